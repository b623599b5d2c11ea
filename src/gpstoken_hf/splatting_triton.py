# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Splatting on a GPU: Triton kernels, float32 (paper Eq. 1-3).

Forward: one program renders one tile of pixels of one image, for one block of channels. It takes the tokens in chunks;
a chunk is one matrix product of weights and features. With few tokens, the program renders every chunk that has a
token on the tile. With many, it first compacts the tokens on its tile into a list.

Backward: one program handles one token, one strip of its box and one block of channels. The strips take rows of blocks
in turn, and a second kernel adds their partial sums in a fixed order.

The batch is part of the grid. There are no atomics and no host synchronisation, and the result is deterministic.
Kernels are compiled at the first call. With TRITON_INTERPRET=1 they run on CPU tensors, for tests.

`t`, `v` and the moments are those of `splatting`. Shapes: B batch, L tokens, C channels, h x w pixels of the map,
P pixels of a tile.
"""

from __future__ import annotations

import math

import torch

from .triton_support import cdiv, jit, next_power_of_2, on_device, tl

_jit = jit("L", "C", "height", "width", "num_tokens", "num_strips", "num_parts")

# Forward: pixels of a tile, tokens of a chunk, and tokens scanned at once to make a list.
TILE_HEIGHT, TILE_WIDTH = 8, 16
CHUNK = 16
SCAN = 512
# The forward pass makes lists from this many tokens on.
LIST_MIN_TOKENS = 64
# Backward: pixels of a block of the token's box.
BLOCK_HEIGHT, BLOCK_WIDTH = 8, 8
MAX_CHANNEL_BLOCK = 64
# A box is split into one strip per this many rows of the map, up to a largest number of strips.
ROWS_PER_STRIP, MAX_STRIPS = 64, 8
# This many programs keep a GPU busy. With fewer, boxes are split further.
MIN_PROGRAMS = 2048

# Fused multiply-adds are safe, because no comparison with a box contains a product and a sum. The option is explicit
# because its default varies between versions of Triton. Software pipelining is off: it needs registers (forward with
# lists on sm_90: 107 instead of 96), and a multiprocessor then holds a fifth fewer programs.
_OPTIONS = {"enable_fp_fusion": True, "num_stages": 1}

_EXP2_SCALE = -0.5 / math.log(2)


@_jit
def _coordinate(index, num_pixels):
    """`(2 i - (n - 1)) / (n - 1)` in float32, with the same bits as `gaussians.pixel_coordinates`, which uses float64.

    Both operands are exact below 2^24, and the division rounds once. A test checks every index of every n up to 20000.
    """
    span = tl.maximum(num_pixels - 1, 1)
    coordinate = tl.div_rn((2 * index - span).to(tl.float32), span.to(tl.float32))
    return tl.where(num_pixels > 1, coordinate, 0.0)


@_jit
def _weights(dx, dy, half_x, half_y, sigma_x, sigma_y, rho, scale, EXP2_SCALE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Weight, t and v; 0 outside the box. The comparison is that of the reference, so both agree on every pixel."""
    inside = (tl.abs(dx) <= half_x) & (tl.abs(dy) <= half_y)
    v = tl.where(inside, dy / sigma_y, 0.0)
    t = tl.where(inside, (dx / sigma_x - rho * v) * scale, 0.0)
    return tl.where(inside, tl.exp2((t * t + v * v) * EXP2_SCALE), 0.0), t, v


