# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""What the programs that compare trainings share: runs with equal budgets, the same measures, one folder of results.

Shapes: N images, H and W their sides in pixels.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from gpstoken_hf.metrics import FeatureStatistics, frechet_distance, psnr, ssim
from gpstoken_hf.modeling_gpstoken import GPSTokenModel
from pipelines.shared.outputs import atomic_file
from pipelines.shared.programs import ProgramError, non_negative_int, positive_float
from pipelines.shared.programs import positive_int as positive
from training.checkpoints import checkpoints_of, read_run_state
from training.data import load_validation_images
from training.perceptual import FeatureLoss

CHUNK = 20
POLL_SECONDS = 0.2
# The settings of the steps that were begun, by their results.
COMMANDS = "commands.json"


def add_experiment_options(parser: argparse.ArgumentParser) -> None:
    """Folder, budget, seeds and measures."""
    parser.add_argument("--output_dir", type=Path, required=True, help="runs, results.json, results.md and pictures")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--budget_minutes", type=positive_float, help="training time of every run")
    budget.add_argument("--budget_steps", type=positive, help="training steps of every run")
    parser.add_argument("--seeds", type=non_negative_int, nargs="+", default=[0, 1])
    parser.add_argument("--parallel", type=positive, default=1, help="runs that train at the same time")
    parser.add_argument("--threads", type=positive, help="CPU threads of a run; default: its share of torch's choice")
    parser.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), default="no", help="of every training")
    parser.add_argument(
        "--distance_network",
        default="efficientnet_lite0",
        help="frozen network of the perceptual and the Fréchet distance, see --feature_network of train_tokenizer",
    )
    parser.add_argument("--distance_weights_file", help="its weights; default: cached or downloaded")


def budget_options(options: argparse.Namespace, share: float = 1.0) -> list[str]:
    """The budget as options of a training program, or a share of it."""
    if options.budget_minutes is not None:
        return ["--max_train_minutes", f"{share * options.budget_minutes:g}"]
    return ["--max_train_steps", str(max(1, round(share * options.budget_steps)))]


