# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""AutoencoderGPSToken: the tokenizer behind AutoencoderKL's interface, and inside a pipeline of diffusers."""

import inspect

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from model_helpers import make_images, make_model, max_error
from safetensors.torch import load_file, save_file

from gpstoken_hf.autoencoder_gpstoken import (
    MODEL_FIELDS,
    RENAMED_FIELDS,
    AutoencoderGPSToken,
    grid_positions,
    grid_to_tokens,
    token_grid,
    tokens_to_grid,
)
from gpstoken_hf.gaussians import check_gaussians

# Through logits and standardisation and back, in float32. Measured 3e-6 in pixels.
PIXELS = 1e-4


def make_autoencoder(**overrides):
    return AutoencoderGPSToken.from_gpstoken(make_model(**overrides), [make_images(4, 32, 32, seed=9)])


@pytest.fixture(scope="module")
def vae():
    return make_autoencoder()


@pytest.fixture(scope="module")
def images():
    return make_images(3, 32, 32)


# -- the grid


@pytest.mark.parametrize(
    ("num_tokens", "grid"),
    [(1, (1, 1)), (2, (1, 2)), (7, (1, 7)), (12, (3, 4)), (64, (8, 8)), (128, (8, 16)), (256, (16, 16))],
)
def test_grid_is_the_nearest_to_a_square(num_tokens, grid):
    assert token_grid(num_tokens) == grid
    assert sorted(grid_positions(num_tokens).tolist()) == list(range(num_tokens))


