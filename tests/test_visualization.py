# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Drawing: geometry against closed forms, and pictures that show what they should."""

import math

import numpy as np
import PIL.Image
import pytest
import torch

from gpstoken_hf.gaussians import boxes_to_gaussians
from gpstoken_hf.visualization import (
    COLOR_MAPS,
    colors_of,
    contact_sheet,
    draw_boxes,
    draw_error_map,
    draw_gaussians,
    ellipse_outlines,
    gaussians_to_pixels,
    panel,
    pixel_errors,
    tensor_to_pil,
)


@pytest.fixture
def grey():
    return PIL.Image.new("RGB", (61, 41), (128, 128, 128))


def changed_pixels(before, after):
    """(H, W) bool"""
    return (np.asarray(before.convert("RGB")) != np.asarray(after)).any(axis=-1)


# ------------------------------------------------------------------------------------------------------- geometry


def test_means_and_covariances_in_pixels():
    gaussians = torch.tensor([[0.5, 0.25, 0.0, -1.0, -1.0], [0.1, 0.2, 0.5, 1.0, 0.0], [0.1, 0.1, 0.0, 0.0, 1.0]])
    means, covariances = gaussians_to_pixels(gaussians, (41, 61))
    assert np.allclose(means, [[0, 0], [60, 20], [30, 40]])  # corners aligned
    assert np.allclose(covariances[0], [[15**2, 0], [0, 5**2]])
    assert np.allclose(covariances[1], [[9, 0.5 * 3 * 4], [0.5 * 3 * 4, 16]], atol=1e-6)


def test_without_aligned_corners_an_enlargement_has_the_same_drawing_enlarged():
    box = torch.tensor([[4, 2, 19, 9]])
    gaussians = boxes_to_gaussians(box, (20, 30), align_corners=False)
    for factor in (1, 3):
        means, covariances = gaussians_to_pixels(gaussians, (20 * factor, 30 * factor), align_corners=False)
        # Pixel centres are at whole numbers, so the first edge is at -0.5.
        assert np.allclose((means + 0.5) / factor, [[12, 6]])
        assert np.allclose(np.sqrt(np.diagonal(covariances[0])) / factor, [16 * 2 / 3 / 2, 8 * 2 / 3 / 2])
    image = PIL.Image.new("RGB", (30, 20))
    drawn = [draw_gaussians(image, gaussians, zoom=8, align_corners=aligned) for aligned in (True, False)]
    assert changed_pixels(*drawn).any()


def test_outline_is_the_level_set_of_the_gaussian():
    gaussians = torch.tensor([[0.2, 0.1, 0.0, 0.1, -0.2], [0.2, 0.3, 0.9, 0.0, 0.0], [0.05, 0.3, -0.7, -0.5, 0.5]])
    means, covariances = gaussians_to_pixels(gaussians, (41, 61))
    for reach in (1.0, 3.0):
        outlines = ellipse_outlines(means, covariances, reach, num_points=100)
        offset = outlines - means[:, None]
        distance = np.einsum("lpi,lij,lpj->lp", offset, np.linalg.inv(covariances), offset)
        assert np.allclose(distance, reach**2)
        # it touches the sides of the renderer's support, |dx| <= s sigma_x and |dy| <= s sigma_y
        extent = np.abs(ellipse_outlines(means, covariances, reach, num_points=4000) - means[:, None]).max(axis=1)
        assert np.allclose(extent, reach * np.sqrt(np.diagonal(covariances, axis1=1, axis2=2)), rtol=1e-5)


def test_a_single_column_of_pixels_has_no_width():
    means, covariances = gaussians_to_pixels(torch.tensor([[0.5, 0.5, 0.3, 0.0, 0.0]]), (9, 1))
    assert covariances[0, 0, 0] == 0.0
    assert np.isfinite(ellipse_outlines(means, covariances)).all()


# ------------------------------------------------------------------------------------------------- over an image


@pytest.mark.parametrize("zoom", [1, 2, 5])
def test_ellipse_is_drawn_where_the_gaussian_is(grey, zoom):
    gaussians = torch.tensor([[0.3, 0.2, 0.0, 0.2, -0.1]])
    picture = draw_gaussians(grey, gaussians, zoom=zoom, color=(255, 0, 0))
    assert picture.size == (61 * zoom, 41 * zoom)
    enlarged = grey.resize(picture.size)
    ys, xs = np.nonzero(changed_pixels(enlarged, picture))
    centre = (xs.mean() + 0.5) / zoom - 0.5, (ys.mean() + 0.5) / zoom - 0.5
    assert centre == pytest.approx((1.2 * 30, 0.9 * 20), abs=0.35)
    # half the extent: one sigma of 9 x 4 pixels, and the outline's own width and shade around it
    line = 3 / zoom + 0.5
    assert (np.ptp(xs) + 1) / zoom / 2 == pytest.approx(9 + line / 2, abs=line / 2 + 0.5)
    assert (np.ptp(ys) + 1) / zoom / 2 == pytest.approx(4 + line / 2, abs=line / 2 + 0.5)


