# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Splatting on the CPU: every token over the pixels of its own box, in compiled loops (paper Eq. 1-3).

The forward pass gives a band of pixel rows to each unit of work and adds the tokens in their order; the backward pass
gives it a token. So nothing is shared between threads, and the result does not depend on their number. Neither the
list of tokens of a tile nor any (token, pixel) weight is ever stored: a band scans the boxes of its image instead.

`t`, `v` and the moments are those of `splatting`. Shapes: B batch, L tokens, C channels, h x w pixels of the map.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import torch

from .gaussians import pixel_coordinates
from .splatting_torch import gaussian_gradients

# A band's accumulator is kept within this many bytes, so that it stays in a core's cache.
_BAND_BYTES = 1 << 18
# (token, pixel) pairs times channels below which starting threads costs more than it saves.
_MIN_THREADED_WORK = 1 << 21


def _compiled(fastmath: set[str] | bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`numba.njit` without the GIL, compiled at the first call and kept on disk where there is a place to keep it."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        options = {"nogil": True, "fastmath": fastmath, "error_model": "numpy"}
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:  # no folder that a cache could be written to: compile once per process
            return numba.njit(**options)(function)

    return decorate


# Sums over channels may be reordered and fused, so that they use vector instructions. Whether a pixel is in a box is
# decided in _find_boxes, with plain rounding, as in the reference.
_LOOPS = {"reassoc", "contract", "nsz"}


@_compiled(fastmath=False)
def _first_inside(coordinates: np.ndarray, mu: float, extent: float) -> int:
    """Index of the first pixel that is not left of the box; the length of the axis if there is none."""
    num_pixels = coordinates.shape[0]
    guess = (mu - extent + 1.0) * 0.5 * (num_pixels - 1) - 2.0
    first = 0
    if guess >= num_pixels:
        first = num_pixels
    elif guess > 0:
        first = int(guess)
    while first < num_pixels and coordinates[first] - mu < -extent:
        first += 1
    return first


@_compiled(fastmath=False)
def _find_boxes(
    gaussians: np.ndarray, mask: np.ndarray, x: np.ndarray, y: np.ndarray, support: float, boxes: np.ndarray
) -> int:
    """Fill `boxes` `(B, L, 4)` with the pixels inside each token's box, `[x0, y0, x1, y1)`; returns their number."""
    num_pairs = 0
    for b in range(gaussians.shape[0]):
        for l in range(gaussians.shape[1]):
            boxes[b, l, :] = 0
            if not mask[b, l]:
                continue
            sigma_x, sigma_y, _, mu_x, mu_y = gaussians[b, l]
            extent_x, extent_y = support * sigma_x, support * sigma_y
            x0 = _first_inside(x, mu_x, extent_x)
            y0 = _first_inside(y, mu_y, extent_y)
            x1, y1 = x0, y0
            while x1 < x.shape[0] and abs(x[x1] - mu_x) <= extent_x:
                x1 += 1
            while y1 < y.shape[0] and abs(y[y1] - mu_y) <= extent_y:
                y1 += 1
            boxes[b, l, 0], boxes[b, l, 1], boxes[b, l, 2], boxes[b, l, 3] = x0, y0, x1, y1
            num_pairs += (x1 - x0) * (y1 - y0)
    return num_pairs


@_compiled(fastmath=_LOOPS)
def _render_bands(
    gaussians: np.ndarray,
    features: np.ndarray,
    boxes: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    maps: np.ndarray,
    band_height: int,
    start: int,
    stop: int,
) -> None:
    """Write bands `start` to `stop` of `maps` `(B, C, h, w)`, counted over all images."""
    _, L, C = features.shape
    h, w = y.shape[0], x.shape[0]
    num_bands = (h + band_height - 1) // band_height
    one, minus_half = features.dtype.type(1), features.dtype.type(-0.5)
    band = np.empty((band_height, w, C), features.dtype)  # channels last: a pixel's features lie together
    t_x, weights = np.empty(w, features.dtype), np.empty(w, features.dtype)
    for index in range(start, stop):
        b = index // num_bands
        top = (index - b * num_bands) * band_height
        bottom = min(top + band_height, h)
        band[:] = 0
        for l in range(L):
            x0, x1 = boxes[b, l, 0], boxes[b, l, 2]
            y0, y1 = max(boxes[b, l, 1], top), min(boxes[b, l, 3], bottom)
            if y0 >= y1:
                continue
            sigma_x, sigma_y, rho, mu_x, mu_y = gaussians[b, l]
            scale = one / math.sqrt(one - rho * rho)
            feature = features[b, l]
            for i in range(x0, x1):
                t_x[i] = (x[i] - mu_x) / sigma_x * scale
            for j in range(y0, y1):
                v = (y[j] - mu_y) / sigma_y
                t_y = v * rho * scale
                for i in range(x0, x1):
                    t = t_x[i] - t_y
                    weights[i] = math.exp(minus_half * (t * t + v * v))
                row = band[j - top]
                for i in range(x0, x1):
                    pixel, weight = row[i], weights[i]
                    for c in range(C):
                        pixel[c] += weight * feature[c]
        for c in range(C):
            for j in range(top, bottom):
                for i in range(w):
                    maps[b, c, j, i] = band[j - top, i, c]


@_compiled(fastmath=_LOOPS)
def _reduce_tokens(
    grad: np.ndarray,
    gaussians: np.ndarray,
    features: np.ndarray,
    boxes: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    moments: np.ndarray,
    grad_features: np.ndarray,
    start: int,
    stop: int,
) -> None:
    """Moments `(B, L, 5)` and feature gradients `(B, L, C)` of tokens `start` to `stop`; `grad` is `(B, h, w, C)`.

    Sums along a row have the dtype of the data, sums over rows are float64.
    """
    _, L, C = features.shape
    w = x.shape[0]
    one, minus_half, zero = features.dtype.type(1), features.dtype.type(-0.5), features.dtype.type(0)
    t_x, weights = np.empty(w, features.dtype), np.empty(w, features.dtype)
    row_grad, token_grad = np.empty(C, features.dtype), np.empty(C, np.float64)
    for index in range(start, stop):
        b = index // L
        l = index - b * L
        x0, y0, x1, y1 = boxes[b, l]
        sigma_x, sigma_y, rho, mu_x, mu_y = gaussians[b, l]
        scale = one / math.sqrt(one - rho * rho)
        feature = features[b, l]
        for i in range(x0, x1):
            t_x[i] = (x[i] - mu_x) / sigma_x * scale
        sum_t, sum_v, sum_tt, sum_tv, sum_vv = 0.0, 0.0, 0.0, 0.0, 0.0
        token_grad[:] = 0
        for j in range(y0, y1):
            v = (y[j] - mu_y) / sigma_y
            t_y = v * rho * scale
            for i in range(x0, x1):
                t = t_x[i] - t_y
                weights[i] = math.exp(minus_half * (t * t + v * v))
            row = grad[b, j]
            row_grad[:] = 0
            row_A, row_At, row_Att = zero, zero, zero
            for i in range(x0, x1):
                pixel, weight, t = row[i], weights[i], t_x[i] - t_y
                product = zero
                for c in range(C):
                    row_grad[c] += weight * pixel[c]
                    product += pixel[c] * feature[c]
                A = weight * product
                row_A += A
                row_At += A * t
                row_Att += A * t * t
            for c in range(C):
                token_grad[c] += row_grad[c]
            sum_t += row_At
            sum_v += row_A * v
            sum_tt += row_Att
            sum_tv += row_At * v
            sum_vv += row_A * v * v
        moments[b, l, 0] = sum_t
        moments[b, l, 1] = sum_v
        moments[b, l, 2] = sum_tt
        moments[b, l, 3] = sum_tv
        moments[b, l, 4] = sum_vv
        grad_features[b, l, :] = token_grad


@_compiled(fastmath=False)
def _to_channels_last(maps: np.ndarray, out: np.ndarray, start: int, stop: int) -> None:
    """`(B, C, h, w)` -> `(B, h, w, C)`, rows `start` to `stop`, counted over all images.

    Row by row, which stays in the cache: in a quarter of the time that PyTorch's copy of the permuted maps takes.
    """
    _, C, h, w = maps.shape
    for index in range(start, stop):
        b = index // h
        j = index - b * h
        for c in range(C):
            for i in range(w):
                out[b, j, i, c] = maps[b, c, j, i]


def cpu_forward(
    gaussians: torch.Tensor,
    features: torch.Tensor,
    attention_mask: torch.Tensor | None,
    height: int,
    width: int,
    support: float,
) -> torch.Tensor:
    """Render Gaussians `(B, L, 5)` and features `(B, L, C)` into a map `(B, C, h, w)`."""
    B, _, C = features.shape
    h, w = height, width
    x, y = _axes(gaussians, h, w)
    arrays = _to_numpy(gaussians, features)
    boxes, num_pairs = _boxes(arrays[0], attention_mask, x, y, support)
    maps = features.new_empty(B, C, h, w)
    band_height = min(h, max(1, _BAND_BYTES // (w * C * features.element_size())))
    num_items = B * -(-h // band_height)
    arguments = (*arrays, boxes, x.numpy(), y.numpy(), maps.numpy(), band_height)
    _share_out(_render_bands, arguments, num_items, num_pairs * C)
    return maps


def cpu_backward(
    grad: torch.Tensor,
    gaussians: torch.Tensor,
    features: torch.Tensor,
    attention_mask: torch.Tensor | None,
    support: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the Gaussians `(B, L, 5)` and of the features `(B, L, C)` from that of the map `(B, C, h, w)`."""
    B, L, C = features.shape
    x, y = _axes(gaussians, *grad.shape[-2:])
    maps, *arrays = _to_numpy(grad, gaussians, features)
    boxes, num_pairs = _boxes(arrays[0], attention_mask, x, y, support)
    channels_last = grad.new_empty(B, y.shape[0], x.shape[0], C).numpy()
    _share_out(_to_channels_last, (maps, channels_last), B * y.shape[0], maps.size)
    moments, grad_features = torch.empty_like(gaussians).contiguous(), torch.empty_like(features).contiguous()
    arguments = (channels_last, *arrays, boxes, x.numpy(), y.numpy(), moments.numpy(), grad_features.numpy())
    _share_out(_reduce_tokens, arguments, B * L, num_pairs * C)
    return gaussian_gradients(gaussians, moments, attention_mask), grad_features


def _axes(like: torch.Tensor, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Coordinates of the pixel columns `(w,)` and rows `(h,)`."""
    return (
        pixel_coordinates(width, like.device, like.dtype),
        pixel_coordinates(height, like.device, like.dtype),
    )


def _to_numpy(*tensors: torch.Tensor) -> list[np.ndarray]:
    return [tensor.detach().contiguous().numpy() for tensor in tensors]


def _boxes(
    gaussians: np.ndarray, attention_mask: torch.Tensor | None, x: torch.Tensor, y: torch.Tensor, support: float
) -> tuple[np.ndarray, int]:
    B, L, _ = gaussians.shape
    mask = np.ones((B, L), np.bool_) if attention_mask is None else attention_mask.contiguous().numpy()
    boxes = np.empty((B, L, 4), np.int32)
    # The support in the dtype of the data: the reference rounds its product with sigma the same way.
    return boxes, _find_boxes(gaussians, mask, x.numpy(), y.numpy(), gaussians.dtype.type(support), boxes)


def _share_out(function: Callable[..., None], arguments: tuple[Any, ...], num_items: int, work: int) -> None:
    """Run `function(*arguments, start, stop)` over `num_items`, on torch's number of threads when it is worth it."""
    num_threads = min(torch.get_num_threads(), num_items)
    if num_threads == 1 or work < _MIN_THREADED_WORK:
        function(*arguments, 0, num_items)
        return
    # More shares than threads, as tokens differ in size. The pool lives as long as the call: a process that forks
    # later inherits no threads.
    num_shares = min(num_items, 4 * num_threads)
    cuts = [num_items * share // num_shares for share in range(num_shares + 1)]
    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(lambda start, stop: function(*arguments, start, stop), cuts[:-1], cuts[1:]))
