# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Splatting on the CPU: every token over the pixels of its own box, in compiled loops (paper Eq. 1-3).

A unit of work is a band of pixel rows in the forward pass and a token in the backward pass. Threads share nothing, so
the result does not depend on their number. A band adds the tokens in their order and skips those whose boxes miss it.
No (token, pixel) weight outlives its row of pixels.

`t`, `v` and the moments are those of `splatting`.

The loops never assign an array to a slice: that compiles NumPy's broadcasting and its error messages, for 1.5 s.

Shapes: B batch, L tokens, C channels, h x w pixels of the map.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from .gaussians import pixel_coordinates
from .numba_support import compiled

# A band's accumulator is kept within this many bytes, so that it stays in a core's cache.
_BAND_BYTES = 1 << 18
# (token, pixel) pairs times channels below which starting threads costs more than it saves.
_MIN_THREADED_WORK = 1 << 21

# Sums over channels may be reordered and fused, so that they use vector instructions. _find_boxes rounds plainly, as
# the reference does: it decides which pixels are inside a box.
_LOOPS: dict[str, Any] = {"error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz"}}


@compiled(error_model="numpy")
def _find_boxes(
    gaussians: np.ndarray, mask: np.ndarray, x: np.ndarray, y: np.ndarray, support: float, boxes: np.ndarray
) -> int:
    """Fill `boxes` `(B, L, 4)` with the pixels inside each token's box, `[x0, y0, x1, y1)`; returns their number.

    The box of a padded token is empty.
    """
    num_pairs = 0
    for b in range(gaussians.shape[0]):
        for l in range(gaussians.shape[1]):
            num_inside = 1
            for axis in range(2):
                coordinates = x if axis == 0 else y
                num_pixels = coordinates.shape[0]
                mu, extent = gaussians[b, l, 3 + axis], support * gaussians[b, l, axis]
                # Start left of the box; the comparison with each coordinate decides.
                first = 0
                guess = (mu - extent + 1.0) * 0.5 * (num_pixels - 1) - 2.0
                if guess >= num_pixels or not mask[b, l]:
                    first = num_pixels
                elif guess > 0:
                    first = int(guess)
                while first < num_pixels and coordinates[first] - mu < -extent:
                    first += 1
                end = first
                while end < num_pixels and abs(coordinates[end] - mu) <= extent:
                    end += 1
                boxes[b, l, axis] = first
                boxes[b, l, 2 + axis] = end
                num_inside *= end - first
            num_pairs += num_inside
    return num_pairs


@compiled(**_LOOPS)
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
    L, C = features.shape[1], features.shape[2]
    h, w = y.shape[0], x.shape[0]
    num_bands = (h + band_height - 1) // band_height
    zero, one, minus_half = features.dtype.type(0), features.dtype.type(1), features.dtype.type(-0.5)
    band = np.empty((band_height, w, C), features.dtype)  # channels last: a pixel's features lie together
    t_x, weights = np.empty(w, features.dtype), np.empty(w, features.dtype)
    for index in range(start, stop):
        b = index // num_bands
        top = (index - b * num_bands) * band_height
        bottom = min(top + band_height, h)
        band[:] = zero
        for l in range(L):
            x0, x1 = boxes[b, l, 0], boxes[b, l, 2]
            y0, y1 = max(boxes[b, l, 1], top), min(boxes[b, l, 3], bottom)
            if y0 >= y1:
                continue
            sigma_x, sigma_y, rho = gaussians[b, l, 0], gaussians[b, l, 1], gaussians[b, l, 2]
            mu_x, mu_y = gaussians[b, l, 3], gaussians[b, l, 4]
            scale = one / math.sqrt((one - rho) * (one + rho))
            feature = features[b, l]
            for i in range(x0, x1):
                t_x[i] = (x[i] - mu_x) / sigma_x * scale
            for j in range(y0, y1):
                v = (y[j] - mu_y) / sigma_y
                t_y = rho * v * scale
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


