# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""An exponential moving average of a module's parameters, kept in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from training.sharding import gathered_by_deepspeed, local_part, shard_like, whole


class ExponentialMovingAverage:
    """`shadow <- d shadow + (1 - d) parameter` after every optimizer step.

    The rate is `d = min(decay, (1 + n) / (10 + n))` at update n. So a short run is not held at its start. The average
    of a sharded module is sharded like it.

    Args:
        module (`torch.nn.Module`): Its trainable parameters are averaged, its buffers are not.
        decay (`float`): The largest rate, in [0, 1].
    """

    def __init__(self, module: torch.nn.Module, decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        with gathered_by_deepspeed(list(parameters.values())):
            self.shadow = {name: p.detach().float().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, module: torch.nn.Module) -> None:
        """Move the average towards the current parameters of `module`."""
        rate = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        self.num_updates += 1
        current = {name: p for name, p in module.named_parameters() if name in self.shadow}
        with gathered_by_deepspeed(list(current.values())):
            for name, value in self.shadow.items():
                local_part(value).lerp_(local_part(current[name]).float(), 1 - rate)

    def whole(self) -> dict[str, torch.Tensor]:
        """The average, gathered from its shards. All processes must call it."""
        return {name: whole(value) for name, value in self.shadow.items()}

    @contextmanager
    def applied_to(self, module: torch.nn.Module) -> Iterator[None]:
        """Give `module` the average for the length of the block, then its own parameters back, bit for bit."""
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

    def to(self, device: torch.device) -> None:
        """Move the average to a device."""
        self.shadow = {name: value.to(device) for name, value in self.shadow.items()}

    def save(self, path: Path, is_main: bool = True) -> None:
        """Write the average as a safetensors file on the main process. All processes must call it."""
        tensors = {name: value.cpu().contiguous() for name, value in self.whole().items()}
        if is_main:
            save_file(tensors, path, metadata={"num_updates": str(self.num_updates)})

    def load(self, path: Path) -> None:
        """Read what `save` has written.

        Raises:
            ValueError: If the file holds other parameters, or parameters of other shapes.
        """
        with safe_open(path, framework="pt") as file:
            stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            expected = {name: tuple(value.shape) for name, value in self.shadow.items()}
            if stored != expected:
                differing = sorted(name for name, _ in stored.items() ^ expected.items())
                raise ValueError(f"the average must be of this module; parameters that differ: {differing[:4]}")
            for name, value in self.shadow.items():
                local_part(value).copy_(local_part(shard_like(file.get_tensor(name), value)))
            self.num_updates = int((file.metadata() or {})["num_updates"])
