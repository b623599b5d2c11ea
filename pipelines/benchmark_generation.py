# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""What generation costs: Table 8's columns for two stages over tokens, against a SiT over a grid of latents.

    python -m pipelines.benchmark_generation --device cuda --batch_size 8 --output results/
    python -m pipelines.benchmark_generation --size S --batch_size 1 --steps 1 --output results/

Both sides have random weights, on which cost does not depend, and are of the same size: --size XL is 28 blocks of
width 1152. Ours samples a layout and then the texture of --tokens tokens, and decodes them; --pipeline puts a
checkpoint in its place. The other side is a SiT with patches of 2 x 2 over 32 x 32 x 4 latents (the architecture of
SiT-XL/2, as diffusers' DiTTransformer2DModel), decoded by an AutoencoderKL of SDXL's shape. Both run with guidance in
every step, which doubles the batch.

Both sides take turns; times are medians over all steps of --repeats rounds after a warm-up, with the smallest and the
largest. The images per second at 250 steps are computed from the time of a step. A training step is the forward and
backward pass of the mean squared error of the texture transformer or the SiT, without an optimizer. The output folder
holds results.json, report.md and report.html, and times.png.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel
from tqdm import tqdm

from gpstoken_hf.configuration_gpstoken import PRESETS, GPSTokenConfig
from gpstoken_hf.evaluation_results import make_result, write_result
from gpstoken_hf.modeling_gpstoken import GPSTokenModel
from gpstoken_hf.transformer_sit import SiTTransformer1DModel

from .shared.checkpoints import load_pipeline
from .shared.costs import (
    device_name,
    measure,
    milliseconds,
    multiply_adds,
    num_parameters,
    peak_growth,
    spread,
    weight_bytes,
)
from .shared.outputs import atomic_directory
from .shared.programs import make_parser, positive_int, printable, run_program
from .shared.reports import Command, Curve, Heading, Picture, Table, Text, draw_curves, number, write_report

PROGRAM = "pipelines.benchmark_generation"
# Blocks, heads and channels of a head, as SiT names them.
SIZES = {"S": (12, 6, 64), "B": (12, 12, 64), "L": (24, 16, 64), "XL": (28, 16, 72)}
NUM_CLASSES = 1000
FULL_STEPS = 250
PARTS = ("layout step", "step", "decode", "training step")


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    with atomic_directory(args.output, args.overwrite, PROGRAM) as folder:
        results = benchmark([make_ours(args), make_grid(args)], args)
        protocol = {
            "task": "cost of generation",
            "device": device_name(args.device),
            "size": args.size,
            "layout_size": args.layout_size,
            "preset": args.preset,
            "pipeline": args.pipeline,
            "batch_size": args.batch_size,
            "steps": args.steps,
            "layout_steps": args.layout_steps,
            "guidance": "in every step, by a doubled batch",
            "dtype": args.dtype,
            "repeats": args.repeats,
        }
        command = [PROGRAM, *(sys.argv[1:] if argv is None else argv)]
        write_result(folder / "results.json", make_result(protocol, results, command))
        rows = [
            [
                entry["name"],
                number(entry["tokens"]),
                number(entry["parameters"] / 1e6, 1),
                number(entry["multiply_adds"] / 1e9, 1),
                milliseconds(entry.get("layout step")),
                milliseconds(entry["step"]),
                milliseconds(entry["decode"]),
                number(entry["images_per_s"], 3),
                milliseconds(entry["training step"]),
                "–" if entry["peak_bytes"] is None else number(entry["peak_bytes"] / 2**20, 0),
            ]
            for entry in results
        ]
        header = [
            "model",
            "tokens",
            "transformer (M parameters)",
            "forward (GMAC)",
            "layout step (ms)",
            "step (ms)",
            "decode (ms)",
            f"images/s at {FULL_STEPS} steps",
            "training step (ms)",
            "peak memory (MiB)",
        ]
        draw_curves(
            folder / "times.png",
            [
                Curve(
                    str(entry["name"]),
                    [(steps, args.batch_size / seconds_of(entry, steps, args)) for steps in (10, 25, 50, 100, 250)],
                )
                for entry in results
            ],
            "steps",
            "images per second",
            protocol["device"],
            is_log=True,
        )
        write_report(
            folder,
            "What generation costs",
            [
                Text(
                    f"Batches of {args.batch_size}, {args.dtype}, on {protocol['device']}. Weights are random, except "
                    "those of a --pipeline."
                ),
                Table(header, rows),
                Text(
                    "Times are medians with the smallest and the largest in brackets. Multiply-adds are of one image. "
                    "Peak memory is that of the weights and of one call, the training step included."
                ),
                Picture("times.png", "Images per second over the number of steps, from the time of a step."),
                Heading("How it was measured"),
                Command(f"python -m {shlex.join(map(printable, command))}"),
                Table(("field", "value"), [(name, json.dumps(value)) for name, value in protocol.items()]),
            ],
        )
        print((folder / "report.md").read_text(encoding="utf-8").split("## How")[0])
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(PROGRAM, __doc__)
    parser.add_argument("--pipeline", help="a saved pipeline takes the place of ours with random weights")
    parser.add_argument("--size", choices=SIZES, default="XL", help="of the texture transformer and of the SiT")
    parser.add_argument("--layout_size", choices=SIZES, default="B", help="of the layout transformer")
    parser.add_argument("--preset", choices=PRESETS, default="m128", help="of our tokenizer")
    parser.add_argument("--tokens", type=positive_int, help="default: the preset's")
    parser.add_argument("--batch_size", type=positive_int, default=8)
    parser.add_argument("--steps", type=positive_int, default=10, help="of the texture stage, in each round")
    parser.add_argument("--layout_steps", type=positive_int, default=5)
    parser.add_argument("--repeats", type=positive_int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("out/benchmark_generation"))
    parser.add_argument("--overwrite", action="store_true", help="replace an output folder of this program")
    return parser.parse_args(argv)


# ----------------------------------------------------------------------------------------------------------- sides

Calls = dict[str, Callable[[], Any]]


def make_ours(args: argparse.Namespace) -> dict[str, Any]:
    """Two stages over tokens: what to count and what to time."""
    torch.manual_seed(0)
    place = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    saved = load_pipeline(args.pipeline, place["dtype"], args.device) if args.pipeline else None
    vae = (saved.vae if saved else GPSTokenModel(GPSTokenConfig.preset(args.preset)).to(**place)).eval()
    config = vae.config
    tokens = saved.transformer.config.sample_size if saved else args.tokens or config.num_tokens

    def transformer(size: str, channels: int, condition: int | None) -> SiTTransformer1DModel:
        layers, heads, width = SIZES[size]
        made = SiTTransformer1DModel(
            sample_size=tokens,
            in_channels=channels,
            condition_channels=condition,
            num_layers=layers,
            num_attention_heads=heads,
            attention_head_dim=width,
            num_classes=NUM_CLASSES,
        )
        return made.to(**place).eval()

    texture = saved.transformer if saved else transformer(args.size, config.token_channels, 5)
    layout = saved.layout_transformer if saved else transformer(args.layout_size, 5, None)
    classes, condition = texture.config.num_classes, texture.config.condition_channels
    batch = 2 * args.batch_size  # with and without the class
    latents = torch.randn(batch, tokens, config.token_channels, **place)
    gaussians = torch.rand(batch, tokens, 5, **place)
    labels = torch.arange(batch, device=args.device) % classes
    images = torch.rand(1, 3, config.image_size, config.image_size, **place) * 2 - 1
    with torch.no_grad():
        coded = vae.encode(images, num_tokens=tokens).tokens.expand(args.batch_size, -1, -1).contiguous()

    def forward(count: int) -> torch.Tensor:
        time = torch.full((count,), 500.0, **place)
        return texture(latents[:count], time, labels[:count], gaussians[:count] if condition else None).sample

    def layout_forward() -> torch.Tensor:
        assert layout is not None
        return layout(gaussians, torch.full((batch,), 500.0, **place), labels).sample

    calls: Calls = {"decode": torch.no_grad()(lambda: vae.decode(coded).sample)}
    if layout is not None:
        calls["layout step"] = torch.no_grad()(layout_forward)
    return {
        "name": printable(args.pipeline) if args.pipeline else f"GPSToken two-stage, SiT-{args.size}",
        "tokens": tokens,
        "transformer": texture,
        "others": [] if layout is None else [layout],
        "vae": vae,
        "forward": forward,
        "targets": latents,
        "calls": calls,
    }


def make_grid(args: argparse.Namespace) -> dict[str, Any]:
    """A SiT over 32 x 32 x 4 latents."""
    torch.manual_seed(0)
    place = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    layers, heads, width = SIZES[args.size]
    transformer = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=width,
        in_channels=4,
        out_channels=8,
        num_layers=layers,
        sample_size=32,
        patch_size=2,
        num_embeds_ada_norm=NUM_CLASSES,
    )
    transformer = transformer.to(**place).eval()
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
    )
    vae = vae.to(**place).eval()
    batch = 2 * args.batch_size
    latents = torch.randn(batch, 4, 32, 32, **place)
    labels = torch.arange(batch, device=args.device) % NUM_CLASSES

    def forward(count: int) -> torch.Tensor:
        time = torch.full((count,), 500, device=args.device)
        return transformer(latents[:count], timestep=time, class_labels=labels[:count]).sample[:, :4]

    return {
        "name": f"SiT-{args.size}/2 on 32 x 32 x 4",
        "tokens": 256,
        "transformer": transformer,
        "others": [],
        "vae": vae,
        "forward": forward,
        "targets": latents,
        "calls": {"decode": torch.no_grad()(lambda: vae.decode(latents[: args.batch_size]).sample)},
    }


