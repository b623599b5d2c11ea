# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""The partition on a GPU: Triton kernels for the complexity of regions (Eq. 4) and the choices of Alg. 1.

Shapes: B batch, L regions of an image, S splittable regions of the tree, N all of them, H x W pixels of an image.

`entropy_kernel`: a fixed number of programs share the pairs of an image and a splittable region. A program resizes a
region to 64 x 64 in scratch memory, small enough for the cache, and computes the histogram of its Sobel magnitudes and
their entropy. It rounds as `complexity_torch.region_entropies` and the loops of `complexity_cpu` do: products and sums
are not fused, and every sum has the same order.

`choose_kernel`: one program per image holds the regions so far and halves the one with the largest score until there
are enough.

Both kernels are deterministic, use no floating-point atomics and never synchronise. They are memory-safe for any
pixels and scores, because images may be unchecked. Triton compiles them at the first call. With TRITON_INTERPRET=1
they run on CPU tensors, for tests.
"""

from __future__ import annotations

import torch

from .complexity_torch import BIN_WIDTH, MAGNITUDE_LIMIT, RESIZED, USED_BINS, RegionTensors
from .triton_support import jit, next_power_of_2, on_device, tl

_jit = jit("height", "width", "num_pairs", "num_splittable", "max_count")

# Programs of the entropy kernel: eight per multiprocessor of a large GPU. Each has 17 KiB of scratch memory.
MAX_PROGRAMS = 1024
# Rows of the 64 x 64 pixels that a program works on at a time: four pixels per thread, which take 56 registers on
# sm_90 (80 with Triton 3.2 and 3.3).
ROWS = 8
ENTROPY_WARPS = 4
# The choose kernel holds two 64-bit numbers per region in registers, which takes 16 warps for this many.
MAX_CHOSEN = 4096

# Explicit, because the default differs between versions of Triton.
_OPTIONS = {"enable_fp_fusion": False}

_NO_KEY = 2**63 - 1


@_jit
def _source_positions(k, extent, CLAMPED: tl.constexpr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """`complexity_torch._source_positions` of the centres `k` on an axis of `extent` pixels."""
    # SIZE is a power of two, so everything is exact up to the cast.
    position = ((k.to(tl.float64) + 0.5) * (extent.to(tl.float64) * (1 / SIZE)) - 0.5).to(tl.float32)
    below = tl.floor(position)
    fraction = position - below
    index = below.to(tl.int32)
    last = extent - 1
    if CLAMPED:
        fraction = tl.where((index < 0) | (index >= last), 0.0, fraction)
    first = tl.minimum(tl.maximum(index, 0), last)
    second = tl.minimum(tl.maximum(index + 1, 0), last)
    return first, second, fraction


@_jit
def _lerp(a, b, fraction):
    """`a + (b - a) fraction` in float32, product and sum rounded once."""
    return ((b - a).to(tl.float64) * fraction.to(tl.float64) + a.to(tl.float64)).to(tl.float32)


@_jit
def _weighted(a, b, fraction):
    """`a (1 - fraction) + b fraction` in float32."""
    return a * (1.0 - fraction) + b * fraction


@_jit
def _resize_rows(  # type: ignore[no-untyped-def]
    image_ptr,
    resized_ptr,
    x0,
    y0,
    w,
    h,
    width,
    first_row,
    IS_LINE: tl.constexpr,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Store `ROWS` rows of the region, resized to SIZE x SIZE."""
    j, i = first_row + tl.arange(0, ROWS), tl.arange(0, SIZE)
    left, right, fx = _source_positions(i, w, True, SIZE)
    top, bottom, fy = _source_positions(j, h, not IS_LINE, SIZE)
    left_ptr, right_ptr = image_ptr + (x0 + left)[None, :], image_ptr + (x0 + right)[None, :]
    top_offset = ((y0 + top).to(tl.int64) * width)[:, None]
    bottom_offset = ((y0 + bottom).to(tl.int64) * width)[:, None]
    top_left, top_right = tl.load(left_ptr + top_offset), tl.load(right_ptr + top_offset)
    bottom_left, bottom_right = tl.load(left_ptr + bottom_offset), tl.load(right_ptr + bottom_offset)
    fx, fy = fx[None, :], fy[:, None]
    if IS_LINE:
        upper, lower = _weighted(top_left, top_right, fx), _weighted(bottom_left, bottom_right, fx)
        resized = _weighted(upper, lower, fy)
    else:
        upper, lower = _lerp(top_left, top_right, fx), _lerp(bottom_left, bottom_right, fx)
        resized = _lerp(upper, lower, fy)
    tl.store(resized_ptr + j[:, None] * SIZE + i[None, :], resized)


