# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Metrics of images: PSNR, SSIM and LPIPS per image; Fréchet distance and others of sets, from feature_statistics.

Shapes: B images, C channels, H x W pixels of an image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .feature_networks import LPIPSNetwork, PerceptualNetwork, load_perceptual_network
from .feature_statistics import (
    FeatureStatistics,
    frechet_distance,
    inception_score,
    precision_recall,
    read_statistics,
    write_statistics,
)
from .gaussians import to_float64

__all__ = [
    "FeatureStatistics",
    "frechet_distance",
    "inception_score",
    "lpips",
    "precision_recall",
    "psnr",
    "read_statistics",
    "ssim",
    "to_uint8",
    "write_statistics",
]

# As defined by Wang et al. 2004: an 11 x 11 Gaussian window of sigma 1.5 pixels.
SSIM_WINDOW = 11
SSIM_SIGMA_PX = 1.5
SSIM_K1, SSIM_K2 = 0.01, 0.03


def psnr(images: torch.Tensor, reference: torch.Tensor, data_range: float = 2.0) -> torch.Tensor:
    """Peak signal-to-noise ratio of every image, `10 log10(data_range² / MSE)` in dB over its pixels and channels.

    Args:
        images, reference (`torch.Tensor` of shape `(B, C, H, W)`): the images to compare, neither clamped nor rounded.
        data_range (`float`, *optional*, defaults to 2.0): largest minus smallest possible value, above 0; 2 for images
            in [-1, 1].

    Returns:
        `torch.Tensor` of shape `(B,)`: float64 on the CPU, infinite for equal images.

    Raises:
        ValueError: if the shapes differ or are not `(B, C, H, W)`, or `data_range` is not above 0.

    Examples:
        ```python
        >>> import torch
        >>> from gpstoken_hf.metrics import psnr

        >>> images = torch.zeros(2, 3, 16, 16)
        >>> psnr(images + 0.2, images)  # MSE 0.04
        tensor([20.0000, 20.0000], dtype=torch.float64)

        ```
    """
    images, reference = _as_pair(images, reference, data_range)
    mse = (images - reference).square().mean(dim=(1, 2, 3))
    return (10.0 * torch.log10(data_range**2 / mse)).cpu()


def ssim(images: torch.Tensor, reference: torch.Tensor, data_range: float = 2.0) -> torch.Tensor:
    """Structural similarity of every image (Wang et al. 2004), the mean over channels and positions.

    Positions count where the whole Gaussian window lies inside the image, as in the original program.

    Args:
        images, reference (`torch.Tensor` of shape `(B, C, H, W)`): the images to compare; H and W at least 11.
        data_range (`float`, *optional*, defaults to 2.0): largest minus smallest possible value, above 0; 2 for images
            in [-1, 1].

    Returns:
        `torch.Tensor` of shape `(B,)`: float64 on the CPU, at most 1, and 1 for equal images.

    Raises:
        ValueError: if the shapes differ or are not `(B, C, H, W)`, an image is smaller than the window, or
            `data_range` is not above 0.

    Examples:
        ```python
        >>> import torch
        >>> from gpstoken_hf.metrics import ssim

        >>> images = torch.rand(2, 3, 16, 16) * 2 - 1
        >>> ssim(images, images)
        tensor([1., 1.], dtype=torch.float64)

        ```
    """
    images, reference = _as_pair(images, reference, data_range)
    B, C, H, W = images.shape
    if min(H, W) < SSIM_WINDOW:
        raise ValueError(f"images must be at least {SSIM_WINDOW} x {SSIM_WINDOW} pixels for SSIM, got {H} x {W}")
    offsets = torch.arange(SSIM_WINDOW, dtype=images.dtype, device=images.device) - SSIM_WINDOW // 2
    window = torch.exp(-(offsets**2) / (2 * SSIM_SIGMA_PX**2))
    window = window / window.sum()

    def local_mean(values: torch.Tensor) -> torch.Tensor:
        values = values.reshape(B * C, 1, H, W)
        return F.conv2d(F.conv2d(values, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))

    mean_x, mean_y = local_mean(images), local_mean(reference)
    var_x = local_mean(images * images) - mean_x**2
    var_y = local_mean(reference * reference) - mean_y**2
    cov_xy = local_mean(images * reference) - mean_x * mean_y
    c1, c2 = (SSIM_K1 * data_range) ** 2, (SSIM_K2 * data_range) ** 2
    similarity = ((2 * mean_x * mean_y + c1) * (2 * cov_xy + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    )
    return similarity.reshape(B, -1).mean(dim=1).cpu()


def lpips(
    images: torch.Tensor, reference: torch.Tensor, network: str | LPIPSNetwork | PerceptualNetwork = "alex"
) -> torch.Tensor:
    """LPIPS of every image (Zhang et al. 2018): 0 for equal images, larger for images that look different.

    Args:
        images, reference (`torch.Tensor` of shape `(B, 3, H, W)`): the images to compare, in [-1, 1].
        network (`str` or `torch.nn.Module`, *optional*, defaults to `"alex"`): "alex", "vgg" or "squeeze", or any
            classifier by name, which gives another distance than LPIPS; or what
            [`~gpstoken_hf.feature_networks.load_perceptual_network`] returns, to load it once for many calls.

    Returns:
        `torch.Tensor` of shape `(B,)`: float64 on the CPU.

    Raises:
        ValueError: if the shapes differ or are not `(B, 3, H, W)`, or the network cannot be loaded.

    Examples:
        ```python
        >>> import torch
        >>> from gpstoken_hf.metrics import lpips

        >>> images = torch.rand(2, 3, 64, 64) * 2 - 1
        >>> lpips(images, images, network="efficientnet_lite0")  # weights come with a package
        tensor([0., 0.], dtype=torch.float64)

        ```
    """
    if images.shape != reference.shape or images.ndim != 4 or images.shape[1] != 3 or images.numel() == 0:
        raise ValueError(
            "images and reference must have one shape (B, 3, H, W), "
            f"got {tuple(images.shape)} and {tuple(reference.shape)}"
        )
    module = load_perceptual_network(network).to(images.device) if isinstance(network, str) else network
    with torch.no_grad():
        return module(images.detach().float(), reference.detach().float()).double().cpu()


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] -> uint8, clamped and rounded to nearest, as image files hold them.

    Args:
        images (`torch.Tensor`): floating point of any shape.

    Returns:
        `torch.Tensor`: uint8 of the same shape, on the same device.

    Examples:
        ```python
        >>> import torch
        >>> from gpstoken_hf.metrics import to_uint8

        >>> to_uint8(torch.tensor([-1.5, -1.0, 0.01, 1.0]))
        tensor([  0,   0, 129, 255], dtype=torch.uint8)

        ```
    """
    return ((images.detach().float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def _as_pair(images: torch.Tensor, reference: torch.Tensor, data_range: float) -> tuple[torch.Tensor, torch.Tensor]:
    if images.shape != reference.shape or images.ndim != 4 or images.numel() == 0:
        raise ValueError(
            "images and reference must have one shape (B, C, H, W), "
            f"got {tuple(images.shape)} and {tuple(reference.shape)}"
        )
    if not data_range > 0:
        raise ValueError(f"data_range must be above 0, got {data_range}")
    # Variances are small differences of large numbers, so they need float64.
    return to_float64(images.detach()), to_float64(reference.detach())
