# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""The Gaussian of a token as formulas: its fields, coordinates, logit space, and the region it stands for.

Shapes: B batch, L tokens, C texture channels, H x W pixels of an image.

A Gaussian is `[sigma_x, sigma_y, rho, mu_x, mu_y]`. Coordinates run from -1 to 1 along each axis, x to the right and
y down. Sigma is in the same units, 0 < sigma < 1, and -1 < rho < 1. A token is a Gaussian followed by C texture
features. See docs/conventions.md.

Where pixels lie in these coordinates is a choice. With `align_corners=True`, as in the authors' code, the centres of
the first and the last pixel are at -1 and 1. With `align_corners=False` the outer edges of these pixels are, so that
an image and its enlargement have the same coordinates.
"""

from __future__ import annotations

import torch

GAUSSIAN_FIELDS = ("sigma_x", "sigma_y", "rho", "mu_x", "mu_y")
NUM_GAUSSIAN_PARAMS = len(GAUSSIAN_FIELDS)

# Apple's GPUs. `to_float64` moves to the CPU instead.
DEVICES_WITHOUT_FLOAT64 = frozenset({"mps"})


def to_float64(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in float64, moved to the CPU if its device has no float64."""
    if tensor.device.type in DEVICES_WITHOUT_FLOAT64:
        # Move first: a copy that also casts would cast on the device.
        tensor = tensor.to("cpu")
    return tensor.to(torch.float64)


def pixel_coordinates(
    num_pixels: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    align_corners: bool = True,
) -> torch.Tensor:
    """Normalised coordinate of every pixel centre along one axis.

    `2 i / (n - 1) - 1`, or `(2 i + 1) / n - 1` without `align_corners`; 0 for a single pixel. Computed in float64 on
    the CPU, then cast: a float32 linspace differs by one unit in the last place at most positions.

    Args:
        num_pixels (`int`): n, at least 1.
        device (`torch.device`, *optional*): device of the result.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): dtype of the result.
        align_corners (`bool`, *optional*, defaults to `True`): centres of the corner pixels at -1 and 1.

    Returns:
        `torch.Tensor` of shape `(num_pixels,)`: ascending, in [-1, 1].

    Raises:
        ValueError: if `num_pixels` is below 1.
    """
    if num_pixels < 1:
        raise ValueError(f"num_pixels must be at least 1, got {num_pixels}")
    index = torch.arange(num_pixels, dtype=torch.float64)
    if align_corners:
        coordinates = 2 * index / max(num_pixels - 1, 1) - (1 if num_pixels > 1 else 0)
    else:
        coordinates = (2 * index + 1) / num_pixels - 1
    return coordinates.to(dtype).to(device)


