# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Check the splatting op against its reference on this machine, then time it against dense rendering.

    python -m pipelines.benchmark_splatting --output results                  # one CPU thread
    python -m pipelines.benchmark_splatting --output results --device cuda

Every figure is a median of rounds in which all sides take turns, so that the load of the machine affects all of them;
only in the curves of growth each side has its own rounds. The dense side is `splat_reference`: every weight of every
(token, pixel) pair, forward in chunks of tokens, backward by autograd. The output folder holds results.md,
results.json and growth.png.
"""

from __future__ import annotations

import heapq
import itertools
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from gpstoken_hf import splatting_triton, triton_support
from gpstoken_hf.splatting import splat_gaussians, splat_reference

from .shared.outputs import atomic_directory
from .shared.programs import ProgramError, make_parser, positive_int, printable, run_program

PROGRAM = "pipelines.benchmark_splatting"

# (gaussians, features, size, support, mask) -> maps
Splat = Callable[..., torch.Tensor]

# Largest error of the op against the reference, over the largest value of the reference. Float32 sums in another
# order; the gradient of a Gaussian adds thousands of terms of either sign.
MAP_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 5e-5
# Dense autograd keeps about five float32 tensors with one value per (token, pixel) pair.
MAX_DENSE_AUTOGRAD_PAIRS = 150_000_000
# The curves of growth leave out the dense side beyond this size.
MAX_GROWTH_PAIRS = 2**26
MIN_SECONDS_PER_MEASUREMENT = 0.005


@dataclass(frozen=True)
class Case:
    """A shape to time: B images, L tokens, C channels, a map of side x side pixels."""

    name: str
    B: int
    L: int
    C: int
    side: int

    @property
    def num_pairs(self) -> int:
        return self.B * self.L * self.side**2

    def __str__(self) -> str:
        return f"{self.name}: B{self.B} L{self.L} C{self.C} {self.side}²"


CASES = (
    Case("A", 16, 128, 16, 64),
    Case("A/2", 8, 128, 16, 64),
    Case("B", 1, 2048, 16, 256),
    Case("C", 1, 4096, 32, 256),
    Case("training", 64, 32, 16, 16),
)
QUICK_CASES = (Case("quick", 2, 16, 4, 16),)
# (what, case, device) -> at least this ratio to dense, or at most this many megabytes.
RATIO_TARGETS = {
    ("forward", "B", "cpu"): 40,
    ("forward + backward", "A/2", "cpu"): 10,
    ("forward", "A", "cuda"): 5,
    ("forward + backward", "A", "cuda"): 5,
    ("forward", "B", "cuda"): 30,
    ("forward + backward", "B", "cuda"): 30,
}
# On a GPU, the rows above may take at most this many times two launches of the smallest kernel.
MAX_TWO_LAUNCHES = 3
MEMORY_TARGETS_MB = {("forward + backward", "C"): 200}


def partition_like_gaussians(B: int, L: int, seed: int) -> torch.Tensor:
    """Gaussians `(B, L, 5)` as of a partition: dyadic regions, small where the image is complex.

    Complexity is drawn, and passed on to the halves with some noise. At support 3 the boxes hold three to four times
    as many (token, pixel) pairs as a map has pixels, as those of photographs do.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(B, 2 * L + 1, generator=generator).tolist()
    layouts = []
    for b in range(B):
        draws = iter(noise[b])
        regions = [(-1.0, 0.0, 0.0, 1.0, 1.0, 1.0)]  # -score, x, y, w, h, complexity
        while len(regions) < L:
            _, x, y, w, h, complexity = heapq.heappop(regions)
            half_w, half_h = (w / 2, h) if w >= h else (w, h / 2)
            for x0, y0 in ((x, y), (x + w - half_w, y + h - half_h)):
                inherited = complexity * math.exp(0.7 * next(draws))
                # A partition does not split small regions; here, below an eighth of the mean.
                score = inherited * half_w * half_h if 8 * L * half_w * half_h > 1 else 0.0
                heapq.heappush(regions, (-score, x0, y0, half_w, half_h, inherited))
        layouts.append([[2 / 3 * w, 2 / 3 * h, 0.0, 2 * x + w - 1, 2 * y + h - 1] for _, x, y, w, h, _ in regions])
    gaussians = torch.tensor(layouts)
    gaussians[..., :2] *= torch.empty(B, L, 2).uniform_(0.9, 1.1, generator=generator)
    gaussians[..., 2].uniform_(-0.5, 0.5, generator=generator)
    return gaussians


