# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Conversion of the generator: exact in both directions, strict, and equal to the authors' recorded outputs."""

import json
import logging
import re

import pytest
import torch
from conversion_helpers import BROKEN_NAMES, GOLDEN, SHARED_GOLDEN, broken_checkpoints, same_bits
from safetensors.torch import load_file, save_file

from conversion import convert_sit
from gpstoken_hf.transformer_sit import SiTTransformer1DModel
from pipelines.shared.programs import run_program

OFFICIAL = GOLDEN / "sit_official.safetensors"
ARRAYS = GOLDEN / "sit_io.safetensors"
HEADS = ("--num_attention_heads", 4)


def run(*argv):
    return run_program(convert_sit.main, [str(argument) for argument in argv])


@pytest.fixture(scope="module")
def official():
    return load_file(OFFICIAL)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "sit"
    assert run("--checkpoint", OFFICIAL, "--output", folder, *HEADS) == 0
    return folder


def test_config(converted):
    config = SiTTransformer1DModel.load_config(converted)
    recorded = json.loads((GOLDEN / "sit_config.json").read_text())
    assert config["sample_size"] == recorded["latent_size"]
    assert config["in_channels"] == recorded["in_channels"]
    assert config["condition_channels"] == recorded["cond_channels"]
    assert config["num_layers"] == recorded["depth"]
    assert config["num_attention_heads"] == recorded["num_heads"]
    assert config["num_attention_heads"] * config["attention_head_dim"] == recorded["hidden_size"]
    assert config["num_classes"] == recorded["num_classes"]
    assert config["learn_sigma"] is recorded["learn_sigma"]
    assert config["condition_injection"] == "input"
    assert config["gaussian_target"] == "offset"
    assert config["latents_mean"] is None  # statistics are known for the m128 target only
    assert config["_time_convention"].startswith("forward takes timestep = 1000 (1 - t)")


def test_loads_strictly_and_quietly(converted, recwarn, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)  # to caplog
    model, info = SiTTransformer1DModel.from_pretrained(converted, output_loading_info=True)
    assert not any(info.values()), info
    assert set(load_file(converted / "diffusion_pytorch_model.safetensors")) == set(model.state_dict())
    said = [*(str(warning.message) for warning in recwarn), *caplog.messages]
    assert not [text for text in said if "SiTTransformer1DModel" in text]  # what else is said is not about the weights


# Largest error seen: 4.8e-7.
VELOCITIES = {"velocity", "velocity_unconditioned", "cfg_in", "cfg_out"}


@pytest.mark.parametrize(
    ("folder", "stem"),
    [
        (GOLDEN, "sit"),
        pytest.param(
            SHARED_GOLDEN,
            "sit_tiny",
            marks=pytest.mark.skipif(not SHARED_GOLDEN.is_dir(), reason="the larger golden set is not here"),
        ),
    ],
)
def test_agrees_with_the_release(tmp_path, capsys, folder, stem):
    source, arrays = folder / f"{stem}_official.safetensors", folder / f"{stem}_io.safetensors"
    assert run("--checkpoint", source, "--output", tmp_path / "out", *HEADS, "--verify", arrays) == 0
    printed = capsys.readouterr().out
    assert set(re.findall(r"verified: (\S+): largest error", printed)) == VELOCITIES
    assert "tensors equal the checkpoint's bit for bit" in printed


@pytest.mark.parametrize("array", sorted(VELOCITIES))
def test_verify_notices_a_difference(tmp_path, capsys, array):
    recorded = load_file(ARRAYS)
    recorded[array] = -recorded[array]
    arrays = tmp_path / "arrays.safetensors"
    save_file(recorded, arrays)
    assert run("--checkpoint", OFFICIAL, "--output", tmp_path / "out", *HEADS, "--verify", arrays) == 2
    error = capsys.readouterr().err
    assert f"must reproduce the recorded outputs, got errors of {array} " in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["arrays.safetensors"]


def test_reverse_gives_back_every_bit(converted, official, tmp_path):
    assert run("--checkpoint", converted, "--output", tmp_path / "back.safetensors", "--reverse") == 0
    back = load_file(tmp_path / "back.safetensors")
    assert set(official) - set(back) == {"initted", "step"}
    for name, tensor in back.items():
        assert same_bits(tensor, official[name]), name
    # A second time there is a file, and nothing says who has written it.
    written = (tmp_path / "back.safetensors").read_bytes()
    (tmp_path / "back.safetensors").write_bytes(written + b"mine")
    assert run("--checkpoint", converted, "--output", tmp_path / "back.safetensors", "--reverse") == 2
    assert (tmp_path / "back.safetensors").read_bytes() == written + b"mine"


