# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""The baseline of `training.train_dit`: an autoencoder whose latents are the principal components of patches.

Shapes: B batch, F components, h x w patches of p x p pixels, D = 3 p p values of a patch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput


class PatchBasis(ModelMixin, ConfigMixin):
    """Images to standardised principal components of their patches and back, the best linear latents of this size.

    Args:
        patch_size (`int`, *optional*, defaults to 8): p, pixels of a patch along each axis.
        latent_channels (`int`, *optional*, defaults to 13): F, components of a patch.
        scaling_factor (`float`, *optional*, defaults to 1.0): 1, because components are standardised.
    """

    @register_to_config
    def __init__(self, patch_size: int = 8, latent_channels: int = 13, scaling_factor: float = 1.0) -> None:
        super().__init__()
        values = 3 * patch_size**2
        self.mean = torch.nn.Parameter(torch.zeros(values), requires_grad=False)
        # Columns are orthogonal; their lengths are the standard deviations.
        self.basis = torch.nn.Parameter(torch.eye(values, latent_channels), requires_grad=False)

    def fit(self, pixels: torch.Tensor) -> None:
        """Take the basis of images `(N, 3, H, W)`."""
        patches = F.unfold(pixels, self.config.patch_size, stride=self.config.patch_size)  # (N, D, h w)
        rows = patches.transpose(1, 2).flatten(0, 1).double()
        mean = rows.mean(0)
        centred = rows - mean
        variances, directions = torch.linalg.eigh(centred.T @ centred / len(rows))
        best = variances.argsort(descending=True)[: self.config.latent_channels]
        self.mean.copy_(mean)
        self.basis.copy_(directions[:, best] * variances[best].sqrt())

    def encode(self, x: torch.Tensor) -> AutoencoderKLOutput:
        """Images `(B, 3, H, W)` -> a distribution without variance of latents `(B, F, h, w)`."""
        side = self.config.patch_size
        patches = F.unfold(x, side, stride=side).transpose(1, 2) - self.mean  # (B, h w, D)
        latents = (patches @ self.basis / self.basis.square().sum(0)).transpose(1, 2)
        latents = latents.unflatten(2, (x.shape[2] // side, x.shape[3] // side))
        moments = torch.cat([latents, torch.zeros_like(latents)], dim=1)
        return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(moments, deterministic=True))

    def decode(self, z: torch.Tensor) -> DecoderOutput:
        """Latents `(B, F, h, w)` -> images `(B, 3, p h, p w)`."""
        side = self.config.patch_size
        patches = z.flatten(2).transpose(1, 2) @ self.basis.T + self.mean  # (B, h w, D)
        size = (z.shape[2] * side, z.shape[3] * side)
        return DecoderOutput(sample=F.fold(patches.transpose(1, 2), size, side, stride=side))


__all__ = ["PatchBasis"]
