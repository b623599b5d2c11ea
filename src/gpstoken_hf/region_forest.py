# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""The regions of a batch as trees of halvings: what a token file stores of a layout (docs/token_file.md).

Shapes: B images, L tokens, T tiles, H x W pixels of an image.

A partition halves regions. Which ones is a bit for every region that is met, and one more for a square that is halved.
An image that was encoded in tiles has one tree for each tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .gaussians import NUM_GAUSSIAN_PARAMS, boxes_to_gaussians, check_gaussians
from .layout import GaussianLayout
from .regions import Box, halve, sort_regions
from .tiling import Tile, gaussians_to_frame, tiles_of_image

# Values of `sigma_scale` that are tried for a layout of an unknown model: the authors' and the paper's.
SIGMA_SCALES = (2 / 3, 1 / 3)

_halve = getattr(halve, "py_func", halve)


@dataclass
class RegionForest:
    """The regions of a batch: one tree of halvings for each image, or for each tile of each image."""

    tiles: list[Tile]
    sigma_scale: float
    align_corners: bool
    layout: GaussianLayout
    splits: np.ndarray  # for every region met, the first halves first: 1 if it is halved
    directions: np.ndarray  # for every square that is halved: 1 along y


def tiles_of(image_size: tuple[int, int], tile_size: int | None, map_scale: int) -> list[Tile]:
    if tile_size is None:
        return [(0, 0, *image_size)]
    if tile_size < map_scale:
        raise ValueError(f"tile_size must be at least {map_scale}, got {tile_size}")
    return tiles_of_image(image_size, tile_size, map_scale)[1]


def _initial_gaussians(
    boxes: list[torch.Tensor], tiles: list[Tile], image_size: tuple[int, int], sigma_scale: float, align_corners: bool
) -> torch.Tensor:
    """Boxes in the frames of their tiles -> the Gaussians of the whole image, `(N, 5)`."""
    parts = []
    for part, tile in zip(boxes, tiles):
        gaussians = boxes_to_gaussians(part, (tile[2], tile[3]), sigma_scale, align_corners)
        parts.append(gaussians if len(tiles) == 1 else gaussians_to_frame(gaussians, tile, image_size))
    return torch.cat(parts)


def find_forest(
    layout: GaussianLayout,
    mask: torch.Tensor,
    image_size: tuple[int, int],
    tile_size: int | None,
    map_scale: int,
    config: Any,
) -> RegionForest | None:
    """The trees that a layout came from; `None` if it did not come from a partition."""
    layout = layout.to("cpu")
    if layout.boxes is None:
        return None
    tiles = tiles_of(image_size, tile_size, map_scale)
    if mask.shape[1] % len(tiles):
        return None
    per_tile = mask.shape[1] // len(tiles)
    splits: list[int] = []
    directions: list[int] = []
    image_boxes = []
    for image in range(len(mask)):
        parts = []
        for index, (y0, x0, h, w) in enumerate(tiles):
            rows = slice(index * per_tile, (index + 1) * per_tile)
            boxes = layout.boxes[image, rows][mask[image, rows] == 1] - torch.tensor([x0, y0, x0, y0])
            if not len(boxes) or not _describe_tree(boxes, (h, w), splits, directions):
                return None
            parts.append(boxes)
        image_boxes.append(parts)
    given = layout.gaussians[mask == 1]
    choices = [(scale, aligned) for aligned in (True, False) for scale in SIGMA_SCALES]
    if config is not None:
        choices.insert(0, (float(config.sigma_scale), config.align_corners))
    for sigma_scale, align_corners in choices:
        found = torch.cat(
            [_initial_gaussians(parts, tiles, image_size, sigma_scale, align_corners) for parts in image_boxes]
        )
        if torch.equal(found, given):
            return RegionForest(tiles, sigma_scale, align_corners, layout, np.array(splits), np.array(directions))
    return None


