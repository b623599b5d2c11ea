# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""The golden generator: its checkpoint loaded through the key table, and its arrays in our layout `(B, L, C)`."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from conversion.key_tables import block_count, match_keys, sit_rules
from gpstoken_hf.transformer_sit import SiTTransformer1DModel

TESTS = Path(__file__).parent
SETS = {
    "portable": (TESTS / "golden", "sit"),
    "shared": (TESTS.parents[1] / "shared" / "golden", "sit_tiny"),
}


def available_sets() -> list[str]:
    return [name for name, (folder, prefix) in SETS.items() if (folder / f"{prefix}_io.safetensors").is_file()]


def rename(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The EMA weights of a checkpoint of the authors, or shapes as meta tensors, under our names."""
    rules = sit_rules(block_count(state_dict, "blocks."), has_condition="cond_embedder.0.weight" in state_dict)
    renamed: dict[str, torch.Tensor] = {}
    for rule in match_keys(rules, state_dict, "the golden generator"):
        value = state_dict[rule.source]
        value = value.reshape(value.shape[: value.ndim - rule.trailing_ones])
        renamed.update(zip(rule.targets, value.chunk(len(rule.targets))))
    return renamed


def load_config(name: str) -> dict:
    folder, prefix = SETS[name]
    return json.loads((folder / f"{prefix}_config.json").read_text())


def load_model(name: str) -> SiTTransformer1DModel:
    folder, prefix = SETS[name]
    config = load_config(name)
    model = SiTTransformer1DModel(
        sample_size=config["latent_size"],
        in_channels=config["in_channels"],
        num_classes=config["num_classes"],
        num_layers=config["depth"],
        num_attention_heads=config["num_heads"],
        attention_head_dim=config["hidden_size"] // config["num_heads"],
        condition_channels=config["cond_channels"],
        learn_sigma=config["learn_sigma"],
    )
    checkpoint = load_file(folder / f"{prefix}_official.safetensors")
    ema = {key.removeprefix("ema_model."): value for key, value in checkpoint.items() if key.startswith("ema_model.")}
    model.load_state_dict(rename({key: value.float() for key, value in ema.items()}))
    return model.eval()


def load_arrays(name: str) -> dict[str, torch.Tensor]:
    folder, prefix = SETS[name]
    arrays = load_file(folder / f"{prefix}_io.safetensors")
    return {key: value.squeeze(-1).transpose(-1, -2) if value.ndim >= 4 else value for key, value in arrays.items()}
