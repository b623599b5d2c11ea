# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""The encoder of GPSToken: an image, its regions and their Gaussians -> tokens (paper Sec. 3.2).

Shapes: B batch, L tokens, C texture channels, c conditioner channels, D hidden size, R RoI size, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.modeling_utils import get_parameter_dtype
from torch import nn
from torchvision.ops import roi_align
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .configuration_gpstoken import GPSTokenConfig
from .decoder_gpstoken import ResidualBlock
from .gaussians import NUM_GAUSSIAN_PARAMS, join_tokens, refine_gaussians


class LayerNorm(nn.LayerNorm):
    """Layer normalisation, computed in float32 for any dtype of input and weights."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normed = F.layer_norm(
            hidden_states.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps
        )
        return normed.to(hidden_states.dtype)


class Float32Linear(nn.Linear):
    """A linear layer, computed in float32: the values of a Gaussian need more than the 8 bits of bfloat16."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float(), self.bias.float())


class GPSTokenConditioner(nn.Module):
    """Image features at full resolution, `(B, 3, H, W)` -> `(B, c, H, W)`."""

    def __init__(self, config: GPSTokenConfig):
        super().__init__()
        channels = config.conditioner_channels
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.ModuleList(ResidualBlock(channels, channels, config.norm_num_groups) for _ in range(2))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        hidden_states = self.conv_in(pixel_values.to(get_parameter_dtype(self.conv_in)))
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


class GPSTokenRegionFeatures(nn.Module):
    """Features of every region: RoIAlign, then a 1x1 convolution, `(B, c, H, W)` -> `(B, L, D, R R)`."""

    def __init__(self, config: GPSTokenConfig):
        super().__init__()
        self.roi_size = config.roi_size
        self.align_corners = config.align_corners
        self.projection = nn.Conv2d(config.conditioner_channels, config.hidden_size, 1)

    def forward(self, features: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """Sample `features` `(B, c, H, W)` in `boxes` `(B, L, 4)`, inclusive pixels."""
        batch_size, num_tokens = boxes.shape[:2]
        corners = boxes.to(torch.float32)
        if self.align_corners:
            # The authors use the inclusive indices as corners. A region one pixel wide then has no extent, for which
            # RoIAlign would return zeros.
            thin = (corners[..., 2:] == corners[..., :2]) * 0.25
            corners = torch.cat([corners[..., :2] - thin, corners[..., 2:] + thin], dim=-1)
        else:
            corners = torch.cat([corners[..., :2], corners[..., 2:] + 1], dim=-1)
        image_index = torch.arange(batch_size, device=boxes.device, dtype=torch.float32)
        image_index = image_index[:, None, None].expand(batch_size, num_tokens, 1)
        rois = torch.cat([image_index, corners], dim=2).flatten(0, 1)  # (B L, 5)
        with torch.autocast(features.device.type, enabled=False):
            # As a pair: in a compiled program a number may be open, and older versions cannot trace a pair made of it.
            size = (self.roi_size, self.roi_size)
            regions = roi_align(features.float(), rois, size, spatial_scale=1.0, sampling_ratio=-1, aligned=True)
        projected = self.projection(regions.to(get_parameter_dtype(self.projection)))  # (B L, D, R, R)
        return projected.flatten(2).unflatten(0, (batch_size, num_tokens))


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention: query, key, value `(B, heads, L, d)` -> `(B, L, heads, d)` and weights `(B, heads, L, L)`."""
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class GPSTokenAttnProcessor:
    """The attention that transformers was configured with, unless diffusers was told to use a backend of its own."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: GPSTokenAttention,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        qkv = attn.qkv_proj(hidden_states).unflatten(-1, (3, attn.num_heads, attn.head_dim))
        weights = None
        if self._attention_backend is not None:
            attended = dispatch_attention_fn(
                *qkv.unbind(2),  # each (B, L, heads, d)
                attn_mask=attention_mask,
                scale=attn.scaling,
                backend=self._attention_backend,
                parallel_config=self._parallel_config,
            )
        else:
            query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, heads, L, d)
            attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
                attn.config._attn_implementation, eager_attention_forward
            )
            attended, weights = attend(
                attn, query, key, value, attention_mask, scaling=attn.scaling, dropout=0.0, **kwargs
            )
        return attn.out_proj(attended.flatten(2)), weights


