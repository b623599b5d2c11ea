# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""The layout bank's conversion: the authors' pickle in, the same numbers out, and nothing of a hostile pickle runs."""

import os
import pickle
import pickletools
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from conversion import convert_layout_bank
from conversion.array_pickle import PickleRefusedError, load_array_pickle
from gpstoken_hf.layout_bank import GaussianLayoutBank
from pipelines.shared.programs import run_program

# What arrays pickle themselves with.
RECONSTRUCT = np.empty(0).__reduce__()[0]
SHARED_GOLDEN = Path(__file__).parents[2] / "shared" / "golden"


def run(*argv):
    return run_program(convert_layout_bank.main, [str(argument) for argument in argv])


@pytest.fixture
def content():
    """Two classes in the authors' format: more columns than the Gaussian, layouts of two lengths."""
    random = np.random.default_rng(0)

    def layout(num_tokens):
        values = random.uniform(0.05, 0.9, size=(num_tokens, 9)).astype(np.float32)
        values[:, 5:] = random.normal(size=(num_tokens, 4))
        return values

    return {0: [layout(16), layout(16)], 3: [layout(12)]}


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_reads_what_numpy_writes(tmp_path, protocol):
    written = {
        np.int64(3): [np.arange(12.0).reshape(3, 4), np.asfortranarray(np.arange(12, dtype="f4").reshape(3, 4))],
        5: (np.arange(3, dtype=">i4"), np.float64(0.5), np.arange(10.0).reshape(5, 2)[:, ::-1], np.zeros((0, 5))),
        "text": [None, True, 2**70, b"bytes", np.float16(1.5), {"empty": ()}],
    }
    (tmp_path / "file.pickle").write_bytes(pickle.dumps(written, protocol))
    read = load_array_pickle(tmp_path / "file.pickle")
    assert list(read) == [3, 5, "text"]
    assert read["text"] == [None, True, 2**70, b"bytes", 1.5, {"empty": ()}]
    for key in (3, 5):
        for got, expected in zip(read[key], written[key], strict=True):
            assert np.array_equal(got, expected)
            assert np.asarray(got).dtype == np.asarray(expected).dtype


def test_converts_verifies_and_reverses(tmp_path, content, capsys):
    source = tmp_path / "initg.pickle"
    source.write_bytes(pickle.dumps(content, 4))
    assert run(source, "--output", tmp_path / "bank", "--verify") == 0
    printed = capsys.readouterr().out
    assert "largest error against initg.pickle: 0" in printed
    assert "3 layouts of 2 classes (1 to 2 per class), tokens per layout [12, 16]" in printed
    bank = GaussianLayoutBank.from_pretrained(tmp_path / "bank")
    for label, layouts in bank.layouts_by_class().items():
        for layout, array in zip(layouts, content[label], strict=True):
            assert np.array_equal(layout.numpy(), array[:, :5])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bank", "initg.pickle"]
    assert "converted from `initg.pickle`" in (tmp_path / "bank" / "README.md").read_text()

    assert run(tmp_path / "bank", "--output", tmp_path / "back.pickle", "--reverse", "--verify") == 0
    # What we write, pickle itself reads.
    back = pickle.loads((tmp_path / "back.pickle").read_bytes())
    assert back.keys() == content.keys()
    for label, arrays in content.items():
        for got, expected in zip(back[label], arrays, strict=True):
            assert got.dtype == np.float32
            assert np.array_equal(got, expected[:, :5])


@pytest.mark.skipif(not SHARED_GOLDEN.is_dir(), reason="the larger golden set is not here")
def test_golden_pickle(tmp_path):
    assert run(SHARED_GOLDEN / "initg_tiny.pickle", "--output", tmp_path / "bank", "--verify") == 0
    stored = GaussianLayoutBank.from_pretrained(tmp_path / "bank").layouts_by_class()
    for name, array in load_file(SHARED_GOLDEN / "initg_tiny.safetensors").items():
        _, label, index = name.split("_")
        assert np.array_equal(stored[int(label)][int(index)].numpy(), array[:, :5])


class Hostile:
    """Pickles as a call of `function` with `arguments`."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


class HostileState:
    """Pickles as an array's constructor whose BUILD state is code."""

    def __init__(self, state):
        self.state = state

    def __reduce__(self):
        return RECONSTRUCT, (np.ndarray, (0,), b"b"), self.state


def handmade(*parts):
    return b"".join([b"\x80\x04", *parts, b"."])


def text(value):
    return b"\x8c" + bytes([len(value)]) + value.encode()


def ask(module, name):
    return text(module) + text(name) + b"\x93"


