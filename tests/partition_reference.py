# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""The plain NumPy/OpenCV partition (paper Sec. 3.2, Alg. 1, Eq. 4): one region, one OpenCV call at a time.

It is what `gpstoken_hf.partition` must reproduce and what `pipelines/benchmark_partition.py` times it against, so it
stays as simple as the algorithm itself: a list that is sorted again before every choice, no caches, no batches.
"""

from __future__ import annotations

import cv2
import numpy as np

HISTOGRAM_SIZE = 64
NUM_BINS = 512
MAGNITUDE_RANGE = (-5.5, 5.5)


def grey_image(image: np.ndarray) -> np.ndarray:
    """(3, H, W) RGB in [-1, 1] -> (H, W) float32 in [0, 1]."""
    red, green, blue = image.astype(np.float32)
    return (0.299 * red + 0.587 * green + 0.114 * blue + 1) / 2


def region_entropy(grey: np.ndarray) -> float:
    """Entropy in bits of the histogram of gradient magnitudes of one region, (h, w) float32."""
    resized = cv2.resize(grey, (HISTOGRAM_SIZE, HISTOGRAM_SIZE), interpolation=cv2.INTER_LINEAR)
    gradient_x = cv2.Sobel(resized, cv2.CV_64F, 1, 0, ksize=3, borderType=cv2.BORDER_REPLICATE)
    gradient_y = cv2.Sobel(resized, cv2.CV_64F, 0, 1, ksize=3, borderType=cv2.BORDER_REPLICATE)
    magnitude = np.sqrt(gradient_x**2 + gradient_y**2)
    counts, _ = np.histogram(magnitude, bins=NUM_BINS, range=MAGNITUDE_RANGE)
    q = counts / (counts.sum() + 1e-5)
    return float(-np.sum(q * np.log2(q + 1e-10)))


def region_complexity(grey, box, complexity_exponent=2.5, importance=None) -> float:
    """Eq. 4 for the inclusive box [x0, y0, x1, y1], plus the importance summed over it."""
    x0, y0, x1, y1 = box
    region = np.ascontiguousarray(grey[y0 : y1 + 1, x0 : x1 + 1])
    m = region_entropy(region) ** complexity_exponent * region.shape[0] * region.shape[1]
    if importance is not None:
        m += float(np.sum(importance[y0 : y1 + 1, x0 : x1 + 1], dtype=np.float64))
    return m


def partition_reference(image, num_tokens, complexity_exponent=2.5, min_region_size=8, importance=None) -> np.ndarray:
    """(3, H, W) in [-1, 1] -> (num_tokens, 4) inclusive boxes in the order in which the algorithm leaves them."""
    grey = grey_image(image)
    height, width = grey.shape

    def scored(box):
        return region_complexity(grey, box, complexity_exponent, importance), box

    def splittable(box):
        x0, y0, x1, y1 = box
        return x1 - x0 > min_region_size or y1 - y0 > min_region_size

    regions = [scored((0, 0, width - 1, height - 1))]
    while len(regions) < num_tokens:
        regions.sort(key=lambda region: -region[0])
        index = next((i for i, (_, box) in enumerate(regions) if splittable(box)), None)
        if index is None:
            raise ValueError(f"the image splits into at most {len(regions)} regions, got num_tokens={num_tokens}")
        x0, y0, x1, y1 = regions.pop(index)[1]
        w, h = x1 - x0 + 1, y1 - y0 + 1
        in_x = [(x0, y0, x0 + w // 2 - 1, y1), (x0 + w // 2, y0, x1, y1)]
        in_y = [(x0, y0, x1, y0 + h // 2 - 1), (x0, y0 + h // 2, x1, y1)]
        if w > h:
            children = [scored(box) for box in in_x]
        elif h > w:
            children = [scored(box) for box in in_y]
        else:
            scored_x, scored_y = [scored(box) for box in in_x], [scored(box) for box in in_y]
            children = scored_x if min(m for m, _ in scored_x) < min(m for m, _ in scored_y) else scored_y
        regions.extend(children)
    return np.array([box for _, box in regions], dtype=np.int64)
