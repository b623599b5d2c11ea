# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""What a computation costs: parameters, multiply-adds, time and memory, with the name of the device."""

from __future__ import annotations

import ctypes
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
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'' if threads == 1 else 's'}"


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


def measure(call: Callable[[], Any], device: str | torch.device) -> float:
    """Seconds of a call."""
    start = clock(device)
    call()
    return clock(device) - start


def peak_growth(call: Callable[[], Any], device: str | torch.device) -> int | None:
    """The most bytes by which memory grows during a call; it must not be the first, which may compile.

    On CUDA these are the bytes of tensors, on the CPU those of the process. None where the system reports neither.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if device.type != "cpu" or not clear.exists():
        return None
    try:
        # Return freed memory to the system first, because a call that reuses it would not be measured.
        ctypes.CDLL(None).malloc_trim(0)
        clear.write_text("5")  # resets VmHWM, the peak
        before = _status_bytes(status, "VmRSS")
    except (OSError, AttributeError):
        return None
    call()
    return max(_status_bytes(status, "VmHWM") - before, 0)


def _status_bytes(status: Path, field: str) -> int:
    for line in status.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in {status}")


def weight_bytes(modules: Iterable[torch.nn.Module]) -> int:
    """Bytes of the parameters and buffers of modules, each counted once."""
    tensors = {id(one): one for module in modules for one in (*module.parameters(), *module.buffers())}
    return sum(one.numel() * one.element_size() for one in tensors.values())


def spread(seconds: list[float]) -> dict[str, float]:
    """Median, smallest and largest of several times."""
    return {"median_s": median(seconds), "min_s": min(seconds), "max_s": max(seconds)}


def milliseconds(times: dict[str, float] | None, divisor: int = 1) -> str:
    """`median (smallest to largest)` in milliseconds, each divided by `divisor`."""
    if times is None:
        return "–"
    middle, low, high = (1000 * times[name] / divisor for name in ("median_s", "min_s", "max_s"))
    return f"{middle:.1f} ({low:.1f} to {high:.1f})"
