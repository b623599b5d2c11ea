# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""scikit-learn's digits as images of 32 x 32 pixels, and the classifier that judges generated ones.

Shapes: N images or samples, M references, D values of a vector.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from gpstoken_hf.metrics import FeatureStatistics, frechet_distance
from pipelines.shared.outputs import atomic_file

NUM_CLASSES = 10
IMAGE_SIZE = 32
NUM_IMAGES = 1797
NUM_TEST_IMAGES = 360
CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def load_digit_images() -> tuple[np.ndarray, np.ndarray]:
    """All NUM_IMAGES digits: grey (N, 8, 8) in [0, 16], labels (N,)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return data.images, data.target


def upscale(digits: np.ndarray) -> np.ndarray:
    """(N, 8, 8) in [0, 16] -> uint8 RGB (N, 32, 32, 3), bicubic; 16 becomes 255."""
    images = []
    for digit in digits:
        grey = Image.fromarray((digit * (255 / 16)).astype(np.float32), mode="F")
        grey = grey.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
        images.append(np.asarray(grey).clip(0, 255).round().astype(np.uint8))
    return np.repeat(np.stack(images)[..., None], 3, axis=-1)


def downscale(images: np.ndarray) -> np.ndarray:
    """uint8 RGB (N, 32, 32, 3) -> (N, 64) in [0, 16], for the classifier and the distances."""
    grey = images.astype(np.float64).mean(axis=-1)
    factor = IMAGE_SIZE // 8
    blocks = grey.reshape(-1, 8, factor, 8, factor).mean(axis=(2, 4))
    return blocks.reshape(-1, 64) * (16 / 255)


def split_digits(seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Upscaled images and labels of "train" and "test", the classes in equal proportion."""
    from sklearn.model_selection import train_test_split

    digits, labels = load_digit_images()
    images = upscale(digits)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=NUM_TEST_IMAGES, stratify=labels, random_state=seed
    )
    return {"train": (images[train], labels[train]), "test": (images[test], labels[test])}


def nearest_distances(queries: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Euclidean distances (N,) of queries (N, D) to their nearest references (M, D)."""
    squared = (queries**2).sum(1)[:, None] - 2 * queries @ references.T + (references**2).sum(1)[None]
    return np.sqrt(np.maximum(squared, 0).min(axis=1))


def fit_classifier(images: np.ndarray, labels: np.ndarray) -> Any:
    """An RBF support vector machine on 8 x 8 pixels."""
    from sklearn.svm import SVC

    return SVC(C=10.0, gamma=1e-3).fit(downscale(images), labels)


def evaluate(classifier: Any, images: np.ndarray, labels: np.ndarray, train_images: np.ndarray) -> dict[str, Any]:
    """The share of samples that is recognised as its class, and distances to the training images."""
    pixels, train_pixels = downscale(images), downscale(train_images)
    statistics = [FeatureStatistics.from_features(torch.from_numpy(part)) for part in (pixels, train_pixels)]
    correct = classifier.predict(pixels) == labels
    distances = nearest_distances(pixels, train_pixels)
    return {
        "accuracy": float(correct.mean()),
        "accuracy_per_class": [float(correct[labels == digit].mean()) for digit in range(NUM_CLASSES)],
        "frechet_distance": frechet_distance(*statistics),
        "nearest_distance_min": float(distances.min()),
        "nearest_distance_5_percent": float(np.quantile(distances, 0.05)),
        "nearest_distance_median": float(np.median(distances)),
    }


def save_sheet(images: np.ndarray, per_class: int, path: Path, shown: int = 20, scale: int = 2) -> None:
    """Write a contact sheet: one row per class, the first `shown` images of each, grey lines between them."""
    columns, line = min(shown, per_class), 1
    side = IMAGE_SIZE + line
    sheet = np.full((NUM_CLASSES * side + line, columns * side + line, 3), 96, dtype=np.uint8)
    for digit in range(NUM_CLASSES):
        for column in range(columns):
            top, left = digit * side + line, column * side + line
            sheet[top : top + IMAGE_SIZE, left : left + IMAGE_SIZE] = images[digit * per_class + column]
    picture = Image.fromarray(sheet).convert("L")
    with atomic_file(path) as staging:
        picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST).save(
            staging, optimize=True
        )


# -------------------------------------------------------------------------------------------------------- model card
