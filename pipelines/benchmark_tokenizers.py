# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""What tokenizers cost: Table 5 of the paper and more, ours beside the autoencoders of diffusers.

    python -m pipelines.benchmark_tokenizers --resolution 256 --batch_sizes 1 8 --device cuda --output results/
    python -m pipelines.benchmark_tokenizers --models nano TAESD --resolution 64 --batch_sizes 1 --output results/

Weights are random, as cost does not depend on them; --models also takes checkpoints. All models take turns in one run,
so that a slow minute falls on all of them; times are medians over --repeats rounds after a warm-up, with the smallest
and the largest. Multiply-adds are of one image, and count convolutions, matrix products and attention. A training step
is the forward and backward pass of the mean squared error, without an optimizer, at the first batch size. Peak memory
is that of the weights and of one call, the larger of encode and decode. The output folder holds:

    results.json            all numbers, the device and the command
    report.md, report.html  the tables
    throughput.png          images per second over the batch size, encode and decode apart
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from tqdm import tqdm

from gpstoken_hf.configuration_gpstoken import PRESETS, GPSTokenConfig
from gpstoken_hf.evaluation_results import make_result, write_result
from gpstoken_hf.modeling_gpstoken import GPSTokenModel

from .shared.autoencoders import decode_peer, encode_peer, load_candidates
from .shared.checkpoints import quiet_loading
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
from .shared.programs import (
    ProgramError,
    make_parser,
    non_negative_int,
    one_line,
    positive_int,
    printable,
    run_program,
)
from .shared.reports import (
    Block,
    Command,
    Curve,
    Heading,
    Picture,
    Table,
    Text,
    draw_curves,
    number,
    write_report,
)

PROGRAM = "pipelines.benchmark_tokenizers"
OURS = tuple(name for name in PRESETS if name != "tiny")
# Name -> class of diffusers and the shape of a checkpoint that people use.
PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "SDXL-VAE": (
        "AutoencoderKL",
        {
            "block_out_channels": (128, 256, 512, 512),
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "layers_per_block": 2,
            "latent_channels": 4,
        },
    ),
    "TAESD": ("AutoencoderTiny", {}),
    "DC-AE f32c32": ("AutoencoderDC", {}),
    "VQ f16": (
        "VQModel",
        {
            "block_out_channels": (128, 128, 256, 256, 512),
            "down_block_types": ("DownEncoderBlock2D",) * 4 + ("AttnDownEncoderBlock2D",),
            "up_block_types": ("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 4,
            "layers_per_block": 2,
            "latent_channels": 256,
            "num_vq_embeddings": 1024,
            "vq_embed_dim": 256,
        },
    ),
    "RAE": ("AutoencoderRAE", {}),
}


@dataclass
class Contestant:
    """A model with its two halves as calls."""

    name: str
    model: torch.nn.Module
    encode: Callable[[torch.Tensor], torch.Tensor]
    decode: Callable[[torch.Tensor], torch.Tensor]

    @property
    def halves(self) -> tuple[int, int]:
        """Parameters of the encoder and of the rest."""
        encoder = num_parameters([self.model.get_submodule("encoder")])
        return encoder, num_parameters([self.model]) - encoder


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    contestants = [make_contestant(name, args) for name in dict.fromkeys(args.models)]
    with atomic_directory(args.output, args.overwrite, PROGRAM) as folder:
        results = benchmark(contestants, args)
        protocol = {
            "task": "cost of tokenizers",
            "device": device_name(args.device),
            "resolution": args.resolution,
            "batch_sizes": args.batch_sizes,
            "dtype": args.dtype,
            "repeats": args.repeats,
            "peak_memory": "weights of the model and growth of memory during a call; on the CPU that of the process",
            "multiply_adds": "convolutions, matrix products and attention of one image",
            "training_step": f"forward and backward of the MSE at batch size {args.batch_sizes[0]}, no optimizer",
        }
        command = [PROGRAM, *(sys.argv[1:] if argv is None else argv)]
        write_result(folder / "results.json", make_result(protocol, results, command))
        blocks = tables(results, protocol, args)
        if args.repeats:
            draw(folder / "throughput.png", results, args)
        blocks += [
            Picture("throughput.png", f"Images per second over the batch size on {protocol['device']}."),
            Heading("How it was measured"),
            Command(f"python -m {shlex.join(map(printable, command))}"),
            Table(("field", "value"), [(name, json.dumps(value)) for name, value in protocol.items()]),
        ]
        write_report(folder, "What tokenizers cost", blocks)
        print((folder / "report.md").read_text(encoding="utf-8").split("## How")[0])
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(PROGRAM, __doc__)
    parser.add_argument(
        "--models",
        nargs="+",
        default=["s64", "m128", "l256", *PEERS],
        help=", ".join((*OURS, *PEERS, "or checkpoints")),
    )
    parser.add_argument("--resolution", type=positive_int, default=256)
    parser.add_argument("--batch_sizes", type=positive_int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=non_negative_int, default=5, help="0: count only, measure no time")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("out/benchmark_tokenizers"))
    parser.add_argument("--overwrite", action="store_true", help="replace an output folder of this program")
    args = parser.parse_args(argv)
    unknown = [name for name in args.models if name not in (*PRESETS, *PEERS) and "/" not in name]
    unknown = [name for name in unknown if not Path(name).is_dir()]
    if unknown:
        raise ProgramError(
            f"--models must be of {', '.join((*PRESETS, *PEERS))}, or folders, or Hub repositories, "
            f"got {', '.join(unknown)}"
        )
    return args


