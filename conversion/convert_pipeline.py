# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Converted components -> one GPSTokenPipeline folder.

    python -m conversion.convert_pipeline --tokenizer gpstoken-m128 --transformer gpstoken-sit-xl --layout-bank bank \\
        --output gpstoken

The components are the folders that the other converters write. Weights are copied as files, not loaded and saved.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from conversion.checkpoints import open_checkpoint
from conversion.model_cards import pipeline_card
from conversion.publishing import push_folder
from gpstoken_hf.configuration_gpstoken import GPSTokenConfig
from gpstoken_hf.image_processing_gpstoken import GPSTokenImageProcessor
from gpstoken_hf.layout_bank import GaussianLayoutBank
from gpstoken_hf.modeling_gpstoken import GPSTokenModel
from gpstoken_hf.pipeline_gpstoken import GPSTokenPipeline
from gpstoken_hf.scheduling_flow_match_sde import FlowMatchSDEScheduler
from gpstoken_hf.transformer_sit import SiTTransformer1DModel
from pipelines.shared.outputs import atomic_directory
from pipelines.shared.programs import run_program

COPIED = ("config.json", "*.safetensors", "*.safetensors.index.json")


def component_folder(path: Path, class_name: str) -> Path:
    """The folder, if its config.json is that of the class.

    Raises:
        ValueError: no such folder, or it holds something else.
    """
    file = path / "config.json"
    if not file.is_file():
        raise ValueError(f"expected the folder of a {class_name}, but {path} has no config.json")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no JSON: {error}") from None
    found = config.get("_class_name") or (config.get("architectures") or [None])[0]
    if found != class_name:
        raise ValueError(f"expected the folder of a {class_name}, {path} holds a {found}")
    return path


def check_weights(folder: Path, model: torch.nn.Module) -> None:
    """Raise ValueError unless the folder's safetensors files hold exactly the model's tensors, by name and shape."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with open_checkpoint(file) as checkpoint:
            found.update({key: checkpoint.shape(key) for key in checkpoint.keys()})  # noqa: SIM118 (not a mapping)
    odd = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if odd:
        raise ValueError(
            f"the weights in {folder} are not those of its config.json: {len(odd)} differ, such as {odd[0]}"
        )


def read_id2label(path: Path | None) -> dict[str, str] | None:
    """Class names from a JSON file: a dict of id -> name, or a list in the order of the ids."""
    if path is None:
        return None
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not all(str(key).isdigit() for key in names):
        raise ValueError(f"{path} must hold a dict of class id -> name, or a list of names")
    return {str(key): str(name) for key, name in names.items()}


def load_sit(path: Path) -> SiTTransformer1DModel:
    """The transformer's shape, without its weights."""
    folder = component_folder(path, "SiTTransformer1DModel")
    with torch.device("meta"):
        model = SiTTransformer1DModel.from_config(SiTTransformer1DModel.load_config(folder))
    check_weights(folder, model)
    return model


def build_pipeline(arguments: argparse.Namespace) -> tuple[GPSTokenPipeline, dict[str, Path]]:
    """The pipeline with its models on the meta device, and the folder of each.

    Raises:
        ValueError: folders of something else, damaged ones, or components that do not fit together.
    """
    folders = {
        "vae": component_folder(arguments.vae, "GPSTokenModel"),
        "transformer": arguments.transformer,
        "layout_transformer": arguments.layout_transformer,
        "layout_bank": arguments.layout_bank,
    }
    with torch.device("meta"):
        vae = GPSTokenModel(GPSTokenConfig.from_pretrained(arguments.vae))
    check_weights(arguments.vae, vae)
    transformer = load_sit(arguments.transformer)
    layout_transformer = None if arguments.layout_transformer is None else load_sit(arguments.layout_transformer)
    bank = None
    if arguments.layout_bank is not None:
        bank = GaussianLayoutBank.from_pretrained(component_folder(arguments.layout_bank, "GaussianLayoutBank"))
        num_classes = transformer.config["num_classes"]
        if bank.class_ids[-1] >= num_classes:
            raise ValueError(
                f"the transformer knows classes 0 to {num_classes - 1}, the bank has {bank.class_ids[-1]}"
            )
    processor_file = arguments.vae / "preprocessor_config.json"
    pipeline = GPSTokenPipeline(
        vae=vae,
        transformer=transformer,
        scheduler=FlowMatchSDEScheduler(),
        layout_transformer=layout_transformer,
        layout_scheduler=None if layout_transformer is None else FlowMatchEulerDiscreteScheduler(),
        layout_bank=bank,
        image_processor=GPSTokenImageProcessor.from_pretrained(arguments.vae) if processor_file.is_file() else None,
        id2label=read_id2label(arguments.id2label),
    )
    return pipeline, {name: folder for name, folder in folders.items() if folder is not None}


