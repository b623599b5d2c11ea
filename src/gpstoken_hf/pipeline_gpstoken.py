# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""GPSTokenPipeline: class label -> layout -> calibration -> texture -> image (paper Sec. 3.3).

Letters: B batch, L tokens, C texture channels, H x W pixels.
"""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import numpy as np
import PIL.Image
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from .calibration import calibrate_layout
from .gaussians import NUM_GAUSSIAN_PARAMS
from .hub import HubDownloadMixin
from .image_processing_gpstoken import GPSTokenImageProcessor
from .layout import GaussianLayout
from .layout_bank import GaussianLayoutBank
from .loading import CheckedPipelineMixin, check_source, only_safetensors
from .modeling_gpstoken import GPSTokenModel
from .partition import partition_images
from .transformer_sit import SiTTransformer1DModel, latents_to_tokens, timestep_to_time

OUTPUT_TYPES = ("pil", "np", "pt", "latent", "layout")
LAYOUT_SOURCES = ("generated", "bank")
# The paper's time of a step is compared with the guidance interval after a trip through float32.
TIME_TOLERANCE = 1e-6

Labels: TypeAlias = int | str | Sequence[int | str] | torch.Tensor
Images: TypeAlias = PIL.Image.Image | np.ndarray | torch.Tensor | Sequence[PIL.Image.Image | np.ndarray]
Generators: TypeAlias = torch.Generator | list[torch.Generator] | None


@dataclass
class GPSTokenPipelineOutput(BaseOutput):
    """What a call of the pipeline made.

    Args:
        images: B PIL images; `(B, H, W, 3)` NumPy or `(B, 3, H, W)` torch in [0, 1]; for `output_type="latent"` the
            standardised latents `(B, L, 5 + C)`; `None` for `output_type="layout"`.
        layout: the [`GaussianLayout`] that the texture was made for. Edit it and pass it back as `layout=`. `None` in
            one-stage mode.
        tokens: `(B, L, 5 + C)` float32, what was decoded; `None` for `output_type="layout"`.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor | None = None
    layout: GaussianLayout | None = None
    tokens: torch.Tensor | None = None


def guide(output_null: torch.Tensor, output_class: torch.Tensor, w: float) -> torch.Tensor:
    """Classifier-free guidance, `v_null + w (v_class - v_null)`; the same for either sign of v."""
    return output_null + w * (output_class - output_null)