@_jit
def _render_chunk(  # type: ignore[no-untyped-def]
    acc,
    token,
    valid,
    x,
    y,
    gaussians_ptr,
    features_ptr,
    mask_ptr,
    channel,
    C,
    support,
    HAS_MASK: tl.constexpr,
    EXP2_SCALE: tl.constexpr,
):
    """Add the tokens at the flat indices `token` `(CHUNK,)` to `acc` `(P, channels)`, where `valid`."""
    if HAS_MASK:
        valid = valid & (tl.load(mask_ptr + token, mask=valid, other=0) != 0)
    base = gaussians_ptr + token * 5
    sigma_x = tl.load(base, mask=valid, other=1.0)[None, :]
    sigma_y = tl.load(base + 1, mask=valid, other=1.0)[None, :]
    rho = tl.load(base + 2, mask=valid, other=0.0)[None, :]
    mu_x = tl.load(base + 3, mask=valid, other=0.0)[None, :]
    mu_y = tl.load(base + 4, mask=valid, other=0.0)[None, :]
    half_x = tl.where(valid[None, :], support * sigma_x, -1.0)
    half_y = support * sigma_y
    scale = 1.0 / tl.sqrt((1.0 - rho) * (1.0 + rho))
    weights, _, _ = _weights(
        x[:, None] - mu_x, y[:, None] - mu_y, half_x, half_y, sigma_x, sigma_y, rho, scale, EXP2_SCALE
    )
    feature = tl.load(
        features_ptr + token[:, None] * C + channel[None, :],
        mask=valid[:, None] & (channel < C)[None, :],
        other=0.0,
    )
    return tl.dot(weights, feature, acc, input_precision="ieee")


@_jit
def _on_tile(  # type: ignore[no-untyped-def]
    token, valid, gaussians_ptr, mask_ptr, x_first, x_last, y_first, y_last, support, HAS_MASK: tl.constexpr
):
    """Whether each token's box reaches the tile, i.e. whether the tile's nearest point to mu is in the box.

    May be wrongly true, never wrongly false.
    """
    if HAS_MASK:
        valid = valid & (tl.load(mask_ptr + token, mask=valid, other=0) != 0)
    base = gaussians_ptr + token * 5
    half_x = support * tl.load(base, mask=valid, other=0.0)
    half_y = support * tl.load(base + 1, mask=valid, other=0.0)
    mu_x = tl.load(base + 3, mask=valid, other=0.0)
    mu_y = tl.load(base + 4, mask=valid, other=0.0)
    dx = tl.minimum(tl.maximum(mu_x, x_first), x_last) - mu_x
    dy = tl.minimum(tl.maximum(mu_y, y_first), y_last) - mu_y
    return valid & (tl.abs(dx) <= half_x) & (tl.abs(dy) <= half_y)