def test_powers_of_two_lie_along_the_z_curve():
    index = torch.arange(16.0).view(1, 16, 1)
    assert tokens_to_grid(index)[0, 0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    index = torch.arange(8.0).view(1, 8, 1)
    assert tokens_to_grid(index)[0, 0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]


def test_other_counts_lie_row_by_row():
    index = torch.arange(12.0).view(1, 12, 1)
    assert tokens_to_grid(index)[0, 0].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


@pytest.mark.parametrize("num_tokens", [1, 6, 16, 32, 100])
def test_grid_round_trip(num_tokens):
    tokens = torch.randn(2, num_tokens, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(grid_to_tokens(tokens_to_grid(tokens)), tokens)


def test_no_tokens_have_no_grid():
    with pytest.raises(ValueError, match="num_tokens must be at least 1, got 0"):
        token_grid(0)


# -- AutoencoderKL's interface


def test_config_carries_every_field_of_the_tokenizer():
    arguments = set(inspect.signature(AutoencoderGPSToken).parameters)
    assert {RENAMED_FIELDS.get(name, name) for name in MODEL_FIELDS} <= arguments
    count = 9
    model = make_model(latents_mean=[0.5] * count, latents_std=[2.0] * count, tile_decode="stitched")
    vae = AutoencoderGPSToken.from_gpstoken(model)
    assert vae.to_gpstoken() is model
    rebuilt = AutoencoderGPSToken.from_config(vae.config).to_gpstoken().config
    for name in MODEL_FIELDS:
        ours, expected = getattr(rebuilt, name), getattr(model.config, name)
        assert (list(ours) if isinstance(ours, tuple) else ours) == (
            list(expected) if isinstance(expected, tuple) else expected
        ), name
    # Pipelines of diffusers would standardise once more with statistics of these names.
    assert "latents_mean" not in vae.config
    assert "latents_std" not in vae.config


@torch.no_grad()
def test_latents(vae, images):
    latent_dist = vae.encode(images).latent_dist
    latents = latent_dist.mode()
    assert latents.shape == (3, 9, 2, 4)
    assert latents.dtype == torch.float32
    assert torch.equal(latent_dist.sample(torch.Generator().manual_seed(1)), latents)
    assert torch.equal(latent_dist.mean, latents)
    assert not latent_dist.std.any()
    assert torch.equal(vae.encode(images, return_dict=False)[0].mode(), latents)
    assert vae.config.scaling_factor == 1.0
    assert vae.config.latent_channels == 9


@torch.no_grad()
def test_latents_are_standardised(vae):
    latents = vae.encode(make_images(4, 32, 32, seed=9)).latent_dist.mode()
    assert latents.mean((0, 2, 3)).abs().max() < 1e-4
    assert (latents.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-3
    plain = AutoencoderGPSToken.from_gpstoken(vae.to_gpstoken())
    raw = plain.encode(make_images(4, 32, 32, seed=9)).latent_dist.mode()
    mean = torch.tensor(vae.config.latents_channel_mean).view(1, 9, 1, 1)
    std = torch.tensor(vae.config.latents_channel_std).view(1, 9, 1, 1)
    assert max_error((raw - mean) / std, latents) < 1e-4


@torch.no_grad()
def test_round_trip_is_the_tokenizer_s_reconstruction(vae, images):
    model = vae.to_gpstoken()
    expected = model(images).sample
    latents = vae.encode(images).latent_dist.mode()
    assert max_error(vae.latents_to_tokens(latents), model.encode(images).tokens) < 1e-5
    assert max_error(vae.decode(latents).sample, expected) <= PIXELS
    assert max_error(vae.decode(latents, return_dict=False)[0], expected) <= PIXELS
    assert max_error(vae(images).sample, expected) <= PIXELS
    assert max_error(vae(images, sample_posterior=True, return_dict=False)[0], expected) <= PIXELS


@torch.no_grad()
def test_any_size(vae):
    images = make_images(2, 37, 51)
    assert max_error(vae(images).sample, vae.to_gpstoken()(images).sample) <= PIXELS
    latents = vae.encode(images).latent_dist.mode()
    assert vae.decode(latents).sample.shape == (2, 3, 32, 32)
    assert vae.decode(latents, image_size=40).sample.shape == (2, 3, 40, 40)


@torch.no_grad()
def test_any_finite_latent_is_an_image(vae):
    for scale in (1.0, 1e3, 1e6):
        latents = torch.randn(2, 9, 2, 4, generator=torch.Generator().manual_seed(0)) * scale
        check_gaussians(vae.latents_to_tokens(latents)[..., :5])
        assert torch.isfinite(vae.decode(latents).sample).all()


@torch.no_grad()
def test_slicing(images):
    vae = make_autoencoder()
    expected = vae(images).sample
    vae.enable_slicing()
    assert vae.use_slicing
    assert vae.to_gpstoken().use_slicing
    assert max_error(vae(images).sample, expected) <= 1e-5
    vae.disable_slicing()
    assert not vae.use_slicing


@torch.no_grad()
@pytest.mark.parametrize("tile_decode", ["merged", "stitched"])
def test_tiling(tile_decode):
    vae = make_autoencoder(tile_decode=tile_decode)
    model = vae.to_gpstoken()
    images = make_images(2, 64, 90)
    vae.enable_tiling()
    # 2 x 3 tiles, each with the grid of one image.
    latents = vae.encode(images).latent_dist.mode()
    assert latents.shape == (2, 9, 4, 12)
    tile = vae.encode(images[:, :, :32, :30]).latent_dist.mode()
    assert max_error(latents[:, :, :2, :4], tile) < 1e-4
    assert max_error(vae(images).sample, model(images).sample) <= PIXELS
    vae.disable_tiling()
    # Without tiling, latents of several tiles are decoded as the tokenizer decodes tiles.
    decoded = vae.decode(latents, image_size=(64, 90)).sample
    assert max_error(decoded, model(images, tile_size=32).sample) <= PIXELS
    assert vae.decode(latents).sample.shape == (2, 3, 64, 96)
    assert vae.encode(images).latent_dist.mode().shape == (2, 9, 2, 4)


def test_gradient_checkpointing(images):
    gradients = []
    for checkpointing in (False, True):
        vae = make_autoencoder().train()
        if checkpointing:
            vae.enable_gradient_checkpointing()
            assert vae.is_gradient_checkpointing
        vae(images).sample.square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in vae.named_parameters()})
    for name, grad in gradients[0].items():
        assert torch.equal(gradients[1][name], grad), name


# -- files


@torch.no_grad()
def test_save_and_load(vae, images, tmp_path):
    vae.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = AutoencoderGPSToken.from_pretrained(tmp_path)
    assert torch.equal(loaded(images).sample, vae(images).sample)
    assert loaded.config.latents_channel_std == vae.config.latents_channel_std
    half = AutoencoderGPSToken.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    latents = half.encode(images.bfloat16()).latent_dist.mode()
    assert latents.dtype == torch.float32
    sample = half.decode(latents.bfloat16()).sample
    assert sample.dtype == torch.bfloat16
    assert torch.isfinite(sample).all()


def test_a_checkpoint_that_does_not_fit_is_an_error(vae, tmp_path):
    vae.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["model.encoder.texture_head.bias"]
    save_file({**tensors, "stranger": torch.zeros(1)}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 missing \(model.encoder.texture_head.bias\); 1 unexpected \(stranger\)"):
        AutoencoderGPSToken.from_pretrained(tmp_path)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors must be a whole safetensors file, got a damaged one"):
        AutoencoderGPSToken.from_pretrained(tmp_path)


# -- a pipeline of diffusers


def make_pipeline(vae, size):
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        sample_size=size,
        num_layers=1,
        patch_size=1,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=9,
        out_channels=18,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )
    pipeline = DiTPipeline(transformer=transformer.eval(), vae=vae, scheduler=DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline):
    generator = torch.Generator().manual_seed(0)
    return pipeline([3, 7], generator=generator, num_inference_steps=2, output_type="np").images


def test_dit_pipeline(tmp_path):
    vae = make_autoencoder(num_tokens=16)
    pipeline = make_pipeline(vae, size=4)
    images = generate(pipeline)
    assert images.shape == (2, 32, 32, 3)
    assert np.isfinite(images).all()
    assert images.std() > 0
    # Twice the grid in both directions: four tiles, an image of twice the side.
    assert generate(make_pipeline(vae, size=8)).shape == (2, 64, 64, 3)
    pipeline.save_pretrained(tmp_path)
    loaded = DiTPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.vae) is AutoencoderGPSToken
    assert np.array_equal(generate(loaded), images)


