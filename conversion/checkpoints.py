# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Read checkpoint files tensor by tensor and write safetensors files.

Tensors are mapped from the input file and written from that mapping. A conversion therefore needs the memory of one
model, not of two.
"""

from __future__ import annotations

import os
import pickletools
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from conversion.array_pickle import ALLOWED_INSTRUCTIONS, PickleRefusedError, check_instructions

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
# The released files hold up to 565 tensors. A model takes time and memory for each that a header lists.
MAX_TENSORS = 10_000
MAX_HEADER_BYTES = 16 * 2**20
# A state dict's pickle needs no others. STACK_GLOBAL would hide its names from the check.
TORCH_INSTRUCTIONS = (ALLOWED_INSTRUCTIONS | {"BINPERSID", "LONG1"}) - {"STACK_GLOBAL"}
TORCH_NAMES = {
    "collections OrderedDict",
    *("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"),
    *(f"torch {name}Storage" for name in ("Double", "Float", "Half", "BFloat16")),
    *(f"torch {name}Storage" for name in ("Long", "Int", "Short", "Char", "Byte", "Bool")),
}


class Checkpoint(Protocol):
    """An open checkpoint file. Shapes and number types are known at once, values are read tensor by tensor.

    Attributes:
        path (`Path`): the file.
        member (`str`, *optional*): the name under which the file holds its state dict; `None` if it is the whole file.
    """

    path: Path
    member: str | None

    def keys(self) -> list[str]: ...

    def shape(self, key: str) -> tuple[int, ...]: ...

    def dtype(self, key: str) -> torch.dtype: ...

    def tensor(self, key: str) -> torch.Tensor: ...


class SafetensorsCheckpoint:
    """An open safetensors file. Its tensors are mapped, not copied."""

    def __init__(self, path: Path, file: safe_open):
        self.path = path
        self.member: str | None = None
        self._file = file
        _check_number(path, file.keys())
        self._slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)

    def keys(self) -> list[str]:
        return list(self._slices)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._slices[key].get_shape())

    def dtype(self, key: str) -> torch.dtype:
        name = self._slices[key].get_dtype()
        if name not in DTYPES:
            raise ValueError(f"the number type of {key} in {self.path} must be one of {sorted(DTYPES)}, got {name}")
        return DTYPES[name]

    def tensor(self, key: str) -> torch.Tensor:
        return self._file.get_tensor(key)


class MappingCheckpoint:
    """A state dict that `torch.load` has mapped."""

    def __init__(self, path: Path, tensors: Mapping[str, torch.Tensor], member: str | None = None):
        _check_number(path, list(tensors))
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
    """Open a safetensors file or a torch checkpoint. No code from the file is run.

    Args:
        path (`str` or `os.PathLike`): a `.safetensors` file, or a `.pt`, `.bin`, `.pth` or `.ckpt` file that
            `torch.save` wrote as a zip archive.
        members (iterable of `str`, *optional*, defaults to none): names under which a torch checkpoint may hold its
            state dict, in order of preference. If it has none of them, it must be a state dict itself.

    Returns:
        A context manager that returns the `Checkpoint`.

    Raises:
        ValueError: if the file is missing, damaged or of another format, if it holds anything but tensors, or if it
            claims more or larger tensors than it can hold.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"the checkpoint must be a file, got {path}")
    if path.suffix == ".safetensors":
        with open(path, "rb") as start:
            header_bytes = int.from_bytes(start.read(8), "little")
        try:
            if header_bytes > MAX_HEADER_BYTES:
                raise SafetensorError(f"a header of {header_bytes} bytes, the most is {MAX_HEADER_BYTES}")
            with safe_open(path, framework="pt") as file:
                yield SafetensorsCheckpoint(path, file)
        except SafetensorError as error:
            raise ValueError(f"{path} must be a whole safetensors file, got {error}") from None
    elif path.suffix in TORCH_SUFFIXES:
        yield MappingCheckpoint(path, *_load_torch(path, members))
    else:
        raise ValueError(
            f"the checkpoint must be a .safetensors file or one of {list(TORCH_SUFFIXES)}, got {path.name}"
        )


def _load_torch(path: Path, members: Iterable[str]) -> tuple[dict[str, torch.Tensor], str | None]:
    try:
        _check_torch_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except PickleRefusedError as error:
        raise ValueError(f"{path} must hold tensors only and was refused, nothing in it was run: {error}") from None
    except Exception as error:  # zipfile, pickletools and torch raise many types at damaged files
        raise ValueError(f"{path} must be a whole torch checkpoint, got {type(error).__name__}: {error}") from None
    nested = content if isinstance(content, dict) else {}
    member = next((name for name in members if isinstance(nested.get(name), dict)), None)
    if member is not None:
        content = content[member]
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} must hold a dict of tensors, got {type(content).__name__}")
    foreign = [str(key) for key, value in content.items() if not isinstance(value, torch.Tensor)]
    foreign += [repr(key) for key in content if not isinstance(key, str)]
    if foreign:
        raise ValueError(f"{path} must hold a dict of names and tensors, got something else at {foreign[:5]}")
    # Strides of 0 make a large tensor of a few bytes.
    claimed, size = sum(value.nbytes for value in content.values()), path.stat().st_size
    if claimed > size:
        raise ValueError(f"the tensors in {path} must be smaller than the file of {size} bytes, got {claimed} bytes")
    return content, member


def _check_torch_archive(path: Path) -> None:
    """Refuse what `weights_only` accepts: compressed contents, and calls such as `bytearray(10**12)`."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        pickles = [entry for entry in entries if entry.filename.endswith("data.pkl")]
        if len(pickles) != 1 or pickles[0].file_size > MAX_HEADER_BYTES:
            raise ValueError(f"it must hold one data.pkl of at most {MAX_HEADER_BYTES} bytes")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("its contents must not be compressed")
        data = archive.read(pickles[0])
    check_instructions(data, TORCH_INSTRUCTIONS)
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name == "GLOBAL" and argument not in TORCH_NAMES:
            name = str(argument).replace(" ", ".")[:100]
            raise PickleRefusedError(f"it asks for {name!r}; only tensors are allowed")


def _check_number(path: Path, names: Sequence[str]) -> None:
    if len(names) > MAX_TENSORS:
        raise ValueError(f"{path} must hold at most {MAX_TENSORS} tensors, got {len(names)}")


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
    """View a tensor of any number type as its bytes, `(bytes,)` uint8."""
    return tensor.contiguous().flatten().view(torch.uint8)


def floating_dtype(checkpoint: Checkpoint, keys: Iterable[str]) -> torch.dtype:
    """Return the most frequent number type of these tensors, for the `dtype` of the converted model's config."""
    counts: dict[torch.dtype, int] = {}
    for key in keys:
        counts[checkpoint.dtype(key)] = counts.get(checkpoint.dtype(key), 0) + 1
    return max(counts, key=lambda dtype: counts[dtype])
