# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Loads the common test suites that `fetch_transformers_suite` has put under `.cache/`.

The suites import a few helpers that the source distribution leaves out. What stands in for them here:

| module the suites import | stand-in | what is therefore not tested |
|---|---|---|
| `exporters.test_export` | empty `ExportTesterMixin` | export to ONNX, ExecuTorch and others |
| `generation.test_utils` | empty `GenerationTesterMixin` | text generation; the model generates none |
| `utils.test_configuration_utils` | the fields of `PreTrainedConfig`, values of ours | nothing |
| `fetch_hub_objects_for_ci` | addresses as they are | nothing; no test here loads from one |
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from types import ModuleType

import pytest
from fetch_transformers_suite import suite_folder, suite_is_complete

_PACKAGE = "transformers_common_suites"

# One value other than the default for every field that each transformers config has.
_CONFIG_COMMON_KWARGS = {
    "architectures": ["GPSTokenModel"],
    "chunk_size_feed_forward": 3,
    "dtype": "float16",
    "id2label": {0: "zero", 1: "one"},
    "is_encoder_decoder": True,
    "label2id": {"zero": 0, "one": 1},
    "output_hidden_states": True,
    "problem_type": "regression",
    "return_dict": False,
}

REQUIRED = os.environ.get("GPSTOKEN_REQUIRE_TRANSFORMERS_SUITE") == "1"


def load_suite(name: str) -> ModuleType:
    """The suite `test_<name>_common`; skips the calling test module when the suites have not been fetched.

    With GPSTOKEN_REQUIRE_TRANSFORMERS_SUITE=1 in the environment a missing suite is an error instead.
    """
    if not suite_is_complete():
        reason = f"not fetched: {suite_folder().name}; run `python -m tests.fetch_transformers_suite`"
        if REQUIRED:
            raise FileNotFoundError(reason)
        pytest.skip(reason, allow_module_level=True)
    if _PACKAGE not in sys.modules:
        _provide_package()
    return importlib.import_module(f"{_PACKAGE}.test_{name}_common")


def _provide_package() -> None:
    package = _module(_PACKAGE)
    package.__path__ = [str(suite_folder())]
    for parent in ("exporters", "generation", "utils"):
        _module(f"{_PACKAGE}.{parent}").__path__ = []
    _module(f"{_PACKAGE}.exporters.test_export").ExportTesterMixin = type("ExportTesterMixin", (), {})
    _module(f"{_PACKAGE}.generation.test_utils").GenerationTesterMixin = type("GenerationTesterMixin", (), {})
    _module(f"{_PACKAGE}.utils.test_configuration_utils").config_common_kwargs = _CONFIG_COMMON_KWARGS
    _module("fetch_hub_objects_for_ci").url_to_local_path = lambda address: address


def _module(name: str) -> ModuleType:
    module = importlib.util.module_from_spec(importlib.machinery.ModuleSpec(name, loader=None))
    sys.modules[name] = module
    return module
