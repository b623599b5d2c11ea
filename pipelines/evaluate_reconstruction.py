# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Score a tokenizer on a set of images by PSNR and SSIM, against thumbnails of as many floats.

    python -m pipelines.evaluate_reconstruction images.parquet --resolution 64 --tokens 16 32 64 --output results/
    python -m pipelines.evaluate_reconstruction folder/ --resolution 256 --tokens 128 --focus 64,64,191,191

Every image is resized until its shortest side is the resolution, and cropped in the middle. The resize is antialiased
and bicubic unless --resample says otherwise; a softer filter makes images that every method reconstructs better. For
each number of tokens the table holds the mean PSNR and SSIM, and those of a *thumbnail*: the image reduced to s x s
pixels and enlarged again, both bicubic and antialiased as in Pillow, in floating point, clamped. The side s is the
smallest with `3 s² >= floats`, so a thumbnail never holds fewer floats than the tokens.

With --focus, every image is also encoded with that box marked as important, and the PSNR inside the box is compared
with and without. The output folder holds:

    per_image.jsonl     the scores of every image; an interrupted run resumes after the last one
    results.json        the means and the settings
    table.md            the same as tables
    curve.png           PSNR over the number of floats
    examples.png        a few images, their thumbnails and their reconstructions
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import PIL.Image
import torch
import torch.nn.functional as F
from tqdm import tqdm

import gpstoken_hf
from gpstoken_hf.image_processing_gpstoken import GPSTokenImageProcessor, open_image
from gpstoken_hf.metrics import psnr, ssim
from gpstoken_hf.modeling_gpstoken import GPSTokenModel
from gpstoken_hf.visualization import contact_sheet, tensor_to_pil

from .shared.checkpoints import DEFAULT_MODEL, load_tokenizer, weights_fingerprint
from .shared.outputs import OwnDirectory, atomic_file, own_directory
from .shared.photographs import find_photographs
from .shared.programs import (
    PixelBox,
    ProgramError,
    make_parser,
    non_negative_float,
    pixel_box,
    positive_int,
    printable,
    run_program,
)

PROGRAM = "pipelines.evaluate_reconstruction"
PER_IMAGE_FILE = "per_image.jsonl"
OUTPUTS = (PER_IMAGE_FILE, "results.json", "table.md", "curve.png", "examples.png")
NUM_EXAMPLES = 6


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    images = ImageSet(args.data, args.image_column, args.resolution, args.max_images, args.resample)
    if args.focus and (args.focus[2] >= args.resolution or args.focus[3] >= args.resolution):
        raise ProgramError(
            f"--focus must lie inside {args.resolution} x {args.resolution} pixels, "
            f"got {','.join(map(str, args.focus))}"
        )
    model = load_tokenizer(args.model, args.device)
    token_counts = sorted(set(args.tokens or [model.config.num_tokens]))
    settings = {
        "version": gpstoken_hf.__version__,
        "data": [printable(path.name) for path in args.data],
        "images": len(images),
        "model": args.model,
        "weights": weights_fingerprint(model),
        "resolution": args.resolution,
        "resample": args.resample,
        "tokens": token_counts,
        "focus": args.focus and list(args.focus),
        "focus_weight": args.focus_weight if args.focus else None,
    }
    with own_directory(args.output, PROGRAM) as folder:
        evaluate(args, model, images, token_counts, settings, folder)
    return 0


