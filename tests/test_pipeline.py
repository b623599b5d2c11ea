# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import sit_golden
import tiny_pipeline
import torch
from accelerate import cpu_offload
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    PyramidAttentionBroadcastConfig,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback, SDCFGCutoffCallback
from safetensors.torch import save_file
from tiny_pipeline import CHANNELS, SIDE, TOKENS, make_components, make_pipeline, seeded

from gpstoken_hf.calibration import calibrate_layout
from gpstoken_hf.layout import GaussianLayout
from gpstoken_hf.partition import partition_images
from gpstoken_hf.pipeline_gpstoken import GPSTokenPipeline
from gpstoken_hf.sampling import tokens_of
from gpstoken_hf.scheduling_flow_match_sde import FlowMatchSDEScheduler

MODES = ("generated", "bank", "one_stage")


def pixels(output) -> torch.Tensor:
    assert isinstance(output.images, torch.Tensor)
    return output.images


class RecordedNoise(FlowMatchSDEScheduler):
    """The same scheduler with the noise of a recording."""

    noise: torch.Tensor

    def step(self, model_output, timestep, sample, generator=None, **kwargs):
        index = self.step_index or 0
        noise = self.noise[index] if index < len(self.noise) else None
        return super().step(model_output, timestep, sample, variance_noise=noise, **kwargs)


@pytest.mark.parametrize("name", sit_golden.available_sets())
@pytest.mark.parametrize("sampler", ["sde", "ode_euler"])
def test_the_loop_follows_the_guided_trajectories_of_the_release(name, sampler):
    golden, config = sit_golden.load_arrays(name), sit_golden.load_config(name)
    states = []
    if sampler == "sde":
        scheduler, trajectory = RecordedNoise(), golden["sde_trajectory"]
        scheduler.noise = golden["sde_noise"]
    else:
        scheduler, trajectory = FlowMatchEulerDiscreteScheduler(), golden["ode_euler_trajectory"][1:]
    pipeline = make_pipeline("bank", transformer=sit_golden.load_model(name), scheduler=scheduler)
    pipeline._guidance_scale = config["cfg"]["scale"]
    with torch.no_grad():
        pipeline._sample(
            "texture",
            golden["cfg_y"],
            GaussianLayout(golden["cfg_cond"]),
            golden["cfg_x"],
            len(trajectory),
            None,
            (config["cfg"]["low"], config["cfg"]["high"]),
            lambda _pipe, _i, _t, tensors: states.append(tensors["latents"]),
            ["latents"],
        )
    assert len(states) == len(trajectory)
    for state, expected in zip(states, trajectory):
        torch.testing.assert_close(state, expected, rtol=0, atol=1e-4)


def record_calls(transformer) -> list[tuple[int, list[int]]]:
    """(batch size, labels) of every forward pass from now on."""
    calls = []
    transformer.register_forward_hook(lambda _m, args, _o: calls.append((len(args[0]), args[2].tolist())))
    return calls


def test_guidance_makes_no_forward_pass_it_does_not_need():
    null = tiny_pipeline.CLASSES

    def run(**kwargs):
        pipeline = make_pipeline("bank", scheduler=FlowMatchEulerDiscreteScheduler())
        calls = record_calls(pipeline.transformer)
        pipeline([3, 4], num_inference_steps=10, generator=seeded(0, 1), output_type="pt", **kwargs)
        return calls

    labelled, unlabelled, both = (2, [3, 4]), (2, [null, null]), (4, [null, null, 3, 4])
    # t of the steps: 0, 0.1, ..., 0.9; both ends of the interval belong to it.
    assert run(guidance_scale=1.5, guidance_interval=(0.2, 1.0)) == [labelled] * 2 + [both] * 8
    assert run(guidance_scale=1.5, guidance_interval=(0.3, 0.7)) == [labelled] * 3 + [both] * 5 + [labelled] * 2
    assert run(guidance_scale=1.0, guidance_interval=(0.0, 1.0)) == [labelled] * 10
    assert run(guidance_scale=0.0, guidance_interval=(0.0, 0.4)) == [unlabelled] * 5 + [labelled] * 5


def test_guidance_scale_one_is_no_guidance_and_others_are():
    def run(w):
        return pixels(make_pipeline("bank")([3], 6, guidance_scale=w, generator=seeded(0), output_type="pt"))

    # Worst seen 1.0e-6: a batch of one and of two.
    torch.testing.assert_close(run(1.0), run(1.0 + 1e-7), rtol=0, atol=1e-5)
    assert (run(1.0) - run(4.0)).abs().max() > 1e-3


def test_the_layout_stage_is_not_guided():
    pipeline = make_pipeline("generated")
    calls = record_calls(pipeline.layout_transformer)
    pipeline([3], 2, num_layout_steps=4, guidance_scale=5.0, generator=seeded(0), output_type="layout")
    assert calls == [(1, [3])] * 4


@pytest.mark.parametrize("mode", MODES)
def test_the_same_image_alone_and_in_a_batch(mode):
    pipeline = make_pipeline(mode)
    together = pipeline([1, 2, 3], 6, generator=seeded(7, 8, 9), output_type="pt")
    again = pipeline([1, 2, 3], 6, generator=seeded(7, 8, 9), output_type="pt")
    assert torch.equal(pixels(together), pixels(again))
    for i in range(3):
        alone = pipeline([1 + i], 6, generator=seeded(7 + i), output_type="pt")
        # Worst seen 1.7e-6.
        torch.testing.assert_close(pixels(alone)[0], pixels(together)[i], rtol=0, atol=1e-5)
    other = pipeline([1, 2, 3], 6, generator=seeded(10, 8, 9), output_type="pt")
    assert (pixels(other)[0] - pixels(together)[0]).abs().max() > 1e-3
    # Layout and class of a sample are its own: the neighbours did not change.
    torch.testing.assert_close(pixels(other)[1:], pixels(together)[1:], rtol=0, atol=1e-5)


def test_one_generator_for_the_batch():
    pipeline = make_pipeline()
    first = pipeline([1, 2], 4, generator=torch.Generator().manual_seed(0), output_type="pt")
    second = pipeline([1, 2], 4, generator=torch.Generator().manual_seed(0), output_type="pt")
    assert torch.equal(pixels(first), pixels(second))


