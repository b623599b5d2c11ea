# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""The command `gpstoken`, and the programs encode, decode and info, which it adds to reconstruct and generate."""

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from loopback_hub import LoopbackHub
from safetensors.torch import load_file
from tiny_pipeline import make_pipeline

from gpstoken_hf.autoencoder_gpstoken import AutoencoderGPSToken
from gpstoken_hf.configuration_gpstoken import GPSTokenConfig
from gpstoken_hf.layout_bank import GaussianLayoutBank
from gpstoken_hf.modeling_gpstoken import GPSTokenModel
from gpstoken_hf.visualization import tensor_to_pil
from pipelines.command_line import COMMANDS, main
from pipelines.info import describe
from pipelines.shared.outputs import MARKER
from pipelines.shared.programs import run_program

ROOT = Path(__file__).resolve().parents[1]
PIPELINES = ROOT / "pipelines"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoints") / "tokenizer"
    GPSTokenModel(GPSTokenConfig.preset("tiny")).save_pretrained(folder)
    return folder


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    random = np.random.default_rng(0)
    for name, size in (("a.png", (48, 40)), ("b.png", (40, 56))):
        PIL.Image.fromarray(random.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / name)
    return folder


def read_pixels(path):
    with PIL.Image.open(path) as picture:
        return np.array(picture)


def gpstoken(*words):
    return run_program(main, [str(word) for word in words])


# ---- The command itself ---------------------------------------------------------------------------------------------


def test_without_a_command_all_are_listed(capsys):
    assert gpstoken() == 0
    printed = capsys.readouterr().out
    assert "python -m" not in printed
    for name in COMMANDS:
        assert f"gpstoken {name}" in printed
        assert f"\n    {name:<12} " in printed


