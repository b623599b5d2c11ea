# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""What every tokenizer has to beat: the thumbnail of as many floats, and JPEG and WebP of as many bytes.

Shapes: B images of H x W pixels.
"""

from __future__ import annotations

import math
from io import BytesIO

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F

from gpstoken_hf.metrics import to_uint8

CODECS = ("jpeg", "webp")
QUALITIES = {"jpeg": (1, 95), "webp": (0, 100)}


def thumbnail_side(num_floats: int) -> int:
    """The smallest s with `3 s² >= num_floats`."""
    return math.isqrt(max(0, -(-num_floats // 3) - 1)) + 1


def thumbnail(images: torch.Tensor, side: int) -> torch.Tensor:
    """Reduce `(B, 3, H, W)` to `side` x `side` and enlarge it again, bicubic and antialiased, clamped to [-1, 1]."""
    small = F.interpolate(images, (side, side), mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)
    large = F.interpolate(small, images.shape[-2:], mode="bicubic", antialias=True, align_corners=False)
    return large.clamp(-1, 1)


def compress(image: PIL.Image.Image, codec: str, max_bytes: int) -> tuple[PIL.Image.Image, int] | None:
    """Compress an image in the best quality that fits.

    Args:
        image (`PIL.Image.Image`): RGB.
        codec (`str`): "jpeg" (its tables optimised for the image) or "webp" (its slowest method).
        max_bytes (`int`): Size of the file, its header included.

    Returns:
        `tuple[PIL.Image.Image, int]` or `None`: the decoded image and the bytes of its file; `None` if the lowest
        quality takes more.
    """
    low, high = QUALITIES[codec]
    best: tuple[int, bytes] | None = None
    while low <= high:
        quality = (low + high) // 2
        content = _encode(image, codec, quality)
        if len(content) <= max_bytes:
            best, low = (quality, content), quality + 1
        else:
            high = quality - 1
    if best is None:
        return None
    return PIL.Image.open(BytesIO(best[1])).convert("RGB"), len(best[1])


def _encode(image: PIL.Image.Image, codec: str, quality: int) -> bytes:
    file = BytesIO()
    options = {"optimize": True} if codec == "jpeg" else {"method": 6}
    image.save(file, codec, quality=quality, **options)
    return file.getvalue()


def compress_batch(images: torch.Tensor, codec: str, max_bytes: int) -> list[torch.Tensor | None]:
    """Images `(B, 3, H, W)` in [-1, 1] -> each `(3, H, W)` after `compress`, `None` where it does not fit."""
    found: list[torch.Tensor | None] = []
    for pixels in to_uint8(images).permute(0, 2, 3, 1).cpu().numpy():
        fitted = compress(PIL.Image.fromarray(pixels), codec, max_bytes)
        if fitted is None:
            found.append(None)
        else:
            decoded = torch.from_numpy(np.array(fitted[0])).permute(2, 0, 1)
            found.append((decoded.to(images.device).float() / 127.5 - 1).to(images.dtype))
    return found