def shared_options(options: argparse.Namespace, seed: int) -> list[str]:
    """Options that every training of an experiment has."""
    threads = options.threads
    if threads is None and options.parallel > 1:
        threads = max(1, torch.get_num_threads() // options.parallel)
    shared = ["--seed", str(seed), "--report_to", "none", "--mixed_precision", options.mixed_precision]
    return shared if threads is None else [*shared, "--threads", str(threads)]


def run_steps(commands: Iterable[tuple[str, list[str]]], parallel: int = 1) -> int:
    """Run other programs in processes of their own; returns the first exit code that is not 0, or 0.

    After a signal it returns 128 + its number, also when all that had been started finished.

    SIGINT and SIGTERM are left to these processes, which write a checkpoint and end. (From a terminal Ctrl-C reaches
    all processes, a SIGTERM is passed on.) When one ends with an error, the others are stopped in the same way.

    Args:
        commands (`Iterable[tuple[str, list[str]]]`):
            Names of modules, and their arguments. One is taken when it can be started.
        parallel (`int`, *optional*, defaults to 1): How many run at the same time.
    """
    commands = iter(commands)
    running: list[subprocess.Popen[bytes]] = []
    is_stopped, code = False, 0

    def stop(number: int, frame: Any = None) -> None:
        nonlocal is_stopped, code
        is_stopped, code = True, code or 128 + number
        if number != signal.SIGINT:
            for process in running:
                process.send_signal(number)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while True:
            while not is_stopped and len(running) < parallel and (command := next(commands, None)) is not None:
                module, arguments = command
                running.append(subprocess.Popen([sys.executable, "-m", module, *arguments]))
            if not running:
                return code
            time.sleep(POLL_SECONDS)
            for process in [process for process in running if process.poll() is not None]:
                running.remove(process)
                if process.returncode != 0 and code == 0:
                    code = process.returncode
                    stop(signal.SIGTERM)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def run_missing(folder: Path, steps: Sequence[tuple[Path, str, list[str]]], parallel: int = 1) -> int:
    """Run every `(result, module, command)` whose result does not exist; the first exit code that is not 0, or 0.

    A step that was interrupted resumes from its own checkpoint. `folder` keeps the settings, so that no table mixes
    results of several ones.

    Args:
        folder (`Path`): Folder of the experiment. Results lie in it.
        steps (`Sequence[tuple[Path, str, list[str]]]`): Steps that do not need each other, or `parallel` must be 1.
        parallel (`int`, *optional*, defaults to 1): How many run at the same time.

    Raises:
        ProgramError: If a step was begun with other settings. Only the number of threads may differ.
    """
    begun = check_settings(folder, steps)

    def missing() -> Iterator[tuple[str, list[str]]]:
        for result, module, command in tqdm(steps, desc="runs", unit="run"):
            if not result.exists():
                begun[str(result.relative_to(folder))] = _settings(command, folder)
                with atomic_file(folder / COMMANDS) as staging:
                    staging.write_text(json.dumps(begun, indent=1), encoding="utf-8")
                yield module, command

    return run_steps(missing(), parallel)


def check_settings(folder: Path, steps: Sequence[tuple[Path, str, list[str]]]) -> dict[str, dict[str, str]]:
    """The settings of all steps that were begun, by their results.

    Raises:
        ProgramError: If one of `steps` was begun with other settings. Only the number of threads may differ.
    """
    path = folder / COMMANDS
    begun: dict[str, dict[str, str]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    settings = {str(result.relative_to(folder)): _settings(command, folder) for result, _, command in steps}
    for name, wanted in settings.items():
        known = begun.get(name, wanted)
        differing = [option for option in {**known, **wanted} if known.get(option) != wanted.get(option)]
        if differing:
            parts = (f"{option} must be {known.get(option)}, got {wanted.get(option)}" for option in differing)
            raise ProgramError(f"the settings must be those that {folder / name} was begun with: {', '.join(parts)}")
    return begun


def _settings(command: list[str], folder: Path) -> dict[str, str]:
    """The options of a command but the number of threads. Paths are relative to `folder`, which may be moved."""
    settings: dict[str, str] = {}
    option = ""
    for word in command:
        if word.startswith("--"):
            option = word
            settings[option] = ""
        else:
            text = f"./{Path(word).relative_to(folder)}" if Path(word).is_relative_to(folder) else word
            settings[option] = f"{settings[option]} {text}".strip()
    settings.pop("--threads", None)
    return settings


def training_minutes(run: Path) -> float:
    """Duration of a training, interruptions not counted."""
    return read_run_state(checkpoints_of(run)[-1])["elapsed_seconds"] / 60


def read_images(path: str, image_column: str, num_images: int, resolution: int) -> torch.Tensor:
    """The first images of a parquet file, central squares: (N, 3, resolution, resolution) in [-1, 1].

    Raises:
        ProgramError: If the file does not exist or lacks the column.
    """
    import datasets

    if not Path(path).is_file():
        raise ProgramError(f"the parquet file must exist, got {path}")
    rows = datasets.load_dataset("parquet", data_files=path, split="train")
    if image_column not in rows.column_names:
        raise ProgramError(f"--image_column must be one of {', '.join(rows.column_names)}, got {image_column!r}")
    rows = rows.cast_column(image_column, datasets.Image(decode=False))
    return load_validation_images(rows, image_column, num_images, resolution)


@torch.no_grad()
def features_of(network: FeatureLoss, images: torch.Tensor) -> torch.Tensor:
    """Pooled features (N, D) of images (N, 3, H, W) in [-1, 1]."""
    return torch.cat([network.features(part) for part in images.split(CHUNK)])


@torch.no_grad()
def reconstruct(model: GPSTokenModel, images: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Images (N, 3, H, W) encoded and decoded, in [-1, 1]."""
    size = (images.shape[-2], images.shape[-1])
    parts = []
    for part in images.split(CHUNK):
        encoded = model.encode(part, num_tokens=num_tokens)
        parts.append(model.decode(encoded.tokens, image_size=size).sample.clamp(-1, 1))
    return torch.cat(parts)


def sharpness(reconstructions: torch.Tensor, images: torch.Tensor) -> float:
    """Mean absolute difference of neighbouring pixels, relative to that of the images; 1 is as sharp."""

    def contrast(pixels: torch.Tensor) -> torch.Tensor:
        return pixels.diff(dim=-1).abs().mean() + pixels.diff(dim=-2).abs().mean()

    return (contrast(reconstructions) / contrast(images)).item()


def measure_reconstructions(
    reconstructions: torch.Tensor, images: torch.Tensor, network: FeatureLoss
) -> dict[str, float]:
    """PSNR, SSIM, distance of features, Fréchet distance and sharpness, the means over the images."""
    pair = [features_of(network, part) for part in (reconstructions, images)]
    return {
        "psnr": psnr(reconstructions, images).mean().item(),
        "ssim": ssim(reconstructions, images).mean().item(),
        "feature_distance": (pair[0] - pair[1]).square().mean().item(),
        "frechet": frechet_distance(*map(FeatureStatistics.from_features, pair)),
        "sharpness": sharpness(reconstructions, images),
    }


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median and range, or the value itself if there is one."""
    middle = f"{statistics.median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, its first column left of the numbers."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def command_line(program: str, argv: Sequence[str] | None) -> str:
    """The command that was given, for the record."""
    return f"python -m {program} {shlex.join(sys.argv[1:] if argv is None else argv)}"


def write_results(folder: Path, results: dict[str, Any], text: str) -> None:
    """Write results.json and results.md."""
    for name, content in (("results.json", json.dumps(results, indent=1) + "\n"), ("results.md", text)):
        with atomic_file(folder / name) as staging:
            staging.write_text(content, encoding="utf-8")
