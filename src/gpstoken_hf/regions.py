# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Regions: how an image is halved into boxes, which boxes can occur, and in which order they are listed.

Shapes: N regions of a tree, S splittable ones, L tokens, H x W pixels of an image, w x h pixels of a region.

A region is a box `[x0, y0, x1, y1]` of inclusive pixel indices. It is halved along its longer side, and the first half
is the smaller one when the side is odd. A square may be halved either way. The partition (Alg. 1) and the calibration
(Alg. 2) choose which region to halve next. Everything they share is here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import torch

from .numba_support import compiled

# A box as four integers, or as four arrays of them. The functions on boxes below take either.
Box: TypeAlias = tuple[Any, Any, Any, Any]

# Above every Morton code: padding is sorted to the end.
_LAST = torch.iinfo(torch.int64).max


@compiled
def halve(x0, y0, x1, y1, along_x):
    """The two halves of a box along x or along y, each `(x0, y0, x1, y1)`. Works on integers and on arrays of them."""
    if along_x:
        middle = x0 + (x1 - x0 + 1) // 2
        return (x0, y0, middle - 1, y1), (middle, y0, x1, y1)
    middle = y0 + (y1 - y0 + 1) // 2
    return (x0, y0, x1, middle - 1), (x0, middle, x1, y1)


@compiled
def is_splittable(x0, y0, x1, y1, min_region_size):
    """Whether a box may be halved: at least one inclusive extent is above `min_region_size`."""
    return (x1 - x0 > min_region_size) | (y1 - y0 > min_region_size)


# The same functions for the Python code below: calling a compiled function from Python would compile it first.
_halve = getattr(halve, "py_func", halve)
_is_splittable = getattr(is_splittable, "py_func", is_splittable)


@lru_cache(maxsize=4096)
def max_regions(height: int, width: int, min_region_size: int) -> int:
    """The largest number of regions that an image can be split into.

    It does not depend on the pixels, because both ways of halving a square lead to the same four quadrants.

    Args:
        height (`int`): H, at least 1 pixel.
        width (`int`): W, at least 1 pixel.
        min_region_size (`int`): s_min in pixels, at least 1.

    Returns:
        `int`: the number of smallest regions.
    """
    box = (0, 0, width - 1, height - 1)
    if not _is_splittable(*box, min_region_size):
        return 1
    return sum(
        max_regions(y1 - y0 + 1, x1 - x0 + 1, min_region_size) for x0, y0, x1, y1 in _halve(*box, width >= height)
    )


@lru_cache(maxsize=64)
def region_centres(num_pixels: int, min_region_size: int = 8) -> np.ndarray:
    """Every centre that a region can have along one axis.

    Which intervals occur does not depend on the other axis: a region is halved along its longer side only, so that
    side's extent is above `min_region_size` whenever the region is splittable.

    Args:
        num_pixels (`int`): length of the axis in pixels.
        min_region_size (`int`, *optional*, defaults to 8): s_min in pixels.

    Returns:
        `np.ndarray`: sorted int64 centres in half pixels, `x0 + x1`.
    """
    centres = set()
    pending = [(0, num_pixels - 1)]
    while pending:
        first, last = pending.pop()
        centres.add(first + last)
        if _is_splittable(first, 0, last, 0, min_region_size):
            pending += [(x0, x1) for x0, _, x1, _ in _halve(first, 0, last, 0, True)]
    return np.array(sorted(centres), dtype=np.int64)


@dataclass(frozen=True)
class RegionTree:
    """Every region that repeated halving of an image can produce. Row 0 is the whole image.

    Args:
        boxes (`np.ndarray` of shape `(N, 4)`): int64 inclusive `[x0, y0, x1, y1]`.
        halves (`np.ndarray` of shape `(N, 4)`): int64 rows of the two halves along x, then of the two along y; -1
            where a region is not halved that way.
        num_splittable (`int`): S. The first S regions can be halved, the others cannot.
    """

    boxes: np.ndarray
    halves: np.ndarray
    num_splittable: int


@lru_cache(maxsize=8)
def region_tree(height: int, width: int, min_region_size: int) -> RegionTree:
    """The tree of halvings of an H x W image, built level by level. A quadrant reached in both ways is one region."""
    level = np.array([[0, 0, width - 1, height - 1]], dtype=np.int64)
    all_boxes, all_halves, num_regions = [], [], 0
    while len(level):
        all_boxes.append(level)
        num_regions += len(level)
        x0, y0, x1, y1 = level.T
        splittable = _is_splittable(x0, y0, x1, y1, min_region_size)
        children = np.stack(
            [np.stack(half, axis=1) for along_x in (True, False) for half in _halve(x0, y0, x1, y1, along_x)], axis=1
        )
        along_x, along_y = splittable & (x1 - x0 >= y1 - y0), splittable & (y1 - y0 >= x1 - x0)
        exists = np.stack([along_x, along_x, along_y, along_y], axis=1)
        halves = np.full((len(level), 4), -1, dtype=np.int64)
        level, position = np.unique(children[exists], axis=0, return_inverse=True)
        halves[exists] = num_regions + position.reshape(-1)
        all_halves.append(halves)
    boxes, halves = np.concatenate(all_boxes), np.concatenate(all_halves)
    # Splittable regions first.
    is_leaf = (halves < 0).all(axis=1)
    order = np.argsort(is_leaf, kind="stable")
    new_row = np.empty(num_regions + 1, dtype=np.int64)
    new_row[order] = np.arange(num_regions)
    new_row[-1] = -1
    return RegionTree(boxes[order], new_row[halves[order]], num_regions - int(is_leaf.sum()))


