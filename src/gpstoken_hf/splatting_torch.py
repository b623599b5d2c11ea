# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Splatting with PyTorch operations alone, on any device, in float32 or float64 (paper Eq. 1-3).

The map is cut into tiles of 8 x 8 pixels. Each tile gets the tokens whose boxes touch it, and tiles with about as many
tokens are rendered together as one batched matrix product.

`t`, `v` and the moments are those of `splatting`.

Shapes: B batch, L tokens, C channels, h x w pixels of the map, T tiles of a bucket, K tokens of a tile, P (token,
tile) pairs, S = 8 side of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from .gaussians import NUM_GAUSSIAN_PARAMS, pixel_coordinates

TILE_SIZE = 8

# Replaces t outside the box: its square is finite in float32, and exp(-t² / 2) is 0.
FAR = 1e18
# exp(-q / 2) = exp2(EXP2_SCALE q). Most weights underflow here, where PyTorch's exp takes 10 to 30 times as long as
# elsewhere. Its exp2 does not.
EXP2_SCALE = -0.5 / math.log(2)
# (token, tile) pairs rendered at once: 4096 pairs of 64 float32 weights are 1 MiB, which stays in a core's cache.
_PAIRS_PER_CHUNK = 4096


def tiled_forward(
    gaussians: torch.Tensor,
    features: torch.Tensor,
    attention_mask: torch.Tensor | None,
    height: int,
    width: int,
    support: float,
) -> torch.Tensor:
    """Render Gaussians `(B, L, 5)` and features `(B, L, C)` into a map `(B, C, h, w)`."""
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


def tiled_backward(
    grad: torch.Tensor,
    gaussians: torch.Tensor,
    features: torch.Tensor,
    attention_mask: torch.Tensor | None,
    support: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the Gaussians `(B, L, 5)` and of the features `(B, L, C)` from that of the map `(B, C, h, w)`."""
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
    return gaussian_gradients(gaussians, sums[..., C:], attention_mask), sums[..., :C].contiguous()


def gaussian_gradients(
    gaussians: torch.Tensor, moments: torch.Tensor, attention_mask: torch.Tensor | None
) -> torch.Tensor:
    """Gradient of the Gaussians `(B, L, 5)` from the moments of A `(B, L, 5)`; 0 for padded tokens.

    With the exponent `-(t² + v²) / 2`, `t = s (u - rho v)`, `s = 1 / sqrt(1 - rho²)`:
    d/du = -s t, d/dv = s rho t - v, d/drho = s t v - rho s² t²; and u = s⁻¹ t + rho v.
    """
    sigma_x, sigma_y, rho, _, _ = gaussians.unbind(-1)
    sum_t, sum_v, sum_tt, sum_tv, sum_vv = moments.unbind(-1)
    scale = ((1 - rho) * (1 + rho)).rsqrt()
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


def _tile_grid(height: int, width: int) -> tuple[int, int]:
    """Rows and columns of tiles that cover the map."""
    return -(-height // TILE_SIZE), -(-width // TILE_SIZE)


def _tile_buckets(
    gaussians: torch.Tensor, attention_mask: torch.Tensor | None, height: int, width: int, support: float
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Find the tokens of every tile, and yield tiles with about as many tokens together.

    Yields:
        `tiles` `(T,)`, flat indices `(b rows + row) columns + column`, and `tokens` `(T, K)`, flat indices `b L + l`
        in ascending order. Empty slots hold B L, which stands for no token.
    """
    B, L, _ = gaussians.shape
    rows, columns = _tile_grid(height, width)
    device = gaussians.device
    sigma_x, sigma_y, _, mu_x, mu_y = gaussians.reshape(B * L, NUM_GAUSSIAN_PARAMS).unbind(-1)

    # The tiles that a token's box may touch. _tile_weights decides which of their pixels are inside the box.
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
    pair_token = torch.cat([pair_token[order], pair_token.new_tensor([B * L])])  # the last entry is for empty slots

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
    """First tile and number of tiles along one axis that `[mu - extent, mu + extent]` touches; both `(B L,)` int64.

    Never too few: in float32, `slack` is twice the sum of all roundings, here and in the comparison in _tile_weights.
    """
    slack = 1e-6 * (mu.abs() + extent + 1)
    # Clamped so that nothing overflows. NaN, which only padded tokens may hold, becomes 0.
    low = torch.nan_to_num((mu - extent - slack).clamp(-2, 2))
    high = torch.nan_to_num((mu + extent + slack).clamp(-2, 2))
    to_pixels = (num_pixels - 1) / 2
    first = ((low + 1) * to_pixels).ceil().clamp(0, num_pixels).long()
    last = ((high + 1) * to_pixels).floor().clamp(-1, num_pixels - 1).long()
    first_tile = torch.div(first, TILE_SIZE, rounding_mode="floor")
    last_tile = torch.div(last, TILE_SIZE, rounding_mode="floor")
    return first_tile, torch.where(first <= last, last_tile - first_tile + 1, 0)


def _bucket_bounds(descending_counts: list[int]) -> Iterator[tuple[int, int, int]]:
    """Cut tiles, ordered by descending number of tokens, into `(begin, end, capacity)`.

    A tile shares a bucket with a fuller one if it fills at least three quarters of the slots.
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
    """Values per token from which _tile_weights computes the weights, `(B L + 1, 8)`.

    Columns: mu_x, mu_y, half the box in x and in y, s = 1 / sqrt(1 - rho²), rho s, sigma_x, sigma_y. The last row is
    the token of empty slots, whose box contains nothing.
    """
    sigma_x, sigma_y, rho, mu_x, mu_y = gaussians.reshape(-1, NUM_GAUSSIAN_PARAMS).unbind(-1)
    scale = ((1 - rho) * (1 + rho)).rsqrt()
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
    # The 1-D terms carry the box: outside it t is far away in x, and the exponent is -inf in y.
    t_x = torch.where(dx.abs() <= half_x, dx / sigma_x * scale, FAR)
    inside_y = dy.abs() <= half_y
    v = torch.where(inside_y, dy / sigma_y, 0)
    exponent_y = torch.where(inside_y, v.square() * EXP2_SCALE, -math.inf)
    t = t_x.unsqueeze(2) - (v * rho_scale).unsqueeze(3)
    weights = torch.addcmul(exponent_y.unsqueeze(3), t, t, value=EXP2_SCALE).exp2_()
    return weights, t, v


def _tile_coordinates(num_pixels: int, like: torch.Tensor) -> torch.Tensor:
    """Pixel coordinates of one axis by tile, `(tiles, S)`; infinite, so outside of every box, past the map's end."""
    num_tiles = -(-num_pixels // TILE_SIZE)
    coordinates = like.new_full((num_tiles * TILE_SIZE,), math.inf)
    coordinates[:num_pixels] = pixel_coordinates(num_pixels, like.device, like.dtype)
    return coordinates.view(num_tiles, TILE_SIZE)
