# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Encode a dataset once: tokens, initial Gaussians and labels as a parquet dataset, for training generators.

    python -m training.cache_tokens --tokenizer path/or/repo --train_data_files images.parquet --output_dir tokens/

A shard gets its name only when it is whole. So an interrupted run resumes at the first missing shard. At the end
`statistics.json` gets the statistics of the channels, and `datasets.load_dataset(output_dir)` reads the result.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from gpstoken_hf.gaussians import NUM_GAUSSIAN_PARAMS
from gpstoken_hf.layout import GaussianLayout
from gpstoken_hf.modeling_gpstoken import GPSTokenModel
from pipelines.shared.outputs import atomic_file
from pipelines.shared.programs import ProgramError, non_negative_int, run_program
from pipelines.shared.programs import positive_int as positive
from training.data import (
    BatchRequest,
    ImageBatches,
    PartitionSettings,
    TokenCounts,
    batch_loader,
    batches_of,
    load_image_dataset,
)
from training.options import Switch, add_dataset_options, add_program_options, describe_options, parse_options
from training.run_folder import claimed_folder
from training.token_cache import STATISTICS, ChannelSums

PROGRAM = "training.cache_tokens"
IDENTITY = "cache.json"
OUTPUTS = (IDENTITY, STATISTICS, "README.md", "data/train-*.parquet", "sums/*.json")


def make_parser() -> argparse.ArgumentParser:
    """The parser of this program."""
    parser = argparse.ArgumentParser(prog="cache_tokens", description=__doc__.splitlines()[0], allow_abbrev=False)
    add_program_options(parser)
    parser.add_argument("--tokenizer", required=True, help="a GPSTokenModel: folder or Hub repository")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--resolution", type=positive, help="side of the central squares; default: the model's")
    parser.add_argument("--num_tokens", type=positive, help="tokens of an image; default: the model's")
    parser.add_argument("--with_flips", action=Switch, default=False, help="encode mirrored copies, too")
    parser.add_argument("--shard_size", type=positive, default=4096, help="images of a parquet file")
    parser.add_argument("--batch_size", type=positive, default=32)
    parser.add_argument("--dataloader_num_workers", type=non_negative_int, default=2)
    parser.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), default="no")
    add_dataset_options(parser)
    return parser


def plan_shards(num_images: int, shard_size: int, flips: Sequence[str]) -> list[tuple[str, int, int]]:
    """(flip, first row, row after the last) of every shard."""
    return [
        (flip, start, min(start + shard_size, num_images))
        for flip in flips
        for start in range(0, num_images, shard_size)
    ]


def encode_shard(
    model: GPSTokenModel, batches: Iterable[dict[str, torch.Tensor]], accelerator: Accelerator, bar: tqdm
) -> tuple[list[dict[str, Any]], ChannelSums]:
    """The rows of one shard and their channel sums.

    Raises:
        ProgramError: If a token is not finite.
    """
    rows: list[dict[str, Any]] = []
    sums = ChannelSums()
    for batch in batches:
        inputs = {name: value.to(accelerator.device) for name, value in batch.items() if name != "labels"}
        with torch.no_grad(), accelerator.autocast():
            layout = GaussianLayout(inputs["init_gaussians"], inputs["boxes"])
            encoded = model.encode(inputs["pixel_values"], layout=layout)
        tokens, layouts = encoded.tokens.float().cpu(), batch["init_gaussians"]
        if not torch.isfinite(tokens).all():
            raise ProgramError("tokens must be finite, got NaN or infinity from the tokenizer: try more precision")
        sums.add(tokens, layouts)
        labels = batch["labels"].tolist() if "labels" in batch else [0] * len(tokens)
        rows += [
            {"tokens": t, "init_gaussians": g, "label": label}
            for t, g, label in zip(tokens.numpy(), layouts.numpy(), labels)
        ]
        bar.update(len(tokens))
    return rows, sums


