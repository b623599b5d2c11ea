# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sit_golden
import torch
from diffusers import FasterCacheConfig, FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpstoken_hf.transformer_sit import (
    GAUSSIAN_TARGETS,
    SIT_PRESETS,
    SiTAttnProcessor,
    SiTTransformer1DModel,
    latents_to_tokens,
    timestep_to_time,
    tokens_to_latents,
)

BATCH, LENGTH, CHANNELS, CLASSES = 3, 8, 9, 10


def make_model(seed: int = 0, randomize: bool = True, **config) -> SiTTransformer1DModel:
    """A tiny model; its zero-initialised layers get values, so that every input reaches the output."""
    torch.manual_seed(seed)
    defaults = {
        "sample_size": LENGTH,
        "in_channels": CHANNELS,
        "num_classes": CLASSES,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "condition_channels": 5,
    }
    model = SiTTransformer1DModel(**{**defaults, **config}).eval()
    if randomize:
        for parameter in model.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
    return model


def make_inputs(seed: int = 1, length: int = LENGTH, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(BATCH, length, CHANNELS, generator=generator).to(dtype),
        "timestep": torch.tensor([999.0, 400.0, 7.5]),
        "class_labels": torch.tensor([0, 9, CLASSES]),
        "encoder_condition": torch.randn(BATCH, length, 5, generator=generator).to(dtype),
    }


@pytest.mark.parametrize("name", sit_golden.available_sets())
def test_velocities_match_the_release(name):
    model, golden = sit_golden.load_model(name), sit_golden.load_arrays(name)
    timestep = 1000 * (1 - golden["t"])
    with torch.no_grad():
        conditioned = model(golden["x"], timestep, golden["y"], golden["cond"]).sample
        unconditioned = model(golden["x"], timestep, golden["y"]).sample
    torch.testing.assert_close(-conditioned, golden["velocity"], rtol=0, atol=1e-5)
    torch.testing.assert_close(-unconditioned, golden["velocity_unconditioned"], rtol=0, atol=1e-5)


def test_xl_preset_has_the_shapes_of_the_released_generator():
    path = Path(__file__).parent / "golden" / "official_state_dict_shapes.json"
    shapes = json.loads(path.read_text())["generator_sit_xl_2_gs"]
    with torch.device("meta"):
        model = SiTTransformer1DModel.preset("XL", condition_channels=5)
        released = sit_golden.rename({key: torch.empty(shape) for key, shape in shapes.items()})
    ours = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert ours == {key: tuple(value.shape) for key, value in released.items()}


@pytest.mark.parametrize(("preset", "millions"), [("S", 33), ("B", 130), ("L", 458), ("XL", 675)])
def test_presets_have_their_sizes(preset, millions):
    with torch.device("meta"):
        model = SiTTransformer1DModel.preset(preset)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == pytest.approx(millions, abs=2)
    assert model.config.num_layers == SIT_PRESETS[preset]["num_layers"]
    with torch.device("meta"):
        assert SiTTransformer1DModel.preset(preset, num_layers=1).config.num_layers == 1
    with pytest.raises(ValueError, match=r"'S', 'B', 'L', 'XL'.*'M'"):
        SiTTransformer1DModel.preset("M")
    with pytest.raises(TypeError, match="num_layer"):
        SiTTransformer1DModel.preset("S", num_layer=1)


def test_timestep_is_a_thousand_sigma_and_the_output_minus_the_velocity():
    assert timestep_to_time(torch.tensor([1000.0, 250.0, 0.0])).tolist() == [0.0, 0.75, 1.0]
    # A network whose output layer is a constant k in the paper's sign returns -k.
    model = make_model(randomize=False)
    with torch.no_grad():
        model.proj_out.bias[:CHANNELS] = torch.arange(float(CHANNELS))
        model.proj_out.bias[CHANNELS:] = 1e6
        sample = model(**make_inputs()).sample
    assert torch.equal(sample, -torch.arange(float(CHANNELS)).expand(BATCH, LENGTH, CHANNELS))


