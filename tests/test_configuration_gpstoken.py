# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""GPSTokenConfig: presets, what is refused, and the round trip through a file."""

import json

import pytest
from conversion_helpers import GOLDEN
from transformers import AutoConfig

import gpstoken_hf  # noqa: F401 - registers the config
from gpstoken_hf.configuration_gpstoken import PRESETS, GPSTokenConfig


def test_defaults_are_m128():
    assert GPSTokenConfig().to_dict() == GPSTokenConfig.preset("m128").to_dict()


@pytest.mark.parametrize(("name", "num_tokens", "channels"), [("s64", 64, 16), ("m128", 128, 16), ("l256", 256, 32)])
def test_released_presets(name, num_tokens, channels):
    config = GPSTokenConfig.preset(name)
    assert (config.num_tokens, config.texture_channels) == (num_tokens, channels)
    assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (512, 8, 30)
    assert (config.roi_size, config.conditioner_channels, config.mlp_ratio) == (8, 128, 4)
    assert config.decoder_base_channels == 128
    assert tuple(config.decoder_channel_multipliers) == (1, 2, 4)
    assert config.decoder_layers_per_block == 2
    assert config.image_size // config.map_scale == 64
    assert config.splat_support == 3
    assert (config.complexity_exponent, config.min_region_size, config.sigma_scale) == (2.5, 8, 2 / 3)
    assert config.tile_decode == ("stitched" if name == "l256" else "merged")


@pytest.mark.parametrize("name", ["s64", "m128", "l256"])
def test_released_presets_have_the_release_s_shapes(name):
    shapes = json.loads((GOLDEN / "official_state_dict_shapes.json").read_text())
    keys = next(value for key, value in shapes.items() if name in key)
    config = GPSTokenConfig.preset(name)
    assert keys["gps_embed.weight"] == [1, config.hidden_size]
    assert keys["to_gps.1.weight"] == [config.texture_channels, config.hidden_size]
    assert keys["attnblocks.0.roimlp.weight"] == [1, config.roi_size**2]
    assert f"attnblocks.{config.num_hidden_layers - 1}.roimlp.weight" in keys
    assert f"attnblocks.{config.num_hidden_layers}.roimlp.weight" not in keys


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_is_saved_and_loaded_unchanged(name, tmp_path):
    config = GPSTokenConfig.preset(name)
    config.save_pretrained(tmp_path)
    for loaded in (GPSTokenConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is GPSTokenConfig
        for field in PRESETS["tiny"]:
            value = getattr(loaded, field)
            expected = getattr(config, field)
            assert (list(value) == list(expected)) if isinstance(expected, tuple) else value == expected
        assert loaded.token_channels == 5 + config.texture_channels


def test_overrides_and_unknown_presets():
    assert GPSTokenConfig.preset("tiny", num_tokens=5).num_tokens == 5
    with pytest.raises(ValueError, match=r"name must be one of the presets \[.*'tiny'\], got 'huge'"):
        GPSTokenConfig.preset("huge")


def test_a_misspelt_override_is_an_error():
    with pytest.raises(TypeError, match="unexpected keyword argument 'num_token'"):
        GPSTokenConfig.preset("tiny", num_token=5)
    assert GPSTokenConfig.preset("tiny", dtype="bfloat16", id2label={0: "cat"}).id2label == {0: "cat"}


def test_latent_statistics():
    count = 5 + GPSTokenConfig.preset("tiny").texture_channels
    config = GPSTokenConfig.preset("tiny", latents_mean=[0.5] * count, latents_std=[2.0] * count)
    assert config.latents_mean == [0.5] * count


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_tokens": 0}, "num_tokens must be an integer from 1 to .*, got 0"),
        ({"image_size": -3}, "image_size must be an integer from 1 to .*, got -3"),
        ({"min_region_size": 0}, "min_region_size must be an integer from 1 to .*, got 0"),
        ({"mlp_ratio": 0.0}, "mlp_ratio must be a number from .*, got 0"),
        ({"splat_support": -1.0}, "splat_support must be a number from .*, got -1"),
        ({"sigma_scale": float("nan")}, "sigma_scale must be a number from .*, got nan"),
        ({"complexity_exponent": -0.5}, "complexity_exponent must be a number from .*, got -0.5"),
        ({"hidden_size": 33}, "hidden_size must be a multiple of num_attention_heads.*33.*2"),
        (
            {"conditioner_channels": 12},
            "conditioner_channels must be a positive multiple of norm_num_groups=8, got 12",
        ),
        ({"decoder_base_channels": 0}, "decoder_base_channels must be an integer from 1 to .*, got 0"),
        ({"decoder_channel_multipliers": []}, "must hold 1 to .* integers, one per level, got 0"),
        ({"decoder_channel_multipliers": [1, 0]}, "decoder_channel_multipliers must be an integer .*, got 0"),
        ({"tile_decode": "blended"}, "'merged' or 'stitched', got 'blended'"),
        ({"latents_mean": [0.0] * 9}, "must be given together"),
        (
            {"latents_mean": [0.0] * 8, "latents_std": [1.0] * 8},
            "latents_mean must hold 9 numbers, one per channel, got 8",
        ),
        (
            {"latents_mean": [0.0] * 9, "latents_std": [0.0] * 9},
            "every entry of latents_std must be a number from .*, got 0",
        ),
        ({"num_tokens": "many"}, "num_tokens"),
        ({"num_tokens": 2.5}, "num_tokens"),
        ({"decoder_channel_multipliers": 4}, "decoder_channel_multipliers"),
    ],
)
def test_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        GPSTokenConfig.preset("tiny", **fields)


def test_refuses_on_assignment_too():
    config = GPSTokenConfig.preset("tiny")
    with pytest.raises(ValueError, match="num_tokens"):
        config.num_tokens = "many"