def random_features(B: int, L: int, C: int, device: torch.device) -> torch.Tensor:
    return torch.randn(B, L, C, generator=torch.Generator().manual_seed(1)).to(device)


# ---- The sides ------------------------------------------------------------------------------------------------------


def automatic(gaussians, features, size, support=3.0, mask=None):
    """`splat_gaussians` with its own choice of a path, as users call it."""
    return splat_gaussians(gaussians, features, size, support, attention_mask=mask)


def tiles(gaussians, features, size, support=3.0, mask=None):
    """The path for devices without kernels, on this device."""
    return torch.ops.gpstoken.splat(gaussians, features, mask, *size, support, "tiled")


SIDES: dict[str, Splat] = {"op": automatic, "tiles in PyTorch": tiles, "dense": splat_reference}


def forward(splat: Splat, gaussians: torch.Tensor, features: torch.Tensor, weights: torch.Tensor) -> None:
    with torch.no_grad():
        splat(gaussians, features, weights.shape[-2:])


def forward_backward(
    splat: Splat,
    gaussians: torch.Tensor,
    features: torch.Tensor,
    weights: torch.Tensor,
    support: float = 3.0,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """The map, and the gradients of `<weights, map>` with respect to Gaussians and features."""
    gaussians, features = gaussians.detach().requires_grad_(), features.detach().requires_grad_()
    maps = splat(gaussians, features, weights.shape[-2:], support, mask)
    return maps.detach(), *torch.autograd.grad(maps, (gaussians, features), weights)


PASSES: dict[str, Callable[..., Any]] = {"forward": forward, "forward + backward": forward_backward}


# ---- Checking -------------------------------------------------------------------------------------------------------


def check(device: torch.device, quick: bool) -> list[dict[str, Any]]:
    """Compare every path and kernel variant with the reference.

    Raises:
        ProgramError: If any of them differs.
    """
    shapes = [(2, 7, 3, 9, 13), (1, 1, 1, 1, 1), (2, 40, 16, 16, 16)]
    if not quick:
        shapes += [(1, 30, 70, 17, 33), (1, 12, 128, 40, 9), (2, 600, 5, 70, 64), (1, 200, 2, 1, 300)]
        shapes += [(4, 128, 16, 64, 64)]
    if device.type == "cuda":
        shapes += [(16, 128, 16, 64, 64), (1, 2048, 16, 256, 256), (1, 64, 8, 1024, 1024)]
    rows = []
    for shape, support, masked in itertools.product(shapes, (0.5, 3.0, 10.0), (False, True)):
        rows += _check_shape(shape, support, masked, device)
    return rows


def _check_shape(
    shape: tuple[int, int, int, int, int], support: float, masked: bool, device: torch.device
) -> list[dict[str, Any]]:
    B, L, C, h, w = shape
    gaussians = partition_like_gaussians(B, L, seed=L).to(device)
    features = random_features(B, L, C, device)
    weights = torch.randn(B, C, h, w, generator=torch.Generator().manual_seed(2)).to(device)
    drawn = torch.rand(B, L, generator=torch.Generator().manual_seed(3)) < 0.8
    mask = drawn.to(device) if masked else None
    results = {
        name: forward_backward(side, gaussians, features, weights, support, mask) for name, side in SIDES.items()
    }
    if triton_support.is_available(device):
        results |= _kernel_variants(gaussians, features, weights, mask, support)
    where = f"B{B} L{L} C{C} {h} x {w}, support {support}, {'masked' if masked else 'no mask'}"
    again = forward_backward(automatic, gaussians, features, weights, support, mask)
    if not all(torch.equal(one, other) for one, other in zip(again, results["op"], strict=True)):
        raise ProgramError(f"two runs of the op differ at {where}")
    reference = results.pop("dense")
    rows = []
    for name, values in results.items():
        errors = [
            ((value - target).abs().max() / target.abs().max().clamp(min=1)).item()
            for value, target in zip(values, reference, strict=True)
        ]
        limits = (MAP_TOLERANCE, GRADIENT_TOLERANCE, GRADIENT_TOLERANCE)
        if not all(error <= limit for error, limit in zip(errors, limits, strict=True)):
            raise ProgramError(f"{name} differs from the reference at {where}: {errors}, allowed {limits}")
        rows.append({"path": name, "shape": where, "map": errors[0], "gradients": max(errors[1:])})
    return rows


def _kernel_variants(
    gaussians: torch.Tensor,
    features: torch.Tensor,
    weights: torch.Tensor,
    mask: torch.Tensor | None,
    support: float,
) -> dict[str, tuple[torch.Tensor, ...]]:
    """The results of `forward_backward` for each variant of the kernels, forced."""
    height, width = weights.shape[-2:]
    render = partial(splatting_triton.triton_forward, gaussians, features, mask, height, width, support)
    differentiate = partial(splatting_triton.triton_backward, weights, gaussians, features, mask, support)
    return {
        "Triton, lists": (render(make_lists=True), *differentiate(num_strips=5)),
        "Triton, no lists": (render(make_lists=False), *differentiate(num_strips=1)),
    }


# ---- Measuring ------------------------------------------------------------------------------------------------------


def measure(functions: dict[str, Callable[[], Any]], device: torch.device, num_rounds: int) -> dict[str, float]:
    """Median seconds of each function over rounds in which they take turns, after a first round that compiles."""
    repeats = {}
    for name, function in functions.items():
        function()
        repeats[name] = max(1, math.ceil(MIN_SECONDS_PER_MEASUREMENT / _seconds(function, device, 1)))
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(num_rounds):
        for name, function in functions.items():
            function()  # uncounted: what another side left in caches and page tables is not this side's cost
            seconds[name].append(_seconds(function, device, repeats[name]))
    return {name: statistics.median(values) for name, values in seconds.items()}


def _seconds(function: Callable[[], Any], device: torch.device, repeats: int) -> float:
    _wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    _wait(device)
    return max(time.perf_counter() - start, 1e-9) / repeats


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_extra_bytes(what: str, case: Case, device: torch.device) -> int | None:
    """Peak memory of a call of the op beyond its inputs, results included; None if unknown.

    On the CPU it is measured in a process of its own: here the allocator keeps what earlier calls gave back, and a
    call that finds room there would seem to need nothing.
    """
    if device.type == "cuda":
        function = partial(PASSES[what], automatic, *_inputs(case, device))
        function()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    program = f"from pipelines.benchmark_splatting import print_peak; print_peak({what!r}, {astuple(case)!r})"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    return int(result.stdout.split()[-1]) if result.returncode == 0 else None


def print_peak(what: str, case: tuple[Any, ...]) -> None:
    """Print the peak in bytes; `peak_extra_bytes` runs this in a fresh process on the CPU."""
    cpu = torch.device("cpu")
    run = PASSES[what]
    run(automatic, *_inputs(Case("first call", 1, 4, case[3], 8), cpu))  # loads the compiled loops
    inputs = _inputs(Case(*case), cpu)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, VmHWM
    before = _status_bytes("VmRSS")
    run(automatic, *inputs)
    print(max(0, _status_bytes("VmHWM") - before))


def _status_bytes(field: str) -> int:
    return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0]) * 1024


