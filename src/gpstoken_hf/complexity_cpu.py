# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""The partition on the CPU: complexity of regions (Eq. 4) and the choices of Alg. 1 as compiled loops.

Shapes: B batch, L tokens, H x W pixels of an image, w x h pixels of a region.

A region is scored when a split creates it. Every rounding of the resize, the histogram and the sum reproduces NumPy
and OpenCV (docs/partition.md).
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from .complexity_torch import BIN_WIDTH, RESIZED, USED_BINS, entropy_table, grey_images
from .numba_support import compiled
from .regions import halve, heap_pop, heap_push, is_splittable

PADDED = RESIZED + 2
# A bin that no magnitude falls into: with grey in [0, 1] the largest is sqrt(20), bin 208.
UNDECIDED = USED_BINS - 1
_ENTROPY_TABLE = entropy_table()


class Scratch(NamedTuple):
    """Working memory for one image. Allocating it here instead of inside the loops saves a second of compilation."""

    positions: np.ndarray  # (extents, 2, 64), where resized pixels lie, by extent
    fractions: np.ndarray  # (extents, 64), the same, negative until an extent is first met
    score: np.ndarray  # (L,), age and heap too: of the regions so far
    age: np.ndarray
    heap: np.ndarray
    children: np.ndarray  # (4, 4), boxes of the halves along x, then along y
    child_score: np.ndarray  # (4,)
    resized: np.ndarray  # (66, 66), a region resized to 64 x 64 and its border
    rows: np.ndarray  # (2, 64), two rows of a region, resized along x
    bins: np.ndarray  # (64 * 66,), bins of the magnitudes
    histogram: np.ndarray  # (4, 256)
    partial: np.ndarray  # (8,), accumulators of the entropy

    @classmethod
    def for_image(cls, height: int, width: int, num_tokens: int) -> Scratch:
        """Uninitialised, but for the marks of extents that were not met yet."""
        extents = max(height, width) + 1
        return cls(
            positions=np.empty((extents, 2, RESIZED), np.uint32),
            fractions=np.full((extents, RESIZED), -1, np.float32),
            score=np.empty(num_tokens, np.float64),
            age=np.empty(num_tokens, np.int64),
            heap=np.empty(num_tokens, np.int64),
            children=np.empty((4, 4), np.int64),
            child_score=np.empty(4, np.float64),
            resized=np.empty((PADDED, PADDED), np.float32),
            rows=np.empty((2, RESIZED), np.float32),
            bins=np.empty(RESIZED * PADDED, np.uint8),
            histogram=np.empty((4, USED_BINS), np.int32),
            partial=np.empty(8, np.float64),
        )


def partition_compiled(
    images: torch.Tensor,
    counts: list[int],
    complexity_exponent: float,
    min_region_size: int,
    importance: torch.Tensor | None,
) -> torch.Tensor:
    """Alg. 1 on every image of a batch, on `torch.get_num_threads()` threads.

    Args:
        images (`torch.Tensor` of shape `(B, 3, H, W)`): RGB in [-1, 1]. Pixels out of range do no harm, but the result
            then has no meaning.
        counts (`list[int]`): B numbers of regions, no more than the image size allows.
        complexity_exponent (`float`): lambda.
        min_region_size (`int`): s_min in pixels.
        importance (`torch.Tensor` of shape `(B, H, W)`, *optional*): weights; their sum over a region is added to its
            complexity.

    Returns:
        `torch.Tensor` of shape `(B, max(counts), 4)`: int64 boxes on the CPU in the order of the splits (see
        `regions.choose_regions`); rows beyond the count of an image are 0.
    """
    grey = grey_images(images.cpu())
    # Pixels out of range would index beyond the histogram.
    pixels = grey.nan_to_num_(0.0).clamp_(-0.01, 1.01).numpy()
    weights = None if importance is None else importance.to("cpu", torch.float32).contiguous().numpy()
    no_weights = np.zeros((0, 0), dtype=np.float32)
    boxes = np.zeros((len(counts), max(counts, default=0), 4), dtype=np.int64)

    def work(index: int) -> None:
        _partition_image(
            pixels[index],
            boxes[index, : counts[index]],
            complexity_exponent,
            min_region_size,
            no_weights if weights is None else weights[index],
            _ENTROPY_TABLE,
            Scratch.for_image(pixels.shape[1], pixels.shape[2], counts[index]),
        )

    num_threads = min(torch.get_num_threads(), len(counts))
    if num_threads > 1:
        # The pool ends with the call: a process that forks later inherits no threads.
        with ThreadPoolExecutor(num_threads) as pool:
            list(pool.map(work, range(len(counts))))
    else:
        for index in range(len(counts)):
            work(index)
    return torch.from_numpy(boxes)