@_jit
def forward_kernel(  # type: ignore[no-untyped-def]
    gaussians_ptr,
    features_ptr,
    mask_ptr,
    maps_ptr,
    lists_ptr,
    L,
    C,
    height,
    width,
    support,
    HAS_MASK: tl.constexpr,
    MAKE_LISTS: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    CHUNK_L: tl.constexpr,
    SCAN_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EXP2_SCALE: tl.constexpr,
):
    """Grid (B tiles, blocks of channels). `lists` `(blocks, B tiles, SCAN_L)` int32 is scratch for MAKE_LISTS."""
    image_tile, channel_block = tl.program_id(0), tl.program_id(1)
    columns = tl.cdiv(width, TILE_W)
    num_tiles = columns * tl.cdiv(height, TILE_H)
    image, tile = image_tile // num_tiles, image_tile % num_tiles
    top, left = tile // columns * TILE_H, tile % columns * TILE_W
    pixel = tl.arange(0, TILE_H * TILE_W)
    column, row = left + pixel % TILE_W, top + pixel // TILE_W
    x, y = _coordinate(column, width), _coordinate(row, height)
    x_first, x_last = _coordinate(left, width), _coordinate(tl.minimum(left + TILE_W, width) - 1, width)
    y_first, y_last = _coordinate(top, height), _coordinate(tl.minimum(top + TILE_H, height) - 1, height)
    channel = channel_block * BLOCK_C + tl.arange(0, BLOCK_C)
    gaussians_ptr += image.to(tl.int64) * L * 5
    features_ptr += image.to(tl.int64) * L * C
    mask_ptr += image.to(tl.int64) * L

    acc = tl.zeros((TILE_H * TILE_W, BLOCK_C), dtype=tl.float32)
    if MAKE_LISTS:
        program = channel_block.to(tl.int64) * tl.num_programs(0) + image_tile
        list_ptr = lists_ptr + program * SCAN_L
        for start in range(0, L, SCAN_L):
            scanned = start + tl.arange(0, SCAN_L)
            hit = _on_tile(
                scanned, scanned < L, gaussians_ptr, mask_ptr, x_first, x_last, y_first, y_last, support, HAS_MASK
            ).to(tl.int32)
            tl.store(list_ptr + tl.cumsum(hit, 0) - 1, scanned, mask=hit != 0)
            num_hits = tl.sum(hit, 0)
            tl.debug_barrier()  # other threads wrote the entries that a thread reads
            for k in range(0, num_hits, CHUNK_L):
                slot = k + tl.arange(0, CHUNK_L)
                listed = tl.load(list_ptr + slot, mask=slot < num_hits, other=0)
                acc = _render_chunk(
                    acc, listed, slot < num_hits, x, y, gaussians_ptr, features_ptr, mask_ptr, channel, C, support,
                    HAS_MASK, EXP2_SCALE,
                )  # fmt: skip
            tl.debug_barrier()  # all threads have read the list before it is overwritten
    else:
        for start in range(0, L, CHUNK_L):
            token = start + tl.arange(0, CHUNK_L)
            hit = _on_tile(
                token, token < L, gaussians_ptr, mask_ptr, x_first, x_last, y_first, y_last, support, HAS_MASK
            )
            if tl.max(hit.to(tl.int32), 0) > 0:
                acc = _render_chunk(
                    acc, token, hit, x, y, gaussians_ptr, features_ptr, mask_ptr, channel, C, support,
                    HAS_MASK, EXP2_SCALE,
                )  # fmt: skip

    offset = channel[None, :] * (height * width) + (row * width + column)[:, None]
    inside = ((row < height) & (column < width))[:, None] & (channel < C)[None, :]
    tl.store(maps_ptr + image.to(tl.int64) * C * height * width + offset, acc, mask=inside)


@_jit
def _pixel_range(mu, half, num_pixels):
    """First pixel and end of a range that contains every pixel of the box along one axis."""
    to_pixels = 0.5 * (num_pixels - 1)
    middle, reach = (mu + 1.0) * to_pixels, half * to_pixels
    end = num_pixels.to(tl.float32)
    # Covers the float32 rounding here and in the comparison in _weights.
    slack = 1e-3 + 1e-6 * (tl.abs(middle) + reach + end)
    first, last = tl.ceil(middle - reach - slack), tl.floor(middle + reach + slack) + 1.0
    # These comparisons turn NaN into 0 and keep the values within int32.
    first = tl.where(first > 0.0, tl.where(first < end, first, end), 0.0)
    last = tl.where(last > 0.0, tl.where(last < end, last, end), 0.0)
    return first.to(tl.int32), last.to(tl.int32)


@_jit
def _store_gaussian_gradient(grad_ptr, sigma_x, sigma_y, rho, scale, kept, sum_t, sum_v, sum_tt, sum_tv, sum_vv):
    """Gradient of a Gaussian from its moments, as in `splatting_torch.gaussian_gradients`; 0 unless `kept`."""
    tl.store(grad_ptr, tl.where(kept, (sum_tt + rho * scale * sum_tv) / sigma_x, 0.0))
    tl.store(grad_ptr + 1, tl.where(kept, (sum_vv - rho * scale * sum_tv) / sigma_y, 0.0))
    tl.store(grad_ptr + 2, tl.where(kept, scale * sum_tv - rho * scale * scale * sum_tt, 0.0))
    tl.store(grad_ptr + 3, tl.where(kept, scale * sum_t / sigma_x, 0.0))
    tl.store(grad_ptr + 4, tl.where(kept, (sum_v - rho * scale * sum_t) / sigma_y, 0.0))


