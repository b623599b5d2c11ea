# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""GPSTokenPipeline: class label -> layout -> calibration -> texture -> image (paper Sec. 3.3).

Shapes: B batch, L tokens, C texture channels, H x W pixels of an image.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias, get_args, get_type_hints

import numpy as np
import PIL.Image
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput

from .class_labels import Labels, ids_by_name, ids_of_names, label_ids
from .file_checks import check_source, only_safetensors
from .gaussians import NUM_GAUSSIAN_PARAMS
from .guidance import GuidedPredictor, check_guidance, guidance_at, mask_of
from .hub import HubDownloadMixin
from .image_processing_gpstoken import GPSTokenImageProcessor
from .layout import GaussianLayout
from .layout_bank import GaussianLayoutBank
from .layout_sources import (
    LAYOUT_SOURCES,
    Images,
    borrow_layout,
    calibrated,
    check_given,
    choose_source,
    spread,
)
from .loading import CheckedPipelineMixin
from .lora import GPSTokenLoraMixin
from .modeling_gpstoken import GPSTokenModel
from .sampling import (
    Generators,
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
from .transformer_sit import SiTTransformer1DModel, timestep_to_time

OUTPUT_TYPES = ("pil", "np", "pt", "latent", "layout")

StepCallback: TypeAlias = Callable[[Any, int, torch.Tensor, dict[str, Any]], dict[str, Any] | None]


@dataclass
class GPSTokenPipelineOutput(BaseOutput):
    """Output of a [`GPSTokenPipeline`].

    Args:
        images (list of B `PIL.Image.Image`, `np.ndarray` or `torch.Tensor`): for `output_type="np"` of shape
            `(B, H, W, 3)` and for `"pt"` of shape `(B, 3, H, W)`, both in [0, 1]; for `"latent"` the standardised
            latents `(B, L, 5 + C)`; `None` for `"layout"`.
        layout ([`GaussianLayout`]): the layout that the texture was generated for. Pass it as `layout=` to use it
            again, edited or not. `None` if one transformer generates layout and texture.
        tokens (`torch.Tensor` of shape `(B, L, 5 + C)`): the decoded tokens, float32; `None` for
            `output_type="layout"`.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor | None = None
    layout: GaussianLayout | None = None
    tokens: torch.Tensor | None = None


class GPSTokenPipeline(CheckedPipelineMixin, HubDownloadMixin, GPSTokenLoraMixin, DiffusionPipeline):
    r"""Class-conditional image generation in two stages: a layout of Gaussians, then their texture.

    The layout comes from the layout transformer, whose output is calibrated (Alg. 2), from a bank of stored layouts,
    or from the caller. A texture transformer without condition generates layout and texture at once (the one-stage
    baseline of the paper) and uses none of these.

    Args:
        vae ([`GPSTokenModel`]): the tokenizer, which decodes tokens.
        transformer ([`SiTTransformer1DModel`]): generator of texture (`condition_channels=5`) or of layout and texture
            (no condition), with the `in_channels` of the tokenizer's tokens, 5 + C.
        scheduler ([`~diffusers.SchedulerMixin`]): its sampler, a [`FlowMatchSDEScheduler`] or a flow scheduler of
            diffusers.
        layout_transformer ([`SiTTransformer1DModel`], *optional*): generator of layouts (`in_channels=5`, no
            condition), for the same classes.
        layout_scheduler ([`~diffusers.SchedulerMixin`], *optional*): its sampler.
        layout_bank ([`GaussianLayoutBank`], *optional*): stored layouts per class.
        image_processor ([`GPSTokenImageProcessor`], *optional*): prepares images that lend their layout, and returns
            the generated ones. A default one is used if `None`.
        id2label (`dict`, *optional*): class id -> name, or several names separated by commas.

    Raises:
        ValueError: if the components do not fit together.

    Examples:
        ```python
        >>> import torch
        >>> from gpstoken_hf import GPSTokenPipeline, bundled

        >>> pipe = GPSTokenPipeline.from_pretrained(bundled("gpstoken-digits"))
        >>> generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        >>> output = pipe(["three", 7], num_inference_steps=4, generator=generators)
        >>> [image.size for image in output.images]
        [(32, 32), (32, 32)]
        >>> output.layout.gaussians.shape
        torch.Size([2, 16, 5])

        ```
    """

    model_cpu_offload_seq = "layout_transformer->transformer->vae"
    # Accelerate finds the device of a module by its parameters. A bank has only buffers, and is small.
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
        components = {
            "vae": vae,
            "transformer": transformer,
            "scheduler": scheduler,
            "layout_transformer": layout_transformer,
            "layout_scheduler": layout_scheduler,
            "layout_bank": layout_bank,
            "image_processor": image_processor,
        }
        _check_components(**components)
        self.register_modules(**components)
        id2label = None if id2label is None else {str(key): str(value) for key, value in id2label.items()}
        self.register_to_config(id2label=id2label)
        self._guidance_scale = 1.0
        self._interrupt = False
        self._num_timesteps = 0
        self._current_timestep: torch.Tensor | None = None
        self._attention_kwargs: dict[str, Any] | None = None

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
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    # -- state of a running call, for callbacks

    @property
    def guidance_scale(self) -> float:
        """w of the running call. A callback may set `_guidance_scale`."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Number of timesteps of the texture stage."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> torch.Tensor | None:
        """The running timestep; `None` between calls."""
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        """Whether to skip the remaining steps. A callback or another thread may set `_interrupt`."""
        return self._interrupt

    @property
    def attention_kwargs(self) -> dict[str, Any] | None:
        """`attention_kwargs` of the running call."""
        return self._attention_kwargs

    @property
    def is_one_stage(self) -> bool:
        """Whether `transformer` generates layout and texture at once."""
        return self.transformer.config.condition_channels is None

    # -- labels

    @property
    def labels(self) -> dict[str, list[int]]:
        """Class name in lower case -> the ids that carry it. Names count as a whole and split at commas."""
        return ids_by_name(self.config.id2label)

    def get_label_ids(self, label: str | Sequence[str]) -> list[int]:
        """The ids of class names.

        Args:
            label (`str` or `Sequence[str]`): one name or several, in any case.

        Returns:
            `list[int]`: one id per name.

        Raises:
            ValueError: if a name is unknown or several classes share it.
        """
        return ids_of_names(label, self.config.id2label)

    # -- the call

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
        num_images_per_label: int = 1,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> GPSTokenPipelineOutput | tuple:
        r"""Generate `num_images_per_label` images for each class label, B in all.

        Args:
            class_labels (`int`, `str`, a sequence of these, or `torch.Tensor`): class ids or names of `id2label`.
            num_inference_steps (`int`, *optional*, defaults to 250): steps of the texture stage, at least 1.
            num_layout_steps (`int`, *optional*, defaults to 5): steps of the layout stage, at least 1.
            guidance_scale (`float`, *optional*, defaults to 1.5): w of `v_null + w (v_class - v_null)` in the texture
                stage, at least 0. With 1 there is no guidance. The layout stage is never guided.
            guidance_interval (`tuple[float, float]`, *optional*, defaults to `(0.2, 1.0)`): `(low, high)` with
                0 <= low <= high <= 1 in the paper's time (0 noise, 1 data). Steps outside are not guided, which halves
                their cost.
            layout ([`GaussianLayout`], images, or `str`, *optional*): where the tokens go. A layout of B images, one
                per label or one for all is used unchanged. As many images (PIL, NumPy, or a `(B, 3, H, W)` tensor in
                [0, 1]) lend the layout that the tokenizer chooses for them after a resize and centre crop.
                `"generated"` and `"bank"` name a source. By default layouts are generated if the pipeline has a layout
                transformer, and drawn from the bank if not.
            generator (`torch.Generator` or list of B of them, *optional*): source of all noise, for the batch or per
                image. With one per image, an image does not depend on the others of its batch, as long as their
                layouts have equally many tokens.
            latents (`torch.Tensor` of shape `(B, L, 5 + C)`, *optional*): initial noise of the texture stage.
            layout_latents (`torch.Tensor` of shape `(B, L, 5)`, *optional*): initial noise of the layout stage.
            num_images_per_label (`int`, *optional*, defaults to 1): images of each label, one after another.
            output_type (`str`, *optional*, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"`, `"latent"`, or `"layout"` to
                stop after the first stage.
            return_dict (`bool`, *optional*, defaults to `True`): return a [`GPSTokenPipelineOutput`] instead of the
                tuple `(images, layout, tokens)`.
            attention_kwargs (`dict`, *optional*): passed to the attention of both transformers. `{"scale": s}` scales
                their LoRAs.
            callback_on_step_end (`Callable`, *optional*): called as `f(pipeline, step, timestep, state)` after every
                step of the texture stage. Entries of the dict that it returns replace those of the loop.
            callback_on_step_end_tensor_inputs (`Sequence[str]`, *optional*, defaults to `("latents",)`): entries of
                `state`: `"latents"` `(B, L, 5 + C)` and `"layout"`, a [`GaussianLayout`].

        Returns:
            [`GPSTokenPipelineOutput`] or `tuple`: the images, their layout and their tokens.

        Raises:
            ValueError: before anything is computed, if an argument is out of its range, a class is unknown, the number
                of layouts or generators is not B, or a component that `layout` needs is missing; with the layout at
                hand, if the shape of `latents` does not fit it.

        Examples:
            ```python
            >>> import torch
            >>> from gpstoken_hf import GPSTokenPipeline, bundled

            >>> pipe = GPSTokenPipeline.from_pretrained(bundled("gpstoken-digits"))
            >>> layout = pipe(5, output_type="layout", generator=torch.Generator().manual_seed(0)).layout
            >>> both = pipe([5, 8], num_inference_steps=4, layout=layout, output_type="pt")  # one layout for both
            >>> both.images.shape
            torch.Size([2, 3, 32, 32])

            ```
        """
        labels = label_ids(
            class_labels, self.config.id2label, self.transformer.config.num_classes, num_images_per_label
        )
        check_num_steps("num_inference_steps", num_inference_steps)
        check_num_steps("num_layout_steps", num_layout_steps)
        check_guidance(guidance_scale, guidance_interval)
        check_flow_scheduler("scheduler", self.scheduler)
        check_generators(generator, len(labels))
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self._check_outputs(output_type, callback_on_step_end_tensor_inputs, callback_on_step_end)
        source = self._layout_source(layout, layout_latents, output_type)
        if isinstance(source, GaussianLayout):
            source = spread(source, len(labels), num_images_per_label)
        self._guidance_scale, self._interrupt, self._attention_kwargs = guidance_scale, False, attention_kwargs
        ids = torch.tensor(labels, device=self._execution_device)

        # 1. The layout.
        made = self._make_layout(source, ids, num_layout_steps, layout_latents, generator, num_images_per_label)
        images, tokens = None, None
        if output_type != "layout":
            # 2. The texture, with the refinement of the layout.
            latents, made = self._sample(
                "texture",
                ids,
                made,
                latents,
                num_inference_steps,
                generator,
                guidance_interval,
                callback_on_step_end,
                callback_on_step_end_tensor_inputs,
            )
            # 3. The image.
            tokens = tokens_of(latents, self.transformer, self.vae.config, made)
            if output_type == "latent":
                images = latents
            else:
                sample = self.vae.decode(tokens, attention_mask=mask_of(made)).sample
                processor = self.image_processor or GPSTokenImageProcessor()
                images = processor.post_process(sample, output_type=output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images, made, tokens)
        return GPSTokenPipelineOutput(images=images, layout=made, tokens=tokens)

    def _sample(
        self,
        stage: str,
        labels: torch.Tensor,
        layout: GaussianLayout | None,
        latents: torch.Tensor | None,
        num_steps: int,
        generator: Generators,
        guidance_interval: tuple[float, float] = (1.0, 0.0),
        callback: StepCallback | None = None,
        callback_inputs: Sequence[str] = (),
    ) -> tuple[torch.Tensor, GaussianLayout | None]:
        """The loop of the "layout" or "texture" stage: noise -> latents `(B, L, C)` and the layout after callbacks."""
        name = "layout_" if stage == "layout" else ""
        transformer, scheduler = getattr(self, f"{name}transformer"), getattr(self, f"{name}scheduler")
        latents = stage_noise(f"{name}latents", transformer, layout, latents, labels, generator)
        timesteps = set_timesteps(scheduler, num_steps, latents.device)
        inputs = model_timesteps(scheduler, timesteps)
        times = [timestep_to_time(timestep) for timestep in inputs.tolist()]  # copied to the host once
        predict = GuidedPredictor(transformer, labels, layout, self.attention_kwargs)
        if stage == "texture":
            self._num_timesteps = len(timesteps)
        with self.progress_bar(total=num_steps) as bar:
            if "desc" not in getattr(self, "_progress_bar_config", {}):
                bar.set_description(stage, refresh=False)
            for i, timestep in counted_steps(timesteps, scheduler.order, bar):
                if self.interrupt:
                    break
                self._current_timestep = timestep
                w = guidance_at(times[i], self.guidance_scale, guidance_interval)
                output = predict(latents, inputs[i], w)
                latents = take_step(scheduler, output, timestep, latents, generator)
                if callback is not None:
                    state: dict[str, Any] = {"latents": latents, "layout": layout}
                    state |= callback(self, i, timestep, {name: state[name] for name in callback_inputs}) or {}
                    latents = state["latents"]
                    if state["layout"] is not layout:
                        layout = state["layout"]
                        predict = GuidedPredictor(transformer, labels, layout, self.attention_kwargs)
        self._current_timestep = None
        return latents, layout

    def _make_layout(
        self,
        source: Any,
        labels: torch.Tensor,
        num_steps: int,
        layout_latents: torch.Tensor | None,
        generator: Generators,
        num_images_per_label: int,
    ) -> GaussianLayout | None:
        """The layout of B images from the source that `_layout_source` returned, on the device of `labels`."""
        if source is None:
            return None
        if isinstance(source, GaussianLayout):
            return source.to(labels.device, torch.float32)
        if isinstance(source, str) and source == "bank":
            assert self.layout_bank is not None  # checked by choose_source
            return self.layout_bank.sample(labels, generator=generator).to(labels.device)
        if isinstance(source, str):
            latents, _ = self._sample("layout", labels, None, layout_latents, num_steps, generator)
            assert self.layout_transformer is not None  # checked by choose_source
            return self._calibrate(tokens_of(latents, self.layout_transformer, self.vae.config, None))
        layout = borrow_layout(source, self.vae.config, self.image_processor, labels.device)
        return spread(layout, len(labels), num_images_per_label)

    def _calibrate(self, gaussians: torch.Tensor) -> GaussianLayout:
        return calibrated(gaussians, self.vae.config)

    # -- checks

    def _check_outputs(self, output_type: str, callback_inputs: Sequence[str], callback: StepCallback | None) -> None:
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {list(OUTPUT_TYPES)}, got {output_type!r}")
        if not set(callback_inputs) <= set(self._callback_tensor_inputs):
            of_class = f" of {type(callback).__name__}" if isinstance(callback, PipelineCallback) else ""
            raise ValueError(
                f"callback_on_step_end_tensor_inputs must be among {self._callback_tensor_inputs}, "
                f"got {list(callback_inputs)}{of_class} (to guide fewer steps, set guidance_interval)"
            )

    def _layout_source(
        self, layout: Any, layout_latents: torch.Tensor | None, output_type: str
    ) -> GaussianLayout | Images | str | None:
        """Check `layout` and return the source of layouts: a layout, images, a name, or `None` in one stage."""
        if self.is_one_stage:
            if layout is not None or layout_latents is not None or output_type == "layout":
                raise ValueError(
                    "layout and layout_latents must be None and output_type another than 'layout' for a transformer "
                    "without condition, which makes layout and texture at once, got one of them"
                )
            return None
        if layout is None or (isinstance(layout, str) and layout in LAYOUT_SOURCES):
            layout = choose_source(self, layout)
        is_generated = isinstance(layout, str) and layout == "generated"
        if layout_latents is not None and not is_generated:
            raise ValueError("layout_latents must be None unless the layout is generated, got a tensor")
        if is_generated:
            check_flow_scheduler("layout_scheduler", self.layout_scheduler)
        return layout if isinstance(layout, str) and layout in LAYOUT_SOURCES else check_given(layout)


def _check_components(**components: Any) -> None:
    """Raise a ValueError unless the components are of their classes and fit together."""
    hints = get_type_hints(GPSTokenPipeline)
    for name, component in components.items():
        # A compiled model keeps the original in `_orig_mod`.
        if not isinstance(getattr(component, "_orig_mod", component), hints[name]):
            expected = " or ".join(cls.__name__ for cls in get_args(hints[name]) or (hints[name],))
            raise ValueError(f"{name} must be a {expected}, got {type(component).__name__}")
        if isinstance(component, SchedulerMixin):
            check_flow_scheduler(name, component)
    layout_transformer, transformer = components["layout_transformer"], components["transformer"]

    def check_config(name: str, **expected: int | None) -> None:
        config = components[name].config
        for key, value in expected.items():
            if config[key] != value:
                raise ValueError(f"{name} must have {key}={value}, got {config[key]}")

    check_config("transformer", in_channels=components["vae"].config.token_channels)
    if transformer.config.condition_channels is None:
        if layout_transformer is not None or components["layout_bank"] is not None:
            raise ValueError(
                "layout_transformer and layout_bank must be None for a transformer without condition, "
                "which makes layouts itself, got one of them"
            )
        return
    check_config("transformer", condition_channels=NUM_GAUSSIAN_PARAMS)
    if layout_transformer is not None:
        if components["layout_scheduler"] is None:
            raise ValueError("layout_scheduler must be given with layout_transformer, got None")
        classes = transformer.config.num_classes
        channels = NUM_GAUSSIAN_PARAMS
        check_config("layout_transformer", in_channels=channels, condition_channels=None, num_classes=classes)
