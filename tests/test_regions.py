# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Halving, the largest number of regions, centres, and Morton order."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpstoken_hf.regions import halve, is_splittable, max_regions, morton_order, region_centres, sort_regions


@pytest.mark.parametrize(
    ("box", "along_x"),
    [((0, 0, 7, 7), True), ((0, 0, 7, 7), False), ((2, 3, 8, 4), True), ((5, 5, 5, 6), False), ((0, 0, 2, 2), True)],
)
def test_halves_share_the_box_and_the_first_is_the_smaller(box, along_x):
    x0, y0, x1, y1 = box
    first, second = halve(*box, along_x)
    axis = 0 if along_x else 1
    assert first[:2] == (x0, y0)
    assert second[2:] == (x1, y1)
    assert first[axis + 2] + 1 == second[axis]
    extents = [half[axis + 2] - half[axis] + 1 for half in (first, second)]
    assert extents[1] - extents[0] == (extents[0] + extents[1]) % 2
    # The same on arrays, where numba is not involved.
    columns = [np.array([value, value + 10]) for value in box]
    arrays = getattr(halve, "py_func", halve)(*columns, along_x)
    assert [tuple(int(value[0]) for value in half) for half in arrays] == [first, second]


def test_splittable_is_about_inclusive_extents():
    assert not is_splittable(0, 0, 8, 8, 8)
    assert is_splittable(0, 0, 9, 0, 8)
    assert is_splittable(0, 0, 0, 9, 8)


@pytest.mark.parametrize(("size", "smallest", "expected"), [((256, 256), 8, 1024), ((1, 1), 8, 1), ((9, 9), 8, 1)])
def test_max_regions(size, smallest, expected):
    assert max_regions(*size, smallest) == expected


def test_centres_of_an_axis():
    assert region_centres(8, 2).tolist() == [1, 3, 5, 7, 9, 11, 13]
    assert region_centres(1, 8).tolist() == [0]


@given(st.lists(st.tuples(st.integers(0, 2**31 - 1), st.integers(0, 2**31 - 1)), min_size=1, max_size=20))
def test_morton_order_is_that_of_the_interleaved_bits(points):
    def interleaved(point):
        x, y = point
        return sum(((x >> bit) & 1) << (2 * bit) | ((y >> bit) & 1) << (2 * bit + 1) for bit in range(31))

    boxes = torch.tensor([(x, y, x, y) for x, y in points])
    expected = sorted(range(len(points)), key=lambda index: interleaved(points[index]))  # stable
    assert morton_order(boxes).tolist() == expected


def test_morton_order_of_a_square_is_the_z_curve():
    y, x = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    order = morton_order(torch.stack([x, y, x, y], dim=-1).flatten(0, 1))
    assert order[:8].tolist() == [0, 1, 4, 5, 2, 3, 6, 7]


def test_padding_is_sorted_to_the_end():
    boxes = torch.tensor([[[0, 0, 0, 0], [4, 4, 5, 5], [0, 4, 1, 5]]])
    mask = torch.tensor([[0, 1, 1]])
    assert sort_regions(boxes, mask)[0].tolist() == [[0, 4, 1, 5], [4, 4, 5, 5], [0, 0, 0, 0]]
