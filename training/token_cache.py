# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""The format of a token cache: where `cache_tokens` writes, and what those who train generators read.

Shapes: B images, L tokens, C texture channels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpstoken_hf.file_checks import read_json
from gpstoken_hf.gaussians import NUM_GAUSSIAN_PARAMS, gaussians_to_logits
from pipelines.shared.programs import ProgramError, one_line

STATISTICS = "statistics.json"


class ChannelSums:
    """Running sums, in float64, of the channels of everything that a generator can model.

    "offset" is refined minus initial Gaussian, and texture (the paper's texture target). "absolute" and "logit" are
    the refined Gaussian or its logits, and texture. "layout" and "layout_logit" are the initial Gaussian.
    """

    def __init__(self) -> None:
        self.count = 0
        self.sums: dict[str, list[np.ndarray]] = {}

    def add(self, tokens: torch.Tensor, init_gaussians: torch.Tensor) -> None:
        """Add `tokens` (B, L, 5 + C) and `init_gaussians` (B, L, 5)."""
        tokens, layout = tokens.double(), init_gaussians.double()
        gaussians, texture = tokens[..., :NUM_GAUSSIAN_PARAMS], tokens[..., NUM_GAUSSIAN_PARAMS:]
        targets = {
            "offset": torch.cat([gaussians - layout, texture], dim=-1),
            "absolute": tokens,
            "logit": torch.cat([gaussians_to_logits(gaussians), texture], dim=-1),
            "layout": layout,
            "layout_logit": gaussians_to_logits(layout),
        }
        sums = {}
        for name, target in targets.items():
            flat = target.flatten(0, 1)
            sums[name] = [flat.sum(0).numpy(), flat.square().sum(0).numpy()]
        self._add(tokens.shape[0] * tokens.shape[1], sums)

    def merge(self, state: dict[str, Any]) -> None:
        """Add the sums of another `state_dict`."""
        self._add(state["count"], {name: [np.asarray(s) for s in pair] for name, pair in state["sums"].items()})

    def _add(self, count: int, sums: dict[str, list[np.ndarray]]) -> None:
        self.count += count
        for name, pair in sums.items():
            previous = self.sums.get(name)
            self.sums[name] = pair if previous is None else [a + b for a, b in zip(previous, pair)]

    def state_dict(self) -> dict[str, Any]:
        """The sums as JSON can hold them."""
        return {"count": self.count, "sums": {name: [s.tolist() for s in pair] for name, pair in self.sums.items()}}

    def statistics(self) -> dict[str, dict[str, list[float]]]:
        """Mean and standard deviation of the channels of every target. A constant channel has standard deviation 1."""
        result = {}
        for name, (first, second) in self.sums.items():
            mean = first / self.count
            std = np.sqrt(np.maximum(second / self.count - mean**2, 0))
            result[name] = {"mean": mean.tolist(), "std": np.where(std < 1e-6, 1.0, std).tolist()}
        return result


def read_statistics(tokens_dir: str) -> tuple[dict[str, Any], Path]:
    """The description of a token cache, and its local folder.

    Args:
        tokens_dir (`str`): A folder, or a dataset of the Hub, which is then downloaded.

    Raises:
        ProgramError: If there is no finished token cache.
        ValueError: If its description is damaged.
    """
    directory = Path(tokens_dir)
    if not directory.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            directory = Path(snapshot_download(tokens_dir, repo_type="dataset"))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
            raise ProgramError(
                f"--tokens_dir must be a folder or a dataset of the Hub, got {tokens_dir}: {error}"
            ) from error
    path = directory / STATISTICS
    if not path.is_file():
        raise ProgramError(
            f"{directory} must hold a finished token cache, got none with {STATISTICS}: run cache_tokens"
        )
    return read_json(path), directory


def load_token_dataset(directory: Path) -> Any:
    """The rows of a token cache as NumPy arrays, memory-mapped.

    Raises:
        ProgramError: If the shards cannot be read.
    """
    import datasets
    import pyarrow.parquet

    files = sorted(map(str, (directory / "data").glob("train-*.parquet")))
    try:
        for file in files:  # datasets 4.0 leaves out a shard of zeros without a word
            pyarrow.parquet.read_metadata(file)
        return datasets.load_dataset("parquet", data_files=files, split="train").with_format("numpy")
    except Exception as error:  # datasets has many exception types for bad input
        cause = one_line(error.__cause__ or error)
        raise ProgramError(f"cannot read the token cache {directory}: {cause}") from error


def class_names(dataset: Any, label_column: str) -> list[str] | None:
    """Names of the classes of a dataset of images, if it has them."""
    import datasets

    feature = (dataset.features or {}).get(label_column)
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None