@pytest.fixture(scope="module")
def with_online(official, tmp_path_factory):
    """A file with both kinds of weights, with different values."""
    online = {
        name.replace("ema_model.", "online_model."): -tensor for name, tensor in official.items() if "ema" in name
    }
    path = tmp_path_factory.mktemp("online") / "generator.safetensors"
    save_file({**official, **online}, path)
    return path


def test_ema_is_the_default_and_online_can_be_chosen(with_online, converted, official, tmp_path, capsys):
    assert run("--checkpoint", with_online, "--output", tmp_path / "ema", *HEADS) == 0
    printed = capsys.readouterr().out
    assert "dropped online_model.* (36 tensors: --weights ema)" in printed
    assert "dropped initted (training state)" in printed
    assert "dropped step (training state)" in printed
    weights = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "ema" / weights).read_bytes() == (converted / weights).read_bytes()

    assert run("--checkpoint", with_online, "--output", tmp_path / "online", *HEADS, "--weights", "online") == 0
    online = load_file(tmp_path / "online" / weights)
    assert torch.equal(online["pos_embed"], -official["ema_model.pos_embed"])
    back = tmp_path / "back.safetensors"
    assert run("--checkpoint", tmp_path / "online", "--output", back, "--reverse", "--weights", "online") == 0
    for name, tensor in load_file(back).items():
        assert name.startswith("online_model.")
        assert same_bits(tensor, load_file(with_online)[name])


def plain(official, condition=True):
    """The EMA weights under bare names, as plain SiT checkpoints have them."""
    tensors = {name.removeprefix("ema_model."): value for name, value in official.items() if name.startswith("ema")}
    return {name: value for name, value in tensors.items() if condition or not name.startswith("cond_embedder")}


@pytest.mark.parametrize("member", [None, "ema", "model", "state_dict"])
def test_plain_checkpoints(official, converted, tmp_path, member):
    tensors = plain(official)
    torch.save({member: tensors, "train_steps": 5} if member else tensors, tmp_path / "sit.pt")
    assert run("--checkpoint", tmp_path / "sit.pt", "--output", tmp_path / "out", *HEADS, "--verify", ARRAYS) == 0
    weights = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (converted / weights).read_bytes()
    back = tmp_path / "back.safetensors"
    assert run("--checkpoint", tmp_path / "out", "--output", back, "--reverse", "--weights", "plain") == 0
    assert set(load_file(back)) == set(tensors)


def test_torch_files_offer_both_kinds(official, tmp_path, capsys):
    ema = plain(official)
    online = {name: -value for name, value in ema.items()}
    torch.save({"model": online, "ema": ema}, tmp_path / "sit.pt")
    for weights, expected in (("ema", ema), ("online", online)):
        argv = ["--checkpoint", tmp_path / "sit.pt", "--output", tmp_path / weights, *HEADS, "--weights", weights]
        assert run(*argv) == 0
        written = load_file(tmp_path / weights / "diffusion_pytorch_model.safetensors")
        assert torch.equal(written["pos_embed"], expected["pos_embed"])


def test_plain_checkpoints_without_a_condition(official, tmp_path):
    save_file(plain(official, condition=False), tmp_path / "sit.safetensors")
    argv = ["--checkpoint", tmp_path / "sit.safetensors", "--output", tmp_path / "out", *HEADS]
    assert run(*argv, "--verify", "--gaussian_target", "logit") == 0
    model = SiTTransformer1DModel.from_pretrained(tmp_path / "out", torch_dtype=torch.float32).eval()
    assert model.config["condition_channels"] is None
    assert model.config["gaussian_target"] == "logit"
    recorded = load_file(ARRAYS)
    with torch.no_grad():
        x = recorded["x"].squeeze(-1).transpose(1, 2)
        output = model(x, 1000 * (1 - recorded["t"]), recorded["y"]).sample
    expected = recorded["velocity_unconditioned"].squeeze(-1).transpose(1, 2)
    torch.testing.assert_close(-output, expected, rtol=0, atol=1e-5)


def test_statistics_by_option(tmp_path):
    mean, std = [0.1 * index for index in range(9)], [1 + 0.1 * index for index in range(9)]
    argv = ["--checkpoint", OFFICIAL, "--output", tmp_path / "out", *HEADS]
    assert run(*argv, "--latents_mean", *mean, "--latents_std", *std) == 0
    config = SiTTransformer1DModel.load_config(tmp_path / "out")
    assert config["latents_mean"] == mean
    assert config["latents_std"] == std


