# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""The partition: image -> layout, small regions where the image is complex (paper Sec. 3.2, Alg. 1, Eq. 4).

Shapes: B batch, L tokens, H x W pixels of an image, w x h pixels of a region.

The complexity of a region is `m = entropy^lambda h w`, plus the importance summed over it. The entropy is that of the
histogram of gradient magnitudes after a resize to 64 x 64. Starting from the whole image, the region of largest m is
halved until there are L regions. The regions are exactly those of the plain algorithm written with NumPy and OpenCV
(tests/partition_reference.py): every rounding is reproduced, so that no near-tie falls the other way.

This module checks the arguments, chooses a backend and assembles the layout. `complexity_cpu`, `complexity_torch` and
`complexity_triton` compute.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import numpy as np
import torch

from .complexity_cpu import partition_compiled
from .complexity_torch import count_tensor, grey_images, importance_sums, region_entropies, region_tensors, to_device
from .complexity_triton import MAX_CHOSEN, triton_choose_boxes, triton_region_entropies
from .gaussians import boxes_to_gaussians
from .layout import GaussianLayout
from .numba_support import is_available as numba_is_available
from .regions import choose_regions, max_regions, region_tree, sort_regions
from .triton_support import is_available as triton_is_available

# Tuples, not unions of types: the oldest supported PyTorch cannot trace those. `operator.index` would read the value
# of a SymInt, and so fix the number of tokens of a traced program.
_TRACED_INTEGERS = (int, torch.SymInt)
_INTEGERS = (int, np.integer)
_SEQUENCES = (list, tuple)

BACKENDS = ("auto", "numba", "torch", "triton")

# Pixels may leave [-1, 1] by this much, more than the rounding of a resize in float32. 1 + 2^-17 is exact there.
PIXEL_TOLERANCE = 2.0**-17


def partition_images(
    images: torch.Tensor,
    num_tokens: int | Sequence[int],
    complexity_exponent: float = 2.5,
    min_region_size: int = 8,
    sigma_scale: float = 2 / 3,
    importance: torch.Tensor | None = None,
    align_corners: bool = True,
    backend: str = "auto",
    validate: bool = True,
) -> GaussianLayout:
    r"""Split every image into regions, small where it is complex, and place a Gaussian on each (Alg. 1, Eq. 4).

    A region is splittable while one of its inclusive extents is above `min_region_size`. It is halved along its longer
    side; a square is halved along the side that leaves the least complex half.

    All backends compute the same entropies, bit for bit. Sums of an importance map, and powers on CUDA, may differ in
    the last place, so regions whose complexities differ by less may be split in another order (docs/partition.md).

    Args:
        images (`torch.Tensor` of shape `(B, 3, H, W)`): floating point RGB in [-1, 1], any H and W.
        num_tokens (`int` or sequence of B `int`): regions of an image, for all images or for each.
        complexity_exponent (`float`, *optional*, defaults to 2.5): lambda of Eq. 4, at least 0.
        min_region_size (`int`, *optional*, defaults to 8): s_min in pixels, at least 1.
        sigma_scale (`float`, *optional*, defaults to 2/3): sigma over a region's extent; 2/3 in the authors' code, 1/3
            in the paper.
        importance (`torch.Tensor` of shape `(B, H, W)`, *optional*): weights >= 0, added per pixel to the complexity.
        align_corners (`bool`, *optional*, defaults to `True`): where pixels lie in normalised coordinates, see
            `gaussians`.
        backend (`str`, *optional*, defaults to `"auto"`): `"numba"` (compiled loops on the CPU, images shared out over
            `torch.get_num_threads()` threads), `"torch"` (batched tensor operations), `"triton"` (kernels on CUDA,
            which never synchronise) or `"auto"`: Triton for images on CUDA, numba otherwise, torch where these are
            not installed.
        validate (`bool`, *optional*, defaults to `True`): check the ranges of `images` and `importance`. Set to False
            if they are already validated; the Triton backend then never synchronises.

    Returns:
        [`GaussianLayout`]: on the device of `images`, in Morton order of the regions' top-left corners, padded to the
        largest number of regions in the batch.

    Raises:
        ValueError: if `images` is not a `(B, 3, H, W)` floating point tensor or leaves [-1, 1]; if `num_tokens` is
            below 1, not one per image or more than an image of this size can be split into; if another argument is out
            of its range; if `backend` is not available.

    Examples:
        ```python
        >>> import torch
        >>> from gpstoken_hf import partition_images

        >>> image = torch.zeros(1, 3, 64, 64)
        >>> image[:, :, :32, :32] = torch.rand(1, 3, 32, 32)  # one busy quarter
        >>> layout = partition_images(image, num_tokens=6)
        >>> layout.boxes[0].tolist()[:2]
        [[0, 0, 15, 15], [16, 0, 31, 15]]

        ```
    """
    counts = _check_arguments(images, num_tokens, complexity_exponent, min_region_size, sigma_scale, importance)
    path = _resolve_backend(backend, images.device)
    boxes = torch.ops.gpstoken.partition(
        images.detach(),
        counts,
        float(complexity_exponent),
        int(min_region_size),
        None if importance is None else importance.detach().to(torch.float32),
        validate,
        path,
    )
    attention_mask = None
    if any(count != counts[0] for count in counts):
        attention_mask = _mask_of(counts, images.device)
    gaussians = boxes_to_gaussians(boxes, (images.shape[2], images.shape[3]), sigma_scale, align_corners)
    return GaussianLayout(gaussians, boxes, attention_mask)


