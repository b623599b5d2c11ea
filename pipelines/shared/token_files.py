# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Files of tokens: one image as tokens, with the size to decode them to.

Shapes: L tokens, C texture channels, H x W pixels.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from gpstoken_hf.modeling_gpstoken import GPSTokenModel
from gpstoken_hf.token_file import MAGIC, read_tokens, write_tokens

from .outputs import atomic_file
from .programs import FILE_ERRORS, ProgramError, one_line, printable
from .tiles import num_tiles

# A larger image is refused before anything is allocated. Decoding one of this size takes about 4 GB.
MAX_STORED_PIXELS = 8192 * 8192


def save_tokens(path: Path, encoded: Any, size: tuple[int, int], tile_size: int | None, model: str) -> None:
    """Writes what `load_tokens` reads: tokens, where they came from, and the size to decode to."""
    tensors = {
        "tokens": encoded.tokens.float(),
        "init_gaussians": encoded.layout.gaussians.float(),
        "boxes": encoded.layout.boxes,
        "attention_mask": encoded.attention_mask,
    }
    metadata = {
        "format": "gpstoken_hf tokens",
        "height": str(size[0]),
        "width": str(size[1]),
        "tile_size": "" if tile_size is None else str(tile_size),
        "model": printable(model),
    }
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)


def check_replaceable_token_file(path: Path, overwrite: bool) -> None:
    """Raise a ProgramError if a `.gpst` file must not be written to `path`."""
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise ProgramError(f"{path} must not exist yet; --overwrite replaces a token file")
    if path.is_file():
        with path.open("rb") as file:
            is_ours = file.read(len(MAGIC)) == MAGIC
    else:
        is_ours = False
    if not is_ours:
        raise ProgramError(f"{path} must be a token file to be replaced, got something else")


def save_token_file(
    path: Path, encoded: Any, size: tuple[int, int], model: GPSTokenModel, tile_size: int | None, step: float | None
) -> int:
    """Write the tokens of one image to a `.gpst` file; returns its bytes."""
    with atomic_file(path) as staging:
        return write_tokens(
            staging, encoded.tokens, size, model, encoded.attention_mask, encoded.layout, tile_size, step=step
        )


def load_token_file(path: Path, model: GPSTokenModel) -> StoredTokens:
    """Read a `.gpst` file of one image.

    Raises:
        ProgramError: If there is no such file, or it holds several images.
        ValueError: If it is damaged, or of another model.
    """
    if not path.is_file():
        raise ProgramError(f"tokens must be a token file, got no such file: {path}")
    stored = read_tokens(path, model)
    if len(stored.tokens) > 1:
        raise ProgramError(f"{path} must hold one image, got {len(stored.tokens)}")
    return StoredTokens(stored.tokens, stored.attention_mask, stored.image_size, stored.tile_size)


@dataclass
class StoredTokens:
    """Tokens of one image and how to decode them."""

    tokens: torch.Tensor  # (1, L, 5 + C) float32
    attention_mask: torch.Tensor  # (1, L) int64
    size: tuple[int, int]  # (H, W)
    tile_size: int | None


def load_tokens(path: Path, channels: int) -> StoredTokens:
    """Read a file of `save_tokens`. Its claims are checked before a tensor is read or an image is allocated.

    Args:
        path (`Path`): The file.
        channels (`int`): Numbers per token of the model that is going to decode it, 5 + C.

    Raises:
        ProgramError: If there is no such file, if it holds something else, or if its image has more than
            `MAX_STORED_PIXELS` pixels.
    """
    if not path.is_file():
        raise ProgramError(f"tokens must be a safetensors file, got no such file: {path}")
    try:
        with safe_open(path, framework="pt") as file:
            size, tile_size = _check_tokens_header(file, channels)
            tokens, attention_mask = file.get_tensor("tokens"), file.get_tensor("attention_mask")
    except FILE_ERRORS as error:
        raise ProgramError(f"{path} must hold tokens as this program writes them, got: {one_line(error)}") from error
    return StoredTokens(tokens.float(), attention_mask.long(), size, tile_size)


def _check_tokens_header(file: Any, channels: int) -> tuple[tuple[int, int], int | None]:
    """Size and tile size of a file of tokens, when its header fits them, the tensors and the model."""
    missing = {"tokens", "attention_mask"} - set(file.keys())
    if missing:
        raise ProgramError(f"a file without the tensor {sorted(missing)[0]!r}")
    shape, dtype = file.get_slice("tokens").get_shape(), file.get_slice("tokens").get_dtype()
    if len(shape) != 3 or shape[0] != 1 or shape[1] < 1 or shape[2] != channels or dtype not in ("F32", "F16", "BF16"):
        raise ProgramError(f"tokens must be floating point (1, L, {channels}) for this model, got {dtype} {shape}")
    mask_shape, mask_dtype = file.get_slice("attention_mask").get_shape(), file.get_slice("attention_mask").get_dtype()
    if mask_shape != shape[:2] or mask_dtype not in ("I64", "I32", "U8", "BOOL"):
        raise ProgramError(f"attention_mask must be integers (1, {shape[1]}), got {mask_dtype} {mask_shape}")
    metadata = file.metadata() or {}
    numbers = {name: metadata.get(name, "") for name in ("height", "width", "tile_size")}
    for name, text in numbers.items():
        # At most six digits: int() of thousands of them takes its time.
        if not (text.isascii() and text.isdigit() and len(text) <= 6 and int(text) > 0) and not (
            name == "tile_size" and text == ""
        ):
            raise ProgramError(f"{name} must be an integer from 1 to 999999, got {text[:20]!r}")
    height, width = int(numbers["height"]), int(numbers["width"])
    if height * width > MAX_STORED_PIXELS:
        raise ProgramError(f"height x width must be at most {MAX_STORED_PIXELS} pixels, got {height} x {width}")
    if not numbers["tile_size"]:
        return (height, width), None
    tile_size = int(numbers["tile_size"])
    if num_tiles((height, width), tile_size) > shape[1]:
        raise ProgramError(f"tile_size must give each tile a token, got {tile_size} for {shape[1]} tokens")
    return (height, width), tile_size