@compiled
def _partition_image(grey, boxes, complexity_exponent, min_region_size, importance, entropy_table, scratch):
    """Alg. 1 on one image, `grey` (H, W) float32 in [0, 1]. Fills `boxes` (L, 4); the image must allow L regions."""
    height, width = grey.shape
    num_tokens = boxes.shape[0]
    # The heap holds the splittable regions. Age (order of insertion) breaks ties, like a stable sort of all regions.
    # The first half of a split region takes over its row of `boxes`.
    score, age, heap = scratch.score, scratch.age, scratch.heap
    children, child_score = scratch.children, scratch.child_score
    boxes[0, 0], boxes[0, 1], boxes[0, 2], boxes[0, 3] = 0, 0, width - 1, height - 1
    score[0], age[0], heap[0] = 0.0, 0, 0
    # Not literals, for which heap_pop would be compiled a second time.
    heap_size, found, next_age = np.int64(1), np.int64(1), np.int64(1)
    while found < num_tokens:
        row = heap_pop(heap, heap_size, score, age)
        heap_size -= 1
        x0, y0, x1, y1 = boxes[row, 0], boxes[row, 1], boxes[row, 2], boxes[row, 3]
        # Rows 0 and 1 hold the halves along x, rows 2 and 3 those along y.
        for axis in range(2):
            first, second = halve(x0, y0, x1, y1, axis == 0)
            for k in range(4):
                children[2 * axis, k], children[2 * axis + 1, k] = first[k], second[k]
        w, h = x1 - x0 + 1, y1 - y0 + 1
        for i in range(4):
            is_candidate = w >= h if i < 2 else h >= w
            child_score[i] = 0.0
            if is_candidate and is_splittable(
                children[i, 0], children[i, 1], children[i, 2], children[i, 3], min_region_size
            ):
                child_score[i] = _complexity(
                    grey, children[i], complexity_exponent, importance, entropy_table, scratch
                )
        if w == h:
            chosen = 0 if min(child_score[0], child_score[1]) < min(child_score[2], child_score[3]) else 2
        else:
            chosen = 0 if w > h else 2
        for i in range(chosen, chosen + 2):
            if i > chosen:
                row = found
                found += 1
            for k in range(4):
                boxes[row, k] = children[i, k]
            score[row], age[row] = child_score[i], next_age
            next_age += 1
            if is_splittable(boxes[row, 0], boxes[row, 1], boxes[row, 2], boxes[row, 3], min_region_size):
                heap_push(row, heap, heap_size, score, age)
                heap_size += 1


@compiled
def _complexity(grey, box, complexity_exponent, importance, entropy_table, scratch):
    """Eq. 4 of one region, plus the importance summed over it."""
    x0, y0, x1, y1 = box[0], box[1], box[2], box[3]
    h, w = y1 - y0 + 1, x1 - x0 + 1
    positions, fractions, resized = scratch.positions, scratch.fractions, scratch.resized
    if h == 1 or w == 1:
        _resize_line(grey, x0, y0, w, h, resized)
    else:
        _source_positions(w, positions[w], fractions[w])
        _source_positions(h, positions[h], fractions[h])
        _resize(grey, x0, y0, w, h, positions[w], fractions[w], positions[h], fractions[h], scratch.rows, resized)
    _replicate_border(resized)
    m = (
        _gradient_entropy(resized, entropy_table, scratch.bins, scratch.histogram, scratch.partial)
        ** complexity_exponent
        * h
        * w
    )
    if importance.size > 0:
        m += _box_sum(importance, x0, y0, x1, y1)
    return m