# ---- The op ---------------------------------------------------------------------------------------------------------


def _partition(
    images: torch.Tensor,
    counts: Sequence[int],
    complexity_exponent: float,
    min_region_size: int,
    importance: torch.Tensor | None,
    validate: bool,
    path: str,
) -> torch.Tensor:
    """Boxes `(B, L, 4)` int64 in Morton order, padding last. `counts` holds one number for all images, or B."""
    batch_size, _, height, width = images.shape
    check_region_count(max(counts, default=0), (height, width), min_region_size, "num_tokens")
    if batch_size == 0:
        return _partition_fake(images, counts, complexity_exponent, min_region_size, importance, validate, path)
    if validate:
        check_range("images", images, -1.0, 1.0, PIXEL_TOLERANCE)
        if importance is not None:
            check_range("importance", importance, 0.0, math.inf)
    counts = list(counts) * batch_size if len(counts) == 1 else list(counts)
    arguments = (images, counts, complexity_exponent, min_region_size, importance)
    if path == "triton" and max(counts) <= MAX_CHOSEN:
        return _choose_on_device(*arguments)
    boxes = partition_compiled(*arguments) if path == "numba" else _choose_on_host(*arguments, path)
    attention_mask = _mask_of(counts, images.device) if len(set(counts)) > 1 else None
    return sort_regions(to_device(boxes, images.device), attention_mask)


def _partition_fake(
    images: torch.Tensor,
    counts: Sequence[int],
    complexity_exponent: float,
    min_region_size: int,
    importance: torch.Tensor | None,
    validate: bool,
    path: str,
) -> torch.Tensor:
    return images.new_empty(images.shape[0], max(counts, default=0), 4, dtype=torch.int64)


def _mask_of(counts: Sequence[int], device: torch.device) -> torch.Tensor:
    """`(B, max(counts))` int64: 1 for a token, 0 for padding."""
    places = torch.arange(max(counts), device=device)
    return (places < count_tensor(list(counts), device)[:, None]).to(torch.int64)


# An op, so that compiled and exported programs hold the partition as one node: they cannot trace compiled loops, and
# which regions come out depends on the pixels. Ops are global to the process: a second copy of this module uses the
# op of the first.
if not hasattr(torch.ops.gpstoken, "partition"):
    torch.library.define(
        "gpstoken::partition",
        "(Tensor images, SymInt[] counts, float complexity_exponent, int min_region_size, Tensor? importance, "
        "bool validate, str path) -> Tensor",
        tags=(torch.Tag.pt2_compliant_tag,),
    )
    torch.library.impl("gpstoken::partition", "default", _partition)
    torch.library.register_fake("gpstoken::partition", _partition_fake)


