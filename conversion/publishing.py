# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Upload a converted folder to the Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi


def push_folder(folder: Path, repo_id: str) -> str:
    """Upload `folder` to the model repository `repo_id`, which is made if need be; returns what was done, one line."""
    api = HfApi()
    repo = api.create_repo(repo_id, exist_ok=True)
    api.upload_folder(repo_id=repo.repo_id, folder_path=folder, commit_message="Upload converted checkpoint")
    return f"pushed {folder} to {repo}"