def test_a_new_model_is_zero_and_learn_sigma_only_widens_the_last_layer():
    assert not make_model(randomize=False)(**make_inputs()).sample.any()
    assert make_model(learn_sigma=False).proj_out.out_features == CHANNELS
    assert make_model(learn_sigma=True).proj_out.out_features == 2 * CHANNELS
    assert make_model(learn_sigma=False)(**make_inputs()).sample.shape == (BATCH, LENGTH, CHANNELS)


def test_one_timestep_serves_the_batch():
    model, inputs = make_model(), make_inputs()
    inputs["timestep"] = torch.full((BATCH,), 300.0)
    expected = model(**inputs).sample
    for timestep in (300.0, 300, torch.tensor(300.0), torch.tensor([300])):
        assert torch.equal(model(**{**inputs, "timestep": timestep}).sample, expected)


def test_each_input_matters():
    model, inputs = make_model(), make_inputs()
    expected = model(**inputs).sample
    changed = {
        "hidden_states": inputs["hidden_states"] + 0.1,
        "timestep": torch.tensor([1.0, 900.0, 900.0]),
        "class_labels": (inputs["class_labels"] + 1) % (CLASSES + 1),
        "encoder_condition": inputs["encoder_condition"] + 0.1,
    }
    for key, value in changed.items():
        difference = (model(**{**inputs, key: value}).sample - expected).abs().amax(dim=(1, 2))
        assert (difference > 1e-4).all(), key


def test_class_dropout_acts_in_training_only_and_draws_the_null_class():
    inputs = make_inputs()
    null = {**inputs, "class_labels": torch.full((BATCH,), CLASSES)}
    always, never = make_model(class_dropout_prob=1.0), make_model(class_dropout_prob=0.0)
    unlabelled, labelled = never(**null).sample, never(**inputs).sample
    assert torch.equal(always(**inputs).sample, labelled)
    assert torch.equal(always.train()(**inputs).sample, unlabelled)
    assert torch.equal(never.train()(**inputs).sample, labelled)
    assert always.null_class == CLASSES

    half = make_model(class_dropout_prob=0.5).train()
    torch.manual_seed(0)
    labels = torch.zeros(2000, dtype=torch.long)
    with torch.no_grad():
        sample = half(torch.zeros(2000, 1, CHANNELS), 500.0, labels, torch.zeros(2000, 1, 5)).sample
    dropped = (sample != sample[0]).any(dim=(1, 2)).float().mean()
    assert 0.45 < dropped < 0.55


def test_padding_changes_no_token():
    model, inputs = make_model(), make_inputs(length=5)
    expected = model(**inputs).sample
    padded = {**inputs}
    for key in ("hidden_states", "encoder_condition"):
        padded[key] = torch.cat([inputs[key], torch.full_like(inputs[key][:, :3], 50.0)], dim=1)
    mask = torch.tensor([[1] * 5 + [0] * 3] * BATCH)
    for kind in (torch.int64, torch.bool, torch.float32):
        sample = model(**padded, attention_mask=mask.to(kind)).sample
        torch.testing.assert_close(sample[:, :5], expected, rtol=0, atol=1e-6)
    assert (model(**padded).sample[:, :5] - expected).abs().max() > 1e-3


def test_with_a_condition_any_length_works_and_order_has_no_meaning():
    model = make_model()
    for length in (1, 3, 20):
        inputs = make_inputs(length=length)
        order = torch.randperm(length, generator=torch.Generator().manual_seed(0))
        shuffled = {**inputs, **{key: inputs[key][:, order] for key in ("hidden_states", "encoder_condition")}}
        torch.testing.assert_close(model(**shuffled).sample, model(**inputs).sample[:, order], rtol=0, atol=1e-6)