@_jit
def _magnitude_bins(  # type: ignore[no-untyped-def]
    resized_ptr, pixel, SIZE: tl.constexpr, BIN_WIDTH: tl.constexpr, MAGNITUDE_LIMIT: tl.constexpr
):
    """Bins of the Sobel magnitudes of `pixel`, flat indices of the SIZE x SIZE image with a replicated border."""
    j, i = pixel // SIZE, pixel % SIZE
    above, here, below = tl.maximum(j - 1, 0) * SIZE, j * SIZE, tl.minimum(j + 1, SIZE - 1) * SIZE
    left, right = tl.maximum(i - 1, 0), tl.minimum(i + 1, SIZE - 1)
    a0 = tl.load(resized_ptr + above + left).to(tl.float64)
    a1 = tl.load(resized_ptr + above + i).to(tl.float64)
    a2 = tl.load(resized_ptr + above + right).to(tl.float64)
    b0 = tl.load(resized_ptr + here + left).to(tl.float64)
    b2 = tl.load(resized_ptr + here + right).to(tl.float64)
    c0 = tl.load(resized_ptr + below + left).to(tl.float64)
    c1 = tl.load(resized_ptr + below + i).to(tl.float64)
    c2 = tl.load(resized_ptr + below + right).to(tl.float64)
    gx = (a2 - a0) + 2 * (b2 - b0) + (c2 - c0)
    gy = (c0 - a0) + 2 * (c1 - a1) + (c2 - a2)
    magnitude = tl.sqrt(gx * gx + gy * gy)
    # Larger values, NaN included, must not index beyond the bins.
    magnitude = tl.where(magnitude < MAGNITUDE_LIMIT, magnitude, 0.0)
    # The product is off by less than a bin, for any precision of the constant, so compare with the exact edges.
    bins = (magnitude * (1 / BIN_WIDTH)).to(tl.int32)
    bins -= (magnitude < bins.to(tl.float64) * BIN_WIDTH).to(tl.int32)
    bins += (magnitude >= (bins + 1).to(tl.float64) * BIN_WIDTH).to(tl.int32)
    return bins