def benchmark(sides: Sequence[dict[str, Any]], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure both sides in turn; one entry for each."""
    entries: list[dict[str, Any]] = []
    for side in sides:
        side["calls"]["step"] = torch.no_grad()(lambda side=side: side["forward"](2 * args.batch_size))
        side["calls"]["training step"] = lambda side=side: train(side, args.batch_size)
        entries.append(
            {
                "name": side["name"],
                "tokens": side["tokens"],
                "parameters": num_parameters([side["transformer"]]),
                "other_parameters": num_parameters(side["others"]),
                "multiply_adds": multiply_adds(partial(side["forward"], 1)),
                "peak_bytes": None,
            }
        )
    times: dict[tuple[str, str], list[float]] = {}
    for round_ in tqdm(range(args.repeats + 1), unit=" rounds", disable=None):
        for side, entry in zip(sides, entries):  # in turn, so that a slow minute falls on both
            for name, call in side["calls"].items():
                count = {"step": args.steps, "layout step": args.layout_steps}.get(name, 1)
                if not round_:  # the first round warms up
                    call()
                    growth = peak_growth(call, args.device)
                    if growth is not None:
                        loaded = weight_bytes([side["transformer"], *side["others"], side["vae"]])
                        entry["peak_bytes"] = max(entry["peak_bytes"] or 0, loaded + growth)
                    continue
                for _ in range(count):
                    times.setdefault((side["name"], name), []).append(measure(call, args.device))
    for entry in entries:
        for part in PARTS:
            if (entry["name"], part) in times:
                entry[part] = spread(times[entry["name"], part])
        entry["images_per_s"] = args.batch_size / seconds_of(entry, FULL_STEPS, args)
    return entries


def train(side: dict[str, Any], count: int) -> None:
    """The forward and backward pass of the transformer."""
    side["transformer"].zero_grad(set_to_none=True)
    torch.nn.functional.mse_loss(side["forward"](count).float(), side["targets"][:count].float()).backward()
    side["transformer"].zero_grad(set_to_none=True)


def seconds_of(entry: dict[str, Any], steps: int, args: argparse.Namespace) -> float:
    """Seconds of a batch with so many steps of the texture stage, from the medians."""
    layout = args.layout_steps * entry["layout step"]["median_s"] if "layout step" in entry else 0.0
    return layout + steps * entry["step"]["median_s"] + entry["decode"]["median_s"]


if __name__ == "__main__":
    raise SystemExit(run_program(main))
