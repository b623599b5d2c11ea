# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Read a pickle of NumPy arrays and plain containers without running anything of it.

A pickle is a program for a stack machine whose REDUCE and BUILD call whatever the file names. This reader is a machine
of its own: it knows the instructions that containers, numbers, strings and bytes need, and the five NumPy names that
an array's pickle mentions. Those names are looked up in a table here, never imported; the arrays are made from the
file's own bytes after their type, shape and length were checked. So nothing of the file is called, no size that a file
claims is allocated unless the file holds as many bytes, and anything else in it is refused.
"""

from __future__ import annotations

import math
import os
import pickletools
from collections.abc import Callable
from typing import Any

import numpy as np

# An array's pickle names these, before and after NumPy 2 renamed numpy.core; see numpy.ndarray.__reduce__.
ALLOWED_GLOBALS = {
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
    **{
        (f"numpy.{core}.{module}", name): name
        for core in ("core", "_core")
        for module, name in (("multiarray", "_reconstruct"), ("multiarray", "scalar"), ("numeric", "_frombuffer"))
    },
}
# Type codes of real numbers. "O" (objects), "V" (records) and the rest have no place in a layout.
DTYPE_CODES = frozenset({"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"})
MAX_DIMENSIONS = 8
MAX_NESTING = 16


class PickleRefusedError(ValueError):
    """The pickle is damaged, or asks for something other than arrays and plain containers."""


def load_array_pickle(path: str | os.PathLike[str]) -> Any:
    """The object in a pickle file: dicts, lists, tuples, numbers, strings, bytes, None and NumPy arrays of numbers.

    Pickle protocols 3 to 5, as Python 3 and NumPy write them; no object arrays, no out-of-band buffers.

    Raises:
        PickleRefusedError: (a ValueError) anything else, naming what was asked for.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        data = file.read()
    try:
        return _Machine(data).run()
    except PickleRefusedError as error:
        raise PickleRefusedError(f"{os.fspath(path)} was refused: {error}; nothing of it was run") from None


class _Global:
    """A NumPy name that the file mentioned: only a label, it can neither be called nor changed by the file."""

    __slots__ = ("kind",)

    def __init__(self, kind: str):
        self.kind = kind


class _Dtype:
    """A number type in the making: its code, then (BUILD) its byte order."""

    __slots__ = ("byte_order", "code")

    def __init__(self, code: str):
        self.code = code
        self.byte_order = "|" if code[1] == "1" else "<"

    def numpy(self) -> np.dtype:
        return np.dtype(self.byte_order + self.code)


