# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Encode a dataset once: tokens, initial Gaussians and labels as a parquet dataset, for training generators.

    python -m training.cache_tokens --tokenizer path/or/repo --train_data_files images.parquet --output_dir tokens/

Every shard takes its place only when it is whole, so an interrupted run goes on with the next missing one. When all
are there, `statistics.json` gets the channel statistics, and `datasets.load_dataset(output_dir)` reads the result.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from gpstoken_hf.gaussians import NUM_GAUSSIAN_PARAMS, gaussians_to_logits
from gpstoken_hf.modeling_gpstoken import GPSTokenModel
from pipelines.shared.outputs import atomic_directory, atomic_file
from pipelines.shared.programs import ProgramError, run_program
from pipelines.shared.programs import positive_int as positive
from training.data import (
    BatchRequest,
    ImageBatches,
    PartitionSettings,
    TokenCounts,
    batch_loader,
    load_image_dataset,
)
from training.options import add_dataset_options, describe_options, parse_options

STATISTICS = "statistics.json"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cache_tokens", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--config", type=Path, help="YAML file of defaults for these options; the command line wins")
    parser.add_argument("--tokenizer", required=True, help="a GPSTokenModel: folder or Hub repository")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--resolution", type=positive, help="side of the central squares; default: the model's")
    parser.add_argument("--num_tokens", type=positive, help="tokens of an image; default: the model's")
    parser.add_argument(
        "--with_flips", action=argparse.BooleanOptionalAction, default=False, help="mirrored copies too"
    )
    parser.add_argument("--shard_size", type=positive, default=4096, help="images of a parquet file")
    parser.add_argument("--batch_size", type=positive, default=32)
    parser.add_argument("--dataloader_num_workers", type=int, default=2)
    parser.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), default="no")
    parser.add_argument("--threads", type=positive, help="CPU threads of the arithmetic; default: torch's own choice")
    parser.add_argument(
        "--dry_run", "--dry-run", action="store_true", help="print the resolved configuration and stop"
    )
    add_dataset_options(parser)
    return parser


class ChannelSums:
    """Running sums of the channels of what a generator may be asked to model, in float64.

    "offset": refined minus initial Gaussian, and texture (the paper's texture target); "absolute" and "logit": the
    refined Gaussian itself or its logits, and texture; "layout" and "layout_logit": the initial Gaussian.
    """

    def __init__(self) -> None:
        self.count = 0
        self.sums: dict[str, list[np.ndarray]] = {}

    def add(self, tokens: torch.Tensor, init_gaussians: torch.Tensor) -> None:
        """`tokens` (B, L, 5 + C) and `init_gaussians` (B, L, 5)."""
        tokens, layout = tokens.double(), init_gaussians.double()
        gaussians, texture = tokens[..., :NUM_GAUSSIAN_PARAMS], tokens[..., NUM_GAUSSIAN_PARAMS:]
        targets = {
            "offset": torch.cat([gaussians - layout, texture], dim=-1),
            "absolute": tokens,
            "logit": torch.cat([gaussians_to_logits(gaussians), texture], dim=-1),
            "layout": layout,
            "layout_logit": gaussians_to_logits(layout),
        }
        self.count += tokens.shape[0] * tokens.shape[1]
        for name, target in targets.items():
            flat = target.flatten(0, 1)
            sums = [flat.sum(0).numpy(), flat.square().sum(0).numpy()]
            previous = self.sums.get(name)
            self.sums[name] = sums if previous is None else [a + b for a, b in zip(previous, sums)]

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "sums": {name: [s.tolist() for s in pair] for name, pair in self.sums.items()}}

    def merge(self, state: dict[str, Any]) -> None:
        self.count += state["count"]
        for name, pair in state["sums"].items():
            added = [np.asarray(values) for values in pair]
            previous = self.sums.get(name)
            self.sums[name] = added if previous is None else [a + b for a, b in zip(previous, added)]

    def statistics(self) -> dict[str, dict[str, list[float]]]:
        """Mean and standard deviation of every target's channels; 1 for a channel that does not vary."""
        result = {}
        for name, (first, second) in self.sums.items():
            mean = first / self.count
            std = np.sqrt(np.maximum(second / self.count - mean**2, 0))
            constant = std < 1e-6
            result[name] = {"mean": mean.tolist(), "std": np.where(constant, 1.0, std).tolist()}
        return result


def plan_shards(num_images: int, shard_size: int, flips: Sequence[str]) -> list[tuple[str, int, int]]:
    """(flip, first row, row after the last) of every shard."""
    return [
        (flip, start, min(start + shard_size, num_images))
        for flip in flips
        for start in range(0, num_images, shard_size)
    ]


def encode_shard(
    model: GPSTokenModel, loader: Any, accelerator: Accelerator, bar: tqdm
) -> tuple[list[dict[str, Any]], ChannelSums]:
    """The rows of one shard and their channel sums."""
    rows: list[dict[str, Any]] = []
    sums = ChannelSums()
    for batch in loader:
        inputs = {name: value.to(accelerator.device) for name, value in batch.items() if name != "labels"}
        with torch.no_grad(), accelerator.autocast():
            encoded = model.encode(
                inputs["pixel_values"], boxes=inputs["boxes"], init_gaussians=inputs["init_gaussians"]
            )
        tokens, layouts = encoded.tokens.float().cpu(), batch["init_gaussians"]
        if not torch.isfinite(tokens).all():
            raise ProgramError("the tokenizer gave NaN or infinite tokens; try --mixed_precision no")
        sums.add(tokens, layouts)
        labels = batch["labels"].tolist() if "labels" in batch else [0] * len(tokens)
        rows += [
            {"tokens": t, "init_gaussians": g, "label": label}
            for t, g, label in zip(tokens.numpy(), layouts.numpy(), labels)
        ]
        bar.update(len(tokens))
    return rows, sums


