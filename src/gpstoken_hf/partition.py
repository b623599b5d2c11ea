# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Partition of an image into regions of similar complexity, and the initial Gaussians (paper Sec. 3.2, Alg. 1, Eq. 4).

Letters: B batch, L tokens, H x W pixels of an image, h x w pixels of a region.

The complexity of a region is `m = entropy^lambda h w` (plus the importance summed over it), where the entropy is that
of the histogram of its gradient magnitudes after a resize to 64 x 64. Starting from the whole image, the region of
largest m is halved until there are L regions. `partition_images` gives exactly the regions of the plain algorithm
written with NumPy and OpenCV (tests/partition_reference.py): every rounding of the resize, of the histogram and of the
sum is reproduced, so that no near-tie falls the other way. This module checks, chooses a backend and puts the result
together; partition_cpu.py, partition_torch.py and partition_triton.py do the work.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from .gaussians import boxes_to_gaussians
from .partition_cpu import choose_regions, partition_compiled
from .partition_torch import (
    PIXEL_TOLERANCE,
    RangeCheck,
    count_tensor,
    grey_images,
    importance_sums,
    region_entropies,
    region_tensors,
    region_tree,
    to_device,
)
from .partition_triton import MAX_CHOSEN, triton_choose_boxes, triton_region_entropies
from .triton_support import is_available as triton_is_available

BACKENDS = ("auto", "numba", "torch", "triton")


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


# torch.compile breaks its graph here: it cannot look into compiled loops, and the result depends on the pixels.
@torch.compiler.disable
def partition_images(
    images: torch.Tensor,
    num_tokens: int | Sequence[int],
    complexity_exponent: float = 2.5,
    min_region_size: int = 8,
    sigma_scale: float = 2 / 3,
    importance: torch.Tensor | None = None,
    backend: str = "auto",
    check_values: bool = True,
) -> PartitionOutput:
    """Split every image into `num_tokens` regions, small where it is complex, and place a Gaussian on each.

    A region is splittable while `x1 - x0 > min_region_size` or `y1 - y0 > min_region_size`. It is halved along its
    longer side (the first half is the smaller one), a square along the side that leaves the least complex half.

    On the CPU the images of a batch are shared out over `torch.get_num_threads()` threads (one in a DataLoader
    worker). On CUDA all regions that the image size allows are scored by one kernel and chosen by another ("triton").
    The host waits there for the check of the values alone, which the GPU does first: it still has the rest to do when
    the host goes on. Without Triton ("torch"), and for more than 4096 regions of an image, the GPU waits once while
    the host makes the choices.

    All backends see the same entropies, bit for bit. Sums of an importance map, and on CUDA powers of the entropies,
    may differ in the last place, so that regions whose complexities differ by less can be taken in another order (see
    docs/partition.md).

    Args:
        images: `(B, 3, H, W)` floating point RGB in [-1, 1]; any H and W.
        num_tokens: regions per image, one number for all or one for each.
        complexity_exponent: lambda of Eq. 4, at least 0.
        min_region_size: s_min, pixels, at least 1.
        sigma_scale: sigma in units of a region's extent, 2/3 in the authors' code, 1/3 in the paper.
        importance: optional `(B, H, W)` weights >= 0, added to the complexity of every region that holds them.
        backend: "numba" (the compiled loop on the CPU), "torch" (batched tensor operations on the device of `images`,
            float64 needed, and the choices on the CPU), "triton" (kernels for CUDA tensors) or "auto": "triton" for
            CUDA tensors, "torch" for those where there is no Triton, else "numba".
        check_values: False for a caller who sees to the range of `images` and `importance`: nothing is waited for with
            "triton" then. Values out of range do no harm, but what is returned for them means nothing.

    Returns:
        A `PartitionOutput` on the device of `images`.

    Raises:
        ValueError: shape, dtype or range of an argument, more tokens than an image can be split into, or a forced
            backend that is not available.
    """
    counts = _check_arguments(images, num_tokens, complexity_exponent, min_region_size, sigma_scale, importance)
    path = _resolve_backend(backend, images.device)
    # First in the queue, so that the answers are there long before the partition is. The compiled loop looks at the
    # pixels by itself.
    checks = start_value_checks(None if path == "numba" else images, importance) if check_values else []
    images, token_counts = images.detach(), count_tensor(counts, images.device)
    arguments = (counts, float(complexity_exponent), int(min_region_size))
    if path == "numba":
        boxes = to_device(partition_compiled(images, *arguments, importance), images.device)
    else:
        if importance is not None:
            importance = to_device(importance.detach().to(torch.float32), images.device)
        boxes = _partition_batched(images, *arguments, importance, token_counts, path)
    height, width = images.shape[-2:]
    attention_mask = torch.arange(boxes.shape[1], device=images.device) < token_counts[:, None]
    output = PartitionOutput(
        boxes=boxes,
        gaussians=boxes_to_gaussians(boxes, image_size=(height, width), sigma_scale=sigma_scale),
        attention_mask=attention_mask.to(torch.int64),
    )
    for check in checks:
        check.finish()
    return output


