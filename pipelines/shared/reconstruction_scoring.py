# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Scoring reconstructions: all methods on all images, batch by batch, resumable, with the protocol in the result.

Shapes: B images of H x W pixels.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import gpstoken_hf
from gpstoken_hf.evaluation_results import make_result, protocol_differences, write_result
from gpstoken_hf.feature_networks import LPIPS_NETWORKS, load_feature_network, load_perceptual_network
from gpstoken_hf.metrics import psnr, ssim, to_uint8

from .autoencoders import BITS_PER_FLOAT, Candidate, describe
from .checkpoints import weights_fingerprint
from .image_sets import RESAMPLES, ImageSet
from .outputs import OwnDirectory, atomic_file
from .programs import (
    ProgramError,
    positive_int,
    printable,
)
from .reconstruction_methods import Method
from .reconstruction_report import REFERENCE, ReconstructionReport
from .reports import (
    REPORT_FILES,
    Command,
    Heading,
    Table,
    as_markdown,
    write_report,
)
from .set_statistics import SetStatistics, describe_network

PER_IMAGE_FILE, STATISTICS_FILE, PARQUET_FILE = "per_image.jsonl", "statistics.safetensors", "per_image.parquet"
OUTPUTS = (PER_IMAGE_FILE, STATISTICS_FILE, PARQUET_FILE, "results.json", "table.md", *REPORT_FILES)
# The statistics take 67 MB for each method with Inception.
SAVE_STATISTICS_S = 120.0

Scores = dict[str, float | None]


def add_options(parser: argparse.ArgumentParser, output: Path) -> None:
    """The options of every program that scores reconstructions; `output` is the default folder."""
    parser.add_argument("paths", nargs="*", type=Path, metavar="data", help="the same as --data")
    parser.add_argument(
        "--data",
        "--dataset",
        nargs="+",
        type=Path,
        default=[],
        help="parquet files, .npz files of images, image files, and folders of images",
    )
    parser.add_argument("--image_column", default="image", help="column of the parquet files")
    parser.add_argument("--resolution", type=positive_int, default=64)
    parser.add_argument("--resample", choices=RESAMPLES, default="bicubic")
    parser.add_argument("--max_images", type=positive_int, help="use only the first images, this many")
    parser.add_argument("--batch_size", type=positive_int, default=16)
    parser.add_argument("--rounding", choices=("none", "8bit"), default="none", help="of pixels, before PSNR and SSIM")
    parser.add_argument(
        "--feature_network",
        metavar="NAME",
        help="adds rFID: inception, or a stand-in: efficientnet_lite0, timm/NAME or a classifier of torchvision",
    )
    parser.add_argument("--feature_weights_file", type=Path, help="its weights; default: cached or downloaded")
    parser.add_argument(
        "--lpips_network", metavar="NAME", help="adds LPIPS: alex, vgg or squeeze, or a stand-in as above"
    )
    parser.add_argument("--lpips_weights_file", type=Path, help="its weights; default: cached or downloaded")
    parser.add_argument("--output", type=Path, default=output)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--overwrite", action="store_true", help="replace results of this program")


def check_options(args: argparse.Namespace) -> None:
    """Join both ways to name the data, and refuse what no image can be scored with."""
    args.data = [*args.paths, *args.data]
    if not args.data:
        raise ProgramError("--data must name files or folders of images, got none")
    if args.resolution < 11:
        raise ProgramError(f"--resolution must be at least 11, the window of SSIM, got {args.resolution}")


