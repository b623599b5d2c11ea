# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Tables that map the tensor names of the released checkpoints to ours.

Every tensor of the authors' files has one rule. Rules work in both directions, and a tensor without a rule is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from conversion.checkpoints import Checkpoint, PlannedTensor


@dataclass(frozen=True)
class KeyRule:
    """Maps one tensor of a released checkpoint.

    Attributes:
        source (`str`): its released name.
        targets (`tuple[str, ...]`): our names. With several, the first axis is split into as many equal parts, in this
            order. With none, the tensor is dropped on purpose.
        trailing_ones (`int`, *optional*, defaults to 0): number of axes of size 1 at its end that our tensor does not
            have: our linear layer is their 1 x 1 convolution.
        reason (`str`, *optional*, defaults to `""`): why it is dropped.
    """

    source: str
    targets: tuple[str, ...]
    trailing_ones: int = 0
    reason: str = ""


def _modules(pairs: Iterable[tuple[str, str]]) -> list[KeyRule]:
    """Return rules for the weights and biases of modules, from pairs of released name and our name."""
    return [
        KeyRule(f"{source}.{parameter}", (f"{target}.{parameter}",))
        for source, target in pairs
        for parameter in ("weight", "bias")
    ]


def _residual_block(source: str, target: str, shortcut: bool = False) -> list[tuple[str, str]]:
    pairs = [(f"{source}.{name}", f"{target}.{name}") for name in ("norm1", "conv1", "norm2", "conv2")]
    return pairs + ([(f"{source}.nin_shortcut", f"{target}.shortcut")] if shortcut else [])


def gpstoken_rules(num_hidden_layers: int, level_channels: list[int], layers_per_block: int) -> list[KeyRule]:
    """Return the table of a tokenizer.

    Args:
        num_hidden_layers (`int`): number of encoder blocks.
        level_channels (`list[int]`): decoder channels of each level, full resolution first.
        layers_per_block (`int`): `decoder_layers_per_block`; a level has one residual block more.
    """
    pairs = [
        ("preprocess_img.0", "encoder.conditioner.conv_in"),
        *_residual_block("preprocess_img.1", "encoder.conditioner.blocks.0"),
        *_residual_block("preprocess_img.2", "encoder.conditioner.blocks.1"),
        ("roialign_layer", "encoder.region_features.projection"),
        ("gps_embed_layer.0", "encoder.gaussian_embedding1"),
        ("gps_embed_layer.2", "encoder.gaussian_embedding2"),
        ("to_gps.0", "encoder.gaussian_head"),
        ("to_gps.1", "encoder.texture_head"),
        ("decoder.conv_in", "decoder.conv_in"),
        *_residual_block("decoder.mid.block_1", "decoder.mid_block1"),
        ("decoder.mid.attn_1.norm", "decoder.mid_attention.norm"),
        ("decoder.mid.attn_1.q", "decoder.mid_attention.q_proj"),
        ("decoder.mid.attn_1.k", "decoder.mid_attention.k_proj"),
        ("decoder.mid.attn_1.v", "decoder.mid_attention.v_proj"),
        ("decoder.mid.attn_1.proj_out", "decoder.mid_attention.out_proj"),
        *_residual_block("decoder.mid.block_2", "decoder.mid_block2"),
        ("decoder.norm_out", "decoder.norm_out"),
        ("decoder.conv_out", "decoder.conv_out"),
    ]
    rules = [KeyRule("gps_embed.weight", ("encoder.query",))]
    for index in range(num_hidden_layers):
        source, target = f"attnblocks.{index}", f"encoder.layers.{index}"
        pairs += [
            (f"{source}.roimlp", f"{target}.region_reader"),
            (f"{source}.ln1", f"{target}.norm1"),
            (f"{source}.attn1.out_proj", f"{target}.self_attn.out_proj"),
            (f"{source}.ln2", f"{target}.norm2"),
            (f"{source}.mlp.0", f"{target}.mlp.fc1"),
            (f"{source}.mlp.2", f"{target}.mlp.fc2"),
        ]
        rules += [
            KeyRule(f"{source}.attn1.in_proj_{parameter}", (f"{target}.self_attn.qkv_proj.{parameter}",))
            for parameter in ("weight", "bias")
        ]
    # Their decoder numbers the levels from full resolution, ours in the order of computation.
    deepest = len(level_channels) - 1
    incoming = [*level_channels[1:], level_channels[-1]]
    for level, (channels, channels_in) in enumerate(zip(level_channels, incoming)):
        source, target = f"decoder.up.{level}", f"decoder.levels.{deepest - level}"
        for block in range(layers_per_block + 1):
            shortcut = block == 0 and channels != channels_in
            pairs += _residual_block(f"{source}.block.{block}", f"{target}.blocks.{block}", shortcut)
        if level > 0:
            pairs.append((f"{source}.upsample.conv", f"{target}.upsample.conv"))
    rules += [
        KeyRule(
            f"preprocess_img.{block}.temb_proj.{parameter}", (), reason="time-embedding projection that is never used"
        )
        for block in (1, 2)
        for parameter in ("weight", "bias")
    ]
    return rules + _modules(pairs)


