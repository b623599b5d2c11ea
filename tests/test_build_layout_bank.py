# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""The program that takes a bank of layouts from a labelled dataset."""

import json

import numpy as np
import PIL.Image
import pytest
import torch

from gpstoken_hf.layout_bank import GaussianLayoutBank
from gpstoken_hf.partition import partition_images
from pipelines.shared.programs import run_program

datasets = pytest.importorskip("datasets")
build_layout_bank = pytest.importorskip("pipelines.build_layout_bank")

SMALL = ("--resolution", 32, "--num_tokens", 8, "--min_region_size", 4)


@pytest.fixture(scope="module")
def pixels():
    """Ten images of 40 x 32 pixels, noise of a strength that grows to one side: (10, 40, 32, 3) uint8."""
    random = np.random.default_rng(0)
    noise = random.uniform(-1, 1, size=(10, 40, 32, 3)) * np.linspace(0, 1, 32)[None, None, :, None] ** 2
    return (127.5 * (1 + noise * random.uniform(0.1, 1, size=(10, 1, 1, 1)))).astype(np.uint8)


@pytest.fixture(scope="module")
def parquet(pixels, tmp_path_factory):
    """Class 0 has two images, 1 has three, 4 has five."""
    path = tmp_path_factory.mktemp("data") / "images.parquet"
    rows = {"image": [PIL.Image.fromarray(image) for image in pixels], "label": [0, 1, 4, 4, 1, 4, 0, 4, 1, 4]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    return path


def run(*argv):
    return run_program(build_layout_bank.main, [str(argument) for argument in argv])


def test_layouts_are_those_of_the_partition(parquet, pixels, tmp_path, capsys):
    assert run("--train_data_files", parquet, "--output_dir", tmp_path / "bank", *SMALL) == 0
    assert "10 layouts of 3 classes (2 to 5 per class), tokens per layout [8]" in capsys.readouterr().out
    bank = GaussianLayoutBank.from_pretrained(tmp_path / "bank")
    assert bank.class_counts == {0: 2, 1: 3, 4: 5}
    # The central square of a 40 x 32 image is its middle 32 rows, and the resize has nothing to do.
    images = torch.from_numpy(pixels[[0, 6], 4:36]).permute(0, 3, 1, 2) / 127.5 - 1
    expected = partition_images(images, 8, min_region_size=4).gaussians
    assert torch.equal(torch.stack(bank.layouts_by_class()[0]), expected)
    assert {path.name for path in tmp_path.iterdir()} == {"bank"}
    assert {"README.md", "config.json", "layouts.png"} < {path.name for path in (tmp_path / "bank").iterdir()}
    assert "taken from images of `images.parquet`" in (tmp_path / "bank" / "README.md").read_text()


def test_several_token_counts_and_a_limit_per_class(parquet, tmp_path):
    argv = ["--train_data_files", parquet, *SMALL, "--num_tokens", 4, 7, "--images_per_class", 2]
    assert run(*argv, "--output_dir", tmp_path / "a", "--seed", 1) == 0
    assert run(*argv, "--output_dir", tmp_path / "b", "--seed", 1, "--batch_size", 3, "--part_size", 2) == 0
    a, b = (GaussianLayoutBank.from_pretrained(tmp_path / name) for name in "ab")
    assert a.class_counts == {0: 4, 1: 4, 4: 4}
    assert a.token_counts == {4: 6, 7: 6}
    assert torch.equal(a.gaussians, b.gaussians)


def test_goes_on_where_it_was_stopped(parquet, tmp_path, monkeypatch, capsys):
    argv = ["--train_data_files", parquet, *SMALL, "--part_size", 3, "--output_dir", tmp_path / "bank"]
    made = []
    build_part = build_layout_bank.build_part

    def stop_at_the_third(dataset, rows, *rest):
        made.append(list(rows))
        if len(made) == 3:
            raise KeyboardInterrupt
        return build_part(dataset, rows, *rest)

    monkeypatch.setattr(build_layout_bank, "build_part", stop_at_the_third)
    assert run(*argv) == 130
    assert not (tmp_path / "bank").exists()
    assert len(list((tmp_path / "bank.parts").glob("*.safetensors"))) == 2
    # Other settings must not be mixed with what is there.
    capsys.readouterr()
    assert run(*argv, "--num_tokens", 5) == 2
    assert "made with other options" in capsys.readouterr().err
    assert run(*argv) == 0
    assert made == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [6, 7, 8], [9]]
    assert {path.name for path in tmp_path.iterdir()} == {"bank"}
    assert len(GaussianLayoutBank.from_pretrained(tmp_path / "bank")) == 10


