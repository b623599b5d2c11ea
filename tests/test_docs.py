# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""README, docs and the cards of the bundled checkpoints are true: their Python runs, links and commands exist.

Every ```python block runs, in the order of its page, all blocks of a page in one namespace. A block of `>>>` lines
must also print what it shows. A block that no test can run stands below a line `<!-- not run: reason -->`.

Every `python -m` command of our programs, in a block or inline, is parsed by the program itself, so it must be
complete: options, their values, and required arguments. Options in [brackets] are parsed like the others.
"""

import argparse
import doctest
import importlib
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_pipeline import CHANNELS, TOKENS, make_vae

from gpstoken_hf.layout_bank import GaussianLayoutBank
from gpstoken_hf.pipeline_gpstoken import GPSTokenPipeline
from gpstoken_hf.transformer_sit import SiTTransformer1DModel

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "src" / "gpstoken_hf" / "bundled").glob("*/README.md")),
]
FENCE = re.compile(r"^(?:<!-- (?P<note>not run: .+?) -->\n+)?```(?P<language>\w*)\n(?P<body>.*?)^```$", re.M | re.S)
# What a page takes for granted beside files: images as a batch.
GIVEN = {"docs/released_checkpoints.md": {"pixel_values": torch.zeros(1, 3, 512, 768)}}
PROGRAM = re.compile(r"(?:^|\s)-m ((?:pipelines|conversion|training)\.\w+)(.*)")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


# ---- Python ---------------------------------------------------------------------------------------------------------


def python_blocks(page: Path) -> list[tuple[int, str]]:
    """`(line, code)` of the blocks that run."""
    text = page.read_text()
    return [
        (text.count("\n", 0, match.start("body")) + 1, match["body"])
        for match in FENCE.finditer(text)
        if match["language"] == "python" and match["note"] is None
    ]


@pytest.fixture(scope="module")
def belongings(tmp_path_factory) -> Path:
    """A folder with what the pages take for granted: photographs, and tiny checkpoints of the names that they use."""
    folder = tmp_path_factory.mktemp("reader")
    y, x = np.mgrid[0:240, 0:320]
    noise = np.random.default_rng(0).integers(0, 60, (240, 320))
    channels = [128 + 80 * np.sin(x / 20), 128 + 80 * np.cos(y / 13), np.where(x > y, 190, 40) + noise]
    photo = PIL.Image.fromarray(np.stack(channels, axis=-1).clip(0, 255).astype(np.uint8))
    photo.save(folder / "photo.jpg")

    torch.manual_seed(0)
    vae = make_vae(decoder_channel_multipliers=(1, 1, 1))
    vae.save_pretrained(folder / "gpstoken-m128")
    layouts = torch.rand(4, TOKENS, 5) * 0.5 + 0.2
    bank = GaussianLayoutBank.from_layouts({207: list(layouts[:3]), 88: [layouts[3]]})
    bank.save_pretrained(folder / "bank")
    transformer = SiTTransformer1DModel(
        sample_size=TOKENS,
        in_channels=CHANNELS,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=16,
        condition_channels=5,
    )
    pipeline = GPSTokenPipeline(vae, transformer, FlowMatchEulerDiscreteScheduler(), layout_bank=bank)
    pipeline.save_pretrained(folder / "gpstoken")
    return folder


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)], ids=name_of)
def test_python_runs(page, belongings, tmp_path, monkeypatch):
    monkeypatch.chdir(shutil.copytree(belongings, tmp_path / "reader"))
    torch.manual_seed(0)
    namespace = {"__name__": page.stem, **GIVEN.get(name_of(page), {})}
    for line, code in python_blocks(page):
        if ">>>" in code:
            example = doctest.DocTestParser().get_doctest(code, namespace, name_of(page), str(page), line)
            report: list[str] = []
            result = doctest.DocTestRunner().run(example, out=report.append, clear_globs=False)
            assert result.failed == 0, "".join(report)
            namespace.update(example.globs)
        else:
            exec(compile("\n" * line + code, str(page), "exec"), namespace)


def test_the_quick_start_is_run():
    assert len(python_blocks(ROOT / "README.md")) >= 3


def test_pages_for_newcomers_are_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200
    assert len((ROOT / "docs" / "architecture.md").read_text().splitlines()) <= 80


# ---- Links ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_point_to_files(page):
    text = FENCE.sub("", page.read_text())
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"\w+:|#", target)]
    missing = [target for target in targets if not (page.parent / target.partition("#")[0]).exists()]
    assert not missing


# ---- Commands -------------------------------------------------------------------------------------------------------


def commands(page: Path) -> list[str]:
    """Every line of a shell block, every indented line and every inline code span, each on one line."""
    text = page.read_text()
    lines = []
    for match in FENCE.finditer(text):
        if match["language"] in ("", "bash"):
            lines += match["body"].replace("\\\n", " ").splitlines()
    prose = FENCE.sub("", text)
    lines += re.findall(r"^ {4}(\S.*)$", prose, re.M)
    lines += [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    return lines


PROGRAM_CALLS = sorted(
    {(name_of(page), *match.groups()) for page in PAGES for line in commands(page) if (match := PROGRAM.search(line))}
)


class ParsedError(Exception):
    """The program has parsed its arguments."""


@pytest.mark.parametrize(("page", "program", "arguments"), PROGRAM_CALLS)
def test_programs_know_the_options(page, program, arguments, monkeypatch, capsys):
    words = shlex.split(arguments.replace("[", "").replace("]", ""), comments=True)
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, args=None, namespace=None):
        parse_args(self, args, namespace)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.chdir(ROOT)
    with pytest.raises((ParsedError, SystemExit)) as stop:
        importlib.import_module(program).main(words)
    assert getattr(stop.value, "code", 0) == 0, capsys.readouterr().err


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_options_are_snake_case(page):
    # The options of diffusers' own program are spelt as it spells them.
    text = re.sub(r"^diffusers-cli (?:.*\\\n)*.*$", "", page.read_text(), flags=re.M)
    assert not re.findall(r"--(?!no-)[a-z_]+-[a-z_-]+", text)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_make_targets_and_test_files_exist(page):
    text = page.read_text()
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    for line in commands(page):
        for target in re.findall(r"^make ([a-z-]+)", line):
            assert target in targets
    for file in re.findall(r"\btests/[\w/]+\.\w+", text):
        assert (ROOT / file).exists(), file
