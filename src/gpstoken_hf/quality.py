# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Quality on demand: the fewest tokens that reach a target, found with few reconstructions (docs/quality.md).

Shapes: B batch, L tokens, H x W pixels of an image.

`NestedPartition` holds the partitions of an image of every size, because each splits one region of the one before.
`CountSearch` chooses which number of tokens to try next. `predict_psnr` guesses the result without trying.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from .layout import GaussianLayout
from .metrics import psnr, ssim
from .regions import Box, sort_regions

# A reconstruction must exceed its target by this much, relative to the target. Rounding depends on how images are
# batched and padded, and moves a PSNR of 30 dB by about 1e-5 dB.
MARGIN = 1e-5
# Reconstructions that a search may take, over log2(max_tokens).
BUDGET_FACTOR = 1.3
# The predictor compares a partition with one of this many times the regions.
FINER = 4


# ---- Partitions of every size ---------------------------------------------------------------------------------------


class NestedPartition:
    r"""The partitions of a batch into 1, 2, ..., L regions. Each splits one region of the one before.

    Args:
        boxes (`torch.Tensor` of shape `(B, L, 4)`): regions in the order of the splits, from
            `partition.split_sequence`.
        image_size (`tuple[int, int]`): `(H, W)` in pixels.

    Examples:
        ```python
        >>> import torch
        >>> from gpstoken_hf.partition import split_sequence
        >>> from gpstoken_hf.quality import NestedPartition

        >>> images = torch.rand(1, 3, 64, 64) * 2 - 1
        >>> partition = NestedPartition(split_sequence(images, 32), (64, 64))
        >>> partition.boxes(0, 1).tolist(), partition.boxes(0, 20).shape
        ([[0, 0, 63, 63]], (20, 4))

        ```
    """

    def __init__(self, boxes: torch.Tensor, image_size: tuple[int, int]):
        self.image_size = image_size
        height, width = image_size
        corners = boxes.numpy()[:, :, :2]
        batch_size, self.max_tokens = corners.shape[:2]
        # Row k: the row of the region that split k halves, and its two halves.
        self.parents = np.zeros((batch_size, self.max_tokens), np.int64)
        self.halves = np.zeros((batch_size, self.max_tokens, 2, 4), np.int64)
        for image in range(batch_size):
            nodes: list[Box] = [(0, 0, width - 1, height - 1)]
            rows = [0]
            first_child: dict[int, int] = {}  # the second child comes next
            for k, (x, y) in enumerate(corners[image, 1:].tolist(), 1):
                node = 0  # the region that holds (x, y) now
                while node in first_child:
                    node = first_child[node]
                    x0, y0, _, _ = nodes[node + 1]
                    node += x >= x0 and y >= y0
                x0, y0, x1, y1 = nodes[node]
                # The second half begins at (x, y), so the axis that was halved is the one on which this is no corner.
                halves = ((x0, y0, x - 1, y1), (x, y0, x1, y1)) if x != x0 else ((x0, y0, x1, y - 1), (x0, y, x1, y1))
                first_child[node] = len(nodes)
                nodes += halves
                rows += [rows[node], k]
                self.parents[image, k], self.halves[image, k] = rows[node], halves

    def boxes(self, image: int, count: int) -> np.ndarray:
        """The `count` regions of one image, `(count, 4)` int64, in the order of the splits."""
        height, width = self.image_size
        boxes = np.tile(np.array([0, 0, width - 1, height - 1]), (count, 1))
        # A region may be halved again: the last half that is written to a row stays.
        rows = np.stack([self.parents[image, 1:count], np.arange(1, count)], axis=1).reshape(-1)
        boxes[rows] = self.halves[image, 1:count].reshape(-1, 4)
        return boxes

    def layout(
        self, images: Sequence[int], counts: Sequence[int], sigma_scale: float, align_corners: bool
    ) -> GaussianLayout:
        """What `partition_images` returns for some images with their counts, padded to the largest, on the CPU.

        Args:
            images (`Sequence[int]`): indices into the batch.
            counts (`Sequence[int]`): regions of each, at most L.
            sigma_scale (`float`): `sigma_scale` of the model's config.
            align_corners (`bool`): `align_corners` of the model's config.
        """
        parts = [sort_regions(torch.from_numpy(self.boxes(*pair)))[None] for pair in zip(images, counts)]
        return GaussianLayout.stack(
            [GaussianLayout.from_boxes(part, self.image_size, None, sigma_scale, align_corners) for part in parts]
        )

    def features(self, image: int, pixels: torch.Tensor, training_area: int, max_tokens: int) -> np.ndarray:
        """Numbers that tell the PSNR of one image for every number of tokens n, by `predict_psnr`.

        Two are the PSNR of an image that is constant in each of n and in each of `FINER` n regions. Each split removes
        the variance between its two halves, so all counts cost one summed-area table. The others are the size of the
        image and the tokens per pixel, both as octaves from those of the training, and products.

        Args:
            image (`int`): index into the batch.
            pixels (`torch.Tensor` of shape `(3, H, W)`): RGB in [-1, 1].
            training_area (`int`): pixels of an image of the training.
            max_tokens (`int`): the largest n. The partition must hold `FINER` times as many regions, or all.

        Returns:
            `np.ndarray` of shape `(max_tokens, 7)`: float64; row n - 1 is of n tokens.
        """
        height, width = self.image_size
        values = pixels.detach().double().cpu().numpy()
        table = np.zeros((3, height + 1, width + 1))
        table[:, 1:, 1:] = values.cumsum(1).cumsum(2)

        def energy(boxes: np.ndarray) -> np.ndarray:
            """Squared sums over the areas, `(..., 4)` -> `(...)`: the energy of the region's mean."""
            x0, y0, x1, y1 = np.moveaxis(boxes, -1, 0)
            sums = table[:, y1 + 1, x1 + 1] - table[:, y0, x1 + 1] - table[:, y1 + 1, x0] + table[:, y0, x0]
            return (sums**2).sum(0) / ((x1 - x0 + 1) * (y1 - y0 + 1))

        halves = self.halves[image, 1:]
        parents = np.concatenate([halves[:, 0, :2], halves[:, 1, 2:]], axis=-1)
        removed = energy(halves).sum(1) - energy(parents)
        left = (values**2).sum() - energy(np.array([[0, 0, width - 1, height - 1]])) - np.cumsum(np.r_[0.0, removed])
        error = np.maximum(left, 0) / values.size
        scores = 10 * np.log10(4 / (error + 1e-5))
        counts = np.arange(1, max_tokens + 1)
        flat, finer = scores[counts - 1], scores[np.minimum(FINER * counts, self.max_tokens) - 1]
        density = np.log2(counts * (training_area / (height * width)))
        size = np.full_like(flat, math.log2(height * width / training_area))
        return np.stack([np.ones_like(flat), flat, finer, density, size, flat * density, density**2], axis=1)