def _describe_tree(boxes: torch.Tensor, size: tuple[int, int], splits: list[int], directions: list[int]) -> bool:
    """Add the halvings that lead to `boxes` (n, 4); False if none do, or the boxes are in another order."""
    if not torch.equal(sort_regions(boxes), boxes):
        return False
    height, width = size
    pending = [((0, 0, width - 1, height - 1), boxes.numpy())]
    while pending:
        box, inside = pending.pop()
        x0, y0, x1, y1 = box
        is_leaf = len(inside) == 1
        if not len(inside) or (is_leaf and tuple(inside[0].tolist()) != box):
            return False
        if x0 == x1 and y0 == y1:
            if not is_leaf:
                return False
            continue
        splits.append(int(not is_leaf))
        if is_leaf:
            continue
        w, h = x1 - x0 + 1, y1 - y0 + 1
        for along_x in [True] * (w >= h) + [False] * (h >= w):
            axis = 0 if along_x else 1
            first, second = _halve(*box, along_x)
            middle = second[axis]
            in_first, in_second = inside[:, axis + 2] < middle, inside[:, axis] >= middle
            if (in_first | in_second).all():
                if w == h:
                    directions.append(int(not along_x))
                pending += [(second, inside[in_second]), (first, inside[in_first])]
                break
        else:
            return False
    return True


def _read_tree(count: int, size: tuple[int, int], splits: list[int], directions: list[int]) -> torch.Tensor:
    """The `count` regions of the next tree, in Morton order. Takes its halvings off the ends of the lists."""
    height, width = size
    pending: list[Box] = [(0, 0, width - 1, height - 1)]
    boxes: list[Box] = []
    while pending:
        x0, y0, x1, y1 = box = pending.pop()
        if len(boxes) + len(pending) >= count:
            raise ValueError(f"{count} regions, got more")
        w, h = x1 - x0 + 1, y1 - y0 + 1
        is_split = False
        if w > 1 or h > 1:
            if not splits:
                raise ValueError("halvings for every region, got fewer")
            is_split = splits.pop() == 1
        if not is_split:
            boxes.append(box)
            continue
        along_x = w > h
        if w == h:
            if not directions:
                raise ValueError("directions for every square, got fewer")
            along_x = directions.pop() == 0
        first, second = _halve(*box, along_x)
        pending += [second, first]
    if len(boxes) != count:
        raise ValueError(f"{count} regions, got {len(boxes)}")
    return sort_regions(torch.tensor(boxes, dtype=torch.int64))


def read_forest(
    splits: np.ndarray,
    directions: np.ndarray,
    mask: torch.Tensor,
    image_size: tuple[int, int],
    tiles: list[Tile],
    sigma_scale: float,
    align_corners: bool,
) -> GaussianLayout:
    pending_splits, pending_directions = splits[::-1].tolist(), directions[::-1].tolist()
    boxes = torch.zeros(*mask.shape, 4, dtype=torch.int64)
    gaussians = torch.zeros(*mask.shape, NUM_GAUSSIAN_PARAMS)
    rows = mask.shape[1] // len(tiles)
    for image in range(len(mask)):
        for index, tile in enumerate(tiles):
            place = slice(index * rows, (index + 1) * rows)
            is_real = mask[image, place] == 1
            local = _read_tree(int(is_real.sum()), (tile[2], tile[3]), pending_splits, pending_directions)
            boxes[image, place][is_real] = local + torch.tensor([tile[1], tile[0], tile[1], tile[0]])
            # One tile is the whole image, whose frame is the tile's.
            found = boxes_to_gaussians(local, (tile[2], tile[3]), sigma_scale, align_corners)
            gaussians[image, place][is_real] = (
                found if len(tiles) == 1 else gaussians_to_frame(found, tile, image_size)
            )
    if pending_splits or pending_directions:
        raise ValueError("halvings of its regions, got more")
    check_gaussians(gaussians[mask == 1], "initial Gaussians that")
    return GaussianLayout(gaussians, boxes, None if bool(mask.all()) else mask)


__all__ = ["SIGMA_SCALES", "RegionForest", "find_forest", "read_forest", "tiles_of"]
