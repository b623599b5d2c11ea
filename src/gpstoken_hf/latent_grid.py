# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""The grid of a latent: tokens in Morton order <-> square cells, as pure functions.

Shapes: B batch, l tokens of an image, F values of a token, k tokens of a cell, h x w cells.

A cell covers f x f pixels and holds k tokens, one after the other in its channels. An image of the side that a
tokenizer was trained at has s x s cells, so `l = k s^2` and `f = image_size / s`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .gaussians import clamp_gaussians, gaussians_to_logits, join_tokens, logits_to_gaussians, split_tokens
from .regions import morton_code
from .tiling import Tile, TileGrid, gaussians_from_frame, gaussians_to_frame, tiles_of_image

# Gaussians are clamped this far inside their ranges before the logit, as the encoder does when it refines them.
RANGE_EPS = 1e-6


@dataclass(frozen=True)
class LatentGrid:
    """How the tokens of an image lie on square cells.

    Args:
        side (`int`): s, cells along each axis of an image of `image_size x image_size` pixels.
        depth (`int`): k, tokens of a cell.
        scale (`int`): f, pixels of a cell along each axis; a power of two.
    """

    side: int
    depth: int
    scale: int


def latent_grid(num_tokens: int, image_size: int) -> LatentGrid:
    """The finest grid of square cells that holds the tokens of an image.

    f is a power of two, because pipelines of diffusers know no other, and s is at least 2.

    Args:
        num_tokens (`int`): l, tokens of an image of `image_size x image_size` pixels.
        image_size (`int`): side of the image in pixels.

    Raises:
        ValueError: if no grid holds the tokens: `num_tokens` must be `k s^2` with `s = image_size / 2^n >= 2`.

    Examples:
        ```python
        >>> from gpstoken_hf.latent_grid import latent_grid

        >>> latent_grid(128, 256)
        LatentGrid(side=8, depth=2, scale=32)

        ```
    """
    scale = 1
    while image_size % scale == 0 and image_size // scale >= 2:
        side = image_size // scale
        depth, rest = divmod(num_tokens, side * side)
        if depth and not rest:
            return LatentGrid(side, depth, scale)
        scale *= 2
    raise ValueError(
        "num_tokens must be k s^2 for a grid of s x s cells of k tokens, with s = image_size / 2^n and s >= 2, "
        f"got num_tokens={num_tokens} and image_size={image_size}"
    )


def cell_order(height: int, width: int) -> torch.Tensor:
    """The cells of a grid along the Z-curve, as tokens come in: `(h w,)` int64 of row by row indices."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return morton_code(columns.flatten(), rows.flatten()).argsort()


def tokens_to_logits(tokens: torch.Tensor) -> torch.Tensor:
    """Tokens `(..., F)` -> the same with Gaussians in logit space, in float32."""
    gaussians, texture = split_tokens(tokens.float())
    return join_tokens(gaussians_to_logits(clamp_gaussians(gaussians, RANGE_EPS)), texture)


def logits_to_tokens(logits: torch.Tensor) -> torch.Tensor:
    """The inverse of `tokens_to_logits`. Any finite logits become a legal token."""
    gaussians, texture = split_tokens(logits)
    # The sigmoid of a large logit rounds to the end of its range, which is not legal.
    return join_tokens(clamp_gaussians(logits_to_gaussians(gaussians), RANGE_EPS), texture)


def tokens_to_cells(tokens: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Tokens `(B, h w k, F)` in Morton order -> cells `(B, k F, h, w)` of logits; `size` is `(h, w)`."""
    height, width = size
    stacked = tokens_to_logits(tokens).unflatten(1, (height * width, -1)).flatten(2)  # (B, h w, k F)
    position = cell_order(height, width).argsort().to(tokens.device)
    return stacked[:, position].transpose(1, 2).unflatten(2, size)


def cells_to_tokens(cells: torch.Tensor, depth: int) -> torch.Tensor:
    """The inverse of `tokens_to_cells`: `(B, k F, h, w)` -> `(B, h w k, F)`; `depth` is k."""
    order = cell_order(cells.shape[2], cells.shape[3]).to(cells.device)
    stacked = cells.flatten(2).transpose(1, 2)[:, order]  # (B, h w, k F)
    return logits_to_tokens(stacked.unflatten(2, (depth, -1)).flatten(1, 2))


def window(values: torch.Tensor, box: Tile, scale: int = 1) -> torch.Tensor:
    """The view of `(..., H, W)` values in a box `(y0, x0, h, w)`, whose numbers are multiplied by `scale`."""
    y0, x0, h, w = (scale * number for number in box)
    return values[..., y0 : y0 + h, x0 : x0 + w]


