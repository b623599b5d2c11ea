# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Convert a released SiT generator to a SiTTransformer1DModel folder for `from_pretrained`, and back.

    python -m conversion.convert_sit --checkpoint generator.safetensors --num_attention_heads 16 --output sit-xl
    python -m conversion.convert_sit --checkpoint sit-xl --output generator.safetensors --reverse

The authors' file holds `ema_model.*`, the default, `online_model.*` (`--weights online`) and training state. Plain SiT
checkpoints of patch size 1, without a prefix and with or without a condition, convert as well.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from conversion.checkpoints import Checkpoint, open_checkpoint, save_tensors
from conversion.folders import build_empty, load_empty_sit, model_shapes
from conversion.key_tables import KeyRule, block_count, match_keys, plan_conversion, plan_reverse, sit_rules
from conversion.model_cards import sit_card
from conversion.verification import check_errors, compare_tensors, load_arrays, verify_sit
from gpstoken_hf.transformer_sit import SIT_PRESETS, SiTTransformer1DModel
from pipelines.shared.outputs import atomic_directory, atomic_file
from pipelines.shared.programs import positive_int, run_program
from pipelines.shared.publishing import add_push_options, check_push_options, push_written

WHAT = "a SiT generator of patch size 1"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
PREFIXES = {"ema": "ema_model.", "online": "online_model.", "plain": ""}
# The members of a torch checkpoint that may hold the weights, in order of preference.
MEMBERS = {None: ("ema", "model", "state_dict"), "ema": ("ema",), "online": ("model",), "plain": ("state_dict",)}
TRAINING_STATE = ("initted", "step")
TIME_CONVENTION = (
    "forward takes timestep = 1000 (1 - t) and returns x_0 - x_1, for the checkpoint's time t (0 noise, 1 data) "
    "and velocity x_1 - x_0"
)

# Channel statistics of the authors' m128 texture target, [g - g_init, f] with 16 texture channels f.
M128_TEXTURE_MEAN = [
    *(-0.0211, -0.0196, 0.0107, -0.0052, -0.0044),
    *(1.8017, 2.4036, 2.0145, 1.2402, -4.2579, -1.2646, -3.0395, 2.2928),
    *(3.2168, -0.1431, 0.1600, 1.3924, 3.2345, 1.6994, 0.8237, 0.3222),
]
M128_TEXTURE_STD = [
    *(0.0121, 0.0108, 0.2533, 0.0119, 0.0114),
    *(2.7334, 2.6400, 2.7963, 2.9325, 2.8337, 2.8269, 3.1082, 3.1412),
    *(2.8038, 2.6501, 2.6163, 2.4718, 2.6958, 2.8157, 2.4744, 2.8200),
]


def choose_weights(keys: Sequence[str], wanted: str | None) -> str:
    """Choose the weights of a file to convert.

    Args:
        keys (sequence of `str`): the names of its tensors.
        wanted (`str`, *optional*): "ema", "online", or "plain" for names without a prefix. `None` takes the first of
            them that the file holds.

    Returns:
        `str`: the chosen weights.

    Raises:
        ValueError: if the file does not hold the wanted weights.
    """
    present = [name for name, prefix in PREFIXES.items() if prefix and any(key.startswith(prefix) for key in keys)]
    present = present or ["plain"]
    choice = wanted or present[0]
    if choice not in present:
        raise ValueError(f"--weights must be one of {present}, which the checkpoint holds, got {choice}")
    return choice


def read_sizes(checkpoint: Checkpoint, prefix: str) -> dict[str, Any]:
    """Read the sizes of a generator from the shapes of its tensors.

    Args:
        checkpoint (`Checkpoint`): the released file.
        prefix (`str`): what the names of the chosen weights begin with.

    Returns:
        `dict[str, Any]`: arguments of `SiTTransformer1DModel`, and its `width`.

    Raises:
        ValueError: if it is not a SiT, or its patch size is not 1.
    """
    keys = set(checkpoint.keys())

    def shape(name: str, num_axes: int) -> tuple[int, ...]:
        if prefix + name not in keys:
            raise ValueError(f"{checkpoint.path} must be {WHAT}, got a file without {prefix}{name}")
        found = checkpoint.shape(prefix + name)
        if len(found) != num_axes or 0 in found:
            raise ValueError(f"{prefix}{name} must have {num_axes} axes of at least 1, got shape {found}")
        return found

    _, sample_size, width = shape("pos_embed", 3)
    _, in_channels, *patch = shape("x_embedder.proj.weight", 4)
    if patch != [1, 1]:
        raise ValueError(f"the patch size of {checkpoint.path} must be 1, got {patch[0]} x {patch[1]}")
    out_channels = shape("final_layer.linear.weight", 2)[0]
    if out_channels not in (in_channels, 2 * in_channels):
        raise ValueError(f"the last layer must have {in_channels} or {2 * in_channels} channels, got {out_channels}")
    has_condition = prefix + "cond_embedder.0.weight" in keys
    return {
        "sample_size": sample_size,
        "in_channels": in_channels,
        "num_classes": shape("y_embedder.embedding_table.weight", 2)[0] - 1,
        "num_layers": block_count(keys, prefix + "blocks."),
        "width": width,
        "condition_channels": shape("cond_embedder.0.weight", 2)[1] if has_condition else None,
        "learn_sigma": out_channels == 2 * in_channels,
        "mlp_ratio": shape("blocks.0.mlp.fc1.weight", 2)[0] / width,
    }


