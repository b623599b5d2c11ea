# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Files from strangers: every one is a good load, or one clear ValueError or OSError, in bounded memory and time."""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import hostile
import pytest
import tiny_pipeline
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from loopback_hub import LoopbackHub
from model_helpers import make_images, make_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel

import gpstoken_hf
from gpstoken_hf import (
    AutoencoderGPSToken,
    FlowMatchSDEScheduler,
    GaussianLayout,
    GaussianLayoutBank,
    GPSTokenConfig,
    GPSTokenImageProcessor,
    GPSTokenModel,
    GPSTokenPipeline,
    SiTTransformer1DModel,
)
from gpstoken_hf.file_checks import MAX_HEADER_BYTES, MAX_JSON_BYTES, read_header, read_index, read_json

# Kind -> class, name of its config file, name of its weights.
KINDS = {
    "config": (GPSTokenConfig, "config.json", None),
    "tokenizer": (GPSTokenModel, "config.json", "model.safetensors"),
    "autoencoder": (AutoencoderGPSToken, "config.json", "diffusion_pytorch_model.safetensors"),
    "transformer": (SiTTransformer1DModel, "config.json", "diffusion_pytorch_model.safetensors"),
    "bank": (GaussianLayoutBank, "config.json", "diffusion_pytorch_model.safetensors"),
    "scheduler": (FlowMatchSDEScheduler, "scheduler_config.json", None),
    "processor": (GPSTokenImageProcessor, "preprocessor_config.json", None),
    "pipeline": (GPSTokenPipeline, "model_index.json", None),
}
MODELS = [kind for kind, (_, _, weights) in KINDS.items() if weights]
# What one load may take. The largest JSON file takes under 200 MB and 1 s; the rest is slack for a busy machine.
MEMORY, SECONDS = 2**29, 20


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """A folder of healthy checkpoints, one of each kind."""
    folder = tmp_path_factory.mktemp("healthy")
    tokenizer = make_model()
    made = {
        "config": tokenizer.config,
        "tokenizer": tokenizer,
        "autoencoder": AutoencoderGPSToken.from_gpstoken(tokenizer),
        "transformer": tiny_pipeline.make_texture_transformer(),
        "bank": tiny_pipeline.make_bank(),
        "scheduler": FlowMatchSDEScheduler(),
        "processor": GPSTokenImageProcessor(),
        "pipeline": tiny_pipeline.make_pipeline("both"),
    }
    for kind, thing in made.items():
        thing.save_pretrained(folder / kind)
    return folder


@pytest.fixture
def copied(healthy, tmp_path):
    """A function that copies the checkpoint of a kind to where it may be changed."""

    def copy(kind, name=None):
        return Path(shutil.copytree(healthy / kind, tmp_path / (name or kind)))

    return copy


@contextmanager
def bounded():
    """Fail instead of taking much memory (an allocation then raises) or time."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    start = time.monotonic()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert time.monotonic() - start < SECONDS


def refused(load, *names):
    """The message of the one ValueError of a load, which holds all the names."""
    with bounded(), pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is matched below
        load()
    assert type(caught.value) is ValueError
    message = str(caught.value)
    assert len(message) < 3000
    for name in names:
        assert str(name) in message, message
    return message


def change(path, **fields):
    """Change fields of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def change_tensors(path, edit):
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


# -- JSON files


