# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Measure the predictor of PSNR that `encode(..., target_psnr=..., fast=True)` needs.

    python -m pipelines.fit_quality images.parquet --model gpstoken-nano --output out/fit_quality
    python -m pipelines.fit_quality folder/ --resolutions 256 384 --model my-model --output out/fit_quality

Every image is resized and cropped to each resolution, encoded with a few random numbers of tokens, an eighth to four
times those of the training, and decoded. The weights are those of a linear fit of the PSNR to the features of the
partition (gpstoken_hf.quality). The output folder holds:

    rows.jsonl      the features and the PSNR of every measurement; an interrupted run resumes after the last one
    config.json     the config of the model with the weights; copy it over that of the model
    fit.json        the weights and the error of the fit
    fit.png         predicted over measured PSNR
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import gpstoken_hf
from gpstoken_hf.metrics import psnr
from gpstoken_hf.modeling_gpstoken import GPSTokenModel
from gpstoken_hf.partition import split_sequence
from gpstoken_hf.quality import FINER, NestedPartition, predict_psnr
from gpstoken_hf.regions import max_regions

from .shared.checkpoints import DEFAULT_MODEL, load_tokenizer, weights_fingerprint
from .shared.image_sets import ImageSet
from .shared.outputs import atomic_file, own_directory
from .shared.programs import make_parser, positive_int, printable, run_program
from .shared.score_log import ScoreLog

PROGRAM = "pipelines.fit_quality"
ROWS_FILE = "rows.jsonl"
OUTPUTS = ("config.json", "fit.json", "fit.png")


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    model = load_tokenizer(args.model, args.device)
    resolutions = args.resolutions or [model.config.image_size]
    sets = {side: ImageSet(args.data, args.image_column, side, args.max_images, "bicubic") for side in resolutions}
    settings = {
        "version": gpstoken_hf.__version__,
        "data": [printable(path.name) for path in args.data],
        "checksum": sets[resolutions[0]].checksum(),
        "images": len(sets[resolutions[0]]),
        "model": args.model,
        "weights": weights_fingerprint(model),
        "resolutions": resolutions,
        "samples": args.samples,
        "batch_size": args.batch_size,  # a row of the file is a batch
    }
    with own_directory(args.output, PROGRAM) as folder:
        log = ScoreLog(folder, ROWS_FILE, settings, OUTPUTS, args.overwrite)
        jobs = [(side, start) for side in resolutions for start in range(0, settings["images"], args.batch_size)]
        for side, start in tqdm(jobs[len(log.rows) :], initial=len(log.rows), total=len(jobs), disable=None):
            images = sets[side].batch(start, min(start + args.batch_size, settings["images"]))
            log.add(measure(model, images.to(model.device), args.samples, seed=1000 * side + start))
        rows = np.array([row for batch in log.rows for row in batch])
        fit = fit_weights(rows)
        model.config.quality_predictor = fit["weights"]
        with atomic_file(folder.path / "config.json") as staging:
            staging.write_text(model.config.to_json_string(), encoding="utf-8")
        with atomic_file(folder.path / "fit.json") as staging:
            staging.write_text(json.dumps({"settings": settings, **fit}, indent=2) + "\n")
        _draw(folder.path / "fit.png", rows, fit, settings)
    print(
        f"{len(rows)} measurements: error {fit['rms_error']:.2f} dB (root mean square), "
        f"{fit['rms_error_held_out']:.2f} dB on images that were left out; see {printable(args.output)}"
    )
    return 0


