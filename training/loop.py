# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""The loop of all training programs: steps, schedule, weight average, checkpoints, resuming, logging, validation.

A program describes what it trains as a `TrainingTask` and calls `run_training`. The state of a run is its step, the
number of batches it has consumed and the seconds it has trained. Batch n is a pure function of the seed and n (see
`training.data`), so a resumed run does the same as an uninterrupted one.
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, ProjectConfiguration, broadcast, broadcast_object_list, set_seed
from tqdm.auto import tqdm

from pipelines.shared.programs import ProgramError
from pipelines.shared.publishing import push_folder
from training.checkpoints import RunState, choose_checkpoint, load_checkpoint, save_checkpoint
from training.data import batches_of
from training.ema import ExponentialMovingAverage
from training.optimization import learning_rate_factor, make_optimizer, run_progress
from training.options import save_options
from training.records import MetricLog, plot_metrics, read_metrics, training_card
from training.run_folder import check_replaceable, claimed_folder, replaced_folder, writing

TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# What a run writes into its folder, beside `model`.
OUTPUTS = ("training_config.yaml", "metrics.jsonl", "curves.png", "checkpoint-*", "images/step-*.png")


class TrainingTask(ABC):
    """What is trained: the modules, their losses, the batches, and how to validate and save the result."""

    name: str
    modules: dict[str, torch.nn.Module]
    """By name. "model" is averaged, validated and saved; other modules are trained in turns with it."""

    def turn(self, step: int) -> str:
        """The module that is trained at this step (0-based)."""
        return "model"

    def learning_rate(self, name: str, options: argparse.Namespace) -> float:
        """The peak learning rate of a module."""
        return options.learning_rate

    @abstractmethod
    def loader(self, first_batch: int, accelerator: Accelerator) -> Iterable[dict[str, torch.Tensor]]:
        """The endless batches of this process, starting with number `first_batch`."""

    @abstractmethod
    def losses(
        self, modules: dict[str, torch.nn.Module], batch: dict[str, torch.Tensor], step: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """What the module of this turn minimises, and scalars to log.

        Args:
            modules (`dict[str, torch.nn.Module]`): `self.modules` as accelerate has wrapped them.
            batch (`dict[str, torch.Tensor]`): One of the loader's, on the right device.
            step (`int`): Number of finished steps.
        """

    @abstractmethod
    def validate(self, step: int, directory: Path) -> dict[str, float]:
        """Measure the model, which is in evaluation mode and on its device; may write pictures into `directory`."""

    @abstractmethod
    def save(self, directory: Path, dtype: torch.dtype) -> None:
        """Write the trained model in the format of Hugging Face, its weights stored as `dtype`."""

    def describe(self) -> dict[str, Any]:
        """Sections for the record of the run beside the options, such as the model's configuration."""
        return {}


class StopRequest:
    """Turns the first SIGINT or SIGTERM into a request for a checkpoint and a clean end. A second one ends at once."""

    signal: int | None = None

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Listen for the length of the block."""

        def on_signal(number: int, frame: Any) -> None:
            if self.signal is not None:
                raise KeyboardInterrupt
            self.signal = number

        previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


class Meter:
    """Scalars of the steps since the last reset. They stay on their device until they are read."""

    def __init__(self) -> None:
        self.history: dict[str, list[tuple[int, torch.Tensor]]] = {}

    def add(self, step: int, values: dict[str, torch.Tensor]) -> None:
        """Note the scalars of one step."""
        for name, value in values.items():
            self.history.setdefault(name, []).append((step, value.detach().float()))

    def read(self, accelerator: Accelerator) -> dict[str, list[tuple[int, float]]]:
        """`(step, mean over the processes)` of every scalar. All processes must call it."""
        means = {
            name: accelerator.reduce(torch.stack([value for _, value in entries]), reduction="mean").tolist()
            for name, entries in self.history.items()
        }
        return {name: [(step, mean) for (step, _), mean in zip(self.history[name], means[name])] for name in means}

    def reset(self) -> None:
        """Forget everything."""
        self.history = {}


def make_accelerator(options: argparse.Namespace) -> Accelerator:
    """The accelerator for the options. Also sets the seed, the number of threads and TF32.

    Raises:
        ProgramError: If accelerate is configured for sharded training.
    """
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
            "the distributed type must be one process or data parallel, because weights are not gathered from "
            f"shards, got {accelerator.distributed_type.value}"
        )
    set_seed(options.seed)
    return accelerator


def run_training(options: argparse.Namespace, make_task: Callable[[Accelerator], TrainingTask], program: str) -> int:
    """Train until the end that the options give, and save the result in `output_dir/model`.

    Args:
        options (`argparse.Namespace`): Those of `add_run_options` and `add_optimizer_options`.
        make_task (`Callable[[Accelerator], TrainingTask]`): Called once the folder is known to be free.
        program (`str`): Name of the program, such as "training.train_sit"; it marks the output folder.

    Returns:
        `int`: 0 if the run is complete; 128 + the number of the signal if it was stopped, with a checkpoint.

    Raises:
        ProgramError: If the options are bad, the folder is in use or not ours, or a loss is not finite.
    """
    output_dir: Path = options.output_dir
    accelerator = make_accelerator(options)
    with claimed_folder(output_dir, program, (*OUTPUTS, "model")) if accelerator.is_main_process else nullcontext():
        resume: list[Path | None] = [None]
        if accelerator.is_main_process:
            check_replaceable(output_dir / "model", program)
            resume[0], notes = choose_checkpoint(output_dir, options.resume_from_checkpoint)
            for note in notes:
                print(note, file=sys.stderr)
        broadcast_object_list(resume)
        task = make_task(accelerator)
        # From here on each process has its own random stream, separate from initialisation.
        set_seed(options.seed + 1, device_specific=True)
        run = _Run(options, accelerator, task, resume[0], program)
        with StopRequest().listening() as stop:
            finished = run.train(stop)
        if finished:
            run.finish()
        accelerator.end_training()
    if finished:
        return 0
    accelerator.print(f"stopped at step {run.state.step} with a checkpoint; the same command resumes")
    return 128 + (stop.signal or signal.SIGTERM)


class _Run:
    """The state of `run_training`."""

    def __init__(
        self,
        options: argparse.Namespace,
        accelerator: Accelerator,
        task: TrainingTask,
        resume: Path | None,
        program: str,
    ) -> None:
        self.options, self.accelerator, self.task, self.program = options, accelerator, task, program
        self.output_dir: Path = options.output_dir
        self.peak_rates = {name: task.learning_rate(name, options) for name in task.modules}
        # Prepared before the optimizers are made, so that a fused update sees the parameters on their device.
        self.modules = {name: accelerator.prepare(module) for name, module in task.modules.items()}
        self.optimizers = {
            name: accelerator.prepare(make_optimizer(module, options, self.peak_rates[name]))
            for name, module in self.modules.items()
        }
        self.average: ExponentialMovingAverage | None = None
        if options.use_ema:
            self.average = ExponentialMovingAverage(task.modules["model"], options.ema_decay)
            self.average.to(accelerator.device)
        self.state = RunState()
        if resume is not None:
            load_checkpoint(accelerator, resume, self.state, self.average)
            accelerator.print(f"resuming at step {self.state.step} from {resume}")
        self.last_checkpoint = resume
        self.clock = time.monotonic()
        self.elapsed_before = self.state.elapsed_seconds
        self.validated_step = -1
        self.saved_step = self.state.step
        self.meter = Meter()
        self.log: MetricLog | None = None
        if accelerator.is_main_process:
            save_options(self.output_dir / "training_config.yaml", options, **task.describe())
            self.log = MetricLog(self.output_dir / "metrics.jsonl", self.state.step)
        if options.report_to != "none":
            plain = {k: v for k, v in vars(options).items() if isinstance(v, bool | int | float | str)}
            accelerator.init_trackers(task.name, config=plain)

    def train(self, stop: StopRequest) -> bool:
        """Take steps until the end of the run (True) or until a stop is requested (False)."""
        options, state = self.options, self.state
        window_start, window_images = time.monotonic(), state.num_images
        self.modules["model"].train()
        with self._bar() as bar, batches_of(self.task.loader(state.batches, self.accelerator)) as batches:
            while (progress := self._progress()) < 1:
                factor = learning_rate_factor(
                    options.lr_scheduler, state.step, progress, options.lr_warmup_steps, options.lr_final_ratio
                )
                self._step(batches, factor)
                if state.step % options.logging_steps == 0:
                    means = self._checked_means()
                    self.meter.reset()
                    now = time.monotonic()
                    rate = (state.num_images - window_images) / (now - window_start)
                    window_start, window_images = now, state.num_images
                    self._write(
                        {
                            **{f"train/{name}": value for name, value in means.items()},
                            "train/learning_rate": options.learning_rate * factor,
                            "train/images_per_s": rate,
                        }
                    )
                    bar.set_postfix(step=state.step, img_s=f"{rate:.1f}", refresh=False)
                self._advance(bar)
                if state.step % options.validation_steps == 0:
                    paused = time.monotonic()
                    self.validate()
                    window_start += time.monotonic() - paused
                if self._asked_to_stop(stop):
                    self.checkpoint()
                    return False
                if state.step % options.checkpointing_steps == 0:
                    self.checkpoint()
        return True

    def _step(self, batches: Iterator[dict[str, torch.Tensor]], rate_factor: float) -> None:
        """One optimizer step of the module whose turn it is, over its micro-batches."""
        turn = self.task.turn(self.state.step)
        module, optimizer = self.modules[turn], self.optimizers[turn]
        for group in optimizer.param_groups:
            group["lr"] = self.peak_rates[turn] * rate_factor
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        count = self.options.gradient_accumulation_steps
        means: dict[str, torch.Tensor] = {}
        for _ in range(count):
            batch = {
                name: value.to(self.accelerator.device, non_blocking=True) for name, value in next(batches).items()
            }
            with self.accelerator.accumulate(module):
                loss, values = self.task.losses(self.modules, batch, self.state.step)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    norm = self.accelerator.clip_grad_norm_(parameters, self.options.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            for name, value in values.items():
                means[name] = means.get(name, 0) + value.detach() / count
            self.state.num_images += len(next(iter(batch.values()))) * self.accelerator.num_processes
            self.state.batches += 1
        if self.average is not None and turn == "model":
            self.average.update(self.task.modules["model"])
        self.state.step += 1
        prefix = "" if turn == "model" else f"{turn}_"
        self.meter.add(self.state.step, {**means, f"{prefix}gradient_norm": torch.as_tensor(norm)})

    def _progress(self) -> float:
        """The progress of the run, the same on all processes. Also updates the run's elapsed time."""
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

    def _checked_means(self) -> dict[str, float]:
        """Means of the scalars since the last log line.

        Raises:
            ProgramError: If a loss or a gradient is not finite. The state then contains NaN and must not be saved.
        """
        history = self.meter.read(self.accelerator)
        # With float16 infinite gradients are normal. The loss scaler skips their steps.
        suffixes = ("loss",) if self.options.mixed_precision == "fp16" else ("loss", "gradient_norm")
        bad = [
            (step, name, value)
            for name, entries in history.items()
            if name.endswith(suffixes)
            for step, value in entries
            if not math.isfinite(value)
        ]
        if bad:
            step, name, value = min(bad)
            raise ProgramError(
                f"{name} is {value} at step {step}; "
                + (
                    f"the last good checkpoint is {self.last_checkpoint}"
                    if self.last_checkpoint is not None
                    else "there is no checkpoint yet"
                )
                + ": lower the learning rate or raise the precision, then give the same command"
            )
        return {name: sum(value for _, value in entries) / len(entries) for name, entries in history.items()}

    def _bar(self) -> tqdm:
        """Counts steps, or seconds if time may end the run."""
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
        """A context in which the model has the averaged weights, if there are any."""
        return self.average.applied_to(self.task.modules["model"]) if self.average is not None else nullcontext()

    def validate(self) -> None:
        """Validate the averaged model on the main process, unless this step is validated already."""
        if self.validated_step == self.state.step:
            return
        self.validated_step = self.state.step
        if self.accelerator.is_main_process:
            self.modules["model"].eval()
            with self.averaged(), torch.no_grad():
                values = self.task.validate(self.state.step, self.output_dir)
            self.modules["model"].train()
            self._write({f"validation/{name}": value for name, value in values.items()})
            line = f"step {self.state.step}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            line += f" after {self.state.elapsed_seconds / 60:.1f} min, {self.state.num_images} images"
            tqdm.write(line, file=sys.stderr)
        self.accelerator.wait_for_everyone()

    def checkpoint(self) -> None:
        """Save the state of the run, unless this step is saved already."""
        if self.saved_step == self.state.step:
            return
        self._checked_means()
        self.saved_step = self.state.step
        self.state.elapsed_seconds = self.elapsed_before + time.monotonic() - self.clock
        self.last_checkpoint = save_checkpoint(
            self.accelerator, self.output_dir, self.state, self.average, self.options.checkpoints_total_limit
        )

    def finish(self) -> None:
        """Write the last validation, the checkpoint, the curves and the model."""
        self.validate()
        self.checkpoint()
        if not self.accelerator.is_main_process:
            return
        plot_metrics(read_metrics(self.output_dir / "metrics.jsonl"), self.output_dir / "curves.png")
        model = self.output_dir / "model"
        with writing(model), self.averaged(), replaced_folder(model, self.program) as staging:
            self.task.save(staging, TORCH_DTYPES[self.options.save_dtype])
            card = training_card(self.program, self.output_dir.name, self.state, self.output_dir / "metrics.jsonl")
            (staging / "README.md").write_text(card, encoding="utf-8")
        self.accelerator.print(f"saved {model}")
        if self.options.push_to_hub:
            push_folder(
                model,
                self.options.hub_model_id or self.output_dir.name,
                private=self.options.hub_private,
                remote_code=self.options.remote_code,
            )