def make_contestant(name: str, args: argparse.Namespace) -> Contestant:
    """A model of random weights, or a checkpoint."""
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    if name in PRESETS:
        size = (args.resolution, args.resolution)
        ours = GPSTokenModel(GPSTokenConfig.preset(name)).to(args.device, dtype).eval()
        return Contestant(
            f"GPSToken {name}", ours, lambda x: ours.encode(x).tokens, lambda z: ours.decode(z, size).sample
        )
    if name not in PEERS:
        return of_checkpoint(name, args)
    kind, config = PEERS[name]
    if not hasattr(diffusers, kind):
        raise ProgramError(f"{name} needs a version of diffusers with {kind}, got {diffusers.__version__}")
    with quiet_loading():  # diffusers warns of every change of type
        peer = getattr(diffusers, kind)(**config).to(args.device, dtype).eval()
    return Contestant(f"{name} ({kind})", peer, lambda x: encode_peer(peer, x), lambda z: decode_peer(peer, z))


def of_checkpoint(name: str, args: argparse.Namespace) -> Contestant:
    """A saved tokenizer or autoencoder."""
    label = printable(name)
    model: Any = load_candidates(name, args.device, option="--models")[0].model.to(getattr(torch, args.dtype))
    size = (args.resolution, args.resolution)
    if isinstance(model, GPSTokenModel):
        return Contestant(label, model, lambda x: model.encode(x).tokens, lambda z: model.decode(z, size).sample)
    return Contestant(label, model, lambda x: encode_peer(model, x), lambda z: decode_peer(model, z))


