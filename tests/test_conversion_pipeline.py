# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Converted components become one pipeline, which loads, samples and holds the converted weights bit for bit."""

import json
import pickle
import re
import shutil
import tracemalloc

import numpy as np
import pytest
import torch
from conversion_helpers import GOLDEN
from safetensors.torch import load_file, save_file
from tiny_pipeline import CHANNELS, make_transformer, make_vae

from conversion import convert_gpstoken, convert_layout_bank, convert_pipeline, convert_sit
from gpstoken_hf.partition import partition_images
from gpstoken_hf.pipeline_gpstoken import GPSTokenPipeline
from pipelines.shared.programs import run_program


def run(program, *argv):
    return run_program(program.main, [str(argument) for argument in argv])


@pytest.mark.parametrize("program", [convert_gpstoken, convert_layout_bank, convert_pipeline, convert_sit])
def test_options_are_spelt_in_snake_case(program, capsys):
    with pytest.raises(SystemExit):
        run(program, "--help")
    options = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    assert {"--output", "--push_to_hub"} <= options
    assert not [option for option in options if "-" in option[2:]]


@pytest.fixture(scope="module")
def components(tmp_path_factory):
    """Converted folders: the golden tokenizer, the golden generator widened to its 21 channels, a bank."""
    folder = tmp_path_factory.mktemp("components")
    tokenizer = GOLDEN / "tokenizer_official.safetensors"
    options = ("--num_tokens", 16, "--image_size", 64)
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
    argv = ["--checkpoint", folder / "generator.safetensors", "--output", folder / "sit", "--num_attention_heads", 4]
    assert run(convert_sit, *argv) == 0

    images = torch.rand(3, 3, 64, 64, generator=generator) * 2 - 1
    layouts = partition_images(images, 16).gaussians.numpy()
    content = {label: [np.pad(layout, ((0, 0), (0, 16)))] for label, layout in zip((0, 4, 9), layouts)}
    (folder / "initg.pickle").write_bytes(pickle.dumps(content))
    assert run(convert_layout_bank, folder / "initg.pickle", "--output", folder / "bank") == 0
    return folder


def test_a_thousand_classes_get_the_names_of_imagenet(tmp_path, capsys):
    make_vae().save_pretrained(tmp_path / "vae")
    make_transformer(CHANNELS, 5, seed=0, num_classes=1000).save_pretrained(tmp_path / "sit")
    argv = ["--tokenizer", tmp_path / "vae", "--transformer", tmp_path / "sit", "--output"]
    assert run(convert_pipeline, *argv, tmp_path / "out") == 0
    assert "class names: those of ImageNet" in capsys.readouterr().out
    pipeline = GPSTokenPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.get_label_ids(["tench", "Golden Retriever", "toilet tissue"]) == [0, 207, 999]
    assert len(pipeline.config.id2label) == 1000
    # Given names win, and other numbers of classes get none.
    (tmp_path / "names.json").write_text(json.dumps(["mine"]))
    assert run(convert_pipeline, *argv, tmp_path / "named", "--id2label", tmp_path / "names.json") == 0
    assert GPSTokenPipeline.load_config(tmp_path / "named")["id2label"] == {"0": "mine"}
    assert convert_pipeline.class_names(None, 10) is None