def test_without_a_condition_positions_are_learned():
    model, inputs = make_model(condition_channels=None), make_inputs()
    inputs["encoder_condition"] = None
    flipped = {**inputs, "hidden_states": inputs["hidden_states"].flip(1)}
    assert (model(**flipped).sample - model(**inputs).sample.flip(1)).abs().max() > 1e-4
    assert model.pos_embed.requires_grad
    assert not make_model().pos_embed.requires_grad
    assert model.config.gaussian_target == "absolute"
    assert make_model().config.gaussian_target == "offset"


def test_condition_before_every_block():
    inputs = make_inputs()
    once, every = make_model(), make_model(condition_injection="every_block")
    every.load_state_dict(once.state_dict())
    assert (once(**inputs).sample - every(**inputs).sample).abs().max() > 1e-3
    # With a single block the two are the same network.
    once, every = make_model(num_layers=1), make_model(num_layers=1, condition_injection="every_block")
    every.load_state_dict(once.state_dict())
    torch.testing.assert_close(once(**inputs).sample, every(**inputs).sample, rtol=0, atol=0)


@pytest.mark.parametrize("injection", ["input", "every_block"])
def test_gradient_checkpointing_gives_the_same_gradients(injection):
    inputs, gradients = make_inputs(), []
    for checkpointing in (False, True):
        model = make_model(condition_injection=injection, class_dropout_prob=0.0).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(**inputs).sample.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(value is not None for value in gradients[0].values())
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near(dtype):
    expected = make_model()(**make_inputs()).sample
    sample = make_model().to(dtype)(**make_inputs(dtype=dtype)).sample
    assert sample.dtype == dtype
    # Worst seen: 0.011 (bfloat16) and 0.0016 (float16) on outputs of up to 0.8.
    torch.testing.assert_close(sample.float(), expected, rtol=0, atol=0.02)


def test_save_and_load(tmp_path):
    model, inputs = make_model(latents_mean=[0.5] * CHANNELS, latents_std=[2.0] * CHANNELS), make_inputs()
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    model.save_pretrained(tmp_path / "half", variant="fp16")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    for loaded in (
        SiTTransformer1DModel.from_pretrained(tmp_path / "whole"),
        SiTTransformer1DModel.from_pretrained(tmp_path / "whole", low_cpu_mem_usage=False),
        SiTTransformer1DModel.from_pretrained(tmp_path / "shards"),
        SiTTransformer1DModel.from_pretrained(tmp_path / "half", variant="fp16"),
    ):
        public = {key: value for key, value in model.config.items() if not key.startswith("_")}
        assert {key: value for key, value in loaded.config.items() if not key.startswith("_")} == public
        assert torch.equal(loaded(**inputs).sample, model(**inputs).sample)
    half = SiTTransformer1DModel.from_pretrained(tmp_path / "whole", torch_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16


def test_attention_backends_and_fused_projections_agree():
    model, inputs = make_model(), make_inputs()
    expected = model(**inputs).sample
    model.set_attention_backend("native")
    for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
        with sdpa_kernel(kernel):
            torch.testing.assert_close(model(**inputs).sample, expected, rtol=0, atol=1e-6)
    assert len(model.attn_processors) == model.config.num_layers
    model.reset_attention_backend()
    model.fuse_qkv_projections()
    torch.testing.assert_close(model(**inputs).sample, expected, rtol=0, atol=1e-6)
    model.unfuse_qkv_projections()
    torch.testing.assert_close(model(**inputs).sample, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", ["native", "_native_math", "_native_flash"])
def test_a_mask_works_with_backends_that_take_none(backend):
    model, inputs = make_model(), make_inputs()
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3, [0, 1] * 4])
    expected = model(**inputs, attention_mask=mask).sample
    model.set_attention_backend(backend)
    try:
        sample = model(**inputs, attention_mask=mask).sample
        torch.testing.assert_close(sample[mask == 1], expected[mask == 1], rtol=0, atol=1e-6)
        sample[mask == 1].square().mean().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    finally:
        model.set_attention_backend("native")
        model.reset_attention_backend()


