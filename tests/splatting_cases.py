# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Inputs for the tests of splatting, and the renderer as a naive loop."""

import math

import numpy as np
import torch


def random_tokens(seed, B, L, C, dtype=torch.float32, extreme=False):
    """Gaussians `(B, L, 5)` and features `(B, L, C)`.

    `extreme` draws sigma from its lower bound 1e-5 to 1, |rho| up to 1 - 1e-5, and means outside of the frame too;
    every second token is in the frame and covers some of it.
    """
    rng = np.random.default_rng(seed)
    if extreme:
        sigma = 10 ** rng.uniform(-5, 0, (B, L, 2))
        sigma[rng.random((B, L, 2)) < 0.1] = 1e-5
        rho = (1 - 10 ** rng.uniform(-5, 0, (B, L, 1))) * rng.choice([-1, 1], (B, L, 1))
        mu = rng.uniform(-1.5, 1.5, (B, L, 2))
        sigma[:, ::2] = 10 ** rng.uniform(-0.5, 0, sigma[:, ::2].shape)
        mu[:, ::2] /= 2
    else:
        sigma = rng.uniform(0.3, 1.5, (B, L, 2)) * (2 / 3 / math.sqrt(max(L, 1)))
        rho = rng.uniform(-0.9, 0.9, (B, L, 1))
        mu = rng.uniform(-1, 1, (B, L, 2))
    gaussians = torch.from_numpy(np.concatenate([sigma, rho, mu], axis=-1)).to(dtype)
    return gaussians, torch.from_numpy(rng.standard_normal((B, L, C))).to(dtype)


def ridge_tokens(rho, seed=0, num_tokens=16):
    """Gaussians `(1, L, 5)` with correlation rho or -rho, and features `(1, L, 3)`, float32.

    Each is a ridge along a diagonal of the pixel grid, narrower than a pixel for rho near 1, and runs beside the pixel
    centres at up to 1.5 times its width, where its weights depend on the width.
    """
    rng = np.random.default_rng(seed)
    sigma = rng.uniform(0.2, 0.8, num_tokens)
    sign = rng.choice([-1, 1], num_tokens)
    centre = rng.uniform(-0.4, 0.4, num_tokens)
    offset = rng.uniform(-1.5, 1.5, num_tokens) * sigma * math.sqrt((1 - rho) * (1 + rho))
    gaussians = np.stack([sigma, sigma, sign * rho, centre + offset, sign * centre], axis=-1)
    features = rng.standard_normal((num_tokens, 3))
    return torch.from_numpy(gaussians).float().unsqueeze(0), torch.from_numpy(features).float().unsqueeze(0)


# Float32 values below 1. The second has the largest relative error of 1 - rho * rho in float32, 9e-5.
RHOS_NEAR_ONE = (0.99, 1 - 2896 * 2**-24, 0.9999, 0.99999, 0.999999, 1 - 2**-24)


def relative_errors(actual, expected):
    """Largest errors of the map, of the gradients of the five fields of a Gaussian, and of that of the features.

    Each is relative to the largest value of `expected`. Both arguments are results of `value_and_gradients`.
    """

    def split(maps, grad_gaussians, grad_features):
        return maps, *grad_gaussians.unbind(-1), grad_features

    pairs = zip(split(*actual), split(*expected), strict=True)
    return [((got.cpu().double() - want).abs().max() / want.abs().max()).item() for got, want in pairs]


def random_mask(seed, B, L):
    return torch.from_numpy(np.random.default_rng(seed + 1).random((B, L)) < 0.7)


def naive_splat(gaussians, features, size, support, mask=None):
    """Eq. 1-3 as written, token by token and pixel by pixel, in Python floats."""
    B, L, C = features.shape
    height, width = size
    maps = np.zeros((B, C, height, width))
    for b in range(B):
        for l in range(L):
            if mask is not None and not mask[b, l]:
                continue
            sigma_x, sigma_y, rho, mu_x, mu_y = gaussians[b, l].tolist()
            for j in range(height):
                for i in range(width):
                    dx = (2 * i / (width - 1) - 1 if width > 1 else 0.0) - mu_x
                    dy = (2 * j / (height - 1) - 1 if height > 1 else 0.0) - mu_y
                    if abs(dx) <= support * sigma_x and abs(dy) <= support * sigma_y:
                        q = dx**2 / sigma_x**2 - 2 * rho * dx * dy / (sigma_x * sigma_y) + dy**2 / sigma_y**2
                        maps[b, :, j, i] += math.exp(-q / (2 * (1 - rho**2))) * features[b, l].numpy()
    return torch.from_numpy(maps)


def value_and_gradients(splat, gaussians, features, weights):
    """The map, and the gradients of `<weights, map>` by Gaussians and features."""
    gaussians, features = gaussians.detach().requires_grad_(), features.detach().requires_grad_()
    maps = splat(gaussians, features)
    return maps.detach(), *torch.autograd.grad(maps, (gaussians, features), weights)
