# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Token files, `.gpst`: the tokens of images as few bytes, lossless or with a chosen step (docs/token_file.md).

Shapes: B images, L tokens, C texture channels, T tiles, H x W pixels of an image.

Regions of a partition are stored as the splits of their tree, about two bits a token. The Gaussians of the tokens are
then stored as what the encoder has changed, and textures in steps of their channel's standard deviation. Tokens of
any other layout are stored without regions.
"""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .entropy_coding import (
    CODERS,
    MAX_VALUES_PER_BYTE,
    ByteReader,
    StreamReader,
    StreamWriter,
    constriction_is_available,
    varint,
)
from .gaussians import NUM_GAUSSIAN_PARAMS, check_gaussians
from .layout import PADDING_GAUSSIAN, GaussianLayout
from .region_forest import SIGMA_SCALES, RegionForest, find_forest, read_forest, tiles_of
from .token_values import add_exact, add_quantised, exact_values, quantised_values

MAGIC, VERSION = b"GPST", 1
NO_MODEL = bytes(8)

# What a file may claim. Decoding an image of so many pixels takes about 4 GB.
MAX_PIXELS = 8192 * 8192
MAX_SIDE, MAX_IMAGES, MAX_CHANNELS = 2**20, 2**20, 2**13
MAX_NUMBERS = 2**25  # of all tokens: 128 MiB in float32
MAX_FILE_BYTES = 4 * MAX_NUMBERS + 2**20

DEFAULT_STEP, MIN_STEP, MAX_STEP = 0.5, 1e-4, 100.0
_LOSSLESS, _REGIONS, _ALIGN_CORNERS, _CONSTRICTION = 1, 2, 4, 8
_EVERY_ROW, _COUNTS, _BITMAP = 0, 1, 2


@dataclass
class StoredTokens:
    """What a token file holds.

    Args:
        tokens (`torch.Tensor` of shape `(B, L, 5 + C)`): float32. Padded rows hold the padding Gaussian and texture 0.
        image_size (`tuple[int, int]`): `(H, W)` in pixels to decode to.
        attention_mask (`torch.Tensor` of shape `(B, L)`): int64, 1 for a token, 0 for padding.
        layout ([`GaussianLayout`], *optional*): the regions and Gaussians before refinement, of a partition.
        tile_size (`int`, *optional*): the `tile_size` that `encode` was given and `decode` needs.
        step (`float`, *optional*): of the quantisation; `None` if the file is lossless.
        model_fingerprint (`str`, *optional*): of the model that made the tokens, in hexadecimal digits.
        coder (`str`): `"constriction"` or `"zlib"`.
        num_bytes (`int`): size of the file.
    """

    tokens: torch.Tensor
    image_size: tuple[int, int]
    attention_mask: torch.Tensor
    layout: GaussianLayout | None
    tile_size: int | None
    step: float | None
    model_fingerprint: str | None
    coder: str
    num_bytes: int

    @property
    def bits_per_pixel(self) -> float:
        """Bits of the whole file over the pixels of its images."""
        return 8 * self.num_bytes / (len(self.tokens) * self.image_size[0] * self.image_size[1])


def model_fingerprint(model: torch.nn.Module) -> str:
    """A hash of the weights of a model, their names, types and shapes, as 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


# ---- Writing --------------------------------------------------------------------------------------------------------


