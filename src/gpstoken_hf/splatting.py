# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Splatting: tokens -> feature map (paper Eq. 1-3), as one differentiable op on every device.

    R(x, y) = sum_i g_i(x, y) f_i        g = exp(-(u² - 2 rho u v + v²) / (2 (1 - rho²)))
    u = (x - mu_x) / sigma_x,  v = (y - mu_y) / sigma_y        where |u|, |v| <= support, else g = 0

A plain sum: no sorting, no compositing, no normalisation. `splat_gaussians` is the op, `splat_reference` the formula.

Every path evaluates the exponent in the whitened form `-(t² + v²) / 2` with `t = (u - rho v) / sqrt(1 - rho²)`. It
equals the form above, and keeps its digits where that one cancels, as rho comes near ±1. The gradients of a token's
Gaussian follow from five moments of `A = g · <grad R, f>` over the pixels: sums of A t, A v, A t², A t v, A v².

On the CPU the compiled loops of `splatting_cpu` run, on CUDA the kernels of `splatting_triton`. Where neither is to be
had, and in float64 on CUDA, the tiled path below: it sorts tokens into the 8 x 8 pixel tiles that their boxes touch,
and renders tiles with about as many tokens together as one batched matrix product, in PyTorch alone.

Letters: B batch, L tokens, C channels, h x w pixels of the map, T tiles of a bucket, K tokens of a tile, P (token,
tile) pairs, S = 8 the side of a tile.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from functools import cache

import torch
from torch.autograd import forward_ad

from .gaussians import NUM_GAUSSIAN_PARAMS, pixel_coordinates
from .splatting_cpu import cpu_backward, cpu_forward
from .splatting_triton import triton_backward, triton_forward
from .triton_support import is_available as triton_is_available

TILE_SIZE = 8
BACKENDS = ("auto", "reference", "cpu", "triton")

# Stands for "outside the box" in the whitened coordinate t: its square is finite in float32, and exp(-t² / 2) is 0.
_FAR = 1e18
# exp(-q / 2) = exp2(q _EXP2_SCALE). PyTorch's exp takes ten to thirty times as long where its result underflows, as
# most weights here do; its exp2 does not.
_EXP2_SCALE = -0.5 / math.log(2)
# (token, tile) pairs rendered at once: 4096 pairs of 64 float32 weights are 1 MiB, which stays in a core's cache.
_PAIRS_PER_CHUNK = 4096
# Looked up once: not every supported version of PyTorch can trace the question.
_AUTOCAST_DEVICES = frozenset(name for name in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(name))
# Weights that `splat_reference` holds at once.
_REFERENCE_WEIGHTS = 1 << 22


