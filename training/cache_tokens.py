# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Encode a dataset once: tokens, initial Gaussians and labels as a parquet dataset, for training generators.

    python -m training.cache_tokens --tokenizer path/or/repo --train_data_files images.parquet --output_dir tokens/
    accelerate launch --num_machines 2 --num_processes 16 --machine_rank 0 --main_process_ip HOST \\
        -m training.cache_tokens --tokenizer path/or/repo --dataset_name NAME --streaming --output_dir /shared/tokens

The data is cut into parts of `--shard_size` images, and each part becomes a parquet file. The parts are dealt to the
processes, on any number of machines that share the output folder. A file gets its name only when it is whole. So an
interrupted run resumes with the missing parts, also with another number of processes, and the result is the same.
At the end `statistics.json` gets the statistics of the channels. `datasets.load_dataset(output_dir)` reads the result.
Unusable images are left out, counted and named in the statistics.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from gpstoken_hf.gaussians import NUM_GAUSSIAN_PARAMS
from gpstoken_hf.modeling_gpstoken import GPSTokenModel
from pipelines.shared.checkpoints import find_checkpoint
from pipelines.shared.outputs import atomic_file
from pipelines.shared.programs import ProgramError, non_negative_int, run_program
from pipelines.shared.programs import positive_int as positive
from pipelines.shared.publishing import push_folder
from training.data import BatchRequest, batch_loader, batches_of, load_image_dataset
from training.loop import MIN_SAMPLES
from training.online_tokens import encode_batch, image_batches
from training.options import Switch, add_dataset_options, add_program_options, describe_options, parse_options
from training.run_folder import claimed_folder
from training.streams import ImageStream
from training.token_cache import STATISTICS, ChannelSums, class_names

PROGRAM = "training.cache_tokens"
IDENTITY = "cache.json"
OUTPUTS = (IDENTITY, STATISTICS, "README.md", "data/train-*.parquet", "sums/*.json")


def make_parser() -> argparse.ArgumentParser:
    """The parser of this program."""
    parser = argparse.ArgumentParser(prog="cache_tokens", description=__doc__.splitlines()[0], allow_abbrev=False)
    add_program_options(parser)
    parser.add_argument("--tokenizer", required=True, help="a GPSTokenModel: folder or Hub repository")
    parser.add_argument("--output_dir", type=Path, required=True, help="a folder that all machines share")
    parser.add_argument("--resolution", type=positive, help="side of the central squares; default: the model's")
    parser.add_argument("--num_tokens", type=positive, help="tokens of an image; default: the model's")
    parser.add_argument("--with_flips", action=Switch, default=False, help="encode mirrored copies, too")
    parser.add_argument("--shard_size", type=positive, default=4096, help="images of a parquet file")
    parser.add_argument("--batch_size", type=positive, default=32)
    parser.add_argument("--dataloader_num_workers", type=non_negative_int, default=2)
    parser.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), default="no")
    parser.add_argument("--push_to_hub", action="store_true", help="upload the finished cache as a dataset")
    parser.add_argument("--hub_dataset_id", help="repository of --push_to_hub; default: the name of --output_dir")
    parser.add_argument("--hub_private", action="store_true", help="create that repository as a private one")
    add_dataset_options(parser)
    return parser


@dataclass(frozen=True)
class Part:
    """Up to `--shard_size` images of a dataset, which become one file.

    Args:
        name (`str`): Of the file, without suffix.
        flip (`str`): "never" or "always".
        shard (`int`): Of a stream; 0 for a dataset with a length.
        start (`int`): First row in that shard, or in the dataset.
        size (`int`): Rows at most.
    """

    name: str
    flip: str
    shard: int
    start: int
    size: int


def parts_of_rows(num_images: int, shard_size: int, flips: Sequence[str]) -> list[Part]:
    """All parts of a dataset with a length."""
    places = [(flip, start) for flip in flips for start in range(0, num_images, shard_size)]
    return [
        Part(f"{index:05d}", flip, 0, start, min(shard_size, num_images - start))
        for index, (flip, start) in enumerate(places)
    ]


def parts_of_shard(shard: int, shard_size: int, flip: str) -> Iterator[Part]:
    """The endless parts of a shard of a stream; the data ends with the first one that is not full."""
    suffix = "" if flip == "never" else "-flipped"
    for number in count():
        yield Part(f"{shard:05d}-{number:05d}{suffix}", flip, shard, number * shard_size, shard_size)


class PartRequests:
    """The batches of a part, to be read once. `num_rows` counts what was read."""

    def __init__(self, dataset: Any, part: Part, batch_size: int, resolution: int) -> None:
        self.dataset, self.part, self.batch_size, self.resolution = dataset, part, batch_size, resolution
        self.num_rows = 0

    def __iter__(self) -> Iterator[BatchRequest]:
        part = self.part
        rows: Iterator[Any] = iter(range(part.start, part.start + part.size))
        if isinstance(self.dataset, ImageStream):
            rows = (named for _, named in islice(self.dataset.rows(part.shard, part.start), part.size))
        while batch := list(islice(rows, self.batch_size)):
            positions = list(range(part.start + self.num_rows, part.start + self.num_rows + len(batch)))
            self.num_rows += len(batch)
            yield BatchRequest(0, 0, self.resolution, positions, batch)