class ScaledProcessor(SiTAttnProcessor):
    def __call__(self, attn, hidden_states, attention_mask=None, factor: float = 1.0):
        return factor * super().__call__(attn, hidden_states, attention_mask)


def test_attention_kwargs_reach_the_processors():
    model, inputs = make_model(), make_inputs()
    expected = model(**inputs).sample
    assert torch.equal(model(**inputs, attention_kwargs={"scale": 0.5}).sample, expected)  # there is no LoRA
    with pytest.raises(ValueError, match=r"arguments of SiTAttnProcessor, got \['factor'\]"):
        model(**inputs, attention_kwargs={"factor": 0.0})
    model.set_attn_processor(ScaledProcessor())
    assert torch.equal(model(**inputs, attention_kwargs={"factor": 1.0}).sample, expected)
    assert (model(**inputs, attention_kwargs={"factor": 0.0}).sample - expected).abs().max() > 1e-4


def test_the_embedding_of_time_stays_in_float32(tmp_path):
    make_model().save_pretrained(tmp_path)
    loaded = SiTTransformer1DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert loaded.time_embedder.linear_1.weight.dtype == torch.float32
    assert loaded.transformer_blocks[0].attn.to_q.weight.dtype == torch.bfloat16
    sample = loaded(**make_inputs(dtype=torch.bfloat16)).sample
    assert sample.dtype == torch.bfloat16
    torch.testing.assert_close(sample.float(), make_model()(**make_inputs()).sample, rtol=0, atol=0.02)


@pytest.mark.parametrize("config", [{}, {"condition_injection": "every_block"}, {"condition_channels": None}])
def test_repeated_blocks_compile(config):
    torch.compiler.reset()
    model, inputs = make_model(**config), make_inputs()
    if "condition_channels" in config:
        inputs["encoder_condition"] = None
    expected = model(**inputs).sample
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    torch.testing.assert_close(model(**inputs).sample, expected, rtol=0, atol=1e-6)
    torch.compiler.reset()


CONTEXT_PARALLEL = """
import os, sys, torch, torch.distributed as dist
torch.accelerator.device_count = lambda: 2  # two processes on one CPU
from diffusers import ContextParallelConfig
from test_transformer_sit import make_inputs, make_model
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=int(sys.argv[2]), world_size=2)
os.environ.update(RANK=sys.argv[2], WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3, [1] * 8])
for config in ({}, {"condition_injection": "every_block"}, {"condition_channels": None}):
    model, inputs = make_model(**config), make_inputs()
    if "condition_channels" in config:
        inputs["encoder_condition"] = None
    with torch.no_grad():
        expected = [model(**inputs, attention_mask=m).sample for m in (None, mask)]
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
        for m, one in zip((None, mask), expected):
            difference = (model(**inputs, attention_mask=m).sample - one)[mask == 1].abs().max()
            assert difference < 1e-6, (config, m, difference)
dist.destroy_process_group()
print("equal")
"""


@pytest.mark.slow
def test_tokens_are_split_over_devices(tmp_path):
    root = Path(__file__).parent
    paths = [root, root.parent, root.parent / "src"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    commands = [[sys.executable, "-c", CONTEXT_PARALLEL, str(tmp_path / "store"), str(rank)] for rank in range(2)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, env=environment, **pipes) for command in commands]
    for process in processes:
        output, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors[-3000:]
        assert "equal" in output