@pytest.mark.parametrize("mode", MODES)
def test_output_types(mode):
    pipeline = make_pipeline(mode)

    def run(output_type):
        return pipeline([1, 2], 3, generator=seeded(0, 1), output_type=output_type)

    pil, np_, pt, latent = (run(kind) for kind in ("pil", "np", "pt", "latent"))
    assert [(image.size, image.mode) for image in pil.images] == [((SIDE, SIDE), "RGB")] * 2
    assert np_.images.shape == (2, SIDE, SIDE, 3)
    assert np_.images.dtype == np.float32
    assert 0 <= np_.images.min() <= np_.images.max() <= 1
    np.testing.assert_array_equal(np_.images.transpose(0, 3, 1, 2), pt.images.numpy())
    np.testing.assert_allclose(np.stack([np.asarray(image) for image in pil.images]) / 255, np_.images, atol=0.5 / 255)
    assert latent.images.shape == pt.tokens.shape == (2, TOKENS, CHANNELS)
    assert torch.equal(latent.tokens, pt.tokens)
    assert torch.equal(pipeline.vae.decode(pt.tokens).sample.clamp(-1, 1) / 2 + 0.5, pt.images)
    assert (pt.layout is None) == (mode == "one_stage")
    if mode != "one_stage":
        assert pt.layout.gaussians.shape == (2, TOKENS, 5)
        assert pt.layout.gaussians.dtype == torch.float32
    images, layout, tokens = pipeline([1, 2], 3, generator=seeded(0, 1), output_type="pt", return_dict=False)
    assert torch.equal(images, pt.images)
    assert torch.equal(tokens, pt.tokens)
    assert (layout is None) == (mode == "one_stage")


def test_generated_layouts_are_legal():
    layout = make_pipeline()(list(range(10)), generator=torch.Generator().manual_seed(0), output_type="layout").layout
    calibrated = calibrate_layout(layout.gaussians, (SIDE, SIDE), min_region_size=4)
    assert torch.equal(calibrated.gaussians, layout.gaussians)
    assert torch.equal(calibrated.boxes, layout.boxes)
    assert len(torch.unique(layout.gaussians, dim=0)) > 1


def test_layouts_from_the_bank_are_of_the_class():
    pipeline = make_pipeline("bank")
    stored = pipeline.layout_bank.layouts_by_class()
    layout = pipeline([4, 7], generator=seeded(0, 1), output_type="layout").layout
    for one, label in zip(layout.gaussians, (4, 7)):
        assert any(torch.equal(one, other) for other in stored[label])
    assert pipeline.layout_bank.class_labels[layout.indices].tolist() == [4, 7]


def test_layout_source_by_name():
    pipeline, stored = make_pipeline("both"), tiny_pipeline.make_bank().layouts_by_class()[4]
    generated = pipeline([4], generator=seeded(0), output_type="layout").layout
    named = pipeline([4], generator=seeded(0), layout="generated", output_type="layout").layout
    banked = pipeline([4], generator=seeded(0), layout="bank", output_type="layout").layout
    assert torch.equal(generated.gaussians, named.gaussians)
    assert any(torch.equal(banked.gaussians[0], other) for other in stored)
    assert not any(torch.equal(generated.gaussians[0], other) for other in stored)


@pytest.mark.parametrize("mode", ["generated", "bank"])
def test_a_layout_can_be_taken_out_and_put_back_in(mode):
    pipeline = make_pipeline(mode)
    latents = torch.randn(2, TOKENS, CHANNELS, generator=torch.Generator().manual_seed(0))
    arguments = {"num_inference_steps": 3, "latents": latents, "output_type": "pt"}
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    whole = pipeline([1, 2], generator=seeded(0, 1), **arguments)
    layout = pipeline([1, 2], generator=seeded(0, 1), output_type="layout").layout
    assert torch.equal(layout.gaussians, whole.layout.gaussians)
    assert torch.equal(pixels(pipeline([1, 2], layout=layout, **arguments)), pixels(whole))

    edited = layout.gaussians.clone()
    edited[:, 0, 3:] *= -0.5
    moved = pipeline([1, 2], layout=GaussianLayout(edited), **arguments)
    assert torch.equal(moved.layout.gaussians, edited)
    assert (pixels(moved) - pixels(whole)).abs().max() > 1e-3


def test_a_layout_given_by_hand_needs_no_source_of_layouts():
    pipeline = make_pipeline("bank", layout_bank=None)
    gaussians = tiny_pipeline.make_bank().gaussians_of(0)
    layout = GaussianLayout(gaussians[None])
    output = pipeline([1, 2], 3, layout=layout, generator=seeded(0, 1), output_type="pt")
    assert torch.equal(output.layout.gaussians, gaussians.expand(2, -1, -1))
    # The output may be edited: it shares memory neither between its rows nor with the layout that was given.
    output.layout.gaussians[0, 0, 3] = 0.25
    assert output.layout.gaussians[1, 0, 3] != 0.25
    assert gaussians[0, 3] != 0.25


def test_any_number_of_tokens_and_different_numbers_in_one_batch():
    pipeline = make_pipeline("bank", scheduler=FlowMatchEulerDiscreteScheduler())
    image = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3)) * 2 - 1
    short, long = (partition_images(image, length, min_region_size=4) for length in (3, 12))
    noise = torch.randn(2, 12, CHANNELS, generator=torch.Generator().manual_seed(0))
    output = pipeline([1, 2], 4, layout=GaussianLayout.stack([short, long]), latents=noise, output_type="pt")
    assert output.layout.gaussians.shape == (2, 12, 5)
    assert output.layout.num_tokens.tolist() == [3, 12]
    for i, layout in enumerate((short, long)):
        given = noise[i : i + 1, : layout.gaussians.shape[1]]
        alone = pipeline([1 + i], 4, layout=layout, latents=given, output_type="pt")
        assert not alone.layout.is_padded
        torch.testing.assert_close(pixels(alone)[0], pixels(output)[i], rtol=0, atol=1e-5)
    again = pipeline([1, 2], 4, layout=output.layout, latents=noise, output_type="pt")
    assert torch.equal(pixels(again), pixels(output))


def test_a_bank_of_layouts_of_different_lengths():
    pipeline = make_pipeline("bank", layout_bank=tiny_pipeline.make_bank(lengths=(4, 6, 10)))
    output = pipeline(list(range(10)), 2, generator=torch.Generator().manual_seed(0), output_type="pt")
    assert set(output.layout.num_tokens.tolist()) == {4, 6, 10}
    assert torch.isfinite(pixels(output)).all()


