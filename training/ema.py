# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""An exponential moving average of a module's parameters, kept in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class ExponentialMovingAverage:
    """`shadow <- d shadow + (1 - d) parameter` after every optimizer step.

    The rate is `d = min(decay, (1 + n) / (10 + n))` at update n, so that short runs are not held at their start.

    Args:
        module: its trainable parameters are averaged; buffers are not.
        decay: in [0, 1].
    """

    def __init__(self, module: torch.nn.Module, decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        self.shadow = {
            name: parameter.detach().float().clone()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }

    @torch.no_grad()
    def update(self, module: torch.nn.Module) -> None:
        """Move towards the parameters that `module` has now."""
        rate = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        self.num_updates += 1
        current = dict(module.named_parameters())
        torch._foreach_lerp_(
            list(self.shadow.values()), [current[name].float() for name in self.shadow], weight=1 - rate
        )

    @contextmanager
    def applied_to(self, module: torch.nn.Module) -> Iterator[None]:
        """Within the block `module` holds the average; afterwards it has its own parameters back, bit for bit."""
        parameters = {name: p for name, p in module.named_parameters() if name in self.shadow}
        own = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(self.shadow[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(own[name])

    def state_dict(self) -> dict[str, Any]:
        return {"decay": self.decay, "num_updates": self.num_updates, "shadow": self.shadow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["shadow"].keys() != self.shadow.keys():
            differing = sorted(state["shadow"].keys() ^ self.shadow.keys())
            raise ValueError(f"the average was made for another module; parameters that differ: {differing[:4]}")
        self.num_updates = state["num_updates"]
        with torch.no_grad():
            for name, value in state["shadow"].items():
                self.shadow[name].copy_(value)
