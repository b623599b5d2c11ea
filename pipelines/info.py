# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Say what a checkpoint is: its class, parameters, tokens, sizes and licence.

    python -m pipelines.info gpstoken-nano
    python -m pipelines.info runs/nano/model owner/name

A checkpoint is a folder, a Hub repository or the name of a bundled one. Only its configs and its card are read, so
nothing large is downloaded. Parameters are counted on a model without memory. The exit code is 2 if any is none of
ours.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

import gpstoken_hf
from gpstoken_hf.file_checks import read_json, refusing
from gpstoken_hf.transformer_sit import SiTTransformer1DModel

from .shared.checkpoints import find_checkpoint, quiet_loading
from .shared.programs import EXIT_BAD_INPUT, FILE_ERRORS, ProgramError, make_parser, one_line, printable, run_program

PROGRAM = "pipelines.info"
CONFIG, INDEX, CARD = "config.json", "model_index.json", "README.md"
MAX_CARD_BYTES = 2**20

Rows = list[tuple[str, str]]


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(PROGRAM, __doc__)
    parser.add_argument("model", nargs="+", help="folder, Hub repository owner/name, or name of a bundled checkpoint")
    args: argparse.Namespace = parser.parse_args(argv)
    failed = False
    for number, name in enumerate(args.model):
        try:
            rows = describe(name)
        except (*FILE_ERRORS, HfHubHTTPError) as error:
            failed = True
            print(f"error: {printable(name)}: {one_line(error)}", file=sys.stderr)
            continue
        width = max(len(key) for key, _ in rows)
        text = "\n".join(f"{key:<{width}}  {printable(value)}" for key, value in rows)
        print(f"\n{text}" if number else text)
    return EXIT_BAD_INPUT if failed else 0


def describe(name: str) -> Rows:
    """What a checkpoint is, as pairs of a heading and a text.

    Args:
        name (`str`): A folder, a Hub repository or the name of a bundled checkpoint.

    Returns:
        `list[tuple[str, str]]`: The rows, in the order in which they are read.

    Raises:
        ProgramError: If there is no such checkpoint, or if it holds no model of this package.
        ValueError: If a config is damaged or does not fit its class.
        OSError: If a repository cannot be reached or a file cannot be read.
    """
    source = find_checkpoint(name, "MODEL")
    rows: Rows = [("checkpoint", name)]
    if (index := _file(source, INDEX)) is not None:
        rows += _describe_pipeline(source, index)
    elif (config := _file(source, CONFIG)) is not None:
        rows += _describe_model(config)
    else:
        raise ProgramError(f"MODEL must hold {CONFIG} or {INDEX}, got neither")
    if Path(source).is_dir():
        weights = sum(file.stat().st_size for file in Path(source).rglob("*.safetensors") if file.is_file())
        rows.append(("weights", f"{weights / 1e6:.1f} MB"))
    rows.append(("licence", _licence(source)))
    return rows


def _file(source: str, name: str, subfolder: str | None = None) -> Path | None:
    """A file of a folder or of a Hub repository, downloaded if need be; `None` if the checkpoint has none."""
    if Path(source).is_dir():
        path = Path(source, subfolder or "", name)
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(source, name, subfolder=subfolder))
    except LocalEntryNotFoundError as error:
        raise OSError(f"{source} cannot be reached, and {name} is not in the cache") from error
    except EntryNotFoundError:
        return None


def _class_name(config: dict[str, Any]) -> Any:
    """The class that a config names. The remote-code edition names a file and its class."""
    name = config.get("_class_name")
    return name[-1] if isinstance(name, list) and name else name


def _describe_pipeline(source: str, path: Path) -> Rows:
    index = read_json(path)
    if _class_name(index) != "GPSTokenPipeline":
        raise ProgramError(f"MODEL must be a GPSTokenPipeline or one of its models, got {_class_name(index)!r}")
    index = gpstoken_hf.GPSTokenPipeline.check_config_file(path)
    rows: Rows = [("class", "GPSTokenPipeline: class label -> layout -> texture -> image")]
    parts = {name: entry for name, entry in index.items() if isinstance(entry, list) and len(entry) == 2 and entry[1]}
    for part, (_, class_name) in parts.items():
        config = _file(source, CONFIG, subfolder=part)
        if config is None:
            rows.append((part, str(class_name)))
        else:
            described = _describe_model(config)
            rows += [(part if key == "class" else f"  {key}", text) for key, text in described]
    labels = index.get("id2label")
    if isinstance(labels, dict) and labels:
        shown = ", ".join(str(label).split(",")[0] for label in list(labels.values())[:10])
        rows.append(("classes", f"{len(labels)}: {shown}{', ...' if len(labels) > 10 else ''}"))
    layouts = [kind for kind, part in (("generated", "layout_transformer"), ("bank", "layout_bank")) if part in parts]
    rows.append(("layouts", " or ".join(layouts) or "none: layout and texture in one stage, or layouts from outside"))
    return rows


