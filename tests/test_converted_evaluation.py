# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""A converted checkpoint runs through every program with one command each (docs/released_checkpoints.md)."""

import pickle

import numpy as np
import PIL.Image
import pytest
import torch
from conversion_helpers import GOLDEN
from safetensors.torch import load_file, save_file

from conversion import convert_gpstoken, convert_layout_bank, convert_pipeline, convert_sit
from gpstoken_hf.evaluation_results import read_result
from gpstoken_hf.partition import partition_images
from pipelines import (
    ablate,
    benchmark_generation,
    benchmark_tokenizers,
    evaluate_generation,
    evaluate_reconstruction,
    figures,
)
from pipelines.shared.programs import run_program


def run(program, *argv):
    return run_program(program.main, [str(argument) for argument in argv])


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The golden tokenizer, and a pipeline of it, the golden generator widened to its channels, and a bank."""
    folder = tmp_path_factory.mktemp("converted")
    options = ("--num_tokens", 16, "--image_size", 64)
    golden = GOLDEN / "tokenizer_official.safetensors"
    assert run(convert_gpstoken, "--checkpoint", golden, "--output", folder / "gpstoken-m128", *options) == 0
    tensors = load_file(GOLDEN / "sit_official.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, shape in (
        ("x_embedder.proj.weight", (64, 21, 1, 1)),
        ("final_layer.linear.weight", (42, 64)),
        ("final_layer.linear.bias", (42,)),
    ):
        tensors[f"ema_model.{name}"] = 0.1 * torch.randn(shape, generator=generator)
    save_file(tensors, folder / "generator.safetensors")
    sit = ("--checkpoint", folder / "generator.safetensors", "--output", folder / "sit", "--num_attention_heads", 4)
    assert run(convert_sit, *sit) == 0
    layouts = partition_images(torch.rand(3, 3, 64, 64, generator=generator) * 2 - 1, 16).gaussians.numpy()
    content = {label: [np.pad(layout, ((0, 0), (0, 16)))] for label, layout in zip((0, 4, 9), layouts)}
    (folder / "initg.pickle").write_bytes(pickle.dumps(content))
    assert run(convert_layout_bank, folder / "initg.pickle", "--output", folder / "bank") == 0
    parts = (
        "--tokenizer",
        folder / "gpstoken-m128",
        "--transformer",
        folder / "sit",
        "--layout_bank",
        folder / "bank",
    )
    assert run(convert_pipeline, *parts, "--output", folder / "gpstoken") == 0
    (folder / "photographs").mkdir()
    for number in range(3):
        small = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        PIL.Image.fromarray(small).resize((72, 64)).save(folder / "photographs" / f"{number}.png")
    timm = pytest.importorskip("timm", reason="needs timm")
    torch.save(timm.create_model("test_efficientnet").state_dict(), folder / "weights.pth")
    return folder


CPU = ("--device", "cpu", "--output", "out")
COMMANDS = {
    "evaluate_reconstruction": (
        evaluate_reconstruction,
        ("--model", "gpstoken-m128", "--data", "photographs", "--resolution", 64, "--tokens", 8, 16, *CPU),
    ),
    "ablate": (ablate, ("--model", "gpstoken-m128", "--data", "photographs", "--resolution", 64, *CPU)),
    "figures": (figures, ("photographs", "--model", "gpstoken-m128", "--resolution", 64, *CPU)),
    "figures of a pipeline": (
        figures,
        ("--pipeline", "gpstoken", "--figures", 8, "--classes", 0, 4, "--steps", 2, *CPU),
    ),
    "evaluate_generation": (
        evaluate_generation,
        (
            *("--pipeline", "gpstoken", "--reference", "photographs", "--resolution", 64, "--num_images", 4),
            *("--steps", 2, "--classes", 0, 4, "--feature_network", "timm/test_efficientnet"),
            *("--feature_weights_file", "weights.pth", *CPU),
        ),
    ),
    "benchmark_tokenizers": (
        benchmark_tokenizers,
        ("--models", "gpstoken-m128", "--resolution", 64, "--batch_sizes", 1, "--repeats", 1, *CPU),
    ),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_one_command(name, converted, tmp_path, monkeypatch, capsys):
    for entry in converted.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    monkeypatch.chdir(tmp_path)
    program, arguments = COMMANDS[name]
    assert run(program, *arguments) == 0, capsys.readouterr().err
    page = (tmp_path / "out/report.html").read_text()
    assert "data:image/png;base64," in page
    if "figures" not in name:
        assert read_result(tmp_path / "out/results.json")["results"]


@pytest.mark.slow
def test_generation_costs_of_a_converted_pipeline(converted, tmp_path, monkeypatch):
    """Slow for the other side: the smallest SiT and an autoencoder of SDXL's size."""
    monkeypatch.chdir(converted)
    arguments = ("--pipeline", "gpstoken", "--size", "S", "--batch_size", 1, "--steps", 1, "--repeats", 1)
    assert run(benchmark_generation, *arguments, "--device", "cpu", "--output", tmp_path / "out") == 0
    ours, grid = read_result(tmp_path / "out/results.json")["results"]
    assert (ours["name"], ours["tokens"]) == ("gpstoken", 16)
    assert "layout step" not in ours  # its layouts come from the bank
    assert ours["parameters"] < grid["parameters"]
