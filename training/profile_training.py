# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Where the time of a training step goes: data, partition, forward, backward, optimizer, in milliseconds an image.

    python -m training.profile_training --config training/presets/m128.yaml --train_data_files images.parquet

It takes the options of `training.train_tokenizer` and trains for `--profile_steps` steps, of which nothing is saved.
Data (reading, decoding, cropping) and partition are what one worker needs; the workers share them. "waiting" is how
long the model waits for a batch that the workers have not finished. Without a dataset it makes pictures of its own.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from tqdm.auto import tqdm

from pipelines.shared.outputs import atomic_directory
from pipelines.shared.programs import non_negative_int, run_program
from pipelines.shared.programs import positive_int as positive
from training import data
from training.ema import ExponentialMovingAverage
from training.loop import make_accelerator
from training.optimization import make_optimizer
from training.options import describe_options, parse_options
from training.tokenizer_task import Sizes, TokenizerTask, resolve_config
from training.tokenizer_task import make_parser as make_tokenizer_parser

PROGRAM = "training.profile_training"
IN_WORKERS = ("data", "partition")
IN_STEP = ("waiting", "forward", "backward", "optimizer")


def make_parser() -> argparse.ArgumentParser:
    """The parser of this program: that of train_tokenizer and three more options."""
    parser = make_tokenizer_parser("profile_training")
    group = parser.add_argument_group("profile")
    group.add_argument("--profile_steps", type=positive, default=20)
    group.add_argument("--warmup_steps", type=non_negative_int, default=3, help="not counted")
    group.add_argument(
        "--at_step", type=non_negative_int, default=0, help="of the recipe, which says the losses in use"
    )
    return parser


class Stopwatch:
    """Seconds by name. On a GPU the queue is emptied before each look at the clock."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self.is_cuda = device.type == "cuda"

    def now(self) -> float:
        """The time, once everything queued is done."""
        if self.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the duration of the block to `name`."""
        start = self.now()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + self.now() - start


def write_pictures(path: Path, count: int) -> None:
    """A parquet file of JPEGs of 500 x 375 pixels with structures of all sizes."""
    import datasets

    rng = np.random.default_rng(0)
    rows = []
    for index in range(count):
        pixels = np.zeros((375, 500, 3))
        for cells in (3, 9, 27, 81):
            coarse = Image.fromarray(rng.integers(0, 255, (cells, cells, 3), dtype=np.uint8))
            pixels += np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC)) / 4
        buffer = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(buffer, format="JPEG", quality=90)
        rows.append({"image": {"bytes": buffer.getvalue(), "path": None}, "label": index % 10})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_list(rows, features=features).to_parquet(path)


def measure_workers(task: TokenizerTask, accelerator: Accelerator, num_batches: int) -> dict[str, float]:
    """Seconds an image that one worker needs for data and for partition."""
    watch = Stopwatch(torch.device("cpu"))
    partition = data.partitioned_batch
    inside = 0.0

    def timed(*arguments: Any) -> dict[str, torch.Tensor]:
        nonlocal inside
        start = time.perf_counter()
        batch = partition(*arguments)
        inside += time.perf_counter() - start
        return batch

    batches, plan = task.batches(0, accelerator)
    requests = [request for request, _ in zip(plan, range(num_batches + 1))]
    batches[requests[0]]  # compiles
    data.partitioned_batch = timed  # type: ignore[assignment]
    try:
        with watch.part("data"):
            count = sum(len(batches[request]["pixel_values"]) for request in requests[1:])
    finally:
        data.partitioned_batch = partition
    return {"data": (watch.seconds["data"] - inside) / count, "partition": inside / count}


