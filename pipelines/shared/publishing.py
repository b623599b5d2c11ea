# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Upload the folders that programs write to the Hugging Face Hub."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from gpstoken_hf.hub import export_remote_code
from gpstoken_hf.pushing import upload

from .outputs import MARKER


def add_push_options(parser: argparse.ArgumentParser) -> None:
    """Add `--push_to_hub` and `--remote_code`. Call `check_push_options` after parsing."""
    parser.add_argument("--push_to_hub", metavar="REPO", help="upload the written folder to this model repository")
    parser.add_argument("--remote_code", action="store_true", help=REMOTE_CODE_HELP)


REMOTE_CODE_HELP = "with --push_to_hub: upload the edition that carries its code and loads without gpstoken-hf"


def check_push_options(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Stop with an error for `--remote_code` without `--push_to_hub`."""
    if arguments.remote_code and not arguments.push_to_hub:
        parser.error("--remote_code must be given with --push_to_hub, got --remote_code alone")


def push_written(folder: Path, arguments: argparse.Namespace) -> None:
    """Upload the folder that a program has written, if its options say so, and print the address."""
    if arguments.push_to_hub:
        print(f"pushed {folder} to {push_folder(folder, arguments.push_to_hub, remote_code=arguments.remote_code)}")


def push_folder(
    folder: str | Path,
    repo_id: str,
    private: bool = False,
    remote_code: bool = False,
    repo_type: str = "model",
    ignore: Sequence[str] = (),
) -> str:
    """Upload a folder to a repository on the Hub. A card that is there is kept.

    Args:
        folder (`str` or `Path`): the folder to upload.
        repo_id (`str`): the repository, as `owner/name`, or `name` for the owner of the access token. It is created
            if it does not exist.
        private (`bool`, *optional*, defaults to `False`): whether a new repository is private. An existing one keeps
            its visibility.
        remote_code (`bool`, *optional*, defaults to `False`): upload the remote-code edition, which loads without
            this package.
        repo_type (`str`, *optional*, defaults to `"model"`): "model" or "dataset".
        ignore (`Sequence[str]`, *optional*): patterns of files to leave out beside the marker.

    Returns:
        `str`: the address of the repository.

    Raises:
        OSError: if the Hub cannot be reached or refuses the upload.
        ValueError: if `repo_id` is not a valid name, or a folder for `remote_code` holds nothing that has one.
    """
    with tempfile.TemporaryDirectory() as temporary:
        source = export_remote_code(folder, Path(temporary) / "edition") if remote_code else folder
        ignored = [MARKER, *ignore]
        return str(upload(source, repo_id, private=private, ignore=ignored, repo_type=repo_type).repo_url)
