# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""The examples in docstrings run, and every public name has one."""

import doctest
import importlib
from types import ModuleType
from typing import Any

import pytest
import torch

import gpstoken_hf

MODULES = (
    "metrics",
    "feature_statistics",
    "evaluation_results",
    "visualization",
    "layout",
    "splatting",
    "partition",
    "calibration",
    "quality",
    "token_file",
)
# Functions outside of `__all__` that users call.
USED = (
    "metrics.psnr",
    "metrics.ssim",
    "metrics.lpips",
    "metrics.to_uint8",
    *(f"feature_statistics.{name}" for name in ("frechet_distance", "inception_score", "precision_recall")),
    *(f"evaluation_results.{name}" for name in ("make_result", "compare")),
    "token_file.write_tokens",
    "token_file.read_tokens",
    *(f"visualization.draw_{kind}" for kind in ("gaussians", "boxes", "error_map")),
)


def names_defined_in(module: ModuleType) -> dict[str, Any]:
    """Public classes and functions of a module, without those that it imports."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__ and callable(value)
    }


def documented_names() -> dict[str, Any]:
    """Name -> object, of `__all__` and of `MODULES`."""
    found = {name: getattr(gpstoken_hf, name) for name in gpstoken_hf.__all__}
    for stem in MODULES:
        module = importlib.import_module(f"gpstoken_hf.{stem}")
        found |= {
            f"{stem}.{name}": value
            for name, value in names_defined_in(module).items()
            if name not in gpstoken_hf.__all__
        }
    return found


NAMES = documented_names()


def examples_of(name: str) -> list[doctest.DocTest]:
    """The examples of a name and, if it is a class, of its methods."""
    return [test for test in doctest.DocTestFinder().find(NAMES[name], name, module=False) if test.examples]


@pytest.mark.parametrize("name", NAMES)
def test_examples_run(name, monkeypatch, tmp_path):
    """Twice, from different random states, on which an example must not depend."""
    monkeypatch.chdir(tmp_path)
    for seed in range(2):
        torch.manual_seed(seed)
        for test in examples_of(name):
            report: list[str] = []
            result = doctest.DocTestRunner(verbose=False).run(test, out=report.append)
            assert result.failed == 0, "".join(report)


@pytest.mark.parametrize("name", [*gpstoken_hf.__all__, *USED])
def test_public_name_has_an_example(name):
    owner = NAMES[name]
    own = [test for test in examples_of(name) if test.name == name]
    assert own, f"{owner.__module__}.{owner.__qualname__} has no Examples block"