def measure_steps(task: TokenizerTask, accelerator: Accelerator, options: argparse.Namespace) -> dict[str, float]:
    """Seconds an image of the parts of a step, "images_per_s" and "images"."""
    modules = {name: accelerator.prepare(module) for name, module in task.modules.items()}
    optimizers = {name: make_optimizer(m, options, task.learning_rate(name, options)) for name, m in modules.items()}
    average = ExponentialMovingAverage(task.modules["model"], options.ema_decay) if options.use_ema else None
    watch, count, start = Stopwatch(accelerator.device), 0, 0.0
    total = options.warmup_steps + options.profile_steps
    with data.batches_of(task.loader(0, accelerator)) as batches, tqdm(total=total, unit="step", mininterval=2) as bar:
        for number in range(total):
            if number == options.warmup_steps:
                watch, count, start = Stopwatch(accelerator.device), 0, watch.now()
            turn = task.turn(options.at_step + number)
            with watch.part("waiting"):
                batch = {
                    name: value.to(accelerator.device) for name, value in next(batches).items() if name != "unusable"
                }
            with watch.part("forward"):
                loss, _ = task.losses(modules, batch, options.at_step + number)
            with watch.part("backward"):
                accelerator.backward(loss)
            with watch.part("optimizer"):
                torch.nn.utils.clip_grad_norm_(modules[turn].parameters(), options.max_grad_norm)
                optimizers[turn].step()
                optimizers[turn].zero_grad(set_to_none=True)
                if average is not None and turn == "model":
                    average.update(task.modules["model"])
            count += len(batch["pixel_values"])
            bar.update()
        seconds = watch.now() - start
    return {
        **{name: value / count for name, value in watch.seconds.items()},
        "images_per_s": count / seconds,
        "images": count,
    }


def summary(result: dict[str, Any]) -> str:
    """The result as a table in Markdown."""
    step = sum(result[name] for name in IN_STEP)
    lines = [f"{result['images_per_s']:.2f} images/s", "", "| part | ms an image | share of a step |", "|---|---|---|"]
    lines += [f"| {name} (one worker) | {1000 * result[name]:.2f} | |" for name in IN_WORKERS]
    lines += [f"| {name} | {1000 * result[name]:.2f} | {100 * result[name] / step:.1f} % |" for name in IN_STEP]
    supply = sum(result[name] for name in IN_WORKERS) / max(1, result["num_workers"])
    demand = step - result["waiting"]
    verdict = "waits" if supply > demand or not result["num_workers"] else "does not wait"
    lines += ["", f"{result['num_workers']} workers make an image in {1000 * supply:.2f} ms,"]
    lines += [f"the model takes {1000 * demand:.2f} ms: it {verdict} for them."]
    return "\n".join(lines)


def draw(result: dict[str, Any], path: Path) -> None:
    """One bar for a worker and one for a step, cut into their parts."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.6), layout="constrained")
    axes = figure.add_subplot()
    for row, names in enumerate((IN_STEP, IN_WORKERS)):
        left = 0.0
        for name in names:
            width = 1000 * result[name]
            axes.barh(row, width, left=left, label=name)
            left += width
    axes.set_yticks([0, 1], ["step", "one worker"])
    axes.set_xlabel("milliseconds an image")
    axes.set_title(
        f"{result['images_per_s']:.2f} images/s, {result['resolution']} x {result['resolution']}, {result['device']}"
    )
    axes.legend(ncols=6, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.25), frameon=False)
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    options = parse_options(make_parser(), argv)
    config = resolve_config(options)
    if options.dry_run:
        print(describe_options(options, model_config=config.to_diff_dict()), end="")
        return 0
    sizes = Sizes.of(options, config)
    output, options.report_to = options.output_dir, "none"
    options.output_dir = output or Path()
    options.num_validation_images = 1
    with tempfile.TemporaryDirectory() as folder:
        made = not (options.dataset_name or options.train_data_files or options.train_data_dir)
        if made:
            options.train_data_files = [str(Path(folder) / "pictures.parquet")]
            options.cache_dir = folder
            write_pictures(Path(options.train_data_files[0]), 65)
        accelerator = make_accelerator(options)
        task = TokenizerTask(options, config, accelerator)
        result: dict[str, Any] = {
            **measure_workers(task, accelerator, min(options.profile_steps, 5)),
            **measure_steps(task, accelerator, options),
            "num_workers": options.dataloader_num_workers,
            "resolution": sizes.resolution,
            "device": torch.cuda.get_device_name() if accelerator.device.type == "cuda" else "CPU",
            "threads": torch.get_num_threads(),
            "pictures": "made for this purpose" if made else "of the dataset",
        }
    text = summary(result)
    print(text)
    if output is not None:
        with atomic_directory(output, overwrite=True, program=PROGRAM) as staging:
            (staging / "profile.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            (staging / "profile.md").write_text(text + "\n", encoding="utf-8")
            draw(result, staging / "profile.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_program(main))
