# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Training objectives as formulas: reconstruction and GAN for the tokenizer, velocity matching for the generators.

Shapes: B images, C channels, H and W pixels, L tokens.
"""

import torch
import torch.nn.functional as F


def reconstruction_loss(
    reconstruction: torch.Tensor, image: torch.Tensor, l1_weight: float = 0.0, mse_weight: float = 1.0
) -> torch.Tensor:
    """The pixel part of the tokenizer's objective: `l1_weight mean |x - x̂| + mse_weight mean (x - x̂)²`.

    The paper trains with the squared error (the defaults), which also gave the best PSNR here (docs/nano.md).

    Args:
        reconstruction (`torch.Tensor`): x̂, (B, 3, H, W).
        image (`torch.Tensor`): x, (B, 3, H, W) in [-1, 1].
        l1_weight (`float`, *optional*, defaults to 0.0): >= 0.
        mse_weight (`float`, *optional*, defaults to 1.0): >= 0.

    Returns:
        `torch.Tensor`: A scalar, computed in float32.

    Raises:
        ValueError: If the shapes differ, a weight is negative, or both are 0.

    Examples:

    ```python
    >>> import torch
    >>> from training.losses import reconstruction_loss

    >>> reconstruction_loss(torch.full((1, 3, 4, 4), 0.5), torch.zeros(1, 3, 4, 4), l1_weight=1.0)
    tensor(0.7500)
    ```
    """
    if reconstruction.shape != image.shape:
        raise ValueError(
            f"reconstruction must have the shape of image, {tuple(image.shape)}, got {tuple(reconstruction.shape)}"
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


def hinge_discriminator_loss(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """`(mean max(0, 1 - D(x)) + mean max(0, 1 + D(x̂))) / 2`, computed in float32.

    Args:
        real, fake (`torch.Tensor`): Logits of real and of reconstructed images, of any shape.

    Returns:
        `torch.Tensor`: A scalar; 1 if all logits are 0, and 0 if real ones are >= 1 and fake ones <= -1.
    """
    return (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean()) / 2


def hinge_generator_loss(fake: torch.Tensor) -> torch.Tensor:
    """`-mean D(x̂)`, a scalar computed in float32; `fake` are logits of any shape."""
    return -fake.float().mean()


def adaptive_weight(reconstruction_gradient: torch.Tensor, adversarial_gradient: torch.Tensor) -> torch.Tensor:
    """The weight that makes the adversarial gradient as large as that of the reconstruction (Esser et al. 2021).

    Args:
        reconstruction_gradient, adversarial_gradient (`torch.Tensor`): Gradients of the two losses with respect to
            the weights of the decoder's last layer.

    Returns:
        `torch.Tensor`: The ratio of their norms, a scalar in [0, 1e4].
    """
    ratio = reconstruction_gradient.float().norm() / (adversarial_gradient.float().norm() + 1e-4)
    return ratio.clamp(0, 1e4)


def linear_path(data: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """`x_sigma = sigma noise + (1 - sigma) data`, the straight path; sigma = 1 - t for the t of the paper (Sec. 3.3).

    Args:
        data (`torch.Tensor`): x_1, (B, ...).
        noise (`torch.Tensor`): x_0, of the same shape.
        sigma (`torch.Tensor`): (B,) in [0, 1]; 1 is noise.

    Returns:
        `torch.Tensor`: Of the shape of `data`.
    """
    sigma = sigma.reshape(-1, *([1] * (data.dim() - 1)))
    return sigma * noise + (1 - sigma) * data


def velocity_matching_loss(
    prediction: torch.Tensor, data: torch.Tensor, noise: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean squared error of a predicted velocity with the sign of diffusers: the target is `noise - data`, the -v of
    the paper.

    Args:
        prediction (`torch.Tensor`): (B, L, C).
        data, noise (`torch.Tensor`): (B, L, C), the ends of the path.
        attention_mask (`torch.Tensor`, *optional*): (B, L), 1 = real token; padded tokens do not count.

    Returns:
        `torch.Tensor`: A scalar, the mean over the channels of all real tokens, computed in float32.

    Raises:
        ValueError: If the shapes differ.
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
