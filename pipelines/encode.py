# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Encode photographs as files of tokens.

    python -m pipelines.encode photo.jpg more.png folder/ --tokens 256 --output tokens/
    python -m pipelines.encode photo.jpg --focus 120,40,260,200 --output tokens/
    python -m pipelines.encode photo.jpg --target_psnr 24 --format gpst --output tokens/

For `photo.jpg` the output folder gets

    photo.safetensors     tokens, initial Gaussians and regions; `decode` turns them into a picture; with --format gpst
                          a smaller token file in its place, photo.gpst
    photo.png             the refined Gaussians over the photograph, one sigma
    photo.json            size, number of tokens and floats, settings

The same command resumes an interrupted run: finished photographs are skipped. Results of other settings are an error
unless --overwrite replaces them, and only files that this program has listed in `.gpstoken.json` are ever replaced.
Large photographs are encoded in tiles. The exit code is 0 if every photograph was encoded and 2 if any was not.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from gpstoken_hf.modeling_gpstoken import GPSTokenModel
from gpstoken_hf.visualization import draw_gaussians, tensor_to_pil

from .shared.checkpoints import load_tokenizer, weights_fingerprint
from .shared.encoding import (
    Source,
    add_encoding_options,
    check_step,
    check_target,
    collect_sources,
    encode_photograph,
    encoding_settings,
    read_mask,
)
from .shared.outputs import OutputError, OwnDirectory, atomic_file, own_directory
from .shared.photographs import read_photograph
from .shared.programs import (
    EXIT_BAD_INPUT,
    FILE_ERRORS,
    ProgramError,
    make_parser,
    one_line,
    printable,
    progress,
    run_program,
)
from .shared.token_files import save_token_file, save_tokens

PROGRAM = "pipelines.encode"
DRAWN_SIDE = 512  # small images are drawn enlarged, to about this many pixels


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    check_target(args)
    check_step(args.step, "--format gpst", args.format == "gpst")
    sources = collect_sources(args.images, args.output, suffixes=[f".{kind}" for kind in kinds_of(args.format)])
    mask = None if args.importance is None else read_mask(args.importance)
    model = load_tokenizer(args.model, args.device)
    settings = {**encoding_settings(args), "weights": weights_fingerprint(model), "format": args.format}
    failures = []
    with own_directory(args.output, PROGRAM) as folder:
        for source in progress(sources, "images"):
            try:
                _encode_source(model, source, mask, settings, folder, args)
            except OutputError:  # the disk is full or read-only, so every other photograph would fail too
                raise
            except FILE_ERRORS as error:
                failures.append(source.label)
                tqdm.write(f"error: {source.label}: {one_line(error)}", file=sys.stderr)
    if failures and len(sources) > 1:
        print(f"{len(failures)} of {len(sources)} images not encoded: {', '.join(failures)}", file=sys.stderr)
    return EXIT_BAD_INPUT if failures else 0


def kinds_of(token_format: str) -> tuple[str, ...]:
    """The endings of the files of one photograph, in the order in which they are written."""
    return token_format, "png", "json"


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(PROGRAM, __doc__)
    parser.add_argument("images", nargs="+", type=Path, help="image files, and folders that are searched recursively")
    add_encoding_options(parser, output=Path("out/tokens"))
    parser.add_argument(
        "--format",
        choices=("safetensors", "gpst"),
        default="safetensors",
        help="gpst: smaller files, which only the same weights read",
    )
    return parser.parse_args(argv)


def _encode_source(
    model: GPSTokenModel,
    source: Source,
    mask: torch.Tensor | None,
    settings: dict[str, Any],
    folder: OwnDirectory,
    args: argparse.Namespace,
) -> None:
    names = {kind: f"{source.name}.{kind}" for kind in kinds_of(args.format)}
    settings = {**settings, "source": source.digest()}
    if not args.overwrite and _is_done(folder.path, names, args.format, settings):
        tqdm.write(f"{source.label}: done before, skipped (--overwrite replaces it)")
        return
    folder.check_free(names.values())

    photograph = read_photograph(source.read(), args.max_side)
    encoded, tile_size = encode_photograph(model, photograph, mask, args, source.label)
    height, width = photograph.size
    num_tokens = int(encoded.attention_mask.sum())
    facts = {"width": width, "height": height, "tokens": num_tokens, "floats": num_tokens * encoded.tokens.shape[-1]}
    if args.target_psnr is not None:
        facts["reached"] = bool(encoded.reached[0])
    picture = draw_gaussians(
        tensor_to_pil(photograph.pixel_values[0]),
        encoded.tokens[0, :, :5].cpu(),
        encoded.attention_mask[0].cpu(),
        zoom=max(1, round(DRAWN_SIDE / max(photograph.size))),
        align_corners=model.config.align_corners,
    )
    folder.expect(names.values())
    tokens_file = folder.path / names[args.format]
    if args.format == "gpst":
        save_token_file(tokens_file, encoded, photograph.size, model, tile_size, args.step)
    else:
        with atomic_file(tokens_file) as staging:
            save_tokens(staging, encoded, photograph.size, tile_size, args.model)
    with atomic_file(folder.path / names["png"]) as staging:
        picture.save(staging)
    # The last file: where it is, the others are.
    with atomic_file(folder.path / names["json"]) as staging:
        staging.write_text(json.dumps({**facts, "settings": settings}, indent=2) + "\n", encoding="utf-8")
    words = f"{width} x {height}, {num_tokens} tokens, {facts['floats']} floats, {tokens_file.stat().st_size} bytes"
    if not facts.get("reached", True):
        words += f", short of {args.target_psnr:g} dB"
    tqdm.write(f"{source.label}: {words} -> {printable(args.output / names[args.format])}")


def _is_done(folder: Path, names: dict[str, str], kind: str, settings: dict[str, Any]) -> bool:
    """Whether an earlier run has written the results of these settings.

    Raises:
        ProgramError: If it has written results of other settings.
    """
    path = folder / names["json"]
    if not path.is_file():
        return False
    try:
        same = json.loads(path.read_text(encoding="utf-8"))["settings"] == json.loads(json.dumps(settings))
    except (ValueError, LookupError, TypeError, RecursionError):
        same = False
    if not same:
        raise ProgramError(f"{path} is of other settings; choose another --output, or --overwrite")
    return (folder / names[kind]).is_file()


if __name__ == "__main__":
    sys.exit(run_program(main))