@compiled
def _source_positions(n, positions, fractions):
    """Source positions of a resize from n to 64 pixels along an axis, as OpenCV rounds them.

    Fills `positions` (2, 64), the pixels on both sides of each half-pixel centre, and `fractions` (64,), where it lies
    between them. Does nothing if they are filled: a negative first fraction marks empty ones.
    """
    if fractions[0] >= 0:
        return
    scale = n / RESIZED
    for i in range(RESIZED):
        position = np.float32((i + 0.5) * scale - 0.5)
        first = math.floor(position)
        inside = 0 <= first < n - 1
        fractions[i] = position - np.float32(first) if inside else np.float32(0)
        positions[0, i] = min(max(first, 0), n - 1)
        positions[1, i] = min(max(first + 1, 0), n - 1)


@compiled
def _resize(grey, x0, y0, w, h, positions_x, fractions_x, positions_y, fractions_y, rows, resized):
    """Bilinear resize of a region of at least 2 x 2 pixels to 64 x 64, into the middle of `resized` (66, 66).

    OpenCV 5 interpolates along x, then along y, as `a + (b - a) f` with a fused multiply-add in float32. The product
    of two float32 numbers is exact in float64, so a sum in float64, rounded once, gives the same.
    """
    held_first, held_second = -1, -1
    upper, lower = 0, 1
    for j in range(RESIZED):
        first, second = int(positions_y[0, j]), int(positions_y[1, j])
        if first == held_second and held_second != held_first:
            upper, lower = lower, upper
            held_first, held_second = held_second, -1
        if first != held_first:
            held_first = first
            _interpolate_row(grey[y0 + first, x0 : x0 + w], positions_x, fractions_x, rows[upper])
        if second != held_second:
            held_second = second
            _interpolate_row(grey[y0 + second, x0 : x0 + w], positions_x, fractions_x, rows[lower])
        f = np.float64(fractions_y[j])
        a, b, out = rows[upper], rows[lower], resized[j + 1, 1 : RESIZED + 1]
        for i in range(RESIZED):
            out[i] = np.float32(np.float64(b[i] - a[i]) * f + np.float64(a[i]))


@compiled
def _interpolate_row(row, positions, fractions, out):
    for i in range(RESIZED):
        a, b = row[positions[0, i]], row[positions[1, i]]
        out[i] = np.float32(np.float64(b - a) * np.float64(fractions[i]) + np.float64(a))


@compiled
def _resize_line(grey, x0, y0, w, h, resized):
    """The same for a region one pixel wide or high, which OpenCV resizes differently.

    It interpolates as `a (1 - f) + b f` in float32, and along y it does not reset the fraction at the border.
    """
    one = np.float32(1)
    for j in range(RESIZED):
        position_y = np.float32((j + 0.5) * (h / RESIZED) - 0.5)
        first_y = math.floor(position_y)
        fy = position_y - np.float32(first_y)
        upper = grey[y0 + min(max(first_y, 0), h - 1)]
        lower = grey[y0 + min(max(first_y + 1, 0), h - 1)]
        for i in range(RESIZED):
            position_x = np.float32((i + 0.5) * (w / RESIZED) - 0.5)
            first_x = math.floor(position_x)
            fx = position_x - np.float32(first_x) if 0 <= first_x < w - 1 else np.float32(0)
            left = x0 + min(max(first_x, 0), w - 1)
            right = x0 + min(max(first_x + 1, 0), w - 1)
            a = upper[left] * (one - fx) + upper[right] * fx
            b = lower[left] * (one - fx) + lower[right] * fx
            resized[j + 1, i + 1] = a * (one - fy) + b * fy


@compiled
def _replicate_border(resized):
    for j in range(1, RESIZED + 1):
        resized[j, 0] = resized[j, 1]
        resized[j, RESIZED + 1] = resized[j, RESIZED]
    for i in range(PADDED):
        resized[0, i] = resized[1, i]
        resized[RESIZED + 1, i] = resized[RESIZED, i]


