# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Compare time and memory of `partition_images` with the plain NumPy/OpenCV algorithm.

    python -m pipelines.benchmark_partition --output results/
    python -m pipelines.benchmark_partition --device cuda --output results/
    python -m pipelines.benchmark_partition --quick --output results/        # seconds, small cases

Every case is checked first: both sides must give the same regions. Then they take turns, and the medians of their
processor time are compared. On the GPU the medians are of wall time, for every backend and batch size. Absolute times
depend on the machine, ratios less so. The plain algorithm is tests/partition_reference.py, so the program runs from a
checkout of the repository. Without --image the picture is scikit-image's astronaut, scaled down to 256 x 256 and
mirrored at its borders for larger sizes. The output folder holds:

    results.md, results.json    the tables, and the numbers behind them
    growth.png                  how the cost grows with tokens and with pixels
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import gpstoken_hf
from gpstoken_hf.image_processing_gpstoken import open_image
from gpstoken_hf.partition import partition_images
from gpstoken_hf.triton_support import is_available

from .shared.costs import peak_growth
from .shared.outputs import atomic_directory
from .shared.photographs import sample_photograph
from .shared.programs import ProgramError, make_parser, positive_int, printable, run_program

PROGRAM = "pipelines.benchmark_partition"
REFERENCE = Path(__file__).resolve().parent.parent / "tests" / "partition_reference.py"
# (pixels along a side, tokens)
HEADLINE_CASES = [(256, 64), (256, 128), (256, 256)]
TOKEN_CASES = [(2048, tokens) for tokens in (64, 256, 1024, 4096, 16384)]
PIXEL_CASES = [(128, 64), (256, 256), (512, 1024), (1024, 4096), (2048, 16384)]
FIXED_CASES = [(128, 128), (256, 128), (512, 128), (1024, 128), (2048, 128)]
QUICK_CASES = [(64, 16), (128, 64)]
BATCHES = (1, 16, 64)