def split_tokens(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens `(..., 5 + C)` -> Gaussians `(..., 5)` and texture `(..., C)`, as views."""
    return tokens[..., :NUM_GAUSSIAN_PARAMS], tokens[..., NUM_GAUSSIAN_PARAMS:]


def join_tokens(gaussians: torch.Tensor, texture: torch.Tensor) -> torch.Tensor:
    """Gaussians `(..., 5)` and texture `(..., C)` -> tokens `(..., 5 + C)`: the inverse of `split_tokens`."""
    return torch.cat([gaussians, texture.to(gaussians.dtype)], dim=-1)


def gaussians_to_logits(gaussians: torch.Tensor) -> torch.Tensor:
    """Gaussians `(..., 5)` -> unbounded logits of the same shape: `logit(sigma)` and `logit((1 + v) / 2)` for rho, mu.

    The logit is infinite at the ends of a range and NaN beyond them. Apply `clamp_gaussians` first where that can
    happen.
    """
    sigma, rho_mu = gaussians[..., :2], gaussians[..., 2:]
    return torch.cat([torch.logit(sigma), torch.logit((1 + rho_mu) / 2)], dim=-1)


def logits_to_gaussians(logits: torch.Tensor) -> torch.Tensor:
    """The inverse of `gaussians_to_logits`: `sigmoid` for sigma, `2 sigmoid - 1` for rho and mu."""
    return torch.cat([torch.sigmoid(logits[..., :2]), 2 * torch.sigmoid(logits[..., 2:]) - 1], dim=-1)


def refine_gaussians(init_gaussians: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """Move initial Gaussians `(..., 5)` by `delta` `(..., 5)` in logit space (paper Sec. 3.2).

    Safe at the ends of the ranges: a mean on the outermost pixel would have an infinite logit, so every value is first
    clamped to just inside its range.
    """
    return logits_to_gaussians(gaussians_to_logits(clamp_gaussians(init_gaussians, eps=1e-6)) + delta)


def clamp_gaussians(gaussians: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """Clamp sigma to [eps, 1 - eps] and rho, mu to [-1 + eps, 1 - eps]; `(..., 5)` in and out."""
    sigma = gaussians[..., :2].clamp(eps, 1 - eps)
    rho_mu = gaussians[..., 2:].clamp(-1 + eps, 1 - eps)
    return torch.cat([sigma, rho_mu], dim=-1)


def boxes_to_gaussians(
    boxes: torch.Tensor, image_size: tuple[int, int], sigma_scale: float = 2 / 3, align_corners: bool = True
) -> torch.Tensor:
    """The initial Gaussian of every region (paper Eq. 4).

    With `align_corners`, as in the authors' code: `sigma_x = (x1 - x0) / W * sigma_scale` and
    `mu_x = 2 ((x0 + x1) / 2 / (W - 1) - 1/2)`. Without: `sigma_x = (x1 - x0 + 1) / W * sigma_scale` and
    `mu_x = (x0 + x1 + 1) / W - 1`, which an enlargement of the image leaves unchanged. Likewise along y; rho is 0.

    Args:
        boxes (`torch.Tensor` of shape `(..., 4)`): inclusive pixel indices `[x0, y0, x1, y1]`.
        image_size (`tuple[int, int]`): `(H, W)` in pixels.
        sigma_scale (`float`, *optional*, defaults to 2/3): sigma over a region's extent: 2/3 in the authors' code, 1/3
            in the paper (w/6 pixels).
        align_corners (`bool`, *optional*, defaults to `True`): see the module.

    Returns:
        `torch.Tensor` of shape `(..., 5)`: float32. A region one pixel wide has no extent between its inclusive
        indices; half a pixel is taken, so that sigma is above 0.
    """
    height, width = image_size
    x0, y0, x1, y1 = to_float64(boxes).unbind(-1)

    def along(first: torch.Tensor, last: torch.Tensor, extent: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not align_corners:
            return (last - first + 1) / extent * sigma_scale, (first + last + 1) / extent - 1
        sigma = (last - first).clamp(min=0.5) / extent * sigma_scale
        mu = ((first + last) / 2 / (extent - 1) - 0.5) * 2 if extent > 1 else torch.zeros_like(first)
        return sigma, mu

    sigma_x, mu_x = along(x0, x1, width)
    sigma_y, mu_y = along(y0, y1, height)
    gaussians = torch.stack([sigma_x, sigma_y, torch.zeros_like(mu_x), mu_x, mu_y], dim=-1)
    return gaussians.to(torch.float32).to(boxes.device)


def gaussians_to_boxes(
    gaussians: torch.Tensor, image_size: tuple[int, int], sigma_scale: float = 2 / 3, align_corners: bool = True
) -> torch.Tensor:
    """The region that an initial Gaussian stands for: the inverse of `boxes_to_gaussians`.

    Args:
        gaussians (`torch.Tensor` of shape `(..., 5)`): rho is ignored.
        image_size (`tuple[int, int]`): `(H, W)` in pixels.
        sigma_scale (`float`, *optional*, defaults to 2/3): as for `boxes_to_gaussians`.
        align_corners (`bool`, *optional*, defaults to `True`): as for `boxes_to_gaussians`.

    Returns:
        `torch.Tensor` of shape `(..., 4)`: int64 inclusive `[x0, y0, x1, y1]`, rounded to whole pixels and clipped to
        the image.
    """
    height, width = image_size
    sigma_x, sigma_y, _, mu_x, mu_y = to_float64(gaussians).unbind(-1)

    def along(sigma: torch.Tensor, mu: torch.Tensor, extent: int) -> tuple[torch.Tensor, torch.Tensor]:
        length = sigma / sigma_scale * extent
        if align_corners:
            # Half a pixel stands for a region one pixel wide, whichever way float32 rounded it.
            length = torch.where(length < 0.75, 0, length.round())
            centre = (mu / 2 + 0.5) * (extent - 1)
        else:
            length = length.round().clamp(min=1) - 1
            centre = (mu + 1) / 2 * extent - 0.5
        first = (centre - length / 2).round().clamp(0, extent - 1)
        return first, (first + length).clamp(max=extent - 1)

    x0, x1 = along(sigma_x, mu_x, width)
    y0, y1 = along(sigma_y, mu_y, height)
    return torch.stack([x0, y0, x1, y1], dim=-1).to(torch.int64).to(gaussians.device)


def to_aligned_corners(gaussians: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Express Gaussians of a frame without aligned corners in the frame with them, for a map of `size` pixels.

    Pixel i of n lies at c in one frame and at `c n / (n - 1)` in the other, so sigma and mu scale by `n / (n - 1)`
    along each axis. An axis of one pixel has that pixel at 0 in both.

    Args:
        gaussians (`torch.Tensor` of shape `(..., 5)`): in the frame with `align_corners=False`.
        size (`tuple[int, int]`): `(h, w)` of the map in pixels.

    Returns:
        `torch.Tensor` of shape `(..., 5)`: sigma may exceed 1.
    """
    ratio_y, ratio_x = (n / (n - 1) if n > 1 else 1.0 for n in size)
    sigma_x, sigma_y, rho, mu_x, mu_y = gaussians.unbind(-1)
    return torch.stack([sigma_x * ratio_x, sigma_y * ratio_y, rho, mu_x * ratio_x, mu_y * ratio_y], dim=-1)


def check_gaussians(gaussians: torch.Tensor, name: str = "gaussians") -> None:
    """Raise a ValueError unless every Gaussian is legal. Reads the values, so it synchronises.

    Args:
        gaussians (`torch.Tensor` of shape `(..., 5)`): must be finite with 0 < sigma < 1 and -1 < rho < 1. Means may
            lie outside the image.
        name (`str`, *optional*, defaults to `"gaussians"`): how messages call them.

    Raises:
        ValueError: if the last axis does not have 5 values, a value is not finite, or sigma or rho leaves its range.
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