@_jit
def backward_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,
    gaussians_ptr,
    features_ptr,
    mask_ptr,
    moments_ptr,
    grad_features_ptr,
    L,
    C,
    height,
    width,
    num_tokens,
    support,
    HAS_MASK: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EXP2_SCALE: tl.constexpr,
):
    """Grid (B L, strips, blocks of channels).

    With SPLIT: partial `moments` `(strips blocks, B L, 5)` and `grad_features` `(strips, B L, C)`. Without (one strip
    and one block): the gradients themselves, `(B L, 5)` and `(B L, C)`.
    """
    token, strip, channel_block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_strips = tl.num_programs(1)
    image = token // L
    base = gaussians_ptr + token.to(tl.int64) * 5
    sigma_x, sigma_y, rho = tl.load(base), tl.load(base + 1), tl.load(base + 2)
    mu_x, mu_y = tl.load(base + 3), tl.load(base + 4)
    half_x, half_y = support * sigma_x, support * sigma_y
    scale = 1.0 / tl.sqrt((1.0 - rho) * (1.0 + rho))
    x_begin, x_end = _pixel_range(mu_x, half_x, width)
    y_begin, y_end = _pixel_range(mu_y, half_y, height)
    channel = channel_block * BLOCK_C + tl.arange(0, BLOCK_C)
    real = channel < C
    if HAS_MASK:
        kept = tl.load(mask_ptr + token) != 0
        y_end = tl.where(kept, y_end, y_begin)
    if SPLIT:
        part = (channel_block * num_strips + strip).to(tl.int64)
        moments_ptr += (part * num_tokens + token) * 5
        grad_features_ptr += (strip.to(tl.int64) * num_tokens + token) * C
        if (y_begin + strip * BLOCK_H >= y_end) | (x_begin >= x_end):  # most strips of small boxes
            for k in tl.static_range(5):
                tl.store(moments_ptr + k, 0.0)
            tl.store(grad_features_ptr + channel, tl.zeros((BLOCK_C,), dtype=tl.float32), mask=real)
            return
    feature = tl.load(features_ptr + token.to(tl.int64) * C + channel, mask=real, other=0.0)[None, :]
    grad_ptr += image.to(tl.int64) * C * height * width

    P: tl.constexpr = BLOCK_H * BLOCK_W
    pixel = tl.arange(0, P)
    weighted_grad = tl.zeros((P, BLOCK_C), dtype=tl.float32)
    sum_t = tl.zeros((P,), dtype=tl.float32)
    sum_v = tl.zeros((P,), dtype=tl.float32)
    sum_tt = tl.zeros((P,), dtype=tl.float32)
    sum_tv = tl.zeros((P,), dtype=tl.float32)
    sum_vv = tl.zeros((P,), dtype=tl.float32)
    for top in range(y_begin + strip * BLOCK_H, y_end, num_strips * BLOCK_H):
        row = top + pixel // BLOCK_W
        dy = _coordinate(row, height) - mu_y
        for left in range(x_begin, x_end, BLOCK_W):
            column = left + pixel % BLOCK_W
            # Load early: only the sums at the end need the gradient.
            inside = (row < y_end) & (column < x_end)
            offset = channel[None, :] * (height * width) + (row * width + column)[:, None]
            grad = tl.load(grad_ptr + offset, mask=inside[:, None] & real[None, :], other=0.0)
            dx = _coordinate(column, width) - mu_x
            weight, t, v = _weights(dx, dy, half_x, half_y, sigma_x, sigma_y, rho, scale, EXP2_SCALE)
            # The range covers the box. Mask the tail of the last block.
            weight = tl.where(inside, weight, 0.0)
            weighted_grad += weight[:, None] * grad
            A = weight * tl.sum(grad * feature, 1)
            sum_t += A * t
            sum_v += A * v
            sum_tt += A * t * t
            sum_tv += A * t * v
            sum_vv += A * v * v

    total_t, total_v = tl.sum(sum_t, 0), tl.sum(sum_v, 0)
    total_tt, total_tv, total_vv = tl.sum(sum_tt, 0), tl.sum(sum_tv, 0), tl.sum(sum_vv, 0)
    grad_feature = tl.sum(weighted_grad, 0)
    if SPLIT:
        tl.store(moments_ptr, total_t)
        tl.store(moments_ptr + 1, total_v)
        tl.store(moments_ptr + 2, total_tt)
        tl.store(moments_ptr + 3, total_tv)
        tl.store(moments_ptr + 4, total_vv)
        tl.store(grad_features_ptr + channel, grad_feature, mask=channel < C)
    else:
        kept = half_x == half_x
        if HAS_MASK:
            kept = tl.load(mask_ptr + token) != 0
        out = moments_ptr + token.to(tl.int64) * 5
        _store_gaussian_gradient(
            out, sigma_x, sigma_y, rho, scale, kept, total_t, total_v, total_tt, total_tv, total_vv
        )
        tl.store(grad_features_ptr + token.to(tl.int64) * C + channel, grad_feature, mask=channel < C)


