# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""What a reconstruction evaluation says: means over the images, tables, the curve and the sheets of examples."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import torch

from gpstoken_hf.visualization import contact_sheet, draw_error_map, tensor_to_pil

from .autoencoders import BITS_PER_FLOAT
from .baselines import CODECS, thumbnail, thumbnail_side
from .image_sets import ImageSet
from .outputs import atomic_file
from .programs import printable
from .reconstruction_methods import Method, thumbnail_name
from .reports import Block, Curve, Picture, Table, Text, draw_curves, number
from .set_statistics import SetStatistics, distance_names

REFERENCE = "images"
NUM_EXAMPLES = 6


class ReconstructionReport:
    """The words and pictures of an evaluation.

    Args:
        args (`argparse.Namespace`): The options of the program.
        images (`ImageSet`): The images.
        models, methods (`Sequence[Method]`): The models, and all rows: the models and then the base lines.
        perceptual (`dict[str, str]`): Key and title of the perceptual distance, if it is measured.
        statistics (`SetStatistics`, *optional*): Of the features of all methods and of the images.
    """

    title = "Reconstruction"
    picture_files: tuple[str, ...] = ("curve.png", "examples.png", "extremes.png")

    def __init__(
        self,
        args: argparse.Namespace,
        images: ImageSet,
        models: Sequence[Method],
        methods: Sequence[Method],
        perceptual: dict[str, str],
        statistics: SetStatistics | None,
    ):
        self.args, self.images, self.models, self.methods = args, images, models, methods
        self.perceptual, self.statistics = perceptual, statistics
        self.zoom = max(1, round(192 / args.resolution))

    def summarize(
        self, rows: Sequence[dict[str, dict[str, Any]]]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[str]]:
        """The means over the images: the models' entries, the base lines' entries, and warnings."""
        entries = {method.name: self._entry(method, rows) for method in self.methods}
        for method in self.models:
            if method.floats is None or "thumbnail" not in self.args.baselines:
                continue
            entry, side = entries[method.name], min(thumbnail_side(method.floats), self.args.resolution)
            name = thumbnail_name(side)
            differences = [row[method.name]["psnr"] - row[name]["psnr"] for row in rows]
            entry |= {
                "thumbnail_side": side,
                "thumbnail_floats": 3 * side * side,
                "thumbnail_psnr": entries[name]["psnr"],
                "thumbnail_ssim": entries[name]["ssim"],
                "gain": entry["psnr"] - entries[name]["psnr"],
                "gain_standard_error": _standard_error(differences),
            }
        warnings = []
        if self.statistics is not None:
            statistics = self.statistics.sets[REFERENCE]
            for kind, one in statistics.items():
                if one.is_rank_deficient:
                    warnings.append(
                        f"{one.count} images are fewer than the {one.num_features} features ({kind}) plus one: "
                        "Fréchet distances are too large and only comparable at this number of images"
                    )
        models = [entries[method.name] for method in self.models]
        return models, [entries[method.name] for method in self.methods[len(self.models) :]], warnings

    def _entry(self, method: Method, rows: Sequence[dict[str, dict[str, Any]]]) -> dict[str, Any]:
        scores = [row[method.name] for row in rows]
        reached = [entry for entry in scores if entry["psnr"] is not None]
        entry: dict[str, Any] = {"name": method.name, "kind": method.kind}
        if method.candidate is not None:
            entry["tokens"] = method.candidate.tokens
        entry |= {"floats": method.floats, "bits": method.bits}
        is_whole = len(reached) == len(rows)
        for name in scores[0] if is_whole else ("psnr", "ssim"):
            # Where not all images fit, a mean over some images would be compared with one over all.
            entry[name] = sum(row[name] for row in reached) / len(rows) if is_whole else None
        if method.kind in CODECS:
            entry["images_that_fit"] = len(reached)
        if self.statistics is not None and is_whole:
            for kind, distance in self.statistics.distances(method.name, REFERENCE).items():
                entry[distance_names(self.statistics.network.name, True)[kind][0]] = distance
        return entry

    def tables(
        self, results: Sequence[dict[str, Any]], baselines: Sequence[dict[str, Any]], warnings: Sequence[str]
    ) -> list[Block]:
        """The table of all methods, and the table of the focus box if there is one."""
        args = self.args
        columns = [("psnr", "PSNR (dB)", 2), ("ssim", "SSIM", 4)]
        columns += [(key, title, 4) for key, title in self.perceptual.items()]
        if self.statistics is not None:
            columns += [(key, title, 2) for key, title in distance_names(self.statistics.network.name, True).values()]
        rows = []
        for entry in (*results, *baselines):
            gain, error = entry.get("gain"), entry.get("gain_standard_error")
            shown = "" if gain is None else f"{gain:+.2f}" + ("" if error is None else f" ± {error:.2f}")
            rows.append(
                [
                    entry["name"],
                    number(entry["floats"]),
                    number(entry["bits"]),
                    *(number(entry.get(key), digits) for key, _, digits in columns),
                    shown,
                ]
            )
        header = ["method", "floats", "bits", *(title for _, title, _ in columns), "gain (dB)"]
        blocks: list[Block] = [
            Text(
                f"{len(self.images)} images of {', '.join(printable(path.name) for path in args.data)}, "
                f"{args.resolution} x {args.resolution} centre crops ({args.resample}). The gain is over the "
                "thumbnail of as many floats."
            ),
            Table(header, rows),
        ]
        unfit = [entry for entry in baselines if entry.get("images_that_fit", len(self.images)) < len(self.images)]
        if unfit:
            counts = "; ".join(f"{entry['name']}: {entry['images_that_fit']}" for entry in unfit)
            blocks.append(Text(f"A dash: not all images fit into as many bytes at the lowest quality ({counts})."))
        blocks += [Text(f"Warning: {warning}.") for warning in warnings]
        if args.focus:
            focused = [entry for entry in results if "inside_psnr" in entry]
            blocks += [
                Text(f"With the box {','.join(map(str, args.focus))} in focus (weight {args.focus_weight:g}):"),
                Table(
                    ("method", "PSNR in the box (dB)", "with focus", "gain", "PSNR of the image (dB)", "with focus"),
                    [
                        [
                            entry["name"],
                            number(entry["inside_psnr"]),
                            number(entry["inside_psnr_focused"]),
                            f"{entry['inside_psnr_focused'] - entry['inside_psnr']:+.2f}",
                            number(entry["psnr"]),
                            number(entry["psnr_focused"]),
                        ]
                        for entry in focused
                    ],
                ),
            ]
        return blocks

    # -------------------------------------------------------------------------------------------------- pictures

    def pictures(
        self,
        output: Path,
        results: Sequence[dict[str, Any]],
        baselines: Sequence[dict[str, Any]],
        rows: Sequence[dict[str, dict[str, Any]]],
    ) -> list[Block]:
        """Draw `picture_files` into a folder; returns them with captions."""
        self.draw_curve(output / "curve.png", results, baselines)
        self.draw_examples(output / "examples.png")
        self.draw_extremes(output / "extremes.png", rows)
        return [
            Picture("curve.png", "PSNR over the number of floats (16 bits each)."),
            Picture("examples.png", "The first images, a thumbnail of as many floats, and the reconstructions."),
            Picture("extremes.png", f"The images that {self.shown_method.name} reconstructs worst and best."),
        ]

    def draw_curve(self, path: Path, results: Sequence[dict[str, Any]], baselines: Sequence[dict[str, Any]]) -> None:
        groups: dict[str, list[tuple[float, float | None]]] = {}
        for method, entry in zip(self.models, results):
            if method.floats is not None:
                label = method.name.rsplit(",", 1)[0] if method.candidate and method.candidate.tokens else method.name
                groups.setdefault(label, []).append((entry["bits"] / BITS_PER_FLOAT, entry["psnr"]))
        curves = [Curve(label, points) for label, points in groups.items()]
        for kind, label, style in (
            ("thumbnail", "bicubic thumbnail", "s--"),
            ("jpeg", "JPEG", "^:"),
            ("webp", "WebP", "v:"),
        ):
            points = [(entry["bits"] / BITS_PER_FLOAT, entry["psnr"]) for entry in baselines if entry["kind"] == kind]
            curves.append(Curve(label, points, style))
        side = self.args.resolution
        title = f"{len(self.images)} images, {side} x {side}"
        draw_curves(path, curves, "floats per image (of 16 bits)", "PSNR (dB)", title, is_log=True)

    def _pictures(self, images: Sequence[torch.Tensor]) -> list[PIL.Image.Image]:
        side = self.args.resolution * self.zoom
        return [tensor_to_pil(image).resize((side, side), PIL.Image.Resampling.NEAREST) for image in images]

    def draw_examples(self, path: Path, methods: Sequence[Method] | None = None) -> None:
        """A row for each of the first images: the image, a thumbnail, and a column for each method."""
        places = range(min(NUM_EXAMPLES, len(self.images)))
        batch = self.images.batch(places.start, places.stop).to(self.args.device)
        columns, titles = [list(batch)], ["image"]
        floats = [method.floats for method in self.models if method.floats is not None]
        if floats:
            side = min(thumbnail_side(max(floats)), self.args.resolution)
            columns.append(list(thumbnail(batch, side)))
            titles.append(thumbnail_name(side))
        for method in self.models if methods is None else methods:
            found = [image for image in method.produce(batch, places) if image is not None]
            columns.append(found)
            tokens = method.candidate.tokens if method.candidate else None
            is_alone = len(self.args.model) == 1 and tokens is not None and not method.group
            titles.append(f"{tokens} tokens" if is_alone else method.name)
        pictures = [picture for row in zip(*columns) for picture in self._pictures(row)]
        with atomic_file(path) as staging:
            contact_sheet(pictures, titles * len(batch), columns=len(columns)).save(staging)

    @property
    def shown_method(self) -> Method:
        """The first model, with its largest number of tokens."""
        first = self.models[0].candidate
        same = [one for one in self.models if first and one.candidate and one.candidate.model is first.model]
        return same[-1] if same else self.models[0]

    def draw_extremes(self, path: Path, rows: Sequence[dict[str, dict[str, Any]]]) -> None:
        """Rows of image, reconstruction and error: the worst images of `shown_method`, then the best."""
        method = self.shown_method
        order = sorted(range(len(rows)), key=lambda place: rows[place][method.name]["psnr"])
        count = min(NUM_EXAMPLES // 2, len(rows))
        chosen = list(dict.fromkeys([*order[:count], *order[-count:]]))
        pictures, titles = [], []
        for place in chosen:
            image = self.images.batch(place, place + 1).to(self.args.device)
            sample = method.produce(image, range(place, place + 1))[0]
            assert sample is not None
            error = draw_error_map(image[0].cpu(), sample.cpu(), zoom=self.zoom)
            pictures += [*self._pictures([image[0], sample]), error]
            scores = rows[place][method.name]
            titles += [self.images.names[place][-24:], f"{scores['psnr']:.2f} dB", "error"]
        with atomic_file(path) as staging:
            contact_sheet(pictures, titles, columns=3).save(staging)


def _standard_error(values: Sequence[float]) -> float | None:
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