def test_the_layout_of_an_image_is_borrowed():
    pipeline = make_pipeline("generated")
    array = np.full((48, 64, 3), 255, dtype=np.uint8)
    array[20:30, 10:40] = np.random.default_rng(0).integers(0, 255, (10, 30, 3))
    image = PIL.Image.fromarray(array)
    cropped = image.resize((43, 32), PIL.Image.BICUBIC)
    borrowed = pipeline([1, 2], 2, layout=image, generator=seeded(0, 1), output_type="pt").layout
    assert borrowed.gaussians.shape == (2, TOKENS, 5)
    assert torch.equal(borrowed.gaussians[0], borrowed.gaussians[1])
    assert torch.equal(calibrate_layout(borrowed.gaussians, (SIDE, SIDE), 4).boxes, borrowed.boxes)

    # An image of the right size keeps its pixels: its layout is the partition's own.
    exact = cropped.crop((5, 0, 37, 32))
    pixel_values = torch.from_numpy(np.asarray(exact).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    expected = partition_images(pixel_values, TOKENS, min_region_size=4).gaussians
    kinds = [exact, [exact], np.asarray(exact), pixel_values / 2 + 0.5]
    for kind in kinds:
        layout = pipeline([1], layout=kind, output_type="layout").layout
        torch.testing.assert_close(layout.gaussians, expected, rtol=0, atol=0)
    two = pipeline([1, 2], layout=[exact, image], output_type="layout").layout
    assert torch.equal(two.gaussians[0], expected[0])
    assert torch.equal(two.gaussians[1], borrowed.gaussians[0])
    with pytest.raises(ValueError, match="1 or 3 images, got 2"):
        pipeline([1, 2, 3], layout=[exact, image], output_type="layout")


def test_noise_can_be_given():
    pipeline = make_pipeline("generated", scheduler=FlowMatchEulerDiscreteScheduler())
    generator = torch.Generator().manual_seed(0)
    noise = {"latents": torch.randn(1, TOKENS, CHANNELS, generator=generator)}
    noise["layout_latents"] = torch.randn(1, TOKENS, 5, generator=generator)
    first, second = (pixels(pipeline([1], 3, generator=seeded(seed), output_type="pt", **noise)) for seed in (0, 1))
    assert torch.equal(first, second)
    # With seeds, the noise of the layout is drawn first and that of the texture next.
    generator = seeded(3)[0]
    noise = {
        "layout_latents": torch.randn(1, TOKENS, 5, generator=generator),
        "latents": torch.randn(1, TOKENS, CHANNELS, generator=generator),
    }
    given, seeds = pipeline([1], 3, output_type="pt", **noise), pipeline([1], 3, generator=seeded(3), output_type="pt")
    assert torch.equal(pixels(given), pixels(seeds))


def test_statistics_are_the_transformers_and_else_the_tokenizers():
    mean, std = [float(i) for i in range(CHANNELS)], [float(i + 1) for i in range(CHANNELS)]
    latents, layout = torch.randn(1, TOKENS, CHANNELS), tiny_pipeline.make_bank().gaussians_of(0)[None]

    def texture(pipeline):
        return tokens_of(latents, pipeline.transformer, pipeline.vae.config, GaussianLayout(layout))[..., 5:]

    def transformer(**statistics):
        return tiny_pipeline.make_transformer(CHANNELS, 5, seed=1, **statistics)

    own = make_pipeline("bank", transformer=transformer(latents_mean=mean, latents_std=std))
    expected = latents[..., 5:] * torch.tensor(std[5:]) + torch.tensor(mean[5:])
    assert torch.equal(texture(own), expected)
    vae = tiny_pipeline.make_vae(latents_mean=mean, latents_std=std)
    assert torch.equal(texture(make_pipeline("bank", vae=vae, transformer=transformer())), expected)
    other = transformer(latents_mean=[0.0] * CHANNELS, latents_std=[2.0] * CHANNELS)
    assert torch.equal(texture(make_pipeline("bank", vae=vae, transformer=other)), latents[..., 5:] * 2)
    assert torch.equal(texture(make_pipeline("bank", transformer=transformer())), latents[..., 5:])
    # Statistics of `g - g_init` say nothing of whole Gaussians.
    whole = tiny_pipeline.make_transformer(CHANNELS, None, seed=1)
    one_stage = make_pipeline("one_stage", vae=vae, transformer=whole)
    assert torch.equal(texture(one_stage), latents[..., 5:])


def test_labels_by_id_name_and_tensor():
    pipeline = make_pipeline("bank")
    expected = pixels(pipeline([0, 1, 2], 2, generator=seeded(0, 1, 2), output_type="pt"))
    for labels in (["cat", "DOG ", "bird"], ["cat, tabby", 1, "crane, bird"], torch.tensor([0, 1, 2]), (0, "dog", 2)):
        assert torch.equal(pixels(pipeline(labels, 2, generator=seeded(0, 1, 2), output_type="pt")), expected)
    one = pixels(pipeline("dog", 2, generator=seeded(1), output_type="pt"))
    assert torch.equal(one, pixels(pipeline(1, 2, generator=seeded(1), output_type="pt")))
    assert pipeline.get_label_ids(["tabby", "machine"]) == [0, 3]
    assert pipeline.labels["crane"] == [2, 3]


def test_callbacks():
    pipeline, seen = make_pipeline(), []

    def callback(pipe, i, timestep, tensors):
        assert pipe is pipeline
        assert pipe.current_timestep is timestep
        seen.append((i, set(tensors)))
        return {}

    names = pipeline._callback_tensor_inputs
    pipeline([1], 4, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names, generator=seeded(0))
    assert seen == [(i, {"latents", "layout"}) for i in range(4)]
    assert pipeline.num_timesteps == 4
    assert pipeline.current_timestep is None
    with pytest.raises(ValueError, match="prompt"):
        pipeline([1], 4, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["prompt"])


def test_a_callback_changes_tensors_guidance_and_stops():
    pipeline = make_pipeline("bank", scheduler=FlowMatchEulerDiscreteScheduler())

    def zero(pipe, i, timestep, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])} if i == pipe.num_timesteps - 1 else None

    assert not pipeline([1], 4, callback_on_step_end=zero, output_type="latent").images.any()

    def stop(pipe, i, timestep, tensors):
        pipe._interrupt = i == 1
        return {}

    calls = record_calls(pipeline.transformer)
    pipeline([1], 6, callback_on_step_end=stop, guidance_scale=1.0, output_type="latent")
    assert len(calls) == 2
    assert len(pipeline([1], 6, guidance_scale=1.0).images) == 1  # the next call is not interrupted
    assert len(calls) == 8

    def guide_more(pipe, i, timestep, tensors):
        pipe._guidance_scale += 1.0
        return {}

    pipeline([1], 3, callback_on_step_end=guide_more, guidance_scale=1.0, guidance_interval=(0, 1))
    assert [size for size, _ in calls[8:]] == [1, 2, 2]
    assert pipeline.guidance_scale == 4.0

    other = GaussianLayout(tiny_pipeline.make_bank().gaussians_of(3)[None])
    edited = pipeline(
        [1],
        3,
        generator=seeded(0),
        callback_on_step_end=lambda *_: {"layout": other},
        callback_on_step_end_tensor_inputs=["layout"],
    )
    assert edited.layout is other


