# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""GPSTokenConfig: every choice that shapes a GPSToken tokenizer, and the table of presets."""

# Annotations stay objects here (no `from __future__ import annotations`): `@strict` checks the fields against them.
import os
from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from .file_checks import (
    check_fields,
    check_number,
    check_source,
    check_statistics,
    read_json,
    refusing,
    transformers_fields,
)

# s64, m128 and l256 have the shapes of the authors' released checkpoints. (The paper, App. B, gives s64 60 blocks; the
# released one has 30.) The others are small models of this project: nano is the bundled gpstoken-nano, digits is for
# 32 x 32 images, tiny is for tests.
PRESETS: dict[str, dict[str, Any]] = {
    "s64": {"num_tokens": 64, "texture_channels": 16},
    "m128": {"num_tokens": 128, "texture_channels": 16},
    "l256": {"num_tokens": 256, "texture_channels": 32, "tile_decode": "stitched"},
    "nano": {
        "image_size": 64,
        "num_tokens": 32,
        "texture_channels": 16,
        "hidden_size": 192,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "roi_size": 8,
        "conditioner_channels": 32,
        "decoder_base_channels": 32,
        "decoder_channel_multipliers": (1, 2, 4),
        "decoder_layers_per_block": 1,
        "norm_num_groups": 8,
        "min_region_size": 4,
    },
    "digits": {
        "image_size": 32,
        "num_tokens": 16,
        "texture_channels": 8,
        "hidden_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "roi_size": 4,
        "conditioner_channels": 32,
        "decoder_base_channels": 32,
        "decoder_channel_multipliers": (1, 1, 2),
        "decoder_layers_per_block": 1,
        "norm_num_groups": 8,
        "min_region_size": 2,
    },
    "tiny": {
        "image_size": 32,
        "num_tokens": 8,
        "texture_channels": 4,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "roi_size": 4,
        "conditioner_channels": 32,
        "decoder_base_channels": 32,
        "decoder_channel_multipliers": (1, 1),
        "decoder_layers_per_block": 1,
        "norm_num_groups": 8,
        "min_region_size": 4,
    },
}

# What a config may ask for: the largest presets have 30 blocks of width 512.
LIMITS: dict[str, tuple[float, float]] = {
    "image_size": (1, 2**16),
    "num_tokens": (1, 2**20),
    "texture_channels": (1, 2**13),
    "hidden_size": (1, 2**17),
    "num_hidden_layers": (1, 1000),
    "num_attention_heads": (1, 2**12),
    "mlp_ratio": (0.01, 100.0),
    "roi_size": (1, 2**10),
    "conditioner_channels": (1, 2**16),
    "decoder_base_channels": (1, 2**16),
    "decoder_layers_per_block": (1, 64),
    "norm_num_groups": (1, 2**16),
    "splat_support": (1e-6, 1000.0),
    "complexity_exponent": (0.0, 1000.0),
    "min_region_size": (1, 2**16),
    "sigma_scale": (1e-6, 1000.0),
}
# What transformers passes to a constructor but does not save.
INIT_ARGUMENTS = {"attn_implementation", "experts_implementation"}
# Weights of the predictor of PSNR: one for each feature of a partition (quality.py).
NUM_QUALITY_FEATURES = 7
MAX_DECODER_LEVELS, MAX_CHANNEL_MULTIPLIER, MAX_LABELS = 12, 2**10, 2**20