def sit_rules(num_layers: int, has_condition: bool) -> list[KeyRule]:
    """Return the table of a SiT generator of patch size 1.

    Args:
        num_layers (`int`): number of transformer blocks.
        has_condition (`bool`): whether it embeds a condition.

    Returns:
        `list[KeyRule]`: the rules. Their released names have no prefix `ema_model.` or `online_model.`.
    """
    pairs = [
        ("t_embedder.mlp.0", "time_embedder.linear_1"),
        ("t_embedder.mlp.2", "time_embedder.linear_2"),
        ("final_layer.adaLN_modulation.1", "modulation_out"),
        ("final_layer.linear", "proj_out"),
    ]
    if has_condition:
        pairs += [
            ("cond_embedder.0", "condition_embedder.linear_1"),
            ("cond_embedder.2", "condition_embedder.linear_2"),
        ]
    rules = [
        KeyRule("pos_embed", ("pos_embed",)),
        KeyRule("x_embedder.proj.weight", ("proj_in.weight",), trailing_ones=2),
        KeyRule("x_embedder.proj.bias", ("proj_in.bias",)),
        KeyRule("y_embedder.embedding_table.weight", ("class_embedder.weight",)),
    ]
    for index in range(num_layers):
        source, target = f"blocks.{index}", f"transformer_blocks.{index}"
        pairs += [
            (f"{source}.adaLN_modulation.1", f"{target}.modulation"),
            (f"{source}.attn.proj", f"{target}.attn.to_out.0"),
            (f"{source}.mlp.fc1", f"{target}.ff.net.0.proj"),
            (f"{source}.mlp.fc2", f"{target}.ff.net.2"),
        ]
        rules += [
            KeyRule(f"{source}.attn.qkv.{parameter}", tuple(f"{target}.attn.to_{part}.{parameter}" for part in "qkv"))
            for parameter in ("weight", "bias")
        ]
    return rules + _modules(pairs)


def match_keys(rules: Iterable[KeyRule], keys: Iterable[str], what: str) -> list[KeyRule]:
    """Return the rules that apply to a checkpoint: all but those of dropped keys that it does not have.

    Args:
        rules (iterable of `KeyRule`): the table.
        keys (iterable of `str`): the checkpoint's keys.
        what (`str`): what the checkpoint must be, for the message.

    Raises:
        ValueError: if a key has no rule, or a rule has no key. The message names the first four.
    """
    table = {rule.source: rule for rule in rules}
    present = set(keys)
    missing = sorted(source for source, rule in table.items() if source not in present and rule.targets)
    unknown = sorted(present - table.keys())
    problems = []
    for kind, names in (("missing", missing), ("unknown", unknown)):
        if names:
            listing = ", ".join(names[:4] + ["..."] * (len(names) > 4))
            problems.append(f"{len(names)} {kind} key{'s' * (len(names) > 1)} ({listing})")
    if problems:
        raise ValueError(f"the checkpoint must hold the keys of {what}, got {' and '.join(problems)}")
    return [rule for rule in table.values() if rule.source in present]


