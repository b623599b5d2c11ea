# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""The loop that all training programs share: steps, schedule, average, checkpoints, resuming, logging, validation.

A program describes what it trains as a `TrainingTask` and calls `run_training`. The state of a run is its step, the
number of batches it has consumed and the seconds it has trained; batch n is a pure function of the seed and n (see
`training.data`), so a resumed run does what the uninterrupted one would have done.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shutil
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, ProjectConfiguration, broadcast, set_seed
from tqdm.auto import tqdm

from pipelines.shared.outputs import atomic_directory
from pipelines.shared.programs import ProgramError
from training.data import close_loader
from training.ema import ExponentialMovingAverage
from training.options import save_options
from training.records import MetricLog, plot_metrics, read_metrics, training_card

REPEAT_SECONDS = 2.0
TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class TrainingTask(ABC):
    """What is trained: a module that maps a batch to its losses, the batches, and how to judge and keep the result."""

    name: str
    module: torch.nn.Module
    """`module(batch)` returns a dict of scalars; "loss" is minimised, all are logged."""

    @abstractmethod
    def loader(self, first_batch: int, accelerator: Accelerator) -> Iterable[dict[str, torch.Tensor]]:
        """This process's endless batches from number `first_batch` on."""

    @abstractmethod
    def validate(self, step: int, directory: Path) -> dict[str, float]:
        """Measure `module` (it is in evaluation mode and on its device); may write pictures into `directory`."""

    @abstractmethod
    def save(self, directory: Path, dtype: torch.dtype) -> None:
        """Write the trained model in Hugging Face's format, weights stored as `dtype`."""

    def describe(self) -> dict[str, Any]:
        """Sections beside the options in the record of the run, such as the model's configuration."""
        return {}


@dataclass
class RunState:
    """How far a run is; saved with every checkpoint."""

    step: int = 0
    batches: int = 0
    num_images: int = 0
    elapsed_seconds: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for field in fields(self):
            setattr(self, field.name, state[field.name])


def run_progress(
    step: int, elapsed_seconds: float, max_train_steps: int | None, max_train_minutes: float | None
) -> float:
    """How much of the run is over, in [0, 1]: by steps or by time, whichever is further on."""
    by_steps = step / max_train_steps if max_train_steps else 0.0
    by_time = elapsed_seconds / (60 * max_train_minutes) if max_train_minutes else 0.0
    return min(1.0, max(by_steps, by_time))


def learning_rate_factor(schedule: str, step: int, progress: float, warmup_steps: int, final_ratio: float) -> float:
    """The learning rate over its peak.

    "constant" ignores the warmup; the others rise linearly over `warmup_steps`, then "constant_with_warmup" stays,
    "linear" and "cosine" fall to `final_ratio` as `progress` goes from 0 to 1.
    """
    if schedule == "constant":
        return 1.0
    warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    if schedule == "constant_with_warmup":
        return warmup
    if schedule == "linear":
        decay = 1 - progress
    elif schedule == "cosine":
        decay = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        raise ValueError(f"expected constant, constant_with_warmup, linear or cosine, got {schedule!r}")
    return warmup * (final_ratio + (1 - final_ratio) * decay)


class StopRequest:
    """Turns the first Ctrl-C or SIGTERM into a request that the loop answers with a checkpoint.

    A later one interrupts. One that follows at once does not: a launcher passes on the Ctrl-C that the terminal has
    sent to its children already.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.received = 0.0

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        def on_signal(signum: int, frame: Any) -> None:
            if self.signal is None:
                self.signal, self.received = signum, time.monotonic()
            elif time.monotonic() - self.received > REPEAT_SECONDS:
                raise KeyboardInterrupt

        try:
            previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: signals go elsewhere
            previous = {}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


# ----------------------------------------------------------------------------------------------------- checkpoints


def checkpoints_of(output_dir: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = [
        (int(match[1]), path) for path in output_dir.glob("checkpoint-*") if (match := _STEP.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found)]


_STEP = re.compile(r"checkpoint-(\d+)")


def checkpoint_to_resume(output_dir: Path, choice: str) -> Path | None:
    """What `--resume_from_checkpoint` means.

    Raises:
        ProgramError: the folder is no checkpoint, or 'none' is asked for where checkpoints would be overwritten.
    """
    existing = checkpoints_of(output_dir)
    if choice == "latest":
        return existing[-1] if existing else None
    if choice == "none":
        if existing:
            raise ProgramError(f"{output_dir} holds checkpoints of an earlier run; resume it or take another folder")
        return None
    path = Path(choice)
    if not path.is_dir() and (output_dir / choice).is_dir():
        path = output_dir / choice
    if not any(path.glob("random_states_*")):
        raise ProgramError(f"no checkpoint of a training run at {choice}")
    return path


def save_checkpoint(accelerator: Accelerator, output_dir: Path, step: int, total_limit: int) -> Path:
    """Write checkpoint-{step}; it has that name only once it is whole. Runs on all processes."""
    path = output_dir / f"checkpoint-{step}"
    staging = output_dir / f".checkpoint-{step}.partial"
    if accelerator.is_main_process:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(staging))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if path.exists():  # left by a run that was resumed from an earlier checkpoint
            shutil.rmtree(path)
        staging.rename(path)
        for old in checkpoints_of(output_dir)[:-total_limit]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return path


# ------------------------------------------------------------------------------------------------------------ loop


class Meter:
    """Means of scalars that stay on their device until they are read."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.count = 0

    def add(self, values: dict[str, torch.Tensor]) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums[name] + value.detach() if name in self.sums else value.detach().clone()
        self.count += 1

    def read(self) -> dict[str, float]:
        means = {name: value.item() / self.count for name, value in self.sums.items()}
        self.sums, self.count = {}, 0
        return means


