# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Seeded damage: corrupted bytes, safetensors that lie about their contents, JSON that nobody expects, odd names.

Every function takes a `numpy.random.Generator` and returns what it made with a few words on what is wrong with it.
"""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from gpstoken_hf.partition import partition_images

NESTED = b"[" * 100_000
HOSTILE_VALUES: tuple[Any, ...] = (
    *(0, -1, 1, 3, 10**9, 10**18, 10**400, -(10**400), 0.5, -0.5, 1e308, 1e-320),
    *(float("nan"), float("inf"), float("-inf"), True, False, None, "", "x", "1", "\x00", "é" * 1000),
    *([], [1], [10**9] * 3, [[]], [None], list(range(10_000)), {}, {"a": 1}, {"": {}}, "../../etc/passwd"),
)


def _pick(rng: np.random.Generator, options: Any) -> Any:
    return options[int(rng.integers(len(options)))]


# ------------------------------------------------------------------------------------------------------------- bytes


def corrupt_bytes(data: bytes, rng: np.random.Generator) -> tuple[bytes, str]:
    """Damage that any file can take: on the disk, in a transfer, by another program."""
    kind = _pick(rng, ("empty", "cut", "zeros", "bits", "start", "noise", "more", "hole", "text", "nested", "twice"))
    size = max(1, len(data))
    position = int(rng.integers(size))
    if kind == "empty":
        return b"", "no bytes"
    if kind == "cut":
        return data[:position], f"cut to {position} bytes"
    if kind == "zeros":
        length = int(rng.integers(1, size + 1))
        return data[:position] + bytes(min(length, len(data) - position)) + data[
            position + length :
        ], "a block of zeros"
    if kind in ("bits", "start"):
        edited = bytearray(data)
        reach = min(size, 64) if kind == "start" else size
        for index in rng.integers(reach, size=int(rng.integers(1, 9))):
            if edited:
                edited[int(index)] ^= 1 << int(rng.integers(8))
        return bytes(edited), "flipped bits" + (" in the first 64 bytes" if kind == "start" else "")
    if kind == "noise":
        return rng.bytes(int(rng.integers(1, 4096))), "random bytes"
    if kind == "more":
        return data + rng.bytes(int(rng.integers(1, 100))), "bytes too many"
    if kind == "hole":
        length = int(rng.integers(1, 64))
        return data[:position] + data[position + length :], f"{length} bytes missing at {position}"
    if kind == "text":
        return b"<html>404 Not Found</html>\n", "another file's text"
    if kind == "nested":
        return NESTED, "100000 brackets"
    return data + data, "its contents twice"


# -------------------------------------------------------------------------------------------------------- safetensors


def _join(header: bytes, body: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + body


def corrupt_safetensors(data: bytes, rng: np.random.Generator) -> tuple[bytes, str]:
    """A safetensors file whose header, shapes or values lie."""
    length = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    names = [name for name in header if name != "__metadata__"]
    name = _pick(rng, names)
    entry = header[name]
    start, stop = entry["data_offsets"]
    kind = _pick(
        rng,
        (
            "shape",
            "claim",
            "dtype",
            "offsets",
            "metadata",
            "missing",
            "extra",
            "rename",
            "values",
            "length",
            "zero size",
        ),
    )
    what = f"{kind} of {name}"
    if kind == "shape":
        entry["shape"] = _pick(rng, ([1, *entry["shape"]], entry["shape"][::-1], [stop - start], [0], [-1]))
    elif kind == "claim":
        entry["shape"] = [2**40, *entry["shape"][1:]]
        entry["data_offsets"] = [start, start + 2**45]
    elif kind == "dtype":
        entry["dtype"] = _pick(rng, ("F64", "F16", "BF16", "I64", "I32", "BOOL", "F8_E4M3", "X"))
        if rng.random() < 0.5:  # consistent with the bytes, so that only the reader of the tensors can object
            width = {"F64": 8, "I64": 8, "F16": 2, "BF16": 2, "I32": 4, "BOOL": 1, "F8_E4M3": 1}.get(entry["dtype"], 1)
            entry["shape"] = [(stop - start) // width]
    elif kind == "offsets":
        entry["data_offsets"] = _pick(rng, ([stop, start], [0, 0], [-1, stop], [start, 2**63], [start, stop + 4], [1]))
    elif kind == "metadata":
        metadata = header.setdefault("__metadata__", {"format": "pt"})
        key = _pick(rng, sorted(metadata))
        value = _pick(rng, ("", "100000", "1000000000", "-1", "0", "1e9", "x", "None", "9" * 5000, 5, None, {"a": 1}))
        metadata[key] = value
        if rng.random() < 0.2:
            del header["__metadata__"][key]
        what = f"metadata {key} = {str(value)[:20]}"
    elif kind == "missing":
        # The rest moves up: the file stays whole.
        del body[start:stop], header[name]
        for other in header.values():
            if "data_offsets" in other and other["data_offsets"][0] >= stop:
                other["data_offsets"] = [offset - (stop - start) for offset in other["data_offsets"]]
    elif kind == "extra":
        header["hostile.extra"] = {"dtype": "U8", "shape": [4], "data_offsets": [len(body), len(body) + 4]}
        body += b"\1\2\3\4"
    elif kind == "rename":
        header["../" + name] = header.pop(name)
    elif kind == "values":
        value = _pick(rng, (float("nan"), float("inf"), -1e30, 1e15, -1.0, 0.0))
        if entry["dtype"] == "F32" and stop > start:
            values = np.frombuffer(bytes(body[start:stop]), "<f4").copy()
            values[rng.integers(len(values), size=max(1, len(values) // 4))] = value
            body[start:stop] = values.tobytes()
        elif entry["dtype"] == "I64" and stop > start:
            values = np.frombuffer(bytes(body[start:stop]), "<i8").copy()
            values[rng.integers(len(values))] = _pick(rng, (-1, 10**15, 0, 2**63 - 1))
            body[start:stop] = values.tobytes()
        what = f"values of {name}: {value}"
    elif kind == "length":
        claimed = _pick(rng, (0, 1, 2**63, 2**64 - 1, 10**8, length - 1, length + 1))
        return _join(json.dumps(header).encode(), bytes(body), claimed), f"a header of {claimed} bytes"
    else:
        entry["shape"], entry["data_offsets"] = [0, 2**40], [start, start]
    return _join(json.dumps(header).encode(), bytes(body)), what


# --------------------------------------------------------------------------------------------------------------- JSON


def corrupt_json(data: bytes, rng: np.random.Generator) -> tuple[bytes, str]:
    """A configuration with a value, a type or a structure that nobody expects."""
    content = json.loads(data)
    kind = _pick(
        rng, ("value", "value", "value", "delete", "add", "top", "nesting", "size", "bytes", "class", "double")
    )
    key = _pick(rng, sorted(content)) if isinstance(content, dict) and content else None
    if key is None or kind == "top":
        value = _pick(rng, ([1, 2], [], 5, "x", None, True, [[]], {}))
        return json.dumps(value).encode(), f"the whole file is {value!r}"
    if kind == "value":
        value = _pick(rng, HOSTILE_VALUES)
        content[key] = value
        if isinstance(value, int) and abs(value) > 10**100:  # json.dumps refuses integers of so many digits
            content[key] = 0
            text = json.dumps(content).replace(f'"{key}": 0', f'"{key}": {"-" if value < 0 else ""}1{"0" * 400}', 1)
            return text.encode(), f"{key} = {'-' if value < 0 else ''}10^400"
        return json.dumps(content).encode(), f"{key} = {str(value)[:40]!r}"
    if kind == "delete":
        del content[key]
        return json.dumps(content).encode(), f"without {key}"
    if kind == "add":
        name = _pick(rng, ("hostile", "", "__class__", "dtype", "quantization_config", "auto_map", "_name_or_path"))
        content[name] = _pick(rng, HOSTILE_VALUES[:6] + HOSTILE_VALUES[15:25])
        return json.dumps(content).encode(), f"with {name!r} = {str(content[name])[:40]!r}"
    if kind == "nesting":
        depth = _pick(rng, (100, 900, 5000, 100_000))
        text = json.dumps(content | {key: 0}).replace(f'"{key}": 0', f'"{key}": {"[" * depth}{"]" * depth}', 1)
        return text.encode(), f"{key} nested {depth} deep"
    if kind == "size":
        return json.dumps(content | {"padding": "x" * 20_000_000}).encode(), "20 MB of padding"
    if kind == "bytes":
        return _pick(rng, (b"\xff\xfe", b"\xef\xbb\xbf", b"\x00")) + data, "bytes before the JSON"
    if kind == "class":
        for name in ("model_type", "_class_name", "image_processor_type"):
            if name in content:
                content[name] = _pick(rng, ("os.system", "bert", "", 5, None, ["a"]))
                return json.dumps(content).encode(), f"{name} = {content[name]!r}"
        content["architectures"] = 5
        return json.dumps(content).encode(), "architectures = 5"
    return data + data, "two documents"


# ------------------------------------------------------------------------------------------------------------- images


def corrupt_png(data: bytes, rng: np.random.Generator) -> tuple[bytes, str]:
    """A PNG file whose header claims another size or another kind of pixels, its checksums right."""
    width, height, depth, color = struct.unpack(">IIBB", data[16:26])
    kind = _pick(rng, ("huge", "zero", "wide", "depth", "color", "chunk"))
    if kind == "huge":
        width = height = _pick(rng, (20_000, 100_000, 2**31 - 1))
    elif kind == "zero":
        width = 0
    elif kind == "wide":
        width, height = width * int(rng.integers(2, 1000)), 1
    elif kind == "depth":
        depth = int(rng.integers(256))
    elif kind == "color":
        color = int(rng.integers(256))
    header = b"IHDR" + struct.pack(">IIBB", width, height, depth, color) + data[26:29]
    edited = data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]
    if kind == "chunk":
        edited = edited[:33] + struct.pack(">I", 2**31 - 1) + b"iTXt" + edited[33:]
    return edited, f"PNG with another {kind}: {width} x {height}, depth {depth}, color {color}"


# -------------------------------------------------------------------------------------------------------------- files


def corrupt_file(path: Path, rng: np.random.Generator) -> str:
    """Corrupt a file in place, by its kind or as any file.

    Args:
        path (`Path`): The file. `.safetensors`, `.json` and `.png` can also be damaged in ways of their own.
        rng (`numpy.random.Generator`): Chooses the damage.

    Returns:
        `str`: What was done, in a few words.
    """
    data = path.read_bytes()
    special = {".safetensors": corrupt_safetensors, ".json": corrupt_json, ".png": corrupt_png}.get(path.suffix)
    corrupted, what = corrupt_bytes(data, rng) if special is None or rng.random() < 0.4 else special(data, rng)
    path.write_bytes(corrupted)
    return f"{path.name}: {what}"


# Names of image files of one folder: each group must give as many results as it has names.
ODD_NAMES: tuple[tuple[bytes, ...], ...] = (
    (b"\xff\xfe.png", b"plain.png"),
    (b"new\nline.png",),
    (b"-dash.png", b"--output.png"),
    (b"a" * 251 + b".png",),
    ("é".encode() * 125 + b".png",),
    (b"Photo.png", b"photo.png", b"PHOTO.PNG"),
    (b"photo.png", b"photo.jpg", b"photo.jpg-2.png"),
    (b"photo.png", b"photo/inner.png"),
    ("\u00e9.png".encode(), "e\u0301.png".encode()),
    (b" .png", b"a b .png"),
    (b"%s{0}$HOME`x`.png",),
    (b"\x1b[31mred.png", b"\t.png"),
    (b"..a..png", b"a..png"),
    (b"overview.png", b"scores.json.png", b"settings.png"),
    (b"con.png", b"a:b.png", b"a\\b.png"),
    (b".hidden.png",),
)


class PartitionDataset(Dataset):
    """Images and their partitions, computed in the workers of a DataLoader."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1000 + index)
        image = torch.rand(1, 3, 24, 32, generator=generator) * torch.linspace(0.1, 1, 32)
        return partition_images(image, 12, min_region_size=4).gaussians[0]
