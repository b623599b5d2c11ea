# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Training objectives: reconstruction for the tokenizer, velocity matching for the generators.

Letters: B images, C channels, H, W pixels, L tokens.
"""

import warnings

import torch
import torch.nn.functional as F


def reconstruction_loss(
    reconstruction: torch.Tensor, image: torch.Tensor, l1_weight: float = 0.0, mse_weight: float = 1.0
) -> torch.Tensor:
    """Pixel part of the tokenizer's objective: `l1_weight mean |x - x̂| + mse_weight mean (x - x̂)²`.

    The paper trains with the squared error (weights 0 and 1, the defaults); the absolute error keeps small errors
    worth removing and helps short runs.

    Args:
        reconstruction: x̂, (B, 3, H, W), in the units of `image`.
        image: x, (B, 3, H, W) in [-1, 1].

    Returns:
        A scalar, computed in float32.

    Raises:
        ValueError: the shapes differ (they would broadcast), or both weights are 0.
    """
    if reconstruction.shape != image.shape:
        raise ValueError(
            f"reconstruction and image must have one shape, got {tuple(reconstruction.shape)} and {tuple(image.shape)}"
        )
    if l1_weight < 0 or mse_weight < 0 or l1_weight + mse_weight == 0:
        raise ValueError(f"loss weights must be >= 0 and not both 0, got l1 {l1_weight} and mse {mse_weight}")
    reconstruction, image = reconstruction.float(), image.float()
    loss = image.new_zeros(())
    if l1_weight:
        loss = loss + l1_weight * F.l1_loss(reconstruction, image)
    if mse_weight:
        loss = loss + mse_weight * F.mse_loss(reconstruction, image)
    return loss


class PerceptualLoss(torch.nn.Module):
    """LPIPS with the VGG network (Zhang et al. 2018), frozen: distances (B,) between images in [-1, 1].

    Raises:
        ValueError: the `lpips` package is missing, or the network's weights are neither cached nor downloadable.
    """

    def __init__(self, network: str = "vgg") -> None:
        super().__init__()
        try:
            import lpips
        except ImportError as error:
            raise ValueError("the perceptual loss needs the package lpips: pip install lpips") from error
        try:
            with warnings.catch_warnings():
                # lpips still speaks torchvision's old interface.
                warnings.filterwarnings("ignore", message=".*'(pretrained|weights)'", category=UserWarning)
                warnings.filterwarnings("ignore", message="Arguments other than a weight enum", category=UserWarning)
                self.metric = lpips.LPIPS(net=network, verbose=False)
        except OSError as error:  # URLError is one
            raise ValueError(
                f"the perceptual loss needs torchvision's {network} weights, and they can be neither found in "
                f"{torch.hub.get_dir()} nor downloaded ({error}); put them there or set its weight to 0"
            ) from error
        self.metric.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "PerceptualLoss":
        """Stays in evaluation mode: the metric is a measure, not a part of what is trained."""
        return super().train(False)

    def forward(self, reconstruction: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        return self.metric(reconstruction.float(), image.float()).flatten()


def linear_path(data: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """`x_sigma = sigma noise + (1 - sigma) data`, the straight path with sigma = 1 - t for the paper's t (Sec. 3.3).

    Args:
        data: x_1, (B, ...).
        noise: x_0, of the same shape.
        sigma: (B,) in [0, 1]; 1 is noise.
    """
    sigma = sigma.reshape(-1, *([1] * (data.dim() - 1)))
    return sigma * noise + (1 - sigma) * data


def velocity_matching_loss(
    prediction: torch.Tensor, data: torch.Tensor, noise: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean squared error of a predicted velocity in diffusers' sign: the target is `noise - data` (the paper's -v).

    Args:
        prediction: (B, L, C).
        data, noise: (B, L, C), the ends of the path.
        attention_mask: (B, L), 1 = real token; padded tokens do not count.

    Returns:
        A scalar: the mean over the channels of all real tokens, computed in float32.

    Raises:
        ValueError: the shapes differ.
    """
    if not prediction.shape == data.shape == noise.shape:
        raise ValueError(
            "prediction, data and noise must have one shape, got "
            f"{tuple(prediction.shape)}, {tuple(data.shape)} and {tuple(noise.shape)}"
        )
    error = (prediction.float() - (noise.float() - data.float())).square().mean(dim=-1)
    if attention_mask is None:
        return error.mean()
    mask = attention_mask.to(error.dtype)
    return (error * mask).sum() / mask.sum()
