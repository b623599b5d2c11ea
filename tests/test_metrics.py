# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""PSNR and SSIM against closed forms and against scikit-image."""

import math

import numpy as np
import pytest
import torch

from gpstoken_hf.metrics import psnr, ssim


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.linspace(-1, 1, 40), torch.linspace(-1, 1, 53), indexing="ij")
    reference = torch.stack([torch.sin(5 * x + y), torch.cos(4 * y), x * y]).repeat(2, 1, 1, 1)
    noise = torch.randn(reference.shape, generator=generator) * torch.tensor([0.05, 0.3]).view(2, 1, 1, 1)
    return (reference + noise).clamp(-1, 1), reference


def test_psnr_of_a_constant_error():
    reference = torch.zeros(3, 3, 8, 9)
    error = torch.tensor([0.02, 0.2, 2.0]).view(3, 1, 1, 1)
    assert torch.allclose(psnr(reference + error, reference), torch.tensor([40.0, 20.0, 0.0]).double(), atol=1e-6)
    unit = psnr(reference + 0.1, reference, data_range=1.0)
    assert torch.allclose(unit, torch.full((3,), 20.0).double(), atol=1e-6)


def test_equal_images():
    image = torch.rand(2, 3, 16, 16)
    assert psnr(image, image).tolist() == [math.inf, math.inf]
    assert torch.allclose(ssim(image, image), torch.ones(2).double(), atol=1e-12)


def test_each_image_on_its_own(pair):
    images, reference = pair
    for metric in (psnr, ssim):
        values = metric(images, reference)
        assert values.shape == (2,)
        assert values[0] > values[1]
        alone = torch.cat([metric(images[i : i + 1], reference[i : i + 1]) for i in range(2)])
        assert torch.allclose(values, alone, atol=1e-12)


def test_ssim_of_an_inverted_texture_is_negative():
    texture = 0.3 * (-1.0) ** torch.arange(32).view(1, 1, 1, 32).expand(1, 3, 32, 32)
    value = ssim(0.5 + texture, 0.5 - texture).item()
    # equal means, and cov = -var = -0.09 at every position
    c2 = (0.03 * 2) ** 2
    assert value == pytest.approx((-2 * 0.09 + c2) / (2 * 0.09 + c2), abs=5e-3)
    assert value < -0.9


def test_half_precision_is_widened(pair):
    images, reference = (image.bfloat16() for image in pair)
    assert torch.equal(psnr(images, reference), psnr(images.double(), reference.double()))
    assert torch.equal(ssim(images, reference), ssim(images.double(), reference.double()))


def test_against_scikit_image(pair):
    metrics = pytest.importorskip("skimage.metrics")
    images, reference = pair
    for i, (image, truth) in enumerate(zip(images.double().numpy(), reference.double().numpy())):
        expected = metrics.peak_signal_noise_ratio(truth, image, data_range=2.0)
        assert psnr(images, reference)[i].item() == pytest.approx(expected, abs=1e-9)
        expected = metrics.structural_similarity(
            truth, image, data_range=2.0, channel_axis=0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert ssim(images, reference)[i].item() == pytest.approx(expected, abs=1e-9)


def test_against_torchmetrics(pair):
    """Its PSNR has constants in float32: worst difference seen 1.5e-6 dB.

    Its SSIM also counts positions at the border, on reflected pixels. Ours is the mean over the rest of its map.
    """
    functional = pytest.importorskip("torchmetrics.functional.image", reason="needs torchmetrics")
    data = pytest.importorskip("skimage.data", reason="needs scikit-image")
    photograph = torch.from_numpy(data.astronaut()[:64, 100:180]).permute(2, 0, 1)[None].double() / 127.5 - 1
    pairs = [tuple(image.double() for image in pair), ((photograph * 0.9).clamp(-1, 1), photograph)]
    for images, reference in pairs:
        options = {"data_range": 2.0, "reduction": "none"}
        expected = functional.peak_signal_noise_ratio(images, reference, dim=(1, 2, 3), **options)
        assert torch.allclose(psnr(images, reference), expected, rtol=0, atol=1e-5)
        _, full = functional.structural_similarity_index_measure(
            images, reference, sigma=1.5, return_full_image=True, **options
        )
        inside = full[..., 5:-5, 5:-5].mean(dim=(1, 2, 3))
        assert torch.allclose(ssim(images, reference), inside, rtol=0, atol=1e-9)


def test_8_bit_images_agree_whatever_the_range(pair):
    images, reference = (np.round((image.numpy() + 1) * 127.5) for image in pair)
    bytes_pair = torch.from_numpy(images), torch.from_numpy(reference)
    unit_pair = tuple(image / 127.5 - 1 for image in bytes_pair)
    assert torch.allclose(psnr(*bytes_pair, data_range=255.0), psnr(*unit_pair), atol=1e-5)
    # SSIM is not invariant to the offset of the range, but is to its scale
    assert torch.allclose(
        ssim(*bytes_pair, data_range=255.0), ssim(*(image / 127.5 for image in bytes_pair)), atol=1e-5
    )


@pytest.mark.parametrize("metric", [psnr, ssim])
@pytest.mark.parametrize(
    ("images", "reference", "data_range", "message"),
    [
        (torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 17), 2.0, r"\(1, 3, 16, 16\) and \(1, 3, 16, 17\)"),
        (torch.zeros(3, 16, 16), torch.zeros(3, 16, 16), 2.0, r"\(B, C, H, W\)"),
        (torch.zeros(0, 3, 16, 16), torch.zeros(0, 3, 16, 16), 2.0, r"\(0, 3"),
        (torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16), 0.0, "data_range must be above 0"),
    ],
)
def test_bad_input(metric, images, reference, data_range, message):
    with pytest.raises(ValueError, match=message):
        metric(images, reference, data_range=data_range)


def test_image_smaller_than_the_window():
    with pytest.raises(ValueError, match=r"at least 11 x 11 .* 10 x 40"):
        ssim(torch.zeros(1, 3, 10, 40), torch.zeros(1, 3, 10, 40))
