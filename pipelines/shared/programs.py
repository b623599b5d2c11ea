# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""What every program of this project shares: its parser and argument types, one-line errors, progress bars."""

from __future__ import annotations

import argparse
import struct
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from tqdm import tqdm

EXIT_BAD_INPUT = 2

# Errors whose message is written for the user. All of them speak of input or of the output's disk.
INPUT_ERRORS = (ValueError, OSError, StrictDataclassError, SafetensorError)
# What a damaged file can make its reader or the model raise. A batch reports these and continues with the next file.
FILE_ERRORS = (
    *INPUT_ERRORS,
    RuntimeError,
    MemoryError,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    SyntaxError,
    TypeError,
    struct.error,
    zlib.error,
)

PixelBox = tuple[int, int, int, int]


class ProgramError(ValueError):
    """A message for the person at the terminal: printed as one line, exit code 2."""


# ---------------------------------------------------------------------------------------------------- run a program


def run_program(main: Callable[[Sequence[str] | None], int | None], argv: Sequence[str] | None = None) -> int:
    """Run `main(argv)` and turn the errors that its input can cause into one line and exit code 2.

    Other errors are faults of the program and keep their traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        # A file name that the terminal cannot show must not end a batch.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        return main(argv) or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        raise
    except INPUT_ERRORS as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return EXIT_BAD_INPUT


def one_line(error: BaseException) -> str:
    """The message of an error on one line, after its type where the message was not written for users."""
    message = printable(" ".join(str(error).split()))
    if not message:
        return type(error).__name__
    return message if isinstance(error, INPUT_ERRORS) else f"{type(error).__name__}: {message}"


def printable(text: object) -> str:
    """`text` with line breaks, control characters and bytes that are not UTF-8 written as escapes."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in str(text)
    )


def progress(items: Sequence[Any], unit: str) -> Iterator[Any]:
    """Iterate with a progress bar; one item, and output that is not a terminal, get none."""
    return iter(tqdm(items, unit=f" {unit}", disable=True if len(items) == 1 else None))


# ------------------------------------------------------------------------------------------------------- arguments


# Program -> the command that starts it, where that is not `python -m program`.
_spellings: dict[str, str] = {}


def spell_as(program: str, command: str) -> None:
    """Let the help of `program` show `command` in place of `python -m program`."""
    _spellings[program] = command


def make_parser(program: str, description: str) -> argparse.ArgumentParser:
    """A parser for `python -m program`: the description as it is written, and no abbreviated options."""
    command = _spellings.get(program, f"python -m {program}")
    return argparse.ArgumentParser(
        prog=command,
        description=description.replace(f"python -m {program}", command),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def positive_int(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    return _number(text, int, lambda value: value >= 1, "an integer >= 1")


def non_negative_int(text: str) -> int:
    """An argparse type: an integer of at least 0."""
    return _number(text, int, lambda value: value >= 0, "an integer >= 0")


def positive_float(text: str) -> float:
    """An argparse type: a finite number above 0."""
    return _number(text, float, lambda value: 0 < value < float("inf"), "a number > 0")


def non_negative_float(text: str) -> float:
    """An argparse type: a finite number of at least 0."""
    return _number(text, float, lambda value: 0 <= value < float("inf"), "a number >= 0")


def _number(text: str, kind: type, accept: Callable[[float], bool], expected: str):  # type: ignore[no-untyped-def]
    try:
        value = kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be {expected}, got {text!r}") from None
    if not accept(value):
        raise argparse.ArgumentTypeError(f"must be {expected}, got {text!r}")
    return value


def pixel_box(text: str) -> PixelBox:
    """An argparse type: `x0,y0,x1,y1`, inclusive pixels."""
    try:
        x0, y0, x1, y1 = (int(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be four integers x0,y0,x1,y1, got {text!r}") from None
    if not (0 <= x0 <= x1 and 0 <= y0 <= y1):
        raise argparse.ArgumentTypeError(f"must be 0 <= x0 <= x1 and 0 <= y0 <= y1, got {text!r}")
    return x0, y0, x1, y1
