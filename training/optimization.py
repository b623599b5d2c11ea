# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""The optimizer, and the learning rate as a function of the progress of a run."""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch


def run_progress(
    step: int, elapsed_seconds: float, max_train_steps: int | None, max_train_minutes: float | None
) -> float:
    """The finished share of a run, in [0, 1]: by steps or by time, whichever is further on."""
    by_steps = step / max_train_steps if max_train_steps else 0.0
    by_time = elapsed_seconds / (60 * max_train_minutes) if max_train_minutes else 0.0
    return min(1.0, max(by_steps, by_time))


def learning_rate_factor(schedule: str, step: int, progress: float, warmup_steps: int, final_ratio: float) -> float:
    """The learning rate over its peak.

    "constant" has no warmup. The others rise linearly over `warmup_steps`. Then "constant_with_warmup" stays, while
    "linear" and "cosine" fall to `final_ratio` as `progress` goes from 0 to 1.

    Raises:
        ValueError: If the schedule is unknown.
    """
    if schedule == "constant":
        return 1.0
    warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    if schedule == "constant_with_warmup":
        return warmup
    if schedule == "linear":
        decay = 1 - progress
    elif schedule == "cosine":
        decay = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        raise ValueError(f"schedule must be constant, constant_with_warmup, linear or cosine, got {schedule!r}")
    return warmup * (final_ratio + (1 - final_ratio) * decay)


def make_optimizer(module: torch.nn.Module, options: argparse.Namespace, lr: float) -> torch.optim.Optimizer:
    """AdamW. Parameters of one dimension (biases, norms) are not decayed; without weight decay it is Adam."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": options.adam_weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=lr,
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_epsilon,
        fused=all(parameter.device.type in ("cpu", "cuda") for parameter in parameters),
    )


def enable_checkpointing(model: Any) -> None:
    """Keep only the inputs of the blocks of a transformers model for the backward pass."""
    # The name since transformers 5.1, or the one before.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