def load_reference() -> Callable[..., np.ndarray]:
    """`partition_reference` of the tests."""
    if not REFERENCE.exists():
        raise ProgramError(f"the plain algorithm must be in a checkout of the repository, got no file {REFERENCE}")
    spec = importlib.util.spec_from_file_location("partition_reference", REFERENCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.cv2.setNumThreads(1)
    return module.partition_reference


def load_square(path: str | None) -> np.ndarray:
    """The largest centred square of a picture, (3, S, S) float32 in [-1, 1]."""
    if path is None:
        pixels = np.asarray(sample_photograph("astronaut"))
    else:
        pixels = np.asarray(open_image(path).convert("RGB"))
    side = min(pixels.shape[:2])
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    square = pixels[top : top + side, left : left + side]
    return np.ascontiguousarray(square.transpose(2, 0, 1), dtype=np.float32) / np.float32(127.5) - 1


def picture(square: np.ndarray, side: int) -> np.ndarray:
    """The picture at side x side: scaled to at most 512 pixels, and mirrored for larger sizes."""
    scaled = torch.nn.functional.interpolate(
        torch.from_numpy(square)[None], size=(min(side, 512),) * 2, mode="bicubic", antialias=True
    )[0].clamp(-1, 1)
    copies = math.ceil(side / scaled.shape[-1])
    row = torch.cat([scaled.flip(-1) if i % 2 else scaled for i in range(copies)], dim=-1)
    whole = torch.cat([row.flip(-2) if i % 2 else row for i in range(copies)], dim=-2)
    return whole[:, :side, :side].contiguous().numpy()


def in_mib(size: int | None) -> float | None:
    return None if size is None else size / 2**20


def timed(function: Callable[[], Any], clock: Callable[[], float]) -> float:
    begin = clock()
    function()
    return clock() - begin


def as_set(boxes: np.ndarray) -> set[tuple[int, ...]]:
    return {tuple(box) for box in boxes.tolist()}


def compare_on_cpu(
    square: np.ndarray, reference: Callable[..., np.ndarray], side: int, tokens: int, seconds: float
) -> dict[str, Any]:
    """Measure one case on one thread, both sides in turn for about `seconds` and at most 25 times."""
    image = picture(square, side)
    batch = torch.from_numpy(image)[None]
    expected: list[np.ndarray] = []
    memory = in_mib(peak_growth(lambda: partition_images(batch, tokens), "cpu"))
    plain_memory = in_mib(peak_growth(lambda: expected.append(reference(image, tokens)), "cpu"))
    boxes = partition_images(batch, tokens).boxes
    assert boxes is not None  # a partition has regions
    if as_set(expected[0]) != as_set(boxes[0].numpy()):
        raise ProgramError(f"the regions differ from the plain algorithm's at {side} x {side} with {tokens} tokens")
    plain: list[float] = []
    ours: list[float] = []
    begin = time.perf_counter()
    while len(plain) < 25 and (not plain or time.perf_counter() - begin < seconds):
        # Processor time, because wall time on a shared machine includes other processes.
        plain.append(timed(lambda: reference(image, tokens), time.process_time))
        ours.extend(timed(lambda: partition_images(batch, tokens), time.process_time) for _ in range(3))
    return {
        "side": side,
        "tokens": tokens,
        "plain_ms": statistics.median(plain) * 1e3,
        "ours_ms": statistics.median(ours) * 1e3,
        "ratio": statistics.median(plain) / statistics.median(ours),
        "plain_mib": plain_memory,
        "ours_mib": memory,
        "turns": len(plain),
    }


def compare_batches(
    square: np.ndarray,
    reference: Callable[..., np.ndarray],
    side: int,
    tokens: int,
    batch_size: int,
    turns: int,
    device: torch.device,
) -> dict[str, Any]:
    """Measure a batch on `device` with every backend; the plain algorithm takes one image per turn."""
    pictures = np.stack([np.roll(picture(square, side), 7 * i, axis=-1) for i in range(batch_size)])
    images = torch.from_numpy(pictures).to(device)
    backends = [name for name in ("numba", "torch", "triton") if name != "triton" or is_available(device)]

    def run(backend: str) -> torch.Tensor:
        boxes = partition_images(images, tokens, backend=backend).boxes
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return boxes

    expected = [as_set(reference(image, tokens)) for image in pictures]
    row: dict[str, Any] = {"side": side, "tokens": tokens, "batch": batch_size, "turns": turns}
    for backend in backends:
        boxes = run(backend).cpu().numpy()
        row[f"{backend}_equal"] = sum(as_set(found) == wanted for found, wanted in zip(boxes, expected))
        # Triton computes powers on the device, which may differ in the last place.
        if backend != "triton" and row[f"{backend}_equal"] < batch_size:
            raise ProgramError(f"the regions of {backend} differ from the plain algorithm's at {side} x {side}")
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            run(backend)
            row[f"{backend}_mib"] = (torch.cuda.max_memory_allocated(device) - before) / 2**20
    plain: list[float] = []
    times: dict[str, list[float]] = {backend: [] for backend in backends}
    for _ in range(turns):
        plain.append(timed(lambda: reference(pictures[0], tokens), time.perf_counter))
        for backend in backends:
            times[backend].append(timed(partial(run, backend), time.perf_counter))
    row["plain_ms_per_image"] = statistics.median(plain) * 1e3
    for backend in backends:
        row[f"{backend}_ms"] = statistics.median(times[backend]) * 1e3
    return row


def cpu_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| image | tokens | plain, ms | ours, ms | ratio | plain, MiB | ours, MiB | ours, us per token | turns |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        memory = ["-" if value is None else f"{value:.1f}" for value in (row["plain_mib"], row["ours_mib"])]
        lines.append(
            f"| {row['side']} x {row['side']} | {row['tokens']} | {row['plain_ms']:.1f} | {row['ours_ms']:.2f} | "
            f"{row['ratio']:.1f}x | {memory[0]} | {memory[1]} | {row['ours_ms'] * 1e3 / row['tokens']:.1f} | "
            f"{row['turns']} |"
        )
    return lines


def batch_table(rows: list[dict[str, Any]]) -> list[str]:
    """One line for each case and backend. The ratio compares times per image."""
    lines = [
        "| batch | image | tokens | backend | ms | images per s | plain, ms per image | ratio | equal regions | MiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        for backend in ("numba", "torch", "triton"):
            if f"{backend}_ms" not in row:
                continue
            seconds = row[f"{backend}_ms"] / 1e3
            memory = row.get(f"{backend}_mib")
            lines.append(
                f"| {row['batch']} | {row['side']} x {row['side']} | {row['tokens']} | {backend} | "
                f"{seconds * 1e3:.2f} | {row['batch'] / seconds:.0f} | {row['plain_ms_per_image']:.1f} | "
                f"{row['plain_ms_per_image'] / 1e3 * row['batch'] / seconds:.1f}x | "
                f"{row[f'{backend}_equal']} of {row['batch']} | {'-' if memory is None else f'{memory:.0f}'} |"
            )
    return lines


def slope(rows: list[dict[str, Any]], quantity: Callable[[dict[str, Any]], float]) -> float:
    """The exponent p of the best fit `ours ~ quantity^p`; linear growth has 1."""
    x = np.log([quantity(row) for row in rows])
    y = np.log([row["ours_ms"] for row in rows])
    return float(np.polyfit(x, y, 1)[0])


def draw_growth(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = (
        (results["tokens"], "tokens", lambda row: row["tokens"], "tokens on one image size"),
        (results["pixels"], "pixels", lambda row: row["side"] ** 2, "pixels, tokens in proportion"),
    )
    for axes, (rows, label, quantity, title) in zip(figure.subplots(1, 2), panels):
        x = [quantity(row) for row in rows]
        axes.loglog(x, [row["plain_ms"] for row in rows], "o--", color="0.5", label="plain NumPy/OpenCV")
        axes.loglog(x, [row["ours_ms"] for row in rows], "o-", color="C0", label="partition_images")
        anchor = rows[-1]["ours_ms"] / x[-1]
        axes.loglog(x, [anchor * value for value in x], ":", color="C0", label="linear")
        axes.set(xlabel=label, ylabel="ms of one thread", title=title)
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    figure.savefig(path, dpi=120)


def machine() -> str:
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    load = f", load {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    return f"{name}, {os.cpu_count()} cores{load}; torch {torch.__version__}, numpy {np.__version__}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(PROGRAM, __doc__)
    parser.add_argument("--output", required=True, help="new folder for the tables and the plot")
    parser.add_argument("--overwrite", action="store_true", help="replace an output folder of this program")
    parser.add_argument("--image", help="picture to use instead of the astronaut")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="cuda: also measure batches on the GPU"
    )
    parser.add_argument("--turns", type=positive_int, default=15, help="turns of each CUDA case (default %(default)s)")
    parser.add_argument("--seconds", type=positive_int, default=8, help="time for a CPU case (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="small cases only, as a check that the program runs")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ProgramError("--device cuda must have a CUDA device, got none")
    reference = load_reference()
    square = load_square(arguments.image)
    cases = {
        "headline": QUICK_CASES if arguments.quick else HEADLINE_CASES,
        "tokens": [(128, 16), (128, 64)] if arguments.quick else TOKEN_CASES,
        "pixels": QUICK_CASES if arguments.quick else PIXEL_CASES,
        "fixed": QUICK_CASES if arguments.quick else FIXED_CASES,
    }
    environment = machine()
    with atomic_directory(arguments.output, arguments.overwrite, PROGRAM) as folder:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            # The first call compiles the loops.
            partition_images(torch.zeros(1, 3, 32, 32), 2)
            measured: dict[tuple[int, int], dict[str, Any]] = {}
            distinct = sorted({case for group in cases.values() for case in group})
            for case in tqdm(distinct, desc="cases", unit="case"):
                measured[case] = compare_on_cpu(square, reference, case[0], case[1], arguments.seconds)
        finally:
            torch.set_num_threads(threads)
        results = {name: [measured[case] for case in group] for name, group in cases.items()}
        text = [
            "# Partition: benchmark",
            "",
            f"`python -m pipelines.benchmark_partition {printable(' '.join(sys.argv[1:] if argv is None else argv))}`",
            "",
            f"gpstoken_hf {gpstoken_hf.__version__} on {environment}. One thread, medians of processor time, both",
            "sides in turn, equal regions in every case. MiB is the growth of the process during a call.",
            "",
            "## One image",
            "",
            *cpu_table(results["headline"]),
            "",
            f"## Growth with tokens: time ~ tokens^{slope(results['tokens'], lambda row: row['tokens']):.2f}",
            "",
            *cpu_table(results["tokens"]),
            "",
            f"## Growth with pixels, tokens in proportion: time ~ pixels^"
            f"{slope(results['pixels'], lambda row: row['side'] ** 2):.2f}",
            "",
            *cpu_table(results["pixels"]),
            "",
            f"## Growth with pixels, tokens fixed: time ~ pixels^"
            f"{slope(results['fixed'], lambda row: row['side'] ** 2):.2f}",
            "",
            *cpu_table(results["fixed"]),
        ]
        if arguments.device == "cuda":
            side, batches = (64, (1, 2)) if arguments.quick else (256, BATCHES)
            results["cuda"] = [
                compare_batches(square, reference, side, side // 2, batch_size, arguments.turns, torch.device("cuda"))
                for batch_size in tqdm(batches, desc="CUDA", unit="case")
            ]
            text += [
                "",
                f"## Batches on {torch.cuda.get_device_name()}",
                "",
                f"Medians of wall time. numba: copied to the CPU, {threads} threads there, and back. The plain",
                "algorithm takes one image at a time, in one thread.",
                "",
                *batch_table(results["cuda"]),
            ]
        (folder / "results.md").write_text("\n".join(text) + "\n")
        (folder / "results.json").write_text(json.dumps({"machine": environment, **results}, indent=1) + "\n")
        draw_growth(results, folder / "growth.png")
    print("\n".join(text))
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