class GPSTokenPipeline(CheckedPipelineMixin, HubDownloadMixin, DiffusionPipeline):
    r"""Class-conditional image generation in two stages: a layout of Gaussians, then their texture.

    Where the layout comes from: the layout transformer, whose output is calibrated (Alg. 2); the bank of stored
    layouts; or the caller. A texture transformer without condition makes layout and texture at once (the one-stage
    baseline) and goes without all of these.

    Args:
        vae: the tokenizer that decodes.
        transformer: the generator of texture (`condition_channels=5`), or of whole tokens (no condition).
        scheduler: its sampler: `FlowMatchSDEScheduler` or one of diffusers' for flow models.
        layout_transformer: the generator of layouts, 5 channels, no condition.
        layout_scheduler: its sampler.
        layout_bank: stored layouts per class.
        image_processor: turns images to layouts and tensors to images; a default one if `None`.
        id2label: class id -> name; several names are separated by commas.

    Raises:
        ValueError: components that do not fit together.
    """

    model_cpu_offload_seq = "layout_transformer->transformer->vae"
    # Accelerate finds out where a module is by its parameters, and a bank has buffers only. It is small.
    _exclude_from_cpu_offload: ClassVar[list[str]] = ["layout_bank"]
    _optional_components: ClassVar[list[str]] = [
        "layout_transformer",
        "layout_scheduler",
        "layout_bank",
        "image_processor",
    ]
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents", "layout"]

    vae: GPSTokenModel
    transformer: SiTTransformer1DModel
    scheduler: SchedulerMixin
    layout_transformer: SiTTransformer1DModel | None
    layout_scheduler: SchedulerMixin | None
    layout_bank: GaussianLayoutBank | None
    image_processor: GPSTokenImageProcessor | None

    def __init__(
        self,
        vae: GPSTokenModel,
        transformer: SiTTransformer1DModel,
        scheduler: SchedulerMixin,
        layout_transformer: SiTTransformer1DModel | None = None,
        layout_scheduler: SchedulerMixin | None = None,
        layout_bank: GaussianLayoutBank | None = None,
        image_processor: GPSTokenImageProcessor | None = None,
        id2label: dict | None = None,
    ):
        super().__init__()
        _check_components(vae, transformer, layout_transformer, layout_scheduler, layout_bank)
        self.register_modules(
            vae=vae,
            transformer=transformer,
            scheduler=scheduler,
            layout_transformer=layout_transformer,
            layout_scheduler=layout_scheduler,
            layout_bank=layout_bank,
            image_processor=image_processor,
        )
        id2label = None if id2label is None else {str(key): str(value) for key, value in id2label.items()}
        self.register_to_config(id2label=id2label)
        self._guidance_scale = 1.0
        self._interrupt = False
        self._num_timesteps = 0
        self._current_timestep: torch.Tensor | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> GPSTokenPipeline:
        """Load from a folder or the Hub, as every diffusers pipeline; all in float32 unless a dtype is given.

        Raises:
            ValueError: if a file is malformed or damaged, components do not fit their weights or each other, or
                `use_safetensors=False` is asked for.
            OSError: if there is no such pipeline.
        """
        check_source(pretrained_model_name_or_path)
        only_safetensors(kwargs)
        # Without a dtype transformers takes the one that the config names and diffusers takes float32.
        if kwargs.get("dtype") is None and kwargs.get("torch_dtype") is None:
            kwargs["dtype"] = torch.float32
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    # ------------------------------------------------------------------------------------------------ what is running

    @property
    def guidance_scale(self) -> float:
        """w of the running call; a callback may change `_guidance_scale`."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Number of timesteps of the texture stage."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> torch.Tensor | None:
        """The timestep that is being computed; `None` between calls."""
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        """Set `_interrupt` (from a callback or another thread) to skip the steps that are left."""
        return self._interrupt

    @property
    def is_one_stage(self) -> bool:
        """The transformer makes layout and texture at once."""
        return self.transformer.config.condition_channels is None

    # --------------------------------------------------------------------------------------------------------- labels

    @property
    def labels(self) -> dict[str, list[int]]:
        """Every class name, as a whole and split at commas, in lower case -> the ids that carry it."""
        names: dict[str, list[int]] = {}
        for key, label in (self.config.id2label or {}).items():
            for name in dict.fromkeys([label, *label.split(",")]):
                names.setdefault(name.strip().casefold(), []).append(int(key))
        return names

    def get_label_ids(self, label: str | Sequence[str]) -> list[int]:
        """Class names -> ids.

        Raises:
            ValueError: an unknown name, or one that several classes share.
        """
        labels, ids = self.labels, []
        for name in [label] if isinstance(label, str) else label:
            found = labels.get(name.strip().casefold(), [])
            if not labels:
                raise ValueError(f"this pipeline has no class names (id2label): expected class ids, got {name!r}")
            if not found:
                near = difflib.get_close_matches(name.casefold(), labels, n=3) or sorted(labels)[:3]
                raise ValueError(f"expected one of {len(labels)} class names, such as {near}, got {name!r}")
            if len(found) > 1:
                raise ValueError(f"expected a name of one class, got {name!r}, which the classes {found} share")
            ids.append(found[0])
        return ids

    def _label_ids(self, class_labels: Labels) -> list[int]:
        if isinstance(class_labels, torch.Tensor | np.ndarray):
            class_labels = class_labels.reshape(-1).tolist()
        elif isinstance(class_labels, int | np.integer | str):
            class_labels = [class_labels]
        ids = []
        for label in class_labels:
            if isinstance(label, str):
                ids += self.get_label_ids(label)
            elif isinstance(label, int | np.integer) and not isinstance(label, bool):
                ids.append(int(label))
            else:
                raise ValueError(f"class_labels must be class names or ids, got {label!r}")
        num_classes = self.transformer.config.num_classes
        if not ids:
            raise ValueError("class_labels must name at least one class, got none")
        for label_id in ids:
            if not 0 <= label_id < num_classes:
                raise ValueError(f"class ids are 0 to {num_classes - 1}, got {label_id}")
        return ids

    # ------------------------------------------------------------------------------------------------------- the call

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Labels,
        num_inference_steps: int = 250,
        num_layout_steps: int = 5,
        guidance_scale: float = 1.5,
        guidance_interval: tuple[float, float] = (0.2, 1.0),
        layout: GaussianLayout | Images | str | None = None,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        layout_latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> GPSTokenPipelineOutput | tuple:
        r"""Generate one image for each class label.

        Args:
            class_labels: class ids or names (`id2label`), one or a list or a tensor of ids.
            num_inference_steps: steps of the texture stage.
            num_layout_steps: steps of the layout stage.
            guidance_scale: w of `v_null + w (v_class - v_null)` in the texture stage; 1: no guidance, one forward
                pass a step. The layout stage is not guided.
            guidance_interval: `(low, high)` of the paper's time t, 0 noise to 1 data, in which guidance acts; outside
                of it there is one forward pass a step.
            layout: where to put the tokens. `None`: generated if there is a layout transformer, else from the bank;
                "generated" and "bank" name one of them. A [`GaussianLayout`] of B images, or of one for all, is used
                as it is. An image or a list of B (PIL, NumPy, or a `(B, 3, H, W)` tensor in [0, 1]) lends its own
                layout, after a resize and centre crop to the size of the generated image.
            generator: of all noise. With a list of B generators an image does not depend on the others of its batch
                (if their layouts have the same number of tokens).
            latents: `(B, L, 5 + C)` in place of the noise that the texture stage starts from.
            layout_latents: `(B, L, 5)` in place of the noise that the layout stage starts from.
            output_type: "pil", "np", "pt", "latent", or "layout" to stop after the first stage.
            return_dict: return a `GPSTokenPipelineOutput` instead of the tuple `(images, layout, tokens)`.
            callback_on_step_end: called as `f(pipeline, step, timestep, tensors)` after each step of the texture
                stage; the tensors it returns take the place of those of the loop.
            callback_on_step_end_tensor_inputs: which of `pipeline._callback_tensor_inputs` it is given.

        Raises:
            ValueError: what was expected and what came, before anything is computed.
        """
        labels = self._label_ids(class_labels)
        self._check_call(
            len(labels),
            num_inference_steps,
            num_layout_steps,
            guidance_scale,
            guidance_interval,
            layout,
            generator,
            layout_latents,
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        self._guidance_scale = guidance_scale
        self._interrupt = False
        device = self._execution_device
        label_ids = torch.tensor(labels, device=device)

        # 1. The layout: generated and calibrated, from the bank, or given.
        made: GaussianLayout | None = None
        if not self.is_one_stage:
            made = self._make_layout(labels, label_ids, layout, num_layout_steps, layout_latents, generator)
            if output_type == "layout":
                self.maybe_free_model_hooks()
                return GPSTokenPipelineOutput(layout=made) if return_dict else (None, made, None)
        gaussians = None if made is None else made.gaussians
        mask = made.attention_mask if made is not None and made.is_padded else None

        # 2. The texture and the refinement of the layout (or everything, in one stage).
        num_tokens = self.transformer.config.sample_size if gaussians is None else gaussians.shape[1]
        shape = (len(labels), num_tokens, self.transformer.config.in_channels)
        latents = self._prepare_latents("latents", latents, shape, generator, device)
        latents, gaussians = self._sample(
            self.transformer,
            self.scheduler,
            latents,
            label_ids,
            gaussians,
            mask,
            num_inference_steps,
            guidance_interval,
            generator,
            "texture",
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )

        # 3. Tokens, and the image.
        tokens = self._to_tokens(self.transformer, latents, gaussians)
        if output_type == "latent":
            images = latents
        else:
            sample = self.vae.decode(tokens, attention_mask=mask).sample
            images = self._processor().post_process(sample, output_type=output_type)
        self.maybe_free_model_hooks()
        if made is not None and gaussians is not made.gaussians:  # a callback edited them
            made = GaussianLayout(gaussians, None, mask)
        if not return_dict:
            return (images, made, tokens)
        return GPSTokenPipelineOutput(images=images, layout=made, tokens=tokens)

    def _sample(
        self,
        transformer: SiTTransformer1DModel,
        scheduler: SchedulerMixin,
        latents: torch.Tensor,
        labels: torch.Tensor,
        layout: torch.Tensor | None,
        mask: torch.Tensor | None,
        num_steps: int,
        guidance_interval: tuple[float, float] | None,
        generator: Generators,
        stage: str,
        callback: Callable[[Any, int, torch.Tensor, dict], dict] | None = None,
        callback_inputs: Sequence[str] = (),
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The sampling loop of either stage: noise -> latents `(B, L, C)`, and the layout (callbacks may edit it)."""
        timesteps = _set_timesteps(scheduler, num_steps, latents.device)
        times = timestep_to_time(timesteps.double()).tolist()  # all of the host's knowledge of time, in one transfer
        step_kwargs = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        low, high = guidance_interval or (1.0, 0.0)
        if stage == "texture":
            self._num_timesteps = len(timesteps)
        predict = _Predictor(transformer, labels, layout, mask)
        with self.progress_bar(total=num_steps) as bar:
            if "desc" not in getattr(self, "_progress_bar_config", {}):
                bar.set_description(stage, refresh=False)
            for i, (timestep, t) in enumerate(zip(timesteps, times)):
                if self.interrupt:
                    continue
                self._current_timestep = timestep
                in_interval = low - TIME_TOLERANCE <= t <= high + TIME_TOLERANCE
                x = (
                    scheduler.scale_model_input(latents, timestep)
                    if hasattr(scheduler, "scale_model_input")
                    else latents
                )
                output = predict(x, timestep, self.guidance_scale if in_interval else 1.0)
                latents = scheduler.step(output, timestep, latents, **step_kwargs, return_dict=False)[0]
                if callback is not None:
                    tensors = {"latents": latents, "layout": layout}
                    returned = callback(self, i, timestep, {name: tensors[name] for name in callback_inputs}) or {}
                    latents = returned.get("latents", latents)
                    edited = returned.get("layout", layout)
                    if edited is not layout:
                        layout = edited
                        predict = _Predictor(transformer, labels, layout, mask)
                if (i + 1) % scheduler.order == 0 or i + 1 == len(timesteps):
                    bar.update()
        self._current_timestep = None
        return latents, layout

    # --------------------------------------------------------------------------------------------------------- layout

    def _make_layout(
        self,
        labels: list[int],
        label_ids: torch.Tensor,
        layout: Any,
        num_steps: int,
        layout_latents: torch.Tensor | None,
        generator: Generators,
    ) -> GaussianLayout:
        """The layout of B images on the device of `label_ids`, whichever way it is asked for."""
        device = label_ids.device
        if layout is None:
            layout = "generated" if self.layout_transformer is not None else "bank"
        if isinstance(layout, GaussianLayout):
            return layout.expand(len(labels)).to(device, torch.float32)
        if not isinstance(layout, str):
            return self._layout_of_images(layout, len(labels), device)
        if layout == "bank":
            assert self.layout_bank is not None
            return self.layout_bank.sample(labels, generator=generator).to(device)
        assert self.layout_transformer is not None
        config = self.layout_transformer.config
        shape = (len(labels), config.sample_size, config.in_channels)
        latents = self._prepare_latents("layout_latents", layout_latents, shape, generator, device)
        latents, _ = self._sample(
            self.layout_transformer,
            self.layout_scheduler,
            latents,
            label_ids,
            None,
            None,
            num_steps,
            None,
            generator,
            "layout",
        )
        vae = self.vae.config
        return calibrate_layout(
            self._to_tokens(self.layout_transformer, latents, None),
            (vae.image_size, vae.image_size),
            vae.min_region_size,
            vae.sigma_scale,
            vae.align_corners,
        )

    def _layout_of_images(self, images: Any, batch_size: int, device: torch.device) -> GaussianLayout:
        """The layouts that the tokenizer would choose for these images."""
        config = self.vae.config
        side = config.image_size
        pixel_values = self._processor()(
            images,
            do_resize=True,
            size={"shortest_edge": side},
            do_center_crop=True,
            crop_size={"height": side, "width": side},
            return_tensors="pt",
        )["pixel_values"]
        if pixel_values.shape[0] not in (1, batch_size):
            raise ValueError(
                f"layout must be 1 or {batch_size} images, one per class label, got {pixel_values.shape[0]}"
            )
        layout = partition_images(
            pixel_values.to(device),
            config.num_tokens,
            complexity_exponent=config.complexity_exponent,
            min_region_size=config.min_region_size,
            sigma_scale=config.sigma_scale,
            align_corners=config.align_corners,
        )
        return layout.expand(batch_size)

    # ---------------------------------------------------------------------------------------------------------- parts

    def _processor(self) -> GPSTokenImageProcessor:
        return GPSTokenImageProcessor() if self.image_processor is None else self.image_processor

    def _prepare_latents(
        self,
        name: str,
        latents: torch.Tensor | None,
        shape: tuple[int, int, int],
        generator: Generators,
        device: torch.device,
    ) -> torch.Tensor:
        """The noise that a stage starts from, float32: the loop's sums are made in it, whatever the model's dtype."""
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if tuple(latents.shape) != shape:
            raise ValueError(f"{name} must be {shape}, got {tuple(latents.shape)}")
        return latents.to(device=device, dtype=torch.float32)

    def _to_tokens(
        self, transformer: SiTTransformer1DModel, latents: torch.Tensor, layout: torch.Tensor | None
    ) -> torch.Tensor:
        """Latents of a stage -> tokens, by the statistics of its transformer or else of the tokenizer."""
        config = transformer.config
        mean, std = config.latents_mean, config.latents_std
        if mean is None and config.gaussian_target == "offset":
            mean, std = self.vae.config.latents_mean, self.vae.config.latents_std
        mean = torch.zeros(config.in_channels) if mean is None else torch.tensor(mean)
        std = torch.ones(config.in_channels) if std is None else torch.tensor(std)
        given = layout if config.gaussian_target == "offset" else None
        latents = latents.float()
        return latents_to_tokens(latents, mean.to(latents), std.to(latents), config.gaussian_target, given)

    def _check_call(
        self,
        batch_size: int,
        num_inference_steps: int,
        num_layout_steps: int,
        guidance_scale: float,
        guidance_interval: tuple[float, float],
        layout: Any,
        generator: Generators,
        layout_latents: torch.Tensor | None,
        output_type: str,
        callback_inputs: Sequence[str],
    ) -> None:
        for name, value in (("num_inference_steps", num_inference_steps), ("num_layout_steps", num_layout_steps)):
            if not isinstance(value, int | np.integer) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value}")
        if not guidance_scale >= 0:
            raise ValueError(f"guidance_scale must be at least 0 (1 for no guidance), got {guidance_scale}")
        if len(guidance_interval) != 2 or not 0 <= guidance_interval[0] <= guidance_interval[1] <= 1:
            raise ValueError(
                f"guidance_interval must be (low, high) with 0 <= low <= high <= 1, got {tuple(guidance_interval)}"
            )
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {list(OUTPUT_TYPES)}, got {output_type!r}")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"generator must be one or a list of {batch_size}, one per label, got {len(generator)}")
        unknown = [name for name in callback_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                "callback_on_step_end_tensor_inputs may hold "
                f"{self._callback_tensor_inputs}, got {list(callback_inputs)}"
            )
        if self.is_one_stage:
            if layout is not None or layout_latents is not None or output_type == "layout":
                raise ValueError(
                    "this pipeline makes layout and texture at once (its transformer has no condition): "
                    "expected no layout, no layout_latents and another output_type than 'layout'"
                )
            return
        is_tensor = isinstance(layout, torch.Tensor) and layout.ndim != 4
        is_list_of_tensors = isinstance(layout, list | tuple) and any(isinstance(one, torch.Tensor) for one in layout)
        if is_tensor or is_list_of_tensors or (isinstance(layout, str) and layout not in LAYOUT_SOURCES):
            got = repr(layout) if isinstance(layout, str) else "tensors that are not a (B, 3, H, W) batch"
            raise ValueError(
                f"layout must be a GaussianLayout, an image (or B of them) or one of {list(LAYOUT_SOURCES)}, got {got}"
            )
        generated = layout is None and self.layout_transformer is not None
        if isinstance(layout, str) and layout == "generated":
            generated = True
            if self.layout_transformer is None:
                raise ValueError("layout='generated' needs the component layout_transformer, which is missing")
        if isinstance(layout, str) and layout == "bank" and self.layout_bank is None:
            raise ValueError("layout='bank' needs the component layout_bank, which is missing")
        if layout is None and self.layout_transformer is None and self.layout_bank is None:
            raise ValueError(
                "the texture needs a layout: expected a layout_transformer with layout_scheduler or a layout_bank "
                "among the components, or layout=, got none of them"
            )
        if layout_latents is not None and not generated:
            raise ValueError("layout_latents are for a generated layout, but the layout is given or from the bank")
        if generated and self.layout_scheduler is None:
            raise ValueError("a generated layout needs the component layout_scheduler, which is missing")
        if isinstance(layout, GaussianLayout):
            layout.check()
            if len(layout) not in (1, batch_size):
                raise ValueError(f"layout must be of 1 or {batch_size} images, one per class label, got {len(layout)}")