def write(pipeline: GPSTokenPipeline, folders: dict[str, Path], output: Path) -> None:
    """Model folders copied, the rest saved: what `save_pretrained` would write, with the weights as they are."""
    for name, folder in folders.items():
        (output / name).mkdir()
        for pattern in COPIED:
            for file in folder.glob(pattern):
                shutil.copyfile(file, output / name / file.name)
    for name in ("scheduler", "layout_scheduler", "image_processor"):
        if getattr(pipeline, name) is not None:
            getattr(pipeline, name).save_pretrained(output / name)
    pipeline.save_config(output)
    (output / "README.md").write_text(pipeline_card(pipeline), encoding="utf-8")


def verify(folder: Path) -> None:
    """Load the pipeline and take two steps of one image.

    Raises:
        ValueError: the image is not finite.
    """
    pipeline = GPSTokenPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    config = pipeline.vae.config
    label, layout = 0, None
    if pipeline.layout_bank is not None:
        label = pipeline.layout_bank.class_ids[0]
    elif pipeline.layout_transformer is None and not pipeline.is_one_stage:
        image = torch.linspace(0, 1, config.image_size).expand(1, 3, config.image_size, config.image_size)
        layout = image.clone()
    images = pipeline(
        [label],
        num_inference_steps=2,
        num_layout_steps=2,
        layout=layout,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    if not torch.isfinite(images).all():
        raise ValueError("the pipeline's image holds NaN or infinite values")
    print(f"verified: the pipeline loads and makes an image of {tuple(images.shape[1:])}")


def convert(arguments: argparse.Namespace) -> None:
    pipeline, folders = build_pipeline(arguments)
    with atomic_directory(arguments.output) as staging:
        write(pipeline, folders, staging)
        if arguments.verify:
            verify(staging)
    absent = [name for name in ("layout_transformer", "layout_bank") if getattr(pipeline, name) is None]
    if not pipeline.is_one_stage and len(absent) == 2:
        print("neither layout bank nor layout transformer: every call of the pipeline must be given a layout")
    print(f"wrote {arguments.output}: {', '.join(sorted(folders))}")
    if arguments.push_to_hub:
        print(push_folder(arguments.output, arguments.push_to_hub))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="conversion.convert_pipeline", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--tokenizer",
        "--vae",
        dest="vae",
        type=Path,
        required=True,
        help="folder of the tokenizer (convert_gpstoken); the pipeline's component is called vae",
    )
    parser.add_argument("--transformer", type=Path, required=True, help="folder of the generator (convert_sit)")
    parser.add_argument("--layout-bank", type=Path, help="folder of the layouts (convert_layout_bank)")
    parser.add_argument("--layout-transformer", type=Path, help="folder of a generator of layouts")
    parser.add_argument("--id2label", type=Path, metavar="JSON", help="class names: id -> name, or a list of names")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--verify", action="store_true", help="load the written pipeline and make an image in two steps"
    )
    parser.add_argument("--push-to-hub", metavar="REPO", help="upload the written folder to this model repository")
    convert(parser.parse_args(argv))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_program(main))
