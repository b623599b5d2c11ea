# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""What programs share: one-line errors, and output that is whole or absent."""

import argparse
import importlib
import os
import re
import stat
from pathlib import Path

import pytest

from pipelines.shared.programs import (
    ProgramError,
    atomic_directory,
    atomic_file,
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


def write_half(output, error):
    """Begin an output and fail."""
    with output as staging:
        (staging / "half" if staging.is_dir() else staging).write_text("half")
        raise error


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


def test_atomic_directory_appears_whole(tmp_path):
    target = tmp_path / "deep" / "out"
    with atomic_directory(target) as staging:
        (staging / "weights.bin").write_bytes(b"1")
        assert not target.exists()
        assert staging.parent == target.parent  # on one file system, so that the move is atomic
    assert sorted(path.name for path in target.iterdir()) == ["weights.bin"]
    assert list(target.parent.iterdir()) == [target]


def test_atomic_directory_has_the_usual_permissions(tmp_path):
    usual = tmp_path / "usual"
    usual.mkdir()
    with atomic_directory(tmp_path / "out"):
        pass
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == stat.S_IMODE(usual.stat().st_mode)


def test_atomic_directory_leaves_nothing_after_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="disk"):
        write_half(atomic_directory(tmp_path / "out"), RuntimeError("disk"))
    assert list(tmp_path.iterdir()) == []


def test_atomic_directory_leaves_nothing_after_an_interruption(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write_half(atomic_directory(tmp_path / "out"), KeyboardInterrupt())
    assert list(tmp_path.iterdir()) == []


def test_atomic_directory_does_not_overwrite_unless_asked(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    with atomic_directory(target) as staging:  # an empty folder may be filled
        (staging / "first").touch()
    with pytest.raises(ValueError, match="must not exist or be an empty folder; it exists and is not empty"):
        atomic_directory(target).__enter__()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="must not exist or be an empty folder"):
        atomic_directory(tmp_path / "file").__enter__()
    with pytest.raises(RuntimeError, match="disk"):
        write_half(atomic_directory(target, overwrite=True), RuntimeError("disk"))
    assert [path.name for path in target.iterdir()] == ["first"]
    with atomic_directory(target, overwrite=True) as staging:
        (staging / "second").touch()
    assert [path.name for path in target.iterdir()] == ["second"]


def test_atomic_directory_replaces_a_file_when_asked(tmp_path):
    target = tmp_path / "out"
    target.write_text("old")
    with atomic_directory(target, overwrite=True) as staging:
        (staging / "new").touch()
    assert [path.name for path in target.iterdir()] == ["new"]


def test_atomic_file(tmp_path):
    target = tmp_path / "deep" / "out.png"
    with atomic_file(target) as staging:
        assert staging.suffix == ".png"
        staging.write_text("first")
        assert not target.exists()
    assert target.read_text() == "first"
    usual = tmp_path / "usual"
    usual.touch()
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE(usual.stat().st_mode)
    with pytest.raises(RuntimeError, match="disk"):
        write_half(atomic_file(target), RuntimeError("disk"))
    assert target.read_text() == "first"
    assert list(target.parent.iterdir()) == [target]
    with atomic_file(target) as staging:
        staging.write_text("second")
    assert target.read_text() == "second"


def test_the_umask_is_left_alone(tmp_path):
    before = os.umask(0o027)
    try:
        with atomic_file(tmp_path / "file") as staging:
            staging.touch()
        assert os.umask(0o027) == 0o027
        assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640
    finally:
        os.umask(before)


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