def start_value_checks(
    images: torch.Tensor | None, importance: torch.Tensor | None, name: str = "images"
) -> list[RangeCheck]:
    """The checks of values that `partition_images` makes; to be finished by the caller. Off CUDA they raise at once.

    Args:
        images: called `name` in messages; None leaves them out.
    """
    checks = []
    if images is not None:
        checks.append(RangeCheck(name, images.detach(), -1.0, 1.0, PIXEL_TOLERANCE))
    if importance is not None:
        checks.append(RangeCheck("importance", importance.detach().to(torch.float32), 0.0, math.inf))
    return checks


def _resolve_backend(backend: str, device: torch.device) -> str:
    """A backend's name -> the path that runs: "numba", "torch" or "triton"."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if backend == "triton" and not triton_is_available(device):
        raise ValueError(
            "backend 'triton' needs Triton and images on CUDA (elsewhere it runs under TRITON_INTERPRET=1 only), "
            f"got images on {device}"
        )
    if backend != "auto":
        return backend
    if device.type != "cuda":
        return "numba"
    return "triton" if triton_is_available(device) else "torch"


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
    counts = _token_counts(num_tokens, batch_size)
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


def _token_counts(num_tokens: int | Sequence[int], batch_size: int) -> list[int]:
    """One number of tokens for each image."""
    try:
        if isinstance(num_tokens, Sequence | np.ndarray | torch.Tensor) and np.ndim(num_tokens) > 0:
            counts = [operator.index(count) for count in num_tokens]
        else:
            counts = [operator.index(num_tokens)] * batch_size  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"num_tokens must be an integer or one for each image, got {num_tokens!r}") from None
    if len(counts) != batch_size:
        raise ValueError(f"num_tokens must hold one number per image, expected {batch_size}, got {len(counts)}")
    return counts


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
    token_counts: torch.Tensor,
    path: str,
) -> torch.Tensor:
    """Boxes `(B, L, 4)` int64 on the device of `images`, whose values nobody has checked yet."""
    _, _, height, width = images.shape
    max_count = max(counts, default=0)
    regions = region_tensors(height, width, min_region_size, images.device)
    score = triton_region_entropies if path == "triton" else region_entropies
    entropies = score(grey_images(images), regions)
    weights = None
    if importance is not None:
        weights = importance_sums(importance, regions.boxes[: regions.num_splittable])
    if path == "triton" and max_count <= MAX_CHOSEN:
        return triton_choose_boxes(entropies, weights, regions, token_counts, max_count, complexity_exponent)

    tree = region_tree(height, width, min_region_size)
    boxes = np.empty((len(counts), max_count, 4), dtype=np.int64)
    boxes[:] = tree.boxes[0]
    # One copy of both, so that the host waits once.
    both = torch.stack([entropies, torch.zeros_like(entropies) if weights is None else weights]).cpu().numpy()
    choose_regions(
        both[0], both[1], tree.boxes, tree.halves, np.array(counts, dtype=np.int64), complexity_exponent, boxes
    )
    return to_device(torch.from_numpy(boxes), images.device)
