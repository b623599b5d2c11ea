# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.

from pathlib import Path

# Top-level names of this repository's modules. `tests` is on the path itself, so its modules have no prefix.
OUR_MODULES = (
    *("gpstoken_hf", "pipelines", "conversion", "training", "tests"),
    *(path.stem for path in Path(__file__).parent.glob("*.py")),
)


def pytest_configure(config):
    # A warning counts as ours if it is attributed to a module of ours: what dependencies warn about in their own
    # modules must not fail our tests. Nor must a function that we call and that a later release deprecates: pytest
    # lists those at the end. Later filters win.
    config.addinivalue_line("filterwarnings", rf"error:::({'|'.join(OUR_MODULES)})(\.|$)")
    for deprecation in ("DeprecationWarning", "PendingDeprecationWarning", "FutureWarning"):
        config.addinivalue_line("filterwarnings", f"default::{deprecation}")
