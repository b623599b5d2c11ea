# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Score generated images: FID, sFID, Inception Score, precision and recall, for a pipeline or a folder of images.

    python -m pipelines.evaluate_generation --pipeline owner/name --reference VIRTUAL_imagenet256_labeled.npz \
        --num_images 50000 --guidance_scale 1.0 1.25 1.5 2.0 --guidance_interval 0.2,1.0 0,1
    python -m pipelines.evaluate_generation --samples samples/ --reference photographs/ --resolution 256
    accelerate launch --num_processes 8 -m pipelines.evaluate_generation --pipeline owner/name --reference adm.npz

The reference is an `.npz` with ADM's statistics (precision and recall then need its images, `arr_0`), or images: a
folder, parquet files, or an `.npz` of images. With --resolution images are resized by their shortest side and cropped
in the middle; without it they keep their size, which must be one. Samples come from a pipeline, or from --samples in
the same kinds of files, such as the sample batches that ADM's programs write.

Several values of --guidance_scale, --guidance_interval, --steps or --scheduler make a sweep: one row for each
combination, and a plot. Image i has class i modulo the number of classes, and noise that is drawn from --seed and i.
It does not depend on the batch size or the number of processes, which share the work.

Features are written batch by batch; an interrupted run resumes, and more --num_images add to it. The features are
those of torch-fidelity's Inception. With another --feature_network the distance is not called FID. Output:

    results.json            the scores, the protocol and the command
    report.md, report.html  tables and pictures
    sweep.png               the distance over what is swept
    samples.png             the first images of every row
    features/               the features of all images, by row
    images/                 the images, with --save_images
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm import tqdm

import gpstoken_hf
from gpstoken_hf.evaluation_results import make_result, protocol_differences, write_result
from gpstoken_hf.feature_networks import INCEPTION, load_feature_network
from gpstoken_hf.metrics import (
    FeatureStatistics,
    frechet_distance,
    inception_score,
    precision_recall,
    read_statistics,
    write_statistics,
)
from gpstoken_hf.visualization import contact_sheet

from .shared.checkpoints import load_pipeline, weights_fingerprint
from .shared.feature_files import FeatureFolder, FileSource, PipelineSource, Source, extract
from .shared.image_sets import RESAMPLES, ImageSet
from .shared.outputs import OwnDirectory, atomic_file, claim_file, own_directory
from .shared.photographs import file_digest
from .shared.programs import (
    ProgramError,
    make_parser,
    non_negative_float,
    non_negative_int,
    positive_int,
    printable,
    run_program,
)
from .shared.reports import (
    REPORT_FILES,
    Block,
    Command,
    Curve,
    Heading,
    Picture,
    Table,
    Text,
    draw_curves,
    number,
    write_report,
)
from .shared.sampling import DTYPES, SCHEDULERS, class_ids
from .shared.set_statistics import describe_network, distance_names

