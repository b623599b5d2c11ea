# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Calibration: any set of Gaussians -> a layout that a partition could have made (paper Alg. 2).

Shapes: B batch, L tokens, H x W pixels of the image.

A generated layout is only nearly one: its Gaussians overlap and leave gaps. Calibration keeps their means, which say
where the tokens go, and rebuilds the regions from them by the halvings of a partition.
"""

from __future__ import annotations

import numpy as np
import torch

from .gaussians import GAUSSIAN_FIELDS, NUM_GAUSSIAN_PARAMS, boxes_to_gaussians, to_float64
from .layout import GaussianLayout
from .numba_support import compiled
from .partition import check_min_region_size, check_region_count, check_sigma_scale
from .regions import halve, heap_pop, heap_push, is_splittable, region_centres, sort_regions


# torch.compile breaks its graph here: it cannot trace compiled loops, and the result depends on the means.
@torch.compiler.disable
def calibrate_layout(
    gaussians: torch.Tensor,
    image_size: tuple[int, int] = (256, 256),
    min_region_size: int = 8,
    sigma_scale: float = 2 / 3,
    align_corners: bool = True,
) -> GaussianLayout:
    r"""The layout of L regions that follows the means of L Gaussians (Alg. 2).

    Every mean moves to the nearest centre that a region can have on its axis. Then, from the whole image until there
    are L regions, the splittable region that holds most of these means is halved (the larger one on equal counts, then
    the older one): along its longer side; a square along x if no mean lies exactly on the line `x = (x0 + x1) / 2`,
    else along y. Sigma and rho are ignored; each region's own Gaussian replaces them.

    The paper's grid is uniform and its phase is left open. Where the sides halve evenly, the centres of all legal
    regions form one uniform grid with a step of half the smallest side: 4 pixels for 256 x 256 and
    `min_region_size=8`.

    Which layouts come back unchanged:

    - The layout of a partition of any H x W with the same `min_region_size`, exactly, boxes and Gaussians, if
      `min_region_size >= 2`. With `min_region_size=1` the same holds where the sides halve evenly down to one pixel;
      elsewhere the centre of a column one pixel wide may lie on the middle line of an odd square.
    - The same with noise on the means below half the distance between neighbouring centres of the axis. Where the
      sides halve evenly that is half a grid step: 2 pixels for 256 x 256 and `min_region_size=8`; 1.25 pixels in x and
      1.5 in y for 192 x 320. Elsewhere the distances differ along an axis (`regions.region_centres` lists the centres)
      and shrink to half a pixel.

    Args:
        gaussians (`torch.Tensor` of shape `(B, L, 5)`): floating point `[sigma_x, sigma_y, rho, mu_x, mu_y]`. Means
            outside the image move to its outermost centres.
        image_size (`tuple[int, int]`, *optional*, defaults to `(256, 256)`): `(H, W)` in pixels.
        min_region_size (`int`, *optional*, defaults to 8): s_min of the partition in pixels.
        sigma_scale (`float`, *optional*, defaults to 2/3): sigma over a region's extent.
        align_corners (`bool`, *optional*, defaults to `True`): where pixels lie in normalised coordinates.

    Returns:
        [`GaussianLayout`]: on the device of `gaussians`, in Morton order of the regions' top-left corners.

    Raises:
        ValueError: if `gaussians` is not a `(B, L, 5)` floating point tensor with L >= 1 or holds NaN; if L is more
            than an image of this size can be split into; if another argument is out of its range.

    Examples:
        ```python
        >>> import torch
        >>> from gpstoken_hf import calibrate_layout

        >>> generated = torch.rand(1, 16, 5) * 2 - 1  # only the means count
        >>> layout = calibrate_layout(generated, image_size=(64, 64), min_region_size=8)
        >>> areas = (layout.boxes[..., 2:] - layout.boxes[..., :2] + 1).prod(-1)
        >>> int(areas.sum()) == 64 * 64  # the regions tile the image
        True

        ```
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
    check_min_region_size(min_region_size)
    check_sigma_scale(sigma_scale)
    min_region_size = int(min_region_size)
    check_region_count(num_tokens, (height, width), min_region_size, "the number of Gaussians")
    values = to_float64(gaussians.detach()).cpu().numpy()
    if np.isnan(values).any():
        raise ValueError(f"gaussians must not be NaN, got {int(np.isnan(values).sum())} NaN values")
    mu = values[..., 3:]

    means = np.stack(
        [
            _nearest_centre(mu[..., axis], extent, region_centres(extent, min_region_size), align_corners)
            for axis, extent in enumerate((width, height))
        ],
        axis=-1,
    )
    regions = np.empty((*means.shape[:2], 4), dtype=np.int64)
    _regions_of_means(means, regions, height, width, min_region_size)
    boxes = sort_regions(torch.from_numpy(regions)).to(gaussians.device)
    return GaussianLayout(boxes_to_gaussians(boxes, (height, width), sigma_scale, align_corners), boxes)


