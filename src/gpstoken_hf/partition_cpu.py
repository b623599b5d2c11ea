# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""The partition on the CPU: one compiled loop in the place of NumPy's and OpenCV's calls (paper Alg. 1, Eq. 4).

Letters: B batch, L tokens, H x W pixels of an image, h x w pixels of a region.

Every rounding of the resize, of the histogram and of the sum is reproduced (docs/partition.md). The heap, the order of
the regions and `compiled` serve calibration.py as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import torch

from .partition_torch import BIN_WIDTH, PIXEL_TOLERANCE, RESIZED, USED_BINS, check_range, entropy_table

PADDED = RESIZED + 2
# No bin that a magnitude can have: with grey in [0, 1] it is at most sqrt(20), bin 208.
UNDECIDED = USED_BINS - 1
_ENTROPY_TABLE = entropy_table()


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


def partition_compiled(
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
        weights = importance.detach().to("cpu", torch.float32).contiguous().numpy()
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
        check_range("images", images, -1.0, 1.0, PIXEL_TOLERANCE)
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
    # Resize positions by extent, filled when an extent is first met.
    positions = np.empty((max(height, width) + 1, 2, RESIZED), dtype=np.uint32)
    fractions = np.empty((max(height, width) + 1, RESIZED), dtype=np.float32)
    fractions[:, 0] = -1
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
                child_score[i] = _complexity(
                    grey, children[i], complexity_exponent, importance, entropy_table, positions, fractions
                )
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
def choose_regions(entropies, weights, boxes, halves, counts, complexity_exponent, regions):
    """Alg. 1 on a batch: `entropies`, `weights` (B, S) of the splittable regions of the tree.

    `boxes` and `halves` (N, 4) are those of all its regions.
    """
    num_regions, num_splittable = boxes.shape[0], entropies.shape[1]
    score = np.empty(num_splittable, dtype=np.float64)
    age = np.empty(num_regions, dtype=np.int64)
    heap = np.empty(num_regions, dtype=np.int64)
    for image in range(entropies.shape[0]):
        for i in range(num_splittable):
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
    one, half, limit = np.float32(1), np.float32(0.5), np.float32(1 + PIXEL_TOLERANCE)
    red, green, blue = np.float32(0.299), np.float32(0.587), np.float32(0.114)
    valid = True
    for y in range(grey.shape[0]):
        for x in range(grey.shape[1]):
            r, g, b = pixels[0, y, x], pixels[1, y, x], pixels[2, y, x]
            valid &= (abs(r) <= limit) & (abs(g) <= limit) & (abs(b) <= limit)
            grey[y, x] = (red * r + green * g + blue * b + one) * half
    return valid


@compiled
def _complexity(grey, box, complexity_exponent, importance, entropy_table, positions, fractions):
    """Eq. 4 of one region, plus the importance summed over it."""
    x0, y0, x1, y1 = box
    h, w = y1 - y0 + 1, x1 - x0 + 1
    resized = np.empty((PADDED, PADDED), dtype=np.float32)
    if h == 1 or w == 1:
        _resize_line(grey, x0, y0, w, h, resized)
    else:
        _source_positions(w, positions[w], fractions[w])
        _source_positions(h, positions[h], fractions[h])
        _resize(grey, x0, y0, w, h, positions[w], fractions[w], positions[h], fractions[h], resized)
    _replicate_border(resized)
    m = _gradient_entropy(resized, entropy_table) ** complexity_exponent * h * w
    if importance.size > 0:
        m += _box_sum(importance, x0, y0, x1, y1)
    return m


@compiled
def _source_positions(n, positions, fractions):
    """Where each of 64 half-pixel centres lies between the samples of an axis of n pixels, as OpenCV rounds it.

    Fills `positions` (2, 64), first and second sample, and `fractions` (64,), unless it has been done: a negative
    fraction marks what is still to do.
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
def _resize(grey, x0, y0, w, h, positions_x, fractions_x, positions_y, fractions_y, resized):
    """Bilinear resize of a region of at least 2 x 2 pixels to 64 x 64, into the middle of `resized` (66, 66).

    OpenCV 5 interpolates along x, then along y, each time as `a + (b - a) f` with one fused multiply-add in float32:
    the product of two float32 is exact in float64, so adding there and rounding once is the same.
    """
    rows = np.empty((2, RESIZED), dtype=np.float32)
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
    """The same for a region one pixel wide or high, where OpenCV takes another path.

    There it interpolates as `a (1 - f) + b f` in float32, and along y the fraction is not reset at the border.
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
def _gradient_entropy(resized, entropy_table):
    """Entropy (bits) of the histogram of Sobel magnitudes of a 64 x 64 image with its border, (66, 66) float32."""
    bins = np.empty(RESIZED * PADDED, dtype=np.uint8)
    _magnitude_bins(resized.reshape(-1), bins)
    # Four histograms in turn: equal bins in a row would otherwise wait for each other's increment.
    histogram = np.zeros((4, USED_BINS), dtype=np.int32)
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
    # np.sum adds 128 numbers at a time in eight accumulators; empty bins (the lower half, those after the last
    # magnitude) add zero.
    total = 0.0
    seen = 0
    for block in range(0, USED_BINS, 128):
        partial = np.zeros(8)
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
    """Bins of the Sobel magnitudes in float32, or UNDECIDED where float32 cannot tell on which side of an edge it is.

    `pixels` is the flat (66 * 66,) image and `bins` (64 * 66,) has its rows as long, with two idle entries at the end
    of each: one loop without row ends runs in full vectors.

    For pixels in [0, 1] the float32 gradients are off by at most 3 * 2^-23 each, the product by 3.5 * 2^-24 of its
    value: together less than 7e-5 bins.
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
    """Move the UNDECIDED magnitudes to the bins that NumPy would choose for the float64 magnitude."""
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
            # The quotient is rounded; the edges, multiples of 11/512, are exact.
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
