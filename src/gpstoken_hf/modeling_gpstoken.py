# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""GPSTokenModel: image -> regions -> tokens -> splatted map -> image.

Letters: B batch, L tokens, C texture channels, D hidden size, R RoI size, H x W pixels, h x w map pixels, N tiles.
"""

# Annotations stay objects here (no `from __future__ import annotations`): transformers reads what `**kwargs` may hold
# from the signature of `forward`.
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.utils.accelerate_utils import apply_forward_hook
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.output_capturing import capture_outputs

from .configuration_gpstoken import GPSTokenConfig
from .decoder_gpstoken import GPSTokenDecoder, TileGrid, decode_in_windows
from .encoder_gpstoken import GPSTokenAttention, GPSTokenEncoder, GPSTokenEncoderLayer
from .gaussians import (
    NUM_GAUSSIAN_PARAMS,
    boxes_to_gaussians,
    check_gaussians,
    gaussians_from_frame,
    gaussians_to_boxes,
    gaussians_to_frame,
    gaussians_to_padded_frame,
    join_tokens,
    split_tokens,
)
from .partition import partition_images, start_value_checks
from .splatting import splat_gaussians


@dataclass
class GPSTokenEncoderOutput(ModelOutput):
    """Tokens of a batch of images.

    Args:
        tokens (`torch.FloatTensor` of shape `(B, L, 5 + C)`): refined Gaussians and texture, float32.
        init_gaussians (`torch.FloatTensor` of shape `(B, L, 5)`): the Gaussians of the regions, before refinement.
        boxes (`torch.LongTensor` of shape `(B, L, 4)`): the regions, inclusive pixels `[x0, y0, x1, y1]`.
        attention_mask (`torch.LongTensor` of shape `(B, L)`): 1 for a token, 0 for padding.
    """

    tokens: torch.FloatTensor | None = None
    init_gaussians: torch.FloatTensor | None = None
    boxes: torch.LongTensor | None = None
    attention_mask: torch.LongTensor | None = None


@dataclass
class GPSTokenDecoderOutput(ModelOutput):
    """A decoded batch.

    Args:
        sample (`torch.FloatTensor` of shape `(B, 3, H, W)`): images, about [-1, 1], not clamped.
    """

    sample: torch.FloatTensor | None = None


@dataclass
class GPSTokenOutput(ModelOutput):
    """A reconstructed batch and its tokens; see `GPSTokenEncoderOutput` and `GPSTokenDecoderOutput` for shapes.

    Args:
        hidden_states (`tuple(torch.FloatTensor)` of shape `(B, L, D)`, *optional*): the output of every encoder block.
        attentions (`tuple(torch.FloatTensor)` of shape `(B, heads, L, L)`, *optional*): the encoder's attention.
    """

    sample: torch.FloatTensor | None = None
    tokens: torch.FloatTensor | None = None
    init_gaussians: torch.FloatTensor | None = None
    boxes: torch.LongTensor | None = None
    attention_mask: torch.LongTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class GPSTokenPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of the model: names, capabilities and initial weights."""

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

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *model_args: Any, **kwargs: Any
    ) -> Any:
        """Load weights and config; as in transformers, but a checkpoint that does not fit is an error.

        Raises:
            ValueError: weights are missing, left over or of another shape, or the file is damaged. Pass
                `output_loading_info=True`, `ignore_mismatched_sizes=True` or a `state_dict` of your own to load what
                fits and judge for yourself.
        """
        lenient = (
            kwargs.get("output_loading_info")
            or kwargs.get("ignore_mismatched_sizes")
            or kwargs.get("state_dict") is not None
        )
        with readable_weights(pretrained_model_name_or_path):
            if lenient:
                return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
            # Weights of another shape are named below; transformers' own error names none.
            kwargs.update(output_loading_info=True, ignore_mismatched_sizes=True)
            model, info = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        check_loading_info(cls.__name__, pretrained_model_name_or_path, info)
        return model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The initialisation of torch's own layers; the Gaussian head starts at zero, so that refinement does."""
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
    """The GPSToken tokenizer (arXiv 2509.01109): images to 2D-Gaussian tokens and back.

    `encode` partitions an image into regions of like complexity and turns each into a token, `render` splats tokens
    into a feature map, `decode` renders and turns the map into an image, `forward` does all of it.
    """

    def __init__(self, config: GPSTokenConfig):
        super().__init__(config)
        self.encoder = GPSTokenEncoder(config)
        self.decoder = GPSTokenDecoder(
            config.texture_channels,
            config.decoder_base_channels,
            config.decoder_channel_multipliers,
            config.decoder_layers_per_block,
            config.norm_num_groups,
        )
        self.use_slicing = False
        self.use_tiling = False
        self.tiling_size = config.image_size
        self.tiling_overlap = 0.25
        self.post_init()

    # -- memory

    def enable_slicing(self) -> None:
        """Encode and decode one image of a batch at a time: less memory, the same result."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Back to whole batches."""
        self.use_slicing = False

    def enable_tiling(self, tile_size: int | None = None, overlap: float = 0.25) -> None:
        """Bound the memory of large images.

        Images larger than a tile are encoded tile by tile (as with `encode(tile_size=...)`), and maps larger than a
        tile are decoded in overlapping windows that are blended into one another.

        Args:
            tile_size: side in image pixels, a multiple of `config.map_scale`; `config.image_size` by default.
            overlap: share of a window that it has in common with the next, 0 <= overlap < 1.
        """
        tile_size = self.config.image_size if tile_size is None else tile_size
        self._check_tile_size(tile_size)
        if not 0 <= overlap < 1:
            raise ValueError(f"overlap must be at least 0 and below 1, got {overlap}")
        self.use_tiling, self.tiling_size, self.tiling_overlap = True, tile_size, overlap

    def disable_tiling(self) -> None:
        """Back to whole images."""
        self.use_tiling = False

    # -- image -> tokens

    @apply_forward_hook
    def encode(
        self,
        pixel_values: torch.Tensor,
        num_tokens: int | Sequence[int] | None = None,
        importance: torch.Tensor | None = None,
        init_gaussians: torch.Tensor | None = None,
        boxes: torch.Tensor | None = None,
        tile_size: int | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> GPSTokenEncoderOutput:
        """Image -> tokens.

        Args:
            pixel_values: `(B, 3, H, W)` in [-1, 1], any H x W.
            num_tokens: tokens of the whole image, one number or one per image; fewer are padded and masked. Default:
                `config.num_tokens`, in tiles as many for every tile.
            importance: `(B, H, W)` >= 0, added to the regions' complexity per pixel: more weight, more tokens there.
            init_gaussians: `(B, L, 5)` a layout made by hand or taken from elsewhere, in place of the partition.
            boxes: `(B, L, 4)` its regions, inclusive pixels; each is derived from the other when only one is given.
            tile_size: encode tiles of near-equal size no larger than this on their own and merge their tokens into
                the image's frame. `num_tokens` is shared out equally over the tiles; tokens come tile by tile.
            attention_mask: `(B, L)` of a layout given by hand, 1 for a token, 0 for padding.

        Raises:
            ValueError: what was expected and what came, for any input that does not fit; before any work is done, but
                for values out of range on CUDA, which are found while the GPU works.
        """
        check_pixel_values(pixel_values)
        batch_size, _, height, width = pixel_values.shape
        num_tokens = check_num_tokens(num_tokens, batch_size)
        if importance is not None and importance.shape != (batch_size, height, width):
            raise ValueError(
                f"importance must be (B, H, W) = {(batch_size, height, width)}, got {tuple(importance.shape)}"
            )
        has_layout = init_gaussians is not None or boxes is not None
        if has_layout and (num_tokens is not None or importance is not None or tile_size is not None):
            raise ValueError(
                "a layout given by init_gaussians or boxes leaves nothing to partition: "
                "expected num_tokens, importance and tile_size to be None"
            )
        if attention_mask is not None and not has_layout:
            raise ValueError("attention_mask belongs to a layout given by init_gaussians or boxes, got neither")

        # Off CUDA these raise at once. There they are waited for when all work is queued, so that the GPU has some.
        checks = []
        if not torch.compiler.is_compiling():  # reading values would break the graph
            checks = start_value_checks(pixel_values, importance, name="pixel_values")
        if has_layout:
            boxes, init_gaussians = self._complete_layout(pixel_values, boxes, init_gaussians, attention_mask)
            output = self._encode_layout(pixel_values, boxes, init_gaussians, attention_mask, **kwargs)
        else:
            if tile_size is None and self.use_tiling and max(height, width) > self.tiling_size:
                tile_size = self.tiling_size
            if tile_size is None:
                count = self.config.num_tokens if num_tokens is None else num_tokens
                output = self._encode_whole(pixel_values, count, importance, **kwargs)
            else:
                self._check_tile_size(tile_size)
                output = self._encode_tiles(pixel_values, num_tokens, importance, tile_size, **kwargs)
        for check in checks:
            check.finish()
        return output

    def _encode_whole(
        self,
        pixel_values: torch.Tensor,
        num_tokens: int | Sequence[int],
        importance: torch.Tensor | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> GPSTokenEncoderOutput:
        partition = partition_images(
            pixel_values.float(),
            num_tokens,
            complexity_exponent=self.config.complexity_exponent,
            min_region_size=self.config.min_region_size,
            sigma_scale=self.config.sigma_scale,
            importance=importance,
            # A traced `encode` has not looked at the values.
            check_values=torch.compiler.is_compiling(),
        )
        # One count for the whole batch leaves nothing to mask, and attention without a mask is faster.
        mask = None if isinstance(num_tokens, int) or len(set(num_tokens)) == 1 else partition.attention_mask
        return self._encode_layout(pixel_values, partition.boxes, partition.gaussians, mask, **kwargs)

    def _encode_layout(
        self,
        pixel_values: torch.Tensor,
        boxes: torch.Tensor,
        init_gaussians: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> GPSTokenEncoderOutput:
        roi_boxes = boxes
        if attention_mask is not None:
            # RoIAlign's cost grows with a region, and padding carries the largest of all.
            roi_boxes = boxes * attention_mask.unsqueeze(-1)
        if self.use_slicing and len(pixel_values) > 1:
            masks = [None] * len(boxes) if attention_mask is None else attention_mask.split(1)
            slices = zip(pixel_values.split(1), roi_boxes.split(1), init_gaussians.split(1), masks)
            tokens = torch.cat([self.encoder(*one_image, **kwargs) for one_image in slices])
        else:
            tokens = self.encoder(pixel_values, roi_boxes, init_gaussians, attention_mask, **kwargs)
        if attention_mask is None:
            attention_mask = torch.ones(boxes.shape[:2], device=boxes.device, dtype=torch.int64)
        return GPSTokenEncoderOutput(
            tokens=tokens, init_gaussians=init_gaussians, boxes=boxes, attention_mask=attention_mask
        )

    def _encode_tiles(
        self,
        pixel_values: torch.Tensor,
        num_tokens: int | Sequence[int] | None,
        importance: torch.Tensor | None,
        tile_size: int,
        **kwargs: Unpack[TransformersKwargs],
    ) -> GPSTokenEncoderOutput:
        batch_size, _, height, width = pixel_values.shape
        tile_boxes = self.tiles_of_image((height, width), tile_size)[1]
        counts = share_tokens(num_tokens, len(tile_boxes), batch_size, self.config.num_tokens)
        longest = max(map(max, counts))
        parts = []
        for (y0, x0, h, w), tile_counts in zip(tile_boxes, counts):
            part = self._encode_whole(
                pixel_values[:, :, y0 : y0 + h, x0 : x0 + w],
                tile_counts,
                None if importance is None else importance[:, y0 : y0 + h, x0 : x0 + w],
                **kwargs,
            )
            tokens, init_gaussians, boxes, attention_mask = part.to_tuple()
            gaussians, texture = split_tokens(tokens)
            frame = ((y0, x0, h, w), (height, width))
            missing = longest - tokens.shape[1]
            # Numbers, not a tensor of them, which would have to be sent to the device.
            boxes = torch.stack([boxes[..., 0::2] + x0, boxes[..., 1::2] + y0], dim=-1).flatten(-2)
            parts.append(
                (
                    pad_tokens(join_tokens(gaussians_to_frame(gaussians, *frame), texture), missing),
                    pad_tokens(gaussians_to_frame(init_gaussians, *frame), missing),
                    pad_tokens(boxes, missing),
                    F.pad(attention_mask, (0, missing)),
                )
            )
        tokens, init_gaussians, boxes, attention_mask = (torch.cat(field, dim=1) for field in zip(*parts))
        return GPSTokenEncoderOutput(
            tokens=tokens, init_gaussians=init_gaussians, boxes=boxes, attention_mask=attention_mask
        )

    # -- tokens -> map -> image

    def render(
        self, tokens: torch.Tensor, size: tuple[int, int], attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Splat tokens `(B, L, 5 + C)` into a feature map `(B, C, h, w)`, `size = (h, w)` (Eq. 1-3), in float32."""
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

        Args:
            tokens: `(B, L, 5 + C)`.
            image_size: `(H, W)` or one side; `config.image_size` by default. The map is `image_size / map_scale`,
                rounded up; what that adds at the right and lower border is cropped off again.
            attention_mask: `(B, L)`, 1 for a token, 0 for padding, which changes nothing in the image.
            tile_size: the one that `encode` was given, for the way `config.tile_decode` decodes tiles.

        Raises:
            ValueError: what was expected and what came.
        """
        self._check_tokens(tokens, attention_mask)
        if image_size is None:
            image_size = self.config.image_size
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if height < 1 or width < 1:
            raise ValueError(f"image_size must be at least 1 x 1 pixels, got {height} x {width}")
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
        tiles = None if tile_size is None else self.tiles_of_image(image_size, tile_size)[0]
        stitched = self.config.tile_decode == "stitched"
        if stitched and tile_size is not None and tiles is not None and tiles.shape != (1, 1):
            return self._decode_stitched(tokens, image_size, attention_mask, tile_size)
        height, width = image_size
        scale = self.config.map_scale
        map_size = (-(-height // scale), -(-width // scale))
        padded_size = (map_size[0] * scale, map_size[1] * scale)
        gaussians, texture = split_tokens(tokens)
        gaussians = gaussians_to_padded_frame(gaussians, image_size, padded_size, map_size)
        maps = self._splat(gaussians, texture, map_size, attention_mask)
        window = self.tiling_size // scale
        if tiles is None and self.use_tiling and max(map_size) > window:
            image = decode_in_windows(self.decoder, maps, window, self.tiling_overlap, scale)
        else:
            image = self.decoder(maps, tiles)
        return image[:, :, :height, :width]

    def _decode_stitched(
        self,
        tokens: torch.Tensor,
        image_size: tuple[int, int],
        attention_mask: torch.Tensor | None,
        tile_size: int,
    ) -> torch.Tensor:
        tile_boxes = self.tiles_of_image(image_size, tile_size)[1]
        per_tile, rest = divmod(tokens.shape[1], len(tile_boxes))
        if rest:
            raise ValueError(
                f"a stitched decode takes as many tokens for each of the {len(tile_boxes)} tiles, tile by tile as "
                f"encode returns them, got {tokens.shape[1]} tokens"
            )
        image = tokens.new_empty(tokens.shape[0], 3, *image_size, dtype=self.dtype)
        for index, tile_box in enumerate(tile_boxes):
            y0, x0, h, w = tile_box
            part = slice(index * per_tile, (index + 1) * per_tile)
            gaussians, texture = split_tokens(tokens[:, part])
            tile_tokens = join_tokens(gaussians_from_frame(gaussians, tile_box, image_size), texture)
            mask = None if attention_mask is None else attention_mask[:, part]
            image[:, :, y0 : y0 + h, x0 : x0 + w] = self._decode(tile_tokens, (h, w), mask, None)
        return image

    def _splat(
        self,
        gaussians: torch.Tensor,
        texture: torch.Tensor,
        size: tuple[int, int],
        attention_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        return splat_gaussians(
            gaussians.float(), texture.float(), size, self.config.splat_support, attention_mask=attention_mask
        )

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor,
        num_tokens: int | Sequence[int] | None = None,
        importance: torch.Tensor | None = None,
        init_gaussians: torch.Tensor | None = None,
        boxes: torch.Tensor | None = None,
        tile_size: int | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> GPSTokenOutput:
        """Reconstruct images: `encode`, then `decode` at the same size. Arguments as for `encode`."""
        encoded = self.encode(
            pixel_values, num_tokens, importance, init_gaussians, boxes, tile_size, attention_mask, **kwargs
        )
        height, width = pixel_values.shape[-2:]
        decoded = self.decode(encoded.tokens, (height, width), encoded.attention_mask, tile_size)
        return GPSTokenOutput(
            sample=decoded.sample,
            tokens=encoded.tokens,
            init_gaussians=encoded.init_gaussians,
            boxes=encoded.boxes,
            attention_mask=encoded.attention_mask,
        )

    # -- tiles and checks

    def tiles_of_image(
        self, image_size: tuple[int, int], tile_size: int
    ) -> tuple[TileGrid, list[tuple[int, int, int, int]]]:
        """The tiles on the map, and the same tiles in pixels of the image, `(y0, x0, h, w)` each."""
        scale = self.config.map_scale
        map_size = (-(-image_size[0] // scale), -(-image_size[1] // scale))
        tiles = TileGrid.of_near_equal_tiles(map_size, tile_size // scale)
        boxes = [
            (y0, x0, min(h, image_size[0] - y0), min(w, image_size[1] - x0))
            for y0, x0, h, w in tiles.scaled(scale).boxes()
        ]
        return tiles, boxes

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
        if torch.compiler.is_compiling():
            return
        real = tokens.detach()
        if attention_mask is not None:
            real = real[attention_mask.bool()]
        check_gaussians(real[..., :NUM_GAUSSIAN_PARAMS], "the Gaussians of tokens")
        if not torch.isfinite(real).all():
            raise ValueError("the texture of tokens must be finite, got NaN or infinite values")

    def _complete_layout(
        self,
        pixel_values: torch.Tensor,
        boxes: torch.Tensor | None,
        init_gaussians: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A layout given by hand -> its boxes and Gaussians, each derived from the other where one is missing."""
        batch_size, _, height, width = pixel_values.shape
        given = boxes if boxes is not None else init_gaussians
        assert given is not None
        expected = (batch_size, given.shape[1] if given.ndim > 1 else 0)
        for name, value, fields in (("boxes", boxes, 4), ("init_gaussians", init_gaussians, NUM_GAUSSIAN_PARAMS)):
            if value is not None and (value.shape != (*expected, fields) or expected[1] == 0):
                raise ValueError(f"{name} must be (B, L, {fields}) with B = {batch_size}, got {tuple(value.shape)}")
        if attention_mask is not None and attention_mask.shape != expected:
            raise ValueError(f"attention_mask must be (B, L) = {expected}, got {tuple(attention_mask.shape)}")
        if boxes is not None and boxes.is_floating_point():
            raise ValueError(f"boxes must be integers, inclusive pixels [x0, y0, x1, y1], got {boxes.dtype}")
        if attention_mask is not None and not torch.compiler.is_compiling() and not attention_mask.any(1).all():
            raise ValueError("attention_mask must leave every image at least one token, got an image with none")
        if init_gaussians is not None and not torch.compiler.is_compiling():
            real = init_gaussians if attention_mask is None else init_gaussians[attention_mask.bool()]
            check_gaussians(real, "init_gaussians")
        if boxes is None:
            assert init_gaussians is not None
            boxes = gaussians_to_boxes(init_gaussians, (height, width), self.config.sigma_scale)
        elif not torch.compiler.is_compiling():
            x0, y0, x1, y1 = boxes.unbind(-1)
            inside = (x0 >= 0) & (y0 >= 0) & (x0 <= x1) & (y0 <= y1) & (x1 < width) & (y1 < height)
            if attention_mask is not None:
                inside |= attention_mask == 0
            if not inside.all():
                first = boxes[~inside][0].tolist()
                raise ValueError(
                    f"boxes must be inclusive pixels [x0, y0, x1, y1] inside the {height} x {width} image, got {first}"
                )
        if init_gaussians is None:
            init_gaussians = boxes_to_gaussians(boxes, (height, width), self.config.sigma_scale)
        if attention_mask is not None:
            # Padding may hold anything, but attention would carry a NaN from there to every token (0 · NaN).
            padded = (attention_mask == 0).unsqueeze(-1).to(boxes.device)
            whole = boxes.new_tensor([0, 0, width - 1, height - 1])
            gaussian = boxes_to_gaussians(whole, (height, width), self.config.sigma_scale).to(init_gaussians)
            boxes, init_gaussians = torch.where(padded, whole, boxes), torch.where(padded, gaussian, init_gaussians)
        return boxes.to(pixel_values.device), init_gaussians.to(pixel_values.device)


@contextmanager
def readable_weights(source: Any) -> Iterator[None]:
    """Turn the error of a damaged safetensors file into a ValueError that names the checkpoint."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        # diffusers hides it behind an OSError, and that behind the error of reading the file as text.
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, SafetensorError):
            cause = cause.__context__
        if cause is None:
            raise
        raise ValueError(
            f"the weights of {source} must be whole safetensors files, got a damaged one: {cause}"
        ) from error


def check_loading_info(class_name: str, source: Any, info: dict[str, Any]) -> None:
    """Raise ValueError unless a checkpoint held exactly the weights of its model.

    Args:
        info: the loading info of transformers or diffusers, with `missing_keys`, `unexpected_keys` and
            `mismatched_keys`, the last of `(key, shape in the checkpoint, shape in the model)`.
    """
    mismatched = [
        f"{key} {tuple(found)} instead of {tuple(expected)}" for key, found, expected in info["mismatched_keys"]
    ]
    problems = []
    for kind, keys in (
        ("missing", info["missing_keys"]),
        ("unexpected", info["unexpected_keys"]),
        ("of another shape", mismatched),
    ):
        if keys:
            shown = sorted(keys)
            more = f", and {len(shown) - 5} more" if len(shown) > 5 else ""
            problems.append(f"{len(shown)} {kind} ({', '.join(shown[:5])}{more})")
    if problems:
        raise ValueError(f"expected exactly the weights of {class_name} in {source}, got: {'; '.join(problems)}")


def check_pixel_values(pixel_values: torch.Tensor) -> None:
    """What can be said of images without reading them: their shape and dtype."""
    if pixel_values.ndim != 4 or pixel_values.shape[1] != 3 or 0 in pixel_values.shape:
        raise ValueError(f"pixel_values must be (B, 3, H, W) with 3 colour channels, got {tuple(pixel_values.shape)}")
    if not pixel_values.is_floating_point():
        raise ValueError(f"pixel_values must be floating point in [-1, 1], got {pixel_values.dtype}")


def check_num_tokens(num_tokens: int | Sequence[int] | None, batch_size: int) -> int | list[int] | None:
    """The number of tokens as plain integers; ValueError unless it is one of at least 1, or one for each image."""
    if num_tokens is None:
        return None
    if isinstance(num_tokens, Integral):
        counts = [int(num_tokens)]
    elif isinstance(num_tokens, Sequence) and all(isinstance(count, Integral) for count in num_tokens):
        counts = [int(count) for count in num_tokens]
        if len(counts) != batch_size:
            raise ValueError(f"num_tokens must hold one number per image, {batch_size}, got {len(counts)}")
    else:
        raise ValueError(f"num_tokens must be an integer or a list of one integer per image, got {num_tokens!r}")
    if min(counts) < 1:
        raise ValueError(f"num_tokens must be at least 1, got {min(counts)}")
    return counts[0] if isinstance(num_tokens, Integral) else counts


def share_tokens(
    num_tokens: int | Sequence[int] | None, num_tiles: int, batch_size: int, default_per_tile: int
) -> list[list[int]]:
    """Tokens of whole images -> tokens of each tile, one list of B numbers per tile, differing by at most 1.

    Raises:
        ValueError: an image has fewer tokens than tiles.
    """
    if num_tokens is None:
        return [[default_per_tile] * batch_size for _ in range(num_tiles)]
    totals = [num_tokens] * batch_size if isinstance(num_tokens, int) else list(num_tokens)
    if min(totals) < num_tiles:
        raise ValueError(f"num_tokens must give each of the {num_tiles} tiles at least one token, got {min(totals)}")
    return [[total // num_tiles + (tile < total % num_tiles) for total in totals] for tile in range(num_tiles)]


def pad_tokens(values: torch.Tensor, count: int) -> torch.Tensor:
    """`(B, L, F)` -> `(B, L + count, F)`, padded with copies of the last token, so that padding is a legal token."""
    if count == 0:
        return values
    return torch.cat([values, values[:, -1:].expand(-1, count, -1)], dim=1)


__all__ = ["GPSTokenModel", "GPSTokenPreTrainedModel"]
