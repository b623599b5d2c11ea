# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""What a run would cost on paper: parameters, memory and the time of a step on 1 and on 8 GPUs.

Operations and saved activations are counted on tensors without memory, by running the model itself for one image.
Everything else is arithmetic from the constants below, which are printed with the result.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from gpstoken_hf.configuration_gpstoken import GPSTokenConfig
from gpstoken_hf.layout import GaussianLayout
from gpstoken_hf.modeling_gpstoken import GPSTokenModel
from gpstoken_hf.transformer_sit import SiTTransformer1DModel
from training.discriminator import PatchDiscriminator
from training.optimization import enable_checkpointing

GIB = 2**30
DEVICE = "A100 80 GB"
MEMORY_BYTES = 80 * GIB
# Dense peak by the data sheet, in operations per second.
PEAK = {"no": 19.5e12, "tf32": 156e12, "bf16": 312e12, "fp16": 312e12}
# The share of the peak that a step reaches, and of the memory that tensors may fill.
EFFICIENCY = 0.4
USABLE_MEMORY = 0.9
# Bytes per second in which a GPU exchanges gradients with seven others.
LINK = 200e9
NUM_GPUS = (1, 8)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Cost:
    """Of a forward pass over one image or sequence: operations (2 for a multiply-add) and bytes saved for backward."""

    operations: float
    saved_bytes: float


def measure(forward: Callable[[int], Any], mixed_precision: str) -> Cost:
    """The cost of `forward(batch size)` for one more image, called in the mode of tensors without memory."""
    totals = []
    for batch_size in (1, 2):
        sizes: dict[int, tuple[int, torch.Tensor]] = {}

        def note(tensor: torch.Tensor, sizes: dict[int, tuple[int, torch.Tensor]] = sizes) -> torch.Tensor:
            storage = tensor.untyped_storage()
            sizes[id(storage)] = (storage.nbytes(), tensor)  # the tensor keeps the id in use
            return tensor

        enabled = mixed_precision in DTYPES
        # float16 on the CPU is not supported by every operation. Its tensors are as large as those of bfloat16.
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=enabled),
            FlopCounterMode(display=False) as counter,
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        ):
            forward(batch_size)
        totals.append((counter.get_total_flops(), sum(size for size, _ in sizes.values())))
    # The difference leaves out weights, which are saved for backward too and belong to no image.
    return Cost(totals[1][0] - totals[0][0], totals[1][1] - totals[0][1])


