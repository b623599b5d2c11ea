# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""What the feature loss and the GAN change: fine-tunings of one tokenizer with and without them, side by side.

    python -m training.compare_recipes --pretrained_model_name_or_path gpstoken-nano \\
        --train_data_files train.parquet --validation_data_files validation.parquet --budget_minutes 10 \\
        --output_dir runs/recipes

All recipes start from the same weights and have the same budget and data. The first row is the start itself. A recipe
that is finished is not trained again, an interrupted one resumes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gpstoken_hf.modeling_gpstoken import GPSTokenModel
from gpstoken_hf.visualization import contact_sheet, tensor_to_pil
from pipelines.shared.checkpoints import find_checkpoint
from pipelines.shared.outputs import atomic_file
from pipelines.shared.programs import non_negative_float, run_program
from pipelines.shared.programs import positive_int as positive
from training.experiments import (
    COMMANDS,
    add_experiment_options,
    budget_options,
    command_line,
    markdown_table,
    measure_reconstructions,
    read_images,
    reconstruct,
    run_missing,
    shared_options,
    spread,
    training_minutes,
    write_results,
)
from training.perceptual import FeatureLoss
from training.run_folder import claimed_folder

PROGRAM = "training.compare_recipes"
RECIPES = ("pixels", "pixels, feature", "pixels, feature, GAN")
OUTPUTS = (COMMANDS, "results.json", "results.md", "results.png", "side_by_side.png", "recipe-*")
MEASURES = {"psnr": 2, "ssim": 3, "feature_distance": 4, "frechet": 2, "sharpness": 3}


def make_parser() -> argparse.ArgumentParser:
    """The parser of this program."""
    parser = argparse.ArgumentParser(prog="compare_recipes", description=__doc__.splitlines()[0], allow_abbrev=False)
    add_experiment_options(parser)
    parser.set_defaults(seeds=[0])
    parser.add_argument("--pretrained_model_name_or_path", required=True, help="the tokenizer that all start from")
    parser.add_argument("--train_data_files", required=True, help="a parquet file with a column image")
    parser.add_argument("--validation_data_files", required=True, help="held-out images, the same for all recipes")
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--num_validation_images", type=positive, default=100)
    parser.add_argument("--resolution", type=positive, default=128)
    parser.add_argument("--num_tokens", type=positive, default=128)
    parser.add_argument("--train_batch_size", type=positive, default=8)
    parser.add_argument("--learning_rate", type=non_negative_float, default=1e-4)
    # With it the gradients of the squared error and of the features of efficientnet_lite0 are about as large.
    parser.add_argument("--feature_weight", type=non_negative_float, default=0.02)
    parser.add_argument("--feature_network", default="efficientnet_lite0")
    parser.add_argument("--feature_weights_file", help="its weights; default: cached or downloaded")
    parser.add_argument("--adversarial_weight", type=non_negative_float, default=0.3)
    parser.add_argument("--num_shown", type=positive, default=6)
    return parser


def folder_of(options: argparse.Namespace, recipe: str, seed: int) -> Path:
    """Of one run."""
    return options.output_dir / f"recipe-{recipe.replace(', ', '-').lower()}-seed{seed}"


def training_step(options: argparse.Namespace, recipe: str, seed: int) -> tuple[Path, str, list[str]]:
    """`(result, module, command)` of one run."""
    folder, count = folder_of(options, recipe, seed), str(options.num_tokens)
    command = ["--pretrained_model_name_or_path", options.pretrained_model_name_or_path, "--output_dir", str(folder)]
    command += shared_options(options, seed)
    command += [
        "--train_data_files",
        options.train_data_files,
        "--validation_data_files",
        options.validation_data_files,
    ]
    command += ["--image_column", options.image_column, "--num_validation_images", "8", "--validation_steps", "100000"]
    command += ["--resolution", str(options.resolution), "--crop", "random_resized", "--min_crop_scale", "0.35"]
    command += ["--min_tokens", count, "--max_tokens", count, "--validation_tokens", count]
    command += ["--train_batch_size", str(options.train_batch_size), "--learning_rate", str(options.learning_rate)]
    command += ["--adam_beta1", "0.5", "--adam_beta2", "0.9", "--lr_scheduler", "cosine", "--lr_warmup_steps", "50"]
    command += ["--ema_decay", "0.99", "--dataloader_num_workers", "1", "--checkpointing_steps", "100"]
    command += ["--checkpoints_total_limit", "1", *budget_options(options)]
    if "feature" in recipe:
        command += ["--feature_weight", str(options.feature_weight), "--feature_network", options.feature_network]
        if options.feature_weights_file is not None:
            command += ["--feature_weights_file", options.feature_weights_file]
    if "GAN" in recipe:
        command += ["--adversarial_weight", str(options.adversarial_weight)]
    return folder / "model", "training.train_tokenizer", command


