# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""A release of transformers or of another dependency must not fail our tests; in strict mode changes are failures.

Each case is a small project with this repository's pytest configuration, run by pytest in a process of its own.
"""

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from fetch_transformers_suite import SUITE_FILES

TESTS = Path(__file__).parent

# transformers' suite, as the table below knows it.
KNOWN_SUITE = """
import warnings
import pytest

class ModelTesterMixin:
    def test_passes(self):
        pass

    def test_listed(self):
        self.skipTest("no vocabulary")
"""

OUR_TEST = """
import unittest
from transformers_suite import NOT_APPLICABLE, ListedSkips, load_suite

NOT_APPLICABLE["modeling"] = {"test_listed": "no vocabulary"}
common = load_suite("modeling", "ModelTesterMixin")

class ModelTest(ListedSkips, common.ModelTesterMixin, unittest.TestCase):
    suite = "modeling"
"""

NEW_SKIP = """
    def test_new(self):
        with self.subTest("a model"):
            self.skipTest("needs a cache")
"""

NEW_MARKER = """
    @pytest.mark.flash_attn_99
    def test_new(self):
        warnings.warn("something of the suite", stacklevel=1)
"""


class Project:
    """A folder with this repository's pytest configuration, and files of its own."""

    def __init__(self, root):
        self.root = root
        self.write("tests/test_nothing.py", "def test_nothing():\n    pass\n")  # a run without tests is a failure
        shutil.copy(TESTS.parent / "pyproject.toml", root)
        for name in ("conftest.py", "transformers_suite.py", "fetch_transformers_suite.py"):
            shutil.copy(TESTS / name, root / "tests")

    def write(self, path, text):
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def write_suite(self, text):
        for name in SUITE_FILES:
            self.write(f".cache/transformers-{version('transformers')}-tests/{name}", text)

    def run(self, *options, strict=False):
        """Exit code and output of pytest."""
        environment = {
            **os.environ,
            "GPSTOKEN_STRICT_TRANSFORMERS_SUITE": str(int(strict)),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # starts in half the time
        }
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options]
        done = subprocess.run(command, cwd=self.root, env=environment, capture_output=True, text=True, timeout=120)
        return done.returncode, done.stdout + done.stderr


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


@pytest.mark.parametrize("strict", [False, True])
def test_the_known_suite_passes(project, strict):
    project.write_suite(KNOWN_SUITE)
    project.write("tests/test_model.py", OUR_TEST)
    code, output = project.run(strict=strict)
    assert code == 0, output
    assert "3 passed, 1 skipped" in output


@pytest.mark.parametrize(
    ("suite", "report"),
    [
        (KNOWN_SUITE + NEW_SKIP, "test_new skips itself (needs a cache) but is not listed"),
        (KNOWN_SUITE.replace("test_listed", "test_renamed"), "test_renamed skips itself (no vocabulary)"),
        (KNOWN_SUITE.replace("self.skipTest", "print").replace("_listed", "_other"), "NOT_APPLICABLE: test_listed"),
        ("from .new_helpers import helper\n" + KNOWN_SUITE, "test_modeling_common.py cannot be imported"),
        (KNOWN_SUITE.replace("ModelTesterMixin", "ModelTests"), "test_modeling_common.py has no ModelTesterMixin"),
    ],
    ids=["new self-skip", "renamed", "removed", "new helper", "no base class"],
)
def test_a_changed_suite_is_reported_and_fails_in_strict_mode_only(project, suite, report):
    project.write_suite(suite)
    project.write("tests/test_model.py", OUR_TEST)
    code, output = project.run()
    assert code == 0, output
    assert report in output
    code, output = project.run(strict=True)
    assert code != 0
    assert report in output


@pytest.mark.parametrize("strict", [False, True])
def test_a_failure_of_a_new_test_is_a_failure(project, strict):
    project.write_suite(KNOWN_SUITE + "\n    def test_new(self):\n        assert False\n")
    project.write("tests/test_model.py", OUR_TEST)
    code, output = project.run(strict=strict)
    assert code == 1, output
    assert "1 failed" in output


def test_markers_and_warnings_of_a_suite_are_no_errors(project):
    project.write_suite(KNOWN_SUITE + NEW_MARKER)
    project.write("tests/test_model.py", OUR_TEST)
    code, output = project.run()
    assert code == 0, output
    assert "4 passed, 1 skipped" in output


DEPENDENCY = """
import warnings

def call(category, stacklevel):
    warnings.warn("from a dependency", category, stacklevel=stacklevel)
"""

# With stacklevel 1 the dependency warns about itself, with 2 about its caller.
CALLS = """
import pytest
import dependency

@pytest.mark.parametrize("stacklevel", [1, 2])
@pytest.mark.parametrize("category", [UserWarning, RuntimeWarning, DeprecationWarning, FutureWarning])
def test_it(category, stacklevel):
    dependency.call(category, stacklevel)
"""


def test_warnings_are_errors_where_they_are_ours_and_no_deprecations(project):
    project.write("dependency.py", DEPENDENCY)
    for path in ("tests/test_call.py", "tests/helpers.py", "pipelines/shared/programs.py"):
        project.write(path, CALLS)
    project.write("tests/test_helpers.py", "from helpers import test_it\n")
    project.write("tests/test_programs.py", "from pipelines.shared.programs import test_it\n")
    code, output = project.run()
    assert code == 1, output
    assert set(re.findall(r"^FAILED tests/(\S+)", output, re.MULTILINE)) == {
        f"{file}.py::test_it[{category}-2]"
        for file in ("test_call", "test_helpers", "test_programs")
        for category in ("UserWarning", "RuntimeWarning")
    }


def test_an_unknown_marker_of_ours_and_an_error_in_a_finaliser_are_errors(project):
    broken = "class Broken:\n    def __del__(self):\n        raise ValueError('never seen')\n\n"
    project.write("tests/test_broken.py", f"{broken}def test_it():\n    Broken()\n")
    project.write("tests/test_marked.py", "import pytest\n\n@pytest.mark.slwo\ndef test_it():\n    pass\n")
    code, output = project.run("--continue-on-collection-errors")
    assert code == 1, output
    assert "PytestUnknownMarkWarning: Unknown pytest.mark.slwo" in output
    assert "FAILED tests/test_broken.py" in output