def test_progress_bars_of_both_stages(capsys):
    pipeline = make_pipeline()
    pipeline.set_progress_bar_config(disable=False)
    pipeline([1], 6, num_layout_steps=3, generator=seeded(0))
    text = capsys.readouterr().err
    assert "layout: 100%" in text
    assert "3/3" in text
    assert "texture: 100%" in text
    assert "6/6" in text
    pipeline.set_progress_bar_config(disable=True)
    pipeline([1], 2, generator=seeded(0))
    assert "2/2" not in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers with NumPy 2
@pytest.mark.parametrize(
    ("scheduler", "calls"),
    [
        (FlowMatchSDEScheduler, 6),
        (FlowMatchEulerDiscreteScheduler, 6),
        (FlowMatchHeunDiscreteScheduler, 11),
        (DPMSolverMultistepScheduler, 6),
        (UniPCMultistepScheduler, 6),
    ],
)
def test_schedulers_swap_by_from_config(scheduler, calls):
    pipeline = make_pipeline("generated")
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    seen = record_calls(pipeline.transformer)
    output = pipeline([1], 6, generator=seeded(0), guidance_scale=1.0, output_type="pt")
    assert len(seen) == calls
    assert torch.isfinite(output.tokens).all()


def test_accurate_solvers_agree_with_many_euler_steps():
    def run(scheduler, steps):
        pipeline = make_pipeline("bank", scheduler=scheduler)
        return pipeline([1], steps, generator=seeded(0), guidance_scale=1.0, output_type="latent").images

    euler = run(FlowMatchEulerDiscreteScheduler(), 200)
    heun = run(FlowMatchHeunDiscreteScheduler(), 25)
    # Worst seen: 0.012, the error of 200 steps of Euler; 10 steps are 0.23 away.
    torch.testing.assert_close(heun, euler, rtol=0, atol=0.015)


