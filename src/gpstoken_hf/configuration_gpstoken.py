# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""GPSTokenConfig: every choice that shapes a GPSToken tokenizer, and the table of presets."""

# No `from __future__ import annotations`: @strict checks the types of the fields, and takes none from strings.
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

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

    def validate_positive_sizes(self) -> None:
        """Sizes and counts are at least 1, real factors above 0."""
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
            if value < 1 or value % max(self.norm_num_groups, 1):
                raise ValueError(
                    f"{name} must be a positive multiple of norm_num_groups={self.norm_num_groups}, got {value}"
                )
        if not self.decoder_channel_multipliers or min(self.decoder_channel_multipliers) < 1:
            raise ValueError(
                "decoder_channel_multipliers must hold one integer >= 1 per level, "
                f"got {self.decoder_channel_multipliers}"
            )

    def validate_tile_decode(self) -> None:
        """One of two ways."""
        if self.tile_decode not in ("merged", "stitched"):
            raise ValueError(f"tile_decode must be 'merged' or 'stitched', got {self.tile_decode!r}")

    def validate_latent_statistics(self) -> None:
        """Both or neither, 5 + C numbers each."""
        if (self.latents_mean is None) != (self.latents_std is None):
            raise ValueError("latents_mean and latents_std must be given together, got only one of them")
        if self.latents_mean is None or self.latents_std is None:
            return
        expected = 5 + self.texture_channels
        if len(self.latents_mean) != expected or len(self.latents_std) != expected:
            raise ValueError(
                f"latents_mean and latents_std must hold 5 + texture_channels = {expected} numbers, "
                f"got {len(self.latents_mean)} and {len(self.latents_std)}"
            )
        if min(self.latents_std) <= 0:
            raise ValueError(f"latents_std must be above 0, got {min(self.latents_std)}")

    @property
    def map_scale(self) -> int:
        """Image pixels per pixel of the splatted map along an axis, `2^(levels - 1)`."""
        return 2 ** (len(self.decoder_channel_multipliers) - 1)

    @property
    def token_channels(self) -> int:
        """Numbers in a token, 5 + C."""
        return 5 + self.texture_channels

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