def predict_psnr(features: np.ndarray, weights: Sequence[float] | np.ndarray) -> np.ndarray:
    """The PSNR in dB that a model is expected to reach, from `NestedPartition.features` and its fitted weights."""
    return features @ np.asarray(weights)


# ---- The search -----------------------------------------------------------------------------------------------------


@dataclass
class CountSearch:
    """Chooses numbers of tokens to try until the fewest that reach the target are known.

    Args:
        low, high (`int`): the smallest and the largest number allowed.
        start (`int`): the number to try first.
        budget (`int`): how many numbers may be tried.

    A number n is the fewest if it reaches the target and n - 1 does not. Quality mostly grows with n up to a peak, but
    not strictly, so a smaller n may reach the target too. Within a bracket of a number that fails and one that passes
    the next guess is interpolated in log n, and kept where bisection can still finish within the budget. Before any
    number has passed the search goes up, and to the peak once quality falls again. `high` is tried before it gives up.
    """

    low: int
    high: int
    start: int
    budget: int
    tried: dict[int, float] = field(default_factory=dict)  # count -> quality - target

    def next_count(self) -> int | None:
        """The number to try next; `None` when the search is over."""
        left = self.budget - len(self.tried)
        if left <= 0:
            return None
        if not self.tried:
            return self._in_reach(self.start, self.low - 1, self.high + 1, left)
        passed = self.passed
        if passed is None:
            return self._next_upwards(left)
        failed = max((count for count in self.tried if count < passed), default=self.low - 1)
        return self._next_between(failed, passed, left) if passed - failed > 1 else None

    @property
    def passed(self) -> int | None:
        """The smallest number that has reached the target."""
        return min((count for count, excess in self.tried.items() if excess >= 0), default=None)

    @property
    def best(self) -> int:
        """The result: the smallest number that has reached the target, or else the number of highest quality."""
        return max(self.tried, key=lambda n: (self.tried[n], -n)) if self.passed is None else self.passed

    @staticmethod
    def _in_reach(guess: float, failed: int, passed: int, left: int) -> int:
        """A number in (failed, passed) near `guess` from where bisection can finish with `left` trials."""
        reach = 2 ** (left - 1)
        first, last = max(failed + 1, passed - reach), min(passed - 1, failed + reach)
        if first > last:
            return (failed + passed) // 2
        return min(max(round(guess), first), last)

    def _next_between(self, failed: int, passed: int, left: int) -> int:
        excess = self.tried[passed]
        if failed not in self.tried:  # nothing has failed yet
            return self._in_reach(passed / 2, failed, passed, left)
        share = -self.tried[failed] / (excess - self.tried[failed])
        octaves = math.log2(passed / failed)
        guess = failed * 2 ** (share * octaves)
        # Interpolation approaches from one side. A step beyond the guess closes the bracket from the other side.
        was_passed = self.tried[list(self.tried)[-1]] >= 0
        guess *= 2 ** ((-1 if was_passed else 1) * 0.1 * octaves)
        return self._in_reach(guess, failed, passed, left)

    def _next_upwards(self, left: int) -> int | None:
        counts = sorted(self.tried)
        best = max(counts, key=lambda n: (self.tried[n], n))
        place = counts.index(best)
        if self.high not in self.tried and left == 1:
            return self.high
        if best == counts[-1] and best < self.high:
            return self._in_reach(2 * best, best, self.high + 1, left)
        below = counts[place - 1] if place else self.low - 1
        above = counts[place + 1] if place + 1 < len(counts) else best
        gaps = [(a, b) for a, b in ((below, best), (best, above)) if b - a > 1]
        if gaps:
            a, b = max(gaps, key=lambda gap: math.log2(gap[1] / max(gap[0], 0.5)))
            return min(max(round(math.sqrt(max(a, 0.5) * b)), a + 1), b - 1)
        return None if self.high in self.tried else self.high