def test_statistics_of_the_m128_target_are_the_default_for_its_channels(official, tmp_path):
    tensors = dict(official)
    generator = torch.Generator().manual_seed(0)
    tensors["ema_model.x_embedder.proj.weight"] = torch.randn(64, 21, 1, 1, generator=generator).half()
    tensors["ema_model.final_layer.linear.weight"] = torch.randn(42, 64, generator=generator).half()
    tensors["ema_model.final_layer.linear.bias"] = torch.randn(42, generator=generator).half()
    save_file(tensors, tmp_path / "generator.safetensors")
    assert run("--checkpoint", tmp_path / "generator.safetensors", "--output", tmp_path / "out", *HEADS) == 0
    config = SiTTransformer1DModel.load_config(tmp_path / "out")
    assert config["latents_mean"][:6] == [-0.0211, -0.0196, 0.0107, -0.0052, -0.0044, 1.8017]
    assert config["latents_std"][:6] == [0.0121, 0.0108, 0.2533, 0.0119, 0.0114, 2.7334]
    assert len(config["latents_mean"]) == len(config["latents_std"]) == 21
    assert (config["latents_mean"][-1], config["latents_std"][-1]) == (0.3222, 2.8200)


def refusal(capsys, argv, message):
    assert run(*argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert re.search(message, error), error


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("broken")
    return broken_checkpoints(OFFICIAL, folder, folder / "marker")


@pytest.mark.parametrize("name", BROKEN_NAMES)
def test_broken_checkpoints_are_refused(tmp_path, capsys, broken, name):
    path, message = broken[name]
    refusal(capsys, ["--checkpoint", path, "--output", tmp_path / "out", *HEADS], message)
    assert not list(tmp_path.iterdir())
    assert not (path.parent / "marker").exists()


def test_unknown_keys_outside_of_the_weights_are_refused(official, tmp_path, capsys):
    save_file({**official, "optimizer.state": torch.zeros(3)}, tmp_path / "w.safetensors")
    argv = ["--checkpoint", tmp_path / "w.safetensors", "--output", tmp_path / "out", *HEADS]
    refusal(capsys, argv, r"1 unknown key \(optimizer.state\)")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--num_attention_heads must be given for a model of this depth and width, got none"),
        (["--num_attention_heads", 7], "must divide the width 64, got 7"),
        (
            [*HEADS, "--weights", "online"],
            r"--weights must be one of \['ema'\], which the checkpoint holds, got online",
        ),
        ([*HEADS, "--latents_mean", 1, "--latents_std", 1], "latents"),
    ],
)
def test_options_that_do_not_fit(tmp_path, capsys, argv, message):
    refusal(capsys, ["--checkpoint", OFFICIAL, "--output", tmp_path / "out", *argv], message)
    assert not list(tmp_path.iterdir())


def test_patches_are_refused(official, tmp_path, capsys):
    tensors = dict(official)
    tensors["ema_model.x_embedder.proj.weight"] = torch.zeros(64, 9, 2, 2)
    save_file(tensors, tmp_path / "w.safetensors")
    argv = ["--checkpoint", tmp_path / "w.safetensors", "--output", tmp_path / "out", *HEADS]
    refusal(capsys, argv, "patch size of .* must be 1, got 2 x 2")


@pytest.mark.parametrize("shape", [(), (0,), (191,), (192, 1)])
def test_projections_that_cannot_be_cut_in_three_are_refused(official, tmp_path, capsys, shape):
    save_file({**official, "ema_model.blocks.0.attn.qkv.bias": torch.zeros(shape)}, tmp_path / "w.safetensors")
    argv = ["--checkpoint", tmp_path / "w.safetensors", "--output", tmp_path / "out", *HEADS]
    refusal(capsys, argv, "blocks.0.attn.qkv.bias must have (a first axis that 3 divides|the shape of)")
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


def test_a_tokenizer_is_no_generator(tmp_path, capsys):
    argv = ["--checkpoint", GOLDEN / "tokenizer_official.safetensors", "--output", tmp_path / "out", *HEADS]
    refusal(capsys, argv, "must be a SiT generator")
    assert not list(tmp_path.iterdir())


def test_mean_without_std(tmp_path):
    with pytest.raises(SystemExit) as exit_info:
        run("--checkpoint", OFFICIAL, "--output", tmp_path / "out", *HEADS, "--latents_mean", 1)
    assert exit_info.value.code == 2
