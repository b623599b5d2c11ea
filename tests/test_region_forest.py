# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Regions as trees of halvings: which layouts are trees, and that they come back."""

import numpy as np
import pytest
import torch
from model_helpers import make_images, make_model

from gpstoken_hf.layout import GaussianLayout
from gpstoken_hf.partition import partition_images
from gpstoken_hf.region_forest import find_forest, read_forest


def there_and_back(layout, size, tile_size=None, config=None):
    mask = layout.attention_mask
    forest = find_forest(layout, mask, size, tile_size, 1, config)
    if forest is None:
        return None
    return forest, read_forest(
        forest.splits, forest.directions, mask, size, forest.tiles, forest.sigma_scale, forest.align_corners
    )


@pytest.mark.parametrize("size", [(64, 64), (37, 90), (1, 33), (1, 1)])
@pytest.mark.parametrize("align_corners", [True, False])
def test_partitions_come_back(size, align_corners):
    images = make_images(2, *size)
    count = 20 if min(size) > 1 else min(4, size[1])
    layout = partition_images(images, [count, 1], min_region_size=2, sigma_scale=1 / 3, align_corners=align_corners)
    forest, found = there_and_back(layout, size)
    assert torch.equal(found.boxes, layout.boxes)
    assert torch.equal(found.gaussians, layout.gaussians)
    assert torch.equal(found.attention_mask, layout.attention_mask)
    # Every region that is met costs one bit, and a square that is halved one more.
    assert len(forest.splits) <= 2 * (2 * count)
    assert forest.splits.sum() == count - 1


def test_tiles_come_back():
    model = make_model()
    layout = model.encode(make_images(2, 64, 48), [16, 9], tile_size=32).layout
    _, found = there_and_back(layout, (64, 48), 32, model.config)
    assert torch.equal(found.boxes, layout.boxes)
    assert torch.equal(found.gaussians, layout.gaussians)
    assert there_and_back(layout, (64, 48)) is None


def test_other_layouts_are_no_forests():
    layout = partition_images(make_images(1, 64, 64), 12)
    moved = layout.gaussians.clone()
    moved[0, 3, 3] += 1e-6
    shuffled = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    boxes = layout.boxes.clone()
    boxes[0, 5, 2] -= 1
    for other in (
        GaussianLayout(moved, layout.boxes),
        GaussianLayout(layout.gaussians[:, shuffled], layout.boxes[:, shuffled]),
        GaussianLayout.from_boxes(boxes, (64, 64)),
        GaussianLayout.from_boxes(layout.boxes[:, 1:], (64, 64)),
        GaussianLayout.from_boxes(torch.cat([layout.boxes, layout.boxes], 1), (64, 64)),
        GaussianLayout(layout.gaussians),
    ):
        assert there_and_back(other, (64, 64)) is None
    assert there_and_back(layout, (64, 64)) is not None
    assert there_and_back(layout, (64, 65)) is None


@pytest.mark.parametrize(
    ("splits", "directions", "message"),
    [
        ([], [], "got fewer"),
        ([1], [], "got fewer"),
        ([1, 0, 0, 0], [0], "got more"),
        ([1, 1, 1, 1, 1, 1], [0] * 9, "got more"),
        ([0], [], "2 regions, got 1"),
        ([1, 0, 0], [0, 1], "got more"),
    ],
)
def test_halvings_of_strangers_are_refused(splits, directions, message):
    with pytest.raises(ValueError, match=message):
        read_forest(
            np.array(splits, int), np.array(directions, int), torch.ones(1, 2, dtype=torch.int64), (8, 8),
            [(0, 0, 8, 8)], 2 / 3, True,
        )  # fmt: skip
