# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.

# Markers that transformers' common test suites use (see tests/transformers_suite.py).
TRANSFORMERS_MARKERS = (
    "accelerate_tests",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "flash_attn_test",
    "torch_compile_test",
)


def pytest_configure(config):
    for marker in TRANSFORMERS_MARKERS:
        config.addinivalue_line("markers", f"{marker}: used by transformers' common test suites")
