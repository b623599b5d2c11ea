# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
import math

import pytest
import torch

from training.losses import linear_path, reconstruction_loss, velocity_matching_loss


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_reconstruction_loss_is_the_weighted_sum():
    image, reconstruction = draw(2, 3, 5, 7), draw(2, 3, 5, 7, seed=1)
    difference = (reconstruction - image).double()
    expected = 0.25 * difference.abs().mean() + 2.0 * difference.square().mean()
    loss = reconstruction_loss(reconstruction, image, l1_weight=0.25, mse_weight=2.0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_reconstruction_loss_defaults_to_the_squared_error_in_float32():
    image, reconstruction = draw(1, 3, 4, 4), draw(1, 3, 4, 4, seed=1)
    loss = reconstruction_loss(reconstruction.bfloat16(), image)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx((reconstruction.bfloat16().float() - image).square().mean().item(), rel=1e-6)


def test_reconstruction_loss_gradient():
    image = draw(1, 3, 4, 4).double()
    reconstruction = draw(1, 3, 4, 4, seed=1).requires_grad_()
    reconstruction_loss(reconstruction, image.float(), l1_weight=1.0, mse_weight=0.0).backward()
    assert torch.equal(reconstruction.grad, torch.sign(reconstruction - image.float()) / reconstruction.numel())


@pytest.mark.parametrize(
    ("shapes", "weights", "message"),
    [
        (((1, 3, 4, 4), (1, 1, 4, 4)), (1.0, 1.0), "must have the shape of image"),
        (((1, 3, 4, 4), (1, 3, 4, 4)), (0.0, 0.0), "not both 0"),
        (((1, 3, 4, 4), (1, 3, 4, 4)), (-1.0, 2.0), ">= 0"),
    ],
)
def test_reconstruction_loss_refuses(shapes, weights, message):
    with pytest.raises(ValueError, match=message):
        reconstruction_loss(torch.zeros(shapes[0]), torch.zeros(shapes[1]), *weights)


def test_linear_path_ends_and_slope():
    data, noise = draw(3, 4, 5).double(), draw(3, 4, 5, seed=1).double()
    assert torch.equal(linear_path(data, noise, torch.zeros(3)), data)
    assert torch.equal(linear_path(data, noise, torch.ones(3)), noise)
    sigma = torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)
    step = 1e-6
    slope = (linear_path(data, noise, sigma + step) - linear_path(data, noise, sigma)) / step
    # Worst error seen 1e-9: the path is straight, what is left is cancellation.
    torch.testing.assert_close(slope, noise - data, atol=1e-8, rtol=0)


def test_velocity_matching_is_zero_at_the_target_and_the_error_elsewhere():
    data, noise = draw(2, 6, 4), draw(2, 6, 4, seed=1)
    assert velocity_matching_loss(noise - data, data, noise).item() == 0
    assert velocity_matching_loss(noise - data + 3, data, noise).item() == pytest.approx(9, rel=1e-5)


def test_velocity_matching_does_not_count_padding():
    data, noise, prediction = draw(2, 6, 4), draw(2, 6, 4, seed=1), draw(2, 6, 4, seed=2)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    loss = velocity_matching_loss(prediction, data, noise, attention_mask=mask)
    prediction[1, 3:] = 1e6
    assert velocity_matching_loss(prediction, data, noise, attention_mask=mask) == loss
    error = (prediction - (noise - data)).square()
    kept = torch.cat([error[0], error[1, :3]])
    assert loss.item() == pytest.approx(kept.mean().item(), rel=1e-6)


def test_velocity_matching_refuses_what_would_broadcast():
    with pytest.raises(ValueError, match=r"\(2, 6, 1\)"):
        velocity_matching_loss(torch.zeros(2, 6, 1), torch.zeros(2, 6, 4), torch.zeros(2, 6, 4))


def test_psnr_of_a_known_mean_squared_error():
    """The unit of the logged `mse`: images span 2, so PSNR = 10 log10(4 / mse)."""
    image = torch.zeros(1, 3, 8, 8)
    mse = reconstruction_loss(image + 0.1, image).item()
    assert 10 * math.log10(4 / mse) == pytest.approx(26.0206, abs=1e-4)