def _describe_model(path: Path) -> Rows:
    """Rows of the model with this config."""
    config = read_json(path)
    if config.get("model_type") == "gpstoken":
        with quiet_loading():
            settings = gpstoken_hf.GPSTokenConfig.from_pretrained(path.parent)
            with torch.device("meta"):
                model = gpstoken_hf.GPSTokenModel(settings)
        return _tokenizer_rows("GPSTokenModel: image <-> tokens", model, settings)
    class_name = _class_name(config)
    for model_class in (gpstoken_hf.AutoencoderGPSToken, SiTTransformer1DModel, gpstoken_hf.GaussianLayoutBank):
        if class_name == model_class.__name__:
            values = {key: value for key, value in model_class.check_config_file(path).items() if key[:1] != "_"}
            with refusing(path), torch.device("meta"):
                model = model_class(**values)
            break
    else:
        known = "GPSTokenPipeline, GPSTokenModel, AutoencoderGPSToken, SiTTransformer1DModel or GaussianLayoutBank"
        raise ProgramError(f"MODEL must be a {known}, got {class_name or config.get('model_type')!r}")
    if isinstance(model, SiTTransformer1DModel):
        return _transformer_rows(model)
    if isinstance(model, gpstoken_hf.GaussianLayoutBank):
        count, total = model.config.num_layouts, model.config.total_tokens
        return [
            ("class", "GaussianLayoutBank: stored layouts per class"),
            ("layouts", f"{count} of {total / count:.4g} tokens"),
        ]
    return _tokenizer_rows("AutoencoderGPSToken: image <-> latents on a grid", model, model.config)


def _tokenizer_rows(title: str, model: torch.nn.Module, config: Any) -> Rows:
    scale = 2 ** (len(config.decoder_channel_multipliers) - 1)
    return [
        ("class", title),
        ("parameters", _in_millions(model)),
        ("tokens", f"{config.num_tokens} per image of training, each 5 + {config.texture_channels} numbers"),
        ("images", f"{config.image_size} x {config.image_size} pixels in training, any size in use"),
        ("map", f"{scale} image pixels per map pixel, {config.texture_channels} channels"),
        ("regions", f"at least {config.min_region_size} pixels wide"),
        ("transformer", f"{config.num_hidden_layers} blocks of width {config.hidden_size}"),
    ]


def _transformer_rows(model: SiTTransformer1DModel) -> Rows:
    config = model.config
    if config.condition_channels is not None:
        makes = "texture, for a layout"
    else:
        makes = "layouts" if config.in_channels == 5 else "layout and texture in one stage"
    width = config.num_attention_heads * config.attention_head_dim
    return [
        ("class", f"SiTTransformer1DModel: generates {makes}"),
        ("parameters", _in_millions(model)),
        ("tokens", f"{config.sample_size} of {config.in_channels} numbers"),
        ("classes", str(config.num_classes)),
        ("transformer", f"{config.num_layers} blocks of width {width}"),
    ]


def _in_millions(model: torch.nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f} M"


def _licence(source: str) -> str:
    """The licence that the card's header names."""
    path = _file(source, CARD)
    if path is None:
        return "not stated: no model card"
    with path.open(encoding="utf-8", errors="replace") as file:
        lines = file.read(MAX_CARD_BYTES).splitlines()
    if lines and lines[0].strip() == "---":
        for line in lines[1:]:
            if line.strip() == "---":
                break
            key, _, value = line.partition(":")
            if key == "license" and value.strip():
                return value.strip().strip("'\"")
    return "not stated in the model card"


if __name__ == "__main__":
    sys.exit(run_program(main))
