# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Encode photographs as Gaussian tokens, decode them again, and draw what the tokens do.

    python -m pipelines.reconstruct photo.jpg more.png folder/ --tokens 256 --output out/
    python -m pipelines.reconstruct photo.jpg --focus 120,40,260,200 --output out/
    python -m pipelines.reconstruct --from_tokens out/photo/tokens.safetensors --output out/
    python -m pipelines.reconstruct photo.jpg --target_psnr 28 --to_file photo.gpst --step 0.5 --output out/
    python -m pipelines.reconstruct --from_file photo.gpst --output out/

Without an image the program takes four sample photographs of scikit-image. Each image gets its own folder:

    reconstruction.png          the decoded image
    initial_gaussians.png       the Gaussians of the regions, one sigma, over the image
    refined_gaussians.png       the Gaussians after refinement by the encoder
    error.png                   the error of each pixel, in 8-bit levels
    panel.png                   all of these side by side
    tokens.safetensors          tokens, initial Gaussians and regions; --from_tokens decodes them again
    scores.json                 PSNR, SSIM, number of tokens and floats, settings

With --target_psnr each image gets the fewest tokens that reach it. --to_file writes the tokens of one image as a small
.gpst file, lossless or with a --step, and --from_file decodes such files.

A folder appears only when it is complete. The same command resumes an interrupted run: finished images are skipped.
Results of other settings are an error unless --overwrite replaces them, and only files that this program has listed in
`.gpstoken.json` are ever replaced. Large photographs are encoded and decoded in tiles. The exit code is 0 if every
image was reconstructed and 2 if any was not.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from tqdm import tqdm

import gpstoken_hf
from gpstoken_hf.metrics import SSIM_WINDOW, psnr, ssim
from gpstoken_hf.modeling_gpstoken import GPSTokenModel
from gpstoken_hf.visualization import contact_sheet, draw_boxes, draw_error_map, draw_gaussians, panel, tensor_to_pil

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
from .shared.outputs import (
    BusyError,
    OutputError,
    atomic_directory,
    atomic_file,
    claim_file,
    plan_names,
    remove_left_over,
)
from .shared.photographs import (
    Photograph,
    file_digest,
    read_photograph,
)
from .shared.programs import (
    EXIT_BAD_INPUT,
    FILE_ERRORS,
    PixelBox,
    ProgramError,
    make_parser,
    one_line,
    printable,
    progress,
    run_program,
)
from .shared.tiles import decode_in_tiles
from .shared.token_files import (
    StoredTokens,
    check_replaceable_token_file,
    load_token_file,
    load_tokens,
    save_token_file,
    save_tokens,
)

PROGRAM = "pipelines.reconstruct"
TOKENS_FILE, SCORES_FILE, OVERVIEW_FILE = "tokens.safetensors", "scores.json", "overview.png"
DRAWN_SIDE = 512  # small images are drawn enlarged, to about this many pixels
MAX_PANELS_IN_OVERVIEW = 16
WAIT_SECONDS = 0.5
SSIM_BAND_ROWS = 128


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    if args.from_tokens or args.from_file:
        option = "--from_tokens" if args.from_tokens else "--from_file"
        making = (args.focus, args.importance, args.tokens, args.tile_size, args.target_psnr, args.to_file)
        if args.images or any(making) or (args.from_tokens and args.from_file):
            raise ProgramError(
                f"{option} must come without images and the options that choose, place or store tokens: it decodes "
                "tokens as they were stored"
            )
        return _decode_files(args)
    check_target(args)
    check_step(args.step, "--to_file", args.to_file is not None)
    if args.to_file and args.to_file.suffix != ".gpst":
        raise ProgramError(f"--to_file must end in .gpst, got {args.to_file}")

    sources = collect_sources(args.images, args.output, [OVERVIEW_FILE])
    if args.to_file and len(sources) > 1:
        raise ProgramError(f"--to_file must come with one image, got {len(sources)}")
    if args.to_file:
        folder = args.output / sources[0].name
        if Path(os.path.realpath(args.to_file)).is_relative_to(os.path.realpath(folder)):
            raise ProgramError(f"--to_file must lie outside of {folder}, which is written whole, got {args.to_file}")
    settings = {**encoding_settings(args), "to_file": args.to_file and printable(args.to_file)}
    mask = None if args.importance is None else read_mask(args.importance)
    model = load_tokenizer(args.model, args.device)
    settings["weights"] = weights_fingerprint(model)
    if len(sources) > 1:
        claim_file(args.output / OVERVIEW_FILE, PROGRAM)

    def work(source: Source) -> dict[str, Any]:
        return _reconstruct_source(model, source, mask, settings, args)

    done, failures = _run_batch(sources, "images", [source.label for source in sources], work)
    if len(done) > 1:
        _write_overview(args.output, [args.output / source.name for source, _ in done])
        scores = [scores for _, scores in done]
        print(
            f"{len(done)} images: mean PSNR {_mean(scores, 'psnr'):.2f} dB, mean SSIM {_mean(scores, 'ssim'):.4f}, "
            f"see {printable(args.output / OVERVIEW_FILE)}"
        )
    return _report(failures, len(sources), "images not reconstructed")


