# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Converted components become one pipeline that loads, samples, and holds the converted weights bit for bit."""

import json
import pickle
import re
import shutil

import numpy as np
import pytest
import torch
from conversion_helpers import GOLDEN
from safetensors.torch import load_file, save_file

from conversion import convert_gpstoken, convert_layout_bank, convert_pipeline, convert_sit
from gpstoken_hf.partition import partition_images
from gpstoken_hf.pipeline_gpstoken import GPSTokenPipeline
from pipelines.shared.programs import run_program


def run(program, *argv):
    return run_program(program.main, [str(argument) for argument in argv])


@pytest.fixture(scope="module")
def components(tmp_path_factory):
    """Converted folders: the golden tokenizer, the golden generator widened to its 21 channels, a bank."""
    folder = tmp_path_factory.mktemp("components")
    tokenizer = GOLDEN / "tokenizer_official.safetensors"
    options = ("--num-tokens", 16, "--image-size", 64)
    assert run(convert_gpstoken, "--checkpoint", tokenizer, "--output", folder / "vae", *options) == 0

    tensors = load_file(GOLDEN / "sit_official.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, shape in (
        ("x_embedder.proj.weight", (64, 21, 1, 1)),
        ("final_layer.linear.weight", (42, 64)),
        ("final_layer.linear.bias", (42,)),
    ):
        tensors[f"ema_model.{name}"] = (0.1 * torch.randn(shape, generator=generator)).half()
    save_file(tensors, folder / "generator.safetensors")
    argv = ["--checkpoint", folder / "generator.safetensors", "--output", folder / "sit", "--num-attention-heads", 4]
    assert run(convert_sit, *argv) == 0

    images = torch.rand(3, 3, 64, 64, generator=generator) * 2 - 1
    layouts = partition_images(images, 16).gaussians.numpy()
    content = {label: [np.pad(layout, ((0, 0), (0, 16)))] for label, layout in zip((0, 4, 9), layouts)}
    (folder / "initg.pickle").write_bytes(pickle.dumps(content))
    assert run(convert_layout_bank, folder / "initg.pickle", "--output", folder / "bank") == 0
    return folder


def arguments(components, *changes):
    values = {
        "--tokenizer": components / "vae",
        "--transformer": components / "sit",
        "--layout-bank": components / "bank",
    }
    values.update(zip(changes[::2], changes[1::2]))
    return [item for name, value in values.items() if value is not None for item in (name, value)]


@pytest.fixture(scope="module")
def assembled(components, tmp_path_factory):
    folder = tmp_path_factory.mktemp("assembled") / "pipeline"
    names = folder.parent / "names.json"
    names.write_text(json.dumps([f"name {index}" for index in range(10)]))
    assert run(convert_pipeline, *arguments(components), "--id2label", names, "--output", folder) == 0
    return folder


def test_holds_the_converted_weights(assembled, components):
    for name, source in (("vae", "vae"), ("transformer", "sit"), ("layout_bank", "bank")):
        files = list((components / source).glob("*.safetensors"))
        assert len(files) == 1
        assert (assembled / name / files[0].name).read_bytes() == files[0].read_bytes()


def test_is_what_save_pretrained_writes(assembled, tmp_path):
    """The same files and the same index as those of the loaded pipeline."""
    pipeline = GPSTokenPipeline.from_pretrained(assembled)
    pipeline.save_pretrained(tmp_path)
    ours = {path.relative_to(assembled) for path in assembled.rglob("*") if path.is_file()}
    theirs = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    assert {str(path) for path in ours - theirs} == {"README.md", ".gpstoken.json"}
    assert theirs <= ours
    index, again = (json.loads((folder / "model_index.json").read_text()) for folder in (assembled, tmp_path))
    index.pop("_name_or_path", None)
    again.pop("_name_or_path", None)
    assert index == again


def test_samples_from_the_bank(assembled):
    pipeline = GPSTokenPipeline.from_pretrained(assembled)
    pipeline.set_progress_bar_config(disable=True)
    out = pipeline(["name 4", 9], num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="pt")
    assert out.images.shape == (2, 3, 64, 64)
    assert torch.isfinite(out.images).all()
    for row, label in enumerate((4, 9)):
        assert torch.equal(out.layout[row], pipeline.layout_bank.layouts_by_class()[label][0])
    # The channel statistics came along.
    assert pipeline.transformer.config["latents_mean"] == convert_sit.M128_TEXTURE_MEAN


