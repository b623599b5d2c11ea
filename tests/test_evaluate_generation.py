# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""pipelines/evaluate_generation.py on folders and on a tiny pipeline, with a small network of random weights."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from feature_helpers import save_inception
from tiny_pipeline import make_pipeline

from gpstoken_hf.evaluation_results import compare, read_result
from gpstoken_hf.feature_networks import load_feature_network
from gpstoken_hf.metrics import FeatureStatistics, frechet_distance, precision_recall, read_statistics
from pipelines import evaluate_generation as program
from pipelines.shared.feature_files import FeatureFolder, FileSource, PipelineSource
from pipelines.shared.programs import run_program

ROOT = Path(__file__).resolve().parents[1]
NETWORK = "timm/test_efficientnet"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    timm = pytest.importorskip("timm", reason="needs timm")
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save(timm.create_model("test_efficientnet").state_dict(), path)
    return path


def write_images(folder, count, seed, size=24):
    folder.mkdir()
    generator = np.random.default_rng(seed)
    for number in range(count):
        small = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        PIL.Image.fromarray(small).resize((size, size), PIL.Image.Resampling.BICUBIC).save(
            folder / f"{number:03d}.png"
        )
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    return write_images(folder / "made", 20, 0), write_images(folder / "real", 24, 1)


@pytest.fixture
def run(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    defaults = {"--output": "results", "--device": "cpu", "--feature_network": NETWORK}

    def call(*arguments):
        more = [text for name, value in defaults.items() if name not in arguments for text in (name, value)]
        if "--feature_weights_file" not in arguments:
            more += ["--feature_weights_file", weights]
        return run_program(program.main, list(map(str, [*arguments, *more])))

    return call


def test_scores_of_a_folder_are_those_of_its_features(run, folders, weights, tmp_path, capsys):
    made, real = folders
    assert run("--samples", made, "--reference", real, "--save_reference", "real.npz") == 0
    report = read_result(tmp_path / "results/results.json")
    entry = report["results"][0]

    network = load_feature_network(NETWORK, weights)
    features = []
    for folder in folders:
        images = [np.asarray(PIL.Image.open(file)) for file in sorted(folder.iterdir())]
        features.append(network(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))["pool"])
    statistics = [FeatureStatistics(), FeatureStatistics()]
    for one, values in zip(statistics, features):
        one.update(values)
    assert entry["frechet_distance"] == pytest.approx(frechet_distance(*statistics), rel=1e-5)
    assert (entry["precision"], entry["recall"]) == precision_recall(*features)
    assert entry["images"] == 20
    assert entry["class_score"] >= 1
    assert not {"fid", "inception_score"} & set(entry)
    assert report["protocol"]["reference_images"] == 24
    assert "256" in report["warnings"][0]
    for name in ("report.md", "report.html"):
        text = (tmp_path / "results" / name).read_text()
        assert f"Fréchet distance ({NETWORK})" in text
        assert f"{entry['frechet_distance']:.3f}" in text
    assert (tmp_path / "results/samples.png").is_file()
    assert f"{entry['frechet_distance']:.3f}" in capsys.readouterr().out

    # The same against the statistics alone.
    assert read_statistics(tmp_path / "real.npz")["pool"].count == 24
    assert run("--samples", made, "--reference", "real.npz", "--output", "moments") == 0
    again = read_result(tmp_path / "moments/results.json")["results"][0]
    assert again["frechet_distance"] == pytest.approx(entry["frechet_distance"], rel=1e-9)
    assert "precision" not in again
    # The same command may be repeated. A file of somebody else is kept, whatever is asked.
    assert run("--samples", made, "--reference", real, "--save_reference", "real.npz") == 0
    (tmp_path / "mine.npz").write_text("mine")
    assert run("--samples", made, "--reference", real, "--save_reference", "mine.npz", "--overwrite") == 2
    assert "mine.npz must not exist or be written by" in capsys.readouterr().err
    assert (tmp_path / "mine.npz").read_text() == "mine"


def test_batches_make_no_difference(run, folders, tmp_path):
    """Worst relative difference seen 3e-8."""
    made, real = folders
    found = []
    for size in (1, 7, 64):
        assert run("--samples", made, "--reference", real, "--batch_size", size, "--output", f"of{size}") == 0
        found.append(read_result(tmp_path / f"of{size}/results.json"))
    for other in found[1:]:
        for row in compare(found[0], other):
            assert row["second"] == pytest.approx(row["first"], rel=1e-6), row


def test_what_too_few_images_leave_out_is_said(run, tmp_path):
    for name in ("made", "real"):
        write_images(tmp_path / name, 3, len(name))
    assert run("--samples", "made", "--reference", "real") == 0
    report = read_result(tmp_path / "results/results.json")
    assert report["protocol"]["image_size"] == [24, 24]
    assert not {"precision", "recall", "class_score"} & set(report["results"][0])
    warnings = " ".join(report["warnings"])
    assert "a score over 10 splits takes at least 10 images, got 3" in warnings
    assert "precision and recall take more than 3 images of each set, got 3 and 3" in warnings
    assert "takes at least 10 images" in (tmp_path / "results/report.md").read_text()


