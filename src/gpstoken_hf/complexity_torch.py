# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Complexity of every region of every image of a batch at once (Eq. 4), in PyTorch on any device with float64.

Shapes: B batch, N regions, S splittable regions, H x W pixels of an image, P pairs of an image and a region.

Halving an image of a given size can only produce a fixed set of regions (2729 for 256 x 256 pixels and s_min = 8).
This module computes all of their entropies before Alg. 1 makes its first choice: far more work than the compiled loops
of `complexity_cpu`, but all of it in parallel. It rounds as those loops do: float32 where OpenCV uses float32, a fused
multiply-add as a product and a sum in float64, and one kernel per operation, so that the compiler fuses none.
`complexity_triton` uses the tensors of `region_tensors` too.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from .regions import morton_code, region_tree

RESIZED = 64
NUM_BINS = 512
# The authors' histogram spans [-5.5, 5.5]. Magnitudes are not negative, so only its upper half is filled.
USED_BINS = NUM_BINS // 2
# Exact in binary, as are its multiples, the edges of the bins.
BIN_WIDTH = 11 / NUM_BINS
# With grey in [0, 1] the largest magnitude is sqrt(20), bin 208; this is bin 232.
MAGNITUDE_LIMIT = 5.0
# Magnitudes computed at a time, about 60 bytes each.
_CHUNK_PIXELS = 2**23


def entropy_table() -> np.ndarray:
    """`q log2(q + 1e-10)` for every count of a histogram of 64 x 64 magnitudes, `(4097,)` float64."""
    q = np.arange(RESIZED * RESIZED + 1) / (RESIZED * RESIZED + 1e-5)
    return q * np.log2(q + 1e-10)


@dataclass(frozen=True)
class RegionTensors:
    """A `RegionTree` on one device, with the tensors that score and order its regions.

    Args:
        boxes (`torch.Tensor` of shape `(N, 4)`): int64 inclusive pixels; the first S are splittable.
        halves (`torch.Tensor` of shape `(N, 4)`): int32, see `RegionTree`.
        num_splittable (`int`): S, the number of regions that have a score.
        area_rows, line_rows (`torch.Tensor`): int64 rows of `boxes` below S, of regions of at least 2 x 2 pixels and
            of regions one pixel wide or high.
        height, width (`torch.Tensor` of shape `(S,)`): float64 extents in pixels.
        morton_code (`torch.Tensor` of shape `(N,)`): int64 codes of the top-left corners.
        entropy_table (`torch.Tensor` of shape `(4097,)`): float64, see `entropy_table`.
    """

    boxes: torch.Tensor
    halves: torch.Tensor
    num_splittable: int
    area_rows: torch.Tensor
    line_rows: torch.Tensor
    height: torch.Tensor
    width: torch.Tensor
    morton_code: torch.Tensor
    entropy_table: torch.Tensor


