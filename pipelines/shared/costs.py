# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""What a computation costs: parameters, multiply-adds, time and memory, with the name of the device."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def device_name(device: str | torch.device) -> str:
    """The name of a device for a report, with the number of threads on a CPU."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} threads"


def num_parameters(modules: Iterable[torch.nn.Module]) -> int:
    """Parameters of modules, each counted once."""
    return sum({id(parameter): parameter.numel() for module in modules for parameter in module.parameters()}.values())


def multiply_adds(call: Callable[[], Any]) -> int:
    """Multiply-adds of convolutions, matrix products and attention in a call; everything else counts 0."""
    # Fused attention is not counted on every device; written out it is.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() // 2


def clock(device: str | torch.device) -> float:
    """The time in seconds, after the work of the device is done."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure(call: Callable[[], Any], device: str | torch.device) -> tuple[float, int | None]:
    """Seconds of a call, and on CUDA the bytes of its largest use of memory, what is loaded included."""
    is_cuda = torch.device(device).type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    start = clock(device)
    call()
    seconds = clock(device) - start
    return seconds, torch.cuda.max_memory_allocated(device) if is_cuda else None


def spread(seconds: list[float]) -> dict[str, float]:
    """Median, smallest and largest of several times."""
    return {"median_s": median(seconds), "min_s": min(seconds), "max_s": max(seconds)}


def milliseconds(times: dict[str, float] | None, divisor: int = 1) -> str:
    """`median (smallest to largest)` in milliseconds, each divided by `divisor`."""
    if times is None:
        return "–"
    middle, low, high = (1000 * times[name] / divisor for name in ("median_s", "min_s", "max_s"))
    return f"{middle:.1f} ({low:.1f} to {high:.1f})"
