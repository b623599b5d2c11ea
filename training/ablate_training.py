# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""The paper's ablations in small (Tables 6 and 7): what initialisation, refinement, lambda and support bring.

    python -m training.ablate_training --train_data_files train.parquet --validation_data_files validation.parquet \\
        --budget_minutes 10 --output_dir runs/ablation

Every row is a tokenizer trained from scratch with the same budget and measured on the same held-out images. Without
adaptive initialisation (lambda 0) regions are halved by size alone, which gives a regular grid. Without refinement the
Gaussians stay where the regions put them. A row that is finished is not trained again, an interrupted one resumes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gpstoken_hf.modeling_gpstoken import GPSTokenModel
from gpstoken_hf.visualization import contact_sheet, tensor_to_pil
from pipelines.shared.outputs import atomic_file
from pipelines.shared.programs import positive_float, run_program
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

PROGRAM = "training.ablate_training"
OUTPUTS = (COMMANDS, "results.json", "results.md", "results.png", "reconstructions.png", "px*")

# Fields of the configuration beside those of the preset, and whether Gaussians are refined.
ROWS: dict[str, tuple[dict[str, float], bool]] = {
    "grid": ({"complexity_exponent": 0.0}, False),
    "grid, refined": ({"complexity_exponent": 0.0}, True),
    "adaptive": ({}, False),
    "adaptive, refined": ({}, True),
    "lambda 5": ({"complexity_exponent": 5.0}, True),
    "support 1": ({"splat_support": 1.0}, True),
    "support 5": ({"splat_support": 5.0}, True),
}
MAIN_ROWS = ("grid", "grid, refined", "adaptive", "adaptive, refined")


def make_parser() -> argparse.ArgumentParser:
    """The parser of this program."""
    parser = argparse.ArgumentParser(prog="ablate_training", description=__doc__.splitlines()[0], allow_abbrev=False)
    add_experiment_options(parser)
    parser.add_argument("--train_data_files", required=True, help="a parquet file with a column image")
    parser.add_argument("--validation_data_files", required=True, help="held-out images, the same for all rows")
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--num_validation_images", type=positive, default=100)
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--resolutions", type=positive, nargs="+", default=[64, 128])
    parser.add_argument("--num_tokens", type=positive, default=32, help="at 64 x 64; others have as many a pixel")
    parser.add_argument(
        "--rows", choices=list(ROWS), nargs="+", help="default: all at the first of --resolutions, four at the others"
    )
    parser.add_argument("--train_batch_size", type=positive, default=16, help="at 64 x 64; others have as many pixels")
    parser.add_argument("--learning_rate", type=positive_float, default=4e-4, help="peak of every training")
    return parser


def planned_rows(options: argparse.Namespace) -> list[tuple[int, str]]:
    """`(resolution, row)` of everything to train for a seed: all rows at the first resolution, four at the others."""
    rows = []
    for index, resolution in enumerate(options.resolutions):
        rows += [(resolution, row) for row in options.rows or (ROWS if index == 0 else MAIN_ROWS)]
    return rows


def tokens_at(options: argparse.Namespace, resolution: int) -> int:
    """As many tokens a pixel as at 64 x 64."""
    return max(1, round(options.num_tokens * (resolution / 64) ** 2))


def folder_of(options: argparse.Namespace, resolution: int, row: str, seed: int) -> Path:
    """Of one run."""
    return options.output_dir / f"px{resolution}" / f"{row.replace(', ', '-').replace(' ', '-')}-seed{seed}"


