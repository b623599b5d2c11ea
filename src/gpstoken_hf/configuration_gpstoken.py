# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""GPSTokenConfig: every choice that shapes a GPSToken tokenizer, and the table of presets."""

# Annotations stay objects here (no `from __future__ import annotations`): `@strict` checks the fields against them.
import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

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

    def validate_positive_sizes(self) -> None:
        """Sizes and counts are at least 1, factors are above 0."""
        for name in (
            "image_size",
            "num_tokens",
            "texture_channels",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "roi_size",
            "decoder_layers_per_block",
            "norm_num_groups",
            "min_region_size",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("mlp_ratio", "splat_support", "sigma_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if not self.complexity_exponent >= 0:
            raise ValueError(f"complexity_exponent must be at least 0, got {self.complexity_exponent}")

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
            if value < 1 or value % max(self.norm_num_groups, 1):
                raise ValueError(
                    f"{name} must be a positive multiple of norm_num_groups={self.norm_num_groups}, got {value}"
                )
        if not self.decoder_channel_multipliers or min(self.decoder_channel_multipliers) < 1:
            raise ValueError(
                "decoder_channel_multipliers must hold one integer of at least 1 per level, "
                f"got {self.decoder_channel_multipliers}"
            )

    def validate_tile_decode(self) -> None:
        """`tile_decode` is a known way."""
        if self.tile_decode not in ("merged", "stitched"):
            raise ValueError(f"tile_decode must be 'merged' or 'stitched', got {self.tile_decode!r}")

    def validate_latent_statistics(self) -> None:
        """Both statistics or neither, 5 + C numbers each."""
        check_channel_statistics(self.latents_mean, self.latents_std, self.token_channels)

    @property
    def map_scale(self) -> int:
        """Image pixels per map pixel along each axis, `2^(levels - 1)`."""
        return 2 ** (len(self.decoder_channel_multipliers) - 1)

    @property
    def token_channels(self) -> int:
        """Values per token, 5 + C."""
        return 5 + self.texture_channels

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


def check_channel_statistics(
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    num_channels: int,
    names: tuple[str, str] = ("latents_mean", "latents_std"),
) -> None:
    """Raise a ValueError unless the statistics of channels are both absent or both legal.

    Args:
        mean (`list[float]`, *optional*): one finite number per channel.
        std (`list[float]`, *optional*): one finite number above 0 per channel.
        num_channels (`int`): the number of channels.
        names (`tuple[str, str]`, *optional*): how messages call the two.

    Raises:
        ValueError: if only one is given, either is not a list of `num_channels` numbers, or a number is out of range.
    """
    if mean is None and std is None:
        return
    if mean is None or std is None:
        given = names[0] if std is None else names[1]
        raise ValueError(f"{names[0]} and {names[1]} must be given together, got only {given}")
    for name, values, low in ((names[0], mean, -math.inf), (names[1], std, 0.0)):
        # Configs are saved as JSON, which has no tensors.
        if not isinstance(values, list | tuple) or len(values) != num_channels:
            got = len(values) if isinstance(values, list | tuple) else f"a {type(values).__name__}"
            raise ValueError(f"{name} must be a list of {num_channels} numbers, one per channel, got {got}")
        illegal = [value for value in values if not low < value < math.inf]
        if illegal:
            expected = "finite" if low < 0 else "finite and above 0 (1 for a constant channel)"
            raise ValueError(f"{name} must be {expected}, got {illegal[0]}")


__all__ = ["PRESETS", "GPSTokenConfig"]