OFFLOADS = {
    "model": lambda pipe, device: pipe.enable_model_cpu_offload(device=device),
    "sequential": lambda pipe, device: pipe.enable_sequential_cpu_offload(device=device),
    "group_leaf": lambda pipe, device: pipe.enable_group_offload(torch.device(device), offload_type="leaf_level"),
    "group_block": lambda pipe, device: pipe.enable_group_offload(
        torch.device(device), offload_type="block_level", num_blocks_per_group=1
    ),
}


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("mode", ["both", "one_stage"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_offload(offload, mode, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if device == "cpu" and offload == "sequential":
        pytest.skip("accelerate cannot offload from the CPU to the CPU")

    def run(pipeline):
        kinds = {} if mode == "one_stage" else {"layout": "bank"}
        first = pixels(pipeline([1, 2], 3, generator=seeded(0, 1), output_type="pt", **kinds))
        second = pixels(pipeline([1, 2], 3, generator=seeded(0, 1), output_type="pt"))
        return torch.stack([first, second]).cpu()

    expected = run(make_pipeline(mode))
    pipeline = make_pipeline(mode)
    OFFLOADS[offload](pipeline, device)
    # Twice: the hooks must be as they were after a call.
    for _ in range(2):
        torch.testing.assert_close(run(pipeline), expected, rtol=0, atol=1e-5 if device == "cpu" else 2e-3)


def test_slicing_and_half_precision():
    pipeline = make_pipeline("generated")
    latents = torch.randn(3, TOKENS, CHANNELS, generator=torch.Generator().manual_seed(0))
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()

    def run():
        layout = GaussianLayout(tiny_pipeline.make_bank().gaussians_of(0)[None])
        return pipeline([1, 2, 3], 4, latents=latents, layout=layout, output_type="pt")

    expected = run()
    pipeline.vae.enable_slicing()
    torch.testing.assert_close(pixels(run()), pixels(expected), rtol=0, atol=1e-5)
    pipeline.to(torch.bfloat16)
    half = run()
    assert pixels(half).dtype == half.tokens.dtype == half.layout.gaussians.dtype == torch.float32
    # Worst seen: 0.019 of pixels in [0, 1].
    torch.testing.assert_close(pixels(half), pixels(expected), rtol=0, atol=0.06)
    generated = pipeline([1], 2, generator=seeded(0), output_type="pt")
    assert torch.isfinite(pixels(generated)).all()


def test_several_images_per_label():
    pipeline = make_pipeline("both")
    several = pipeline([1, "dog"], 4, num_images_per_label=2, generator=seeded(0, 1, 2, 3), output_type="pt")
    repeated = pipeline([1, 1, 1, 1], 4, generator=seeded(0, 1, 2, 3), output_type="pt")
    assert torch.equal(pixels(several), pixels(repeated))
    # One layout per label, one for all, one per image.
    bank = tiny_pipeline.make_bank()
    two = GaussianLayout(torch.stack([bank.gaussians_of(i) for i in (0, 3)]))
    made = pipeline([1, 2], num_images_per_label=2, layout=two, output_type="layout").layout
    assert torch.equal(made.gaussians, two.gaussians.repeat_interleave(2, 0))
    assert len(pipeline([1, 2], num_images_per_label=2, layout=two[0], output_type="layout").layout) == 4
    assert torch.equal(
        pipeline([1, 2], num_images_per_label=2, layout=made, output_type="layout").layout.gaussians, made.gaussians
    )
    images = [np.full((SIDE, SIDE, 3), value, np.uint8) for value in (0, 255)]
    images[0][:8, :8] = 200
    borrowed = pipeline([1, 2], num_images_per_label=3, layout=images, output_type="layout").layout
    alone = pipeline([1, 2], layout=images, output_type="layout").layout
    assert torch.equal(borrowed.gaussians, alone.gaussians.repeat_interleave(3, 0))
    for number in (0, 1.5, True, "2"):
        with pytest.raises(ValueError, match=f"num_images_per_label must be an integer of at least 1, got {number}"):
            pipeline([1], num_images_per_label=number)


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers with NumPy 2
@pytest.mark.parametrize(
    "scheduler", [FlowMatchSDEScheduler, FlowMatchEulerDiscreteScheduler, DPMSolverMultistepScheduler]
)
def test_a_scheduler_that_counts_other_timesteps_gives_the_same_images(scheduler):
    def run(num_train_timesteps):
        kwargs = (
            {}
            if scheduler is not DPMSolverMultistepScheduler
            else {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
        )
        chosen = scheduler(num_train_timesteps=num_train_timesteps, **kwargs)
        pipeline = make_pipeline("both", scheduler=chosen)
        pipeline.layout_scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=num_train_timesteps)
        arguments = {"guidance_scale": 2.0, "guidance_interval": (0.3, 0.8), "layout": "generated"}
        return pixels(pipeline([1], 6, generator=seeded(0), output_type="pt", **arguments))

    # The multistep solver rounds its timesteps to integers, and begins at another sigma: worst seen 0.0015.
    atol = 0.02 if scheduler is DPMSolverMultistepScheduler else 1e-4
    torch.testing.assert_close(run(500), run(1000), rtol=0, atol=atol)


class Halfway(PipelineCallback):
    """Halves the latents once; a callback of diffusers says which tensors it wants."""

    tensor_inputs = ("latents",)

    def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
        if step_index == int(pipeline.num_timesteps * self.config.cutoff_step_ratio):
            callback_kwargs["latents"] = callback_kwargs["latents"] / 2
        return callback_kwargs


def test_callbacks_of_diffusers():
    pipeline = make_pipeline("bank")
    plain = pixels(pipeline([1], 4, generator=seeded(0), output_type="pt"))
    for callback in (Halfway(cutoff_step_ratio=0.5), MultiPipelineCallbacks([Halfway(cutoff_step_ratio=0.5)])):
        images = pixels(pipeline([1], 4, generator=seeded(0), output_type="pt", callback_on_step_end=callback))
        assert (images - plain).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"\['prompt_embeds'\] of SDCFGCutoffCallback .* set guidance_interval"):
        pipeline([1], 4, callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=0.5))


def test_lora_weights_round_trip(tmp_path):
    peft = pytest.importorskip("peft")

    def run(pipeline, **kwargs):
        return pixels(pipeline([1, 2], 3, generator=seeded(0, 1), output_type="pt", **kwargs))

    trained, metadata = make_pipeline("both"), {}
    plain = run(trained)
    torch.manual_seed(0)
    for name in ("transformer", "layout_transformer"):
        config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
        getattr(trained, name).add_adapter(config)
        metadata[f"{name}_lora_adapter_metadata"] = config.to_dict()
    adapted = run(trained)
    assert (adapted - plain).abs().max() > 1e-3
    layers = {
        f"{name}_lora_layers": peft.get_peft_model_state_dict(getattr(trained, name))
        for name in ("transformer", "layout_transformer")
    }
    GPSTokenPipeline.save_lora_weights(tmp_path, **layers, **metadata)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    for source in (tmp_path, path):
        pipeline = make_pipeline("both")
        pipeline.load_lora_weights(source, adapter_name="mine")
        assert pipeline.get_active_adapters() == ["mine"]
        assert torch.equal(run(pipeline), adapted)
    half = run(pipeline, attention_kwargs={"scale": 0.5})
    assert (half - plain).abs().max() > 1e-4
    assert (half - adapted).abs().max() > 1e-4
    assert torch.equal(run(pipeline, attention_kwargs={"scale": 0.0}), plain)
    assert torch.equal(run(pipeline), adapted)  # the scale of one call does not stay
    pipeline.set_adapters(["mine"], 0.5)
    torch.testing.assert_close(run(pipeline), half, rtol=0, atol=1e-5)
    pipeline.disable_lora()
    assert torch.equal(run(pipeline), plain)
    pipeline.enable_lora()
    pipeline.set_adapters(["mine"], 1.0)
    pipeline.fuse_lora()
    torch.testing.assert_close(run(pipeline), adapted, rtol=0, atol=1e-4)
    pipeline.unfuse_lora()
    pipeline.unload_lora_weights()
    torch.testing.assert_close(run(pipeline), plain, rtol=0, atol=1e-4)  # fusing has rounded

    # One generator only, under another name; then what is refused.
    only = {"layout_transformer_lora_layers": layers["layout_transformer_lora_layers"]}
    GPSTokenPipeline.save_lora_weights(tmp_path, **only, weight_name="layout.safetensors")
    with pytest.raises(ValueError, match="layout_transformer must be a component of the pipeline for the LoRA"):
        make_pipeline("bank").load_lora_weights(tmp_path, weight_name="layout.safetensors")
    with pytest.raises(ValueError, match="at least one of"):
        GPSTokenPipeline.save_lora_weights(tmp_path)
    with pytest.raises(ValueError, match=r"weight_name must end in \.safetensors"):
        GPSTokenPipeline.save_lora_weights(tmp_path, **only, weight_name="lora.bin")
    (tmp_path / "lora.bin").write_bytes(b"pickle")
    for source, kwargs, message in (
        (tmp_path, {"weight_name": "lora.bin"}, "pickles are never loaded"),
        (tmp_path / "lora.bin", {}, "pickles are never loaded"),
        (tmp_path, {"use_safetensors": False}, "pickles are never loaded"),
        ({"unet.lora_A.weight": torch.zeros(1)}, {}, r"must hold LoRA weights named transformer\.\*"),
        ({}, {}, r"must hold LoRA weights named transformer\.\*"),
    ):
        with pytest.raises(ValueError, match=message):
            pipeline.load_lora_weights(source, **kwargs)
    with pytest.raises(OSError, match=r"pytorch_lora_weights\.safetensors"):
        pipeline.load_lora_weights(tmp_path / "..")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"pytorch_lora_weights\.safetensors must be a whole safetensors file"):
        pipeline.load_lora_weights(tmp_path)


def lora_layers(side=8):
    return {f"transformer_blocks.0.attn.to_q.lora_{part}.weight": torch.rand(side, side) for part in "AB"}


