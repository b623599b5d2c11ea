# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Statistics of network features, and what is computed from features: Fréchet distance, Inception Score, precision.

Shapes: N images, D features, K classes of the network.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Mapping
from typing import IO, Any

import numpy as np
import torch

from .gaussians import to_float64

# The names in the reference files of ADM's evaluator, by kind of features.
ADM_NAMES = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
MAX_FEATURES = 2**13
# Rows of a block of distances: 1000 x 50,000 float64 are 400 MB.
DISTANCE_ROWS = 1000
# What a damaged or hostile archive makes its readers raise.
DAMAGED = (zipfile.BadZipFile, zlib.error, KeyError, EOFError, ValueError, OverflowError, NotImplementedError)


class FeatureStatistics:
    """Mean and covariance of features that arrive batch by batch; the batch sizes do not change the result.

    Batches, and statistics of several processes, are joined in float64 by the pairwise update of Chan et al., which
    does not lose digits where the mean is large. Examples: see [`frechet_distance`].

    Attributes:
        count (`int` or `None`): number of images so far; `None` if the moments were given without it.
    """

    def __init__(self) -> None:
        self.count: int | None = 0
        self._mean: torch.Tensor | None = None  # (D,) float64
        self._scatter: torch.Tensor | None = None  # (D, D) float64: the sum of outer products about the mean

    @classmethod
    def from_moments(cls, mean: Any, covariance: Any, count: int | None = None) -> FeatureStatistics:
        """Statistics from a mean and a covariance that were computed elsewhere.

        Args:
            mean (`torch.Tensor` or `np.ndarray` of shape `(D,)`): the mean.
            covariance (`torch.Tensor` or `np.ndarray` of shape `(D, D)`): the unbiased covariance.
            count (`int`, *optional*): how many images they are of; without it nothing can be added to them.

        Raises:
            ValueError: if the shapes do not fit, a value is not finite, the covariance is not symmetric or `count` is
                below 2.
        """
        mean, covariance = (torch.as_tensor(value).detach().cpu().to(torch.float64) for value in (mean, covariance))
        if mean.ndim != 1 or not mean.numel() or covariance.shape != (len(mean), len(mean)):
            raise ValueError(
                "mean and covariance must have shapes (D,) and (D, D), "
                f"got {tuple(mean.shape)} and {tuple(covariance.shape)}"
            )
        if not (mean.isfinite().all() and covariance.isfinite().all()):
            raise ValueError("mean and covariance must be finite, got NaN or infinite values")
        scale = covariance.diagonal().abs().max()
        if (covariance - covariance.T).abs().max() > 1e-6 * scale or covariance.diagonal().min() < 0:
            raise ValueError("covariance must be symmetric with a diagonal >= 0, got another matrix")
        if count is not None and count < 2:
            raise ValueError(f"count must be at least 2, got {count}")
        statistics = cls()
        statistics.count, statistics._mean = count, mean
        statistics._scatter = covariance * (1 if count is None else count - 1)
        return statistics

    @classmethod
    def from_features(cls, features: torch.Tensor) -> FeatureStatistics:
        """Statistics of the features `(N, D)` of N images that are all at hand; see `update`."""
        statistics = cls()
        statistics.update(features)
        return statistics

    def update(self, features: torch.Tensor) -> None:
        """Add the features `(N, D)` of N images. They are detached and moved to the CPU.

        Raises:
            ValueError: if `features` is not `(N, D)` with the D of earlier batches, or has values that are not finite.
        """
        if features.ndim != 2 or 0 in features.shape:
            raise ValueError(f"features must have shape (N, D), got {tuple(features.shape)}")
        rows = to_float64(features.detach().cpu())
        if not rows.isfinite().all():
            raise ValueError("features must be finite, got NaN or infinite values")
        mean = rows.mean(dim=0)
        centred = rows - mean
        self._add(len(rows), mean, centred.T @ centred)

    def merge(self, other: FeatureStatistics) -> None:
        """Add the images of other statistics, such as another process's.

        Raises:
            ValueError: if the numbers of features differ, or `other` does not know its number of images.
        """
        if other.count is None:
            raise ValueError("other must know its number of images, got statistics read without it")
        if other.count:
            self._add(other.count, other.mean, other._known()[1])

    def _add(self, count: int, mean: torch.Tensor, scatter: torch.Tensor) -> None:
        if self.count is None:
            raise ValueError("statistics must know their number of images to be added to, got statistics without it")
        if self._mean is None or self._scatter is None:
            self.count, self._mean, self._scatter = count, mean.clone(), scatter.clone()
            return
        if len(mean) != len(self._mean):
            raise ValueError(f"features must have {len(self._mean)} columns as before, got {len(mean)}")
        total = self.count + count
        step = mean - self._mean
        self._scatter += scatter
        self._scatter.addr_(step, step, alpha=self.count * count / total)
        self._mean = self._mean + step * (count / total)
        self.count = total

    def _known(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._mean is None or self._scatter is None:
            raise ValueError("statistics must be of at least one image, got none")
        return self._mean, self._scatter

    @property
    def num_features(self) -> int:
        """The number of features, D."""
        return len(self._known()[0])

    @property
    def mean(self) -> torch.Tensor:
        """`(D,)` float64 on the CPU."""
        return self._known()[0]

    @property
    def covariance(self) -> torch.Tensor:
        """`(D, D)` float64 on the CPU, unbiased (divided by the number of images less one)."""
        scatter = self._known()[1]
        if self.count is None:
            return scatter
        if self.count < 2:
            raise ValueError(f"a covariance must be of at least 2 images, got {self.count}")
        return scatter / (self.count - 1)

    @property
    def is_rank_deficient(self) -> bool:
        """Whether there are too few images for a covariance of full rank. Fréchet distances are then too large."""
        return self.count is not None and self.count <= self.num_features

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The tensors from which `load_state_dict` resumes, bit for bit."""
        mean, scatter = self._known()
        return {"count": torch.tensor(self.count or 0), "mean": mean, "scatter": scatter}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Resume from a `state_dict`."""
        self.count = int(state["count"])
        self._mean, self._scatter = state["mean"].clone(), state["scatter"].clone()


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """Fréchet distance of two Gaussians, `|m1 - m2|² + tr C1 + tr C2 - 2 tr (C1 C2)^(1/2)`.

    With Inception's pooled features this is FID. With `C = A Aᵀ` the last trace is the sum of the singular values of
    `A1ᵀ A2`, where A comes from the eigenvalues of C. No root of a matrix is taken, so nothing turns complex.

    Args:
        first, second ([`FeatureStatistics`]): of the same features; the order does not matter.

    Returns:
        `float`: at least 0, and 0 for equal statistics.

    Raises:
        ValueError: if the numbers of features differ, or either is of fewer than 2 images.

    Examples:
        ```python
        >>> import torch
        >>> from gpstoken_hf.metrics import FeatureStatistics, frechet_distance

        >>> features = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
        >>> first, second = FeatureStatistics(), FeatureStatistics()
        >>> for batch in features.split(64):
        ...     first.update(batch)
        >>> second.update(features + 1.0)  # one for each of the 8 features
        >>> round(frechet_distance(first, second), 3)
        8.0

        ```
    """
    if first.num_features != second.num_features:
        raise ValueError(
            f"first and second must be of the same features, got {first.num_features} and {second.num_features}"
        )
    c1, c2 = first.covariance, second.covariance
    if torch.equal(first.mean, second.mean) and torch.equal(c1, c2):
        return 0.0
    cross = torch.linalg.svdvals(_factor(c1, first.count).T @ _factor(c2, second.count)).sum()
    distance = (first.mean - second.mean).square().sum() + c1.trace() + c2.trace() - 2 * cross
    return max(0.0, distance.item())


def _factor(covariance: torch.Tensor, count: int | None) -> torch.Tensor:
    """A `(D, rank)` with `A Aᵀ` the covariance."""
    values, vectors = torch.linalg.eigh(covariance)
    # Eigenvalues that are rounding errors would add their roots, which are not small.
    is_real = values > values[-1].clamp(min=0) * len(values) * torch.finfo(values.dtype).eps
    if count is not None and count <= len(values):
        is_real[: len(values) - (count - 1)] = False  # ascending: the rest is zero
    return vectors[:, is_real] * values[is_real].sqrt()


def inception_score(logits: torch.Tensor, num_splits: int = 10, seed: int = 2020) -> tuple[float, float]:
    """Inception Score of Salimans et al. 2016: `exp E KL(p(class | image), p(class))`, over splits of the images.

    Args:
        logits (`torch.Tensor` of shape `(N, K)`): of the network's classes; without their bias for Inception.
        num_splits (`int`, *optional*, defaults to 10): the score is the mean over as many parts of the images.
        seed (`int`, *optional*, defaults to 2020): of the order in which images are split, as in torch-fidelity.

    Returns:
        `tuple[float, float]`: mean and standard deviation over the splits.

    Raises:
        ValueError: if `logits` is not `(N, K)`, is not finite, or has fewer rows than splits.

    Examples:
        ```python
        >>> import torch
        >>> from gpstoken_hf.metrics import inception_score

        >>> sure = 50.0 * torch.eye(4).repeat(10, 1)  # ten images of each of four classes
        >>> mean, deviation = inception_score(sure, num_splits=1)
        >>> round(mean, 4)
        4.0

        ```
    """
    if logits.ndim != 2 or not logits.isfinite().all():
        raise ValueError(f"logits must be finite and of shape (N, K), got {tuple(logits.shape)}")
    if not 1 <= num_splits <= len(logits):
        raise ValueError(f"num_splits must be between 1 and the number of images, {len(logits)}, got {num_splits}")
    order = np.random.RandomState(seed).permutation(len(logits))  # the order of torch-fidelity
    logs = to_float64(logits.detach())[torch.from_numpy(order)].log_softmax(dim=1)
    scores = []
    for i in range(num_splits):
        part = logs[i * len(logs) // num_splits : (i + 1) * len(logs) // num_splits]
        divergence = (part.exp() * (part - part.exp().mean(dim=0).log())).sum(dim=1)
        scores.append(divergence.mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(samples: torch.Tensor, reference: torch.Tensor, num_neighbors: int = 3) -> tuple[float, float]:
    """Improved precision and recall of Kynkäänniemi et al. 2019.

    A set covers a point that is no farther from one of its points than this one's k-th neighbour in the set. Precision
    is the share of samples that the reference covers, recall the share of the reference that the samples cover.

    Args:
        samples (`torch.Tensor` of shape `(N, D)`): features of generated images.
        reference (`torch.Tensor` of shape `(M, D)`): features of real images.
        num_neighbors (`int`, *optional*, defaults to 3): k, at least 1.

    Returns:
        `tuple[float, float]`: precision and recall, in [0, 1].

    Raises:
        ValueError: if the shapes do not fit, a value is not finite, or a set has no more than k images.

    Examples:
        ```python
        >>> import torch
        >>> from gpstoken_hf.metrics import precision_recall

        >>> real = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
        >>> precision_recall(real[:20], real)  # good, but not everything
        (1.0, 0.905)

        ```
    """
    if samples.ndim != 2 or reference.ndim != 2 or samples.shape[1] != reference.shape[1]:
        raise ValueError(
            "samples and reference must have shapes (N, D) and (M, D), "
            f"got {tuple(samples.shape)} and {tuple(reference.shape)}"
        )
    if num_neighbors < 1 or min(len(samples), len(reference)) <= num_neighbors:
        raise ValueError(
            f"num_neighbors must be at least 1 and below the number of images, {len(samples)} samples and "
            f"{len(reference)} of the reference, got {num_neighbors}"
        )
    samples, reference = to_float64(samples.detach()), to_float64(reference.detach())
    if not (samples.isfinite().all() and reference.isfinite().all()):
        raise ValueError("samples and reference must be finite, got NaN or infinite values")

    def radii(points: torch.Tensor) -> torch.Tensor:
        # The nearest of all is the point itself.
        parts = [torch.cdist(rows, points).kthvalue(num_neighbors + 1).values for rows in points.split(DISTANCE_ROWS)]
        return torch.cat(parts)

    def covered(points: torch.Tensor, by: torch.Tensor) -> float:
        limit = radii(by)
        parts = [(torch.cdist(rows, by) <= limit).any(dim=1) for rows in points.split(DISTANCE_ROWS)]
        return torch.cat(parts).double().mean().item()

    return covered(samples, reference), covered(reference, samples)


# ---- Files of statistics --------------------------------------------------------------------------------------------


def write_statistics(path: str | os.PathLike[str] | IO[bytes], statistics: Mapping[str, FeatureStatistics]) -> None:
    """Write statistics as ADM's evaluator does, an `.npz` with `mu`, `sigma`, `mu_s` and `sigma_s`.

    Args:
        path (`str`, `os.PathLike` or binary file): the file, which is replaced.
        statistics (`Mapping[str, FeatureStatistics]`): by kind of features, "pool" and "spatial" (which may be
            absent). The numbers of images are written beside them.

    Raises:
        ValueError: if there is another kind, or no "pool".
    """
    if "pool" not in statistics or set(statistics) - set(ADM_NAMES):
        raise ValueError(f"statistics must be of 'pool' and at most 'spatial', got {sorted(statistics)}")
    arrays: dict[str, np.ndarray] = {}
    for kind, one in statistics.items():
        mean_name, covariance_name = ADM_NAMES[kind]
        arrays[mean_name], arrays[covariance_name] = one.mean.numpy(), one.covariance.numpy()
        if one.count is not None:
            arrays[f"num_images_{kind}"] = np.array(one.count, dtype=np.float64)
    np.savez(path, **arrays)  # type: ignore[arg-type]


def read_statistics(path: str | os.PathLike[str]) -> dict[str, FeatureStatistics]:
    """Read the statistics of an `.npz` file, such as ADM's reference batches. Nothing in it is unpickled.

    Args:
        path (`str` or `os.PathLike`): the file. Sizes are checked before an array is read.

    Returns:
        `dict[str, FeatureStatistics]`: by kind of features: "pool", and "spatial" if the file has it.

    Raises:
        ValueError: if the file is not such an archive, has no `mu` and `sigma`, or an array has another type or shape.
        OSError: if it cannot be read.
    """
    found = {}
    try:
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
            for kind, (mean_name, covariance_name) in ADM_NAMES.items():
                if f"{mean_name}.npy" not in names:
                    continue
                mean = _read_array(archive, mean_name, 1)
                covariance = _read_array(archive, covariance_name, 2)
                count_name = f"num_images_{kind}"
                count = int(_read_array(archive, count_name, 0)) if f"{count_name}.npy" in names else None
                found[kind] = FeatureStatistics.from_moments(mean, covariance, count)
    except DAMAGED as error:
        message = " ".join(str(error).split())
        raise ValueError(f"{path} must be an .npz file of statistics, got: {message}") from error
    if "pool" not in found:
        raise ValueError(f"{path} must hold the arrays mu and sigma, got {', '.join(sorted(names)[:8]) or 'nothing'}")
    return found


def _read_array(archive: zipfile.ZipFile, name: str, num_dims: int) -> np.ndarray:
    with archive.open(f"{name}.npy") as file:
        shape, is_fortran, dtype = read_array_header(file)
        if dtype.kind != "f" or len(shape) != num_dims or any(not 1 <= side <= MAX_FEATURES for side in shape):
            raise ValueError(f"{name} of {dtype} and shape {shape}")
        size = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        content = file.read(size)
    if len(content) != size:
        raise ValueError(f"{name} of {len(content)} bytes where its header says {size}")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if is_fortran else "C").astype(np.float64)


def read_array_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, order (whether Fortran's) and type of an array in NumPy's file format, from an open file.

    Raises:
        ValueError: if the file does not begin with such a header, or its version is not 1.0 or 2.0.
    """
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(file)
    raise ValueError(f"an array in version {version} of NumPy's format")