def training_step(options: argparse.Namespace, resolution: int, row: str, seed: int) -> tuple[Path, str, list[str]]:
    """`(result, module, command)` of one run."""
    folder = folder_of(options, resolution, row, seed)
    changes, is_refined = ROWS[row]
    batch = max(1, round(options.train_batch_size * (64 / resolution) ** 2))
    count = tokens_at(options, resolution)
    command = ["--preset", options.preset, "--output_dir", str(folder), *shared_options(options, seed)]
    if changes:
        command += ["--config_overrides", *(f"{name}={value}" for name, value in changes.items())]
    command += [
        "--train_data_files",
        options.train_data_files,
        "--validation_data_files",
        options.validation_data_files,
    ]
    command += ["--image_column", options.image_column, "--num_validation_images", "8", "--validation_steps", "100000"]
    command += ["--resolution", str(resolution), "--crop", "random_resized", "--min_tokens", str(count)]
    command += ["--max_tokens", str(count), "--validation_tokens", str(count), "--train_batch_size", str(batch)]
    command += ["--learning_rate", str(options.learning_rate), "--adam_beta1", "0.9", "--adam_beta2", "0.99"]
    command += ["--adam_weight_decay", "0.01", "--lr_scheduler", "cosine", "--lr_warmup_steps", "50"]
    command += ["--ema_decay", "0.99", "--dataloader_num_workers", "1", "--checkpointing_steps", "200"]
    command += ["--checkpoints_total_limit", "1", *budget_options(options)]
    command += [] if is_refined else ["--no_refinement"]
    return folder / "model", "training.train_tokenizer", command


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All runs, measured; also writes the sheet of reconstructions."""
    network = FeatureLoss(options.distance_network, options.distance_weights_file)
    results: dict[str, Any] = {}
    pictures: list[Any] = []
    titles: list[str] = []
    for resolution, row in planned_rows(options):
        images = read_images(
            options.validation_data_files, options.image_column, options.num_validation_images, resolution
        )
        entries = []
        for seed in options.seeds:
            folder = folder_of(options, resolution, row, seed)
            model = GPSTokenModel.from_pretrained(folder / "model").eval()
            reconstructions = reconstruct(model, images, tokens_at(options, resolution))
            values = measure_reconstructions(reconstructions, images, network)
            entries.append({"seed": seed, "minutes": round(training_minutes(folder), 2), **values})
            if seed == options.seeds[0] and resolution == options.resolutions[0]:
                shown = torch.cat([images[:4], reconstructions[:4]]) if not pictures else reconstructions[:4]
                names = ["image", row] if not pictures else [row]
                for name, part in zip(names, shown.split(4)):
                    pictures += [tensor_to_pil(image).resize((128, 128), 0) for image in part]
                    titles += [name, *[""] * (len(part) - 1)]
        results.setdefault(str(resolution), {})[row] = entries
    with atomic_file(options.output_dir / "reconstructions.png") as staging:
        contact_sheet(pictures, titles, columns=min(4, options.num_validation_images)).save(staging)
    return results


def report(options: argparse.Namespace, results: dict[str, Any], command: str) -> str:
    """results.md."""
    budget = f"{options.budget_minutes:g} minutes" if options.budget_minutes else f"{options.budget_steps} steps"
    text = f"# Ablation of the tokenizer\n\nPreset {options.preset}, {budget} for each run, seeds {options.seeds}, "
    text += f"{options.num_validation_images} held-out images. Median, and range over the seeds. The distances are of "
    text += f"features of {options.distance_network}.\n\n```\n{command}\n```\n"
    for resolution, rows in results.items():
        text += f"\n## {resolution} x {resolution}, {tokens_at(options, int(resolution))} tokens\n\n"
        lines = [
            [
                row,
                *(
                    spread([entry[name] for entry in entries], digits)
                    for name, digits in (("psnr", 2), ("ssim", 3), ("feature_distance", 4), ("frechet", 2))
                ),
            ]
            for row, entries in rows.items()
        ]
        text += markdown_table(["", "PSNR, dB", "SSIM", "feature distance", "Fréchet"], lines) + "\n"
    return text


def draw(results: dict[str, Any], path: Path) -> None:
    """PSNR of every row, one panel for each resolution, a dot for each seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(results), 3.6), layout="constrained")
    for index, (resolution, rows) in enumerate(results.items()):
        axes = figure.add_subplot(1, len(results), index + 1)
        for place, entries in enumerate(rows.values()):
            axes.plot([entry["psnr"] for entry in entries], [place] * len(entries), "o")
        axes.set_yticks(range(len(rows)), list(rows))
        axes.invert_yaxis()
        axes.set_xlabel("PSNR, dB")
        axes.set_title(f"{resolution} x {resolution}")
        axes.grid(alpha=0.3)
    with atomic_file(path) as staging:
        figure.savefig(staging, dpi=110)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    options = make_parser().parse_args(argv)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    # What is wrong with data or network shows before hours are spent.
    read_images(options.validation_data_files, options.image_column, 1, 32)
    FeatureLoss(options.distance_network, options.distance_weights_file)
    with claimed_folder(options.output_dir, PROGRAM, OUTPUTS):
        steps = [training_step(options, *row, seed) for seed in options.seeds for row in planned_rows(options)]
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