class GPSTokenAttention(nn.Module, AttentionModuleMixin):
    """Multi-head self-attention with one projection, with bias, for query, key and value."""

    _default_processor_cls = GPSTokenAttnProcessor
    _available_processors = [GPSTokenAttnProcessor]  # noqa: RUF012
    _supports_qkv_fusion = False  # it is one projection

    def __init__(self, config: GPSTokenConfig):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.set_processor(GPSTokenAttnProcessor())

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.processor(self, hidden_states, attention_mask, **kwargs)


class GPSTokenMLP(nn.Module):
    """Linear, exact GELU, Linear."""

    def __init__(self, config: GPSTokenConfig):
        super().__init__()
        inner = int(config.hidden_size * config.mlp_ratio)
        self.fc1 = nn.Linear(config.hidden_size, inner)
        self.fc2 = nn.Linear(inner, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(hidden_states)))


class GPSTokenEncoderLayer(GradientCheckpointingLayer):
    """Adds a linear projection of the token's region, then applies pre-norm attention and MLP."""

    def __init__(self, config: GPSTokenConfig):
        super().__init__()
        self.region_reader = nn.Linear(config.roi_size**2, 1)
        self.norm1 = LayerNorm(config.hidden_size)
        self.self_attn = GPSTokenAttention(config)
        self.norm2 = LayerNorm(config.hidden_size)
        self.mlp = GPSTokenMLP(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        region_features: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """`hidden_states` `(B, L, D)` and `region_features` `(B, L, D, R R)` -> `(B, L, D)`."""
        hidden_states = hidden_states + self.region_reader(region_features).squeeze(-1)
        attended, _ = self.self_attn(self.norm1(hidden_states), attention_mask, **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.norm2(hidden_states))


class GPSTokenEncoder(nn.Module):
    """Image, regions and their initial Gaussians -> refined Gaussians and texture (paper Sec. 3.2)."""

    def __init__(self, config: GPSTokenConfig):
        super().__init__()
        self.config = config
        self.conditioner = GPSTokenConditioner(config)
        self.region_features = GPSTokenRegionFeatures(config)
        self.query = nn.Parameter(torch.empty(1, config.hidden_size))
        self.gaussian_embedding1 = Float32Linear(NUM_GAUSSIAN_PARAMS, config.hidden_size)
        self.gaussian_embedding2 = nn.Linear(config.hidden_size, config.hidden_size)
        self.layers = nn.ModuleList(GPSTokenEncoderLayer(config) for _ in range(config.num_hidden_layers))
        self.gaussian_head = Float32Linear(config.hidden_size, NUM_GAUSSIAN_PARAMS)
        self.texture_head = nn.Linear(config.hidden_size, config.texture_channels)

    def forward(
        self,
        pixel_values: torch.Tensor,
        boxes: torch.Tensor,
        init_gaussians: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """Image -> tokens.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): RGB in [-1, 1].
            boxes (`torch.Tensor` of shape `(B, L, 4)`): regions, inclusive pixels `[x0, y0, x1, y1]`.
            init_gaussians (`torch.Tensor` of shape `(B, L, 5)`): the Gaussians of the regions.
            attention_mask (`torch.Tensor` of shape `(B, L)`, *optional*): 1 for a token, 0 for padding.

        Returns:
            `torch.Tensor` of shape `(B, L, 5 + C)`: tokens in float32.
        """
        region_features = self.region_features(self.conditioner(pixel_values), boxes)
        embedded = F.gelu(self.gaussian_embedding1(init_gaussians)).to(get_parameter_dtype(self.gaussian_embedding2))
        embedded = self.gaussian_embedding2(embedded)
        hidden_states = self.query.to(embedded.dtype) + embedded
        mask = create_bidirectional_mask(self.config, inputs_embeds=hidden_states, attention_mask=attention_mask)
        for layer in self.layers:
            hidden_states = layer(hidden_states, region_features, mask, **kwargs)
        gaussians = refine_gaussians(init_gaussians.float(), self.gaussian_head(hidden_states))
        return join_tokens(gaussians, self.texture_head(hidden_states))


__all__ = ["GPSTokenEncoder"]
