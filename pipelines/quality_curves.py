# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Measure quality on demand against fixed numbers of tokens, and token files beside JPEG and WebP.

    python -m pipelines.quality_curves images.parquet --curves demand greedy --output out/quality
    python -m pipelines.quality_curves images.parquet --curves codecs --resolution 256 --tokens 128 512

Images are resized and cropped to one resolution. `--curves` chooses what is measured:

    demand      each image gets the fewest tokens for a target PSNR, by search and by prediction (if the model has a
                predictor), against the same number of tokens for all images
    greedy      the last tokens of a partition go where a first reconstruction is worst (greedy by error)
    codecs      PSNR over the real sizes of .gpst, JPEG and WebP files

The output folder holds:

    per_image.jsonl     what was measured of every batch; an interrupted run resumes after the last one
    results.json        the means and the settings
    tables.md           the same as tables
    <curve>.png         a plot of each
"""

from __future__ import annotations

import heapq
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import gpstoken_hf
from gpstoken_hf.layout import GaussianLayout
from gpstoken_hf.metrics import psnr
from gpstoken_hf.modeling_gpstoken import GPSTokenModel
from gpstoken_hf.partition import split_sequence
from gpstoken_hf.quality import NestedPartition
from gpstoken_hf.regions import halve, is_splittable, sort_regions
from gpstoken_hf.token_file import read_tokens, write_tokens
from gpstoken_hf.visualization import tensor_to_pil

from .shared.checkpoints import DEFAULT_MODEL, load_tokenizer, weights_fingerprint
from .shared.image_sets import ImageSet
from .shared.outputs import atomic_file, own_directory
from .shared.programs import make_parser, positive_float, positive_int, printable, run_program
from .shared.score_log import ScoreLog

PROGRAM = "pipelines.quality_curves"
CURVES = ("demand", "greedy", "codecs")
OUTPUTS = ("results.json", "tables.md", *(f"{curve}.png" for curve in CURVES))
# The functions for Python: calling the compiled ones would compile them first.
_halve, _is_splittable = (getattr(function, "py_func", function) for function in (halve, is_splittable))
# Shares of the tokens that are spent by error.
GREEDY_SHARES = (0.25, 0.5)
JPEG_QUALITIES, WEBP_QUALITIES = (2, 5, 10, 20, 35, 50), (0, 5, 15, 30, 50, 75)


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    model = load_tokenizer(args.model, args.device)
    images = ImageSet(args.data, args.image_column, args.resolution, args.max_images, "bicubic")
    settings = {
        "version": gpstoken_hf.__version__,
        "data": [printable(path.name) for path in args.data],
        "checksum": images.checksum(),
        "images": len(images),
        "model": args.model,
        "weights": weights_fingerprint(model),
        "has_predictor": model.config.quality_predictor is not None,
        "resolution": args.resolution,
        "curves": args.curves,
        "tokens": sorted(set(args.tokens)),
        "targets": sorted(set(args.targets)),
        "max_tokens": args.max_tokens,
        "steps": sorted(set(args.steps)),
    }
    with own_directory(args.output, PROGRAM) as folder:
        log = ScoreLog(folder, "per_image.jsonl", settings, OUTPUTS, args.overwrite)
        done = sum(len(batch) for batch in log.rows)
        with tqdm(total=len(images), initial=done, unit=" images", disable=None) as bar:
            while done < len(images):
                batch = images.batch(done, min(done + args.batch_size, len(images))).to(model.device)
                log.add(measure(model, batch, settings))
                done += len(batch)
                bar.update(len(batch))
        rows = [row for batch in log.rows for row in batch]
        results = {curve: SUMMARIES[curve](rows, settings) for curve in args.curves}
        with atomic_file(folder.path / "results.json") as staging:
            staging.write_text(json.dumps({"settings": settings, "results": results}, indent=2) + "\n")
        tables = "\n\n".join(as_markdown(curve, results[curve], settings) for curve in args.curves) + "\n"
        with atomic_file(folder.path / "tables.md") as staging:
            staging.write_text(tables, encoding="utf-8")
        for curve in args.curves:
            _draw(folder.path / f"{curve}.png", curve, results[curve], settings)
    print(tables)
    return 0


# -------------------------------------------------------------------------------------------------------- measuring


@torch.inference_mode()
def measure(model: GPSTokenModel, images: torch.Tensor, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """What is asked for of every image of a batch `(B, 3, H, W)`."""
    rows: list[dict[str, Any]] = [{} for _ in images]
    for curve in settings["curves"]:
        for row, found in zip(rows, MEASURES[curve](model, images, settings)):
            row[curve] = found
    return rows


def _decode(model: GPSTokenModel, images: torch.Tensor, encoded: Any) -> torch.Tensor:
    size = (images.shape[2], images.shape[3])
    return model.decode(encoded.tokens, size, encoded.attention_mask).sample.float().clamp(-1, 1)


def _file_sizes(model: GPSTokenModel, encoded: Any, size: tuple[int, int], step: float) -> list[int]:
    """Bytes of the token file of each image."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image.gpst"
        sizes = []
        for image, layout in enumerate(encoded.layout):
            tokens = encoded.tokens[image : image + 1, encoded.attention_mask[image] == 1]
            sizes.append(write_tokens(path, tokens, size, model, layout=layout, step=step))
    return sizes


