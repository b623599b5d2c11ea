# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""AutoencoderGPSToken: the tokenizer behind AutoencoderKL's interface, and inside a pipeline of diffusers."""

import inspect

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoModel, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from model_helpers import make_images, make_model, max_error
from safetensors.torch import load_file, save_file
from tiny_pipeline import make_bank, make_texture_transformer

from gpstoken_hf import bundled
from gpstoken_hf.autoencoder_gpstoken import MODEL_FIELDS, RENAMED_FIELDS, AutoencoderGPSToken
from gpstoken_hf.gaussians import check_gaussians
from gpstoken_hf.metrics import psnr
from gpstoken_hf.modeling_gpstoken import GPSTokenModel

# Through logits and standardisation and back, in float32. Measured 3e-6 in pixels.
PIXELS = 1e-4


# The tiny model has 8 tokens of 9 values: 2 x 2 cells of 16 pixels, each with two tokens.
CHANNELS, SCALE = 18, 16


def make_autoencoder(**overrides):
    return AutoencoderGPSToken.from_gpstoken(make_model(**overrides), [make_images(4, 32, 32, seed=9)])


@pytest.fixture(scope="module")
def vae():
    return make_autoencoder()


@pytest.fixture(scope="module")
def images():
    return make_images(3, 32, 32)


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
    assert latents.shape == (3, CHANNELS, 2, 2)
    assert latents.dtype == torch.float32
    assert torch.equal(latent_dist.sample(torch.Generator().manual_seed(1)), latents)
    assert torch.equal(latent_dist.mean, latents)
    assert not latent_dist.std.any()
    assert torch.equal(vae.encode(images, return_dict=False)[0].mode(), latents)
    # Without gradients the values are checked once more by the tokenizer.
    vae.to_gpstoken().validate_inputs = False
    assert torch.equal(vae.encode(images).latent_dist.mode(), latents)
    vae.to_gpstoken().validate_inputs = True


