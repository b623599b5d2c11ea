# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Open the folders of converted models. They may come from a stranger, so a config is compared with the weights first.

A config can claim any size in a few bytes. The weights' headers cannot: their tensors are in the file. No model is
built before the two agree on the number of blocks, and only on the meta device before they agree on every shape.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from conversion.checkpoints import open_checkpoint
from conversion.key_tables import block_count
from gpstoken_hf.configuration_gpstoken import GPSTokenConfig
from gpstoken_hf.gaussians import NUM_GAUSSIAN_PARAMS
from gpstoken_hf.layout_bank import GaussianLayoutBank
from gpstoken_hf.modeling_gpstoken import GPSTokenModel
from gpstoken_hf.transformer_sit import SiTTransformer1DModel

MAX_JSON_BYTES = 10 * 2**20

Model = TypeVar("Model", bound=torch.nn.Module)
Shapes = dict[str, tuple[int, ...]]


@contextmanager
def malformed_as_value_error(path: Path, expected: str) -> Iterator[None]:
    """Turn any exception that the contents of a file cause in a library into one `ValueError` that names the file.

    Args:
        path (`Path`): the file or folder that is read in the block.
        expected (`str`): what it must be.

    Raises:
        ValueError: if the block raises anything but an `OSError`.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # libraries raise many types at values that they do not expect
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} must be {expected}, got {type(error).__name__}: {reason}") from error


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: if it is not JSON, or larger than 10 MB.
        OSError: if it cannot be read.
    """
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise ValueError(f"{path} must be at most {MAX_JSON_BYTES} bytes, got {size}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be a JSON file, got {type(error).__name__}: {error}") from None


def check_folder(folder: Path, class_name: str) -> None:
    """Raise `ValueError` unless the folder's `config.json` says that it holds a model of this class."""
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} must be the folder of a {class_name}, got no config.json in it")
    config = read_json(file)
    if not isinstance(config, dict):
        raise ValueError(f"{file} must hold a JSON object, got a {type(config).__name__}")
    architectures = config.get("architectures")
    names = [config.get("_class_name"), *(architectures if isinstance(architectures, list) else [])]
    if class_name not in names:
        found = next((name for name in names if isinstance(name, str)), None)
        raise ValueError(f"{folder} must be the folder of a {class_name}, got that of a {found}")


def read_shapes(folder: Path) -> Shapes:
    """Read the names and shapes of the tensors in a folder from the headers of its safetensors files.

    Raises:
        ValueError: if a file is damaged, or two files hold a tensor of the same name.
    """
    shapes: Shapes = {}
    for file in sorted(folder.glob("*.safetensors")):
        with open_checkpoint(file) as checkpoint:
            found = {key: checkpoint.shape(key) for key in checkpoint.keys()}  # noqa: SIM118 (not a mapping)
        if repeated := sorted(found.keys() & shapes.keys()):
            raise ValueError(f"each tensor in {folder} must be in one file, got {repeated[0]} in several")
        shapes.update(found)
    return shapes


def _check_block_count(folder: Path, shapes: Shapes, prefix: str, claimed: object) -> None:
    found = block_count(shapes, prefix)
    if found != claimed:
        raise ValueError(
            f"the weights in {folder} must be those of its config.json, got {found} blocks {prefix}N for {claimed!r}"
        )


def _check_shapes(folder: Path, shapes: Shapes, expected: Shapes) -> None:
    odd = sorted(name for name in expected.keys() | shapes.keys() if expected.get(name) != shapes.get(name))
    if odd:
        raise ValueError(
            f"the weights in {folder} must be those of its config.json, got {len(odd)} different tensors: "
            f"{odd[0]} must have shape {expected.get(odd[0])}, got {shapes.get(odd[0])}"
        )


def model_shapes(model: torch.nn.Module) -> Shapes:
    """Names and shapes of a model's tensors."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def build_empty(build: Callable[[], Model], path: Path, expected: str) -> Model:
    """Build a model on the meta device, where its weights take no memory.

    Args:
        build (`Callable`): returns the model.
        path (`Path`): the file that its sizes come from, for the message.
        expected (`str`): what that file must be.

    Raises:
        ValueError: if no model has such sizes.
    """
    with malformed_as_value_error(path, expected), torch.device("meta"):
        return build()


def load_empty_gpstoken(folder: Path) -> GPSTokenModel:
    """Build the tokenizer in a folder on the meta device. Its weights fit its config.

    Raises:
        ValueError: if the folder holds something else, is damaged, or its weights have other names or shapes.
    """
    expected = "the config of a GPSTokenModel"
    check_folder(folder, "GPSTokenModel")
    with malformed_as_value_error(folder / "config.json", expected):
        config = GPSTokenConfig.from_pretrained(folder)
    shapes = read_shapes(folder)
    _check_block_count(folder, shapes, "encoder.layers.", config.num_hidden_layers)
    _check_block_count(folder, shapes, "decoder.levels.", len(config.decoder_channel_multipliers))
    _check_block_count(folder, shapes, "decoder.levels.0.blocks.", config.decoder_layers_per_block + 1)
    model = build_empty(lambda: GPSTokenModel(config), folder / "config.json", expected)
    _check_shapes(folder, shapes, model_shapes(model))
    return model


def load_empty_sit(folder: Path) -> SiTTransformer1DModel:
    """Build the generator in a folder on the meta device. Its weights fit its config.

    Raises:
        ValueError: if the folder holds something else, is damaged, or its weights have other names or shapes.
    """
    expected = "the config of a SiTTransformer1DModel"
    check_folder(folder, "SiTTransformer1DModel")
    with malformed_as_value_error(folder / "config.json", expected):
        config = SiTTransformer1DModel.load_config(folder)
    shapes = read_shapes(folder)
    _check_block_count(folder, shapes, "transformer_blocks.", config.get("num_layers"))
    model = build_empty(lambda: SiTTransformer1DModel.from_config(config), folder / "config.json", expected)
    _check_shapes(folder, shapes, model_shapes(model))
    return model


def load_layout_bank(folder: Path) -> GaussianLayoutBank:
    """Load a layout bank.

    Raises:
        ValueError: if the folder holds something else, or its arrays are not those of its config.
    """
    check_folder(folder, "GaussianLayoutBank")
    config = read_json(folder / "config.json")
    num_layouts, total_tokens = config.get("num_layouts"), config.get("total_tokens")
    if type(num_layouts) is not int or type(total_tokens) is not int:
        raise ValueError(
            f"num_layouts and total_tokens in {folder / 'config.json'} must be integers, "
            f"got {num_layouts!r} and {total_tokens!r}"
        )
    expected: Shapes = {
        "gaussians": (total_tokens, NUM_GAUSSIAN_PARAMS),
        "offsets": (num_layouts + 1,),
        "class_labels": (num_layouts,),
    }
    _check_shapes(folder, read_shapes(folder), expected)
    with malformed_as_value_error(folder, "a layout bank"):
        return GaussianLayoutBank.from_pretrained(folder)
