# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""What a program tells the training loop, and how a signal asks it to stop."""

from __future__ import annotations

import argparse
import signal
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator


class TrainingTask(ABC):
    """What is trained: the modules, their losses, the batches, and how to validate and save the result."""

    name: str
    modules: dict[str, torch.nn.Module]
    """By name. "model" is averaged, validated and saved; other modules are trained in turns with it."""

    def turn(self, step: int) -> str:
        """The module that is trained at this step (0-based)."""
        return "model"

    def learning_rate(self, name: str, options: argparse.Namespace) -> float:
        """The peak learning rate of a module."""
        return options.learning_rate

    @abstractmethod
    def loader(
        self, first_batch: int, accelerator: Accelerator, place: dict[str, Any] | None = None
    ) -> Iterable[dict[str, Any]]:
        """The endless batches of this process, starting with number `first_batch`, which begins at `place`."""

    def place_of(self, batch: int) -> dict[str, Any] | None:
        """Where batch number `batch` begins in a stream; see `training.data.BatchPlan.place_of`."""
        return None

    @abstractmethod
    def losses(
        self, modules: dict[str, torch.nn.Module], batch: dict[str, torch.Tensor], step: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """What the module of this turn minimises, and scalars to log.

        Args:
            modules (`dict[str, torch.nn.Module]`): `self.modules` as accelerate has wrapped them.
            batch (`dict[str, torch.Tensor]`): One of the loader's, on the right device.
            step (`int`): Number of finished steps.
        """

    @abstractmethod
    def validate(self, step: int, directory: Path) -> dict[str, float]:
        """Measure the model, which is in evaluation mode and on its device; may write pictures into `directory`."""

    @abstractmethod
    def save(self, directory: Path, dtype: torch.dtype) -> None:
        """Write the trained model in the format of Hugging Face, its weights stored as `dtype`."""

    def describe(self) -> dict[str, Any]:
        """Sections for the record of the run beside the options, such as the model's configuration."""
        return {}


class StopRequest:
    """Turns the first SIGINT or SIGTERM into a request for a checkpoint and a clean end. A second one ends at once."""

    signal: int | None = None

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Listen for the length of the block."""

        def on_signal(number: int, frame: Any) -> None:
            if self.signal is not None:
                raise KeyboardInterrupt
            self.signal = number

        previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
