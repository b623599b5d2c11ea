# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Read checkpoint files tensor by tensor and write safetensors files.

Tensors are mapped from the input file and written from that mapping. A conversion therefore needs the memory of one
model, not of two.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

# The number types that a checkpoint may hold, by their names in the safetensors format.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
TORCH_SUFFIXES = (".pt", ".bin", ".pth", ".ckpt")


class Checkpoint(Protocol):
    """Named tensors in a file: their shapes and types at once, their values one at a time."""

    path: Path
    member: str | None  # the part of the file that holds the tensors, None for the file itself

    def keys(self) -> list[str]: ...

    def shape(self, key: str) -> tuple[int, ...]: ...

    def dtype(self, key: str) -> torch.dtype: ...

    def tensor(self, key: str) -> torch.Tensor: ...


class SafetensorsCheckpoint:
    """A safetensors file, mapped and read tensor by tensor."""

    def __init__(self, path: Path, file: safe_open):
        self.path = path
        self.member: str | None = None
        self._file = file
        self._slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)

    def keys(self) -> list[str]:
        return list(self._slices)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._slices[key].get_shape())

    def dtype(self, key: str) -> torch.dtype:
        name = self._slices[key].get_dtype()
        if name not in DTYPES:
            raise ValueError(f"{self.path}: {key} has the number type {name}, expected one of {sorted(DTYPES)}")
        return DTYPES[name]

    def tensor(self, key: str) -> torch.Tensor:
        return self._file.get_tensor(key)


class MappingCheckpoint:
    """A state dict in memory, or mapped by `torch.load`."""

    def __init__(self, path: Path, tensors: Mapping[str, torch.Tensor], member: str | None = None):
        self.path = path
        self.member = member
        self._tensors = tensors

    def keys(self) -> list[str]:
        return list(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._tensors[key].shape)

    def dtype(self, key: str) -> torch.dtype:
        return self._tensors[key].dtype

    def tensor(self, key: str) -> torch.Tensor:
        return self._tensors[key]


@contextmanager
def open_checkpoint(path: str | os.PathLike[str], members: Iterable[str] = ()) -> Iterator[Checkpoint]:
    """The tensors of a `.safetensors` file, or of a `.pt`/`.bin` file read with `weights_only` (no code runs).

    Args:
        path: the file.
        members: names under which a `.pt` file may hold its state dict, in order of preference; without one of them
            the file itself must be a state dict.

    Raises:
        ValueError: the file is missing, truncated, of another format, or asks for more than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"the checkpoint {path} is not a file")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                yield SafetensorsCheckpoint(path, file)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
    elif path.suffix in TORCH_SUFFIXES:
        yield MappingCheckpoint(path, *_load_torch(path, members))
    else:
        raise ValueError(
            f"the checkpoint must be a .safetensors file or one of {list(TORCH_SUFFIXES)}, got {path.name}"
        )


def _load_torch(path: Path, members: Iterable[str]) -> tuple[dict[str, torch.Tensor], str | None]:
    try:
        # Files that are no zip archive (torch < 1.6) cannot be mapped.
        with open(path, "rb") as file:
            mappable = file.read(4) == b"PK\x03\x04"
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mappable)
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()
        asked = next(
            (line for line in reason if "Unsupported" in line or "GLOBAL" in line), reason[-1] if reason else ""
        )
        raise ValueError(f"{path} holds more than tensors and was refused, nothing of it was run: {asked}") from None
    except (RuntimeError, EOFError, KeyError, AttributeError, IndexError, AssertionError, TypeError) as error:
        raise ValueError(f"{path} is not a whole torch checkpoint: {error}") from None
    nested = content if isinstance(content, dict) else {}
    member = next((name for name in members if isinstance(nested.get(name), dict)), None)
    if member is not None:
        content = content[member]
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} must hold a dict of tensors, got {type(content).__name__}")
    foreign = [str(key) for key, value in content.items() if not isinstance(value, torch.Tensor)]
    if foreign:
        raise ValueError(f"{path} must hold a dict of tensors, but {foreign[:5]} are none")
    return content, member


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to write: its name, its shape, and a function that returns its values.

    Attributes:
        name (`str`): its name in the written file.
        shape (`tuple[int, ...]`): its shape.
        load (`Callable`): returns the tensor, a view of the mapped input file if possible.
    """

    name: str
    shape: tuple[int, ...]
    load: Callable[[], torch.Tensor]


def save_tensors(path: str | os.PathLike[str], plan: Iterable[PlannedTensor]) -> None:
    """Write the tensors to a safetensors file, bit for bit.

    Args:
        path (`str` or `os.PathLike`): the file to write.
        plan (iterable of `PlannedTensor`): the tensors.

    Raises:
        ValueError: if a tensor holds NaN or infinite values, or shares its memory with another one.
        OSError: if the file cannot be written.
    """
    tensors = {}
    for planned in plan:
        value = planned.load().contiguous()
        # The extremes are NaN if any value is; unlike isfinite(value) they need no memory.
        if value.is_floating_point() and value.numel() and not torch.stack(torch.aminmax(value)).isfinite().all():
            raise ValueError(f"{planned.name} must be finite, got NaN or infinite values")
        tensors[planned.name] = value
    try:
        # save_file writes from the tensors' own memory: mapped tensors are never copied.
        save_file(tensors, path, metadata={"format": "pt"})
    except RuntimeError as error:
        raise ValueError(f"the tensors of a checkpoint must not share memory: {error}") from None
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from None


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor's values, `(bytes,)` uint8, whatever its number type."""
    return tensor.contiguous().flatten().view(torch.uint8)


def floating_dtype(checkpoint: Checkpoint, keys: Iterable[str]) -> torch.dtype:
    """The number type that most of these tensors have: what the config of the converted model names."""
    counts: dict[torch.dtype, int] = {}
    for key in keys:
        counts[checkpoint.dtype(key)] = counts.get(checkpoint.dtype(key), 0) + 1
    return max(counts, key=lambda dtype: counts[dtype])
