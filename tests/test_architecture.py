# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""The shape of the project: public names, the arrows between modules, the code map, quiet imports."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gpstoken_hf

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "src" / "gpstoken_hf"
PROGRAM_FOLDERS = ("pipelines", "conversion", "training")

# Which siblings a module of the library may import. Data flows one way: nothing here points back.
ARROWS = {
    "configuration_gpstoken": {"file_checks"},
    "gaussians": set(),
    "file_checks": set(),
    "model_cards": set(),
    "pushing": {"model_cards"},
    "loading": {"file_checks", "pushing"},
    "evaluation_results": {"file_checks"},
    "feature_networks": set(),
    "feature_statistics": {"gaussians"},
    "metrics": {"feature_networks", "feature_statistics", "gaussians"},
    "numba_support": set(),
    "triton_support": set(),
    "regions": {"numba_support"},
    "tiling": set(),
    "visualization": {"gaussians"},
    "layout": {"file_checks", "gaussians", "visualization"},
    "complexity_torch": {"regions"},
    "complexity_triton": {"complexity_torch", "triton_support"},
    "complexity_cpu": {"complexity_torch", "numba_support", "regions"},
    "partition": {
        "complexity_cpu",
        "complexity_torch",
        "complexity_triton",
        "gaussians",
        "layout",
        "numba_support",
        "regions",
        "triton_support",
    },
    "splatting_torch": {"gaussians"},
    "splatting_cpu": {"gaussians", "numba_support"},
    "splatting_triton": {"triton_support"},
    "splatting": {
        "gaussians",
        "numba_support",
        "splatting_cpu",
        "splatting_torch",
        "splatting_triton",
        "triton_support",
    },
    "calibration": {"gaussians", "layout", "numba_support", "partition", "regions"},
    "image_processing_gpstoken": {"file_checks", "pushing"},
    "decoder_gpstoken": {"tiling"},
    "encoder_gpstoken": {"configuration_gpstoken", "decoder_gpstoken", "gaussians"},
    "quality": {"layout", "metrics", "regions"},
    "modeling_gpstoken": {
        "configuration_gpstoken",
        "decoder_gpstoken",
        "encoder_gpstoken",
        "gaussians",
        "layout",
        "loading",
        "partition",
        "quality",
        "regions",
        "splatting",
        "tiling",
    },
    "entropy_coding": set(),
    "region_forest": {"gaussians", "layout", "regions", "tiling"},
    "token_values": {"entropy_coding", "gaussians"},
    "token_file": {"entropy_coding", "gaussians", "layout", "region_forest", "token_values"},
    "latent_grid": {"gaussians", "regions", "tiling"},
    "autoencoder_gpstoken": {
        "configuration_gpstoken",
        "file_checks",
        "gaussians",
        "latent_grid",
        "loading",
        "modeling_gpstoken",
        "partition",
        "tiling",
    },
    "transformer_sit": {"file_checks", "gaussians", "loading"},
    "scheduling_flow_match_sde": {"file_checks", "loading", "pushing"},
    "layout_bank": {"file_checks", "gaussians", "layout", "loading"},
    "remote_code": {"file_checks", "model_cards", "pushing"},
    "hub": {"pushing", "remote_code"},
    "guidance": {"layout", "transformer_sit"},
    "class_labels": set(),
    "lora": {"file_checks"},
    "layout_sources": {
        "calibration",
        "configuration_gpstoken",
        "image_processing_gpstoken",
        "layout",
        "partition",
    },
    "sampling": {"configuration_gpstoken", "layout", "transformer_sit"},
    "guiders": {"guidance", "transformer_sit"},
    "modular_blocks": {
        "class_labels",
        "guidance",
        "guiders",
        "image_processing_gpstoken",
        "layout",
        "layout_bank",
        "layout_sources",
        "modeling_gpstoken",
        "sampling",
        "scheduling_flow_match_sde",
        "transformer_sit",
    },
    "modular_gpstoken": {"file_checks", "guiders", "loading", "lora", "modular_blocks"},
    "pipeline_gpstoken": {
        "class_labels",
        "file_checks",
        "gaussians",
        "guidance",
        "hub",
        "image_processing_gpstoken",
        "layout",
        "layout_bank",
        "layout_sources",
        "loading",
        "lora",
        "modeling_gpstoken",
        "sampling",
        "transformer_sit",
    },
}

PUBLIC_NAMES = (
    "GPSTokenConfig",
    "GPSTokenModel",
    "GPSTokenImageProcessor",
    "SiTTransformer1DModel",
    "FlowMatchSDEScheduler",
    "AutoencoderGPSToken",
    "GPSTokenPipeline",
    "splat_gaussians",
    "partition_images",
    "calibrate_layout",
    "GaussianLayout",
    "GaussianLayoutBank",
)


