# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""GPSTokenConfig: every choice that shapes a GPSToken tokenizer, and the table of presets."""

# No `from __future__ import annotations`: @strict checks the types of the fields, and takes none from strings.
import os
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from .loading import (
    check_fields,
    check_number,
    check_source,
    check_statistics,
    read_json,
    refusing,
    transformers_fields,
)

# s64, m128 and l256 have the shapes of the authors' released checkpoints; their paper (App. B) names 60 blocks for
# s64, where the release has 30. The small ones are ours: `nano` is the checkpoint that ships with the package,
# `digits` its sibling for 32 x 32 images, `tiny` is for tests.
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
INIT_ARGUMENTS = {"attn_implementation", "experts_implementation", "_commit_hash"}
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
        image_size (`int`): side of the square images of training, in pixels; the default size of `decode` and the
            default tile. The model takes any H x W.
        num_tokens (`int`): default number of tokens of an image (of a tile, when encoding in tiles).
        texture_channels (`int`): C, the texture features of a token.
        hidden_size (`int`): width of the encoder.
        num_hidden_layers (`int`): number of encoder blocks.
        num_attention_heads (`int`): attention heads of an encoder block; divides `hidden_size`.
        mlp_ratio (`float`): inner width of an encoder MLP over `hidden_size`.
        roi_size (`int`): RoIAlign turns every region into `roi_size x roi_size` features.
        conditioner_channels (`int`): channels of the full-resolution image features; a multiple of `norm_num_groups`.
        decoder_base_channels (`int`): channels of the decoder at full resolution; a multiple of `norm_num_groups`.
        decoder_channel_multipliers (`list[int]`): channels of each decoder level over the base, full resolution
            first. The map that the Gaussians are splatted into is the image size over `2^(levels - 1)`, rounded up.
        decoder_layers_per_block (`int`): a decoder level has one residual block more than this.
        norm_num_groups (`int`): groups of every group norm. With one channel in each group (32 groups of 32 channels)
            the last norm would take the brightness and the contrast of an image away; small models want fewer groups.
        splat_support (`float`): a Gaussian reaches this many sigmas along each axis (Eq. 3; the paper's text has 5).
        complexity_exponent (`float`): lambda, the exponent of the entropy in a region's complexity (Eq. 4).
        min_region_size (`int`): s_min in pixels: a region is not split when both inclusive extents are at most this.
        sigma_scale (`float`): initial sigma over a region's extent: 2/3 in the authors' code, 1/3 in the paper.
        align_corners (`bool`): where pixels lie in normalised coordinates. `True`: the centres of the corner pixels
            are at -1 and 1, as in the authors' code. `False`: the outer edges of these pixels are, so an image and its
            enlargement have the same layout, and a model does not depend on the size that it was trained at.
        tile_decode (`str`): how tokens that were encoded in tiles are decoded, `"merged"` (one map, statistics
            interpolated between tiles) or `"stitched"` (every tile on its own).
        latents_mean, latents_std (`list[float]`, *optional*): per-channel statistics of `[g - g_init, texture]`, 5 + C
            numbers each, for generators of texture.
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

    def __post_init__(self, **kwargs: Any) -> None:
        unknown = sorted(set(kwargs) - transformers_fields(type(self)) - INIT_ARGUMENTS)
        if unknown:
            raise ValueError(f"GPSTokenConfig has no field {', '.join(map(repr, unknown))}")
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
        """The heads divide the width."""
        if self.num_attention_heads > 0 and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads, "
                f"got hidden_size={self.hidden_size} and num_attention_heads={self.num_attention_heads}"
            )

    def validate_norm_groups(self) -> None:
        """Convolutional channels come in multiples of the norm's groups."""
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
        """One of two ways."""
        if self.tile_decode not in ("merged", "stitched"):
            raise ValueError(f"tile_decode must be 'merged' or 'stitched', got {self.tile_decode!r}")

    def validate_latent_statistics(self) -> None:
        """Both or neither, 5 + C numbers each."""
        check_statistics(("latents_mean", "latents_std"), self.latents_mean, self.latents_std, self.token_channels)

    @property
    def map_scale(self) -> int:
        """Image pixels per pixel of the splatted map along an axis, `2^(levels - 1)`."""
        return 2 ** (len(self.decoder_channel_multipliers) - 1)

    @property
    def token_channels(self) -> int:
        """Numbers in a token, 5 + C."""
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
        """The configuration of a named preset, with single fields overridden.

        Raises:
            ValueError: the name is not in `PRESETS`.
        """
        if name not in PRESETS:
            raise ValueError(f"presets are {sorted(PRESETS)}, got {name!r}")
        return cls(**{**PRESETS[name], **overrides})


__all__ = ["PRESETS", "GPSTokenConfig"]