def test_lora_state_dict_reads_what_was_saved(tmp_path):
    layers, metadata = {"transformer": lora_layers(), "layout_transformer": lora_layers()}, {"r": 8, "lora_alpha": 4}
    GPSTokenPipeline.save_lora_weights(
        tmp_path,
        **{f"{name}_lora_layers": values for name, values in layers.items()},
        transformer_lora_adapter_metadata=metadata,
    )
    expected = {f"{name}.{key}": value for name, values in layers.items() for key, value in values.items()}
    for source in (tmp_path, tmp_path / "pytorch_lora_weights.safetensors", expected):
        weights, read = GPSTokenPipeline.lora_state_dict(source, return_lora_metadata=True)
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[key], value) for key, value in expected.items())
        assert read == (
            None if source is expected else {f"transformer.{key}": value for key, value in metadata.items()}
        )
        assert GPSTokenPipeline.lora_state_dict(source).keys() == expected.keys()
    assert weights is not expected  # the caller's stays as it is

    GPSTokenPipeline.save_lora_weights(tmp_path, layers["transformer"], weight_name="plain.safetensors")
    weights, read = make_pipeline().lora_state_dict(
        tmp_path, weight_name="plain.safetensors", use_safetensors=True, return_lora_metadata=True
    )
    assert len(weights) == 2
    assert read is None


def test_lora_state_dict_refuses(tmp_path):
    with pytest.raises(ValueError, match=r"the state dict must hold LoRA weights named transformer\.\*"):
        GPSTokenPipeline.lora_state_dict({"unet.lora_A.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"use_safetensors must be True"):
        GPSTokenPipeline.lora_state_dict(tmp_path, use_safetensors=False)
    with pytest.raises(ValueError, match="pickles are never loaded"):
        GPSTokenPipeline.lora_state_dict(tmp_path, weight_name="pytorch_lora_weights.bin")
    with pytest.raises(OSError, match=r"pytorch_lora_weights\.safetensors"):
        GPSTokenPipeline.lora_state_dict(tmp_path)
    layers = {f"transformer.{key}": value for key, value in lora_layers().items()}
    for text in ("[1]", "3", "{", "[" * 10**5):
        save_file(layers, tmp_path / "pytorch_lora_weights.safetensors", metadata={"lora_adapter_metadata": text})
        with pytest.raises(ValueError, match=r"lora_adapter_metadata of .*\.safetensors must"):
            GPSTokenPipeline.lora_state_dict(tmp_path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"transformer.r": 4}, r"must have transformer\.target_modules, got \['transformer\.r'\]"),
        ({"transformer.no_such_field": 1}, "must hold legal values"),
    ],
)
def test_metadata_that_peft_cannot_use_names_the_file(tmp_path, metadata, message):
    pytest.importorskip("peft")
    weights = {f"transformer.{key}": value for key, value in lora_layers().items()}
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(weights, file, metadata={"lora_adapter_metadata": json.dumps(metadata)})
    pipeline = make_pipeline("bank")
    with pytest.raises(ValueError, match=message) as caught:
        pipeline.load_lora_weights(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert not getattr(pipeline.transformer, "peft_config", None)


def test_metadata_of_the_other_generator_alone_does_not_matter(tmp_path):
    pytest.importorskip("peft")
    shapes = {"A": (4, 32), "B": (32, 4)}
    names = {part: f"transformer.transformer_blocks.0.attn.to_q.lora_{part}.weight" for part in shapes}
    weights = {names[part]: torch.rand(shape) for part, shape in shapes.items()}
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(weights, file, metadata={"lora_adapter_metadata": json.dumps({"layout_transformer.r": 4})})
    pipeline = make_pipeline("bank")
    pipeline.load_lora_weights(tmp_path)
    assert pipeline.get_active_adapters() == ["default_0"]


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_lora_layers_are_initialised_unless_memory_is_to_be_saved(low_cpu_mem_usage, monkeypatch):
    pytest.importorskip("peft")
    shapes, initialised = {"A": (4, 32), "B": (32, 4)}, []
    weights = {
        f"transformer.transformer_blocks.0.attn.to_q.lora_{part}.weight": torch.rand(shape)
        for part, shape in shapes.items()
    }
    draw = torch.nn.init.kaiming_uniform_

    def recorded_draw(tensor, **kwargs):
        initialised.append(tensor.device.type)
        return draw(tensor, **kwargs)

    pipeline = make_pipeline("bank")
    monkeypatch.setattr(torch.nn.init, "kaiming_uniform_", recorded_draw)
    pipeline.load_lora_weights(weights, low_cpu_mem_usage=low_cpu_mem_usage)
    assert ("cpu" in initialised) != low_cpu_mem_usage
    layer = pipeline.transformer.transformer_blocks[0].attn.to_q
    for part in shapes:
        loaded = getattr(layer, f"lora_{part}")["default_0"].weight
        assert torch.equal(loaded, weights[f"transformer.transformer_blocks.0.attn.to_q.lora_{part}.weight"])


def test_misspelt_arguments_of_lora_loading_are_refused(tmp_path):
    GPSTokenPipeline.save_lora_weights(tmp_path, lora_layers())
    for read in (make_pipeline("bank").load_lora_weights, GPSTokenPipeline.lora_state_dict):
        with pytest.raises(TypeError, match="got an unexpected argument 'weigth_name'"):
            read(tmp_path, weigth_name="other.safetensors")


def test_lora_weights_are_saved_with_the_arguments_of_other_pipelines(tmp_path):
    GPSTokenPipeline.save_lora_weights(tmp_path, lora_layers(), weight_name=None, safe_serialization=True)
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    for value in (False, None):
        message = rf"safe_serialization must be True \(pickles are never written\), got {value}"
        with pytest.raises(ValueError, match=message):
            GPSTokenPipeline.save_lora_weights(tmp_path / "refused", lora_layers(), safe_serialization=value)
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("kind", ["faster", "pyramid"])
def test_attention_caches_live_with_an_interval_of_guidance(kind):
    """The batch is twice as large inside the interval: what is cached on one side must not be used on the other."""
    pipeline, calls = make_pipeline("bank"), []
    pipeline.transformer.transformer_blocks[0].attn.to_q.register_forward_hook(lambda *_: calls.append(1))
    timestep = {"current_timestep_callback": lambda: int(pipeline.current_timestep)}
    if kind == "faster":
        config = FasterCacheConfig(
            is_guidance_distilled=True, spatial_attention_timestep_skip_range=(-1, 1001), **timestep
        )
    else:
        config = PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 1001), **timestep
        )
    pipeline.transformer.enable_cache(config)
    arguments = {"guidance_scale": 2.0, "guidance_interval": (0.3, 0.7), "output_type": "pt"}
    images = pixels(pipeline([1, 2], 10, generator=seeded(0, 1), **arguments))
    assert torch.isfinite(images).all()
    assert len(calls) < 10
    again = pixels(pipeline([1, 2], 10, generator=seeded(0, 1), **arguments))
    assert torch.equal(again, images)


