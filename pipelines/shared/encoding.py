# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Encode photographs: the options, the inputs and the steps of the programs that do it.

Shapes: H x W pixels, L tokens of 5 + C channels.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from tqdm import tqdm

import gpstoken_hf
from gpstoken_hf.image_processing_gpstoken import GPSTokenImageProcessor, open_image
from gpstoken_hf.modeling_gpstoken import GPSTokenModel
from gpstoken_hf.token_file import MAX_STEP, MIN_STEP

from .checkpoints import DEFAULT_MODEL
from .outputs import plan_names
from .photographs import Photograph, file_digest, find_photographs, sample_photograph
from .programs import (
    PixelBox,
    ProgramError,
    non_negative_float,
    non_negative_int,
    pixel_box,
    positive_float,
    positive_int,
    printable,
)
from .tiles import choose_tile_size, num_tiles, tile_bar

SAMPLES = ("astronaut", "chelsea", "coffee", "rocket")


@dataclass
class Source:
    """One image to encode, and the name of its results, relative to the output."""

    label: str
    name: str
    read: Callable[[], PIL.Image.Image]
    digest: Callable[[], str]


# ---------------------------------------------------------------------------------------------------------- options


def add_encoding_options(parser: argparse.ArgumentParser, output: Path) -> None:
    """The options that choose the model, the number of tokens and where they go."""
    parser.add_argument(
        "--tokens", type=positive_int, help="tokens per image; default: as many per pixel as in training"
    )
    parser.add_argument(
        "--target_psnr", type=positive_float, metavar="DB", help="the fewest tokens that reach this PSNR, in dB"
    )
    parser.add_argument(
        "--max_tokens", type=positive_int, help="most tokens with --target_psnr; default: four times as in training"
    )
    parser.add_argument(
        "--focus",
        type=pixel_box,
        action="append",
        default=[],
        metavar="x0,y0,x1,y1",
        help="spend more tokens in this box of the original image, inclusive pixels; may be repeated",
    )
    parser.add_argument(
        "--importance", metavar="MASK", help="image of the photograph's size; more tokens where it is white"
    )
    parser.add_argument(
        "--focus_weight",
        type=non_negative_float,
        default=30.0,
        help="importance per pixel of a focus box or a white mask; far larger values also split flat parts",
    )
    parser.add_argument("--output", type=Path, default=output)
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, help=f"folder or Hub repository; default: the bundled {DEFAULT_MODEL}"
    )
    parser.add_argument(
        "--tile_size",
        type=positive_int,
        help="side of the tiles, in pixels; default: one pass, tiles for large images",
    )
    parser.add_argument(
        "--max_side", type=non_negative_int, default=640, help="reduce larger images to this side, in pixels; 0: never"
    )
    parser.add_argument(
        "--step",
        type=positive_float,
        help="round the values of a .gpst file to this step, in standard deviations of a channel, for example 0.5; "
        "default: lossless",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--overwrite", action="store_true", help="replace results of this program")


def check_target(args: argparse.Namespace) -> None:
    """Refuse options for the number of tokens that do not go together."""
    if args.target_psnr is not None and args.tokens is not None:
        raise ProgramError("--tokens must not come with --target_psnr, which chooses their number (see --max_tokens)")
    if args.max_tokens is not None and args.target_psnr is None:
        raise ProgramError("--max_tokens must come with --target_psnr; --tokens sets their number")


def check_step(step: float | None, option: str, writes_token_file: bool) -> None:
    """Refuse a `--step` out of its range, or without the `option` that writes a `.gpst` file."""
    if step is not None and not writes_token_file:
        raise ProgramError(f"--step must come with {option}, whose values it rounds")
    if step is not None and not MIN_STEP <= step <= MAX_STEP:
        raise ProgramError(f"--step must be from {MIN_STEP} to {MAX_STEP}, got {step}")


def encoding_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What decides how a photograph is encoded, as it is recorded beside the results."""
    return {
        "version": gpstoken_hf.__version__,
        "model": args.model,
        "tokens": args.tokens,
        "focus": args.focus,
        "focus_weight": args.focus_weight,
        "importance": args.importance and file_digest(args.importance),
        "tile_size": args.tile_size,
        "max_side": args.max_side,
        "target_psnr": args.target_psnr,
        "max_tokens": args.max_tokens,
        "step": args.step,
    }


# ----------------------------------------------------------------------------------------------------------- inputs


def collect_sources(
    paths: Sequence[Path], output: Path, reserved: Sequence[str] = (), suffixes: Sequence[str] = ("",)
) -> list[Source]:
    """Plan a source, with a unique name for its results, for each file and for each image of a folder.

    Without paths, the sample photographs. `reserved` and `suffixes` are those of `plan_names`.

    `photo.jpg` becomes `photo`, or `photo.jpg` where another result would share, contain or lie in that name, or
    `photo.jpg-<hash of its path>` where even that is taken.

    Raises:
        ProgramError: If a path does not exist, or if a folder holds no image.
    """
    if not paths:
        return [
            Source(f"sample {name}", name, partial(sample_photograph, name), partial(str, f"skimage.data.{name}"))
            for name in SAMPLES
        ]
    root = os.path.abspath(output)
    files: dict[str, Path] = {}  # one source for each file, however often and by which way it was named
    names: dict[str, Path] = {}
    for file, name in find_photographs(paths):
        key = os.path.abspath(file)
        files.setdefault(key, file)
        names[key] = min(name, names.get(key, name), key=lambda path: (len(path.parts), path))
    inputs = [Path(key).relative_to(root).as_posix() for key in files if Path(key).is_relative_to(root)]
    candidates = {key: _result_names(name) for key, name in names.items()}
    planned = plan_names(candidates, [*inputs, *reserved], suffixes)
    return [
        Source(printable(file), planned[key], partial(open_image, file), partial(file_digest, file))
        for key, file in files.items()
    ]


def _result_names(name: Path) -> list[str]:
    stem = name.name.removesuffix(name.suffix)
    shared = [] if stem in ("", ".", "..") else [(name.parent / stem).as_posix()]
    return [*shared, name.as_posix()]


def read_mask(path: str) -> torch.Tensor:
    """Read a mask as (1, H, W) in [0, 1], the mean of its channels."""
    mask = GPSTokenImageProcessor(do_normalize=False)(open_image(path), return_tensors="pt").pixel_values
    return mask.mean(dim=1)


def importance_map(
    photograph: Photograph, mask: torch.Tensor | None, boxes: Sequence[PixelBox], weight: float
) -> torch.Tensor | None:
    """Turn a mask and boxes, in pixels of the original, into importance (1, H, W) at the size of the model's input.

    Raises:
        ProgramError: If the mask has another size than the original, or if a box reaches beyond it.
    """
    height, width = photograph.original_size
    total = torch.zeros(1, height, width)
    if mask is not None:
        if mask.shape != total.shape:
            raise ProgramError(
                f"--importance must have the image's {width} x {height} pixels, got {mask.shape[2]} x {mask.shape[1]}"
            )
        total += weight * mask
    for x0, y0, x1, y1 in boxes:
        if x1 >= width or y1 >= height:
            raise ProgramError(
                f"--focus must lie inside the image's {width} x {height} pixels, got {x0},{y0},{x1},{y1}"
            )
        total[:, y0 : y1 + 1, x0 : x1 + 1] += weight
    if mask is None and not boxes:
        return None
    if photograph.size != photograph.original_size:
        total = torch.nn.functional.interpolate(total[None], photograph.size, mode="area")[0]
    return total


# --------------------------------------------------------------------------------------------------------- encoding


def default_num_tokens(model: GPSTokenModel, size: tuple[int, int]) -> int:
    """The number of tokens that gives an image as many tokens per pixel as in training."""
    return max(1, round(model.config.num_tokens * size[0] * size[1] / model.config.image_size**2))


def encode_photograph(
    model: GPSTokenModel, photograph: Photograph, mask: torch.Tensor | None, args: argparse.Namespace, label: str
) -> tuple[Any, int | None]:
    """Encode a photograph as the options say.

    A large one is encoded in tiles, with a word about it and a progress bar.

    Returns:
        `tuple[GPSTokenEncoderOutput, int | None]`: The tokens, and the side of its tiles, `None` for one pass.

    Raises:
        ProgramError: If the mask or a focus box does not fit the photograph.
    """
    (old_height, old_width), (height, width) = photograph.original_size, photograph.size
    if photograph.size != photograph.original_size:
        tqdm.write(
            f"{label}: reduced from {old_width} x {old_height} to {width} x {height} (--max_side {args.max_side})"
        )
    importance = importance_map(photograph, mask, args.focus, args.focus_weight)
    num_tokens = args.tokens or default_num_tokens(model, photograph.size)
    tile_size = args.tile_size or choose_tile_size(model, photograph.size, num_tokens)
    num_parts = 1 if tile_size is None else num_tiles(photograph.size, tile_size)
    if tile_size is not None and args.tile_size is None:
        tqdm.write(
            f"{label}: {width} x {height} pixels are too many for one pass: encoded in {num_parts} tiles of "
            f"{tile_size} pixels (--tile_size chooses another side)"
        )
    with tile_bar(model.encoder, num_parts, f"encode {label}"), torch.inference_mode():
        encoded = model.encode(
            photograph.pixel_values.to(model.device),
            num_tokens=num_tokens if args.target_psnr is None else None,
            importance=None if importance is None else importance.to(model.device),
            tile_size=tile_size,
            target_psnr=args.target_psnr,
            max_tokens=args.max_tokens,
        )
    return encoded, tile_size
