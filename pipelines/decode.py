# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Decode files of tokens to pictures.

    python -m pipelines.decode tokens/photo.safetensors --output pictures/
    python -m pipelines.decode tokens/*.safetensors --size 512 --output pictures/

The files are those of `encode` and `reconstruct`; `photo.safetensors` or `photo.gpst` becomes `photo.png`. A picture
appears only when it is complete. Pictures that this program has written are decoded again; any other file is never
replaced. The exit code is 0 if every file was decoded and 2 if any was not.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from gpstoken_hf.modeling_gpstoken import GPSTokenModel
from gpstoken_hf.visualization import tensor_to_pil

from .shared.checkpoints import DEFAULT_MODEL, load_tokenizer
from .shared.outputs import OutputError, OwnDirectory, atomic_file, own_directory, plan_names
from .shared.programs import (
    EXIT_BAD_INPUT,
    FILE_ERRORS,
    ProgramError,
    make_parser,
    one_line,
    positive_int,
    printable,
    progress,
    run_program,
)
from .shared.tiles import decode_in_tiles
from .shared.token_files import MAX_STORED_PIXELS, load_token_file, load_tokens

PROGRAM = "pipelines.decode"
SUFFIX = ".png"


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    files = {os.path.abspath(path): path for path in args.tokens}
    names = plan_names({key: _names_of(Path(key)) for key in files}, suffixes=[SUFFIX])
    model = load_tokenizer(args.model, args.device)
    failures = []
    with own_directory(args.output, PROGRAM) as folder:
        for key in progress(list(files), "files"):
            label = printable(files[key])
            try:
                _decode_file(model, files[key], names[key] + SUFFIX, folder, args)
            except OutputError:  # the disk is full or read-only, so every other file would fail too
                raise
            except FILE_ERRORS as error:
                failures.append(label)
                tqdm.write(f"error: {label}: {one_line(error)}", file=sys.stderr)
    if failures and len(files) > 1:
        print(f"{len(failures)} of {len(files)} files not decoded: {', '.join(failures)}", file=sys.stderr)
    return EXIT_BAD_INPUT if failures else 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(PROGRAM, __doc__)
    parser.add_argument("tokens", nargs="+", type=Path, metavar="FILE", help="files that encode or reconstruct wrote")
    parser.add_argument(
        "--size", type=positive_int, help="longer side of the pictures, in pixels; default: that of the photograph"
    )
    parser.add_argument("--output", type=Path, default=Path("out/pictures"))
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, help=f"folder or Hub repository; default: the bundled {DEFAULT_MODEL}"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def _names_of(file: Path) -> list[str]:
    """Names for a picture, in order of preference. `reconstruct` makes a folder for each photograph."""
    is_in_own_folder = file.name == "tokens.safetensors" and file.parent.name
    return [file.parent.name if is_in_own_folder else file.stem, file.name]


def _decode_file(model: GPSTokenModel, path: Path, name: str, folder: OwnDirectory, args: argparse.Namespace) -> None:
    folder.check_free([name])
    is_packed = path.suffix.lower() == ".gpst"
    stored = load_token_file(path, model) if is_packed else load_tokens(path, model.config.token_channels)
    if args.size is not None:
        scale = args.size / max(stored.size)
        height, width = (max(1, round(side * scale)) for side in stored.size)
        if height * width > MAX_STORED_PIXELS:
            raise ProgramError(f"--size must give at most {MAX_STORED_PIXELS} pixels, got {width} x {height}")
        # The tiles were those of the photograph. Gaussians are relative to the image, so they fit any size.
        stored = replace(stored, size=(height, width), tile_size=None)
    label = printable(path)
    sample = decode_in_tiles(model, stored.tokens, stored.attention_mask, stored.size, stored.tile_size, label)
    folder.expect([name])
    with atomic_file(folder.path / name) as staging:
        tensor_to_pil(sample[0].cpu()).save(staging)
    (height, width), count = stored.size, int(stored.attention_mask.sum())
    tqdm.write(f"{label}: {width} x {height}, {count} tokens -> {printable(args.output / name)}")


if __name__ == "__main__":
    sys.exit(run_program(main))
