# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Large photographs: when and how to encode in tiles and decode in windows, with a progress bar inside the image.

Shapes: L tokens, C texture channels, H x W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from tqdm import tqdm

from gpstoken_hf.modeling_gpstoken import GPSTokenModel

# Larger photographs are encoded in tiles and decoded in windows. One pass of gpstoken-nano over 768 x 768 pixels adds
# 0.6 GB to the process and takes tokens x tokens of attention; over 3000 x 2000 pixels it would be above 6 GB.
MAX_WHOLE_PIXELS = 768 * 768


def choose_tile_size(model: GPSTokenModel, size: tuple[int, int], num_tokens: int) -> int | None:
    """The side of the tiles that an image is encoded in, or `None` for one pass.

    Up to `MAX_WHOLE_PIXELS` one pass it is. Tiles of larger images have the size of the training images, or two,
    four, ... times that side where tiles would have less than half of the tokens of a training image.
    """
    if size[0] * size[1] <= MAX_WHOLE_PIXELS:
        return None
    side = model.config.image_size
    while side < max(size):
        # Where larger tiles would need too much memory, one token is enough.
        enough = model.config.num_tokens / 2 if (2 * side) ** 2 <= MAX_WHOLE_PIXELS else 1
        if num_tokens >= num_tiles(size, side) * enough:
            return side
        side *= 2
    return None


def num_tiles(size: tuple[int, int], side: int) -> int:
    """How many tiles of at most `side` x `side` pixels an image of `size` pixels is split into."""
    return math.ceil(size[0] / side) * math.ceil(size[1] / side)


def _num_windows(model: GPSTokenModel, size: tuple[int, int]) -> int:
    """How many windows of the training size, overlapping by a quarter, `decode` takes."""
    scale = model.config.map_scale
    window = model.config.image_size // scale
    extents = [math.ceil(side / scale) for side in size]
    counts = [max(0, math.ceil((extent - window) / round(0.75 * window))) + 1 for extent in extents]
    return math.prod(counts)


def decode_in_tiles(
    model: GPSTokenModel,
    tokens: torch.Tensor,
    attention_mask: torch.Tensor,
    size: tuple[int, int],
    tile_size: int | None,
    label: str,
) -> torch.Tensor:
    """Tokens (1, L, 5 + C) -> image (1, 3, H, W) in [-1, 1], in bounded memory, with a bar for tiles or windows."""
    is_stitched = model.config.tile_decode == "stitched" and tile_size is not None
    in_windows = size[0] * size[1] > MAX_WHOLE_PIXELS and not is_stitched
    if in_windows:
        num_parts = _num_windows(model, size)
        model.enable_tiling()
    else:
        num_parts = num_tiles(size, tile_size) if is_stitched and tile_size is not None else 1
    try:
        with tile_bar(model.decoder, num_parts, f"decode {label}"), torch.inference_mode():
            return (
                model.decode(
                    tokens.to(model.device),
                    size,
                    attention_mask=attention_mask.to(model.device),
                    tile_size=None if in_windows else tile_size,
                )
                .sample.float()
                .clamp(-1, 1)
            )
    finally:
        model.disable_tiling()


@contextmanager
def tile_bar(module: torch.nn.Module, num_parts: int, description: str) -> Iterator[None]:
    """A bar that moves on with every call of `module`, which takes one tile at a time."""
    disable = True if num_parts == 1 else None
    with tqdm(total=num_parts, desc=description, unit=" tiles", leave=False, disable=disable) as bar:

        def advance(*_: object) -> None:
            bar.update()

        hook = module.register_forward_hook(advance)
        try:
            yield
        finally:
            hook.remove()
