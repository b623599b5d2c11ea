# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""PatchGAN (Isola et al. 2017): a convolutional network that judges overlapping patches of an image.

Shapes: B images, H and W their sides in pixels.
"""

from __future__ import annotations

import torch
from torch import nn

NORM_GROUPS = 32


class PatchDiscriminator(nn.Module):
    """Three strided layers and 64 filters: each logit judges 70 x 70 pixels.

    The norm is GroupNorm where Isola et al. have BatchNorm. A logit then depends on its own image only. So real and
    reconstructed images can share a batch, batches can be small (one image at 256 x 256 on a CPU) and vary in size,
    and N processes train like one with N times the batch.

    Args:
        base_channels (`int`, *optional*, defaults to 64): Filters of the first layer; a multiple of 16.
        num_layers (`int`, *optional*, defaults to 3): Number of strided layers; each doubles the filters, up to 8
            times the first.

    Examples:

    ```python
    >>> import torch
    >>> from training.discriminator import PatchDiscriminator

    >>> PatchDiscriminator()(torch.zeros(2, 3, 64, 64)).shape
    torch.Size([2, 1, 6, 6])
    ```
    """

    def __init__(self, base_channels: int = 64, num_layers: int = 3) -> None:
        super().__init__()
        channels = [base_channels * min(2**level, 8) for level in range(num_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, channels[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for level in range(1, num_layers + 1):
            stride = 2 if level < num_layers else 1
            layers += [
                nn.Conv2d(channels[level - 1], channels[level], 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(NORM_GROUPS, channels[level]),
                nn.LeakyReLU(0.2),
            ]
        layers.append(nn.Conv2d(channels[-1], 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)
        self.num_layers = num_layers
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)
            elif isinstance(layer, nn.GroupNorm):
                nn.init.normal_(layer.weight, 1.0, 0.02)

    @property
    def min_resolution(self) -> int:
        """The smallest side, in pixels, that gives a logit."""
        return 3 * 2**self.num_layers

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (B, 1, h, w) of images (B, 3, H, W) in [-1, 1]; positive is real."""
        return self.layers(images)