def test_another_word_is_one_line(capsys):
    assert gpstoken("recode", "photo.jpg") == 2
    assert capsys.readouterr().err.startswith("error: command must be one of reconstruct, encode")


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as stop:
        gpstoken("--version")
    assert stop.value.code == 0
    assert re.fullmatch(r"gpstoken-hf \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_is_spelled_as_it_is_typed(name, capsys):
    if name == "demo":
        pytest.importorskip("gradio")
    with pytest.raises(SystemExit) as stop:
        gpstoken(name, "--help")
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert f"usage: gpstoken {name} " in printed
    assert f"python -m pipelines.{name}" not in printed


def test_errors_of_a_command_are_one_line(tmp_path, capsys):
    assert gpstoken("reconstruct", tmp_path / "none.png", "--output", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def reachable_modules() -> set[Path]:
    """The files in pipelines/ that a command imports, itself included."""
    found: set[Path] = set()
    todo = [PIPELINES / "command_line.py", *(PIPELINES / f"{name}.py" for name in COMMANDS)]
    while todo:
        path = todo.pop()
        if path in found:
            continue
        found.add(path)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                names = [node.module] if node.module else [alias.name for alias in node.names]
                todo += [path.parent / f"{name.replace('.', '/')}.py" for name in names]
    return found


def test_what_is_installed_needs_no_clone():
    """The folder is installed under another name, so its modules import each other relatively."""
    modules = reachable_modules()
    assert PIPELINES / "shared" / "token_files.py" in modules
    for path in modules:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                assert name.split(".")[0] not in ("pipelines", "conversion", "training"), f"{path.name}: {name}"


# ---- encode and decode ----------------------------------------------------------------------------------------------


def test_encode_then_decode_is_what_the_model_does(photos, model_folder, tmp_path):
    options = ["--model", model_folder, "--device", "cpu"]
    assert gpstoken("encode", photos, "--tokens", 12, "--output", tmp_path / "tokens", *options) == 0
    names = {f"{stem}.{kind}" for stem in "ab" for kind in ("safetensors", "png", "json")}
    assert {path.name for path in (tmp_path / "tokens").iterdir()} == {*names, MARKER}
    files = sorted((tmp_path / "tokens").glob("*.safetensors"))
    assert gpstoken("decode", *files, "--output", tmp_path / "pictures", *options) == 0
    model = GPSTokenModel.from_pretrained(model_folder).eval()
    for stem, size in (("a", (48, 40)), ("b", (40, 56))):
        image = read_pixels(photos / f"{stem}.png")
        pixel_values = torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            encoded = model.encode(pixel_values, num_tokens=12)
            expected = tensor_to_pil(model.decode(encoded.tokens, size).sample[0])
        assert torch.equal(load_file(tmp_path / "tokens" / f"{stem}.safetensors")["tokens"], encoded.tokens)
        assert np.array_equal(read_pixels(tmp_path / "pictures" / f"{stem}.png"), np.asarray(expected))
        facts = json.loads((tmp_path / "tokens" / f"{stem}.json").read_text())
        assert (facts["height"], facts["width"], facts["tokens"]) == (*size, 12)


def test_decode_at_another_size_and_names_of_reconstruct(photos, model_folder, tmp_path):
    options = ["--model", model_folder, "--device", "cpu"]
    assert gpstoken("reconstruct", photos / "a.png", "--tokens", 9, "--output", tmp_path / "out", *options) == 0
    tokens = tmp_path / "out" / "a" / "tokens.safetensors"
    assert gpstoken("decode", tokens, "--size", 96, "--output", tmp_path / "large", *options) == 0
    with PIL.Image.open(tmp_path / "large" / "a.png") as picture:
        assert picture.size == (80, 96)
    assert gpstoken("decode", tokens, "--size", 10**6, "--output", tmp_path / "huge", *options) == 2


def test_encode_skips_what_is_done_and_refuses_other_settings(photos, model_folder, tmp_path, capsys):
    command = ["encode", photos / "a.png", "--output", tmp_path / "tokens", "--model", model_folder]
    assert gpstoken(*command, "--tokens", 8) == 0
    written = (tmp_path / "tokens" / "a.safetensors").stat().st_mtime_ns
    assert gpstoken(*command, "--tokens", 8) == 0
    assert "done before, skipped" in capsys.readouterr().out
    assert gpstoken(*command, "--tokens", 9) == 2
    assert "of other settings" in capsys.readouterr().err
    assert (tmp_path / "tokens" / "a.safetensors").stat().st_mtime_ns == written
    assert gpstoken(*command, "--tokens", 9, "--overwrite") == 0
    assert load_file(tmp_path / "tokens" / "a.safetensors")["tokens"].shape[1] == 9


def test_every_photograph_gets_files_of_its_own(photos, model_folder, tmp_path):
    (photos / "sub.png").mkdir()
    long = "x" * 250 + ".png"
    for name in ("sub.jpg", "sub.png/inner.png", long, ".gpstoken.png"):
        shutil.copy(photos / "a.png", photos / name)
    command = ["encode", photos, "--tokens", 4, "--output", photos / "tokens", "--model", model_folder]
    assert gpstoken(*command) == 0
    written = sorted(path for path in (photos / "tokens").rglob("*.safetensors"))
    assert len(written) == 6  # the two of the folder, and these
    assert gpstoken(*command) == 0  # its own pictures are no photographs
    assert sorted(path for path in (photos / "tokens").rglob("*.safetensors")) == written
    command = ["--output", tmp_path / "pictures", "--model", model_folder]
    assert gpstoken("decode", *written, *command) == 0
    assert len([*(tmp_path / "pictures").rglob("*.png")]) == 6


def test_a_focus_draws_tokens(photos, model_folder, tmp_path):
    flat = PIL.Image.new("RGB", (64, 64), (90, 90, 90))
    flat.save(photos / "flat.png")
    command = ["encode", photos / "flat.png", "--tokens", 24, "--model", model_folder, "--output"]
    assert gpstoken(*command, tmp_path / "plain") == 0
    assert gpstoken(*command, tmp_path / "focus", "--focus", "0,0,15,15") == 0

    def in_corner(folder):
        gaussians = load_file(tmp_path / folder / "flat.safetensors")["init_gaussians"][0]
        return int(((gaussians[:, 3] < -0.5) & (gaussians[:, 4] < -0.5)).sum())

    assert in_corner("focus") > in_corner("plain") + 4


def test_token_files_and_a_quality(photos, model_folder, tmp_path, capsys):
    options = ("--model", model_folder, "--device", "cpu")
    kinds = {"safetensors": (), "gpst": ("--format", "gpst"), "rounded": ("--format", "gpst", "--step", 0.5)}
    for kind, more in kinds.items():
        output = tmp_path / kind
        assert gpstoken("encode", photos / "a.png", "--tokens", 12, *more, "--output", output, *options) == 0
        assert gpstoken("encode", photos / "a.png", "--tokens", 12, *more, "--output", output, *options) == 0
        assert "done before" in capsys.readouterr().out
        name = "a.safetensors" if kind == "safetensors" else "a.gpst"
        assert gpstoken("decode", output / name, "--output", tmp_path / f"{kind}.pictures", *options) == 0
    pictures = [(tmp_path / f"{kind}.pictures" / "a.png").read_bytes() for kind in kinds]
    assert pictures[0] == pictures[1] != pictures[2]
    assert (tmp_path / "rounded/a.gpst").stat().st_size < (tmp_path / "gpst/a.gpst").stat().st_size

    command = ("encode", photos / "a.png", "--output", tmp_path / "quality", *options, "--max_tokens", 16)
    assert gpstoken(*command, "--target_psnr", 1) == 0
    facts = json.loads((tmp_path / "quality/a.json").read_text())
    assert facts["reached"] is True
    assert facts["tokens"] < 16
    assert gpstoken(*command, "--target_psnr", 90, "--overwrite") == 0
    assert "short of 90 dB" in capsys.readouterr().out
    assert json.loads((tmp_path / "quality/a.json").read_text())["reached"] is False
    for bad in (
        ("--target_psnr", 9, "--tokens", 4),
        ("--max_tokens", 4),
        ("--step", 1),
        ("--format", "gpst", "--step", 1e9),
    ):
        assert gpstoken("encode", photos / "a.png", *bad, "--output", tmp_path / "bad", *options) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize("command", ["encode", "decode"])
def test_one_bad_file_does_not_stop_the_others(command, photos, model_folder, tmp_path, capsys):
    options = ["--model", model_folder, "--device", "cpu"]
    good = photos / "a.png"
    if command == "decode":
        assert gpstoken("encode", good, "--tokens", 5, "--output", tmp_path / "tokens", *options) == 0
        good = tmp_path / "tokens" / "a.safetensors"
    bad = tmp_path / "bad.bin"
    bad.write_bytes(b"no picture and no tokens")
    capsys.readouterr()
    assert gpstoken(command, bad, good, "--output", tmp_path / "out", *options) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error", "1 of 2"))]
    assert len(lines) == 2, lines
    assert lines[1].startswith(f"1 of 2 {'images' if command == 'encode' else 'files'} not {command}d: ")
    assert len([path for path in (tmp_path / "out").iterdir() if path.suffix == ".png"]) == 1


@pytest.mark.parametrize("command", ["encode", "decode"])
def test_files_of_others_are_never_replaced(command, photos, model_folder, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.png").write_text("mine")
    source = photos / "a.png"
    if command == "decode":
        assert gpstoken("encode", source, "--tokens", 5, "--output", tmp_path / "t", "--model", model_folder) == 0
        source = tmp_path / "t" / "a.safetensors"
    assert gpstoken(command, source, "--output", out, "--model", model_folder) == 2
    assert "a.png" in capsys.readouterr().err
    assert (out / "a.png").read_text() == "mine"
    assert sorted(path.name for path in out.iterdir()) == ["a.png"]


# ---- info -----------------------------------------------------------------------------------------------------------


def test_info_on_the_bundled_checkpoints(capsys):
    assert gpstoken("info", "gpstoken-nano", "gpstoken-digits") == 0
    nano, digits = (dict(re.findall(r"^(\S+) +(.+)$", part, re.M)) for part in capsys.readouterr().out.split("\n\n"))
    assert nano["parameters"] == "4.45 M"
    assert nano["class"].startswith("GPSTokenModel")
    assert nano["tokens"].startswith("32 ")
    assert nano["images"].startswith("64 x 64 ")
    assert nano["licence"] == digits["licence"] == "apache-2.0"
    assert digits["class"].startswith("GPSTokenPipeline")
    assert digits["classes"].startswith("10: zero, one")


def test_info_counts_what_is_there(tmp_path, model_folder):
    pipeline = make_pipeline()
    layouts = torch.rand(3, 4, 5) * 0.5 + 0.2
    bank = GaussianLayoutBank.from_layouts({0: list(layouts[:2]), 1: [layouts[2]]})
    pipeline.save_pretrained(tmp_path / "pipeline")
    bank.save_pretrained(tmp_path / "bank")
    vae = AutoencoderGPSToken(image_size=32, num_tokens=8, hidden_size=24, num_hidden_layers=1, num_attention_heads=2)
    vae.save_pretrained(tmp_path / "vae")

    def parameters(module):
        return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:.2f} M"

    rows = describe(str(tmp_path / "pipeline"))
    for part in ("vae", "transformer"):
        start = rows.index(next(row for row in rows if row[0] == part))
        assert rows[start + 1] == ("  parameters", parameters(getattr(pipeline, part)))
    assert dict(rows)["licence"] == "not stated: no model card"
    assert dict(describe(str(tmp_path / "bank")))["layouts"] == "3 of 4 tokens"
    assert dict(describe(str(tmp_path / "vae")))["parameters"] == parameters(vae)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "must hold config.json or model_index.json, got neither"),
        ({"model_type": "bert"}, "got 'bert'"),
        ({"_class_name": "UNet2DModel"}, "got 'UNet2DModel'"),
        ({"model_type": "gpstoken", "image_size": -3}, "image_size"),
        ({"_class_name": "SiTTransformer1DModel", "flux": 1}, "flux"),
        ({"_class_name": "GaussianLayoutBank"}, "num_layouts"),
        ({"_class_name": "GaussianLayoutBank", "num_layouts": 0, "total_tokens": 8}, "num_layouts must be an integer"),
        ({"_class_name": "SiTTransformer1DModel", "num_layers": 10**9}, "num_layers must be an integer"),
        ({"_class_name": ["modeling", "SiTTransformer1DModel"], "num_heads": 1}, "num_heads"),
        ("{", "must be a JSON file"),
    ],
)
def test_info_on_what_is_none_of_ours(config, message, tmp_path, capsys):
    if config is not None:
        (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    assert gpstoken("info", tmp_path) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert message in line


def test_info_believes_no_index_of_a_pipeline(tmp_path, capsys):
    make_pipeline().save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    for field, value in (("vae", 5), ("vae", ["gpstoken_hf", 5]), ("../other", ["a", "b"]), ("id2label", {"0": None})):
        (tmp_path / "model_index.json").write_text(json.dumps({**index, field: value}))
        assert gpstoken("info", tmp_path) == 2
        assert field in capsys.readouterr().err
    # The edition with remote code names files and their classes.
    index["_class_name"] = ["pipeline_gpstoken", "GPSTokenPipeline"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    config = tmp_path / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "auto_map": {"AutoModel": "a.b"}}))
    assert gpstoken("info", tmp_path) == 0
    assert "SiTTransformer1DModel: generates" in capsys.readouterr().out