def arguments(components, *changes):
    values = {
        "--tokenizer": components / "vae",
        "--transformer": components / "sit",
        "--layout_bank": components / "bank",
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
    """The folder has the files and the index that the loaded pipeline would save."""
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
        assert torch.equal(out.layout.gaussians[row], pipeline.layout_bank.layouts_by_class()[label][0])
    # The channel statistics came along.
    assert pipeline.transformer.config["latents_mean"] == convert_sit.M128_TEXTURE_MEAN


def test_card(assembled):
    card = (assembled / "README.md").read_text()
    assert "| images | 64 x 64 |" in card
    assert "| layouts | a bank of 3 layouts |" in card


def test_verify(components, tmp_path, capsys):
    assert run(convert_pipeline, *arguments(components), "--output", tmp_path / "out", "--verify") == 0
    assert "generates an image of shape (3, 64, 64)" in capsys.readouterr().out


def test_without_a_bank_a_layout_must_be_given(components, tmp_path, capsys):
    argv = arguments(components, "--layout_bank", None)
    assert run(convert_pipeline, *argv, "--output", tmp_path / "out", "--verify") == 0
    assert "every call of the pipeline needs the argument layout" in capsys.readouterr().out
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
        (cut_weights, "must be a whole safetensors file"),
        (without_weights, "must be those of its config.json, got 0 blocks"),
        (other_depth, "must be those of its config.json, got [23] blocks .* for [34]"),
        (broken_config, "must be a JSON file"),
    ],
)
def test_damaged_components_are_refused(components, tmp_path, capsys, option, source, edit, message):
    folder = edited(components, tmp_path, source, edit)
    refusal(capsys, [*arguments(components, option, folder), "--output", tmp_path / "out"], message)
    assert [path.name for path in tmp_path.iterdir()] == ["edited"]


@pytest.mark.parametrize(
    ("option", "source", "message"),
    [
        ("--tokenizer", "sit", "must be the folder of a GPSTokenModel, got that of a SiTTransformer1DModel"),
        ("--transformer", "bank", "must be the folder of a SiTTransformer1DModel, got that of a GaussianLayoutBank"),
        ("--layout_bank", "vae", "must be the folder of a GaussianLayoutBank, got that of a GPSTokenModel"),
        ("--tokenizer", "missing", "got no config.json in it"),
    ],
)
def test_swapped_components_are_refused(components, tmp_path, capsys, option, source, message):
    argv = arguments(components, option, components / source)
    refusal(capsys, [*argv, "--output", tmp_path / "out"], message)
    assert not list(tmp_path.iterdir())


def test_components_that_do_not_fit_are_refused(components, tmp_path, capsys):
    narrow = tmp_path / "narrow"
    options = ("--output", narrow, "--num_attention_heads", 4)
    assert run(convert_sit, "--checkpoint", GOLDEN / "sit_official.safetensors", *options) == 0
    argv = [*arguments(components, "--transformer", narrow), "--output", tmp_path / "out"]
    refusal(capsys, argv, "transformer must have in_channels=21, got 9")

    (tmp_path / "initg.pickle").write_bytes(pickle.dumps({10: [np.full((4, 5), 0.5, "f4")]}))
    assert run(convert_layout_bank, tmp_path / "initg.pickle", "--output", tmp_path / "bank") == 0
    argv = [*arguments(components, "--layout_bank", tmp_path / "bank"), "--output", tmp_path / "out"]
    refusal(capsys, argv, "must be below the transformer's 10, got 10")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "must be a JSON file"),
        (b"\xff\xfe", "must be a JSON file, got UnicodeDecodeError"),
        (b"[" * 100_000, "must be a JSON file, got RecursionError"),
        (b"1" * 5000, "must be a JSON file"),
        (b" " * (10 * 2**20 + 1), "must be at most 10485760 bytes, got 10485761"),
        (b'{"a": "b"}', "must be integers from 0 to 9, got 'a'"),
        ('{"²": "b"}'.encode(), "must be integers from 0 to 9"),
        (b'{"-1": "b"}', "must be integers from 0 to 9, got '-1'"),
        (b'["name"]\n' + b"x", "must be a JSON file"),
        (str(["name"] * 11).replace("'", '"').encode(), "must be integers from 0 to 9, got '10'"),
        (b'{"1": ["b"]}', "the name of class 1 in .* must be a string, got list"),
        (b"[null]", "the name of class 0 in .* must be a string, got NoneType"),
        (b"3", "must hold an object of class id -> name or a list of names, got int"),
    ],
)
def test_bad_class_names_are_refused(components, tmp_path, capsys, content, message):
    names = tmp_path / "names.json"
    names.write_bytes(content)
    argv = [*arguments(components), "--id2label", names, "--output", tmp_path / "out"]
    refusal(capsys, argv, message)
    assert [path.name for path in tmp_path.iterdir()] == ["names.json"]