def region_tensors(height: int, width: int, min_region_size: int, device: torch.device) -> RegionTensors:
    """The tree of an image size on a device, copied there once and cached."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _region_tensors(height, width, min_region_size, device, stream)


# One copy per stream, because another stream could read the tensors before their copy ends or after they are freed.
@lru_cache(maxsize=4)
def _region_tensors(height: int, width: int, min_region_size: int, device: torch.device, stream: int) -> RegionTensors:
    tree = region_tree(height, width, min_region_size)
    x0, y0, x1, y1 = tree.boxes.T
    splittable = np.arange(len(tree.boxes)) < tree.num_splittable
    is_line = (x0 == x1) | (y0 == y1)

    def send(array: np.ndarray) -> torch.Tensor:
        return to_device(torch.from_numpy(np.ascontiguousarray(array)), device)

    # Tensors made in inference mode could not be used outside it.
    with torch.inference_mode(False):
        return RegionTensors(
            boxes=send(tree.boxes),
            halves=send(tree.halves.astype(np.int32)),
            num_splittable=tree.num_splittable,
            area_rows=send(np.flatnonzero(splittable & ~is_line)),
            line_rows=send(np.flatnonzero(splittable & is_line)),
            height=send((y1 - y0 + 1)[splittable].astype(np.float64)),
            width=send((x1 - x0 + 1)[splittable].astype(np.float64)),
            morton_code=to_device(morton_code(torch.from_numpy(x0), torch.from_numpy(y0)), device),
            entropy_table=send(entropy_table()),
        )


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` on `device`. Copies to CUDA asynchronously through pinned memory."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type == "cuda")


def count_tensor(counts: list[int], device: torch.device) -> torch.Tensor:
    """`counts` as `(B,)` int64 on `device`."""
    if len(set(counts)) == 1:
        return torch.full((len(counts),), counts[0], dtype=torch.int64, device=device)
    return to_device(torch.tensor(counts, dtype=torch.int64), device)


def grey_images(images: torch.Tensor) -> torch.Tensor:
    """`(B, 3, H, W)` RGB in [-1, 1] -> `(B, H, W)` grey in [0, 1], float32 throughout."""
    red, green, blue = images.to(torch.float32).unbind(1)
    # In place: for large images, fresh memory costs more time than the arithmetic.
    return (0.299 * red).add_(0.587 * green).add_(0.114 * blue).add_(1).mul_(0.5)


def region_entropies(grey: torch.Tensor, regions: RegionTensors) -> torch.Tensor:
    """Entropy in bits of the gradient magnitudes of every splittable region, after a resize to 64 x 64 (Eq. 4).

    Args:
        grey (`torch.Tensor` of shape `(B, H, W)`): float32 in [0, 1]. Other values, NaN included, give a finite result
            without meaning.
        regions (`RegionTensors`): the regions, on the same device.

    Returns:
        `torch.Tensor` of shape `(B, S)`: float64.
    """
    boxes, table = regions.boxes, regions.entropy_table
    entropies = torch.empty(grey.shape[0], regions.num_splittable, dtype=torch.float64, device=grey.device)
    for rows, resize in ((regions.area_rows, _resize), (regions.line_rows, _resize_lines)):
        # Chunks of pairs bound the memory for large batches and for many regions.
        num_pairs = grey.shape[0] * len(rows)
        for start in range(0, num_pairs, _CHUNK_PIXELS // RESIZED**2):
            pair = torch.arange(start, min(start + _CHUNK_PIXELS // RESIZED**2, num_pairs), device=grey.device)
            image, row = pair // len(rows), rows[pair % len(rows)]
            entropies[image, row] = _gradient_entropy(resize(grey, image, boxes[row]), table)
    return entropies


def importance_sums(importance: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Sums of importance `(B, H, W)` over boxes `(N, 4)` -> `(B, N)` float64."""
    # From a summed-area table. Exact for weights that are multiples of one power of two.
    table = torch.nn.functional.pad(importance.to(torch.float64).cumsum(1).cumsum(2), (1, 0, 1, 0))
    x0, y0, x1, y1 = boxes.unbind(1)
    return (table[:, y1 + 1, x1 + 1] - table[:, y0, x1 + 1]) - (table[:, y1 + 1, x0] - table[:, y0, x0])


