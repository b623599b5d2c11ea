# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""pipelines/ablate.py: what is varied is what is measured, and the model is as before afterwards."""

import numpy as np
import PIL.Image
import pytest
import torch

from gpstoken_hf.configuration_gpstoken import GPSTokenConfig
from gpstoken_hf.evaluation_results import read_result
from gpstoken_hf.modeling_gpstoken import GPSTokenModel
from pipelines import ablate
from pipelines.shared.autoencoders import reconstruct
from pipelines.shared.programs import run_program


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return GPSTokenModel(GPSTokenConfig.preset("tiny")).eval()


@pytest.fixture(scope="module")
def images():
    noise = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    noise[:, :, :, 12:] *= 0.1  # busy at the left
    return noise


@pytest.fixture
def run(model, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "images").mkdir()
    for number, pixels in enumerate(((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()):
        PIL.Image.fromarray(np.ascontiguousarray(pixels)).save(tmp_path / "images" / f"{number}.png")

    def call(*arguments):
        common = ["images", "--model", "model", "--resolution", 32, "--device", "cpu", "--output", "results"]
        return run_program(ablate.main, list(map(str, [*common, *arguments])))

    return call


def test_variations_are_those_of_the_config(model, images):
    plain = ablate.reconstruct_varied(model, images, 12)
    assert torch.equal(plain, reconstruct(model, images, 12))
    before = model.config.to_dict()
    for name, value in (("complexity_exponent", 0.0), ("splat_support", 1.0), ("min_region_size", 8)):
        changed = ablate.reconstruct_varied(model, images, 12, **{name: value})
        fresh = GPSTokenModel(GPSTokenConfig.preset("tiny", **{name: value})).eval()
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(changed, reconstruct(fresh, images, 12)), name
        assert not torch.equal(changed, plain), name
    assert model.config.to_dict() == before
    with pytest.raises(ValueError, match="num_tokens"):
        ablate.reconstruct_varied(model, images, 12, min_region_size=32)
    assert model.config.to_dict() == before


def test_without_refinement_the_gaussians_are_those_of_the_regions(model, images):
    encoded = model.encode(images, num_tokens=8)
    tokens = encoded.tokens.clone()
    assert not torch.equal(tokens[..., :5], encoded.layout.gaussians)
    tokens[..., :5] = encoded.layout.gaussians
    expected = model.decode(tokens, (32, 32)).sample.clamp(-1, 1)
    assert torch.equal(ablate.reconstruct_varied(model, images, 8, is_refined=False), expected)


def test_tables_curves_and_resuming(run, tmp_path, capsys):
    arguments = ["--tokens", 4, 8, "--lambdas", 0, 2.5, "--supports", 1, 3, "--min_region_sizes", 4, 16]
    assert run(*arguments) == 0
    report = read_result(tmp_path / "results/results.json")
    scores = {entry["name"]: entry["psnr"] for entry in report["results"]}
    # Equal settings give equal numbers: the defaults are lambda 2.5, support 3 and s_min 4.
    same = ("regions by complexity, refined", "lambda 2.5", "support 3", "s_min 4", "8 tokens")
    assert len({scores[name] for name in same}) == 1
    assert scores["equal regions, refined"] == scores["lambda 0"] == scores["8 tokens, equal regions"]
    assert "s_min 16" not in scores  # 32 x 32 pixels have four such regions
    assert len({scores[name] for name in ("4 tokens", "8 tokens", "support 1", "lambda 0")}) == 4
    for name in ("tokens.png", "curve.png", "examples.png", "per_image.parquet", "report.html"):
        assert (tmp_path / "results" / name).is_file()
    page = (tmp_path / "results/report.md").read_text()
    assert all(f"## {title}" in page for title in ablate.GROUPS.values())
    assert "| thumbnail 5 x 5 |" in page
    assert run(*arguments) == 0
    assert "2 of 2 images are scored already" in capsys.readouterr().out
    assert read_result(tmp_path / "results/results.json")["results"] == report["results"]


def test_errors(run, tmp_path, capsys):
    (tmp_path / "peer").mkdir()
    import diffusers

    blocks = {"down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"]}
    peer = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, **blocks)
    peer.save_pretrained(tmp_path / "peer")
    assert run("--model", "peer") == 2
    assert "--model must be a GPSToken tokenizer, got peer" in capsys.readouterr().err
    assert run("--resolution", 8) == 2
    assert "--resolution must be at least 11" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()
