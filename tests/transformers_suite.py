# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Loads the common test suites that `fetch_transformers_suite` has put under `.cache/`.

The suites import a few helpers that the source distribution leaves out. What stands in for them here:

| module the suites import | stand-in | what is therefore not tested |
|---|---|---|
| `exporters.test_export` | empty `ExportTesterMixin` | export to ONNX, ExecuTorch and others |
| `generation.test_utils` | empty `GenerationTesterMixin` | text generation; the model generates none |
| `utils.test_configuration_utils` | the fields of `PreTrainedConfig`, values of ours | nothing |
| `fetch_hub_objects_for_ci` | addresses as they are | nothing; no test here loads from one |

`NOT_APPLICABLE` lists the tests that do not apply to GPSToken, with the reasons. It describes the versions of
transformers that it was written for. When another version adds a test that skips itself, or drops a listed one,
pytest's summary says so. With GPSTOKEN_STRICT_TRANSFORMERS_SUITE=1 that is a failure: `make test-newest` tells what to
update. Tests that a decorator skips (no accelerator, no Flash Attention, slow) need no entry: they run where these are
available.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import warnings
from fnmatch import fnmatch
from importlib.metadata import version
from types import ModuleType
from typing import NoReturn

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

# Test names (shell patterns) -> why they do not apply.
NOT_APPLICABLE = {
    "image_processing": {
        "test_backends_equivalence*": "there is one backend, torchvision",
        "test_save_load_backends*": "there is one backend, torchvision",
        "test_image_processor_preprocess_arguments": "looks for two validations older than transformers 5",
        "test_override_instance_attributes_*": "wants image_mean as a list; transformers 5 itself makes it a tuple",
    },
    "modeling": {
        "test_model_get_set_embeddings": "no vocabulary: there is no nn.Embedding to exchange",
        "test_bc_cache_name_forward": "no key-value cache",
        "test_inputs_embeds*": "no vocabulary",
        "test_resize_*": "no vocabulary and no position embeddings",
        "test_enable_input_require_grads_with_gradient_checkpointing": "no input embedding to watch",
        "test_causal_lm_loss_*": "not a language model",
        "test_encoder_decoder_loss_*": "not a language model",
        "test_model_rope_*": "no rotary embeddings",
        "test_vision_axial_rope": "no rotary embeddings",
        "test_sliding_window_mask": "every token attends to every token",
        "test_eager_matches_batched_and_grouped_inference*": "no mixture of experts",
        "test_moe_models_record_router_logits": "no mixture of experts",
        "test_output_router_logits_from_config": "no mixture of experts",
        "test_attn_implementation_composite_models": "not a composite of several models",
        "test_can_set_attention_dynamically_composite_model": "not a composite of several models",
        "test_sdpa_can_dispatch_composite_models": "not a composite of several models",
        "test_internal_model_config_and_subconfig_are_same": "not a composite of several models",
        "test_can_load_from_already_mapped_keys": "weights are saved under the names of the modules",
        "test_reverse_loading_mapping": "weights are saved under the names of the modules",
        "test_tp_plan_matches_params": "no plan for tensor parallelism",
        "test_keep_in_fp32_modules*": "float32 parts convert their weights as they run",
    },
}

REQUIRED = os.environ.get("GPSTOKEN_REQUIRE_TRANSFORMERS_SUITE") == "1"
STRICT = os.environ.get("GPSTOKEN_STRICT_TRANSFORMERS_SUITE") == "1"


def load_suite(name: str, *classes: str) -> ModuleType:
    """The suite `test_<name>_common` of the installed transformers, with the `classes` that our tests build on.

    The calling test module is skipped if the suites have not been fetched, which is an error with
    GPSTOKEN_REQUIRE_TRANSFORMERS_SUITE=1. It is also skipped if this version's suite needs more than the stand-ins
    offer or lacks a class, which is a failure in strict mode.
    """
    if not suite_is_complete():
        reason = f"not fetched: {suite_folder().name}; run `python -m tests.fetch_transformers_suite`"
        if REQUIRED or STRICT:
            raise FileNotFoundError(reason)
        pytest.skip(reason, allow_module_level=True)
    if _PACKAGE not in sys.modules:
        _provide_package()
    try:
        suite = importlib.import_module(f"{_PACKAGE}.test_{name}_common")
    except ImportError as error:
        report_change(f"test_{name}_common.py cannot be imported: {error}")
    for missing in (class_name for class_name in classes if not hasattr(suite, class_name)):
        report_change(f"test_{name}_common.py has no {missing}")
    return suite


def report_change(change: str) -> NoReturn:
    """Skip the calling test or test module because transformers has changed; fail it in strict mode."""
    message = f"transformers {version('transformers')}: {change}"
    if STRICT:
        pytest.fail(message, pytrace=False)
    pytest.skip(message, allow_module_level=True)


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


class ListedSkips:
    """Beside a suite's mixin: holds the tests that skip themselves against `NOT_APPLICABLE[suite]`."""

    suite = ""

    def skipTest(self, reason):  # noqa: N802
        name = self._testMethodName
        if not any(fnmatch(name, pattern) for pattern in NOT_APPLICABLE[self.suite]):
            message = f"{name} skips itself ({reason}) but is not listed in NOT_APPLICABLE"
            if STRICT:
                self.fail(message)
            # A warning besides the skip: pytest lists no skips of subtests. It is attributed to the suite, not to us.
            warnings.warn(message, stacklevel=2)
        super().skipTest(reason)

    def test_every_entry_of_the_table_is_needed(self):
        names = [name for name in dir(self) if name.startswith("test_")]
        unused = [
            pattern for pattern in NOT_APPLICABLE[self.suite] if not any(fnmatch(name, pattern) for name in names)
        ]
        if unused:
            report_change(f"no test matches these entries of NOT_APPLICABLE: {', '.join(unused)}")