def measure_demand(model: GPSTokenModel, images: torch.Tensor, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Tokens, PSNR and bytes of every image for fixed numbers of tokens and for targets."""
    size = (images.shape[2], images.shape[3])
    runs: dict[str, dict[str, list[Any]]] = {}

    def add(name: str, encoded: Any, **more: list[Any]) -> None:
        runs[name] = {
            "tokens": encoded.layout.num_tokens.tolist(),
            "psnr": psnr(_decode(model, images, encoded), images).tolist(),
            "bytes": _file_sizes(model, encoded, size, settings["steps"][0]),
            **more,
        }

    for count in settings["tokens"]:
        add(f"fixed {count}", model.encode(images, count))
    for target in settings["targets"]:
        decoded = 0

        def count_images(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            nonlocal decoded
            decoded += len(inputs[0])

        hook = model.decoder.register_forward_pre_hook(count_images)
        encoded = model.encode(images, target_psnr=target, max_tokens=settings["max_tokens"])
        hook.remove()
        cost = [decoded / len(images)] * len(images)
        add(f"target {target:g}", encoded, reached=encoded.reached.tolist(), reconstructions=cost)
        if settings["has_predictor"]:
            encoded = model.encode(images, target_psnr=target, max_tokens=settings["max_tokens"], fast=True)
            add(f"fast {target:g}", encoded)
    return _by_image(runs, len(images))


def measure_greedy(model: GPSTokenModel, images: torch.Tensor, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """PSNR of every image with the last tokens spent by error, for each share of them."""
    config, size = model.config, (images.shape[2], images.shape[3])
    highest = max(settings["tokens"])
    splits = split_sequence(images, highest, config.complexity_exponent, config.min_region_size)
    partition = NestedPartition(splits, size)
    runs: dict[str, dict[str, list[Any]]] = {}
    for count in settings["tokens"]:
        plain = model.encode(images, count)
        runs[f"{count} by complexity"] = {"psnr": psnr(_decode(model, images, plain), images).tolist()}
        for share in GREEDY_SHARES:
            first = max(1, round(count * (1 - share)))
            error = (_decode(model, images, model.encode(images, first)) - images).square().sum(1).cpu().numpy()
            boxes = [
                split_worst(partition.boxes(image, first), error[image], count, config.min_region_size)
                for image in range(len(images))
            ]
            regions = sort_regions(torch.from_numpy(np.stack(boxes)))
            layout = GaussianLayout.from_boxes(regions, size, None, config.sigma_scale, config.align_corners)
            sample = _decode(model, images, model.encode(images, layout=layout.to(images.device)))
            runs[f"{count} with {share:.0%} by error"] = {"psnr": psnr(sample, images).tolist()}
    return _by_image(runs, len(images))


def split_worst(boxes: np.ndarray, error: np.ndarray, count: int, min_region_size: int) -> np.ndarray:
    """Halve the regions of largest summed error until there are `count`: Alg. 1 with the error as complexity.

    Args:
        boxes (`np.ndarray` of shape `(n, 4)`): regions to begin with.
        error (`np.ndarray` of shape `(H, W)`): squared error of every pixel.
        count (`int`): how many regions to end with; the image must allow them.
        min_region_size (`int`): s_min in pixels.

    Returns:
        `np.ndarray` of shape `(count, 4)`.
    """

    def total(box: tuple[int, int, int, int]) -> float:
        x0, y0, x1, y1 = box
        return float(error[y0 : y1 + 1, x0 : x1 + 1].sum())

    heap = [(-total(tuple(box)), tuple(box)) for box in boxes.tolist()]
    heapq.heapify(heap)
    finished: list[tuple[int, int, int, int]] = []
    while len(heap) + len(finished) < count:
        _, box = heapq.heappop(heap)
        if not _is_splittable(*box, min_region_size):
            finished.append(box)
            continue
        w, h = box[2] - box[0] + 1, box[3] - box[1] + 1
        ways = [_halve(*box, along_x) for along_x in (True, False) if (w >= h if along_x else h >= w)]
        halves = min(ways, key=lambda way: min(total(half) for half in way))
        for half in halves:
            heapq.heappush(heap, (-total(half), half))
    return np.array([*finished, *(box for _, box in heap)], dtype=np.int64)


def measure_codecs(model: GPSTokenModel, images: torch.Tensor, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Bytes and PSNR of every image as .gpst, JPEG and WebP."""
    size = (images.shape[2], images.shape[3])
    runs: dict[str, dict[str, list[Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image.gpst"
        for count in settings["tokens"]:
            encoded = model.encode(images, count)
            exact = psnr(_decode(model, images, encoded), images).tolist()
            for step in (None, *settings["steps"]):
                sizes, scores = [], []
                for image, layout in enumerate(encoded.layout):
                    tokens = encoded.tokens[image : image + 1]
                    sizes.append(write_tokens(path, tokens, size, model, layout=layout, step=step))
                    stored = read_tokens(path)
                    if step is not None:
                        sample = model.decode(stored.tokens.to(images.device), size).sample.float().clamp(-1, 1)
                        exact_or_not = psnr(sample, images[image : image + 1]).item()
                    else:
                        assert torch.equal(stored.tokens, tokens.cpu())
                        exact_or_not = exact[image]
                    scores.append(exact_or_not)
                name = f"{count} tokens, " + ("lossless" if step is None else f"step {step:g}")
                runs[name] = {"bytes": sizes, "psnr": scores}
    for kind, qualities in (("JPEG", JPEG_QUALITIES), ("WEBP", WEBP_QUALITIES)):
        for quality in qualities:
            found = [_codec(image, kind, quality) for image in images]
            runs[f"{kind} {quality}"] = {"bytes": [size for size, _ in found], "psnr": [score for _, score in found]}
    return _by_image(runs, len(images))


def _codec(image: torch.Tensor, kind: str, quality: int) -> tuple[int, float]:
    """Bytes and PSNR of one image `(3, H, W)` as a file of Pillow."""
    import PIL.Image

    file = BytesIO()
    options: dict[str, Any] = {"optimize": True} if kind == "JPEG" else {"method": 6}
    tensor_to_pil(image.cpu()).save(file, kind, quality=quality, **options)
    with PIL.Image.open(file) as picture:
        decoded = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1
    return len(file.getvalue()), psnr(decoded[None], image[None].cpu()).item()


def _by_image(runs: dict[str, dict[str, list[Any]]], count: int) -> list[dict[str, Any]]:
    return [
        {name: {key: values[image] for key, values in run.items()} for name, run in runs.items()}
        for image in range(count)
    ]


MEASURES = {"demand": measure_demand, "greedy": measure_greedy, "codecs": measure_codecs}


# -------------------------------------------------------------------------------------------------------- summaries


def _mean(rows: Sequence[dict[str, Any]], name: str, key: str) -> float:
    return sum(row[name][key] for row in rows) / len(rows)


def summarize_demand(rows: Sequence[dict[str, Any]], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Means over the images for each way of choosing the number of tokens."""
    measured = [row["demand"] for row in rows]
    results: list[dict[str, Any]] = []
    for name in measured[0]:
        scores = sorted(row[name]["psnr"] for row in measured)
        entry = {
            "name": name,
            "tokens": _mean(measured, name, "tokens"),
            "bytes": _mean(measured, name, "bytes"),
            "psnr": sum(scores) / len(scores),
            # The PSNR that nine images of ten reach.
            "psnr_of_90_percent": scores[len(scores) // 10],
        }
        kind, value = name.split()
        if kind == "target":
            entry["reached"] = sum(row[name]["reached"] for row in measured) / len(measured)
            entry["reconstructions"] = _mean(measured, name, "reconstructions")
        if kind == "fast":
            reachable = [row for row in measured if row[f"target {value}"]["reached"]]
            if reachable:
                entry["above_target"] = _mean(reachable, name, "psnr") - float(value)
        if kind != "fixed":
            fixed = [other for other in results if other["name"].startswith("fixed")]
            for key, title in (("psnr", "psnr"), ("psnr_of_90_percent", "90_percent")):
                entry[f"fixed_tokens_of_equal_{title}"] = _tokens_of(entry[key], fixed, key)
        results.append(entry)
    return results


def _tokens_of(score: float, fixed: Sequence[dict[str, Any]], key: str) -> float | None:
    """The number of tokens for all images that gives a score, interpolated in log n; `None` beyond the ends."""
    for less, more in pairwise(fixed):
        if less[key] <= score <= more[key] and less[key] < more[key]:
            share = (score - less[key]) / (more[key] - less[key])
            return less["tokens"] * (more["tokens"] / less["tokens"]) ** share
    return None


def summarize_greedy(rows: Sequence[dict[str, Any]], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The mean PSNR, and what the error gains over the complexity with its standard error."""
    measured = [row["greedy"] for row in rows]
    results = []
    for name in measured[0]:
        base = f"{name.split()[0]} by complexity"
        gains = np.array([row[name]["psnr"] - row[base]["psnr"] for row in measured])
        spread = float(gains.std(ddof=1) / math.sqrt(len(gains))) if len(gains) > 1 else 0.0
        results.append(
            {"name": name, "psnr": _mean(measured, name, "psnr"), "gain": float(gains.mean()), "error": spread}
        )
    return results


def summarize_codecs(rows: Sequence[dict[str, Any]], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Mean bytes, bits per pixel and PSNR of every kind of file."""
    measured = [row["codecs"] for row in rows]
    pixels = settings["resolution"] ** 2
    return [
        {
            "name": name,
            "bytes": _mean(measured, name, "bytes"),
            "bits_per_pixel": 8 * _mean(measured, name, "bytes") / pixels,
            "psnr": _mean(measured, name, "psnr"),
        }
        for name in measured[0]
    ]


SUMMARIES = {"demand": summarize_demand, "greedy": summarize_greedy, "codecs": summarize_codecs}


# ---------------------------------------------------------------------------------------------------------- outputs


def as_markdown(curve: str, results: Sequence[dict[str, Any]], settings: dict[str, Any]) -> str:
    """One table, after a line that says what was measured."""
    titles = list(dict.fromkeys(key for entry in results for key in entry))
    lines = [
        f"{curve}: {settings['model']}, {settings['images']} images of {', '.join(settings['data'])}, "
        f"{settings['resolution']} x {settings['resolution']} pixels",
        "",
        "| " + " | ".join(title.replace("_", " ") for title in titles) + " |",
        "|" + "---|" * len(titles),
    ]
    lines += ["| " + " | ".join(_cell(title, entry.get(title)) for title in titles) + " |" for entry in results]
    return "\n".join(lines)


def _cell(title: str, value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    if title == "reached":
        return f"{value:.0%}"
    return f"{value:.0f}" if title == "bytes" else f"{value:.1f}" if "tokens" in title else f"{value:.2f}"


def _draw(path: Path, curve: str, results: Sequence[dict[str, Any]], settings: dict[str, Any]) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"no {path.name}: it needs matplotlib (pip install gpstoken-hf[demo])", file=sys.stderr)
        return
    figure = Figure(figsize=(10 if curve == "demand" else 6, 4.2), layout="constrained")
    {"demand": _draw_demand, "greedy": _draw_greedy, "codecs": _draw_codecs}[curve](figure, results)
    side = settings["resolution"]
    figure.suptitle(f"{settings['model']}, {settings['images']} images of {side} x {side} pixels", fontsize=11)
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.legend()
    with atomic_file(path) as staging:
        figure.savefig(staging, dpi=120)


def _draw_demand(figure: Any, results: Sequence[dict[str, Any]]) -> None:
    kinds = (
        ("fixed", "o-", "the same number for all"),
        ("target", "s-", "target, by search"),
        ("fast", "^--", "fast"),
    )
    for axes, key, label in zip(
        figure.subplots(1, 2), ("psnr", "psnr_of_90_percent"), ("mean PSNR (dB)", "PSNR that 90 % reach (dB)")
    ):
        for kind, style, name in kinds:
            chosen = [entry for entry in results if entry["name"].startswith(kind)]
            if chosen:
                axes.plot([entry["tokens"] for entry in chosen], [entry[key] for entry in chosen], style, label=name)
        axes.set_xlabel("mean tokens per image")
        axes.set_ylabel(label)


def _draw_greedy(figure: Any, results: Sequence[dict[str, Any]]) -> None:
    axes = figure.add_subplot()
    for kind in dict.fromkeys(entry["name"].split(" ", 1)[1] for entry in results):
        chosen = [entry for entry in results if entry["name"].endswith(kind)]
        axes.plot([int(entry["name"].split()[0]) for entry in chosen], [e["psnr"] for e in chosen], "o-", label=kind)
    axes.set_xlabel("tokens per image")
    axes.set_ylabel("mean PSNR (dB)")


def _draw_codecs(figure: Any, results: Sequence[dict[str, Any]]) -> None:
    axes = figure.add_subplot()
    files: dict[str, list[dict[str, Any]]] = {}
    for entry in results:
        if not entry["name"].endswith("lossless"):
            files.setdefault(entry["name"].split()[0], []).append(entry)
    for kind, chosen in files.items():
        is_ours = kind.isdigit()
        chosen = sorted(chosen, key=lambda entry: entry["bytes"])
        label = f".gpst, {kind} tokens" if is_ours else kind
        style = "o-" if is_ours else "s--"
        axes.plot([e["bits_per_pixel"] for e in chosen], [e["psnr"] for e in chosen], style, label=label)
    axes.set_xscale("log")
    axes.set_xlabel("bits per pixel of the whole file")
    axes.set_ylabel("mean PSNR (dB)")


def _parse(argv: Sequence[str] | None) -> Any:
    parser = make_parser(PROGRAM, __doc__)
    parser.add_argument("data", nargs="+", type=Path, help="parquet files, image files, and folders of images")
    parser.add_argument("--curves", nargs="+", choices=CURVES, default=list(CURVES))
    parser.add_argument("--image_column", default="image", help="column of the parquet files")
    parser.add_argument("--resolution", type=positive_int, default=64)
    parser.add_argument(
        "--tokens", type=positive_int, nargs="+", default=[8, 16, 32, 48, 64], help="fixed numbers of tokens"
    )
    parser.add_argument("--targets", type=positive_float, nargs="+", default=[20.0, 22.0, 24.0], help="PSNR in dB")
    parser.add_argument("--max_tokens", type=positive_int, help="most tokens with a target; default: that of encode")
    parser.add_argument(
        "--steps",
        type=positive_float,
        nargs="+",
        default=[0.25, 0.5, 1.0],
        help="steps of lossy files; the smallest one gives the bytes of `demand`",
    )
    parser.add_argument("--max_images", type=positive_int, help="use only the first images, this many")
    parser.add_argument("--batch_size", type=positive_int, default=8)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="folder, Hub repository, or the bundled checkpoint")
    parser.add_argument("--output", type=Path, default=Path("out/quality_curves"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--overwrite", action="store_true", help="replace results of this program")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run_program(main))
