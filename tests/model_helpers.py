# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Tiny models and images that the tests of the model share."""

import torch

from gpstoken_hf.configuration_gpstoken import GPSTokenConfig
from gpstoken_hf.modeling_gpstoken import GPSTokenModel


def make_model(seed=0, **overrides):
    """A tiny model with random weights, the Gaussian head included, so that refinement moves every Gaussian."""
    torch.manual_seed(seed)
    model = GPSTokenModel(GPSTokenConfig.preset("tiny", **overrides)).eval()
    torch.nn.init.normal_(model.encoder.gaussian_head.weight, std=0.1)
    torch.nn.init.normal_(model.encoder.gaussian_head.bias, std=0.1)
    return model


def make_images(*shape, seed=0):
    """`(B, 3, H, W)` noise in [-1, 1] whose contrast grows to the right, so that partitions are uneven."""
    batch_size, height, width = shape
    noise = torch.rand(batch_size, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return noise * torch.linspace(0.1, 1, width)


def max_error(a, b):
    """The largest absolute difference; the shapes must agree."""
    assert a.shape == b.shape
    return (a.double() - b.double()).abs().max().item()