# ---- A priority queue for compiled loops ----------------------------------------------------------------------------


@compiled
def _is_before(a, b, score, age):
    return score[a] > score[b] or (score[a] == score[b] and age[a] < age[b])


@compiled
def heap_push(row, heap, size, score, age):
    """Add `row` to a binary heap that holds `size` rows. The highest score comes first, then the lowest age."""
    position = size
    while position > 0:
        parent = (position - 1) // 2
        if not _is_before(row, heap[parent], score, age):
            break
        heap[position] = heap[parent]
        position = parent
    heap[position] = row


@compiled
def heap_pop(heap, size, score, age):
    """Remove and return the first row of a binary heap that holds `size` rows."""
    first = heap[0]
    size -= 1
    row = heap[size]
    position = 0
    while 2 * position + 1 < size:
        child = 2 * position + 1
        if child + 1 < size and _is_before(heap[child + 1], heap[child], score, age):
            child += 1
        if not _is_before(heap[child], row, score, age):
            break
        heap[position] = heap[child]
        position = child
    heap[position] = row
    return first


# ---- Alg. 1 over a tree of scored regions --------------------------------------------------------------------------


@compiled
def choose_regions(entropies, weights, boxes, halves, counts, complexity_exponent, chosen_boxes):
    """Alg. 1 on every image of a batch, given the entropies of all splittable regions.

    Args:
        entropies: `(B, S)` float64 of the splittable regions of a tree.
        weights: `(B, S)` float64, the importance summed over them.
        boxes, halves: `(N, 4)` int64, those of the `RegionTree`.
        counts: `(B,)` int64, the number of regions wanted of each image.
        complexity_exponent: lambda.
        chosen_boxes: `(B, max(counts), 4)` int64, filled with the regions of each image in the order of the splits:
            the first half takes over the row of the region that was split, the second half gets the next free row.
    """
    num_regions, num_splittable = boxes.shape[0], entropies.shape[1]
    score = np.empty(num_splittable, dtype=np.float64)
    age = np.empty(num_regions, dtype=np.int64)
    heap = np.empty(num_regions, dtype=np.int64)
    place = np.empty(num_regions, dtype=np.int64)  # the row of `chosen_boxes` that holds a region
    for image in range(entropies.shape[0]):
        for i in range(num_splittable):
            w, h = boxes[i, 2] - boxes[i, 0] + 1, boxes[i, 3] - boxes[i, 1] + 1
            score[i] = entropies[image, i] ** complexity_exponent * h * w + weights[image, i]
        heap[0], place[0], age[0] = 0, 0, 0
        heap_size, next_age, found = min(num_splittable, 1), 1, 1
        for k in range(4):
            chosen_boxes[image, 0, k] = boxes[0, k]
        while found < counts[image]:
            row = heap_pop(heap, heap_size, score, age)
            heap_size -= 1
            first = 0 if halves[row, 0] >= 0 else 2
            if halves[row, 0] >= 0 and halves[row, 2] >= 0:  # a square
                # Its halves are splittable: they have a side as long as its own.
                along_x = min(score[halves[row, 0]], score[halves[row, 1]])
                along_y = min(score[halves[row, 2]], score[halves[row, 3]])
                first = 0 if along_x < along_y else 2
            for i in range(first, first + 2):
                half = halves[row, i]
                place[half] = place[row] if i == first else found
                for k in range(4):
                    chosen_boxes[image, place[half], k] = boxes[half, k]
                age[half] = next_age
                next_age += 1
                if half < num_splittable:
                    heap_push(half, heap, heap_size, score, age)
                    heap_size += 1
            found += 1


# ---- The order of regions -------------------------------------------------------------------------------------------


def morton_code(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Position of points along the Z-curve (Morton order): the bits of x and y interleaved, those of y above.

    Args:
        x, y (`torch.Tensor` of shape `(..., L)`): non-negative integers below 2^31.

    Returns:
        `torch.Tensor` of shape `(..., L)`: int64.
    """
    return _spread_bits(x) | (_spread_bits(y) << 1)


def morton_order(boxes: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """The permutation that lists regions along the Z-curve of their top-left corners, padding last.

    Args:
        boxes (`torch.Tensor` of shape `(..., L, 4)`): inclusive pixels.
        attention_mask (`torch.Tensor` of shape `(..., L)`, *optional*): 0 for padding.

    Returns:
        `torch.Tensor` of shape `(..., L)`: int64 indices. Equal corners keep their order.
    """
    code = morton_code(boxes[..., 0], boxes[..., 1])
    if attention_mask is not None:
        code = code.masked_fill(attention_mask == 0, _LAST)
    return code.argsort(dim=-1, stable=True)


def sort_regions(boxes: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """`boxes` `(..., L, 4)` in Morton order, padding last."""
    order = morton_order(boxes, attention_mask)
    return boxes.gather(-2, order.unsqueeze(-1).expand_as(boxes))


def _spread_bits(value: torch.Tensor) -> torch.Tensor:
    """Move the low 31 bits of every integer to the even bit positions."""
    value = value.to(torch.int64)
    for shift, mask in (
        (16, 0x0000FFFF0000FFFF),
        (8, 0x00FF00FF00FF00FF),
        (4, 0x0F0F0F0F0F0F0F0F),
        (2, 0x3333333333333333),
        (1, 0x5555555555555555),
    ):
        value = (value | (value << shift)) & mask
    return value