def imported_modules(path: Path) -> list[tuple[int, str]]:
    """`(level, module)` of every import in a file, wherever it stands."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or ""))
        elif isinstance(node, ast.Import):
            found.extend((0, alias.name) for alias in node.names)
    return found


def library_modules() -> list[Path]:
    return sorted(path for path in LIBRARY.glob("*.py") if path.name != "__init__.py")


@pytest.mark.parametrize("name", PUBLIC_NAMES)
def test_public_name_is_importable(name):
    assert name in gpstoken_hf.__all__
    assert getattr(gpstoken_hf, name) is not None


@pytest.mark.parametrize("path", library_modules(), ids=lambda path: path.stem)
def test_arrows_between_modules(path):
    assert path.stem in ARROWS, "a new module: write down here what it may import"
    siblings = {module for level, module in imported_modules(path) if level == 1}
    assert siblings == ARROWS[path.stem]
    for level, module in imported_modules(path):
        # Remote code on the Hub follows `from .x import y` and nothing else.
        assert level <= 1
        assert not (level == 0 and module.split(".")[0] == "gpstoken_hf")
        assert module.split(".")[0] not in PROGRAM_FOLDERS


def test_arrows_have_no_circle():
    def reachable(name: str, seen: tuple[str, ...]) -> None:
        assert name not in seen, f"a circle: {' -> '.join((*seen, name))}"
        for target in ARROWS[name]:
            reachable(target, (*seen, name))

    for name in ARROWS:
        reachable(name, ())
    assert set(ARROWS) == {path.stem for path in library_modules()}


def test_modules_are_short():
    lengths = {path.stem: len(path.read_text().splitlines()) for path in library_modules()}
    assert max(lengths.values()) <= 700, lengths
    long = sorted(name for name, length in lengths.items() if length > 500)
    assert len(long) <= 2, f"at most two modules may have more than 500 lines, got {long}"


def code_lines(path: Path) -> list[tuple[int, str]]:
    """`(number, text)` of the lines of a file without blank lines, comments, docstrings, imports and signatures."""
    text = path.read_text()
    skipped: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            skipped.update(range(node.lineno, node.end_lineno + 1))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            skipped.update(range(node.lineno, node.body[0].lineno))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            skipped.update(range(node.lineno, node.end_lineno + 1))
    lines = ((number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if number not in skipped)
    return [(number, line) for number, line in lines if line and not line.startswith("#")]


def test_no_code_stands_twice():
    """No run of more than six equal lines in the library. Lines that only close brackets do not count."""
    places: dict[tuple[str, ...], str] = {}
    for path in library_modules():
        lines = [(number, line) for number, line in code_lines(path) if line.strip("()[]{},:")]
        for start in range(len(lines) - 6):
            run = lines[start : start + 7]
            place = f"{path.name}:{run[0][0]}"
            first = places.setdefault(tuple(line for _, line in run), place)
            assert first == place, f"seven equal lines at {first} and {place}"


def test_code_map_is_true():
    tree = re.search(r"```text\n(.*?)```", (ROOT / "docs" / "code_map.md").read_text(), re.DOTALL)
    assert tree, "docs/code_map.md shows the file tree in a ```text block"
    folder, named = "", set()
    for line in tree[1].splitlines():
        entry = line.split()[0] if line.strip() else ""
        if not line.startswith(" ") and entry.endswith("/"):
            folder = entry
        elif entry:
            named.add((folder if line.startswith(" ") else "") + entry)
    for name in named:
        assert (ROOT / name).exists(), f"the code map names {name}, which is not there"
    for folder in ("src/gpstoken_hf", "pipelines/shared", *PROGRAM_FOLDERS):
        for path in (ROOT / folder).glob("*.py"):
            if path.name != "__init__.py":
                assert f"{folder}/{path.name}" in named, f"the code map does not name {folder}/{path.name}"


def test_import_is_quiet_and_offline():
    """Nothing is printed, compiled or asked of the network when the package is imported."""
    program = (
        "import socket\n"
        "def refuse(*arguments, **options): raise AssertionError('network at import')\n"
        "socket.socket.connect = refuse\n"
        "import gpstoken_hf, sys\n"
        "modules = [module for name, module in sys.modules.items() if name.startswith('gpstoken_hf')]\n"
        "ours = [d for module in modules for d in vars(module).values() if hasattr(d, 'py_func')]\n"
        "assert ours and not any(d.signatures for d in ours), 'compiled at import'\n"
        "assert 'matplotlib' not in sys.modules and 'skimage' not in sys.modules and 'datasets' not in sys.modules\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""


def test_the_whole_way_works_without_numba():
    """`auto` takes the PyTorch paths: the partition, the splat, the calibration."""
    program = (
        "import sys\n"
        "sys.modules['numba'] = None\n"
        "import torch, gpstoken_hf\n"
        "from gpstoken_hf import GPSTokenConfig, GPSTokenModel, calibrate_layout, partition_images\n"
        "images = torch.rand(2, 3, 32, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1\n"
        "model = GPSTokenModel(GPSTokenConfig.preset('tiny'))\n"
        "output = model(images, num_tokens=[6, 9])\n"
        "output.sample.mean().backward()\n"
        "layout = partition_images(images, 12, min_region_size=4)\n"
        "assert torch.equal(calibrate_layout(layout.gaussians, (32, 40), 4).boxes, layout.boxes)\n"
        "try:\n"
        "    partition_images(images, 4, backend='numba')\n"
        "except ValueError as error:\n"
        "    assert 'not installed' in str(error), error\n"
        "else:\n"
        "    raise AssertionError('numba is not there')\n"
        "print(layout.boxes.sum((0, 1)).tolist())\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    images = torch.rand(2, 3, 32, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert result.stdout.strip() == str(
        gpstoken_hf.partition_images(images, 12, min_region_size=4).boxes.sum((0, 1)).tolist()
    )


def test_every_file_carries_the_licence():
    for folder in ("src", "tests", *PROGRAM_FOLDERS):
        for path in (ROOT / folder).rglob("*.py"):
            assert path.read_text().startswith("# Copyright 2026 The gpstoken-hf authors."), path