@pytest.mark.parametrize(
    ("overrides", "channels", "scale"),
    [
        ({}, 18, 16),
        ({"num_tokens": 16}, 9, 8),
        ({"num_tokens": 12}, 27, 16),
        ({"num_tokens": 64, "min_region_size": 2}, 9, 4),
        ({"image_size": 64, "num_tokens": 128}, 18, 8),
        ({"image_size": 48, "num_tokens": 72}, 18, 8),
    ],
)
def test_config_tells_pipelines_the_shape_of_latents(overrides, channels, scale):
    vae = AutoencoderGPSToken.from_gpstoken(make_model(**overrides))
    config = vae.config
    assert 2 ** (len(config.block_out_channels) - 1) == vae.spatial_compression_ratio == scale
    assert 2 ** (len(config.encoder_block_out_channels) - 1) == scale
    assert (config.latent_channels, config.scaling_factor, config.shift_factor) == (channels, 1.0, 0.0)
    # Pipelines of diffusers would standardise once more with statistics of these names.
    assert "latents_mean" not in config
    side = config.image_size
    with torch.no_grad():
        latents = vae.encode(make_images(1, side, side)).latent_dist.mode()
    assert latents.shape == (1, channels, side // scale, side // scale)


@pytest.mark.parametrize(("image_size", "num_tokens"), [(32, 7), (32, 30), (256, 1), (48, 50), (33, 16)])
def test_counts_without_a_square_grid_are_refused(image_size, num_tokens):
    with pytest.raises(ValueError, match=f"got num_tokens={num_tokens} and image_size={image_size}"):
        AutoencoderGPSToken.from_gpstoken(make_model(image_size=image_size, num_tokens=num_tokens))


@torch.no_grad()
def test_latents_are_standardised(vae):
    latents = vae.encode(make_images(4, 32, 32, seed=9)).latent_dist.mode()
    assert latents.mean((0, 2, 3)).abs().max() < 1e-4
    assert (latents.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-3
    plain = AutoencoderGPSToken.from_gpstoken(vae.to_gpstoken())
    raw = plain.encode(make_images(4, 32, 32, seed=9)).latent_dist.mode()
    mean = torch.tensor(vae.config.latents_channel_mean).view(1, CHANNELS, 1, 1)
    std = torch.tensor(vae.config.latents_channel_std).view(1, CHANNELS, 1, 1)
    assert max_error((raw - mean) / std, latents) < 1e-4


@torch.no_grad()
def test_round_trip_is_the_tokenizer_s_reconstruction(vae, images):
    model = vae.to_gpstoken()
    expected = model(images).sample
    tokens = model.encode(images).tokens
    latents = vae.encode(images).latent_dist.mode()
    assert max_error(vae.latents_to_tokens(latents), tokens) < 1e-5
    assert max_error(vae.tokens_to_latents(tokens), latents) < 1e-4
    assert max_error(vae.decode(latents).sample, expected) <= PIXELS
    assert max_error(vae.decode(latents, return_dict=False)[0], expected) <= PIXELS
    assert max_error(vae(images).sample, expected) <= PIXELS
    assert max_error(vae(images, sample_posterior=True, return_dict=False)[0], expected) <= PIXELS


@torch.no_grad()
@pytest.mark.parametrize("tile_decode", ["merged", "stitched"])
def test_several_tiles_are_the_tokenizer_s_reconstruction_in_tiles(tile_decode):
    vae = make_autoencoder(tile_decode=tile_decode)
    model = vae.to_gpstoken()
    images = make_images(2, 64, 96)
    tokens = model.encode(images, tile_size=32).tokens
    latents = vae.encode(images).latent_dist.mode()
    assert latents.shape == (2, CHANNELS, 4, 6)
    assert max_error(vae.latents_to_tokens(latents), tokens) < 1e-5
    assert max_error(vae.tokens_to_latents(tokens, (4, 6)), latents) < 1e-4
    assert max_error(vae.decode(latents).sample, model(images, tile_size=32).sample) <= PIXELS
    # Every tile has the latents of an image.
    tile = vae.encode(images[:, :, 32:, 64:]).latent_dist.mode()
    assert max_error(latents[:, :, 2:, 4:], tile) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("size", [(16, 16), (32, 32), (16, 48), (80, 48), (37, 51), (5, 90)])
@pytest.mark.parametrize("tile_decode", ["merged", "stitched"])
def test_latents_grow_with_the_image_with_and_without_tiling(size, tile_decode):
    vae = make_autoencoder(tile_decode=tile_decode)
    images = make_images(2, *size)
    cells = (-(-size[0] // SCALE), -(-size[1] // SCALE))
    latents = vae.encode(images).latent_dist.mode()
    decoded = vae.decode(latents).sample
    assert latents.shape == (2, CHANNELS, *cells)
    assert decoded.shape == (2, 3, SCALE * cells[0], SCALE * cells[1])
    assert max_error(vae(images).sample, decoded[..., : size[0], : size[1]]) == 0
    vae.enable_tiling()
    assert max_error(vae.encode(images).latent_dist.mode(), latents) < 1e-4
    assert vae.decode(latents).sample.shape == decoded.shape
    vae.disable_tiling()
    assert torch.equal(vae.decode(latents).sample, decoded)


@torch.no_grad()
def test_cells_finer_than_the_map():
    """Four levels of the decoder, so that a pixel of the map covers 2 x 2 cells."""
    vae = make_autoencoder(num_tokens=64, min_region_size=1, decoder_channel_multipliers=(1, 1, 1, 1))
    assert (vae.spatial_compression_ratio, vae.to_gpstoken().config.map_scale) == (4, 8)
    for size in ((32, 32), (36, 68), (4, 12)):
        latents = vae.encode(make_images(1, *size)).latent_dist.mode()
        assert latents.shape == (1, 9, size[0] // 4, size[1] // 4)
        assert vae.decode(latents).sample.shape == (1, 3, *size)


@torch.no_grad()
def test_tiling_bounds_what_is_computed_at_once():
    vae = make_autoencoder()
    images, sizes = make_images(1, 64, 96), []
    hook = vae.to_gpstoken().decoder.register_forward_hook(lambda module, args, output: sizes.append(output.shape))
    encoded = []
    other = vae.to_gpstoken().encoder.register_forward_hook(lambda module, args, output: encoded.append(len(output)))
    vae(images)
    assert (encoded, sizes) == ([6], [(1, 3, 64, 96)])
    encoded.clear(), sizes.clear()
    vae.enable_tiling(tile_sample_min_height=32, tile_sample_min_width=48, tile_sample_stride_width=24)
    vae(images)
    assert encoded == [1] * 6
    # Windows begin every 24 pixels along x and every 24 (3/4 of 32) along y.
    assert sizes == [(1, 3, 32, 48)] * 9
    encoded.clear(), sizes.clear()
    vae.enable_tiling(False)
    vae(images)
    assert (encoded, sizes) == ([6], [(1, 3, 64, 96)])
    hook.remove(), other.remove()


@torch.no_grad()
def test_a_photograph_is_nearly_the_same_with_tiling():
    data = pytest.importorskip("skimage.data")
    pixels = torch.tensor(data.chelsea()[:192, 60:316]).permute(2, 0, 1)[None] / 127.5 - 1
    vae = AutoencoderGPSToken.from_pretrained(bundled("gpstoken-nano"))
    whole = vae(pixels).sample
    vae.enable_tiling()
    tiled = vae(pixels).sample
    # Measured 28.45 dB and 28.54 dB, and a mean difference of 0.012.
    assert psnr(whole, pixels).item() > 28
    assert abs(psnr(tiled, pixels).item() - psnr(whole, pixels).item()) < 0.3
    assert (whole - tiled).abs().mean() < 0.03


def test_the_tokenizer_s_own_tiling_changes_no_latents(vae):
    images = make_images(1, 32, 64)
    with torch.no_grad():
        expected = vae.encode(images).latent_dist.mode()
        vae.to_gpstoken().enable_tiling(tile_size=16)
        assert max_error(vae.encode(images).latent_dist.mode(), expected) < 1e-4
        vae.to_gpstoken().disable_tiling()


@torch.no_grad()
def test_any_finite_latent_is_an_image(vae):
    for scale in (1.0, 1e3, 1e6):
        latents = torch.randn(2, CHANNELS, 3, 2, generator=torch.Generator().manual_seed(0)) * scale
        check_gaussians(vae.latents_to_tokens(latents)[..., :5])
        assert torch.isfinite(vae.decode(latents).sample).all()


@torch.no_grad()
def test_slicing():
    vae, images = make_autoencoder(), make_images(3, 48, 32)
    expected = vae(images).sample
    vae.enable_slicing()
    assert vae.use_slicing
    assert vae.to_gpstoken().use_slicing
    assert max_error(vae(images).sample, expected) <= 1e-5
    vae.disable_slicing()
    assert not vae.use_slicing


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


@torch.no_grad()
def test_a_saved_tokenizer_is_wrapped(images, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "nested")
    vae = AutoencoderGPSToken.from_pretrained(tmp_path, subfolder="nested")
    assert not vae.training
    assert vae.config.latents_channel_mean is None
    assert torch.equal(vae.to_gpstoken()(images).sample, model(images).sample)
    statistics = {"latents_channel_mean": [0.5] * CHANNELS, "latents_channel_std": [2.0] * CHANNELS}
    vae, info = AutoencoderGPSToken.from_pretrained(
        tmp_path / "nested", torch_dtype=torch.bfloat16, scaling_factor=0.5, output_loading_info=True, **statistics
    )
    assert not info["missing_keys"]
    assert (vae.dtype, vae.config.scaling_factor) == (torch.bfloat16, 0.5)
    assert vae.config.latents_channel_std == [2.0] * CHANNELS
    vae.save_pretrained(tmp_path / "wrapped")
    assert AutoencoderGPSToken.from_pretrained(tmp_path / "wrapped").config.scaling_factor == 0.5
    make_model(num_tokens=7).save_pretrained(tmp_path / "seven")
    with pytest.raises(ValueError, match=r"config.json must hold legal values, got: num_tokens must be k s\^2"):
        AutoencoderGPSToken.from_pretrained(tmp_path / "seven")
    with pytest.raises(ValueError, match=r"latents_channel_mean must hold 18 numbers, one per channel, got 1"):
        AutoencoderGPSToken.from_pretrained(tmp_path / "nested", latents_channel_mean=[0.0], latents_channel_std=[1.0])
    with pytest.raises(OSError, match=r"config\.json"):
        AutoencoderGPSToken.from_pretrained(tmp_path)


@pytest.mark.parametrize(("name", "place"), [("gpstoken-nano", {}), ("gpstoken-digits", {"subfolder": "vae"})])
def test_bundled_tokenizers_are_wrapped(name, place):
    vae = AutoencoderGPSToken.from_pretrained(bundled(name), **place)
    model = GPSTokenModel.from_pretrained(bundled(name), **place)
    images = make_images(1, model.config.image_size, model.config.image_size)
    with torch.no_grad():
        assert max_error(vae(images).sample, model(images).sample) <= PIXELS


def test_a_bundled_name_is_no_repository():
    with pytest.raises(OSError, match="the name of a bundled checkpoint"):
        AutoencoderGPSToken.from_pretrained("gpstoken-nano")


def test_automodel_of_diffusers_finds_the_classes(tmp_path):
    vae = make_autoencoder()
    vae.save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(str(tmp_path))) is AutoencoderGPSToken
    bank, transformer = make_bank(), make_texture_transformer()
    for name, model in (("bank", bank), ("transformer", transformer)):
        model.save_pretrained(tmp_path / name)
        assert type(AutoModel.from_pretrained(str(tmp_path / name))) is type(model)


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
        (torch.zeros(1, 9, 2, 2), r"\(B, 18, h, w\) with at least one cell, got \(1, 9, 2, 2\)"),
        (torch.zeros(18, 2, 2), r"got \(18, 2, 2\)"),
        (torch.zeros(1, 18, 0, 4), r"got \(1, 18, 0, 4\)"),
        (torch.zeros(1, 18, 2, 2, dtype=torch.long), "floating point, got torch.int64"),
        (torch.full((1, 18, 2, 4), float("nan")), "z must be finite"),
    ],
)
def test_decode_refuses(vae, latents, message):
    with pytest.raises(ValueError, match=message):
        vae.decode(latents)
    with pytest.raises(ValueError, match=message):
        vae.latents_to_tokens(latents)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tile_sample_min_height": 0}, "tile_sample_min_height must be a positive multiple of 2 pixels, got 0"),
        ({"tile_sample_min_width": 33}, "tile_sample_min_width must be a positive multiple of 2 pixels, got 33"),
        ({"tile_sample_stride_width": 33}, "tile_sample_stride_width must be between 1 and 32 pixels, got 33"),
        ({"tile_sample_stride_height": 0}, "tile_sample_stride_height must be between 1 and 32 pixels, got 0"),
    ],
)
def test_tiling_refuses(vae, arguments, message):
    with pytest.raises(ValueError, match=message):
        vae.enable_tiling(**arguments)
    assert not vae.use_tiling