def test_faster_cache_is_for_attention_only():
    model, inputs, calls = make_model(), make_inputs(), []
    with pytest.raises(ValueError, match="is_guidance_distilled must be True for FasterCache on tokens"):
        model.enable_cache(FasterCacheConfig(current_timestep_callback=lambda: 500))
    assert not model.is_cache_enabled
    model.transformer_blocks[0].attn.to_q.register_forward_hook(lambda *_: calls.append(1))
    config = FasterCacheConfig(
        is_guidance_distilled=True, current_timestep_callback=lambda: 500, attention_weight_callback=lambda _: 0.5
    )
    model.enable_cache(config)
    with torch.no_grad(), model.cache_context("class"):
        for _ in range(4):
            sample = model(**inputs).sample
    assert 1 <= len(calls) < 4
    torch.testing.assert_close(sample, make_model()(**inputs).sample, rtol=0, atol=1e-5)


def test_lora_adapters(tmp_path):
    peft = pytest.importorskip("peft")
    inputs, base = make_inputs(), make_model()
    expected = base(**inputs).sample
    model = make_model()
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    model.add_adapter(config)
    adapted = model(**inputs).sample
    assert (adapted - expected).abs().max() > 1e-3
    model.save_lora_adapter(tmp_path)
    base.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    torch.testing.assert_close(base(**inputs).sample, adapted, rtol=0, atol=1e-6)
    base.disable_adapters()
    assert torch.equal(base(**inputs).sample, expected)


def test_first_block_cache_skips_blocks_and_is_exact_at_threshold_zero():
    inputs, counts = make_inputs(), []
    expected = make_model(num_layers=4)(**inputs).sample
    for threshold in (0.0, 1e6):
        model, calls = make_model(num_layers=4), []
        model.transformer_blocks[2].attn.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model.enable_cache(FirstBlockCacheConfig(threshold=threshold))
        assert model.is_cache_enabled
        with torch.no_grad(), model.cache_context("cond"):
            torch.testing.assert_close(model(**inputs).sample, expected, rtol=0, atol=1e-6)
            model(**{**inputs, "timestep": inputs["timestep"] * 0.9})
        counts.append(len(calls))
        model.disable_cache()
        assert torch.equal(model(**inputs).sample, expected)
    assert counts == [2, 1]


def test_pyramid_attention_broadcast_reuses_attention():
    model, inputs, calls = make_model(), make_inputs(), []
    model.transformer_blocks[0].attn.to_q.register_forward_hook(lambda *_: calls.append(1))
    model.enable_cache(
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(0, 1000),
            current_timestep_callback=lambda: 500,
        )
    )
    with torch.no_grad():
        for _ in range(4):
            sample = model(**inputs).sample
    assert len(calls) == 2
    torch.testing.assert_close(sample, make_model()(**inputs).sample, rtol=0, atol=1e-6)


def test_layerwise_casting_stores_in_eight_bits():
    model, inputs = make_model(), make_inputs()
    expected = model(**inputs).sample
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert model.transformer_blocks[0].attn.to_q.weight.dtype == torch.float8_e4m3fn
    assert model.time_embedder.linear_1.weight.dtype == torch.float32
    with torch.no_grad():
        sample = model(**inputs).sample
    # Worst seen: 0.032 on outputs of up to 0.8; three bits of mantissa.
    torch.testing.assert_close(sample, expected, rtol=0, atol=0.15)


@pytest.mark.parametrize("condition_channels", [None, 5])
def test_compiles_without_graph_breaks(condition_channels):
    torch.compiler.reset()
    model, inputs = make_model(condition_channels=condition_channels), make_inputs()
    if condition_channels is None:
        inputs["encoder_condition"] = None
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs).sample, model(**inputs).sample, rtol=0, atol=1e-6)