PROGRAM = "pipelines.evaluate_generation"
SETTINGS_FILE = "settings.json"
REFERENCE = "reference"
NUM_NEIGHBORS, NUM_SPLITS, SPLIT_SEED = 3, 10, 2020
CHUNK = 1000
SHOWN = 8


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    state = PartialState(cpu=args.device == "cpu")
    device = args.device or state.device
    if args.save_reference is not None and state.is_main_process:
        claim_file(args.save_reference, PROGRAM)
    moments, reference = read_reference(args)
    sources = make_sources(args, device)
    first = next(iter(sources.values()))
    if reference is not None:
        check_sizes(reference, first)
    network = load_feature_network(args.feature_network, args.feature_weights_file).to(device)
    protocol = make_protocol(args, moments is not None, reference, first, describe_network(network))
    settings = {
        "version": gpstoken_hf.__version__,
        **{name: value for name, value in protocol.items() if name != "images"},
        "samples": {name: source.settings for name, source in sources.items() if name != REFERENCE},
    }
    with ExitStack() as stack:
        with state.main_process_first():
            if state.is_main_process:
                folder = stack.enter_context(own_directory(args.output, PROGRAM))
                open_output(folder, settings, args.overwrite)
        everything = {**({REFERENCE: FileSource(reference)} if reference is not None else {}), **sources}
        features = {name: FeatureFolder(args.output / "features" / name) for name in everything}
        plan = {name: features[name].missing(len(source), args.batch_size) for name, source in everything.items()}
        state.wait_for_everyone()  # before anybody adds to what has been listed
        if state.is_main_process:
            files = [file for name, batches in plan.items() for file in features[name].files(batches)]
            present = [file for name in everything for file in features[name].files(features[name].ranges())]
            images = [name for one in sources.values() for name in one.image_files(args.save_images)]
            reports = [SETTINGS_FILE, "results.json", "sweep.png", "samples.png", *REPORT_FILES]
            folder.expect([*reports, *files, *present, *images])
        state.wait_for_everyone()
        for name, source in everything.items():
            batches = plan[name][state.process_index :: state.num_processes]
            with tqdm(batches, desc=name, unit=" batches", disable=None if state.is_main_process else True) as bar:
                for places in bar:
                    output = args.output if args.save_images and name != REFERENCE else None
                    extract(source, places, network, features[name], output)
        state.wait_for_everyone()
        if state.is_main_process:
            write_results(args, argv, protocol, settings, features, sources, moments)
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(PROGRAM, __doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--pipeline", help="folder, Hub repository, or a bundled checkpoint")
    source.add_argument("--samples", type=Path, nargs="+", help="generated images: folders, parquet or .npz files")
    parser.add_argument("--reference", type=Path, nargs="+", required=True, help="an .npz of statistics, or images")
    parser.add_argument("--num_images", type=positive_int, help="default: 50,000, or all of --samples")
    parser.add_argument("--resolution", type=positive_int, help="resize and crop the images of files to it")
    parser.add_argument("--resample", choices=RESAMPLES, default="bicubic")
    parser.add_argument("--image_column", default="image", help="column of parquet files")
    parser.add_argument("--classes", nargs="+", metavar="CLASS", help="class ids or names; default: all classes")
    parser.add_argument("--guidance_scale", type=non_negative_float, nargs="+", default=[1.5], help="1: no guidance")
    parser.add_argument(
        "--guidance_interval",
        type=interval,
        nargs="+",
        default=[(0.2, 1.0)],
        metavar="LOW,HIGH",
        help="range of time in which guidance acts; 0 is noise, 1 is data",
    )
    parser.add_argument("--steps", type=positive_int, nargs="+", default=[250], help="steps of the texture stage")
    parser.add_argument("--layout_steps", type=positive_int, default=5, help="steps of the layout stage")
    parser.add_argument(
        "--scheduler", choices=SCHEDULERS, nargs="+", default=[None], help="of the texture stage; default: its own"
    )
    parser.add_argument("--seed", type=non_negative_int, default=0)
    parser.add_argument("--batch_size", type=positive_int, default=16)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", help="default: the accelerator of this process, or the CPU")
    parser.add_argument(
        "--feature_network",
        default=INCEPTION,
        metavar="NAME",
        help="inception (default), or a stand-in: efficientnet_lite0, timm/NAME or a classifier of torchvision",
    )
    parser.add_argument("--feature_weights_file", type=Path, help="its weights; default: cached or downloaded")
    parser.add_argument("--save_images", action="store_true", help="write the generated images, too")
    parser.add_argument("--save_reference", type=Path, help="write the statistics of the reference, as ADM does")
    parser.add_argument("--output", type=Path, default=Path("out/evaluate_generation"))
    parser.add_argument("--overwrite", action="store_true", help="replace results of this program")
    return parser.parse_args(argv)


def interval(text: str) -> tuple[float, float]:
    """An argparse type: `low,high`, both in [0, 1]."""
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be two numbers low,high, got {text!r}") from None
    if not 0 <= low <= high <= 1:
        raise argparse.ArgumentTypeError(f"must be 0 <= low <= high <= 1, got {text!r}")
    return low, high


# ---------------------------------------------------------------------------------------------------------- inputs


def read_reference(args: argparse.Namespace) -> tuple[dict[str, FeatureStatistics] | None, ImageSet | None]:
    """The statistics of `--reference` and its images; ADM's files hold both."""
    images: ImageSet | None = None
    moments: dict[str, FeatureStatistics] | None = None
    is_archive = len(args.reference) == 1 and args.reference[0].suffix == ".npz"
    try:
        images = ImageSet(args.reference, args.image_column, args.resolution, None, args.resample)
    except ProgramError:
        if not is_archive or not args.reference[0].is_file():
            raise
    # Statistics in files are Inception's; another network needs the images.
    if is_archive and (images is None or args.feature_network == INCEPTION):
        try:
            moments = read_statistics(args.reference[0])
        except ValueError:
            if images is None:
                raise
    return moments, images


def make_sources(args: argparse.Namespace, device: str | torch.device) -> dict[str, Source]:
    """What is scored, by the name of its row."""
    if args.samples:
        images = ImageSet(args.samples, args.image_column, args.resolution, args.num_images, args.resample)
        if args.num_images and len(images) < args.num_images:
            raise ProgramError(
                f"--samples must hold {args.num_images} images, as --num_images says, got {len(images)}"
            )
        sources: dict[str, Source] = {"samples": FileSource(images)}
    else:
        pipeline = load_pipeline(args.pipeline, DTYPES[args.dtype], device)
        weights = weights_fingerprint(
            pipeline.vae, pipeline.transformer, pipeline.layout_transformer, pipeline.layout_bank
        )
        labels = class_ids(pipeline, args.classes)
        count = args.num_images or 50_000
        sources = {}
        for scale, (low, high), steps, scheduler in itertools.product(
            args.guidance_scale, args.guidance_interval, args.steps, args.scheduler
        ):
            name = f"w={scale:g} in {low:g}-{high:g}, {steps} steps" + (f", {scheduler}" if scheduler else "")
            options = {
                "guidance_scale": scale,
                "guidance_interval": [low, high],
                "steps": steps,
                "layout_steps": args.layout_steps,
                "scheduler": scheduler,
                "dtype": args.dtype,
                "classes": labels,
                "seed": args.seed,
                "weights": weights,
            }
            sources[name] = PipelineSource(pipeline, count, options, name)
    for source in sources.values():
        if len(source) < 2:
            raise ProgramError(f"a Fréchet distance must be of at least 2 images, got {len(source)}")
    return sources


def check_sizes(reference: ImageSet, samples: Source) -> None:
    """Raise a ProgramError if samples and reference differ in size: a network would compare blur, not content."""
    wanted, got = samples.size, reference.size
    if got != wanted:
        raise ProgramError(
            f"--reference must hold images of {wanted[0]} x {wanted[1]} pixels as the samples are, "
            f"got {got[0]} x {got[1]}; --resolution resizes and crops images of files"
        )


def make_protocol(
    args: argparse.Namespace, has_moments: bool, images: ImageSet | None, samples: Source, features: dict[str, Any]
) -> dict[str, Any]:
    """How the numbers are measured, against the images of `--reference` or the statistics that it holds."""
    if images is not None and len(images) < 2:
        raise ProgramError(f"--reference must hold at least 2 images, got {len(images)}")
    return {
        "task": "generation",
        "images": len(samples),
        "image_size": list(samples.size),
        "reference": [printable(path.name) for path in args.reference],
        # Of the whole file where it holds statistics, as they need not be those of its images.
        "reference_checksum": file_digest(args.reference[0]) if images is None or has_moments else images.checksum(),
        "reference_images": len(images) if images is not None else "statistics",
        "resolution": args.resolution,
        "crop": "centre, after the shortest side is resized" if args.resolution else None,
        "resize": args.resample if args.resolution else None,
        "antialias": True,
        "rounding": "8bit",
        "features": features,
        "precision_recall": f"{NUM_NEIGHBORS} neighbours",
        "inception_score": f"{NUM_SPLITS} splits, shuffled with seed {SPLIT_SEED}",
        "seed": args.seed if args.pipeline else None,
    }


def open_output(folder: OwnDirectory, settings: dict[str, Any], overwrite: bool) -> None:
    """Prepare the output folder. Features of the same settings stay.

    Raises:
        ProgramError: If the folder holds features of other settings, unless `overwrite`.
    """
    path = folder.path / SETTINGS_FILE
    present = None
    if path.exists():
        try:
            present = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, RecursionError):
            present = None
    if overwrite:
        folder.clear()
    elif present is not None:
        # Another sweep may be added: its rows have other names.
        known = {name: value for name, value in settings["samples"].items() if name in present.get("samples", {})}
        now = {**settings, "samples": known}
        before = {**present, "samples": {name: present.get("samples", {})[name] for name in known}}
        changed = protocol_differences(before, now)
        if changed:
            pairs = ", ".join(f"{name} {old!r} (now {new!r})" for name, old, new in changed[:3])
            raise ProgramError(
                f"{folder.path} holds features of other settings: {printable(pairs)}; choose another --output, or "
                "--overwrite"
            )
        settings = {**settings, "samples": {**present.get("samples", {}), **settings["samples"]}}
    elif path.exists() or (folder.path / "features").exists():
        raise ProgramError(
            f"{path} must hold the settings of the features beside it, got none; --overwrite clears them"
        )
    folder.expect([SETTINGS_FILE])
    with atomic_file(path) as staging:
        staging.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


