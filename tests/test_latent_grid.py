# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""The grid of a latent: which counts have one, the order of cells, round trips, tiles of cells."""

import pytest
import torch
from test_gaussians import random_gaussians

from gpstoken_hf.latent_grid import (
    LatentGrid,
    cell_order,
    cells_to_tokens,
    latent_grid,
    merge_tiles,
    split_tiles,
    tiles_of_cells,
    tokens_to_cells,
)


@pytest.mark.parametrize(
    ("num_tokens", "image_size", "expected"),
    [
        (64, 256, (8, 1, 32)),
        (128, 256, (8, 2, 32)),
        (256, 256, (16, 1, 16)),
        (32, 64, (4, 2, 16)),
        (16, 32, (4, 1, 8)),
        (4, 32, (2, 1, 16)),
        (12, 32, (2, 3, 16)),
        (36, 48, (6, 1, 8)),
        (1024, 32, (32, 1, 1)),
    ],
)
def test_the_finest_square_grid(num_tokens, image_size, expected):
    grid = latent_grid(num_tokens, image_size)
    assert (grid.side, grid.depth, grid.scale) == expected
    assert grid.side**2 * grid.depth == num_tokens
    assert grid.side * grid.scale == image_size


@pytest.mark.parametrize(("num_tokens", "image_size"), [(0, 32), (1, 32), (7, 256), (30, 256), (49, 256), (4, 1)])
def test_counts_without_a_grid_are_refused(num_tokens, image_size):
    with pytest.raises(ValueError, match=f"got num_tokens={num_tokens} and image_size={image_size}"):
        latent_grid(num_tokens, image_size)


def test_cells_lie_along_the_z_curve():
    position = cell_order(4, 4).argsort().view(4, 4)
    assert position.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert cell_order(2, 3).argsort().view(2, 3).tolist() == [[0, 1, 4], [2, 3, 5]]
    assert sorted(cell_order(5, 7).tolist()) == list(range(35))


def random_tokens(*shape: int) -> torch.Tensor:
    texture = torch.randn(*shape, 3, generator=torch.Generator().manual_seed(1))
    return torch.cat([random_gaussians(*shape).float(), texture], dim=-1)


@pytest.mark.parametrize(("size", "depth"), [((2, 2), 1), ((4, 4), 2), ((3, 5), 3), ((1, 1), 4)])
def test_cells_round_trip(size, depth):
    tokens = random_tokens(2, size[0] * size[1] * depth)
    cells = tokens_to_cells(tokens, size)
    assert cells.shape == (2, 8 * depth, *size)
    # The first cell holds the first tokens, one after the other.
    assert torch.equal(cells[:, 5:8, 0, 0], tokens[:, 0, 5:])
    assert torch.equal(cells[:, -3:, 0, 0], tokens[:, depth - 1, 5:])
    # Measured 6e-7: through logits and back.
    assert (cells_to_tokens(cells, depth) - tokens).abs().max() < 1e-5


@pytest.mark.parametrize("map_scale", [1, 4, 16])
def test_tiles_of_cells(map_scale):
    grid = LatentGrid(side=4, depth=2, scale=8)
    tiles, boxes = tiles_of_cells((7, 12), grid, map_scale)
    assert tiles.shape == (2, 3)
    assert tiles.size == (-(-7 * 8 // map_scale), -(-12 * 8 // map_scale))
    covered = torch.zeros(7, 12)
    for (y0, x0, h, w), (map_y, map_x, _, _) in zip(boxes, tiles.boxes()):
        assert h <= 4
        assert w <= 4
        assert (y0 * 8, x0 * 8) == (map_y * map_scale, map_x * map_scale)
        covered[y0 : y0 + h, x0 : x0 + w] += 1
    assert (covered == 1).all()


def test_tokens_of_tiles_round_trip():
    grid = LatentGrid(side=2, depth=2, scale=8)
    boxes = tiles_of_cells((3, 4), grid, 2)[1]
    parts = [random_tokens(2, h * w * 2) for _, _, h, w in boxes]
    merged = merge_tiles(parts, boxes, (3, 4))
    assert merged.shape == (2, 24, 8)
    for part, again in zip(parts, split_tiles(merged, boxes, (3, 4), depth=2)):
        assert (part - again).abs().max() < 1e-5
