# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Shared by the conversion tests: golden files, damaged checkpoints and the messages that refuse them."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

GOLDEN = Path(__file__).parent / "golden"
SHARED_GOLDEN = Path(__file__).parents[2] / "shared" / "golden"


class Hostile:
    """A pickle that creates the file `marker` when it is loaded."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def broken_checkpoints(source, folder, marker):
    """Name -> (file, pattern of the message that refuses it), made from a good checkpoint of the release's format."""
    tensors = load_file(source)
    key = next(name for name in sorted(tensors) if name.endswith(("mlp.0.weight", "mlp.fc1.weight")))
    data = source.read_bytes()

    def edited(**changes):
        copy = {name: value.clone() for name, value in tensors.items()}
        copy.update(changes)
        return {name: value for name, value in copy.items() if value is not None}

    def with_value(value):
        weight = tensors[key].clone()
        weight[0, 0] = value
        return edited(**{key: weight})

    saved = {
        "extra key": (edited(**{f"{key}.extra": torch.zeros(2)}), "1 unknown key .*extra"),
        "missing key": (edited(**{key.replace("weight", "bias"): None}), "1 missing key .*bias"),
        "NaN weight": (with_value(float("nan")), "must be finite, got NaN or infinite"),
        "infinite weight": (with_value(float("-inf")), "must be finite, got NaN or infinite"),
        "integer weight": (edited(**{key: tensors[key].int()}), "floating-point weights, got torch.int32"),
        "other shape": (edited(**{key: tensors[key][:, :-1].contiguous()}), "must have the shape of"),
        "empty": ({"nothing": torch.zeros(1)}, "must be a .*, got a file without"),
        "gap in the blocks": (
            {name.replace("blocks.1.", "blocks.2."): value for name, value in tensors.items()},
            "without gaps",
        ),
    }
    files = {}
    for name, (content, message) in saved.items():
        path = folder / f"{name.replace(' ', '_')}.safetensors"
        save_file(content, path)
        files[name] = (path, message)
    for name, content, message in (
        ("truncated", data[: len(data) // 2], "must be a whole safetensors file"),
        ("header only", data[:100], "must be a whole safetensors file"),
        ("no bytes", b"", "must be a whole safetensors file"),
        ("bytes too many", data + b"\0", "must be a whole safetensors file"),
        ("text", b"not a checkpoint at all", "must be a whole safetensors file"),
    ):
        path = folder / f"{name.replace(' ', '_')}.safetensors"
        path.write_bytes(content)
        files[name] = (path, message)
    torch.save({**tensors, "hostile": Hostile(marker)}, folder / "hostile.pt")
    files["hostile pickle"] = (
        folder / "hostile.pt",
        "must hold tensors only and was refused, nothing in it was run: it asks for '_?io.open'",
    )
    torch.save({"state_dict": {"a": 1}}, folder / "numbers.pt")
    files["no tensors"] = (folder / "numbers.pt", "must hold a dict of names and tensors")
    torch.save(tensors, folder / "whole.pt")
    (folder / "cut.pt").write_bytes((folder / "whole.pt").read_bytes()[:-1000])
    files["truncated .pt"] = (folder / "cut.pt", "must be a whole torch checkpoint")
    (folder / "weights.onnx").write_bytes(data)
    files["other suffix"] = (folder / "weights.onnx", "must be a .safetensors file")
    files["missing file"] = (folder / "missing.safetensors", "must be a file")
    return files


BROKEN_NAMES = (
    *("extra key", "missing key", "NaN weight", "infinite weight", "integer weight", "other shape", "empty"),
    *("gap in the blocks", "truncated", "header only", "no bytes", "bytes too many", "text", "hostile pickle"),
    *("no tensors", "truncated .pt", "other suffix", "missing file"),
)


def same_bits(a, b):
    """Whether two tensors have the same number type, shape and bytes."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and a.contiguous().numpy().tobytes() == b.contiguous().numpy().tobytes()
    )