# --------------------------------------------------------------------------------------------------------- results


def statistics_of(folder: FeatureFolder, count: int, kinds: Sequence[str]) -> dict[str, FeatureStatistics]:
    """Statistics of the first images in their order, so that batches and processes make no difference."""
    found = {kind: FeatureStatistics() for kind in kinds}
    for start in range(0, count, CHUNK):
        features = folder.read(range(start, min(start + CHUNK, count)), kinds)
        for kind in kinds:
            found[kind].update(features[kind])
    return found


def write_results(
    args: argparse.Namespace,
    argv: Sequence[str] | None,
    protocol: dict[str, Any],
    settings: dict[str, Any],
    features: dict[str, FeatureFolder],
    sources: dict[str, Source],
    moments: dict[str, FeatureStatistics] | None,
) -> None:
    """Compute the scores from the features, and write and print them."""
    network = protocol["features"]["network"]
    titles = distance_names(network, False)
    kinds = [kind for kind in titles if kind in protocol["features"]["layers"] and (not moments or kind in moments)]
    real: torch.Tensor | None = None
    if moments is None:
        moments = statistics_of(features[REFERENCE], int(protocol["reference_images"]), kinds)
    if REFERENCE in features:
        real = features[REFERENCE].read(range(int(protocol["reference_images"])), ("pool",))["pool"]
    if args.save_reference is not None:
        with atomic_file(args.save_reference) as staging, staging.open("wb") as file:
            write_statistics(file, {kind: moments[kind] for kind in kinds})
    score_key = "inception_score" if network == INCEPTION else "class_score"
    columns = [titles[kind] for kind in kinds]
    columns += [(score_key, "IS" if network == INCEPTION else f"class score ({network})")]
    results, warnings = [], []
    for name, source in sources.items():
        count = len(source)
        made = statistics_of(features[name], count, kinds)
        options = {
            key: value for key, value in source.settings.items() if key not in ("classes", "weights", "checksum")
        }
        entry: dict[str, Any] = {"name": name, "images": count, **options}
        for kind in kinds:
            if made[kind].num_features != moments[kind].num_features:
                raise ProgramError(
                    f"--reference must be of the {made[kind].num_features} features of {network}, "
                    f"got {moments[kind].num_features}"
                )
            entry[titles[kind][0]] = frechet_distance(made[kind], moments[kind])
            if made[kind].is_rank_deficient or moments[kind].is_rank_deficient:
                warnings.append(
                    f"there are no more images than features ({kind}, {made[kind].num_features}): the Fréchet "
                    "distance is too large and only comparable at this number of images"
                )
        rest = features[name].read(range(count), ("pool", "logits"))
        if count < NUM_SPLITS:
            warnings.append(f"a score over {NUM_SPLITS} splits takes at least {NUM_SPLITS} images, got {count}")
        else:
            entry[score_key], entry[f"{score_key}_deviation"] = inception_score(rest["logits"], NUM_SPLITS, SPLIT_SEED)
        if real is None:
            warnings.append("precision and recall take images of the reference, got statistics")
        elif min(count, len(real)) <= NUM_NEIGHBORS:
            warnings.append(
                f"precision and recall take more than {NUM_NEIGHBORS} images of each set, got {count} and {len(real)}"
            )
        else:
            entry["precision"], entry["recall"] = precision_recall(rest["pool"], real, NUM_NEIGHBORS)
        results.append(entry)
    columns += [("precision", "precision"), ("recall", "recall")]
    command = [PROGRAM, *(sys.argv[1:] if argv is None else argv)]
    record = make_result(
        {**protocol, "images": len(next(iter(sources.values())))},
        results,
        command,
        warnings,
        samples=settings["samples"],
    )
    with atomic_file(args.output / "results.json") as staging:
        write_result(staging, record)
    rows = [
        [entry["name"], number(entry["images"]), *(number(entry.get(key), 3) for key, _ in columns)]
        for entry in results
    ]
    table = Table(["samples", "images", *(title for _, title in columns)], rows)
    blocks: list[Block] = [
        Text(f"Against {', '.join(protocol['reference'])} ({protocol['reference_images']} images)."),
        table,
        *(Text(f"Warning: {warning}.") for warning in record["warnings"]),
    ]
    if draw_sweep(args, results, *titles["pool"]):
        blocks.append(Picture("sweep.png", f"{titles['pool'][1]} over what was swept."))
    draw_samples(args.output / "samples.png", features, sources)
    blocks += [
        Picture("samples.png", "The first images of every row."),
        Heading("How it was measured"),
        Command(f"python -m {shlex.join(map(printable, command))}"),
        Table(("field", "value"), [(name, json.dumps(value)) for name, value in record["protocol"].items()]),
    ]
    write_report(args.output, "Generation", blocks)
    print((args.output / "report.md").read_text(encoding="utf-8").split("## ")[0])