def test_card(assembled):
    card = (assembled / "README.md").read_text()
    assert "| images | 64 x 64 |" in card
    assert "| layouts | a bank of 3 layouts |" in card


def test_verify(components, tmp_path, capsys):
    assert run(convert_pipeline, *arguments(components), "--output", tmp_path / "out", "--verify") == 0
    assert "loads and makes an image of (3, 64, 64)" in capsys.readouterr().out


def test_without_a_bank_a_layout_must_be_given(components, tmp_path, capsys):
    argv = arguments(components, "--layout-bank", None)
    assert run(convert_pipeline, *argv, "--output", tmp_path / "out", "--verify") == 0
    assert "every call of the pipeline must be given a layout" in capsys.readouterr().out
    assert GPSTokenPipeline.from_pretrained(tmp_path / "out").layout_bank is None


def refusal(capsys, argv, message):
    assert run(convert_pipeline, *argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert re.search(message, error), error


def edited(components, tmp_path, source, edit):
    """A copy of a component with something changed."""
    folder = tmp_path / "edited"
    shutil.copytree(components / source, folder)
    edit(folder)
    return folder


def cut_weights(folder):
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])


def without_weights(folder):
    next(folder.glob("*.safetensors")).unlink()


def other_depth(folder):
    config = json.loads((folder / "config.json").read_text())
    key = "num_hidden_layers" if "num_hidden_layers" in config else "num_layers"
    (folder / "config.json").write_text(json.dumps({**config, key: config[key] + 1}))


def broken_config(folder):
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize(("option", "source"), [("--tokenizer", "vae"), ("--transformer", "sit")])
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (cut_weights, "not a whole safetensors file"),
        (without_weights, "are not those of its config.json"),
        (other_depth, "are not those of its config.json"),
        (broken_config, "is no JSON"),
    ],
)
def test_damaged_components_are_refused(components, tmp_path, capsys, option, source, edit, message):
    folder = edited(components, tmp_path, source, edit)
    refusal(capsys, [*arguments(components, option, folder), "--output", tmp_path / "out"], message)
    assert [path.name for path in tmp_path.iterdir()] == ["edited"]


@pytest.mark.parametrize(
    ("option", "source", "message"),
    [
        ("--tokenizer", "sit", "expected the folder of a GPSTokenModel, .* holds a SiTTransformer1DModel"),
        ("--transformer", "bank", "expected the folder of a SiTTransformer1DModel, .* holds a GaussianLayoutBank"),
        ("--layout-bank", "vae", "expected the folder of a GaussianLayoutBank, .* holds a GPSTokenModel"),
        ("--tokenizer", "missing", "has no config.json"),
    ],
)
def test_swapped_components_are_refused(components, tmp_path, capsys, option, source, message):
    argv = arguments(components, option, components / source)
    refusal(capsys, [*argv, "--output", tmp_path / "out"], message)
    assert not list(tmp_path.iterdir())


def test_components_that_do_not_fit_are_refused(components, tmp_path, capsys):
    narrow = tmp_path / "narrow"
    options = ("--output", narrow, "--num-attention-heads", 4)
    assert run(convert_sit, "--checkpoint", GOLDEN / "sit_official.safetensors", *options) == 0
    argv = [*arguments(components, "--transformer", narrow), "--output", tmp_path / "out"]
    refusal(capsys, argv, "transformer must have in_channels = 21, as the vae's tokens, got 9")

    (tmp_path / "initg.pickle").write_bytes(pickle.dumps({10: [np.full((4, 5), 0.5, "f4")]}))
    assert run(convert_layout_bank, tmp_path / "initg.pickle", "--output", tmp_path / "bank") == 0
    argv = [*arguments(components, "--layout-bank", tmp_path / "bank"), "--output", tmp_path / "out"]
    refusal(capsys, argv, "knows classes 0 to 9, the bank has 10")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["{", '{"a": "b"}', "3"])
def test_bad_class_names_are_refused(components, tmp_path, capsys, content):
    names = tmp_path / "names.json"
    names.write_text(content)
    argv = [*arguments(components), "--id2label", names, "--output", tmp_path / "out"]
    refusal(capsys, argv, "is no JSON|must hold a dict of class id")
    assert [path.name for path in tmp_path.iterdir()] == ["names.json"]
