# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Two stages against one: class-conditional generators of one architecture, Fréchet distance against training time.

    python -m training.compare_stages --data_files cifar10.parquet --budget_minutes 60 --output_dir runs/stages

One tokenizer is trained on the images and makes one cache of tokens for everything that follows. For each seed the
two-stage way trains a layout and a texture generator, which share the budget, and the one-stage way trains one
generator for the whole budget. The averaged weights of every checkpoint are sampled with the pipeline of the library,
without guidance, and compared with held-out images. The time (or the steps, if the budget is in steps) of a two-stage
point is that of the finished layout generator and of the texture generator so far. What is finished is not done again,
an interrupted run resumes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file
from tqdm.auto import tqdm

from gpstoken_hf.metrics import FeatureStatistics, frechet_distance
from gpstoken_hf.modeling_gpstoken import GPSTokenModel
from gpstoken_hf.pipeline_gpstoken import GPSTokenPipeline
from gpstoken_hf.transformer_sit import SIT_PRESETS, SiTTransformer1DModel
from gpstoken_hf.visualization import contact_sheet, tensor_to_pil
from pipelines.shared.checkpoints import find_checkpoint
from pipelines.shared.outputs import atomic_file
from pipelines.shared.programs import ProgramError, run_program
from pipelines.shared.programs import positive_int as positive
from training.checkpoints import AVERAGE, checkpoints_of, read_run_state
from training.experiments import (
    COMMANDS,
    add_experiment_options,
    budget_options,
    check_settings,
    command_line,
    features_of,
    markdown_table,
    read_images,
    reconstruct,
    run_missing,
    shared_options,
    spread,
    write_results,
)
from training.options import assignment, unit_interval
from training.perceptual import FeatureLoss
from training.run_folder import claimed_folder
from training.token_cache import STATISTICS

PROGRAM = "training.compare_stages"
OUTPUTS = (
    *(COMMANDS, "results.json", "results.md", "results.png", "samples-*.png", "points.json", "data/*.parquet"),
    *("tokenizer", "tokens", "layout-*", "texture-*", "one-stage-*"),
)
WAYS = ("two-stage", "one-stage")
CHUNK = 50


def make_parser() -> argparse.ArgumentParser:
    """The parser of this program."""
    parser = argparse.ArgumentParser(prog="compare_stages", description=__doc__.splitlines()[0], allow_abbrev=False)
    add_experiment_options(parser)
    parser.add_argument("--data_files", required=True, help="a parquet file with images and labels")
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--label_column", default="label")
    parser.add_argument("--num_reference_images", type=positive, default=5000, help="the last rows, held out")
    parser.add_argument("--max_train_samples", type=positive, help="train on the first rows only")
    parser.add_argument("--tokenizer", help="default: one that is trained first, with the budget of a generator")
    parser.add_argument("--tokenizer_preset", default="digits")
    parser.add_argument("--resolution", type=positive, default=32)
    parser.add_argument("--num_tokens", type=positive, default=16)
    parser.add_argument("--size", choices=sorted(SIT_PRESETS), default="S")
    parser.add_argument(
        "--config_overrides", type=assignment, nargs="+", default=[], help="of the generators, as key=value"
    )
    parser.add_argument("--train_batch_size", type=positive, default=128)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--layout_share", type=unit_interval, default=0.2, help="of the budget of the two-stage way")
    parser.add_argument("--num_points", type=positive, default=6, help="checkpoints of a generator that are sampled")
    parser.add_argument("--steps_between_points", type=positive, default=200)
    parser.add_argument("--num_samples", type=positive, default=1000)
    parser.add_argument("--num_validation_samples", type=positive, default=64, help="of the loss while training")
    parser.add_argument("--num_inference_steps", type=positive, default=50)
    parser.add_argument("--num_layout_steps", type=positive, default=25)
    return parser


def split_data(options: argparse.Namespace) -> None:
    """Write data/train.parquet and data/reference.parquet.

    Raises:
        ProgramError: If the file is missing, lacks a column, or has too few rows.
    """
    import datasets

    folder = options.output_dir / "data"
    if (folder / "train.parquet").exists() and (folder / "reference.parquet").exists():
        return
    if not Path(options.data_files).is_file():
        raise ProgramError(f"--data_files must be a parquet file, got {options.data_files}")
    rows = datasets.load_dataset("parquet", data_files=options.data_files, split="train")
    for name in ("image_column", "label_column"):
        column = getattr(options, name)
        if column not in rows.column_names:
            raise ProgramError(f"--{name} must be one of {', '.join(rows.column_names)}, got {column!r}")
    rows = rows.rename_columns(
        {old: new for old, new in ((options.image_column, "image"), (options.label_column, "label")) if old != new}
    ).cast_column("image", datasets.Image(decode=False))
    if not isinstance(rows.features["label"], datasets.ClassLabel):
        count = max(rows["label"]) + 1
        rows = rows.cast_column("label", datasets.ClassLabel(names=[str(label) for label in range(count)]))
    num_train = len(rows) - options.num_reference_images
    if num_train < 1:
        raise ProgramError(f"--num_reference_images must be less than {len(rows)}, got {options.num_reference_images}")
    for name, first, last in (
        ("train", 0, min(num_train, options.max_train_samples or num_train)),
        ("reference", num_train, len(rows)),
    ):
        with atomic_file(folder / f"{name}.parquet") as staging:
            rows.select(range(first, last)).to_parquet(staging)