def test_parts_of_somebody_else_are_left_alone(parquet, tmp_path, capsys):
    (tmp_path / "bank.parts").mkdir()
    (tmp_path / "bank.parts" / "work").write_text("years of it")
    argv = ["--train_data_files", parquet, *SMALL, "--output_dir", tmp_path / "bank"]
    assert run(*argv) == 2
    assert "got a folder that holds work" in capsys.readouterr().err
    assert (tmp_path / "bank.parts" / "work").read_text() == "years of it"
    assert not (tmp_path / "bank").exists()


def test_what_is_added_to_the_parts_is_kept(parquet, tmp_path, monkeypatch):
    build_part = build_layout_bank.build_part

    def add_a_file(*arguments):
        (tmp_path / "bank.parts" / "work").write_text("years of it")
        return build_part(*arguments)

    monkeypatch.setattr(build_layout_bank, "build_part", add_a_file)
    assert run("--train_data_files", parquet, *SMALL, "--output_dir", tmp_path / "bank") == 0
    assert (tmp_path / "bank.parts" / "work").read_text() == "years of it"
    assert not list((tmp_path / "bank.parts").glob("*.safetensors"))


def test_a_damaged_part_is_one_line(parquet, tmp_path, capsys, monkeypatch):
    argv = ["--train_data_files", parquet, *SMALL, "--output_dir", tmp_path / "bank"]
    monkeypatch.setattr(build_layout_bank, "read_parts", fail)
    assert run(*argv) == 130
    monkeypatch.undo()
    part = next((tmp_path / "bank.parts").glob("*.safetensors"))
    part.write_bytes(part.read_bytes()[:100])
    capsys.readouterr()
    assert run(*argv) == 2
    assert f"error: {part} must be a whole part" in capsys.readouterr().err
    part.unlink()
    assert run(*argv) == 0


def fail(files):
    raise KeyboardInterrupt


def test_an_output_that_is_there_is_refused_before_any_work(parquet, tmp_path, capsys):
    (tmp_path / "bank").mkdir()
    (tmp_path / "bank" / "work").write_text("years of it")
    assert run("--train_data_files", parquet, *SMALL, "--output_dir", tmp_path / "bank") == 2
    assert "must not exist or be an empty folder" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"bank"}


def test_defaults_come_from_the_tokenizer(tmp_path, capsys):
    from gpstoken_hf.configuration_gpstoken import GPSTokenConfig

    GPSTokenConfig.preset("tiny", complexity_exponent=1.5).save_pretrained(tmp_path / "tokenizer")
    assert run("--tokenizer", tmp_path / "tokenizer", "--output_dir", tmp_path / "bank", "--dry_run") == 0
    printed = capsys.readouterr().out
    for line in ("resolution: 32", "num_tokens:\n- 8", "complexity_exponent: 1.5", "min_region_size: 4"):
        assert line in printed
    assert run("--output_dir", tmp_path / "bank", "--dry_run", "--resolution", 64) == 0
    printed = capsys.readouterr().out
    for line in ("resolution: 64", "num_tokens:\n- 128", "complexity_exponent: 2.5", "min_region_size: 8"):
        assert line in printed


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--label_column", "kind"], "--label_column must be one of image, label, got 'kind'"),
        (["--streaming"], "--streaming must be off"),
        (["--num_tokens", 4, 4], r"--num_tokens must be different numbers, got [4, 4]"),
        (["--num_tokens", 5000], "5000"),
        (["--image_column", "picture"], "got 'picture'"),
    ],
)
def test_what_cannot_be_done(parquet, tmp_path, capsys, argv, message):
    assert run("--train_data_files", parquet, "--output_dir", tmp_path / "bank", *SMALL, *argv) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert message in error[0]
    assert not (tmp_path / "bank").exists()


@pytest.mark.parametrize("label", [-1, None])
def test_labels_must_be_class_ids(pixels, tmp_path, capsys, label):
    rows = {"image": [PIL.Image.fromarray(pixels[0])] * 2, "label": [0, label]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data.parquet")
    assert run("--train_data_files", tmp_path / "data.parquet", "--output_dir", tmp_path / "bank", *SMALL) == 2
    assert f"got {label!r} in row 1" in capsys.readouterr().err


def test_choice_of_rows():
    labels = [0, 1] * 50
    chosen = build_layout_bank.choose_rows(labels, 5, seed=0)
    assert chosen == sorted(set(chosen))
    assert [labels[row] for row in chosen].count(0) == 5
    assert len(chosen) == 10
    assert chosen != build_layout_bank.choose_rows(labels, 5, seed=1)
    # A class is chosen from alike whatever the other classes are.
    zeros = [row for row in chosen if labels[row] == 0]
    others = build_layout_bank.choose_rows([label if label == 0 else 7 for label in labels], 5, seed=0)
    assert zeros == [row for row in others if labels[row] == 0]
    assert build_layout_bank.choose_rows(labels, 1000, seed=3) == list(range(100))
    assert json.dumps(chosen)  # plain integers: they are written to the record of a run