def test_tilt_follows_rho_with_y_down(grey):
    """rho > 0: x and y grow together, so with y down the long axis runs from top left to bottom right."""
    picture = draw_gaussians(grey, torch.tensor([[0.3, 0.4, 0.95, 0.0, 0.0]]), color=(255, 0, 0))
    ys, xs = np.nonzero(changed_pixels(grey, picture))
    assert np.corrcoef(xs, ys)[0, 1] > 0.8
    picture = draw_gaussians(grey, torch.tensor([[0.3, 0.4, -0.95, 0.0, 0.0]]), color=(255, 0, 0))
    ys, xs = np.nonzero(changed_pixels(grey, picture))
    assert np.corrcoef(xs, ys)[0, 1] < -0.8


def test_support_is_three_times_as_wide(grey):
    gaussian = torch.tensor([[0.1, 0.1, 0.0, 0.0, 0.0]])
    narrow = changed_pixels(grey, draw_gaussians(grey, gaussian, num_sigmas=(1.0,), fill_opacity=0.0))
    wide = changed_pixels(grey, draw_gaussians(grey, gaussian, num_sigmas=(1.0, 3.0), fill_opacity=0.0))
    width, wider = (np.ptp(np.nonzero(mask)[1]) for mask in (narrow, wide))
    assert wider - width == pytest.approx(2 * (3 - 1) * 3, abs=1)
    assert wide[narrow].all()


def test_small_gaussians_are_on_top_and_brighter(grey):
    gaussians = torch.tensor([[0.05, 0.05, 0.0, 0.0, 0.0], [0.6, 0.6, 0.0, 0.0, 0.0]])
    both = np.asarray(draw_gaussians(grey, gaussians, fill_opacity=1.0)).astype(int)
    yellow, green = both[20, 30], both[20, 18]
    assert yellow.tolist() == list(COLOR_MAPS["viridis"][-1])
    assert green[0] < 100 < yellow[0]
    reverse = np.asarray(draw_gaussians(grey, gaussians.flip(0), fill_opacity=1.0)).astype(int)
    assert np.array_equal(both, reverse)


def test_padding_is_not_drawn_and_the_image_is_left_alone(grey):
    gaussians = torch.tensor([[0.1, 0.1, 0.0, -0.5, 0.0], [0.1, 0.1, 0.0, 0.5, 0.0]])
    picture = draw_gaussians(grey, gaussians, attention_mask=torch.tensor([1, 0]))
    assert not changed_pixels(grey, picture)[:, 31:].any()
    assert changed_pixels(grey, picture)[:, :30].any()
    assert np.asarray(grey).min() == np.asarray(grey).max() == 128
    boxes = torch.tensor([[0, 0, 10, 10], [40, 20, 50, 30]])
    picture = draw_boxes(grey, boxes, attention_mask=torch.tensor([1, 0]))
    assert not changed_pixels(grey, picture)[:, 15:].any()


def test_boxes_frame_their_inclusive_pixels(grey):
    picture = draw_boxes(grey, torch.tensor([[10, 5, 19, 14]]), zoom=8)
    assert picture.size == (488, 328)
    ys, xs = np.nonzero(changed_pixels(grey.resize(picture.size), picture))
    assert (xs.min() + xs.max() + 1) / 2 == pytest.approx(8 * 15, abs=0.5)  # pixels 10 to 19 span 80 to 160
    assert np.ptp(xs) + 1 == pytest.approx(80, abs=5)
    assert (ys.min() + ys.max() + 1) / 2 == pytest.approx(8 * 10, abs=0.5)


def test_initial_gaussians_lie_inside_their_boxes():
    boxes = torch.tensor([[0, 0, 31, 15], [32, 0, 63, 31], [0, 16, 31, 31]])
    means, covariances = gaussians_to_pixels(boxes_to_gaussians(boxes, (32, 64)), (32, 64))
    outlines = ellipse_outlines(means, covariances)
    for outline, (x0, y0, x1, y1) in zip(outlines, boxes.tolist()):
        assert ((outline >= [x0, y0]) & (outline <= [x1, y1])).all()


def test_large_canvases_are_not_oversampled():
    picture = draw_gaussians(PIL.Image.new("L", (2000, 1300)), torch.tensor([[0.1, 0.1, 0.0, 0.0, 0.0]]), zoom=2)
    assert picture.size == (4000, 2600)
    assert np.asarray(picture).any()


# ----------------------------------------------------------------------------------------------------- error maps


def test_errors_are_in_8_bit_levels():
    image = torch.zeros(3, 4, 5)
    other = image.clone()
    other[:, 1, 2] = 10 / 127.5
    other[0, 2, 3] = 30 / 127.5
    other[:, 3, 4] = 9.0  # outside the range: shown as the brightest that an image can hold
    errors = pixel_errors(image, other)
    assert errors[1, 2] == pytest.approx(10)
    assert errors[2, 3] == pytest.approx(30 / math.sqrt(3))
    assert errors[3, 4] == pytest.approx(127.5)
    assert errors[0].max() == 0.0