@torch.compiler.disable
def split_sequence(
    images: torch.Tensor,
    num_tokens: int,
    complexity_exponent: float = 2.5,
    min_region_size: int = 8,
    importance: torch.Tensor | None = None,
) -> torch.Tensor:
    """The regions of `partition_images`, in the order of the splits, from which every smaller partition follows.

    The first half of a region takes over its row, and the second half gets the next free row. So row k holds a region
    whose top-left corner is that of the second half of split k (see `quality.NestedPartition`).

    Args:
        images, complexity_exponent, min_region_size, importance: as for `partition_images`, already validated.
        num_tokens (`int`): L, no more than the image size allows.

    Returns:
        `torch.Tensor` of shape `(B, L, 4)`: int64 inclusive pixels `[x0, y0, x1, y1]`, on the CPU.
    """
    importance = None if importance is None else importance.detach().to(torch.float32)
    arguments = (images.detach(), [num_tokens] * len(images), complexity_exponent, min_region_size, importance)
    path = _resolve_backend("auto", images.device)
    return partition_compiled(*arguments) if path == "numba" else _choose_on_host(*arguments, path)


def _choose_on_device(
    images: torch.Tensor,
    counts: list[int],
    complexity_exponent: float,
    min_region_size: int,
    importance: torch.Tensor | None,
) -> torch.Tensor:
    """Boxes `(B, L, 4)` int64 in Morton order. Everything is queued on the device; nothing is read back."""
    regions = region_tensors(images.shape[2], images.shape[3], min_region_size, images.device)
    entropies = triton_region_entropies(grey_images(images), regions)
    weights = None
    if importance is not None:
        weights = importance_sums(to_device(importance, images.device), regions.boxes[: regions.num_splittable])
    token_counts = count_tensor(counts, images.device)
    return triton_choose_boxes(entropies, weights, regions, token_counts, max(counts, default=0), complexity_exponent)


def _choose_on_host(
    images: torch.Tensor,
    counts: list[int],
    complexity_exponent: float,
    min_region_size: int,
    importance: torch.Tensor | None,
    path: str,
) -> torch.Tensor:
    """Boxes `(B, L, 4)` int64 on the CPU, unsorted. The scores are read back once, and the choices are made there."""
    # The scores need float64, which CUDA has; other accelerators may not.
    device = images.device if images.is_cuda or path == "triton" else torch.device("cpu")
    height, width = images.shape[2:]
    regions = region_tensors(height, width, min_region_size, device)
    score = triton_region_entropies if path == "triton" else region_entropies
    entropies = score(grey_images(images.to(device)), regions)
    weights = torch.zeros_like(entropies)
    if importance is not None:
        weights = importance_sums(to_device(importance, device), regions.boxes[: regions.num_splittable])
    scores = torch.stack([entropies, weights]).cpu().numpy()
    tree = region_tree(height, width, min_region_size)
    boxes = np.zeros((len(counts), max(counts, default=0), 4), dtype=np.int64)
    choose_regions(
        scores[0], scores[1], tree.boxes, tree.halves, np.array(counts, dtype=np.int64), complexity_exponent, boxes
    )
    return torch.from_numpy(boxes)


# ---- Arguments ------------------------------------------------------------------------------------------------------


def check_range(name: str, values: torch.Tensor, low: float, high: float, tolerance: float = 0.0) -> None:
    """Raise a ValueError unless all `values` are finite and in [low, high], give or take `tolerance`. Synchronises."""
    if values.numel() == 0:
        return
    smallest, largest = (extreme.item() for extreme in values.aminmax())  # NaN if any value is
    if low - tolerance <= smallest and largest <= high + tolerance and math.isfinite(largest):
        return
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise ValueError(f"{name} must be finite, got {bad} NaN or infinite values")
    expected = f"in [{low:g}, {high:g}]" if math.isfinite(high) else f"at least {low:g}"
    raise ValueError(f"{name} must be {expected}, got values from {smallest:.6g} to {largest:.6g}")


def check_images(name: str, images: torch.Tensor) -> None:
    """Raise a ValueError unless `images` is a floating point tensor of shape `(B, 3, H, W)`. Reads no pixel."""
    if not isinstance(images, torch.Tensor) or images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
        got = tuple(images.shape) if isinstance(images, torch.Tensor) else type(images).__name__
        raise ValueError(f"{name} must be a tensor of shape (B, 3, H, W), got {got}")
    if not images.is_floating_point():
        raise ValueError(f"{name} must be floating point in [-1, 1] (uint8 as x / 127.5 - 1), got {images.dtype}")