def tiles_of_cells(size: tuple[int, int], grid: LatentGrid, map_scale: int) -> tuple[TileGrid, list[Tile]]:
    """Cut a grid of cells into near-equal tiles of at most `s x s` cells.

    Every tile is a whole number of pixels of the splatted map, except where the image ends.

    Args:
        size (`tuple[int, int]`): `(h, w)` in cells.
        grid (`LatentGrid`): s and f.
        map_scale (`int`): image pixels per map pixel, a power of two that divides `s f`.

    Returns:
        `tuple[TileGrid, list[Tile]]`: the tiles on the map, and `(y0, x0, h, w)` of each in cells, row by row.
    """
    unit = max(1, map_scale // grid.scale)  # cells that a map pixel covers
    tiles, boxes = tiles_of_image(size, grid.side, unit)
    return tiles.scaled(max(1, grid.scale // map_scale)), boxes


def merge_tiles(tokens: Sequence[torch.Tensor], boxes: Sequence[Tile], size: tuple[int, int]) -> torch.Tensor:
    """Tokens of tiles, each `(B, n, F)` in the frame of its tile -> `(B, L, F)` in the frame of the image.

    Args:
        tokens (sequence of `torch.Tensor`): one for each tile.
        boxes (sequence of `tuple[int, int, int, int]`): the tiles `(y0, x0, h, w)`, in any unit.
        size (`tuple[int, int]`): `(h, w)` of the image in this unit.
    """
    if len(boxes) == 1:
        return tokens[0]
    merged = []
    for part, box in zip(tokens, boxes):
        gaussians, texture = split_tokens(part)
        merged.append(join_tokens(gaussians_to_frame(gaussians, box, size), texture))
    return torch.cat(merged, dim=1)


def split_tiles(tokens: torch.Tensor, boxes: Sequence[Tile], size: tuple[int, int], depth: int) -> list[torch.Tensor]:
    """The inverse of `merge_tiles`, for tiles in cells of k tokens; `depth` is k."""
    if len(boxes) == 1:
        return [tokens]
    parts = []
    for part, box in zip(tokens.split([h * w * depth for _, _, h, w in boxes], dim=1), boxes):
        gaussians, texture = split_tokens(part)
        parts.append(join_tokens(gaussians_from_frame(gaussians, box, size), texture))
    return parts


def derived_fields(grid: LatentGrid, token_channels: int, block_channels: int) -> dict[str, Any]:
    """The fields of a config from which pipelines of diffusers compute the shape of latents.

    They take `f = 2^(entries - 1)`, with the entries of `block_out_channels` or `encoder_block_out_channels`.
    """
    blocks = [block_channels] * grid.scale.bit_length()
    return {
        "latent_channels": grid.depth * token_channels,
        "block_out_channels": blocks,
        "encoder_block_out_channels": blocks,
        "spatial_compression_ratio": grid.scale,
    }


def check_latents(z: torch.Tensor, channels: int) -> None:
    """Raise a ValueError unless `z` is finite latents `(B, channels, h, w)`."""
    if z.ndim != 4 or z.shape[1] != channels or 0 in z.shape:
        raise ValueError(f"z must be (B, {channels}, h, w) with at least one cell, got {tuple(z.shape)}")
    if not z.is_floating_point():
        raise ValueError(f"z must be floating point, got {z.dtype}")
    if not torch.compiler.is_compiling() and not torch.isfinite(z.detach()).all():
        raise ValueError("z must be finite, got NaN or infinite values")


def batches_of_tiles(boxes: Sequence[Tile], one_by_one: bool) -> list[list[Tile]]:
    """Tiles that can be encoded together, as they have the same size; or every tile on its own."""
    if one_by_one:
        return [[box] for box in boxes]
    by_size: dict[tuple[int, int], list[Tile]] = {}
    for box in boxes:
        by_size.setdefault(box[2:], []).append(box)
    return list(by_size.values())


def channel_statistics(batches: Iterable[torch.Tensor]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of every channel of batches of cells `(B, k F, h, w)`.

    Raises:
        ValueError: if there are fewer than two cells, or a channel does not vary.
    """
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for cells in batches:
        values = cells.cpu().double().transpose(0, 1).flatten(1)  # (k F, B h w)
        count += values.shape[1]
        total = total + values.sum(1)
        squares = squares + values.square().sum(1)
    if count < 2:
        raise ValueError(f"pixel_values must give at least two cells, got {count}")
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    if std.min() < 1e-6:
        raise ValueError(
            f"pixel_values must make every latent channel vary, got standard deviation {std.min().item():.3g} "
            f"in channel {int(std.argmin())}"
        )
    return mean.tolist(), std.tolist()


__all__ = ["LatentGrid", "latent_grid"]
