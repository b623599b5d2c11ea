# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Frames of tiles as inverses and as the paper's merge, tokens shared out over tiles."""

import pytest
import torch
from test_gaussians import random_gaussians

from gpstoken_hf.tiling import (
    gaussians_from_frame,
    gaussians_to_frame,
    gaussians_to_padded_frame,
    share_tokens,
    tiles_of_image,
)


def test_frames_are_inverses():
    gaussians = random_gaussians(3, 20)
    for tile, size in (((0, 0, 64, 64), (128, 128)), ((37, 100, 12, 201), (49, 301)), ((0, 0, 5, 7), (5, 7))):
        there = gaussians_to_frame(gaussians, tile, size)
        assert (gaussians_from_frame(there, tile, size) - gaussians).abs().max() < 1e-12


def test_frame_of_equal_tiles_is_the_papers_merge():
    gaussians = random_gaussians(20)
    n = 3
    for row in range(n):
        for column in range(n):
            frame = gaussians_to_frame(gaussians, (row * 64, column * 64, 64, 64), (n * 64, n * 64))
            assert torch.allclose(frame[:, :2], gaussians[:, :2] / n, atol=1e-14)
            assert torch.equal(frame[:, 2], gaussians[:, 2])
            assert torch.allclose(frame[:, 3], -1 + (2 * column + gaussians[:, 3] + 1) / n, atol=1e-14)
            assert torch.allclose(frame[:, 4], -1 + (2 * row + gaussians[:, 4] + 1) / n, atol=1e-14)


def test_frame_of_the_whole_image_changes_nothing():
    gaussians = random_gaussians(20)
    assert torch.allclose(gaussians_to_frame(gaussians, (0, 0, 37, 301), (37, 301)), gaussians, atol=1e-14)


def test_padded_frame_keeps_every_pixel_in_its_place():
    size = (37, 301)
    index_x, index_y = torch.tensor([0.0, 150.0, 300.0]), torch.tensor([0.0, 18.0, 36.0])
    gaussians = torch.stack(
        [torch.full((3,), 0.1), torch.full((3,), 0.1), torch.zeros(3), index_x / 150 - 1, index_y / 18 - 1], -1
    )
    moved = gaussians_to_padded_frame(gaussians, size, 4)  # to 40 x 304
    assert torch.allclose((moved[:, 3] + 1) / 2 * 303, index_x, atol=1e-4)
    assert torch.allclose((moved[:, 4] + 1) / 2 * 39, index_y, atol=1e-4)
    # sigma in pixels, of n - 1 pixels between the corners, stays too.
    assert torch.allclose(moved[:, 0] * 303, gaussians[:, 0] * 300)
    assert torch.allclose(moved[:, 1] * 39, gaussians[:, 1] * 36)
    assert gaussians_to_padded_frame(gaussians, size, 1) is gaussians


def test_padded_frame_without_aligned_corners():
    gaussians = random_gaussians(4)
    moved = gaussians_to_padded_frame(gaussians, (30, 62), 4, align_corners=False)  # to 32 x 64
    # A pixel edge at the share s of the axis is at s W / W' of the padded one.
    assert torch.allclose((moved[:, 3] + 1) * 64, (gaussians[:, 3] + 1) * 62)
    assert torch.allclose(moved[:, 1] * 32, gaussians[:, 1] * 30)


def test_tiles_of_an_image_lie_on_whole_map_pixels():
    grid, tiles = tiles_of_image((37, 75), 32, map_scale=4)
    assert grid.size == (10, 19)
    assert all(y0 % 4 == x0 % 4 == 0 and h <= 32 and w <= 32 for y0, x0, h, w in tiles)
    covered = torch.zeros(37, 75)
    for y0, x0, h, w in tiles:
        covered[y0 : y0 + h, x0 : x0 + w] += 1
    assert (covered == 1).all()


def test_tokens_are_shared_out():
    assert share_tokens([10, 4], 4) == [[3, 1], [3, 1], [2, 1], [2, 1]]
    with pytest.raises(ValueError, match="at least 1 for each of the 4 tiles, got 3"):
        share_tokens([10, 3], 4)