def two_launches(device: torch.device) -> Callable[[], None]:
    """Two launches of the smallest kernel, to measure the cost of a launch."""
    value = torch.zeros(1, device=device)

    def launch() -> None:
        value.add_(1)
        value.add_(1)

    return launch


def graphed(function: Callable[[], Any]) -> Callable[[], None]:
    """`function` as a CUDA graph, which leaves out the host's work."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is compiled or allocated once, before the capture
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def time_case(case: Case, device: torch.device, num_rounds: int) -> list[dict[str, Any]]:
    """Time forward, and forward + backward, of every side; returns rows of the table."""
    inputs = _inputs(case, device)
    rows = []
    for what, run in PASSES.items():
        functions: dict[str, Callable[[], Any]] = {
            name: partial(run, side, *inputs)
            for name, side in SIDES.items()
            if name != "dense" or what == "forward" or case.num_pairs <= MAX_DENSE_AUTOGRAD_PAIRS
        }
        if device.type == "cuda":
            functions["two launches"] = two_launches(device)
            for name in ("op", "two launches"):
                functions[f"{name}, graph"] = graphed(functions[name])
        seconds = measure(functions, device, num_rounds)
        memory = peak_extra_bytes(what, case, device)
        milliseconds = {name: value * 1e3 for name, value in seconds.items()}
        row: dict[str, Any] = {"case": str(case), "what": what, "milliseconds": milliseconds}
        row["peak_extra_mb"] = None if memory is None else memory / 1e6
        if "dense" in seconds:
            row["ratio"] = seconds["dense"] / seconds["op"]
        if "two launches" in seconds:
            row["launches"] = seconds["op"] / seconds["two launches"]
            row["graph_launches"] = seconds["op, graph"] / seconds["two launches, graph"]
        row["target"], row["met"] = _target(row, what, case.name, device.type)
        rows.append(row)
    return rows


def _inputs(case: Case, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gaussians, features, and weights that take the place of a loss."""
    weights = torch.randn(case.B, case.C, case.side, case.side, generator=torch.Generator().manual_seed(2))
    gaussians = partition_like_gaussians(case.B, case.L, seed=0)
    return gaussians.to(device), random_features(case.B, case.L, case.C, device), weights.to(device)


