# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Conversion of the tokenizer: exact in both directions, strict, and equal to the authors' recorded outputs."""

import json
import re

import pytest
import torch
from conversion_helpers import BROKEN_NAMES, GOLDEN, SHARED_GOLDEN, broken_checkpoints, same_bits
from safetensors.torch import load_file, save_file

from conversion import convert_gpstoken
from conversion.verification import Comparison, check_errors
from gpstoken_hf.configuration_gpstoken import GPSTokenConfig
from gpstoken_hf.image_processing_gpstoken import GPSTokenImageProcessor
from gpstoken_hf.layout import GaussianLayout
from gpstoken_hf.modeling_gpstoken import GPSTokenModel
from pipelines.shared.programs import run_program

OFFICIAL = GOLDEN / "tokenizer_official.safetensors"
ARRAYS = GOLDEN / "tokenizer_io.safetensors"
OPTIONS = ("--num_tokens", 16, "--image_size", 64)
DROPPED = {f"preprocess_img.{block}.temb_proj.{name}" for block in (1, 2) for name in ("weight", "bias")}


def run(*argv):
    return run_program(convert_gpstoken.main, [str(argument) for argument in argv])


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "gpstoken"
    assert run("--checkpoint", OFFICIAL, "--output", folder, *OPTIONS) == 0
    return folder


def test_sizes_come_from_the_tensors(converted):
    config = GPSTokenConfig.from_pretrained(converted)
    recorded = json.loads((GOLDEN / "tokenizer_config.json").read_text())
    encoder, decoder = recorded["gpsconfig"], recorded["decoderconfig"]
    assert config.hidden_size == encoder["gpsenc_c"]
    assert config.num_hidden_layers == encoder["gpsenc_n"]
    assert config.roi_size == encoder["rois"]
    assert config.texture_channels == encoder["gps_c"]
    assert config.decoder_base_channels == decoder["ch"]
    assert list(config.decoder_channel_multipliers) == decoder["ch_mult"]
    assert config.decoder_layers_per_block == decoder["num_res_blocks"]
    assert config.conditioner_channels == 128
    assert config.mlp_ratio == 4
    # Not in the tensors: options, and the defaults of the release.
    assert (config.num_tokens, config.image_size, config.num_attention_heads) == (16, 64, 8)
    assert (config.splat_support, config.tile_decode, config.min_region_size) == (3, "merged", 8)
    assert config.dtype == torch.float16  # as the file stores them


def test_loads_strictly(converted):
    model, info = GPSTokenModel.from_pretrained(converted, output_loading_info=True)
    assert not any(info.values()), info
    assert model.dtype == torch.float16
    names = set(load_file(converted / "model.safetensors"))
    assert names == set(model.state_dict())


