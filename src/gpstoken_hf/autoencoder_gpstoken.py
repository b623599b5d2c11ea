# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""AutoencoderGPSToken: a GPSTokenModel with the interface of diffusers' AutoencoderKL.

Shapes: B batch, l tokens of an image, F values of a token, C texture channels, h x w grid of tokens, H x W pixels.

Tokens lie on a grid, so that generators and pipelines for image latents can use them. A latent `(B, 5 + C, h, w)`
holds the `h w = l` tokens of an image. Its Gaussians are in logit space, where any value that a generator draws is a
legal Gaussian, and every channel is standardised.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook

from .configuration_gpstoken import GPSTokenConfig
from .file_checks import check_number, check_statistics
from .gaussians import clamp_gaussians, gaussians_to_logits, join_tokens, logits_to_gaussians, split_tokens
from .loading import StrictDiffusersMixin
from .modeling_gpstoken import GPSTokenModel
from .tiling import gaussians_from_frame, gaussians_to_frame, tiles_of_image

# Fields of GPSTokenConfig that have another name here. Pipelines of diffusers multiply latents with the `latents_std`
# of a vae's config, and these latents are standardised already.
RENAMED_FIELDS = {"latents_mean": "texture_target_mean", "latents_std": "texture_target_std"}
MODEL_FIELDS = tuple(GPSTokenConfig.__annotations__)
# Gaussians are clamped this far inside their ranges before the logit, as the encoder does when it refines them.
RANGE_EPS = 1e-6


def token_grid(num_tokens: int) -> tuple[int, int]:
    """The grid `(h, w)` of l tokens nearest to a square, with `h w = l` and `h <= w`."""
    if num_tokens < 1:
        raise ValueError(f"num_tokens must be at least 1, got {num_tokens}")
    height = next(side for side in range(math.isqrt(num_tokens), 0, -1) if num_tokens % side == 0)
    return height, num_tokens // height


