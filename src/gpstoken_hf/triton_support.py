# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Triton, if it is installed: the decorator and launch helpers of the modules with GPU kernels."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # `is_available` then returns False, so no kernel is called
    triton = tl = None

# Triton decides whether to compile or to interpret a kernel when the kernel is defined.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def is_available(device: torch.device) -> bool:
    """Whether kernels can run on tensors of `device`: CUDA, or any device under Triton's interpreter."""
    if triton is None:
        return False
    return device.type == "cuda" or _INTERPRETED


def jit(*sizes: str) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: `triton.jit` without specialisation on the arguments named in `sizes`.

    A kernel then compiles once for all sizes, 1 included. Without Triton the function is returned unchanged.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        return function if triton is None else triton.jit(function, do_not_specialize=list(sizes))

    return decorate


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Context in which the device of `tensor` is the current one. Triton launches kernels on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


# Triton has functions of these names too, but each call takes 2 to 3 µs, a tenth of the time of a launch.


def cdiv(a: int, b: int) -> int:
    """`a / b` rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n, for n >= 1."""
    return 1 << (n - 1).bit_length()