@_jit
def finish_kernel(  # type: ignore[no-untyped-def]
    moments_ptr,
    partial_features_ptr,
    gaussians_ptr,
    mask_ptr,
    grad_gaussians_ptr,
    grad_features_ptr,
    C,
    num_tokens,
    num_strips,
    num_parts,
    HAS_MASK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid (B L,): add the parts of a token in their order and turn its moments into gradients."""
    token = tl.program_id(0).to(tl.int64)
    num_tokens = num_tokens.to(tl.int64)
    total_t, total_v, total_tt, total_tv, total_vv = 0.0, 0.0, 0.0, 0.0, 0.0
    for part in range(num_parts):
        base = moments_ptr + (part * num_tokens + token) * 5
        total_t += tl.load(base)
        total_v += tl.load(base + 1)
        total_tt += tl.load(base + 2)
        total_tv += tl.load(base + 3)
        total_vv += tl.load(base + 4)
    base = gaussians_ptr + token * 5
    sigma_x, sigma_y, rho = tl.load(base), tl.load(base + 1), tl.load(base + 2)
    kept = sigma_x == sigma_x
    if HAS_MASK:
        kept = tl.load(mask_ptr + token) != 0
    scale = 1.0 / tl.sqrt((1.0 - rho) * (1.0 + rho))
    _store_gaussian_gradient(
        grad_gaussians_ptr + token * 5,
        sigma_x, sigma_y, rho, scale, kept, total_t, total_v, total_tt, total_tv, total_vv,
    )  # fmt: skip
    for first in range(0, C, BLOCK_C):
        channel = first + tl.arange(0, BLOCK_C)
        total = tl.zeros((BLOCK_C,), dtype=tl.float32)
        for strip in range(num_strips):
            base = partial_features_ptr + (strip * num_tokens + token) * C
            total += tl.load(base + channel, mask=channel < C, other=0.0)
        tl.store(grad_features_ptr + token * C + channel, total, mask=channel < C)


def triton_forward(
    gaussians: torch.Tensor,
    features: torch.Tensor,
    attention_mask: torch.Tensor | None,
    height: int,
    width: int,
    support: float,
    make_lists: bool | None = None,
) -> torch.Tensor:
    """Render float32 Gaussians `(B, L, 5)` and features `(B, L, C)` into a map `(B, C, h, w)`, in one launch.

    `make_lists` forces the variant for many tokens (True) or for few (False).
    """
    B, L, C = features.shape
    gaussians, features, mask = _kernel_inputs(gaussians, features, attention_mask, height, width)
    maps = features.new_empty(B, C, height, width)
    if make_lists is None:
        make_lists = L >= LIST_MIN_TOKENS
    block_c = _channel_block(C)
    num_tiles = cdiv(height, TILE_HEIGHT) * cdiv(width, TILE_WIDTH)
    grid = (B * num_tiles, cdiv(C, block_c))
    # Triton compiles a kernel for every value of it. Without lists it is unused, so it is constant.
    scan = min(SCAN, max(128, next_power_of_2(L))) if make_lists else CHUNK
    lists = features.new_empty(math.prod(grid) * scan if make_lists else 1, dtype=torch.int32)
    with on_device(features):
        forward_kernel[grid](
            gaussians, features, mask, maps, lists, L, C, height, width, support,
            HAS_MASK=attention_mask is not None, MAKE_LISTS=make_lists, TILE_H=TILE_HEIGHT, TILE_W=TILE_WIDTH,
            CHUNK_L=CHUNK, SCAN_L=scan, BLOCK_C=block_c, EXP2_SCALE=_EXP2_SCALE, num_warps=4, **_OPTIONS,
        )  # fmt: skip
    return maps


def triton_backward(
    grad: torch.Tensor,
    gaussians: torch.Tensor,
    features: torch.Tensor,
    attention_mask: torch.Tensor | None,
    support: float,
    num_strips: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the Gaussians `(B, L, 5)` and of the features `(B, L, C)` from that of the map `(B, C, h, w)`.

    One launch, or two if boxes are split into strips. `num_strips` forces their number.
    """
    B, L, C = features.shape
    height, width = grad.shape[-2:]
    gaussians, features, mask = _kernel_inputs(gaussians, features, attention_mask, height, width)
    grad = grad.contiguous()
    if num_strips is None:
        num_strips = min(MAX_STRIPS, cdiv(height, ROWS_PER_STRIP))
        if num_strips > 1:  # few tokens on a large map need more strips to fill a GPU
            num_strips = max(num_strips, min(cdiv(height, 4 * BLOCK_HEIGHT), MIN_PROGRAMS // (B * L)))
    block_c = _channel_block(C)
    num_blocks = cdiv(C, block_c)
    num_parts = num_strips * num_blocks
    grad_gaussians, grad_features = torch.empty_like(gaussians), torch.empty_like(features)
    split = num_parts > 1
    moments = gaussians.new_empty(num_parts, B * L, 5) if split else grad_gaussians
    partial_features = features.new_empty(num_strips, B * L, C) if split else grad_features
    has_mask = attention_mask is not None
    with on_device(features):
        backward_kernel[(B * L, num_strips, num_blocks)](
            grad, gaussians, features, mask, moments, partial_features, L, C, height, width, B * L, support,
            HAS_MASK=has_mask, SPLIT=split, BLOCK_H=BLOCK_HEIGHT, BLOCK_W=BLOCK_WIDTH, BLOCK_C=block_c,
            EXP2_SCALE=_EXP2_SCALE, num_warps=2 if block_c <= 32 else 4, **_OPTIONS,
        )  # fmt: skip
        if split:
            finish_kernel[(B * L,)](
                moments, partial_features, gaussians, mask, grad_gaussians, grad_features, C, B * L, num_strips,
                num_parts, HAS_MASK=has_mask, BLOCK_C=block_c, num_warps=1, **_OPTIONS,
            )  # fmt: skip
    return grad_gaussians, grad_features


def _kernel_inputs(
    gaussians: torch.Tensor, features: torch.Tensor, attention_mask: torch.Tensor | None, height: int, width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Contiguous inputs, and the mask as bytes. Without a mask its pointer is never read, so any tensor will do."""
    C = features.shape[-1]
    if C * height * width >= 2**31:
        raise ValueError(f"a map of one image must have fewer than 2³¹ values, got {C} x {height} x {width}")
    mask = features if attention_mask is None else attention_mask.contiguous().view(torch.uint8)
    return gaussians.contiguous(), features.contiguous(), mask


def _channel_block(num_channels: int) -> int:
    """Channels of one program: a power of two, and at least 16, the smallest side of a matrix product."""
    return max(16, min(MAX_CHANNEL_BLOCK, next_power_of_2(num_channels)))