def _source_positions(extent: torch.Tensor, clamped: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Source positions of a resize from `extent` (P,) to 64 pixels along an axis, as OpenCV rounds them.

    Returns:
        The pixels on both sides of each half-pixel centre, `(P, 64)` int64, and where it lies between them, `(P, 64)`
        float32.
    """
    centre = torch.arange(RESIZED, device=extent.device, dtype=torch.float64) + 0.5
    position = (centre * (extent.to(torch.float64) / RESIZED)[:, None] - 0.5).to(torch.float32)
    below = position.floor()
    fraction = position - below
    index = below.to(torch.int64)
    last = (extent - 1)[:, None]
    if clamped:
        fraction = fraction.masked_fill((index < 0) | (index >= last), 0)
    first, second = index.clamp(min=0), (index + 1).clamp(min=0)
    return torch.minimum(first, last), torch.minimum(second, last), fraction


def _lerp(a: torch.Tensor, b: torch.Tensor, fraction: torch.Tensor) -> torch.Tensor:
    """`a + (b - a) fraction` in float32, product and sum rounded once."""
    return ((b - a).to(torch.float64) * fraction.to(torch.float64) + a.to(torch.float64)).to(torch.float32)


def _resize(grey: torch.Tensor, image: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Bilinear resize of regions of at least 2 x 2 pixels; `image` (P,), `boxes` (P, 4) -> `(P, 64, 64)` float32."""
    x0, y0, x1, y1 = boxes.unbind(1)
    first_x, second_x, fx = _source_positions(x1 - x0 + 1, clamped=True)
    first_y, second_y, fy = _source_positions(y1 - y0 + 1, clamped=True)
    image = image[:, None, None]
    left, right = (x0[:, None] + first_x)[:, None, :], (x0[:, None] + second_x)[:, None, :]
    top, bottom = (y0[:, None] + first_y)[:, :, None], (y0[:, None] + second_y)[:, :, None]
    fx = fx[:, None, :]
    upper = _lerp(grey[image, top, left], grey[image, top, right], fx)
    lower = _lerp(grey[image, bottom, left], grey[image, bottom, right], fx)
    return _lerp(upper, lower, fy[:, :, None])


def _resize_lines(grey: torch.Tensor, image: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """The same for regions one pixel wide or high, where OpenCV computes `a (1 - f) + b f` in float32."""
    x0, y0, x1, y1 = boxes.unbind(1)
    first_x, second_x, fx = _source_positions(x1 - x0 + 1, clamped=True)
    first_y, second_y, fy = _source_positions(y1 - y0 + 1, clamped=False)
    image = image[:, None, None]
    left, right = (x0[:, None] + first_x)[:, None, :], (x0[:, None] + second_x)[:, None, :]
    top, bottom = (y0[:, None] + first_y)[:, :, None], (y0[:, None] + second_y)[:, :, None]
    fx, fy = fx[:, None, :], fy[:, :, None]
    upper = grey[image, top, left] * (1 - fx) + grey[image, top, right] * fx
    lower = grey[image, bottom, left] * (1 - fx) + grey[image, bottom, right] * fx
    return upper * (1 - fy) + lower * fy


def _gradient_entropy(resized: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Entropy in bits of the histogram of Sobel magnitudes, `(P, 64, 64)` float32 -> `(P,)` float64."""
    padded = torch.nn.functional.pad(resized, (1, 1, 1, 1), mode="replicate").to(torch.float64)
    dx = padded[:, :, 2:] - padded[:, :, :-2]
    gx = dx[:, :-2] + 2 * dx[:, 1:-1] + dx[:, 2:]
    dy = padded[:, 2:] - padded[:, :-2]
    gy = dy[:, :, :-2] + 2 * dy[:, :, 1:-1] + dy[:, :, 2:]
    magnitude = (gx * gx + gy * gy).sqrt()
    # Grey in [0, 1] stays below the limit. Other values, NaN included, must not index beyond the bins.
    magnitude = torch.where(magnitude < MAGNITUDE_LIMIT, magnitude, 0)
    bins = (magnitude * (1 / BIN_WIDTH)).to(torch.int64)
    # The quotient is rounded, so compare with the exact edges.
    bins -= (magnitude < bins * BIN_WIDTH).to(torch.int64)
    bins += (magnitude >= (bins + 1) * BIN_WIDTH).to(torch.int64)
    counts = torch.zeros(len(resized), USED_BINS, dtype=torch.int64, device=resized.device)
    bins = bins.flatten(1)
    counts.scatter_add_(1, bins, torch.ones_like(bins))
    # In the order of np.sum: 128 numbers at a time in eight accumulators.
    terms = table[counts].reshape(-1, USED_BINS // 128, 16, 8)
    partial = terms[:, :, 0]
    for step in range(1, 16):
        partial = partial + terms[:, :, step]
    pairs = partial[..., 0::2] + partial[..., 1::2]
    blocks = (pairs[..., 0] + pairs[..., 1]) + (pairs[..., 2] + pairs[..., 3])
    return -(blocks[:, 0] + blocks[:, 1])