def _run_batch(
    items: Sequence[Any], unit: str, labels: Sequence[str], work: Callable[[Any], Any]
) -> tuple[list[tuple[Any, Any]], list[str]]:
    """Work on every item, also after failures. Returns finished items with their results, and labels of failures."""
    results: dict[int, Any] = {}
    failures: list[str] = []
    busy: list[int] = []

    def attempt(index: int, waits: bool) -> bool:
        try:
            results[index] = work(items[index])
        except OutputError:  # the disk is full or read-only, so every other item would fail too
            raise
        except FILE_ERRORS as error:
            if waits and isinstance(error, BusyError):
                return False
            failures.append(labels[index])
            tqdm.write(f"error: {labels[index]}: {one_line(error)}", file=sys.stderr)
        return True

    for index in progress(range(len(items)), unit):
        if not attempt(index, waits=len(items) > 1):
            busy.append(index)
    # Another run has been writing these. Once it is done, there is nothing left to do, or else the work falls to us.
    for index in busy:
        tqdm.write(f"{labels[index]}: waiting for the run that is writing it", file=sys.stderr)
        while not attempt(index, waits=True):
            time.sleep(WAIT_SECONDS)
    return [(items[index], results[index]) for index in sorted(results)], failures


def _report(failures: Sequence[str], count: int, what: str) -> int:
    if failures and count > 1:
        print(f"{len(failures)} of {count} {what}: {', '.join(failures)}", file=sys.stderr)
    return EXIT_BAD_INPUT if failures else 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(PROGRAM, __doc__)
    parser.add_argument("images", nargs="*", type=Path, help="image files, and folders that are searched recursively")
    add_encoding_options(parser, output=Path("out"))
    parser.add_argument("--to_file", type=Path, metavar="X.gpst", help="also write the tokens as a small file")
    parser.add_argument("--from_file", type=Path, nargs="+", metavar="X.gpst", help="decode files of --to_file")
    parser.add_argument(
        "--from_tokens", type=Path, nargs="+", metavar=TOKENS_FILE, help="decode stored tokens instead of images"
    )
    return parser.parse_args(argv)


# -------------------------------------------------------------------------------------------------- reconstruction


def _reconstruct_source(
    model: GPSTokenModel, source: Source, mask: torch.Tensor | None, settings: dict, args: argparse.Namespace
) -> dict[str, Any]:
    folder = args.output / source.name
    settings = {**settings, "source": source.digest()}
    known = _done_before(folder, settings, source.label, args.overwrite)
    if known is not None and (args.to_file is None or args.to_file.is_file()):
        return known
    if known is not None:
        raise ProgramError(f"{args.to_file} is gone since {folder} was written; --overwrite writes both again")
    if args.to_file:
        check_replaceable_token_file(args.to_file, args.overwrite)

    photograph = read_photograph(source.read(), args.max_side)
    pixel_values = photograph.pixel_values.to(model.device)
    with atomic_directory(folder, args.overwrite, PROGRAM) as staging:
        encoded, tile_size = encode_photograph(model, photograph, mask, args, source.label)
        reconstruction = decode_in_tiles(
            model, encoded.tokens, encoded.attention_mask, photograph.size, tile_size, source.label
        )
        scores = _scores(pixel_values, reconstruction, encoded)
        scores["tile_size"] = tile_size
        if args.target_psnr is not None:
            # In windows a large image is decoded otherwise than in the search.
            scores["reached"] = scores["psnr"] >= args.target_psnr
        if args.to_file:
            scores["file_bytes"] = save_token_file(args.to_file, encoded, photograph.size, model, tile_size, args.step)
        boxes = [_scaled_box(box, photograph) for box in args.focus]
        if boxes:
            scores["psnr_in_focus"] = [
                psnr(pixel_values[..., y0 : y1 + 1, x0 : x1 + 1], reconstruction[..., y0 : y1 + 1, x0 : x1 + 1]).item()
                for x0, y0, x1, y1 in boxes
            ]
        images = pixel_values[0].cpu(), reconstruction[0].cpu()
        _write_pictures(staging, printable(source.name), *images, encoded, scores, boxes)
        save_tokens(staging / TOKENS_FILE, encoded, photograph.size, tile_size, args.model)
        (staging / SCORES_FILE).write_text(json.dumps({**scores, "settings": settings}, indent=2) + "\n")
    tqdm.write(f"{source.label}: {_in_words(scores)} -> {printable(folder)}")
    return scores