def evaluate(
    args: argparse.Namespace,
    model: GPSTokenModel,
    images: ImageSet,
    token_counts: Sequence[int],
    settings: dict[str, Any],
    folder: OwnDirectory,
) -> None:
    """Score the images that have no scores yet, then write and print the results of all images."""
    output = folder.path
    done = _open_progress(folder, settings, args.overwrite)
    if done:
        print(f"{done} of {len(images)} images are scored already in {printable(output / PER_IMAGE_FILE)}; resuming")

    with (
        (output / PER_IMAGE_FILE).open("a", encoding="utf-8") as log,
        tqdm(total=len(images), initial=done, unit=" images", disable=None) as bar,
    ):
        for start in range(done, len(images), args.batch_size):
            batch = images.batch(start, min(start + args.batch_size, len(images))).to(model.device)
            for scores in score_batch(model, batch, token_counts, args.focus, args.focus_weight):
                log.write(json.dumps(scores) + "\n")
            log.flush()
            bar.update(len(batch))

    rows = [json.loads(line) for line in (output / PER_IMAGE_FILE).read_text(encoding="utf-8").splitlines()[1:]]
    results = summarize(rows, token_counts, model.config.token_channels, args.resolution)
    with atomic_file(output / "results.json") as staging:
        staging.write_text(json.dumps({"settings": settings, "results": results}, indent=2) + "\n")
    table = as_markdown(results, settings)
    with atomic_file(output / "table.md") as staging:
        staging.write_text(table, encoding="utf-8")
    _draw_curve(output / "curve.png", results, settings)
    _draw_examples(output / "examples.png", model, images, token_counts)
    print(table)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(PROGRAM, __doc__)
    parser.add_argument("data", nargs="+", type=Path, help="parquet files, image files, and folders of images")
    parser.add_argument("--image_column", default="image", help="column of the parquet files")
    parser.add_argument("--resolution", type=positive_int, default=64)
    parser.add_argument("--resample", choices=("bicubic", "bilinear", "lanczos", "box"), default="bicubic")
    parser.add_argument("--tokens", type=positive_int, nargs="+", help="numbers of tokens; default: the model's")
    parser.add_argument("--max_images", type=positive_int, help="use only the first images, this many")
    parser.add_argument("--batch_size", type=positive_int, default=16)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="folder, Hub repository, or the bundled checkpoint")
    parser.add_argument("--focus", type=pixel_box, metavar="x0,y0,x1,y1", help="box in pixels of the cropped images")
    parser.add_argument(
        "--focus_weight", type=non_negative_float, default=30.0, help="importance per pixel of the focus box"
    )
    parser.add_argument("--output", type=Path, default=Path("out/evaluate_reconstruction"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--overwrite", action="store_true", help="replace results of this program")
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------------------- images


class ImageSet:
    """Images of parquet files, image files and folders in a fixed order, resized and cropped on demand."""

    def __init__(self, paths: Sequence[Path], column: str, resolution: int, max_images: int | None, resample: str):
        self.entries: list[Path | tuple[Any, int]] = []  # a file, or a parquet column and a row of it
        self.processor = GPSTokenImageProcessor(
            do_resize=True,
            size={"shortest_edge": resolution},
            resample=PIL.Image.Resampling[resample.upper()],
            do_center_crop=True,
            crop_size=resolution,
        )
        for path in paths:
            if path.suffix == ".parquet" and path.is_file():
                rows = _parquet_column(path, column)
                self.entries += [(rows, row) for row in range(len(rows))]
            else:
                self.entries += [file for file, _ in find_photographs([path])]
        self.entries = self.entries[:max_images]
        if not self.entries:
            raise ProgramError(f"data must hold images, got none in {', '.join(map(str, paths))}")

    def __len__(self) -> int:
        return len(self.entries)

    def batch(self, start: int, stop: int) -> torch.Tensor:
        """(B, 3, resolution, resolution) in [-1, 1]."""
        images = [self._read(entry) for entry in self.entries[start:stop]]
        return self.processor(images, return_tensors="pt").pixel_values

    def _read(self, entry: Path | tuple[Any, int]) -> PIL.Image.Image:
        if isinstance(entry, Path):
            return open_image(entry)
        column, row = entry
        value = column[row].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            raise ProgramError(f"row {row} must hold an encoded image, got {type(content).__name__}")
        try:
            image = PIL.Image.open(BytesIO(content))
            image.load()
        except (OSError, SyntaxError, EOFError) as error:
            raise ProgramError(f"row {row} must hold a readable image: {error}") from error
        return image


def _parquet_column(path: Path, column: str) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ProgramError("parquet files need pyarrow: pip install gpstoken-hf[train]") from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
        if column not in file.schema_arrow.names:
            raise ProgramError(f"{path} must have a column {column!r}, got {', '.join(file.schema_arrow.names)}")
        return file.read([column]).column(column)
    except pyarrow.ArrowInvalid as error:
        raise ProgramError(f"{path} must be a parquet file, cannot read it: {error}") from error


# ---------------------------------------------------------------------------------------------------------- scores


def thumbnail_side(num_floats: int) -> int:
    """The smallest s with `3 s² >= num_floats`."""
    return math.isqrt(max(0, -(-num_floats // 3) - 1)) + 1


def thumbnail(images: torch.Tensor, side: int) -> torch.Tensor:
    """Reduce (B, 3, H, W) to `side` x `side` and enlarge it again, bicubic and antialiased, clamped to [-1, 1]."""
    small = F.interpolate(images, (side, side), mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)
    large = F.interpolate(small, images.shape[-2:], mode="bicubic", antialias=True, align_corners=False)
    return large.clamp(-1, 1)


@torch.inference_mode()
def reconstruct(
    model: GPSTokenModel, images: torch.Tensor, num_tokens: int, importance: torch.Tensor | None = None
) -> torch.Tensor:
    """Encode (B, 3, H, W) as `num_tokens` tokens and decode it, clamped to [-1, 1]."""
    encoded = model.encode(images, num_tokens=num_tokens, importance=importance)
    sample = model.decode(encoded.tokens, tuple(images.shape[-2:]), attention_mask=encoded.attention_mask).sample
    return sample.float().clamp(-1, 1)


def score_batch(
    model: GPSTokenModel,
    images: torch.Tensor,
    token_counts: Sequence[int],
    focus: PixelBox | None,
    focus_weight: float,
) -> Iterator[dict[str, dict[str, float]]]:
    """For each image of a batch: its scores by number of tokens and name."""
    columns: dict[str, dict[str, list[float]]] = {}
    for count in token_counts:
        plain = reconstruct(model, images, count)
        side = min(thumbnail_side(count * model.config.token_channels), images.shape[-1])
        small = thumbnail(images, side)
        scores = {
            "psnr": psnr(plain, images),
            "ssim": ssim(plain, images),
            "thumbnail_psnr": psnr(small, images),
            "thumbnail_ssim": ssim(small, images),
        }
        if focus is not None:
            x0, y0, x1, y1 = focus
            window = (..., slice(y0, y1 + 1), slice(x0, x1 + 1))
            importance = torch.zeros(images.shape[0], *images.shape[-2:], device=images.device)
            importance[window] = focus_weight
            focused = reconstruct(model, images, count, importance)
            scores["inside_psnr"] = psnr(plain[window], images[window])
            scores["inside_psnr_focused"] = psnr(focused[window], images[window])
            scores["psnr_focused"] = psnr(focused, images)
        columns[str(count)] = {name: values.tolist() for name, values in scores.items()}
    for row in range(len(images)):
        yield {count: {name: values[row] for name, values in scores.items()} for count, scores in columns.items()}


def summarize(
    rows: Sequence[dict[str, dict[str, float]]], token_counts: Sequence[int], channels: int, resolution: int
) -> list[dict[str, Any]]:
    """The means over the images, one entry for each number of tokens."""
    results = []
    for count in token_counts:
        floats = count * channels
        side = min(thumbnail_side(floats), resolution)
        names = rows[0][str(count)]
        means = {name: sum(row[str(count)][name] for row in rows) / len(rows) for name in names}
        spread = _standard_error([row[str(count)]["psnr"] - row[str(count)]["thumbnail_psnr"] for row in rows])
        results.append(
            {
                "tokens": count,
                "floats": floats,
                **means,
                "thumbnail_side": side,
                "thumbnail_floats": 3 * side * side,
                "gain": means["psnr"] - means["thumbnail_psnr"],
                "gain_standard_error": spread,
            }
        )
    return results


def _standard_error(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


# --------------------------------------------------------------------------------------------------------- outputs


def _open_progress(folder: OwnDirectory, settings: dict[str, Any], overwrite: bool) -> int:
    """Prepare `PER_IMAGE_FILE` for the next line; returns how many images it holds.

    The first line holds the settings. A last line that was cut off is dropped.

    Raises:
        ProgramError: If the file is of other settings, unless `overwrite`.
    """
    path, header, complete = folder.path / PER_IMAGE_FILE, json.dumps(settings), []
    if path.exists() and not overwrite:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        if lines[0] != header:
            raise ProgramError(f"{path} holds the scores of other settings; choose another --output, or --overwrite")
        complete = lines[1:-1]  # the rest after the last line break is empty, or was cut off
    elif overwrite:
        folder.clear()
    folder.expect(OUTPUTS)
    with atomic_file(path) as staging:
        staging.write_text("\n".join([header, *complete]) + "\n", encoding="utf-8")
    return len(complete)


def as_markdown(results: Sequence[dict[str, Any]], settings: dict[str, Any]) -> str:
    """The table of the scores, and the table of the focus box if there is one."""
    lines = [
        f"{settings['model']}, {settings['images']} images of {', '.join(settings['data'])}, "
        f"{settings['resolution']} x {settings['resolution']} centre crops ({settings['resample']})",
        "",
        "| tokens | floats | PSNR (dB) | SSIM | thumbnail | its floats | its PSNR (dB) | its SSIM | gain (dB) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for entry in results:
        error = entry["gain_standard_error"]
        gain = f"{entry['gain']:+.2f}" + ("" if error is None else f" ± {error:.2f}")
        side = entry["thumbnail_side"]
        lines.append(
            f"| {entry['tokens']} | {entry['floats']} | {entry['psnr']:.2f} | {entry['ssim']:.4f} "
            f"| {side} x {side} | {entry['thumbnail_floats']} | {entry['thumbnail_psnr']:.2f} "
            f"| {entry['thumbnail_ssim']:.4f} | {gain} |"
        )
    if settings["focus"]:
        lines += [
            "",
            f"With the box {','.join(map(str, settings['focus']))} in focus (weight {settings['focus_weight']:g}):",
            "",
            "| tokens | PSNR in the box (dB) | with focus | gain | PSNR of the image (dB) | with focus |",
            "|---|---|---|---|---|---|",
        ]
        for entry in results:
            inside, focused = entry["inside_psnr"], entry["inside_psnr_focused"]
            lines.append(
                f"| {entry['tokens']} | {inside:.2f} | {focused:.2f} | {focused - inside:+.2f} "
                f"| {entry['psnr']:.2f} | {entry['psnr_focused']:.2f} |"
            )
    return "\n".join(lines) + "\n"


def _draw_curve(path: Path, results: Sequence[dict[str, Any]], settings: dict[str, Any]) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no curve.png: it needs matplotlib (pip install gpstoken-hf[demo])", file=sys.stderr)
        return
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    finite = [entry for entry in results if math.isfinite(entry["thumbnail_psnr"])]
    axes.plot([entry["floats"] for entry in results], [entry["psnr"] for entry in results], "o-", label="GPSToken")
    axes.plot(
        [entry["thumbnail_floats"] for entry in finite],
        [entry["thumbnail_psnr"] for entry in finite],
        "s--",
        label="bicubic thumbnail",
    )
    axes.set_xscale("log")
    ticks = [entry["floats"] for entry in results]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("floats per image")
    axes.set_ylabel("PSNR (dB)")
    axes.set_title(f"{settings['images']} images, {settings['resolution']} x {settings['resolution']}")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_file(path) as staging:
        figure.savefig(staging, dpi=150)


def _draw_examples(path: Path, model: GPSTokenModel, images: ImageSet, token_counts: Sequence[int]) -> None:
    batch = images.batch(0, min(NUM_EXAMPLES, len(images))).to(model.device)
    resolution = batch.shape[-1]
    largest = token_counts[-1]
    side = min(thumbnail_side(largest * model.config.token_channels), resolution)
    columns = [batch, thumbnail(batch, side), *(reconstruct(model, batch, count) for count in token_counts)]
    titles = ["image", f"thumbnail {side} x {side}", *(f"{count} tokens" for count in token_counts)]
    zoom = max(1, round(192 / resolution))
    pictures = []
    for row in range(len(batch)):
        for column in columns:
            picture = tensor_to_pil(column[row])
            pictures.append(picture.resize((resolution * zoom, resolution * zoom), PIL.Image.Resampling.NEAREST))
    with atomic_file(path) as staging:
        contact_sheet(pictures, titles * len(batch), columns=len(columns)).save(staging)


if __name__ == "__main__":
    sys.exit(run_program(main))