def make_accelerator(options: argparse.Namespace) -> Accelerator:
    """The accelerator that the options describe; with it the seed, the threads and TF32 are set."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    accelerator = Accelerator(
        mixed_precision=options.mixed_precision,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        log_with=None if options.report_to == "none" else options.report_to,
        project_config=ProjectConfiguration(str(options.output_dir), logging_dir=str(options.output_dir / "logs")),
    )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ProgramError(
            f"expected one process or data-parallel ones, got {accelerator.distributed_type.value}: the averaged and "
            "the final weights are not gathered from shards"
        )
    set_seed(options.seed)
    return accelerator


def make_optimizer(module: torch.nn.Module, options: argparse.Namespace) -> torch.optim.Optimizer:
    """AdamW (Adam without weight decay); biases, norms and embeddings of one dimension are not decayed."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": options.adam_weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=options.learning_rate,
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_epsilon,
        fused=all(parameter.device.type in ("cpu", "cuda") for parameter in parameters),
    )


def run_training(options: argparse.Namespace, make_task: Callable[[Accelerator], TrainingTask]) -> int:
    """Train until the options say that it is over, and save the result in `output_dir/model`.

    Returns:
        0 when the run is complete; 128 + the signal's number when it was asked to stop, with a checkpoint written.

    Raises:
        ProgramError: bad options, or a loss that is not finite.
    """
    output_dir: Path = options.output_dir
    resume = checkpoint_to_resume(output_dir, options.resume_from_checkpoint)
    accelerator = make_accelerator(options)
    task = make_task(accelerator)
    output_dir.mkdir(parents=True, exist_ok=True)
    # From here on the processes draw different numbers, and others than the weights were made of.
    set_seed(options.seed + 1, device_specific=True)

    ema = ExponentialMovingAverage(task.module, options.ema_decay) if options.use_ema else None
    # Prepared before the optimizer is made, so that the fused update sees the parameters where they will be.
    module = accelerator.prepare(task.module)
    optimizer = accelerator.prepare(make_optimizer(module, options))
    state = RunState()
    accelerator.register_for_checkpointing(state)
    if ema is not None:
        ema.shadow = {name: value.to(accelerator.device) for name, value in ema.shadow.items()}
        accelerator.register_for_checkpointing(ema)
    if resume is not None:
        _load_checkpoint(accelerator, resume)
        accelerator.print(f"resuming at step {state.step} from {resume}")
    run = _Run(options, accelerator, task, module, optimizer, ema, state)
    with StopRequest().listening() as stop:
        finished = run.train(stop)
    if not finished:
        accelerator.print(f"stopped at step {state.step}, checkpoint written; the same command goes on from there")
        accelerator.end_training()
        return 128 + (stop.signal or signal.SIGTERM)
    run.finish()
    accelerator.end_training()
    return 0


def _load_checkpoint(accelerator: Accelerator, path: Path) -> None:
    try:
        accelerator.load_state(str(path))
    except (RuntimeError, ValueError, KeyError) as error:
        raise ProgramError(
            f"{path} does not fit this run (was the model's configuration changed?): {error}"
        ) from error


