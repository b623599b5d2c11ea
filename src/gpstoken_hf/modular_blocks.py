# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""The steps of [`GPSTokenPipeline`] as blocks of diffusers, each with the functions that the pipeline uses.

Shapes: B batch, L tokens, C texture channels.
"""

from __future__ import annotations

from typing import Any, ClassVar

import PIL.Image
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.guiders.guider_utils import BaseGuidance
from diffusers.modular_pipelines.modular_pipeline import (
    BlockState,
    ConditionalPipelineBlocks,
    LoopSequentialPipelineBlocks,
    ModularPipelineBlocks,
    PipelineState,
)
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, ConfigSpec, InputParam, OutputParam
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .class_labels import label_ids
from .guidance import GuidedPredictor, mask_of
from .guiders import IntervalGuidance, guided_prediction
from .image_processing_gpstoken import GPSTokenImageProcessor
from .layout import GaussianLayout
from .layout_bank import GaussianLayoutBank
from .layout_sources import LAYOUT_SOURCES, borrow_layout, calibrated, check_given, choose_source, spread
from .modeling_gpstoken import GPSTokenModel
from .sampling import (
    check_flow_scheduler,
    check_generators,
    check_num_steps,
    counted_steps,
    model_timesteps,
    set_timesteps,
    stage_noise,
    take_step,
    tokens_of,
)
from .scheduling_flow_match_sde import FlowMatchSDEScheduler
from .transformer_sit import SiTTransformer1DModel

MODEL_NAME = "gpstoken"
OUTPUT_TYPES = ("pil", "np", "pt")

# Name of an input or output -> its type, its default and what it is.
INPUTS: dict[str, tuple[Any, Any, str]] = {
    "class_labels": (list, None, "Class ids or names of `id2label`: one, a list, or a tensor of ids."),
    "num_images_per_label": (int, 1, "Images of each label, one after another."),
    "generator": (torch.Generator, None, "Source of all noise: one, or a list of one per image."),
    "label_ids": (torch.Tensor, None, "Class id of every image, (B,)."),
    "layout": (GaussianLayout, None, "Where the tokens go: a layout of B images, one per label, or one for all."),
    "image": (PIL.Image.Image, None, "Image: PIL, NumPy, a (B, 3, H, W) tensor in [0, 1], or a list."),
    "layout_source": (str, None, "'generated' or 'bank'; by default generated where there is a layout transformer."),
    "layout_origin": (str, None, "Where the layout came from: 'given', 'image', 'bank' or 'generated'."),
    "num_layout_steps": (int, 5, "Steps of the layout stage."),
    "layout_latents": (torch.Tensor, None, "Initial noise of the layout stage, (B, L, 5)."),
    "num_inference_steps": (int, 250, "Steps of the texture stage."),
    "latents": (torch.Tensor, None, "Latents of the texture stage, (B, L, 5 + C): first noise, then data."),
    "timesteps": (torch.Tensor, None, "Timesteps of the texture stage."),
    "attention_kwargs": (dict, None, "Passed to the attention of the transformers; 'scale' scales their LoRAs."),
    "tokens": (torch.Tensor, None, "Tokens, (B, L, 5 + C): Gaussians and texture."),
    "num_tokens": (int, None, "Tokens of each image; by default those of the tokenizer's config."),
    "image_size": (tuple, None, "(H, W) of the image; by default that of the tokenizer's config."),
    "output_type": (str, "pil", "'pil', 'np' or 'pt'."),
    "images": (list, None, "The images."),
}
COMPONENTS: dict[str, type] = {
    "vae": GPSTokenModel,
    "transformer": SiTTransformer1DModel,
    "scheduler": FlowMatchSDEScheduler,
    "layout_transformer": SiTTransformer1DModel,
    "layout_scheduler": FlowMatchEulerDiscreteScheduler,
    "layout_bank": GaussianLayoutBank,
    "image_processor": GPSTokenImageProcessor,
}
# Any flow scheduler can take the place of ours.
ALLOWED = {**COMPONENTS, "scheduler": SchedulerMixin, "layout_scheduler": SchedulerMixin, "guider": BaseGuidance}


def input_param(name: str, required: bool = False) -> InputParam:
    """An input by its name: one of `INPUTS`, or one that a block of the user has."""
    kind, default, description = INPUTS.get(name, (None, None, ""))
    return InputParam(name, kind, default, required, description)


def output_params(*names: str) -> list[OutputParam]:
    """Outputs by their names."""
    entries = {name: INPUTS.get(name, (None, None, "")) for name in names}
    return [OutputParam(name, kind, description) for name, (kind, _, description) in entries.items()]


class _Interface:
    """Inputs, outputs and components of a block, by their names. Those in the tables above have types and defaults."""

    model_name = MODEL_NAME
    requires: ClassVar[tuple[str, ...]] = ()
    takes: ClassVar[tuple[str, ...]] = ()
    makes: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[tuple[str, ...]] = ()

    @property
    def inputs(self) -> list[InputParam]:
        """Inputs of the block."""
        return [input_param(name, name in self.requires) for name in (*self.requires, *self.takes)]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        """Outputs of the block."""
        return output_params(*self.makes)

    @property
    def expected_components(self) -> list[ComponentSpec]:
        """Components of the block."""
        return [
            _guider_spec() if name == "guider" else ComponentSpec(name, COMPONENTS.get(name)) for name in self.needs
        ]


def _guider_spec() -> ComponentSpec:
    config = FrozenDict({"guidance_scale": 1.5, "guidance_interval": (0.2, 1.0)})
    return ComponentSpec("guider", IntervalGuidance, config=config, default_creation_method="from_config")


def _require(components: Any, names: tuple[str, ...]) -> None:
    for name in names:
        component, allowed = getattr(components, name, None), ALLOWED.get(name, object)
        if component is None and name != "image_processor":
            raise ValueError(f"{name} must be loaded by load_components or update_components, got None")
        # A compiled model keeps the original in `_orig_mod`.
        if component is not None and not isinstance(getattr(component, "_orig_mod", component), allowed):
            raise ValueError(f"{name} must be a {allowed.__name__}, got {type(component).__name__}")


class GPSTokenBlock(_Interface, ModularPipelineBlocks):
    """A step between inputs and outputs. Subclasses say in `run` what it does to the state."""

    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        """Run the block."""
        _require(components, self.needs)
        block = self.get_block_state(state)
        self.run(components, block)
        self.set_block_state(state, block)
        return components, state

    def run(self, components: Any, block: Any) -> None:
        """Read inputs from `block`, and set its outputs."""
        raise NotImplementedError


class GPSTokenLabelStep(GPSTokenBlock):
    """Class names and ids -> the class id of every image."""

    description = "Turns class names and ids into the class id of every image."
    requires, takes, makes = ("class_labels",), ("num_images_per_label", "generator"), ("label_ids",)
    needs = ("transformer",)

    @property
    def expected_configs(self) -> list[ConfigSpec]:
        """The names of the classes."""
        return [ConfigSpec("id2label", None, "Class id -> its names, separated by commas.")]

    def run(self, components: Any, block: Any) -> None:
        """Set `label_ids`."""
        num_classes = components.transformer.config.num_classes
        names = components.config.get("id2label")
        ids = label_ids(block.class_labels, names, num_classes, block.num_images_per_label)
        check_generators(block.generator, len(ids))
        block.label_ids = torch.tensor(ids, device=components._execution_device)


class GPSTokenGivenLayoutStep(GPSTokenBlock):
    """A layout of the caller, for every image."""

    description = "Takes a given layout, and repeats it for every image."
    requires, takes, makes = ("layout", "label_ids"), ("num_images_per_label",), ("layout", "layout_origin")

    def run(self, components: Any, block: Any) -> None:
        """Set `layout`."""
        if not isinstance(block.layout, GaussianLayout):
            raise ValueError(f"layout must be a GaussianLayout, got {type(block.layout).__name__}")
        block.layout.check()
        layout = spread(block.layout, len(block.label_ids), block.num_images_per_label)
        block.layout, block.layout_origin = layout.to(block.label_ids.device, torch.float32), "given"


class GPSTokenBorrowLayoutStep(GPSTokenBlock):
    """The layout that the tokenizer chooses for an image."""

    description = "Borrows the layout that the tokenizer chooses for an image."
    requires, takes, makes = ("image", "label_ids"), ("num_images_per_label",), ("layout", "layout_origin")
    needs = ("vae", "image_processor")

    def run(self, components: Any, block: Any) -> None:
        """Set `layout`."""
        images = check_given(block.image)
        layout = borrow_layout(images, components.vae.config, components.image_processor, block.label_ids.device)
        block.layout = spread(layout, len(block.label_ids), block.num_images_per_label)
        block.layout_origin = "image"


class GPSTokenBankLayoutStep(GPSTokenBlock):
    """Layouts of the classes, drawn from the bank."""

    description = "Draws a layout of its class from the bank for every image."
    requires, takes, makes = ("label_ids",), ("generator",), ("layout", "layout_origin")
    needs = ("layout_bank",)

    def run(self, components: Any, block: Any) -> None:
        """Set `layout`."""
        layout = components.layout_bank.sample(block.label_ids, generator=block.generator)
        block.layout, block.layout_origin = layout.to(block.label_ids.device), "bank"


class GPSTokenGenerateLayoutStep(GPSTokenBlock):
    """Layouts of the classes, sampled by the layout transformer; raw, to be calibrated."""

    description = "Samples a layout for every image with the layout transformer. It is raw until it is calibrated."
    requires, makes = ("label_ids",), ("layout", "layout_origin")
    takes = ("num_layout_steps", "layout_latents", "generator", "attention_kwargs")
    needs = ("layout_transformer", "layout_scheduler", "vae")

    def run(self, components: Any, block: Any) -> None:
        """Set `layout`."""
        transformer, scheduler = components.layout_transformer, components.layout_scheduler
        check_num_steps("num_layout_steps", block.num_layout_steps)
        check_flow_scheduler("layout_scheduler", scheduler)
        labels, generator = block.label_ids, block.generator
        latents = stage_noise("layout_latents", transformer, None, block.layout_latents, labels, generator)
        timesteps = set_timesteps(scheduler, block.num_layout_steps, latents.device)
        predict = GuidedPredictor(transformer, labels, None, block.attention_kwargs)
        for timestep, model_timestep in zip(timesteps, model_timesteps(scheduler, timesteps)):
            output = predict(latents, model_timestep, 1.0)
            latents = take_step(scheduler, output, timestep, latents, generator)
        gaussians = tokens_of(latents, transformer, components.vae.config, None)
        block.layout, block.layout_origin = GaussianLayout(gaussians), "generated"


class GPSTokenLayoutStep(ConditionalPipelineBlocks):
    """One of the four sources of layouts, by what is given."""

    description = (
        "Finds the layout: the given one (`layout`), the one of an `image`, or by `layout_source` one from the bank "
        "or a generated one. A transformer without condition, which makes layout and texture at once, gets none."
    )
    block_classes: ClassVar[list] = [
        GPSTokenGivenLayoutStep,
        GPSTokenBorrowLayoutStep,
        GPSTokenBankLayoutStep,
        GPSTokenGenerateLayoutStep,
    ]
    block_names: ClassVar[list[str]] = ["given", "image", "bank", "generated"]
    block_trigger_inputs: ClassVar[list[str]] = ["layout", "image", "layout_source"]
    default_block_name = "generated"

    @property
    def inputs(self) -> list[InputParam]:
        """Inputs of all sources, none required by itself, and the name of a source."""
        merged = {one.name: one for one in super().inputs}
        for name in (*self.block_trigger_inputs, "layout_latents"):
            merged[name] = input_param(name)
        return list(merged.values())

    def select_block(self, layout: Any = None, image: Any = None, layout_source: str | None = None) -> str | None:
        """The name of the source.

        Raises:
            ValueError: if more than one is given, or `layout_source` is unknown.
        """
        given = {"layout": layout, "image": image, "layout_source": layout_source}
        given = {name: value for name, value in given.items() if value is not None}
        if len(given) > 1:
            raise ValueError(f"one of layout, image and layout_source must be given, got {list(given)}")
        if layout_source is not None and layout_source not in LAYOUT_SOURCES:
            raise ValueError(f"layout_source must be one of {list(LAYOUT_SOURCES)}, got {layout_source!r}")
        return {"layout": "given", "image": "image"}.get(next(iter(given), ""), layout_source)

    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        """Run the block of the source."""
        given = {name: state.get(name) for name in self.block_trigger_inputs}
        name = self.select_block(**given)
        has_noise = state.get("layout_latents") is not None
        transformer = getattr(components, "transformer", None)
        if transformer is not None and transformer.config.condition_channels is None:
            if name is not None or has_noise:
                raise ValueError(
                    "layout, image, layout_source and layout_latents must be None for a transformer without "
                    "condition, which makes layout and texture at once, got one of them"
                )
            return components, state
        if name is None or name in LAYOUT_SOURCES:
            name = choose_source(components, name)
        if has_noise and name != "generated":
            raise ValueError("layout_latents must be None unless the layout is generated, got a tensor")
        return self.sub_blocks[name](components, state)


class GPSTokenCalibrateStep(GPSTokenBlock):
    """A generated layout -> a legal one (Alg. 2). Layouts of other sources are legal and pass unchanged."""

    description = "Calibrates a generated layout (paper Alg. 2); layouts of other sources pass unchanged."
    takes, makes, needs = ("layout", "layout_origin"), ("layout",), ("vae",)

    def run(self, components: Any, block: Any) -> None:
        """Set `layout`."""
        if block.layout is not None and block.layout_origin in ("generated", None):
            block.layout = calibrated(block.layout.gaussians, components.vae.config)


class GPSTokenPrepareTextureStep(GPSTokenBlock):
    """Noise and timesteps of the texture stage."""

    description = "Draws the noise of the texture stage and sets its timesteps."
    requires, takes = ("label_ids",), ("layout", "num_inference_steps", "latents", "generator")
    makes, needs = ("latents", "timesteps"), ("transformer", "scheduler")

    def run(self, components: Any, block: Any) -> None:
        """Set `latents` and `timesteps`."""
        check_num_steps("num_inference_steps", block.num_inference_steps)
        check_flow_scheduler("scheduler", components.scheduler)
        block.latents = stage_noise(
            "latents", components.transformer, block.layout, block.latents, block.label_ids, block.generator
        )
        block.timesteps = set_timesteps(components.scheduler, block.num_inference_steps, block.latents.device)


class GPSTokenLoopDenoiser(_Interface, ModularPipelineBlocks):
    """Inside the loop: latents at a step -> the guided prediction."""

    description = "Inside the texture loop: predicts `noise - data` with the guider."
    requires, takes = ("latents", "label_ids"), ("layout", "attention_kwargs")
    needs = ("transformer", "guider")

    def __call__(self, components: Any, block: BlockState, i: int, t: torch.Tensor) -> tuple[Any, BlockState]:
        """Set `noise_pred`."""
        predict = block["predict"]
        if predict is None or predict.layout is not block.layout:  # an inserted block may have changed the layout
            predict = GuidedPredictor(components.transformer, block.label_ids, block.layout, block.attention_kwargs)
            block.predict = predict
        components.guider.set_state(i, len(block.timesteps), block.host_timesteps[i])
        block.noise_pred = guided_prediction(components.guider, predict, block.latents, block.model_timesteps[i])
        return components, block


class GPSTokenLoopStep(_Interface, ModularPipelineBlocks):
    """Inside the loop: a prediction -> the latents of the next step."""

    description = "Inside the texture loop: takes a step of the scheduler."
    requires, takes, needs = ("latents",), ("generator",), ("scheduler",)

    def __call__(self, components: Any, block: BlockState, i: int, t: torch.Tensor) -> tuple[Any, BlockState]:
        """Set `latents`."""
        block.latents = take_step(components.scheduler, block.noise_pred, t, block.latents, block.generator)
        return components, block


class GPSTokenDenoiseStep(LoopSequentialPipelineBlocks):
    """The texture loop: noise -> latents."""

    model_name = MODEL_NAME
    description = "Runs its sub-blocks at every timestep: the guided prediction, and a step of the scheduler."
    block_classes: ClassVar[list] = [GPSTokenLoopDenoiser, GPSTokenLoopStep]
    block_names: ClassVar[list[str]] = ["denoiser", "step"]

    @property
    def loop_expected_components(self) -> list[ComponentSpec]:
        """The scheduler."""
        return [ComponentSpec("scheduler", FlowMatchSDEScheduler)]

    @property
    def loop_inputs(self) -> list[InputParam]:
        """The timesteps."""
        return [input_param("timesteps", required=True)]

    @property
    def loop_intermediate_outputs(self) -> list[OutputParam]:
        """The latents."""
        return output_params("latents")

    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        """Run the loop."""
        _require(components, ("transformer", "scheduler", "guider"))
        block, scheduler = self.get_block_state(state), components.scheduler
        block.model_timesteps = model_timesteps(scheduler, block.timesteps)
        block.host_timesteps = block.model_timesteps.cpu()  # copied to the host once
        with self.progress_bar(total=-(-len(block.timesteps) // scheduler.order)) as bar:
            for i, t in counted_steps(block.timesteps, scheduler.order, bar):
                components, block = self.loop_step(components, block, i=i, t=t)
        self.set_block_state(state, block)
        return components, state


class GPSTokenToTokensStep(GPSTokenBlock):
    """Latents of the texture stage -> tokens."""

    description = "Turns latents into tokens: undoes the standardisation, and adds the layout to offsets of Gaussians."
    requires, takes, makes, needs = ("latents",), ("layout",), ("tokens",), ("transformer", "vae")

    def run(self, components: Any, block: Any) -> None:
        """Set `tokens`."""
        block.tokens = tokens_of(block.latents, components.transformer, components.vae.config, block.layout)


class GPSTokenEncodeStep(GPSTokenBlock):
    """Images -> tokens."""

    description = "Encodes images as tokens."
    requires, takes, makes = ("image",), ("num_tokens",), ("tokens", "layout", "image_size")
    needs = ("vae", "image_processor")

    def run(self, components: Any, block: Any) -> None:
        """Set `tokens`, `layout` and `image_size`."""
        processor = components.image_processor or GPSTokenImageProcessor()
        pixel_values = processor(block.image, return_tensors="pt")["pixel_values"]
        pixel_values = pixel_values.to(components._execution_device, components.vae.dtype)
        output = components.vae.encode(pixel_values, num_tokens=block.num_tokens)
        block.tokens, block.layout, block.image_size = output.tokens, output.layout, tuple(pixel_values.shape[-2:])


class GPSTokenDecodeStep(GPSTokenBlock):
    """Tokens -> images."""

    description = "Renders tokens, and decodes them to images."
    requires, takes, makes = ("tokens",), ("layout", "image_size", "output_type"), ("images",)
    needs = ("vae", "image_processor")

    def run(self, components: Any, block: Any) -> None:
        """Set `images`."""
        if block.output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {list(OUTPUT_TYPES)}, got {block.output_type!r}")
        processor = components.image_processor or GPSTokenImageProcessor()
        sample = components.vae.decode(block.tokens, block.image_size, attention_mask=mask_of(block.layout)).sample
        block.images = processor.post_process(sample, output_type=block.output_type)