def attention_heads(num_layers: int, width: int, asked: int | None) -> int:
    """Return the number of heads that was asked for, or that of the SiT preset with this depth and width.

    Raises:
        ValueError: if there is no such preset and none was asked for, or the heads do not divide the width.
    """
    for preset in SIT_PRESETS.values():
        preset_width = preset["num_attention_heads"] * preset["attention_head_dim"]
        if asked is None and (preset["num_layers"], preset_width) == (num_layers, width):
            asked = preset["num_attention_heads"]
    if asked is None:
        raise ValueError("--num_attention_heads must be given for a model of this depth and width, got none")
    if width % asked:
        raise ValueError(f"--num_attention_heads must divide the width {width}, got {asked}")
    return asked


def build_config(checkpoint: Checkpoint, prefix: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `SiTTransformer1DModel`. Sizes come from the tensors, the rest from the options."""
    config = read_sizes(checkpoint, prefix)
    width = config.pop("width")
    heads = attention_heads(config["num_layers"], width, arguments.num_attention_heads)
    mean, std = arguments.latents_mean, arguments.latents_std
    is_m128_texture = config["condition_channels"] is not None and config["in_channels"] == len(M128_TEXTURE_MEAN)
    if mean is None and std is None and is_m128_texture:
        mean, std = M128_TEXTURE_MEAN, M128_TEXTURE_STD
    return {
        **config,
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "latents_mean": mean,
        "latents_std": std,
        "gaussian_target": arguments.gaussian_target,
    }


def select(keys: Sequence[str], rules: Sequence[KeyRule], weights: str) -> tuple[list[KeyRule], list[str]]:
    """Choose the rules that apply to a file.

    Args:
        keys (sequence of `str`): the names of the file's tensors.
        rules (sequence of `KeyRule`): the key table.
        weights (`str`): the weights to convert, see `choose_weights`.

    Returns:
        `tuple[list[KeyRule], list[str]]`: the rules, and a line for each part of the file that is dropped.

    Raises:
        ValueError: if keys are missing or unknown.
    """
    prefix = PREFIXES[weights]
    if weights == "plain":
        return match_keys(rules, keys, WHAT), []
    left_out = []
    for name, other in PREFIXES.items():
        count = sum(key.startswith(other) for key in keys)
        if other and name != weights and count:
            left_out.append(f"{other}* ({count} tensors: --weights {weights})")
    left_out += [f"{key} (training state)" for key in TRAINING_STATE if key in keys]
    prefixes = tuple(other for other in PREFIXES.values() if other)
    unknown = sorted(key for key in keys if not key.startswith(prefixes) and key not in TRAINING_STATE)
    # match_keys also refuses unknown keys that have no prefix.
    own = [key.removeprefix(prefix) for key in keys if key.startswith(prefix)] + unknown
    return match_keys(rules, own, WHAT), left_out


def convert(arguments: argparse.Namespace) -> None:
    with open_checkpoint(arguments.checkpoint, members=MEMBERS[arguments.weights]) as checkpoint:
        keys = checkpoint.keys()
        # A torch checkpoint keeps each kind of weights in a member of its own, whose names have no prefix.
        weights = "plain" if checkpoint.member else choose_weights(keys, arguments.weights)
        prefix = PREFIXES[weights]
        config = build_config(checkpoint, prefix, arguments)
        table = sit_rules(config["num_layers"], config["condition_channels"] is not None)
        # Before the model is built: the file must hold every tensor of as many blocks as it claims.
        rules, left_out = select(keys, table, weights)
        model = build_empty(lambda: SiTTransformer1DModel(**config), checkpoint.path, WHAT)
        tensors = plan_conversion(rules, checkpoint, model_shapes(model), prefix)
        with atomic_directory(arguments.output) as staging:
            save_tensors(staging / WEIGHTS_NAME, tensors)
            model.save_config(staging)
            write_time_convention(staging / "config.json")
            card = sit_card(dict(model.config), Path(arguments.checkpoint).name, weights)
            (staging / "README.md").write_text(card, encoding="utf-8")
            num_parameters = sum(torch.Size(tensor.shape).numel() for tensor in tensors)
            print(f"{len(tensors)} tensors from {len(rules)} ({weights} weights), {num_parameters:,} parameters")
            for line in left_out:
                print(f"dropped {line}")
            if model.config["latents_mean"] is None:
                print(
                    "no channel statistics in the config: the pipeline takes those of its tokenizer, "
                    "unless you give --latents_mean and --latents_std"
                )
            if arguments.verify is not None:
                verify(checkpoint, staging, table, prefix, arguments.verify)
    print(f"wrote {arguments.output}")
    push_written(arguments.output, arguments)


def write_time_convention(path: Path) -> None:
    """Note the convention of time and sign in the config. diffusers ignores keys that begin with an underscore."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["_time_convention"] = TIME_CONVENTION
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def verify(checkpoint: Checkpoint, folder: Path, table: Sequence[KeyRule], prefix: str, arrays: Path) -> None:
    """Compare the written tensors with the checkpoint's, and the outputs with recorded arrays.

    Args:
        checkpoint (`Checkpoint`): the released file.
        folder (`Path`): the written folder.
        table (sequence of `KeyRule`): the key table.
        prefix (`str`): what the names of the chosen weights begin with.
        arrays (`Path`): a safetensors file of recorded arrays; `Path()` compares tensors only.

    Raises:
        ValueError: if a tensor differs, or an error exceeds its tolerance.
    """
    with open_checkpoint(folder / WEIGHTS_NAME) as written:
        restored, _ = plan_reverse(table, written, prefix)
        print(f"verified: {compare_tensors(checkpoint, restored)} tensors equal the checkpoint's bit for bit")
    model = SiTTransformer1DModel.from_pretrained(folder, torch_dtype=torch.float32).eval()
    if arrays != Path():
        check_errors(verify_sit(model, load_arrays(arrays)))


def reverse(arguments: argparse.Namespace) -> None:
    """Write a converted folder as a file of the release's format."""
    folder = Path(arguments.checkpoint)
    config = load_empty_sit(folder).config
    prefix = PREFIXES[arguments.weights or "ema"]
    table = sit_rules(config["num_layers"], config["condition_channels"] is not None)
    with open_checkpoint(folder / WEIGHTS_NAME) as checkpoint:
        tensors, _ = plan_reverse(table, checkpoint, prefix)
        with atomic_file(arguments.output, overwrite=False) as staging:
            save_tensors(staging, tensors)
    print(f"wrote {arguments.output}: {len(tensors)} tensors {prefix}*, without those that conversion drops:")
    for name in [f"{other}*" for other in PREFIXES.values() if other not in ("", prefix)] + list(TRAINING_STATE):
        print(f"  {name}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="conversion.convert_sit", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        help="released .safetensors, .pt or .bin file (with --reverse: converted folder)",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write (with --reverse: file to write)")
    parser.add_argument(
        "--num_attention_heads", type=positive_int, help="required unless the model is a SiT-S, B, L or XL"
    )
    parser.add_argument(
        "--weights",
        choices=tuple(PREFIXES),
        help="weights of the file to convert (default: the first of these that it holds)",
    )
    parser.add_argument(
        "--latents_mean", type=float, nargs="+", metavar="M", help="mean of each channel of the target"
    )
    parser.add_argument("--latents_std", type=float, nargs="+", metavar="S", help="standard deviation of each channel")
    parser.add_argument(
        "--gaussian_target",
        choices=("offset", "absolute", "logit"),
        help="meaning of the first 5 channels (default: offset with a condition, else absolute)",
    )
    parser.add_argument(
        "--verify",
        nargs="?",
        type=Path,
        const=Path(),
        metavar="ARRAYS",
        help="compare the written tensors with the checkpoint's, and the outputs with a safetensors file of recorded "
        "arrays, if given (x, t, y, cond, velocity, ...)",
    )
    parser.add_argument("--reverse", action="store_true", help="convert a folder back to the release's format")
    add_push_options(parser)
    arguments = parser.parse_args(argv)
    check_push_options(parser, arguments)
    if (arguments.latents_mean is None) != (arguments.latents_std is None):
        parser.error("--latents_mean and --latents_std must be given together")
    if arguments.reverse:
        if arguments.push_to_hub or arguments.verify is not None:
            parser.error("--push_to_hub and --verify must not be given with --reverse")
        reverse(arguments)
    else:
        convert(arguments)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_program(main))