def count_parameters(module: torch.nn.Module) -> int:
    """Trainable parameters."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def precision_of(options: argparse.Namespace) -> str:
    """The row of `PEAK` for the options."""
    return "tf32" if options.mixed_precision == "no" and options.allow_tf32 else options.mixed_precision


def describe(
    options: argparse.Namespace, parameters: int, phases: dict[str, tuple[Cost, float, int]], more_parameters: int = 0
) -> dict[str, Any]:
    """The section `estimate` of a dry run.

    Args:
        options (`argparse.Namespace`): Those of `add_optimizer_options`.
        parameters (`int`): Of the model.
        phases (`dict[str, tuple[Cost, float, int]]`): For each phase the cost of the model's forward pass, the
            operations of a whole step for one image, and the number of steps.
        more_parameters (`int`, *optional*, defaults to 0): Of a discriminator, which has no average.

    Returns:
        `dict`: Assumptions, and for each number of GPUs memory, time of a step and days of the run.
    """
    precision = precision_of(options)
    batch = options.train_batch_size * options.gradient_accumulation_steps
    # Weights, gradients and two moments in float32, the average, and the weights in 16 bits of mixed precision.
    each = 4 * 4 + (2 if options.mixed_precision in DTYPES else 0)
    fixed = parameters * (each + (4 if options.use_ema else 0)) + more_parameters * each
    result: dict[str, Any] = {
        "assumptions": {
            "device": DEVICE,
            "peak_teraflops": PEAK[precision] / 1e12,
            "efficiency": EFFICIENCY,
            "usable_memory": USABLE_MEMORY,
            "link_gigabytes_per_second": LINK / 1e9,
            "images_of_a_step": batch,
            "parallelism": "data parallel, every GPU holds the whole model",
        },
        "parameters_million": round((parameters) / 1e6, 1),
        "weights_gradients_optimizer_average_gib": round(fixed / GIB, 2),
    }
    if more_parameters:
        result["discriminator_parameters_million"] = round(more_parameters / 1e6, 1)
    for count in NUM_GPUS:
        per_gpu = math.ceil(batch / count)
        section: dict[str, Any] = {"images_per_gpu": per_gpu}
        hours = 0.0
        for name, (cost, operations, steps) in phases.items():
            room = max(1, int((USABLE_MEMORY * MEMORY_BYTES - fixed) / cost.saved_bytes))
            micro = math.ceil(per_gpu / math.ceil(per_gpu / room))
            exchange = 2 * (count - 1) / count * 4 * parameters / LINK
            seconds = per_gpu * operations / (PEAK[precision] * EFFICIENCY) + exchange
            section[name] = {
                "steps": steps,
                "images_at_a_time": micro,
                "gradient_accumulation_steps": math.ceil(per_gpu / micro),
                "memory_gib": round((fixed + micro * cost.saved_bytes) / GIB, 1),
                "step_seconds": round(seconds, 3),
            }
            hours += steps * seconds / 3600
        section["hours"] = round(hours, 1)
        result[f"gpus_{count}"] = section
    return result


def tokenizer_estimate(options: argparse.Namespace, config: GPSTokenConfig, resolution: int) -> dict[str, Any]:
    """The estimate for `training.train_tokenizer` at one resolution and the largest number of tokens."""
    steps = options.max_train_steps or 0
    late = [
        getattr(options, f"{name}_start_step")
        for name in ("lpips", "feature", "adversarial")
        if getattr(options, f"{name}_weight")
    ]
    start = min(min(late, default=steps), steps)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = GPSTokenModel(config)
        model.validate_inputs = False
        if options.gradient_checkpointing:
            enable_checkpointing(model)
        model.train()
        count = options.max_tokens or config.num_tokens

        def pixels(side: int, batch_size: int) -> torch.Tensor:
            return torch.empty(batch_size, 3, side, side, requires_grad=True)

        def forward(batch_size: int) -> None:
            boxes = torch.empty(batch_size, count, 4, dtype=torch.int64)
            layout = GaussianLayout(torch.empty(batch_size, count, 5), boxes)
            tokens = model.encode(pixels(resolution, batch_size).detach(), layout=layout).tokens
            model.decode(tokens, image_size=(resolution, resolution))

        cost = measure(forward, options.mixed_precision)
        # Backward costs twice a forward pass; checkpointing adds one.
        whole = cost.operations * (4 if options.gradient_checkpointing else 3)
        phases = {}
        if start:
            phases["reconstruction"] = (cost, whole, start)
        more = 0
        if start < steps:
            added, operations = Cost(0, 0), whole
            for network, side in _loss_networks(options, resolution):
                part = measure(lambda size, network=network, side=side: network(pixels(side, size)), "no")  # type: ignore[misc]
                added = Cost(added.operations + part.operations, added.saved_bytes + part.saved_bytes)
                # The image and its reconstruction forward, the reconstruction backward to the pixels.
                operations += 3 * part.operations
            if options.adversarial_weight:
                discriminator = PatchDiscriminator()
                more = count_parameters(discriminator)
                part = measure(lambda size: discriminator(pixels(resolution, size)), options.mixed_precision)
                # Steps alternate: one judges reconstructions, and one makes them and learns from two images.
                operations = (operations + 2 * part.operations + cost.operations + 6 * part.operations) / 2
                added = Cost(added.operations, added.saved_bytes + part.saved_bytes)
            both = Cost(cost.operations, cost.saved_bytes + added.saved_bytes)
            phases["all_losses"] = (both, operations, steps - start)
        result = describe(options, count_parameters(model), phases, more)
    result["forward_gigaflop_per_image"] = round(cost.operations / 1e9, 1)
    result["saved_activations_mib_per_image"] = round(cost.saved_bytes / 2**20, 1)
    return result


def _loss_networks(options: argparse.Namespace, resolution: int) -> list[tuple[torch.nn.Module, int]]:
    """VGG16 for LPIPS and Inception-v3 for the feature loss, whichever network the options name."""
    import torchvision

    networks: list[tuple[torch.nn.Module, int]] = []
    if options.lpips_weight:
        networks.append((torchvision.models.vgg16(init_weights=False).features, resolution))
    if options.feature_weight:
        inception = torchvision.models.inception_v3(init_weights=False, aux_logits=False)
        networks.append((inception.eval(), options.feature_resolution or 299))
    for network, _ in networks:
        network.requires_grad_(False)
    return networks


def generator_estimate(options: argparse.Namespace, config: dict[str, Any]) -> dict[str, Any]:
    """The estimate for `training.train_sit`; the tokenizer of on-the-fly tokens is not counted."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = SiTTransformer1DModel(**config)
        if options.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        model.train()
        length, channels = config["sample_size"], config["in_channels"]
        width = config["condition_channels"]

        def forward(batch_size: int) -> None:
            model(
                torch.empty(batch_size, length, channels),
                torch.empty(batch_size),
                class_labels=torch.empty(batch_size, dtype=torch.int64),
                encoder_condition=torch.empty(batch_size, length, width) if width else None,
            )

        cost = measure(forward, options.mixed_precision)
        steps = options.max_train_steps or 0
        whole = cost.operations * (4 if options.gradient_checkpointing else 3)
        result = describe(options, count_parameters(model), {"training": (cost, whole, steps)})
    result["forward_gigaflop_per_image"] = round(cost.operations / 1e9, 1)
    result["saved_activations_mib_per_image"] = round(cost.saved_bytes / 2**20, 1)
    return result