def draw_sweep(args: argparse.Namespace, results: Sequence[dict[str, Any]], key: str, title: str) -> bool:
    """The distance over the first option with several values, a curve for each combination of the others."""
    options = ("guidance_scale", "steps", "guidance_interval", "scheduler")
    swept = [name for name in options if args.pipeline and len(set(getattr(args, name))) > 1]
    if not swept:
        return False
    axis, others = swept[0], swept[1:]
    # Intervals and schedulers have no order: each has a place along the axis.
    is_number = axis in ("guidance_scale", "steps")
    names = [] if is_number else list(dict.fromkeys(_shown(entry[axis]) for entry in results))
    groups: dict[str, list[tuple[float, float | None]]] = {}
    for entry in results:
        label = ", ".join(f"{name.replace('_', ' ')} {_shown(entry[name])}" for name in others) or args.pipeline
        x = entry[axis] if is_number else names.index(_shown(entry[axis]))
        groups.setdefault(label, []).append((float(x), entry[key]))
    curves = [Curve(label, points) for label, points in groups.items()]
    label = axis.replace("_", " ")
    draw_curves(args.output / "sweep.png", curves, label, title, f"{results[0]['images']} images", names=names)
    return True


def _shown(value: Any) -> str:
    """A value of an option, as a person would write it."""
    return f"{value[0]:g} to {value[1]:g}" if isinstance(value, list) else str(value)


def draw_samples(path: Path, features: dict[str, FeatureFolder], sources: dict[str, Source]) -> None:
    """A row of images for each row of the table."""
    pictures, titles = [], []
    count = min(SHOWN, *(len(source) for source in sources.values()))
    for name in sources:
        shown = features[name].images(count)
        pictures += shown
        titles += [name] + [""] * (len(shown) - 1)
    with atomic_file(path) as staging:
        contact_sheet(pictures, titles, columns=count).save(staging)


if __name__ == "__main__":
    raise SystemExit(run_program(main))