def training_steps(options: argparse.Namespace) -> list[tuple[Path, str, list[str]]]:
    """`(result, module, command)` of all programs to run."""
    work, count = options.output_dir, str(options.num_tokens)
    data = ["--train_data_files", str(work / "data" / "train.parquet")]
    tokenizer = options.tokenizer or str(work / "tokenizer" / "model")
    steps = []
    if options.tokenizer is None:
        command = ["--preset", options.tokenizer_preset, "--config_overrides", "min_region_size=4", *data]
        command += ["--output_dir", str(work / "tokenizer"), *shared_options(options, 0), *budget_options(options)]
        command += ["--resolution", str(options.resolution), "--min_tokens", count, "--max_tokens", count]
        command += ["--l1_weight", "1", "--train_batch_size", "32", "--learning_rate", "1e-3", "--adam_beta1", "0.9"]
        command += [
            "--adam_beta2",
            "0.99",
            "--lr_scheduler",
            "cosine",
            "--lr_warmup_steps",
            "50",
            "--ema_decay",
            "0.99",
        ]
        command += ["--validation_data_files", str(work / "data" / "reference.parquet"), "--validation_steps", "1000"]
        command += ["--dataloader_num_workers", "1", "--checkpointing_steps", "200", "--checkpoints_total_limit", "1"]
        steps.append((work / "tokenizer" / "model", "training.train_tokenizer", command))
    command = ["--tokenizer", tokenizer, "--output_dir", str(work / "tokens"), *data, "--num_tokens", count]
    command += ["--resolution", str(options.resolution), "--with_flips", "--dataloader_num_workers", "1"]
    steps.append((work / "tokens" / STATISTICS, "training.cache_tokens", command))
    for seed in options.seeds:
        for stage, share in (
            ("layout", options.layout_share),
            ("texture", 1 - options.layout_share),
            ("one-stage", 1),
        ):
            folder = work / f"{stage}-seed{seed}"
            command = ["--stage", stage, "--tokens_dir", str(work / "tokens"), "--output_dir", str(folder)]
            command += [*shared_options(options, seed), *budget_options(options, share), "--size", options.size]
            if options.config_overrides:
                command += ["--config_overrides", *(f"{k}={json.dumps(v)}" for k, v in options.config_overrides)]
            command += ["--train_batch_size", str(options.train_batch_size), "--num_samples", "0"]
            command += ["--learning_rate", str(options.learning_rate), "--lr_scheduler", "constant_with_warmup"]
            command += ["--lr_warmup_steps", "100", "--ema_decay", "0.995", "--dataloader_num_workers", "0"]
            command += [
                "--num_validation_samples",
                str(options.num_validation_samples),
                "--validation_steps",
                "1000",
                "--condition_noise",
                "0.05",
            ]
            command += [
                "--checkpointing_steps",
                str(options.steps_between_points),
                "--checkpoints_total_limit",
                "1000",
            ]
            steps.append((folder / "model", "training.train_sit", command))
    return steps


def generator_at(run: Path, checkpoint: Path) -> SiTTransformer1DModel:
    """The generator of a finished run with the averaged weights of one of its checkpoints."""
    model = SiTTransformer1DModel.from_pretrained(run / "model")
    average = load_file(checkpoint / AVERAGE)
    model.load_state_dict({name.removeprefix("model."): value for name, value in average.items()}, strict=False)
    return model.eval()


