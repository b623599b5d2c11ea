# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Fetches transformers' common test suites for the installed version: `python -m tests.fetch_transformers_suite`.

The suites are in transformers' source distribution on PyPI and nowhere in its wheel. pip downloads that archive (with
the index, mirror and proxy it is configured for, checking the hash); the three files are kept under `.cache/`, which
git ignores. Standard library only, so that it runs before anything else is set up except transformers itself.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

SUITE_FILES = ("test_configuration_common.py", "test_image_processing_common.py", "test_modeling_common.py")

_CACHE = Path(__file__).resolve().parent.parent / ".cache"


def suite_folder() -> Path:
    """Where the suites of the installed transformers are kept, whether or not they are there."""
    return _CACHE / f"transformers-{version('transformers')}-tests"


def suite_is_complete() -> bool:
    return all((suite_folder() / name).is_file() for name in SUITE_FILES)


def fetch_suite() -> Path:
    """Downloads and unpacks the suites unless they are there already; returns their folder.

    Raises:
        RuntimeError: pip cannot get the source distribution, or it does not hold the suites.
    """
    folder = suite_folder()
    if suite_is_complete():
        return folder
    wanted = version("transformers")
    _CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=_CACHE) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
        done = subprocess.run(
            [*command, "--dest", scratch, f"transformers=={wanted}"], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"pip cannot download transformers {wanted} as source: {done.stderr.strip()[-500:]}")
        archives = list(Path(scratch).glob("*.tar.gz"))
        if [archive.name for archive in archives] != [f"transformers-{wanted}.tar.gz"]:
            raise RuntimeError(f"expected transformers-{wanted}.tar.gz from pip, got {archives}")
        unpacked = Path(scratch) / "suite"
        unpacked.mkdir()
        with tarfile.open(archives[0]) as archive:
            for name in SUITE_FILES:
                try:
                    member = archive.extractfile(f"transformers-{wanted}/tests/{name}")
                except KeyError:
                    member = None
                if member is None:
                    raise RuntimeError(f"the source distribution of transformers {wanted} holds no tests/{name}")
                (unpacked / name).write_bytes(member.read())
        (unpacked / "__init__.py").touch()  # one of the suites looks for it beside itself
        shutil.rmtree(folder, ignore_errors=True)
        unpacked.rename(folder)
    return folder


def main(argv: Sequence[str] | None = None) -> int:
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args(argv)
    try:
        print(f"transformers' common test suites: {fetch_suite()}")
    except RuntimeError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
