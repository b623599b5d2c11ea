# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Pushing to the Hub with a model card, which never replaces one that is there."""

from __future__ import annotations

import functools
import inspect
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from safetensors import safe_open

from .model_cards import KINDS, CardDetails, loaded_from, model_card

CARD = "README.md"
# Arguments of `push_to_hub` that say how weights are saved.
SAVE_ARGUMENTS = ("max_shard_size", "safe_serialization", "variant")


def add_card(
    model: Any,
    folder: str | Path,
    repo_id: str | None = None,
    details: CardDetails | None = None,
    tags: Sequence[str] = (),
) -> None:
    """Write the card of a saved model into its folder, unless one is there.

    A model that was loaded from a folder with a card, and has the same weights still, keeps that card and the
    pictures in it.

    Args:
        model: the model, scheduler, processor or pipeline.
        folder (`str` or `Path`): the folder that it was saved to.
        repo_id, details, tags: as for [`model_card`].
    """
    card = Path(folder) / CARD
    if card.exists():
        return
    source = Path(loaded_from(model) or folder)
    if details is None and (source / CARD).is_file() and _same_weights(Path(folder), source):
        text = (source / CARD).read_text(encoding="utf-8")
        card.write_text(text, encoding="utf-8")
        for link in re.findall(r"\]\(([\w./-]+)\)", text):
            # What stays in the folder, that is.
            if (source / link).is_file() and (source / link).resolve().is_relative_to(source.resolve()):
                (card.parent / link).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / link, card.parent / link)
    elif any(cls.__name__ in KINDS for cls in type(model).__mro__):
        card.write_text(model_card(model, repo_id, details, tags), encoding="utf-8")


def _same_weights(folder: Path, other: Path) -> bool:
    files = sorted(path.relative_to(folder) for path in folder.rglob("*.safetensors"))
    if files != sorted(path.relative_to(other) for path in other.rglob("*.safetensors")):
        return False
    for file in files:
        with safe_open(folder / file, framework="pt") as ours, safe_open(other / file, framework="pt") as theirs:
            if set(ours.keys()) != set(theirs.keys()):
                return False
            for name in ours.keys():  # noqa: SIM118 - it is no mapping
                # Weights may be stored in fewer bits than they are loaded in, with the same values.
                if not torch.equal(ours.get_tensor(name).double(), theirs.get_tensor(name).double()):
                    return False
    return True


def upload(
    folder: str | Path,
    repo_id: str,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    subfolder: str | None = None,
    ignore: Sequence[str] = (),
    repo_type: str = "model",
) -> Any:
    """Upload a folder to a repository on the Hub, which keeps its card if it has one.

    Args:
        folder (`str` or `Path`): the folder.
        repo_id (`str`): the repository, as `owner/name`. It is created if it does not exist.
        private (`bool`, *optional*): whether a new repository is private.
        token (`str` or `bool`, *optional*): access token of the Hub.
        commit_message, commit_description (`str`, *optional*): of the commit.
        revision (`str`, *optional*): branch to upload to; it is created if it does not exist.
        create_pr (`bool`, *optional*, defaults to `False`): open a pull request instead of a commit.
        subfolder (`str`, *optional*): folder of the repository to upload to.
        ignore (`Sequence[str]`, *optional*): patterns of files to leave out.
        repo_type (`str`, *optional*, defaults to `"model"`): "model" or "dataset".

    Returns:
        `huggingface_hub.CommitInfo`: the commit.

    Raises:
        OSError: if the Hub cannot be reached or refuses the upload.
        ValueError: if `repo_id` is not a valid name.
    """
    api = HfApi(token=token)
    try:
        repo = api.create_repo(repo_id, private=private, exist_ok=True, repo_type=repo_type).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo, branch=revision, exist_ok=True, repo_type=repo_type)
        has_card = subfolder is None and api.file_exists(repo, CARD, revision=revision, repo_type=repo_type)
        return api.upload_folder(
            repo_id=repo,
            repo_type=repo_type,
            folder_path=folder,
            path_in_repo=subfolder,
            commit_message=commit_message or "Upload with gpstoken-hf",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
            ignore_patterns=[*ignore, *([CARD] if has_card else [])],
        )
    except (OSError, ValueError):
        raise
    except Exception as error:  # a failed connection: the HTTP library and its exceptions depend on the Hub's version
        raise OSError(f"{folder} could not be uploaded to {repo_id}: {error}") from error


class PushWithCardMixin:
    """A `push_to_hub` that writes a real model card and never replaces one."""

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
        *,
        commit_description: str | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
        tags: Sequence[str] | None = None,
        details: CardDetails | None = None,
        **save_arguments: Any,
    ) -> Any:
        """Upload to the Hub, with a model card unless the repository has one.

        Args:
            repo_id (`str`): the repository, as `owner/name`. It is created if it does not exist.
            commit_message, commit_description (`str`, *optional*): of the commit.
            private (`bool`, *optional*): whether a new repository is private.
            token (`str` or `bool`, *optional*): access token of the Hub.
            create_pr (`bool`, *optional*, defaults to `False`): open a pull request instead of a commit.
            revision (`str`, *optional*): branch to upload to.
            subfolder (`str`, *optional*): folder of the repository to upload to, without a card.
            tags (`Sequence[str]`, *optional*): more tags of a new card.
            details ([`~model_cards.CardDetails`], *optional*): training, scores, licence and limits for a new card.
            save_arguments: `max_shard_size` or `variant` of `save_pretrained`. `safe_serialization` may be given, but
                weights are always written to safetensors files.

        Returns:
            `huggingface_hub.CommitInfo`: the commit.
        """
        unknown = sorted(set(save_arguments) - set(SAVE_ARGUMENTS))
        if unknown:
            raise TypeError(f"push_to_hub() takes no argument {unknown[0]!r}")
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **save_arguments)  # type: ignore[attr-defined]
            if subfolder is None:
                add_card(self, folder, repo_id, details, tags or ())
            message = commit_message or f"Upload {type(self).__name__}"
            return upload(folder, repo_id, private, token, message, commit_description, revision, create_pr, subfolder)


def save_with_card(library_save: Callable[..., Any]) -> Callable[..., Any]:
    """A `save_pretrained` that does as the library's, but pushes as [`PushWithCardMixin`] does and writes no pickles.

    Args:
        library_save (`Callable`): `save_pretrained` of the base class. Its signature, which diffusers reads, is kept.
    """
    signature = inspect.signature(library_save)

    @functools.wraps(library_save)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, save_directory, *args, **kwargs)
        # Pickles are never loaded, so none is written. transformers writes none either.
        bound.arguments.pop("safe_serialization", None)
        if not bound.arguments.pop("push_to_hub", False):
            return library_save(*bound.args, **bound.kwargs)
        given = bound.arguments.setdefault("kwargs", {})
        names = set(inspect.signature(upload).parameters) - {"folder", "ignore", "repo_type"}
        push = {name: given.pop(name) for name in names & set(given)}
        if "token" in bound.arguments:
            push["token"] = bound.arguments["token"]
        push.setdefault("repo_id", Path(save_directory).name)
        result = library_save(*bound.args, **bound.kwargs)
        add_card(self, save_directory, push["repo_id"])
        upload(save_directory, **push)
        return result

    return save_pretrained