def write_tokens(
    path: str | os.PathLike[str],
    tokens: torch.Tensor,
    image_size: int | tuple[int, int],
    model: Any = None,
    attention_mask: torch.Tensor | None = None,
    layout: GaussianLayout | None = None,
    tile_size: int | None = None,
    lossless: bool | None = None,
    step: float | None = None,
    coder: str | None = None,
) -> int:
    r"""Write tokens to a `.gpst` file.

    Args:
        path (`str` or `os.PathLike`): the file; an existing one is replaced.
        tokens (`torch.Tensor` of shape `(B, L, 5 + C)`): of B images of one size; float32, float16 or bfloat16.
        image_size (`int` or `tuple[int, int]`): `(H, W)` of the images in pixels, or one side.
        model ([`GPSTokenModel`], *optional*): the model that made the tokens. Its fingerprint is stored, and
            `read_tokens` refuses another model.
        attention_mask (`torch.Tensor` of shape `(B, L)`, *optional*): 1 for a token, 0 for padding, whose values are
            not stored.
        layout ([`GaussianLayout`], *optional*): the `layout` that `encode` returned. Its regions are stored if they
            are those of a partition, and a lossy file is then smaller.
        tile_size (`int`, *optional*): the `tile_size` that `encode` was given.
        lossless (`bool`, *optional*): store the float32 values as they are; `True` unless a `step` is given.
        step (`float`, *optional*, defaults to 0.5 in a lossy file): step of the textures, in standard deviations of
            their channel, from 0.0001 to 100. Gaussians are stored in a quarter of it: log sigma, atanh rho, and mu
            over sigma.
        coder (`str`, *optional*): `"constriction"` or `"zlib"`; by default constriction where it is installed.

    Returns:
        `int`: bytes written.

    Raises:
        ValueError: if a shape does not fit; if a token is not finite and legal; if there are more tokens or pixels
            than a file may hold; if `step` is out of its range or comes with `lossless=True`; if `coder` is not
            available.

    Examples:
        ```python
        >>> import torch
        >>> from gpstoken_hf import GPSTokenModel, bundled
        >>> from gpstoken_hf.token_file import read_tokens, write_tokens

        >>> model = GPSTokenModel.from_pretrained(bundled("gpstoken-nano"))
        >>> image = torch.rand(1, 3, 64, 64) * 2 - 1
        >>> with torch.no_grad():
        ...     encoded = model.encode(image)
        >>> size = write_tokens("image.gpst", encoded.tokens, (64, 64), model, layout=encoded.layout)
        >>> stored = read_tokens("image.gpst", model)
        >>> torch.equal(stored.tokens, encoded.tokens), torch.equal(stored.layout.boxes, encoded.layout.boxes)
        (True, True)
        >>> write_tokens("image.gpst", encoded.tokens, (64, 64), model, layout=encoded.layout, step=0.5) < size / 4
        True

        ```
    """
    if isinstance(image_size, int):
        image_size = (image_size, image_size)
    step = _check_step(lossless, step)
    coder = _check_coder(coder)
    tokens, mask = _check_tokens(tokens, attention_mask, image_size)
    config = None if model is None else model.config
    if config is not None and tokens.shape[2] != config.token_channels:
        raise ValueError(f"tokens must have 5 + C = {config.token_channels} values, got {tokens.shape[2]}")
    if tile_size is not None and (not isinstance(tile_size, int) or not 1 <= tile_size <= MAX_SIDE):
        raise ValueError(f"tile_size must be an integer from 1 to {MAX_SIDE}, got {tile_size!r}")
    if layout is not None and layout.gaussians.shape[:2] != tokens.shape[:2]:
        raise ValueError(
            f"layout must be of (B, L) = {tuple(tokens.shape[:2])} tokens, got {tuple(layout.gaussians.shape[:2])}"
        )
    map_scale = 1 if config is None or tile_size is None else config.map_scale
    forest = None if layout is None else find_forest(layout, mask, image_size, tile_size, map_scale, config)

    flags = (_LOSSLESS if step is None else 0) | (_CONSTRICTION if coder == "constriction" else 0)
    if forest is not None:
        flags |= _REGIONS | (_ALIGN_CORNERS if forest.align_corners else 0)
    out = bytearray(MAGIC) + bytes([VERSION, flags])
    out += NO_MODEL if model is None else bytes.fromhex(model_fingerprint(model))
    for number in (*image_size, len(tokens), tokens.shape[1], tokens.shape[2] - NUM_GAUSSIAN_PARAMS, tile_size or 0):
        out += varint(int(number))
    streams = StreamWriter(coder)
    if step is not None:
        out += struct.pack("<f", step)
    if forest is not None:
        out += varint(map_scale) + _pack_sigma_scale(forest.sigma_scale)
    out += _pack_mask(mask, forest)
    if forest is not None:
        out += varint(len(forest.splits)) + varint(len(forest.directions))
        streams.bits(forest.splits)
        streams.bits(forest.directions)
    rows = tokens[mask == 1].numpy()
    if step is None:
        out += add_exact(rows, streams)
    else:
        initial = None if forest is None else forest.layout.gaussians[mask == 1].double().numpy()
        add_quantised(rows.astype(np.float64), initial, step, streams)
    out += streams.finish()
    out += struct.pack("<I", zlib.crc32(out))
    Path(path).write_bytes(out)
    return len(out)


