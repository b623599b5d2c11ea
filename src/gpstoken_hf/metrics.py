# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""How close a reconstruction is to its image: PSNR and SSIM, one value per image.

Letters used in shapes: B images, C channels, H and W the height and width in pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

# The constants of the paper that defined SSIM (Wang et al. 2004): an 11 x 11 Gaussian window of sigma 1.5 pixels.
SSIM_WINDOW = 11
SSIM_SIGMA_PX = 1.5
SSIM_K1, SSIM_K2 = 0.01, 0.03


def psnr(images: torch.Tensor, reference: torch.Tensor, data_range: float = 2.0) -> torch.Tensor:
    """Peak signal-to-noise ratio, `10 log10(data_range² / MSE)` in dB, over all pixels and channels of an image.

    Args:
        images, reference: (B, C, H, W), floating-point; nothing is clamped or rounded here.
        data_range: largest minus smallest possible value; 2 for images in [-1, 1].

    Returns:
        (B,) float64 on the CPU; infinite where the two are equal.

    Raises:
        ValueError: on shapes that differ or are not (B, C, H, W), and on a `data_range` that is not positive.
    """
    images, reference = _as_pair(images, reference, data_range)
    mse = (images - reference).square().mean(dim=(1, 2, 3))
    return (10.0 * torch.log10(data_range**2 / mse)).cpu()


def ssim(images: torch.Tensor, reference: torch.Tensor, data_range: float = 2.0) -> torch.Tensor:
    """Structural similarity with the Gaussian window of Wang et al. 2004, the mean over channels and positions.

    Only positions where the whole window lies inside the image count, as in the authors' program.

    Args:
        images, reference: (B, C, H, W), floating-point, H and W at least 11.
        data_range: largest minus smallest possible value; 2 for images in [-1, 1].

    Returns:
        (B,) float64 on the CPU, at most 1, which is reached for equal images.

    Raises:
        ValueError: as `psnr`, and on images smaller than the window.
    """
    images, reference = _as_pair(images, reference, data_range)
    B, C, H, W = images.shape
    if min(H, W) < SSIM_WINDOW:
        raise ValueError(f"expected images of at least {SSIM_WINDOW} x {SSIM_WINDOW} pixels for SSIM, got {H} x {W}")
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


def _as_pair(images: torch.Tensor, reference: torch.Tensor, data_range: float) -> tuple[torch.Tensor, torch.Tensor]:
    if images.shape != reference.shape or images.ndim != 4 or images.numel() == 0:
        raise ValueError(
            f"expected two batches of one shape (B, C, H, W), got {tuple(images.shape)} and {tuple(reference.shape)}"
        )
    if not data_range > 0:
        raise ValueError(f"expected data_range > 0, got {data_range}")
    # float64: small variances are differences of large numbers. Apple's GPUs have none, so there it is the CPU's work.
    device = images.device if images.device.type != "mps" else torch.device("cpu")
    return images.detach().to(device, torch.float64), reference.detach().to(device, torch.float64)