def test_caches_live_with_guidance():
    pipeline = make_pipeline("bank")
    expected = pixels(pipeline([1], 8, generator=seeded(0), output_type="pt"))
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    exact = pixels(pipeline([1], 8, generator=seeded(0), output_type="pt"))
    torch.testing.assert_close(exact, expected, rtol=0, atol=1e-5)
    again = pixels(pipeline([1, 2], 8, generator=seeded(0, 1), output_type="pt"))
    torch.testing.assert_close(again[:1], expected, rtol=0, atol=1e-5)
    pipeline.transformer.disable_cache()


@pytest.mark.parametrize("mode", [*MODES, "both"])
def test_save_and_load(mode, tmp_path):
    pipeline = make_pipeline(mode)
    expected = pixels(pipeline([1, "crane, machine"], 3, generator=seeded(0, 1), output_type="pt"))
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["transformer"] == ["gpstoken_hf.transformer_sit", "SiTTransformer1DModel"]
    assert (index["layout_bank"] == [None, None]) == (mode not in ("bank", "both"))
    for cls in (GPSTokenPipeline, DiffusionPipeline):
        loaded = cls.from_pretrained(tmp_path)
        assert type(loaded) is GPSTokenPipeline
        loaded.set_progress_bar_config(disable=True)
        again = pixels(loaded([1, "crane, machine"], 3, generator=seeded(0, 1), output_type="pt"))
        assert torch.equal(again, expected)
    # A component can be passed, or left out.
    if mode == "both":
        loaded = GPSTokenPipeline.from_pretrained(tmp_path, layout_transformer=None, layout_scheduler=None)
        assert loaded.layout_transformer is None
        assert loaded([1], 2, generator=seeded(0), output_type="layout").layout.gaussians.shape == (1, TOKENS, 5)
        loaded = GPSTokenPipeline.from_pretrained(tmp_path, vae=pipeline.vae)
        assert loaded.vae is pipeline.vae


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("asked", [None, torch.float32, torch.bfloat16])
def test_one_dtype_whatever_the_file_has(saved, asked, tmp_path):
    make_pipeline("both").to(saved).save_pretrained(tmp_path)
    arguments = {} if asked is None else {"dtype": asked}
    loaded = GPSTokenPipeline.from_pretrained(tmp_path, **arguments)
    expected = asked or torch.float32
    assert {loaded.vae.dtype, loaded.transformer.dtype, loaded.layout_transformer.dtype} == {expected}
    assert loaded.layout_bank.gaussians.dtype == torch.float32
    loaded.set_progress_bar_config(disable=True)
    assert torch.isfinite(pixels(loaded([1], 2, generator=seeded(0), output_type="pt"))).all()
    if asked is None:
        # Through the base class as well.
        mixed = DiffusionPipeline.from_pretrained(tmp_path)
        assert {mixed.vae.dtype, mixed.layout_transformer.dtype, mixed.transformer.dtype} == {torch.float32}
        mixed.set_progress_bar_config(disable=True)
        assert torch.isfinite(pixels(mixed([1], 2, generator=seeded(0), output_type="pt"))).all()


def test_the_recorded_model_index_goes_on_loading(tmp_path):
    """Paths of modules and names of classes are recorded in every saved pipeline, so they may not change."""
    make_pipeline("both").save_pretrained(tmp_path)
    recorded = Path(__file__).parent / "golden" / "model_index.json"
    written = json.loads((tmp_path / "model_index.json").read_text())
    kept = {key: value for key, value in json.loads(recorded.read_text()).items() if key != "_diffusers_version"}
    assert {key: written[key] for key in kept} == kept
    shutil.copy(recorded, tmp_path / "model_index.json")
    for cls in (GPSTokenPipeline, DiffusionPipeline):
        loaded = cls.from_pretrained(tmp_path)
        assert loaded.layout_bank is not None
        assert loaded.image_processor is not None


def test_without_an_image_processor():
    pipeline = make_pipeline("bank", image_processor=None)
    expected = pixels(make_pipeline("bank")([1], 2, generator=seeded(0), output_type="pt"))
    assert torch.equal(pixels(pipeline([1], 2, generator=seeded(0), output_type="pt")), expected)


LEGAL = GaussianLayout(tiny_pipeline.make_bank().gaussians_of(0)[None])


