# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Assemble converted components into one GPSTokenPipeline folder.

    python -m conversion.convert_pipeline --tokenizer gpstoken-m128 --transformer gpstoken-sit-xl --layout_bank bank \\
        --output gpstoken

The components are folders that the other converters wrote. Weights are copied as files.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from conversion.folders import (
    load_empty_gpstoken,
    load_empty_sit,
    load_layout_bank,
    malformed_as_value_error,
    read_json,
)
from conversion.model_cards import pipeline_card
from gpstoken_hf.image_processing_gpstoken import GPSTokenImageProcessor
from gpstoken_hf.pipeline_gpstoken import GPSTokenPipeline
from gpstoken_hf.scheduling_flow_match_sde import FlowMatchSDEScheduler
from pipelines.shared.outputs import atomic_directory
from pipelines.shared.programs import run_program
from pipelines.shared.publishing import add_push_options, check_push_options, push_written

# A generator of so many classes is taken for one of ImageNet, unless names are given.
IMAGENET_CLASSES = 1000
COPIED = ("config.json", "*.safetensors", "*.safetensors.index.json")


def read_id2label(path: Path, num_classes: int) -> dict[str, str]:
    """Read class names from a JSON file: an object of class id -> name, or a list in the order of the ids.

    Raises:
        ValueError: if the file holds something else, or an id that is not below `num_classes`.
    """
    names = read_json(path)
    if isinstance(names, list):
        names = {str(label): name for label, name in enumerate(names)}
    if not isinstance(names, dict):
        raise ValueError(
            f"{path} must hold an object of class id -> name or a list of names, got {type(names).__name__}"
        )
    for label, name in names.items():
        if not label.isdecimal() or len(label) > 9 or int(label) >= num_classes:
            raise ValueError(f"class ids in {path} must be integers from 0 to {num_classes - 1}, got {label[:20]!r}")
        if not isinstance(name, str):
            raise ValueError(f"the name of class {label} in {path} must be a string, got {type(name).__name__}")
    return names


def class_names(path: Path | None, num_classes: int) -> dict[str, str] | None:
    """The names of a JSON file, else the names of ImageNet for 1000 classes, else none."""
    if path is not None:
        return read_id2label(path, num_classes)
    if num_classes != IMAGENET_CLASSES:
        return None
    from torchvision.models import ResNet50_Weights  # takes seconds to import

    return {str(label): name for label, name in enumerate(ResNet50_Weights.IMAGENET1K_V1.meta["categories"])}


def build_pipeline(arguments: argparse.Namespace) -> tuple[GPSTokenPipeline, dict[str, Path]]:
    """Build the pipeline on the meta device.

    Args:
        arguments (`argparse.Namespace`): the folders of the components, and `id2label`.

    Returns:
        `tuple[GPSTokenPipeline, dict[str, Path]]`: the pipeline, and the folder of each model in it.

    Raises:
        ValueError: if a folder is damaged or holds something else, or the components do not fit together.
    """
    folders = {
        "vae": arguments.vae,
        "transformer": arguments.transformer,
        "layout_transformer": arguments.layout_transformer,
        "layout_bank": arguments.layout_bank,
    }
    vae = load_empty_gpstoken(arguments.vae)
    transformer = load_empty_sit(arguments.transformer)
    num_classes = transformer.config["num_classes"]
    layout_transformer = None if arguments.layout_transformer is None else load_empty_sit(arguments.layout_transformer)
    bank = None if arguments.layout_bank is None else load_layout_bank(arguments.layout_bank)
    if bank is not None and bank.class_ids[-1] >= num_classes:
        raise ValueError(
            f"the class ids of the bank must be below the transformer's {num_classes}, got {bank.class_ids[-1]}"
        )
    processor, processor_file = None, arguments.vae / "preprocessor_config.json"
    if processor_file.is_file():
        read_json(processor_file)
        with malformed_as_value_error(processor_file, "the config of a GPSTokenImageProcessor"):
            processor = GPSTokenImageProcessor.from_pretrained(arguments.vae)
    pipeline = GPSTokenPipeline(
        vae=vae,
        transformer=transformer,
        scheduler=FlowMatchSDEScheduler(),
        layout_transformer=layout_transformer,
        layout_scheduler=None if layout_transformer is None else FlowMatchEulerDiscreteScheduler(),
        layout_bank=bank,
        image_processor=processor,
        id2label=class_names(arguments.id2label, num_classes),
    )
    return pipeline, {name: folder for name, folder in folders.items() if folder is not None}


def write(pipeline: GPSTokenPipeline, folders: dict[str, Path], output: Path) -> None:
    """Write the files that `save_pretrained` would write. The weights are copied from the components' folders."""
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
    """Load the pipeline and generate one image in two steps.

    Raises:
        ValueError: if the image holds NaN or infinite values.
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
        raise ValueError("the pipeline's image must be finite, got NaN or infinite values")
    print(f"verified: the pipeline generates an image of shape {tuple(images.shape[1:])}")


def convert(arguments: argparse.Namespace) -> None:
    pipeline, folders = build_pipeline(arguments)
    with atomic_directory(arguments.output) as staging:
        write(pipeline, folders, staging)
        if arguments.verify:
            with malformed_as_value_error(arguments.output, "a pipeline that makes images"):
                verify(staging)
    absent = [name for name in ("layout_transformer", "layout_bank") if getattr(pipeline, name) is None]
    if not pipeline.is_one_stage and len(absent) == 2:
        print("without a layout bank or a layout transformer, every call of the pipeline needs the argument layout")
    if arguments.id2label is None and pipeline.config["id2label"] is not None:
        print("class names: those of ImageNet, for 1000 classes; give --id2label for others")
    print(f"wrote {arguments.output}: {', '.join(sorted(folders))}")
    push_written(arguments.output, arguments)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="conversion.convert_pipeline", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--tokenizer",
        dest="vae",
        type=Path,
        required=True,
        help="folder of the tokenizer (convert_gpstoken); the pipeline names it vae",
    )
    parser.add_argument("--transformer", type=Path, required=True, help="folder of the generator (convert_sit)")
    parser.add_argument("--layout_bank", type=Path, help="folder of the layouts (convert_layout_bank)")
    parser.add_argument("--layout_transformer", type=Path, help="folder of a layout generator (convert_sit)")
    parser.add_argument(
        "--id2label",
        type=Path,
        metavar="JSON",
        help="JSON file of class names: an object of id -> name, or a list (default: the names of ImageNet for 1000 "
        "classes, else none)",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--verify", action="store_true", help="load the written pipeline and generate an image in two steps"
    )
    add_push_options(parser)
    arguments = parser.parse_args(argv)
    check_push_options(parser, arguments)
    convert(arguments)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_program(main))
