# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Corrupted files of every kind that this package reads, made of healthy ones.

Every function yields `(name, bytes)` pairs: what was done, and the corrupted file. The same seed makes the same files.
Some corruptions leave a file that may still be read, such as a flipped bit in a weight: a reader must then succeed or
refuse it with a clear error.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Corruption = tuple[str, bytes]

NOT_JSON_OBJECTS = {
    "empty": b"",
    "white space": b"  \n",
    "a list": b"[1,2]",
    "a number": b"5",
    "null": b"null",
    "a string": b'"text"',
    "no JSON": b"{'a': 1}",
    "binary": bytes(range(256)),
    "zeros": bytes(1000),
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "byte order mark": b'\xef\xbb\xbf{"a": 1}',
    "deep list": b"[" * 100_000,
    "deep object": b'{"a":' * 100_000,
    "deep closed list": b'{"a": ' + b"[" * 500 + b"]" * 500 + b"}",
    "long number": b'{"a": ' + b"9" * 10_000 + b"}",
    "same key twice": b'{"a": 1, "a": 2}',
}

HOSTILE_VALUES: tuple[Any, ...] = (
    True,
    -1,
    0,
    10**9,
    10**18,
    10**100,
    0.5,
    -1.0,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "text",
    "9" * 10_000,
    [],
    [0],
    [1] * 100_000,
    [10**12],
    ["a", None],
    [[1]],
    {},
    {"a": {"b": 1}},
)


def random_damage(healthy: bytes, rng: random.Random, count: int) -> Iterator[Corruption]:
    """Truncated, lengthened, with flipped bits, with a part zeroed or repeated."""
    for index in range(count):
        kind = ("truncated", "lengthened", "flipped", "zeroed", "repeated")[index % 5]
        at = rng.randrange(len(healthy))
        end = min(len(healthy), at + rng.choice((1, 8, 100)))
        if kind == "truncated":
            damaged = healthy[:at]
        elif kind == "lengthened":
            damaged = healthy + rng.randbytes(rng.choice((1, 8, 1000)))
        elif kind == "flipped":
            damaged = healthy[:at] + bytes([healthy[at] ^ 1 << rng.randrange(8)]) + healthy[at + 1 :]
        elif kind == "zeroed":
            damaged = healthy[:at] + bytes(end - at) + healthy[end:]
        else:
            damaged = healthy[:end] + healthy[at:]
        yield f"{kind} at {at}", damaged


