# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Attack the package and count what survives: damaged files, hostile configs, kills, full disks, odd names.

    python -m tests.hostile_campaign                                      everything
    python -m tests.hostile_campaign --scale 0.05 --areas files kills     a twentieth of two areas
    python -m tests.hostile_campaign --areas files --seed 0 --only 17     one case again

A case survives if the program or function succeeds with a whole result, or ends with one clear line and exit code 2
(a program) or a ValueError, an OSError or the exception of a configuration's bad field (a function). A traceback, a
crash, a hang, memory without bound, a lost file or one left half-written is a failure. The exit code is 1 if there is
any. Case N of an area is a function of the seed, the area and N alone, so that each can be repeated.

Every case runs in a forked process with a limit of time and of memory. Linux only.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import pickle
import platform
import resource
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The helpers of the tests import each other by their bare names.
sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import PIL.Image
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from tqdm import tqdm

from tests.hostile_files import ODD_NAMES, PartitionDataset, corrupt_file, corrupt_json

GIB = 2**30
SECONDS, MEMORY = 60, 3 * GIB
NOBODY = 65534
# What a function of the library may raise at bad input: `run_program` prints these as one line.
EXPECTED_ERRORS = (ValueError, OSError, StrictDataclassError)
# Files whose names depend on the moment they were written, or that record an interruption.
IGNORED_FOLDERS = ("logs",)


# ------------------------------------------------------------------------------------------- a process with limits


@dataclass
class Ended:
    """How a forked process ended: its exit code (minus the signal that killed it), what it printed, how long it took.

    `code` is None if it was stopped because its time was up.
    """

    code: int | None
    printed: str
    seconds: float

    def problem(self, codes: Sequence[int] = (0, 2)) -> str | None:
        """What is wrong with this end of a program, in one line; None if nothing is."""
        lines = [line for line in self.printed.replace("\r", "\n").splitlines() if line.strip()]
        last = lines[-1] if lines else "nothing printed"
        if self.code is None:
            return f"still running after {self.seconds:.0f} s: {last}"
        if "Traceback (most recent call last)" in self.printed:
            return f"traceback, exit {self.code}: {last}"
        if self.code < 0:
            return f"killed by {signal.Signals(-self.code).name}: {last}"
        if self.code not in codes:
            return f"exit {self.code} instead of {' or '.join(map(str, codes))}: {last}"
        if self.code == 2 and not any(line.startswith(("error:", "usage:")) for line in lines):
            return f"exit 2 without a line that says why: {last}"
        return None


class Child:
    """A function in a forked process group of its own, what it prints collected in a pipe.

    Args:
        function: Its result is the exit code, None for 0.
        cwd: Folder to run in.
        memory: Bytes of address space that it may take beyond what this process has.
        file_size: Largest file that it may write.
        user: Effective user id to run as.
    """

    def __init__(
        self,
        function: Callable[[], int | None],
        cwd: Path,
        memory: int | None = MEMORY,
        file_size: int | None = None,
        user: int | None = None,
    ) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self.started = time.monotonic()
        self.read_end, write_end = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(function, cwd, memory, file_size, user, write_end)
        os.close(write_end)
        os.set_blocking(self.read_end, False)

    @staticmethod
    def _run(function: Any, cwd: Path, memory: Any, file_size: Any, user: Any, write_end: int) -> None:
        code = 70
        try:
            os.setpgid(0, 0)
            os.dup2(write_end, 1)
            os.dup2(write_end, 2)
            for name, descriptor in (("stdout", 1), ("stderr", 2)):
                stream = open(descriptor, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
                setattr(sys, name, stream)
            os.chdir(cwd)
            # PyTorch makes its pool of threads anew after a fork, without a lock: two threads that get there together,
            # such as those by which transformers loads a model, end in "Invalid thread pool!". This process has one
            # thread as yet. DataLoader does the same in its workers.
            torch.set_num_threads(1)
            # Forked processes share tqdm's lock. One that is killed while it holds it would stop all later ones.
            tqdm.set_lock(threading.RLock())
            if memory is not None:
                taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (taken + memory, taken + memory))
            if file_size is not None:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
            if user is not None:
                os.seteuid(user)
            code = function() or 0
        except SystemExit as error:  # argparse
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            try:
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(code)

    def wait(self, seconds: float, sigkill_after: float | None = None) -> Ended:
        """Wait until it ends; kill it, and what it has started, when `seconds` are over.

        `sigkill_after` kills the process alone after so many seconds: the moment of a power cut.
        """
        printed, code, status = bytearray(), None, 0
        stop_at = self.started + seconds
        kill_at = math.inf if sigkill_after is None else self.started + sigkill_after
        while time.monotonic() < stop_at:
            select.select([self.read_end], [], [], 0.01)
            printed += self._drain()
            finished, status = os.waitpid(self.pid, os.WNOHANG)
            if finished:
                code = os.waitstatus_to_exitcode(status)
                break
            if time.monotonic() >= kill_at:
                os.kill(self.pid, signal.SIGKILL)
                kill_at = math.inf
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # its workers, if any are left
        if code is None:
            os.waitpid(self.pid, 0)
        printed += self._drain()
        os.close(self.read_end)
        return Ended(code, printed.decode("utf-8", "replace"), time.monotonic() - self.started)

    def _drain(self) -> bytes:
        result = b""
        try:
            while block := os.read(self.read_end, 1 << 16):
                result += block
        except BlockingIOError:
            pass
        return result


def call(function: Callable[[], Any], cwd: Path, seconds: float = SECONDS, **limits: Any) -> str | None:
    """Run a function of the library in a child; what it did wrong, or None. An expected error is no fault."""

    def guarded() -> int:
        try:
            function()
        except EXPECTED_ERRORS as error:
            if not str(error).strip():
                print(f"Traceback (most recent call last): {type(error).__name__} without a message")
                return 1
        return 0

    return Child(guarded, cwd, **limits).wait(seconds).problem((0,))


# ------------------------------------------------------------------------------------------------------------ inputs