def _raise_value_errors(method: Callable[..., Any]) -> Callable[..., Any]:
    """`@strict` raises errors of its own: make them the ValueErrors that they are about."""

    @wraps(method)
    def checked(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except StrictDataclassError as error:
            raise ValueError(str(error.__cause__ or error)) from error

    return checked


def _with_value_errors(cls: type) -> type:
    for name in ("__init__", "__setattr__", "validate"):
        setattr(cls, name, _raise_value_errors(getattr(cls, name)))
    return cls


@_with_value_errors
@strict
class GPSTokenConfig(PreTrainedConfig):
    r"""Configuration of a [`GPSTokenModel`]. The defaults are those of the released m128 checkpoint.

    Args:
        image_size (`int`, *optional*, defaults to 256): side in pixels of the square training images, and the default
            size of decoded images and of tiles. The model takes any H x W.
        num_tokens (`int`, *optional*, defaults to 128): L, tokens per image (per tile when encoding in tiles).
        texture_channels (`int`, *optional*, defaults to 16): C, texture features per token.
        hidden_size (`int`, *optional*, defaults to 512): width of the encoder.
        num_hidden_layers (`int`, *optional*, defaults to 30): encoder blocks.
        num_attention_heads (`int`, *optional*, defaults to 8): attention heads per encoder block; divides
            `hidden_size`.
        mlp_ratio (`float`, *optional*, defaults to 4.0): inner width of an encoder MLP over `hidden_size`, above 0.
        roi_size (`int`, *optional*, defaults to 8): RoIAlign samples `roi_size x roi_size` features per region.
        conditioner_channels (`int`, *optional*, defaults to 128): channels of the full-resolution image features; a
            multiple of `norm_num_groups`.
        decoder_base_channels (`int`, *optional*, defaults to 128): channels of the decoder at full resolution; a
            multiple of `norm_num_groups`.
        decoder_channel_multipliers (`list[int]`, *optional*, defaults to `(1, 2, 4)`): channels of each decoder level
            over `decoder_base_channels`, full resolution first. Gaussians are splatted into a map of the image size
            over `2^(levels - 1)`, rounded up.
        decoder_layers_per_block (`int`, *optional*, defaults to 2): each decoder level has one residual block more.
        norm_num_groups (`int`, *optional*, defaults to 32): groups of every group norm. With one channel per group (32
            groups of 32 channels) the last norm removes the brightness and contrast of an image, so small models need
            fewer groups.
        splat_support (`float`, *optional*, defaults to 3.0): reach of a Gaussian along each axis in sigmas (Eq. 3),
            above 0. The paper's text says 5.
        complexity_exponent (`float`, *optional*, defaults to 2.5): lambda, the exponent of the entropy in the
            complexity of a region (Eq. 4), at least 0.
        min_region_size (`int`, *optional*, defaults to 8): s_min in pixels. A region is not split when both of its
            sides are at most this long.
        sigma_scale (`float`, *optional*, defaults to 2/3): initial sigma over the extent of a region: 2/3 in the
            authors' code, 1/3 in the paper.
        align_corners (`bool`, *optional*, defaults to `True`): where pixels lie in normalised coordinates. `True` puts
            the centres of the corner pixels at -1 and 1, as the authors' code does. `False` puts their outer edges
            there; an image and its enlargement then have the same layout, so the model does not depend on the size
            that it was trained at.
        tile_decode (`str`, *optional*, defaults to `"merged"`): how tokens that were encoded in tiles are decoded:
            `"merged"` (one map, with the statistics of the norms interpolated between tiles) or `"stitched"` (tile by
            tile).
        latents_mean, latents_std (`list[float]`, *optional*): statistics of the channels of `[g - g_init, texture]`,
            5 + C numbers each, by which a texture generator standardises tokens. Give both or neither.
        quality_predictor (`list[float]`, *optional*): 7 weights that predict the PSNR of an image from its partition,
            for `encode(..., target_psnr=..., fast=True)`; `python -m pipelines.fit_quality` measures them.

    Raises:
        huggingface_hub.errors.StrictDataclassError: if a field has another type, is out of its range, or does not fit
            another field; in the constructor and on assignment.

    Examples:
        ```python
        >>> from gpstoken_hf import GPSTokenConfig, GPSTokenModel

        >>> config = GPSTokenConfig.preset("tiny", num_tokens=12)
        >>> config.image_size, config.num_tokens, config.token_channels
        (32, 12, 9)
        >>> model = GPSTokenModel(config)  # random weights

        ```
    """

    model_type = "gpstoken"

    image_size: int = 256
    num_tokens: int = 128
    texture_channels: int = 16
    hidden_size: int = 512
    num_hidden_layers: int = 30
    num_attention_heads: int = 8
    mlp_ratio: float | int = 4.0
    roi_size: int = 8
    conditioner_channels: int = 128
    decoder_base_channels: int = 128
    decoder_channel_multipliers: list[int] | tuple[int, ...] = (1, 2, 4)
    decoder_layers_per_block: int = 2
    norm_num_groups: int = 32
    splat_support: float | int = 3.0
    complexity_exponent: float | int = 2.5
    min_region_size: int = 8
    sigma_scale: float | int = 2 / 3
    align_corners: bool = True
    tile_decode: str = "merged"
    latents_mean: list[float] | tuple[float, ...] | None = None
    latents_std: list[float] | tuple[float, ...] | None = None
    quality_predictor: list[float] | tuple[float, ...] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        unknown = sorted(set(kwargs) - transformers_fields(type(self)) - INIT_ARGUMENTS)
        if unknown:
            raise ValueError(f"arguments must be fields of GPSTokenConfig, got {', '.join(map(repr, unknown))}")
        if kwargs.get("num_labels") is not None:
            check_number("num_labels", kwargs["num_labels"], 0, MAX_LABELS)
        super().__post_init__(**kwargs)
        if not isinstance(self.dtype, torch.dtype | None):
            raise ValueError(f"dtype must be the name of a torch.dtype, got {self.dtype!r}")

    def validate_limits(self) -> None:
        """Sizes, counts and factors are within `LIMITS`."""
        for name, (low, high) in LIMITS.items():
            check_number(name, getattr(self, name), low, high)

    def validate_heads(self) -> None:
        """The heads divide the width of the encoder."""
        if self.num_attention_heads > 0 and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads, "
                f"got hidden_size={self.hidden_size} and num_attention_heads={self.num_attention_heads}"
            )

    def validate_norm_groups(self) -> None:
        """Channels of convolutions are multiples of the groups of their norms."""
        for name in ("conditioner_channels", "decoder_base_channels"):
            value = getattr(self, name)
            if value % max(self.norm_num_groups, 1):
                raise ValueError(
                    f"{name} must be a positive multiple of norm_num_groups={self.norm_num_groups}, got {value}"
                )

    def validate_multipliers(self) -> None:
        """The decoder has a bounded number of levels."""
        multipliers = self.decoder_channel_multipliers
        if not 1 <= len(multipliers) <= MAX_DECODER_LEVELS:
            raise ValueError(
                f"decoder_channel_multipliers must hold 1 to {MAX_DECODER_LEVELS} integers, one per level, "
                f"got {len(multipliers)}"
            )
        for value in multipliers:
            check_number("every entry of decoder_channel_multipliers", value, 1, MAX_CHANNEL_MULTIPLIER)

    def validate_tile_decode(self) -> None:
        """`tile_decode` is a known way."""
        if self.tile_decode not in ("merged", "stitched"):
            raise ValueError(f"tile_decode must be 'merged' or 'stitched', got {self.tile_decode!r}")

    def validate_latent_statistics(self) -> None:
        """Both statistics or neither, 5 + C numbers each."""
        check_statistics(("latents_mean", "latents_std"), self.latents_mean, self.latents_std, self.token_channels)

    def validate_quality_predictor(self) -> None:
        """One finite weight for each feature of `quality.NestedPartition.features`."""
        weights = self.quality_predictor
        if weights is None:
            return
        if len(weights) != NUM_QUALITY_FEATURES:
            raise ValueError(f"quality_predictor must hold {NUM_QUALITY_FEATURES} numbers, got {len(weights)}")
        for value in weights:
            check_number("every entry of quality_predictor", value, -1e6, 1e6)

    @property
    def map_scale(self) -> int:
        """Image pixels per map pixel along each axis, `2^(levels - 1)`."""
        return 2 ** (len(self.decoder_channel_multipliers) - 1)

    @property
    def token_channels(self) -> int:
        """Values per token, 5 + C."""
        return 5 + self.texture_channels

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Find and read a saved config, as transformers does; a missing file is an OSError."""
        check_source(pretrained_model_name_or_path)
        config, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if not config:
            raise OSError(f"{pretrained_model_name_or_path} does not appear to have a file named config.json")
        return config, unused

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike[str]) -> dict[str, Any]:
        config = read_json(json_file)
        if "model_type" not in config:
            raise ValueError(f"{json_file} must have the model_type {cls.model_type!r}, got none")
        cls._check_dict(json_file, config)
        return super()._dict_from_json_file(json_file)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make a config of a dictionary, as transformers does.

        Raises:
            ValueError: if a field is unknown, of a wrong type or out of its range.
        """
        cls._check_dict("the config", config_dict)
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def _check_dict(cls, source: str | os.PathLike[str], config: dict[str, Any]) -> None:
        if config.get("model_type", cls.model_type) != cls.model_type:
            found = repr(config["model_type"])[:100]
            raise ValueError(f"{source} must have the model_type {cls.model_type!r}, got {found}")
        check_fields(source, config, cls.__name__, transformers_fields(cls))
        with refusing(source):
            cls(**config)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "GPSTokenConfig":
        """The configuration of a named preset, with some fields replaced.

        Args:
            name (`str`): a key of `PRESETS`: `"s64"`, `"m128"`, `"l256"`, `"nano"`, `"digits"` or `"tiny"`.
            overrides: fields of the configuration that replace those of the preset.

        Raises:
            ValueError: if no preset has this name.
            TypeError: if no field has the name of an override.

        Examples:
            ```python
            >>> from gpstoken_hf import GPSTokenConfig

            >>> GPSTokenConfig.preset("l256").tile_decode
            'stitched'

            ```
        """
        if name not in PRESETS:
            raise ValueError(f"name must be one of the presets {sorted(PRESETS)}, got {name!r}")
        # The constructor, like that of every transformers config, would store an unknown field without a word.
        unknown = sorted(set(overrides) - {field.name for field in fields(cls)})
        if unknown:
            raise TypeError(f"preset() got an unexpected keyword argument {unknown[0]!r}")
        return cls(**{**PRESETS[name], **overrides})


__all__ = ["PRESETS", "GPSTokenConfig"]