def pipeline_of(options: argparse.Namespace, way: str, seed: int, checkpoint: Path) -> GPSTokenPipeline:
    """The pipeline at one checkpoint of the texture or the one-stage generator."""
    work = options.output_dir
    tokenizer = options.tokenizer or str(work / "tokenizer" / "model")
    vae = GPSTokenModel.from_pretrained(find_checkpoint(tokenizer, "--tokenizer"), dtype=torch.float32).eval()
    vae.config.image_size = options.resolution  # the size of the images that the pipeline generates
    channels = json.loads((work / "tokens" / STATISTICS).read_text(encoding="utf-8"))["channels"]
    vae.config.latents_mean, vae.config.latents_std = (channels["offset"][name] for name in ("mean", "std"))
    parts: dict[str, Any] = {}
    if way == "two-stage":
        layout = SiTTransformer1DModel.from_pretrained(work / f"layout-seed{seed}" / "model").eval()
        parts = {"layout_transformer": layout, "layout_scheduler": FlowMatchEulerDiscreteScheduler()}
    transformer = generator_at(checkpoint.parent, checkpoint)
    pipeline = GPSTokenPipeline(vae, transformer, FlowMatchEulerDiscreteScheduler(), **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw_samples(options: argparse.Namespace, pipeline: GPSTokenPipeline, seed: int) -> torch.Tensor:
    """Samples of all classes in turn, (N, 3, H, W) in [-1, 1]."""
    num_classes = pipeline.transformer.config.num_classes
    labels = [index % num_classes for index in range(options.num_samples)]
    arguments: dict[str, Any] = {"guidance_scale": 1.0, "num_inference_steps": options.num_inference_steps}
    if pipeline.layout_transformer is not None:
        arguments["num_layout_steps"] = options.num_layout_steps
    parts = []
    for start in range(0, len(labels), CHUNK):
        generator = torch.Generator().manual_seed(100_000 * (seed + 1) + start)
        images = pipeline(labels[start : start + CHUNK], generator=generator, output_type="np", **arguments).images
        parts.append(torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))) * 2 - 1)
    return torch.cat(parts).float()


def points_of(run: Path, count: int) -> list[Path]:
    """Up to `count` checkpoints of a run, evenly over its length; the last one is among them."""
    found = checkpoints_of(run)
    places = np.unique(np.linspace(0, len(found) - 1, min(count, len(found))).round().astype(int))
    return [found[place] for place in places]


def measure_bounds(options: argparse.Namespace, network: FeatureLoss, expected: FeatureStatistics) -> dict[str, float]:
    """The Fréchet distances of as many training images as there are samples, and of their reconstructions."""
    images = read_images(
        str(options.output_dir / "data" / "train.parquet"), "image", options.num_samples, options.resolution
    )
    tokenizer = options.tokenizer or str(options.output_dir / "tokenizer" / "model")
    model = GPSTokenModel.from_pretrained(find_checkpoint(tokenizer, "--tokenizer"), dtype=torch.float32).eval()
    sets = {"training images": images, "their reconstructions": reconstruct(model, images, options.num_tokens)}
    return {
        name: frechet_distance(FeatureStatistics.from_features(features_of(network, part)), expected)
        for name, part in sets.items()
    }