class Inputs:
    """Good files to start from, made when they are first asked for, always the same."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __getitem__(self, name: str) -> Path:
        path = self.folder / name
        if not path.exists():
            staging = self.folder / f"making-{name}"
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            ended = Child(partial(getattr(self, f"make_{name}"), staging), self.folder, memory=None).wait(600)
            if ended.code != 0:
                raise RuntimeError(f"the input {name!r} of the campaign could not be made:\n{ended.printed}")
            staging.rename(path)
        return path

    def make_photos(self, folder: Path) -> None:
        for seed in range(3):
            photograph(seed).save(folder / f"photo{seed}.png")
        photograph(3).save(folder / "photo3.jpg")
        photograph(4).convert("P").save(folder / "photo4.gif")
        photograph(5).save(folder / "photo5.webp")
        photograph(6).save(folder / "photo6.tiff")
        photograph(7).save(folder / "photo7.bmp")

    def make_model(self, folder: Path) -> None:
        from model_helpers import make_model

        from gpstoken_hf import GPSTokenImageProcessor

        make_model().save_pretrained(folder)
        GPSTokenImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)

    def make_autoencoder(self, folder: Path) -> None:
        from gpstoken_hf import AutoencoderGPSToken, GPSTokenModel

        model = GPSTokenModel.from_pretrained(self["model"]).eval()
        images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
        AutoencoderGPSToken.from_gpstoken(model, pixel_values=[images]).save_pretrained(folder)

    def make_pipeline(self, folder: Path) -> None:
        from tiny_pipeline import make_pipeline

        make_pipeline("both").save_pretrained(folder)

    def make_layout(self, folder: Path) -> None:
        from gpstoken_hf import partition_images

        images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
        partition_images(images, 8, min_region_size=4).save(folder / "layout.safetensors")

    def make_tokens(self, folder: Path) -> None:
        from pipelines import reconstruct

        command = [str(self["photos"] / "photo0.png"), "--model", str(self["model"]), "--tokens", "8"]
        program(reconstruct, [*command, "--device", "cpu", "--output", str(folder / "out")])
        shutil.copy(folder / "out" / "photo0" / "tokens.safetensors", folder / "tokens.safetensors")

    def make_packed(self, folder: Path) -> None:
        from pipelines import encode

        for step, name in ((None, "photo1"), (0.5, "photo2")):
            options = [
                "--format",
                "gpst",
                *(("--step", step) if step else ()),
                "--model",
                self["model"],
                "--tokens",
                8,
            ]
            program(encode, [self["photos"] / f"{name}.png", *options, "--device", "cpu", "--output", folder / name])
            shutil.copy(folder / name / f"{name}.gpst", folder)

    def make_parquet(self, folder: Path) -> None:
        from training_helpers import write_images

        write_images(folder / "images.parquet")

    def make_cache(self, folder: Path) -> None:
        from training_helpers import cache_command

        from training import cache_tokens

        images = self["parquet"] / "images.parquet"
        program(cache_tokens, cache_command(images, self["model"], folder / "tokens", "--cache_dir", folder / "hf"))

    def make_run(self, folder: Path) -> None:
        from training import train_sit

        program(train_sit, training_run(self["cache"] / "tokens", folder / "run", 4))

    def make_pickle(self, folder: Path) -> None:
        random = np.random.default_rng(0)
        layouts = {label: [random.uniform(0.1, 0.9, (8, 9)).astype(np.float32)] for label in (0, 3)}
        for protocol in (3, 4, 5):
            (folder / f"layouts{protocol}.pickle").write_bytes(pickle.dumps(layouts, protocol))

    def make_released(self, folder: Path) -> None:
        from safetensors.torch import load_file

        golden = Path(__file__).resolve().parent / "golden"
        for name in ("tokenizer_official", "sit_official"):
            shutil.copy(golden / f"{name}.safetensors", folder)
            torch.save(load_file(golden / f"{name}.safetensors"), folder / f"{name}.pt")

    def make_converted(self, folder: Path) -> None:
        """The components that `convert_pipeline` joins: a generator of the golden tokenizer's channels, and a bank."""
        from safetensors.torch import load_file, save_file

        from conversion import convert_gpstoken, convert_layout_bank, convert_sit

        tensors = load_file(self["released"] / "sit_official.safetensors")
        generator = torch.Generator().manual_seed(0)
        shapes = {"x_embedder.proj.weight": (64, 21, 1, 1), "final_layer.linear.weight": (42, 64)}
        for name, shape in {**shapes, "final_layer.linear.bias": (42,)}.items():
            tensors[f"ema_model.{name}"] = (0.1 * torch.randn(shape, generator=generator)).half()
        save_file(tensors, folder / "generator.safetensors")
        tokenizer = self["released"] / "tokenizer_official.safetensors"
        options = ("--num_tokens", 16, "--image_size", 64)
        program(convert_gpstoken, ["--checkpoint", tokenizer, "--output", folder / "vae", *options])
        options = ("--checkpoint", folder / "generator.safetensors", "--num_attention_heads", 4)
        program(convert_sit, [*options, "--output", folder / "sit"])
        random = np.random.default_rng(0)
        layouts = {label: [random.uniform(0.1, 0.9, (16, 21)).astype(np.float32)] for label in (0, 4)}
        (folder / "initg.pickle").write_bytes(pickle.dumps(layouts))
        program(convert_layout_bank, [folder / "initg.pickle", "--output", folder / "bank"])


def photograph(seed: int, width: int = 32, height: int = 24) -> PIL.Image.Image:
    """Noise that grows to the right, so that partitions are uneven."""
    noise = np.random.default_rng(seed).uniform(-1, 1, (height, width, 3)) * np.linspace(0.1, 1, width)[:, None]
    return PIL.Image.fromarray((127.5 + 127 * noise).astype(np.uint8))


def program(module: Any, arguments: Sequence[Any]) -> None:
    """Run a program that must succeed."""
    from pipelines.shared.programs import run_program

    code = run_program(module.main, [str(argument) for argument in arguments])
    if code != 0:
        raise RuntimeError(f"{module.__name__} ended with {code}")


def training_run(tokens: Path, output: Path, steps: int) -> list[str]:
    from training_helpers import sit_command

    more = ("--checkpointing_steps", "2", "--validation_steps", "2")
    return sit_command(tokens, output, "texture", steps, *more)


# ---------------------------------------------------------------------------------------------------------- programs


@dataclass(frozen=True)
class Program:
    """A program with the command of a short run: `command(inputs, output, scratch)`.

    `overwrite` is the option that lets it replace what it has written before, if it has one.
    """

    module: str
    command: Callable[[Inputs, Path, Path], list[Any]]
    output: str = "out"
    overwrite: tuple[str, ...] = ()