def _target(row: dict[str, Any], what: str, case: str, device: str) -> tuple[str, bool | None]:
    """The target of a row and whether it is met; `("", None)` without a target."""
    ratio, megabytes = RATIO_TARGETS.get((what, case, device)), MEMORY_TARGETS_MB.get((what, case))
    if ratio is not None:
        target, met = f">= {ratio}x dense", row["ratio"] >= ratio
        if device == "cuda":
            target += f", <= {MAX_TWO_LAUNCHES}x two launches"
            met = met and row["launches"] <= MAX_TWO_LAUNCHES
        return target, met
    if megabytes is not None:
        return f"<= {megabytes} MB", None if row["peak_extra_mb"] is None else row["peak_extra_mb"] <= megabytes
    return "", None


def scaling(device: torch.device, num_rounds: int, quick: bool) -> dict[str, list[dict[str, float]]]:
    """Time of forward + backward over the number of tokens (256² map) and over pixels (256 tokens), 16 channels."""
    side, L = (16, 16) if quick else (256, 256)
    token_counts = (8, 16) if quick else (64, 256, 1024, 4096, 16384)
    sides = (8, 16) if quick else (64, 128, 256, 512, 1024)
    cases = {
        "tokens": [(count, Case("", 1, count, 16, side)) for count in token_counts],
        "pixels": [(side**2, Case("", 1, L, 16, side)) for side in sides],
    }
    curves: dict[str, list[dict[str, float]]] = {}
    for axis, points in cases.items():
        curves[axis] = []
        for value, case in tqdm(points, desc=f"growth with {axis}", leave=False):
            inputs = _inputs(case, device)
            names = ("op", "dense") if case.num_pairs <= MAX_GROWTH_PAIRS else ("op",)
            # One after the other, unlike the cases: a curve compares a side with itself, and right after a dense side
            # that gives gigabytes back the op would pay for pages that the system hands out anew.
            seconds: dict[str, float] = {}
            for name in names:
                seconds |= measure({name: partial(forward_backward, SIDES[name], *inputs)}, device, num_rounds)
            curves[axis].append({axis: value, **{name: s * 1e3 for name, s in seconds.items()}})
    return curves


# ---- Reporting ------------------------------------------------------------------------------------------------------