class _Array:
    """An array in the making: empty, then (BUILD) filled."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: np.ndarray | None = None


_MARK = object()


class _Machine:
    """Stack, memo and one method per group of instructions."""

    def __init__(self, data: bytes):
        self.data = data
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.array_bytes = 0

    def run(self) -> Any:
        end = 0
        try:
            for opcode, argument, position in pickletools.genops(self.data):
                if opcode.name == "STOP":
                    end = (position or 0) + 1
                    break
                handler = _HANDLERS.get(opcode.name)
                if handler is None:
                    raise PickleRefusedError(f"instruction {opcode.name} at byte {position} is not allowed")
                handler(self, argument)
        except PickleRefusedError:
            raise
        except IndexError:
            raise PickleRefusedError("it is damaged: it takes more from the stack than there is") from None
        except (ValueError, OverflowError, UnicodeError) as error:
            # pickletools names the place where a file breaks off or holds what is no instruction.
            raise PickleRefusedError(f"it is damaged or truncated: {error}") from None
        if end != len(self.data):
            raise PickleRefusedError(f"{len(self.data) - end} bytes follow its end")
        if len(self.stack) != 1:
            raise PickleRefusedError(f"it is damaged: it leaves {len(self.stack)} objects instead of one")
        # An item takes at least a byte of the file: more items than bytes means containers that hold each other.
        return _Finisher(budget=len(self.data)).finish(self.pop())

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise PickleRefusedError("it is damaged: a mark where a value should be")
        return value

    def pop_to_mark(self) -> list[Any]:
        for position in range(len(self.stack) - 1, -1, -1):
            if self.stack[position] is _MARK:
                items = self.stack[position + 1 :]
                del self.stack[position:]
                return items
        raise PickleRefusedError("it is damaged: a mark is missing")

    def top(self, kind: type) -> Any:
        value = self.stack[-1]
        if not isinstance(value, kind):
            raise PickleRefusedError(f"it adds items to {_describe(value)}, expected a {kind.__name__}")
        return value

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def push_tuple(self, size: int) -> None:
        items = [self.pop() for _ in range(size)]
        self.push(tuple(reversed(items)))

    def append(self, items: list[Any]) -> None:
        self.top(list).extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.top(dict)
        if len(items) % 2:
            raise PickleRefusedError("it is damaged: a dict key without a value")
        for key, value in zip(items[::2], items[1::2]):
            # A nested tuple as key could exhaust the C stack when hashed, and no bank needs one.
            if not isinstance(key, (int, float, str)):
                raise PickleRefusedError(f"dict keys must be numbers or strings, got {_describe(key)}")
            target[key] = value

    def get_memo(self, index: int) -> None:
        if index not in self.memo:
            raise PickleRefusedError(f"it is damaged: it recalls entry {index}, which it never stored")
        self.push(self.memo[index])

    def find_global(self, module: Any, name: Any) -> None:
        kind = ALLOWED_GLOBALS.get((module, name)) if isinstance(module, str) and isinstance(name, str) else None
        if kind is None:
            # What the file says is printed as a literal: it may hold control characters.
            raise PickleRefusedError(f"it asks for {f'{module}.{name}'!r}; only NumPy arrays of numbers are allowed")
        self.push(_Global(kind))

    def reduce(self) -> None:
        """REDUCE: one of the constructors of NumPy, applied to arguments that are checked to be its own."""
        arguments, function = self.pop(), self.pop()
        kind = function.kind if isinstance(function, _Global) else None
        if kind == "_reconstruct" and isinstance(arguments, tuple) and len(arguments) == 3:
            cls, shape, _ = arguments
            if isinstance(cls, _Global) and cls.kind == "ndarray" and shape == (0,):
                self.push(_Array())
                return
        elif kind == "dtype" and isinstance(arguments, tuple) and arguments and isinstance(arguments[0], str):
            if arguments[0] not in DTYPE_CODES:
                raise PickleRefusedError(
                    f"it holds an array of type {arguments[0]!r}; allowed are numbers, {sorted(DTYPE_CODES)}"
                )
            self.push(_Dtype(arguments[0]))
            return
        elif kind == "scalar" and isinstance(arguments, tuple) and len(arguments) == 2:
            dtype, raw = arguments
            if isinstance(dtype, _Dtype) and isinstance(raw, bytes) and len(raw) == dtype.numpy().itemsize:
                self.push(np.frombuffer(raw, dtype=dtype.numpy())[0].item())
                return
        elif kind == "_frombuffer" and isinstance(arguments, tuple) and len(arguments) == 4:
            raw, dtype, shape, order = arguments
            if order in ("C", "F"):
                array = _Array()
                array.value = self._array((1, shape, dtype, order == "F", raw))
                self.push(array)
                return
        raise PickleRefusedError(f"it calls {_describe(function)} with arguments that no NumPy array has")

    def build(self) -> None:
        """BUILD: the byte order of a dtype, or the contents of an array."""
        state, target = self.pop(), self.stack[-1]
        if isinstance(target, _Dtype):
            if not isinstance(state, tuple) or len(state) < 5 or state[1] not in ("<", ">", "=", "|"):
                raise PickleRefusedError("it gives a number type a state that NumPy does not write")
            if any(part is not None for part in state[2:5]):
                raise PickleRefusedError("it holds an array of records; only arrays of numbers are allowed")
            target.byte_order = state[1]
        elif isinstance(target, _Array):
            target.value = self._array(state)
        else:
            raise PickleRefusedError(f"it sets the state of {_describe(target)}")

    def _array(self, state: Any) -> np.ndarray:
        if not isinstance(state, tuple) or len(state) != 5:
            raise PickleRefusedError("it gives an array a state that NumPy does not write")
        _, shape, dtype, fortran_order, raw = state
        if not isinstance(dtype, _Dtype) or not isinstance(raw, (bytes, bytearray)):
            raise PickleRefusedError("it holds an array of something else than numbers")
        if (
            not isinstance(shape, tuple)
            or len(shape) > MAX_DIMENSIONS
            or not all(isinstance(size, int) and size >= 0 for size in shape)
        ):
            raise PickleRefusedError(f"an array's shape must be a tuple of at most {MAX_DIMENSIONS} sizes")
        expected = math.prod(shape) * dtype.numpy().itemsize
        if len(raw) != expected:
            raise PickleRefusedError(
                f"an array of shape {shape} and type {dtype.code} needs {expected} bytes, the file holds {len(raw)}"
            )
        # References are cheap in a pickle and their bytes are not: together the arrays may not outgrow the file.
        self.array_bytes += expected
        if self.array_bytes > len(self.data):
            raise PickleRefusedError("its arrays repeat each other's bytes and are larger than the file")
        return np.frombuffer(raw, dtype=dtype.numpy()).reshape(shape, order="F" if fortran_order else "C")


class _Finisher:
    """Puts the finished arrays in the place of those in the making, all through the containers."""

    def __init__(self, budget: int):
        self.budget = budget

    def finish(self, value: Any, depth: int = 0) -> Any:
        self.budget -= 1
        if self.budget < 0 or depth > MAX_NESTING:
            raise PickleRefusedError(f"its containers hold each other or are nested more than {MAX_NESTING} deep")
        if isinstance(value, _Array):
            if value.value is None:
                raise PickleRefusedError("it holds an array without contents")
            return value.value
        if isinstance(value, dict):
            return {key: self.finish(item, depth + 1) for key, item in value.items()}
        if isinstance(value, list):
            return [self.finish(item, depth + 1) for item in value]
        if isinstance(value, tuple):
            return tuple(self.finish(item, depth + 1) for item in value)
        if isinstance(value, (_Global, _Dtype)):
            raise PickleRefusedError(f"it holds {_describe(value)} where a value should be")
        return value


def _describe(value: Any) -> str:
    return f"numpy.{value.kind}" if isinstance(value, _Global) else f"a {type(value).__name__.lstrip('_').lower()}"


def _push_argument(machine: _Machine, argument: Any) -> None:
    machine.push(argument)


_Handler = Callable[[_Machine, Any], Any]
_HANDLERS: dict[str, _Handler] = {
    "PROTO": lambda machine, version: None,
    "FRAME": lambda machine, size: None,
    "MARK": lambda machine, _: machine.push(_MARK),
    "POP": lambda machine, _: machine.stack.pop(),
    "POP_MARK": lambda machine, _: machine.pop_to_mark(),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    **dict.fromkeys(
        ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
        _push_argument,
    ),
    **dict.fromkeys(("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"), _push_argument),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.pop_to_mark())),
    "TUPLE1": lambda machine, _: machine.push_tuple(1),
    "TUPLE2": lambda machine, _: machine.push_tuple(2),
    "TUPLE3": lambda machine, _: machine.push_tuple(3),
    "APPEND": lambda machine, _: machine.append([machine.pop()]),
    "APPENDS": lambda machine, _: machine.append(machine.pop_to_mark()),
    "SETITEM": lambda machine, _: machine.set_items([machine.pop(), machine.pop()][::-1]),
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_to_mark()),
    "MEMOIZE": lambda machine, _: machine.memo.__setitem__(len(machine.memo), machine.stack[-1]),
    "BINPUT": lambda machine, index: machine.memo.__setitem__(index, machine.stack[-1]),
    "LONG_BINPUT": lambda machine, index: machine.memo.__setitem__(index, machine.stack[-1]),
    "BINGET": lambda machine, index: machine.get_memo(index),
    "LONG_BINGET": lambda machine, index: machine.get_memo(index),
    "GLOBAL": lambda machine, names: machine.find_global(*names.split(" ", 1)),
    "STACK_GLOBAL": lambda machine, _: machine.find_global(*[machine.pop(), machine.pop()][::-1]),
    "REDUCE": lambda machine, _: machine.reduce(),
    "BUILD": lambda machine, _: machine.build(),
}
