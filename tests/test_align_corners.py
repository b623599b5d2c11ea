# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Geometry that does not depend on the size: an image and its enlargement by pixel repetition."""

import pytest
import torch
from model_helpers import make_images, make_model, max_error
from test_gaussians import random_gaussians

from gpstoken_hf import GaussianLayout, GPSTokenConfig, calibrate_layout, splat_gaussians
from gpstoken_hf.gaussians import pixel_coordinates


def enlarged(images, factor):
    return images.repeat_interleave(factor, -1).repeat_interleave(factor, -2)


def test_the_same_regions_have_the_same_gaussians_and_region_features():
    model, images = make_model(align_corners=False), make_images(1, 32, 48)
    boxes = model.encode(images).layout.boxes
    small = GaussianLayout.from_boxes(boxes, (32, 48), align_corners=False)
    large_boxes = torch.cat([boxes[..., :2] * 4, boxes[..., 2:] * 4 + 3], dim=-1)
    large = GaussianLayout.from_boxes(large_boxes, (128, 192), align_corners=False)
    assert torch.equal(small.gaussians, large.gaussians)
    # RoIAlign averages over the same part of the picture: equal where it is constant over each region.
    read = model.encoder.region_features
    ramp = torch.linspace(-1, 1, 48).repeat(1, 32, 32, 1)  # (B, c, H, W), linear in x
    features = read(torch.nn.functional.interpolate(ramp, scale_factor=4, mode="bilinear"), large_boxes)
    inner = (boxes[0, :, 0] > 2) & (boxes[0, :, 2] < 45)  # away from the border, where interpolation stops
    assert inner.any()
    assert max_error(features[0, inner], read(ramp, boxes)[0, inner]) < 1e-5


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("factor", [2, 3])
def test_the_same_gaussians_have_a_map_that_is_the_enlarged_map(backend, factor):
    gaussians = random_gaussians(1, 6, seed=3).double()
    gaussians[..., :2] = gaussians[..., :2] * 0.3 + 0.2
    features = torch.randn(1, 6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    size = (10, 14)
    small = splat_gaussians(gaussians, features, size, 50.0, backend, align_corners=False)
    # Every pixel of the small map is the middle pixel of a block of the large one (odd factors).
    large = splat_gaussians(
        gaussians, features, (size[0] * factor, size[1] * factor), 50.0, backend, align_corners=False
    )
    if factor % 2:
        middle = large[..., factor // 2 :: factor, factor // 2 :: factor]
        torch.testing.assert_close(middle, small, rtol=0, atol=1e-9)
    # And the formula holds at every pixel centre.
    x, y = (pixel_coordinates(n * factor, dtype=torch.float64, align_corners=False) for n in (size[1], size[0]))
    sigma_x, sigma_y, rho, mu_x, mu_y = gaussians[0, :, :, None, None].unbind(1)
    u, v = (x - mu_x) / sigma_x, (y[:, None] - mu_y) / sigma_y
    weights = torch.exp(-(u**2 - 2 * rho * u * v + v**2) / (2 * (1 - rho**2)))
    torch.testing.assert_close(large[0], torch.einsum("lc,lhw->chw", features[0], weights), rtol=0, atol=1e-9)


def test_gradients_without_aligned_corners():
    gaussians = random_gaussians(1, 3, seed=4).requires_grad_()
    features = torch.randn(1, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda g, f: splat_gaussians(g, f, (5, 7), 60.0, align_corners=False), (gaussians, features)
    )


@torch.no_grad()
def test_a_model_draws_a_large_picture_where_it_draws_a_small_one():
    """The centre of mass of one bright token moves with the corners in one geometry and stays in the other."""
    shift = {}
    for align_corners in (True, False):
        model = make_model(align_corners=align_corners, norm_num_groups=8)
        tokens = torch.tensor([[[0.1, 0.1, 0.0, 0.7, -0.4, 1.0, 1.0, 1.0, 1.0]]])
        places = []
        for side in (32, 256):
            maps = model.render(tokens, (side // 2, side // 2))[0, 0]
            share = (torch.arange(maps.shape[-1]) + 0.5) / maps.shape[-1]
            places.append(((maps.sum(0) * share).sum() / maps.sum()).item())
        shift[align_corners] = abs(places[0] - places[1])
    assert shift[False] < 1e-3 < 0.01 < shift[True]


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 32), (37, 61)])
def test_a_partition_comes_back_from_calibration(size):
    model = make_model(align_corners=False)
    layout = model.encode(make_images(1, *size), num_tokens=12).layout
    back = calibrate_layout(layout.gaussians, size, min_region_size=4, align_corners=False)
    assert torch.equal(back.boxes, layout.boxes)
    assert torch.equal(back.gaussians, layout.gaussians)
    assert model(make_images(1, *size), num_tokens=12).sample.shape == (1, 3, *size)


def test_existing_checkpoints_keep_the_geometry_of_the_release():
    assert GPSTokenConfig().align_corners is True
    assert GPSTokenConfig.from_dict({"model_type": "gpstoken", "num_tokens": 4}).align_corners is True