def test_writes_processor_and_card(converted):
    processor = GPSTokenImageProcessor.from_pretrained(converted)
    assert dict(processor.crop_size) == {"height": 64, "width": 64}
    card = (converted / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "Converted from `tokenizer_official.safetensors`" in card
    assert "PSNR" not in card  # no released preset, no numbers
    assert {path.name for path in converted.iterdir()} == {
        *(".gpstoken.json", "README.md", "config.json", "model.safetensors", "preprocessor_config.json")
    }


def test_card_marks_the_papers_numbers():
    from conversion.model_cards import gpstoken_card

    card = gpstoken_card(GPSTokenConfig.preset("l256"), "l256", "gpstoken_l256.safetensors")
    assert "**These are the paper's numbers for l256; they were not measured with this folder.**" in card
    assert "| 28.81 | 0.809 | 0.043 | 0.22 | 1.31 | 1.65 | 3.77 |" in card


def errors_printed(text):
    return {name: float(error) for name, error in re.findall(r"verified: (.+): largest error (\S+) \(", text)}


# Largest errors seen: tokens 1.4e-6, maps 2.7e-6, images 7.0e-5, merged images 1.7e-5.
OUTPUTS = {
    *("images with other regions", "init_gaussians", "tokens", "rendered", "decoded"),
    *("merged_tokens", "merged_rendered", "merged_decoded"),
}


def test_agrees_with_the_release(tmp_path, capsys):
    assert run("--checkpoint", OFFICIAL, "--output", tmp_path / "out", *OPTIONS, "--verify", ARRAYS) == 0
    printed = capsys.readouterr().out
    assert "167 tensors equal the checkpoint's bit for bit" in printed
    assert set(errors_printed(printed)) == OUTPUTS


@pytest.mark.skipif(not SHARED_GOLDEN.is_dir(), reason="the larger golden set is not here")
def test_agrees_with_the_release_on_photographs(tmp_path, capsys):
    source, arrays = (SHARED_GOLDEN / f"tokenizer_tiny_{kind}.safetensors" for kind in ("official", "io"))
    assert run("--checkpoint", source, "--output", tmp_path / "out", *OPTIONS, "--verify", arrays) == 0
    assert set(errors_printed(capsys.readouterr().out)) == OUTPUTS
    # Full-resolution features of the conditioner, which the token comparison sees only through its regions.
    model = GPSTokenModel.from_pretrained(tmp_path / "out").eval()
    recorded = load_file(arrays)
    with torch.no_grad():
        features = model.encoder.conditioner(recorded["pixel_values"][:1])
    torch.testing.assert_close(features, recorded["conditioner_features"], rtol=0, atol=1e-5)


def test_tokens_and_images_against_the_recording(converted):
    """The comparison of --verify without its code: given the recorded regions, in the recorded order."""
    recorded = load_file(ARRAYS)
    model = GPSTokenModel.from_pretrained(converted, dtype=torch.float32).eval()
    boxes = ((recorded["regions"] + 1) / 2 * 63).round().long()
    with torch.no_grad():
        layout = GaussianLayout.from_boxes(boxes, (64, 64))
        encoded = model.encode(recorded["pixel_values"], layout=layout)
        torch.testing.assert_close(encoded.layout.gaussians, recorded["init_gaussians"], rtol=0, atol=1e-6)
        torch.testing.assert_close(encoded.tokens, recorded["tokens"], rtol=0, atol=1e-5)
        maps = model.render(encoded.tokens, (16, 16))
        torch.testing.assert_close(maps, recorded["rendered"], rtol=0, atol=1e-5)
        torch.testing.assert_close(model.decode(encoded.tokens).sample, recorded["decoded"], rtol=0, atol=1e-3)


@pytest.mark.parametrize("array", ["tokens", "regions"])
def test_verify_notices_a_difference(tmp_path, capsys, array):
    recorded = load_file(ARRAYS)
    recorded[array] = recorded[array].roll(1, dims=1)
    save_file(recorded, tmp_path / "arrays.safetensors")
    code = run(
        "--checkpoint", OFFICIAL, "--output", tmp_path / "out", *OPTIONS, "--verify", tmp_path / "arrays.safetensors"
    )
    assert code == 2
    assert "must reproduce the recorded outputs" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["arrays.safetensors"]


@pytest.mark.parametrize("error", [1.01e-3, float("nan"), float("inf")])
def test_errors_beyond_the_tolerance_are_refused(error, capsys):
    good = Comparison("good", 1e-3, 1e-3)
    check_errors([good])
    with pytest.raises(ValueError, match=r"recorded outputs, got errors of bad \S+ > 0.001$"):
        check_errors([good, Comparison("bad", error, 1e-3)])
    assert "verified: bad: largest error" in capsys.readouterr().out


def test_verify_needs_inputs(tmp_path, capsys):
    save_file({"tokens": torch.zeros(1)}, tmp_path / "arrays.safetensors")
    code = run(
        "--checkpoint", OFFICIAL, "--output", tmp_path / "out", *OPTIONS, "--verify", tmp_path / "arrays.safetensors"
    )
    assert code == 2
    assert "must hold pixel_values, got ['tokens']" in capsys.readouterr().err


def test_verify_without_arrays_compares_the_bits(tmp_path, capsys):
    assert run("--checkpoint", OFFICIAL, "--output", tmp_path / "out", *OPTIONS, "--verify") == 0
    assert "167 tensors equal the checkpoint's bit for bit" in capsys.readouterr().out


def test_reverse_gives_back_every_bit(converted, tmp_path, capsys):
    assert run("--checkpoint", converted, "--output", tmp_path / "back.safetensors", "--reverse") == 0
    original, back = load_file(OFFICIAL), load_file(tmp_path / "back.safetensors")
    assert set(original) - set(back) == DROPPED
    assert set(back) <= set(original)
    for name, tensor in back.items():
        assert same_bits(tensor, original[name]), name
    printed = capsys.readouterr().out
    assert all(name in printed for name in DROPPED)


def test_reverse_leaves_a_file_of_yours_alone(converted, tmp_path, capsys):
    (tmp_path / "mine.safetensors").write_text("mine")
    argv = ["--checkpoint", converted, "--output", tmp_path / "mine.safetensors", "--reverse"]
    refusal(capsys, argv, "must not exist yet")
    assert (tmp_path / "mine.safetensors").read_text() == "mine"


def test_dropped_keys_are_named_and_may_be_absent(tmp_path, capsys, converted):
    tensors = {name: tensor for name, tensor in load_file(OFFICIAL).items() if name not in DROPPED}
    save_file(tensors, tmp_path / "lean.safetensors")
    assert run("--checkpoint", tmp_path / "lean.safetensors", "--output", tmp_path / "lean", *OPTIONS) == 0
    assert "dropped preprocess" not in capsys.readouterr().out
    assert run("--checkpoint", OFFICIAL, "--output", tmp_path / "whole", *OPTIONS) == 0
    assert set(re.findall(r"dropped (\S+) \(", capsys.readouterr().out)) == DROPPED
    files = [tmp_path / name / "model.safetensors" for name in ("lean", "whole")]
    assert files[0].read_bytes() == files[1].read_bytes() == (converted / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("name", "member"), [("w.pt", None), ("w.bin", "state_dict"), ("w.ckpt", "model"), ("w.pth", None)]
)
def test_torch_files_convert_to_the_same_bytes(tmp_path, converted, name, member):
    tensors = load_file(OFFICIAL)
    content = {member: tensors, "epoch": 3} if member else tensors
    torch.save(content, tmp_path / name)
    assert run("--checkpoint", tmp_path / name, "--output", tmp_path / "out", *OPTIONS) == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (converted / "model.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_number_types_are_kept(tmp_path, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(OFFICIAL).items()}
    save_file(tensors, tmp_path / "w.safetensors")
    assert run("--checkpoint", tmp_path / "w.safetensors", "--output", tmp_path / "out", *OPTIONS) == 0
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {dtype}
    assert torch.equal(written["encoder.query"], tensors["gps_embed.weight"])
    assert GPSTokenConfig.from_pretrained(tmp_path / "out").dtype == dtype


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("broken")
    files = broken_checkpoints(OFFICIAL, folder, folder / "marker")
    assert set(files) == set(BROKEN_NAMES)
    return files


def refusal(capsys, argv, message):
    """Check that a run exits with code 2 and prints one line that matches `message`."""
    assert run(*argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert re.search(message, error), error


@pytest.mark.parametrize("name", BROKEN_NAMES)
def test_broken_checkpoints_are_refused(tmp_path, capsys, broken, name):
    path, message = broken[name]
    refusal(capsys, ["--checkpoint", path, "--output", tmp_path / "deep" / "out", *OPTIONS], message)
    assert not [entry for entry in tmp_path.rglob("*") if not entry.is_dir() or entry.name != "deep"]
    assert not (path.parent / "marker").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--num_tokens N or --preset s64|m128|l256 must be given, got neither"),
        (["--preset", "m128"], "hidden_size of the checkpoint must be 512 for m128, got 64"),
        (["--num_tokens", 16, "--num_attention_heads", 7], "hidden_size=64 and num_attention_heads=7"),
    ],
)
def test_options_that_do_not_fit(tmp_path, capsys, argv, message):
    refusal(capsys, ["--checkpoint", OFFICIAL, "--output", tmp_path / "out", *argv], re.escape(message))
    assert not list(tmp_path.iterdir())


def test_a_generator_is_no_tokenizer(tmp_path, capsys):
    source = GOLDEN / "sit_official.safetensors"
    refusal(capsys, ["--checkpoint", source, "--output", tmp_path / "out", *OPTIONS], "must be a GPSToken tokenizer")
    assert not list(tmp_path.iterdir())


def test_an_output_that_exists_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    refusal(capsys, ["--checkpoint", OFFICIAL, "--output", tmp_path, *OPTIONS], "not empty")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_reverse_refuses_what_it_cannot_name(converted, tmp_path, capsys):
    tensors = load_file(converted / "model.safetensors")
    tensors["encoder.query_2"] = tensors["encoder.query"].clone()
    folder = tmp_path / "edited"
    folder.mkdir()
    (folder / "config.json").write_bytes((converted / "config.json").read_bytes())
    save_file(tensors, folder / "model.safetensors")
    argv = ["--checkpoint", folder, "--output", tmp_path / "back.safetensors", "--reverse"]
    refusal(capsys, argv, "encoder.query_2 must have shape None, got")
    del tensors["encoder.query_2"], tensors["encoder.query"]
    save_file(tensors, folder / "model.safetensors")
    refusal(capsys, argv, "encoder.query must have shape .* None")
    query = load_file(converted / "model.safetensors")["encoder.query"]
    save_file({"encoder.query": query}, folder / "other.safetensors")
    message = "model.safetensors must hold the tensor encoder.query, got none"
    refusal(capsys, argv, message)
    save_file({"encoder.query": query}, folder / "another.safetensors")
    refusal(capsys, argv, "must be in one file, got encoder.query")
    assert [path.name for path in tmp_path.iterdir()] == ["edited"]


@pytest.mark.parametrize(
    "extra", [["--reverse", "--push_to_hub", "a/b"], ["--reverse", "--verify"], ["--preset", "xl"]]
)
def test_bad_arguments(tmp_path, extra):
    with pytest.raises(SystemExit) as exit_info:
        run("--checkpoint", OFFICIAL, "--output", tmp_path / "out", *extra)
    assert exit_info.value.code == 2