def splat_gaussians(
    gaussians: torch.Tensor,
    features: torch.Tensor,
    size: tuple[int, int],
    support: float = 3.0,
    backend: str = "auto",
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Render tokens into a feature map (paper Eq. 1-3), differentiable in Gaussians and features.

    Computed in float32 (float64 when either input is); the result has the promoted dtype of the inputs, and float32
    under autocast. Deterministic. The gradients are closed-form; double backward, forward-mode AD and
    `torch.func.grad` raise: use `backend="reference"` for those.

    Args:
        gaussians: `(B, L, 5)` finite `[sigma_x, sigma_y, rho, mu_x, mu_y]`, sigma > 0, -1 < rho < 1 (see
            docs/conventions.md).
        features: `(B, L, C)`.
        size: `(h, w)` of the map in pixels.
        support: half side of a token's box, in sigmas; outside the box its weight is 0.
        backend: `"auto"` takes compiled loops on the CPU, Triton on CUDA, and PyTorch operations by tiles elsewhere;
            `"reference"`, `"cpu"` and `"triton"` force one.
        attention_mask: `(B, L)` bool or integer, 0 for padded tokens: they add nothing and get zero gradients,
            whatever values they hold.

    Returns:
        `(B, C, h, w)` map.

    Raises:
        ValueError: a shape, dtype, device or option does not fit, or a forced backend is not available.
    """
    height, width = _check_inputs(gaussians, features, size, support, attention_mask)
    out_dtype = torch.promote_types(gaussians.dtype, features.dtype)
    compute_dtype = torch.float64 if out_dtype == torch.float64 else torch.float32
    path = _resolve_backend(backend, gaussians.device, compute_dtype)
    if path == "reference":
        return splat_reference(gaussians, features, size, support, attention_mask)
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
    """The formula (paper Eq. 1-3) over every token and pixel, by autograd: what the fast paths are held against.

    Takes and returns what `splat_gaussians` does. Works through the tokens in chunks, so that without gradients it
    needs little memory; with gradients autograd keeps the weights of every (token, pixel) pair.
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
        # Padded rows may hold anything: a legal Gaussian in their place keeps NaN out of the gradients too.
        padded = ~attention_mask.bool().unsqueeze(-1)  # (B, L, 1)
        gaussians = torch.where(padded, gaussians.new_tensor([1.0, 1.0, 0.0, 0.0, 0.0]), gaussians)
        features = features.masked_fill(padded, 0)
    x = pixel_coordinates(width, gaussians.device, gaussians.dtype)
    y = pixel_coordinates(height, gaussians.device, gaussians.dtype)
    maps = features.new_zeros(B, C, height * width)
    chunk = max(1, _REFERENCE_WEIGHTS // max(1, B * height * width))
    for start in range(0, max(L, 1), chunk):  # once for L = 0, so that the graph is whole
        sigma_x, sigma_y, rho, mu_x, mu_y = gaussians[:, start : start + chunk].unsqueeze(-1).unbind(2)  # (B, l, 1)
        dx, dy = x - mu_x, y - mu_y  # (B, l, w), (B, l, h)
        inside_x, inside_y = dx.abs() <= support * sigma_x, dy.abs() <= support * sigma_y
        scale = (1 - rho.square()).rsqrt()
        # The box goes into the 1-D terms, which costs nothing: outside it t or v² is so large that g is 0.
        t_x = torch.where(inside_x, dx / sigma_x * scale, _FAR)
        v = torch.where(inside_y, dy / sigma_y, 0)
        v_squared = torch.where(inside_y, v.square(), math.inf)
        t = t_x.unsqueeze(2) - (v * rho * scale).unsqueeze(3)  # (B, l, h, w)
        weights = torch.exp2((t.square() + v_squared.unsqueeze(3)) * _EXP2_SCALE).flatten(2)  # (B, l, h w)
        maps = maps + features[:, start : start + chunk].transpose(1, 2) @ weights
    return maps.view(B, C, height, width)


def _check_inputs(
    gaussians: torch.Tensor,
    features: torch.Tensor,
    size: tuple[int, int],
    support: float,
    attention_mask: torch.Tensor | None,
) -> tuple[int, int]:
    if gaussians.ndim != 3 or gaussians.shape[-1] != NUM_GAUSSIAN_PARAMS:
        raise ValueError(f"gaussians must have shape (B, L, {NUM_GAUSSIAN_PARAMS}), got {tuple(gaussians.shape)}")
    if features.ndim != 3 or features.shape[:2] != gaussians.shape[:2]:
        raise ValueError(
            f"features must have shape (B, L, C) with (B, L) = {tuple(gaussians.shape[:2])} as the Gaussians, "
            f"got {tuple(features.shape)}"
        )
    for name, tensor in (("gaussians", gaussians), ("features", features)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}")
    tensors = {"gaussians": gaussians, "features": features}
    if attention_mask is not None:
        tensors["attention_mask"] = attention_mask
        if attention_mask.shape != gaussians.shape[:2]:
            raise ValueError(
                f"attention_mask must have shape (B, L) = {tuple(gaussians.shape[:2])}, "
                f"got {tuple(attention_mask.shape)}"
            )
        if attention_mask.is_floating_point() or attention_mask.is_complex():
            raise ValueError(f"attention_mask must be bool or integer, got {attention_mask.dtype}")
    if len({tensor.device for tensor in tensors.values()}) > 1:
        devices = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
        raise ValueError(f"all inputs must be on one device, got {devices}")
    if len(size) != 2 or any(side < 1 for side in size):
        raise ValueError(f"size must be (h, w) with both at least 1, got {tuple(size)}")
    if not 0 < support < math.inf:
        raise ValueError(f"support must be a finite number above 0, got {support}")
    return size[0], size[1]


# ---- The choice of a path -------------------------------------------------------------------------------------------


def _resolve_backend(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """A backend's name -> the path that runs: "reference", "cpu", "tiled" or "triton"."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if backend == "cpu" and device.type != "cpu":
        raise ValueError(f"backend 'cpu' needs tensors on the CPU, got {device}")
    if backend == "triton":
        if not triton_is_available(device):
            raise ValueError(
                "backend 'triton' needs Triton and tensors on CUDA (elsewhere it runs under TRITON_INTERPRET=1 only), "
                f"got tensors on {device}"
            )
        if dtype != torch.float32:
            raise ValueError(f"backend 'triton' computes in float32, got inputs that need {dtype}")
    if backend != "auto":
        return backend
    if device.type == "cpu":
        return "cpu"
    return "triton" if device.type == "cuda" and triton_is_available(device) and dtype == torch.float32 else "tiled"


@cache
def _notice_no_triton() -> None:
    warnings.warn(
        "Triton is not installed: splatting on CUDA falls back to PyTorch operations, which give the same result "
        "but are slower and wait for the GPU",
        stacklevel=2,
    )


# ---- The tiled path -------------------------------------------------------------------------------------------------


def _tile_grid(height: int, width: int) -> tuple[int, int]:
    """Rows and columns of tiles that cover the map."""
    return -(-height // TILE_SIZE), -(-width // TILE_SIZE)


def _tile_buckets(
    gaussians: torch.Tensor, attention_mask: torch.Tensor | None, height: int, width: int, support: float
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The tokens of every tile, tiles with about as many tokens together.

    Yields:
        `tiles` `(T,)` flat index `(b rows + row) columns + column`, and `tokens` `(T, K)` flat index `b L + l` in
        ascending order, filled up with B L, which stands for no token.
    """
    B, L, _ = gaussians.shape
    rows, columns = _tile_grid(height, width)
    device = gaussians.device
    sigma_x, sigma_y, _, mu_x, mu_y = gaussians.reshape(B * L, NUM_GAUSSIAN_PARAMS).double().unbind(-1)

    # The tiles that a token's box may touch. Whether a pixel is inside is decided in _tile_weights, by the same
    # comparison as the reference; the slack covers the rounding of its float32 operands.
    first_column, num_columns = _tile_range(mu_x, support * sigma_x, width)
    first_row, num_rows = _tile_range(mu_y, support * sigma_y, height)
    num_tiles = num_columns * num_rows
    if attention_mask is not None:
        num_tiles = num_tiles * attention_mask.reshape(-1)

    # (token, tile) pairs, grouped by token, then sorted by tile; the stable sort keeps the order deterministic.
    pair_token = torch.repeat_interleave(num_tiles)  # (P,)
    rank = torch.arange(pair_token.shape[0], device=device) - (num_tiles.cumsum(0) - num_tiles)[pair_token]
    row_in_box = torch.div(rank, num_columns[pair_token], rounding_mode="floor")
    column_in_box = rank - row_in_box * num_columns[pair_token]
    image = torch.div(torch.arange(B * L, device=device), L, rounding_mode="floor")
    first_tile = (image * rows + first_row) * columns + first_column
    pair_tile, order = torch.sort(first_tile[pair_token] + row_in_box * columns + column_in_box, stable=True)
    pair_token = torch.cat([pair_token[order], pair_token.new_tensor([B * L])])  # a last entry for empty slots

    counts = torch.bincount(pair_tile, minlength=B * rows * columns)
    starts = counts.cumsum(0) - counts
    sorted_counts, sorted_tiles = torch.sort(counts, descending=True, stable=True)
    for begin, end, capacity in _bucket_bounds(sorted_counts.tolist()):
        tiles = sorted_tiles[begin:end]
        slot = torch.arange(capacity, device=device)
        position = starts[tiles].unsqueeze(1) + slot  # (T, K)
        position = position.masked_fill(slot >= sorted_counts[begin:end].unsqueeze(1), pair_tile.shape[0])
        yield tiles, pair_token[position]


def _tile_range(mu: torch.Tensor, extent: torch.Tensor, num_pixels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """First tile and number of tiles along one axis that `[mu - extent, mu + extent]` touches; both `(B L,)` int64."""
    slack = 1e-3 + 1e-6 * num_pixels
    to_pixels = (num_pixels - 1) / 2
    first = torch.nan_to_num((mu - extent + 1) * to_pixels - slack).ceil().clamp(0, num_pixels).long()
    last = torch.nan_to_num((mu + extent + 1) * to_pixels + slack).floor().clamp(-1, num_pixels - 1).long()
    first_tile = torch.div(first, TILE_SIZE, rounding_mode="floor")
    last_tile = torch.div(last, TILE_SIZE, rounding_mode="floor")
    return first_tile, torch.where(first <= last, last_tile - first_tile + 1, 0)


def _bucket_bounds(descending_counts: list[int]) -> Iterator[tuple[int, int, int]]:
    """Cut tiles, ordered by descending number of tokens, into `(begin, end, capacity)`.

    A tile shares a bucket with a fuller one as long as at least three quarters of its slots are filled.
    """
    begin, num_tiles = 0, len(descending_counts)
    while begin < num_tiles and descending_counts[begin] > 0:
        capacity = descending_counts[begin]
        limit = begin + max(1, _PAIRS_PER_CHUNK // capacity)
        smallest = capacity - capacity // 4
        end = begin + 1
        while end < min(limit, num_tiles) and descending_counts[end] >= smallest:
            end += 1
        yield begin, end, capacity
        begin = end


def _token_table(gaussians: torch.Tensor, support: float) -> torch.Tensor:
    """Per token, as `(B L + 1, 8)`: mu_x, mu_y, half box in x and y, 1 / sqrt(1 - rho²), rho of it, sigma_x, sigma_y.

    The last row is the token that fills empty slots: its box holds nothing.
    """
    sigma_x, sigma_y, rho, mu_x, mu_y = gaussians.reshape(-1, NUM_GAUSSIAN_PARAMS).unbind(-1)
    scale = (1 - rho.square()).rsqrt()
    table = torch.stack(
        [mu_x, mu_y, support * sigma_x, support * sigma_y, scale, rho * scale, sigma_x, sigma_y], dim=-1
    )
    return torch.cat([table, table.new_tensor([[0.0, 0.0, -1.0, -1.0, 1.0, 0.0, 1.0, 1.0]])])


def _tile_weights(
    table: torch.Tensor, x: torch.Tensor, y: torch.Tensor, tiles: torch.Tensor, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights of the tokens of each tile at its pixels.

    Args:
        table: `(B L + 1, 8)` of `_token_table`.
        x: `(columns, S)` coordinates of a tile's pixel columns; y: `(rows, S)` of its pixel rows.
        tiles: `(T,)`; tokens: `(T, K)`, of `_tile_buckets`.

    Returns:
        weights `(T, K, S, S)`; t `(T, K, S, S)`, finite everywhere; v `(T, K, S)`, 0 outside the box.
    """
    rows, columns = y.shape[0], x.shape[0]
    row = torch.div(tiles, columns, rounding_mode="floor") % rows
    mu_x, mu_y, half_x, half_y, scale, rho_scale, sigma_x, sigma_y = table[tokens].unsqueeze(-1).unbind(2)  # (T, K, 1)
    dx = x[tiles % columns].unsqueeze(1) - mu_x  # (T, K, S)
    dy = y[row].unsqueeze(1) - mu_y
    # The box goes into the 1-D terms: t is far away outside in x, and the exponent -inf outside in y.
    t_x = torch.where(dx.abs() <= half_x, dx / sigma_x * scale, _FAR)
    inside_y = dy.abs() <= half_y
    v = torch.where(inside_y, dy / sigma_y, 0)
    exponent_y = torch.where(inside_y, v.square() * _EXP2_SCALE, -math.inf)
    t = t_x.unsqueeze(2) - (v * rho_scale).unsqueeze(3)
    weights = torch.addcmul(exponent_y.unsqueeze(3), t, t, value=_EXP2_SCALE).exp2_()
    return weights, t, v


def _tile_coordinates(num_pixels: int, like: torch.Tensor) -> torch.Tensor:
    """Pixel coordinates of one axis by tile, `(tiles, S)`; infinite, so in no box, past the end of the map."""
    num_tiles = -(-num_pixels // TILE_SIZE)
    coordinates = like.new_full((num_tiles * TILE_SIZE,), math.inf)
    coordinates[:num_pixels] = pixel_coordinates(num_pixels, like.device, like.dtype)
    return coordinates.view(num_tiles, TILE_SIZE)


def _tiled_forward(
    gaussians: torch.Tensor,
    features: torch.Tensor,
    attention_mask: torch.Tensor | None,
    height: int,
    width: int,
    support: float,
) -> torch.Tensor:
    B, L, C = features.shape
    rows, columns = _tile_grid(height, width)
    table = _token_table(gaussians, support)
    x, y = _tile_coordinates(width, gaussians), _tile_coordinates(height, gaussians)
    flat_features = torch.cat([features.reshape(B * L, C), features.new_zeros(1, C)])
    tile_maps = features.new_zeros(B * rows * columns, C, TILE_SIZE * TILE_SIZE)
    for tiles, tokens in _tile_buckets(gaussians, attention_mask, height, width, support):
        weights, _, _ = _tile_weights(table, x, y, tiles, tokens)
        tile_maps.index_copy_(0, tiles, torch.bmm(flat_features[tokens].transpose(1, 2), weights.flatten(2)))
    maps = tile_maps.view(B, rows, columns, C, TILE_SIZE, TILE_SIZE).permute(0, 3, 1, 4, 2, 5)
    return maps.reshape(B, C, rows * TILE_SIZE, columns * TILE_SIZE)[:, :, :height, :width].contiguous()


def _tiled_backward(
    grad: torch.Tensor,
    gaussians: torch.Tensor,
    features: torch.Tensor,
    attention_mask: torch.Tensor | None,
    support: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Moments of A `(B, L, 5)` and gradient of the features `(B, L, C)`."""
    B, L, C = features.shape
    height, width = grad.shape[-2:]
    rows, columns = _tile_grid(height, width)
    table = _token_table(gaussians, support)
    x, y = _tile_coordinates(width, gaussians), _tile_coordinates(height, gaussians)
    flat_features = torch.cat([features.reshape(B * L, C), features.new_zeros(1, C)])
    padding = (0, columns * TILE_SIZE - width, 0, rows * TILE_SIZE - height)
    tile_grads = torch.nn.functional.pad(grad, padding).view(B, C, rows, TILE_SIZE, columns, TILE_SIZE)
    tile_grads = tile_grads.permute(0, 2, 4, 1, 3, 5).reshape(B * rows * columns, C, TILE_SIZE * TILE_SIZE)

    # Columns: gradient of the features, then the moments of t, v, t², t v, v².
    sums = features.new_zeros(B * L + 1, C + 5)
    for tiles, tokens in _tile_buckets(gaussians, attention_mask, height, width, support):
        T, K = tokens.shape
        weights, t, v = _tile_weights(table, x, y, tiles, tokens)
        bucket_grads = tile_grads[tiles]  # (T, C, S²)
        pair_sums = features.new_empty(T, K, C + 5)
        pair_sums[..., :C] = torch.bmm(weights.flatten(2), bucket_grads.transpose(1, 2))
        A = weights.mul_(torch.bmm(flat_features[tokens], bucket_grads).view_as(weights))
        A_t = A * t
        row_A, row_t = A.sum(-1), A_t.sum(-1)  # (T, K, S)
        pair_sums[..., C] = row_t.sum(-1)
        pair_sums[..., C + 1] = (row_A * v).sum(-1)
        pair_sums[..., C + 2] = t.mul_(A_t).sum((-2, -1))
        pair_sums[..., C + 3] = (row_t * v).sum(-1)
        pair_sums[..., C + 4] = (row_A * v.square()).sum(-1)
        sums.index_add_(0, tokens.view(-1), pair_sums.view(T * K, C + 5))
    sums = sums[:-1].view(B, L, C + 5)
    return sums[..., C:], sums[..., :C].contiguous()


def _gaussian_gradients(
    gaussians: torch.Tensor, moments: torch.Tensor, attention_mask: torch.Tensor | None
) -> torch.Tensor:
    """Gradient of the Gaussians from the moments of A; `(B, L, 5)`, `(B, L, 5)` -> `(B, L, 5)`.

    With the exponent `-(t² + v²) / 2`, `t = s (u - rho v)`, `s = 1 / sqrt(1 - rho²)`:
    d/du = -s t, d/dv = s rho t - v, d/drho = s t v - rho s² t²; and u = s⁻¹ t + rho v.
    """
    sigma_x, sigma_y, rho, _, _ = gaussians.unbind(-1)
    sum_t, sum_v, sum_tt, sum_tv, sum_vv = moments.unbind(-1)
    scale = (1 - rho.square()).rsqrt()
    grads = torch.stack(
        [
            (sum_tt + rho * scale * sum_tv) / sigma_x,
            (sum_vv - rho * scale * sum_tv) / sigma_y,
            scale * sum_tv - rho * scale.square() * sum_tt,
            scale * sum_t / sigma_x,
            (sum_v - rho * scale * sum_t) / sigma_y,
        ],
        dim=-1,
    )
    return grads if attention_mask is None else grads.masked_fill(~attention_mask.unsqueeze(-1), 0)


def _axes(like: torch.Tensor, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Coordinates of the pixel columns `(w,)` and rows `(h,)`."""
    return (
        pixel_coordinates(width, like.device, like.dtype),
        pixel_coordinates(height, like.device, like.dtype),
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
        x, y = _axes(gaussians, height, width)
        return cpu_forward(gaussians, features, attention_mask, x, y, support)
    if path == "triton":
        return triton_forward(gaussians, features, attention_mask, height, width, support)
    if features.is_cuda and features.dtype == torch.float32:
        _notice_no_triton()
    return _tiled_forward(gaussians, features, attention_mask, height, width, support)


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
    if path == "triton":
        return triton_backward(grad, gaussians, features, attention_mask, support)
    if path == "cpu":
        x, y = _axes(gaussians, *grad.shape[-2:])
        moments, grad_features = cpu_backward(grad, gaussians, features, attention_mask, x, y, support)
    else:
        moments, grad_features = _tiled_backward(grad.contiguous(), gaussians, features, attention_mask, support)
    return _gaussian_gradients(gaussians, moments, attention_mask), grad_features


def _splat_backward_fake(
    grad: torch.Tensor,
    gaussians: torch.Tensor,
    features: torch.Tensor,
    attention_mask: torch.Tensor | None,
    support: float,
    path: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    return gaussians.new_empty(gaussians.shape), features.new_empty(features.shape)


class _Splat(torch.autograd.Function):
    """A call of the op in a graph, with the backward op as its gradient."""

    @staticmethod
    def forward(ctx, gaussians, features, attention_mask, height, width, support, path):
        ctx.save_for_backward(gaussians, features, attention_mask)
        ctx.support, ctx.path = support, path
        args = gaussians, features, attention_mask, height, width, support, path
        return _below_autograd(torch.ops.gpstoken.splat.default, args)

    @staticmethod
    def backward(ctx, grad):
        gaussians, features, attention_mask = ctx.saved_tensors
        # Autograd promises nothing about the strides of `grad`.
        grads = torch.ops.gpstoken.splat_backward.default(
            grad.contiguous(), gaussians, features, attention_mask, ctx.support, ctx.path
        )
        return *grads, None, None, None, None, None


class _SplatBackward(torch.autograd.Function):
    """The backward op in a graph of its own, as `create_graph=True` asks for; its gradient is not defined."""

    @staticmethod
    def forward(ctx, *args):
        return _below_autograd(torch.ops.gpstoken.splat_backward.default, args)

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            'second derivatives of gpstoken::splat: there is no autograd formula; use backend="reference" for them'
        )


def _below_autograd(op, args):
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def _splat_autograd(*args):
    """What the dispatcher calls first: a node of the graph where autograd is at work, else the op itself."""
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in args[:2]):
        raise NotImplementedError('forward-mode AD of gpstoken::splat is not implemented; use backend="reference"')
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in args[:2]):
        return _Splat.apply(*args)
    return _below_autograd(torch.ops.gpstoken.splat.default, args)


def _splat_backward_autograd(*args):
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in args[:3]):
        return _SplatBackward.apply(*args)
    return _below_autograd(torch.ops.gpstoken.splat_backward.default, args)


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
    """The dimension that vmap maps over, joined with the batch: `(..., B, ...)` -> `(n B, ...)`."""
    folded: list[torch.Tensor | None] = []
    for tensor, dim in zip(tensors, in_dims, strict=False):
        if tensor is None:
            folded.append(None)
        else:
            batched = tensor.expand(batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            folded.append(batched.flatten(0, 1))
    return folded


def _register_op(name, kernel, fake, autograd, vmap):
    torch.library.define(
        name, torch.library.infer_schema(kernel, mutates_args=()), tags=(torch.Tag.pt2_compliant_tag,)
    )
    torch.library.impl(name, "default", kernel)
    # Not `register_autograd`: the wrapper it generates costs as much as rendering a small map.
    torch.library.impl(name, "Autograd", autograd)
    torch.library.register_fake(name, fake)
    torch.library.register_vmap(name, vmap)
    for device_type in ("cpu", "cuda"):
        torch.library.register_autocast(name, device_type, torch.float32)


# Ops are global to the process: a second copy of this module, as remote code of a model repository brings one, uses
# those of the first.
if not hasattr(torch.ops.gpstoken, "splat"):
    _register_op("gpstoken::splat", _splat, _splat_fake, _splat_autograd, _splat_vmap)
    _register_op(
        "gpstoken::splat_backward",
        _splat_backward,
        _splat_backward_fake,
        _splat_backward_autograd,
        _splat_backward_vmap,
    )
