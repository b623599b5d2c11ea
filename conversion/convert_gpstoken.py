# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Convert a released GPSToken tokenizer to a GPSTokenModel folder for `from_pretrained`, and back.

    python -m conversion.convert_gpstoken --checkpoint gpstoken_m128.safetensors --preset m128 --output gpstoken-m128
    python -m conversion.convert_gpstoken --checkpoint gpstoken-m128 --output m128.safetensors --reverse

Sizes are read from the tensors. Settings that the tensors do not show come from the preset or from options.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers.utils import logging

from conversion.checkpoints import Checkpoint, PlannedTensor, floating_dtype, open_checkpoint, save_tensors
from conversion.folders import build_empty, load_empty_gpstoken, model_shapes
from conversion.key_tables import KeyRule, block_count, gpstoken_rules, match_keys, plan_conversion, plan_reverse
from conversion.model_cards import gpstoken_card
from conversion.verification import check_errors, compare_tensors, load_arrays, verify_gpstoken
from gpstoken_hf.configuration_gpstoken import GPSTokenConfig
from gpstoken_hf.image_processing_gpstoken import GPSTokenImageProcessor
from gpstoken_hf.modeling_gpstoken import GPSTokenModel
from pipelines.shared.outputs import atomic_directory, atomic_file
from pipelines.shared.programs import positive_float, positive_int, run_program
from pipelines.shared.publishing import add_push_options, check_push_options, push_written

RELEASED_PRESETS = ("s64", "m128", "l256")
DEFAULT_NUM_ATTENTION_HEADS = 8
WHAT = "a GPSToken tokenizer of the release"
WEIGHTS_NAME = "model.safetensors"


