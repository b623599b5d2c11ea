# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""The command `gpstoken`, which `pip install gpstoken-hf` installs.

    gpstoken reconstruct photo.jpg --tokens 512 --output out/
    gpstoken encode photo.jpg folder/ --output tokens/
    gpstoken decode tokens/photo.safetensors --output pictures/
    gpstoken generate --classes three 7 --count 4 --output digits/
    gpstoken demo --open
    gpstoken info gpstoken-nano

`gpstoken <command> --help` lists the options of a command. A command is the program of the same name in pipelines/.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from .shared.programs import EXIT_BAD_INPUT, make_parser, printable, run_program, spell_as

PROGRAM = "pipelines.command_line"
COMMANDS = {
    "reconstruct": "photographs -> tokens -> photographs, with pictures of what the tokens do",
    "encode": "photographs -> files of tokens",
    "decode": "files of tokens -> pictures",
    "generate": "classes -> images, layouts and a contact sheet",
    "demo": "a page in the browser to encode, edit and generate",
    "info": "what a checkpoint is: class, parameters, tokens, sizes, licence",
}


def main(argv: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else list(argv)
    if words and words[0] in COMMANDS:
        program = f"pipelines.{words[0]}"
        spell_as(program, f"gpstoken {words[0]}")
        # Imported here, because `demo` needs packages of an extra.
        return run_program(import_module(f".{words[0]}", __package__).main, words[1:])
    spell_as(PROGRAM, "gpstoken")
    table = "\n".join(f"    {name:<12} {meaning}" for name, meaning in COMMANDS.items())
    parser = make_parser(PROGRAM, f"{__doc__}\n{table}")
    parser.add_argument("--version", action="version", version=f"gpstoken-hf {_version()}")
    if not words:
        parser.print_help()
        return 0
    if words[0].startswith("-"):
        parser.parse_args(words)
    print(f"error: command must be one of {', '.join(COMMANDS)}, got {printable(words[0])}", file=sys.stderr)
    return EXIT_BAD_INPUT


def _version() -> str:
    try:
        return version("gpstoken-hf")
    except PackageNotFoundError:  # a clone that is not installed
        from gpstoken_hf import __version__

        return __version__


def run() -> None:
    """The entry point of the installed command."""
    sys.exit(run_program(main))


if __name__ == "__main__":
    run()
