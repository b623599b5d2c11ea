# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Load a pickle of NumPy arrays and plain containers without running any code that the file names.

`find_class` maps the few NumPy names in an array's pickle to stand-ins from this module, which check type, shape and
length before an array is made. The file never touches a NumPy object, so REDUCE and BUILD have nothing else to call.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import pickletools
from collections.abc import Set
from typing import Any

import numpy as np

# NumPy 2 renamed numpy.core to numpy._core.
ALLOWED_NAMES = {("numpy", "ndarray"), ("numpy", "dtype")} | {
    (f"numpy.{core}.{module}", name)
    for core in ("core", "_core")
    for module, name in (("multiarray", "_reconstruct"), ("multiarray", "scalar"), ("numeric", "_frombuffer"))
}
# LONG1 is absent: its ints can be chosen to hash alike, which makes a dict quadratic in its size.
ALLOWED_INSTRUCTIONS = {
    *(
        "PROTO",
        "FRAME",
        "STOP",
        "MARK",
        "POP",
        "POP_MARK",
        "MEMOIZE",
        "BINPUT",
        "LONG_BINPUT",
        "BINGET",
        "LONG_BINGET",
    ),
    *("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "BINFLOAT", "BYTEARRAY8"),
    *("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
    *("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
    *("APPEND", "APPENDS", "SETITEM", "SETITEMS", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD"),
}
# Real numbers only: "O" would hold objects and "V" records.
DTYPE_CODES = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")
MAX_FILE_BYTES = 16 * 2**30
MAX_DIMENSIONS = 8
MAX_NESTING = 16
# An instruction makes up to 120 bytes of objects. An array of 8 Gaussians has 8 bytes per instruction.
FREE_INSTRUCTIONS, BYTES_PER_INSTRUCTION = 100_000, 8


class PickleRefusedError(ValueError):
    """The pickle is damaged, or holds something other than arrays and plain containers."""


def load_array_pickle(path: str | os.PathLike[str]) -> Any:
    """Load dicts, lists, tuples, numbers, strings, bytes, None and NumPy arrays of real numbers from a pickle.

    Reads the pickle protocols 3 to 5, which Python 3 writes. Needs at most 20 MB plus 15 times the file's size.

    Args:
        path (`str` or `os.PathLike`): the pickle file.

    Returns:
        The object in the file. Its arrays are views of bytes that were read; copy them before you change them.

    Raises:
        PickleRefusedError: if the file is damaged, too large, or holds anything else. It is a `ValueError`.
        OSError: if the file cannot be read.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_FILE_BYTES:
            raise PickleRefusedError(f"the size of {path} must be at most {MAX_FILE_BYTES} bytes, got {size}")
        data = file.read(size)
    try:
        check_instructions(data, ALLOWED_INSTRUCTIONS)
        return _finish(_ArrayUnpickler(io.BytesIO(data)).load(), budget=[len(data)])
    except PickleRefusedError as error:
        reason = str(error)
    except Exception as error:  # the documentation of pickle says that a damaged file can raise any exception
        reason = f"it is damaged or truncated ({type(error).__name__}: {error})"
    raise PickleRefusedError(f"{path} was refused: {reason}; nothing in it was run")


def check_instructions(data: bytes, allowed: Set[str]) -> None:
    """Refuse what `find_class` cannot stop: other ways to call code, and memory or C stack taken before any call.

    pickletools reads the instructions without executing them, and fails where one is longer than the rest of the file.

    Args:
        data (`bytes`): the pickle.
        allowed (set of `str`): the names of the instructions that it may hold.

    Raises:
        PickleRefusedError: if it holds another instruction, too many of them, or uses a tuple as a dict key.
        ValueError, IndexError, KeyError: if it is damaged.
    """
    limit = FREE_INSTRUCTIONS + len(data) // BYTES_PER_INSTRUCTION
    stack: list[Any] = []  # the kind of each object on pickle's stack
    memo: dict[Any, Any] = {}
    end = 0
    for count, (opcode, argument, position) in enumerate(pickletools.genops(data), 1):
        name, end = opcode.name, (position or 0) + 1
        if name not in allowed:
            raise PickleRefusedError(f"instruction {name} at byte {position} is not allowed")
        if count > limit:
            raise PickleRefusedError(f"a file of {len(data)} bytes must have at most {limit} instructions, got more")
        if name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            index = len(memo) if argument is None else argument
            if index > count:  # the memo is a table: pickle would allocate all entries up to this one
                raise PickleRefusedError(f"a memo index at byte {position} must be at most {count}, got {index}")
            memo[index] = stack[-1]
            continue
        if name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
            continue
        taken = []
        for kind in reversed(opcode.stack_before):
            while kind is pickletools.stackslice and stack[-1] is not pickletools.markobject:
                taken.append(stack.pop())
            if kind is not pickletools.stackslice:
                taken.append(stack.pop())
        # Python hashes nested tuples by unchecked recursion in C, which can overflow the stack.
        if name in ("SETITEM", "SETITEMS") and pickletools.pytuple in taken[1::2]:
            raise PickleRefusedError(f"dict keys must be numbers or strings, got a tuple before byte {position}")
        stack.extend(opcode.stack_after)
    if stack or end != len(data):
        raise PickleRefusedError(f"it must end in one object, got {len(stack)} more and {len(data) - end} more bytes")


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> _StandIn:
        if (module, name) not in ALLOWED_NAMES:
            raise PickleRefusedError(f"it asks for {f'{module}.{name}'[:100]!r}; only arrays of numbers are allowed")
        return _StandIn(name)


class _StandIn:
    """Stands for a NumPy name, a dtype or an array while the file is unpickled.

    It is neither a class nor has a `__dict__`, so that the file can only call it and set its state.
    """

    __slots__ = ("kind", "value")

    def __init__(self, kind: str, value: Any = None):
        self.kind = kind  # a name of NumPy, "a dtype" or "an array"
        self.value = value

    def __call__(self, *arguments: Any) -> Any:
        match self.kind, arguments:
            case "_reconstruct", (_StandIn(kind="ndarray"), (0,), _):
                return _StandIn("an array")
            case "dtype", (str(code), *_):
                if code not in DTYPE_CODES:
                    raise PickleRefusedError(f"an array's type must be one of {DTYPE_CODES}, got {code[:20]!r}")
                return _StandIn("a dtype", np.dtype(code))
            case "scalar", (_StandIn(kind="a dtype", value=dtype), bytes(raw)):
                return _make_array((), dtype, "C", raw).item()
            case "_frombuffer", (raw, _StandIn(kind="a dtype", value=dtype), shape, "C" | "F" as order):
                return _StandIn("an array", _make_array(shape, dtype, order, raw))
        raise PickleRefusedError(f"it calls {self.kind} with arguments that NumPy does not write")

    def __setstate__(self, state: object) -> None:
        match self.kind, state:
            case "a dtype", (3, "<" | ">" | "=" | "|" as byte_order, None, None, None, -1, -1, 0):
                self.value = self.value.newbyteorder(byte_order)
            case "an array", (1, shape, _StandIn(kind="a dtype", value=dtype), bool(fortran_order), raw):
                self.value = _make_array(shape, dtype, "F" if fortran_order else "C", raw)
            case _:
                raise PickleRefusedError(f"it gives {self.kind} a state that NumPy does not write")


def _make_array(shape: Any, dtype: np.dtype, order: Any, raw: Any) -> np.ndarray:
    """View `raw` as an array. Nothing is allocated."""
    sizes = shape if isinstance(shape, tuple) and len(shape) <= MAX_DIMENSIONS else (-1,)
    if not all(isinstance(size, int) and size >= 0 for size in sizes):
        raise PickleRefusedError(f"an array's shape must be at most {MAX_DIMENSIONS} sizes >= 0, got something else")
    expected = math.prod(sizes) * dtype.itemsize
    if not isinstance(raw, (bytes, bytearray)) or len(raw) != expected:
        got = f"{len(raw)} bytes" if isinstance(raw, (bytes, bytearray)) else f"a {type(raw).__name__}"
        raise PickleRefusedError(f"an array of shape {sizes} and type {dtype} must have {expected} bytes, got {got}")
    return np.frombuffer(raw, dtype=dtype).reshape(sizes, order=order)


def _finish(value: Any, budget: list[int], depth: int = 0) -> Any:
    """Replace stand-ins by their arrays. Items and arrays that the file repeats must not add up to more than it."""
    array = value.value if isinstance(value, _StandIn) and value.kind == "an array" else None
    budget[0] -= 1 + (0 if array is None else array.nbytes)
    if budget[0] < 0 or depth > MAX_NESTING:
        raise PickleRefusedError(
            f"its contents must be smaller than the file and nested at most {MAX_NESTING} deep, got repeated or deeper"
        )
    if isinstance(value, dict):
        if not all(isinstance(key, (int, float, str)) for key in value):
            raise PickleRefusedError("dict keys must be numbers or strings, got something else")
        return {key: _finish(item, budget, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_finish(item, budget, depth + 1) for item in value])
    if isinstance(value, _StandIn) and array is None:
        raise PickleRefusedError(f"it must hold arrays with contents, got {value.kind} alone")
    return value if array is None else array
