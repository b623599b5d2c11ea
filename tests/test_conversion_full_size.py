# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""The full key lists of the released checkpoints: every key has a rule, and the memory is bounded."""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conversion_helpers import GOLDEN

from conversion import convert_gpstoken, convert_sit
from conversion.checkpoints import open_checkpoint
from conversion.folders import build_empty
from conversion.key_tables import plan_conversion, sit_rules
from gpstoken_hf.transformer_sit import SiTTransformer1DModel

SHAPES = json.loads((GOLDEN / "official_state_dict_shapes.json").read_text())
# Parameters of the converted models, and encoder or SiT blocks.
EXPECTED = {
    "gpstoken_s64": (128_532_150, 30),
    "gpstoken_m128": (128_532_150, 30),
    "gpstoken_l256": (128_614_086, 30),
    "generator_sit_xl_2_gs": (676_334_634, 28),
}
TOKENIZERS = ("gpstoken_s64", "gpstoken_m128", "gpstoken_l256")


def write(path, name, sparse):
    """Write a checkpoint with the release's names and shapes. The weights are random, or a hole in the file."""
    prefix = "ema_model." if "sit" in name else ""
    header, offset = {}, 0
    for key, shape in SHAPES[name].items():
        end = offset + 4 * torch.Size(shape).numel()
        header[prefix + key] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    generator = torch.Generator().manual_seed(0)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        if sparse:
            file.truncate(8 + len(encoded) + offset)
            return
        for shape in SHAPES[name].values():
            file.write(torch.randn(shape, generator=generator).numpy().data)


def test_every_list_is_here():
    assert set(SHAPES) == set(EXPECTED)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizer_keys_are_all_accounted_for(tmp_path, name):
    write(tmp_path / "w.safetensors", name, sparse=True)
    arguments = argparse.Namespace(
        preset=name.removeprefix("gpstoken_"),
        **dict.fromkeys(("num_tokens", "image_size", "support", "tile_decode", "num_attention_heads")),
        **dict.fromkeys(("min_region_size", "complexity_exponent", "sigma_scale")),
    )
    with open_checkpoint(tmp_path / "w.safetensors") as checkpoint:
        config = convert_gpstoken.build_config(checkpoint, arguments)
        tensors, dropped = convert_gpstoken.plan(checkpoint, config)
    num_parameters = sum(torch.Size(tensor.shape).numel() for tensor in tensors)
    assert num_parameters == sum(torch.Size(s).numel() for key, s in SHAPES[name].items() if "temb_proj" not in key)
    print(f"{name}: {len(SHAPES[name])} keys, {len(dropped)} dropped, {num_parameters:,} parameters")
    assert (num_parameters, config.num_hidden_layers) == EXPECTED[name]
    assert len(dropped) == 4
    assert len(tensors) + len(dropped) == len(SHAPES[name])
    preset = {"s64": (64, 16, "merged"), "m128": (128, 16, "merged"), "l256": (256, 32, "stitched")}
    assert preset[arguments.preset] == (config.num_tokens, config.texture_channels, config.tile_decode)


def test_generator_keys_are_all_accounted_for(tmp_path):
    name = "generator_sit_xl_2_gs"
    write(tmp_path / "w.safetensors", name, sparse=True)
    options = ("num_attention_heads", "latents_mean", "latents_std", "gaussian_target")
    with open_checkpoint(tmp_path / "w.safetensors") as checkpoint:
        # The heads of SiT-XL follow from its depth and width.
        config = convert_sit.build_config(checkpoint, "ema_model.", argparse.Namespace(**dict.fromkeys(options)))
        model = build_empty(lambda: SiTTransformer1DModel(**config), checkpoint.path, "a generator")
        rules, left_out = convert_sit.select(checkpoint.keys(), sit_rules(config["num_layers"], True), "ema")
        expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
        tensors = plan_conversion(rules, checkpoint, expected, "ema_model.")
    num_parameters = sum(torch.Size(tensor.shape).numel() for tensor in tensors)
    assert num_parameters == sum(torch.Size(shape).numel() for shape in SHAPES[name].values())
    print(f"{name}: {len(SHAPES[name])} keys, {num_parameters:,} parameters")
    assert (num_parameters, config["num_layers"]) == EXPECTED[name]
    assert config["num_attention_heads"] == 16
    assert (config["sample_size"], config["in_channels"], config["num_classes"]) == (128, 21, 1000)
    assert config["latents_mean"] == convert_sit.M128_TEXTURE_MEAN
    assert len(rules) == len(SHAPES[name])
    assert left_out == []


MEASURE = """
import glob, os, sys
from conversion import convert_gpstoken, convert_sit

def status(field):
    return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1]) * 1024

program = convert_sit if sys.argv[1] == "sit" else convert_gpstoken
files = [sys.argv[3]] if os.path.isfile(sys.argv[3]) else glob.glob(sys.argv[3] + "/*.safetensors")
size = sum(os.path.getsize(file) for file in files)
baseline = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # resets the peak
assert program.main(sys.argv[2:]) == 0
print("ratio", (status("VmHWM") - baseline) / size)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_full_size_conversion(tmp_path, name):
    """Convert random weights and convert them back, bit for bit. The peak memory includes mapped pages of the file.

    Measured: 1.02 times the file for the tokenizers in both directions; for the generator 1.00, and 1.17 in reverse.
    """
    source, folder = tmp_path / "w.safetensors", tmp_path / "out"
    write(source, name, sparse=False)
    is_sit = name not in TOKENIZERS
    command = [sys.executable, "-c", MEASURE, "sit" if is_sit else "gpstoken"]
    options = [] if is_sit else ["--preset", name.removeprefix("gpstoken_")]
    result = subprocess.run(
        [*command, "--checkpoint", source, "--output", folder, *options],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    print(result.stdout)
    assert f"{EXPECTED[name][0]:,} parameters" in result.stdout
    assert float(result.stdout.split("ratio ")[1]) <= 1.5
    back = tmp_path / "back.safetensors"
    result = subprocess.run(
        [*command, "--checkpoint", folder, "--output", back, "--reverse"],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    print(result.stdout)
    assert float(result.stdout.split("ratio ")[1]) <= 1.5
    with open_checkpoint(source) as original, open_checkpoint(back) as restored:
        assert {key for key in original.keys() if "temb_proj" not in key} == set(restored.keys())  # noqa: SIM118
        for key in restored.keys():  # noqa: SIM118
            assert torch.equal(original.tensor(key).view(torch.int32), restored.tensor(key).view(torch.int32)), key
    # Gigabytes, and pytest keeps the folders of its last runs.
    shutil.rmtree(tmp_path)
