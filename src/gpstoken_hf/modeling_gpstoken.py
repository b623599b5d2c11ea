# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""GPSTokenModel: image -> layout -> tokens -> splatted map -> image.

Shapes: B batch, L tokens, C texture channels, D hidden size, H x W pixels of an image, h x w pixels of a map.
"""

# Annotations stay objects here (no `from __future__ import annotations`): transformers reads what `**kwargs` may hold
# from the signature of `forward`.
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.output_capturing import capture_outputs

from .configuration_gpstoken import GPSTokenConfig
from .decoder_gpstoken import GPSTokenDecoder
from .encoder_gpstoken import GPSTokenAttention, GPSTokenEncoder, GPSTokenEncoderLayer
from .gaussians import NUM_GAUSSIAN_PARAMS, check_gaussians, join_tokens, split_tokens
from .layout import PADDING_GAUSSIAN, GaussianLayout
from .loading import StrictTransformersMixin
from .partition import (
    PIXEL_TOLERANCE,
    check_images,
    check_importance,
    check_range,
    partition_images,
    split_sequence,
    token_counts,
)
from .quality import FINER, Metric, NestedPartition, QualityTarget, encode_to_target, predicted_counts, quality_target
from .regions import max_regions
from .splatting import splat_gaussians
from .tiling import (
    crop,
    decode_in_windows,
    gaussians_from_frame,
    gaussians_to_frame,
    gaussians_to_padded_frame,
    map_size_of,
    share_tokens,
    tiles_of_image,
)


@dataclass
class GPSTokenEncoderOutput(ModelOutput):
    """Tokens of a batch of images.

    Args:
        tokens (`torch.FloatTensor` of shape `(B, L, 5 + C)`): refined Gaussians and texture, float32.
        layout ([`GaussianLayout`]): the Gaussians and regions before refinement.
        attention_mask (`torch.LongTensor` of shape `(B, L)`): 1 for a token, 0 for padding.
        reached (`torch.BoolTensor` of shape `(B,)`, *optional*): which images reach the target that `encode` was
            given, measured on their decoded tokens. `None` without a target, and with `fast=True`.
    """

    tokens: torch.FloatTensor | None = None
    layout: GaussianLayout | None = None
    attention_mask: torch.LongTensor | None = None
    reached: torch.BoolTensor | None = None


@dataclass
class GPSTokenDecoderOutput(ModelOutput):
    """A decoded batch.

    Args:
        sample (`torch.FloatTensor` of shape `(B, 3, H, W)`): images, about [-1, 1], not clamped.
    """

    sample: torch.FloatTensor | None = None


@dataclass
class GPSTokenOutput(ModelOutput):
    """A reconstructed batch and its tokens.

    Args:
        sample (`torch.FloatTensor` of shape `(B, 3, H, W)`): images, about [-1, 1], not clamped.
        tokens (`torch.FloatTensor` of shape `(B, L, 5 + C)`): refined Gaussians and texture, float32.
        attention_mask (`torch.LongTensor` of shape `(B, L)`): 1 for a token, 0 for padding.
        hidden_states (`tuple(torch.FloatTensor)` of shape `(B, L, D)`, *optional*): the output of every encoder block.
        attentions (`tuple(torch.FloatTensor)` of shape `(B, heads, L, L)`, *optional*): the encoder's attention.
    """

    sample: torch.FloatTensor | None = None
    tokens: torch.FloatTensor | None = None
    attention_mask: torch.LongTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class GPSTokenRenderer(nn.Module):
    """Splats Gaussians into a map. transformers' `use_kernels=True` puts a kernel that the user maps in its place.

    Attributes:
        backend (`str`, defaults to `"auto"`): `backend` of [`splat_gaussians`].
    """

    # Marks the layer for `kernelize`. The decorator of transformers marks nothing beside a version of
    # kernels that it does not take.
    kernel_layer_name = "GaussianSplat"

    def __init__(self) -> None:
        super().__init__()
        self.backend = "auto"

    def forward(
        self,
        gaussians: torch.Tensor,
        features: torch.Tensor,
        size: tuple[int, int],
        support: float = 3.0,
        attention_mask: torch.Tensor | None = None,
        align_corners: bool = True,
    ) -> torch.Tensor:
        """The arguments and the map of [`splat_gaussians`]."""
        return splat_gaussians(gaussians, features, size, support, self.backend, attention_mask, align_corners)


class GPSTokenPreTrainedModel(StrictTransformersMixin, PreTrainedModel):
    """Names, capabilities and initial weights, as transformers expects them."""

    config: GPSTokenConfig
    config_class = GPSTokenConfig
    base_model_prefix = "gpstoken"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["GPSTokenEncoderLayer", "ResidualBlock", "GPSTokenRegionFeatures"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": GPSTokenEncoderLayer, "attentions": GPSTokenAttention}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise as torch's own layers do, and the Gaussian head to zero, so that refinement starts at zero."""
        super()._init_weights(module)
        if isinstance(module, nn.Linear | nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            bound = 1 / math.sqrt(module.weight[0].numel())
            init.uniform_(module.bias, -bound, bound)
        if isinstance(module, GPSTokenEncoder):
            init.normal_(module.query)
            init.zeros_(module.gaussian_head.weight)
            init.zeros_(module.gaussian_head.bias)


class GPSTokenModel(GPSTokenPreTrainedModel):
    r"""The GPSToken tokenizer (arXiv 2509.01109): images to 2D-Gaussian tokens and back.

    `encode` partitions an image into regions of similar complexity and turns each into a token. `render` splats tokens
    into a feature map. `decode` renders and turns the map into an image. `forward` does all of it.

    Args:
        config ([`GPSTokenConfig`]): sizes and settings.

    Attributes:
        validate_inputs (`bool`, defaults to `True`): check the values that `encode` and `decode` are given. Each check
            synchronises once on an accelerator. Set to False if the inputs are already validated.

    Examples:
        ```python
        >>> import torch
        >>> from gpstoken_hf import GPSTokenModel, bundled

        >>> model = GPSTokenModel.from_pretrained(bundled("gpstoken-nano")).eval()
        >>> images = torch.rand(2, 3, 64, 96) * 2 - 1
        >>> with torch.no_grad():
        ...     encoded = model.encode(images, num_tokens=[24, 48])
        ...     decoded = model.decode(encoded.tokens, (64, 96), encoded.attention_mask)
        >>> encoded.tokens.shape, decoded.sample.shape
        (torch.Size([2, 48, 21]), torch.Size([2, 3, 64, 96]))

        ```
    """

    def __init__(self, config: GPSTokenConfig):
        super().__init__(config)
        self.encoder = GPSTokenEncoder(config)
        self.renderer = GPSTokenRenderer()
        self.decoder = GPSTokenDecoder(
            config.texture_channels,
            config.decoder_base_channels,
            config.decoder_channel_multipliers,
            config.decoder_layers_per_block,
            config.norm_num_groups,
        )
        self.validate_inputs = True
        self.use_slicing = False
        self.use_tiling = False
        self.tiling_size = config.image_size
        self.tiling_overlap = 0.25
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The layer that reads the pixels. transformers keeps it out of quantization, among others."""
        return self.encoder.conditioner.conv_in

    # -- memory

    def enable_slicing(self) -> None:
        """Encode and decode one image of a batch at a time: less memory, the same result."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Encode and decode whole batches again."""
        self.use_slicing = False

    def enable_tiling(self, tile_size: int | None = None, overlap: float = 0.25) -> None:
        """Bound the memory that large images take.

        Images larger than a tile are encoded tile by tile, as with `encode(tile_size=...)`. Maps larger than a tile
        are decoded in overlapping windows, which are blended.

        Args:
            tile_size (`int`, *optional*, defaults to `config.image_size`): side in image pixels, a multiple of
                `config.map_scale`.
            overlap (`float`, *optional*, defaults to 0.25): share of a window that the next one covers too, in [0, 1).

        Raises:
            ValueError: if an argument is out of its range.
        """
        tile_size = self.config.image_size if tile_size is None else tile_size
        self._check_tile_size(tile_size)
        if not 0 <= overlap < 1:
            raise ValueError(f"overlap must be at least 0 and below 1, got {overlap}")
        self.use_tiling, self.tiling_size, self.tiling_overlap = True, tile_size, overlap

    def disable_tiling(self) -> None:
        """Encode and decode whole images again."""
        self.use_tiling = False

    def compile_repeated_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Compile each layer of the encoder in place, as diffusers' models do.

        All layers share one compiled program, so this takes a fraction of the time of compiling the whole model.

        Args:
            args, kwargs: those of `torch.compile`.
        """
        for layer in self.encoder.layers:
            layer.compile(*args, **kwargs)

    # -- image -> tokens

    @apply_forward_hook
    def encode(
        self,
        pixel_values: torch.Tensor,
        num_tokens: int | Sequence[int] | None = None,
        importance: torch.Tensor | None = None,
        layout: GaussianLayout | None = None,
        tile_size: int | None = None,
        target_psnr: float | None = None,
        target_ssim: float | None = None,
        metric: Metric | None = None,
        target: float | None = None,
        max_tokens: int | None = None,
        fast: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> GPSTokenEncoderOutput:
        r"""Image -> tokens.

        With a target each image gets the fewest tokens that reach it (docs/quality.md). Give one of `target_psnr`,
        `target_ssim`, and `metric` with `target`. The search decodes, so it takes about `1.3 log2(max_tokens)`
        reconstructions, and it keeps no gradients.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): RGB in [-1, 1], any H x W.
            num_tokens (`int` or sequence of B `int`, *optional*): tokens of the whole image, for all images or for
                each; shorter rows are padded and masked. Defaults to `config.num_tokens`, in tiles to as many for
                every tile.
            importance (`torch.Tensor` of shape `(B, H, W)`, *optional*): weights >= 0, added per pixel to the
                complexity of the regions. More weight draws more tokens.
            layout ([`GaussianLayout`], *optional*): a layout of B images (or of one, for all) that takes the place of
                the partition. Its boxes are derived where they are `None`.
            tile_size (`int`, *optional*): encode near-equal tiles of at most this side on their own, and move their
                tokens to the image's frame. `num_tokens` is shared out equally over the tiles, and tokens come tile by
                tile.
            target_psnr (`float`, *optional*): PSNR in dB that each decoded image must reach, unclamped, over a range
                of 2.
            target_ssim (`float`, *optional*): SSIM that each decoded image must reach, at most 1.
            metric (`Callable`, *optional*): `metric(image, reconstruction)` of two `(1, 3, H, W)` tensors in float32,
                which returns one number; higher is better.
            target (`float`, *optional*): value of `metric` that each decoded image must reach.
            max_tokens (`int`, *optional*): the most tokens that an image may get, cut to what its size allows. By
                default four times as many per pixel as in training. An image that falls short gets the number of
                tokens with the highest quality that was found.
            fast (`bool`, *optional*, defaults to `False`): with `target_psnr`, predict the numbers of tokens from the
                partition by `config.quality_predictor`, and encode once. Nothing is decoded, so `reached` is `None`.

        Returns:
            [`GPSTokenEncoderOutput`]: `.tokens`, `.layout`, `.attention_mask`, and with a target `.reached`.

        Raises:
            ValueError: if `pixel_values` has another shape or dtype or leaves [-1, 1]; if `num_tokens`, `importance`,
                `layout` or `tile_size` does not fit the images; if `layout` is combined with one of the others; if a
                target is not a finite number, comes twice, or comes with `num_tokens` or `layout`; if `fast` lacks
                its predictor.
            TypeError: if an argument has an unknown name.
        """
        _check_kwargs("encode", kwargs)
        check_images("pixel_values", pixel_values)
        batch_size, _, height, width = pixel_values.shape
        if batch_size == 0:
            raise ValueError(f"pixel_values must hold at least one image, got shape {tuple(pixel_values.shape)}")
        counts = None if num_tokens is None else token_counts(num_tokens, batch_size)
        check_importance(importance, pixel_values)
        if layout is not None and not (num_tokens is None and importance is None and tile_size is None):
            raise ValueError(
                "num_tokens, importance and tile_size must be None with a layout, which leaves nothing to partition"
            )
        goal = quality_target(target_psnr, target_ssim, metric, target, max_tokens, fast)
        if goal is not None and not (num_tokens is None and layout is None):
            raise ValueError("num_tokens and layout must be None with a target, which chooses the number of tokens")
        if fast and self.config.quality_predictor is None:
            raise ValueError(
                "fast must be False for a model without config.quality_predictor (python -m pipelines.fit_quality "
                "measures one), got True"
            )
        if tile_size is not None:
            self._check_tile_size(tile_size)
        if self._is_validating():
            check_range("pixel_values", pixel_values.detach(), -1.0, 1.0, PIXEL_TOLERANCE)
            if importance is not None:
                check_range("importance", importance.detach(), 0.0, math.inf)

        if layout is not None:
            layout = self._complete_layout(layout, pixel_values)
            return self._encode_layout(pixel_values, layout, **kwargs)
        if goal is not None:
            return self._encode_to_target(pixel_values, importance, tile_size, goal, max_tokens, fast, **kwargs)
        if tile_size is None and self.use_tiling and max(height, width) > self.tiling_size:
            tile_size = self.tiling_size
        if tile_size is not None:
            return self._encode_tiles(pixel_values, counts, importance, tile_size, **kwargs)
        counts = self.config.num_tokens if counts is None else counts
        return self._encode_layout(pixel_values, self._partition(pixel_values, counts, importance), **kwargs)

    def _partition(
        self, pixel_values: torch.Tensor, counts: int | list[int], importance: torch.Tensor | None
    ) -> GaussianLayout:
        return partition_images(
            pixel_values.float(),
            counts,
            complexity_exponent=self.config.complexity_exponent,
            min_region_size=self.config.min_region_size,
            sigma_scale=self.config.sigma_scale,
            importance=importance,
            align_corners=self.config.align_corners,
            # A traced `encode` cannot look at the values. The partition, an op, does.
            validate=self.validate_inputs and torch.compiler.is_compiling(),
        )

    def _encode_layout(
        self, pixel_values: torch.Tensor, layout: GaussianLayout, **kwargs: Unpack[TransformersKwargs]
    ) -> GPSTokenEncoderOutput:
        assert layout.boxes is not None
        # Attention is faster without a mask.
        mask = layout.attention_mask if layout.is_padded else None
        if self.use_slicing and len(pixel_values) > 1:
            masks = [None] * len(layout) if mask is None else mask.split(1)
            slices = zip(pixel_values.split(1), layout.boxes.split(1), layout.gaussians.split(1), masks)
            tokens = torch.cat([self.encoder(*one_image, **kwargs) for one_image in slices])
        else:
            tokens = self.encoder(pixel_values, layout.boxes, layout.gaussians, mask, **kwargs)
        return GPSTokenEncoderOutput(tokens=tokens, layout=layout, attention_mask=layout.attention_mask)

    def _encode_tiles(
        self,
        pixel_values: torch.Tensor,
        counts: int | list[int] | None,
        importance: torch.Tensor | None,
        tile_size: int,
        **kwargs: Unpack[TransformersKwargs],
    ) -> GPSTokenEncoderOutput:
        batch_size, _, height, width = pixel_values.shape
        tiles = tiles_of_image((height, width), tile_size, self.config.map_scale)[1]
        if counts is None:
            tile_counts = [[self.config.num_tokens] * batch_size for _ in tiles]
        else:
            tile_counts = share_tokens(counts if isinstance(counts, list) else [counts] * batch_size, len(tiles))
        tokens, layouts = [], []
        for (y0, x0, h, w), count in zip(tiles, tile_counts):
            pixels = pixel_values[:, :, y0 : y0 + h, x0 : x0 + w]
            weights = None if importance is None else importance[:, y0 : y0 + h, x0 : x0 + w]
            layout = self._partition(pixels, count, weights)
            tile_tokens = self._encode_layout(pixels, layout, **kwargs).tokens
            frame = ((y0, x0, h, w), (height, width))
            gaussians, texture = split_tokens(tile_tokens)
            tokens.append(join_tokens(gaussians_to_frame(gaussians, *frame), texture))
            layouts.append(
                replace(
                    layout,
                    gaussians=gaussians_to_frame(layout.gaussians, *frame),
                    boxes=shift_boxes(layout.boxes, x0, y0),
                    attention_mask=layout.attention_mask if layout.is_padded else None,
                )
            )
        layout = GaussianLayout.join(layouts)
        return GPSTokenEncoderOutput(
            tokens=torch.cat([pad_tokens(part, max(map(max, tile_counts))) for part in tokens], dim=1),
            layout=layout,
            attention_mask=layout.attention_mask,
        )

    @torch.no_grad()
    def _encode_to_target(
        self,
        pixel_values: torch.Tensor,
        importance: torch.Tensor | None,
        decode_tile_size: int | None,
        goal: QualityTarget,
        max_tokens: int | None,
        fast: bool,
        **kwargs: Unpack[TransformersKwargs],
    ) -> GPSTokenEncoderOutput:
        config, size = self.config, (pixel_values.shape[2], pixel_values.shape[3])
        tile_size = decode_tile_size
        if tile_size is None and self.use_tiling and max(size) > self.tiling_size:
            tile_size = self.tiling_size
        tiles = [(0, 0, *size)] if tile_size is None else tiles_of_image(size, tile_size, config.map_scale)[1]
        # Tokens of the training at this size.
        usual = max(1, round(config.num_tokens * math.prod(size) / config.image_size**2))
        low, high = len(tiles), 4 * usual if max_tokens is None else max_tokens
        high = min(max(low, high), low * min(max_regions(h, w, config.min_region_size) for _, _, h, w in tiles))
        if max_tokens is not None and max_tokens < low:
            raise ValueError(f"max_tokens must be at least 1 for each of the {low} tiles, got {max_tokens}")
        partition = None
        if tile_size is None:
            most = min(FINER * high, max_regions(*size, config.min_region_size)) if fast else high
            pixels = pixel_values.float()
            splits = split_sequence(pixels, most, config.complexity_exponent, config.min_region_size, importance)
            partition = NestedPartition(splits, size)

        def encode(rows: list[int], counts: list[int]) -> GPSTokenEncoderOutput:
            if tile_size is not None:
                weights = None if importance is None else importance[rows]
                return self._encode_tiles(pixel_values[rows], counts, weights, tile_size, **kwargs)
            assert partition is not None
            layout = partition.layout(rows, counts, config.sigma_scale, config.align_corners)
            return self._encode_layout(pixel_values[rows], layout.to(pixel_values.device), **kwargs)

        def decode(encoded: GPSTokenEncoderOutput) -> torch.Tensor:
            assert encoded.layout is not None
            mask = encoded.attention_mask if encoded.layout.is_padded else None
            return self.decode(encoded.tokens, size, mask, decode_tile_size).sample

        if fast:
            if partition is None:
                raise ValueError("fast must be False for an image that is encoded in tiles, got True")
            weights = config.quality_predictor
            assert weights is not None
            counts = predicted_counts(partition, pixel_values, config.image_size**2, high, weights, goal.value)
            return encode(list(range(len(counts))), counts)
        return encode_to_target(pixel_values, goal, (low, min(usual, high), high), encode, decode)

    def _complete_layout(self, layout: GaussianLayout, pixel_values: torch.Tensor) -> GaussianLayout:
        """A given layout, checked, with boxes, on the device and for the batch size of `pixel_values`."""
        if not isinstance(layout, GaussianLayout):
            raise ValueError(f"layout must be a GaussianLayout, got {type(layout).__name__}")
        batch_size, _, height, width = pixel_values.shape
        if layout.gaussians.shape[0] != batch_size:  # `len` would fix the size of an exported batch
            layout = layout.expand(batch_size)
        if self._is_validating():
            layout.check((height, width))
        return layout.with_boxes((height, width), self.config.sigma_scale, self.config.align_corners).to(
            pixel_values.device
        )

    # -- tokens -> map -> image

    def render(
        self, tokens: torch.Tensor, size: tuple[int, int], attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Splat tokens into a feature map (Eq. 1-3), in float32.

        Args:
            tokens (`torch.Tensor` of shape `(B, L, 5 + C)`): Gaussians and texture.
            size (`tuple[int, int]`): `(h, w)` of the map in pixels.
            attention_mask (`torch.Tensor` of shape `(B, L)`, *optional*): 1 for a token, 0 for padding.

        Returns:
            `torch.Tensor` of shape `(B, C, h, w)`.

        Raises:
            ValueError: if a shape does not fit or a token is not finite and legal.
        """
        self._check_tokens(tokens, attention_mask)
        gaussians, texture = split_tokens(tokens)
        return self._splat(gaussians, texture, size, attention_mask)

    @apply_forward_hook
    def decode(
        self,
        tokens: torch.Tensor,
        image_size: int | tuple[int, int] | None = None,
        attention_mask: torch.Tensor | None = None,
        tile_size: int | None = None,
        return_dict: bool = True,
    ) -> GPSTokenDecoderOutput | tuple[torch.Tensor]:
        """Tokens -> image.

        The map has `image_size / config.map_scale` pixels, rounded up; what that adds to the image at the right and
        bottom is cropped.

        Args:
            tokens (`torch.Tensor` of shape `(B, L, 5 + C)`): Gaussians and texture.
            image_size (`int` or `tuple[int, int]`, *optional*, defaults to `config.image_size`): `(H, W)` or one side.
            attention_mask (`torch.Tensor` of shape `(B, L)`, *optional*): 1 for a token, 0 for padding. Padding does
                not change the image.
            tile_size (`int`, *optional*): the `tile_size` that `encode` was given; tiles are then decoded as
                `config.tile_decode` says.
            return_dict (`bool`, *optional*, defaults to `True`): return an output object instead of a tuple.

        Returns:
            [`GPSTokenDecoderOutput`] or `tuple`: `.sample` `(B, 3, H, W)`, about [-1, 1], not clamped.

        Raises:
            ValueError: if a shape does not fit, a token is not finite and legal, or `tile_size` is not a positive
                multiple of `config.map_scale`.
        """
        self._check_tokens(tokens, attention_mask)
        height, width = self._image_size(image_size)
        if tile_size is not None:
            self._check_tile_size(tile_size)

        if self.use_slicing and tokens.shape[0] > 1:
            masks = [None] * tokens.shape[0] if attention_mask is None else attention_mask.split(1)
            sample = torch.cat(
                [self._decode(part, (height, width), mask, tile_size) for part, mask in zip(tokens.split(1), masks)]
            )
        else:
            sample = self._decode(tokens, (height, width), attention_mask, tile_size)
        return GPSTokenDecoderOutput(sample=sample) if return_dict else (sample,)

    def _decode(
        self,
        tokens: torch.Tensor,
        image_size: tuple[int, int],
        attention_mask: torch.Tensor | None,
        tile_size: int | None,
    ) -> torch.Tensor:
        scale = self.config.map_scale
        tiles = None
        if tile_size is not None:
            tiles, tile_boxes = tiles_of_image(image_size, tile_size, scale)
            if self.config.tile_decode == "stitched" and len(tile_boxes) > 1:
                return self._decode_stitched(tokens, image_size, attention_mask, tile_boxes)
        gaussians, texture = split_tokens(tokens)
        gaussians = gaussians_to_padded_frame(gaussians, image_size, scale, self.config.align_corners)
        maps = self._splat(gaussians, texture, map_size_of(image_size, scale), attention_mask)
        window = self.tiling_size // scale
        if tiles is None and self.use_tiling and max(maps.shape[-2:]) > window:
            overlap = (self.tiling_overlap, self.tiling_overlap)
            image = decode_in_windows(self.decoder, maps, (window, window), overlap, scale)
        else:
            image = self.decoder(maps, tiles)
        return crop(image, image_size)

    def _decode_stitched(
        self,
        tokens: torch.Tensor,
        image_size: tuple[int, int],
        attention_mask: torch.Tensor | None,
        tile_boxes: list[tuple[int, int, int, int]],
    ) -> torch.Tensor:
        """Decode every tile on its own. `tokens` hold as many rows for every tile, in the order of `encode`."""
        per_tile, rest = divmod(tokens.shape[1], len(tile_boxes))
        if rest:
            raise ValueError(
                f"tokens must hold as many rows for each of the {len(tile_boxes)} tiles, in the order of encode, "
                f"got {tokens.shape[1]} rows"
            )
        image: torch.Tensor | None = None
        for index, tile in enumerate(tile_boxes):
            y0, x0, h, w = tile
            rows = slice(index * per_tile, (index + 1) * per_tile)
            gaussians, texture = split_tokens(tokens[:, rows])
            tile_tokens = join_tokens(gaussians_from_frame(gaussians, tile, image_size), texture)
            mask = None if attention_mask is None else attention_mask[:, rows]
            decoded = self._decode(tile_tokens, (h, w), mask, None)
            if image is None:
                image = decoded.new_empty(decoded.shape[0], 3, *image_size)
            image[:, :, y0 : y0 + h, x0 : x0 + w] = decoded
        assert image is not None
        return image

    def _splat(
        self,
        gaussians: torch.Tensor,
        texture: torch.Tensor,
        size: tuple[int, int],
        attention_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        support, align_corners = self.config.splat_support, self.config.align_corners
        return self.renderer(gaussians.float(), texture.float(), size, support, attention_mask, align_corners)

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor,
        num_tokens: int | Sequence[int] | None = None,
        importance: torch.Tensor | None = None,
        layout: GaussianLayout | None = None,
        tile_size: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> GPSTokenOutput:
        """Reconstruct images: `encode`, then `decode` at the same size. Takes its arguments but for the target."""
        encoded = self.encode(pixel_values, num_tokens, importance, layout, tile_size, **kwargs)
        height, width = pixel_values.shape[-2:]
        mask = encoded.attention_mask if encoded.layout.is_padded else None
        decoded = self.decode(encoded.tokens, (height, width), mask, tile_size)
        return GPSTokenOutput(sample=decoded.sample, tokens=encoded.tokens, attention_mask=encoded.attention_mask)

    # -- checks

    def _is_validating(self) -> bool:
        # Reading values would break the graph of torch.compile.
        return self.validate_inputs and not torch.compiler.is_compiling()

    def _image_size(self, image_size: int | tuple[int, int] | None) -> tuple[int, int]:
        if image_size is None:
            image_size = self.config.image_size
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if height < 1 or width < 1:
            raise ValueError(f"image_size must be at least 1 x 1 pixels, got {height} x {width}")
        return height, width

    def _check_tile_size(self, tile_size: int) -> None:
        scale = self.config.map_scale
        if tile_size < scale or tile_size % scale:
            raise ValueError(f"tile_size must be a positive multiple of {scale} pixels, got {tile_size}")

    def _check_tokens(self, tokens: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
        expected = self.config.token_channels
        if tokens.ndim != 3 or tokens.shape[-1] != expected:
            raise ValueError(f"tokens must be (B, L, 5 + C = {expected}), got {tuple(tokens.shape)}")
        if 0 in tokens.shape:
            raise ValueError(f"tokens must be of at least one image and one token, got {tuple(tokens.shape)}")
        if attention_mask is not None and attention_mask.shape != tokens.shape[:2]:
            raise ValueError(
                f"attention_mask must be (B, L) = {tuple(tokens.shape[:2])}, got {tuple(attention_mask.shape)}"
            )
        if not self._is_validating():
            return
        real = tokens.detach()
        if attention_mask is not None:
            real = real[attention_mask.bool()]
        check_gaussians(real[..., :NUM_GAUSSIAN_PARAMS], "the Gaussians of tokens")
        if not torch.isfinite(real).all():
            raise ValueError("the texture of tokens must be finite, got NaN or infinite values")


def pad_tokens(tokens: torch.Tensor, length: int) -> torch.Tensor:
    """`(B, L, 5 + C)` -> `(B, length, 5 + C)`, padded with the padding Gaussian and texture 0."""
    padding = tokens.new_zeros(tokens.shape[0], length - tokens.shape[1], tokens.shape[2])
    for channel, value in enumerate(PADDING_GAUSSIAN):
        padding[..., channel] = value
    return torch.cat([tokens, padding], dim=1)


def shift_boxes(boxes: torch.Tensor, x: int, y: int) -> torch.Tensor:
    """Boxes `(..., 4)` moved by x and y pixels."""
    return torch.stack([boxes[..., 0::2] + x, boxes[..., 1::2] + y], dim=-1).flatten(-2)


def _check_kwargs(name: str, kwargs: dict[str, Any]) -> None:
    """Raise a TypeError for an argument that neither the method nor transformers' attention knows."""
    unknown = sorted(set(kwargs) - set(TransformersKwargs.__annotations__))
    if unknown:
        raise TypeError(f"{name}() got an unexpected keyword argument {unknown[0]!r}")


__all__ = ["GPSTokenModel", "GPSTokenPreTrainedModel"]
