# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Upload the folders that programs write to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi


def push_folder(folder: str | Path, repo_id: str, private: bool = False) -> str:
    """Upload a folder to a model repository on the Hub. The repository is created if it does not exist.

    Args:
        folder (`str` or `Path`): the folder to upload.
        repo_id (`str`): the repository, as `owner/name`, or `name` for the owner of the access token.
        private (`bool`, *optional*, defaults to `False`): whether a new repository is private. An existing one keeps
            its visibility.

    Returns:
        `str`: the address of the repository.

    Raises:
        OSError: if the Hub cannot be reached or refuses the upload.
        ValueError: if `repo_id` is not a valid name.
    """
    api = HfApi()
    try:
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo.repo_id, folder_path=folder, commit_message="Upload with gpstoken-hf")
    except (OSError, ValueError):
        raise
    except Exception as error:  # a failed connection: the HTTP library and its exceptions depend on the Hub's version
        raise OSError(f"{folder} could not be uploaded to {repo_id}: {error}") from error
    return str(repo)
