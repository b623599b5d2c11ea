# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""The Gaussians of a token: fields, coordinates, logit space, boxes and tiles, as pure functions.

Letters: B batch, L tokens, C texture channels, H x W pixels of an image, N tiles.

A Gaussian is `[sigma_x, sigma_y, rho, mu_x, mu_y]`. Coordinates run from -1 to 1 along each axis, x to the right and
y down, with the centres of the corner pixels at -1 and 1. Sigma is in the same normalised units, 0 < sigma < 1, and
-1 < rho < 1. A token is a Gaussian followed by C texture features. See docs/conventions.md.
"""

from __future__ import annotations

import torch

GAUSSIAN_FIELDS = ("sigma_x", "sigma_y", "rho", "mu_x", "mu_y")
NUM_GAUSSIAN_PARAMS = len(GAUSSIAN_FIELDS)


def pixel_coordinates(
    num_pixels: int, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Normalised coordinate of every pixel centre along one axis, `2 i / (n - 1) - 1`; 0 for a single pixel.

    Computed in float64 and then cast: a float32 linspace differs by one unit in the last place at most positions.

    Returns:
        `(num_pixels,)` tensor from -1 to 1.
    """
    if num_pixels < 1:
        raise ValueError(f"an axis needs at least one pixel, got num_pixels={num_pixels}")
    if num_pixels == 1:
        return torch.zeros(1, device=device, dtype=dtype)
    index = torch.arange(num_pixels, device=device, dtype=torch.float64)
    return (2 * index / (num_pixels - 1) - 1).to(dtype)


