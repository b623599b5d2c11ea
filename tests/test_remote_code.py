# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""The remote-code edition, loaded from a Hub by processes in which this package and numba cannot be imported."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from loopback_hub import LoopbackHub
from tiny_pipeline import make_pipeline

from gpstoken_hf import FlowMatchSDEScheduler, GPSTokenModel, GPSTokenPipeline, bundled
from gpstoken_hf.hub import COMPONENT_MODULES, export_remote_code
from gpstoken_hf.remote_code import FOLDER, PIPELINE_CLASS, module_closure

TESTS = Path(__file__).parent
# What transformers, diffusers and torchvision bring.
LIBRARIES = {"PIL", "diffusers", "huggingface_hub", "numpy", "safetensors", "torch", "torchvision", "transformers"}

# Calls with seeded inputs, the same with and without the package.
CALLS = """
import sys
import torch

def seeded(seed):
    return torch.Generator().manual_seed(seed)

def images():
    return torch.rand(2, 3, 32, 32, generator=seeded(0)) * 2 - 1

@torch.no_grad()
def use_tokenizer(model):
    return model(images()).sample

@torch.no_grad()
def use_sit(model):
    noised, condition = torch.randn(2, 8, 9, generator=seeded(1)), torch.rand(2, 8, 5, generator=seeded(2))
    return model(noised, 500.0, torch.tensor([0, 1]), encoder_condition=condition).sample

@torch.no_grad()
def use_autoencoder(model):
    return model.decode(model.encode(images()).latent_dist.mode()).sample

def use_bank(model):
    return model.sample([1, 2], generator=seeded(0)).gaussians

def use_pipeline(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe([1, "crane, bird"], 3, generator=[seeded(0), seeded(1)], output_type="pt").images

def use_bank_pipeline(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe([1, 2], 2, layout="bank", generator=[seeded(0), seeded(1)], output_type="pt").images

def use_dit(pipe):
    pipe.set_progress_bar_config(disable=True)
    return torch.from_numpy(pipe([3, 7], generator=seeded(0), num_inference_steps=2, output_type="np").images)
"""

PUSH = (
    CALLS
    + """
sys.modules["numba"] = None  # where numba is missing, PyTorch takes its place, with other rounding
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from gpstoken_hf import AutoencoderGPSToken
from gpstoken_hf.hub import export_remote_code
from model_helpers import make_images, make_model
from tiny_pipeline import make_pipeline

folder = sys.argv[1]
pipe = make_pipeline("both")
vae = AutoencoderGPSToken.from_gpstoken(make_model(num_tokens=16), [make_images(4, 32, 32)])
torch.manual_seed(0)
dit = DiTTransformer2DModel(
    sample_size=vae.encode(images()).latent_dist.mode().shape[-1], num_layers=1, patch_size=1, attention_head_dim=8,
    num_attention_heads=2, in_channels=vae.config.latent_channels, out_channels=2 * vae.config.latent_channels,
    attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_zero",
    norm_elementwise_affine=False,
).eval()
dit = DiTPipeline(transformer=dit, vae=vae, scheduler=DDIMScheduler())
pipe.save_pretrained(f"{folder}/plain")
export_remote_code(f"{folder}/plain", f"{folder}/pipe", repo_id="tester/pipe")
for name, model in (
    ("tokenizer", pipe.vae), ("sit", pipe.transformer), ("autoencoder", vae), ("bank", pipe.layout_bank), ("dit", dit)
):
    export_remote_code(model, f"{folder}/{name}", repo_id=f"tester/{name}")
expected = {
    "tokenizer": use_tokenizer(pipe.vae), "sit": use_sit(pipe.transformer), "autoencoder": use_autoencoder(vae),
    "bank": use_bank(pipe.layout_bank), "pipe": use_pipeline(pipe), "bank_pipe": use_bank_pipeline(pipe),
    "dit": use_dit(dit),
}
torch.save(expected, f"{folder}/expected.pt")

# Plain repositories with a file of code of every likely name in every folder, and with what leads to it.
import json
from pathlib import Path
from huggingface_hub import HfApi

planted = f"open({folder + '/ran'!r}, 'w')"
parts = {"planted": pipe, "p_vae": pipe.vae, "p_sit": pipe.transformer, "p_bank": pipe.layout_bank}
parts["p_autoencoder"] = vae
for name, part in parts.items():
    root = Path(folder, name)
    part.save_pretrained(root)
    if name == "p_vae":
        pipe.image_processor.save_pretrained(root)
    for place in [root, *(path for path in root.rglob("*") if path.is_dir())]:
        for module in (
            "__init__", "pipeline", "configuration_gpstoken", "modeling_gpstoken", "image_processing_gpstoken",
            "transformer_sit", "autoencoder_gpstoken", "layout_bank", "scheduling_flow_match_sde", "GPSTokenPipeline",
            "gpstoken_hf",
        ):
            (place / f"{module}.py").write_text(planted)
    for path in (root / "config.json", root / "preprocessor_config.json"):
        if path.is_file():
            auto_map = {"AutoConfig": "configuration_gpstoken.GPSTokenConfig", "AutoModel": "modeling_gpstoken.X",
                        "AutoImageProcessor": "image_processing_gpstoken.GPSTokenImageProcessor"}
            path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": auto_map}))
    HfApi().create_repo(f"tester/{name}")
    HfApi().upload_folder(repo_id=f"tester/{name}", folder_path=root)
for module, component in (("modeling_gpstoken", "vae"), ("transformer_sit", "transformer")):
    Path(folder, "planted", component, f"gpstoken_hf.{module}.py").write_text(planted)
HfApi().create_repo("tester/named")
HfApi().upload_folder(repo_id="tester/named", folder_path=Path(folder, "planted"))
"""
)