def machine(device: torch.device) -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    facts = {"cpu": model, "threads": torch.get_num_threads(), "torch": torch.__version__}
    if device.type == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
        facts["triton"] = getattr(triton_support.triton, "__version__", "none")
    return facts


def to_markdown(report: dict[str, Any]) -> str:
    sides = sorted({name for row in report["cases"] for name in row["milliseconds"]}, key=_column_order)
    head = [
        "case",
        "what",
        *(f"{name}, ms" for name in sides),
        "dense / op",
        "op / two launches",
        "the same, graphs",
        "peak extra MB",
        "target",
        "met",
    ]
    lines = ["# Splatting on this machine", "", f"`{report['command']}`", ""]
    lines += [", ".join(f"{name} {value}" for name, value in report["machine"].items()), ""]
    lines += ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in report["cases"]:
        cells = [row["case"], row["what"]]
        cells += [f"{row['milliseconds'][name]:.3g}" if name in row["milliseconds"] else "-" for name in sides]
        cells += [f"{row['ratio']:.1f}x" if "ratio" in row else "-"]
        cells += [f"{row[key]:.1f}x" if key in row else "-" for key in ("launches", "graph_launches")]
        cells += ["-" if row["peak_extra_mb"] is None else f"{row['peak_extra_mb']:.1f}", row["target"] or "-"]
        cells += ["-" if row["met"] is None else "yes" if row["met"] else "no"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Largest error against the reference, over its largest value:", ""]
    lines += ["| path | map | gradients | checks |", "| --- | --- | --- | --- |"]
    for path in sorted({row["path"] for row in report["checks"]}):
        rows = [row for row in report["checks"] if row["path"] == path]
        worst_map, worst_gradient = max(row["map"] for row in rows), max(row["gradients"] for row in rows)
        lines.append(f"| {path} | {worst_map:.1e} | {worst_gradient:.1e} | {len(rows)} |")
    return "\n".join(lines) + "\n"


def _column_order(name: str) -> tuple[int, str]:
    order = ("dense", "tiles in PyTorch", "op", "two launches", "op, graph", "two launches, graph")
    return order.index(name), name


def draw(curves: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Plot milliseconds over tokens and over pixels, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for axis, (name, points) in zip(axes, curves.items(), strict=True):
        for side, label, marker in (("dense", "dense, autograd", "s"), ("op", "splat_gaussians", "o")):
            shown = [(point[name], point[side]) for point in points if side in point]
            axis.plot(*zip(*shown, strict=True), marker=marker, label=label)
        axis.set(xscale="log", yscale="log", xlabel=f"{name}")
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="forward + backward, ms", title="256 x 256 map, 16 channels")
    axes[1].set(title="256 tokens, 16 channels")
    axes[0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(PROGRAM, __doc__)
    parser.add_argument(
        "--output", type=Path, required=True, help="new folder for results.md, results.json and growth.png"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=positive_int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--rounds", type=positive_int, default=9, help="rounds of each median (default: %(default)s)")
    parser.add_argument("--check_only", action="store_true", help="check against the reference only")
    parser.add_argument("--quick", action="store_true", help="one small case, as a check that the program runs")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ProgramError("--device cuda must have a CUDA device and a PyTorch built for it, got none")
    device = torch.device(arguments.device)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(arguments.threads)
    try:
        with atomic_directory(arguments.output, program=PROGRAM) as folder:
            command = "python -m pipelines.benchmark_splatting " + " ".join(sys.argv[1:] if argv is None else argv)
            report: dict[str, Any] = {"command": printable(command.strip()), "machine": machine(device), "cases": []}
            report["checks"] = check(device, arguments.quick)
            if not arguments.check_only:
                cases = QUICK_CASES if arguments.quick else CASES
                for case in tqdm(cases, desc="cases"):
                    report["cases"] += time_case(case, device, arguments.rounds)
                report["growth"] = scaling(device, arguments.rounds, arguments.quick)
                draw(report["growth"], folder / "growth.png")
            text = to_markdown(report)
            (folder / "results.md").write_text(text)
            (folder / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    finally:
        torch.set_num_threads(threads_before)
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
