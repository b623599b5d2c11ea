# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Partition of an image into regions of similar complexity, and the initial Gaussians (paper Sec. 3.2, Alg. 1, Eq. 4).

Letters: B batch, L tokens, H x W pixels of an image, h x w pixels of a region.

The complexity of a region is `m = entropy^lambda h w` (plus the importance summed over it), where the entropy is that
of the histogram of its gradient magnitudes after a resize to 64 x 64. Starting from the whole image, the region of
largest m is halved until there are L regions. `partition_images` gives exactly the regions of the plain algorithm
written with NumPy and OpenCV (tests/partition_reference.py), with one compiled loop in the place of their calls:
every rounding of the resize, of the histogram and of the sum is reproduced, so that no near-tie falls the other way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numba
import numpy as np
import torch

from .gaussians import boxes_to_gaussians
from .partition_torch import (
    BIN_WIDTH,
    NUM_BINS,
    RESIZED,
    USED_BINS,
    entropy_table,
    grey_images,
    importance_sums,
    region_entropies,
    region_tree,
)

# A little below 1 / BIN_WIDTH: the rounded quotient then never exceeds the true one, and one comparison with the
# exact upper edge of the bin settles the rest.
_INVERSE_BIN_WIDTH = NUM_BINS / 11 * (1 - 2.0**-50)
_ENTROPY_TABLE = entropy_table()