def _images(inputs: Inputs) -> Path:
    return inputs["parquet"] / "images.parquet"


def _reconstruct(inputs: Inputs, output: Path, scratch: Path) -> list[Any]:
    photos = [inputs["photos"] / f"photo{index}.png" for index in range(3)]
    return [*photos, "--model", inputs["model"], "--tokens", 8, "--device", "cpu", "--output", output]


def _from_tokens(inputs: Inputs, output: Path, scratch: Path) -> list[Any]:
    tokens = inputs["tokens"] / "tokens.safetensors"
    return ["--from_tokens", tokens, "--model", inputs["model"], "--device", "cpu", "--output", output]


def _encode(inputs: Inputs, output: Path, scratch: Path) -> list[Any]:
    return _reconstruct(inputs, output, scratch)


def _decode(inputs: Inputs, output: Path, scratch: Path) -> list[Any]:
    files = [inputs["tokens"] / "tokens.safetensors", inputs["packed"] / "photo1.gpst"]
    return [*files, "--model", inputs["model"], "--device", "cpu", "--output", output]


def _generate(inputs: Inputs, output: Path, scratch: Path) -> list[Any]:
    return [
        *("--pipeline", inputs["pipeline"], "--classes", 1, 2, "--count", 3, "--steps", 2, "--layout_steps", 2),
        *("--batch_size", 2, "--device", "cpu", "--output", output),
    ]


def _evaluate(inputs: Inputs, output: Path, scratch: Path) -> list[Any]:
    return [
        *(_images(inputs), "--model", inputs["model"], "--resolution", 32, "--tokens", 8, 4, "--batch_size", 3),
        *("--device", "cpu", "--output", output),
    ]


def _build_bank(inputs: Inputs, output: Path, scratch: Path) -> list[Any]:
    return [
        *("--train_data_files", _images(inputs), "--output_dir", output, "--resolution", 32, "--num_tokens", 8),
        *("--min_region_size", 4, "--part_size", 3, "--cache_dir", scratch),
    ]


def _tokenizer(*more: str) -> Callable[[Inputs, Path, Path], list[Any]]:
    def command(inputs: Inputs, output: Path, scratch: Path) -> list[Any]:
        from training_helpers import tokenizer_command

        often = ("--checkpointing_steps", "1", "--validation_steps", "2", "--cache_dir", str(scratch))
        return tokenizer_command(_images(inputs), output, 4, *often, *more)

    return command


def _sit(inputs: Inputs, output: Path, scratch: Path) -> list[Any]:
    return [*training_run(inputs["cache"] / "tokens", output, 4), "--checkpointing_steps", "1"]


def _cache(inputs: Inputs, output: Path, scratch: Path) -> list[Any]:
    from training_helpers import cache_command

    return cache_command(_images(inputs), inputs["model"], output, "--cache_dir", str(scratch))


def _convert_tokenizer(inputs: Inputs, output: Path, scratch: Path) -> list[Any]:
    checkpoint = inputs["released"] / "tokenizer_official.safetensors"
    return ["--checkpoint", checkpoint, "--output", output, "--num_tokens", 16, "--image_size", 64]


def _convert_sit(inputs: Inputs, output: Path, scratch: Path) -> list[Any]:
    return [
        "--checkpoint",
        inputs["released"] / "sit_official.safetensors",
        *("--output", output, "--num_attention_heads", 4),
    ]


def _convert_bank(inputs: Inputs, output: Path, scratch: Path) -> list[Any]:
    return [inputs["pickle"] / "layouts4.pickle", "--output", output]


def _convert_pipeline(inputs: Inputs, output: Path, scratch: Path) -> list[Any]:
    parts = inputs["converted"]
    components = ("--tokenizer", parts / "vae", "--transformer", parts / "sit", "--layout_bank", parts / "bank")
    return [*components, "--output", output]


def _fit_quality(inputs: Inputs, output: Path, scratch: Path) -> list[Any]:
    return [
        *(_images(inputs), "--model", inputs["model"], "--samples", 3, "--batch_size", 2),
        *("--device", "cpu", "--output", output),
    ]


def _quality_curves(inputs: Inputs, output: Path, scratch: Path) -> list[Any]:
    return [
        *(_images(inputs), "--model", inputs["model"], "--resolution", 32, "--curves", "codecs", "--tokens", 8),
        *("--batch_size", 2, "--device", "cpu", "--output", output),
    ]


def _ablate(inputs: Inputs, output: Path, scratch: Path) -> list[Any]:
    return [*_evaluate(inputs, output, scratch), "--lambdas", 0, "--supports", 2, "--min_region_sizes", 4]


def _figures(inputs: Inputs, output: Path, scratch: Path) -> list[Any]:
    return [
        *(_images(inputs), "--model", inputs["model"], "--resolution", 32, "--max_images", 2),
        *("--device", "cpu", "--output", output),
    ]


def _export_kernel(inputs: Inputs, output: Path, scratch: Path) -> list[Any]:
    return ["--output", output]


ADVERSARIAL = ("--adversarial_weight", "0.3", "--adversarial_start_step", "1")
PROGRAMS = {
    "reconstruct": Program("pipelines.reconstruct", _reconstruct, overwrite=("--overwrite",)),
    "train_tokenizer": Program("training.train_tokenizer", _tokenizer()),
    "generate": Program("pipelines.generate", _generate, overwrite=("--overwrite",)),
    "train_tokenizer, adversarial": Program("training.train_tokenizer", _tokenizer(*ADVERSARIAL)),
    "evaluate_reconstruction": Program("pipelines.evaluate_reconstruction", _evaluate, overwrite=("--overwrite",)),
    "train_sit": Program("training.train_sit", _sit),
    "build_layout_bank": Program("pipelines.build_layout_bank", _build_bank),
    "cache_tokens": Program("training.cache_tokens", _cache),
    "convert_gpstoken": Program("conversion.convert_gpstoken", _convert_tokenizer),
    "convert_sit": Program("conversion.convert_sit", _convert_sit),
    "convert_layout_bank": Program("conversion.convert_layout_bank", _convert_bank),
    "convert_pipeline": Program("conversion.convert_pipeline", _convert_pipeline),
    "encode": Program("pipelines.encode", _encode, overwrite=("--overwrite",)),
    "decode": Program("pipelines.decode", _decode),
    "fit_quality": Program("pipelines.fit_quality", _fit_quality, overwrite=("--overwrite",)),
    "quality_curves": Program("pipelines.quality_curves", _quality_curves, overwrite=("--overwrite",)),
    "ablate": Program("pipelines.ablate", _ablate, overwrite=("--overwrite",)),
    "figures": Program("pipelines.figures", _figures, overwrite=("--overwrite",)),
    "export_kernel": Program("conversion.export_kernel", _export_kernel, overwrite=("--overwrite",)),
    "reconstruct --from_tokens": Program("pipelines.reconstruct", _from_tokens, overwrite=("--overwrite",)),
}


