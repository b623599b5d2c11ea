# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Complexity of every region of an image in PyTorch, for a whole batch at once, on any device with float64 (Eq. 4).

Shapes: B batch, N regions, S splittable ones, H x W pixels of an image, P pairs of an image and a region.

Repeated halving of an image of a given size can produce a fixed set of regions (2729 for 256 x 256 and s_min = 8), so
all of their entropies can be computed before the first choice is made. This is much more work than the compiled loop
of `complexity_cpu` does, but all of it is parallel. It rounds as that loop does: float32 where OpenCV has float32, a
fused multiply-add as a product and a sum in float64, and one kernel per operation so that nothing is contracted. The
tensors of a tree (`region_tensors`) serve the kernels of `complexity_triton` as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from .regions import morton_code, region_tree

RESIZED = 64
NUM_BINS = 512
# The authors' histogram spans [-5.5, 5.5]; magnitudes are never negative, so only its upper half is ever filled.
USED_BINS = NUM_BINS // 2
# Exact in binary, and so are its multiples, the edges of the bins.
BIN_WIDTH = 11 / NUM_BINS
# With grey in [0, 1] the largest magnitude is sqrt(20), bin 208; this is bin 232.
MAGNITUDE_LIMIT = 5.0
# Magnitudes computed at a time. Each takes about 60 bytes.
_CHUNK_PIXELS = 2**23


def entropy_table() -> np.ndarray:
    """`q log2(q + 1e-10)` for every count of a histogram of 64 x 64 magnitudes, `(4097,)` float64."""
    q = np.arange(RESIZED * RESIZED + 1) / (RESIZED * RESIZED + 1e-5)
    return q * np.log2(q + 1e-10)


@dataclass(frozen=True)
class RegionTensors:
    """A `RegionTree` on one device, with everything that scoring and ordering its regions needs. S = num_splittable.

    Args:
        boxes: `(N, 4)` int64.
        halves: `(N, 4)` int32.
        num_splittable: S, the number of regions that have a score.
        area_rows, line_rows: int64 rows of `boxes` below S, those of at least 2 x 2 pixels and those one pixel wide or
            high.
        height, width: `(S,)` float64, pixels.
        morton_code: `(N,)` int64, of the top-left corners.
        entropy_table: `(4097,)` float64, see `entropy_table`.
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
    """The tree of an image size on a device. It is copied there once and kept."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _region_tensors(height, width, min_region_size, device, stream)


# One copy per stream: another stream could read the tensors before the copy ends, or after they are freed.
@lru_cache(maxsize=4)
def _region_tensors(height: int, width: int, min_region_size: int, device: torch.device, stream: int) -> RegionTensors:
    tree = region_tree(height, width, min_region_size)
    x0, y0, x1, y1 = tree.boxes.T
    splittable = np.arange(len(tree.boxes)) < tree.num_splittable
    is_line = (x0 == x1) | (y0 == y1)

    def send(array: np.ndarray) -> torch.Tensor:
        return to_device(torch.from_numpy(np.ascontiguousarray(array)), device)

    # Tensors made under inference mode would be unusable outside of it.
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
    return (0.299 * red + 0.587 * green + 0.114 * blue + 1) * 0.5


def region_entropies(grey: torch.Tensor, regions: RegionTensors) -> torch.Tensor:
    """Entropy in bits of the gradient magnitudes of the splittable regions, after a resize to 64 x 64 (Eq. 4).

    Args:
        grey: `(B, H, W)` float32 in [0, 1]. Values outside, NaN included, give a finite but meaningless result.
        regions: the S splittable regions, on the same device.

    Returns:
        `(B, S)` float64.
    """
    boxes, table = regions.boxes, regions.entropy_table
    entropies = torch.empty(grey.shape[0], regions.num_splittable, dtype=torch.float64, device=grey.device)
    for rows, resize in ((regions.area_rows, _resize), (regions.line_rows, _resize_lines)):
        # Pairs of an image and a region, so that neither a large batch nor many regions decide the memory.
        num_pairs = grey.shape[0] * len(rows)
        for start in range(0, num_pairs, _CHUNK_PIXELS // RESIZED**2):
            pair = torch.arange(start, min(start + _CHUNK_PIXELS // RESIZED**2, num_pairs), device=grey.device)
            image, row = pair // len(rows), rows[pair % len(rows)]
            entropies[image, row] = _gradient_entropy(resize(grey, image, boxes[row]), table)
    return entropies


def importance_sums(importance: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Importance `(B, H, W)` summed over every box `(N, 4)` -> `(B, N)` float64."""
    # Differences of a summed-area table, in float64: exact for weights that are multiples of one power of two.
    table = torch.nn.functional.pad(importance.to(torch.float64).cumsum(1).cumsum(2), (1, 0, 1, 0))
    x0, y0, x1, y1 = boxes.unbind(1)
    return (table[:, y1 + 1, x1 + 1] - table[:, y0, x1 + 1]) - (table[:, y1 + 1, x0] - table[:, y0, x0])


def _source_positions(extent: torch.Tensor, clamped: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where 64 half-pixel centres lie between the samples of axes of `extent` (P,) pixels, as OpenCV rounds it.

    Returns:
        First and second sample, `(P, 64)` int64, and the fraction between them, `(P, 64)` float32.
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
    """`a + (b - a) fraction` with one rounding of product and sum, float32."""
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
    """Entropy (bits) of the histogram of Sobel magnitudes, `(P, 64, 64)` float32 -> `(P,)` float64."""
    padded = torch.nn.functional.pad(resized, (1, 1, 1, 1), mode="replicate").to(torch.float64)
    dx = padded[:, :, 2:] - padded[:, :, :-2]
    gx = dx[:, :-2] + 2 * dx[:, 1:-1] + dx[:, 2:]
    dy = padded[:, 2:] - padded[:, :-2]
    gy = dy[:, :, :-2] + 2 * dy[:, :, 1:-1] + dy[:, :, 2:]
    magnitude = (gx * gx + gy * gy).sqrt()
    # Grey in [0, 1] stays below it; what is not, NaN too, must not reach beyond the bins.
    magnitude = torch.where(magnitude < MAGNITUDE_LIMIT, magnitude, 0)
    bins = (magnitude * (1 / BIN_WIDTH)).to(torch.int64)
    # The quotient is rounded: compare with the exact edges.
    bins -= (magnitude < bins * BIN_WIDTH).to(torch.int64)
    bins += (magnitude >= (bins + 1) * BIN_WIDTH).to(torch.int64)
    counts = torch.zeros(len(resized), USED_BINS, dtype=torch.int64, device=resized.device)
    bins = bins.flatten(1)
    counts.scatter_add_(1, bins, torch.ones_like(bins))
    # np.sum adds 128 numbers at a time in eight accumulators.
    terms = table[counts].reshape(-1, USED_BINS // 128, 16, 8)
    partial = terms[:, :, 0]
    for step in range(1, 16):
        partial = partial + terms[:, :, step]
    pairs = partial[..., 0::2] + partial[..., 1::2]
    blocks = (pairs[..., 0] + pairs[..., 1]) + (pairs[..., 2] + pairs[..., 3])
    return -(blocks[:, 0] + blocks[:, 1])