ARRAY = ask("numpy._core.multiarray", "_reconstruct") + ask("numpy", "ndarray") + b"K\x00\x85C\x01b\x87R"
FLOAT32 = ask("numpy", "dtype") + text("f4") + b"\x89\x88\x87R(K\x03" + text("<") + b"NNNK\x00K\x00K\x00tb"


def array_of(shape, raw):
    """An array whose pickle claims `shape` and carries `raw`."""
    sizes = b"".join(b"\x8a\x08" + struct.pack("<q", size) for size in shape)
    return ARRAY + b"(K\x01(" + sizes + b"t" + FLOAT32 + b"\x89B" + struct.pack("<I", len(raw)) + raw + b"tb"


def hostile_pickles(marker):
    """Files that would make the file `marker`, take the memory, or crash the interpreter, if pickle read them."""
    touch = f"touch {marker}"
    protocol_2 = pickle.dumps(Hostile(os.system, touch), 2)
    nested = b")" + b"\x85" * 100_000  # tuples in each other, deep enough to crash a recursive hash
    laughs = b"".join(b"](" + b"h%c" % i * 12 + b"e\x940" for i in range(12))  # 12 ** 12 lists
    return {
        "os.system": (pickle.dumps({0: [Hostile(os.system, touch)]}), "system"),
        "os.system, protocol 0": (pickle.dumps(Hostile(os.system, touch), 0), "asks for 'posix.system'"),
        "os.system, protocol 2": (protocol_2, "asks for 'posix.system'"),
        "subprocess": (pickle.dumps({0: [Hostile(subprocess.call, ["touch", str(marker)])]}), "subprocess.call"),
        "builtins.eval": (pickle.dumps(Hostile(eval, f"open({str(marker)!r}, 'w')")), "builtins.eval"),
        "builtins.getattr": (pickle.dumps(Hostile(getattr, "", "join")), "builtins.getattr"),
        "numpy.save": (pickle.dumps(Hostile(np.save, str(marker), np.zeros(1))), "numpy.save"),
        "numpy.fromfile": (handmade(ask("numpy", "fromfile") + text("/etc/hostname") + b"\x85R"), "numpy.fromfile"),
        "name with dots": (handmade(ask("numpy", "ndarray.tofile")), "ndarray.tofile"),
        "ndarray called": (handmade(ask("numpy", "ndarray") + b"K\x05\x85R"), "calls numpy.ndarray"),
        "ndarray made": (handmade(ask("numpy", "ndarray") + b"K\x05\x85\x81"), "NEWOBJ"),
        "extension registry": (handmade(b"\x82\x01"), "EXT1"),
        "persistent id": (handmade(b"Pid\n"), "PERSID"),
        "inst": (b"(" + f"S'{touch}'\n".encode() + b"ios\nsystem\n.", "not allowed"),
        "state of a name": (
            handmade(ask("numpy", "ndarray") + b"}" + text("x") + b"K\x01sb"),
            "state of numpy.ndarray",
        ),
        "array state that is code": (pickle.dumps(HostileState(Hostile(os.system, touch))), "system"),
        "object array": (pickle.dumps({0: [np.array([Hostile(os.system, touch)], dtype=object)]}), "'O8'"),
        "record array": (pickle.dumps({0: [np.zeros(2, dtype=[("a", "f4")])]}), "'V4'"),
        "shape bomb": (handmade(array_of((2**31, 2**31), b"")), "needs 18446744073709551616 bytes, the file holds 0"),
        "negative shape": (handmade(array_of((-1, 4), b"")), "shape"),
        "length bomb": (handmade(b"\x8e" + struct.pack("<Q", 2**62) + b"x"), "truncated"),
        "memo bomb": (handmade(b"]r" + struct.pack("<I", 2**31 - 1) + b"j" + struct.pack("<I", 2**30)), "recalls"),
        "repeated bytes": (
            handmade(array_of((25000,), bytes(100_000))[:-2] + b"t\x940" + b"(" + (ARRAY + b"h\x00b") * 200 + b"t"),
            "repeat each other's bytes",
        ),
        "billion laughs": (handmade(b"]\x940" + laughs + b"h\x0c"), "hold each other or are nested"),
        "list in itself": (handmade(b"]\x94h\x00a"), "hold each other or are nested"),
        "nested tuples": (handmade(nested), "nested"),
        "nested tuples as a key": (handmade(b"}" + nested + b"Ns"), "keys must be numbers or strings"),
        "set": (pickle.dumps({1, 2}), "not allowed"),
        "stack underflow": (handmade(b"\x85"), "damaged"),
        "mark as a value": (handmade(b"("), "a mark where a value should be"),
        "two objects": (handmade(b"NN"), "leaves 2 objects"),
        "trailing bytes": (pickle.dumps({}) + protocol_2, "bytes follow its end"),
        "array without contents": (handmade(ARRAY), "without contents"),
        "empty file": (b"", "damaged or truncated"),
        "no pickle": (b"\x89PNG\r\n\x1a\n", "not allowed"),
    }