@torch.inference_mode()
def measure(model: GPSTokenModel, images: torch.Tensor, samples: int, seed: int) -> list[list[float]]:
    """Features and PSNR of images `(B, 3, H, W)` with `samples` numbers of tokens each, drawn evenly in log n."""
    config, (height, width) = model.config, images.shape[-2:]
    usual = config.num_tokens * height * width / config.image_size**2
    limit = max_regions(height, width, config.min_region_size)
    # Fewer tokens than an eighth of the usual number say little about the numbers that targets need.
    low, high = (min(limit, max(1, round(factor * usual))) for factor in (1 / 8, 4))
    splits = split_sequence(images, min(limit, FINER * high), config.complexity_exponent, config.min_region_size)
    partition = NestedPartition(splits, (height, width))
    rows = []
    rng = np.random.default_rng(seed)
    for _ in range(samples):
        counts = np.rint(np.exp(rng.uniform(math.log(low), math.log(high), len(images)))).astype(int).tolist()
        encoded = model.encode(images, counts)
        sample = model.decode(encoded.tokens, (height, width), encoded.attention_mask).sample
        for image, value in enumerate(psnr(sample.float(), images).tolist()):
            features = partition.features(image, images[image], config.image_size**2, high)[counts[image] - 1]
            rows.append([*features.tolist(), value])
    return rows


def fit_weights(rows: np.ndarray) -> dict[str, Any]:
    """The weights of least squares, and their error on the rows and on rows that were left out of the fit."""
    features, values = rows[:, :-1], rows[:, -1]

    def solve(chosen: np.ndarray) -> np.ndarray:
        # One resolution alone says nothing about the size. The smallest solution then leaves it out.
        return np.linalg.lstsq(features[chosen], values[chosen], rcond=1e-9)[0]

    everything = np.ones(len(rows), bool)
    weights = solve(everything)
    # A row in five is left out in turn. Rows of an image are apart by a batch, so whole runs are left out.
    fold = np.arange(len(rows)) * 5 // len(rows)
    held_out = np.concatenate(
        [predict_psnr(features[fold == k], solve(fold != k)) for k in range(5) if (fold != k).any()]
    )
    error = predict_psnr(features, weights) - values
    return {
        "weights": [round(float(weight), 12) + 0.0 for weight in weights],  # + 0.0: no negative zeros
        "rms_error": float(np.sqrt(np.mean(error**2))),
        "rms_error_held_out": float(np.sqrt(np.mean((held_out - values[: len(held_out)]) ** 2))),
    }


def _draw(path: Path, rows: np.ndarray, fit: dict[str, Any], settings: dict[str, Any]) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no fit.png: it needs matplotlib (pip install gpstoken-hf[demo])", file=sys.stderr)
        return
    figure = Figure(figsize=(5, 4.4), layout="constrained")
    axes = figure.add_subplot()
    dots = axes.scatter(rows[:, -1], predict_psnr(rows[:, :-1], fit["weights"]), c=rows[:, 3], s=8, cmap="viridis")
    figure.colorbar(dots, label="octaves of tokens per pixel from the training")
    ends = [rows[:, -1].min(), rows[:, -1].max()]
    axes.plot(ends, ends, "k--", linewidth=1)
    axes.set_xlabel("measured PSNR (dB)")
    axes.set_ylabel("predicted PSNR (dB)")
    axes.set_title(f"{settings['model']}, {settings['images']} images", fontsize=10)
    axes.grid(alpha=0.3)
    with atomic_file(path) as staging:
        figure.savefig(staging, dpi=150)


def _parse(argv: Sequence[str] | None) -> Any:
    parser = make_parser(PROGRAM, __doc__)
    parser.add_argument("data", nargs="+", type=Path, help="parquet files, image files, and folders of images")
    parser.add_argument("--image_column", default="image", help="column of the parquet files")
    parser.add_argument("--resolutions", type=positive_int, nargs="+", help="sides in pixels; default: the model's")
    parser.add_argument("--samples", type=positive_int, default=6, help="numbers of tokens for each image")
    parser.add_argument("--max_images", type=positive_int, help="use only the first images, this many")
    parser.add_argument("--batch_size", type=positive_int, default=8)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="folder, Hub repository, or the bundled checkpoint")
    parser.add_argument("--output", type=Path, default=Path("out/fit_quality"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--overwrite", action="store_true", help="replace results of this program")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run_program(main))
