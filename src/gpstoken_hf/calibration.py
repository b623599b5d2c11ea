# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Calibration of a layout: from any set of Gaussians to the nearest layout that a partition could have made (Alg. 2).

Letters: B batch, L tokens, H x W pixels of the image.

A generated layout is only nearly one: its Gaussians overlap and leave gaps. Calibration keeps what it says about where
the tokens go, the means, and rebuilds the regions from them by the halvings of a partition.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from .gaussians import GAUSSIAN_FIELDS, NUM_GAUSSIAN_PARAMS, boxes_to_gaussians
from .partition import max_regions
from .partition_cpu import compiled, heap_pop, heap_push, sort_by_morton_code


@dataclass
class CalibrationOutput:
    """Legal layouts, in Morton order of the regions' top-left corners, as `partition_images` returns them.

    Attributes:
        gaussians: `(B, L, 5)` float32, normalised units (see docs/conventions.md).
        boxes: `(B, L, 4)` int64, inclusive pixel indices `[x0, y0, x1, y1]` that tile the image.
    """

    gaussians: torch.Tensor
    boxes: torch.Tensor


# torch.compile breaks its graph here: it cannot look into compiled loops, and the result depends on the means.
@torch.compiler.disable
def calibrate_layout(
    gaussians: torch.Tensor,
    image_size: tuple[int, int] = (256, 256),
    min_region_size: int = 8,
    sigma_scale: float = 2 / 3,
) -> CalibrationOutput:
    """The layout of L regions that follows the means of L Gaussians (paper Alg. 2).

    Every mean goes to the nearest centre that a region can have on its axis. From the whole image, until there are L
    regions, the splittable region that holds most of these means is halved (the larger one on equal counts, then the
    older one): along its longer side, a square along x if no mean lies exactly on its line `x = (x0 + x1) / 2`, else
    along y. Sigma and rho play no part: a region's own Gaussian takes their place.

    The paper's grid is uniform, and leaves its phase open. Where the sides halve evenly the centres of all legal
    regions are the points of one uniform grid with a step of half the smallest side: 4 pixels for 256 x 256 and
    `min_region_size=8`.

    What comes back unchanged:

    - The layout of a partition of any H x W with the same `min_region_size`, exactly, boxes and Gaussians, if
      `min_region_size >= 2`. With `min_region_size=1` the same holds where the sides halve evenly down to one
      pixel; otherwise the centre of a column one pixel wide may lie on the middle line of an odd square.
    - The same with noise on the means, as long as it is smaller than half the distance between neighbouring centres
      of the axis. Where the sides halve evenly that is half a grid step: 2 pixels for 256 x 256 and
      `min_region_size=8`; 1.25 pixels in x and 1.5 in y for 192 x 320. Elsewhere the distances
      differ along an axis (`layout_centres` lists the centres) and shrink to half a pixel.

    Args:
        gaussians: `(B, L, 5)` floating point `[sigma_x, sigma_y, rho, mu_x, mu_y]`; means beyond the frame go to its
            outermost centres. NaN is refused.
        image_size: `(H, W)` in pixels.
        min_region_size: s_min of the partition, pixels.
        sigma_scale: sigma in units of a region's extent, 2/3 in the authors' code, 1/3 in the paper.

    Returns:
        A `CalibrationOutput` on the device of `gaussians`.

    Raises:
        ValueError: a wrong shape, NaN, or more tokens than an image of this size can be split into.
    """
    if not isinstance(gaussians, torch.Tensor) or gaussians.ndim != 3 or gaussians.shape[-1] != NUM_GAUSSIAN_PARAMS:
        got = tuple(gaussians.shape) if isinstance(gaussians, torch.Tensor) else type(gaussians).__name__
        raise ValueError(f"gaussians must be a tensor of shape (B, L, 5), {list(GAUSSIAN_FIELDS)}, got {got}")
    if not gaussians.is_floating_point():
        raise ValueError(f"gaussians must be floating point, got {gaussians.dtype}")
    num_tokens = gaussians.shape[1]
    if num_tokens < 1:
        raise ValueError("gaussians must hold at least 1 token per layout, got 0")
    height, width = (int(extent) for extent in image_size)
    if height < 1 or width < 1:
        raise ValueError(f"image_size must be (H, W) of at least 1 x 1 pixels, got {tuple(image_size)}")
    if not (isinstance(min_region_size, int | np.integer) and min_region_size >= 1):
        raise ValueError(f"min_region_size must be an integer of at least 1 pixel, got {min_region_size}")
    if not 0 < sigma_scale <= 1:
        raise ValueError(f"sigma_scale must be in (0, 1], got {sigma_scale}")
    largest = max_regions(height, width, int(min_region_size))
    if num_tokens > largest:
        raise ValueError(
            f"an image of {height} x {width} pixels with min_region_size={min_region_size} can be split into at most "
            f"{largest} regions, got {num_tokens} Gaussians"
        )
    mu = gaussians.detach().to("cpu", torch.float64).numpy()
    if np.isnan(mu).any():
        raise ValueError(f"gaussians must not be NaN, got {int(np.isnan(mu).sum())} NaN values")

    mu_x, mu_y = mu[..., 3], mu[..., 4]
    means = np.stack(
        [
            _nearest_centre(mu_x, width, layout_centres(width, int(min_region_size))),
            _nearest_centre(mu_y, height, layout_centres(height, int(min_region_size))),
        ],
        axis=-1,
    )
    regions = np.empty((*means.shape[:2], 4), dtype=np.int64)
    _regions_of_means(means, regions, height, width, int(min_region_size))
    boxes = torch.from_numpy(regions).to(gaussians.device)
    return CalibrationOutput(gaussians=boxes_to_gaussians(boxes, (height, width), sigma_scale), boxes=boxes)