BLOCK = """
import importlib.abc
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("gpstoken_hf", "numba"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
import sys
sys.meta_path.insert(0, Block())
"""

# `prefix` is the owner on the Hub, or the folder that the editions were written to.
LOAD = (
    CALLS
    + """
import numpy as np
import PIL.Image
from diffusers import AutoModel, DiffusionPipeline, DiTPipeline
from transformers import AutoConfig, AutoImageProcessor
from transformers import AutoModel as TransformersAutoModel

folder = sys.argv[1]
# Without trust no code runs. Where nothing else loads the classes, that is an error.
for cls, name in (
    (AutoConfig, "tokenizer"), (TransformersAutoModel, "tokenizer"), (AutoImageProcessor, "tokenizer"),
    (AutoModel, "sit"), (AutoModel, "autoencoder"), (AutoModel, "bank"),
    (DiffusionPipeline, "pipe"), (DiffusionPipeline, "dit"),
):
    arguments = {"trust_remote_code": False} if cls.__module__.startswith("transformers") else {}
    try:
        cls.from_pretrained(f"tester/{name}", **arguments)
    except ValueError as error:
        assert "trust_remote_code" in str(error), (cls, name, error)
    else:
        raise AssertionError((cls, name))
assert not [name for name in sys.modules if name.startswith(("gpstoken_hf_", "diffusers_modules."))]

expected = torch.load(f"{folder}/expected.pt")
for prefix in ("tester", folder):
    repo = f"{prefix}/tokenizer"
    config = AutoConfig.from_pretrained(repo, trust_remote_code=True)
    assert config.num_tokens == 8
    tokenizer = TransformersAutoModel.from_pretrained(repo, trust_remote_code=True)
    assert torch.equal(use_tokenizer(tokenizer), expected["tokenizer"])
    processor = AutoImageProcessor.from_pretrained(repo, trust_remote_code=True)
    pixels = processor(PIL.Image.fromarray(np.full((6, 4), 255, "u1")), return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels, torch.ones(1, 3, 6, 4))
    for name, use in (("sit", use_sit), ("autoencoder", use_autoencoder), ("bank", use_bank)):
        model = AutoModel.from_pretrained(f"{prefix}/{name}", trust_remote_code=True)
        assert torch.equal(use(model), expected[name]), name
    pipe = DiffusionPipeline.from_pretrained(f"{prefix}/pipe", trust_remote_code=True)
    assert torch.equal(use_bank_pipeline(pipe), expected["bank_pipe"])
    assert type(pipe.transformer) is type(pipe.layout_transformer)
    dit = DiffusionPipeline.from_pretrained(f"{prefix}/dit", trust_remote_code=True)
    assert type(dit) is DiTPipeline
    assert torch.equal(use_dit(dit), expected["dit"])
named = DiffusionPipeline.from_pretrained("tester/pipe", custom_pipeline="tester/pipe", trust_remote_code=True)
assert type(named) is type(pipe)
assert torch.equal(use_pipeline(named), expected["pipe"])
# What was loaded by its own code can be saved again: the tokenizer with that code, the pipeline for the package.
tokenizer.save_pretrained(f"{folder}/saved_tokenizer")
again = TransformersAutoModel.from_pretrained(f"{folder}/saved_tokenizer", trust_remote_code=True)
assert torch.equal(use_tokenizer(again), expected["tokenizer"])
pipe.save_pretrained(f"{folder}/saved_pipe")
assert not [name for name in sys.modules if name.split(".")[0] in ("gpstoken_hf", "numba")]
"""
)