class Evaluation:
    """Scores all methods on all images, batch by batch, and writes the results.

    Args:
        program (`str`): Module name of the program.
        args (`argparse.Namespace`): Its options.
        images (`ImageSet`): The images.
        models, methods (`Sequence[Method]`): The models, and all rows: the models and then the base lines.
        report_class (`type[ReconstructionReport]`, *optional*): Writes the tables and draws the pictures.

    Raises:
        ValueError: If two methods have one name, or a network that measures is missing.
    """

    def __init__(
        self,
        program: str,
        args: argparse.Namespace,
        images: ImageSet,
        models: Sequence[Method],
        methods: Sequence[Method],
        report_class: type[ReconstructionReport] = ReconstructionReport,
    ):
        self.program = program
        self.args, self.images, self.models, self.methods = args, images, models, methods
        names = [method.name for method in methods]
        if len(set(names)) < len(names):
            raise ProgramError(f"models and reconstructions must have different names, got {', '.join(names)}")
        self.statistics: SetStatistics | None = None
        self.perceptual: torch.nn.Module | None = None
        if args.feature_network:
            if len(images) < 2:
                raise ProgramError(f"a Fréchet distance must be of at least 2 images, got {len(images)}")
            network = load_feature_network(args.feature_network, args.feature_weights_file).to(args.device)
            self.statistics = SetStatistics(network, [REFERENCE, *names])
        if args.lpips_network:
            self.perceptual = load_perceptual_network(args.lpips_network, args.lpips_weights_file).to(args.device)
        # Only LPIPS's own networks give a number of that name.
        self.perceptual_key = "lpips" if args.lpips_network in LPIPS_NETWORKS else "perceptual_distance"
        titles = {self.perceptual_key: str(self.perceptual.name)} if self.perceptual is not None else {}
        self.protocol = self._protocol()
        self.report = report_class(args, images, models, methods, titles, self.statistics)

    def _protocol(self) -> dict[str, Any]:
        args = self.args
        protocol: dict[str, Any] = {
            "task": "reconstruction",
            "images": len(self.images),
            "reference": [printable(path.name) for path in args.data],
            "reference_checksum": self.images.checksum(),
            "resolution": args.resolution,
            "crop": "centre, after the shortest side is resized",
            "resize": args.resample,
            "antialias": True,
            "rounding": args.rounding,
            "bits_per_float": BITS_PER_FLOAT,
            "latents": "mode, nothing is drawn",
            "seed": None,
            "psnr": "mean over images of the PSNR over all pixels and channels",
            "ssim": "Gaussian window of 11 x 11 pixels and sigma 1.5, inside the image, mean over channels",
            "focus": args.focus and list(args.focus),
            "focus_weight": args.focus_weight if args.focus else None,
        }
        if self.perceptual is not None:
            protocol["lpips"] = {
                "network": self.perceptual.name,
                "weights": weights_fingerprint(self.perceptual),
                "rounding": args.rounding,
            }
        if self.statistics is not None:
            protocol["features"] = {**describe_network(self.statistics.network), "rounding": "8bit"}
        return protocol

    def run(self, folder: OwnDirectory, argv: Sequence[str] | None) -> None:
        """Score the images that have no scores yet, then write and print the results of all images."""
        args, output = self.args, folder.path
        candidates = [method.candidate for method in self.models if method.candidate is not None]
        settings = {
            "version": gpstoken_hf.__version__,
            **self.protocol,
            "methods": {method.name: method.kind for method in self.methods},
            "weights": {
                **{entry["name"]: entry["weights"] for entry in describe(candidates)},
                **{method.name: method.checksum for method in self.models if method.checksum},
            },
            "tile_size": args.tile_size,
        }
        done = _open_progress(folder, settings, args, self.statistics, [*OUTPUTS, *self.report.picture_files])
        if done:
            print(
                f"{done} of {len(self.images)} images are scored already in {printable(output / PER_IMAGE_FILE)}; "
                "resuming"
            )
        self._score(output, done)
        rows = _read_rows((output / PER_IMAGE_FILE).read_text(encoding="utf-8"))[1]
        results, baselines, warnings = self.report.summarize(rows)
        command = [self.program, *(sys.argv[1:] if argv is None else argv)]
        record = make_result(
            self.protocol, results, command, warnings, device=str(args.device), weights=settings["weights"]
        )
        record["baselines"] = baselines
        with atomic_file(output / "results.json") as staging:
            write_result(staging, record)
        _write_parquet(output / PARQUET_FILE, rows, self.images.names)
        blocks = self.report.tables(results, baselines, warnings)
        table = as_markdown(blocks)
        with atomic_file(output / "table.md") as staging:
            staging.write_text(table, encoding="utf-8")
        blocks += self.report.pictures(output, results, baselines, rows)
        blocks += [
            Heading("How it was measured"),
            Command(f"python -m {shlex.join(map(printable, command))}"),
            Table(("field", "value"), [(name, json.dumps(value)) for name, value in self.protocol.items()]),
        ]
        write_report(output, self.report.title, blocks)
        print(table)

    def _score(self, output: Path, done: int) -> None:
        args = self.args
        saved = time.monotonic()
        with (
            (output / PER_IMAGE_FILE).open("a", encoding="utf-8") as log,
            tqdm(total=len(self.images), initial=done, unit=" images", disable=None) as bar,
        ):
            for start in range(done, len(self.images), args.batch_size):
                places = range(start, min(start + args.batch_size, len(self.images)))
                batch = self.images.batch(places.start, places.stop).to(args.device)
                for scores in self.score_batch(batch, places):
                    log.write(json.dumps(scores) + "\n")
                log.flush()
                bar.update(len(batch))
                is_last = places.stop == len(self.images)
                if self.statistics is not None and (is_last or time.monotonic() - saved > SAVE_STATISTICS_S):
                    self.statistics.save(output / STATISTICS_FILE, places.stop)
                    saved = time.monotonic()

    def score_batch(self, images: torch.Tensor, places: range) -> Iterator[dict[str, Scores]]:
        """For each image of a batch: its scores by method and name."""
        rows: list[dict[str, Scores]] = [{} for _ in places]
        target = self._rounded(images)
        if self.statistics is not None:
            self.statistics.update(REFERENCE, to_uint8(images))
        for method in self.methods:
            found = method.produce(images, places)
            present = [i for i, image in enumerate(found) if image is not None]
            samples = torch.stack([image for image in found if image is not None]) if present else images[:0]
            columns = self._scores(samples, target[present]) if present else {}
            if self.statistics is not None and present:
                self.statistics.update(method.name, to_uint8(samples))
            if self.args.focus and method.candidate is not None and method.candidate.is_ours:
                columns |= self._focus_scores(method.candidate, samples, images)
            for row, scores in enumerate(rows):
                place = present.index(row) if row in present else None
                scores[method.name] = (
                    {"psnr": None} if place is None else {name: values[place] for name, values in columns.items()}
                )
        yield from rows

    def _rounded(self, images: torch.Tensor) -> torch.Tensor:
        return images if self.args.rounding == "none" else to_uint8(images).to(images.dtype) / 127.5 - 1

    def _scores(self, samples: torch.Tensor, target: torch.Tensor) -> dict[str, list[float]]:
        samples = self._rounded(samples)
        columns = {"psnr": psnr(samples, target).tolist(), "ssim": ssim(samples, target).tolist()}
        if self.perceptual is not None:
            with torch.inference_mode():
                columns[self.perceptual_key] = self.perceptual(samples, target).double().tolist()
        return columns

    def _focus_scores(self, candidate: Candidate, plain: torch.Tensor, images: torch.Tensor) -> dict[str, list[float]]:
        x0, y0, x1, y1 = self.args.focus
        window = (..., slice(y0, y1 + 1), slice(x0, x1 + 1))
        importance = torch.zeros(images.shape[0], *images.shape[-2:], device=images.device)
        importance[window] = self.args.focus_weight
        focused = candidate.reconstruct(images, importance)
        return {
            "inside_psnr": psnr(plain[window], images[window]).tolist(),
            "inside_psnr_focused": psnr(focused[window], images[window]).tolist(),
            "psnr_focused": psnr(focused, images).tolist(),
        }