def test_error_map_and_its_bar():
    image = torch.zeros(3, 40, 50)
    ramp = torch.linspace(0, 20 / 127.5, 50).expand(3, 40, 50)
    picture = np.asarray(draw_error_map(image, ramp, max_error=20.0)).astype(int)
    assert picture.shape[0] == 40
    assert picture.shape[1] > 60
    assert picture[0, 0].tolist() == list(COLOR_MAPS["magma"][0])
    assert np.abs(picture[0, 49] - COLOR_MAPS["magma"][-1]).max() <= 1
    bar = picture[:, 58]
    assert bar[0].tolist() == list(COLOR_MAPS["magma"][-1])
    assert bar[-1].tolist() == list(COLOR_MAPS["magma"][0])
    assert (picture[:, 68:] < 100).any()  # the numbers
    clipped = np.asarray(draw_error_map(image, ramp * 5, max_error=20.0)).astype(int)
    assert clipped[0, 30].tolist() == list(COLOR_MAPS["magma"][-1])
    assert draw_error_map(image, ramp, zoom=3).height == 120


def test_equal_images_give_a_dark_map():
    image = torch.rand(3, 16, 16) * 2 - 1
    assert (np.asarray(draw_error_map(image, image))[:, :16] == COLOR_MAPS["magma"][0]).all()


def test_color_maps_run_from_dark_to_bright():
    for name in COLOR_MAPS:
        brightness = colors_of(np.linspace(0, 1, 50), name).astype(float).mean(axis=-1)
        assert (np.diff(brightness) > -1).all()
    assert colors_of(np.array([-1.0, 2.0])).tolist() == [[68, 1, 84], [253, 231, 37]]


def test_tensor_to_pil_rounds_and_clamps():
    picture = tensor_to_pil(torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).expand(3, 1, 5))
    assert np.asarray(picture)[0, :, 0].tolist() == [0, 0, 128, 255, 255]


# ------------------------------------------------------------------------------------------------ several pictures


def test_contact_sheet_shows_every_picture_whole():
    colors = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0), (0, 200, 200)]
    sizes = [(60, 40), (30, 50), (80, 20), (10, 10), (50, 50)]
    pictures = [PIL.Image.new("RGB", size, color) for size, color in zip(sizes, colors)]
    for titles, columns in ((None, None), (list("abcde"), 2), (["a long title"] * 5, 5), (None, 1), (None, 9)):
        sheet = np.asarray(contact_sheet(pictures, titles, columns=columns, footer="five pictures"))
        for size, color in zip(sizes, colors):
            assert (sheet == color).all(axis=-1).sum() == size[0] * size[1]


def test_panel_is_one_row(grey):
    row = panel([grey, grey, grey], ["one", "two", "three"], footer="scores")
    assert row.width > 3 * grey.width
    assert row.height < 2 * grey.height + 80
    dark = (np.asarray(row) < 60).all(axis=-1)
    assert dark[:12].any() or dark[:30].any()  # titles
    assert dark[-25:].any()  # footer


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda image: draw_gaussians(image, torch.zeros(2, 4)), "5 values"),
        (lambda image: draw_gaussians(image, torch.zeros(1, 2, 5)), r"\(L, 5\)"),
        (lambda image: draw_gaussians(image, torch.tensor([[0.1, 0.1, 1.0, 0.0, 0.0]])), "rho"),
        (lambda image: draw_gaussians(image, torch.tensor([[0.0, 0.1, 0.0, 0.0, 0.0]])), "sigma"),
        (lambda image: draw_gaussians(image, torch.tensor([[0.1, 0.1, 0, 0, 0]]), num_sigmas=()), "num_sigmas"),
        (lambda image: draw_gaussians(image, torch.tensor([[0.1, 0.1, 0, 0, 0]]), zoom=0), "zoom"),
        (lambda image: gaussians_to_pixels(torch.tensor([[0.1, 0.1, 0, 0, 0]]), (0, 4)), "0 x 4"),
        (lambda image: draw_boxes(image, torch.zeros(2, 5)), r"\(L, 4\)"),
        (lambda image: pixel_errors(torch.zeros(3, 4, 4), torch.zeros(3, 4, 5)), "one shape"),
        (lambda image: draw_error_map(torch.zeros(3, 4, 4), torch.zeros(3, 4, 4), max_error=0.0), "max_error"),
        (lambda image: tensor_to_pil(torch.zeros(1, 4, 4)), r"\(3, H, W\)"),
        (lambda image: colors_of(np.zeros(2), "jet"), "'jet'"),
        (lambda image: contact_sheet([]), "at least one"),
        (lambda image: contact_sheet([image], ["a", "b"]), "1 titles"),
        (lambda image: contact_sheet([image], columns=0), "columns"),
    ],
)
def test_bad_input(grey, call, message):
    with pytest.raises(ValueError, match=message):
        call(grey)