def json_corruptions(healthy: bytes, rng: random.Random, count: int) -> Iterator[Corruption]:
    """What is no JSON object, `count` objects with a field of a hostile value, and `count // 4` damaged texts."""
    yield from NOT_JSON_OBJECTS.items()
    fields = json.loads(healthy)
    for _ in range(count):
        name, value = rng.choice(sorted(fields)), rng.choice(HOSTILE_VALUES)
        yield f"{name} = {repr(value)[:40]}", json.dumps({**fields, name: value}).encode()
    for name in sorted(fields)[:: max(1, 4 * len(fields) // max(count, 1))]:
        yield f"without {name}", json.dumps({key: value for key, value in fields.items() if key != name}).encode()
    yield from random_damage(healthy, rng, count // 4)


def split_safetensors(file: bytes) -> tuple[dict[str, Any], bytes]:
    """A safetensors file -> its header and its data."""
    size = int.from_bytes(file[:8], "little")
    return json.loads(file[8 : 8 + size]), file[8 + size :]


def join_safetensors(header: bytes | dict[str, Any], data: bytes) -> bytes:
    """The inverse of `split_safetensors`; a header may be any bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def safetensors_corruptions(healthy: bytes, rng: random.Random, count: int) -> Iterator[Corruption]:
    """Headers that lie, tensors of another name, shape or dtype, and `count` damaged files."""
    header, data = split_safetensors(healthy)
    text = json.dumps(header).encode()
    for size in (0, 1, 2**31, 2**40, 2**63, 2**64 - 1):
        yield f"header of {size} bytes", size.to_bytes(8, "little") + text + data
    for name, bad in NOT_JSON_OBJECTS.items():
        yield f"header: {name}", join_safetensors(bad, data)
    for keep in (0, 4, 8, 9, len(healthy) - 1):
        yield f"first {keep} bytes", healthy[:keep]
    yield "a pickle", pickle.dumps({"a": 1})
    for _ in range(count // 4):
        name = rng.choice([key for key in header if key != "__metadata__"])
        entry = header[name]
        begin, end = entry["data_offsets"]
        lies = {
            "offsets beyond the file": {**entry, "data_offsets": [begin, end + 2**40]},
            "reversed offsets": {**entry, "data_offsets": [end, begin]},
            "negative offsets": {**entry, "data_offsets": [-8, end]},
            "overflowing shape": {**entry, "shape": [2**32, 2**32]},
            "huge shape": {**entry, "shape": [10**12]},
            "negative shape": {**entry, "shape": [-1]},
            "other shape": {**entry, "shape": [*entry["shape"], 1]},
            "integers": {**entry, "dtype": {"F32": "I32", "I64": "F64"}.get(entry["dtype"], "U8")},
            "unknown dtype": {**entry, "dtype": "F31"},
            "no tensor": 5,
        }
        lie = rng.choice(sorted(lies))
        yield f"{name}: {lie}", join_safetensors({**header, name: lies[lie]}, data)
        renamed = {f"{key}.other" if key == name else key: value for key, value in header.items()}
        yield f"{name} renamed", join_safetensors(renamed, data)
    yield from random_damage(healthy, rng, count)


def image_corruptions(healthy: bytes, rng: random.Random, count: int) -> Iterator[Corruption]:
    """Of a PNG file: headers that lie, files of other kinds, and `count` damaged files."""
    for width, height in ((0, 0), (1, 2**31 - 1), (100_000, 100_000), (2**32 - 1, 2**32 - 1)):
        chunk = b"IHDR" + struct.pack(">II", width, height) + healthy[24:29]
        claim = struct.pack(">I", zlib.crc32(chunk))
        yield f"{width} x {height} pixels", healthy[:12] + chunk + claim + healthy[33:]
    yield "empty", b""
    yield "text", b"this is no image"
    yield "signature alone", healthy[:8]
    yield "GIF header alone", b"GIF89a" + struct.pack("<HH", 60_000, 60_000) + bytes(3)
    yield "JPEG header alone", b"\xff\xd8\xff\xe0\x00\x10JFIF"
    yield "a pickle", pickle.dumps({"a": 1})
    yield from random_damage(healthy, rng, count)


def parquet_corruptions(healthy: bytes, rng: random.Random, count: int) -> Iterator[Corruption]:
    """Footers that lie, files of other kinds, and `count` damaged files."""
    for size in (0, 2**31 - 1, 2**32 - 1):
        yield f"footer of {size} bytes", healthy[:-8] + struct.pack("<I", size) + healthy[-4:]
    yield "empty", b""
    yield "magic alone", b"PAR1PAR1"
    yield "text", b"this is no table"
    yield "other magic", healthy[:-4] + b"PAR9"
    yield from random_damage(healthy, rng, count)


class Touch:
    """What creates a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.marker),))


def pickle_corruptions(healthy: bytes, rng: random.Random, count: int, marker: Path) -> Iterator[Corruption]:
    """Pickles that run code (they create the folder `marker`), claim memory or nest, and `count` damaged ones."""
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        yield f"code in protocol {protocol}", pickle.dumps({"a": Touch(marker)}, protocol)
    yield "empty", b""
    yield "2 GB of bytes claimed", b"\x80\x03B" + struct.pack("<I", 2**31 - 1) + b"."
    yield "an exabyte of bytes claimed", b"\x80\x05\x96" + struct.pack("<Q", 2**60) + b"."
    yield "nested", b"\x80\x02" + b"(" * 100_000 + b"l" * 100_000 + b"."
    yield "text", b"this is no pickle"
    yield from random_damage(healthy, rng, count)


def sparse_file(path: Path, size: int) -> Path:
    """A file of zeros that takes no room on the disk."""
    with open(path, "wb") as file:
        file.truncate(size)
    return path