def start(module: str, arguments: Sequence[Any], cwd: Path, **limits: Any) -> Child:
    """A program as a child. Arguments of bytes are file names as the operating system gives them."""
    argv = [os.fsdecode(item) if isinstance(item, bytes) else str(item) for item in arguments]

    def run() -> int:
        from pipelines.shared.programs import run_program

        return run_program(importlib.import_module(module).main, argv)

    return Child(run, cwd, **limits)


def tree(folder: Path) -> set[str]:
    """The relative names of all files and empty folders below a folder, hidden ones among them."""
    leaves = (path for path in folder.rglob("*") if not path.is_dir() or not any(path.iterdir()))
    names = (path.relative_to(folder) for path in leaves)
    return {os.fsencode(name).decode("utf-8", "replace") for name in names if not {*IGNORED_FOLDERS} & {*name.parts}}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def find_broken(folder: Path) -> str | None:
    """The first file that cannot be read to its end, or None."""
    for path in sorted(folder.rglob("*")):
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118 (not a mapping)
                        file.get_tensor(name)
            elif path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".png":
                with PIL.Image.open(path) as image:
                    image.load()
        except Exception as error:
            return f"{path.name} is broken: {error}"
    return None


# ------------------------------------------------------------------------------------------------------------- areas


@dataclass
class Campaign:
    """What the cases share: inputs, a folder for each case, and one uninterrupted run of each program."""

    work: Path
    seed: int
    references: dict[str, tuple[set[str], float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.inputs = Inputs(self.work / "inputs")
        self.inputs.folder.mkdir(parents=True, exist_ok=True)

    def rng(self, area: str, number: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, zlib.crc32(area.encode()), number])

    @contextmanager
    def folder(self, area: str, number: int) -> Iterator[Path]:
        path = self.work / f"{area}-{number}"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def reference(self, name: str) -> tuple[set[str], float]:
        """The files that a program leaves when nothing disturbs it, and how long it takes."""
        if name not in self.references:
            with self.folder("reference", 0) as folder:
                ended = self.start(name, folder).wait(600)
                if ended.code != 0:
                    raise RuntimeError(f"{name} fails undisturbed: {ended.printed}")
                self.references[name] = tree(folder / "area"), ended.seconds
        return self.references[name]

    def start(self, name: str, folder: Path, *more: str, output: str | None = None, **limits: Any) -> Child:
        """A program whose output is `folder/area/out`. What it caches of its input goes elsewhere."""
        program = PROGRAMS[name]
        area, scratch = folder / "area", folder / "scratch"
        for path in (area, scratch):
            path.mkdir(exist_ok=True)
        scratch.chmod(0o777)  # whoever the program runs as
        arguments = program.command(self.inputs, area / (output or program.output), scratch)
        return start(program.module, [*arguments, *more], folder, **limits)


# -- files


def _program_case(module: str, arguments: Callable[[Campaign, Path], list[Any]], *results: str) -> Any:
    """A program that gets the corrupted file among others; `results` must be there whatever the file holds."""

    def act(campaign: Campaign, folder: Path) -> str | None:
        ended = start(module, arguments(campaign, folder), folder).wait(SECONDS)
        missing = [name for name in results if not (folder / name).exists()]
        return ended.problem() or (f"{missing[0]} is missing: the other files were not done" if missing else None)

    return act


def _reconstruct_good_and_bad(campaign: Campaign, folder: Path) -> list[Any]:
    good = campaign.inputs["photos"] / "photo1.png"
    return [folder / "in", good, "--model", campaign.inputs["model"], "--tokens", 6, "--device", "cpu"]


def _decode_good_and_bad(campaign: Campaign, folder: Path) -> list[Any]:
    good = shutil.copy(campaign.inputs["tokens"] / "tokens.safetensors", folder / "good.safetensors")
    bad = folder / "in" / "tokens.safetensors"
    return ["--from_tokens", bad, good, "--model", campaign.inputs["model"], "--device", "cpu"]


def _decode_packed(campaign: Campaign, folder: Path) -> list[Any]:
    good = shutil.copy(campaign.inputs["packed"] / "photo1.gpst", folder / "good.gpst")
    return [*sorted((folder / "in").glob("*.gpst")), good, "--model", campaign.inputs["model"], "--device", "cpu"]


def _loads(use: Callable[[Path], Any]) -> Any:
    return lambda campaign, folder: call(partial(use, folder / "in"), folder)


def use_model(folder: Path) -> None:
    from gpstoken_hf import GPSTokenImageProcessor, GPSTokenModel

    GPSTokenImageProcessor.from_pretrained(folder)(photograph(0), return_tensors="pt")
    GPSTokenModel.from_pretrained(folder)


def use_autoencoder(folder: Path) -> None:
    from gpstoken_hf import AutoencoderGPSToken

    AutoencoderGPSToken.from_pretrained(folder)


def use_sit(folder: Path) -> None:
    from gpstoken_hf import SiTTransformer1DModel

    SiTTransformer1DModel.from_pretrained(folder)


def use_bank(folder: Path) -> None:
    from gpstoken_hf import GaussianLayoutBank
    from gpstoken_hf.gaussians import check_gaussians

    bank = GaussianLayoutBank.from_pretrained(folder)
    loaded = bank.layouts_by_class()
    check_loaded(sum(map(len, loaded.values())) == len(bank), "the bank counts other layouts than it holds")
    for layouts in loaded.values():
        for layout in layouts:
            check_loaded(len(layout) > 0, "the bank holds a layout without tokens")
            try:
                check_gaussians(layout, "a layout of the bank")
            except ValueError as error:
                check_loaded(False, f"the bank was loaded although {error}")
    bank.sample(bank.class_ids[:1])


def check_loaded(holds: bool, fault: str) -> None:
    """Loading said that all is well: then it must be."""
    if not holds:
        raise AssertionError(fault)


def use_pipeline(folder: Path) -> None:
    from gpstoken_hf import GPSTokenPipeline

    pipeline = GPSTokenPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline([1], 2, num_layout_steps=2, generator=torch.Generator().manual_seed(0))


def use_layout(folder: Path) -> None:
    from gpstoken_hf import GaussianLayout

    layout = GaussianLayout.load(folder / "layout.safetensors")
    check_loaded(bool(layout.gaussians.isfinite().all()), "a layout was loaded that is not finite")


def use_pickle(folder: Path) -> None:
    from conversion.array_pickle import load_array_pickle

    for path in folder.iterdir():
        load_array_pickle(path)


def use_parquet(folder: Path) -> None:
    from training.data import decode_image, load_image_dataset
    from training.options import add_dataset_options

    parser = argparse.ArgumentParser()
    add_dataset_options(parser)
    files = ["--train_data_files", str(folder / "images.parquet"), "--cache_dir", str(folder.parent / "hf")]
    dataset = load_image_dataset(parser.parse_args(files))
    for index in range(len(dataset)):
        decode_image(dataset[index]["image"], f"row {index}")


def _evaluate_parquet(campaign: Campaign, folder: Path) -> list[Any]:
    data = folder / "in" / "images.parquet"
    return [data, "--model", campaign.inputs["model"], "--resolution", 32, "--tokens", 4, "--device", "cpu"]


def _train_on_cache(campaign: Campaign, folder: Path) -> list[Any]:
    return training_run(folder / "in", folder / "run", 1)


def _convert(module: str, file: str, *options: Any) -> Any:
    def arguments(campaign: Campaign, folder: Path) -> list[Any]:
        source = folder / "in" / file
        return [*(("--checkpoint", source) if options else (source,)), "--output", folder / "converted", *options]

    return _program_case(module, arguments)


def resume(campaign: Campaign, folder: Path) -> str | None:
    """The newest checkpoint is damaged: the run goes on from the one before."""
    command = training_run(campaign.inputs["cache"] / "tokens", folder / "in", 5)
    ended = start("training.train_sit", command, folder).wait(2 * SECONDS)
    return ended.problem((0,))


@dataclass(frozen=True)
class FileKind:
    """A kind of file: the input it is copied from, which of its files are corrupted, what reads it, how often."""

    name: str
    source: str
    pattern: str
    act: Callable[[Campaign, Path], str | None]
    share: int = 1


RECONSTRUCT = ("pipelines.reconstruct", _reconstruct_good_and_bad, "out/photo1/scores.json")
DECODE = ("pipelines.reconstruct", _decode_good_and_bad, "out/good-from-tokens/reconstruction.png")
UNPACK = ("pipelines.decode", _decode_packed, "out/pictures/good.png")
PICKLE = "layouts4.pickle"
CONVERT_TOKENIZER = ("conversion.convert_gpstoken", "--num_tokens", 16, "--image_size", 64)
CONVERT_SIT = ("conversion.convert_sit", "--num_attention_heads", 4)


def _converter(options: Sequence[Any], file: str) -> Any:
    return _convert(options[0], file, *options[1:])


FILE_KINDS = (
    FileKind("image for reconstruct", "photos", "photo[02-7].*", _program_case(*RECONSTRUCT), 3),
    FileKind("tokens for reconstruct", "tokens", "tokens.safetensors", _program_case(*DECODE), 3),
    FileKind("token file for decode", "packed", "*.gpst", _program_case(*UNPACK), 3),
    FileKind("GPSTokenModel", "model", "*.*", _loads(use_model), 5),
    FileKind("AutoencoderGPSToken", "autoencoder", "*.*", _loads(use_autoencoder), 3),
    FileKind("SiTTransformer1DModel", "pipeline/transformer", "*.*", _loads(use_sit), 4),
    FileKind("GaussianLayoutBank", "pipeline/layout_bank", "*.*", _loads(use_bank), 5),
    FileKind("GPSTokenPipeline", "pipeline", "**/*.*", _loads(use_pipeline), 4),
    FileKind("GaussianLayout", "layout", "layout.safetensors", _loads(use_layout), 4),
    FileKind("layout pickle", "pickle", "*.pickle", _loads(use_pickle), 4),
    FileKind("parquet for training", "parquet", "images.parquet", _loads(use_parquet), 2),
    FileKind(
        "parquet for evaluation",
        "parquet",
        "images.parquet",
        _program_case("pipelines.evaluate_reconstruction", _evaluate_parquet),
        2,
    ),
    FileKind("pickle for conversion", "pickle", PICKLE, _convert("conversion.convert_layout_bank", PICKLE)),
    *(
        FileKind(f"released {file}", "released", file, _converter(options, file))
        for options, stem in ((CONVERT_TOKENIZER, "tokenizer_official"), (CONVERT_SIT, "sit_official"))
        for file in (f"{stem}.safetensors", f"{stem}.pt")
    ),
    FileKind("token cache", "cache/tokens", "**/*.*", _program_case("training.train_sit", _train_on_cache), 2),
    FileKind("training checkpoint", "run/run", "checkpoint-4/*.*", resume, 2),
)


def _interleaved(kinds: Sequence[FileKind]) -> list[FileKind]:
    """Each kind once, then those of a larger share again, so that a small scale has all of them."""
    most = max(kind.share for kind in kinds)
    return [kind for turn in range(most) for kind in kinds if kind.share > turn]


def _copied(campaign: Campaign, kind: FileKind, folder: Path, rng: np.random.Generator) -> Path:
    """A copy of the kind's input in `folder/in`, and the file of it to corrupt."""
    name, _, below = kind.source.partition("/")
    source, target = campaign.inputs[name] / below, folder / "in"
    paths = sorted(path for path in source.glob(kind.pattern) if path.is_file())
    path = paths[int(rng.integers(len(paths)))]
    if kind.source == "photos":
        target.mkdir()
        shutil.copy(path, target)
    else:
        shutil.copytree(source, target)
    return target / path.relative_to(source)


def files_case(campaign: Campaign, number: int, folder: Path) -> tuple[str, str | None]:
    rng = campaign.rng("files", number)
    kinds = _interleaved(FILE_KINDS)
    kind = kinds[number % len(kinds)]
    what = corrupt_file(_copied(campaign, kind, folder, rng), rng)
    return f"{kind.name}, {what}", kind.act(campaign, folder)


# -- configs


CONFIG_KINDS = (
    FileKind("GPSTokenConfig", "model", "config.json", _loads(use_model)),
    FileKind("image processor", "model", "preprocessor_config.json", _loads(use_model)),
    FileKind("AutoencoderGPSToken", "autoencoder", "config.json", _loads(use_autoencoder)),
    FileKind("SiTTransformer1DModel", "pipeline/transformer", "config.json", _loads(use_sit)),
    FileKind("GaussianLayoutBank", "pipeline/layout_bank", "config.json", _loads(use_bank)),
    FileKind("model_index.json", "pipeline", "model_index.json", _loads(use_pipeline)),
    FileKind("scheduler", "pipeline", "*scheduler/*.json", _loads(use_pipeline)),
    FileKind("training preset", "", "", lambda campaign, folder: _train_by_preset(campaign, folder)),
)


def _train_by_preset(campaign: Campaign, folder: Path) -> str | None:
    more = ("--config", folder / "preset.yaml", "--dry_run")
    return start("training.train_tokenizer", [*more, "--output_dir", folder / "out"], folder).wait(SECONDS).problem()


def configs_case(campaign: Campaign, number: int, folder: Path) -> tuple[str, str | None]:
    rng = campaign.rng("configs", number)
    kind = CONFIG_KINDS[number % len(CONFIG_KINDS)]
    if not kind.source:  # JSON is YAML, too
        preset = {"preset": "tiny", "max_train_steps": 3, "resolutions": [32, 48], "use_ema": True}
        corrupted, what = corrupt_json(json.dumps(preset).encode(), rng)
        (folder / "preset.yaml").write_bytes(corrupted)
    else:
        path = _copied(campaign, kind, folder, rng)
        corrupted, what = corrupt_json(path.read_bytes(), rng)
        path.write_bytes(corrupted)
    return f"{kind.name}, {what}", kind.act(campaign, folder)


# -- kills, disks, read-only folders, two at once


def _left_over(campaign: Campaign, name: str, folder: Path) -> str | None:
    """What differs from the files of an undisturbed run."""
    expected, found = campaign.reference(name)[0], tree(folder / "area") - {"mine.txt", "out/mine.txt"}
    if left := sorted(found - expected):
        return f"left behind: {', '.join(left[:5])}"
    if missing := sorted(expected - found):
        return f"missing: {', '.join(missing[:5])}"
    return find_broken(folder / "area")


def kills_case(campaign: Campaign, number: int, folder: Path) -> tuple[str, str | None]:
    """SIGKILL at a random moment; then the same command must end with the whole output."""
    rng = campaign.rng("kills", number)
    name = list(PROGRAMS)[number % len(PROGRAMS)]
    moment = float(rng.uniform(0.02, 1.0)) * campaign.reference(name)[1]
    title = f"{name}, killed after {moment:.2f} s"
    campaign.start(name, folder).wait(SECONDS * 3, sigkill_after=moment)
    (folder / "area" / "mine.txt").write_text("mine")
    return title, _go_on(campaign, name, folder) or _mine_is_lost(folder)


def _go_on(campaign: Campaign, name: str, folder: Path, *more: str) -> str | None:
    """What the same command does wrong after an interrupted one. Where all is done, it may refuse to do it again.

    Either way nothing of the interrupted run is left behind.
    """
    done = campaign.reference(name)[0] <= tree(folder / "area") and find_broken(folder / "area") is None
    ended = campaign.start(name, folder, *more).wait(SECONDS * 3)
    return ended.problem((0, 2) if done else (0,)) or _left_over(campaign, name, folder)


def _mine_is_lost(folder: Path) -> str | None:
    mine = folder / "area" / "mine.txt"
    return None if mine.is_file() and mine.read_text() == "mine" else "mine.txt, a file of the user, is lost"


def disk_case(campaign: Campaign, number: int, folder: Path) -> tuple[str, str | None]:
    """Files beyond a limit cannot be written. What was there before stays, and the next run is whole."""
    rng = campaign.rng("disk", number)
    names = list(PROGRAMS)
    name = names[number % len(names)]
    again = number >= len(names) and bool(PROGRAMS[name].overwrite)
    limit = int(2 ** rng.uniform(0, 18))
    title = f"{name}{', over an output' if again else ''}, files of at most {limit} bytes"
    expected = campaign.reference(name)[0]
    (folder / "area").mkdir()
    (folder / "area" / "mine.txt").write_text("mine")
    if again and (problem := campaign.start(name, folder).wait(SECONDS * 3).problem((0,))):
        return title, problem
    more = PROGRAMS[name].overwrite if again else ()
    problem = campaign.start(name, folder, *more, file_size=limit).wait(SECONDS * 3).problem()
    problem = problem or _mine_is_lost(folder)
    if problem is None and again:
        lost = expected - tree(folder / "area")
        problem = (f"lost: {', '.join(sorted(lost)[:5])}" if lost else None) or find_broken(folder / "area")
    return title, problem or _go_on(campaign, name, folder, *more)


def readonly_case(campaign: Campaign, number: int, folder: Path) -> tuple[str, str | None]:
    """An output that cannot be written: a read-only folder or parent, or a file where a folder should be."""
    names = list(PROGRAMS)
    name = names[number % len(names)]
    kind = ("parent", "folder", "file", "below a file")[(number + number // len(names)) % 4]
    area = folder / "area"
    area.mkdir()
    (area / "mine.txt").write_text("mine")
    output = area / "out"
    if kind == "folder":
        output.mkdir()
        (output / "mine.txt").write_text("mine")
        output.chmod(0o555)
    elif kind != "parent":
        output.write_text("mine")
    before = contents(area)
    more = {"output": "out/below"} if kind == "below a file" else {}
    user = NOBODY if os.geteuid() == 0 else None  # root writes anywhere
    area.chmod(0o555 if kind == "parent" else 0o777)
    problem = campaign.start(name, folder, user=user, **more).wait(SECONDS * 3).problem((2,))
    area.chmod(0o755)
    if problem is None and contents(area) != before:
        problem = f"changed: {', '.join(sorted(set(contents(area)) ^ set(before)) or ['contents'])}"
    return f"{name}, {kind}", problem


def twice_case(campaign: Campaign, number: int, folder: Path) -> tuple[str, str | None]:
    """Two runs at once in one output: one may refuse, none may break, and afterwards all is there."""
    rng = campaign.rng("twice", number)
    name = list(PROGRAMS)[number % len(PROGRAMS)]
    pause = float(rng.uniform(0, 0.5)) * campaign.reference(name)[1] * (number % 2)
    first = campaign.start(name, folder)
    time.sleep(pause)
    second = campaign.start(name, folder)
    ends = [child.wait(SECONDS * 3) for child in (first, second)]
    title = f"{name}, the second after {pause:.2f} s"
    for problem in (ended.problem() for ended in ends):
        if problem:
            return title, problem
    if all(ended.code for ended in ends):
        return title, f"both refused: {ends[0].printed.strip()[-200:]}"
    return title, _go_on(campaign, name, folder)


# -- names


def names_case(campaign: Campaign, number: int, folder: Path) -> tuple[str, str | None]:
    """Every image gets a result of its own, whatever it is called, and a second run finds all of them."""
    group = ODD_NAMES[number // 2 % len(ODD_NAMES)]
    one_by_one = number % 2 == 1
    source = folder / "in"
    title = f"{'files' if one_by_one else 'a folder'} {group!r}"
    try:
        for index, name in enumerate(group):
            path = Path(os.fsdecode(os.fsencode(source) + b"/" + name))
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                photograph(index).save(file, "PNG")
    except OSError as error:  # a file system that does not take the name
        return f"{title} (skipped: {error})", None
    named = [os.fsencode(source) + b"/" + name for name in group] if one_by_one else [source]
    arguments = [*named, "--model", campaign.inputs["model"], "--tokens", 4, "--device", "cpu"]
    output = folder / ("out" if number % 4 < 2 else os.fsdecode(group[0]).replace("/", "-") + "-out"[: 255 - 250])
    if len(os.fsencode(output.name)) > 255:
        output = folder / "out"
    ended = start("pipelines.reconstruct", [*arguments, "--output", os.fsencode(output)], folder).wait(SECONDS)
    if problem := ended.problem((0,)):
        return title, problem
    results = [path.read_text() for path in output.rglob("scores.json") if path.is_file()]
    if len(results) != len(group) or len(set(results)) != len(group):
        return title, f"{len(group)} inputs, {len(results)} results, {len(set(results))} different"
    before = tree(output)
    ended = start("pipelines.reconstruct", [*arguments, "--output", os.fsencode(output)], folder).wait(SECONDS)
    problem = ended.problem((0,))
    if problem is None and tree(output) != before:
        problem = f"a second run changes the output: {sorted(tree(output) ^ before)[:5]}"
    return title, problem


# -- half precision and concurrency


IMAGES_OF_A_CASE = 20


def half_case(campaign: Campaign, number: int, folder: Path) -> tuple[str, str | None]:
    """A batch of reconstructions in float16 or bfloat16, of noise, edges, constants and extremes."""
    rng = campaign.rng("half", number)
    dtype = (torch.float16, torch.bfloat16)[number % 2]
    bundled = number % 4 < 2
    height, width = (int(rng.integers(2, 5)) * 8 for _ in range(2))

    def run() -> None:
        import gpstoken_hf
        from gpstoken_hf import GPSTokenModel

        path = gpstoken_hf.bundled("gpstoken-nano") if bundled else campaign.inputs["model"]
        model = GPSTokenModel.from_pretrained(path, dtype=dtype).eval()
        images = torch.from_numpy(rng.uniform(-1, 1, (IMAGES_OF_A_CASE, 3, height, width))).to(dtype)
        for index in range(0, IMAGES_OF_A_CASE, 4):
            images[index] = float(rng.choice([-1.0, 0.0, 1.0]))  # constant
            images[index + 1] = images[index + 1].sign()  # black and white noise
            images[index + 2, :, :, : width // 2] = -1  # an edge
        counts = rng.integers(1, 16, IMAGES_OF_A_CASE).tolist()
        with torch.inference_mode():
            encoded = model.encode(images, num_tokens=counts)
            sample = model.decode(encoded.tokens, (height, width), attention_mask=encoded.attention_mask).sample
        check_loaded(bool(encoded.tokens.isfinite().all()), "tokens are not finite")
        check_loaded(bool(sample.isfinite().all()), "reconstructions are not finite")

    title = f"{'gpstoken-nano' if bundled else 'random weights'}, {dtype}, {width} x {height}"
    return title, call(run, folder, seconds=3 * SECONDS)


def encode_in_threads(campaign: Campaign) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from gpstoken_hf import GPSTokenModel

    model = GPSTokenModel.from_pretrained(campaign.inputs["model"]).eval()
    images = torch.rand(32, 1, 3, 24, 32, generator=torch.Generator().manual_seed(campaign.seed)) * 2 - 1

    def encode(image: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return model.encode(image, num_tokens=12).tokens

    expected = [encode(image) for image in images]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(encode, images))
    for index, (one, other) in enumerate(zip(found, expected)):
        check_loaded(torch.equal(one, other), f"image {index} has other tokens when 8 threads encode")


def load_in_workers(method: str, seed: int) -> None:
    from torch.utils.data import DataLoader

    dataset = PartitionDataset(16, seed)
    expected = torch.stack([dataset[index] for index in range(len(dataset))])
    loader = DataLoader(dataset, batch_size=4, num_workers=2, multiprocessing_context=method)
    check_loaded(torch.equal(torch.cat(list(loader)), expected), f"workers by {method} partition otherwise")


def concurrency_case(campaign: Campaign, number: int, folder: Path) -> tuple[str, str | None]:
    title = ("encode from 8 threads", "DataLoader workers by fork", "DataLoader workers by spawn")[number % 3]
    actions = (
        partial(encode_in_threads, campaign),
        partial(load_in_workers, "fork", campaign.seed),
        partial(load_in_workers, "spawn", campaign.seed),
    )
    # Each worker by spawn imports torch: minutes on a busy machine.
    return title, call(actions[number % 3], folder, seconds=6 * SECONDS, memory=16 * GIB)


@dataclass(frozen=True)
class Area:
    """A kind of attack: its function `(campaign, number, folder) -> (title, problem)`, and its number of cases."""

    title: str
    case: Callable[[Campaign, int, Path], tuple[str, str | None]]
    cases: int
    weight: int = 1  # what one case counts for in the table


AREAS = {
    "files": Area("corrupted files", files_case, 1000),
    "configs": Area("hostile configurations", configs_case, 100),
    "kills": Area("kills at random moments", kills_case, 3 * len(PROGRAMS)),
    "disk": Area("a full disk", disk_case, 2 * len(PROGRAMS)),
    "readonly": Area("outputs that cannot be written", readonly_case, 4 * len(PROGRAMS)),
    "names": Area("odd file names", names_case, 2 * len(ODD_NAMES)),
    "twice": Area("two runs at once in one output", twice_case, len(PROGRAMS)),
    "half": Area("half-precision reconstructions", half_case, 50, weight=IMAGES_OF_A_CASE),
    "concurrency": Area("threads and DataLoader workers", concurrency_case, 3),
}


# --------------------------------------------------------------------------------------------------- report and main


@dataclass
class Result:
    """The count of one area, and its failures with the commands that repeat them."""

    area: str
    tried: int = 0
    survived: int = 0
    failures: list[tuple[str, str, str]] = field(default_factory=list)  # title, problem, command


def versions() -> dict[str, str]:
    from importlib.metadata import version

    packages = ("torch", "transformers", "diffusers", "safetensors", "datasets", "numba", "numpy", "pillow")
    return {"Python": platform.python_version(), **{name: version(name) for name in packages}}


def as_markdown(results: Sequence[Result], seed: int, scale: float, minutes: float) -> str:
    """The page docs/reliability.md."""
    listed = ", ".join(f"{name} {number}" for name, number in versions().items())
    command = f"python -m tests.hostile_campaign --seed {seed} --scale {scale:g}"
    if len(results) < len(AREAS):
        command += " --areas " + " ".join(result.area for result in results)
    lines = [
        "# Reliability",
        "",
        "People point these programs at folders that hold their work, and load files from strangers.",
        "`make test-hostile` attacks the package and counts what survives. A case survives if it ends with a whole",
        "result, or with one clear line: exit code 2 of a program, a `ValueError`, an `OSError` or the error of a",
        "configuration's field of a function. A traceback, a crash, a hang, memory without bound, a lost file or one",
        "left half-written is a failure.",
        "",
        f"Measured on {datetime.now(timezone.utc):%Y-%m-%d} in {minutes:.0f} min with {listed}:",
        "",
        "| area | tried | survived |",
        "|---|---:|---:|",
        *(f"| {AREAS[result.area].title} | {result.tried} | {result.survived} |" for result in results),
        "",
        "The command of this table:",
        "",
        "```bash",
        command,
        "```",
    ]
    failures = [failure for result in results for failure in result.failures]
    lines += ["", "## Failures", "", "None." if not failures else "Each with the command that repeats it.", ""]
    for title, problem, command in failures:
        lines += [f"- {_code(title)}: {_code(problem)}", "", "    ```bash", f"    {command}", "    ```", ""]
    return "\n".join(lines).rstrip() + "\n"


def _code(text: str) -> str:
    """Text from outside as inline code: it may hold anything."""
    plain = " ".join(text.encode("unicode_escape").decode().replace("`", "'").split())
    return "`" + (plain if len(plain) <= 300 else f"{plain[:140]} ... {plain[-140:]}") + "`"


def run_area(campaign: Campaign, name: str, numbers: Sequence[int]) -> Result:
    area, result = AREAS[name], Result(name)
    for number in numbers:
        started = time.monotonic()
        with campaign.folder(name, number) as folder:
            title, problem = area.case(campaign, number, folder)
        result.tried += area.weight
        if problem is None:
            result.survived += area.weight
        else:
            command = f"python -m tests.hostile_campaign --areas {name} --seed {campaign.seed} --only {number}"
            result.failures.append((title, problem, command))
        state = "survived" if problem is None else f"FAILED: {_code(problem)}"
        print(f"{name} {number}: {_code(title)}: {state} ({time.monotonic() - started:.1f} s)", flush=True)
    return result


def warm_up(campaign: Campaign, areas: Sequence[str]) -> None:
    """Import and compile once what every forked child then has."""
    import datasets
    import diffusers
    import transformers

    import gpstoken_hf

    importlib.import_module("training_helpers")
    for program in PROGRAMS.values():
        importlib.import_module(program.module)
    # Also if OMP_NUM_THREADS says otherwise: the model would start threads here that no forked child has.
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    for module in (diffusers, transformers):
        module.utils.logging.disable_progress_bar()
    model = gpstoken_hf.GPSTokenModel.from_pretrained(campaign.inputs["model"]).eval()
    with torch.inference_mode():
        model(torch.zeros(1, 3, 24, 32), num_tokens=6)
    if {"files", "configs"} & {*areas}:
        use_autoencoder(campaign.inputs["autoencoder"])
        use_pipeline(campaign.inputs["pipeline"])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.hostile_campaign",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full numbers of cases")
    parser.add_argument("--areas", nargs="+", choices=AREAS, default=list(AREAS))
    parser.add_argument("--only", type=int, help="the number of one case")
    parser.add_argument("--output", type=Path, help="Markdown file to write the table to")
    options = parser.parse_args(argv)

    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hostile-") as work:
        os.chmod(work, 0o755)
        for name in ("HF_HOME", "HF_MODULES_CACHE", "MPLCONFIGDIR"):
            if name not in os.environ:
                os.environ[name] = f"{work}/{name.lower()}"
        campaign = Campaign(Path(work), options.seed)
        warm_up(campaign, options.areas)
        results = []
        for name in options.areas:
            count = max(1, math.ceil(AREAS[name].cases * options.scale))
            results.append(run_area(campaign, name, range(count) if options.only is None else [options.only]))

    print(f"\n{'area':<32} {'tried':>6} {'survived':>9}")
    for result in results:
        print(f"{AREAS[result.area].title:<32} {result.tried:>6} {result.survived:>9}")
        for title, problem, command in result.failures:
            print(f"    {_code(title)}: {_code(problem)}\n        {command}")
    if options.output is not None:
        page = as_markdown(results, options.seed, options.scale, (time.monotonic() - started) / 60)
        options.output.write_text(page, encoding="utf-8")
    return 1 if any(result.failures for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