@pytest.mark.slow
def test_info_on_a_hub_name(model_folder, tmp_path):
    program = (
        "import sys\n"
        "from pipelines.command_line import main\n"
        "from huggingface_hub import HfApi\n"
        "HfApi().create_repo('tester/tiny')\n"
        f"HfApi().upload_folder(repo_id='tester/tiny', folder_path={str(model_folder)!r})\n"
        "sys.exit(main(['info', 'tester/tiny', 'tester/none']))\n"
    )
    with LoopbackHub() as hub:
        environment = {**os.environ, **hub.env, "HF_HOME": str(tmp_path), "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert "GPSTokenModel" in done.stdout, done.stderr
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith("error: tester/none: ")


# ---- Installed ------------------------------------------------------------------------------------------------------


def make_environment(folder: Path) -> Path:
    """A virtual environment that sees the packages of this one, but neither this package nor this clone."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    # A path file inside that folder would be read, one that it names only adds to the path.
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_the_installed_command_runs(kind, photos, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    leave_out = shutil.ignore_patterns("*.egg-info", "__pycache__")
    for name in ("src", "pipelines"):
        shutil.copytree(ROOT / name, source / name, ignore=leave_out)
    bin_folder = make_environment(tmp_path / "environment")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["HF_HUB_OFFLINE"] = "1"

    def run(*words, code=0):
        command = [str(word) for word in words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == code, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    pip = (sys.executable, "-m", "pip", "--quiet")
    built = source
    if kind == "wheel":
        run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path / "dist", source)
        (built,) = (tmp_path / "dist").glob("*.whl")
        shutil.rmtree(source)
    target = ("--python", bin_folder / "python", "install", "--no-deps", "--no-build-isolation", "--no-index")
    run(*pip, *target, *(["--editable"] if kind == "editable" else []), built)

    command = bin_folder / "gpstoken"
    where = run(bin_folder / "python", "-c", "import gpstoken_hf; print(gpstoken_hf.__file__)")
    assert where.startswith(str(tmp_path))
    assert "reconstruct" in run(command)
    assert "4.45 M" in run(command, "info", "gpstoken-nano")
    run(command, "encode", photos, "--output", "tokens")
    if kind == "editable":
        return
    run(command, "decode", "tokens/a.safetensors", "tokens/b.safetensors", "--output", "pictures")
    run(command, "reconstruct", photos / "a.png", "--output", "panels")
    run(command, "generate", "--classes", "three", "--count", "1", "--steps", "2", "--output", "digits")
    for file in ("pictures/b.png", "panels/a/panel.png", "digits/sheet.png"):
        assert (tmp_path / file).is_file(), file
    run(command, "encode", "nowhere.png", code=2)
    # The page as a Space runs it: one file, in a folder of its own.
    if importlib.util.find_spec("gradio") is not None:
        shutil.copy(PIPELINES / "demo.py", tmp_path / "app.py")
        assert "--layout_bank" in run(bin_folder / "python", "app.py", "--help")
        with subprocess.Popen([command, "demo"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE) as process:
            try:
                assert b"the page is at http://127.0.0.1:" in process.stdout.readline()
            finally:
                process.terminate()
