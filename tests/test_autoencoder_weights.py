# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""What diffusers does to a model's weights and attention: casting, quantization, backends, fused projections, LoRA."""

import importlib

import diffusers
import pytest
import torch
from diffusers.hooks import apply_layerwise_casting
from model_helpers import make_images, make_model, max_error

from gpstoken_hf import AutoencoderGPSToken, GPSTokenModel


def make_autoencoder(**overrides):
    return AutoencoderGPSToken.from_gpstoken(make_model(**overrides), [make_images(4, 32, 32, seed=9)])


@pytest.fixture(scope="module")
def images():
    return make_images(2, 48, 32)


# -- casting

# Storage, computation and the weights before; the largest error measured over both ways of decoding.
CASTS = [
    (torch.float16, torch.float32, torch.float32, 0.01),  # 0.0012
    (torch.float8_e4m3fn, torch.float32, torch.float32, 0.6),  # 0.27
    (torch.float8_e4m3fn, torch.bfloat16, torch.float32, 0.6),  # 0.26
    (torch.float8_e5m2, torch.bfloat16, torch.bfloat16, 1.0),  # 0.50
]


@torch.no_grad()
@pytest.mark.parametrize("tile_decode", ["merged", "stitched"])
@pytest.mark.parametrize(("storage", "compute", "before", "tolerance"), CASTS)
def test_layerwise_casting(images, tile_decode, storage, compute, before, tolerance):
    vae = make_autoencoder(tile_decode=tile_decode)
    expected = vae(images).sample
    vae.to(before).enable_layerwise_casting(storage_dtype=storage, compute_dtype=compute)
    decoder = vae.to_gpstoken().decoder
    assert decoder.conv_in.weight.dtype == storage
    assert vae.to_gpstoken().encoder.gaussian_head.weight.dtype == before
    sample = vae(images.to(before)).sample
    assert sample.dtype == compute
    assert max_error(sample.float(), expected) < tolerance
    assert decoder.conv_in.weight.dtype == storage


@torch.no_grad()
@pytest.mark.parametrize("tile_decode", ["merged", "stitched"])
def test_layerwise_casting_of_the_tokenizer(images, tile_decode):
    model = make_model(tile_decode=tile_decode)
    expected = model(images, tile_size=32).sample
    apply_layerwise_casting(model, storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    sample = model(images, tile_size=32).sample
    assert sample.dtype == torch.bfloat16
    # Everything is stored in 8 bits, the Gaussian head included. Measured 0.30.
    assert max_error(sample.float(), expected) < 1.0


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])  # 0.039, 0.0039
def test_half_precision(images, dtype, tolerance):
    vae = make_autoencoder()
    expected = vae(images).sample
    sample = vae.to(dtype)(images.to(dtype)).sample
    assert sample.dtype == dtype
    assert max_error(sample.float(), expected) < tolerance


# -- quantization


@torch.no_grad()
def test_torchao(tmp_path):
    torchao = pytest.importorskip("torchao.quantization")
    int8 = torchao.Int8WeightOnlyConfig()
    model, images = make_model(), make_images(2, 32, 32)
    expected = model(images).sample
    model.save_pretrained(tmp_path / "tokenizer")
    AutoencoderGPSToken.from_gpstoken(model).save_pretrained(tmp_path / "autoencoder")
    transformers_config = importlib.import_module("transformers").TorchAoConfig(int8)
    loaded = [
        GPSTokenModel.from_pretrained(tmp_path / "tokenizer", quantization_config=transformers_config),
        AutoencoderGPSToken.from_pretrained(tmp_path / "tokenizer", quantization_config=transformers_config),
        AutoencoderGPSToken.from_pretrained(
            tmp_path / "autoencoder", quantization_config=diffusers.TorchAoConfig(int8)
        ),
    ]
    for quantized in loaded:
        tokenizer = quantized if isinstance(quantized, GPSTokenModel) else quantized.to_gpstoken()
        assert type(tokenizer.encoder.layers[0].mlp.fc1.weight) is not torch.nn.Parameter
        assert type(tokenizer.get_input_embeddings().weight) is torch.nn.Parameter
        # Measured 0.018.
        assert 0 < max_error(quantized(images).sample, expected) < 0.05


