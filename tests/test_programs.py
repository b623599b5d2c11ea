# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""What programs share: their options, one-line errors, argument types, finding photographs and models."""

import argparse
import ast
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from pipelines.shared.checkpoints import find_checkpoint, quiet_loading, weights_fingerprint
from pipelines.shared.outputs import MARKER
from pipelines.shared.photographs import find_photographs
from pipelines.shared.programs import (
    ProgramError,
    non_negative_float,
    non_negative_int,
    one_line,
    pixel_box,
    positive_float,
    positive_int,
    printable,
    run_program,
)

PIPELINES = Path(__file__).resolve().parents[1] / "pipelines"
PROGRAMS = sorted(path.stem for path in PIPELINES.glob("*.py") if "\ndef main(" in path.read_text())


def fail_with(error):
    def main(argv):
        raise error

    return main


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_program_imports_another(name):
    tree = ast.parse((PIPELINES / f"{name}.py").read_text())
    modules = {
        f"pipelines.{node.module}" if node.level else node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module
    }
    modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    for module in modules:
        if module.split(".")[0] in ("pipelines", "conversion", "training"):
            path = PIPELINES.parent / f"{module.replace('.', '/')}.py"
            assert path.exists(), f"{module} must be imported as a module"
            assert "\ndef main(" not in path.read_text(), module


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


@pytest.mark.parametrize("error", [RuntimeError("a\nb"), MemoryError("a b"), KeyError("a b")])
def test_an_error_not_written_for_users_has_its_kind_in_front(error):
    assert one_line(error).startswith(f"{type(error).__name__}: ")
    assert "\n" not in one_line(error)


def test_errors_of_the_libraries_that_write_and_read_are_input_errors(capsys):
    assert run_program(fail_with(SafetensorError("header too small"))) == 2
    assert capsys.readouterr().err == "error: header too small\n"


def test_anything_can_be_printed():
    assert printable(Path("a b/ü.png")) == "a b/ü.png"
    assert printable("two\nlines\x1b[31m\u202e") == r"two\nlines\x1b[31m\u202e"
    assert printable(os.fsdecode(b"caf\xe9")) == r"caf\udce9"


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
        with pytest.raises(argparse.ArgumentTypeError, match=f"must be .*, got {text!r}"):
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


def test_boxes():
    assert pixel_box("1,2,3,4") == (1, 2, 3, 4)
    for text in ("1,2,3", "1,2,3,x", "3,2,1,4", "-1,0,1,1", ""):
        with pytest.raises(argparse.ArgumentTypeError, match=f"got {text!r}"):
            pixel_box(text)


# ------------------------------------------------------------------------------------------------------ checkpoints


def test_where_checkpoints_are_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint("owner/name", "--model") == "owner/name"
    assert Path(find_checkpoint("gpstoken-nano", "--model")).is_dir()
    for name in ("nowhere", "a/b/c", "", "./nowhere"):
        with pytest.raises(ProgramError, match=r"--model must be a folder, .* or one of .*gpstoken-nano, got"):
            find_checkpoint(name, "--model")
    (tmp_path / "gpstoken-nano").mkdir()
    assert find_checkpoint("gpstoken-nano", "--model") == "gpstoken-nano"


def test_loading_is_quiet_and_then_as_before():
    import diffusers
    import transformers

    modules = (diffusers.utils.logging, transformers.utils.logging)
    before = [(module.get_verbosity(), module.is_progress_bar_enabled()) for module in modules]
    with quiet_loading():
        assert not any(module.is_progress_bar_enabled() for module in modules)
    assert [(module.get_verbosity(), module.is_progress_bar_enabled()) for module in modules] == before


def test_a_fingerprint_is_that_of_every_weight():
    def module(fill=0.0, dtype=torch.float32):
        module = torch.nn.BatchNorm1d(3)  # with a buffer of no dimension
        torch.nn.init.constant_(module.bias, fill)
        return module.to(dtype)

    modules = [module(), module(1e-30), module(dtype=torch.bfloat16), torch.nn.Linear(3, 1)]
    prints = [weights_fingerprint(one) for one in modules]
    prints += [weights_fingerprint(module(), None), weights_fingerprint(None, module())]
    assert weights_fingerprint(module()) == prints[0] == prints[4]
    assert len(set(prints)) == len(prints) - 1
    swapped = module()
    with torch.no_grad():  # the same sums
        swapped.weight.copy_(torch.tensor([0.0, 1.0, 2.0]))
        one = weights_fingerprint(swapped)
        swapped.weight.copy_(torch.tensor([2.0, 1.0, 0.0]))
    assert weights_fingerprint(swapped) != one


FINGERPRINT = """
import resource, torch
from pipelines.shared.checkpoints import weights_fingerprint
model = torch.nn.Linear(10_000, 10_000, bias=False)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
weights_fingerprint(model)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_fingerprint_copies_no_weights():
    environment = {**os.environ, "PYTHONPATH": f"{PIPELINES.parent / 'src'}:{PIPELINES.parent}"}
    result = subprocess.run([sys.executable, "-c", FINGERPRINT], env=environment, capture_output=True, text=True)
    assert int(result.stdout) < 40_000, result.stderr  # kilobytes; the weights are 400 MB


# ------------------------------------------------------------------------------------------------------ photographs


def test_photographs_are_found_by_what_can_be_read(tmp_path):
    for name in ("b.PNG", "a.jpg", "sub/c.webp", "notes.txt", "print.pdf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    found = find_photographs([tmp_path, tmp_path / "notes.txt"])
    assert [name.as_posix() for _, name in found] == ["a.jpg", "b.PNG", "sub/c.webp", "notes.txt"]
    with pytest.raises(ProgramError, match=r"the folder .*/folder\.png must hold images, got none"):
        find_photographs([tmp_path / "folder.png"])
    (tmp_path / "out/deep").mkdir(parents=True)
    for name in ("mine.png", "deep/mine.png", "deep/theirs.png"):
        (tmp_path / "out" / name).touch()
    marker = {"program": "mine", "format": 1, "files": ["mine.png", "deep/mine.png"]}
    (tmp_path / "out" / MARKER).write_text(json.dumps(marker))
    assert [name.as_posix() for _, name in find_photographs([tmp_path])][2:] == ["out/deep/theirs.png", "sub/c.webp"]
    os.mkfifo(tmp_path / "pipe.png")  # reading it would wait for ever
    with pytest.raises(ProgramError, match="must be an image file or a folder, got no such file"):
        find_photographs([tmp_path / "pipe.png"])