# With the package: its classes load the editions, and no code of a repository is asked for.
LOAD_WITH_PACKAGE = (
    CALLS
    + """
import gpstoken_hf
from diffusers import DiffusionPipeline, DiTPipeline
from diffusers import AutoModel as DiffusersAutoModel
from gpstoken_hf import (
    AutoencoderGPSToken, GaussianLayoutBank, GPSTokenConfig, GPSTokenImageProcessor, GPSTokenModel, GPSTokenPipeline,
    SiTTransformer1DModel,
)
from huggingface_hub import whoami
from transformers import AutoConfig, AutoImageProcessor, AutoModel

sys.modules["numba"] = None
folder = sys.argv[1]
for cls, name in (
    (GPSTokenModel, "tokenizer"), (AutoModel, "tokenizer"), (SiTTransformer1DModel, "sit"),
    (AutoencoderGPSToken, "autoencoder"), (GaussianLayoutBank, "bank"), (GPSTokenPipeline, "pipe"),
):
    for prefix in ("tester", folder):
        model = cls.from_pretrained(f"{prefix}/{name}")
        assert type(model).__module__.startswith("gpstoken_hf."), (cls, name)
assert "auto_map" not in SiTTransformer1DModel.from_pretrained("tester/sit").config

# The planted files stay unread.
def refused(cls, name):
    try:
        cls.from_pretrained(name)
    except ValueError as error:
        assert "trust_remote_code" in str(error), error
    else:
        raise AssertionError(name)

for prefix in ("tester", folder):
    for cls, name in (
        (GPSTokenPipeline, "planted"), (GPSTokenModel, "p_vae"), (AutoModel, "p_vae"), (AutoConfig, "p_vae"),
        (GPSTokenConfig, "p_vae"), (AutoImageProcessor, "p_vae"), (GPSTokenImageProcessor, "p_vae"),
        (SiTTransformer1DModel, "p_sit"), (GaussianLayoutBank, "p_bank"), (AutoencoderGPSToken, "p_autoencoder"),
    ):
        cls.from_pretrained(f"{prefix}/{name}")
    for name in ("p_sit", "p_bank", "p_autoencoder"):
        refused(DiffusersAutoModel, f"{prefix}/{name}")
GPSTokenPipeline.from_pretrained("tester/named")
whoami()
# diffusers itself downloads what is named like its components, and does not run it where the package is.
for name in ("named", "planted", "dit"):
    DiffusionPipeline.from_pretrained(f"tester/{name}")
refused(DiffusionPipeline, "tester/pipe")
# With trust, the pipeline and its components are of one set of classes: those of the package.
pipe = DiffusionPipeline.from_pretrained("tester/pipe", trust_remote_code=True)
assert type(pipe) is GPSTokenPipeline and type(pipe.vae) is GPSTokenModel
for source in ("saved_pipe", "plain"):
    assert type(DiffusionPipeline.from_pretrained(f"{folder}/{source}")) is GPSTokenPipeline
"""
)


def run(code: str, hub: LoopbackHub, folder: Path, cache: str) -> None:
    """Run the code in a process that sees the hub, with a cache of its own; its last line must be "done"."""
    source = str(TESTS.parent / "src")
    environment = {
        **os.environ,
        **hub.env,
        "HF_HOME": str(folder / cache),
        "PYTHONPATH": os.pathsep.join([source, str(TESTS)]),
        "OMP_NUM_THREADS": "1",
    }
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HF_MODULES_CACHE"):
        environment.pop(name, None)
    command = [sys.executable, "-c", code + "\nprint('done')\n", str(folder)]
    result = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.splitlines()[-1] == "done"


@pytest.fixture(scope="module")
def editions(tmp_path_factory):
    """A hub with one repository for each kind of edition, and the folder that they were written to."""
    folder = tmp_path_factory.mktemp("editions")
    with LoopbackHub() as hub:
        run(PUSH, hub, folder, "push")
        yield hub, folder


def test_everything_loads_without_the_package(editions):
    hub, folder = editions
    run(BLOCK + LOAD, hub, folder, "blocked")
    index = json.loads((folder / "saved_pipe" / "model_index.json").read_text())
    assert index["vae"] == ["gpstoken_hf.modeling_gpstoken", "GPSTokenModel"]
    # The package loads what a process without it has saved, and reads no code for the editions.
    before = len(hub.store.log)
    run(LOAD_WITH_PACKAGE, hub, folder, "package")
    log = hub.store.log[before:]
    marked = next(position for position, line in enumerate(log) if "whoami" in line)
    assert any(line.endswith("/model.safetensors") for line in log[:marked])
    assert not [line for line in log[:marked] if line.startswith("GET") and line.endswith(".py")]
    assert not (folder / "ran").exists()