def check_importance(importance: torch.Tensor | None, images: torch.Tensor) -> None:
    """Raise a ValueError unless `importance` is None or a `(B, H, W)` tensor that fits `images`. Reads no value."""
    expected = (images.shape[0], *images.shape[2:])
    if importance is not None and not (isinstance(importance, torch.Tensor) and importance.shape == expected):
        got = tuple(importance.shape) if isinstance(importance, torch.Tensor) else type(importance).__name__
        raise ValueError(f"importance must be a tensor of shape (B, H, W) = {expected}, got {got}")


def token_counts(num_tokens: int | Sequence[int] | torch.Tensor, batch_size: int) -> int | list[int]:
    """The number of tokens of all images, or of each.

    Args:
        num_tokens (`int`, or sequence, array or tensor of B `int`): for all images or for each.
        batch_size (`int`): B.

    Returns:
        `int` or `list[int]`: one number for all images, or B numbers, as `num_tokens` is.

    Raises:
        ValueError: if a number is not an integer of at least 1, or there are not B of them.
    """
    counts: int | list[int]
    try:
        if isinstance(num_tokens, _TRACED_INTEGERS):
            counts = num_tokens
        elif not isinstance(num_tokens, _SEQUENCES) and np.ndim(num_tokens) == 0:
            counts = operator.index(num_tokens)  # type: ignore[arg-type]
        else:
            counts = [operator.index(count) for count in num_tokens]
    except TypeError:
        raise ValueError(f"num_tokens must be an integer or one integer per image, got {num_tokens!r}") from None
    if isinstance(counts, list) and len(counts) != batch_size:
        raise ValueError(f"num_tokens must be one number per image, {batch_size}, got {len(counts)} numbers")
    smallest = min(counts, default=1) if isinstance(counts, list) else counts
    if smallest < 1:
        raise ValueError(f"num_tokens must be at least 1, got {smallest}")
    return counts


def check_min_region_size(min_region_size: int) -> None:
    """Raise a ValueError unless `min_region_size` is an integer of at least 1."""
    if not (isinstance(min_region_size, _INTEGERS) and min_region_size >= 1):
        raise ValueError(f"min_region_size must be an integer of at least 1 pixel, got {min_region_size!r}")


def check_sigma_scale(sigma_scale: float) -> None:
    """Raise a ValueError unless `sigma_scale` is in (0, 1]."""
    if not 0 < sigma_scale <= 1:
        raise ValueError(f"sigma_scale must be in (0, 1], got {sigma_scale}")


def check_region_count(count: int, image_size: tuple[int, int], min_region_size: int, name: str) -> None:
    """Raise a ValueError if an image cannot be split into `count` regions. The message calls this number `name`."""
    height, width = image_size
    largest = max_regions(height, width, min_region_size)
    if count > largest:
        raise ValueError(
            f"{name} must be at most {largest}, the number of regions that an image of {height} x {width} pixels can "
            f"be split into with min_region_size={min_region_size}, got {count}"
        )


def _check_arguments(
    images: torch.Tensor,
    num_tokens: int | Sequence[int],
    complexity_exponent: float,
    min_region_size: int,
    sigma_scale: float,
    importance: torch.Tensor | None,
) -> list[int]:
    """Check all but the pixels and what the size of the image allows. Returns one count, or B."""
    check_images("images", images)
    counts = token_counts(num_tokens, images.shape[0])
    if not 0 <= complexity_exponent < math.inf:
        raise ValueError(f"complexity_exponent must be finite and at least 0, got {complexity_exponent}")
    check_min_region_size(min_region_size)
    check_sigma_scale(sigma_scale)
    check_importance(importance, images)
    return counts if isinstance(counts, list) else [counts]


def _resolve_backend(backend: str, device: torch.device) -> str:
    """The name of a backend -> the path that runs: "numba", "torch" or "triton"."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if backend == "triton" and not triton_is_available(device):
        raise ValueError(
            "backend must be available, got 'triton', which needs Triton and images on CUDA "
            f"(or TRITON_INTERPRET=1), with images on {device}"
        )
    if backend == "numba" and not numba_is_available():
        raise ValueError("backend must be available, got 'numba', which is not installed: pip install numba")
    if backend != "auto":
        return backend
    if device.type == "cuda":
        return "triton" if triton_is_available(device) else "torch"
    return "numba" if numba_is_available() else "torch"
