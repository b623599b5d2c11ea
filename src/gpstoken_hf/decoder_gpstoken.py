# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""The decoder of GPSToken: a splatted map -> an image (paper Sec. 3.2), and the residual blocks it shares.

Shapes: B batch, C channels, H x W positions of a map, G norm groups, R x S rows and columns of tiles.

A map of several tiles is decoded in one piece, but its norms and attention take their statistics per tile: see
`TileGrid`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.modeling_utils import get_parameter_dtype
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .tiling import TileGrid

NORM_EPS = 1e-6


class GroupNorm(nn.GroupNorm):
    """Group normalisation in float32, optionally with statistics per tile.

    With tiles, mean and standard deviation are computed per tile and group, then interpolated bicubically from the
    grid of tiles to every position. So tiles meet without a seam (the authors' merged decode).
    """

    def forward(self, hidden_states: torch.Tensor, tiles: TileGrid | None = None) -> torch.Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        if tiles is None or tiles.shape == (1, 1):
            # On the CPU the kernel takes bfloat16 input with float32 weights and computes in float32: the same values
            # as after a cast, without the copies.
            mixed = hidden_states.device.type == "cpu" and hidden_states.dtype == torch.bfloat16
            x = hidden_states if mixed else hidden_states.float()
            return F.group_norm(x, self.num_groups, weight, bias, self.eps).to(hidden_states.dtype)
        x = hidden_states.float()
        mean, std = tile_statistics(x, tiles, self.num_groups)
        grouped = x.unflatten(1, (self.num_groups, -1))  # (B, G, C/G, H, W)
        # The authors' norm adds eps to the standard deviation, not to the variance.
        grouped = (grouped - interpolate_tiles(mean, x.shape[-2:])) / (
            interpolate_tiles(std, x.shape[-2:], floor=0.5) + self.eps
        )
        return (grouped.flatten(1, 2) * weight[:, None, None] + bias[:, None, None]).to(hidden_states.dtype)


def tile_statistics(x: torch.Tensor, tiles: TileGrid, num_groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation per tile and group: `(B, C, H, W)` -> two tensors `(B, G, R, S)`."""
    rows, columns = tiles.shape
    means, stds = [], []
    for y0, x0, h, w in tiles.boxes():
        tile = x[:, :, y0 : y0 + h, x0 : x0 + w].unflatten(1, (num_groups, -1)).flatten(2)  # (B, G, C/G h w)
        means.append(tile.mean(-1))
        stds.append(tile.std(-1, correction=0))
    grid = (x.shape[0], num_groups, rows, columns)
    return torch.stack(means, -1).view(grid), torch.stack(stds, -1).view(grid)


def interpolate_tiles(values: torch.Tensor, size: Sequence[int], floor: float | None = None) -> torch.Tensor:
    """Bicubic interpolation from the grid of tiles to every position: `(B, G, R, S)` -> `(B, G, 1, H, W)`.

    Bicubic interpolation undershoots between a quiet and a busy tile. A standard deviation near or below 0 would blow
    up the map there, so `floor` keeps the result at or above `floor` times the smallest value of a tile.
    """
    result = F.interpolate(values, size=tuple(size), mode="bicubic", align_corners=False)
    if floor is not None:
        result = torch.maximum(result, floor * values.amin((-2, -1), keepdim=True))
    return result.unsqueeze(2)


class ResidualBlock(GradientCheckpointingLayer):
    """Twice GroupNorm, SiLU, 3x3 convolution, plus the input (through a 1x1 convolution if the channels change)."""

    def __init__(self, in_channels: int, out_channels: int, num_groups: int):
        super().__init__()
        self.norm1 = GroupNorm(num_groups, in_channels, eps=NORM_EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm(num_groups, out_channels, eps=NORM_EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, hidden_states: torch.Tensor, tiles: TileGrid | None = None) -> torch.Tensor:
        residual = hidden_states if self.shortcut is None else self.shortcut(hidden_states)
        hidden_states = self.conv1(F.silu(self.norm1(hidden_states, tiles)))
        hidden_states = self.conv2(F.silu(self.norm2(hidden_states, tiles)))
        return residual + hidden_states


class MapAttnProcessor:
    """Attention over all positions of a map, `(B, C, H, W)` -> the same shape, on the backend that diffusers chose."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: MapAttention, hidden_states: torch.Tensor) -> torch.Tensor:
        normed = attn.norm(hidden_states)
        if attn.fused_projections:
            projected = attn.to_qkv(normed).chunk(3, dim=1)
        else:
            projected = (attn.q_proj(normed), attn.k_proj(normed), attn.v_proj(normed))
        # The fused kernels need contiguous input. The fallback stores all (H W)² weights, gigabytes for a large image.
        query, key, value = (
            part.flatten(2).transpose(1, 2).unsqueeze(2).contiguous()  # (B, H W, 1, C)
            for part in projected
        )
        attended = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        return attn.out_proj(attended.squeeze(2).transpose(1, 2).unflatten(2, hidden_states.shape[-2:]))


class MapAttention(nn.Module, AttentionModuleMixin):
    """Single-head self-attention over the positions of a map, or over those of each tile."""

    _default_processor_cls = MapAttnProcessor
    _available_processors = [MapAttnProcessor]  # noqa: RUF012
    fused_projections: bool = False

    def __init__(self, channels: int, num_groups: int):
        super().__init__()
        self.norm = GroupNorm(num_groups, channels, eps=NORM_EPS)
        self.q_proj = nn.Conv2d(channels, channels, 1)
        self.k_proj = nn.Conv2d(channels, channels, 1)
        self.v_proj = nn.Conv2d(channels, channels, 1)
        self.out_proj = nn.Conv2d(channels, channels, 1)
        self.set_processor(MapAttnProcessor())
        self.register_state_dict_post_hook(_without_fused_weights)

    def forward(self, hidden_states: torch.Tensor, tiles: TileGrid | None = None) -> torch.Tensor:
        if tiles is None or tiles.shape == (1, 1):
            return hidden_states + self.processor(self, hidden_states)
        output = torch.empty_like(hidden_states)
        for y0, x0, h, w in tiles.boxes():
            window = (slice(None), slice(None), slice(y0, y0 + h), slice(x0, x0 + w))
            output[window] = self.processor(self, hidden_states[window])
        return hidden_states + output

    @torch.no_grad()
    def fuse_projections(self) -> None:
        """Compute query, key and value with one convolution. Its weights are not saved."""
        if self.fused_projections:
            return
        layers = (self.q_proj, self.k_proj, self.v_proj)
        weight = torch.cat([layer.weight for layer in layers])
        self.to_qkv = nn.Conv2d(weight.shape[1], weight.shape[0], 1, device=weight.device, dtype=weight.dtype)
        self.to_qkv.weight.copy_(weight)
        self.to_qkv.bias.copy_(torch.cat([layer.bias for layer in layers]))
        self.fused_projections = True


def _without_fused_weights(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in ("weight", "bias"):
        state.pop(f"{prefix}to_qkv.{name}", None)


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by 2 and a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(hidden_states, scale_factor=2.0, mode="nearest"))


class DecoderLevel(nn.Module):
    """The residual blocks of one resolution, then upsampling to the next, except at full resolution."""

    def __init__(self, in_channels: int, out_channels: int, num_blocks: int, num_groups: int, upsample: bool):
        super().__init__()
        self.blocks = nn.ModuleList(
            ResidualBlock(in_channels if index == 0 else out_channels, out_channels, num_groups)
            for index in range(num_blocks)
        )
        self.upsample = Upsample(out_channels) if upsample else None

    def forward(self, hidden_states: torch.Tensor, tiles: TileGrid | None = None) -> torch.Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states, tiles)
        return hidden_states if self.upsample is None else self.upsample(hidden_states)


