# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""torch.compile: every way through the package is one graph, for sizes that are fixed and for sizes that are open."""

import pytest
import torch
from model_helpers import make_images, make_model, max_error
from test_autoencoder import make_autoencoder
from test_transformer_sit import make_inputs
from test_transformer_sit import make_model as make_sit

from gpstoken_hf import partition_images

# Without inductor both sides run the same kernels. With it, operations are fused.
SAME = 1e-6
TORCH_2_7 = torch.__version__.startswith("2.7.")
CLOSE = 1e-4


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(scope="module")
def model():
    return make_model(num_hidden_layers=1, decoder_layers_per_block=1).requires_grad_(False)


def compile_one_graph(function, dynamic, backend="aot_eager"):
    return torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)


# -- the partition


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize(("counts", "with_importance"), [([6], False), ([6, 3], True)])
def test_partition_is_a_sound_op(backend, counts, with_importance):
    importance = torch.rand(2, 32, 40) if with_importance else None
    arguments = (make_images(2, 32, 40), counts, 2.5, 8, importance, True, backend)
    torch.library.opcheck(torch.ops.gpstoken.partition.default, arguments)


def test_partition_compiles_as_one_graph():
    def negative(images, num_tokens, weights):
        layout = partition_images(images.neg(), num_tokens, importance=weights)
        return layout.gaussians * 2, layout.boxes, layout.attention_mask

    compiled = compile_one_graph(negative, dynamic=True)
    cases = [((2, 32, 40), 6), ((3, 48, 37), 9), ((2, 32, 40), [6, 3])]
    for shape, num_tokens in cases:
        arguments = make_images(*shape), num_tokens, torch.rand(shape)
        for actual, expected in zip(compiled(*arguments), negative(*arguments)):
            assert torch.equal(actual, expected)


def test_a_compiled_partition_refuses_what_the_eager_one_refuses():
    compiled = compile_one_graph(lambda images, count: partition_images(images, count).boxes, False, "eager")
    images = make_images(1, 32, 40)
    compiled(images, 4)
    with pytest.raises(ValueError, match=r"images must be in \[-1, 1\], got values from .* to 3"):
        compiled(images.clone().index_fill_(3, torch.tensor(5), 3.0), 4)
    with pytest.raises(ValueError, match=r"num_tokens must be at most 32, the number of regions .* got 33"):
        compiled(images, 33)


# -- the tokenizer


def test_encode_of_an_image_and_decode_with_fixed_sizes(model):
    images = make_images(2, 32, 40)
    encode, decode = (compile_one_graph(function, dynamic=False) for function in (model.encode, model.decode))
    expected = model.encode(images, 6)
    compiled = encode(images, 6)
    assert max_error(compiled.tokens, expected.tokens) <= SAME
    assert torch.equal(compiled.layout.boxes, expected.layout.boxes)
    sample = decode(expected.tokens, (32, 40)).sample
    assert max_error(sample, model.decode(expected.tokens, (32, 40)).sample) <= SAME


def test_encode_with_a_layout_and_with_several_counts(model):
    images = make_images(2, 32, 40)
    layout = partition_images(images, 5)
    encode = compile_one_graph(model.encode, dynamic=False, backend="eager")
    assert max_error(encode(images, layout=layout).tokens, model.encode(images, layout=layout).tokens) <= SAME
    compiled, expected = encode(images, [6, 3]), model.encode(images, [6, 3])
    assert max_error(compiled.tokens, expected.tokens) <= SAME
    assert torch.equal(compiled.attention_mask, expected.attention_mask)


@pytest.mark.slow
def test_the_whole_tokenizer_with_open_sizes(model):
    """One program for several batches, image sizes and numbers of tokens."""
    compiled = compile_one_graph(model, dynamic=True)
    for stance, shape, num_tokens in (
        ("default", (2, 32, 40), 10),
        ("fail_on_recompile", (3, 48, 56), 9),
        ("fail_on_recompile", (4, 64, 44), 12),
    ):
        images = make_images(*shape)
        with torch.compiler.set_stance(stance):
            output = compiled(images, num_tokens)
        assert max_error(output.sample, model(images, num_tokens).sample) <= SAME


def check_graph_is_shared(frames):
    """One graph for all layers, except with torch 2.7, which compiles each."""
    assert frames["unique_graphs"] == 1 or TORCH_2_7


@torch.no_grad()
@pytest.mark.parametrize("make", [make_model, make_autoencoder])
def test_compile_repeated_blocks_of_the_tokenizer(make):
    model, images = make(), make_images(2, 32, 32)
    expected = model(images).sample
    model.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    layers = getattr(model, "model", model).encoder.layers
    assert all(layer._compiled_call_impl is not None for layer in layers)
    frames = torch._dynamo.utils.counters["stats"]
    frames.clear()
    assert max_error(model(images).sample, expected) <= SAME
    check_graph_is_shared(frames)


# -- the models of diffusers


@torch.no_grad()
@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_whole_autoencoder(dynamic):
    vae = make_autoencoder(num_hidden_layers=1, decoder_layers_per_block=1)
    compiled = compile_one_graph(vae, dynamic)
    for shape in ((2, 32, 40), (3, 48, 56))[: 1 + dynamic]:
        images = make_images(*shape)
        # Latents are logits, standardised and back: each way rounds, and the decoder multiplies what it gets.
        assert max_error(compiled(images).sample, vae(images).sample) <= 10 * SAME


@torch.no_grad()
@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_sit(dynamic):
    model = make_sit()
    compiled = compile_one_graph(model, dynamic)
    inputs = make_inputs()
    for count in (3, 2)[: 1 + dynamic]:
        part = {name: value[:count] for name, value in inputs.items()}
        assert max_error(compiled(**part).sample, model(**part).sample) <= SAME


@torch.no_grad()
def test_compile_repeated_blocks_of_sit():
    model, inputs = make_sit(), make_inputs()
    expected = model(**inputs).sample
    model.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    frames = torch._dynamo.utils.counters["stats"]
    frames.clear()
    assert max_error(model(**inputs).sample, expected) <= SAME
    check_graph_is_shared(frames)


# -- inductor


@pytest.mark.slow
@pytest.mark.filterwarnings(
    r"ignore::DeprecationWarning:torch\..*", r"ignore::FutureWarning:torch\..*"
)  # inductor's own
@pytest.mark.parametrize("dynamic", [False, True])
def test_the_tokenizer_with_inductor(model, dynamic):
    compiled = compile_one_graph(model, dynamic, backend="inductor")
    for shape, num_tokens in (((2, 32, 40), 6), ((3, 48, 56), 9))[: 1 + dynamic]:
        images = make_images(*shape)
        actual, expected = compiled(images, num_tokens), model(images, num_tokens)
        assert max_error(actual.tokens, expected.tokens) <= CLOSE
        assert max_error(actual.sample, expected.sample) <= CLOSE


@pytest.mark.slow
@pytest.mark.filterwarnings(r"ignore::DeprecationWarning:torch\..*", r"ignore::FutureWarning:torch\..*")
def test_a_training_step_with_inductor():
    images = make_images(2, 32, 40)
    gradients = []
    for compiled in (False, True):
        model = make_model().train()
        step = compile_one_graph(model, dynamic=False, backend="inductor") if compiled else model
        step(images, 6).sample.square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for eager, compiled in zip(*gradients):
        assert max_error(eager, compiled) <= CLOSE
