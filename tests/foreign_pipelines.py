# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Pipelines of diffusers with tiny components and an AutoencoderGPSToken, and the table of which of them take it.

Every family is a function that builds the unmodified pipeline and calls it. Text encoders are left out and their
embeddings passed, as the autoencoder never sees text.

    python tests/foreign_pipelines.py    # measure all, write the tables of docs/autoencoder.md and README.md
"""

from __future__ import annotations

import inspect
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from model_helpers import make_model
from PIL import Image

from gpstoken_hf import AutoencoderGPSToken

ROOT = Path(__file__).resolve().parents[1]
PAGE, README = ROOT / "docs" / "autoencoder.md", ROOT / "README.md"
BEGIN, END = "<!-- pipelines: begin -->", "<!-- pipelines: end -->"
SIDE, CHANNELS, SCALE = 32, 16, 8
STEPS = {"num_inference_steps": 2, "output_type": "np"}


@dataclass(frozen=True)
class Family:
    """A row of the table.

    Args:
        name (`str`): what the table calls it.
        run (`Callable`): builds the pipeline and returns its images or frames, `(..., H, W, 3)`.
        error (`str`, *optional*): a pattern of the error with which it refuses the autoencoder.
        reason (`str`, *optional*): why it refuses, or what it asks for, in the table.
    """

    name: str
    run: Callable[[], Any]
    error: str = ""
    reason: str = ""


FAMILIES: list[Family] = []


def family(name: str, error: str = "", reason: str = "") -> Callable:
    """Add the decorated function to the table."""

    def add(run: Callable[[], Any]) -> Callable[[], Any]:
        FAMILIES.append(Family(name, run, error, reason))
        return run

    return add


# ---------------------------------------------------------------------------------------------------- shared parts


def make_vae() -> AutoencoderGPSToken:
    """4 x 4 cells of 16 channels for 32 x 32 pixels."""
    return AutoencoderGPSToken.from_gpstoken(make_model(num_tokens=16, texture_channels=CHANNELS - 5)).eval()


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def picture(mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def seeded(network: torch.nn.Module) -> torch.nn.Module:
    """A network with small random weights, none of them zero, so that its input reaches the output."""
    torch.manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return network.eval()


def build(name: str, **components: Any) -> Any:
    """A pipeline of diffusers with our autoencoder, quiet."""
    components = {"vae": make_vae(), **components}
    pipeline = getattr(diffusers, name)(**components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def unet(in_channels: int = CHANNELS, **config: Any) -> torch.nn.Module:
    config = {
        "sample_size": SIDE // SCALE,
        "in_channels": in_channels,
        "out_channels": CHANNELS,
        "block_out_channels": (32, 32),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 8,
        **config,
    }
    return seeded(diffusers.UNet2DConditionModel(**config))


def unet_xl(**config: Any) -> torch.nn.Module:
    return unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
        use_linear_projection=True,
        **config,
    )


NO_TEXT = {"text_encoder": None, "tokenizer": None}
EMBEDS = {"prompt_embeds": noise(1, 4, 32), "negative_prompt_embeds": noise(1, 4, 32)}
POOLED = {"pooled_prompt_embeds": noise(1, 32), "negative_pooled_prompt_embeds": noise(1, 32)}
MASKS = {
    "prompt_attention_mask": torch.ones(1, 4, dtype=torch.long),
    "negative_prompt_attention_mask": torch.ones(1, 4, dtype=torch.long),
}
SIZE = {"height": SIDE, "width": SIDE}
NO_TEXT_2 = {**NO_TEXT, "text_encoder_2": None, "tokenizer_2": None}


def stable_diffusion(name: str, network: torch.nn.Module, **call: Any) -> Any:
    pipeline = build(
        name,
        unet=network,
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **NO_TEXT,
    )
    return pipeline(**EMBEDS, **STEPS, **call).images


def stable_diffusion_xl(name: str, network: torch.nn.Module, **call: Any) -> Any:
    pipeline = build(name, unet=network, scheduler=DDIMScheduler(), **NO_TEXT_2)
    return pipeline(**EMBEDS, **POOLED, **STEPS, **call).images


# ------------------------------------------------------------------------------------------------ UNets of images


@family("DiT")
def dit() -> Any:
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=SIDE // SCALE,
        patch_size=1,
        in_channels=CHANNELS,
        out_channels=2 * CHANNELS,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
    )
    pipeline = build("DiTPipeline", transformer=seeded(transformer), scheduler=DDIMScheduler())
    return pipeline([3, 7], **STEPS).images


@family("LDM")
def ldm() -> Any:
    network = diffusers.UNet2DModel(
        sample_size=SIDE // SCALE,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    pipeline = diffusers.LDMPipeline(vqvae=make_vae(), unet=seeded(network), scheduler=DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(**STEPS).images


@family("Stable Diffusion 1 and 2")
def sd() -> Any:
    return stable_diffusion("StableDiffusionPipeline", unet(), **SIZE)


@family("Stable Diffusion, image to image")
def sd_img2img() -> Any:
    return stable_diffusion("StableDiffusionImg2ImgPipeline", unet(), image=picture(), strength=0.9)


@family("InstructPix2Pix")
def sd_pix2pix() -> Any:
    network = unet(in_channels=2 * CHANNELS)
    return stable_diffusion("StableDiffusionInstructPix2PixPipeline", network, image=picture())


@family(
    "Stable Diffusion 1, 2 and XL, inpainting",
    error="should have either 4 or 9",
    reason="the UNet must have 4 or 9 input channels, which is for latents of 4 channels",
)
def sd_inpaint() -> Any:
    return stable_diffusion("StableDiffusionInpaintPipeline", unet(), image=picture(), mask_image=picture("L"), **SIZE)


@family("Stable Diffusion, ControlNet")
def sd_controlnet() -> Any:
    network = unet()
    control = seeded(diffusers.ControlNetModel.from_unet(network, conditioning_embedding_out_channels=(8, 8, 8, 8)))
    pipeline = build(
        "StableDiffusionControlNetPipeline",
        unet=network,
        controlnet=control,
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **NO_TEXT,
    )
    return pipeline(image=picture(), **EMBEDS, **STEPS, **SIZE).images


@family("Latent Consistency Models")
def lcm() -> Any:
    pipeline = build(
        "LatentConsistencyModelPipeline",
        unet=unet(time_cond_proj_dim=32),
        scheduler=diffusers.LCMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **NO_TEXT,
    )
    return pipeline(prompt_embeds=EMBEDS["prompt_embeds"], **STEPS, **SIZE).images


@family("Stable Diffusion XL")
def sdxl() -> Any:
    return stable_diffusion_xl("StableDiffusionXLPipeline", unet_xl(), **SIZE)


@family("Stable Diffusion XL, image to image")
def sdxl_img2img() -> Any:
    call = {"image": picture(), "strength": 0.9}
    return stable_diffusion_xl("StableDiffusionXLImg2ImgPipeline", unet_xl(), **call)


@family("Marigold, depth")
def marigold() -> Any:
    pipeline = build(
        "MarigoldDepthPipeline", unet=unet(in_channels=2 * CHANNELS), scheduler=DDIMScheduler(), **NO_TEXT
    )
    pipeline.empty_text_embedding = noise(1, 4, 32)
    depth = pipeline(picture(), num_inference_steps=2, processing_resolution=0, output_type="np").prediction
    return np.repeat(depth, 3, axis=-1)


# ------------------------------------------------------------------------------------------- transformers of images


def sd3_transformer() -> torch.nn.Module:
    return seeded(
        diffusers.SD3Transformer2DModel(
            sample_size=SIDE // SCALE,
            patch_size=1,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_projection_dim=16,
            joint_attention_dim=32,
            pooled_projection_dim=32,
        )
    )


def sd3(name: str, **call: Any) -> Any:
    pipeline = build(
        name,
        transformer=sd3_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder_3=None,
        tokenizer_3=None,
        **NO_TEXT_2,
    )
    return pipeline(**EMBEDS, **POOLED, **STEPS, **call).images


@family("Stable Diffusion 3")
def sd3_text() -> Any:
    return sd3("StableDiffusion3Pipeline", **SIZE)


@family("Stable Diffusion 3, image to image")
def sd3_img2img() -> Any:
    return sd3("StableDiffusion3Img2ImgPipeline", image=picture(), strength=0.9, **SIZE)


@family("Stable Diffusion 3, inpainting", reason="latents of 16 channels, as its transformer has 16 or 33")
def sd3_inpaint() -> Any:
    return sd3("StableDiffusion3InpaintPipeline", image=picture(), mask_image=picture("L"), strength=0.9, **SIZE)


def flux(name: str, channels: int = 4 * CHANNELS, **call: Any) -> Any:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=channels,
        out_channels=4 * CHANNELS,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    pipeline = build(name, transformer=seeded(transformer), scheduler=FlowMatchEulerDiscreteScheduler(), **NO_TEXT_2)
    embeds = {"prompt_embeds": noise(1, 4, 32), "pooled_prompt_embeds": noise(1, 32)}
    return pipeline(**embeds, **STEPS, **SIZE, **call).images


@family("Flux")
def flux_text() -> Any:
    return flux("FluxPipeline")


@family("Flux, image to image")
def flux_img2img() -> Any:
    return flux("FluxImg2ImgPipeline", image=picture(), strength=0.9)


@family("Flux, inpainting")
def flux_inpaint() -> Any:
    return flux("FluxInpaintPipeline", image=picture(), mask_image=picture("L"), strength=0.9)


@family("Flux, fill")
def flux_fill() -> Any:
    # Noise, masked image and a mask of 8 x 8 pixels per cell, each packed 2 x 2.
    channels = 4 * (CHANNELS + CHANNELS + SCALE**2)
    return flux("FluxFillPipeline", channels, image=picture(), mask_image=picture("L"))


@family("Flux, control")
def flux_control() -> Any:
    return flux("FluxControlPipeline", 8 * CHANNELS, control_image=picture())


@family("Flux Kontext")
def flux_kontext() -> Any:
    return flux("FluxKontextPipeline", image=picture(), max_area=SIDE**2, _auto_resize=False)


@family("Chroma")
def chroma() -> Any:
    transformer = diffusers.ChromaTransformer2DModel(
        patch_size=1,
        in_channels=4 * CHANNELS,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_hidden_dim=32,
        approximator_layers=1,
        approximator_num_channels=16,
    )
    pipeline = build(
        "ChromaPipeline", transformer=seeded(transformer), scheduler=FlowMatchEulerDiscreteScheduler(), **NO_TEXT
    )
    masks = {name: mask.bool() for name, mask in MASKS.items()}
    return pipeline(**EMBEDS, **masks, **STEPS, **SIZE).images


def pixart(name: str) -> Any:
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=SIDE // SCALE,
        patch_size=1,
        in_channels=CHANNELS,
        out_channels=2 * CHANNELS,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=32,
        cross_attention_dim=16,
        use_additional_conditions=False,
    )
    pipeline = build(name, transformer=seeded(transformer), scheduler=diffusers.DDPMScheduler(), **NO_TEXT)
    call = {**EMBEDS, **MASKS, **STEPS, **SIZE, "use_resolution_binning": False}
    return pipeline(negative_prompt=None, **call).images


@family("PixArt-Alpha")
def pixart_alpha() -> Any:
    return pixart("PixArtAlphaPipeline")


@family("PixArt-Sigma")
def pixart_sigma() -> Any:
    return pixart("PixArtSigmaPipeline")


@family("AuraFlow")
def aura_flow() -> Any:
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=SIDE // SCALE,
        patch_size=1,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=32,
        pos_embed_max_size=64,
    )
    pipeline = build(
        "AuraFlowPipeline", transformer=seeded(transformer), scheduler=FlowMatchEulerDiscreteScheduler(), **NO_TEXT
    )
    return pipeline(**EMBEDS, **MASKS, **STEPS, **SIZE).images


def sana(name: str, **call: Any) -> Any:
    transformer = diffusers.SanaTransformer2DModel(
        sample_size=SIDE // SCALE,
        patch_size=1,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=32,
        guidance_embeds="Sprint" in name,
    )
    is_sprint = "Sprint" in name
    scheduler = diffusers.SCMScheduler() if is_sprint else FlowMatchEulerDiscreteScheduler()
    pipeline = build(name, transformer=seeded(transformer), scheduler=scheduler, **NO_TEXT)
    embeds = {"prompt_embeds": noise(1, 4, 32), "prompt_attention_mask": MASKS["prompt_attention_mask"]}
    if not is_sprint:
        embeds = {**EMBEDS, **MASKS, "negative_prompt": None}
    return pipeline(**embeds, **STEPS, **SIZE, use_resolution_binning=False, **call).images


@family("Sana")
def sana_text() -> Any:
    return sana("SanaPipeline")


@family("Sana Sprint")
def sana_sprint() -> Any:
    return sana("SanaSprintPipeline")


@family("Lumina")
def lumina() -> Any:
    transformer = diffusers.LuminaNextDiT2DModel(
        sample_size=SIDE // SCALE,
        patch_size=1,
        in_channels=CHANNELS,
        hidden_size=32,
        num_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        cross_attention_dim=32,
        learn_sigma=True,
        scaling_factor=1.0,
    )
    pipeline = build(
        "LuminaPipeline", transformer=seeded(transformer), scheduler=FlowMatchEulerDiscreteScheduler(), **NO_TEXT
    )
    return pipeline(**EMBEDS, **MASKS, **STEPS, **SIZE).images


@family("Lumina 2")
def lumina2() -> Any:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=SIDE // SCALE,
        patch_size=2,
        in_channels=CHANNELS,
        hidden_size=32,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(8, 4, 4),
        axes_lens=(64, 64, 64),
        cap_feat_dim=32,
    )
    pipeline = build(
        "Lumina2Pipeline", transformer=seeded(transformer), scheduler=FlowMatchEulerDiscreteScheduler(), **NO_TEXT
    )
    return pipeline(**EMBEDS, **MASKS, **STEPS, **SIZE).images


@family("HunyuanDiT")
def hunyuan_dit() -> Any:
    transformer = diffusers.HunyuanDiT2DModel(
        sample_size=SIDE // SCALE,
        patch_size=1,
        in_channels=CHANNELS,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        hidden_size=16,
        activation_fn="gelu-approximate",
        cross_attention_dim=32,
        cross_attention_dim_t5=32,
        pooled_projection_dim=32,
        text_len=4,
        text_len_t5=4,
        learn_sigma=True,
    )
    pipeline = build(
        "HunyuanDiTPipeline",
        transformer=seeded(transformer),
        scheduler=diffusers.DDPMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **NO_TEXT_2,
    )
    second = {f"{name}_2": value for name, value in {**EMBEDS, **MASKS}.items()}
    call = {**EMBEDS, **MASKS, **second, **STEPS, **SIZE, "use_resolution_binning": False}
    return pipeline(original_size=(SIDE, SIDE), target_size=(SIDE, SIDE), **call).images


@family("CogView4")
def cogview4() -> Any:
    transformer = diffusers.CogView4Transformer2DModel(
        sample_size=SIDE // SCALE,
        patch_size=2,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=32,
        time_embed_dim=8,
        condition_dim=4,
        rope_axes_dim=(16, 16),
    )
    pipeline = build(
        "CogView4Pipeline", transformer=seeded(transformer), scheduler=FlowMatchEulerDiscreteScheduler(), **NO_TEXT
    )
    return pipeline(**EMBEDS, **STEPS, **SIZE, original_size=(SIDE, SIDE)).images


@family("Z-Image")
def z_image() -> Any:
    transformer = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=CHANNELS,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[8, 4, 4],
        axes_lens=[64, 32, 32],
    )
    pipeline = build(
        "ZImagePipeline", transformer=seeded(transformer), scheduler=FlowMatchEulerDiscreteScheduler(), **NO_TEXT
    )
    embeds = {"prompt_embeds": [noise(4, 32)], "negative_prompt_embeds": [noise(4, 32)]}
    return pipeline(**embeds, **STEPS, **SIZE).images


@family("PRX")
def prx() -> Any:
    transformer = diffusers.PRXTransformer2DModel(
        patch_size=1,
        in_channels=CHANNELS,
        context_in_dim=32,
        hidden_size=32,
        num_heads=2,
        depth=1,
        axes_dim=[8, 8],
    )
    pipeline = build(
        "PRXPipeline", transformer=seeded(transformer), scheduler=FlowMatchEulerDiscreteScheduler(), **NO_TEXT
    )
    masks = {name: mask.bool() for name, mask in MASKS.items()}
    return pipeline(**EMBEDS, **masks, **STEPS, **SIZE, use_resolution_binning=False).images


@family("HunyuanImage")
def hunyuan_image() -> Any:
    transformer = diffusers.HunyuanImageTransformer2DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=(1, 1),
        text_embed_dim=32,
        text_embed_2_dim=32,
        rope_axes_dim=(4, 4),
        guidance_embeds=False,
    )
    pipeline = build(
        "HunyuanImagePipeline",
        transformer=seeded(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        guider=None,
        ocr_guider=None,
        **NO_TEXT_2,
    )
    embeds = {"prompt_embeds": noise(1, 4, 32), "prompt_embeds_2": noise(1, 4, 32)}
    embeds |= {"prompt_embeds_mask": torch.ones(1, 4), "prompt_embeds_mask_2": torch.ones(1, 4)}
    negative = {f"negative_{name}": value for name, value in embeds.items()}
    return pipeline(**embeds, **negative, **STEPS, **SIZE).images


# ------------------------------------------------------------------------------------------------------------ videos


@family("Latte", reason="frame by frame")
def latte() -> Any:
    transformer = diffusers.LatteTransformer3DModel(
        sample_size=SIDE // SCALE,
        patch_size=1,
        in_channels=CHANNELS,
        out_channels=2 * CHANNELS,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=32,
        cross_attention_dim=16,
        video_length=2,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
    )
    pipeline = build("LattePipeline", transformer=seeded(transformer), scheduler=DDIMScheduler(), **NO_TEXT)
    return pipeline(negative_prompt=None, video_length=2, **EMBEDS, **STEPS, **SIZE).frames


@family("AnimateDiff", reason="frame by frame")
def animate_diff() -> Any:
    adapter = diffusers.MotionAdapter(
        block_out_channels=(32, 32), motion_layers_per_block=1, motion_norm_num_groups=8, motion_num_attention_heads=2
    )
    pipeline = build(
        "AnimateDiffPipeline", unet=unet(), motion_adapter=seeded(adapter), scheduler=DDIMScheduler(), **NO_TEXT
    )
    return pipeline(num_frames=2, **EMBEDS, **STEPS, **SIZE).frames


VIDEO = "it needs a video autoencoder, with a temporal scale and latents `(B, C, T, h, w)`"


def without_parts(name: str) -> Any:
    """Construct a pipeline that refuses the autoencoder before it looks at its other components."""
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters.values()
    required = {parameter.name: None for parameter in parameters if parameter.default is parameter.empty}
    return build(name, **{key: value for key, value in required.items() if key not in ("self", "vae")})


for _title, _class, _error in (
    ("CogVideoX", "CogVideoXPipeline", "temporal_compression_ratio"),
    ("HunyuanVideo", "HunyuanVideoPipeline", "temporal_compression_ratio"),
    ("LTX-Video", "LTXPipeline", "temporal_compression_ratio"),
    ("Allegro", "AllegroPipeline", "temporal_compression_ratio"),
    ("Wan", "WanPipeline", "scale_factor_temporal"),
    ("LTX-2", "LTX2Pipeline", "temporal_compression_ratio"),
    ("SkyReels", "SkyReelsV2Pipeline", "temperal_downsample"),
    ("Kandinsky 5, video", "Kandinsky5T2VPipeline", "temporal_compression_ratio"),
    ("Krea 2", "Krea2Pipeline", "temperal_downsample"),
):
    family(_title, error=_error, reason=VIDEO)(partial(without_parts, _class))


# ----------------------------------------------------------------------------------------- other kinds of autoencoder


@family("Flux 2", error="bn", reason="normalises latents with the batch norm of its autoencoder")
def flux2() -> Any:
    transformer = diffusers.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=4 * CHANNELS,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
    )
    pipeline = build(
        "Flux2Pipeline", transformer=seeded(transformer), scheduler=FlowMatchEulerDiscreteScheduler(), **NO_TEXT
    )
    return pipeline(prompt_embeds=noise(1, 4, 32), **STEPS, **SIZE).images


VQ = "calls `decode(force_not_quantize=True)` of a VQModel"


@family("Kandinsky 2.2", error="force_not_quantize", reason=VQ)
def kandinsky22() -> Any:
    network = unet(
        out_channels=2 * CHANNELS,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        encoder_hid_dim=32,
        encoder_hid_dim_type="image_proj",
        addition_embed_type="image",
        resnet_time_scale_shift="scale_shift",
    )
    pipeline = diffusers.KandinskyV22Pipeline(unet=network, scheduler=diffusers.DDPMScheduler(), movq=make_vae())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(image_embeds=noise(1, 32), negative_image_embeds=noise(1, 32), **STEPS, **SIZE).images


@family("Kandinsky 3", error="force_not_quantize", reason=VQ)
def kandinsky3() -> Any:
    network = diffusers.Kandinsky3UNet(
        in_channels=4,
        time_embedding_dim=4,
        groups=2,
        attention_head_dim=4,
        layers_per_block=3,
        block_out_channels=(32, 64),
        cross_attention_dim=4,
        encoder_hid_dim=32,
    )
    pipeline = diffusers.Kandinsky3Pipeline(
        unet=seeded(network), scheduler=diffusers.DDPMScheduler(), movq=make_vae(), **NO_TEXT
    )
    pipeline.set_progress_bar_config(disable=True)
    masks = {"attention_mask": torch.ones(1, 4), "negative_attention_mask": torch.ones(1, 4)}
    return pipeline(**EMBEDS, **masks, **STEPS, **SIZE).images


@family("Stable Cascade", error="to have 16 channels, but got 4", reason="draws latents of 4 channels")
def cascade() -> Any:
    network = diffusers.models.StableCascadeUNet(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        conditioning_dim=32,
        block_out_channels=(32, 32),
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        down_blocks_repeat_mappers=(1, 1),
        up_blocks_repeat_mappers=(1, 1),
        block_types_per_layer=(("SDCascadeResBlock", "SDCascadeTimestepBlock"),) * 2,
        timestep_ratio_embedding_dim=8,
        clip_text_pooled_in_channels=32,
        effnet_in_channels=16,
        patch_size=1,
        switch_level=None,
    )
    pipeline = diffusers.StableCascadeDecoderPipeline(
        decoder=seeded(network), scheduler=diffusers.DDPMWuerstchenScheduler(), vqgan=make_vae(), **NO_TEXT
    )
    pipeline.set_progress_bar_config(disable=True)
    embeds = {"image_embeddings": noise(1, 16, 1, 1), "prompt_embeds_pooled": noise(1, 1, 32)}
    return pipeline(**embeds, negative_prompt_embeds_pooled=noise(1, 1, 32), **EMBEDS, **STEPS).images


@family("Amused", error="force_not_quantize", reason=VQ)
def amused() -> Any:
    transformer = diffusers.UVit2DModel(
        hidden_size=8,
        cond_embed_dim=8,
        micro_cond_encode_dim=2,
        micro_cond_embed_dim=10,
        encoder_hidden_size=8,
        vocab_size=32,
        codebook_size=8,
        in_channels=8,
        block_out_channels=8,
        num_res_blocks=1,
        downsample=True,
        upsample=True,
        block_num_heads=1,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
    )
    scheduler = diffusers.AmusedScheduler(mask_token_id=31)
    pipeline = diffusers.AmusedPipeline(vqvae=make_vae(), transformer=transformer, scheduler=scheduler, **NO_TEXT)
    pipeline.set_progress_bar_config(disable=True)
    embeds = {"prompt_embeds": noise(1, 8), "encoder_hidden_states": noise(1, 4, 8)}
    negative = {f"negative_{name}": value for name, value in embeds.items()}
    return pipeline(**embeds, **negative, **STEPS, **SIZE).images


# -------------------------------------------------------------------------------------------------------- the table


def measure(row: Family) -> str:
    """Run a family and return its row of the table.

    Raises:
        AssertionError: if the images have another size than was asked for, or are not finite.
        Exception: if the pipeline fails in another way than the family says.
    """
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            images = np.asarray(row.run())
    except Exception as error:
        if not row.error or not re.search(row.error, str(error)):
            raise
        return f"| {row.name} | no: {row.reason} |"
    assert images.shape[-3:] == (SIDE, SIDE, 3), f"{row.name} made images of shape {images.shape}"
    assert np.isfinite(images).all()
    assert images.std() > 0
    assert not row.error, f"{row.name} was expected to refuse"
    return f"| {row.name} | yes{f': {row.reason}' if row.reason else ''} |"


def table_of(path: Path) -> list[str]:
    """The rows of the table in a file, without its head."""
    text = path.read_text(encoding="utf-8")
    return text.split(BEGIN)[1].split(END)[0].strip().splitlines()[2:]


def by_verdict(rows: list[str]) -> list[str]:
    """The rows of the README: one for each verdict, with the pipelines that share it, and refusals last."""
    names: dict[str, list[str]] = {}
    for row in rows:
        _, name, verdict, _ = row.split("|")
        names.setdefault(verdict.strip(), []).append(name.strip())
    verdicts = sorted(names, key=lambda verdict: not verdict.startswith("yes"))
    return [f"| {'; '.join(names[verdict])} | {verdict} |" for verdict in verdicts]


def write_table(path: Path, head: str, rows: list[str]) -> None:
    """Replace the table between the two comments of a file."""
    text = path.read_text(encoding="utf-8")
    table = "\n".join([head, "|---|---|", *rows])
    path.write_text(f"{text.split(BEGIN)[0]}{BEGIN}\n{table}\n{END}{text.split(END)[1]}", encoding="utf-8")


def main() -> int:
    """Measure all families and write the tables; returns how many failed in an unexpected way."""
    rows, failed = [], 0
    for row in FAMILIES:
        try:
            rows.append(measure(row))
        except Exception as error:
            failed += 1
            print(f"{row.name}: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr)
    write_table(PAGE, "| pipeline | takes it |", rows)
    write_table(
        README, "| pipelines of diffusers, unmodified | take our autoencoder as their `vae` |", by_verdict(rows)
    )
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