class _Predictor:
    """Calls a transformer with or without guidance; what does not change from step to step is prepared once."""

    def __init__(
        self,
        transformer: SiTTransformer1DModel,
        labels: torch.Tensor,
        layout: torch.Tensor | None,
        mask: torch.Tensor | None,
    ):
        self.transformer, self.dtype = transformer, transformer.dtype
        # Setting a context walks through all modules, so it is done only where one of them has a hook to see it.
        self.has_hooks = any(hasattr(module, "_diffusers_hook") for module in transformer.modules())
        null = torch.full_like(labels, transformer.config.num_classes)
        layout = None if layout is None else layout.to(self.dtype)

        def twice(value: torch.Tensor | None) -> torch.Tensor | None:
            return None if value is None else torch.cat([value, value])

        self.with_class = (labels, layout, mask)
        self.with_null = (null, layout, mask)
        self.with_both = (torch.cat([null, labels]), twice(layout), twice(mask))

    def __call__(self, x: torch.Tensor, timestep: torch.Tensor, w: float) -> torch.Tensor:
        """`x` (B, L, C) -> the guided output (B, L, C) in float32; two forward passes' work only where w needs it."""
        x = x.to(self.dtype)
        if w == 1.0:
            return self._call("class", x, timestep, self.with_class)
        if w == 0.0:
            return self._call("null", x, timestep, self.with_null)
        output_null, output_class = self._call("both", torch.cat([x, x]), timestep, self.with_both).chunk(2)
        return guide(output_null, output_class, w)

    def _call(self, context: str, x: torch.Tensor, timestep: torch.Tensor, inputs: tuple) -> torch.Tensor:
        labels, layout, mask = inputs
        # Caches of diffusers keep what they hold apart by context; here that also keeps batch sizes apart.
        with self.transformer.cache_context(context) if self.has_hooks else nullcontext():
            output = self.transformer(
                x, timestep, labels, encoder_condition=layout, attention_mask=mask, return_dict=False
            )
        return output[0].float()