def test_refuses(vae):
    with pytest.raises(ValueError, match=r"x must be a tensor of shape \(B, 3, H, W\), got \(1, 4, 32, 32\)"):
        vae.encode(torch.zeros(1, 4, 32, 32))
    with pytest.raises(ValueError, match="at least one image"):
        vae.encode(torch.zeros(0, 3, 32, 32))
    with pytest.raises(ValueError, match=r"\(B, 8, 9\), got \(1, 7, 9\)"):
        vae.tokens_to_latents(torch.zeros(1, 7, 9))
    with pytest.raises(ValueError, match=r"latent_channels must be 42, as the other fields determine, got 4"):
        AutoencoderGPSToken(latent_channels=4)
    with pytest.raises(ValueError, match=r"block_out_channels must be \[.*\], as the other fields determine, got"):
        AutoencoderGPSToken(block_out_channels=(128, 256))
    with pytest.raises(ValueError, match="shift_factor must be a number"):
        AutoencoderGPSToken(shift_factor=float("nan"))
    tiny = {name: vae.config[name] for name in ("texture_channels", "hidden_size", "num_attention_heads")}
    with pytest.raises(ValueError, match="must be given together, got only latents_channel_mean"):
        AutoencoderGPSToken(**tiny, latents_channel_mean=[0.0] * 18)
    with pytest.raises(ValueError, match="latents_channel_mean must hold 18 numbers, one per channel, got 8"):
        AutoencoderGPSToken(**tiny, latents_channel_mean=[0.0] * 8, latents_channel_std=[1.0] * 18)
    with pytest.raises(ValueError, match=r"every entry of latents_channel_std must be a number from .*, got 0"):
        AutoencoderGPSToken(**tiny, latents_channel_mean=[0.0] * 18, latents_channel_std=[0.0] * 18)
    with pytest.raises(ValueError, match="at least two cells, got 0"):
        vae.measure_statistics([])
    with pytest.raises(ValueError, match="make every latent channel vary"):
        vae.measure_statistics([torch.zeros(2, 3, 16, 16)])
    with pytest.raises(TypeError, match="latents_channel_means"):
        AutoencoderGPSToken.from_gpstoken(vae.to_gpstoken(), latents_channel_means=[0.0] * 9)
