# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""The round trip through a Hub, in processes of their own: the client reads its environment when it is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
from loopback_hub import LoopbackHub

import gpstoken_hf
from gpstoken_hf.hub import COMPONENT_MODULES, register_with_diffusers
from gpstoken_hf.pipeline_gpstoken import GPSTokenPipeline

TESTS = Path(__file__).parent

PUSH = """
import torch
from tiny_pipeline import make_pipeline
pipeline = make_pipeline("both")
pipeline.push_to_hub("tester/tiny")
pipeline.vae.push_to_hub("tester/vae")
pipeline.transformer.push_to_hub("tester/sit")
pipeline.layout_bank.push_to_hub("tester/bank")
pipeline.scheduler.push_to_hub("tester/scheduler")
pipeline.push_to_hub("tester/variants")
pipeline.to(torch.float16).push_to_hub("tester/variants", variant="fp16")
"""

# Everything here must load by name from the Hub and make the same picture as the pipeline that was pushed.
LOAD = """
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from gpstoken_hf import (
    FlowMatchSDEScheduler, GaussianLayoutBank, GPSTokenModel, GPSTokenPipeline, SiTTransformer1DModel
)
from tiny_pipeline import make_pipeline, seeded
from transformers import AutoModel

def picture(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline([1, "crane, bird"], 3, generator=seeded(0, 1), output_type="pt").images

expected = picture(make_pipeline("both"))
for cls in (GPSTokenPipeline, DiffusionPipeline):
    pipeline = cls.from_pretrained("tester/tiny")
    assert type(pipeline) is GPSTokenPipeline
    assert torch.equal(picture(pipeline), expected)
# The config of this tokenizer names the dtype of the variant, which was saved last; its weights are both there.
assert torch.equal(picture(GPSTokenPipeline.from_pretrained("tester/variants")), expected)
bank = GaussianLayoutBank.from_pretrained("tester/bank")
scheduler = FlowMatchSDEScheduler.from_pretrained("tester/scheduler")
vae, auto = GPSTokenModel.from_pretrained("tester/vae"), AutoModel.from_pretrained("tester/vae")
assert type(auto) is GPSTokenModel
sit = SiTTransformer1DModel.from_pretrained("tester/sit")
passed = GPSTokenPipeline.from_pretrained(
    "tester/tiny", vae=vae, transformer=sit, scheduler=scheduler, layout_bank=bank
)
assert passed.vae is vae and passed.transformer is sit
assert torch.equal(picture(passed), expected)

try:
    GPSTokenPipeline.from_pretrained("tester/nothing")
except OSError as error:
    print("refused:", "tester/nothing" in str(error))
"""

# What a fresh cache has downloaded is looked at from outside.
LOAD_PARTS = """
from gpstoken_hf import GPSTokenModel, GPSTokenPipeline
vae = GPSTokenModel.from_pretrained("tester/vae")
GPSTokenPipeline.from_pretrained("tester/variants", vae=vae)
"""

# Asking who one is marks a line in the log of the hub.
LOAD_VARIANT = """
from gpstoken_hf import GPSTokenPipeline
from huggingface_hub import whoami
GPSTokenPipeline.from_pretrained("tester/variants", variant="fp16", revision="main")
whoami()
GPSTokenPipeline.from_pretrained("tester/variants", variant="fp16")
whoami()
GPSTokenPipeline.from_pretrained("tester/variants", variant="fp16", local_files_only=True)
"""


def run(code: str, hub: LoopbackHub, cache: Path) -> str:
    """Run the code against the hub with an empty cache; what it printed."""
    environment = {**os.environ, **hub.env, "HF_HOME": str(cache), "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE"):
        environment.pop(name, None)
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def pushed(hub, tmp_path_factory):
    run(PUSH, hub, tmp_path_factory.mktemp("push"))
    return hub


def test_push_writes_the_layout_of_a_diffusers_repository(pushed):
    files = pushed.files("tester/tiny")
    index = json.loads(files["model_index.json"])
    assert index["vae"] == ["gpstoken_hf.modeling_gpstoken", "GPSTokenModel"]
    expected = {
        "model_index.json",
        "vae/config.json",
        "vae/model.safetensors",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "layout_transformer/config.json",
        "layout_bank/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json",
        "image_processor/preprocessor_config.json",
    }
    assert expected <= set(files)
    variants = {path for path in pushed.files("tester/variants") if ".fp16." in path}
    assert {"vae/model.fp16.safetensors", "transformer/diffusion_pytorch_model.fp16.safetensors"} <= variants


def test_round_trip(pushed, tmp_path):
    assert run(LOAD, pushed, tmp_path).strip() == "refused: True"


def test_passed_components_and_variants_are_not_downloaded(pushed, tmp_path):
    before = len(pushed.downloads())
    run(LOAD_PARTS, pushed, tmp_path)
    parts = pushed.downloads()[before:]
    assert "transformer/diffusion_pytorch_model.safetensors" in parts
    assert not [path for path in parts if ".fp16." in path or path.startswith("vae/")]


def test_a_variant_and_the_cache(pushed, tmp_path):
    before = len(pushed.store.log)
    run(LOAD_VARIANT, pushed, tmp_path)
    log = pushed.store.log[before:]
    first, second = (i for i, line in enumerate(log) if "whoami" in line)
    weights = [line for line in log[:first] if line.startswith("GET") and line.endswith(".safetensors")]
    assert [line for line in weights if line.endswith("/transformer/diffusion_pytorch_model.fp16.safetensors")]
    # The second time nothing is downloaded again, and without the Hub the cache is enough.
    assert not [line for line in log[first:second] if line.startswith("GET") and "/resolve/" in line]
    assert not log[second + 1 :]


def test_registration_is_what_diffusers_looks_for():
    """`DiffusionPipeline.from_pretrained` takes modules and classes from there: see `test_round_trip`."""
    register_with_diffusers()
    for name in COMPONENT_MODULES:
        module = f"gpstoken_hf.{name}"
        assert getattr(diffusers.pipelines, module) is sys.modules[module]
    assert diffusers.GPSTokenPipeline is GPSTokenPipeline


def test_public_names_come_from_the_recorded_modules():
    index = json.loads((TESTS / "golden" / "model_index.json").read_text())
    ours = [value for value in index.values() if isinstance(value, list) and value[0].startswith("gpstoken_hf")]
    assert len(ours) == 6
    for module, name in ours:
        assert getattr(gpstoken_hf, name) is getattr(sys.modules[module], name)