def measure(options: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The points of all curves, and the distances of real and of reconstructed images.

    Points are kept in points.json, so that none is sampled twice.
    """
    work, network = options.output_dir, FeatureLoss(options.distance_network, options.distance_weights_file)
    path = work / "points.json"
    points: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    file = str(work / "data" / "reference.parquet")
    reference = read_images(file, "image", options.num_reference_images, options.resolution)
    expected = FeatureStatistics.from_features(features_of(network, reference))
    settings = {
        name: getattr(options, name)
        for name in ("num_samples", "num_inference_steps", "num_layout_steps", "distance_network")
    }
    wanted = [
        (way, seed, checkpoint)
        for seed in options.seeds
        for way in WAYS
        for checkpoint in points_of(
            work / f"{'texture' if way == 'two-stage' else way}-seed{seed}", options.num_points
        )
    ]
    for way, seed, checkpoint in tqdm(wanted, desc="points", unit="point"):
        state = read_run_state(checkpoint)
        key = {"way": way, "seed": seed, "step": state["step"], **settings}
        if any(all(point[name] == value for name, value in key.items()) for point in points):
            continue
        seconds, steps = state["elapsed_seconds"], state["step"]
        if way == "two-stage":
            layout = read_run_state(checkpoints_of(work / f"layout-seed{seed}")[-1])
            seconds, steps = seconds + layout["elapsed_seconds"], steps + layout["step"]
        images = draw_samples(options, pipeline_of(options, way, seed, checkpoint), seed)
        found = FeatureStatistics.from_features(features_of(network, images))
        distance = frechet_distance(found, expected)
        points.append({**key, "steps": steps, "minutes": round(seconds / 60, 2), "frechet": distance})
        with atomic_file(path) as staging:
            staging.write_text(json.dumps(points, indent=1), encoding="utf-8")
        if checkpoint == checkpoints_of(checkpoint.parent)[-1]:
            zoom = max(1, 64 // images.shape[-1])
            pictures = [tensor_to_pil(image) for image in images[:100]]
            pictures = [picture.resize((picture.width * zoom, picture.height * zoom), 0) for picture in pictures]
            with atomic_file(work / f"samples-{way}-seed{seed}.png") as staging:
                contact_sheet(pictures, columns=10, gap=2).save(staging)
    places = {(way, seed, read_run_state(checkpoint)["step"]) for way, seed, checkpoint in wanted}
    chosen = [
        point
        for point in points
        if (point["way"], point["seed"], point["step"]) in places
        and all(point[name] == value for name, value in settings.items())
    ]
    return chosen, measure_bounds(options, network, expected)


def last_points(points: list[dict[str, Any]], way: str) -> list[dict[str, Any]]:
    """The last point of each seed."""
    chosen = [point for point in points if point["way"] == way]
    return [
        max((point for point in chosen if point["seed"] == seed), key=lambda point: point["step"])
        for seed in sorted({point["seed"] for point in chosen})
    ]


def report(options: argparse.Namespace, points: list[dict[str, Any]], bounds: dict[str, float], command: str) -> str:
    """results.md."""
    budget = f"{options.budget_minutes:g} minutes" if options.budget_minutes else f"{options.budget_steps} steps"
    text = f"# Two stages against one\n\nBudget of a way: {budget}, of which the layout generator has "
    text += f"{100 * options.layout_share:g} %. Seeds {options.seeds}. Fréchet distance of features of "
    text += f"{options.distance_network} between {options.num_samples} samples and {options.num_reference_images} "
    text += f"held-out images, without guidance. Median, and range over the seeds.\n\n```\n{command}\n```\n\n"
    lines = []
    for way in WAYS:
        chosen = last_points(points, way)
        minutes = spread([point["minutes"] for point in chosen], 1)
        lines.append([way, minutes, spread([point["frechet"] for point in chosen])])
    lines += [[name, "", f"{value:.2f}"] for name, value in bounds.items()]
    text += markdown_table(["", "minutes", "Fréchet"], lines) + "\n\n"
    ordered = sorted(points, key=lambda point: (point["way"], point["seed"], point["step"]))
    rows = [[p["way"], str(p["seed"]), str(p["steps"]), f"{p['minutes']:.1f}", f"{p['frechet']:.2f}"] for p in ordered]
    return text + markdown_table(["way", "seed", "steps", "minutes", "Fréchet"], rows) + "\n"


def draw(points: list[dict[str, Any]], path: Path, unit: str) -> None:
    """Fréchet distance against the training so far, in `unit` (minutes or steps); a line for each way and seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.add_subplot()
    for color, way in zip(("tab:blue", "tab:orange"), WAYS):
        for index, seed in enumerate(sorted({point["seed"] for point in points})):
            curve = sorted((p[unit], p["frechet"]) for p in points if p["way"] == way and p["seed"] == seed)
            axes.plot(*zip(*curve), "o-", color=color, alpha=1 - 0.4 * min(index, 1), label=way if not index else None)
    axes.set_xlabel(f"training, {unit}")
    axes.set_ylabel("Fréchet distance")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_file(path) as staging:
        figure.savefig(staging, dpi=110)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    options = make_parser().parse_args(argv)
    if not 0 < options.layout_share < 1:
        raise ProgramError(f"--layout_share must be between 0 and 1, got {options.layout_share:g}")
    if min(options.num_samples, options.num_reference_images) < 2:
        raise ProgramError(
            "--num_samples and --num_reference_images must be at least 2, "
            f"got {options.num_samples} and {options.num_reference_images}"
        )
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    FeatureLoss(
        options.distance_network, options.distance_weights_file
    )  # what is missing shows before hours are spent
    if options.tokenizer is not None:
        find_checkpoint(options.tokenizer, "--tokenizer")
    with claimed_folder(options.output_dir, PROGRAM, OUTPUTS):
        split_data(options)
        steps = training_steps(options)
        check_settings(options.output_dir, steps)
        shared = [step for step in steps if step[1] != "training.train_sit"]
        # The tokenizer makes the tokens, and all generators need them.
        code = run_missing(options.output_dir, shared) or run_missing(
            options.output_dir, steps[len(shared) :], options.parallel
        )
        if code:
            return code
        points, bounds = measure(options)
        text = report(options, points, bounds, command_line(PROGRAM, argv))
        write_results(options.output_dir, {"points": points, "bounds": bounds}, text)
        draw(points, options.output_dir / "results.png", "minutes" if options.budget_minutes else "steps")
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_program(main))