@lru_cache(maxsize=64)
def layout_centres(num_pixels: int, min_region_size: int = 8) -> np.ndarray:
    """Every centre that a region can have along an axis of `num_pixels`, in half pixels: `x0 + x1`, sorted int64.

    A region is halved along its longer side only, so along that axis its extent `x1 - x0` is above `min_region_size`
    when it is: which intervals can occur does not depend on the other axis.
    """
    centres = set()
    pending = [(0, num_pixels - 1)]
    while pending:
        first, last = pending.pop()
        centres.add(first + last)
        if last - first > min_region_size:
            middle = first + (last - first + 1) // 2
            pending += [(first, middle - 1), (middle, last)]
    return np.array(sorted(centres), dtype=np.int64)


def _nearest_centre(mu: np.ndarray, num_pixels: int, centres: np.ndarray) -> np.ndarray:
    """The nearest of `centres` (half pixels) to every normalised coordinate; the lower one at equal distance."""
    if num_pixels == 1:
        return np.zeros(mu.shape, dtype=np.int64)
    half_pixels = (mu + 1) * (num_pixels - 1)
    return centres[np.searchsorted((centres[1:] + centres[:-1]) / 2, half_pixels)]


@compiled
def _regions_of_means(means, regions, height, width, min_region_size):
    """Alg. 2 on every layout of a batch: `means` (B, L, 2) int64 in half pixels -> `regions` (B, L, 4)."""
    batch_size, num_tokens = means.shape[0], means.shape[1]
    boxes = np.empty((num_tokens, 4), dtype=np.int64)
    # The means of a region are a slice [start, start + held) of `order`, which every split partitions in place.
    start = np.empty(num_tokens, dtype=np.int64)
    held = np.empty(num_tokens, dtype=np.int64)
    score = np.empty(num_tokens, dtype=np.float64)
    age = np.empty(num_tokens, dtype=np.int64)
    heap = np.empty(num_tokens, dtype=np.int64)
    for layout in range(batch_size):
        x, y = means[layout, :, 0], means[layout, :, 1]
        order = np.arange(num_tokens)
        boxes[0] = (0, 0, width - 1, height - 1)
        start[0], held[0], score[0], age[0] = 0, num_tokens, 0.0, 0
        heap[0], heap_size, found = 0, 1, 1
        while found < num_tokens:
            row = heap_pop(heap, heap_size, score, age)
            heap_size -= 1
            x0, y0, x1, y1 = boxes[row]
            w, h = x1 - x0 + 1, y1 - y0 + 1
            in_x = w > h
            if w == h:
                in_x = True
                for i in range(start[row], start[row] + held[row]):
                    if x[order[i]] == x0 + x1:
                        in_x = False
            # The first half holds the means below this line, half a pixel before the second half's first pixel.
            line = 2 * (x0 + w // 2) - 1 if in_x else 2 * (y0 + h // 2) - 1
            low = start[row]
            high = start[row] + held[row]
            while low < high:
                token = order[low]
                if (x[token] if in_x else y[token]) < line:
                    low += 1
                else:
                    high -= 1
                    order[low], order[high] = order[high], token
            second = found
            found += 1
            start[second], held[second] = low, start[row] + held[row] - low
            held[row] = low - start[row]
            if in_x:
                boxes[row] = (x0, y0, x0 + w // 2 - 1, y1)
                boxes[second] = (x0 + w // 2, y0, x1, y1)
            else:
                boxes[row] = (x0, y0, x1, y0 + h // 2 - 1)
                boxes[second] = (x0, y0 + h // 2, x1, y1)
            for half in (row, second):
                extent_x, extent_y = boxes[half, 2] - boxes[half, 0], boxes[half, 3] - boxes[half, 1]
                # The area breaks ties between equal counts: a share of the image, below one mean.
                score[half] = held[half] + (extent_x + 1) * (extent_y + 1) / (width * height + 1)
                age[half] = 2 * found + (half == second)
                if max(extent_x, extent_y) > min_region_size:
                    heap_push(half, heap, heap_size, score, age)
                    heap_size += 1
        sort_by_morton_code(boxes, regions[layout])