def grid_positions(num_tokens: int) -> torch.Tensor:
    """The cell of every token on the grid of `token_grid`, counted row by row: `(l,)` int64, a permutation.

    Tokens come in Morton order of their regions. If l is a power of two they fill the grid along the same Z-curve:
    token i goes to the column of its even bits and the row of its odd bits, so neighbours in the image are neighbours
    on the grid. Otherwise they fill it row by row.
    """
    width = token_grid(num_tokens)[1]
    index = torch.arange(num_tokens)
    if num_tokens & (num_tokens - 1):
        return index
    column, row = torch.zeros_like(index), torch.zeros_like(index)
    for bit in range(num_tokens.bit_length() // 2):
        column |= ((index >> (2 * bit)) & 1) << bit
        row |= ((index >> (2 * bit + 1)) & 1) << bit
    return row * width + column


def tokens_to_grid(tokens: torch.Tensor) -> torch.Tensor:
    """Tokens `(B, l, F)` -> their grid `(B, F, h, w)`."""
    grid = torch.empty_like(tokens)
    grid[:, grid_positions(tokens.shape[1]).to(tokens.device)] = tokens
    return grid.transpose(1, 2).unflatten(2, token_grid(tokens.shape[1]))


def grid_to_tokens(grid: torch.Tensor) -> torch.Tensor:
    """The inverse of `tokens_to_grid`: `(B, F, h, w)` -> `(B, l, F)`."""
    flat = grid.flatten(2).transpose(1, 2)
    return flat[:, grid_positions(flat.shape[1]).to(grid.device)]


class AutoencoderGPSToken(StrictDiffusersMixin, ModelMixin, AutoencoderMixin, ConfigMixin):
    r"""A [`GPSTokenModel`] with the interface of diffusers' `AutoencoderKL`, for pipelines of latents `(B, F, h, w)`.

    Latents are the tokens of an image on a grid, with Gaussians in logit space and standardised channels.

    Args:
        image_size, num_tokens, texture_channels, hidden_size, num_hidden_layers, num_attention_heads, mlp_ratio,
            roi_size, conditioner_channels, decoder_base_channels, decoder_channel_multipliers,
            decoder_layers_per_block, norm_num_groups, splat_support, complexity_exponent, min_region_size,
            sigma_scale, align_corners, tile_decode: as in [`GPSTokenConfig`].
        texture_target_mean, texture_target_std (`list[float]`, *optional*): `latents_mean` and `latents_std` of
            [`GPSTokenConfig`].
        quality_predictor (`list[float]`, *optional*): as in [`GPSTokenConfig`].
        latents_channel_mean, latents_channel_std (`list[float]`, *optional*): 5 + C statistics each of
            `[logit(g), texture]`, by which latents are standardised. Measure them with
            [`~AutoencoderGPSToken.measure_statistics`]. Without them latents are not scaled.
        latent_channels (`int`, *optional*, defaults to `5 + texture_channels`): values of a token; no other number is
            possible.
        scaling_factor (`float`, *optional*, defaults to 1.0): factor by which pipelines multiply latents; 1 because
            they are standardised.

    Raises:
        ValueError: if `latent_channels` is not 5 + C, or statistics are not 5 + C finite numbers each, std above 0.
        huggingface_hub.errors.StrictDataclassError: if a field is illegal for [`GPSTokenConfig`].

    Examples:
        ```python
        >>> import torch
        >>> from gpstoken_hf import AutoencoderGPSToken, GPSTokenModel, bundled

        >>> model = GPSTokenModel.from_pretrained(bundled("gpstoken-digits"), subfolder="vae").eval()
        >>> images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
        >>> vae = AutoencoderGPSToken.from_gpstoken(model, pixel_values=[images])
        >>> with torch.no_grad():
        ...     latents = vae.encode(images).latent_dist.mode()
        ...     sample = vae.decode(latents).sample
        >>> latents.shape, sample.shape
        (torch.Size([4, 13, 4, 4]), torch.Size([4, 3, 32, 32]))

        ```
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["GPSTokenEncoderLayer", "ResidualBlock", "GPSTokenRegionFeatures"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        image_size: int = 256,
        num_tokens: int = 128,
        texture_channels: int = 16,
        hidden_size: int = 512,
        num_hidden_layers: int = 30,
        num_attention_heads: int = 8,
        mlp_ratio: float = 4.0,
        roi_size: int = 8,
        conditioner_channels: int = 128,
        decoder_base_channels: int = 128,
        decoder_channel_multipliers: Sequence[int] = (1, 2, 4),
        decoder_layers_per_block: int = 2,
        norm_num_groups: int = 32,
        splat_support: float = 3.0,
        complexity_exponent: float = 2.5,
        min_region_size: int = 8,
        sigma_scale: float = 2 / 3,
        align_corners: bool = True,
        tile_decode: str = "merged",
        texture_target_mean: Sequence[float] | None = None,
        texture_target_std: Sequence[float] | None = None,
        quality_predictor: Sequence[float] | None = None,
        latents_channel_mean: Sequence[float] | None = None,
        latents_channel_std: Sequence[float] | None = None,
        latent_channels: int | None = None,
        scaling_factor: float = 1.0,
    ):
        super().__init__()
        fields = {name: self.config[RENAMED_FIELDS.get(name, name)] for name in MODEL_FIELDS}
        config = GPSTokenConfig(**fields)
        expected = config.token_channels
        if latent_channels not in (None, expected):
            raise ValueError(f"latent_channels must be 5 + texture_channels = {expected}, got {latent_channels}")
        self.register_to_config(latent_channels=expected)
        names = ("latents_channel_mean", "latents_channel_std")
        check_statistics(names, latents_channel_mean, latents_channel_std, expected)
        check_number("scaling_factor", scaling_factor, 1e-6, 1e6)
        self.model = GPSTokenModel(config)

    # -- to and from GPSTokenModel

    @classmethod
    def from_gpstoken(
        cls, model: GPSTokenModel, pixel_values: Iterable[torch.Tensor] | None = None, **kwargs: Any
    ) -> AutoencoderGPSToken:
        """Wrap a tokenizer. The two share their weights.

        Args:
            model ([`GPSTokenModel`]): the tokenizer.
            pixel_values (iterable of `torch.Tensor` of shape `(B, 3, H, W)`, *optional*): batches of images in [-1, 1]
                to measure the statistics of the latents on. Without them, and without `latents_channel_mean` and
                `latents_channel_std`, latents are not scaled.
            kwargs: other arguments of the constructor.

        Raises:
            ValueError: if the statistics cannot be measured or are illegal.
            TypeError: if the constructor has no argument of that name.
        """
        fields = {RENAMED_FIELDS.get(name, name): getattr(model.config, name) for name in MODEL_FIELDS}
        with torch.device("meta"):  # no memory for weights that are replaced at once
            vae = cls(**fields, **kwargs)
        vae.model = model
        vae.train(model.training)
        if pixel_values is not None:
            vae.measure_statistics(pixel_values)
        return vae

    def to_gpstoken(self) -> GPSTokenModel:
        """The wrapped tokenizer. The two share their weights."""
        return self.model

    # -- standardisation

    @torch.no_grad()
    def measure_statistics(self, pixel_values: Iterable[torch.Tensor]) -> None:
        """Measure mean and standard deviation of every latent channel over images, and write them to the config.

        Args:
            pixel_values (iterable of `torch.Tensor` of shape `(B, 3, H, W)`): batches of images in [-1, 1].

        Raises:
            ValueError: if there are fewer than two tokens, or a channel does not vary.
        """
        count, total, squares = 0, torch.zeros(()), torch.zeros(())
        for batch in pixel_values:
            values = self._tokens_to_logits(self._encode_tiles(batch)[0]).flatten(0, 1).cpu().double()
            count += len(values)
            total = total + values.sum(0)
            squares = squares + values.square().sum(0)
        if count < 2:
            raise ValueError(f"pixel_values must give at least two tokens, got {count}")
        mean = total / count
        std = (squares / count - mean.square()).clamp(min=0).sqrt()
        if std.min() < 1e-6:
            channel = int(std.argmin())
            raise ValueError(
                f"pixel_values must make every latent channel vary, got standard deviation {std.min().item():.3g} "
                f"in channel {channel}"
            )
        self.register_to_config(latents_channel_mean=mean.tolist(), latents_channel_std=std.tolist())

    def _statistics(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation `(5 + C,)`; 0 and 1 if none were measured."""
        mean, std = self.config.latents_channel_mean, self.config.latents_channel_std
        if mean is None:
            mean, std = [0.0] * self.config.latent_channels, [1.0] * self.config.latent_channels
        return like.new_tensor(mean), like.new_tensor(std)

    @staticmethod
    def _tokens_to_logits(tokens: torch.Tensor) -> torch.Tensor:
        gaussians, texture = split_tokens(tokens)
        return join_tokens(gaussians_to_logits(clamp_gaussians(gaussians, RANGE_EPS)), texture)

    def tokens_to_latents(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens `(B, l, 5 + C)` of one image or tile -> latents `(B, 5 + C, h, w)`, float32."""
        logits = self._tokens_to_logits(tokens.float())
        mean, std = self._statistics(logits)
        return tokens_to_grid((logits - mean) / std)

    def latents_to_tokens(self, latents: torch.Tensor) -> torch.Tensor:
        """The inverse of `tokens_to_latents`, in float32. Any finite latent becomes a legal token."""
        logits = grid_to_tokens(latents.float())
        mean, std = self._statistics(logits)
        logits, texture = split_tokens(logits * std + mean)
        # The sigmoid of a large logit rounds to the end of its range, which is not legal.
        return join_tokens(clamp_gaussians(logits_to_gaussians(logits), RANGE_EPS), texture)

    # -- AutoencoderKL's interface

    @property
    def use_slicing(self) -> bool:
        """Whether batches are encoded and decoded one image at a time."""
        return self.model.use_slicing

    @use_slicing.setter
    def use_slicing(self, value: bool) -> None:
        self.model.use_slicing = value

    @property
    def use_tiling(self) -> bool:
        """Whether images larger than `config.image_size` are encoded in tiles."""
        return self.model.use_tiling

    @use_tiling.setter
    def use_tiling(self, value: bool) -> None:
        if value:
            self.model.enable_tiling()
        else:
            self.model.disable_tiling()

    @apply_forward_hook
    def encode(
        self, x: torch.Tensor, return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Images -> latents.

        An image of any size has one grid of tokens. With tiling enabled, an image larger than `config.image_size` is
        encoded in near-equal tiles of `config.num_tokens` tokens, and their grids are arranged as the tiles are: the
        latents grow with the image.

        Args:
            x (`torch.Tensor` of shape `(B, 3, H, W)`): images in [-1, 1], any H x W.
            return_dict (`bool`, *optional*, defaults to `True`): return an output object instead of a tuple.

        Returns:
            [`~diffusers.models.modeling_outputs.AutoencoderKLOutput`] or `tuple`: `.latent_dist`, a distribution
            without variance. Its `sample()` and `mode()` are the latents `(B, 5 + C, h, w)`, float32 for any dtype of
            the weights, because a mean needs more than the 8 bits of bfloat16.

        Raises:
            ValueError: if `x` has another shape or dtype or leaves [-1, 1].
        """
        tokens, (rows, columns) = self._encode_tiles(x)
        latents = self.tokens_to_latents(tokens).unflatten(0, (-1, rows, columns))
        # (B, rows, columns, F, h, w) -> (B, F, rows h, columns w)
        latents = latents.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
        posterior = DiagonalGaussianDistribution(
            torch.cat([latents, torch.zeros_like(latents)], dim=1), deterministic=True
        )
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def _encode_tiles(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """Tokens of every tile in the frame of the tile, `(B tiles, l, 5 + C)`; numbers of rows and columns."""
        tile_size = self.config.image_size
        if not self.use_tiling or x.ndim != 4 or max(x.shape[-2:]) <= tile_size:
            return self.model.encode(x).tokens, (1, 1)
        encoded = self.model.encode(x, tile_size=tile_size)
        image_size = (x.shape[-2], x.shape[-1])
        boxes, tiles = self._tiles(image_size)
        gaussians, texture = split_tokens(encoded.tokens.unflatten(1, (len(boxes), -1)))
        gaussians = torch.stack(
            [gaussians_from_frame(gaussians[:, index], box, image_size) for index, box in enumerate(boxes)], dim=1
        )
        return join_tokens(gaussians, texture).flatten(0, 1), tiles

    def _tiles(self, image_size: tuple[int, int]) -> tuple[list[tuple[int, int, int, int]], tuple[int, int]]:
        """The tiles `(y0, x0, h, w)` of an image, row by row, and the numbers of rows and columns."""
        grid, boxes = tiles_of_image(image_size, self.config.image_size, self.model.config.map_scale)
        return boxes, grid.shape

    @apply_forward_hook
    def decode(
        self,
        z: torch.Tensor,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
        image_size: int | tuple[int, int] | None = None,
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """Latents -> images.

        Args:
            z (`torch.Tensor` of shape `(B, 5 + C, h, w)`): latents, with h and w multiples of the grid of
                `config.num_tokens` tokens.
            return_dict (`bool`, *optional*, defaults to `True`): return an output object instead of a tuple.
            generator (`torch.Generator`, *optional*): ignored, as decoding draws no noise; part of the interface.
            image_size (`int` or `tuple[int, int]`, *optional*): `(H, W)` or one side in pixels. Defaults to
                `config.image_size` per tile.

        Returns:
            [`~diffusers.models.autoencoders.vae.DecoderOutput`] or `tuple`: `.sample` `(B, 3, H, W)`, about [-1, 1],
            not clamped.

        Raises:
            ValueError: if `z` has another shape or is not finite, or if `image_size` does not have the tiles of `z`.
        """
        self._check_latents(z)
        grid_h, grid_w = token_grid(self.config.num_tokens)
        rows, columns = z.shape[2] // grid_h, z.shape[3] // grid_w
        side = self.config.image_size
        if image_size is None:
            image_size = (rows * side, columns * side)
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        # (B, F, rows h, columns w) -> (B rows columns, F, h, w)
        tiles = z.unflatten(3, (columns, grid_w)).unflatten(2, (rows, grid_h)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
        tokens = self.latents_to_tokens(tiles).unflatten(0, (-1, rows * columns))  # (B, tiles, l, 5 + C)
        tile_size = None
        if (rows, columns) != (1, 1):
            boxes, found = self._tiles((height, width))
            if found != (rows, columns):
                raise ValueError(
                    f"image_size must have {rows} x {columns} tiles of at most {side} pixels, as the latents have, "
                    f"got {(height, width)}"
                )
            gaussians, texture = split_tokens(tokens)
            gaussians = torch.stack(
                [gaussians_to_frame(gaussians[:, index], box, (height, width)) for index, box in enumerate(boxes)],
                dim=1,
            )
            tokens = join_tokens(gaussians, texture)
            # With tiling the model decodes in overlapping windows instead, which bounds the memory.
            tile_size = None if self.use_tiling else side
        tokens = tokens.flatten(1, 2)
        sample = self.model.decode(tokens, (height, width), tile_size=tile_size).sample
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(
        self,
        sample: torch.Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """Reconstruct images: `encode`, then `decode` at the same size.

        Args:
            sample (`torch.Tensor` of shape `(B, 3, H, W)`): images in [-1, 1].
            sample_posterior (`bool`, *optional*, defaults to `False`): sample the latents instead of taking their
                mode; both are the same, as their distribution has no variance.
            return_dict (`bool`, *optional*, defaults to `True`): return an output object instead of a tuple.
            generator (`torch.Generator`, *optional*): source of the sample.
        """
        posterior = self.encode(sample).latent_dist
        latents = posterior.sample(generator) if sample_posterior else posterior.mode()
        return self.decode(latents, return_dict=return_dict, image_size=(sample.shape[-2], sample.shape[-1]))

    def _check_latents(self, z: torch.Tensor) -> None:
        channels, grid = self.config.latent_channels, token_grid(self.config.num_tokens)
        if z.ndim != 4 or z.shape[1] != channels or 0 in z.shape or z.shape[2] % grid[0] or z.shape[3] % grid[1]:
            raise ValueError(
                f"z must be (B, 5 + C = {channels}, h, w) with h and w multiples of the {grid[0]} x {grid[1]} "
                f"grid of {self.config.num_tokens} tokens, got {tuple(z.shape)}"
            )
        if not torch.compiler.is_compiling() and not torch.isfinite(z.detach()).all():
            raise ValueError("z must be finite, got NaN or infinite values")


__all__ = ["AutoencoderGPSToken"]
