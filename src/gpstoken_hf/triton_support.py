# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""What the modules with GPU kernels share: Triton where there is one, and where kernels can run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # a platform without Triton: `is_available` says so, and no kernel is ever called
    triton = tl = None

# Triton decides at the definition of a kernel whether it is compiled or interpreted.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def is_available(device: torch.device) -> bool:
    """Whether kernels can run on tensors of `device`: CUDA, or any device under Triton's interpreter."""
    if triton is None:
        return False
    return device.type == "cuda" or _INTERPRETED


def jit(*sizes: str) -> Callable[[Callable[..., Any]], Any]:
    """`triton.jit` where there is Triton, as a decorator that does not specialise on the arguments named `sizes`.

    So a new size compiles nothing, and 1 is a size like any other.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        return function if triton is None else triton.jit(function, do_not_specialize=list(sizes))

    return decorate


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Kernels are launched on the current device, which need not be that of the tensors."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


# Triton's own functions of these names take 2 to 3 µs a call, a tenth of what a whole launch does.


def cdiv(a: int, b: int) -> int:
    """`a / b`, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n` >= 1."""
    return 1 << (n - 1).bit_length()