@dataclass
class PartitionOutput:
    """Regions of a batch of images, in Morton order of their top-left corners.

    Attributes:
        boxes: `(B, L, 4)` int64, inclusive pixel indices `[x0, y0, x1, y1]`. L is the largest number of tokens in
            the batch; the rows beyond an image's own number hold the box of the whole image.
        gaussians: `(B, L, 5)` float32 initial Gaussians of the boxes, normalised units (see docs/conventions.md).
        attention_mask: `(B, L)` int64, 1 for a region and 0 for padding.
    """

    boxes: torch.Tensor
    gaussians: torch.Tensor
    attention_mask: torch.Tensor


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`numba.njit` without the GIL, compiled at the first call and kept on disk where there is a place to keep it.

    Numba looks for that place when the function is defined and raises if there is none (an installation that cannot
    be written, no home directory); the function is then compiled once per process instead. Neither `fastmath` nor
    contraction to fused multiply-adds: the roundings are part of the result.
    """
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:
        return numba.njit(nogil=True)(function)


def partition_images(
    images: torch.Tensor,
    num_tokens: int | Sequence[int],
    complexity_exponent: float = 2.5,
    min_region_size: int = 8,
    sigma_scale: float = 2 / 3,
    importance: torch.Tensor | None = None,
    backend: str = "auto",
) -> PartitionOutput:
    """Split every image into `num_tokens` regions, small where it is complex, and place a Gaussian on each.

    A region is splittable while `x1 - x0 > min_region_size` or `y1 - y0 > min_region_size`. It is halved along its
    longer side (the first half is the smaller one), a square along the side that leaves the least complex half.

    On the CPU the images of a batch are shared out over `torch.get_num_threads()` threads (one in a DataLoader
    worker). On CUDA all regions that the image size allows are scored at once and the host, which makes the choices,
    is waited for once. Both see the same entropies, bit for bit. Sums of an importance map may differ in the last
    place, so that regions whose complexities differ by less can be taken in another order.

    Args:
        images: `(B, 3, H, W)` floating point RGB in [-1, 1]; any H and W.
        num_tokens: regions per image, one number for all or one for each.
        complexity_exponent: lambda of Eq. 4, at least 0.
        min_region_size: s_min, pixels, at least 1.
        sigma_scale: sigma in units of a region's extent, 2/3 in the authors' code, 1/3 in the paper.
        importance: optional `(B, H, W)` weights >= 0, added to the complexity of every region that holds them.
        backend: "numba" (the compiled loop), "torch" (batched tensor operations on the device of `images`, float64
            needed) or "auto": "torch" for CUDA tensors, else "numba".

    Returns:
        A `PartitionOutput` on the device of `images`.

    Raises:
        ValueError: shape, dtype or range of an argument, or more tokens than an image can be split into.
    """
    counts = _check_arguments(images, num_tokens, complexity_exponent, min_region_size, sigma_scale, importance)
    if backend not in ("auto", "numba", "torch"):
        raise ValueError(f'backend must be "auto", "numba" or "torch", got {backend!r}')
    if backend == "torch" or (backend == "auto" and images.is_cuda):
        partition = _partition_batched
    else:
        partition = _partition_compiled
    boxes = partition(images.detach(), counts, float(complexity_exponent), int(min_region_size), importance)
    height, width = images.shape[-2:]
    attention_mask = torch.arange(boxes.shape[1])[None] < torch.tensor(counts, dtype=torch.int64)[:, None]
    boxes = boxes.to(images.device)
    return PartitionOutput(
        boxes=boxes,
        gaussians=boxes_to_gaussians(boxes, image_size=(height, width), sigma_scale=sigma_scale),
        attention_mask=attention_mask.to(images.device, torch.int64),
    )


def _check_arguments(
    images: torch.Tensor,
    num_tokens: int | Sequence[int],
    complexity_exponent: float,
    min_region_size: int,
    sigma_scale: float,
    importance: torch.Tensor | None,
) -> list[int]:
    """Everything that can be refused without reading a pixel. Returns the number of tokens of every image."""
    if not isinstance(images, torch.Tensor) or images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
        got = tuple(images.shape) if isinstance(images, torch.Tensor) else type(images).__name__
        raise ValueError(f"images must be a tensor of shape (B, 3, H, W), got {got}")
    if not images.is_floating_point():
        raise ValueError(f"images must be floating point in [-1, 1] (uint8 as x / 127.5 - 1), got {images.dtype}")
    batch_size, _, height, width = images.shape
    if isinstance(num_tokens, int | np.integer):
        counts = [int(num_tokens)] * batch_size
    else:
        counts = [int(count) for count in num_tokens]
        if len(counts) != batch_size:
            raise ValueError(f"num_tokens must hold one number per image, expected {batch_size}, got {len(counts)}")
    if any(count < 1 for count in counts):
        raise ValueError(f"num_tokens must be at least 1, got {min(counts)}")
    if not (math.isfinite(complexity_exponent) and complexity_exponent >= 0):
        raise ValueError(f"complexity_exponent must be finite and at least 0, got {complexity_exponent}")
    if not (isinstance(min_region_size, int | np.integer) and min_region_size >= 1):
        raise ValueError(f"min_region_size must be an integer of at least 1 pixel, got {min_region_size}")
    if not 0 < sigma_scale <= 1:
        raise ValueError(f"sigma_scale must be in (0, 1], got {sigma_scale}")
    largest = max_regions(height, width, int(min_region_size))
    if max(counts, default=0) > largest:
        raise ValueError(
            f"an image of {height} x {width} pixels with min_region_size={min_region_size} can be split into at most "
            f"{largest} regions, got num_tokens={max(counts)}"
        )
    if importance is not None:
        expected = (batch_size, height, width)
        if not isinstance(importance, torch.Tensor) or tuple(importance.shape) != expected:
            got = tuple(importance.shape) if isinstance(importance, torch.Tensor) else type(importance).__name__
            raise ValueError(f"importance must be a tensor of shape (B, H, W) = {expected}, got {got}")
    return counts


def _check_range(name: str, values: torch.Tensor, low: float, high: float) -> None:
    """Raise ValueError unless all `values` are finite and in [low, high]."""
    if values.numel() == 0:
        return
    if not torch.isfinite(values).all():
        bad = int((~torch.isfinite(values)).sum())
        raise ValueError(f"{name} must be finite, got {bad} NaN or infinite values")
    smallest, largest = values.min().item(), values.max().item()
    if smallest < low or largest > high:
        expected = f"in [{low:g}, {high:g}]" if math.isfinite(high) else f"at least {low:g}"
        raise ValueError(f"{name} must be {expected}, got values from {smallest:.6g} to {largest:.6g}")


@lru_cache(maxsize=4096)
def max_regions(height: int, width: int, min_region_size: int) -> int:
    """The largest number of regions that an image of H x W pixels can be split into.

    It does not depend on the pixels: a square yields the same four quadrants in either direction.
    """
    long, short = max(height, width), min(height, width)
    if long - 1 <= min_region_size:
        return 1
    return max_regions(long // 2, short, min_region_size) + max_regions(long - long // 2, short, min_region_size)


def _partition_batched(
    images: torch.Tensor,
    counts: list[int],
    complexity_exponent: float,
    min_region_size: int,
    importance: torch.Tensor | None,
) -> torch.Tensor:
    """Boxes `(B, L, 4)` int64 on the CPU: all scores on the device of `images`, the choices on the CPU."""
    _, _, height, width = images.shape
    _check_range("images", images, -1.0, 1.0)
    tree = region_tree(height, width, min_region_size)
    scored = (tree.halves >= 0).any(axis=1)
    boxes = torch.from_numpy(tree.boxes[scored]).to(images.device)
    entropies = np.zeros((len(images), len(tree.boxes)))
    weights = np.zeros_like(entropies)
    entropies[:, scored] = region_entropies(grey_images(images), boxes).cpu().numpy()
    if importance is not None:
        importance = importance.detach().to(images.device, torch.float32)
        _check_range("importance", importance, 0.0, math.inf)
        weights[:, scored] = importance_sums(importance, boxes).cpu().numpy()
    regions = np.empty((len(counts), max(counts, default=0), 4), dtype=np.int64)
    regions[:] = tree.boxes[0]
    _choose_regions(
        entropies, weights, tree.boxes, tree.halves, np.array(counts, dtype=np.int64), complexity_exponent, regions
    )
    return torch.from_numpy(regions)


# ---------------------------------------------------------------------------------------------------------------------
# The compiled loop


def _partition_compiled(
    images: torch.Tensor,
    counts: list[int],
    complexity_exponent: float,
    min_region_size: int,
    importance: torch.Tensor | None,
) -> torch.Tensor:
    """Boxes `(B, L, 4)` int64 on the CPU, padded with the whole image's box."""
    _, _, height, width = images.shape
    pixels = images.to("cpu", torch.float32).contiguous().numpy()
    if importance is None:
        weights = None
        no_weights = np.zeros((0, 0), dtype=np.float32)
    else:
        importance = importance.detach().to("cpu", torch.float32).contiguous()
        _check_range("importance", importance, 0.0, math.inf)
        weights = importance.numpy()
    boxes = np.empty((len(counts), max(counts, default=0), 4), dtype=np.int64)
    boxes[:] = (0, 0, width - 1, height - 1)

    def work(index: int) -> bool:
        return _partition_image(
            pixels[index],
            boxes[index, : counts[index]],
            complexity_exponent,
            min_region_size,
            no_weights if weights is None else weights[index],
            _ENTROPY_TABLE,
        )

    num_threads = min(torch.get_num_threads(), len(counts))
    if num_threads > 1:
        # A pool for each call: one that outlives it would be dead in a forked process.
        with ThreadPoolExecutor(num_threads) as pool:
            valid = list(pool.map(work, range(len(counts))))
    else:
        valid = [work(index) for index in range(len(counts))]
    if not all(valid):
        _check_range("images", images, -1.0, 1.0)
    return torch.from_numpy(boxes)