@pytest.mark.parametrize(
    ("mode", "arguments", "message"),
    [
        ("bank", {"class_labels": "cot"}, r"15 class names, such as \['cat'\], got 'cot'"),
        (
            "bank",
            {"class_labels": "crane"},
            r"label must name one class, got 'crane', which the classes \[2, 3\] share",
        ),
        ("bank", {"class_labels": 10}, "between 0 and 9, got 10"),
        ("bank", {"class_labels": [1, -1]}, "between 0 and 9, got -1"),
        ("bank", {"class_labels": []}, "at least one class"),
        ("bank", {"class_labels": [1.5]}, "names or ids, got 1.5"),
        ("bank", {"class_labels": [True]}, "names or ids, got True"),
        ("bank", {"num_inference_steps": 0}, "num_inference_steps must be .* at least 1, got 0"),
        ("bank", {"num_inference_steps": 2.5}, "num_inference_steps must be an integer .* got 2.5"),
        ("generated", {"num_layout_steps": 0}, "num_layout_steps must be .* at least 1, got 0"),
        ("bank", {"guidance_scale": -0.5}, "guidance_scale must be at least 0, got -0.5"),
        ("bank", {"guidance_scale": float("nan")}, "guidance_scale must be at least 0, got nan"),
        ("bank", {"guidance_interval": (0.8, 0.2)}, r"low <= high <= 1, got \(0.8, 0.2\)"),
        ("bank", {"guidance_interval": (0.0, 1.5)}, r"low <= high <= 1, got \(0.0, 1.5\)"),
        ("bank", {"output_type": "jpeg"}, "'layout'.*'jpeg'"),
        ("bank", {"generator": seeded(0, 1, 2)}, "list of 1, one per label, got 3"),
        ("bank", {"layout": "random"}, r"\['generated', 'bank'\].*'random'"),
        (
            "bank",
            {"layout": "generated"},
            "layout_transformer must be a component of the pipeline for layout='generated', got None",
        ),
        (
            "generated",
            {"layout": "bank"},
            "layout_bank must be a component of the pipeline for layout='bank', got None",
        ),
        ("bank", {"layout": LEGAL.gaussians}, r"a GaussianLayout, images .* got tensors that are not"),
        ("bank", {"layout": [LEGAL.gaussians[0]]}, r"a GaussianLayout, images .* got tensors that are not"),
        ("bank", {"layout": LEGAL.expand(3)}, "of 1 or 1 images, got 3"),
        ("bank", {"layout": GaussianLayout(LEGAL.gaussians * 5)}, "0 < sigma < 1"),
        ("bank", {"layout": GaussianLayout(LEGAL.gaussians * float("nan"))}, "finite"),
        ("bank", {"latents": torch.zeros(1, 3, 9)}, r"latents must be \(1, 8, 9\), got \(1, 3, 9\)"),
        (
            "generated",
            {"layout_latents": torch.zeros(1, 3, 5)},
            r"layout_latents must be \(1, 8, 5\), got \(1, 3, 5\)",
        ),
        (
            "bank",
            {"layout_latents": torch.zeros(1, 8, 5)},
            "layout_latents must be None unless the layout is generated",
        ),
        ("one_stage", {"layout": LEGAL}, "layout and texture at once"),
        ("one_stage", {"output_type": "layout"}, "layout and texture at once"),
    ],
)
def test_call_errors(mode, arguments, message):
    pipeline = make_pipeline(mode)
    calls = record_calls(pipeline.transformer)
    with pytest.raises(ValueError, match=message):
        pipeline(**{"class_labels": [1], "num_inference_steps": 2, **arguments})
    assert not calls


def test_errors_of_missing_components():
    with pytest.raises(ValueError, match="layout must be given to a pipeline without layout_transformer"):
        make_pipeline("bank", layout_bank=None)([1])
    with pytest.raises(ValueError, match=r"label must be a class id, .* no id2label, got 'cat'"):
        make_pipeline("bank", id2label=None)("cat")
    pipeline = make_pipeline("generated")
    pipeline.layout_scheduler = None
    with pytest.raises(ValueError, match="layout_scheduler must be a component"):
        pipeline([1])


@pytest.mark.parametrize(
    ("mode", "changes", "message"),
    [
        (
            "bank",
            {"transformer": tiny_pipeline.make_transformer(7, 5, 0)},
            "transformer must have in_channels=9, got 7",
        ),
        (
            "bank",
            {"transformer": tiny_pipeline.make_transformer(9, 3, 0)},
            "transformer must have condition_channels=5, got 3",
        ),
        ("bank", {"transformer": tiny_pipeline.make_transformer(9, None, 0)}, "makes layouts itself"),
        ("generated", {"layout_scheduler": None}, "layout_scheduler must be given with layout_transformer"),
        (
            "generated",
            {"layout_transformer": tiny_pipeline.make_transformer(9, None, 0)},
            "layout_transformer must have in_channels=5, got 9",
        ),
        (
            "generated",
            {"layout_transformer": tiny_pipeline.make_transformer(5, 5, 0)},
            "layout_transformer must have condition_channels=None, got 5",
        ),
        (
            "generated",
            {"transformer": tiny_pipeline.make_transformer(9, 5, 0, num_classes=7)},
            "layout_transformer must have num_classes=7, got 10",
        ),
    ],
)
def test_components_must_fit(mode, changes, message):
    with pytest.raises(ValueError, match=message):
        GPSTokenPipeline(**{**make_components(mode), **changes})


def foreign_vae():
    return AutoencoderKL(block_out_channels=(8,), norm_num_groups=2, layers_per_block=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vae": foreign_vae()}, "vae must be a GPSTokenModel, got AutoencoderKL"),
        ({"vae": None}, "vae must be a GPSTokenModel, got NoneType"),
        ({"transformer": foreign_vae()}, "transformer must be a SiTTransformer1DModel, got AutoencoderKL"),
        (
            {"layout_transformer": foreign_vae()},
            "layout_transformer must be a SiTTransformer1DModel or NoneType, got AutoencoderKL",
        ),
        ({"layout_bank": {}}, "layout_bank must be a GaussianLayoutBank or NoneType, got dict"),
        ({"scheduler": foreign_vae()}, "scheduler must be a SchedulerMixin, got AutoencoderKL"),
        ({"scheduler": DDIMScheduler()}, "scheduler must be a flow scheduler .* got DDIMScheduler with .*'epsilon'"),
        ({"layout_scheduler": DDIMScheduler()}, "layout_scheduler must be a flow scheduler .* got DDIMScheduler"),
        ({"image_processor": 3}, "image_processor must be a GPSTokenImageProcessor or NoneType, got int"),
    ],
)
def test_a_foreign_component_is_named(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        GPSTokenPipeline(**{**make_components("both"), **changes})


def test_a_foreign_component_is_named_where_it_is_passed_or_set(tmp_path):
    make_pipeline("bank").save_pretrained(tmp_path)
    for cls in (GPSTokenPipeline, DiffusionPipeline):
        with pytest.raises(ValueError, match="vae must be a GPSTokenModel, got AutoencoderKL"):
            cls.from_pretrained(tmp_path, vae=foreign_vae())
    pipeline = make_pipeline("bank")
    pipeline.scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match="scheduler must be a flow scheduler"):
        pipeline([1])
    compiled = torch.compile(tiny_pipeline.make_texture_transformer(), backend="eager")
    assert make_pipeline("bank", transformer=compiled).transformer is compiled


def test_weights_that_live_off_the_device_between_calls():
    """What sequential CPU offload does to every module, with the CPU in the place of the accelerator."""
    expected = pixels(make_pipeline("generated")([1, 2], 3, generator=seeded(0, 1), output_type="pt"))
    pipeline = make_pipeline("generated")
    for component in (pipeline.vae, pipeline.transformer, pipeline.layout_transformer):
        cpu_offload(component, execution_device=torch.device("cpu"))
        assert {parameter.device.type for parameter in component.parameters()} == {"meta"}
    images = pixels(pipeline([1, 2], 3, generator=seeded(0, 1), output_type="pt"))
    assert torch.equal(images, expected)
