# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""The Fréchet distance between two sets of feature vectors, for curves while training.

Shapes: N and M vectors, D features.
"""

from __future__ import annotations

import numpy as np


def frechet_distance(samples: np.ndarray, references: np.ndarray) -> float:
    """Fréchet distance between normal distributions fitted to two sets of vectors.

    `|m_a - m_b|² + tr A + tr B - 2 tr (A B)^(1/2)`. The last trace is the sum of the singular values of `X Yᵀ` over
    `sqrt((N - 1)(M - 1))`, with the centred vectors as rows of X and Y, so no root of a matrix is taken.

    Args:
        samples (`np.ndarray`): (N, D), N at least 2.
        references (`np.ndarray`): (M, D), M at least 2.

    Returns:
        `float`: >= 0 up to rounding.

    Raises:
        ValueError: If the shapes do not fit or there are fewer than 2 vectors.

    Examples:

    ```python
    >>> import numpy as np
    >>> from training.frechet import frechet_distance

    >>> samples = np.array([[0.0, 0.0], [0.0, 2.0], [2.0, 0.0], [2.0, 2.0]])
    >>> round(frechet_distance(samples + 3.0, samples), 6)
    18.0
    ```
    """
    a, b = np.asarray(samples, dtype=np.float64), np.asarray(references, dtype=np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"samples and references must be (N, D) and (M, D), N, M >= 2, got {a.shape} and {b.shape}")
    shift = a.mean(0) - b.mean(0)
    a, b = (a - a.mean(0)) / np.sqrt(len(a) - 1), (b - b.mean(0)) / np.sqrt(len(b) - 1)
    # The singular values of X Yᵀ are those of R_x R_yᵀ, which are at most D x D.
    if min(len(a), len(b)) > a.shape[1]:
        a, b = (np.asarray(np.linalg.qr(rows, mode="r")) for rows in (a, b))
    root = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(shift @ shift + np.square(a).sum() + np.square(b).sum() - 2 * root)