def _done_before(folder: Path, settings: dict[str, Any], label: str, overwrite: bool) -> dict[str, Any] | None:
    """The scores that an earlier run has written; `None` if there are none or if they are to be replaced.

    Raises:
        ProgramError: If the folder holds results of other settings.
    """
    if overwrite or not (folder / SCORES_FILE).is_file():
        return None
    try:
        known = json.loads((folder / SCORES_FILE).read_text(encoding="utf-8"))
        same = known["settings"] == json.loads(json.dumps(settings))
    except (ValueError, LookupError, TypeError, RecursionError):
        same = False
    if not same:
        raise ProgramError(f"{folder} holds the outputs of other settings; choose another --output, or --overwrite")
    remove_left_over(folder)
    tqdm.write(f"{label}: done before, skipped (--overwrite replaces it): {printable(folder)}")
    return known


def _scores(pixel_values: torch.Tensor, reconstruction: torch.Tensor, encoded: Any) -> dict[str, Any]:
    height, width = pixel_values.shape[-2:]
    num_tokens = int(encoded.attention_mask.sum())
    large_enough = min(height, width) >= SSIM_WINDOW
    return {
        "width": width,
        "height": height,
        "tokens": num_tokens,
        "floats": num_tokens * encoded.tokens.shape[-1],
        "psnr": psnr(reconstruction, pixel_values).item(),
        "ssim": _ssim_in_bands(reconstruction, pixel_values) if large_enough else None,
    }


def _ssim_in_bands(images: torch.Tensor, reference: torch.Tensor) -> float:
    """`ssim` of one image (1, 3, H, W), band by band. In one piece it takes 2.7 GB for 3000 x 2000 pixels."""
    num_rows = images.shape[2] - SSIM_WINDOW + 1  # of windows
    total = 0.0
    for top in range(0, num_rows, SSIM_BAND_ROWS):
        count = min(SSIM_BAND_ROWS, num_rows - top)
        rows = (..., slice(top, top + count + SSIM_WINDOW - 1), slice(None))
        total += count * ssim(images[rows], reference[rows]).item()
    return total / num_rows


def _in_words(scores: dict[str, Any]) -> str:
    share = scores["floats"] / (3 * scores["width"] * scores["height"])
    words = [
        f"{scores['width']} x {scores['height']}",
        f"PSNR {scores['psnr']:.2f} dB",
        "SSIM -" if scores["ssim"] is None else f"SSIM {scores['ssim']:.4f}",
        f"{scores['tokens']} tokens",
        f"{scores['floats']} floats ({share:.1%} of the image's)",
    ]
    if scores.get("reached") is False:
        words.append("short of the target")
    if "file_bytes" in scores:
        bits = 8 * scores["file_bytes"] / (scores["width"] * scores["height"])
        words.append(f"file of {scores['file_bytes']} bytes ({bits:.3f} bits per pixel)")
    words += [f"PSNR in focus {value:.2f} dB" for value in scores.get("psnr_in_focus", [])]
    return ", ".join(words)


def _scaled_box(box: PixelBox, photograph: Photograph) -> PixelBox:
    """The pixels of the model's input that a box, in pixels of the original, touches."""
    scale_y, scale_x = (new / old for new, old in zip(photograph.size, photograph.original_size))
    x0, y0, x1, y1 = box
    right, bottom = math.ceil((x1 + 1) * scale_x) - 1, math.ceil((y1 + 1) * scale_y) - 1
    return int(x0 * scale_x), int(y0 * scale_y), right, bottom


# --------------------------------------------------------------------------------------------------------- outputs