def test_signatures_are_those_of_autoencoder_kl(vae, images):
    kl = AutoencoderKL(block_out_channels=(4,), norm_num_groups=4, latent_channels=2, sample_size=8)
    with torch.no_grad():
        encoded = kl.encode(images[:, :, :8, :8])
        assert type(vae.encode(images)) is type(encoded)
        assert type(vae.encode(images).latent_dist) is type(encoded.latent_dist)
        latents = vae.encode(images).latent_dist.mode()
        assert type(vae.decode(latents, generator=None)) is type(kl.decode(encoded.latent_dist.mode(), generator=None))


# -- bad input


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (torch.zeros(1, 8, 2, 4), r"\(B, 5 \+ C = 9, h, w\) .* 2 x 4 grid of 8 tokens, got \(1, 8, 2, 4\)"),
        (torch.zeros(1, 9, 3, 4), r"multiples of the 2 x 4 grid of 8 tokens, got \(1, 9, 3, 4\)"),
        (torch.zeros(9, 2, 4), r"got \(9, 2, 4\)"),
        (torch.zeros(1, 9, 0, 4), r"got \(1, 9, 0, 4\)"),
        (torch.full((1, 9, 2, 4), float("nan")), "z must be finite"),
    ],
)
def test_decode_refuses(vae, latents, message):
    with pytest.raises(ValueError, match=message):
        vae.decode(latents)


def test_refuses(vae):
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\), got \(1, 4, 32, 32\)"):
        vae.encode(torch.zeros(1, 4, 32, 32))
    with pytest.raises(ValueError, match=r"image_size must have 2 x 2 tiles .* got \(32, 32\)"):
        vae.decode(torch.zeros(1, 9, 4, 8), image_size=32)
    with pytest.raises(ValueError, match=r"latent_channels must be 5 \+ texture_channels = 21, got 4"):
        AutoencoderGPSToken(latent_channels=4)
    tiny = {name: vae.config[name] for name in ("texture_channels", "hidden_size", "num_attention_heads")}
    with pytest.raises(ValueError, match="must be given together, got only latents_channel_mean"):
        AutoencoderGPSToken(**tiny, latents_channel_mean=[0.0] * 9)
    with pytest.raises(ValueError, match="latents_channel_mean must hold 9 numbers, one per channel, got 8"):
        AutoencoderGPSToken(**tiny, latents_channel_mean=[0.0] * 8, latents_channel_std=[1.0] * 9)
    with pytest.raises(ValueError, match=r"every entry of latents_channel_std must be a number from .*, got 0"):
        AutoencoderGPSToken(**tiny, latents_channel_mean=[0.0] * 9, latents_channel_std=[0.0] * 9)
    with pytest.raises(ValueError, match="at least two tokens, got 0"):
        vae.measure_statistics([])
    with pytest.raises(TypeError, match="latents_channel_means"):
        AutoencoderGPSToken.from_gpstoken(vae.to_gpstoken(), latents_channel_means=[0.0] * 9)