def class_names(dataset: Any, label_column: str) -> list[str] | None:
    """Names of the classes, where the dataset has them."""
    feature = (dataset.features or {}).get(label_column)
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def write_card(path: Path, options: argparse.Namespace, description: dict[str, Any]) -> None:
    """The dataset card, whose header tells `load_dataset` where the shards are."""
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
`init_gaussians` ({length}, 5) and `label`. Means and standard deviations of the channels are in `{STATISTICS}`.
Made by `training/cache_tokens.py` with the tokenizer `{options.tokenizer}`.
"""
    with atomic_file(path) as staging:
        staging.write_text(text, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_options(make_parser(), argv)
    if options.streaming:
        raise ProgramError("shards are made from rows by number: --streaming is not possible here")
    if options.dry_run:
        print(describe_options(options), end="")
        return 0
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    accelerator = Accelerator(mixed_precision=options.mixed_precision)
    dataset = load_image_dataset(options)
    has_labels = options.label_column in dataset.column_names
    model = GPSTokenModel.from_pretrained(options.tokenizer, dtype=torch.float32).to(accelerator.device).eval()
    config = model.config
    resolution = options.resolution or config.image_size
    num_tokens = options.num_tokens or config.num_tokens
    identity = {
        "tokenizer": options.tokenizer,
        "resolution": resolution,
        "num_tokens": num_tokens,
        "token_channels": config.token_channels,
        "shard_size": options.shard_size,
        "flips": ["never", "always"] if options.with_flips else ["never"],
        "num_images": len(dataset),
    }
    output_dir: Path = options.output_dir
    if accelerator.is_main_process:
        _claim(output_dir, identity)
    accelerator.wait_for_everyone()

    features = datasets.Features(
        {
            "tokens": datasets.Array2D((num_tokens, config.token_channels), "float32"),
            "init_gaussians": datasets.Array2D((num_tokens, NUM_GAUSSIAN_PARAMS), "float32"),
            "label": datasets.Value("int64"),
        }
    )
    shards = plan_shards(len(dataset), options.shard_size, identity["flips"])
    bar = tqdm(
        total=sum(end - start for _, start, end in shards),
        desc="cache_tokens",
        unit="image",
        disable=not accelerator.is_local_main_process,
        mininterval=0.5 if sys.stderr.isatty() else 30,
    )
    for index, (flip, start, end) in enumerate(shards):
        if (output_dir / "sums" / f"{index:05d}.json").exists() or index % accelerator.num_processes != (
            accelerator.process_index
        ):
            bar.update(end - start)
            continue
        batches = ImageBatches(
            dataset,
            image_column=options.image_column,
            label_column=options.label_column if has_labels else None,
            seed=0,
            crop="center",
            min_crop_scale=1.0,
            flip=flip,
            token_counts=TokenCounts(num_tokens, num_tokens, resolution, per_image=False),
            partition=PartitionSettings(config.complexity_exponent, config.min_region_size, config.sigma_scale),
        )
        requests = [
            BatchRequest(0, 0, resolution, rows, rows)
            for first in range(start, end, options.batch_size)
            for rows in [list(range(first, min(first + options.batch_size, end)))]
        ]
        loader = batch_loader(batches, requests, options.dataloader_num_workers, False)  # type: ignore[arg-type]
        rows, sums = encode_shard(model, loader, accelerator, bar)
        with atomic_file(output_dir / "data" / f"train-{index:05d}.parquet") as staging:
            datasets.Dataset.from_list(rows, features=features).to_parquet(staging)
        # Written second: where the sums are, the shard is whole.
        with atomic_file(output_dir / "sums" / f"{index:05d}.json") as staging:
            staging.write_text(json.dumps(sums.state_dict()), encoding="utf-8")
    bar.close()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _finish(output_dir, options, identity, len(shards), class_names(dataset, options.label_column))
    return 0


def _claim(output_dir: Path, identity: dict[str, Any]) -> None:
    """Start the folder, or make sure that what is there was begun with the same settings."""
    path = output_dir / "cache.json"
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        differing = sorted(name for name in identity if found.get(name) != identity[name])
        if differing:
            raise ProgramError(
                f"{output_dir} was begun with other settings: "
                + ", ".join(f"{name} {found.get(name)} there, {identity[name]} now" for name in differing)
            )
        return
    if output_dir.exists() and any(output_dir.iterdir()):
        raise ProgramError(f"{output_dir} is not empty and holds no token cache")
    with atomic_directory(output_dir) as staging:
        (staging / "cache.json").write_text(json.dumps(identity, indent=2), encoding="utf-8")


def _finish(
    output_dir: Path, options: argparse.Namespace, identity: dict[str, Any], num_shards: int, names: list[str] | None
) -> None:
    total = ChannelSums()
    for index in range(num_shards):
        total.merge(json.loads((output_dir / "sums" / f"{index:05d}.json").read_text(encoding="utf-8")))
    num_rows = total.count // identity["num_tokens"]
    description = {**identity, "num_rows": num_rows, "class_names": names, "channels": total.statistics()}
    if not math.isfinite(sum(map(sum, (channel["mean"] for channel in description["channels"].values())))):
        raise ProgramError("the channel statistics are not finite")
    write_card(output_dir / "README.md", options, description)
    with atomic_file(output_dir / STATISTICS) as staging:
        staging.write_text(json.dumps(description, indent=1), encoding="utf-8")
    print(f"{num_rows} images as tokens in {output_dir}")


if __name__ == "__main__":
    raise SystemExit(run_program(main))
