# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Checkpoint files that claim more than they hold, and conversions that are stopped in the middle."""

import io
import json
import os
import pickle
import signal
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch
from conversion_helpers import GOLDEN
from safetensors.torch import save_file

from conversion.checkpoints import PlannedTensor, open_checkpoint, save_tensors

ROOT = Path(__file__).parents[1]


def torch_file(content, **options):
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def rewritten(data, compression=zipfile.ZIP_STORED, extra=None, edit=lambda name, content: content):
    """The torch archive `data` with its entries edited, compressed, or joined by another one."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w", compression) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, edit(entry.filename, old.read(entry)))
        if extra:
            new.writestr(*extra)
    return file.getvalue()


def with_pickle(data):
    """A torch archive whose pickle is `data`."""
    good = torch_file({"a": torch.zeros(2)})
    return rewritten(good, edit=lambda name, content: data if name.endswith("data.pkl") else content)


def with_numel(claimed):
    """A tensor of 77 numbers whose storage and shape claim to hold `claimed`."""
    good = torch_file({"a": torch.zeros(77)})
    number = b"J" + claimed.to_bytes(4, "little", signed=True)
    return rewritten(good, edit=lambda name, content: content.replace(b"KM", number) if "pkl" in name else content)


def header_of(header, size):
    encoded = json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + bytes(size)


def tensor_entry(shape, start, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


CALL = b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R."
NESTED_KEY = b"\x80\x02})" + b"\x85" * 90_000 + b"Ns."
SHARED = torch.arange(4.0)
HOSTILE = {
    "call of bytearray.pt": (with_pickle(CALL), "nothing in it was run: it asks for 'builtins.bytearray'"),
    "nested tuples.pt": (with_pickle(NESTED_KEY), "dict keys must be numbers or strings, got a tuple"),
    "names on the stack.pt": (torch_file({"a": torch.zeros(2)}, pickle_protocol=4), "STACK_GLOBAL"),
    "no pickle.pt": (with_pickle(b"text"), "must be a whole torch checkpoint"),
    "cut pickle.pt": (with_pickle(b"\x80\x02}"), "must be a whole torch checkpoint"),
    "meta tensor.pt": (torch_file({"a": torch.empty(10**12, device="meta")}), "_rebuild_meta_tensor_no_storage"),
    "sparse tensor.pt": (torch_file({"a": torch.eye(3).to_sparse()}), "_rebuild_sparse_tensor"),
    "expanded tensor.pt": (torch_file({"a": torch.zeros(1).expand(10**9, 4)}), "got 16000000000 bytes"),
    "repeated tensor.pt": (
        torch_file({f"{i}": value for i, value in enumerate([torch.zeros(10**5)] * 3)}),
        "must be smaller than the file of 4.* bytes, got 1200000 bytes",
    ),
    "more than is stored.pt": (with_numel(2**31 - 1), "must be a whole torch checkpoint, got RuntimeError"),
    "less than nothing.pt": (with_numel(-1), "must be a whole torch checkpoint, got RuntimeError"),
    "compressed.pt": (
        rewritten(torch_file({"a": torch.zeros(2)}), zipfile.ZIP_DEFLATED),
        "contents must not be compressed",
    ),
    "two pickles.pt": (rewritten(torch_file({"a": SHARED}), extra=("b/data.pkl", b"N.")), "must hold one data.pkl"),
    "no zip archive.pt": (torch_file({"a": SHARED}, _use_new_zipfile_serialization=False), "got BadZipFile"),
    "names that are numbers.pt": (torch_file({1: torch.zeros(2)}), r"got something else at \['1'\]"),
    "many tensors.pt": (
        torch_file(dict.fromkeys(map(str, range(10_001)), torch.zeros(0))),
        "at most 10000 tensors, got 10001",
    ),
    "list.pt": (torch_file([SHARED]), "must hold a dict of tensors, got list"),
    "many tensors.safetensors": (
        header_of({str(i): tensor_entry([0], 0, 0) for i in range(10_001)}, 0),
        "must hold at most 10000 tensors, got 10001",
    ),
    "long header.safetensors": ((2**40).to_bytes(8, "little") + b"{}", "a header of 1099511627776 bytes"),
    "claimed shape.safetensors": (header_of({"a": tensor_entry([10**12], 0, 8)}, 8), "must be a whole safetensors"),
    "claimed bytes.safetensors": (header_of({"a": tensor_entry([10**12], 0, 4 * 10**12)}, 8), "must be a whole"),
    "overflowing shape.safetensors": (header_of({"a": tensor_entry([2**63, 2**63], 0, 8)}, 8), "must be a whole"),
    "overlap.safetensors": (
        header_of({"a": tensor_entry([2], 0, 8), "b": tensor_entry([2], 4, 12)}, 12),
        "must be a whole safetensors file",
    ),
    "header that is a list.safetensors": (header_of([1], 0), "must be a whole safetensors file"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_claims_are_refused_before_memory_is_taken(tmp_path, name):
    data, message = HOSTILE[name]
    path = tmp_path / name
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message), open_checkpoint(path):
            pass
        assert tracemalloc.get_traced_memory()[1] < 50e6 + 10 * len(data)
    finally:
        tracemalloc.stop()


def test_state_dicts_of_modules_are_read(tmp_path):
    """With the metadata that `state_dict()` adds, and as parameters."""
    module = torch.nn.Linear(2, 3)
    for name, content in (("a.pt", module.state_dict()), ("b.pt", dict(module.named_parameters()))):
        torch.save(content, tmp_path / name)
        with open_checkpoint(tmp_path / name) as checkpoint:
            assert checkpoint.shape("weight") == (3, 2)
            assert torch.equal(checkpoint.tensor("weight"), module.weight)


@pytest.mark.parametrize("kind", ["header.safetensors", "archive.pt", "pickle.pt"])
def test_random_damage_is_read_as_tensors_or_is_a_value_error(tmp_path, kind):
    """150 corruptions of one or two bytes each, outside of the weights."""
    content = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(3, dtype=torch.float16)}
    save_file(content, tmp_path / "good.safetensors")
    good = torch_file(content) if kind.endswith("pt") else (tmp_path / "good.safetensors").read_bytes()
    random = torch.Generator().manual_seed(0)

    def number(limit):
        return int(torch.randint(limit, (), generator=random))

    def damaged(name, data):
        if kind == "pickle.pt" and not name.endswith("data.pkl"):
            return data
        changed = bytearray(data)
        for _ in range(1 + number(2)):
            changed[number(len(data) - 20 * kind.startswith("header"))] = number(256)
        return bytes(changed)

    path, refused = tmp_path / kind, 0
    for _ in range(150):
        # The archive around a damaged pickle is written anew, with the right checksum.
        path.write_bytes(rewritten(good, edit=damaged) if kind == "pickle.pt" else damaged("", good))
        try:
            with open_checkpoint(path) as checkpoint:
                for key in checkpoint.keys():  # noqa: SIM118 (not a mapping)
                    assert checkpoint.tensor(key).nbytes <= len(good)
        except ValueError:
            refused += 1
    assert 50 < refused < 150


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_not_written(tmp_path, value):
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        weight = torch.zeros(2, 3, dtype=dtype)
        weight[1, 1] = value
        with pytest.raises(ValueError, match="w must be finite, got NaN or infinite values"):
            save_tensors(tmp_path / "w.safetensors", [PlannedTensor("w", (2, 3), lambda weight=weight: weight)])
    assert not list(tmp_path.iterdir())


def test_tensors_that_share_memory_are_not_written(tmp_path):
    plan = [PlannedTensor(name, (4,), lambda: SHARED) for name in "ab"]
    with pytest.raises(ValueError, match="must not share memory"):
        save_tensors(tmp_path / "w.safetensors", plan)


LIMITED = """
import resource, signal, sys
from conversion import convert_sit
from pipelines.shared.programs import run_program
signal.signal(signal.SIGXFSZ, getattr(signal, sys.argv.pop(1)))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
sys.exit(run_program(convert_sit.main))
"""


def convert_within_100_kb(action, output):
    """Convert the golden generator, whose 380 kB exceed the limit on the size of files; then `action` is taken."""
    argv = ["--checkpoint", GOLDEN / "sit_official.safetensors", "--output", output, "--num_attention_heads", "4"]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-c", LIMITED, action, *map(str, argv)],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_full_disk_is_one_line(tmp_path):
    """Writing fails in the middle, as it does when the disk is full."""
    result = convert_within_100_kb("SIG_IGN", tmp_path / "out")
    assert result.returncode == 2, result.stderr[-3000:]
    assert "cannot write" in result.stderr
    assert "File too large" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_killed_conversion_leaves_a_staging_folder_at_most(tmp_path):
    """The system kills the program in the middle of writing."""
    result = convert_within_100_kb("SIG_DFL", tmp_path / "out")
    assert result.returncode == -signal.SIGXFSZ
    (staging,) = tmp_path.iterdir()
    assert staging.name.startswith(".gpstoken-")
    assert all(path.stat().st_size <= 100_000 for path in staging.rglob("*") if path.is_file())


def test_the_pickle_that_is_refused_would_take_memory():
    """pickle itself makes the call, so the test above can fail."""
    assert len(pickle.loads(CALL.replace(b"J\xff\xff\xff\x7f", b"J\xff\xff\x01\x00"))) == 2**17 - 1


def test_a_good_file_is_read(tmp_path):
    save_file({"a": SHARED}, tmp_path / "a.safetensors")
    torch.save({"model": {"a": SHARED}}, tmp_path / "a.pt")
    for name in ("a.safetensors", "a.pt"):
        with open_checkpoint(tmp_path / name, members=("model",)) as checkpoint:
            assert checkpoint.keys() == ["a"]
            assert torch.equal(checkpoint.tensor("a"), SHARED)