def split_tokens(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens `(..., 5 + C)` -> Gaussians `(..., 5)` and texture `(..., C)`, as views."""
    return tokens[..., :NUM_GAUSSIAN_PARAMS], tokens[..., NUM_GAUSSIAN_PARAMS:]


def join_tokens(gaussians: torch.Tensor, texture: torch.Tensor) -> torch.Tensor:
    """Gaussians `(..., 5)` and texture `(..., C)` -> tokens `(..., 5 + C)`. The inverse of `split_tokens`."""
    return torch.cat([gaussians, texture.to(gaussians.dtype)], dim=-1)


def gaussians_to_logits(gaussians: torch.Tensor) -> torch.Tensor:
    """Gaussians `(..., 5)` -> unbounded logits of the same shape: `logit(sigma)` and `logit((1 + v) / 2)` for rho, mu.

    The logit of a value at (or beyond) the end of its range is infinite (or NaN): clamp first with
    `clamp_gaussians` where that can happen.
    """
    sigma, rho_mu = gaussians[..., :2], gaussians[..., 2:]
    return torch.cat([torch.logit(sigma), torch.logit((1 + rho_mu) / 2)], dim=-1)


def logits_to_gaussians(logits: torch.Tensor) -> torch.Tensor:
    """The inverse of `gaussians_to_logits`: `sigmoid` for sigma, `2 sigmoid - 1` for rho and mu."""
    return torch.cat([torch.sigmoid(logits[..., :2]), 2 * torch.sigmoid(logits[..., 2:]) - 1], dim=-1)


def refine_gaussians(init_gaussians: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """Initial Gaussians moved by `delta` in logit space (paper Sec. 3.2), both `(..., 5)`.

    Unlike the bare logit maps it is safe at the end of the ranges: a mean on the outermost pixel has an infinite
    logit, so its logit is taken of the nearest value inside the range.
    """
    return logits_to_gaussians(gaussians_to_logits(clamp_gaussians(init_gaussians, eps=1e-6)) + delta)


def clamp_gaussians(gaussians: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """Sigma into [eps, 1 - eps], rho and mu into [-1 + eps, 1 - eps]; `(..., 5)` in and out."""
    sigma = gaussians[..., :2].clamp(eps, 1 - eps)
    rho_mu = gaussians[..., 2:].clamp(-1 + eps, 1 - eps)
    return torch.cat([sigma, rho_mu], dim=-1)


def boxes_to_gaussians(boxes: torch.Tensor, image_size: tuple[int, int], sigma_scale: float = 2 / 3) -> torch.Tensor:
    """The initial Gaussian of every region (Eq. 4).

    Args:
        boxes: `(..., 4)` inclusive pixel indices `[x0, y0, x1, y1]`.
        image_size: `(H, W)`.
        sigma_scale: sigma in units of a region's extent, 2/3 as the authors' code has it, 1/3 for the paper's w/6
            pixels.

    Returns:
        `(..., 5)` float32: `sigma = (x1 - x0) / W * sigma_scale`, `rho = 0`, and mu at the region's centre. A region
        one pixel wide has no extent between its inclusive indices; half a pixel is taken, so that sigma > 0.
    """
    height, width = image_size
    x0, y0, x1, y1 = boxes.to(torch.float64).unbind(-1)
    sigma_x = (x1 - x0).clamp(min=0.5) / width * sigma_scale
    sigma_y = (y1 - y0).clamp(min=0.5) / height * sigma_scale
    # A single pixel along an axis is at coordinate 0 (see pixel_coordinates).
    mu_x = ((x0 + x1) / 2 / (width - 1) - 0.5) * 2 if width > 1 else torch.zeros_like(x0)
    mu_y = ((y0 + y1) / 2 / (height - 1) - 0.5) * 2 if height > 1 else torch.zeros_like(y0)
    return torch.stack([sigma_x, sigma_y, torch.zeros_like(mu_x), mu_x, mu_y], dim=-1).to(torch.float32)


def gaussians_to_frame(
    gaussians: torch.Tensor, tile_box: tuple[int, int, int, int], image_size: tuple[int, int]
) -> torch.Tensor:
    """Gaussians of one tile, in the tile's coordinates -> the coordinates of the whole image (the tile merge).

    A tile of `w` of the frame's `W` pixels that begins at pixel `x0` covers the share `w / W` of the axis:
    `sigma' = sigma w / W`, `mu' = -1 + (2 x0 + (mu + 1) w) / W`. For n equal tiles and column j this is the
    authors' `sigma / n` and `-1 + (2 j + mu + 1) / n`.

    Args:
        gaussians: `(..., 5)`.
        tile_box: `(y0, x0, h, w)` of the tile in pixels.
        image_size: `(H, W)` of the frame in pixels.
    """
    y0, x0, h, w = tile_box
    height, width = image_size
    sigma_x, sigma_y, rho, mu_x, mu_y = gaussians.unbind(-1)
    return torch.stack(
        [
            sigma_x * (w / width),
            sigma_y * (h / height),
            rho,
            -1 + (2 * x0 + (mu_x + 1) * w) / width,
            -1 + (2 * y0 + (mu_y + 1) * h) / height,
        ],
        dim=-1,
    )


def gaussians_from_frame(
    gaussians: torch.Tensor, tile_box: tuple[int, int, int, int], image_size: tuple[int, int]
) -> torch.Tensor:
    """The inverse of `gaussians_to_frame`: frame coordinates -> the coordinates of one tile."""
    y0, x0, h, w = tile_box
    height, width = image_size
    sigma_x, sigma_y, rho, mu_x, mu_y = gaussians.unbind(-1)
    return torch.stack(
        [
            sigma_x * (width / w),
            sigma_y * (height / h),
            rho,
            ((mu_x + 1) * width - 2 * x0) / w - 1,
            ((mu_y + 1) * height - 2 * y0) / h - 1,
        ],
        dim=-1,
    )


def morton_order(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Indices that sort points along the Z-curve (Morton order), the bits of y above those of x.

    Args:
        x, y: `(..., L)` non-negative integers below 2^31.

    Returns:
        `(..., L)` int64 permutation; equal points keep their order.
    """
    return torch.argsort(morton_code(x, y), dim=-1, stable=True)


def morton_code(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Position of points `(..., L)` along the Z-curve, int64: their bits in turn, those of y above those of x."""
    return _interleave_zeros(x) | (_interleave_zeros(y) << 1)


def _interleave_zeros(value: torch.Tensor) -> torch.Tensor:
    """Spread the low 31 bits of every integer to the even bit positions."""
    value = value.to(torch.int64)
    for shift, mask in (
        (16, 0x0000FFFF0000FFFF),
        (8, 0x00FF00FF00FF00FF),
        (4, 0x0F0F0F0F0F0F0F0F),
        (2, 0x3333333333333333),
        (1, 0x5555555555555555),
    ):
        value = (value | (value << shift)) & mask
    return value


def check_gaussians(gaussians: torch.Tensor, name: str = "gaussians") -> None:
    """Raise ValueError unless every Gaussian of `(..., 5)` is finite with 0 < sigma < 1 and -1 < rho < 1.

    The means may lie outside the frame. Reads the values, so on an accelerator it waits for the device.
    """
    if gaussians.shape[-1] != NUM_GAUSSIAN_PARAMS:
        raise ValueError(
            f"{name} must have {NUM_GAUSSIAN_PARAMS} values {list(GAUSSIAN_FIELDS)}, got {gaussians.shape[-1]}"
        )
    if not torch.isfinite(gaussians).all():
        raise ValueError(f"{name} must be finite, got NaN or infinite values")
    sigma, rho = gaussians[..., :2], gaussians[..., 2]
    if sigma.numel() and not ((sigma > 0) & (sigma < 1)).all():
        low, high = sigma.aminmax()
        raise ValueError(f"{name} must have 0 < sigma < 1, got sigma from {low.item():.6g} to {high.item():.6g}")
    if rho.numel() and not (rho.abs() < 1).all():
        low, high = rho.aminmax()
        raise ValueError(f"{name} must have -1 < rho < 1, got rho from {low.item():.6g} to {high.item():.6g}")


def gaussians_to_boxes(
    gaussians: torch.Tensor, image_size: tuple[int, int], sigma_scale: float = 2 / 3
) -> torch.Tensor:
    """The region that an initial Gaussian stands for: the inverse of `boxes_to_gaussians`.

    Args:
        gaussians: `(..., 5)`; rho is not used.
        image_size: `(H, W)`.

    Returns:
        `(..., 4)` int64 inclusive `[x0, y0, x1, y1]`, rounded to whole pixels and kept inside the image.
    """
    height, width = image_size
    sigma_x, sigma_y, _, mu_x, mu_y = gaussians.to(torch.float64).unbind(-1)

    def interval(sigma: torch.Tensor, mu: torch.Tensor, extent: int) -> tuple[torch.Tensor, torch.Tensor]:
        length = sigma / sigma_scale * extent
        # A length of half a pixel stands for one pixel (boxes_to_gaussians), whichever way float32 rounded it.
        length = torch.where(length < 0.75, 0, length.round())
        first = ((mu / 2 + 0.5) * (extent - 1) - length / 2).round().clamp(0, extent - 1)
        return first, (first + length).clamp(max=extent - 1)

    x0, x1 = interval(sigma_x, mu_x, width)
    y0, y1 = interval(sigma_y, mu_y, height)
    return torch.stack([x0, y0, x1, y1], dim=-1).to(torch.int64)


def gaussians_to_padded_frame(
    gaussians: torch.Tensor, image_size: tuple[int, int], padded_size: tuple[int, int], map_size: tuple[int, int]
) -> torch.Tensor:
    """Gaussians of an image -> the coordinates of the same image padded at its right and lower border.

    Pixel i keeps its place: `mu' = (mu + 1) r - 1`, `sigma' = sigma r` with `r = (W - 1) / (W' - 1)`. An axis on which
    the map has a single pixel has no places to tell apart and is left as it is.

    Args:
        gaussians: `(..., 5)`.
        image_size, padded_size: `(H, W)` before and after padding.
        map_size: `(h, w)` of the map that the padded image is decoded from.
    """
    if tuple(image_size) == tuple(padded_size):
        return gaussians
    ratio_y, ratio_x = (
        (size - 1) / (padded - 1) if map_extent > 1 else 1.0
        for size, padded, map_extent in zip(image_size, padded_size, map_size)
    )
    sigma_x, sigma_y, rho, mu_x, mu_y = gaussians.unbind(-1)
    return torch.stack(
        [sigma_x * ratio_x, sigma_y * ratio_y, rho, (mu_x + 1) * ratio_x - 1, (mu_y + 1) * ratio_y - 1], dim=-1
    )
