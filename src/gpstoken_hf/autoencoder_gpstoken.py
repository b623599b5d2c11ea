# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""AutoencoderGPSToken: a GPSTokenModel with the interface of diffusers' AutoencoderKL.

Shapes: B batch, F = 5 + C values of a token, C texture channels, k tokens of a cell, h x w cells, H x W pixels.

Tokens lie on a grid of square cells of f x f pixels, so that generators and pipelines for image latents can use them.
Latents are `(B, k F, h, w)` with `h = H / f` and `w = W / f`: every cell holds k tokens in its channels. Gaussians are
in logit space, where any value that a generator draws is a legal Gaussian, and every channel is standardised.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import AttentionMixin
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook

from .configuration_gpstoken import GPSTokenConfig
from .file_checks import (
    CONFIG_FILE,
    check_number,
    check_source,
    check_statistics,
    find_file,
    read_json,
    refusing,
    shown,
)
from .gaussians import join_tokens, split_tokens
from .latent_grid import (
    LatentGrid,
    batches_of_tiles,
    cells_to_tokens,
    channel_statistics,
    check_latents,
    derived_fields,
    latent_grid,
    merge_tiles,
    split_tiles,
    tiles_of_cells,
    tokens_to_cells,
    window,
)
from .loading import SafetensorsAdapterMixin, StrictDiffusersMixin
from .modeling_gpstoken import GPSTokenModel
from .partition import check_images
from .tiling import Tile, TileGrid, decode_in_windows, gaussians_to_padded_frame, map_size_of

# Fields of GPSTokenConfig that have another name here. Pipelines of diffusers multiply latents with the `latents_std`
# of a vae's config, and these latents are standardised already.
RENAMED_FIELDS = {"latents_mean": "texture_target_mean", "latents_std": "texture_target_std"}
# The number of tokens is fixed here, so nothing predicts how many an image needs.
MODEL_FIELDS = tuple(name for name in GPSTokenConfig.__annotations__ if name != "quality_predictor")
# Share of a window that the next one covers too, when a large map is decoded in windows.
WINDOW_OVERLAP = 0.25


