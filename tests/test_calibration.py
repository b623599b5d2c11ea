# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Calibration: legal for any means, and the identity on what a partition made."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_partition import random_image

from gpstoken_hf import calibrate_layout, partition_images
from gpstoken_hf.gaussians import boxes_to_gaussians
from gpstoken_hf.regions import max_regions, morton_order, region_centres

EVEN = [(256, 256, 8), (256, 256, 4), (64, 64, 8), (128, 64, 4), (192, 320, 8)]
UNEVEN = [(37, 301, 8), (37, 301, 3), (101, 99, 5), (17, 17, 2), (1, 300, 8), (75, 75, 8)]


def layout(height, width, min_region_size, num_tokens, seed):
    image = random_image(np.random.default_rng(seed), height, width)
    return partition_images(torch.from_numpy(image)[None], num_tokens, min_region_size=min_region_size)


def with_noise(gaussians, height, width, step_x, step_y, seed):
    """Means moved by up to half of `step` pixels (not reaching it)."""
    generator = torch.Generator().manual_seed(seed)
    noise = (torch.rand(*gaussians.shape[:2], 2, generator=generator, dtype=torch.float64) - 0.5) * 0.999
    moved = gaussians.to(torch.float64)
    moved[..., 3] += noise[..., 0] * step_x * 2 / max(width - 1, 1)
    moved[..., 4] += noise[..., 1] * step_y * 2 / max(height - 1, 1)
    return moved


def smallest_gap(num_pixels, min_region_size):
    """Pixels between the nearest two centres of an axis; any number will do if there is only one."""
    centres = region_centres(num_pixels, min_region_size)
    return np.diff(centres).min() / 2 if len(centres) > 1 else 1.0


