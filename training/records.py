# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Records of a training run: metrics, curves and a model card."""

from __future__ import annotations

import json
import math
import platform
import shlex
import sys
from pathlib import Path
from typing import Any, Protocol

import torch

from gpstoken_hf.model_cards import Score, front_matter
from pipelines.shared.outputs import atomic_file


class Extent(Protocol):
    """The length of a run."""

    step: int
    num_images: int
    elapsed_seconds: float


class MetricLog:
    """`metrics.jsonl`: one line per logged step. Lines after the resumed step are dropped.

    Args:
        path (`Path`): The file; created if it does not exist.
        resumed_step (`int`): The step at which the run starts or resumes.
    """

    def __init__(self, path: Path, resumed_step: int) -> None:
        self.path = path
        rows = [row for row in read_metrics(path) if row["step"] <= resumed_step] if path.exists() else []
        with atomic_file(path) as staging:
            staging.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append the values of one step."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file. A line that a crash has cut short is skipped."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def plot_metrics(rows: list[dict[str, float]], path: Path) -> None:
    """Draw every logged quantity over the steps, one panel each, as a PNG."""
    from matplotlib.figure import Figure

    names = sorted({name for row in rows for name in row} - {"step"})
    if not names:
        return
    columns = min(3, len(names))
    figure = Figure(figsize=(5 * columns, 3.2 * math.ceil(len(names) / columns)), layout="constrained")
    for index, name in enumerate(names):
        axes = figure.add_subplot(math.ceil(len(names) / columns), columns, index + 1)
        points = [(row["step"], row[name]) for row in rows if name in row]
        axes.plot(*zip(*points), linewidth=1, marker="." if len(points) < 60 else None)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.grid(alpha=0.3)
        if "loss" in name and all(value > 0 for _, value in points):
            axes.set_yscale("log")
    with atomic_file(path) as staging:
        figure.savefig(staging, dpi=110)


def training_card(program: str, name: str, extent: Extent, metrics: Path) -> str:
    """README.md of a trained model: the command, its duration and device, and the last validation.

    Args:
        program (`str`): Name of the module that was run, such as "training.train_sit".
        name (`str`): Title of the card.
        extent (`Extent`): The length of the run.
        metrics (`Path`): The file of `MetricLog`.
    """
    validated = [row for row in read_metrics(metrics) if any(key.startswith("validation/") for key in row)]
    last = validated[-1] if validated else {}
    scores = "".join(
        f"| {key.removeprefix('validation/')} | {value:.4g} |\n" for key, value in last.items() if key != "step"
    )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    matter = front_matter(
        "transformers" if program == "training.train_tokenizer" else "diffusers",
        [],
        model_name=name,
        scores=[
            Score(key.removeprefix("validation/"), value, "validation data of the run", f"step {last['step']}")
            for key, value in last.items()
            if key.startswith("validation/") and math.isfinite(value)
        ],
    )
    return f"""{matter}
# {name}

Trained with `gpstoken-hf`, {extent.step} steps, {extent.num_images} images, {extent.elapsed_seconds / 60:.1f} minutes,
{device}, torch {torch.__version__}:

```
python -m {program} {shlex.join(sys.argv[1:])}
```

| last validation, step {last.get("step", "-")} | |
|---|---|
{scores}
## Licence and limits

Whoever trained these weights decides on their licence. They have learned the data of the command above and no other.
"""
