# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""The formulas of a token's Gaussian: inverses in float64, coordinates, the region that it stands for."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import gpstoken_hf
from gpstoken_hf.gaussians import (
    GAUSSIAN_FIELDS,
    boxes_to_gaussians,
    check_gaussians,
    clamp_gaussians,
    gaussians_to_boxes,
    gaussians_to_logits,
    join_tokens,
    logits_to_gaussians,
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
    with pytest.raises(ValueError, match="num_pixels must be at least 1, got 0"):
        pixel_coordinates(0)


@pytest.mark.parametrize("num_pixels", [1, 2, 3, 37, 64])
def test_coordinates_without_aligned_corners_are_those_of_an_enlargement(num_pixels):
    coordinates = pixel_coordinates(num_pixels, dtype=torch.float64, align_corners=False)
    assert coordinates.tolist() == [(2 * i + 1) / num_pixels - 1 for i in range(num_pixels)]
    enlarged = pixel_coordinates(3 * num_pixels, dtype=torch.float64, align_corners=False)
    torch.testing.assert_close(enlarged[1::3], coordinates, rtol=0, atol=1e-15)
    torch.testing.assert_close(enlarged.view(-1, 3).mean(1), coordinates, rtol=0, atol=1e-15)


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
    for align_corners in (True, False):
        gaussians = boxes_to_gaussians(boxes, (height, width), align_corners=align_corners)
        check_gaussians(gaussians)
        assert gaussians_to_boxes(gaussians, (height, width), align_corners=align_corners).tolist() == boxes.tolist()


def test_an_enlargement_has_the_same_gaussians_without_aligned_corners():
    boxes = torch.tensor([[0, 0, 15, 31], [16, 0, 31, 31], [3, 5, 3, 9]])
    enlarged = torch.cat([boxes[:, :2] * 4, boxes[:, 2:] * 4 + 3], dim=1)
    expected = boxes_to_gaussians(boxes, (32, 32), align_corners=False)
    assert torch.equal(boxes_to_gaussians(enlarged, (128, 128), align_corners=False), expected)


class NoFloat64(TorchDispatchMode):
    """Raises when a float64 tensor appears on the meta device, which stands for one that has no float64."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.is_meta and result.dtype == torch.float64:
            raise AssertionError(f"{function} made a float64 tensor")
        return result


def test_no_float64_reaches_a_device_without_it(monkeypatch):
    monkeypatch.setattr(gpstoken_hf.gaussians, "DEVICES_WITHOUT_FLOAT64", {"meta"})
    # Meta tensors hold no values, so what is moved to the CPU is made there.
    monkeypatch.setattr(torch.Tensor, "to", to_from_meta)
    with NoFloat64():
        boxes = torch.empty(2, 3, 4, dtype=torch.int64, device="meta")
        gaussians = boxes_to_gaussians(boxes, (32, 32))
        assert gaussians.is_meta
        assert gaussians_to_boxes(gaussians, (32, 32)).is_meta
        assert pixel_coordinates(8, device="meta").is_meta
        with pytest.raises(AssertionError, match="made a float64 tensor"):
            torch.zeros(2, device="meta").double()


to_anywhere = torch.Tensor.to


def to_from_meta(tensor, *args, **kwargs):
    """`Tensor.to` that takes meta tensors to the CPU, as zeros."""
    target = torch.device(args[0]) if isinstance(args[0], str | torch.device) else tensor.device
    if tensor.is_meta and target.type == "cpu":
        tensor = torch.zeros(tensor.shape, dtype=tensor.dtype)
    return to_anywhere(tensor, *args, **kwargs)


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
