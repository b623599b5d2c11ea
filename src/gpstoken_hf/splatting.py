# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Splatting: tokens -> feature map (paper Eq. 1-3), as one differentiable op on every device.

    R(x, y) = sum_i g_i(x, y) f_i        g = exp(-(u² - 2 rho u v + v²) / (2 (1 - rho²)))
    u = (x - mu_x) / sigma_x,  v = (y - mu_y) / sigma_y        where |u|, |v| <= support, else g = 0

A plain sum: no sorting, no compositing, no normalisation. `splat_gaussians` is the op, `splat_reference` the formula.

Every backend evaluates the exponent in the whitened form `-(t² + v²) / 2` with `t = (u - rho v) / sqrt(1 - rho²)`. It
equals the form above, which cancels as rho approaches ±1, and `1 - rho²` is computed as `(1 - rho) (1 + rho)` for the
same reason. The gradient of a Gaussian follows from five moments of `A = g · <grad R, f>`: the sums of A t, A v, A t²,
A t v and A v² over the pixels.

Backends: `splatting_cpu` on the CPU (compiled loops), `splatting_triton` on CUDA (kernels, float32), and
`splatting_torch` everywhere else (PyTorch operations by tiles).

Shapes: B batch, L tokens, C channels, h x w pixels of the map.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch.autograd import forward_ad

from .gaussians import NUM_GAUSSIAN_PARAMS, pixel_coordinates, to_aligned_corners
from .numba_support import is_available as numba_is_available
from .splatting_cpu import cpu_backward, cpu_forward
from .splatting_torch import EXP2_SCALE, FAR, tiled_backward, tiled_forward
from .splatting_triton import triton_backward, triton_forward
from .triton_support import is_available as triton_is_available

BACKENDS = ("auto", "reference", "cpu", "triton")

# Computed at import: the oldest supported PyTorch cannot trace this call.
_AUTOCAST_DEVICES = frozenset(name for name in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(name))
# Tuples, not unions of types: the oldest supported PyTorch cannot trace those. A side is a SymInt during an export.
_INTEGERS = (int, np.integer, torch.SymInt)
_NUMBERS = (int, float, np.integer, np.floating)
# Weights that `splat_reference` computes at once.
_REFERENCE_WEIGHTS = 1 << 22


def splat_gaussians(
    gaussians: torch.Tensor,
    features: torch.Tensor,
    size: tuple[int, int],
    support: float = 3.0,
    backend: str = "auto",
    attention_mask: torch.Tensor | None = None,
    align_corners: bool = True,
) -> torch.Tensor:
    """Render tokens into a feature map (paper Eq. 1-3), differentiable in Gaussians and features.

    Computes in float32, or in float64 if either input is float64. The gradients are closed-form. Double backward,
    forward-mode AD and `torch.func.grad` raise; use `backend="reference"` for those.

    Args:
        gaussians (`torch.Tensor`): Shape `(B, L, 5)`, fields `[sigma_x, sigma_y, rho, mu_x, mu_y]` in normalised
            coordinates (see docs/conventions.md), finite, with sigma > 0 and -1 < rho < 1.
        features (`torch.Tensor`): Shape `(B, L, C)`.
        size (`tuple[int, int]`): Height and width of the map in pixels.
        support (`float`, *optional*, defaults to 3.0): Half side of a token's box in sigmas. Outside the box the
            weight of the token is 0.
        backend (`str`, *optional*, defaults to `"auto"`): `"auto"` takes compiled loops on the CPU, Triton on CUDA,
            and PyTorch operations where these are not available. `"cpu"`, `"triton"` and `"reference"` force one.
        attention_mask (`torch.Tensor`, *optional*): Shape `(B, L)`, bool or integer, 0 for padded tokens. They add
            nothing and get zero gradients, whatever values they hold.
        align_corners (`bool`, *optional*, defaults to `True`): The centres of the corner pixels are at -1 and 1, as in
            the authors' code. With `False` the outer edges of these pixels are, and a map of twice the size is the
            same picture with twice the pixels.

    Returns:
        `torch.Tensor`: The map, shape `(B, C, h, w)`, in the promoted dtype of the inputs, or float32 under autocast.

    Raises:
        ValueError: If the shape, dtype or device of an input is wrong, if `size` or `support` is not positive, or if
            `backend` is unknown or not available for these inputs.
        NotImplementedError: If an input carries a forward-mode tangent.

    Examples:
        ```python
        >>> import torch
        >>> from gpstoken_hf import splat_gaussians
        >>> gaussians = torch.tensor([[[0.5, 0.5, 0.0, 0.0, 0.0]]], requires_grad=True)  # one token in the middle
        >>> features = torch.tensor([[[1.0, -2.0]]])
        >>> maps = splat_gaussians(gaussians, features, (3, 3))
        >>> maps.shape
        torch.Size([1, 2, 3, 3])
        >>> maps[0, 0].detach()
        tensor([[0.0183, 0.1353, 0.0183],
                [0.1353, 1.0000, 0.1353],
                [0.0183, 0.1353, 0.0183]])
        >>> maps.square().mean().backward()
        >>> gaussians.grad.shape
        torch.Size([1, 1, 5])

        ```
    """
    height, width = _check_inputs(gaussians, features, size, support, attention_mask)
    out_dtype = torch.promote_types(gaussians.dtype, features.dtype)
    compute_dtype = torch.float64 if out_dtype == torch.float64 else torch.float32
    path = _resolve_backend(backend, gaussians.device, compute_dtype)
    if not align_corners:
        gaussians = to_aligned_corners(gaussians.to(compute_dtype), (height, width))
    if path == "reference":
        maps = splat_reference(gaussians, features, size, support, attention_mask)
        return maps if _autocast_enabled(gaussians.device.type) else maps.to(out_dtype)
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in (gaussians, features)):
        # The op would drop the tangents silently.
        raise NotImplementedError('forward-mode AD of splat_gaussians is not implemented; use backend="reference"')
    mask = None if attention_mask is None else attention_mask.bool()
    maps = torch.ops.gpstoken.splat.default(
        gaussians.to(compute_dtype), features.to(compute_dtype), mask, height, width, float(support), path
    )
    return maps if _autocast_enabled(gaussians.device.type) else maps.to(out_dtype)