def class_names(dataset: Any, label_column: str) -> list[str] | None:
    """Names of the classes, if the dataset has them."""
    feature = (dataset.features or {}).get(label_column)
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def write_card(path: Path, tokenizer: str, description: dict[str, Any]) -> None:
    """Write the dataset card. Its header tells `load_dataset` where the shards are."""
    rows, length, channels = (description[name] for name in ("num_rows", "num_tokens", "token_channels"))
    text = f"""---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*.parquet
---
# GPSToken tokens

{rows} images as {length} tokens each: `tokens` ({length}, {channels}) = 5 Gaussian parameters and texture,
`init_gaussians` ({length}, 5) and `label`. `{STATISTICS}` holds means and standard deviations of the channels.
Made by `training/cache_tokens.py` with the tokenizer `{tokenizer}`.
"""
    with atomic_file(path) as staging:
        staging.write_text(text, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    options = parse_options(make_parser(), argv)
    if options.streaming:
        raise ProgramError("--streaming must be off, because shards are made from row numbers, got on")
    if options.dry_run:
        print(describe_options(options), end="")
        return 0
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    accelerator = Accelerator(mixed_precision=options.mixed_precision)
    output_dir: Path = options.output_dir
    with claimed_folder(output_dir, PROGRAM, OUTPUTS) if accelerator.is_main_process else nullcontext():
        dataset = load_image_dataset(options)
        model = GPSTokenModel.from_pretrained(options.tokenizer, dtype=torch.float32).to(accelerator.device).eval()
        identity = {
            "tokenizer": options.tokenizer,
            "resolution": options.resolution or model.config.image_size,
            "num_tokens": options.num_tokens or model.config.num_tokens,
            "token_channels": model.config.token_channels,
            "shard_size": options.shard_size,
            "flips": ["never", "always"] if options.with_flips else ["never"],
            "num_images": len(dataset),
        }
        if accelerator.is_main_process:
            check_identity(output_dir / IDENTITY, identity)
        accelerator.wait_for_everyone()
        num_shards = write_shards(options, accelerator, dataset, model, identity)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            names = class_names(dataset, options.label_column)
            write_description(output_dir, options.tokenizer, identity, num_shards, names)
    return 0


def check_identity(path: Path, identity: dict[str, Any]) -> None:
    """Record the settings of a cache, or check that a resumed one has the same.

    Raises:
        ProgramError: If it was begun with other settings.
    """
    if not path.exists():
        with atomic_file(path) as staging:
            staging.write_text(json.dumps(identity, indent=2), encoding="utf-8")
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    differing = sorted(name for name in identity if found.get(name) != identity[name])
    if differing:
        raise ProgramError(
            f"settings must be those that {path.parent} was begun with: "
            + ", ".join(f"{name} must be {found.get(name)}, got {identity[name]}" for name in differing)
        )


def write_shards(
    options: argparse.Namespace, accelerator: Accelerator, dataset: Any, model: GPSTokenModel, identity: dict[str, Any]
) -> int:
    """Write the missing shards of this process; returns the number of all shards."""
    resolution, num_tokens = identity["resolution"], identity["num_tokens"]
    features = datasets.Features(
        {
            "tokens": datasets.Array2D((num_tokens, identity["token_channels"]), "float32"),
            "init_gaussians": datasets.Array2D((num_tokens, NUM_GAUSSIAN_PARAMS), "float32"),
            "label": datasets.Value("int64"),
        }
    )
    config = model.config
    shards = plan_shards(len(dataset), options.shard_size, identity["flips"])
    bar = tqdm(
        total=sum(end - start for _, start, end in shards),
        desc="cache_tokens",
        unit="image",
        disable=not accelerator.is_local_main_process,
        mininterval=0.5 if sys.stderr.isatty() else 30,
    )
    for index, (flip, start, end) in enumerate(shards):
        sums_path = options.output_dir / "sums" / f"{index:05d}.json"
        if sums_path.exists() or index % accelerator.num_processes != accelerator.process_index:
            bar.update(end - start)
            continue
        images = ImageBatches(
            dataset,
            image_column=options.image_column,
            label_column=options.label_column if options.label_column in dataset.column_names else None,
            seed=0,
            crop="center",
            min_crop_scale=1.0,
            flip=flip,
            token_counts=TokenCounts(num_tokens, num_tokens, resolution, per_image=False),
            partition=PartitionSettings(
                config.complexity_exponent, config.min_region_size, config.sigma_scale, config.align_corners
            ),
        )
        requests = [
            BatchRequest(0, 0, resolution, rows, rows)
            for first in range(start, end, options.batch_size)
            for rows in [list(range(first, min(first + options.batch_size, end)))]
        ]
        with batches_of(batch_loader(images, requests, options.dataloader_num_workers, False)) as batches:
            rows, sums = encode_shard(model, batches, accelerator, bar)
        with atomic_file(options.output_dir / "data" / f"train-{index:05d}.parquet") as staging:
            datasets.Dataset.from_list(rows, features=features).to_parquet(staging)
        # Written second: if the sums exist, the shard is whole.
        with atomic_file(sums_path) as staging:
            staging.write_text(json.dumps(sums.state_dict()), encoding="utf-8")
    bar.close()
    return len(shards)


def write_description(
    output_dir: Path, tokenizer: str, identity: dict[str, Any], num_shards: int, names: list[str] | None
) -> None:
    """Merge the sums of all shards, and write the card and the statistics.

    Raises:
        ProgramError: If a statistic is not finite.
    """
    total = ChannelSums()
    for index in range(num_shards):
        total.merge(json.loads((output_dir / "sums" / f"{index:05d}.json").read_text(encoding="utf-8")))
    num_rows = total.count // identity["num_tokens"]
    description = {**identity, "num_rows": num_rows, "class_names": names, "channels": total.statistics()}
    if not math.isfinite(sum(map(sum, (channel["mean"] for channel in description["channels"].values())))):
        raise ProgramError("the statistics of the channels must be finite, got NaN or infinity")
    write_card(output_dir / "README.md", tokenizer, description)
    with atomic_file(output_dir / STATISTICS) as staging:
        staging.write_text(json.dumps(description, indent=1), encoding="utf-8")
    print(f"{num_rows} images as tokens in {output_dir}")


if __name__ == "__main__":
    raise SystemExit(run_program(main))
