# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Tiles: cutting an image and its map into tiles, moving Gaussians between frames, sharing tokens out, blending.

Shapes: B batch, L tokens, C channels, H x W pixels of an image, h x w pixels of a map.

A tile is `(y0, x0, h, w)` in pixels. A frame is the coordinate system from -1 to 1 of an image or of one of its tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

Tile: TypeAlias = tuple[int, int, int, int]


# ---- The grid of tiles ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TileGrid:
    """Where a map is cut into tiles.

    Args:
        row_edges (`tuple[int, ...]`): ascending, from 0 to the height of the map, in its pixels.
        column_edges (`tuple[int, ...]`): ascending, from 0 to the width of the map.
    """

    row_edges: tuple[int, ...]
    column_edges: tuple[int, ...]

    @classmethod
    def of_near_equal_tiles(cls, size: tuple[int, int], tile_size: int) -> TileGrid:
        """The fewest tiles no larger than `tile_size` that cover `size = (h, w)`; their sides differ by at most 1."""

        def edges(extent: int) -> tuple[int, ...]:
            count = -(-extent // tile_size)
            return tuple(index * extent // count for index in range(count + 1))

        return cls(edges(size[0]), edges(size[1]))

    def scaled(self, factor: int) -> TileGrid:
        """The same tiles on a map `factor` times as large."""
        return TileGrid(tuple(factor * e for e in self.row_edges), tuple(factor * e for e in self.column_edges))

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of tiles."""
        return len(self.row_edges) - 1, len(self.column_edges) - 1

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the whole map."""
        return self.row_edges[-1], self.column_edges[-1]

    def boxes(self) -> list[Tile]:
        """`(y0, x0, h, w)` of every tile, row by row."""
        return [
            (y0, x0, y1 - y0, x1 - x0)
            for y0, y1 in zip(self.row_edges, self.row_edges[1:])
            for x0, x1 in zip(self.column_edges, self.column_edges[1:])
        ]


def map_size_of(image_size: tuple[int, int], map_scale: int) -> tuple[int, int]:
    """`(h, w)` of the map of an image: its size over `map_scale`, rounded up."""
    # `-(-n // map_scale)` would round down in ONNX, whose division of integers truncates.
    return (image_size[0] + map_scale - 1) // map_scale, (image_size[1] + map_scale - 1) // map_scale


def tiles_of_image(image_size: tuple[int, int], tile_size: int, map_scale: int) -> tuple[TileGrid, list[Tile]]:
    """Cut an image into near-equal tiles whose edges lie on whole map pixels.

    Args:
        image_size (`tuple[int, int]`): `(H, W)` in pixels.
        tile_size (`int`): largest side of a tile in image pixels, a multiple of `map_scale`.
        map_scale (`int`): image pixels per map pixel.

    Returns:
        `tuple[TileGrid, list[Tile]]`: the tiles on the map, and the same tiles in image pixels, row by row.
    """
    tiles = TileGrid.of_near_equal_tiles(map_size_of(image_size, map_scale), tile_size // map_scale)
    boxes = [
        (y0, x0, min(h, image_size[0] - y0), min(w, image_size[1] - x0))
        for y0, x0, h, w in tiles.scaled(map_scale).boxes()
    ]
    return tiles, boxes


def share_tokens(totals: Sequence[int], num_tiles: int) -> list[list[int]]:
    """Share the tokens of images out over their tiles, as equally as possible.

    Args:
        totals (`Sequence[int]`): B numbers of tokens, one per image.
        num_tiles (`int`): tiles of an image.

    Returns:
        `list[list[int]]`: for every tile, B numbers; those of one image differ by at most 1.

    Raises:
        ValueError: if an image has fewer tokens than tiles.
    """
    if min(totals) < num_tiles:
        raise ValueError(f"num_tokens must be at least 1 for each of the {num_tiles} tiles, got {min(totals)}")
    return [[total // num_tiles + (tile < total % num_tiles) for total in totals] for tile in range(num_tiles)]


# ---- Frames ---------------------------------------------------------------------------------------------------------


def gaussians_to_frame(gaussians: torch.Tensor, tile: Tile, image_size: tuple[int, int]) -> torch.Tensor:
    """Move Gaussians from a tile's frame to the frame of the whole image (the tile merge, paper Table 3).

    A tile of w pixels that begins at pixel x0 covers the share w / W of the axis: `sigma' = sigma w / W` and
    `mu' = -1 + (2 x0 + (mu + 1) w) / W`. For n equal tiles and column j these are the authors' `sigma / n` and
    `-1 + (2 j + mu + 1) / n`.

    Args:
        gaussians (`torch.Tensor` of shape `(..., 5)`): in the tile's frame.
        tile (`tuple[int, int, int, int]`): `(y0, x0, h, w)` in pixels of the image.
        image_size (`tuple[int, int]`): `(H, W)`.

    Returns:
        `torch.Tensor` of shape `(..., 5)`: in the image's frame.
    """
    y0, x0, h, w = tile
    height, width = image_size
    sigma_x, sigma_y, rho, mu_x, mu_y = gaussians.unbind(-1)
    return torch.stack(
        [
            sigma_x * (w / width),
            sigma_y * (h / height),
            rho,
            -1 + (2 * x0 + (mu_x + 1) * w) / width,
            -1 + (2 * y0 + (mu_y + 1) * h) / height,
        ],
        dim=-1,
    )


def gaussians_from_frame(gaussians: torch.Tensor, tile: Tile, image_size: tuple[int, int]) -> torch.Tensor:
    """The inverse of `gaussians_to_frame`: from the image's frame to a tile's."""
    y0, x0, h, w = tile
    height, width = image_size
    sigma_x, sigma_y, rho, mu_x, mu_y = gaussians.unbind(-1)
    return torch.stack(
        [
            sigma_x * (width / w),
            sigma_y * (height / h),
            rho,
            ((mu_x + 1) * width - 2 * x0) / w - 1,
            ((mu_y + 1) * height - 2 * y0) / h - 1,
        ],
        dim=-1,
    )


def gaussians_to_padded_frame(
    gaussians: torch.Tensor, image_size: tuple[int, int], map_scale: int, align_corners: bool = True
) -> torch.Tensor:
    """Move Gaussians to the frame of the same image, padded at the right and bottom to whole map pixels.

    Every pixel keeps its place: `sigma' = sigma r` and `mu' = (mu + 1) r - 1` with `r = (W - 1) / (W' - 1)`, or
    `W / W'` without `align_corners`. On an axis with a single map pixel nothing moves.

    Args:
        gaussians (`torch.Tensor` of shape `(..., 5)`): in the image's frame.
        image_size (`tuple[int, int]`): `(H, W)` before padding.
        map_scale (`int`): image pixels per map pixel.
        align_corners (`bool`, *optional*, defaults to `True`): see `gaussians`.

    Returns:
        `torch.Tensor` of shape `(..., 5)`.
    """
    ratios = []
    for extent, map_extent in zip(image_size, map_size_of(image_size, map_scale)):
        padded = map_extent * map_scale
        if not align_corners:
            ratios.append(extent / padded)
        else:
            ratios.append((extent - 1) / (padded - 1) if map_extent > 1 else 1.0)
    ratio_y, ratio_x = ratios
    # An export keeps the sizes open, so it must not ask.
    if not torch.compiler.is_exporting() and ratio_x == ratio_y == 1:
        return gaussians
    sigma_x, sigma_y, rho, mu_x, mu_y = gaussians.unbind(-1)
    return torch.stack(
        [sigma_x * ratio_x, sigma_y * ratio_y, rho, (mu_x + 1) * ratio_x - 1, (mu_y + 1) * ratio_y - 1], dim=-1
    )


def crop(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The upper left `size = (H, W)` pixels of an image `(B, C, H', W')`."""
    height, width = size
    if torch.compiler.is_exporting():
        # A view would fix whether it is contiguous, and so whether the padded size is that of the image.
        rows, columns = (torch.arange(extent, device=image.device) for extent in size)
        return image.index_select(2, rows).index_select(3, columns)
    return image[:, :, :height, :width]


# ---- Windows --------------------------------------------------------------------------------------------------------


def decode_in_windows(
    decoder: Callable[[torch.Tensor], torch.Tensor],
    maps: torch.Tensor,
    window: tuple[int, int],
    overlap: tuple[float, float],
    scale: int,
) -> torch.Tensor:
    """Decode a large map in overlapping windows and blend them. Only one window and the image are in memory at once.

    Args:
        decoder (`Callable`): map `(B, C, h, w)` -> image `(B, 3, h scale, w scale)`.
        maps (`torch.Tensor` of shape `(B, C, h, w)`): the whole map.
        window (`tuple[int, int]`): `(h, w)` of a window in map pixels.
        overlap (`tuple[float, float]`): share of a window that the next one covers too, along y and x, in [0, 1).
        scale (`int`): image pixels per map pixel.

    Returns:
        `torch.Tensor` of shape `(B, 3, h scale, w scale)`.
    """
    height, width = maps.shape[-2:]
    image = weights = None
    for y0, y1 in _windows(height, window[0], overlap[0]):
        for x0, x1 in _windows(width, window[1], overlap[1]):
            part = decoder(maps[:, :, y0:y1, x0:x1])
            ramp = _ramp((y1 - y0) * scale, part)[:, None] * _ramp((x1 - x0) * scale, part)
            if image is None or weights is None:
                image = part.new_zeros(*part.shape[:2], height * scale, width * scale)
                weights = ramp.new_zeros(height * scale, width * scale)
            place = (..., slice(y0 * scale, y1 * scale), slice(x0 * scale, x1 * scale))
            image[place] += part * ramp
            weights[place] += ramp
    assert image is not None
    assert weights is not None
    return image / weights


def _windows(extent: int, window: int, overlap: float) -> list[tuple[int, int]]:
    """Intervals of `window` pixels that cover an axis. The last one ends where the axis ends."""
    if extent <= window:
        return [(0, extent)]
    stride = max(1, round(window * (1 - overlap)))
    count = -(-(extent - window) // stride) + 1
    starts = [min(index * stride, extent - window) for index in range(count)]
    return [(start, start + window) for start in starts]


def _ramp(length: int, like: torch.Tensor) -> torch.Tensor:
    """Blending weights along one axis: highest in the middle, above 0 at the ends."""
    position = torch.arange(length, device=like.device, dtype=torch.float32)
    return (torch.minimum(position + 1, length - position) / length).to(like.dtype)
