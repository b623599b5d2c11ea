# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Trackers of a run: tensorboard, trackio, wandb and what else accelerate knows; scalars and pictures."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import LoggerType
from PIL import Image

from pipelines.shared.programs import ProgramError

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}


def chosen_trackers(report_to: str) -> list[str]:
    """The trackers that `--report_to` names, separated by commas.

    Raises:
        ProgramError: If one is unknown or its package is missing.
    """
    if report_to == "none":
        return []
    names = [name.strip() for name in report_to.split(",")]
    known = [str(kind) for kind in LoggerType]
    for name in names:
        if name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None:
            raise ProgramError(f"--report_to {name} needs the package {PACKAGES[name]}: pip install {PACKAGES[name]}")
        if name not in known:
            raise ProgramError(f"--report_to must be none or some of {', '.join(sorted(known))}, got {name}")
    return names


def start_trackers(accelerator: Accelerator, project: str, options: argparse.Namespace) -> None:
    """Start the trackers of `options.report_to` with the options as the configuration of the run."""
    if chosen_trackers(options.report_to):
        plain = {name: value for name, value in vars(options).items() if isinstance(value, bool | int | float | str)}
        accelerator.init_trackers(project, config=plain)


def log_pictures(accelerator: Accelerator, paths: list[Path], step: int) -> None:
    """Send pictures to the trackers that show some, under their names without the step."""
    for path in paths:
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        name = "images/" + (path.stem.split("-", 2)[2] if path.stem.count("-") > 1 else "validation")
        for tracker in accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({name: pixels[None]}, step=step, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images({name: [pixels]}, step=step)
            elif tracker.name == "trackio":
                import trackio

                tracker.log({name: trackio.Image(pixels)}, step=step)


class Meter:
    """Scalars of the steps since the last reset. They stay on their device until they are read."""

    def __init__(self) -> None:
        self.history: dict[str, list[tuple[int, torch.Tensor]]] = {}

    def add(self, step: int, values: dict[str, torch.Tensor]) -> None:
        """Note the scalars of one step."""
        for name, value in values.items():
            self.history.setdefault(name, []).append((step, value.detach().float()))

    def read(self, accelerator: Accelerator) -> dict[str, list[tuple[int, float]]]:
        """`(step, mean over the processes)` of every scalar. All processes must call it."""
        means: dict[str, Any] = {
            name: accelerator.reduce(torch.stack([value for _, value in entries]), reduction="mean").tolist()
            for name, entries in self.history.items()
        }
        return {name: [(step, mean) for (step, _), mean in zip(self.history[name], means[name])] for name in means}

    def reset(self) -> None:
        """Forget everything."""
        self.history = {}
