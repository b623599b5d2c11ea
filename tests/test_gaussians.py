# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""The formulas of a token's Gaussian: inverses in float64, coordinates, Morton order, frames."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpstoken_hf.gaussians import (
    GAUSSIAN_FIELDS,
    boxes_to_gaussians,
    check_gaussians,
    clamp_gaussians,
    gaussians_from_frame,
    gaussians_to_boxes,
    gaussians_to_frame,
    gaussians_to_logits,
    gaussians_to_padded_frame,
    join_tokens,
    logits_to_gaussians,
    morton_order,
    pixel_coordinates,
    refine_gaussians,
    split_tokens,
)


def random_gaussians(*shape, seed=0, dtype=torch.float64):
    uniform = torch.rand(*shape, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    low = torch.tensor([0.01, 0.01, -0.99, -0.99, -0.99], dtype=torch.float64)
    return (low + uniform * (0.99 - low)).to(dtype)


def test_fields():
    assert GAUSSIAN_FIELDS == ("sigma_x", "sigma_y", "rho", "mu_x", "mu_y")


@pytest.mark.parametrize("num_pixels", [2, 3, 16, 37, 64, 256, 301])
def test_pixel_coordinates_are_rounded_once(num_pixels):
    expected = [2 * i / (num_pixels - 1) - 1 for i in range(num_pixels)]
    exact = pixel_coordinates(num_pixels, dtype=torch.float64)
    assert exact.tolist() == expected
    assert torch.equal(pixel_coordinates(num_pixels), torch.tensor(expected, dtype=torch.float64).float())
    assert exact[0] == -1
    assert exact[-1] == 1


def test_pixel_coordinates_of_one_pixel_and_of_none():
    assert pixel_coordinates(1).tolist() == [0.0]
    with pytest.raises(ValueError, match="at least one pixel, got num_pixels=0"):
        pixel_coordinates(0)


def test_tokens_split_and_join():
    tokens = torch.arange(2 * 3 * 9, dtype=torch.float32).view(2, 3, 9)
    gaussians, texture = split_tokens(tokens)
    assert gaussians.shape == (2, 3, 5)
    assert texture.shape == (2, 3, 4)
    assert torch.equal(join_tokens(gaussians, texture), tokens)
    # Half-precision texture joins the Gaussians' float32, not the other way round.
    assert join_tokens(gaussians, texture.bfloat16()).dtype == torch.float32


def test_logits_round_trip():
    gaussians = random_gaussians(4, 50)
    assert (logits_to_gaussians(gaussians_to_logits(gaussians)) - gaussians).abs().max() < 1e-14
    logits = torch.randn(4, 50, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3
    assert (gaussians_to_logits(logits_to_gaussians(logits)) - logits).abs().max() < 1e-10


def test_refinement_is_addition_in_logit_space():
    gaussians = random_gaussians(40)
    delta = torch.randn(40, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    refined = refine_gaussians(gaussians, delta)
    for g, d, r in zip(gaussians[:5].tolist(), delta[:5].tolist(), refined[:5].tolist()):
        for field in range(5):
            share = g[field] if field < 2 else (1 + g[field]) / 2
            moved = 1 / (1 + math.exp(-(math.log(share / (1 - share)) + d[field])))
            assert r[field] == pytest.approx(moved if field < 2 else 2 * moved - 1, abs=1e-12)
    assert (refine_gaussians(refined, -delta) - gaussians).abs().max() < 1e-9
    assert (refine_gaussians(gaussians, torch.zeros_like(delta)) - gaussians).abs().max() < 1e-12


def test_refinement_at_the_end_of_the_ranges_stays_legal_and_differentiable():
    gaussians = torch.tensor([[0.5, 0.5, 0.0, -1.0, 1.0], [1.0, 1e-9, 1.0, -1.0, -1.0]])
    delta = torch.full((2, 5), 0.5, requires_grad=True)
    refined = refine_gaussians(gaussians, delta)
    check_gaussians(refined)
    refined.sum().backward()
    assert torch.isfinite(delta.grad).all()


def test_clamp():
    wild = torch.tensor([[-1.0, 2.0, -3.0, 4.0, 0.25]])
    clamped = clamp_gaussians(wild, eps=1e-3)
    assert torch.allclose(clamped, torch.tensor([[1e-3, 1 - 1e-3, -1 + 1e-3, 1 - 1e-3, 0.25]]))
    gaussians = random_gaussians(30)
    assert torch.equal(clamp_gaussians(gaussians), gaussians)


def test_boxes_to_gaussians_by_hand():
    # 16 x 32 pixels, H x W: a box of inclusive indices (8, 4)-(15, 7).
    sigma_x, sigma_y, rho, mu_x, mu_y = boxes_to_gaussians(torch.tensor([8, 4, 15, 7]), (16, 32)).tolist()
    assert sigma_x == pytest.approx(7 / 32 * 2 / 3)
    assert sigma_y == pytest.approx(3 / 16 * 2 / 3)
    assert rho == 0
    assert mu_x == pytest.approx((11.5 / 31 - 0.5) * 2)
    assert mu_y == pytest.approx((5.5 / 15 - 0.5) * 2)
    paper = boxes_to_gaussians(torch.tensor([8, 4, 15, 7]), (16, 32), sigma_scale=1 / 3)
    assert paper[0].item() == pytest.approx(sigma_x / 2)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_boxes_round_trip_at_every_size(data):
    height, width = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 300))
    x0, y0 = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    x1, y1 = data.draw(st.integers(x0, width - 1)), data.draw(st.integers(y0, height - 1))
    boxes = torch.tensor([[x0, y0, x1, y1]])
    gaussians = boxes_to_gaussians(boxes, (height, width))
    check_gaussians(gaussians)
    assert gaussians_to_boxes(gaussians, (height, width)).tolist() == boxes.tolist()


@given(st.lists(st.tuples(st.integers(0, 2**31 - 1), st.integers(0, 2**31 - 1)), min_size=1, max_size=20))
def test_morton_order_is_that_of_the_interleaved_bits(points):
    def interleaved(point):
        x, y = point
        return sum(((x >> bit) & 1) << (2 * bit) | ((y >> bit) & 1) << (2 * bit + 1) for bit in range(31))

    x, y = torch.tensor(points).unbind(-1)
    expected = sorted(range(len(points)), key=lambda index: interleaved(points[index]))  # stable
    assert morton_order(x, y).tolist() == expected


def test_morton_order_of_a_square_is_the_z_curve():
    y, x = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    order = morton_order(x.flatten(), y.flatten())
    assert order[:8].tolist() == [0, 1, 4, 5, 2, 3, 6, 7]


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
    size, padded, map_size = (37, 301), (40, 304), (10, 76)
    index_x, index_y = torch.tensor([0.0, 150.0, 300.0]), torch.tensor([0.0, 18.0, 36.0])
    gaussians = torch.stack(
        [torch.full((3,), 0.1), torch.full((3,), 0.1), torch.zeros(3), index_x / 150 - 1, index_y / 18 - 1], -1
    )
    moved = gaussians_to_padded_frame(gaussians, size, padded, map_size)
    assert torch.allclose((moved[:, 3] + 1) / 2 * 303, index_x, atol=1e-4)
    assert torch.allclose((moved[:, 4] + 1) / 2 * 39, index_y, atol=1e-4)
    # sigma in pixels, of n - 1 pixels between the corners, stays too.
    assert torch.allclose(moved[:, 0] * 303, gaussians[:, 0] * 300)
    assert torch.allclose(moved[:, 1] * 39, gaussians[:, 1] * 36)
    assert gaussians_to_padded_frame(gaussians, size, size, map_size) is gaussians


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (0, 0.0, "0 < sigma < 1, got sigma from 0 to"),
        (1, -0.5, "0 < sigma < 1, got sigma from -0.5 to"),
        (1, 1.0, "0 < sigma < 1, got sigma from .* to 1"),
        (2, 1.0, "-1 < rho < 1, got rho from .* to 1"),
        (2, -1.5, "-1 < rho < 1, got rho from -1.5 to"),
        (3, float("nan"), "finite, got NaN or infinite"),
        (4, float("inf"), "finite, got NaN or infinite"),
    ],
)
def test_check_refuses(field, value, message):
    gaussians = random_gaussians(2, 3, dtype=torch.float32)
    check_gaussians(gaussians)
    gaussians[1, 2, field] = value
    with pytest.raises(ValueError, match=f"layout must (have|be) {message}"):
        check_gaussians(gaussians, "layout")


def test_check_wants_five_values_and_lets_means_leave_the_frame():
    with pytest.raises(ValueError, match=r"must have 5 values .*, got 4"):
        check_gaussians(torch.zeros(2, 4))
    check_gaussians(torch.tensor([[0.5, 0.5, 0.0, -3.0, 7.0]]))
    check_gaussians(torch.zeros(0, 5))