# -- attention


@torch.no_grad()
def test_attention_processors(images):
    vae = make_autoencoder()
    expected = vae(images).sample
    names = {f"model.encoder.layers.{index}.self_attn.processor" for index in range(2)}
    assert set(vae.attn_processors) == names | {"model.decoder.mid_attention.processor"}
    calls = []

    class Counting:
        def __init__(self, processor):
            self.processor = processor

        def __call__(self, attn, *args, **kwargs):
            calls.append(type(attn).__name__)
            return self.processor(attn, *args, **kwargs)

    original = vae.attn_processors
    vae.set_attn_processor({name: Counting(processor) for name, processor in original.items()})
    assert torch.equal(vae(images).sample, expected)
    # Two tiles of different sizes, two layers each; the attention of the map goes tile by tile.
    assert sorted(calls) == ["GPSTokenAttention"] * 4 + ["MapAttention"] * 2
    vae.set_attn_processor(dict(original))
    assert vae.attn_processors == original


@torch.no_grad()
def test_fused_projections(images, tmp_path):
    vae = make_autoencoder()
    expected, names = vae(images).sample, set(vae.state_dict())
    vae.fuse_qkv_projections()
    attention = vae.to_gpstoken().decoder.mid_attention
    assert attention.fused_projections
    assert attention.to_qkv.weight.shape == (96, 32, 1, 1)
    # Measured 0 here; a fused convolution may add up in another order.
    assert max_error(vae(images).sample, expected) < 1e-5
    assert set(vae.state_dict()) == names
    vae.save_pretrained(tmp_path)
    assert torch.equal(AutoencoderGPSToken.from_pretrained(tmp_path)(images).sample, expected)
    vae.fuse_qkv_projections()
    vae.unfuse_qkv_projections()
    assert not attention.fused_projections
    assert not hasattr(attention, "to_qkv")
    assert torch.equal(vae(images).sample, expected)


@torch.no_grad()
def test_attention_backends(images):
    vae = make_autoencoder()
    expected = vae(images).sample
    for backend in ("_native_math", "native"):  # the last one stays the default of the process
        vae.set_attention_backend(backend)
        assert all(processor._attention_backend.value == backend for processor in vae.attn_processors.values())
        # Measured 2.3e-6.
        assert max_error(vae(images).sample, expected) < 1e-4
    with pytest.raises(ValueError, match="must be one of"):
        vae.set_attention_backend("none")
    vae.reset_attention_backend()
    assert all(processor._attention_backend is None for processor in vae.attn_processors.values())
    assert torch.equal(vae(images).sample, expected)


@torch.no_grad()
def test_padding_is_masked_on_every_backend():
    vae, images = make_autoencoder(), make_images(2, 32, 32)
    model = vae.to_gpstoken()
    expected = model(images, num_tokens=[4, 9]).tokens
    vae.set_attention_backend("native")
    assert max_error(model(images, num_tokens=[4, 9]).tokens, expected) < 1e-5
    vae.reset_attention_backend()


@torch.no_grad()
def test_repeated_blocks_are_compiled(images):
    vae = make_autoencoder()
    expected = vae(images).sample
    vae.compile_repeated_blocks(backend="eager")
    assert max_error(vae(images).sample, expected) < 1e-4


def test_lora(images):
    peft = pytest.importorskip("peft")
    vae = make_autoencoder()
    vae.add_adapter(peft.LoraConfig(r=2, target_modules=["qkv_proj", "fc1"], init_lora_weights=False))
    trained = [name for name, parameter in vae.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora" in name for name in trained)
    vae(images).sample.square().mean().backward()
    assert all(dict(vae.named_parameters())[name].grad is not None for name in trained)