def encode_part(
    model: GPSTokenModel, batches: Iterable[dict[str, Any]], accelerator: Accelerator, bar: tqdm
) -> tuple[list[dict[str, Any]], ChannelSums, list[str]]:
    """The rows of one part, their channel sums, and the names of unusable images."""
    rows: list[dict[str, Any]] = []
    sums, unusable = ChannelSums(), []
    for batch in batches:
        found = batch.pop("unusable", [])
        unusable += found
        bar.update(len(found))
        if not batch:
            continue
        encoded = {name: value.cpu() for name, value in encode_batch(model, batch, accelerator).items()}
        sums.add(encoded["tokens"], encoded["init_gaussians"])
        rows += [
            {"tokens": t, "init_gaussians": g, "label": label}
            for t, g, label in zip(
                encoded["tokens"].numpy(), encoded["init_gaussians"].numpy(), encoded["labels"].tolist()
            )
        ]
        bar.update(len(encoded["labels"]))
    return rows, sums, unusable


def write_card(path: Path, tokenizer: str, description: dict[str, Any]) -> None:
    """Write the dataset card. Its header tells `load_dataset` where the files are."""
    rows, length, channels = (description[name] for name in ("num_rows", "num_tokens", "token_channels"))
    side, names = description["resolution"], description["class_names"]
    unusable = description["num_unusable"]
    copies = ", mirrored copies included" if len(description["flips"]) > 1 else ""
    label = f"one of {len(names)} classes" if names else "class, or 0 where the images have none"
    text = f"""---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*.parquet
tags:
- gpstoken
---
# GPSToken tokens

{rows} images of {side} x {side} pixels as {length} tokens each{copies}.

| column | shape | |
|---|---|---|
| `tokens` | ({length}, {channels}) | refined Gaussian (5 numbers) and texture |
| `init_gaussians` | ({length}, 5) | the Gaussian before refinement |
| `label` | | {label} |

`{STATISTICS}` holds means and standard deviations of the channels, and the names of classes.
{unusable} images could not be used and are left out. Made by `python -m {PROGRAM}` with the tokenizer
`{tokenizer}`. Train a generator with

```
python -m training.train_sit --stage texture --tokens_dir THIS_DATASET --output_dir runs/texture --max_train_steps 1000
```
"""
    with atomic_file(path) as staging:
        staging.write_text(text, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    options = parse_options(make_parser(), argv)
    if options.dry_run:
        print(describe_options(options), end="")
        return 0
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    accelerator = Accelerator(mixed_precision=options.mixed_precision)
    output_dir: Path = options.output_dir
    with claimed_folder(output_dir, PROGRAM, OUTPUTS) if accelerator.is_main_process else nullcontext():
        loaded = load_image_dataset(options)
        dataset = loaded if hasattr(loaded, "__len__") else ImageStream(loaded)
        tokenizer = find_checkpoint(options.tokenizer, "--tokenizer")
        model = GPSTokenModel.from_pretrained(tokenizer, dtype=torch.float32).to(accelerator.device).eval()
        identity = {
            "tokenizer": options.tokenizer,
            "resolution": options.resolution or model.config.image_size,
            "num_tokens": options.num_tokens or model.config.num_tokens,
            "token_channels": model.config.token_channels,
            "shard_size": options.shard_size,
            "flips": ["never", "always"] if options.with_flips else ["never"],
            **(
                {"num_shards": dataset.num_shards}
                if isinstance(dataset, ImageStream)
                else {"num_images": len(dataset)}
            ),
        }
        if accelerator.is_main_process:
            check_identity(output_dir / IDENTITY, identity)
        accelerator.wait_for_everyone()
        write_parts(options, accelerator, dataset, model, identity)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            write_description(options, dataset, identity, class_names(loaded, options.label_column))
            if options.push_to_hub:
                repo_id = options.hub_dataset_id or output_dir.name
                address = push_folder(
                    output_dir, repo_id, options.hub_private, repo_type="dataset", ignore=("sums/*", IDENTITY)
                )
                print(f"pushed to {address}")
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


def parts_of_process(
    dataset: Any, identity: dict[str, Any], rank: int, world_size: int
) -> Iterator[list[Part] | Iterator[Part]]:
    """Sequences of parts that this process has to look after. A sequence ends with a part that is not full.

    Where a stream has fewer shards than there are processes, its parts are dealt instead of its shards.
    """
    shard_size, flips = identity["shard_size"], identity["flips"]
    if not isinstance(dataset, ImageStream):
        yield parts_of_rows(len(dataset), shard_size, flips)[rank::world_size]
        return
    for flip in flips:
        for shard in range(dataset.num_shards):
            parts = parts_of_shard(shard, shard_size, flip)
            if dataset.num_shards < world_size:
                yield islice(parts, (rank - shard) % world_size, None, world_size)
            elif shard % world_size == rank:
                yield parts


def sums_path(output_dir: Path, part: Part) -> Path:
    """The record of a part. It is written after the file of the part: where it exists, the part is whole."""
    return output_dir / "sums" / f"{part.name}.json"


def write_parts(
    options: argparse.Namespace, accelerator: Accelerator, dataset: Any, model: GPSTokenModel, identity: dict[str, Any]
) -> None:
    """Write the missing parts of this process.

    Raises:
        ProgramError: If too many images are unusable.
    """
    length, resolution = identity["num_tokens"], identity["resolution"]
    features = datasets.Features(
        {
            "tokens": datasets.Array2D((length, identity["token_channels"]), "float32"),
            "init_gaussians": datasets.Array2D((length, NUM_GAUSSIAN_PARAMS), "float32"),
            "label": datasets.Value("int64"),
        }
    )
    is_stream = isinstance(dataset, ImageStream)
    label_column = options.label_column if options.label_column in dataset.column_names else None
    total = None if is_stream else len(dataset) * len(identity["flips"])
    rank, world_size = accelerator.process_index, accelerator.num_processes
    seen, num_unusable = 0, 0
    with tqdm(
        total=None if total is None else math.ceil(total / world_size),
        desc="cache_tokens",
        unit="image",
        disable=not accelerator.is_local_main_process,
        mininterval=0.5 if sys.stderr.isatty() else 30,
    ) as bar:
        for parts in parts_of_process(dataset, identity, rank, world_size):
            for part in parts:
                record_path = sums_path(options.output_dir, part)
                if record_path.exists():
                    num_rows = json.loads(record_path.read_text(encoding="utf-8"))["num_rows"]
                    bar.update(num_rows)
                else:
                    images = image_batches(
                        None if is_stream else dataset,
                        model,
                        image_column=options.image_column,
                        label_column=label_column,
                        resolution=resolution,
                        num_tokens=length,
                        flip=part.flip,
                        replace_unusable=False,
                    )
                    requests = PartRequests(dataset, part, options.batch_size, resolution)
                    loader = batch_loader(images, requests, options.dataloader_num_workers, False)
                    with batches_of(loader) as batches:
                        rows, sums, unusable = encode_part(model, batches, accelerator, bar)
                    num_rows = requests.num_rows
                    seen, num_unusable = seen + num_rows, num_unusable + len(unusable)
                    for name in unusable:
                        tqdm.write(f"left out: {name}", file=sys.stderr)
                    if num_unusable > options.max_unusable_share * max(seen, MIN_SAMPLES):
                        raise ProgramError(
                            f"at most {options.max_unusable_share:.3g} of the images may be unusable "
                            f"(--max_unusable_share), got {num_unusable} of {seen}, the last one: {unusable[-1]}"
                        )
                    if rows:
                        with atomic_file(options.output_dir / "data" / f"train-{part.name}.parquet") as staging:
                            datasets.Dataset.from_list(rows, features=features).to_parquet(staging)
                    record = {**sums.state_dict(), "num_rows": num_rows, "unusable": unusable}
                    with atomic_file(record_path) as staging:
                        staging.write_text(json.dumps(record), encoding="utf-8")
                if num_rows < part.size:
                    break


def records_of_parts(output_dir: Path, dataset: Any, identity: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The records of all parts, in an order that does not depend on the processes."""
    for parts in parts_of_process(dataset, identity, 0, 1):
        for part in parts:
            record = json.loads(sums_path(output_dir, part).read_text(encoding="utf-8"))
            yield record
            if record["num_rows"] < part.size:
                break


def write_description(
    options: argparse.Namespace, dataset: Any, identity: dict[str, Any], names: list[str] | None
) -> None:
    """Merge the sums of all parts, and write the card and the statistics.

    Raises:
        ProgramError: If there is no usable image, or a statistic is not finite.
    """
    output_dir, tokenizer = options.output_dir, options.tokenizer
    total, unusable = ChannelSums(), []
    for record in records_of_parts(output_dir, dataset, identity):
        total.merge(record)
        unusable += record["unusable"]
    if not total.count:
        raise ProgramError("the dataset must hold at least one usable image, got none")
    num_rows = total.count // identity["num_tokens"]
    description = {
        **identity,
        "num_rows": num_rows,
        "num_unusable": len(unusable),
        "unusable": unusable[:1000],
        "class_names": names,
        "channels": total.statistics(),
    }
    if not math.isfinite(sum(map(sum, (channel["mean"] for channel in description["channels"].values())))):
        raise ProgramError("the statistics of the channels must be finite, got NaN or infinity")
    write_card(output_dir / "README.md", tokenizer, description)
    with atomic_file(output_dir / STATISTICS) as staging:
        staging.write_text(json.dumps(description, indent=1), encoding="utf-8")
    print(f"{num_rows} images as tokens in {output_dir}")


if __name__ == "__main__":
    raise SystemExit(run_program(main))