def search_budget(low: int, high: int, spare: int = 0) -> int:
    """How many numbers a search may try: `BUDGET_FACTOR` times log2 of `high`, less `spare` for other reconstructions.

    Bisection must be able to finish, and "none of them" is an answer too, so a small range may need one more.
    """
    return max(math.ceil(math.log2(high - low + 2)), math.floor(BUDGET_FACTOR * math.log2(high)) - spare)


# ---- What a target asks for -----------------------------------------------------------------------------------------

Metric = Callable[[torch.Tensor, torch.Tensor], Any]


@dataclass
class QualityTarget:
    """A metric and the value that it must reach. Build it with `quality_target`, which checks."""

    metric: Metric
    value: float

    def excess(self, images: torch.Tensor, samples: torch.Tensor) -> list[float]:
        """How far each image `(B, 3, H, W)` is above the target.

        Raises:
            ValueError: if the metric does not return one number, or returns NaN.
        """
        values = []
        for image, sample in zip(images.split(1), samples.split(1)):
            result = self.metric(image.float(), sample.float())
            try:
                value = float(result)
            except (TypeError, ValueError, RuntimeError):
                raise ValueError(f"metric must return one number per image, got {type(result).__name__}") from None
            if math.isnan(value):
                raise ValueError("metric must return a number, got NaN")
            values.append(value - self.value)
        return values

    @property
    def margin(self) -> float:
        """By how much a search asks for more, so that rounding does not undo it."""
        return MARGIN * max(1.0, abs(self.value))