@pytest.mark.parametrize("corruption", hostile.NOT_JSON_OBJECTS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_json_object_is_one_value_error(copied, kind, corruption):
    cls, name, _ = KINDS[kind]
    file = copied(kind) / name
    file.write_bytes(hostile.NOT_JSON_OBJECTS[corruption])
    refused(lambda: cls.from_pretrained(file.parent), file)


@pytest.mark.parametrize("kind", KINDS)
def test_a_huge_json_file_is_not_read(copied, kind):
    cls, name, _ = KINDS[kind]
    file = hostile.sparse_file(copied(kind) / name, 2**30)
    refused(lambda: cls.from_pretrained(file.parent), file, f"at most {MAX_JSON_BYTES} bytes")


def test_the_largest_json_file_takes_little_memory(tmp_path):
    file = tmp_path / "a.json"
    file.write_bytes(b'{"a": [' + b"[]," * ((MAX_JSON_BYTES - 20) // 3) + b"[]]}")
    with bounded():
        assert len(read_json(file)["a"]) > 10**6
    names = ", ".join(f'"{index}": 0' for index in range(200_000))
    file.write_text(f'{{{names}, "7": 1}}')
    refused(lambda: read_json(file), "the key '7' twice")


@pytest.mark.parametrize("corruption", ["a list", "deep list", "binary", "empty"])
@pytest.mark.parametrize("name", ["scheduler/scheduler_config", "layout_scheduler/scheduler_config", "vae/config"])
def test_json_files_inside_a_pipeline(copied, corruption, name):
    file = copied("pipeline") / f"{name}.json"
    file.write_bytes(hostile.NOT_JSON_OBJECTS[corruption])
    refused(lambda: GPSTokenPipeline.from_pretrained(file.parent.parent), file)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vae", 5),
        ("vae", ["gpstoken_hf.modeling_gpstoken"]),
        ("vae", [None, "GPSTokenModel"]),
        ("scheduler", "DDIMScheduler"),
        ("layout_bank", {}),
        ("vae", ["diffusers", "AutoencoderKL"]),
        ("vae", ["os", "system"]),
        ("vae", ["gpstoken_hf.layout_bank", "GaussianLayoutBank"]),
        ("transformer", ["gpstoken_hf.layout_bank", "GaussianLayoutBank"]),
        ("scheduler", ["diffusers", "NoSuchScheduler"]),
        ("scheduler", ["antigravity", "Fly"]),
        ("id2label", 5),
        ("id2label", {"one": "cat"}),
        ("id2label", {"1": 5}),
        ("_class_name", 5),
        ("_class_name", None),
        ("safety_checker", ["diffusers", "SafetyChecker"]),
    ],
)
def test_a_model_index_that_lies(copied, name, value):
    folder = copied("pipeline")
    change(folder / "model_index.json", **{name: value})
    refused(lambda: GPSTokenPipeline.from_pretrained(folder), folder / "model_index.json", name)
    assert "antigravity" not in sys.modules  # a module is never imported because a file names it


def test_a_foreign_scheduler_is_bounded_too(copied):
    folder = copied("pipeline")
    assert json.loads((folder / "model_index.json").read_text())["layout_scheduler"][0] == "diffusers"
    file = folder / "layout_scheduler" / "scheduler_config.json"
    change(file, num_train_timesteps=10**12)
    refused(lambda: GPSTokenPipeline.from_pretrained(folder), file, "num_train_timesteps")
    change(file, num_train_timesteps=1000, shift="much")
    refused(lambda: GPSTokenPipeline.from_pretrained(folder), file)


# -- values of configs


ABSURD = [
    ("tokenizer", "num_hidden_layers", 10**9),
    ("tokenizer", "hidden_size", 10**9),
    ("tokenizer", "image_size", 10**12),
    ("tokenizer", "num_tokens", 10**12),
    ("tokenizer", "num_tokens", True),
    ("tokenizer", "num_tokens", "8"),
    ("tokenizer", "num_attention_heads", 0),
    ("tokenizer", "norm_num_groups", 0),
    ("tokenizer", "mlp_ratio", float("nan")),
    ("tokenizer", "mlp_ratio", float("inf")),
    ("tokenizer", "splat_support", True),
    ("tokenizer", "decoder_channel_multipliers", [1] * 10**6),
    ("tokenizer", "decoder_channel_multipliers", [10**9]),
    ("tokenizer", "decoder_layers_per_block", 10**9),
    ("tokenizer", "latents_mean", [0.0] * 10**5),
    ("tokenizer", "dtype", "no_such_dtype"),
    ("tokenizer", "dtype", "abs"),
    ("tokenizer", "id2label", "text"),
    ("tokenizer", "quantization_config", 5),
    ("tokenizer", "model_type", "bert"),
    ("autoencoder", "num_hidden_layers", 10**9),
    ("autoencoder", "hidden_size", 10**9),
    ("autoencoder", "texture_channels", "4"),
    ("autoencoder", "scaling_factor", float("nan")),
    ("autoencoder", "latents_channel_mean", [0.0] * 9),
    ("autoencoder", "latent_channels", 10**9),
    ("transformer", "num_layers", 10**9),
    ("transformer", "attention_head_dim", 10**9),
    ("transformer", "num_classes", 10**12),
    ("transformer", "sample_size", 10**12),
    ("transformer", "sample_size", True),
    ("transformer", "in_channels", 9.0),
    ("transformer", "learn_sigma", 1),
    ("transformer", "norm_eps", float("inf")),
    ("transformer", "class_dropout_prob", float("nan")),
    ("transformer", "latents_std", [float("nan")] * 9),
    ("transformer", "condition_channels", 10**9),
    ("transformer", "quantization_config", [1]),
    ("bank", "num_layouts", 10**15),
    ("bank", "total_tokens", 10**15),
    ("bank", "total_tokens", True),
    ("bank", "num_layouts", 0),
    ("scheduler", "num_train_timesteps", 10**12),
    ("scheduler", "num_train_timesteps", 10.5),
    ("scheduler", "start_time", float("nan")),
    ("scheduler", "diffusion_norm", float("inf")),
    ("scheduler", "use_flow_sigmas", "no"),
    ("processor", "size", {"height": 10**12, "width": 10**12}),
    ("processor", "crop_size", -1),
    ("processor", "do_resize", "yes"),
    ("processor", "image_mean", [float("nan")] * 3),
    ("processor", "rescale_factor", "x"),
]


@pytest.mark.parametrize(("kind", "field", "value"), ABSURD, ids=lambda value: repr(value)[:30])
def test_absurd_values_are_refused_before_anything_is_built(copied, kind, field, value):
    cls, name, _ = KINDS[kind]
    folder = copied(kind)
    change(folder / name, **{field: value})
    refused(lambda: cls.from_pretrained(folder), folder)


def test_a_long_list_of_labels_is_refused(copied):
    """transformers makes a dictionary of as many names."""
    folder = copied("config")
    change(folder / "config.json", num_labels=10**9)
    refused(lambda: GPSTokenConfig.from_pretrained(folder), "num_labels must be an integer from 0 to")
    refused(lambda: AutoConfig.from_pretrained(folder), "num_labels must be an integer from 0 to")


@pytest.mark.parametrize(
    "kind", ["config", "tokenizer", "autoencoder", "transformer", "bank", "scheduler", "pipeline"]
)
def test_an_unknown_field_is_named(copied, kind):
    cls, name, _ = KINDS[kind]
    folder = copied(kind)
    change(folder / name, field_of_the_future=1)
    refused(lambda: cls.from_pretrained(folder), folder / name, "'field_of_the_future'")
    if kind in ("config", "tokenizer"):
        refused(lambda: AutoConfig.from_pretrained(folder), "'field_of_the_future'")
    if kind == "tokenizer":
        refused(lambda: AutoModel.from_pretrained(folder), "'field_of_the_future'")


def test_fields_of_the_libraries_are_known(copied):
    folder = copied("tokenizer")
    change(
        folder / "config.json",
        architectures=["GPSTokenModel"],
        auto_map={"AutoModel": "modeling_gpstoken.GPSTokenModel"},
        torch_dtype="float32",
        id2label={"0": "zero"},
        output_hidden_states=True,
        name_or_path="somebody/something",
        use_cache=True,  # written by the Trainer of transformers
        tie_word_embeddings=False,
    )
    assert GPSTokenModel.from_pretrained(folder).config.output_hidden_states
    assert GPSTokenConfig(num_labels=3, attn_implementation="eager").num_labels == 3
    model = AutoModel.from_pretrained(folder, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    model.save_pretrained(folder / "again")
    assert GPSTokenModel.from_pretrained(folder / "again").config.id2label == {0: "zero"}


def test_a_file_does_not_choose_the_attention_code(copied):
    """An attention implementation may be the name of a repository with kernels."""
    folder = copied("tokenizer")
    for field in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal"):
        shutil.copy(folder / "config.json", folder / "config.bak")
        change(folder / "config.json", **{field: "somebody/kernel"})
        for cls in (GPSTokenConfig, GPSTokenModel, AutoConfig, AutoModel):
            refused(lambda cls=cls: cls.from_pretrained(folder), f"'{field}'")
        shutil.move(folder / "config.bak", folder / "config.json")


def test_a_misspelled_argument_of_the_config_is_named():
    with pytest.raises(ValueError, match="arguments must be fields of GPSTokenConfig, got 'num_token'"):
        GPSTokenConfig(num_token=4)
    with pytest.raises(ValueError, match="num_tokens"):
        GPSTokenConfig.from_dict({"num_tokens": "many"})


def test_the_scheduler_keeps_fields_of_diffusers_schedulers(tmp_path):
    FlowMatchSDEScheduler.from_config(FlowMatchEulerDiscreteScheduler(shift=3.0).config).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["shift"] == 3.0
    assert FlowMatchSDEScheduler.from_pretrained(tmp_path).config["shift"] == 3.0


def test_a_missing_config_is_no_default_config(tmp_path):
    for cls in (GPSTokenConfig, GPSTokenModel, SiTTransformer1DModel, FlowMatchSDEScheduler, GPSTokenImageProcessor):
        with pytest.raises(OSError, match=r"config\.json"):
            cls.from_pretrained(tmp_path)


# -- what a config claims against what the files hold


CLAIMS = {
    "tokenizer": {"hidden_size": 100_000, "num_hidden_layers": 1000},
    "autoencoder": {"decoder_base_channels": 2**15, "conditioner_channels": 2**15},
    "transformer": {"num_layers": 1000, "num_attention_heads": 1000, "attention_head_dim": 1000},
    "bank": {"total_tokens": 2**32},
}


@pytest.mark.parametrize("loading", ["strict", "low_cpu_mem_usage=False", "lenient", "quantized"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_config_may_not_claim_more_than_the_files_hold(copied, kind, loading):
    cls, name, _ = KINDS[kind]
    folder = copied(kind)
    change(folder / name, **CLAIMS[kind])
    arguments = {}
    if loading == "lenient":
        arguments["ignore_mismatched_sizes"] = True
    elif loading != "strict":
        arguments["low_cpu_mem_usage"] = loading == "quantized"
    if loading == "quantized":
        change(folder / name, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    refused(lambda: cls.from_pretrained(folder, **arguments), folder)


@pytest.mark.parametrize("kind", MODELS)
def test_the_weights_of_another_model_are_refused(healthy, kind):
    cls = KINDS[kind][0]
    # An autoencoder wraps a saved tokenizer.
    for other in KINDS.keys() - {kind} - ({"tokenizer"} if kind == "autoencoder" else set()):
        if (healthy / other / "config.json").is_file():
            with pytest.raises((ValueError, OSError)) as caught:
                cls.from_pretrained(healthy / other)
            assert str(healthy / other) in str(caught.value)


@pytest.mark.parametrize("kind", MODELS)
def test_missing_strange_and_misshapen_weights_are_refused(copied, kind):
    cls, _, weights = KINDS[kind]
    folder = copied(kind)
    name = min(load_file(folder / weights))

    def lose(tensors):
        del tensors[name]

    change_tensors(folder / weights, lose)
    refused(lambda: cls.from_pretrained(folder), folder, f"1 missing ({name})")
    change_tensors(
        folder / weights, lambda tensors: tensors.update({name: torch.zeros(3, 3, 3, 3), "b": torch.ones(1)})
    )
    refused(
        lambda: cls.from_pretrained(folder), folder, "1 unexpected (b)", f"1 of another shape ({name} (3, 3, 3, 3)"
    )


def test_a_dtype_of_another_kind_is_refused(copied):
    folder = copied("transformer")
    file = folder / "diffusion_pytorch_model.safetensors"
    change_tensors(file, lambda tensors: tensors.update({"proj_in.bias": tensors["proj_in.bias"].int()}))
    refused(lambda: SiTTransformer1DModel.from_pretrained(folder), folder, "proj_in.bias", "I32")


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
@pytest.mark.parametrize("kind", MODELS)
def test_a_truncated_file_is_named(copied, kind, keep):
    cls, _, weights = KINDS[kind]
    file = copied(kind) / weights
    file.write_bytes(file.read_bytes()[:keep])
    for arguments in ({}, {"output_loading_info": True}):
        refused(
            lambda arguments=arguments: cls.from_pretrained(file.parent, **arguments), file, "whole", "a damaged one"
        )
    folder = copied("pipeline", "whole")
    name = next((name for name in ("vae", "transformer", "layout_bank") if (folder / name / weights).is_file()), None)
    if kind in ("tokenizer", "transformer"):
        shutil.copy(file, folder / name / weights)
        for pipeline in (GPSTokenPipeline, DiffusionPipeline):
            refused(lambda pipeline=pipeline: pipeline.from_pretrained(folder), folder / name / weights, "damaged")


def test_headers_are_bounded(tmp_path):
    file = hostile.sparse_file(tmp_path / "a.safetensors", 2**30)
    with open(file, "r+b") as opened:
        opened.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
    refused(lambda: read_header(file), file, f"at most {MAX_HEADER_BYTES} bytes")
    refused(lambda: GaussianLayout.load(file), file, f"at most {MAX_HEADER_BYTES} bytes")


# -- sharded checkpoints


INDEX = {"tokenizer": "model.safetensors.index.json", "transformer": "diffusion_pytorch_model.safetensors.index.json"}


@pytest.fixture(params=INDEX)
def sharded(request, healthy, tmp_path):
    """A sharded checkpoint: its class, folder and index."""
    cls = KINDS[request.param][0]
    cls.from_pretrained(healthy / request.param).save_pretrained(tmp_path, max_shard_size="30KB")
    index = tmp_path / INDEX[request.param]
    assert len(read_index(index)) > 1
    return cls, tmp_path, index


def test_a_sharded_checkpoint_is_compared_too(sharded):
    cls, folder, _ = sharded
    cls.from_pretrained(folder)
    shard = sorted(folder.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    refused(lambda: cls.from_pretrained(folder), shard, "damaged")
    shard.write_bytes(whole)
    change_tensors(shard, lambda tensors: tensors.pop(min(tensors)))
    refused(lambda: cls.from_pretrained(folder), shard, "the tensors that the index names")
    shard.unlink()
    with pytest.raises(OSError, match=shard.name):
        cls.from_pretrained(folder)


@pytest.mark.parametrize(
    "lie",
    [
        {"weight_map": 5},
        {"weight_map": {}},
        {"weight_map": {"a": 5}},
        {"weight_map": {"a": "../outside.safetensors"}},
        {"weight_map": {"a": "/outside.safetensors"}},
        {"weight_map": {"a": "pytorch_model.bin"}},
        {"metadata": 5},
        {"metadata": {"dtype": "no_such_dtype"}},
    ],
    ids=str,
)
def test_an_index_that_lies(sharded, lie):
    cls, folder, index = sharded
    change(index, **lie)
    refused(lambda: cls.from_pretrained(folder), index)
    index.write_bytes(hostile.NOT_JSON_OBJECTS["deep list"])
    refused(lambda: cls.from_pretrained(folder), index)


# -- pickles


def plant(path, marker):
    """A checkpoint that creates the folder `marker` when it is unpickled, whoever reads it."""
    path.write_bytes(pickle.dumps({"a": hostile.Touch(marker)}))
    pickle.loads(path.read_bytes())
    marker.rmdir()  # it does create the folder


PICKLES = ("pytorch_model.bin", "diffusion_pytorch_model.bin", "model.bin", "adapter_model.bin")


@pytest.mark.parametrize("kind", MODELS)
def test_a_pickle_is_never_opened(copied, tmp_path, kind, monkeypatch):
    cls, _, weights = KINDS[kind]
    folder, marker = copied(kind), tmp_path / "unpickled"
    for name in PICKLES:
        plant(folder / name, marker)

    def never(*arguments, **options):
        raise AssertionError("a pickle was opened")

    # torch.load would stop at the code above; a pickle of tensors would be read. Neither may be tried.
    monkeypatch.setattr(torch, "load", never)
    loaders = [cls.from_pretrained] + ([AutoModel.from_pretrained] if kind == "tokenizer" else [])
    for load in loaders:
        load(folder)
        refused(lambda load=load: load(folder, use_safetensors=False), "use_safetensors must be True")
    (folder / weights).unlink()
    for load in loaders:
        with pytest.raises(OSError, match=r"model\.safetensors.*never from pickles"):
            load(folder)
        with pytest.raises(OSError, match=r"model\.fp16\.safetensors.*never from pickles"):
            load(folder, variant="fp16")
    assert not marker.exists()


def test_a_pipeline_never_opens_a_pickle(copied, tmp_path, monkeypatch):
    folder, marker = copied("pipeline"), tmp_path / "unpickled"
    monkeypatch.setattr(torch, "load", lambda *arguments, **options: pytest.fail("a pickle was opened"))
    for component in ("vae", "transformer", "layout_bank"):
        for name in PICKLES:
            plant(folder / component / name, marker)
    refused(lambda: GPSTokenPipeline.from_pretrained(folder, use_safetensors=False), "use_safetensors must be True")
    for cls in (GPSTokenPipeline, DiffusionPipeline):
        cls.from_pretrained(folder)
    for component, weights in (("vae", "model.safetensors"), ("transformer", "diffusion_pytorch_model.safetensors")):
        (folder / component / weights).rename(tmp_path / weights)
        for cls in (GPSTokenPipeline, DiffusionPipeline):
            with pytest.raises(OSError, match=weights):
                cls.from_pretrained(folder)
        (tmp_path / weights).rename(folder / component / weights)
    assert not marker.exists()


def test_adapters_are_never_pickles(copied, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *arguments, **options: pytest.fail("a pickle was opened"))
    folder = copied("tokenizer")
    model = GPSTokenModel.from_pretrained(folder)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA", "target_modules": ["query"]}')
    plant(tmp_path / "adapter" / "adapter_model.bin", tmp_path / "unpickled")
    refused(lambda: model.load_adapter(str(tmp_path / "adapter")), "adapter_model.safetensors")
    shutil.copytree(tmp_path / "adapter", folder, dirs_exist_ok=True)
    refused(lambda: GPSTokenModel.from_pretrained(folder), "adapter_model.safetensors")
    lora = "pytorch_lora_weights.bin"
    plant(tmp_path / "adapter" / lora, tmp_path / "unpickled")
    for model in (
        tiny_pipeline.make_texture_transformer(),
        AutoencoderGPSToken.from_gpstoken(make_model(num_tokens=16)),
    ):
        load = partial(model.load_lora_adapter, tmp_path / "adapter")
        refused(partial(load, use_safetensors=False), "use_safetensors")
        refused(partial(load, weight_name=lora), "weight_name must end in")
        with pytest.raises(OSError, match=r"pytorch_lora_weights\.safetensors|safetensors"):
            load()
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize("kind", [*MODELS, "pipeline"])
def test_no_pickle_is_written(healthy, tmp_path, kind):
    """What is never loaded is not written: asked for pickles, our classes write safetensors, as transformers does."""
    cls = KINDS[kind][0]
    cls.from_pretrained(healthy / kind).save_pretrained(tmp_path, safe_serialization=False)
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pt", ".pth")]
    cls.from_pretrained(tmp_path)


# -- layout banks and layouts


def edited_bank(**changes):
    bank = tiny_pipeline.make_bank()
    state = {name: tensor.clone() for name, tensor in bank.state_dict().items()}
    for name, edit in changes.items():
        edit(state[name])
    return bank, state


def set_at(index, value):
    def edit(tensor):
        tensor[index] = value

    return edit


def reverse(tensor):
    tensor.copy_(tensor.flip(0))


BAD_BANKS = {
    "NaN": ("gaussians", set_at((3, 1), float("nan")), "must be finite"),
    "infinite": ("gaussians", set_at((3, 4), float("inf")), "must be finite"),
    "negative sigma": ("gaussians", set_at((3, 0), -0.1), "0 < sigma < 1"),
    "rho of 1": ("gaussians", set_at((3, 2), 1.0), "-1 < rho < 1"),
    "offsets of 10^15": ("offsets", set_at(3, 10**15), "offsets must rise"),
    "last offset of 10^15": ("offsets", set_at(-1, 10**15), "offsets must rise"),
    "reversed offsets": ("offsets", reverse, "offsets must rise"),
    "empty layout": ("offsets", lambda offsets: offsets[1].copy_(offsets[2]), "offsets must rise"),
    "offsets from 1": ("offsets", set_at(0, 1), "offsets must rise"),
    "negative class": ("class_labels", set_at(0, -1), "class_labels must be at least 0"),
}


@pytest.mark.parametrize("name", BAD_BANKS)
def test_a_bad_bank_is_refused(copied, name):
    buffer, edit, message = BAD_BANKS[name]
    bank, state = edited_bank(**{buffer: edit})
    folder = copied("bank")
    save_file(state, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    for arguments in ({}, {"output_loading_info": True}):
        refused(lambda arguments=arguments: GaussianLayoutBank.from_pretrained(folder, **arguments), folder, message)
    before = {name: tensor.clone() for name, tensor in bank.state_dict().items()}
    for assign in (False, True):
        refused(lambda assign=assign: bank.load_state_dict(state, assign=assign), message)
        refused(
            lambda assign=assign: bank.load_state_dict({buffer: state[buffer]}, strict=False, assign=assign), message
        )
    assert all(torch.equal(bank.state_dict()[name], before[name]) for name in before)
    pipeline = copied("pipeline")
    shutil.copytree(folder, pipeline / "layout_bank", dirs_exist_ok=True)
    refused(lambda: GPSTokenPipeline.from_pretrained(pipeline), message)


def test_a_good_bank_is_loaded(copied):
    bank, state = edited_bank(class_labels=set_at(0, 3))
    assert bank.load_state_dict(state).missing_keys == []
    assert bank.class_labels[0] == 3
    with pytest.raises(RuntimeError, match="size mismatch"):
        bank.load_state_dict({**state, "class_labels": torch.zeros(1, dtype=torch.int64)})


# -- names


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["gpstoken-digits", "gpstoken-nano"])
def test_the_name_of_a_bundled_checkpoint_gets_a_hint(kind, name, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(OSError, match=rf'bundled\("{name}"\)'):
        KINDS[kind][0].from_pretrained(name)


def test_a_folder_with_the_name_of_a_bundled_checkpoint_is_loaded(copied, monkeypatch):
    folder = copied("tokenizer", "gpstoken-nano")
    monkeypatch.chdir(folder.parent)
    assert GPSTokenModel.from_pretrained("gpstoken-nano").config.num_tokens == 8
    assert GPSTokenModel.from_pretrained(gpstoken_hf.bundled("gpstoken-nano")).config.num_tokens == 32


def test_a_file_is_no_checkpoint(healthy):
    for kind in MODELS:
        cls, name, weights = KINDS[kind]
        for file in (healthy / kind / name, healthy / kind / weights):
            refused(lambda cls=cls, file=file: cls.from_pretrained(file), file, "a folder or a repository")


# -- what callers pass on purpose


@torch.no_grad()
def test_a_tokenizer_loads_in_every_way(healthy, tmp_path, monkeypatch):
    folder, images = healthy / "tokenizer", make_images(1, 32, 32)
    expected = make_model()(images).sample
    config = GPSTokenConfig.from_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    save_file(
        {f"old.{key}": value for key, value in weights.items()}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    shutil.copy(folder / "config.json", tmp_path)
    models = [
        GPSTokenModel.from_pretrained(folder, device_map="cpu"),
        GPSTokenModel.from_pretrained(folder, device_map={"": "cpu"}, low_cpu_mem_usage=True),
        GPSTokenModel.from_pretrained(str(folder), dtype="auto", attn_implementation="sdpa"),
        GPSTokenModel.from_pretrained(folder, config=config),
        GPSTokenModel.from_pretrained(folder.parent, subfolder="tokenizer"),
        GPSTokenModel.from_pretrained(folder, use_safetensors=True),
        GPSTokenModel.from_pretrained(None, config=config, state_dict=weights),
        GPSTokenModel.from_pretrained(tmp_path, key_mapping={"^old.": ""}),
        GPSTokenModel.from_pretrained(folder, output_loading_info=True)[0],
        AutoModel.from_pretrained(folder.parent, subfolder="tokenizer"),
        GPSTokenModel.from_pretrained(folder, tile_decode="stitched", num_tokens=8),
    ]
    assert models[-1].config.tile_decode == "stitched"
    # With peft, transformers looks for an adapter beside the file and takes its name for a repository.
    monkeypatch.setattr("transformers.integrations.peft.is_peft_available", lambda: False)
    models.append(GPSTokenModel.from_pretrained(folder / "model.safetensors", config=config))
    for model in models:
        assert not model.training
        assert torch.equal(model(images).sample, expected)
    with pytest.raises(TypeError, match="unexpected keyword"):
        GPSTokenModel.from_pretrained(folder, no_such_argument=1)


def test_fresh_weights_are_allowed_where_the_caller_takes_what_fits(copied):
    folder = copied("tokenizer")
    model, info = GPSTokenModel.from_pretrained(
        folder, texture_channels=5, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert model.config.texture_channels == 5
    assert len(info["mismatched_keys"]) > 1
    change_tensors(folder / "model.safetensors", lambda tensors: tensors.pop("encoder.query"))
    model, info = GPSTokenModel.from_pretrained(folder, output_loading_info=True)
    assert set(info["missing_keys"]) == {"encoder.query"}
    assert torch.isfinite(model.encoder.query).all()


def test_a_transformer_loads_in_every_way(healthy):
    folder = healthy / "transformer"
    expected = load_file(folder / "diffusion_pytorch_model.safetensors")
    models = [
        SiTTransformer1DModel.from_pretrained(folder, device_map="cpu"),
        SiTTransformer1DModel.from_pretrained(folder, low_cpu_mem_usage=False),
        SiTTransformer1DModel.from_pretrained(folder.parent, subfolder="transformer"),
        SiTTransformer1DModel.from_pretrained(folder, class_dropout_prob=0.5),
        SiTTransformer1DModel.from_pretrained(folder, disable_mmap=True),
        SiTTransformer1DModel.from_pretrained(folder, output_loading_info=True)[0],
    ]
    for model in models:
        assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert models[3].config.class_dropout_prob == 0.5
    half = SiTTransformer1DModel.from_pretrained(folder, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16


def test_a_float8_checkpoint_loads(healthy, tmp_path):
    model = SiTTransformer1DModel.from_pretrained(healthy / "transformer", torch_dtype=torch.float8_e4m3fn)
    model.save_pretrained(tmp_path)
    again = SiTTransformer1DModel.from_pretrained(tmp_path)
    assert torch.equal(again.proj_in.weight.float(), model.proj_in.weight.float())


def test_a_processor_loads_in_every_way(healthy):
    folder = healthy / "processor"
    loaded = GPSTokenImageProcessor.from_pretrained(folder / "preprocessor_config.json", do_resize=True)
    assert loaded.do_resize
    assert GPSTokenImageProcessor.from_pretrained(folder.parent, subfolder="processor").size == loaded.size
    _, unused = GPSTokenImageProcessor.from_pretrained(folder, return_unused_kwargs=True, something=1)
    assert unused == {"something": 1}
    (folder / "config.json").write_text('{"model_type": "gpstoken"}')
    assert type(AutoImageProcessor.from_pretrained(folder)) is GPSTokenImageProcessor


def test_a_missing_component_gets_a_hint(copied):
    folder = copied("pipeline")
    shutil.rmtree(folder / "transformer")
    for cls, source in ((GPSTokenPipeline, folder), (SiTTransformer1DModel, folder), (GPSTokenModel, folder)):
        with pytest.raises(OSError, match=r"got a pipeline\. .* or restore the folder of a component that is missing"):
            cls.from_pretrained(source)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", [3, None])
def test_a_source_is_a_name(kind, source):
    refused(lambda: KINDS[kind][0].from_pretrained(source), "must be a folder or a repository on the Hub")


# -- the Hub


PUSH = """
import os, pickle
import torch
from huggingface_hub import HfApi
from model_helpers import make_model
from tiny_pipeline import make_bank, make_texture_transformer

make_model().push_to_hub("tester/vae")
make_model().push_to_hub("tester/shards", max_shard_size="200KB")
transformer = make_texture_transformer()
transformer.push_to_hub("tester/sit")
transformer.save_pretrained("parts/deep", max_shard_size="30KB")
api = HfApi()
api.upload_folder(repo_id="tester/sit", folder_path="parts")
make_bank().push_to_hub("tester/bank")
api.create_tag("tester/vae", tag="first")
for repo in ("tester/vae", "tester/sit"):
    for name in ("pytorch_model.bin", "diffusion_pytorch_model.bin"):
        api.upload_file(repo_id=repo, path_in_repo=name, path_or_fileobj=b"no pickle")
api.create_repo("tester/pickled")
api.upload_file(repo_id="tester/pickled", path_in_repo="config.json", path_or_fileobj=b'{"model_type": "gpstoken"}')
api.upload_file(repo_id="tester/pickled", path_in_repo="pytorch_model.bin", path_or_fileobj=b"no pickle")
"""

LOAD = """
import pytest
import torch
from gpstoken_hf import GaussianLayoutBank, GPSTokenModel, SiTTransformer1DModel
from model_helpers import make_images, make_model
from tiny_pipeline import make_texture_transformer
from transformers import AutoModel

images = make_images(1, 32, 32)
expected = make_model()(images).sample
for load, repo, arguments in (
    (GPSTokenModel, "tester/vae", {}),
    (AutoModel, "tester/vae", {}),
    (GPSTokenModel, "tester/vae", {"revision": "first"}),
    (GPSTokenModel, "tester/shards", {}),
    (GPSTokenModel, "tester/vae", {"force_download": True}),
):
    model = load.from_pretrained(repo, **arguments)
    assert torch.equal(model(images).sample, expected)
    assert model.config.name_or_path == repo
weight = make_texture_transformer().proj_in.weight
for arguments in ({}, {"subfolder": "deep"}):
    model = SiTTransformer1DModel.from_pretrained("tester/sit", **arguments)
    assert torch.equal(model.proj_in.weight, weight)
    assert model.config._name_or_path == "tester/sit"
assert len(GaussianLayoutBank.from_pretrained("tester/bank")) == 20
# From the cache alone.
GPSTokenModel.from_pretrained("tester/vae", local_files_only=True)
GPSTokenModel.from_pretrained("tester/shards", local_files_only=True)
SiTTransformer1DModel.from_pretrained("tester/sit", local_files_only=True)
wrong = ({"revision": "no-such-branch"}, {"variant": "fp16"})
for cls, repo, arguments in (
    *((GPSTokenModel, "tester/vae", arguments) for arguments in wrong),
    *((AutoModel, "tester/vae", arguments) for arguments in wrong),
    *((SiTTransformer1DModel, "tester/sit", arguments) for arguments in wrong),
    *((cls, "tester/nothing", {}) for cls in (GPSTokenModel, AutoModel, SiTTransformer1DModel)),
    *((cls, "tester/pickled", {}) for cls in (GPSTokenModel, AutoModel)),
):
    with pytest.raises(OSError):
        cls.from_pretrained(repo, **arguments)
print("done")
"""


def test_the_same_checks_for_a_repository_on_the_hub(tmp_path):
    with LoopbackHub() as hub:
        environment = {**os.environ, **hub.env, "PYTHONPATH": os.pathsep.join([*sys.path]), "OMP_NUM_THREADS": "1"}
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE"):
            environment.pop(name, None)
        for code, cache in ((PUSH, "push"), (LOAD, "load")):
            environment["HF_HOME"] = str(tmp_path / cache)
            result = subprocess.run(
                [sys.executable, "-c", code],
                env=environment,
                cwd=tmp_path,
                capture_output=True,
                text=True,
                timeout=600,
            )
            assert result.returncode == 0, result.stderr[-3000:]
        assert result.stdout.strip() == "done"
        assert not [path for path in hub.downloads() if path.endswith(".bin")]


OFFLINE = """
import gpstoken_hf
import pytest

for name in ("GPSTokenModel", "AutoencoderGPSToken", "SiTTransformer1DModel", "FlowMatchSDEScheduler"):
    with pytest.raises(OSError, match="(?i)connect|offline"):
        getattr(gpstoken_hf, name).from_pretrained("tester/nothing")
"""


def test_without_a_network_the_error_says_so(tmp_path):
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", OFFLINE], env=environment, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr[-3000:]


# -- a campaign


def campaign(kind, folder, rng):
    """Every case of a kind: the file of the folder, what is done to it, and the corrupted file."""
    _, config, weights = KINDS[kind]
    for name, content in hostile.json_corruptions((folder / config).read_bytes(), rng, 40):
        yield folder / config, name, content
    if weights is not None:
        for name, content in hostile.safetensors_corruptions((folder / weights).read_bytes(), rng, 40):
            yield folder / weights, name, content


@pytest.mark.parametrize("kind", KINDS)
def test_every_corrupted_file_is_loaded_or_refused(copied, kind):
    """About 700 files in all. The pipeline has its own, and those of its parts are tested with the parts."""
    cls, folder = KINDS[kind][0], copied(kind)
    outcomes = {"loaded": 0, "refused": 0}
    failures = []
    for file, name, content in campaign(kind, folder, random.Random(kind)):
        original = file.read_bytes()
        file.write_bytes(content)
        try:
            with bounded():
                cls.from_pretrained(folder)
            outcomes["loaded"] += 1
        except (ValueError, OSError) as error:
            outcomes["refused"] += 1
            is_clear = type(error) is ValueError or isinstance(error, OSError)
            # How parts of a pipeline fit together is no fault of one file.
            if not is_clear or not (str(folder) in str(error) or kind == "pipeline") or len(str(error)) > 3000:
                failures.append((file.name, name, repr(error)[:300]))
        except Exception as error:
            failures.append((file.name, name, repr(error)[:300]))
        file.write_bytes(original)
    assert not failures
    assert outcomes["loaded"] > 5
    assert outcomes["refused"] > 30


def test_corrupted_layouts_are_loaded_or_refused(tmp_path):
    file = tmp_path / "layout.safetensors"
    bank = tiny_pipeline.make_bank()
    layout = GaussianLayout.stack(
        [GaussianLayout(bank.gaussians_of(0)[None, :6]), GaussianLayout(bank.gaussians_of(1)[None])]
    )
    layout.with_boxes((32, 32)).save(file)
    loaded, failures = 0, []
    for name, content in hostile.safetensors_corruptions(file.read_bytes(), random.Random(0), 100):
        file.write_bytes(content)
        try:
            with bounded():
                GaussianLayout.load(file, image_size=(32, 32))
            loaded += 1
        except Exception as error:
            if type(error) is not ValueError:
                failures.append((name, repr(error)[:300]))
    assert not failures
    assert loaded
