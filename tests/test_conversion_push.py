# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""`--push_to_hub` of every converter and `push_folder`, with a Hub on this machine.

The Hub's client reads its address when it is imported, so each test runs a process.
"""

import ast
import importlib
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conversion_helpers import GOLDEN
from loopback_hub import LoopbackHub

from pipelines.shared.outputs import MARKER

TESTS = Path(__file__).parent

PUSH = """
import sys
from conversion import convert_gpstoken, convert_layout_bank, convert_pipeline, convert_sit
golden, folder = sys.argv[1:]
options = ["--num_tokens", "16", "--image_size", "64", "--push_to_hub", "tester/tokenizer"]
convert_gpstoken.main(
    ["--checkpoint", f"{golden}/tokenizer_official.safetensors", "--output", f"{folder}/vae", *options]
)
options = ["--num_attention_heads", "4", "--push_to_hub", "tester/sit"]
convert_sit.main(["--checkpoint", f"{golden}/sit_official.safetensors", "--output", f"{folder}/sit", *options])
convert_layout_bank.main([f"{folder}/initg.pickle", "--output", f"{folder}/bank", "--push_to_hub", "tester/bank"])
convert_layout_bank.main(
    [f"{folder}/initg.pickle", "--output", f"{folder}/code", "--push_to_hub", "tester/code", "--remote_code"]
)
from gpstoken_hf import GaussianLayoutBank, GPSTokenImageProcessor, GPSTokenModel, SiTTransformer1DModel
assert GPSTokenModel.from_pretrained("tester/tokenizer").config.num_tokens == 16
assert GPSTokenImageProcessor.from_pretrained("tester/tokenizer").crop_size["height"] == 64
assert SiTTransformer1DModel.from_pretrained("tester/sit").config["in_channels"] == 9
for repo in ("tester/bank", "tester/code"):
    assert len(GaussianLayoutBank.from_pretrained(repo)) == 1
"""


@pytest.fixture
def hub():
    with LoopbackHub() as hub:
        yield hub


def run(program, hub_env, tmp_path):
    """Run a program in a new process without the Hub's offline switches, and return its output."""
    paths = os.pathsep.join(filter(None, [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, **hub_env, "HF_HOME": str(tmp_path / "cache"), "PYTHONPATH": paths}
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE"):
        environment.pop(name, None)
    command = [sys.executable, "-c", program, str(GOLDEN), str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


PUSH_FOLDER = """
import sys
from pathlib import Path
from pipelines.shared.publishing import push_folder
folder = Path(sys.argv[2]) / "model"
folder.mkdir()
(folder / "config.json").write_text("{}")
for name, private in (("tester/open", False), ("tester/closed", True), ("tester/closed", False), ("a b/c", False)):
    try:
        print(push_folder(folder, name, private=private))
    except (OSError, ValueError) as error:
        print("ValueError" if isinstance(error, ValueError) else "OSError", error)
"""


def test_push_folder(hub, tmp_path):
    lines = run(PUSH_FOLDER, hub.env, tmp_path).splitlines()
    endpoint = hub.env["HF_ENDPOINT"]
    assert lines[:3] == [f"{endpoint}/tester/open", f"{endpoint}/tester/closed", f"{endpoint}/tester/closed"]
    assert lines[3].startswith("ValueError")
    assert {name: repo.is_private for name, repo in hub.store.repos.items()} == {
        "models/tester/open": False,
        "models/tester/closed": True,
    }
    assert hub.files("tester/closed")["config.json"] == b"{}"


def test_a_hub_out_of_reach_is_an_os_error(tmp_path):
    lines = run(PUSH_FOLDER, {"HF_ENDPOINT": "http://127.0.0.1:1", "HF_TOKEN": "hf_x"}, tmp_path).splitlines()
    assert all(line.startswith("OSError") and "could not be uploaded to tester/" in line for line in lines[:3])
    assert lines[3].startswith("ValueError")


def test_programs_import_no_other_program():
    """Code that several programs need is in modules without `main`."""
    folder = TESTS.parent / "conversion"
    programs = {path.stem for path in folder.glob("*.py") if "\ndef main(" in path.read_text()}
    # A program for users of exported models: `export_model` copies it and calls it.
    programs.remove("run_exported")
    assert programs == {
        *("convert_gpstoken", "convert_layout_bank", "convert_pipeline", "convert_sit"),
        *("export_kernel", "export_model"),
    }
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                top, *rest = node.module.split(".")
                assert top != "pipelines" or rest[0] == "shared", path
                assert top != "training", path
                assert top != "conversion" or (rest or [alias.name for alias in node.names])[0] not in programs, path


def test_push_and_load(hub, tmp_path):
    (tmp_path / "initg.pickle").write_bytes(pickle.dumps({3: [np.full((16, 21), 0.5, "f4")]}))
    output = run(PUSH, hub.env, tmp_path)
    assert output.count("pushed ") == 4
    for repo, folder in (("tester/tokenizer", "vae"), ("tester/sit", "sit"), ("tester/bank", "bank")):
        pushed = hub.files(repo)
        for file in (tmp_path / folder).iterdir():
            if file.name != MARKER:
                assert pushed[file.name] == file.read_bytes(), file.name
        assert MARKER not in pushed
    # The edition is made for the Hub: the folder of the program carries no code.
    code = hub.files("tester/code")
    assert {"layout_bank.py", "README.md", "config.json"} <= set(code)
    assert code["README.md"].startswith((tmp_path / "code" / "README.md").read_bytes())
    assert not list((tmp_path / "code").glob("*.py"))


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        ("conversion.convert_gpstoken", ["--checkpoint", "x.safetensors", "--output", "y"]),
        ("conversion.convert_sit", ["--checkpoint", "x.safetensors", "--output", "y"]),
        ("conversion.convert_layout_bank", ["x.pickle", "--output", "y"]),
        ("conversion.convert_pipeline", ["--tokenizer", "x", "--transformer", "y", "--output", "z"]),
        ("pipelines.build_layout_bank", ["--train_data_dir", "x", "--output_dir", "y"]),
    ],
)
def test_remote_code_needs_a_repository(program, arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(program).main([*arguments, "--remote_code"])
    assert stopped.value.code == 2
    assert "--remote_code must be given with --push_to_hub" in capsys.readouterr().err
