# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Streams of integers as few bytes: probability tables made of integers, and two coders (docs/token_file.md).

A stream is a sequence of small integers around a centre, or of bits. Its table comes from a few bytes by integer
arithmetic alone, so every machine decodes with the same table. `constriction` codes the symbols with asymmetric
numeral systems. Where it is not installed, zlib packs them.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

CODERS = ("zlib", "constriction")

# Probabilities are multiples of 1 / TOTAL.
TOTAL = 1 << 24
# A table holds the integers up to this distance from the centre. Others follow an escape symbol.
MAX_DISTANCE = 2048
NUM_SCALES, NUM_SHAPES = 80, 3
MAX_VALUE = 2**40
# No stream packs more values into a byte: zlib repeats at most 258 bytes in two bits, and no table predicts better.
MAX_VALUES_PER_BYTE = 1100


def constriction_is_available() -> bool:
    """Whether the library that codes best is installed."""
    try:
        import constriction  # noqa: F401
    except ImportError:
        return False
    return True


# ---- Probability tables ---------------------------------------------------------------------------------------------


@lru_cache(maxsize=512)
def integer_table(scale: int, shape: int) -> np.ndarray:
    """Counts of a distribution of integers that falls off on both sides of 0, from integer arithmetic alone.

    The weight of k is that of k - 1 times a ratio. The ratio is constant for shape 0 (a geometric fall) and shrinks
    by a constant factor for shapes 1 and 2; with shape 2 the weights are those of a normal distribution.

    Args:
        scale (`int`): from 0 (nearly always 0) to `NUM_SCALES - 1`, four steps for each doubling of the width.
        shape (`int`): from 0 to `NUM_SHAPES - 1`.

    Returns:
        `np.ndarray` of shape `(2 K + 2,)`: int64 counts of -K, ..., K and of the escape symbol; they add up to
        `TOTAL`.
    """
    width = (4 + scale % 4) << (scale // 4 + 1)
    ratio = (width << 32) // (width + 512)
    slower = (4 * width, width // 2)[shape - 1] if shape else 0
    factor = (slower << 32) // (slower + 512) if shape else 1 << 32
    weights = [1 << 40]
    while len(weights) <= MAX_DISTANCE:
        weight = weights[-1] * ratio >> 32
        if weight < 1 << 22:
            break
        weights.append(weight)
        ratio = ratio * factor >> 32
    total = weights[0] + 2 * sum(weights[1:])
    escape = TOTAL >> 10
    counts = [max(1, weight * (TOTAL - escape) // total) for weight in weights]
    table = np.array([*counts[:0:-1], *counts, escape], dtype=np.int64)
    table[len(weights) - 1] += TOTAL - table.sum()
    return table


def bit_table(count_of_zeros: int) -> np.ndarray:
    """Counts of 0 and 1, where `count_of_zeros` of 256 are 0."""
    return np.array([count_of_zeros, 256 - count_of_zeros], dtype=np.int64) * (TOTAL // 256)


def fit_table(values: np.ndarray) -> tuple[int, int, int]:
    """`(centre, scale, shape)` of the table that codes `values` in the fewest bits."""
    centre = int(np.sort(values)[len(values) // 2])
    distance = np.abs(values - centre)
    wanted = max(8.0, 512 * float(np.minimum(distance, MAX_DISTANCE).mean()))
    middle = min(round(4 * (np.log2(wanted) - 3)), NUM_SCALES - 1)
    found = np.bincount(np.minimum(distance, MAX_DISTANCE + 1).astype(np.int64))
    best: tuple[float, int, int] | None = None
    for scale in range(max(0, middle - 5), min(NUM_SCALES, middle + 6)):
        for shape in range(NUM_SHAPES):
            table = integer_table(scale, shape)
            reach = len(table) // 2 - 1
            bits = -np.log2(table / TOTAL)
            inside = found[: reach + 1]
            escaped = found[reach + 1 :].sum()
            cost = float(inside @ bits[reach : reach + len(inside)] + escaped * (bits[-1] + 16))
            if best is None or cost < best[0]:
                best = (cost, scale, shape)
    assert best is not None
    return centre, best[1], best[2]


# ---- Bytes ----------------------------------------------------------------------------------------------------------


def zigzag(values: np.ndarray) -> np.ndarray:
    """Integers -> natural numbers: 0, -1, 1, -2, ... -> 0, 1, 2, 3, ..."""
    return np.where(values < 0, -2 * values - 1, 2 * values)


def unzigzag(values: np.ndarray) -> np.ndarray:
    """The inverse of `zigzag`."""
    return np.where(values % 2 == 1, -(values // 2) - 1, values // 2)


def varint(value: int) -> bytes:
    """A natural number, seven bits a byte, the lowest first; the highest bit says that more bytes follow."""
    out = bytearray()
    while value >= 128:
        out.append(value % 128 + 128)
        value //= 128
    out.append(value)
    return bytes(out)


@dataclass
class ByteReader:
    """Reads numbers from untrusted bytes."""

    data: bytes
    position: int = 0

    def take(self, count: int) -> bytes:
        """The next `count` bytes.

        Raises:
            ValueError: if there are fewer.
        """
        if count > len(self.data) - self.position:
            raise ValueError(f"{count} more bytes at byte {self.position}, got {len(self.data) - self.position}")
        self.position += count
        return self.data[self.position - count : self.position]

    def byte(self) -> int:
        """The next byte as a number."""
        return self.take(1)[0]

    def number(self, name: str, low: int, high: int) -> int:
        """The next `varint`.

        Raises:
            ValueError: if it is not between `low` and `high`.
        """
        value = shift = 0
        while True:
            byte = self.byte()
            value |= (byte % 128) << shift
            shift += 7
            if byte < 128:
                break
            if shift > 63:
                raise ValueError(f"{name} from {low} to {high}, got a longer number")
        if not low <= value <= high:
            raise ValueError(f"{name} from {low} to {high}, got {value}")
        return value


# ---- Streams --------------------------------------------------------------------------------------------------------


class StreamWriter:
    """Collects streams and packs them with one coder. `StreamReader` returns them in the same order."""

    def __init__(self, coder: str):
        self.coder = coder
        self.tables = bytearray()
        self.escaped: list[int] = []
        self.coded: list[tuple[np.ndarray, np.ndarray]] = []  # symbols, table
        self.packed = bytearray()

    def bits(self, values: np.ndarray) -> None:
        """Add a stream of 0 and 1, an integer array."""
        if self.coder == "zlib":
            self.packed += np.packbits(values.astype(np.uint8)).tobytes()
        elif len(values):
            zeros = min(max(round(256 * float((values == 0).mean())), 1), 255)
            self.tables.append(zeros)
            self.coded.append((values.astype(np.int32), bit_table(zeros)))

    def integers(self, values: np.ndarray) -> None:
        """Add a stream of integers within `MAX_VALUE`, int64."""
        if not len(values):
            return
        assert np.abs(values).max() <= MAX_VALUE
        if self.coder == "zlib":
            natural = zigzag(values)
            size = next(size for size in (1, 2, 4, 8) if natural.max() < 1 << (8 * size))
            self.packed += bytes([size]) + natural.astype(f"<u{size}").tobytes()
            return
        centre, scale, shape = fit_table(values)
        table = integer_table(scale, shape)
        reach = len(table) // 2 - 1
        self.tables += bytes([scale * NUM_SHAPES + shape]) + varint(int(zigzag(np.array(centre))))
        symbols = values - centre + reach
        is_escaped = (symbols < 0) | (symbols > 2 * reach)
        self.escaped += zigzag(values[is_escaped]).tolist()
        self.coded.append((np.where(is_escaped, 2 * reach + 1, symbols).astype(np.int32), table))

    def finish(self) -> bytes:
        """The bytes of all streams."""
        if self.coder == "zlib":
            return zlib.compress(bytes(self.packed), 9)
        import constriction

        coder = constriction.stream.stack.AnsCoder()
        # The decoder returns last what was coded first.
        for symbols, table in reversed(self.coded):
            coder.encode_reverse(symbols, _model(table))
        words = np.asarray(coder.get_compressed(), dtype="<u4").tobytes()
        escaped = b"".join(map(varint, self.escaped))
        return bytes(self.tables) + varint(len(escaped)) + escaped + words


@dataclass
class StreamReader:
    """Reads what a `StreamWriter` has packed. The kinds and lengths of the streams must be known beforehand.

    Args:
        coder (`str`): one of `CODERS`.
        data (`bytes`): the bytes of all streams.
        lengths (`Sequence[tuple[str, int]]`): `("bits" | "integers", length)` of each.

    Raises:
        ValueError: if the bytes are not such streams.
    """

    coder: str
    data: bytes
    lengths: Sequence[tuple[str, int]]
    streams: list[np.ndarray] = field(default_factory=list)

    def read(self) -> list[np.ndarray]:
        """All streams, int64."""
        total = sum(length for _, length in self.lengths)
        if total > MAX_VALUES_PER_BYTE * len(self.data):
            raise ValueError(
                f"at most {MAX_VALUES_PER_BYTE} values per byte, got {total} values in {len(self.data)} bytes"
            )
        return self._read_zlib(total) if self.coder == "zlib" else self._read_constriction()

    def _read_zlib(self, total: int) -> list[np.ndarray]:
        unpack = zlib.decompressobj()
        limit = 8 * total + len(self.lengths)
        try:
            data = unpack.decompress(self.data, limit + 1)
        except zlib.error as error:
            raise ValueError(f"streams that zlib can unpack, got: {error}") from error
        if len(data) > limit or not unpack.eof or unpack.unused_data:
            raise ValueError("streams of the claimed lengths, got others")
        reader, streams = ByteReader(data), []
        for kind, length in self.lengths:
            if kind == "bits":
                packed = np.frombuffer(reader.take(-(-length // 8)), np.uint8)
                streams.append(np.unpackbits(packed)[:length].astype(np.int64))
            elif length:
                size = reader.byte()
                if size not in (1, 2, 4, 8):
                    raise ValueError(f"integers of 1, 2, 4 or 8 bytes, got {size}")
                natural = np.frombuffer(reader.take(size * length), f"<u{size}")
                if natural.max() > 2 * MAX_VALUE:
                    raise ValueError(f"integers of at most {MAX_VALUE}, got a larger one")
                streams.append(unzigzag(natural.astype(np.int64)))
            else:
                streams.append(np.zeros(0, np.int64))
        if reader.position != len(data):
            raise ValueError("streams of the claimed lengths, got longer ones")
        return streams

    def _read_constriction(self) -> list[np.ndarray]:
        import constriction

        reader = ByteReader(self.data)
        tables: list[tuple[np.ndarray, int]] = []
        for kind, length in self.lengths:
            if not length:
                tables.append((bit_table(128), 0))
            elif kind == "bits":
                zeros = reader.byte()
                if not zeros:
                    raise ValueError("a table of bits from 1 to 255, got 0")
                tables.append((bit_table(zeros), 0))
            else:
                scale, shape = divmod(reader.byte(), NUM_SHAPES)
                if scale >= NUM_SCALES:
                    raise ValueError(f"a table with a scale below {NUM_SCALES}, got {scale}")
                centre = reader.number("a centre", 0, 2 * MAX_VALUE)
                tables.append((integer_table(scale, shape), int(unzigzag(np.array(centre)))))
        escapes = ByteReader(reader.take(reader.number("bytes of escaped numbers", 0, len(self.data))))
        words = reader.take(len(self.data) - reader.position)
        if len(words) % 4:
            raise ValueError(f"words of 4 bytes, got {len(words)} bytes")
        coder = constriction.stream.stack.AnsCoder(np.frombuffer(words, "<u4").astype(np.uint32))
        streams = []
        for (kind, length), (table, centre) in zip(self.lengths, tables):
            symbols = np.asarray(coder.decode(_model(table), length)).astype(np.int64) if length else np.zeros(0, int)
            if kind == "integers":
                reach = len(table) // 2 - 1
                escaped = symbols == 2 * reach + 1
                symbols += centre - reach
                natural = [escapes.number("an escaped number", 0, 2 * MAX_VALUE) for _ in range(int(escaped.sum()))]
                symbols[escaped] = unzigzag(np.array(natural, dtype=np.int64))
            streams.append(symbols)
        if not coder.is_empty() or escapes.position != len(escapes.data):
            raise ValueError("streams of the claimed lengths, got longer ones")
        return streams


def _model(table: np.ndarray) -> Any:
    import constriction

    # The counts over a power of two are exact in floating point.
    return constriction.stream.model.Categorical(table / TOTAL, perfect=False)


__all__ = ["CODERS", "ByteReader", "StreamReader", "StreamWriter", "constriction_is_available", "varint"]