class GPSTokenDecoder(nn.Module):
    """Splatted map `(B, C, h, w)` -> image `(B, 3, h s, w s)`, s = `2^(levels - 1)` (paper Sec. 3.2, after VQGAN).

    Args:
        texture_channels (`int`): C, channels of the map.
        base_channels (`int`): channels at full resolution.
        channel_multipliers (`Sequence[int]`): channels of each level over `base_channels`, full resolution first.
        layers_per_block (`int`): each level has one residual block more.
        num_groups (`int`): groups of every norm.
    """

    def __init__(
        self,
        texture_channels: int,
        base_channels: int,
        channel_multipliers: Sequence[int],
        layers_per_block: int,
        num_groups: int,
    ):
        super().__init__()
        channels = [base_channels * multiplier for multiplier in channel_multipliers]
        deepest = channels[-1]
        self.conv_in = nn.Conv2d(texture_channels, deepest, 3, padding=1)
        self.mid_block1 = ResidualBlock(deepest, deepest, num_groups)
        self.mid_attention = MapAttention(deepest, num_groups)
        self.mid_block2 = ResidualBlock(deepest, deepest, num_groups)
        # In the order of computation: levels[0] has the lowest resolution.
        incoming = [deepest, *channels[:0:-1]]
        self.levels = nn.ModuleList(
            DecoderLevel(width_in, width, layers_per_block + 1, num_groups, upsample=index > 0)
            for width_in, (index, width) in zip(incoming, reversed(list(enumerate(channels))))
        )
        self.norm_out = GroupNorm(num_groups, channels[0], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(channels[0], 3, 3, padding=1)

    def forward(self, maps: torch.Tensor, tiles: TileGrid | None = None) -> torch.Tensor:
        """Map -> image.

        Args:
            maps (`torch.Tensor` of shape `(B, C, h, w)`): splatted features.
            tiles (`TileGrid`, *optional*): the tiles of the map; `None` for a single one.

        Returns:
            `torch.Tensor` of shape `(B, 3, h s, w s)`: about [-1, 1], not clamped.
        """
        # The dtype of the weights as they are computed with: layerwise casting stores them in another one.
        hidden_states = self.conv_in(maps.to(get_parameter_dtype(self.conv_in)))
        hidden_states = self.mid_block1(hidden_states, tiles)
        hidden_states = self.mid_attention(hidden_states, tiles)
        hidden_states = self.mid_block2(hidden_states, tiles)
        for index, level in enumerate(self.levels):
            hidden_states = level(hidden_states, None if tiles is None else tiles.scaled(2**index))
        # The last norm takes its statistics from the whole map, as in the authors' merged decode.
        return self.conv_out(F.silu(self.norm_out(hidden_states)))


__all__ = ["GPSTokenDecoder"]