class _Run:
    """The parts of one run in one place, for `run_training` alone."""

    def __init__(
        self,
        options: argparse.Namespace,
        accelerator: Accelerator,
        task: TrainingTask,
        module: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        ema: ExponentialMovingAverage | None,
        state: RunState,
    ) -> None:
        self.options, self.accelerator, self.task = options, accelerator, task
        self.module, self.optimizer, self.ema, self.state = module, optimizer, ema, state
        self.output_dir: Path = options.output_dir
        self.clock = time.monotonic()
        self.elapsed_before = state.elapsed_seconds
        self.validated_step = -1
        self.saved_step = state.step  # 0 or what was resumed
        self.last_values: dict[str, torch.Tensor] = {}
        self.log: MetricLog | None = None
        if accelerator.is_main_process:
            save_options(self.output_dir / "training_config.yaml", options, **task.describe())
            self.log = MetricLog(self.output_dir / "metrics.jsonl", state.step)
        if options.report_to != "none":
            plain = {k: v for k, v in vars(options).items() if isinstance(v, bool | int | float | str)}
            accelerator.init_trackers(task.name, config=plain)

    def train(self, stop: StopRequest) -> bool:
        """Take steps until the end of the run (True) or until a stop is requested (False)."""
        options, state = self.options, self.state
        meter, window_start, window_images = Meter(), time.monotonic(), 0
        self.module.train()
        with self._bar() as bar, self._batches() as loader:
            while (progress := self._progress()) < 1:
                factor = learning_rate_factor(
                    options.lr_scheduler, state.step, progress, options.lr_warmup_steps, options.lr_final_ratio
                )
                for group in self.optimizer.param_groups:
                    group["lr"] = options.learning_rate * factor
                values, num_images = self._step(loader)
                meter.add(values)
                window_images += num_images
                if state.step % options.logging_steps == 0:
                    means = meter.read()
                    self._check_finite(means)
                    now = time.monotonic()
                    rate = window_images / (now - window_start)
                    window_start, window_images = now, 0
                    self._write(
                        {
                            **{f"train/{name}": value for name, value in means.items()},
                            "train/learning_rate": options.learning_rate * factor,
                            "train/images_per_s": rate,
                        }
                    )
                    bar.set_postfix(step=state.step, loss=f"{means['loss']:.4f}", img_s=f"{rate:.1f}", refresh=False)
                self._advance(bar)
                if state.step % options.validation_steps == 0:
                    paused = time.monotonic()
                    self.validate(bar)
                    window_start += time.monotonic() - paused
                if self._asked_to_stop(stop):
                    self.checkpoint()
                    return False
                if state.step % options.checkpointing_steps == 0:
                    self.checkpoint()
        return True

    @contextmanager
    def _batches(self) -> Iterator[Iterator[dict[str, torch.Tensor]]]:
        loader = iter(self.task.loader(self.state.batches, self.accelerator))
        try:
            yield loader
        finally:
            close_loader(loader)

    def _step(self, loader: Iterator[dict[str, torch.Tensor]]) -> tuple[dict[str, torch.Tensor], int]:
        """One optimizer step over its micro-batches: the mean of their losses, and the images in them."""
        meter, num_images = Meter(), 0
        parameters = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        for _ in range(self.options.gradient_accumulation_steps):
            batch = {
                name: value.to(self.accelerator.device, non_blocking=True) for name, value in next(loader).items()
            }
            with self.accelerator.accumulate(self.module):
                values = self.module(batch)
                self.accelerator.backward(values["loss"])
                if self.accelerator.sync_gradients:
                    norm = self.accelerator.clip_grad_norm_(parameters, self.options.max_grad_norm)
                    values = {**values, "gradient_norm": norm}
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
            meter.add({name: value for name, value in values.items() if name != "gradient_norm"})
            num_images += len(next(iter(batch.values()))) * self.accelerator.num_processes
            self.state.batches += 1
        if self.ema is not None:
            self.ema.update(self.accelerator.unwrap_model(self.module))
        self.state.step += 1
        self.state.num_images += num_images
        means = {name: value / meter.count for name, value in meter.sums.items()}
        self.last_values = {**means, "gradient_norm": torch.as_tensor(norm)}
        return self.last_values, num_images

    def _progress(self) -> float:
        """The run's progress, the same number on all processes; moves the run's clock on."""
        elapsed = self.elapsed_before + time.monotonic() - self.clock
        if self.options.max_train_minutes and self.accelerator.num_processes > 1:
            elapsed = broadcast(torch.tensor(elapsed, device=self.accelerator.device)).item()
        self.state.elapsed_seconds = elapsed
        return run_progress(self.state.step, elapsed, self.options.max_train_steps, self.options.max_train_minutes)

    def _asked_to_stop(self, stop: StopRequest) -> bool:
        if self.accelerator.num_processes == 1:
            return stop.signal is not None
        if stop.signal is not None:
            self.accelerator.set_trigger()
        return self.accelerator.check_trigger()

    def _check_finite(self, values: dict[str, float]) -> None:
        """Refuse to go on with, and above all to save, what a NaN has gone through."""
        # With float16 an infinite gradient is normal: its scaler leaves that step out.
        names = ("loss",) if self.options.mixed_precision == "fp16" else ("loss", "gradient_norm")
        for name in names:
            if not math.isfinite(values[name]):
                raise ProgramError(
                    f"{name} is {values[name]} at step {self.state.step}; lower the learning rate or raise the "
                    f"precision and resume from the last checkpoint in {self.output_dir}"
                )

    def _bar(self) -> tqdm:
        """Counts steps, or seconds when time may end the run; quiet in log files."""
        options = self.options
        by_time = options.max_train_minutes is not None
        return tqdm(
            total=round(60 * options.max_train_minutes) if by_time else options.max_train_steps,
            initial=round(self.state.elapsed_seconds) if by_time else self.state.step,
            unit="s" if by_time else "step",
            desc=self.task.name,
            disable=not self.accelerator.is_main_process,
            mininterval=0.5 if sys.stderr.isatty() else 60,
            bar_format="{desc} {percentage:3.0f}%|{bar:20}| {n:.0f}/{total} {unit} [{elapsed}<{remaining}{postfix}]",
        )

    def _advance(self, bar: tqdm) -> None:
        now = self.state.step
        if self.options.max_train_minutes is not None:
            now = min(bar.total, round(self.elapsed_before + time.monotonic() - self.clock))
        bar.update(now - bar.n)

    def _write(self, values: dict[str, float]) -> None:
        if self.log is not None:
            self.log.write(self.state.step, values)
        self.accelerator.log(values, step=self.state.step)

    def averaged(self) -> Any:
        """A context in which the task's module holds the averaged weights, when there are any."""
        module = self.accelerator.unwrap_model(self.module)
        return self.ema.applied_to(module) if self.ema is not None else nullcontext()

    def validate(self, bar: tqdm | None = None) -> None:
        """Measure the (averaged) model; once per step, on the main process."""
        if self.validated_step == self.state.step:
            return
        self.validated_step = self.state.step
        if self.accelerator.is_main_process:
            self.module.eval()
            with self.averaged(), torch.no_grad():
                values = self.task.validate(self.state.step, self.output_dir)
            self.module.train()
            self._write({f"validation/{name}": value for name, value in values.items()})
            line = f"step {self.state.step}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            line += f" after {self.state.elapsed_seconds / 60:.1f} min, {self.state.num_images} images"
            tqdm.write(line, file=sys.stderr)
        self.accelerator.wait_for_everyone()

    def checkpoint(self) -> None:
        """Save the state of the run, unless this step's is saved already."""
        if self.saved_step == self.state.step:
            return
        self._check_finite({name: value.item() for name, value in self.last_values.items()})
        self.saved_step = self.state.step
        self.state.elapsed_seconds = self.elapsed_before + time.monotonic() - self.clock
        save_checkpoint(self.accelerator, self.output_dir, self.state.step, self.options.checkpoints_total_limit)

    def finish(self) -> None:
        """The last validation, checkpoint, curves and the model itself."""
        self.validate()
        self.checkpoint()
        if not self.accelerator.is_main_process:
            return
        plot_metrics(read_metrics(self.output_dir / "metrics.jsonl"), self.output_dir / "curves.png")
        final = self.output_dir / "model"
        with self.averaged(), atomic_directory(final, overwrite=True) as staging:
            self.task.save(staging, TORCH_DTYPES[self.options.save_dtype])
            card = training_card(self.task.name, final.parent.name, self.state, self.output_dir / "metrics.jsonl")
            (staging / "README.md").write_text(card, encoding="utf-8")
        self.accelerator.print(f"saved {final}")
        if self.options.push_to_hub:
            push_folder(final, self.options.hub_model_id or self.output_dir.name, private=self.options.hub_private)


def push_folder(folder: Path, repo_id: str, private: bool) -> str:
    """Upload a saved model; returns the repository's id."""
    from huggingface_hub import HfApi

    api = HfApi()
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    api.upload_folder(repo_id=repo_id, folder_path=os.fspath(folder), commit_message="Upload the trained model")
    return repo_id