@compiled(**_LOOPS)
def _reduce_tokens(
    grad: np.ndarray,
    gaussians: np.ndarray,
    features: np.ndarray,
    boxes: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    grad_gaussians: np.ndarray,
    grad_features: np.ndarray,
    start: int,
    stop: int,
) -> None:
    """Gradients of tokens `start` to `stop`, of the Gaussians `(B, L, 5)` and features `(B, L, C)`.

    `grad` is `(B, h, w, C)`. Sums along a row of pixels have the dtype of the data, sums over rows are float64.
    """
    L, C = features.shape[1], features.shape[2]
    w = x.shape[0]
    zero, one, minus_half = features.dtype.type(0), features.dtype.type(1), features.dtype.type(-0.5)
    t_x, weights = np.empty(w, features.dtype), np.empty(w, features.dtype)
    row_grad, token_grad = np.empty(C, features.dtype), np.empty(C, np.float64)
    for index in range(start, stop):
        b = index // L
        l = index - b * L
        x0, y0, x1, y1 = boxes[b, l, 0], boxes[b, l, 1], boxes[b, l, 2], boxes[b, l, 3]
        sigma_x, sigma_y, rho = gaussians[b, l, 0], gaussians[b, l, 1], gaussians[b, l, 2]
        mu_x, mu_y = gaussians[b, l, 3], gaussians[b, l, 4]
        scale = one / math.sqrt((one - rho) * (one + rho))
        feature = features[b, l]
        for i in range(x0, x1):
            t_x[i] = (x[i] - mu_x) / sigma_x * scale
        sum_t, sum_v, sum_tt, sum_tv, sum_vv = 0.0, 0.0, 0.0, 0.0, 0.0
        token_grad[:] = 0.0
        for j in range(y0, y1):
            v = (y[j] - mu_y) / sigma_y
            t_y = rho * v * scale
            for i in range(x0, x1):
                t = t_x[i] - t_y
                weights[i] = math.exp(minus_half * (t * t + v * v))
            row = grad[b, j]
            row_grad[:] = zero
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
        for c in range(C):
            grad_features[b, l, c] = token_grad[c]
        # As splatting_torch.gaussian_gradients. A padded token may hold NaN.
        if x0 == x1 or y0 == y1:
            sigma_x, sigma_y, rho, scale = one, one, zero, one
        grad_gaussians[b, l, 0] = (sum_tt + rho * scale * sum_tv) / sigma_x
        grad_gaussians[b, l, 1] = (sum_vv - rho * scale * sum_tv) / sigma_y
        grad_gaussians[b, l, 2] = scale * sum_tv - rho * scale * scale * sum_tt
        grad_gaussians[b, l, 3] = scale * sum_t / sigma_x
        grad_gaussians[b, l, 4] = (sum_v - rho * scale * sum_t) / sigma_y


@compiled(error_model="numpy")
def _to_channels_last(maps: np.ndarray, out: np.ndarray, start: int, stop: int) -> None:
    """`(B, C, h, w)` -> `(B, h, w, C)`, rows `start` to `stop`, counted over all images.

    Row by row, so that the values stay in the cache: four times as fast as PyTorch's copy of the permuted maps.
    """
    C, h, w = maps.shape[1], maps.shape[2], maps.shape[3]
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
    tokens = _as_arrays(gaussians, features)
    axes = _axes(gaussians, height, width)
    boxes, num_pairs = _boxes(tokens[0], attention_mask, axes, support)
    maps = features.new_empty(B, C, height, width)
    band_height = min(height, max(1, _BAND_BYTES // (width * C * features.element_size())))
    num_bands = B * -(-height // band_height)
    _share_out(_render_bands, (*tokens, boxes, *axes, maps.numpy(), band_height), num_bands, num_pairs * C)
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
    height, width = grad.shape[-2:]
    grad_gaussians, grad_features = gaussians.new_empty(B, L, 5), features.new_empty(B, L, C)
    results = grad_gaussians.numpy(), grad_features.numpy()
    maps, *tokens = _as_arrays(grad, gaussians, features)
    axes = _axes(gaussians, height, width)
    boxes, num_pairs = _boxes(tokens[0], attention_mask, axes, support)
    channels_last = np.empty((B, height, width, C), maps.dtype)
    _share_out(_to_channels_last, (maps, channels_last), B * height, maps.size)
    _share_out(_reduce_tokens, (channels_last, *tokens, boxes, *axes, *results), B * L, num_pairs * C)
    return grad_gaussians, grad_features


def _as_arrays(*tensors: torch.Tensor) -> list[np.ndarray]:
    return [tensor.detach().contiguous().numpy() for tensor in tensors]


def _axes(like: torch.Tensor, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates of the pixel columns `(w,)` and rows `(h,)`."""
    return pixel_coordinates(width, dtype=like.dtype).numpy(), pixel_coordinates(height, dtype=like.dtype).numpy()


def _boxes(
    gaussians: np.ndarray, attention_mask: torch.Tensor | None, axes: tuple[np.ndarray, np.ndarray], support: float
) -> tuple[np.ndarray, int]:
    """The boxes of the tokens and the number of their pixels, from `_find_boxes`."""
    B, L, _ = gaussians.shape
    mask = np.ones((B, L), np.bool_) if attention_mask is None else attention_mask.contiguous().numpy()
    boxes = np.empty((B, L, 4), np.int32)
    # The support in the dtype of the data: the reference rounds its product with sigma the same way.
    return boxes, _find_boxes(gaussians, mask, *axes, gaussians.dtype.type(support), boxes)


def _share_out(function: Callable[..., None], arguments: tuple[Any, ...], num_items: int, work: int) -> None:
    """Run `function(*arguments, start, stop)` over `num_items`, on torch's threads if the `work` is worth them."""
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