def benchmark(contestants: Sequence[Contestant], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure all models in turn; one entry for each."""
    dtype = getattr(torch, args.dtype)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(max(args.batch_sizes), 3, args.resolution, args.resolution, generator=generator) * 2 - 1
    images = images.to(args.device, dtype)
    entries = []
    for one in contestants:
        try:
            with torch.no_grad():
                latents = one.encode(images[:1])
            encode = multiply_adds(partial(one.encode, images[:1]))
            decode = multiply_adds(partial(one.decode, latents))
        except (RuntimeError, ValueError) as error:
            side = f"{args.resolution} x {args.resolution}"
            raise ProgramError(f"{one.name} does not take images of {side} pixels: {one_line(error)}") from error
        encoder, decoder = one.halves
        entries.append(
            {
                "name": one.name,
                "floats": latents[0].numel(),
                "parameters": encoder + decoder,
                "encoder_parameters": encoder,
                "decoder_parameters": decoder,
                "encode_multiply_adds": encode,
                "decode_multiply_adds": decode,
            }
        )
    times: dict[tuple[str, str, int], list[float]] = {}
    peaks: dict[tuple[str, str, int], int | None] = {}
    rounds = args.repeats + 1 if args.repeats else 0
    for round_ in tqdm(range(rounds), unit=" rounds", disable=None):
        for one in contestants:  # in turn, so that a slow minute falls on all of them
            for kind, size, call in _calls(one, images, args.batch_sizes):
                seconds = measure(call, args.device)
                if round_:
                    times.setdefault((one.name, kind, size), []).append(seconds)
                else:  # the first round warms up
                    growth = peak_growth(call, args.device)
                    peaks[one.name, kind, size] = None if growth is None else growth + weight_bytes([one.model])
    for entry in entries:
        name = str(entry["name"])
        for kind in ("encode", "decode", "train"):
            entry[kind] = {
                str(size): {**spread(seconds), "peak_bytes": peaks[name, kind, size]}
                for (owner, what, size), seconds in times.items()
                if (owner, what) == (name, kind)
            }
    return entries


def _calls(
    one: Contestant, images: torch.Tensor, batch_sizes: Sequence[int]
) -> list[tuple[str, int, Callable[[], Any]]]:
    calls: list[tuple[str, int, Callable[[], Any]]] = []
    for size in batch_sizes:
        batch = images[:size]
        with torch.no_grad():
            latents = one.encode(batch)
        calls.append(("encode", size, torch.no_grad()(lambda batch=batch: one.encode(batch))))
        calls.append(("decode", size, torch.no_grad()(lambda latents=latents: one.decode(latents))))
    batch = images[: batch_sizes[0]]

    def train() -> None:
        one.model.zero_grad(set_to_none=True)
        torch.nn.functional.mse_loss(one.decode(one.encode(batch)).float(), batch.float()).backward()
        one.model.zero_grad(set_to_none=True)

    calls.append(("train", batch_sizes[0], train))
    return calls


def tables(results: Sequence[dict[str, Any]], protocol: dict[str, Any], args: argparse.Namespace) -> list[Block]:
    """Sizes, then times for every batch size."""
    side = args.resolution
    blocks: list[Block] = [
        Text(
            f"Images of {side} x {side} pixels, {args.dtype}, on {protocol['device']}. Weights are random, except "
            "those of checkpoints."
        ),
        Table(
            ("model", "floats", "parameters (M)", "encoder (M)", "decoder (M)", "encode (GMAC)", "decode (GMAC)"),
            [
                [
                    entry["name"],
                    number(entry["floats"]),
                    *(number(entry[f"{part}parameters"] / 1e6, 1) for part in ("", "encoder_", "decoder_")),
                    *(number(entry[f"{part}_multiply_adds"] / 1e9, 1) for part in ("encode", "decode")),
                ]
                for entry in results
            ],
        ),
    ]
    if not args.repeats:
        return blocks
    for size in args.batch_sizes:
        rows = []
        for entry in results:
            encode, decode = entry["encode"][str(size)], entry["decode"][str(size)]
            peak = max(encode["peak_bytes"] or 0, decode["peak_bytes"] or 0)
            rows.append(
                [
                    entry["name"],
                    milliseconds(encode),
                    milliseconds(decode),
                    *(number(size / one["median_s"], 1) for one in (encode, decode)),
                    number(peak / 2**20, 0) if peak else "–",
                    milliseconds(entry["train"].get(str(size))),
                ]
            )
        blocks += [
            Heading(f"Batch size {size}"),
            Table(
                (
                    "model",
                    "encode (ms)",
                    "decode (ms)",
                    "encoded/s",
                    "decoded/s",
                    "peak memory (MiB)",
                    "training step (ms)",
                ),
                rows,
            ),
        ]
    blocks.append(Text("Times are medians with the smallest and the largest in brackets."))
    return blocks


def draw(path: Path, results: Sequence[dict[str, Any]], args: argparse.Namespace) -> None:
    """Throughput of both halves."""
    curves = [
        Curve(
            f"{entry['name']}, {kind}",
            [(size, size / entry[kind][str(size)]["median_s"]) for size in args.batch_sizes],
            f"C{index % 10}{style}",
        )
        for index, entry in enumerate(results)
        for kind, style in (("encode", "o-"), ("decode", "s--"))
    ]
    draw_curves(path, curves, "batch size", "images per second", device_name(args.device), is_log=True)


if __name__ == "__main__":
    raise SystemExit(run_program(main))
