# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""pipelines/evaluate_reconstruction.py with tiny models of random weights, and its base lines against Pillow's."""

import io
import json
import math
import os
import struct

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors import safe_open

from gpstoken_hf.configuration_gpstoken import GPSTokenConfig
from gpstoken_hf.evaluation_results import compare, read_result
from gpstoken_hf.metrics import psnr, ssim
from gpstoken_hf.modeling_gpstoken import GPSTokenModel
from pipelines import evaluate_reconstruction as evaluate
from pipelines.shared import baselines
from pipelines.shared import reconstruction_scoring as scoring
from pipelines.shared.image_sets import ImageSet
from pipelines.shared.programs import run_program
from pipelines.shared.reconstruction_report import _standard_error

OUTPUTS = {
    ".gpstoken.json",
    "per_image.jsonl",
    "per_image.parquet",
    "results.json",
    "table.md",
    "report.md",
    "report.html",
    "curve.png",
    "examples.png",
    "extremes.png",
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    GPSTokenModel(GPSTokenConfig.preset("tiny")).save_pretrained(folder)
    return str(folder)


def photograph(seed, size=(48, 40)):
    height, width = size
    y, x = np.mgrid[:height, :width]
    waves = [100 * np.sin(x / (3 + seed) + channel) * np.cos(y / (5 + channel)) + 128 for channel in range(3)]
    return PIL.Image.fromarray(np.stack(waves, -1).round().astype(np.uint8))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(5):
        photograph(number).save(tmp_path / "images" / f"{number}.png")
    return tmp_path / "images"


@pytest.fixture
def run(model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common = ["--device", "cpu"]
    # Codecs take their time; they have a test.
    defaults = {"--resolution": "32", "--output": "results", "--model": model_folder, "--baselines": "thumbnail"}

    def call(*arguments):
        more = [text for name, value in defaults.items() if name not in arguments for text in (name, value)]
        return run_program(evaluate.main, [*map(str, arguments), *common, *more])

    return call


# ------------------------------------------------------------------------------------------------------- thumbnail


@pytest.mark.parametrize(("floats", "side"), [(1, 1), (3, 1), (4, 2), (12, 2), (13, 3), (192, 8), (193, 9), (672, 15)])
def test_side_is_the_smallest_that_holds_as_many_floats(floats, side):
    assert baselines.thumbnail_side(floats) == side
    assert 3 * side**2 >= floats > 3 * (side - 1) ** 2


@pytest.mark.parametrize("side", [5, 8, 31])
def test_thumbnail_is_pillows(side):
    """Pillow's float images are its own bicubic filter without rounding; worst difference seen 1.3e-06."""
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ours = baselines.thumbnail(image, side)[0].numpy()
    for channel, mine in zip(image[0].numpy(), ours):
        small = PIL.Image.fromarray(channel).resize((side, side), PIL.Image.Resampling.BICUBIC)
        small = PIL.Image.fromarray(np.asarray(small).clip(-1, 1))
        large = np.asarray(small.resize((32, 32), PIL.Image.Resampling.BICUBIC)).clip(-1, 1)
        assert np.allclose(mine, large, rtol=0, atol=5e-6)


def test_thumbnail_of_the_whole_size_is_the_image():
    image = torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.allclose(baselines.thumbnail(image, 16), image, atol=1e-6)


# --------------------------------------------------------------------------------------------------------- program


def test_scores_are_the_means_over_the_images(run, folder, tmp_path, capsys, model_folder):
    assert run(folder, "--tokens", 12, 4, "--batch_size", 2) == 0
    assert {file.name for file in (tmp_path / "results").iterdir()} == OUTPUTS
    report = json.loads((tmp_path / "results/results.json").read_text())
    assert [entry["tokens"] for entry in report["results"]] == [4, 12]
    assert [entry["floats"] for entry in report["results"]] == [36, 108]
    assert [entry["thumbnail_side"] for entry in report["results"]] == [4, 6]

    images = ImageSet([folder], "image", 32, None, "bicubic").batch(0, 5)
    model = GPSTokenModel.from_pretrained(model_folder).eval()
    with torch.no_grad():
        sample = model(images, num_tokens=12).sample.clamp(-1, 1)
    entry = report["results"][1]
    assert entry["psnr"] == pytest.approx(psnr(sample, images).mean().item(), abs=1e-4)
    assert entry["ssim"] == pytest.approx(ssim(sample, images).mean().item(), abs=1e-5)
    expected = psnr(baselines.thumbnail(images, 6), images).mean().item()
    assert entry["thumbnail_psnr"] == pytest.approx(expected, abs=1e-4)
    assert entry["gain"] == pytest.approx(entry["psnr"] - expected, abs=1e-4)
    table = (tmp_path / "results/table.md").read_text()
    assert f"12 tokens | 108 | 1,728 | {entry['psnr']:.2f} | {entry['ssim']:.4f} | {entry['gain']:+.2f}" in table
    assert f"| thumbnail 6 x 6 | 108 | 1,728 | {expected:.2f} |" in table
    assert table in capsys.readouterr().out
    for name in ("report.md", "report.html"):
        page = (tmp_path / "results" / name).read_text()
        assert "reference_checksum" in page
        assert f"{entry['psnr']:.2f}" in page
    assert "data:image/png;base64," in page


def test_images_are_resized_by_the_shortest_side_and_cropped_in_the_middle(tmp_path):
    """One white column at the left edge is cut off; a grey gradient keeps its middle."""
    wide = np.tile(np.linspace(0, 255, 128).round().astype(np.uint8), (64, 1))
    PIL.Image.fromarray(wide).save(tmp_path / "wide.png")
    batch = ImageSet([tmp_path / "wide.png"], "image", 32, None, "bicubic").batch(0, 1)
    assert batch.shape == (1, 3, 32, 32)
    assert batch[0, 0, 16].min() == pytest.approx(-0.5, abs=0.02)
    assert batch[0, 0, 16].max() == pytest.approx(0.5, abs=0.02)


def test_parquet_holds_the_same_images(run, folder, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    files = sorted(folder.iterdir())
    column = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    parquet.write_table(pyarrow.table({"picture": column, "label": [0] * 5}), tmp_path / "set.parquet")
    from_parquet = ImageSet([tmp_path / "set.parquet"], "picture", 32, 3, "bicubic")
    assert len(from_parquet) == 3
    from_files = ImageSet(files, "image", 32, None, "bicubic")
    assert torch.equal(from_parquet.batch(0, 3), from_files.batch(0, 3))
    assert run(tmp_path / "set.parquet", "--tokens", 4) == 2  # no column "image"


def test_focus_raises_the_share_of_the_box(run, folder, tmp_path):
    assert run(folder, "--tokens", 12, "--focus", "0,0,15,15") == 0
    entry = json.loads((tmp_path / "results/results.json").read_text())["results"][0]
    lines = (tmp_path / "results/per_image.jsonl").read_text().splitlines()[1:]
    rows = [json.loads(line)[entry["name"]] for line in lines]
    assert entry["inside_psnr"] == pytest.approx(sum(row["inside_psnr"] for row in rows) / 5)
    assert entry["inside_psnr"] != entry["inside_psnr_focused"]
    table = (tmp_path / "results/table.md").read_text()
    assert "With the box 0,0,15,15 in focus (weight 30)" in table
    assert f"| {entry['name']} | {entry['inside_psnr']:.2f} | {entry['inside_psnr_focused']:.2f} |" in table


CUTS = {
    "empty": lambda text: "",
    "within the settings": lambda text: text[:40],
    "within a line": lambda text: text[:-30],
    "garbage": lambda text: text[: text.index("\n") + 1] + "\0\0\0\n",
    "a list": lambda text: text[: text.index("\n") + 1] + "[1]\n",
}


@pytest.mark.parametrize("cut", CUTS)
def test_a_file_that_a_full_disk_has_cut_does_not_block(run, folder, tmp_path, cut):
    assert run(folder, "--tokens", 4) == 0
    whole = json.loads((tmp_path / "results/results.json").read_text())
    log = tmp_path / "results/per_image.jsonl"
    log.write_text(CUTS[cut](log.read_text()))
    assert run(folder, "--tokens", 4) == 0
    assert json.loads((tmp_path / "results/results.json").read_text())["results"] == whole["results"]


def test_an_interrupted_run_goes_on(run, folder, tmp_path, capsys):
    assert run(folder, "--tokens", 4, "--batch_size", 2) == 0
    whole = json.loads((tmp_path / "results/results.json").read_text())
    log = tmp_path / "results/per_image.jsonl"
    lines = log.read_text().splitlines()
    changed = json.loads(lines[2])
    changed[whole["results"][0]["name"]]["psnr"] += 5.0  # to see that it is not computed again
    log.write_text("\n".join([lines[0], lines[1], json.dumps(changed), lines[3], lines[4][:20]]))
    assert run(folder, "--tokens", 4, "--batch_size", 2) == 0
    assert "2 of 5 images are scored already" in capsys.readouterr().out
    again = json.loads((tmp_path / "results/results.json").read_text())
    assert again["results"][0]["psnr"] == pytest.approx(whole["results"][0]["psnr"] + 1.0, abs=1e-6)
    assert len(log.read_text().splitlines()) == 6

    assert run(folder, "--tokens", 8) == 2
    assert "other settings: methods." in capsys.readouterr().err
    assert run(folder, "--tokens", 4, "--resample", "bilinear") == 2
    assert "other settings: resize 'bicubic' (now 'bilinear')" in capsys.readouterr().err
    assert run(folder, "--tokens", 8, "--overwrite") == 0


def test_a_folder_of_somebody_else_is_left_alone(run, folder, tmp_path, capsys):
    (tmp_path / "results").mkdir()
    (tmp_path / "results/table.md").write_text("years of it")
    for options in ((), ("--overwrite",)):
        assert run(folder, "--tokens", 4, *options) == 2
        assert "got a folder that holds table.md" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["table.md"]


def test_its_own_pictures_are_not_taken_for_images(run, folder, tmp_path, capsys):
    for options in ((), ("--overwrite",), ()):
        assert run(folder, "--tokens", 4, "--output", folder / "results", *options) == 0
        assert "5 images of images" in capsys.readouterr().out


def test_names_that_are_not_text(run, folder, tmp_path, capsys):
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    folder.rename(odd)
    assert run(odd, "--tokens", 4) == 0
    assert r"5 images of caf\udce9" in (tmp_path / "results/table.md").read_text()


def test_standard_error():
    assert _standard_error([1.0]) is None
    values = [1.0, 2.0, 4.0, 7.0]
    assert _standard_error(values) == pytest.approx(np.std(values, ddof=1) / math.sqrt(4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.parquet"], "no such file: absent.parquet"),
        (["empty"], "the folder empty must hold images, got none"),
        (["text.parquet"], "text.parquet must be a parquet file"),
        (["images", "--focus", "0,0,32,5"], "--focus must lie inside 32 x 32 pixels, got 0,0,32,5"),
        (["images", "--tokens", "100000"], "100000"),
        (["images", "--resolution", "10"], "--resolution must be at least 11, the window of SSIM, got 10"),
        (["images", "--model", "nowhere"], "--model must be a folder, a Hub repository owner/name or one of"),
        (["images", "--model", "images"], "--model images must hold a config.json"),
        (["images", "--model", "other"], "--model must be a GPSToken tokenizer or one of AutoencoderKL"),
        (["images", "--reconstructions", "two"], "one image for each of the 5 images, got 2"),
        (["cut.png", "--feature_network", "nonsense"], "Fréchet distance must be of at least 2 images, got 1"),
        (["images", "--feature_network", "nonsense"], "or a classifier of torchvision, got nonsense"),
        (
            ["images", "--lpips_weights_file", "absent", "--lpips_network", "vgg"],
            "weights file must exist, got absent",
        ),
        (["cut.png"], "image must be a readable file, got cut.png"),
        (["bytes.parquet"], "row 0 of bytes.parquet must hold a readable image, got"),
        (["bomb.parquet"], "row 0 of bomb.parquet must hold a readable image, got"),
    ],
)
def test_one_line_and_exit_code_2(run, folder, tmp_path, capsys, arguments, message):
    for name in ("empty", "other", "two"):
        (tmp_path / name).mkdir()
    for number in range(2):
        photograph(number, (32, 32)).save(tmp_path / "two" / f"{number}.png")
    (tmp_path / "other/config.json").write_text('{"_class_name": "UNet2DModel"}')
    (tmp_path / "text.parquet").write_text("not parquet")
    whole = (folder / "0.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    # A file that is cut off, and one that claims to be of 60,000 x 60,000 pixels.
    bomb = io.BytesIO()
    PIL.Image.new("RGB", (1, 1)).save(bomb, "BMP")
    bomb = bomb.getvalue()[:18] + struct.pack("<ii", 60_000, 60_000) + bomb.getvalue()[26:]
    for name, content in (("bytes.parquet", whole[:50]), ("bomb.parquet", bomb)):
        if name in arguments:
            pyarrow = pytest.importorskip("pyarrow")
            table = pyarrow.table({"image": [{"bytes": content, "path": None}]})
            pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / name)
    assert run(*arguments) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert message in errors[0]
    assert not (tmp_path / "results/results.json").exists()


# ----------------------------------------------------------------------------------------------- models and features


@pytest.fixture(scope="module")
def peers(tmp_path_factory):
    """Tiny autoencoders of diffusers with random weights: class -> folder."""
    import diffusers

    torch.manual_seed(0)
    blocks = {"block_out_channels": (8, 16), "norm_num_groups": 4}
    down = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    tiny = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    dc = {
        "attention_head_dim": 8,
        "encoder_block_out_channels": (8, 16),
        "decoder_block_out_channels": (8, 16),
        "encoder_layers_per_block": (1, 1),
        "decoder_layers_per_block": (1, 1),
        "encoder_block_types": "ResBlock",
        "decoder_block_types": "ResBlock",
        "encoder_qkv_multiscales": ((), ()),
        "decoder_qkv_multiscales": ((), ()),
        "latent_channels": 4,
    }
    rae = {
        "encoder_type": "mae",
        "encoder_hidden_size": 64,
        "encoder_patch_size": 8,
        "encoder_num_hidden_layers": 1,
        "decoder_hidden_size": 16,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 16,
        "patch_size": 8,
        "encoder_input_size": 32,
    }
    configs = {
        "AutoencoderKL": {**blocks, **down, "latent_channels": 4},
        "AutoencoderTiny": {**tiny, "num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)},
        "AutoencoderDC": dc,
        "VQModel": {**blocks, **down, "latent_channels": 4, "num_vq_embeddings": 20, "vq_embed_dim": 4},
        "AutoencoderRAE": rae,
    }
    folder = tmp_path_factory.mktemp("peers")
    for name, config in configs.items():
        if hasattr(diffusers, name):
            getattr(diffusers, name)(**config).save_pretrained(folder / name)
    return folder


def test_autoencoders_of_diffusers_stand_beside_ours(run, folder, tmp_path, peers, model_folder):
    pytest.importorskip("pyarrow", reason="needs pyarrow")
    import diffusers

    names = sorted(str(path) for path in peers.iterdir())
    assert len(names) >= 4
    assert run(folder, "--model", model_folder, *names, "--tokens", 4, 8) == 0
    report = read_result(tmp_path / "results/results.json")
    entries = {entry["name"]: entry for entry in report["results"]}
    assert list(entries) == [f"{model_folder}, 4 tokens", f"{model_folder}, 8 tokens", *names]
    latents = {"AutoencoderKL": 16 * 16 * 4, "AutoencoderTiny": 16 * 16 * 4, "AutoencoderDC": 16 * 16 * 4}
    latents |= {"VQModel": 16 * 16 * 4, "AutoencoderRAE": 4 * 4 * 64}
    for name in names:
        kind = name.rsplit("/", 1)[1]
        assert entries[name]["floats"] == latents[kind]
        bits = 16 * 16 * 5 if kind == "VQModel" else 16 * latents[kind]  # 20 codes take 5 bits
        assert entries[name]["bits"] == bits
        assert math.isfinite(entries[name]["psnr"])

    images = ImageSet([folder], "image", 32, None, "bicubic").batch(0, 5)
    model = diffusers.AutoencoderKL.from_pretrained(peers / "AutoencoderKL").eval()
    with torch.no_grad():
        sample = model.decode(model.encode(images).latent_dist.mode()).sample.clamp(-1, 1)
    assert entries[str(peers / "AutoencoderKL")]["psnr"] == pytest.approx(psnr(sample, images).mean().item(), abs=1e-4)

    import pyarrow.parquet

    table = pyarrow.parquet.read_table(tmp_path / "results/per_image.parquet").to_pylist()
    assert len(table) == 5 * (len(entries) + len(report["baselines"]))
    ours = [row["psnr"] for row in table if row["method"] == f"{model_folder}, 8 tokens"]
    assert sum(ours) / 5 == pytest.approx(entries[f"{model_folder}, 8 tokens"]["psnr"])
    assert {row["image"] for row in table} == {f"{number}.png" for number in range(5)}


def test_images_in_the_unit_range_are_converted(peers):
    """A model that returns what it is given reconstructs exactly, whatever its range."""
    from pipelines.shared.autoencoders import Candidate

    class Output:
        def __init__(self, **values):
            self.__dict__.update(values)

    class AutoencoderRAE(torch.nn.Module):
        def encode(self, images):
            assert images.min() >= 0
            return Output(latent=images)

        def decode(self, latents):
            return Output(sample=latents)

    images = torch.rand(1, 3, 8, 8) * 2 - 1
    assert torch.allclose(Candidate("exact", AutoencoderRAE()).reconstruct(images), images, atol=1e-6)


def test_the_wrapped_tokenizer_is_ours(run, folder, tmp_path, model_folder):
    from gpstoken_hf import AutoencoderGPSToken

    AutoencoderGPSToken.from_gpstoken(GPSTokenModel.from_pretrained(model_folder)).save_pretrained(tmp_path / "vae")
    assert run(folder, "--model", model_folder, tmp_path / "vae", "--tokens", 8) == 0
    first, second = json.loads((tmp_path / "results/results.json").read_text())["results"]
    assert second["psnr"] == pytest.approx(first["psnr"], abs=1e-6)


def test_a_size_that_a_model_does_not_take(run, folder, peers, capsys):
    assert run(folder, "--model", peers / "AutoencoderKL", "--resolution", 33) == 2
    assert "AutoencoderKL must return images of --resolution 33, got 32 x 32 pixels" in capsys.readouterr().err


def test_reconstructions_of_another_program(run, folder, tmp_path, capsys):
    """Those of the images themselves are perfect; PNG keeps the 8 bits that resized images have been rounded to."""
    images = ImageSet([folder], "image", 32, None, "bicubic").batch(0, 5)
    for place in ("same", "small"):
        (tmp_path / place).mkdir()
    for number, pixels in enumerate(((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()):
        PIL.Image.fromarray(pixels).save(tmp_path / "same" / f"{number}.png")
        PIL.Image.fromarray(pixels[:16, :16]).save(tmp_path / "small" / f"{number}.png")
    assert run(folder, "--tokens", 4, "--reconstructions", tmp_path / "same", "--rounding", "8bit") == 0
    entry = read_result(tmp_path / "results/results.json")["results"][1]
    assert (entry["name"], entry["psnr"], entry["ssim"]) == ("same", math.inf, pytest.approx(1))
    assert "| same | – | – | inf | 1.0000 |" in capsys.readouterr().out
    assert run(folder, "--tokens", 4, "--reconstructions", tmp_path / "small", "--output", "other") == 2
    assert "images of 32 x 32 pixels, got 16 x 16" in capsys.readouterr().err
    photograph(3, (20, 20)).save(tmp_path / "small/4.png")
    assert run(folder, "--tokens", 4, "--reconstructions", tmp_path / "small", "--output", "mixed") == 2
    assert "images must be of one size, got 0.png of 16 x 16 pixels and 4.png of 20 x 20" in capsys.readouterr().err


def test_codecs_fit_and_are_as_good_as_possible():
    picture = photograph(0, (64, 64))
    for codec, kind in (("jpeg", "JPEG"), ("webp", "WEBP")):
        found = baselines.compress(picture, codec, 1500)
        assert found is not None
        decoded, size = found
        assert size <= 1500
        assert decoded.size == (64, 64)
        # One step better takes more bytes.
        sizes = []
        for quality in range(baselines.QUALITIES[codec][0], baselines.QUALITIES[codec][1] + 1):
            file = io.BytesIO()
            picture.save(file, kind, quality=quality, **({"optimize": True} if codec == "jpeg" else {"method": 6}))
            sizes.append(file.tell())
        assert size in sizes
        assert min((other for other in sizes if other > size), default=1501) > 1500 or size == sizes[-1]
        assert baselines.compress(picture, codec, 20) is None


def test_codecs_in_the_table(run, folder, tmp_path, capsys):
    assert run(folder, "--tokens", 4, 64, "--baselines", "jpeg", "webp") == 0
    report = read_result(tmp_path / "results/results.json")
    entries = {entry["name"]: entry for entry in report["baselines"]}
    assert list(entries) == ["JPEG, 72 bytes", "JPEG, 1152 bytes", "WebP, 72 bytes", "WebP, 1152 bytes"]
    assert entries["JPEG, 72 bytes"]["psnr"] is None
    assert entries["JPEG, 72 bytes"]["images_that_fit"] == 0
    assert entries["JPEG, 1152 bytes"]["images_that_fit"] == 5
    assert entries["JPEG, 1152 bytes"]["psnr"] > 20
    assert "JPEG, 72 bytes: 0" in capsys.readouterr().out
    assert "gain" not in report["results"][0]


def test_network_metrics_resume_with_equal_numbers(run, folder, tmp_path, monkeypatch, capsys):
    """Killed after the third of five batches, when the statistics of two had been written."""
    timm = pytest.importorskip("timm", reason="needs timm")
    torch.manual_seed(0)
    torch.save(timm.create_model("test_efficientnet").state_dict(), tmp_path / "weights.pth")
    network = ["timm/test_efficientnet"]
    options = ["--tokens", 4, "--batch_size", 1, "--feature_network", *network, "--lpips_network", *network]
    options += ["--feature_weights_file", tmp_path / "weights.pth", "--lpips_weights_file", tmp_path / "weights.pth"]
    assert run(folder, *options) == 0
    whole = read_result(tmp_path / "results/results.json")
    entry = whole["results"][0]
    assert entry["frechet_distance"] > 0
    assert entry["perceptual_distance"] > 0
    assert not {"fid", "rfid", "lpips"} & set(entry)
    assert "Fréchet distance (timm/test_efficientnet)" in (tmp_path / "results/table.md").read_text()
    assert "fewer than the 256 features" in whole["warnings"][0]
    assert whole["protocol"]["features"]["network"] == "timm/test_efficientnet"

    batches = []
    real = scoring.Evaluation.score_batch

    def killed(self, images, places):
        batches.append(places)
        if len(batches) == 4:
            raise KeyboardInterrupt
        return real(self, images, places)

    monkeypatch.setattr(scoring.Evaluation, "score_batch", killed)
    clock = iter([0.0, 0.0, 200.0, 200.0, 200.0, 200.0, 200.0, 200.0])  # so that the second batch is the last saved
    monkeypatch.setattr(scoring.time, "monotonic", lambda: next(clock, 200.0))
    assert run(folder, *options, "--output", "killed") == 130
    assert len((tmp_path / "killed/per_image.jsonl").read_text().splitlines()) == 4
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert run(folder, *options, "--output", "killed") == 0
    assert "2 of 5 images are scored already" in capsys.readouterr().out
    again = read_result(tmp_path / "killed/results.json")
    assert again["results"] == whole["results"]
    assert all(row["difference"] == 0 for row in compare(whole, again))
    (tmp_path / "killed/statistics.safetensors").write_bytes(b"cut off")
    assert run(folder, *options, "--output", "killed") == 0
    assert read_result(tmp_path / "killed/results.json")["results"] == whole["results"]


def test_a_resumed_run_with_another_batch_size_counts_every_image_once(run, folder, tmp_path, monkeypatch):
    """Killed after a batch of three of five images, whose statistics were written; batches of two do the rest."""
    timm = pytest.importorskip("timm", reason="needs timm")
    torch.save(timm.create_model("test_efficientnet").state_dict(), tmp_path / "weights.pth")
    options = [folder, "--tokens", 4, "--feature_network", "timm/test_efficientnet"]
    options += ["--feature_weights_file", tmp_path / "weights.pth"]
    assert run(*options, "--batch_size", 2) == 0
    whole = read_result(tmp_path / "results/results.json")
    real = scoring.Evaluation.score_batch

    def killed(self, images, places):
        if places.start:
            raise KeyboardInterrupt
        return real(self, images, places)

    monkeypatch.setattr(scoring, "SAVE_STATISTICS_S", -1.0)
    monkeypatch.setattr(scoring.Evaluation, "score_batch", killed)
    assert run(*options, "--batch_size", 3, "--output", "killed") == 130
    monkeypatch.setattr(scoring.Evaluation, "score_batch", real)
    assert run(*options, "--batch_size", 2, "--output", "killed") == 0
    for row in compare(whole, read_result(tmp_path / "killed/results.json")):
        assert row["second"] == pytest.approx(row["first"], rel=1e-5), row
    with safe_open(tmp_path / "killed/statistics.safetensors", "pt") as file:
        assert {file.get_tensor(key).item() for key in file.keys() if key.endswith(".count")} == {5}  # noqa: SIM118


def test_results_of_other_protocols_are_not_compared(run, folder, tmp_path):
    assert run(folder, "--tokens", 4) == 0
    assert run(folder, "--tokens", 4, "--resample", "bilinear", "--output", "box") == 0
    with pytest.raises(ValueError, match="got resize 'bicubic' and 'bilinear'"):
        compare(tmp_path / "results/results.json", tmp_path / "box/results.json")
    photograph(7).save(folder / "0.png")
    assert run(folder, "--tokens", 4, "--output", "changed") == 0
    with pytest.raises(ValueError, match="got reference_checksum"):
        compare(tmp_path / "results/results.json", tmp_path / "changed/results.json")


def test_tiles(run, folder, tmp_path):
    assert run(folder, "--tokens", 16, "--tile_size", 16) == 0
    entry = read_result(tmp_path / "results/results.json")["results"][0]
    assert math.isfinite(entry["psnr"])


def test_images_of_an_archive(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 12, 20, 3), dtype=np.uint8)
    np.savez(tmp_path / "samples.npz", arr_0=pixels)
    images = ImageSet([tmp_path / "samples.npz"])
    assert len(images) == 4
    expected = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    assert torch.allclose(images.batch(1, 3), expected[1:3], atol=1e-6)
    assert torch.allclose(images.batch(0, 4), expected, atol=1e-6)  # back to the start
    for name, content in (("objects", {"arr_0": np.array([None])}), ("flat", {"arr_0": pixels[0]}), ("none", {})):
        np.savez(tmp_path / f"{name}.npz", **content)
        with pytest.raises(ValueError, match=rf"{name}\.npz must"):
            ImageSet([tmp_path / f"{name}.npz"])
    (tmp_path / "cut.npz").write_bytes((tmp_path / "samples.npz").read_bytes()[:500])
    with pytest.raises(ValueError, match=r"cut\.npz must"):
        ImageSet([tmp_path / "cut.npz"])