def _nearest_centre(mu: np.ndarray, num_pixels: int, centres: np.ndarray, align_corners: bool) -> np.ndarray:
    """The nearest of `centres` (half pixels) to every normalised coordinate; the lower one at equal distance."""
    if num_pixels == 1:
        return np.zeros(mu.shape, dtype=np.int64)
    half_pixels = (mu + 1) * (num_pixels - 1) if align_corners else (mu + 1) * num_pixels - 1
    return centres[np.searchsorted((centres[1:] + centres[:-1]) / 2, half_pixels)]


@compiled
def _regions_of_means(means, regions, height, width, min_region_size):
    """Alg. 2 on every layout of a batch: `means` (B, L, 2) int64 in half pixels -> `regions` (B, L, 4), unsorted."""
    num_tokens = means.shape[1]
    # The means of a region are a slice [start, start + held) of `order`, which every split partitions in place.
    order = np.empty(num_tokens, dtype=np.int64)
    start = np.empty(num_tokens, dtype=np.int64)
    held = np.empty(num_tokens, dtype=np.int64)
    score = np.empty(num_tokens, dtype=np.float64)
    age = np.empty(num_tokens, dtype=np.int64)
    heap = np.empty(num_tokens, dtype=np.int64)
    for layout in range(means.shape[0]):
        boxes = regions[layout]
        boxes[0, 0], boxes[0, 1], boxes[0, 2], boxes[0, 3] = 0, 0, width - 1, height - 1
        for i in range(num_tokens):
            order[i] = i
        start[0], held[0], score[0], age[0] = 0, num_tokens, 0.0, 0
        heap[0], heap_size, found = 0, np.int64(1), np.int64(1)
        while found < num_tokens:
            row = heap_pop(heap, heap_size, score, age)
            heap_size -= 1
            x0, y0, x1, y1 = boxes[row, 0], boxes[row, 1], boxes[row, 2], boxes[row, 3]
            along_x = x1 - x0 >= y1 - y0
            if x1 - x0 == y1 - y0:
                for i in range(start[row], start[row] + held[row]):
                    if means[layout, order[i], 0] == x0 + x1:
                        along_x = False
            axis = 0 if along_x else 1
            first, second = halve(x0, y0, x1, y1, along_x)
            # The first half holds the means below this line, half a pixel before the second half's first pixel.
            line = 2 * second[axis] - 1
            low = start[row]
            high = start[row] + held[row]
            while low < high:
                token = order[low]
                if means[layout, token, axis] < line:
                    low += 1
                else:
                    high -= 1
                    order[low], order[high] = order[high], token
            new = found
            found += 1
            start[new], held[new] = low, start[row] + held[row] - low
            held[row] = low - start[row]
            for k in range(4):
                boxes[row, k], boxes[new, k] = first[k], second[k]
            for half in (row, new):
                w, h = boxes[half, 2] - boxes[half, 0] + 1, boxes[half, 3] - boxes[half, 1] + 1
                # The area breaks ties between equal counts: a share of the image, below one mean.
                score[half] = held[half] + w * h / (width * height + 1)
                age[half] = 2 * found + (half == new)
                if is_splittable(boxes[half, 0], boxes[half, 1], boxes[half, 2], boxes[half, 3], min_region_size):
                    heap_push(half, heap, heap_size, score, age)
                    heap_size += 1


__all__ = ["calibrate_layout"]