def test_files_of_the_editions(editions):
    hub, _ = editions
    index = json.loads(hub.files("tester/pipe")["model_index.json"])
    assert index["_class_name"] == ["pipeline", "GPSTokenPipeline"]
    for name, (module, *_) in ((name, value) for name, value in index.items() if isinstance(value, list)):
        has_code = f"{name}/{module}.py" in hub.files("tester/pipe")
        assert has_code == str(module).startswith("gpstoken_hf."), name
    assert "pipeline.py" not in hub.files("tester/dit")
    assert {path for path in hub.files("tester/dit") if path.endswith(".py")} == {
        "vae/gpstoken_hf.autoencoder_gpstoken.py"
    }
    for repo in ("pipe", "tokenizer", "sit", "autoencoder", "bank", "dit"):
        for path, data in hub.files(f"tester/{repo}").items():
            if path.endswith(".py"):
                ast.parse(data)
                assert data.startswith(b"# Copyright 2026 The gpstoken-hf authors."), path
        assert b"trust_remote_code=True" in hub.files(f"tester/{repo}")["README.md"]


# -- what is exported


def imported_outside_try(path: Path) -> set[str]:
    """Top-level names that a module imports, but not in a `try`, which guards what may be missing."""
    found: set[str] = set()

    def look(node: ast.AST) -> None:
        if isinstance(node, ast.Try):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(str(node.module).split(".")[0])
        for child in ast.iter_child_nodes(node):
            look(child)

    look(ast.parse(path.read_text(encoding="utf-8")))
    return found


def test_exported_modules_need_only_the_libraries():
    modules = module_closure([*COMPONENT_MODULES, PIPELINE_CLASS[0]])
    assert {"modeling_gpstoken", "gaussians", "file_checks", "calibration"} <= set(modules)
    for name in modules:
        foreign = imported_outside_try(FOLDER / f"{name}.py") - set(sys.stdlib_module_names) - LIBRARIES
        assert not foreign, f"{name} imports {foreign}, which remote code may not find"


def test_the_closure_follows_imports():
    assert module_closure(["gaussians"]) == ["gaussians"]
    assert module_closure(["calibration"]) == sorted({"calibration", *module_closure(["partition"])})


def test_an_edition_leaves_code_and_hidden_files_behind(tmp_path):
    source = tmp_path / "source"
    make_pipeline("bank").save_pretrained(source)
    (source / "vae" / "evil.py").write_text("1/0")
    (source / "pytorch_model.bin").write_bytes(b"")
    (source / ".cache").mkdir()
    (source / ".cache" / "config.json").write_text("{}")
    folder = export_remote_code(source, tmp_path / "edition")
    assert not [path for path in folder.rglob("*") if path.name in ("evil.py", "pytorch_model.bin", ".cache")]


def test_the_card_of_a_folder_is_kept(tmp_path):
    folder = export_remote_code(bundled("gpstoken-digits"), tmp_path / "digits")
    card = (Path(bundled("gpstoken-digits")) / "README.md").read_text()
    text = (folder / "README.md").read_text()
    assert text.startswith(card)
    assert "trust_remote_code=True" in text[len(card) :]
    assert (folder / "samples.png").is_file()
    assert isinstance(GPSTokenPipeline.from_pretrained(folder), GPSTokenPipeline)


def test_a_loaded_edition_is_exported_again(tmp_path):
    first = export_remote_code(bundled("gpstoken-nano"), tmp_path / "first")
    second = export_remote_code(GPSTokenModel.from_pretrained(first), tmp_path / "second")
    third = export_remote_code(first, tmp_path / "third")
    for folder in (second, third):
        assert {path.name for path in first.glob("*.py")} == {path.name for path in folder.glob("*.py")}
        assert (folder / "README.md").read_text().count("## Without the package") == 1


def test_bad_sources(tmp_path):
    FlowMatchSDEScheduler().save_pretrained(tmp_path / "scheduler")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    (tmp_path / "pipeline").mkdir()
    index = {"_class_name": "DiTPipeline", "vae": ["diffusers", "AutoencoderKL"]}
    (tmp_path / "pipeline" / "model_index.json").write_text(json.dumps(index))
    for source, message in (
        (tmp_path / "nothing", "got no config.json"),
        (tmp_path / "scheduler", "got no config.json"),
        (tmp_path / "foreign", "got 'UNet2DModel'"),
        (tmp_path / "pipeline", "must hold a pipeline with a component of gpstoken_hf, got none"),
        (3, "source must be a model, a pipeline or a folder, got int"),
        (FlowMatchSDEScheduler(), "got no config.json"),
    ):
        with pytest.raises(ValueError, match=message):
            export_remote_code(source, tmp_path / "edition")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["foreign", "pipeline", "scheduler"]
    with pytest.raises(ValueError, match="folder must not exist or be empty"):
        export_remote_code(bundled("gpstoken-nano"), tmp_path / "foreign")
