# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""`--push_to_hub` of every converter, against a Hub on this machine, in a process that reads its address at import."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conversion_helpers import GOLDEN
from loopback_hub import LoopbackHub

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
from gpstoken_hf import GaussianLayoutBank, GPSTokenImageProcessor, GPSTokenModel, SiTTransformer1DModel
assert GPSTokenModel.from_pretrained("tester/tokenizer").config.num_tokens == 16
assert GPSTokenImageProcessor.from_pretrained("tester/tokenizer").crop_size["height"] == 64
assert SiTTransformer1DModel.from_pretrained("tester/sit").config["in_channels"] == 9
assert len(GaussianLayoutBank.from_pretrained("tester/bank")) == 1
"""


@pytest.fixture
def hub():
    with LoopbackHub() as hub:
        yield hub


def test_push_and_load(hub, tmp_path):
    (tmp_path / "initg.pickle").write_bytes(pickle.dumps({3: [np.full((16, 21), 0.5, "f4")]}))
    paths = os.pathsep.join(str(path) for path in (TESTS, TESTS.parent))
    environment = {**os.environ, **hub.env, "HF_HOME": str(tmp_path / "cache"), "PYTHONPATH": paths}
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE"):
        environment.pop(name, None)
    command = [sys.executable, "-c", PUSH, str(GOLDEN), str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("pushed ") == 3
    for repo, folder in (("tester/tokenizer", "vae"), ("tester/sit", "sit"), ("tester/bank", "bank")):
        pushed = hub.files(repo)
        for file in (tmp_path / folder).iterdir():
            assert pushed[file.name] == file.read_bytes(), file.name