def test_tuple_output():
    model, inputs = make_model(), make_inputs()
    assert torch.equal(model(**inputs, return_dict=False)[0], model(**inputs).sample)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_states": torch.zeros(BATCH, LENGTH, 4)}, r"hidden_states must be \(B, L, 9\), got \(3, 8, 4\)"),
        ({"hidden_states": torch.zeros(BATCH, CHANNELS, 4, 4)}, r"hidden_states must be .* got \(3, 9, 4, 4\)"),
        ({"class_labels": torch.zeros(2, dtype=torch.long)}, r"class_labels must be \(3,\), got \(2,\)"),
        ({"encoder_condition": torch.zeros(BATCH, 7, 5)}, r"encoder_condition must be \(3, 8, 5\), got \(3, 7, 5\)"),
        ({"attention_mask": torch.ones(BATCH, 7)}, r"attention_mask must be \(3, 8\), got \(3, 7\)"),
        (
            {"encoder_condition": None, "hidden_states": torch.zeros(BATCH, 7, CHANNELS)},
            r"sample_size = 8 tokens without encoder_condition, got 7",
        ),
    ],
)
def test_forward_errors(change, message):
    with pytest.raises(ValueError, match=message):
        make_model()(**{**make_inputs(), **change})


def test_a_condition_needs_a_model_made_for_it():
    with pytest.raises(ValueError, match="condition_channels=None"):
        make_model(condition_channels=None)(**make_inputs())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"condition_injection": "output"}, "'input', 'every_block'.*'output'"),
        ({"gaussian_target": "log"}, "'offset', 'absolute', 'logit'.*'log'"),
        ({"in_channels": 4}, "in_channels must be an integer from 5 to .*, got 4"),
        ({"class_dropout_prob": 1.5}, "class_dropout_prob must be a number from 0.0 to 1.0, got 1.5"),
        ({"latents_mean": [0.0] * CHANNELS}, "must be given together"),
        (
            {"latents_mean": [0.0] * 2, "latents_std": [1.0] * 2},
            "latents_mean must hold 9 numbers, one per channel, got 2",
        ),
        (
            {"latents_mean": [0.0] * CHANNELS, "latents_std": [0.0] * CHANNELS},
            "every entry of latents_std must be a number from .*, got 0",
        ),
    ],
)
def test_config_errors(config, message):
    with pytest.raises(ValueError, match=message):
        make_model(**config)


@pytest.mark.parametrize("target", GAUSSIAN_TARGETS)
def test_targets_round_trip(target):
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(2, 6, 5, generator=generator, dtype=torch.float64) * 0.8 + 0.1
    gaussians = torch.cat([uniform[..., :2], 2 * uniform[..., 2:] - 1], dim=-1)
    tokens = torch.cat([gaussians, torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)], dim=-1)
    layout = gaussians.flip(1) if target == "offset" else None
    mean = torch.randn(9, generator=generator, dtype=torch.float64)
    std = torch.rand(9, generator=generator, dtype=torch.float64) + 0.5
    latents = tokens_to_latents(tokens, mean, std, target, layout)
    torch.testing.assert_close(latents_to_tokens(latents, mean, std, target, layout), tokens, rtol=0, atol=1e-12)
    if target == "offset":
        first = (gaussians - layout - mean[:5]) / std[:5]
        torch.testing.assert_close(latents[..., :5], first, rtol=0, atol=1e-12)


def test_targets_are_clamped_where_a_gaussian_would_be_illegal_and_means_are_not():
    latents = torch.tensor([[[-5.0, 5.0, -5.0, -5.0, 5.0]]])
    tokens = latents_to_tokens(latents, torch.zeros(5), torch.ones(5), "absolute")
    torch.testing.assert_close(tokens, torch.tensor([[[1e-5, 1 - 1e-5, -1 + 1e-5, -5.0, 5.0]]]), rtol=0, atol=0)


def test_target_errors():
    tokens, ones = torch.full((1, 2, 5), 0.5), torch.ones(5)
    with pytest.raises(ValueError, match="'log'"):
        tokens_to_latents(tokens, ones, ones, "log")
    for function in (tokens_to_latents, latents_to_tokens):
        with pytest.raises(ValueError, match="layout must be a tensor with gaussian_target='offset', got None"):
            function(tokens, ones, ones, "offset")
        with pytest.raises(ValueError, match="layout must be None with gaussian_target='absolute', got a tensor"):
            function(tokens, ones, ones, "absolute", tokens)