class AutoencoderGPSToken(
    StrictDiffusersMixin, ModelMixin, AttentionMixin, AutoencoderMixin, SafetensorsAdapterMixin, ConfigMixin
):
    r"""A [`GPSTokenModel`] with the interface of diffusers' `AutoencoderKL`, for pipelines of image latents.

    An image of H x W pixels has latents `(B, k (5 + C), H / f, W / f)`: cells of f x f pixels, each with k tokens. An
    image of `image_size` pixels has the finest square grid that holds `num_tokens`: `num_tokens = k s^2` and
    `f = image_size / s`, a power of two.

    Args:
        image_size, num_tokens, texture_channels, hidden_size, num_hidden_layers, num_attention_heads, mlp_ratio,
            roi_size, conditioner_channels, decoder_base_channels, decoder_channel_multipliers,
            decoder_layers_per_block, norm_num_groups, splat_support, complexity_exponent, min_region_size,
            sigma_scale, align_corners, tile_decode: as in [`GPSTokenConfig`].
        texture_target_mean, texture_target_std (`list[float]`, *optional*): `latents_mean` and `latents_std` of
            [`GPSTokenConfig`].
        latents_channel_mean, latents_channel_std (`list[float]`, *optional*): statistics of every latent channel, by
            which latents are standardised. Measure them with [`~AutoencoderGPSToken.measure_statistics`]. Without them
            latents are not scaled.
        latent_channels (`int`, *optional*, defaults to `k (5 + texture_channels)`): channels of the latents; no other
            number is possible.
        block_out_channels, encoder_block_out_channels (`list[int]`, *optional*): as many entries as make
            `f = 2^(entries - 1)`, for pipelines, which compute f like this. Derived; no other value is possible.
        spatial_compression_ratio (`int`, *optional*): f. Derived, too.
        scaling_factor (`float`, *optional*, defaults to 1.0): factor by which pipelines multiply latents; 1 because
            they are standardised.
        shift_factor (`float`, *optional*, defaults to 0.0): what pipelines subtract from latents before.
        force_upcast (`bool`, *optional*, defaults to `False`): whether pipelines run the autoencoder in float32 if its
            weights are in float16. Its norms and Gaussians are computed in float32 anyway.

    Raises:
        ValueError: if `num_tokens` tokens fit no grid of square cells; if a derived field has another value; if
            statistics are not finite numbers, one per channel, std above 0; if a field is illegal for
            [`GPSTokenConfig`].

    Examples:
        ```python
        >>> import torch
        >>> from gpstoken_hf import AutoencoderGPSToken, bundled

        >>> vae = AutoencoderGPSToken.from_pretrained(bundled("gpstoken-digits"), subfolder="vae")
        >>> images = torch.rand(4, 3, 32, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
        >>> vae.measure_statistics([images])
        >>> with torch.no_grad():
        ...     latents = vae.encode(images).latent_dist.mode()
        ...     sample = vae.decode(latents).sample
        >>> latents.shape, sample.shape
        (torch.Size([4, 13, 4, 8]), torch.Size([4, 3, 32, 64]))

        ```
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["GPSTokenEncoderLayer", "ResidualBlock", "GPSTokenRegionFeatures"]  # noqa: RUF012
    _repeated_blocks = ["GPSTokenEncoderLayer"]  # noqa: RUF012
    # The values of a Gaussian need more than the few bits that weights are stored in.
    _skip_layerwise_casting_patterns = ("norm", "gaussian_embedding1", "gaussian_head")

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
        latents_channel_mean: Sequence[float] | None = None,
        latents_channel_std: Sequence[float] | None = None,
        latent_channels: int | None = None,
        block_out_channels: Sequence[int] | None = None,
        encoder_block_out_channels: Sequence[int] | None = None,
        spatial_compression_ratio: int | None = None,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        force_upcast: bool = False,
    ):
        super().__init__()
        fields = {name: self.config[RENAMED_FIELDS.get(name, name)] for name in MODEL_FIELDS}
        config = GPSTokenConfig(**fields)
        grid = latent_grid(config.num_tokens, config.image_size)
        if config.image_size % config.map_scale:
            raise ValueError(f"image_size must be a multiple of {config.map_scale} pixels, got {config.image_size}")
        derived = derived_fields(grid, config.token_channels, config.decoder_base_channels)
        for name, expected in derived.items():
            given = self.config[name]
            if given is not None and (list(given) if isinstance(given, tuple) else given) != expected:
                raise ValueError(f"{name} must be {expected}, as the other fields determine, got {shown(given)}")
        self.register_to_config(**derived)
        names = ("latents_channel_mean", "latents_channel_std")
        check_statistics(names, latents_channel_mean, latents_channel_std, self.config.latent_channels)
        check_number("scaling_factor", scaling_factor, 1e-6, 1e6)
        check_number("shift_factor", shift_factor, -1e6, 1e6)
        self.model = GPSTokenModel(config)
        self.use_tiling = False
        self.tile_sample_min_height = self.tile_sample_min_width = config.image_size
        self.tile_overlap_height = self.tile_overlap_width = WINDOW_OVERLAP

    @property
    def grid(self) -> LatentGrid:
        """How the tokens of an image lie on cells."""
        return latent_grid(self.config.num_tokens, self.config.image_size)

    @property
    def spatial_compression_ratio(self) -> int:
        """f, pixels of a cell along each axis."""
        return self.grid.scale

    # -- to and from GPSTokenModel

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *args: Any, **kwargs: Any
    ) -> Any:
        """Load an autoencoder, or wrap a saved [`GPSTokenModel`], from a folder or from the Hub.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): a folder or a repository of either.
            kwargs: arguments of `from_pretrained` of the class that was saved, and of the constructor.

        Returns:
            [`AutoencoderGPSToken`]: in evaluation mode. A saved tokenizer has no statistics of latents: measure them
            with [`~AutoencoderGPSToken.measure_statistics`], or pass them.

        Raises:
            ValueError: if the config or a file of weights is damaged or does not fit; if `num_tokens` fits no grid.
            OSError: if there is no such checkpoint.
        """
        source = pretrained_model_name_or_path
        config_file = None
        if source is not None and kwargs.get("config") is None and not os.path.isfile(source):
            check_source(source)
            config_file = find_file(source, CONFIG_FILE, kwargs)
        if config_file is None or read_json(config_file).get("model_type") != GPSTokenConfig.model_type:
            return super().from_pretrained(source, *args, **kwargs)
        fields = set(inspect.signature(cls.__init__).parameters) - {RENAMED_FIELDS.get(n, n) for n in MODEL_FIELDS}
        own = {name: kwargs.pop(name) for name in fields & set(kwargs)}
        if "torch_dtype" in kwargs:
            kwargs["dtype"] = kwargs.pop("torch_dtype")
        with_info = kwargs.get("output_loading_info", False)
        loaded = GPSTokenModel.from_pretrained(source, *args, **kwargs)
        model, info = loaded if with_info else (loaded, None)
        with refusing(config_file):
            vae = cls.from_gpstoken(model, **own)
        return (vae, info) if with_info else vae

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
            ValueError: if there are fewer than two cells, or a channel does not vary.
        """
        mean, std = channel_statistics(self._encode_cells(batch) for batch in pixel_values)
        self.register_to_config(latents_channel_mean=mean, latents_channel_std=std)

    def _statistics(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation `(k F, 1, 1)`; 0 and 1 if none were measured."""
        mean, std = self.config.latents_channel_mean, self.config.latents_channel_std
        if mean is None:
            mean, std = [0.0] * self.config.latent_channels, [1.0] * self.config.latent_channels
        return like.new_tensor(mean)[:, None, None], like.new_tensor(std)[:, None, None]

    def _standardise(self, cells: torch.Tensor) -> torch.Tensor:
        mean, std = self._statistics(cells)
        return (cells - mean) / std

    def tokens_to_latents(self, tokens: torch.Tensor, size: tuple[int, int] | None = None) -> torch.Tensor:
        """Tokens -> latents.

        Args:
            tokens (`torch.Tensor` of shape `(B, h w k, 5 + C)`): tokens in the frame of the image, tile by tile.
            size (`tuple[int, int]`, *optional*): `(h, w)` in cells. Defaults to that of an image of `image_size`.

        Returns:
            `torch.Tensor` of shape `(B, k (5 + C), h, w)`: float32.

        Raises:
            ValueError: if `tokens` has another shape.
        """
        size = (self.grid.side, self.grid.side) if size is None else size
        expected = (size[0] * size[1] * self.grid.depth, self.model.config.token_channels)
        if tokens.ndim != 3 or tuple(tokens.shape[1:]) != expected:
            raise ValueError(f"tokens must be (B, {expected[0]}, {expected[1]}), got {tuple(tokens.shape)}")
        boxes = self._tiles(size)[1]
        cells = tokens.new_empty(len(tokens), self.config.latent_channels, *size, dtype=torch.float32)
        for box, part in zip(boxes, split_tiles(tokens.float(), boxes, size, self.grid.depth)):
            window(cells, box).copy_(tokens_to_cells(part, box[2:]))
        return self._standardise(cells)

    def latents_to_tokens(self, latents: torch.Tensor) -> torch.Tensor:
        """The inverse of `tokens_to_latents`, for latents of any `h x w` cells. Any finite latent is a legal token."""
        size = (latents.shape[-2], latents.shape[-1])
        return merge_tiles(self._tile_tokens(latents), self._tiles(size)[1], size)

    def _tile_tokens(self, latents: torch.Tensor) -> list[torch.Tensor]:
        """The tokens of every tile of latents in the frame of the tile, in float32."""
        check_latents(latents, self.config.latent_channels)
        mean, std = self._statistics(latents.float())
        cells = latents.float() * std + mean
        boxes = self._tiles((cells.shape[-2], cells.shape[-1]))[1]
        return [cells_to_tokens(window(cells, box), self.grid.depth) for box in boxes]

    def _tiles(self, size: tuple[int, int]) -> tuple[TileGrid, list[Tile]]:
        """The tiles of a grid of `size = (h, w)` cells, on the map and in cells."""
        return tiles_of_cells(size, self.grid, self.model.config.map_scale)

    # -- memory

    @property
    def use_slicing(self) -> bool:
        """Whether batches are encoded and decoded one image at a time."""
        return self.model.use_slicing

    @use_slicing.setter
    def use_slicing(self, value: bool) -> None:
        self.model.use_slicing = value

    def enable_tiling(
        self,
        use_tiling: bool = True,
        tile_sample_min_height: int | None = None,
        tile_sample_min_width: int | None = None,
        tile_sample_stride_height: int | None = None,
        tile_sample_stride_width: int | None = None,
    ) -> None:
        """Bound the memory that large images take. The latents stay the same.

        Images larger than `config.image_size` are encoded one tile after the other instead of all tiles at once. Maps
        larger than a window are decoded in overlapping windows, which are blended.

        Args:
            use_tiling (`bool`, *optional*, defaults to `True`): `False` disables tiling.
            tile_sample_min_height, tile_sample_min_width (`int`, *optional*, defaults to `config.image_size`): sides
                of a window in image pixels, multiples of `2^(decoder levels - 1)`.
            tile_sample_stride_height, tile_sample_stride_width (`int`, *optional*, defaults to 3/4 of the window):
                pixels from one window to the next, at most the side of a window.

        Raises:
            ValueError: if an argument is out of its range.
        """
        scale, sizes, overlaps = self.model.config.map_scale, [], []
        for axis, size, stride in (
            ("height", tile_sample_min_height, tile_sample_stride_height),
            ("width", tile_sample_min_width, tile_sample_stride_width),
        ):
            size = self.config.image_size if size is None else size
            if size < scale or size % scale:
                raise ValueError(f"tile_sample_min_{axis} must be a positive multiple of {scale} pixels, got {size}")
            if stride is not None and not 1 <= stride <= size:
                raise ValueError(f"tile_sample_stride_{axis} must be between 1 and {size} pixels, got {stride}")
            sizes.append(size)
            overlaps.append(WINDOW_OVERLAP if stride is None else 1 - stride / size)
        self.use_tiling = use_tiling
        self.tile_sample_min_height, self.tile_sample_min_width = sizes
        self.tile_overlap_height, self.tile_overlap_width = overlaps

    # -- AutoencoderKL's interface

    @apply_forward_hook
    def encode(
        self, x: torch.Tensor, return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Images -> latents.

        An image larger than `config.image_size` is encoded in near-equal tiles of at most this size, cut between
        cells. A tile has the tokens of its cells. Sides that are not multiples of f are padded at the right and bottom
        by repeating the last pixels.

        Args:
            x (`torch.Tensor` of shape `(B, 3, H, W)`): images in [-1, 1], any H x W.
            return_dict (`bool`, *optional*, defaults to `True`): return an output object instead of a tuple.

        Returns:
            [`~diffusers.models.modeling_outputs.AutoencoderKLOutput`] or `tuple`: `.latent_dist`, a distribution
            without variance. Its `sample()` and `mode()` are the latents `(B, k (5 + C), H / f, W / f)`, rounded up,
            float32 for any dtype of the weights, because a mean needs more than the 8 bits of bfloat16.

        Raises:
            ValueError: if `x` has another shape or dtype or leaves [-1, 1].
        """
        latents = self._standardise(self._encode_cells(x))
        posterior = DiagonalGaussianDistribution(
            torch.cat([latents, torch.zeros_like(latents)], dim=1), deterministic=True
        )
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def _encode_cells(self, x: torch.Tensor) -> torch.Tensor:
        """Images `(B, 3, H, W)` -> cells `(B, k F, h, w)` before standardisation, in float32."""
        check_images("x", x)
        grid, scale = self.grid, self.grid.scale
        height, width = map_size_of((x.shape[-2], x.shape[-1]), scale)
        padding = (0, width * scale - x.shape[-1], 0, height * scale - x.shape[-2])
        if any(padding):
            x = F.pad(x, padding, mode="replicate")
        cells = x.new_empty(x.shape[0], self.config.latent_channels, height, width, dtype=torch.float32)
        for part in batches_of_tiles(self._tiles((height, width))[1], one_by_one=self.use_tiling):
            pixels = torch.cat([window(x, box, scale) for box in part])
            size = part[0][2:]
            # The tile size keeps the tokenizer from cutting the tile further, whatever it was set to.
            encoded = self.model.encode(pixels, size[0] * size[1] * grid.depth, tile_size=self.config.image_size)
            for box, tokens in zip(part, encoded.tokens.chunk(len(part))):
                window(cells, box).copy_(tokens_to_cells(tokens, size))
        return cells

    @apply_forward_hook
    def decode(
        self, z: torch.Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """Latents -> images.

        Args:
            z (`torch.Tensor` of shape `(B, k (5 + C), h, w)`): latents.
            return_dict (`bool`, *optional*, defaults to `True`): return an output object instead of a tuple.
            generator (`torch.Generator`, *optional*): ignored, as decoding draws no noise; part of the interface.

        Returns:
            [`~diffusers.models.autoencoders.vae.DecoderOutput`] or `tuple`: `.sample` `(B, 3, f h, f w)`, about
            [-1, 1], not clamped.

        Raises:
            ValueError: if `z` has another shape or is not finite.
        """
        tile_tokens = self._tile_tokens(z)
        batches = zip(*(tokens.split(1) for tokens in tile_tokens)) if self.use_slicing else [tile_tokens]
        sample = torch.cat([self._decode_tiles(batch, (z.shape[2], z.shape[3])) for batch in batches])
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def _decode_tiles(self, tile_tokens: Sequence[torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
        """The tokens of every tile of `size = (h, w)` cells -> images `(B, 3, f h, f w)`."""
        scale = self.grid.scale
        tiles, boxes = self._tiles(size)
        if self.config.tile_decode == "merged" or len(boxes) == 1:
            tokens = merge_tiles(tile_tokens, boxes, size)
            return self._decode_tokens(tokens, (size[0] * scale, size[1] * scale), tiles)
        sizes = [(h * scale, w * scale) for _, _, h, w in boxes]
        images = [self._decode_tokens(tokens, part, None) for tokens, part in zip(tile_tokens, sizes)]
        columns = tiles.shape[1]
        return torch.cat([torch.cat(row, dim=-1) for row in zip(*[iter(images)] * columns)], dim=-2)

    def _decode_tokens(
        self, tokens: torch.Tensor, image_size: tuple[int, int], tiles: TileGrid | None
    ) -> torch.Tensor:
        """Tokens `(B, L, F)` in the frame of an image -> the image `(B, 3, *image_size)`."""
        scale = self.model.config.map_scale
        gaussians, texture = split_tokens(tokens)
        gaussians = gaussians_to_padded_frame(gaussians, image_size, scale, self.config.align_corners)
        maps = self.model.render(join_tokens(gaussians, texture), map_size_of(image_size, scale))
        sides = (self.tile_sample_min_height // scale, self.tile_sample_min_width // scale)
        if self.use_tiling and (maps.shape[-2] > sides[0] or maps.shape[-1] > sides[1]):
            overlap = (self.tile_overlap_height, self.tile_overlap_width)
            image = decode_in_windows(self.model.decoder, maps, sides, overlap, scale)
        else:
            image = self.model.decoder(maps, tiles)
        return image[..., : image_size[0], : image_size[1]]

    def forward(
        self,
        sample: torch.Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """Reconstruct images: `encode`, then `decode`, cropped to the size of the images.

        Args:
            sample (`torch.Tensor` of shape `(B, 3, H, W)`): images in [-1, 1].
            sample_posterior (`bool`, *optional*, defaults to `False`): sample the latents instead of taking their
                mode; both are the same, as their distribution has no variance.
            return_dict (`bool`, *optional*, defaults to `True`): return an output object instead of a tuple.
            generator (`torch.Generator`, *optional*): source of the sample.

        Returns:
            [`~diffusers.models.autoencoders.vae.DecoderOutput`] or `tuple`: `.sample` `(B, 3, H, W)`.
        """
        posterior = self.encode(sample).latent_dist
        latents = posterior.sample(generator) if sample_posterior else posterior.mode()
        decoded = self.decode(latents).sample[..., : sample.shape[-2], : sample.shape[-1]]
        return DecoderOutput(sample=decoded) if return_dict else (decoded,)


__all__ = ["AutoencoderGPSToken"]