def _check_step(lossless: bool | None, step: float | None) -> float | None:
    """The step of a lossy file, as float32 stores it; `None` for a lossless one."""
    if step is None:
        if lossless is None or lossless:
            return None
        step = DEFAULT_STEP
    if lossless:
        raise ValueError(f"step must be None in a lossless file, got {step}")
    if not isinstance(step, int | float) or isinstance(step, bool) or not MIN_STEP <= step <= MAX_STEP:
        raise ValueError(f"step must be a number from {MIN_STEP} to {MAX_STEP}, got {step!r}")
    return float(np.float32(step))


def _check_coder(coder: str | None) -> str:
    if coder is None:
        return "constriction" if constriction_is_available() else "zlib"
    if coder not in CODERS:
        raise ValueError(f"coder must be one of {CODERS}, got {coder!r}")
    if coder == "constriction" and not constriction_is_available():
        raise ValueError(
            "coder must be available, got 'constriction', which is not installed: pip install constriction"
        )
    return coder


def _check_tokens(
    tokens: torch.Tensor, attention_mask: torch.Tensor | None, image_size: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens in float32 and their mask, both on the CPU."""
    kinds = (torch.float32, torch.float16, torch.bfloat16)
    if not isinstance(tokens, torch.Tensor) or tokens.ndim != 3 or tokens.shape[-1] <= NUM_GAUSSIAN_PARAMS:
        got = tuple(tokens.shape) if isinstance(tokens, torch.Tensor) else type(tokens).__name__
        raise ValueError(f"tokens must be a tensor of shape (B, L, 5 + C), got {got}")
    if tokens.dtype not in kinds:
        raise ValueError(f"tokens must be float32, float16 or bfloat16, got {tokens.dtype}")
    if 0 in tokens.shape or tokens.numel() > MAX_NUMBERS or tokens.shape[2] > MAX_CHANNELS:
        raise ValueError(f"tokens must hold from 1 to {MAX_NUMBERS} values, got shape {tuple(tokens.shape)}")
    height, width = image_size
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE and height * width <= MAX_PIXELS):
        raise ValueError(f"image_size must be from 1 to {MAX_PIXELS} pixels, got {height} x {width}")
    tokens = tokens.detach().cpu().float()
    mask = torch.ones(tokens.shape[:2], dtype=torch.int64)
    if attention_mask is not None:
        if attention_mask.shape != tokens.shape[:2]:
            raise ValueError(
                f"attention_mask must be (B, L) = {tuple(tokens.shape[:2])}, got {tuple(attention_mask.shape)}"
            )
        mask = attention_mask.detach().cpu().to(torch.int64)
        if not ((mask == 0) | (mask == 1)).all() or not mask.any(1).all():
            raise ValueError("attention_mask must hold 0 and 1, and a 1 for every image, got another mask")
    real = tokens[mask == 1]
    check_gaussians(real[:, :NUM_GAUSSIAN_PARAMS], "the Gaussians of tokens")
    if not torch.isfinite(real).all():
        raise ValueError("the texture of tokens must be finite, got NaN or infinite values")
    return tokens, mask


def _pack_sigma_scale(sigma_scale: float) -> bytes:
    if sigma_scale in SIGMA_SCALES:
        return bytes([SIGMA_SCALES.index(sigma_scale)])
    return bytes([len(SIGMA_SCALES)]) + struct.pack("<d", sigma_scale)


def _pack_mask(mask: torch.Tensor, forest: RegionForest | None) -> bytes:
    """Which rows are tokens: all, the first of each block, or as a bitmap."""
    if bool(mask.all()):
        return bytes([_EVERY_ROW])
    blocks = mask.reshape(-1, mask.shape[1] // (1 if forest is None else len(forest.tiles)))
    counts = blocks.sum(1)
    if torch.equal(blocks, _first_rows(counts, blocks.shape[1])):
        return bytes([_COUNTS]) + b"".join(varint(int(count)) for count in counts)
    return bytes([_BITMAP]) + np.packbits(mask.numpy().astype(np.uint8)).tobytes()


def _first_rows(counts: torch.Tensor, length: int) -> torch.Tensor:
    """`(N,)` counts -> a mask `(N, length)` of the first rows."""
    return (torch.arange(length) < counts[:, None]).to(torch.int64)


# ---- Reading --------------------------------------------------------------------------------------------------------


def read_tokens(path: str | os.PathLike[str], model: Any = None) -> StoredTokens:
    r"""Read a `.gpst` file. What it claims is checked before anything is allocated.

    Args:
        path (`str` or `os.PathLike`): a file of `write_tokens`.
        model ([`GPSTokenModel`], *optional*): the model that will decode the tokens. Without it any file is read.

    Returns:
        [`StoredTokens`]: `.tokens`, `.image_size`, `.attention_mask`, `.layout`, `.tile_size`, `.bits_per_pixel`, ...

    Raises:
        ValueError: if the file is no token file, of another version, damaged or cut off; if another model has made its
            tokens; if its coder is not installed.
        OSError: if it cannot be read.

    Examples:
        ```python
        >>> import torch
        >>> from gpstoken_hf.token_file import read_tokens, write_tokens

        >>> size = write_tokens("two.gpst", torch.full((2, 8, 21), 0.5), (64, 96))
        >>> stored = read_tokens("two.gpst")
        >>> stored.tokens.shape, stored.image_size, stored.step
        (torch.Size([2, 8, 21]), (64, 96), None)
        >>> stored.bits_per_pixel == 8 * size / (2 * 64 * 96)
        True

        ```
    """
    data = _read_bytes(path)
    try:
        return _parse(data, model)
    except _UnreadableError as error:
        raise ValueError(f"{path} must {error}") from error
    except ValueError as error:
        raise ValueError(f"{path} must be a whole token file with {error}") from error


class _UnreadableError(ValueError):
    """A file that is not damaged, but cannot be read here."""


def _read_bytes(path: str | os.PathLike[str]) -> bytes:
    with open(path, "rb") as file:
        data = file.read(6)
        if data[:4] != MAGIC:
            raise ValueError(f"{path} must be a token file that begins with {MAGIC!r}, got {data[:4]!r}")
        if len(data) > 4 and data[4] != VERSION:
            raise ValueError(f"{path} must have version {VERSION} of the format, got version {data[4]}")
        size = os.fstat(file.fileno()).st_size
        if size > MAX_FILE_BYTES:
            raise ValueError(f"{path} must be at most {MAX_FILE_BYTES} bytes, got {size}")
        data += file.read(size)
    if len(data) < 10 or struct.pack("<I", zlib.crc32(data[:-4])) != data[-4:]:
        raise ValueError(f"{path} must be a whole token file, got one that is damaged or cut off")
    return data


def _parse(data: bytes, model: Any) -> StoredTokens:
    reader = ByteReader(data[:-4], position=5)
    flags, fingerprint = reader.byte(), reader.take(8)
    if flags >= 16:
        raise ValueError(f"known flags, got {flags}")
    height, width = reader.number("a height", 1, MAX_SIDE), reader.number("a width", 1, MAX_SIDE)
    if height * width > MAX_PIXELS:
        raise ValueError(f"at most {MAX_PIXELS} pixels, got {height} x {width}")
    batch_size = reader.number("images", 1, MAX_IMAGES)
    length = reader.number("tokens per image", 1, MAX_NUMBERS)
    channels = reader.number("channels", 1, MAX_CHANNELS - NUM_GAUSSIAN_PARAMS)
    width_of_tokens = NUM_GAUSSIAN_PARAMS + channels
    most = min(MAX_NUMBERS, MAX_VALUES_PER_BYTE * len(data))
    if batch_size * length * width_of_tokens > most:
        raise ValueError(
            f"at most {most} values in {len(data)} bytes, got {batch_size} x {length} x {width_of_tokens}"
        )
    tile_size = reader.number("a tile size", 0, MAX_SIDE) or None
    coder = "constriction" if flags & _CONSTRICTION else "zlib"
    _check_model(fingerprint, model, width_of_tokens)
    if coder == "constriction" and not constriction_is_available():
        raise _UnreadableError("be read with constriction, which is not installed: pip install constriction")

    step = None
    if not flags & _LOSSLESS:
        (step,) = struct.unpack("<f", reader.take(4))
        if not MIN_STEP * 0.999 <= step <= MAX_STEP:
            raise ValueError(f"a step from {MIN_STEP} to {MAX_STEP}, got {step}")
    image_size, tiles, sigma_scale = (height, width), [(0, 0, height, width)], 0.0
    if flags & _REGIONS:
        map_scale = reader.number("a scale of the map", 1, 2**12)
        # Each tile has a token: counted before their list is made.
        if tile_size is not None and -(-height // tile_size) * -(-width // tile_size) > length:
            raise ValueError(f"a token for every tile, got {length} tokens and tiles of {tile_size} pixels")
        tiles = tiles_of(image_size, tile_size, map_scale)
        if length % len(tiles):
            raise ValueError(f"as many rows for each of {len(tiles)} tiles, got {length} rows")
        sigma_scale = _read_sigma_scale(reader)
    mask = _read_mask(reader, batch_size, length, len(tiles))
    count = int(mask.sum())

    lengths = []
    if flags & _REGIONS:
        lengths += [("bits", reader.number(name, 0, 2 * count)) for name in ("halvings", "directions")]
    if step is None:
        rest = reader.take(3 * count * width_of_tokens)
        lengths += [("integers", count)] * width_of_tokens
    else:
        sizes = (channels, channels, 2 * count, count, 2 * count, channels * count)
        lengths += [("integers", size) for size in sizes]
    streams = StreamReader(coder, reader.take(len(data) - 4 - reader.position), lengths).read()

    layout = None
    if flags & _REGIONS:
        splits, directions, *streams = streams
        is_aligned = bool(flags & _ALIGN_CORNERS)
        layout = read_forest(splits, directions, mask, image_size, tiles, sigma_scale, is_aligned)
    if step is None:
        rows = exact_values(rest, streams, (count, width_of_tokens))
    else:
        initial = None if layout is None else layout.gaussians[mask == 1].double().numpy()
        rows = quantised_values(streams, initial, step, count)
    real = torch.from_numpy(rows)
    check_gaussians(real[:, :NUM_GAUSSIAN_PARAMS], "Gaussians that")
    if not torch.isfinite(real).all():
        raise ValueError("finite textures, got NaN or infinite values")
    tokens = torch.zeros(batch_size, length, width_of_tokens)
    tokens[..., :NUM_GAUSSIAN_PARAMS] = torch.tensor(PADDING_GAUSSIAN)
    tokens[mask == 1] = real
    has_model = fingerprint != NO_MODEL
    return StoredTokens(
        tokens, image_size, mask, layout, tile_size, step, fingerprint.hex() if has_model else None, coder, len(data)
    )


def _check_model(fingerprint: bytes, model: Any, width_of_tokens: int) -> None:
    if model is None:
        return
    if width_of_tokens != model.config.token_channels:
        raise _UnreadableError(
            f"hold tokens of {model.config.token_channels} values for this model, got {width_of_tokens}"
        )
    if fingerprint != NO_MODEL and fingerprint.hex() != model_fingerprint(model):
        raise _UnreadableError(
            f"hold tokens of this model, whose fingerprint is {model_fingerprint(model)}, got {fingerprint.hex()}"
        )


def _read_sigma_scale(reader: ByteReader) -> float:
    kind = reader.byte()
    if kind < len(SIGMA_SCALES):
        return SIGMA_SCALES[kind]
    (sigma_scale,) = struct.unpack("<d", reader.take(8))
    if not (1e-6 <= sigma_scale <= 1000 and kind == len(SIGMA_SCALES)):
        raise ValueError(f"a sigma_scale from 1e-6 to 1000, got {sigma_scale}")
    return sigma_scale


def _read_mask(reader: ByteReader, batch_size: int, length: int, num_tiles: int) -> torch.Tensor:
    kind = reader.byte()
    if kind == _EVERY_ROW:
        return torch.ones(batch_size, length, dtype=torch.int64)
    if kind == _COUNTS:
        rows = length // num_tiles
        counts = [reader.number("tokens", 0, rows) for _ in range(batch_size * num_tiles)]
        mask = _first_rows(torch.tensor(counts), rows).reshape(batch_size, length)
    elif kind == _BITMAP:
        packed = np.frombuffer(reader.take(-(-batch_size * length // 8)), np.uint8)
        mask = torch.from_numpy(np.unpackbits(packed)[: batch_size * length].astype(np.int64))
        mask = mask.reshape(batch_size, length)
    else:
        raise ValueError(f"a known kind of mask, got {kind}")
    if not mask.any(1).all():
        raise ValueError("a token for every image, got an image without")
    return mask


__all__ = ["StoredTokens", "model_fingerprint", "read_tokens", "write_tokens"]