def _write_pictures(
    folder: Path,
    name: str,
    image: torch.Tensor,
    reconstruction: torch.Tensor,
    encoded: Any,
    scores: dict[str, Any],
    focus: Sequence[PixelBox],
) -> None:
    original, decoded = tensor_to_pil(image), tensor_to_pil(reconstruction)
    zoom = max(1, round(DRAWN_SIDE / max(original.size)))
    mask = encoded.attention_mask[0].cpu()
    initial = draw_gaussians(original, encoded.layout.gaussians[0].cpu(), mask, zoom=zoom)
    refined = draw_gaussians(original, encoded.tokens[0, :, :5].cpu(), mask, zoom=zoom)
    error = draw_error_map(image, reconstruction, zoom=zoom)
    decoded.save(folder / "reconstruction.png")
    initial.save(folder / "initial_gaussians.png")
    refined.save(folder / "refined_gaussians.png")
    error.save(folder / "error.png")
    shown = draw_boxes(original, torch.tensor(focus), zoom=zoom) if focus else _enlarged(original, zoom)
    pictures = [shown, initial, refined, _enlarged(decoded, zoom), error]
    titles = [
        "image and its focus" if focus else "image",
        "initial Gaussians",
        "refined Gaussians",
        "reconstruction",
        "error (8-bit levels)",
    ]
    panel(pictures, titles, footer=f"{name}: {_in_words(scores)}").save(folder / "panel.png")


def _enlarged(picture: PIL.Image.Image, zoom: int) -> PIL.Image.Image:
    return picture.resize((picture.width * zoom, picture.height * zoom), PIL.Image.Resampling.NEAREST)


def _write_overview(output: Path, folders: Sequence[Path]) -> None:
    panels = []
    for folder in folders[:MAX_PANELS_IN_OVERVIEW]:
        with PIL.Image.open(folder / "panel.png") as picture:
            picture.thumbnail((1600, 1600))
            panels.append(picture.copy())
    with atomic_file(output / OVERVIEW_FILE) as staging:
        contact_sheet(panels, columns=1).save(staging)


def _decode_files(args: argparse.Namespace) -> int:
    files = {os.path.abspath(path): path for path in args.from_tokens or args.from_file}
    suffix = "from-tokens" if args.from_tokens else "from-file"
    names = {key: Path(key).parent.name if Path(key).name == TOKENS_FILE else Path(key).stem for key in files}
    folders = plan_names({key: [f"{name}-{suffix}"] for key, name in names.items()}, [OVERVIEW_FILE])
    model = load_tokenizer(args.model, args.device)
    settings = {"version": gpstoken_hf.__version__, "model": args.model, "weights": weights_fingerprint(model)}
    channels = model.config.token_channels

    def work(key: str) -> None:
        load = partial(load_token_file, model=model) if args.from_file else partial(load_tokens, channels=channels)
        _decode_file(model, load, files[key], args.output / folders[key], settings, args.overwrite)

    labels = [printable(path) for path in files.values()]
    failures = _run_batch(list(files), "files", labels, work)[1]
    return _report(failures, len(files), "files not decoded")


def _decode_file(
    model: GPSTokenModel,
    load: Callable[[Path], StoredTokens],
    path: Path,
    folder: Path,
    settings: dict[str, Any],
    overwrite: bool,
) -> None:
    label = printable(path)
    stored = load(path)
    settings = {**settings, "source": file_digest(path)}
    if _done_before(folder, settings, label, overwrite) is not None:
        return
    with atomic_directory(folder, overwrite, PROGRAM) as staging:
        sample = decode_in_tiles(model, stored.tokens, stored.attention_mask, stored.size, stored.tile_size, label)
        decoded = tensor_to_pil(sample[0].cpu())
        zoom = max(1, round(DRAWN_SIDE / max(decoded.size)))
        decoded.save(staging / "reconstruction.png")
        drawn = draw_gaussians(decoded, stored.tokens[0, :, :5], stored.attention_mask[0], zoom=zoom)
        drawn.save(staging / "refined_gaussians.png")
        (staging / SCORES_FILE).write_text(json.dumps({"settings": settings}, indent=2) + "\n")
    count, (height, width) = int(stored.attention_mask.sum()), stored.size
    floats = count * stored.tokens.shape[-1]
    tqdm.write(f"{label}: {width} x {height}, {count} tokens, {floats} floats -> {printable(folder)}")


def _mean(scores: Sequence[dict[str, Any]], key: str) -> float:
    values = [entry[key] for entry in scores if entry[key] is not None]
    return sum(values) / len(values) if values else math.nan


if __name__ == "__main__":
    sys.exit(run_program(main))