def quality_target(
    target_psnr: float | None,
    target_ssim: float | None,
    metric: Metric | None,
    target: float | None,
    max_tokens: int | None,
    fast: bool,
) -> QualityTarget | None:
    """The target that the arguments of `encode` name; `None` if they name none.

    Raises:
        ValueError: if they name two, if a value is not a finite number, if `metric` and `target` do not come together,
            if `max_tokens` is below 1 or comes without a target, or if `fast` comes without `target_psnr`.
    """
    if fast and target_psnr is None:
        raise ValueError("fast must come with target_psnr, got True without it")
    if max_tokens is not None and (not isinstance(max_tokens, int | np.integer) or max_tokens < 1):
        raise ValueError(f"max_tokens must be an integer of at least 1, got {max_tokens!r}")
    if (metric is None) != (target is None):
        raise ValueError(
            "metric and target must be given together, got only " + ("target" if metric is None else "metric")
        )
    given = {
        name: (function, value)
        for name, function, value in (
            ("target_psnr", psnr, target_psnr),
            ("target_ssim", ssim, target_ssim),
            ("target", metric, target),
        )
        if value is not None
    }
    if len(given) > 1:
        raise ValueError(f"encode must have one target, got {' and '.join(given)}")
    for name, (function, value) in given.items():
        is_number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, got {value!r}")
        if name == "target_ssim" and value > 1:
            raise ValueError(f"target_ssim must be at most 1, got {value}")
        if not callable(function):
            raise ValueError(f"metric must be callable, got {type(function).__name__}")
        return QualityTarget(function, float(value))
    if max_tokens is not None:
        raise ValueError(f"max_tokens must come with a target, got {max_tokens} without one")
    return None


# ---- Encoding to a target -------------------------------------------------------------------------------------------


def encode_to_target(
    pixel_values: torch.Tensor,
    goal: QualityTarget,
    limits: tuple[int, int, int],
    encode: Callable[[list[int], list[int]], Any],
    decode: Callable[[Any], torch.Tensor],
) -> Any:
    """Find the fewest tokens of every image, all images of a batch at a time.

    Args:
        pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): RGB in [-1, 1].
        goal ([`QualityTarget`]): what the decoded images must reach.
        limits (`tuple[int, int, int]`): the smallest number of tokens, the first to try, and the largest.
        encode (`Callable`): indices of images and their numbers of tokens -> encoder output.
        decode (`Callable`): encoder output -> images `(b, 3, H, W)`.

    Returns:
        The output of `encode` for the whole batch, with `reached`.
    """
    low, start, high = limits
    batch_size = len(pixel_values)
    # A batch is encoded once more when all counts are known.
    budget = search_budget(low, high, spare=int(batch_size > 1))
    searches = [CountSearch(low, high, start, budget) for _ in range(batch_size)]
    kept = None
    while True:
        counts = {row: count for row, search in enumerate(searches) if (count := search.next_count()) is not None}
        if not counts:
            break
        encoded = encode(list(counts), list(counts.values()))
        excess = goal.excess(pixel_values[list(counts)], decode(encoded))
        for (row, count), above in zip(counts.items(), excess):
            searches[row].tried[count] = above - goal.margin
        if batch_size == 1 and searches[0].best == counts[0]:
            kept = encoded
    if kept is not None:
        kept.reached = torch.tensor([searches[0].passed is not None], device=pixel_values.device)
        return kept
    # Other images in a batch change the rounding, so the result is measured as it is returned.
    encoded = encode(list(range(batch_size)), [search.best for search in searches])
    reached = [above >= 0 for above in goal.excess(pixel_values, decode(encoded))]
    encoded.reached = torch.tensor(reached, device=pixel_values.device)
    return encoded


def predicted_counts(
    partition: NestedPartition,
    pixel_values: torch.Tensor,
    training_area: int,
    max_tokens: int,
    weights: Sequence[float],
    target: float,
) -> list[int]:
    """The fewest tokens of every image whose predicted PSNR reaches `target` in dB, or those of the highest one."""
    counts = []
    for image, pixels in enumerate(pixel_values):
        predicted = predict_psnr(partition.features(image, pixels, training_area, max_tokens), weights)
        passed = np.flatnonzero(predicted >= target)
        counts.append(1 + int(passed[0] if len(passed) else predicted.argmax()))
    return counts


__all__ = [
    "CountSearch",
    "NestedPartition",
    "QualityTarget",
    "encode_to_target",
    "predict_psnr",
    "predicted_counts",
    "quality_target",
    "search_budget",
]