def measure(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """All recipes and their start, measured; also writes the pictures side by side."""
    network = FeatureLoss(options.distance_network, options.distance_weights_file)
    images = read_images(
        options.validation_data_files, options.image_column, options.num_validation_images, options.resolution
    )
    start = find_checkpoint(options.pretrained_model_name_or_path, "--pretrained_model_name_or_path")
    runs: list[tuple[str, int | None, Any]] = [("start", None, start)]
    runs += [(name, seed, folder_of(options, name, seed) / "model") for name in RECIPES for seed in options.seeds]
    results: dict[str, list[dict[str, Any]]] = {}
    shown = {"image": images[: options.num_shown]}
    for name, seed, folder in runs:
        model = GPSTokenModel.from_pretrained(folder, dtype=torch.float32).eval()
        reconstructions = reconstruct(model, images, options.num_tokens)
        shown.setdefault(name, reconstructions[: options.num_shown])
        minutes = 0.0 if seed is None else round(training_minutes(folder_of(options, name, seed)), 2)
        values = measure_reconstructions(reconstructions, images, network)
        results.setdefault(name, []).append({"seed": seed, "minutes": minutes, **values})
    columns = len(shown)
    rows = [tensor_to_pil(column[index]) for index in range(len(shown["image"])) for column in shown.values()]
    zoom = max(1, 160 // options.resolution)
    pictures = [picture.resize((picture.width * zoom, picture.height * zoom), 0) for picture in rows]
    titles = [*shown, *[""] * (len(pictures) - columns)]
    with atomic_file(options.output_dir / "side_by_side.png") as staging:
        contact_sheet(pictures, titles, columns=columns).save(staging)
    return results


def report(options: argparse.Namespace, results: dict[str, list[dict[str, Any]]], command: str) -> str:
    """results.md."""
    budget = f"{options.budget_minutes:g} minutes" if options.budget_minutes else f"{options.budget_steps} steps"
    text = f"# Recipes of the tokenizer\n\nFrom {options.pretrained_model_name_or_path}, {budget} for each run, seeds "
    text += f"{options.seeds}, {options.num_validation_images} held-out images of {options.resolution} x "
    text += f"{options.resolution} with {options.num_tokens} tokens. Median, and range over the seeds.\n\n"
    text += f"The distances are of features of {options.distance_network}"
    text += ", the network of the feature loss itself" if options.distance_network == options.feature_network else ""
    text += ". Sharpness is the mean difference of neighbouring pixels relative to that of the images.\n\n"
    text += f"```\n{command}\n```\n\n"
    lines = [
        [name, *(spread([entry[key] for entry in entries], digits) for key, digits in MEASURES.items())]
        for name, entries in results.items()
    ]
    return text + markdown_table(["", "PSNR, dB", "SSIM", "feature distance", "Fréchet", "sharpness"], lines) + "\n"


def draw(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Distance of features against PSNR, a dot for each run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, entries in results.items():
        axes.plot([e["psnr"] for e in entries], [e["feature_distance"] for e in entries], "o", label=name)
    axes.set_xlabel("PSNR, dB")
    axes.set_ylabel("feature distance")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_file(path) as staging:
        figure.savefig(staging, dpi=110)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    options = make_parser().parse_args(argv)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    # What is wrong with data or networks shows before hours are spent.
    read_images(options.validation_data_files, options.image_column, 1, 32)
    for network in {
        options.distance_network: options.distance_weights_file,
        options.feature_network: options.feature_weights_file,
    }.items():
        FeatureLoss(*network)
    with claimed_folder(options.output_dir, PROGRAM, OUTPUTS):
        steps = [training_step(options, name, seed) for seed in options.seeds for name in RECIPES]
        if code := run_missing(options.output_dir, steps, options.parallel):
            return code
        results = measure(options)
        text = report(options, results, command_line(PROGRAM, argv))
        write_results(options.output_dir, results, text)
        draw(results, options.output_dir / "results.png")
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_program(main))