@pytest.mark.parametrize(("height", "width", "min_region_size"), EVEN + UNEVEN)
def test_layouts_of_partitions_come_back_unchanged(height, width, min_region_size):
    largest = max_regions(height, width, min_region_size)
    for seed, num_tokens in enumerate({1, 2, largest // 3 + 1, largest // 2 + 1, largest - 1 or 1, largest}):
        expected = layout(height, width, min_region_size, num_tokens, seed)
        output = calibrate_layout(expected.gaussians, (height, width), min_region_size)
        assert torch.equal(output.boxes, expected.boxes)
        assert torch.equal(output.gaussians, expected.gaussians)


@pytest.mark.parametrize(("height", "width", "min_region_size"), EVEN)
def test_where_sides_halve_evenly_half_a_grid_step_of_noise_changes_nothing(height, width, min_region_size):
    steps = []
    for extent in (width, height):
        gaps = np.diff(region_centres(extent, min_region_size)) / 2
        assert (gaps == gaps[0]).all()
        side = extent
        while side - 1 > min_region_size:
            side //= 2
        assert gaps[0] == side / 2
        steps.append(gaps[0])
    for seed in range(5):
        expected = layout(height, width, min_region_size, max_regions(height, width, min_region_size) // 3, seed)
        noisy = with_noise(expected.gaussians, height, width, *steps, seed)
        output = calibrate_layout(noisy, (height, width), min_region_size)
        assert torch.equal(output.boxes, expected.boxes)
        assert torch.equal(output.gaussians, expected.gaussians)


@pytest.mark.parametrize(("height", "width", "min_region_size"), UNEVEN)
def test_elsewhere_half_the_smallest_gap_of_noise_changes_nothing(height, width, min_region_size):
    step_x, step_y = smallest_gap(width, min_region_size), smallest_gap(height, min_region_size)
    assert min(step_x, step_y) >= 0.5
    for seed in range(5):
        expected = layout(height, width, min_region_size, max_regions(height, width, min_region_size) // 2, seed)
        noisy = with_noise(expected.gaussians, height, width, step_x, step_y, seed)
        assert torch.equal(calibrate_layout(noisy, (height, width), min_region_size).boxes, expected.boxes)


def test_noise_beyond_the_grid_step_does_change_layouts():
    """The bound is not far from the truth: with eight times as much, layouts come out different."""
    expected = layout(256, 256, 8, 128, 0)
    noisy = with_noise(expected.gaussians, 256, 256, 32, 32, 0)
    assert not torch.equal(calibrate_layout(noisy).boxes, expected.boxes)


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 80),
    width=st.integers(1, 80),
    min_region_size=st.integers(1, 10),
    share=st.floats(0, 1),
    spread=st.sampled_from([0.0, 1e-3, 0.5, 10.0, 1e30, float("inf")]),
    seed=st.integers(0, 2**31),
)
def test_any_means_give_a_legal_layout(height, width, min_region_size, share, spread, seed):
    num_tokens = 1 + round(share * (max_regions(height, width, min_region_size) - 1))
    generator = torch.Generator().manual_seed(seed)
    gaussians = torch.nan_to_num(
        torch.randn(2, num_tokens, 5, generator=generator) * spread, nan=0.0, posinf=torch.inf
    )
    output = calibrate_layout(gaussians, (height, width), min_region_size)
    assert output.boxes.shape == (2, num_tokens, 4)
    assert torch.equal(output.gaussians, boxes_to_gaussians(output.boxes, (height, width)))
    for boxes in output.boxes:
        covered = np.zeros((height, width), dtype=int)
        for x0, y0, x1, y1 in boxes.tolist():
            covered[y0 : y1 + 1, x0 : x1 + 1] += 1
        assert (covered == 1).all()
        assert torch.equal(morton_order(boxes), torch.arange(num_tokens))
    # Legal means that a partition could have made it: calibration leaves it alone.
    if min_region_size > 1:
        again = calibrate_layout(output.gaussians, (height, width), min_region_size)
        assert torch.equal(again.boxes, output.boxes)


def test_tokens_go_where_the_means_are():
    gaussians = torch.zeros(1, 64, 5)
    gaussians[..., 3:] = -0.9
    boxes = calibrate_layout(gaussians).boxes[0]
    # All means in one corner: it is split down to the smallest regions, then the larger of the empty ones go first.
    assert [8, 8, 15, 15] in boxes.tolist()
    areas = (boxes[:, 2] - boxes[:, 0] + 1) * (boxes[:, 3] - boxes[:, 1] + 1)
    assert areas.sum() == 256 * 256
    assert areas[(boxes[:, 0] >= 128) & (boxes[:, 1] >= 128)].min() >= 1024


def test_order_of_the_tokens_means_nothing():
    expected = layout(256, 256, 8, 128, 3)
    shuffled = expected.gaussians[:, torch.randperm(128, generator=torch.Generator().manual_seed(0))]
    assert torch.equal(calibrate_layout(shuffled).boxes, expected.boxes)


def test_batch_gives_what_each_layout_gives_alone():
    gaussians = torch.randn(6, 50, 5, generator=torch.Generator().manual_seed(0))
    together = calibrate_layout(gaussians, (96, 160))
    for index in range(6):
        alone = calibrate_layout(gaussians[index : index + 1], (96, 160))
        assert torch.equal(together.boxes[index], alone.boxes[0])


def test_256_layouts_of_128_tokens_take_less_than_a_second_of_one_core():
    gaussians = torch.randn(256, 128, 5, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    # The first call compiles.
    calibrate_layout(gaussians[:1])
    begin = time.process_time()
    calibrate_layout(gaussians)
    assert time.process_time() - begin < 1


def test_sigma_scale_and_half_precision():
    expected = layout(256, 256, 8, 64, 1)
    scaled = calibrate_layout(expected.gaussians, sigma_scale=1 / 3).gaussians
    assert torch.equal(scaled, boxes_to_gaussians(expected.boxes, (256, 256), 1 / 3))
    # float16 keeps the means of 256 pixels well within half a grid step.
    assert torch.equal(calibrate_layout(expected.gaussians.half()).boxes, expected.boxes)


def test_a_single_pixel_column_may_come_back_elsewhere():
    """The one exception of the docstring: s_min = 1, where a column one pixel wide lies on a square's middle line."""
    boxes = torch.tensor([[[0, 0, 1, 4], [2, 0, 2, 1], [3, 0, 4, 1], [2, 2, 4, 4]]])
    gaussians = boxes_to_gaussians(boxes, (5, 5))
    assert not torch.equal(calibrate_layout(gaussians, (5, 5), min_region_size=1).boxes, boxes)


BAD_ARGUMENTS = {
    "unbatched": ({"gaussians": torch.zeros(4, 5)}, r"\(B, L, 5\).* got \(4, 5\)"),
    "four numbers": ({"gaussians": torch.zeros(1, 4, 4)}, r"\(B, L, 5\).* got \(1, 4, 4\)"),
    "array": ({"gaussians": np.zeros((1, 4, 5))}, "got ndarray"),
    "integers": ({"gaussians": torch.zeros(1, 4, 5, dtype=torch.int64)}, "floating point, got torch.int64"),
    "no tokens": ({"gaussians": torch.zeros(1, 0, 5)}, "at least 1 token .* got 0"),
    "nan": ({"gaussians": torch.full((1, 4, 5), torch.nan)}, "NaN, got 20 NaN"),
    "too many": (
        {"gaussians": torch.zeros(1, 17, 5), "image_size": (32, 32)},
        "number of Gaussians must be at most 16, .* got 17",
    ),
    "image size": ({"image_size": (0, 32)}, "at least 1 x 1 pixels, got"),
    "region size": ({"min_region_size": 0}, "at least 1 pixel, got 0"),
    "sigma scale": ({"sigma_scale": 2.0}, r"in \(0, 1\], got 2.0"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        calibrate_layout(**{"gaussians": torch.zeros(1, 4, 5), **arguments})
