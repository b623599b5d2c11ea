# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""The loop of all training programs: steps, schedule, weight average, checkpoints, resuming, logging, validation.

A program describes what it trains as a `TrainingTask` and calls `run_training`. The state of a run is its step, the
number of batches it has consumed and the seconds it has trained. Batch n is a pure function of the seed and n (see
`training.data`), so a resumed run does the same as an uninterrupted one.
"""

from __future__ import annotations

import argparse
import copy
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    ProjectConfiguration,
    broadcast,
    broadcast_object_list,
    gather_object,
    set_seed,
)
from tqdm.auto import tqdm

from pipelines.shared.outputs import atomic_directory, check_free
from pipelines.shared.programs import ProgramError
from pipelines.shared.publishing import push_folder
from training.checkpoints import RunState, choose_checkpoint, load_checkpoint, save_checkpoint
from training.data import batches_of
from training.ema import ExponentialMovingAverage
from training.optimization import learning_rate_factor, make_optimizer, run_progress
from training.options import save_options
from training.records import MetricLog, plot_metrics, read_metrics, training_card
from training.run_folder import claimed_folder, writing
from training.sharding import (
    TrainingAccelerator,
    compute_in_mixed_precision,
    gathered_by_deepspeed,
    shard_model,
    take_fsdp_request,
    whole,
)
from training.task import StopRequest, TrainingTask
from training.trackers import Meter, chosen_trackers, log_pictures, start_trackers

TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# What a run writes into its folder, beside `model`.
OUTPUTS = (
    *("training_config.yaml", "metrics.jsonl", "unusable.jsonl", "statistics.json", "curves.png"),
    *("checkpoint-*", "images/step-*.png"),
)
# Fewer samples count as so many in the share of unusable ones.
MIN_SAMPLES = 100


def make_accelerator(options: argparse.Namespace) -> TrainingAccelerator:
    """The accelerator for the options. Also sets the seed, the number of threads and TF32.

    Raises:
        ProgramError: If a package that the options or accelerate's configuration need is missing.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    accelerator = TrainingAccelerator(
        *(options.train_batch_size, options.gradient_accumulation_steps, options.max_grad_norm),
        options.mixed_precision,
        log_with=chosen_trackers(options.report_to) or None,
        project_config=ProjectConfiguration(str(options.output_dir), logging_dir=str(options.output_dir / "logs")),
    )
    if accelerator.with_deepspeed and options.mixed_precision == "fp16":
        raise ProgramError("--mixed_precision must be no or bf16 with DeepSpeed, got fp16")
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
    is_fsdp = take_fsdp_request()
    if is_fsdp and options.mixed_precision == "fp16":
        raise ProgramError("--mixed_precision must be no or bf16 with FSDP, got fp16")
    accelerator = make_accelerator(options)
    with claimed_folder(output_dir, program, (*OUTPUTS, "model")) if accelerator.is_main_process else nullcontext():
        resume: list[Path | None] = [None]
        if accelerator.is_main_process:
            check_free(output_dir / "model", overwrite=True, program=program)
            resume[0], notes = choose_checkpoint(output_dir, options.resume_from_checkpoint)
            for note in notes:
                print(note, file=sys.stderr)
        broadcast_object_list(resume)
        task = make_task(accelerator)
        # From here on each process has its own random stream, separate from initialisation.
        set_seed(options.seed + 1, device_specific=True)
        run = _Run(options, accelerator, task, resume[0], program, is_fsdp)
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
        accelerator: TrainingAccelerator,
        task: TrainingTask,
        resume: Path | None,
        program: str,
        is_fsdp: bool,
    ) -> None:
        self.options, self.accelerator, self.task, self.program = options, accelerator, task, program
        self.output_dir: Path = options.output_dir
        self.is_fsdp = is_fsdp
        self.peak_rates = {name: task.learning_rate(name, options) for name in task.modules}
        self.modules: dict[str, torch.nn.Module] = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self._prepare()
        self.average: ExponentialMovingAverage | None = None
        if options.use_ema:
            self.average = ExponentialMovingAverage(self._own("model"), options.ema_decay)
            self.average.to(accelerator.device)
        self.state = RunState()
        self.place: dict[str, Any] | None = None
        if resume is not None:
            self.place = load_checkpoint(accelerator, resume, self.state, self.average, self._shards())
            accelerator.print(f"resuming at step {self.state.step} from {resume}")
        self.last_checkpoint = resume
        self.clock = time.monotonic()
        self.elapsed_before = self.state.elapsed_seconds
        self.validated_step = -1
        self.saved_step = self.state.step
        self.meter = Meter()
        self.unusable: list[str] = []
        self.log: MetricLog | None = None
        if accelerator.is_main_process:
            save_options(self.output_dir / "training_config.yaml", options, **task.describe())
            self.log = MetricLog(self.output_dir / "metrics.jsonl", self.state.step)
            self.unusable_log = MetricLog(self.output_dir / "unusable.jsonl", self.state.step)
            self.reported = {row["sample"] for row in read_metrics(self.unusable_log.path)}
        start_trackers(accelerator, task.name, options)

    def _prepare(self) -> None:
        """Wrap the modules and make their optimizers.

        A sharded model is a copy. The task keeps the whole one, which the main process validates and saves.
        """
        options, accelerator, task = self.options, self.accelerator, self.task
        if accelerator.with_deepspeed and len(task.modules) > 1:
            raise ProgramError(
                "the distributed type must be one process, DDP or FSDP with the adversarial loss, got DeepSpeed"
            )
        for name, module in task.modules.items():
            if options.torch_compile:
                module.compile(backend=options.torch_compile_backend)
            if name == "model" and self.is_fsdp:
                module = shard_model(copy.deepcopy(module), accelerator)
                self.modules[name] = module
                self.optimizers[name] = make_optimizer(module, options, self.peak_rates[name])
            elif accelerator.with_deepspeed:
                module = copy.deepcopy(module)
                if accelerator.has_own_autocast:
                    compute_in_mixed_precision(module, accelerator)
                optimizer = make_optimizer(module, options, self.peak_rates[name])
                self.modules[name], self.optimizers[name] = accelerator.prepare(module, optimizer)
            else:
                # Prepared before the optimizer is made, so that a fused update sees the parameters on their device.
                self.modules[name] = accelerator.prepare(module)
                optimizer = make_optimizer(self.modules[name], options, self.peak_rates[name])
                self.optimizers[name] = accelerator.prepare(optimizer)
        if (self.is_fsdp or accelerator.with_deepspeed) and accelerator.is_main_process:
            task.modules["model"].to(accelerator.device)

    def _own(self, name: str) -> torch.nn.Module:
        """The trained module without the wrapper of DDP or DeepSpeed."""
        module = self.modules[name]
        return module if self.is_fsdp and name == "model" else self.accelerator.unwrap_model(module)

    def _shards(self) -> tuple[torch.nn.Module, torch.optim.Optimizer] | None:
        return (self.modules["model"], self.optimizers["model"]) if self.is_fsdp else None

    def train(self, stop: StopRequest) -> bool:
        """Take steps until the end of the run (True) or until a stop is requested (False)."""
        options, state = self.options, self.state
        window_start, window_images = time.monotonic(), state.num_images
        self.modules["model"].train()
        loader = self.task.loader(state.batches, self.accelerator, self.place)
        with self._bar() as bar, batches_of(loader) as batches:
            while (progress := self._progress()) < 1:
                factor = learning_rate_factor(
                    options.lr_scheduler, state.step, progress, options.lr_warmup_steps, options.lr_final_ratio
                )
                self._step(batches, factor)
                if state.step % options.logging_steps == 0:
                    self._report_unusable()
                    means = self._checked_means()
                    self.meter.reset()
                    now = time.monotonic()
                    rate = (state.num_images - window_images) / (now - window_start)
                    window_start, window_images = now, state.num_images
                    self._write(
                        {
                            **{f"train/{name}": value for name, value in means.items()},
                            "train/learning_rate": options.learning_rate * factor,
                            **({"train/unusable": float(state.num_unusable)} if state.num_unusable else {}),
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
            batch = self._next_batch(batches)
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
            self.average.update(self._own("model"))
        self.state.step += 1
        prefix = "" if turn == "model" else f"{turn}_"
        self.meter.add(self.state.step, {**means, f"{prefix}gradient_norm": whole(torch.as_tensor(norm))})

    def _next_batch(self, batches: Iterator[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """The next batch on the device. Notes which samples could not be used.

        Raises:
            ProgramError: If too few samples of the batch can be used.
        """
        batch = next(batches)
        unusable = batch.pop("unusable", [])
        self.unusable += unusable
        if not batch:
            raise ProgramError(f"{len(unusable)} samples in a row cannot be used, the last one: {unusable[-1]}")
        return {name: value.to(self.accelerator.device, non_blocking=True) for name, value in batch.items()}

    def _report_unusable(self) -> None:
        """Count and name the samples that could not be used since the last report. All processes must call it.

        Raises:
            ProgramError: If they are more than `--max_unusable_share` of all.
        """
        found = gather_object(self.unusable) if self.accelerator.num_processes > 1 else self.unusable
        self.unusable = []
        self.state.num_unusable += len(found)
        if self.log is not None:
            for name in found:
                if name not in self.reported:
                    self.reported.add(name)
                    self.unusable_log.write(self.state.step, {"sample": name})
                    tqdm.write(f"left out: {name}", file=sys.stderr)
        seen = self.state.num_images + self.state.num_unusable
        limit = getattr(self.options, "max_unusable_share", 1.0)
        if self.state.num_unusable > limit * max(seen, MIN_SAMPLES):
            raise ProgramError(
                f"at most {limit:.3g} of the samples may be unusable (--max_unusable_share), got "
                f"{self.state.num_unusable} of {seen}, which {self.output_dir / 'unusable.jsonl'} names"
            )

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
            raise self._not_finite(name, value, step)
        return {name: sum(value for _, value in entries) / len(entries) for name, entries in history.items()}

    def _not_finite(self, name: str, value: float, step: int) -> ProgramError:
        last = self.last_checkpoint
        good = "there is no checkpoint yet" if last is None else f"the last good checkpoint is {last}"
        advice = "lower the learning rate or raise the precision, then give the same command"
        return ProgramError(f"{name} is {value} at step {step}; {good}: {advice}")

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

    @contextmanager
    def result(self) -> Iterator[None]:
        """Have the result, averaged and whole, in the task's model on the main process. All processes must call it."""
        model = self.task.modules["model"]
        if not (self.is_fsdp or self.accelerator.with_deepspeed):
            with self.average.applied_to(model) if self.average is not None else nullcontext():
                yield
            return
        own = dict(self._own("model").named_parameters())
        with ExitStack() as stack:
            if self.average is not None:
                tensors = self.average.whole()
            else:
                stack.enter_context(gathered_by_deepspeed(list(own.values())))
                tensors = {name: whole(parameter.detach()) for name, parameter in own.items()}
            if self.accelerator.is_main_process:
                model.load_state_dict(tensors, strict=False)
        yield

    def validate(self) -> None:
        """Validate the averaged model on the main process, unless this step is validated already."""
        if self.validated_step == self.state.step:
            return
        self._checked_means()
        self.validated_step = self.state.step
        model = self.task.modules["model"]
        with self.result(), torch.no_grad():
            if self.accelerator.is_main_process:
                model.eval()
                values = self.task.validate(self.state.step, self.output_dir)
                model.train()
        if self.accelerator.is_main_process:
            for name, value in values.items():
                if math.isnan(value) or (math.isinf(value) and name.endswith("loss")):
                    raise self._not_finite(f"validation/{name}", value, self.state.step)
            self._write({f"validation/{name}": value for name, value in values.items()})
            pictures = sorted(self.output_dir.glob(f"images/step-{self.state.step:07d}*.png"))
            log_pictures(self.accelerator, pictures, self.state.step)
            line = f"step {self.state.step}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            line += f" after {self.state.elapsed_seconds / 60:.1f} min, {self.state.num_images} images"
            tqdm.write(line, file=sys.stderr)
        self.accelerator.wait_for_everyone()

    def checkpoint(self) -> None:
        """Save the state of the run, unless this step is saved already."""
        if self.saved_step == self.state.step:
            return
        self._report_unusable()
        self._checked_means()
        self.saved_step = self.state.step
        self.state.elapsed_seconds = self.elapsed_before + time.monotonic() - self.clock
        self.last_checkpoint = save_checkpoint(
            self.accelerator,
            self.output_dir,
            self.state,
            self.average,
            self.options.checkpoints_total_limit,
            self.task.place_of(self.state.batches),
            self._shards(),
        )

    def finish(self) -> None:
        """Write the last validation, the checkpoint, the curves and the model."""
        self.validate()
        self.checkpoint()
        model = self.output_dir / "model"
        with self.result():
            if not self.accelerator.is_main_process:
                return
            plot_metrics(read_metrics(self.output_dir / "metrics.jsonl"), self.output_dir / "curves.png")
            with writing(model), atomic_directory(model, overwrite=True, program=self.program) as staging:
                self.task.save(staging, TORCH_DTYPES[self.options.save_dtype])
                card = training_card(self.program, self.output_dir.name, self.state, self.output_dir / "metrics.jsonl")
                (staging / "README.md").write_text(card, encoding="utf-8")
        self.accelerator.print(f"saved {model}")
        if self.options.push_to_hub:
            address = push_folder(
                model,
                self.options.hub_model_id or self.output_dir.name,
                private=self.options.hub_private,
                remote_code=self.options.remote_code,
            )
            self.accelerator.print(f"pushed to {address}")
