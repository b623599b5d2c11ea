# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Pictures of a dataset: decoding them, refusing the unusable ones, and cutting squares out of them."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pipelines.shared.programs import FILE_ERRORS, ProgramError, one_line

# Modes that Pillow converts to RGB without guessing a range of values. 16 and 32 bits have none.
RGB_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")
MIN_SIDE = 2


def decode_image(value: Any, where: str) -> Image.Image:
    """The RGB image of a dataset row: encoded bytes, a path, a PIL image or an array.

    Args:
        value (`Any`): The row's entry in the image column.
        where (`str`): The name of the row in the error message.

    Raises:
        ProgramError: If it is not a readable image, has no mode of 8 bits, or is one pixel wide or high.
    """
    image: Image.Image
    try:
        if isinstance(value, dict):
            image = Image.open(io.BytesIO(value["bytes"]) if value.get("bytes") is not None else value["path"])
        elif isinstance(value, bytes):
            image = Image.open(io.BytesIO(value))
        elif isinstance(value, Image.Image):
            image = value
        else:
            image = Image.fromarray(np.asarray(value))
        mode = image.mode
        if mode in RGB_MODES:
            image = ImageOps.exif_transpose(image).convert("RGB")
    except UnidentifiedImageError as error:  # its message has the address of an object, which changes
        raise ProgramError(f"{where} must be a readable image, got no known format") from error
    except (*FILE_ERRORS, Image.DecompressionBombError) as error:
        raise ProgramError(f"{where} must be a readable image, got: {one_line(error)}") from error
    if mode not in RGB_MODES:
        raise ProgramError(f"{where} must have 8-bit colours, got an image of mode {mode}")
    if min(image.size) < MIN_SIDE:
        raise ProgramError(
            f"{where} must have at least {MIN_SIDE} x {MIN_SIDE} pixels, got {image.width} x {image.height}"
        )
    return image


def image_to_array(image: Image.Image) -> np.ndarray:
    """RGB image -> float32 array (3, H, W) in [-1, 1], `x / 127.5 - 1`."""
    return np.ascontiguousarray(np.asarray(image, dtype=np.float32).transpose(2, 0, 1)) / np.float32(127.5) - 1


def center_crop(image: Image.Image, resolution: int) -> Image.Image:
    """The central square of the shortest side, resized to `resolution`."""
    width, height = image.size
    side = min(width, height)
    return _resized_square(image, (width - side) / 2, (height - side) / 2, side, resolution)


def random_resized_crop(
    image: Image.Image, resolution: int, rng: np.random.Generator, min_scale: float
) -> Image.Image:
    """A random square of `min_scale` to 1 times the area of the largest one, resized to `resolution`."""
    side = max(1, round(min(image.size) * math.sqrt(rng.uniform(min_scale, 1.0))))
    return _random_square(image, side, resolution, rng)


def native_crop(image: Image.Image, resolution: int, rng: np.random.Generator) -> Image.Image:
    """A random square of `resolution` pixels, unscaled; the shortest side is resized where it is smaller than that."""
    return _random_square(image, min(resolution, *image.size), resolution, rng)


def _random_square(image: Image.Image, side: int, resolution: int, rng: np.random.Generator) -> Image.Image:
    width, height = image.size
    left, top = int(rng.integers(width - side + 1)), int(rng.integers(height - side + 1))
    return _resized_square(image, left, top, side, resolution)


def _resized_square(image: Image.Image, left: float, top: float, side: int, resolution: int) -> Image.Image:
    return image.resize((resolution, resolution), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
