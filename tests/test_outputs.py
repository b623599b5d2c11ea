# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Output of programs: planned names, whole or absent, only their own replaced, nothing left by killed runs."""

import itertools
import json
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipelines.shared import outputs
from pipelines.shared.outputs import (
    MARKER,
    OutputError,
    atomic_directory,
    atomic_file,
    claim_file,
    own_directory,
    plan_names,
    read_marker,
    remove_left_over,
)
from pipelines.shared.programs import ProgramError

ROOT = Path(__file__).resolve().parents[1]


def write_half(output, error):
    """Begin an output and fail."""
    with output as staging:
        (staging / "half" if staging.is_dir() else staging).write_text("half")
        raise error


def make(path, *files, program="mine", **options):
    with atomic_directory(path, program=program, **options) as staging:
        for name in files:
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            (staging / name).write_text("made")


def names_below(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# ----------------------------------------------------------------------------------------------------------- names


def plan(*paths, reserved=()):
    """Names of files as `reconstruct` asks for them: the stem, then the whole name."""
    candidates = {path: [Path(path).with_suffix("").name, Path(path).name] for path in paths}
    return plan_names(candidates, reserved)


def test_names_are_as_short_as_they_can_be():
    assert plan("a/photo.jpg", "b/other.png") == {"a/photo.jpg": "photo", "b/other.png": "other"}
    assert plan("a/photo.jpg", "b/photo.png") == {"a/photo.jpg": "photo.jpg", "b/photo.png": "photo.png"}


def test_names_are_unique_and_do_not_depend_on_the_order():
    paths = ["a/photo.jpg", "b/photo.jpg", "c/photo.jpg-2.png", "d/Photo.png", "e/photo.png", "f/sheet.png"]
    plans = [plan(*order, reserved=["sheet"]) for order in itertools.permutations(paths)]
    assert all(names == plans[0] for names in plans)
    assert len({name.casefold() for name in plans[0].values()}) == len(paths)
    assert plans[0]["c/photo.jpg-2.png"] == "photo.jpg-2"
    assert plans[0]["f/sheet.png"] == "sheet.png"


def test_no_result_lies_in_another_or_replaces_an_input():
    names = plan_names(
        {
            "/d/photo.png": ["photo", "photo.png"],
            "/d/photo/inner.png": ["photo/inner", "photo/inner.png"],
            "/d/plain.png": ["plain", "plain.png"],
        },
        ["photo.png", "photo/inner.png", "plain.png"],
    )
    assert names["/d/plain.png"] == "plain"
    assert names["/d/photo.png"].startswith("photo.png-")
    assert names["/d/photo/inner.png"].startswith("photo-inner.png-")


def test_long_names_and_bytes_that_are_not_text():
    long = "ü" * 125 + ".png"
    odd = os.fsdecode(b"\xff\xfe.png")
    names = plan_names({"/a/" + long: [long], "/b/" + long: [long], "/c": [odd, odd], "/d": ["x" * 256]})
    assert len(set(names.values())) == 4
    assert all(len(os.fsencode(name)) <= 255 for name in names.values())
    assert names["/c"] == odd


@pytest.mark.parametrize("suffixes", [("",), (".gpst", ".png", ".json")])
def test_random_plans_hold_no_clash(suffixes):
    """Few different parts, so that nearly every plan begins with clashes."""
    generator = random.Random(0)
    for _ in range(200):
        parts = ["a", "A", "b", "a.png", "b.png", "ä", "a\u0308"]
        chosen = {
            "/".join(generator.choices(parts, k=generator.randint(1, 3))) + generator.choice([".png", ".jpg"])
            for _ in range(12)
        }
        candidates = {"/" + path: [path.rpartition(".")[0], path] for path in chosen}
        reserved = ["a", "b/a.png"]
        names = plan_names(candidates, reserved, suffixes)
        files = [name + suffix for name in names.values() for suffix in suffixes]
        used = [outputs._comparable(name) for name in [*files, *reserved, MARKER]]
        for one, other in itertools.permutations(used, 2):
            assert one != other[: len(one)], (names, one, other)
        keys = list(candidates)
        generator.shuffle(keys)
        assert plan_names({key: candidates[key] for key in keys}, reserved, suffixes) == names


def test_names_leave_room_for_their_suffixes():
    long, marker = "x" * 250, MARKER.removesuffix(".json")
    suffixes = [".safetensors", ".json"]
    names = plan_names({"/a": [long, long + ".png"], "/b": [marker, "b"]}, suffixes=suffixes)
    assert len(names["/a"]) == 255 - len(".safetensors")
    assert names["/b"] == "b"


# --------------------------------------------------------------------------------------------- whole or absent


def test_atomic_directory_appears_whole(tmp_path):
    target = tmp_path / "deep" / "out"
    with atomic_directory(target, program="mine") as staging:
        (staging / "weights.bin").write_bytes(b"1")
        assert staging.name == "out"
        assert not target.exists()
        assert target.parent in staging.parents  # on one file system, so that the move is atomic
    assert sorted(path.name for path in target.iterdir()) == [MARKER, "weights.bin"]
    assert json.loads((target / MARKER).read_text()) == {"program": "mine", "format": 1, "files": ["weights.bin"]}
    assert list(target.parent.iterdir()) == [target]


def test_outputs_have_the_usual_permissions(tmp_path):
    usual = tmp_path / "usual"
    usual.mkdir()
    (usual / "file").touch()
    with atomic_directory(tmp_path / "out") as staging:
        save_file({"x": torch.zeros(1)}, staging / "x.safetensors")
    with atomic_file(tmp_path / "file.safetensors") as staging:
        save_file({"x": torch.zeros(1)}, staging)

    def mode(path):
        return stat.S_IMODE(path.stat().st_mode)

    assert mode(tmp_path / "out") == mode(usual)
    for path in (tmp_path / "out" / "x.safetensors", tmp_path / "file.safetensors", tmp_path / "out" / MARKER):
        assert mode(path) == mode(usual / "file")


@pytest.mark.parametrize("error", [RuntimeError("disk"), KeyboardInterrupt()])
@pytest.mark.parametrize("output", [atomic_directory, atomic_file])
def test_nothing_is_left_after_an_error(tmp_path, output, error):
    with pytest.raises(type(error)):
        write_half(output(tmp_path / "out"), error)
    assert list(tmp_path.iterdir()) == []


def test_atomic_file(tmp_path):
    target = tmp_path / "deep" / "out.png"
    with atomic_file(target) as staging:
        assert staging.name == "out.png"
        staging.write_text("first")
        assert not target.exists()
    assert target.read_text() == "first"
    with pytest.raises(RuntimeError, match="disk"):
        write_half(atomic_file(target), RuntimeError("disk"))
    assert target.read_text() == "first"
    assert list(target.parent.iterdir()) == [target]
    with atomic_file(target) as staging:
        staging.write_text("second")
    assert target.read_text() == "second"


def test_a_file_that_a_user_names_is_not_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of it")
    with (
        pytest.raises(ProgramError, match=r"thesis\.txt must not exist yet"),
        atomic_file(tmp_path / "thesis.txt", overwrite=False),
    ):
        pass
    with atomic_file(tmp_path / "new.txt", overwrite=False) as staging:
        staging.write_text("new")
    assert (tmp_path / "thesis.txt").read_text() == "years of it"
    assert names_below(tmp_path) == ["new.txt", "thesis.txt"]


def test_the_umask_is_left_alone(tmp_path):
    before = os.umask(0o027)
    try:
        with atomic_file(tmp_path / "file") as staging:
            staging.touch()
        assert os.umask(0o027) == 0o027
        assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640
    finally:
        os.umask(before)


@pytest.mark.parametrize("name", [os.fsdecode(b"\xff\xfe"), "two\nlines", "-dash", "x" * 255, "ü" * 127])
def test_any_name_that_a_file_may_have(tmp_path, name):
    make(tmp_path / name, "file")
    make(tmp_path / name, name, overwrite=True)
    assert read_marker(tmp_path / name).files == {name}
    with atomic_file(tmp_path / name / name) as staging:
        staging.write_text("again")
    assert (tmp_path / name / name).read_text() == "again"
    assert list(tmp_path.iterdir()) == [tmp_path / name]


# ------------------------------------------------------------------------------------------- only one's own replaced


def test_a_folder_is_replaced_only_when_asked(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    make(target, "first")  # an empty folder may be filled
    with pytest.raises(ProgramError, match="must not exist or be an empty folder, got one that is not empty"):
        make(target, "second")
    with pytest.raises(RuntimeError, match="disk"):
        write_half(atomic_directory(target, overwrite=True, program="mine"), RuntimeError("disk"))
    assert sorted(path.name for path in target.iterdir()) == [MARKER, "first"]
    make(target, "second", overwrite=True)
    assert sorted(path.name for path in target.iterdir()) == [MARKER, "second"]
    assert list(tmp_path.iterdir()) == [target]


MARKERS = {
    "none": None,
    "of another program": {"program": "other", "format": 1, "files": ["work"]},
    "of another format": {"program": "mine", "format": 2, "files": ["work"]},
    "without files": {"program": "mine", "format": 1},
    "of odd types": {"program": "mine", "format": 1, "files": [["work"]]},
    "a list": ["work"],
    "nested": "[" * 100_000,
    "not text": b"\xff\xfe",
}


@pytest.mark.parametrize("marker", MARKERS.values(), ids=MARKERS)
def test_a_folder_of_somebody_else_is_never_replaced(tmp_path, marker):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "work").write_text("years of it")
    if isinstance(marker, bytes | str):
        (tmp_path / "out" / MARKER).write_bytes(marker if isinstance(marker, bytes) else marker.encode())
    elif marker is not None:
        (tmp_path / "out" / MARKER).write_text(json.dumps(marker))
    before = names_below(tmp_path)
    with pytest.raises(ProgramError, match=r"must be written by mine to be replaced, got .* holds work"):
        make(tmp_path / "out", "new", overwrite=True)
    with (
        pytest.raises(ProgramError, match=r"must be new, empty or written by mine, got .* holds work"),
        own_directory(tmp_path / "out", "mine"),
    ):
        pass
    assert names_below(tmp_path) == before
    assert (tmp_path / "out" / "work").read_text() == "years of it"


@pytest.mark.parametrize("extra", ["notes.txt", "deep/notes.txt", "empty/", "link"])
def test_what_was_added_to_ones_own_folder_is_kept(tmp_path, extra):
    make(tmp_path / "out", "deep/result", "result")
    place = tmp_path / "out" / extra
    if extra == "link":
        place.symlink_to(tmp_path)
    elif extra.endswith("/"):
        place.mkdir()
    else:
        place.write_text("mine")
    before = names_below(tmp_path)
    with pytest.raises(ProgramError, match=f"also holds {extra}$"):
        make(tmp_path / "out", "new", overwrite=True)
    with (
        own_directory(tmp_path / "out", "mine") as folder,
        pytest.raises(ProgramError, match=f"also holds {extra}$"),
    ):
        folder.clear()
    assert names_below(tmp_path) == before


def test_empty_folders_of_ones_own_are_replaced(tmp_path):
    for number in range(2):
        with atomic_directory(tmp_path / "out", overwrite=True, program="mine") as staging:
            (staging / "logs" / str(number)).mkdir(parents=True)
    assert names_below(tmp_path) == ["out", f"out/{MARKER}", "out/logs", "out/logs/1"]


def test_what_is_added_while_the_new_folder_is_made_is_kept(tmp_path):
    make(tmp_path / "out", "result")
    with (
        pytest.raises(ProgramError, match="also holds late"),
        atomic_directory(tmp_path / "out", overwrite=True, program="mine"),
    ):
        (tmp_path / "out" / "late").write_text("mine")
    assert names_below(tmp_path) == ["out", f"out/{MARKER}", "out/late", "out/result"]


def test_a_file_is_not_replaced_by_a_folder(tmp_path):
    (tmp_path / "out").write_text("work")
    for overwrite in (False, True):
        with pytest.raises(ProgramError, match="got a file"):
            make(tmp_path / "out", "new", overwrite=overwrite)
    with pytest.raises(ProgramError, match="got a file"), own_directory(tmp_path / "out", "mine"):
        pass
    assert (tmp_path / "out").read_text() == "work"


def test_through_a_symbolic_link_the_folder_is_replaced_and_the_link_stays(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to("elsewhere")
    make(tmp_path / "out", "first")
    make(tmp_path / "out", "second", overwrite=True)
    assert (tmp_path / "out").is_symlink()
    assert sorted(path.name for path in (tmp_path / "elsewhere").iterdir()) == [MARKER, "second"]


def test_a_marker_cannot_lead_out_of_its_folder(tmp_path):
    (tmp_path / "work").write_text("years of it")
    (tmp_path / "out").mkdir()
    marker = {"program": "mine", "format": 1, "files": ["../work", str(tmp_path / "work"), "link/work", "result"]}
    (tmp_path / "out" / MARKER).write_text(json.dumps(marker))
    (tmp_path / "out" / "result").touch()
    (tmp_path / "out" / "link").symlink_to(tmp_path)
    with own_directory(tmp_path / "out", "mine") as folder:
        folder.remove()
    assert (tmp_path / "work").read_text() == "years of it"
    assert not (tmp_path / "out" / "result").exists()


def test_one_file_in_a_folder_of_other_things(tmp_path):
    path = tmp_path / "sheet.png"
    (tmp_path / "photo.png").write_text("work")
    claim_file(path, "mine")
    with atomic_file(path) as staging:
        staging.write_text("ours")
    claim_file(path, "mine")
    with pytest.raises(ProgramError, match="must not be another program's"):
        claim_file(path, "other")
    other = tmp_path / "other.png"
    other.write_text("work")
    with pytest.raises(ProgramError, match="must not exist or be written by mine"):
        claim_file(other, "mine")
    # The folder itself does not become the program's.
    with own_directory(tmp_path, "mine") as folder, pytest.raises(ProgramError, match=r"also holds photo\.png"):
        folder.clear()
    assert other.read_text() == (tmp_path / "photo.png").read_text() == "work"


# ------------------------------------------------------------------------------------------------ folders that grow


def test_a_full_disk_gives_back_what_a_growing_folder_was_to_replace(tmp_path):
    path = tmp_path / "out"

    def write(names, text):
        with own_directory(path, "mine") as folder:
            folder.clear()
            folder.expect(names)
            for name in names:
                with atomic_file(path / name) as staging:
                    staging.write_text(text)
            if text == "full":
                raise outputs.OutputError("cannot write: the disk is full")

    write(["a/1", "b"], "first")
    with pytest.raises(outputs.OutputError):
        write(["b", "c/2"], "full")
    assert names_below(path) == [MARKER, "a", "a/1", "b"]
    assert {(path / name).read_text() for name in ("a/1", "b")} == {"first"}
    assert outputs.read_marker(path).files == {"a/1", "b"}
    write(["b", "c/2"], "second")
    assert names_below(path) == [MARKER, "b", "c", "c/2"]
    assert outputs.read_marker(path).files == {"b", "c/2"}


def test_a_folder_that_grows(tmp_path):
    path = tmp_path / "out"
    with own_directory(path, "mine") as folder:
        folder.expect(["a/1", "b"])
        with atomic_file(path / "a" / "1") as staging:
            staging.touch()
    with own_directory(path, "mine") as folder:  # a second run adds to it
        folder.expect(["c"])
        assert folder.files == {"a/1", "b", "c"}
    assert names_below(path) == [MARKER, "a", "a/1"]
    with own_directory(path, "mine") as folder:
        folder.clear()
        assert names_below(path) != []
    assert names_below(path) == [MARKER]
    with own_directory(path, "mine") as folder:
        folder.remove()
    assert not path.exists()


def test_what_somebody_has_put_into_a_growing_folder_is_kept(tmp_path):
    with own_directory(tmp_path, "mine") as folder:
        folder.expect(["a"])
        (tmp_path / "a").touch()
    (tmp_path / "b").write_text("theirs")
    (tmp_path / "c").symlink_to("nowhere")
    for name in "bc":
        with own_directory(tmp_path, "mine") as folder:
            with pytest.raises(ProgramError, match=f"{name} must not exist or be written by mine"):
                folder.expect(["a", name])
            assert folder.files == {"a"}
    assert (tmp_path / "b").read_text() == "theirs"


def test_a_folder_that_another_program_has_left_empty_may_be_taken(tmp_path):
    marker = {"program": "other", "format": 1, "files": ["work"]}
    (tmp_path / MARKER).write_text(json.dumps(marker))
    with own_directory(tmp_path, "mine") as folder:
        folder.expect(["result"])
        assert folder.files == {"result"}


def test_a_new_folder_goes_when_nothing_was_written(tmp_path):
    with pytest.raises(KeyError), own_directory(tmp_path / "new", "mine"):
        raise KeyError("before any output")
    assert names_below(tmp_path) == []
    (tmp_path / "empty").mkdir()  # the user's own stays
    with pytest.raises(KeyError), own_directory(tmp_path / "empty", "mine"):
        raise KeyError("before any output")
    assert (tmp_path / "empty").exists()


# ------------------------------------------------------------------------------------------- two runs, killed runs


OUTPUTS = {"folder": atomic_directory, "file": atomic_file, "own": lambda path: own_directory(path, "mine")}


@pytest.mark.parametrize("output", OUTPUTS.values(), ids=OUTPUTS)
def test_the_second_of_two_runs_refuses(tmp_path, output):
    path = tmp_path / "out"
    with output(path) as first:
        if isinstance(first, Path):
            (first / "file" if first.is_dir() else first).write_text("first")
        with pytest.raises(ProgramError, match=f"^{path} is being written by another run"), output(path):
            pass
        with output(tmp_path / "other") as other:  # another output does not get in the way
            if output is atomic_file:
                other.touch()
    assert not list(tmp_path.rglob(outputs.STAGING_PREFIX + "*"))


PROGRAM = """
import sys, time
from pathlib import Path
from pipelines.shared.outputs import atomic_directory, atomic_file, own_directory
kind, path = sys.argv[1], Path(sys.argv[2])
def wait(file):
    file.write_text("half")
    print("ready", flush=True)
    time.sleep(60)
if kind == "folder":
    with atomic_directory(path, overwrite=True, program="mine") as staging:
        wait(staging / "half")
elif kind == "file":
    with atomic_file(path) as staging:
        wait(staging)
else:
    with own_directory(path, "mine") as folder:
        folder.expect(["half"])
        wait(path / "half")
"""


def start(tmp_path, kind, path, program=PROGRAM):
    (tmp_path / "program.py").write_text(program)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    command = [sys.executable, tmp_path / "program.py", kind, path]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("kind", ["folder", "file", "own"])
def test_leftovers_of_a_killed_run_are_removed_by_the_next(tmp_path, kind):
    path = tmp_path / "there" / "out"
    with start(tmp_path, kind, path) as process:
        (tmp_path / "there" / ".gpstoken-mine").mkdir(exist_ok=True)
        (tmp_path / "there" / ".gpstoken-mine" / "work").touch()
        (tmp_path / "there" / ".out.abc123").mkdir()
        # It lives, so nothing of it is removed.
        output = OUTPUTS[kind]
        with pytest.raises(ProgramError, match="is being written by another run"), output(path):
            pass
        assert list((tmp_path / "there").rglob("half")) or kind == "file"
        process.kill()
    leftover = [path for path in (tmp_path / "there").rglob(".gpstoken-*") if path.name != ".gpstoken-mine"]
    assert len(leftover) == 1
    if kind == "own":
        with own_directory(path, "mine") as folder:
            folder.clear()
    else:
        with output(path) as staging:
            (staging / "whole" if kind == "folder" else staging).write_text("whole")
    assert not leftover[0].exists()
    assert not list((tmp_path / "there").rglob("half"))
    assert (tmp_path / "there" / ".gpstoken-mine" / "work").exists()
    assert (tmp_path / "there" / ".out.abc123").exists()


def test_the_next_run_removes_leftovers_of_results_that_it_does_not_write_again(tmp_path):
    """A run can be killed after its result is in place and before its staging folder is gone."""
    with own_directory(tmp_path / "out", "mine") as folder:
        folder.expect(["first", "a/photo", "a/old/result"])
        (folder.path / "first").touch()
    with start(tmp_path, "file", tmp_path / "out" / "a" / "photo") as process:
        staging = next((tmp_path / "out" / "a").iterdir())
        with own_directory(tmp_path / "out", "mine"):
            assert staging.exists()  # its run lives
        process.kill()
    # Another was killed between the two moves that replace a folder.
    with atomic_file(tmp_path / "out" / "a" / "old") as other:
        other.touch()
        place = other.parent.parent
    (tmp_path / "out" / "a" / "old").unlink()
    (place / "old").mkdir(parents=True)
    (place / "old" / "result").touch()
    (place / MARKER).write_text(json.dumps({"staging_of": "old", "format": 1}))
    with own_directory(tmp_path / "out", "mine"):
        assert not staging.exists()
        assert names_below(tmp_path / "out" / "a") == ["old", "old/result"]


def test_leftovers_beside_a_whole_result_are_removed(tmp_path):
    with start(tmp_path, "folder", tmp_path / "out") as process:
        remove_left_over(tmp_path / "out")
        assert list(tmp_path.glob(".gpstoken-*"))
        process.kill()
    (tmp_path / ".gpstoken-mine").mkdir()
    remove_left_over(tmp_path / "out")
    assert [path.name for path in tmp_path.glob(".gpstoken-*")] == [".gpstoken-mine"]


def test_something_else_with_the_name_of_a_staging_folder_is_not_removed(tmp_path):
    with atomic_file(tmp_path / "out") as staging:
        staging.touch()
        place = staging.parent.parent
    (tmp_path / "out").unlink()
    for content in ("new", "work"):
        (place / content).mkdir(parents=True)
        output = atomic_file(tmp_path / "out")
        with pytest.raises(ProgramError, match="must not exist or be left by a killed run"), output:
            pass
        assert (place / content).exists()
        shutil.rmtree(place)


@pytest.mark.parametrize("moment", ["moved away", "in place", "at the marker", "empty"])
def test_a_run_killed_while_it_replaces_a_folder_loses_nothing(tmp_path, moment):
    target = tmp_path / "out"
    make(target, "result")
    with atomic_directory(target, overwrite=True, program="mine") as staging:
        (staging / "result").touch()
        place = staging.parent.parent
    # What SIGKILL leaves at each moment, put together by hand.
    place.mkdir()
    if moment == "moved away":
        (place / MARKER).write_text(json.dumps({"staging_of": "out", "format": 1}))
        (place / "new").mkdir()
        target.rename(place / "old")
    elif moment == "in place":
        (place / MARKER).write_text(json.dumps({"staging_of": "out", "format": 1}))
        shutil.copytree(target, place / "old")
    elif moment == "at the marker":
        (place / MARKER).write_text('{"stag')
    with pytest.raises(ProgramError, match="got one that is not empty"):  # put back where it was missing
        make(target, "new")
    assert names_below(tmp_path) == ["out", f"out/{MARKER}", "out/result"]
    make(target, "new", overwrite=True)
    assert names_below(tmp_path) == ["out", f"out/{MARKER}", "out/new"]


LOOP = """
import sys
from pathlib import Path
from pipelines.shared.outputs import atomic_directory, atomic_file, own_directory
kind, path = sys.argv[1], Path(sys.argv[2])
print("ready", flush=True)
while True:
    with atomic_directory(path / "folder", overwrite=True, program="mine") as staging:
        for name in "abc":
            (staging / name).write_text(name)
    with atomic_file(path / "file") as staging:
        staging.write_text("whole")
    with own_directory(path / "own", "mine") as folder:
        folder.clear()
        folder.expect(["x/1", "x/2"])
        for name in ("x/1", "x/2"):
            with atomic_file(path / "own" / name) as staging:
                staging.write_text("whole")
"""


def test_killed_at_any_moment(tmp_path):
    """Thirty kills: what is there is whole, the next run cleans up, and a foreign file beside stays."""
    path = tmp_path / "there"
    path.mkdir()
    (path / "work").write_text("years of it")
    generator = random.Random(0)
    for _ in range(30):
        with start(tmp_path, "-", path, LOOP) as process:
            time.sleep(generator.uniform(0, 0.05))
            process.send_signal(signal.SIGKILL)
        if (path / "folder").exists():
            assert sorted(entry.name for entry in (path / "folder").iterdir()) == [MARKER, "a", "b", "c"]
            assert all((path / "folder" / name).read_text() == name for name in "abc")
        for file in (path / "file", path / "own" / "x" / "1", path / "own" / "x" / "2"):
            assert not file.exists() or file.read_text() == "whole"
    with atomic_directory(path / "folder", overwrite=True, program="mine"):
        pass
    with atomic_file(path / "file") as staging:
        staging.write_text("whole")
    with own_directory(path / "own", "mine") as folder:
        folder.clear()
    assert names_below(path) == ["file", "folder", f"folder/{MARKER}", "own", f"own/{MARKER}", "work"]


# -------------------------------------------------------------------------------------------- full and read-only disks


FULL = """
import resource, sys
from pathlib import Path
from pipelines.shared.outputs import atomic_directory, atomic_file
from pipelines.shared.programs import run_program
import PIL.Image, torch
from safetensors.torch import save_file

def main(argv):
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    kind, path = argv
    if kind == "safetensors":
        with atomic_directory(path) as staging:
            save_file({"x": torch.zeros(200_000)}, staging / "x.safetensors")
    if kind == "image":
        with atomic_file(path + ".bmp") as staging:
            PIL.Image.new("RGB", (500, 500)).save(staging)
    if kind == "text":
        with atomic_file(path) as staging:
            staging.write_text("x" * 200_000)

sys.exit(run_program(main, sys.argv[1:]))
"""


@pytest.mark.parametrize("kind", ["safetensors", "image", "text"])
def test_a_full_disk_is_one_line(tmp_path, kind):
    """A limit on the size of files stands for a full disk: the system refuses to write in the same way."""
    (tmp_path / "program.py").write_text(FULL)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    (tmp_path / "there").mkdir()
    command = [sys.executable, tmp_path / "program.py", kind, tmp_path / "there" / "out"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"error: cannot write {tmp_path}/there/out")
    assert result.stderr.endswith(": File too large\n")
    assert list((tmp_path / "there").iterdir()) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 100_000


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes the rights of the superuser")
@pytest.mark.parametrize("size", ["4k", "64k"])
def test_a_really_full_disk_is_one_line(tmp_path, size):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        for output in (atomic_directory, atomic_file):
            full = pytest.raises(OutputError, match=r"^cannot write .*: No space left on device$")
            with full, output(disk / "out") as staging:
                save_file({"x": torch.zeros(200_000)}, staging / "x" if staging.is_dir() else staging)
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_read_only_output_is_one_line():
    """In a folder that everybody may enter and nobody write to; the superuser steps down for it."""
    place = Path(tempfile.mkdtemp(dir="/tmp"))
    place.chmod(0o555)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)
        for output in (
            atomic_directory(place / "out"),
            atomic_directory(place / "deep" / "out"),
            atomic_file(place / "out"),
            own_directory(place / "out", "mine"),
        ):
            with pytest.raises(OutputError, match=rf"^cannot write {place}/(deep/)?out: Permission denied$"), output:
                pass
    finally:
        os.seteuid(user)
        shutil.rmtree(place)