def plan_conversion(
    rules: Iterable[KeyRule], checkpoint: Checkpoint, expected: Mapping[str, tuple[int, ...]], prefix: str = ""
) -> list[PlannedTensor]:
    """Plan our tensors from a released checkpoint. Only shapes are read.

    Args:
        rules (iterable of `KeyRule`): the rules from `match_keys`.
        checkpoint (`Checkpoint`): the released file.
        expected (mapping of `str` to shape): names and shapes of our model's tensors.
        prefix (`str`, *optional*, defaults to `""`): what the released names begin with.

    Returns:
        `list[PlannedTensor]`: one for each expected tensor.

    Raises:
        ValueError: if a shape or a number type does not fit.
    """
    plan = []
    for rule in rules:
        key = prefix + rule.source
        shape = checkpoint.shape(key)
        if not checkpoint.dtype(key).is_floating_point:
            raise ValueError(f"{key} must hold floating-point weights, got {checkpoint.dtype(key)}")
        if rule.trailing_ones:
            if shape[-rule.trailing_ones :] != (1,) * rule.trailing_ones:
                raise ValueError(f"{key} must end in {rule.trailing_ones} axes of size 1, got shape {shape}")
            shape = shape[: -rule.trailing_ones]
        parts = len(rule.targets)
        if parts > 1 and (not shape or shape[0] % parts):
            raise ValueError(f"{key} must have a first axis that {parts} divides, got shape {shape}")
        for part, target in enumerate(rule.targets):
            part_shape = (shape[0] // parts, *shape[1:]) if parts > 1 else shape
            if expected[target] != part_shape:
                raise ValueError(f"{key} must have the shape of {target}, {expected[target]}, got {part_shape}")
            plan.append(PlannedTensor(target, part_shape, _Loader(checkpoint, key, part_shape, part)))
    assert sorted(tensor.name for tensor in plan) == sorted(expected), "the key table and the model differ"
    return plan


def plan_reverse(
    rules: Iterable[KeyRule], checkpoint: Checkpoint, prefix: str = ""
) -> tuple[list[PlannedTensor], list[str]]:
    """Plan the released format's tensors from a converted checkpoint.

    Args:
        rules (iterable of `KeyRule`): the whole table.
        checkpoint (`Checkpoint`): the converted weights.
        prefix (`str`, *optional*, defaults to `""`): what the released names begin with.

    Returns:
        `tuple[list[PlannedTensor], list[str]]`: the tensors, and the names that conversion drops.

    Raises:
        ValueError: if the checkpoint lacks a target of the table.
    """
    plan, dropped = [], []
    present = set(checkpoint.keys())
    for rule in rules:
        if not rule.targets:
            dropped.append(prefix + rule.source)
            continue
        missing = [target for target in rule.targets if target not in present]
        if missing:
            raise ValueError(f"{checkpoint.path} must hold the tensor {missing[0]}, got none of this name")
        rows, *rest = checkpoint.shape(rule.targets[0])
        shape = (rows * len(rule.targets), *rest, *[1] * rule.trailing_ones)
        plan.append(PlannedTensor(prefix + rule.source, shape, _Joiner(checkpoint, rule.targets, shape)))
    return plan, dropped


@dataclass(frozen=True)
class _Loader:
    """Loads one part of a released tensor in our shape."""

    checkpoint: Checkpoint
    key: str
    shape: tuple[int, ...]
    part: int

    def __call__(self) -> torch.Tensor:
        tensor = self.checkpoint.tensor(self.key)
        if tensor.numel() == torch.Size(self.shape).numel():
            return tensor.reshape(self.shape)
        rows = self.shape[0]
        return tensor[self.part * rows : (self.part + 1) * rows]


@dataclass(frozen=True)
class _Joiner:
    """Joins our tensors along the first axis in the released shape."""

    checkpoint: Checkpoint
    keys: tuple[str, ...]
    shape: tuple[int, ...]

    def __call__(self) -> torch.Tensor:
        tensors = [self.checkpoint.tensor(key) for key in self.keys]
        return (tensors[0] if len(tensors) == 1 else torch.cat(tensors)).reshape(self.shape)


def block_count(keys: Iterable[str], prefix: str) -> int:
    """Count the blocks named `prefix`0, `prefix`1, ...

    Raises:
        ValueError: if the numbers have gaps.
    """
    texts = {key[len(prefix) :].split(".", 1)[0] for key in keys if key.startswith(prefix)}
    numbers = {int(text) for text in texts if text.isdigit() and len(text) < 6}
    if numbers != set(range(len(texts))):
        raise ValueError(f"blocks {prefix}N must be numbered from 0 without gaps, got {sorted(texts)[:8]}")
    return len(numbers)