def test_equal_folders_have_distance_0(run, folders, tmp_path):
    made, _ = folders
    assert run("--samples", made, "--reference", made) == 0
    entry = read_result(tmp_path / "results/results.json")["results"][0]
    assert entry["frechet_distance"] == pytest.approx(0, abs=1e-9)
    assert (entry["precision"], entry["recall"]) == (1, 1)


LAUNCHED = "import sys\nfrom pipelines.evaluate_generation import main\nsys.exit(main(sys.argv[1:]))\n"


def launch(tmp_path, arguments, processes=2):
    (tmp_path / "launched.py").write_text(LAUNCHED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    command += [tmp_path / "launched.py", *arguments]
    result = subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, timeout=900, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr[-3000:]


def test_two_processes_are_one(run, folders, weights, tmp_path):
    made, real = folders
    arguments = ["--samples", made, "--reference", real, "--batch_size", 3, "--device", "cpu"]
    arguments += ["--feature_network", NETWORK, "--feature_weights_file", weights]
    launch(tmp_path, [*arguments, "--output", "two"])
    assert run("--samples", made, "--reference", real, "--batch_size", 3) == 0
    rows = compare(tmp_path / "results/results.json", tmp_path / "two/results.json")
    assert {row["metric"] for row in rows} >= {"frechet_distance", "precision", "recall", "class_score"}
    for row in rows:
        assert row["second"] == pytest.approx(row["first"], rel=1e-6), row


@pytest.mark.slow
def test_fid_of_one_folder_in_batches_and_processes(run, folders, tmp_path):
    """With Inception's class, random weights: FID and sFID agree to 1e-6; worst relative difference seen 2e-7."""
    made, real = folders
    save_inception(tmp_path / "inception.pth")
    options = ["--samples", made, "--reference", real, "--feature_network", "inception"]
    options += ["--feature_weights_file", tmp_path / "inception.pth", "--device", "cpu"]
    found = []
    for size in (1, 7, 64):
        assert run(*options, "--batch_size", size, "--output", f"of{size}") == 0
        found.append(read_result(tmp_path / f"of{size}/results.json"))
    launch(tmp_path, [*options, "--batch_size", 5, "--output", "two"])
    found.append(read_result(tmp_path / "two/results.json"))
    assert {"fid", "sfid", "inception_score", "precision", "recall"} <= set(found[0]["results"][0])
    for other in found[1:]:
        for row in compare(found[0], other):
            assert row["second"] == pytest.approx(row["first"], rel=1e-6), row


# -------------------------------------------------------------------------------------------------------- pipelines


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    make_pipeline("both").save_pretrained(folder)
    return folder


SHORT = ["--steps", 2, "--layout_steps", 2, "--num_images", 10, "--batch_size", 4]


def test_a_sweep_over_guidance_and_schedulers(run, saved, folders, tmp_path):
    sweep = ["--guidance_scale", 1, 2, "--scheduler", "euler", "heun", "--guidance_interval", "0,1", "--save_images"]
    assert run("--pipeline", saved, "--reference", folders[1], "--resolution", 32, *SHORT, *sweep) == 0
    entries = read_result(tmp_path / "results/results.json")["results"]
    assert [(entry["guidance_scale"], entry["scheduler"]) for entry in entries] == [
        (1, "euler"),
        (1, "heun"),
        (2, "euler"),
        (2, "heun"),
    ]
    assert len({entry["frechet_distance"] for entry in entries}) == 4
    assert (tmp_path / "results/sweep.png").is_file()
    assert len(list((tmp_path / "results/images").rglob("*.png"))) == 40

    # An image is a function of the seed and its place.
    pipeline = make_pipeline("both")
    settings = {
        "guidance_scale": 2.0,
        "guidance_interval": [0.0, 1.0],
        "steps": 2,
        "layout_steps": 2,
        "scheduler": "euler",
        "classes": list(range(10)),
        "seed": 0,
    }
    image = PipelineSource(pipeline, 10, settings, "x").batch(range(7, 8))[0].permute(1, 2, 0).numpy()
    path = tmp_path / "results/images" / entries[2]["name"] / "000007.png"
    assert np.abs(np.asarray(PIL.Image.open(path)).astype(int) - image).max() <= 1


@pytest.mark.parametrize(
    ("sweep", "rows"),
    [
        (("--guidance_interval", "0,1", "0.5,1"), 2),
        (("--scheduler", "euler", "heun", "--guidance_interval", "0,1", "0.5,1"), 4),
        (("--guidance_scale", 1.5, 1.5), 1),
    ],
)
def test_a_sweep_over_what_is_no_number_is_drawn(run, saved, folders, tmp_path, sweep, rows):
    short = ["--steps", 2, "--layout_steps", 2, "--num_images", 2]
    assert run("--pipeline", saved, "--reference", folders[1], "--resolution", 32, *short, *sweep) == 0
    assert len(read_result(tmp_path / "results/results.json")["results"]) == rows
    assert (tmp_path / "results/sweep.png").is_file() == (rows > 1)
    assert ("sweep.png" in (tmp_path / "results/report.md").read_text()) == (rows > 1)


def test_a_killed_run_goes_on_and_more_images_add_to_it(run, saved, folders, tmp_path, monkeypatch, capsys):
    arguments = ["--pipeline", saved, "--reference", folders[1], "--resolution", 32, *SHORT]
    assert run(*arguments, "--output", "whole") == 0
    made = []
    real = PipelineSource.batch

    def killed(self, places):
        made.append(places)
        if len(made) == 3:
            raise KeyboardInterrupt
        return real(self, places)

    monkeypatch.setattr(PipelineSource, "batch", killed)
    assert run(*arguments) == 130
    made.clear()
    monkeypatch.setattr(PipelineSource, "batch", lambda self, places: made.append(places) or real(self, places))
    assert run(*arguments) == 0
    assert made == [range(8, 10)]
    rows = compare(tmp_path / "whole/results.json", tmp_path / "results/results.json")
    assert all(row["difference"] == 0 for row in rows)

    made.clear()
    assert run(*[14 if word == 10 else word for word in arguments]) == 0
    assert made == [range(10, 14)]
    assert read_result(tmp_path / "results/results.json")["protocol"]["images"] == 14
    assert run(*arguments, "--seed", 1) == 2
    assert "other settings" in capsys.readouterr().err
    assert run(*arguments, "--seed", 1, "--overwrite") == 0


def test_what_is_missing_is_planned_in_batches(tmp_path):
    folder = FeatureFolder(tmp_path / "x")
    assert folder.missing(7, 3) == [range(3), range(3, 6), range(6, 7)]
    for places in (range(2, 4), range(6, 9)):
        folder.write(places, {"pool": torch.arange(places.start, places.stop)[:, None].float()})
    assert folder.missing(10, 3) == [range(2), range(4, 6), range(9, 10)]
    assert folder.missing(3, 3) == [range(2)]
    assert folder.read(range(3, 8), ("pool",))["pool"].flatten().tolist() == [3, 6, 7]


def test_the_checksum_of_a_reference_is_of_what_is_compared(tmp_path):
    """Of ADM's statistics, if the file holds them and they count, and not of the images beside them."""
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    found = {}
    for scale in (1, 2):
        path = tmp_path / f"{scale}.npz"
        np.savez(path, arr_0=images, mu=np.zeros(3), sigma=scale * np.eye(3))
        for network in ("inception", NETWORK):
            args = program._parse(["--samples", "made", "--reference", str(path), "--feature_network", network])
            moments, reference = program.read_reference(args)
            assert reference is not None
            protocol = program.make_protocol(args, moments is not None, reference, FileSource(reference), {})
            found[scale, network] = protocol["reference_checksum"]
    assert found[1, "inception"] != found[2, "inception"]
    assert found[1, NETWORK] == found[2, NETWORK]


# ----------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "made", "--reference", "absent"], "got no such file: absent"),
        (["--samples", "made", "--reference", "absent.npz"], "no such file: absent.npz"),
        (["--samples", "made", "--reference", "text.npz"], "text.npz must be an .npz file of statistics"),
        (["--samples", "mixed", "--reference", "made"], "images must be of one size, got 000.png of 24 x 24"),
        (
            ["--samples", "made", "--reference", "small"],
            "must hold images of 24 x 24 pixels as the samples are, got 12",
        ),
        (
            ["--pipeline", "gpstoken-digits", "--reference", "made"],
            "must hold images of 32 x 32 pixels as the samples are, got 24 x 24; --resolution resizes",
        ),
        (["--samples", "one", "--reference", "made"], "a Fréchet distance must be of at least 2 images, got 1"),
        (["--samples", "made", "--reference", "one"], "--reference must hold at least 2 images, got 1"),
        (
            ["--samples", "made", "--reference", "made", "--num_images", 9],
            "must hold 9 images, as --num_images says, got 3",
        ),
        (["--samples", "cut", "--reference", "made"], "image must be a readable file, got cut"),
        (["--samples", "made", "--reference", "other.npz"], "256 features of timm/test_efficientnet, got 3"),
        (["--pipeline", "nowhere", "--reference", "made"], "--pipeline must be a folder"),
    ],
)
def test_one_line_and_exit_code_2(run, tmp_path, capsys, arguments, message):
    for name, count in (("made", 3), ("one", 1), ("mixed", 2), ("cut", 2)):
        write_images(tmp_path / name, count, 0)
    write_images(tmp_path / "small", 2, 0, size=12)
    PIL.Image.new("RGB", (10, 12)).save(tmp_path / "mixed/001.png")
    whole = (tmp_path / "cut/001.png").read_bytes()
    (tmp_path / "cut/001.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.npz").write_text("text")
    np.savez(tmp_path / "other.npz", mu=np.zeros(3), sigma=np.eye(3))
    assert run(*arguments) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(errors) == 1
    assert message in errors[0]
    assert not (tmp_path / "results/results.json").exists()