@compiled
def _partition_image(pixels, regions, complexity_exponent, min_region_size, importance, entropy_table):
    """Alg. 1 on one image, `pixels` (3, H, W) float32; fills `regions` (L, 4) in Morton order.

    The caller has made sure that L regions can be reached. Returns False if a pixel is NaN or outside [-1, 1].
    """
    height, width = pixels.shape[1], pixels.shape[2]
    grey = np.empty((height, width), dtype=np.float32)
    if not _grey_image(pixels, grey):
        return False
    num_tokens = regions.shape[0]
    boxes = np.empty((num_tokens, 4), dtype=np.int64)
    # The heap holds the splittable regions. Age (order of insertion) settles ties, as a stable sort of the whole list
    # would. A region that is split leaves its row of `boxes` to its first child.
    score = np.empty(num_tokens, dtype=np.float64)
    age = np.empty(num_tokens, dtype=np.int64)
    heap = np.empty(num_tokens, dtype=np.int64)
    boxes[0] = (0, 0, width - 1, height - 1)
    score[0], age[0], heap[0] = 0.0, 0, 0
    heap_size, found, next_age = 1, 1, 1

    children = np.empty((4, 4), dtype=np.int64)
    child_score = np.empty(4, dtype=np.float64)
    while found < num_tokens:
        row = heap_pop(heap, heap_size, score, age)
        heap_size -= 1
        x0, y0, x1, y1 = boxes[row]
        w, h = x1 - x0 + 1, y1 - y0 + 1
        # Rows 0 and 1: the halves in x; rows 2 and 3: in y.
        children[0] = (x0, y0, x0 + w // 2 - 1, y1)
        children[1] = (x0 + w // 2, y0, x1, y1)
        children[2] = (x0, y0, x1, y0 + h // 2 - 1)
        children[3] = (x0, y0 + h // 2, x1, y1)
        for i in range(4):
            extent = max(children[i, 2] - children[i, 0], children[i, 3] - children[i, 1])
            wanted = w >= h if i < 2 else h >= w
            child_score[i] = 0.0
            if wanted and extent > min_region_size:
                child_score[i] = _complexity(grey, children[i], complexity_exponent, importance, entropy_table)
        if w == h:
            chosen = 0 if min(child_score[0], child_score[1]) < min(child_score[2], child_score[3]) else 2
        else:
            chosen = 0 if w > h else 2
        for i in range(chosen, chosen + 2):
            if i > chosen:
                row = found
                found += 1
            boxes[row] = children[i]
            score[row], age[row] = child_score[i], next_age
            next_age += 1
            if max(children[i, 2] - children[i, 0], children[i, 3] - children[i, 1]) > min_region_size:
                heap_push(row, heap, heap_size, score, age)
                heap_size += 1
    sort_by_morton_code(boxes, regions)
    return True


@compiled
def _choose_regions(entropies, weights, boxes, halves, counts, complexity_exponent, regions):
    """Alg. 1 on a batch whose regions are all scored: `entropies`, `weights` (B, N), `boxes`, `halves` (N, 4)."""
    num_regions = boxes.shape[0]
    score = np.empty(num_regions, dtype=np.float64)
    age = np.empty(num_regions, dtype=np.int64)
    heap = np.empty(num_regions, dtype=np.int64)
    for image in range(entropies.shape[0]):
        for i in range(num_regions):
            w, h = boxes[i, 2] - boxes[i, 0] + 1, boxes[i, 3] - boxes[i, 1] + 1
            score[i] = entropies[image, i] ** complexity_exponent * h * w + weights[image, i]
        heap[0], age[0] = 0, 0
        heap_size = 1 if halves[0].max() >= 0 else 0
        next_age = 1
        leaves = np.empty((counts[image], 4), dtype=np.int64)
        num_leaves = 1 - heap_size
        if num_leaves:
            leaves[0] = boxes[0]
        while num_leaves + heap_size < counts[image]:
            row = heap_pop(heap, heap_size, score, age)
            heap_size -= 1
            chosen = 0 if halves[row, 0] >= 0 else 2
            if halves[row].min() >= 0:
                in_x = min(score[halves[row, 0]], score[halves[row, 1]])
                in_y = min(score[halves[row, 2]], score[halves[row, 3]])
                chosen = 0 if in_x < in_y else 2
            for i in range(chosen, chosen + 2):
                half = halves[row, i]
                age[half] = next_age
                next_age += 1
                if halves[half].max() >= 0:
                    heap_push(half, heap, heap_size, score, age)
                    heap_size += 1
                else:
                    leaves[num_leaves] = boxes[half]
                    num_leaves += 1
        for i in range(heap_size):
            leaves[num_leaves + i] = boxes[heap[i]]
        sort_by_morton_code(leaves, regions[image, : counts[image]])


@compiled
def _grey_image(pixels, grey):
    """(3, H, W) in [-1, 1] -> `grey` (H, W) in [0, 1], float32 throughout. False if a pixel is out of range or NaN."""
    one, half = np.float32(1), np.float32(0.5)
    red, green, blue = np.float32(0.299), np.float32(0.587), np.float32(0.114)
    valid = True
    for y in range(grey.shape[0]):
        for x in range(grey.shape[1]):
            r, g, b = pixels[0, y, x], pixels[1, y, x], pixels[2, y, x]
            valid &= (abs(r) <= one) & (abs(g) <= one) & (abs(b) <= one)
            grey[y, x] = (red * r + green * g + blue * b + one) * half
    return valid


@compiled
def _complexity(grey, box, complexity_exponent, importance, entropy_table):
    """Eq. 4 of one region, plus the importance summed over it."""
    x0, y0, x1, y1 = box
    h, w = y1 - y0 + 1, x1 - x0 + 1
    resized = np.empty((RESIZED + 2, RESIZED + 2), dtype=np.float32)
    if h == 1 or w == 1:
        _resize_line(grey, x0, y0, w, h, resized)
    else:
        _resize(grey, x0, y0, w, h, resized)
    m = _gradient_entropy(resized, entropy_table) ** complexity_exponent * h * w
    if importance.size > 0:
        m += _box_sum(importance, x0, y0, x1, y1)
    return m


@compiled
def _source_positions(n, clamped, first, second, fraction):
    """Where each of 64 half-pixel centres lies between the samples of an axis of n pixels, as OpenCV rounds it."""
    scale = n / RESIZED
    for i in range(RESIZED):
        position = np.float32((i + 0.5) * scale - 0.5)
        below = math.floor(position)
        f = np.float32(position - np.float32(below))
        k = int(below)
        if clamped and (k < 0 or k >= n - 1):
            f = np.float32(0)
        first[i] = min(max(k, 0), n - 1)
        second[i] = min(max(k + 1, 0), n - 1)
        fraction[i] = f


@compiled
def _resize(grey, x0, y0, w, h, resized):
    """Bilinear resize of a region of at least 2 x 2 pixels to 64 x 64, with a border replicated around it.

    OpenCV 5 interpolates along x, then along y, each time as `a + (b - a) f` with one fused multiply-add in float32:
    the product of two float32 is exact in float64, so adding there and rounding once is the same.
    """
    first_x, second_x, fraction_x = np.empty(RESIZED, np.int64), np.empty(RESIZED, np.int64), np.empty(RESIZED)
    first_y, second_y, fraction_y = np.empty(RESIZED, np.int64), np.empty(RESIZED, np.int64), np.empty(RESIZED)
    _source_positions(w, True, first_x, second_x, fraction_x)
    _source_positions(h, True, first_y, second_y, fraction_y)
    rows = np.empty((2, RESIZED), dtype=np.float32)
    held_first, held_second = -1, -1
    upper, lower = 0, 1
    for j in range(RESIZED):
        if first_y[j] == held_second and held_second != held_first:
            upper, lower = lower, upper
            held_first, held_second = held_second, -1
        if first_y[j] != held_first:
            held_first = first_y[j]
            _interpolate_row(grey[y0 + held_first], x0, first_x, second_x, fraction_x, rows[upper])
        if second_y[j] != held_second:
            held_second = second_y[j]
            _interpolate_row(grey[y0 + held_second], x0, first_x, second_x, fraction_x, rows[lower])
        f = fraction_y[j]
        a, b, out = rows[upper], rows[lower], resized[j + 1]
        for i in range(RESIZED):
            out[i + 1] = np.float32(np.float64(b[i] - a[i]) * f + np.float64(a[i]))
    _replicate_border(resized)


@compiled
def _interpolate_row(row, x0, first, second, fraction, out):
    for i in range(RESIZED):
        a, b = row[x0 + first[i]], row[x0 + second[i]]
        out[i] = np.float32(np.float64(b - a) * fraction[i] + np.float64(a))


@compiled
def _resize_line(grey, x0, y0, w, h, resized):
    """The same for a region one pixel wide or high, where OpenCV takes another path.

    There it interpolates as `a (1 - f) + b f` in float32, and along y the fraction is not reset at the border.
    """
    first_x, second_x, fraction_x = np.empty(RESIZED, np.int64), np.empty(RESIZED, np.int64), np.empty(RESIZED)
    first_y, second_y, fraction_y = np.empty(RESIZED, np.int64), np.empty(RESIZED, np.int64), np.empty(RESIZED)
    _source_positions(w, True, first_x, second_x, fraction_x)
    _source_positions(h, False, first_y, second_y, fraction_y)
    one = np.float32(1)
    for j in range(RESIZED):
        upper, lower = grey[y0 + first_y[j]], grey[y0 + second_y[j]]
        fy = np.float32(fraction_y[j])
        for i in range(RESIZED):
            k, n = x0 + first_x[i], x0 + second_x[i]
            fx = np.float32(fraction_x[i])
            a = upper[k] * (one - fx) + upper[n] * fx
            b = lower[k] * (one - fx) + lower[n] * fx
            resized[j + 1, i + 1] = a * (one - fy) + b * fy
    _replicate_border(resized)


@compiled
def _replicate_border(resized):
    for j in range(1, RESIZED + 1):
        resized[j, 0] = resized[j, 1]
        resized[j, RESIZED + 1] = resized[j, RESIZED]
    for i in range(RESIZED + 2):
        resized[0, i] = resized[1, i]
        resized[RESIZED + 1, i] = resized[RESIZED, i]


@compiled
def _gradient_entropy(resized, entropy_table):
    """Entropy (bits) of the histogram of Sobel magnitudes of a 64 x 64 image with its border, (66, 66) float32."""
    # Four histograms in turn: equal bins in a row would otherwise wait for each other's increment.
    histogram = np.zeros((4, USED_BINS), dtype=np.int32)
    bins = np.empty(RESIZED, dtype=np.int32)
    for j in range(RESIZED):
        above, here, below = resized[j], resized[j + 1], resized[j + 2]
        for i in range(RESIZED):
            a0, a1, a2 = np.float64(above[i]), np.float64(above[i + 1]), np.float64(above[i + 2])
            b0, b2 = np.float64(here[i]), np.float64(here[i + 2])
            c0, c1, c2 = np.float64(below[i]), np.float64(below[i + 1]), np.float64(below[i + 2])
            gx = (a2 - a0) + 2 * (b2 - b0) + (c2 - c0)
            gy = (c0 - a0) + 2 * (c1 - a1) + (c2 - a2)
            magnitude = math.sqrt(gx * gx + gy * gy)
            k = np.int32(magnitude * _INVERSE_BIN_WIDTH)
            # Edges are multiples of 11/512, exact in binary, as in np.histogram.
            bins[i] = k + np.int32(magnitude >= (k + 1) * BIN_WIDTH)
        for i in range(0, RESIZED, 4):
            histogram[0, bins[i]] += 1
            histogram[1, bins[i + 1]] += 1
            histogram[2, bins[i + 2]] += 1
            histogram[3, bins[i + 3]] += 1
    # np.sum adds 128 numbers at a time in eight accumulators; the empty lower half of the histogram adds zero.
    total = 0.0
    for block in range(0, USED_BINS, 128):
        partial = np.zeros(8)
        for i in range(block, block + 128, 8):
            for lane in range(8):
                k = i + lane
                count = histogram[0, k] + histogram[1, k] + histogram[2, k] + histogram[3, k]
                partial[lane] += entropy_table[count]
        total += ((partial[0] + partial[1]) + (partial[2] + partial[3])) + (
            (partial[4] + partial[5]) + (partial[6] + partial[7])
        )
    return -total


@compiled
def _box_sum(values, x0, y0, x1, y1):
    """Sum of `values` (H, W) over an inclusive box, in float64."""
    total = 0.0
    for y in range(y0, y1 + 1):
        for x in range(x0, x1 + 1):
            total += values[y, x]
    return total


@compiled
def _before(a, b, score, age):
    return score[a] > score[b] or (score[a] == score[b] and age[a] < age[b])


@compiled
def heap_push(row, heap, size, score, age):
    """Add a row to the `size` rows of a binary heap: highest score first, the oldest of equal ones."""
    position = size
    while position > 0:
        parent = (position - 1) // 2
        if not _before(row, heap[parent], score, age):
            break
        heap[position] = heap[parent]
        position = parent
    heap[position] = row


@compiled
def heap_pop(heap, size, score, age):
    """Take the first of the `size` rows of a binary heap."""
    first = heap[0]
    size -= 1
    row = heap[size]
    position = 0
    while 2 * position + 1 < size:
        child = 2 * position + 1
        if child + 1 < size and _before(heap[child + 1], heap[child], score, age):
            child += 1
        if not _before(heap[child], row, score, age):
            break
        heap[position] = heap[child]
        position = child
    heap[position] = row
    return first


@compiled
def sort_by_morton_code(boxes, regions):
    """`boxes` (L, 4) -> `regions` (L, 4) along the Z-curve of the top-left corners, the bits of y above those of x."""
    code = np.empty(boxes.shape[0], dtype=np.int64)
    for i in range(boxes.shape[0]):
        code[i] = _spread_bits(boxes[i, 0]) | (_spread_bits(boxes[i, 1]) << 1)
    order = np.argsort(code)
    for i in range(boxes.shape[0]):
        regions[i] = boxes[order[i]]


@compiled
def _spread_bits(value):
    """The low 31 bits of an integer on the even bit positions."""
    value = (value | (value << 16)) & 0x0000FFFF0000FFFF
    value = (value | (value << 8)) & 0x00FF00FF00FF00FF
    value = (value | (value << 4)) & 0x0F0F0F0F0F0F0F0F
    value = (value | (value << 2)) & 0x3333333333333333
    return (value | (value << 1)) & 0x5555555555555555