def read_sizes(checkpoint: Checkpoint) -> dict[str, object]:
    """Read widths, depths and multipliers from the shapes of a released checkpoint.

    Args:
        checkpoint (`Checkpoint`): the released file.

    Returns:
        `dict[str, object]`: fields of `GPSTokenConfig`.

    Raises:
        ValueError: if it is not a GPSToken tokenizer, or its tensors contradict each other.
    """
    keys = checkpoint.keys()
    for landmark in ("gps_embed.weight", "to_gps.1.weight", "preprocess_img.0.weight", "decoder.conv_in.weight"):
        if landmark not in keys:
            raise ValueError(f"{checkpoint.path} must be {WHAT}, got a file without {landmark}")

    def shape(key: str, num_axes: int) -> tuple[int, ...]:
        if key not in keys:
            raise ValueError(f"{checkpoint.path} must hold the keys of {WHAT}, got 1 missing key ({key})")
        found = checkpoint.shape(key)
        if len(found) != num_axes or 0 in found:
            raise ValueError(f"{key} must have {num_axes} axes of at least 1, got shape {found}")
        return found

    hidden_size = shape("gps_embed.weight", 2)[1]
    roi_size = math.isqrt(shape("attnblocks.0.roimlp.weight", 2)[1])
    num_levels = block_count(keys, "decoder.up.")
    channels = [shape(f"decoder.up.{level}.block.0.conv1.weight", 4)[0] for level in range(num_levels)]
    if num_levels == 0 or any(width % channels[0] for width in channels):
        raise ValueError(f"the channels of decoder levels must be multiples of the first level's, got {channels}")
    num_blocks = {block_count(keys, f"decoder.up.{level}.block.") for level in range(num_levels)}
    if len(num_blocks) != 1 or min(num_blocks) < 2:
        raise ValueError(
            f"all decoder levels must have the same number of residual blocks, at least 2, got {sorted(num_blocks)}"
        )
    return {
        "texture_channels": shape("to_gps.1.weight", 2)[0],
        "hidden_size": hidden_size,
        "num_hidden_layers": block_count(keys, "attnblocks."),
        "mlp_ratio": shape("attnblocks.0.mlp.0.weight", 2)[0] / hidden_size,
        "roi_size": roi_size,
        "conditioner_channels": shape("preprocess_img.0.weight", 4)[0],
        "decoder_base_channels": channels[0],
        "decoder_channel_multipliers": [width // channels[0] for width in channels],
        "decoder_layers_per_block": num_blocks.pop() - 1,
    }


def rules_for(config: GPSTokenConfig) -> list[KeyRule]:
    """Return the key table of a tokenizer of this configuration."""
    channels = [config.decoder_base_channels * multiplier for multiplier in config.decoder_channel_multipliers]
    return gpstoken_rules(config.num_hidden_layers, channels, config.decoder_layers_per_block)


def build_config(checkpoint: Checkpoint, arguments: argparse.Namespace) -> GPSTokenConfig:
    """Build the config. Sizes come from the tensors, the rest from the options, then from the preset.

    Raises:
        ValueError: if the preset or the options do not fit the tensors, or the number of tokens is unknown.
    """
    sizes = read_sizes(checkpoint)
    asked: dict[str, object] = {"num_attention_heads": DEFAULT_NUM_ATTENTION_HEADS}
    if arguments.preset:
        preset = GPSTokenConfig.preset(arguments.preset)
        # The number of blocks is not compared: the release and the paper differ in it.
        for name in ("texture_channels", "hidden_size", "decoder_channel_multipliers"):
            expected, found = getattr(preset, name), sizes[name]
            if (list(expected) if isinstance(expected, tuple) else expected) != found:
                raise ValueError(f"{name} of the checkpoint must be {expected} for {arguments.preset}, got {found}")
        names = ("num_tokens", "image_size", "splat_support", "tile_decode", "min_region_size", "complexity_exponent")
        asked.update({name: getattr(preset, name) for name in (*names, "sigma_scale")})
    elif arguments.num_tokens is None:
        raise ValueError(f"--num_tokens N or --preset {'|'.join(RELEASED_PRESETS)} must be given, got neither")
    options = {
        "num_tokens": arguments.num_tokens,
        "image_size": arguments.image_size,
        "splat_support": arguments.support,
        "tile_decode": arguments.tile_decode,
        "num_attention_heads": arguments.num_attention_heads,
        "min_region_size": arguments.min_region_size,
        "complexity_exponent": arguments.complexity_exponent,
        "sigma_scale": arguments.sigma_scale,
    }
    asked.update({name: value for name, value in options.items() if value is not None})
    return GPSTokenConfig(**sizes, **asked)


def plan(checkpoint: Checkpoint, config: GPSTokenConfig) -> tuple[list[PlannedTensor], list[str]]:
    """Return the converted tensors, and the released names that are dropped on purpose."""
    # Before the model is built: the file must hold every tensor of as many blocks as it claims.
    rules = match_keys(rules_for(config), checkpoint.keys(), WHAT)
    model = build_empty(lambda: GPSTokenModel(config), checkpoint.path, WHAT)
    dropped = [f"{rule.source} ({rule.reason})" for rule in rules if not rule.targets]
    return plan_conversion(rules, checkpoint, model_shapes(model)), dropped


def convert(arguments: argparse.Namespace) -> None:
    with open_checkpoint(arguments.checkpoint, members=("state_dict", "model")) as checkpoint:
        config = build_config(checkpoint, arguments)
        tensors, dropped = plan(checkpoint, config)
        config.architectures = ["GPSTokenModel"]
        config.dtype = floating_dtype(checkpoint, checkpoint.keys())
        with atomic_directory(arguments.output) as staging:
            save_tensors(staging / WEIGHTS_NAME, tensors)
            config.save_pretrained(staging)
            processor = GPSTokenImageProcessor(
                size={"shortest_edge": config.image_size},
                crop_size={"height": config.image_size, "width": config.image_size},
            )
            processor.save_pretrained(staging)
            card = gpstoken_card(config, arguments.preset, Path(arguments.checkpoint).name)
            (staging / "README.md").write_text(card, encoding="utf-8")
            num_parameters = sum(torch.Size(tensor.shape).numel() for tensor in tensors)
            print(f"{len(tensors)} tensors, {num_parameters:,} parameters, {config.num_hidden_layers} encoder blocks")
            for name in dropped:
                print(f"dropped {name}")
            if arguments.verify is not None:
                verify(checkpoint, staging, config, arguments.verify)
    print(f"wrote {arguments.output}")
    push_written(arguments.output, arguments)


def verify(checkpoint: Checkpoint, folder: Path, config: GPSTokenConfig, arrays: Path) -> None:
    """Load the written folder and compare its tensors with the checkpoint's, and its outputs with recorded arrays.

    Args:
        checkpoint (`Checkpoint`): the released file.
        folder (`Path`): the written folder.
        config (`GPSTokenConfig`): its config.
        arrays (`Path`): a safetensors file of recorded arrays; `Path()` compares tensors only.

    Raises:
        ValueError: if a tensor differs, or an error exceeds its tolerance.
    """
    with open_checkpoint(folder / WEIGHTS_NAME) as written:
        restored, _ = plan_reverse(rules_for(config), written)
        print(f"verified: {compare_tensors(checkpoint, restored)} tensors equal the checkpoint's bit for bit")
    # The progress bar of this short load would appear between the messages.
    logging.disable_progress_bar()
    try:
        model = GPSTokenModel.from_pretrained(folder, dtype=torch.float32).eval()
    finally:
        logging.enable_progress_bar()
    if arrays != Path():
        check_errors(verify_gpstoken(model, load_arrays(arrays)))


def reverse(arguments: argparse.Namespace) -> None:
    """Write a converted folder as a file of the release's format."""
    config = load_empty_gpstoken(Path(arguments.checkpoint)).config
    with open_checkpoint(Path(arguments.checkpoint) / WEIGHTS_NAME) as checkpoint:
        tensors, dropped = plan_reverse(rules_for(config), checkpoint)
        with atomic_file(arguments.output, overwrite=False) as staging:
            save_tensors(staging, tensors)
    print(f"wrote {arguments.output}: {len(tensors)} tensors, without those that conversion drops:")
    for name in dropped:
        print(f"  {name}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="conversion.convert_gpstoken", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="released .safetensors, .pt or .bin file (with --reverse: converted folder)",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write (with --reverse: file to write)")
    parser.add_argument(
        "--preset", choices=RELEASED_PRESETS, help="released model; sets the options below that are not given"
    )
    parser.add_argument("--num_tokens", type=positive_int, help="tokens of an image; required without --preset")
    parser.add_argument("--image_size", type=positive_int, help="side of the training images in pixels (default: 256)")
    parser.add_argument("--support", type=positive_float, help="reach of a Gaussian in sigmas (default: 3)")
    parser.add_argument(
        "--tile_decode", choices=("merged", "stitched"), help="how tiles are decoded (default: merged)"
    )
    parser.add_argument("--num_attention_heads", type=positive_int, help="attention heads of the encoder (default: 8)")
    parser.add_argument(
        "--min_region_size", type=positive_int, help="smallest region of the partition in pixels (default: 8)"
    )
    parser.add_argument("--complexity_exponent", type=float, help="lambda of the partition (default: 2.5)")
    parser.add_argument(
        "--sigma_scale", type=positive_float, help="initial sigma divided by a region's extent (default: 2/3)"
    )
    parser.add_argument(
        "--verify",
        nargs="?",
        type=Path,
        const=Path(),
        metavar="ARRAYS",
        help="compare the written tensors with the checkpoint's, and the outputs with a safetensors file of recorded "
        "arrays, if given (pixel_values, regions, init_gaussians, tokens, rendered, decoded, merged_*)",
    )
    parser.add_argument("--reverse", action="store_true", help="convert a folder back to the release's format")
    add_push_options(parser)
    arguments = parser.parse_args(argv)
    check_push_options(parser, arguments)
    if arguments.reverse:
        if arguments.push_to_hub or arguments.verify is not None:
            parser.error("--push_to_hub and --verify must not be given with --reverse")
        reverse(arguments)
    else:
        convert(arguments)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_program(main))
