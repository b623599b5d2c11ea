# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""What programs share: their options, one-line errors, argument types, finding photographs and models."""

import argparse
import importlib
import re
from pathlib import Path

import pytest

from pipelines.shared.programs import (
    ProgramError,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
    run_program,
)

PIPELINES = Path(__file__).resolve().parents[1] / "pipelines"
PROGRAMS = sorted(path.stem for path in PIPELINES.glob("*.py") if path.name != "__init__.py")


def fail_with(error):
    def main(argv):
        raise error

    return main


def test_run_program_passes_arguments_and_the_exit_code():
    assert run_program(lambda argv: len(argv), ["a", "b", "c"]) == 3
    assert run_program(lambda argv: None) == 0


@pytest.mark.parametrize(
    "error", [ValueError("two\n  lines  of it"), ProgramError("two lines\nof it"), OSError("two\tlines of it")]
)
def test_errors_of_input_are_one_line_and_exit_code_2(error, capsys):
    assert run_program(fail_with(error)) == 2
    assert capsys.readouterr().err == "error: two lines of it\n"


def test_an_error_without_words_says_its_kind(capsys):
    assert run_program(fail_with(ValueError())) == 2
    assert capsys.readouterr().err == "error: ValueError\n"


def test_faults_of_the_program_keep_their_traceback():
    with pytest.raises(KeyError):
        run_program(fail_with(KeyError("oops")))


def test_interruption(capsys):
    assert run_program(fail_with(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (positive_int, {"1": 1, "4096": 4096}, ["0", "-1", "1.5", "x", ""]),
        (non_negative_int, {"0": 0, "7": 7}, ["-1", "0.5", "x"]),
        (positive_float, {"0.5": 0.5, "1e-3": 1e-3}, ["0", "-1", "nan", "inf", "x"]),
        (non_negative_float, {"0": 0.0, "2": 2.0}, ["-0.1", "nan", "inf", "x"]),
    ],
)
def test_argument_types(kind, good, bad):
    for text, value in good.items():
        assert kind(text) == value
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=f"expected .*, got {text!r}"):
            kind(text)


@pytest.mark.parametrize("name", PROGRAMS)
def test_options_are_spelled_one_way(name, capsys):
    if name == "build_layout_bank":
        pytest.importorskip("datasets")
    main = importlib.import_module(f"pipelines.{name}").main
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    # argparse itself makes `--no-` of an on/off option.
    options = {word.removeprefix("--no-").removeprefix("--") for word in re.findall(r"--[\w-]+", printed)}
    assert {"help", "device"} & options
    assert not [option for option in options if "-" in option]
    with pytest.raises(SystemExit) as caught:  # no second spelling by abbreviation either
        main(["--hel"])
    assert caught.value.code == 2