@_jit
def _entropy(counts_ptr, table_ptr, BINS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sum the table's entries for `BINS` = 256 counts in the order of np.sum: 128 at a time in eight accumulators."""
    accumulator = tl.arange(0, BINS // 16)
    first = accumulator // 8 * 128 + accumulator % 8
    partial = tl.zeros((BINS // 16,), dtype=tl.float64)
    for step in tl.static_range(16):
        partial += tl.load(table_ptr + tl.load(counts_ptr + first + step * 8))
    # Sums of two numbers have only one order.
    pairs = tl.sum(tl.reshape(partial, (BINS // 32, 2)), 1)
    fours = tl.sum(tl.reshape(pairs, (BINS // 64, 2)), 1)
    eights = tl.sum(tl.reshape(fours, (BINS // 128, 2)), 1)
    return -tl.sum(eights, 0)


@_jit
def entropy_kernel(  # type: ignore[no-untyped-def]
    grey_ptr,
    boxes_ptr,
    table_ptr,
    resized_ptr,
    counts_ptr,
    entropies_ptr,
    height,
    width,
    num_splittable,
    num_pairs,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    BINS: tl.constexpr,
    BIN_WIDTH: tl.constexpr,
    MAGNITUDE_LIMIT: tl.constexpr,
):
    """Grid (programs,). Scratch: `resized` `(programs, 64, 64)` float32, `counts` `(programs, 256)` int32."""
    program = tl.program_id(0).to(tl.int64)
    resized_ptr += program * SIZE * SIZE
    counts_ptr += program * BINS
    pair = program
    while pair < num_pairs:
        image, region = pair // num_splittable, pair % num_splittable
        image_ptr = grey_ptr + image * height * width
        box_ptr = boxes_ptr + region * 4
        x0, y0 = tl.load(box_ptr).to(tl.int32), tl.load(box_ptr + 1).to(tl.int32)
        w, h = tl.load(box_ptr + 2).to(tl.int32) - x0 + 1, tl.load(box_ptr + 3).to(tl.int32) - y0 + 1
        if (w == 1) | (h == 1):
            for row in range(0, SIZE, ROWS):
                _resize_rows(image_ptr, resized_ptr, x0, y0, w, h, width, row, True, ROWS, SIZE)
        else:
            for row in range(0, SIZE, ROWS):
                _resize_rows(image_ptr, resized_ptr, x0, y0, w, h, width, row, False, ROWS, SIZE)
        tl.debug_barrier()  # threads read pixels that other threads wrote
        histogram = tl.zeros((BINS,), dtype=tl.int32)
        for row in range(0, SIZE, ROWS):
            pixel = row * SIZE + tl.arange(0, ROWS * SIZE)
            histogram += tl.histogram(_magnitude_bins(resized_ptr, pixel, SIZE, BIN_WIDTH, MAGNITUDE_LIMIT), BINS)
        tl.store(counts_ptr + tl.arange(0, BINS), histogram)
        tl.debug_barrier()  # likewise counts; also, all pixels must be read before the next resize
        tl.store(entropies_ptr + pair, _entropy(counts_ptr, table_ptr, BINS))
        pair += tl.num_programs(0)


@_jit
def choose_kernel(  # type: ignore[no-untyped-def]
    scores_ptr,
    halves_ptr,
    counts_ptr,
    regions_ptr,
    num_splittable,
    max_count,
    BLOCK_L: tl.constexpr,
    NO_KEY: tl.constexpr,
):
    """Grid (B,). Rows beyond the count of an image hold region 0, the whole image."""
    image = tl.program_id(0).to(tl.int64)
    scores_ptr += image * num_splittable
    count = tl.minimum(tl.load(counts_ptr + image), max_count).to(tl.int32)
    row = tl.arange(0, BLOCK_L)
    # Per region its score, -inf if it cannot be split, and its key: age and index in the tree.
    score = tl.where(row == 0, tl.load(scores_ptr, mask=num_splittable > 0, other=float("-inf")), float("-inf"))
    key = tl.where(row == 0, 0, NO_KEY).to(tl.int64)
    found = 1
    while found < count:
        best = tl.max(score, 0)
        # Of equal scores take the smallest key, the oldest region. Ages are unique.
        chosen = tl.min(tl.where((score == best) & (score > float("-inf")), key, NO_KEY), 0)
        is_found = chosen != NO_KEY
        half_ptr = halves_ptr + (chosen & 0x7FFFFFFF) * 4
        x1, x2 = tl.load(half_ptr, mask=is_found, other=-1), tl.load(half_ptr + 1, mask=is_found, other=-1)
        y1, y2 = tl.load(half_ptr + 2, mask=is_found, other=-1), tl.load(half_ptr + 3, mask=is_found, other=-1)
        score_x1, score_x2 = _score(scores_ptr, x1, num_splittable), _score(scores_ptr, x2, num_splittable)
        score_y1, score_y2 = _score(scores_ptr, y1, num_splittable), _score(scores_ptr, y2, num_splittable)
        less_in_x = tl.minimum(score_x1, score_x2) < tl.minimum(score_y1, score_y2)
        in_x = (x1 >= 0) & ((y1 < 0) | less_in_x)
        first, second = tl.where(in_x, x1, y1).to(tl.int64), tl.where(in_x, x2, y2).to(tl.int64)
        first_score, second_score = tl.where(in_x, score_x1, score_y1), tl.where(in_x, score_x2, score_y2)
        age = tl.cast(found, tl.int64) * 2
        # The first half takes the row of the region, the second goes to the end.
        is_first, is_second = (key == chosen) & is_found, (row == found) & is_found
        score = tl.where(is_first, first_score, tl.where(is_second, second_score, score))
        key = tl.where(is_first, ((age - 1) << 32) + first, tl.where(is_second, (age << 32) + second, key))
        found += 1
    region = tl.where(key == NO_KEY, 0, key & 0x7FFFFFFF)
    tl.store(regions_ptr + image * max_count + row, region, mask=row < max_count)


@_jit
def _score(scores_ptr, region, num_splittable):
    """The score of a region of the tree, -inf if it cannot be split."""
    return tl.load(scores_ptr + region, mask=(region >= 0) & (region < num_splittable), other=float("-inf"))


# ---- The ops --------------------------------------------------------------------------------------------------------


def _region_entropies(grey: torch.Tensor, boxes: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Entropies `(B, S)` float64 of regions `boxes` (S, 4) int64 in `grey` (B, H, W) float32, with one launch."""
    num_images, height, width = grey.shape
    num_pairs = num_images * len(boxes)
    entropies = torch.empty(num_images, len(boxes), dtype=torch.float64, device=grey.device)
    if num_pairs == 0:
        return entropies
    num_programs = min(num_pairs, MAX_PROGRAMS)
    resized = torch.empty(num_programs, RESIZED, RESIZED, dtype=torch.float32, device=grey.device)
    counts = torch.empty(num_programs, USED_BINS, dtype=torch.int32, device=grey.device)
    with on_device(grey):
        entropy_kernel[(num_programs,)](
            grey.contiguous(), boxes.contiguous(), table, resized, counts, entropies, height, width, len(boxes),
            num_pairs, ROWS=ROWS, SIZE=RESIZED, BINS=USED_BINS, BIN_WIDTH=BIN_WIDTH, MAGNITUDE_LIMIT=MAGNITUDE_LIMIT,
            num_warps=ENTROPY_WARPS, **_OPTIONS,
        )  # fmt: skip
    return entropies


def _region_entropies_fake(grey: torch.Tensor, boxes: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return grey.new_empty(grey.shape[0], boxes.shape[0], dtype=torch.float64)


def _choose_regions(scores: torch.Tensor, halves: torch.Tensor, counts: torch.Tensor, max_count: int) -> torch.Tensor:
    """Indices `(B, max_count)` int64 of the chosen regions, 0 beyond the count of an image, with one launch.

    `scores` (B, S) float64 belong to the first S regions of the tree `halves` (N, 4) int32; `counts` (B,) is int64.
    """
    num_images = len(scores)
    regions = torch.empty(num_images, max_count, dtype=torch.int64, device=scores.device)
    if num_images == 0:
        return regions
    block = max(32, next_power_of_2(max_count))
    with on_device(scores):
        choose_kernel[(num_images,)](
            scores.contiguous(), halves, counts, regions, scores.shape[1], max_count, BLOCK_L=block, NO_KEY=_NO_KEY,
            num_warps=choose_warps(block), **_OPTIONS,
        )  # fmt: skip
    return regions


def _choose_regions_fake(
    scores: torch.Tensor, halves: torch.Tensor, counts: torch.Tensor, max_count: int
) -> torch.Tensor:
    return scores.new_empty(scores.shape[0], max_count, dtype=torch.int64)


def choose_warps(block: int) -> int:
    """Warps of the choose kernel: one if possible, because several exchange values at every choice."""
    return max(1, block // 256)


def _register_ops() -> None:
    entropies = torch.library.custom_op("gpstoken::region_entropies", _region_entropies, mutates_args=())
    choose = torch.library.custom_op("gpstoken::choose_regions", _choose_regions, mutates_args=())
    entropies.register_fake(_region_entropies_fake)
    choose.register_fake(_choose_regions_fake)


# Ops are global to the process. A second copy of this module, from the remote code of a model repository, uses those
# of the first.
if not hasattr(torch.ops.gpstoken, "region_entropies"):
    _register_ops()


# ---- Used by partition.py -------------------------------------------------------------------------------------------


def triton_region_entropies(grey: torch.Tensor, regions: RegionTensors) -> torch.Tensor:
    """`complexity_torch.region_entropies`, bit for bit."""
    return torch.ops.gpstoken.region_entropies(grey, regions.boxes[: regions.num_splittable], regions.entropy_table)


def triton_choose_boxes(
    entropies: torch.Tensor,
    weights: torch.Tensor | None,
    regions: RegionTensors,
    token_counts: torch.Tensor,
    max_count: int,
    complexity_exponent: float,
) -> torch.Tensor:
    """Alg. 1 for every image, on the device.

    Args:
        entropies (`torch.Tensor` of shape `(B, S)`): float64, of the splittable regions.
        weights (`torch.Tensor` of shape `(B, S)`, *optional*): float64, importance summed over them.
        regions (`RegionTensors`): on the same device.
        token_counts (`torch.Tensor` of shape `(B,)`): int64, regions per image, from 1 to the most that the tree
            allows.
        max_count (`int`): the largest of them, at most MAX_CHOSEN.
        complexity_exponent (`float`): lambda of Eq. 4.

    Returns:
        `torch.Tensor` of shape `(B, max_count, 4)`: int64 boxes in Morton order; rows beyond the count of an image
        have no meaning.
    """
    scores = entropies**complexity_exponent * regions.height * regions.width
    if weights is not None:
        scores = scores + weights
    chosen = torch.ops.gpstoken.choose_regions(scores, regions.halves, token_counts, max_count)
    is_padding = torch.arange(max_count, device=chosen.device) >= token_counts[:, None]
    order = regions.morton_code[chosen].masked_fill(is_padding, _NO_KEY).argsort(dim=1)
    return regions.boxes[chosen.gather(1, order)]
