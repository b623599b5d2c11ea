# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""The statistics of network features of many sets of images at once, saved so that a killed run resumes.

Shapes: B images of H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from gpstoken_hf.feature_networks import INCEPTION, FeatureNetwork
from gpstoken_hf.metrics import FeatureStatistics, frechet_distance

from .checkpoints import weights_fingerprint
from .outputs import atomic_file

KINDS = ("pool", "spatial")


class SetStatistics:
    """Statistics of the features of several sets of images.

    Args:
        network (`FeatureNetwork`): Makes the features.
        names (`Sequence[str]`): Of the sets.
    """

    def __init__(self, network: FeatureNetwork, names: Sequence[str]):
        self.network, self.names = network, list(names)
        self.kinds = [kind for kind in KINDS if kind in network.layers]
        self.sets = {name: {kind: FeatureStatistics() for kind in self.kinds} for name in names}

    def update(self, name: str, images: torch.Tensor) -> None:
        """Add images `(B, 3, H, W)` uint8 to a set."""
        features = self.network(images)
        for kind in self.kinds:
            self.sets[name][kind].update(features[kind])

    def distances(self, name: str, reference: str) -> dict[str, float]:
        """The Fréchet distances of two sets, by the kind of features."""
        return {kind: frechet_distance(self.sets[name][kind], self.sets[reference][kind]) for kind in self.kinds}

    def save(self, path: Path, num_images: int) -> None:
        """Write the statistics of the first `num_images` images."""
        tensors = {
            f"{index}.{kind}.{field}": value
            for index, name in enumerate(self.names)
            for kind in self.kinds
            if self.sets[name][kind].count
            for field, value in self.sets[name][kind].state_dict().items()
        }
        with atomic_file(path) as staging:
            save_file(tensors, staging, {"images": str(num_images)})

    def load(self, path: Path) -> int:
        """Read what `save` has written; returns the number of images, 0 if there is no whole file."""
        try:
            with safe_open(path, "pt") as file:
                num_images = int((file.metadata() or {})["images"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
            for index, name in enumerate(self.names):
                for kind in self.kinds:
                    prefix = f"{index}.{kind}."
                    if f"{prefix}count" in tensors:
                        state = {field: tensors[prefix + field] for field in ("count", "mean", "scatter")}
                        self.sets[name][kind].load_state_dict(state)
        except (OSError, SafetensorError, KeyError, ValueError):
            self.sets = {name: {kind: FeatureStatistics() for kind in self.kinds} for name in self.names}
            return 0
        return num_images


def describe_network(network: FeatureNetwork) -> dict[str, Any]:
    """What a protocol says about a feature network."""
    return {"network": network.name, "layers": dict(network.layers), "weights": weights_fingerprint(network)}


def distance_names(network_name: str, is_reconstruction: bool) -> dict[str, tuple[str, str]]:
    """For each kind of features the key of its distance in results, and its title in tables.

    Only distances of Inception's features are called FID.
    """
    prefix = "r" if is_reconstruction else ""
    if network_name == INCEPTION:
        return {"pool": (f"{prefix}fid", f"{prefix}FID"), "spatial": (f"{prefix}sfid", f"{prefix}sFID")}
    return {"pool": ("frechet_distance", f"Fréchet distance ({network_name})")}