# -------------------------------------------------------------------------------------------------------- progress


def _read_rows(text: str) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """The settings and the whole lines after them. A line that was cut off ends the file."""
    found = []
    for line in text.split("\n")[:-1]:  # the rest after the last line break is empty, or was cut off
        try:
            value = json.loads(line)
        except ValueError:
            break
        if not isinstance(value, dict):
            break
        found.append(value)
    return (found[0], found[1:]) if found else (None, [])


def _open_progress(
    folder: OwnDirectory,
    settings: dict[str, Any],
    args: argparse.Namespace,
    statistics: SetStatistics | None,
    outputs: Sequence[str],
) -> int:
    """Prepare `PER_IMAGE_FILE` for the next line; returns how many images it holds.

    The first line holds the settings. Lines after the images of the saved statistics are dropped.

    Raises:
        ProgramError: If the file is of other settings, unless `--overwrite`.
    """
    path = folder.path / PER_IMAGE_FILE
    rows: list[dict[str, Any]] = []
    if args.overwrite:
        folder.clear()
    elif path.exists():
        present, rows = _read_rows(path.read_text(encoding="utf-8", errors="replace"))
        changed = [] if present is None else protocol_differences(present, settings)
        if changed:
            pairs = ", ".join(f"{name} {old!r} (now {new!r})" for name, old, new in changed[:3])
            raise ProgramError(
                f"{path} holds the scores of other settings: {printable(pairs)}; "
                "choose another --output, or --overwrite"
            )
    if statistics is not None:
        counted = statistics.load(folder.path / STATISTICS_FILE) if rows else 0
        if counted > len(rows):  # the statistics hold images whose scores are lost
            counted = 0
            (folder.path / STATISTICS_FILE).unlink()
            statistics.load(folder.path / STATISTICS_FILE)
        rows = rows[:counted]  # the end of a batch, which need not be one of today's --batch_size
    elif len(rows) < settings["images"]:
        # Whole batches, as another batch changes the last digits.
        rows = rows[: len(rows) // args.batch_size * args.batch_size]
    folder.expect(outputs)
    with atomic_file(path) as staging:
        lines = [json.dumps(settings), *map(json.dumps, rows)]
        staging.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(rows)


def _write_parquet(path: Path, rows: Sequence[dict[str, dict[str, Any]]], names: Sequence[str]) -> None:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        print(f"no {path.name}: it needs pyarrow (pip install gpstoken-hf[eval])", file=sys.stderr)
        return
    flat = [
        {"index": index, "image": names[index], "method": method, **scores}
        for index, row in enumerate(rows)
        for method, scores in row.items()
    ]
    columns = dict.fromkeys(name for entry in flat for name in entry)
    table = pyarrow.table({name: [entry.get(name) for entry in flat] for name in columns})
    with atomic_file(path) as staging:
        pyarrow.parquet.write_table(table, staging)