def splat_reference(
    gaussians: torch.Tensor,
    features: torch.Tensor,
    size: tuple[int, int],
    support: float = 3.0,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The formula (paper Eq. 1-3) over every token and pixel, differentiated by autograd; the tests use it as truth.

    Works through the tokens in chunks, so it needs little memory without gradients. With gradients, autograd keeps
    the weights of all (token, pixel) pairs.

    Args:
        gaussians (`torch.Tensor`): Shape `(B, L, 5)`, as for `splat_gaussians`.
        features (`torch.Tensor`): Shape `(B, L, C)`.
        size (`tuple[int, int]`): Height and width of the map in pixels.
        support (`float`, *optional*, defaults to 3.0): Half side of a token's box in sigmas.
        attention_mask (`torch.Tensor`, *optional*): Shape `(B, L)`, bool or integer, 0 for padded tokens.

    Returns:
        `torch.Tensor`: The map, shape `(B, C, h, w)`, in the dtype that `splat_gaussians` returns.

    Raises:
        ValueError: If the shape, dtype or device of an input is wrong, or if `size` or `support` is not positive.

    Examples:
        ```python
        >>> import torch
        >>> from gpstoken_hf.splatting import splat_gaussians, splat_reference
        >>> gaussians = torch.tensor([[[0.5, 0.2, 0.3, 0.0, 0.0], [0.3, 0.3, 0.0, 0.5, -0.5]]])
        >>> features = torch.ones(1, 2, 3)
        >>> maps = splat_reference(gaussians, features, (8, 8))
        >>> torch.allclose(maps, splat_gaussians(gaussians, features, (8, 8)), atol=1e-6)
        True

        ```
    """
    height, width = _check_inputs(gaussians, features, size, support, attention_mask)
    out_dtype = torch.promote_types(gaussians.dtype, features.dtype)
    compute_dtype = torch.float64 if out_dtype == torch.float64 else torch.float32
    autocast = _autocast_enabled(gaussians.device.type)
    with torch.autocast(gaussians.device.type, enabled=False) if autocast else contextlib.nullcontext():
        maps = _dense_splat(
            gaussians.to(compute_dtype), features.to(compute_dtype), attention_mask, height, width, float(support)
        )
    return maps if autocast else maps.to(out_dtype)


def _autocast_enabled(device_type: str) -> bool:
    return device_type in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device_type)


def _dense_splat(
    gaussians: torch.Tensor,
    features: torch.Tensor,
    attention_mask: torch.Tensor | None,
    height: int,
    width: int,
    support: float,
) -> torch.Tensor:
    B, L, C = features.shape
    if attention_mask is not None:
        # Padded rows may hold anything. A valid Gaussian in their place keeps NaN out of the gradients too.
        padded = ~attention_mask.bool().unsqueeze(-1)  # (B, L, 1)
        gaussians = torch.where(padded, gaussians.new_tensor([1.0, 1.0, 0.0, 0.0, 0.0]), gaussians)
        features = features.masked_fill(padded, 0)
    x = pixel_coordinates(width, gaussians.device, gaussians.dtype)
    y = pixel_coordinates(height, gaussians.device, gaussians.dtype)
    maps = features.new_zeros(B, C, height * width)
    # An export keeps the sizes open, so it cannot unroll a loop over them.
    exporting = torch.compiler.is_exporting()
    chunk = max(L, 1) if exporting else max(1, _REFERENCE_WEIGHTS // max(1, B * height * width))
    for start in [0] if exporting else range(0, max(L, 1), chunk):  # once for L = 0, so that autograd sees the inputs
        sigma_x, sigma_y, rho, mu_x, mu_y = gaussians[:, start : start + chunk].unsqueeze(-1).unbind(2)  # (B, l, 1)
        dx, dy = x - mu_x, y - mu_y  # (B, l, w), (B, l, h)
        inside_x, inside_y = dx.abs() <= support * sigma_x, dy.abs() <= support * sigma_y
        scale = ((1 - rho) * (1 + rho)).rsqrt()
        # The 1-D terms carry the box, which costs nothing: outside it t or v² is so large that g is 0.
        t_x = torch.where(inside_x, dx / sigma_x * scale, FAR)
        v = torch.where(inside_y, dy / sigma_y, 0)
        v_squared = torch.where(inside_y, v.square(), math.inf)
        t = t_x.unsqueeze(2) - (v * rho * scale).unsqueeze(3)  # (B, l, h, w)
        weights = torch.exp2((t.square() + v_squared.unsqueeze(3)) * EXP2_SCALE).flatten(2)  # (B, l, h w)
        maps = maps + features[:, start : start + chunk].transpose(1, 2) @ weights
    return maps.view(B, C, height, width)


def _check_inputs(
    gaussians: torch.Tensor,
    features: torch.Tensor,
    size: tuple[int, int],
    support: float,
    attention_mask: torch.Tensor | None,
) -> tuple[int, int]:
    """Raise ValueError unless everything fits; returns height and width."""
    tensors = {"gaussians": gaussians, "features": features}
    if attention_mask is not None:
        tensors["attention_mask"] = attention_mask
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if gaussians.ndim != 3 or gaussians.shape[-1] != NUM_GAUSSIAN_PARAMS:
        raise ValueError(f"gaussians must have shape (B, L, {NUM_GAUSSIAN_PARAMS}), got {tuple(gaussians.shape)}")
    B_L = tuple(gaussians.shape[:2])
    if features.ndim != 3 or features.shape[:2] != B_L:
        raise ValueError(f"features must have shape (B, L, C) with (B, L) = {B_L}, got {tuple(features.shape)}")
    for name in ("gaussians", "features"):
        if not tensors[name].is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensors[name].dtype}")
    if attention_mask is not None:
        if attention_mask.shape != B_L:
            raise ValueError(f"attention_mask must have shape (B, L) = {B_L}, got {tuple(attention_mask.shape)}")
        if attention_mask.is_floating_point() or attention_mask.is_complex():
            raise ValueError(f"attention_mask must be bool or integer, got {attention_mask.dtype}")
    if len({tensor.device for tensor in tensors.values()}) > 1:
        devices = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
        raise ValueError(f"all inputs must be on one device, got {devices}")
    sides = tuple(size) if isinstance(size, Sequence) else ()
    if len(sides) != 2 or any(not isinstance(side, _INTEGERS) or side < 1 for side in sides):
        raise ValueError(f"size must be (h, w), two integers of at least 1, got {size!r}")
    if not isinstance(support, _NUMBERS) or not 0 < support < math.inf:
        raise ValueError(f"support must be a finite number above 0, got {support!r}")
    return sides


# ---- The choice of a backend ----------------------------------------------------------------------------------------


def _resolve_backend(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Which code runs for the option `backend`: "reference", "cpu", "tiled" or "triton"."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if backend == "cpu" and device.type != "cpu":
        raise ValueError(f"tensors must be on the CPU for backend 'cpu', got {device}")
    if backend == "cpu" and not numba_is_available():
        raise ValueError("backend must be one that is available, got 'cpu', which needs numba")
    if backend == "triton":
        if not triton_is_available(device):
            raise ValueError(
                "backend must be one that is available, got 'triton', which needs Triton and tensors on CUDA "
                f"(elsewhere it runs under TRITON_INTERPRET=1 only), not tensors on {device}"
            )
        if dtype != torch.float32:
            raise ValueError(f"inputs must fit float32 for backend 'triton', got {dtype}")
    if backend != "auto":
        return backend
    if device.type == "cpu":
        return "cpu" if numba_is_available() else "tiled"
    return "triton" if device.type == "cuda" and triton_is_available(device) and dtype == torch.float32 else "tiled"


@cache
def _notice_no_triton() -> None:
    warnings.warn(
        "Triton is not installed, so splatting on CUDA uses PyTorch operations. The result is the same, but they are "
        "slower and synchronise with the GPU.",
        stacklevel=2,
    )


# ---- The op ---------------------------------------------------------------------------------------------------------


def _splat(
    gaussians: torch.Tensor,
    features: torch.Tensor,
    attention_mask: torch.Tensor | None,
    height: int,
    width: int,
    support: float,
    path: str,
) -> torch.Tensor:
    B, L, C = features.shape
    if B * L * C == 0:
        return features.new_zeros(B, C, height, width)
    if path == "cpu":
        return cpu_forward(gaussians, features, attention_mask, height, width, support)
    if path == "triton":
        return triton_forward(gaussians, features, attention_mask, height, width, support)
    if features.is_cuda and features.dtype == torch.float32:
        _notice_no_triton()
    return tiled_forward(gaussians, features, attention_mask, height, width, support)


def _splat_fake(
    gaussians: torch.Tensor,
    features: torch.Tensor,
    attention_mask: torch.Tensor | None,
    height: int,
    width: int,
    support: float,
    path: str,
) -> torch.Tensor:
    return features.new_empty(features.shape[0], features.shape[2], height, width)


def _splat_backward(
    grad: torch.Tensor,
    gaussians: torch.Tensor,
    features: torch.Tensor,
    attention_mask: torch.Tensor | None,
    support: float,
    path: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    if features.numel() == 0 or grad.numel() == 0:
        return torch.zeros_like(gaussians), torch.zeros_like(features)
    grad = grad.contiguous()  # autograd passes any strides
    if path == "cpu":
        return cpu_backward(grad, gaussians, features, attention_mask, support)
    if path == "triton":
        return triton_backward(grad, gaussians, features, attention_mask, support)
    return tiled_backward(grad, gaussians, features, attention_mask, support)


def _splat_backward_fake(
    grad: torch.Tensor,
    gaussians: torch.Tensor,
    features: torch.Tensor,
    attention_mask: torch.Tensor | None,
    support: float,
    path: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    return gaussians.new_empty(gaussians.shape), features.new_empty(features.shape)


def _save_for_backward(ctx, inputs, output):
    gaussians, features, attention_mask, _, _, ctx.support, ctx.path = inputs
    ctx.save_for_backward(gaussians, features, attention_mask)


def _splat_gradient(ctx, grad):
    grads = torch.ops.gpstoken.splat_backward(grad, *ctx.saved_tensors, ctx.support, ctx.path)
    return *grads, None, None, None, None, None


def _second_derivative(ctx, *grads):
    raise RuntimeError('second derivatives of gpstoken::splat are not implemented; use backend="reference" for them')


def _splat_vmap(info, in_dims, gaussians, features, attention_mask, height, width, support, path):
    folded = _fold_batches(info.batch_size, in_dims, gaussians, features, attention_mask)
    maps = torch.ops.gpstoken.splat(*folded, height, width, support, path)
    return maps.unflatten(0, (info.batch_size, -1)), 0


def _splat_backward_vmap(info, in_dims, grad, gaussians, features, attention_mask, support, path):
    folded = _fold_batches(info.batch_size, in_dims, grad, gaussians, features, attention_mask)
    grads = torch.ops.gpstoken.splat_backward(*folded, support, path)
    return tuple(grad.unflatten(0, (info.batch_size, -1)) for grad in grads), (0, 0)


def _fold_batches(
    batch_size: int, in_dims: tuple[int | None, ...], *tensors: torch.Tensor | None
) -> list[torch.Tensor | None]:
    """Merge the dimension that vmap maps over into the batch: `(..., B, ...)` -> `(n B, ...)`."""
    folded: list[torch.Tensor | None] = []
    for tensor, dim in zip(tensors, in_dims, strict=False):
        if tensor is None:
            folded.append(None)
        else:
            batched = tensor.expand(batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            folded.append(batched.flatten(0, 1))
    return folded


def _register(name, kernel, fake, vmap, gradient, save_for_backward=None):
    # `torch.library.custom_op` does the same but takes 5 µs more per call.
    torch.library.define(
        name, torch.library.infer_schema(kernel, mutates_args=()), tags=(torch.Tag.pt2_compliant_tag,)
    )
    torch.library.impl(name, "default", kernel)
    torch.library.register_fake(name, fake)
    torch.library.register_vmap(name, vmap)
    torch.library.register_autograd(name, gradient, setup_context=save_for_backward)
    for device_type in ("cpu", "cuda"):
        torch.library.register_autocast(name, device_type, torch.float32)


# Ops are global to the process. A second copy of this module, such as the remote code of a model repository, uses the
# ops of the first.
if not hasattr(torch.ops.gpstoken, "splat"):
    _register("gpstoken::splat", _splat, _splat_fake, _splat_vmap, _splat_gradient, _save_for_backward)
    _register(
        "gpstoken::splat_backward", _splat_backward, _splat_backward_fake, _splat_backward_vmap, _second_derivative
    )
