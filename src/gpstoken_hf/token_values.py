# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""The values of tokens as streams of integers: bit for bit, or quantised (docs/token_file.md).

Shapes: n tokens, C texture channels.
"""

from __future__ import annotations

import numpy as np

from .entropy_coding import MAX_VALUE, StreamWriter
from .gaussians import NUM_GAUSSIAN_PARAMS

# A step of the Gaussians over a step of the textures: where a bit of either buys about as much quality.
GAUSSIAN_STEP = 0.25
# Means are stored in units of sigma, but of no less than this: a tenth of a pixel of the largest images.
MIN_UNIT = 2e-5
# Channels are scaled by powers of 2^(1/4).
SCALES_PER_OCTAVE = 4


def add_exact(rows: np.ndarray, streams: StreamWriter) -> bytes:
    """Float32 values `(n, F)`: exponents as streams, one for each field; sign and mantissa as three bytes."""
    bits = np.ascontiguousarray(rows).view(np.uint32)
    for column in (bits >> 23 & 0xFF).astype(np.int64).T:
        streams.integers(column)
    rest = (bits >> 8 & 0x800000) | (bits & 0x7FFFFF)
    return np.stack([rest & 0xFF, rest >> 8 & 0xFF, rest >> 16], axis=-1).astype(np.uint8).tobytes()


def exact_values(rest: bytes, exponents: list[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """The inverse of `add_exact`, `(n, F)` float32."""
    parts = np.frombuffer(rest, np.uint8).reshape(*shape, 3).astype(np.uint32)
    bits = parts[..., 0] | parts[..., 1] << 8 | (parts[..., 2] & 0x7F) << 16 | (parts[..., 2] & 0x80) << 24
    for field, column in enumerate(exponents):
        if column.min() < 0 or column.max() > 254:
            raise ValueError("exponents from 0 to 254, got others")
        bits[:, field] |= column.astype(np.uint32) << 23
    return bits.view(np.float32)


def _whole(values: np.ndarray) -> np.ndarray:
    """Rounded to int64.

    Raises:
        ValueError: if a value is too large for a stream.
    """
    if len(values) and not np.abs(values).max() < MAX_VALUE:
        raise ValueError(f"tokens must be within {MAX_VALUE} steps, got larger values: use a larger step, or lossless")
    return np.rint(values).astype(np.int64)


def add_quantised(rows: np.ndarray, initial: np.ndarray | None, step: float, streams: StreamWriter) -> None:
    """Tokens `(n, 5 + C)` in float64 as streams; `initial` `(n, 5)` are the Gaussians of their regions."""
    gaussian_step = step * GAUSSIAN_STEP
    texture = rows[:, NUM_GAUSSIAN_PARAMS:]
    deviation = texture.std(axis=0)
    # A channel without deviation is stored to a thousandth of its value.
    deviation = np.maximum(deviation, np.maximum(np.abs(texture).mean(axis=0) * 1e-3, 1e-9))
    scales = np.rint(SCALES_PER_OCTAVE * np.log2(deviation)).astype(np.int64)
    levels = _whole(texture / _texture_steps(scales, step))
    centres = np.rint(np.median(levels, axis=0)).astype(np.int64)
    streams.integers(scales)
    streams.integers(centres)
    base = _base_gaussians(initial, len(rows))
    sigma_levels = _whole(np.log(rows[:, :2] / base[:, :2]) / gaussian_step)
    sigma = base[:, :2] * np.exp(sigma_levels * gaussian_step)
    streams.integers(sigma_levels.T.reshape(-1))
    streams.integers(_whole(np.arctanh(np.clip(rows[:, 2], -1 + 1e-9, 1 - 1e-9)) / gaussian_step))
    streams.integers(
        _whole((rows[:, 3:5] - base[:, 3:5]) / (gaussian_step * np.maximum(sigma, MIN_UNIT))).T.reshape(-1)
    )
    streams.integers((levels - centres).T.reshape(-1))


def quantised_values(streams: list[np.ndarray], initial: np.ndarray | None, step: float, count: int) -> np.ndarray:
    """The inverse of `add_quantised`, `(n, 5 + C)` float32."""
    scales, centres, sigma_levels, rho_levels, mu_levels, levels = streams
    if np.abs(scales).max() > 200 * SCALES_PER_OCTAVE:
        raise ValueError("scales of channels within float32, got others")
    gaussian_step = step * GAUSSIAN_STEP
    base = _base_gaussians(initial, count)
    rows = np.empty((count, NUM_GAUSSIAN_PARAMS + len(scales)), dtype=np.float32)
    sigma = base[:, :2] * np.exp(np.clip(sigma_levels.reshape(2, count).T * gaussian_step, -300, 300))
    mu = base[:, 3:5] + mu_levels.reshape(2, count).T * gaussian_step * np.maximum(sigma, MIN_UNIT)
    # Quantisation may reach the ends of a range.
    rows[:, :2] = np.clip(sigma, 1e-30, 1 - 1e-7)
    rows[:, 2] = np.clip(np.tanh(rho_levels * gaussian_step), -1 + 1e-7, 1 - 1e-7)
    rows[:, 3:5] = np.clip(mu, -1e30, 1e30)
    values = (levels.reshape(len(scales), count).T + centres) * _texture_steps(scales, step)
    rows[:, 5:] = np.clip(values, -1e38, 1e38)
    return rows


def _texture_steps(scales: np.ndarray, step: float) -> np.ndarray:
    return step * 2.0 ** (scales / SCALES_PER_OCTAVE)


def _base_gaussians(initial: np.ndarray | None, count: int) -> np.ndarray:
    """What the stored Gaussians are relative to, `(n, 5)`; without regions sigma 1 in the middle."""
    return np.tile([1.0, 1.0, 0.0, 0.0, 0.0], (count, 1)) if initial is None else initial


__all__ = ["add_exact", "add_quantised", "exact_values", "quantised_values"]