def config_with(**changes):
    def edit(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return edit


def config_text(text):
    def edit(folder):
        (folder / "config.json").write_text(text)

    return edit


REFUSED = "must be those of|must be the config of"
HOSTILE_CONFIGS = {
    "list": ("vae", config_text("[1, 2]"), "must hold a JSON object, got a list"),
    "deep list": ("vae", config_text("[" * 100_000), "must be a JSON file, got RecursionError"),
    "architectures is a number": ("vae", config_with(architectures=5), "got that of a None"),
    "architectures is a list of lists": ("vae", config_with(architectures=[[]]), "got that of a None"),
    "a billion layers": ("vae", config_with(num_hidden_layers=10**9), REFUSED),
    "a billion residual blocks": (
        "vae",
        config_with(decoder_layers_per_block=10**9),
        REFUSED,
    ),
    "a million levels": (
        "vae",
        config_with(decoder_channel_multipliers=[1] * 10**6),
        REFUSED,
    ),
    "a wide encoder": (
        "vae",
        config_with(hidden_size=2**33),
        "must be the config of a GPSTokenModel|must be those of",
    ),
    "wide features": ("vae", config_with(texture_channels=10**12), REFUSED),
    "text for a size": ("vae", config_with(hidden_size="64"), "must be the config of a GPSTokenModel"),
    "negative size": ("vae", config_with(num_tokens=-1), "must be the config of a GPSTokenModel"),
    "dtype of another world": ("vae", config_with(dtype=["x"]), "must be the config of a GPSTokenModel"),
    "a generator of a billion layers": (
        "sit",
        config_with(num_layers=10**9),
        REFUSED,
    ),
    "a generator of text layers": ("sit", config_with(num_layers="2"), "must be those of .* for '2'"),
    "no layers": ("sit", config_with(num_layers=None), "must be those of .* for None"),
    "a wide generator": (
        "sit",
        config_with(attention_head_dim=2**40),
        "must be the config of a SiTTransformer1DModel",
    ),
    "a billion classes": ("sit", config_with(num_classes=10**9), REFUSED),
    "text for channels": ("sit", config_with(in_channels="21"), "must be the config of a SiTTransformer1DModel"),
    "statistics of text": ("sit", config_with(latents_mean="x"), "must be the config of a SiTTransformer1DModel"),
    "a bank of a trillion tokens": ("bank", config_with(total_tokens=10**12), "must be those of its config.json"),
    "a bank of a trillion layouts": ("bank", config_with(num_layouts=10**12), "must be those of its config.json"),
    "a bank of a list": ("bank", config_with(num_layouts=[3]), "must be integers, got \\[3\\] and"),
}


@pytest.mark.parametrize("name", HOSTILE_CONFIGS)
def test_hostile_configs_are_one_line(components, tmp_path, capsys, name):
    source, edit, message = HOSTILE_CONFIGS[name]
    folder = edited(components, tmp_path, source, edit)
    option = {"vae": "--tokenizer", "sit": "--transformer", "bank": "--layout_bank"}[source]
    tracemalloc.start()
    try:
        refusal(capsys, [*arguments(components, option, folder), "--output", tmp_path / "out"], message)
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()
    # The way back reads the same folders.
    program = {"vae": convert_gpstoken, "sit": convert_sit, "bank": convert_layout_bank}[source]
    first = [folder] if source == "bank" else ["--checkpoint", folder]
    assert run(program, *first, "--output", tmp_path / "back.safetensors", "--reverse") == 2
    assert re.search(message, capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["edited"]


@pytest.mark.parametrize("text", ["[]", '{"crop_size": "x"}', "{"])
def test_a_hostile_image_processor_is_one_line(components, tmp_path, capsys, text):
    folder = edited(components, tmp_path, "vae", lambda folder: (folder / "preprocessor_config.json").write_text(text))
    argv = [*arguments(components, "--tokenizer", folder), "--output", tmp_path / "out"]
    refusal(capsys, argv, "preprocessor_config.json must be")
    assert [path.name for path in tmp_path.iterdir()] == ["edited"]