@compiled
def _gradient_entropy(resized, entropy_table, bins, histogram, partial):
    """Entropy in bits of the histogram of Sobel magnitudes of a 64 x 64 image with a border, (66, 66) float32."""
    _magnitude_bins(resized.reshape(-1), bins)
    # Four histograms in turn, because an increment would wait for a preceding one of the same bin.
    for k in range(USED_BINS):
        histogram[0, k] = histogram[1, k] = histogram[2, k] = histogram[3, k] = 0
    for j in range(RESIZED):
        row = bins[j * PADDED : j * PADDED + RESIZED]
        for i in range(0, RESIZED, 4):
            histogram[0, row[i]] += 1
            histogram[1, row[i + 1]] += 1
            histogram[2, row[i + 2]] += 1
            histogram[3, row[i + 3]] += 1
    undecided = histogram[0, UNDECIDED] + histogram[1, UNDECIDED] + histogram[2, UNDECIDED] + histogram[3, UNDECIDED]
    if undecided > 0:
        _decide_bins(resized, bins, histogram)
    # In the order of np.sum: 128 numbers at a time in eight accumulators. Empty bins add zero, so the loop may stop
    # after the last magnitude.
    total = 0.0
    seen = 0
    for block in range(0, USED_BINS, 128):
        for lane in range(8):
            partial[lane] = 0.0
        for i in range(block, block + 128, 8):
            if seen == RESIZED * RESIZED:
                break
            for lane in range(8):
                k = i + lane
                count = histogram[0, k] + histogram[1, k] + histogram[2, k] + histogram[3, k]
                seen += count
                partial[lane] += entropy_table[count]
        total += ((partial[0] + partial[1]) + (partial[2] + partial[3])) + (
            (partial[4] + partial[5]) + (partial[6] + partial[7])
        )
    return -total


@compiled
def _magnitude_bins(pixels, bins):
    """Bins of the Sobel magnitudes, computed in float32; UNDECIDED if one lies too close to the edge of a bin.

    `pixels` is the flat image (66 * 66,). The rows of `bins` (64 * 66,) are as long, with two unused entries at the
    end, so that one loop over all rows runs in full vectors.

    For pixels in [0, 1] the float32 gradients are off by at most 3 * 2^-23 each, the product by 3.5 * 2^-24 of its
    value, together by less than 7e-5 bins.
    """
    two, half, tolerance = np.float32(2), np.float32(0.5), np.float32(1e-4)
    scale = np.float32(1 / BIN_WIDTH)
    undecided = np.int32(UNDECIDED)
    for i in range((RESIZED - 1) * PADDED + RESIZED):
        a0, a1, a2 = pixels[i], pixels[i + 1], pixels[i + 2]
        b0, b2 = pixels[i + PADDED], pixels[i + PADDED + 2]
        c0, c1, c2 = pixels[i + 2 * PADDED], pixels[i + 2 * PADDED + 1], pixels[i + 2 * PADDED + 2]
        gx = (a2 - a0) + two * (b2 - b0) + (c2 - c0)
        gy = (c0 - a0) + two * (c1 - a1) + (c2 - a2)
        q = np.sqrt(gx * gx + gy * gy) * scale
        k = np.int32(q)
        from_middle = abs(q - np.float32(k) - half)
        bins[i] = undecided if (from_middle > half - tolerance) & (q > half) else k


@compiled
def _decide_bins(resized, bins, histogram):
    """Move the UNDECIDED magnitudes to the bins that NumPy chooses for their float64 values."""
    for j in range(RESIZED):
        row = bins[j * PADDED : j * PADDED + RESIZED]
        undecided = 0
        for i in range(RESIZED):
            undecided += row[i] == UNDECIDED
        if undecided == 0:
            continue
        above, here, below = resized[j], resized[j + 1], resized[j + 2]
        for i in range(RESIZED):
            if row[i] != UNDECIDED:
                continue
            a0, a1, a2 = np.float64(above[i]), np.float64(above[i + 1]), np.float64(above[i + 2])
            b0, b2 = np.float64(here[i]), np.float64(here[i + 2])
            c0, c1, c2 = np.float64(below[i]), np.float64(below[i + 1]), np.float64(below[i + 2])
            gx = (a2 - a0) + 2 * (b2 - b0) + (c2 - c0)
            gy = (c0 - a0) + 2 * (c1 - a1) + (c2 - a2)
            magnitude = math.sqrt(gx * gx + gy * gy)
            k = int(magnitude / BIN_WIDTH)
            # The quotient is rounded. The edges, multiples of 11/512, are exact.
            if magnitude < k * BIN_WIDTH:
                k -= 1
            elif magnitude >= (k + 1) * BIN_WIDTH:
                k += 1
            histogram[i % 4, UNDECIDED] -= 1
            histogram[i % 4, k] += 1


@compiled
def _box_sum(values, x0, y0, x1, y1):
    """Sum of `values` (H, W) over an inclusive box, in float64."""
    total = 0.0
    for y in range(y0, y1 + 1):
        for x in range(x0, x1 + 1):
            total += values[y, x]
    return total