HOSTILE_NAMES = sorted(hostile_pickles("marker"))


def test_the_hostile_pickles_are_hostile(tmp_path):
    """pickle itself runs the first of them: the test below would notice."""
    marker = tmp_path / "marker"
    pickle.loads(hostile_pickles(marker)["os.system"][0])
    assert marker.exists()


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_hostile_pickles_are_refused_and_nothing_runs(tmp_path, capsys, name):
    marker = tmp_path / "marker"
    data, message = hostile_pickles(marker)[name]
    (tmp_path / "initg.pickle").write_bytes(data)
    with pytest.raises(PickleRefusedError, match=message):
        load_array_pickle(tmp_path / "initg.pickle")
    assert run(tmp_path / "initg.pickle", "--output", tmp_path / "bank") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not marker.exists()
    # No output, whole or partial, and nothing else either.
    assert [path.name for path in tmp_path.iterdir()] == ["initg.pickle"]


def test_every_cut_of_a_good_pickle_is_refused(tmp_path, content):
    data = pickle.dumps(content, 4)
    for size in range(0, len(data), 61):
        (tmp_path / "initg.pickle").write_bytes(data[:size])
        with pytest.raises(PickleRefusedError):
            load_array_pickle(tmp_path / "initg.pickle")


def test_random_damage_raises_nothing_else(tmp_path, content):
    """Bytes changed at random: read as something, or refused, but no other exception."""
    data = bytearray(pickle.dumps({0: [content[3][0][:2]]}, 4))
    random = np.random.default_rng(1)
    refused = 0
    for _ in range(400):
        damaged = data.copy()
        damaged[int(random.integers(len(data)))] = int(random.integers(256))
        (tmp_path / "initg.pickle").write_bytes(damaged)
        try:
            load_array_pickle(tmp_path / "initg.pickle")
        except PickleRefusedError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "must hold a dict of class id -> layouts, got a list"),
        ({}, "must hold a dict"),
        ({"a": []}, "class ids must be integers, got 'a'"),
        ({True: []}, "class ids must be integers, got True"),
        ({0: 5}, "class 0 must have a list of arrays, got a int"),
        ({0: [np.zeros((4, 4), "f4")]}, "at least 5 columns, got 4"),
        ({0: [np.zeros((4, 5), "i4")]}, "must be a float array"),
        ({0: [np.zeros(5, "f4")]}, r"shape \(5,\)"),
        ({0: [np.full((4, 5), np.nan, "f4")]}, "must be finite"),
        ({0: [np.full((4, 5), 0.5), np.full((4, 5), 1.5)]}, "layout 1 of class 0 must have 0 < sigma < 1"),
        ({0: []}, "at least one layout"),
    ],
)
def test_other_contents_are_refused(tmp_path, capsys, content, message):
    (tmp_path / "initg.pickle").write_bytes(pickle.dumps(content, 4))
    assert run(tmp_path / "initg.pickle", "--output", tmp_path / "bank") == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    with pytest.raises(ValueError, match=message):
        raise ValueError(captured.err)
    assert not (tmp_path / "bank").exists()


def test_output_that_exists_is_left_alone(tmp_path, content, capsys):
    (tmp_path / "initg.pickle").write_bytes(pickle.dumps(content, 4))
    (tmp_path / "bank").mkdir()
    (tmp_path / "bank" / "mine.txt").write_text("mine")
    assert run(tmp_path / "initg.pickle", "--output", tmp_path / "bank") == 2
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "bank").iterdir()] == ["mine.txt"]
    assert run(tmp_path / "missing.pickle", "--output", tmp_path / "other") == 2
    assert run(tmp_path / "missing_bank", "--output", tmp_path / "back.pickle", "--reverse") == 2


def test_float64_layouts_are_rounded_once(tmp_path):
    layout = np.full((2, 5), 1 / 3)
    (tmp_path / "initg.pickle").write_bytes(pickle.dumps({0: [layout]}, 4))
    layouts = convert_layout_bank.read_layouts(tmp_path / "initg.pickle")
    assert torch.equal(layouts[0][0], torch.full((2, 5), 1 / 3))


def test_the_opcode_table_is_that_of_python():
    """Every instruction the reader knows exists, and those that run code by other ways are not among them."""
    from conversion.array_pickle import _HANDLERS

    names = {opcode.name for opcode in pickletools.opcodes}
    assert _HANDLERS.keys() <= names
    assert not _HANDLERS.keys() & {"INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID"}