def _set_timesteps(scheduler: SchedulerMixin, num_steps: int, device: torch.device) -> torch.Tensor:
    """Set the steps of any flow scheduler and return its timesteps."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        # Its default grid ends at sigma 0.001 of training; this one is uniform and ends one step before the data.
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_steps, num_steps).tolist(), device=device)
    else:
        scheduler.set_timesteps(num_steps, device=device)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    return scheduler.timesteps


def _check_components(
    vae: GPSTokenModel,
    transformer: SiTTransformer1DModel,
    layout_transformer: SiTTransformer1DModel | None,
    layout_scheduler: SchedulerMixin | None,
    layout_bank: GaussianLayoutBank | None,
) -> None:
    expected = vae.config.token_channels
    config: Mapping[str, Any] = transformer.config
    if config["in_channels"] != expected:
        raise ValueError(
            f"transformer must have in_channels = {expected}, as the vae's tokens, got {config['in_channels']}"
        )
    if config["condition_channels"] is None:
        if layout_transformer is not None or layout_bank is not None:
            raise ValueError(
                "a transformer without condition makes layouts itself: "
                "expected neither layout_transformer nor layout_bank, or a transformer with condition_channels=5"
            )
        return
    if config["condition_channels"] != NUM_GAUSSIAN_PARAMS:
        raise ValueError(f"transformer must have condition_channels 5 or None, got {config['condition_channels']}")
    if layout_transformer is None:
        return
    if layout_scheduler is None:
        raise ValueError("layout_transformer needs a layout_scheduler, got none")
    layout_config: Mapping[str, Any] = layout_transformer.config
    if layout_config["in_channels"] != NUM_GAUSSIAN_PARAMS or layout_config["condition_channels"] is not None:
        raise ValueError(
            "layout_transformer must have in_channels=5 and no condition, "
            f"got {layout_config['in_channels']} and {layout_config['condition_channels']}"
        )
    if layout_config["num_classes"] != config["num_classes"]:
        raise ValueError(
            f"layout_transformer and transformer must know the same classes, "
            f"got {layout_config['num_classes']} and {config['num_classes']}"
        )
