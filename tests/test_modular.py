# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""The modular blocks: the images of the pipeline, blocks left out and put in, guiders, folders, the Hub, the CLI."""

from __future__ import annotations

import doctest
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    LayerSkipConfig,
    ModularPipeline,
)
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    ClassifierFreeGuidance,
    PerturbedAttentionGuidance,
    SkipLayerGuidance,
)
from loopback_hub import LoopbackHub
from tiny_pipeline import CHANNELS, SIDE, TOKENS, make_bank, make_pipeline, seeded

import gpstoken_hf
from gpstoken_hf import GPSTokenBlocks, GPSTokenModularPipeline, GPSTokenReconstructBlocks, IntervalGuidance
from gpstoken_hf.layout import GaussianLayout
from gpstoken_hf.layout_sources import calibrated
from gpstoken_hf.modular_blocks import GPSTokenBlock
from gpstoken_hf.modular_gpstoken import GPSTokenTextureStep

TESTS = Path(__file__).parent
COMPONENTS = (
    "vae",
    "transformer",
    "scheduler",
    "layout_transformer",
    "layout_scheduler",
    "layout_bank",
    "image_processor",
)


def make_modular(standard, blocks=None) -> GPSTokenModularPipeline:
    """A modular pipeline with the components and class names of a pipeline."""
    pipe = (blocks or GPSTokenBlocks()).init_pipeline()
    given = {name: getattr(standard, name) for name in COMPONENTS if hasattr(pipe, name)}
    pipe.update_components(**{name: value for name, value in given.items() if value is not None})
    if "id2label" in pipe.config:
        pipe.update_components(id2label=standard.config.id2label)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def both():
    return make_pipeline("both")


@pytest.fixture(scope="module")
def saved(both, tmp_path_factory) -> Path:
    """A folder of the standard and one of the modular form."""
    folder = tmp_path_factory.mktemp("saved")
    both.save_pretrained(folder / "standard")
    make_modular(both).save_pretrained(folder / "modular")
    return folder


def images_of(pipe, labels=(1, "dog"), steps=6, seeds=(0, 1), **kwargs) -> torch.Tensor:
    arguments = {"num_inference_steps": steps, "generator": seeded(*seeds), "output_type": "pt", **kwargs}
    if isinstance(pipe, ModularPipeline):
        return pipe(class_labels=list(labels), **arguments).images
    return pipe(list(labels), **arguments).images


IMAGE = np.random.default_rng(0).integers(0, 255, (40, 48, 3)).astype(np.uint8)
GIVEN = GaussianLayout(make_bank().gaussians_of(3)[None])


@pytest.mark.parametrize(
    ("mode", "standard", "modular"),
    [
        ("both", {}, {}),
        ("bank", {}, {}),
        ("one_stage", {}, {}),
        ("both", {"layout": "bank"}, {"layout_source": "bank"}),
        ("both", {"layout": "generated"}, {"layout_source": "generated"}),
        ("both", {"layout": IMAGE}, {"image": IMAGE}),
        ("both", {"layout": GIVEN}, {"layout": GIVEN}),
        ("both", {"num_layout_steps": 3}, {"num_layout_steps": 3}),
    ],
)
def test_the_same_seeds_give_the_images_of_the_pipeline(mode, standard, modular):
    pipeline = make_pipeline(mode)
    assert torch.equal(images_of(make_modular(pipeline), **modular), images_of(pipeline, **standard))


def test_other_schedulers_several_images_per_label_and_padded_layouts():
    pipeline = make_pipeline("bank", layout_bank=make_bank(lengths=(4, 6)), scheduler=FlowMatchHeunDiscreteScheduler())
    several = {"num_images_per_label": 2, "seeds": (0, 1, 2, 3)}
    expected = images_of(pipeline, **several)
    assert len(expected) == 4
    assert torch.equal(images_of(make_modular(pipeline), **several), expected)


class EditLayout(GPSTokenBlock):
    """Moves every token to the left, by an input of its own."""

    takes, makes = ("layout", "shift"), ("layout",)

    def run(self, components, block):
        gaussians = block.layout.gaussians.clone()
        gaussians[..., 3] -= block.shift
        block.layout = GaussianLayout(gaussians)


def test_calibration_can_be_left_out(both):
    blocks = GPSTokenBlocks()
    blocks.sub_blocks.pop("calibrate")
    raw = make_modular(both, blocks)(class_labels=[1, 2], num_inference_steps=2, generator=seeded(0, 1))
    legal = make_modular(both)(class_labels=[1, 2], num_inference_steps=2, generator=seeded(0, 1))
    assert torch.equal(calibrated(raw.layout.gaussians, both.vae.config).gaussians, legal.layout.gaussians)
    assert (raw.layout.gaussians - legal.layout.gaussians).abs().max() > 1e-3
    assert raw.images[0].size == (SIDE, SIDE)


@pytest.mark.parametrize("index", [2, 3])
def test_a_layout_is_edited_between_two_blocks(both, index):
    """Before the calibration, which makes the edited layout legal, or after it."""
    blocks = GPSTokenBlocks()
    blocks.sub_blocks.insert("edit", EditLayout(), index)
    pipe = make_modular(both, blocks)
    edited = pipe(class_labels=[1], num_inference_steps=2, generator=seeded(0), shift=0.25).layout
    plain = GPSTokenBlocks()
    if index == 2:
        plain.sub_blocks.pop("calibrate")
    layout = make_modular(both, plain)(class_labels=[1], num_inference_steps=2, generator=seeded(0)).layout
    moved = layout.gaussians - torch.tensor([0.0, 0, 0, 0.25, 0])
    expected = calibrated(moved, both.vae.config).gaussians if index == 2 else moved
    torch.testing.assert_close(edited.gaussians, expected, rtol=0, atol=1e-6)


def test_a_part_of_the_blocks_goes_on_from_the_state_of_another(both):
    blocks = GPSTokenBlocks()
    texture, decode = (blocks.sub_blocks.pop(name) for name in ("texture", "decode"))
    first = make_modular(both, blocks)
    state = first(class_labels=[1, "dog"], generator=(generators := seeded(0, 1)))
    assert isinstance(texture, GPSTokenTextureStep)
    second = make_modular(both, type(blocks).from_blocks_dict({"texture": texture, "decode": decode}))
    rest = {"label_ids": state.label_ids, "layout": state.layout, "generator": generators}
    assert torch.equal(second(num_inference_steps=6, output_type="pt", **rest).images, images_of(both))


class MoveOneGaussian(GPSTokenBlock):
    requires, makes = ("tokens",), ("tokens",)

    def run(self, components, block):
        block.tokens = block.tokens.clone()
        block.tokens[:, 0, 3] = -block.tokens[:, 0, 3]


def test_images_are_reconstructed_and_edited(both):
    pixels = torch.rand(2, 3, SIDE, SIDE + 8, generator=torch.Generator().manual_seed(0))
    plain = make_modular(both, GPSTokenReconstructBlocks())
    state = plain(image=pixels, num_tokens=6, output_type="pt")
    assert state.tokens.shape == (2, 6, CHANNELS)
    tokens = both.vae.encode(pixels * 2 - 1, num_tokens=6).tokens
    expected = both.vae.decode(tokens, (SIDE, SIDE + 8)).sample.clamp(-1, 1) / 2 + 0.5
    torch.testing.assert_close(state.images, expected, rtol=0, atol=1e-5)
    blocks = GPSTokenReconstructBlocks()
    blocks.sub_blocks.insert("edit", MoveOneGaussian(), 1)
    edited = make_modular(both, blocks)(image=pixels, num_tokens=6, output_type="pt")
    assert torch.equal(edited.tokens[:, 1:], state.tokens[:, 1:])
    assert torch.equal(edited.tokens[:, 0, 3], -state.tokens[:, 0, 3])
    assert (edited.images - state.images).abs().max() > 1e-3


# -- guiders


def test_our_guider_makes_the_forward_passes_of_the_pipeline():
    def calls(run):
        pipeline = make_pipeline("bank", scheduler=FlowMatchEulerDiscreteScheduler())
        seen = []
        pipeline.transformer.register_forward_hook(lambda _m, args, _o: seen.append(args[2].tolist()))
        return run(pipeline), seen

    for w, interval in ((1.5, (0.3, 0.7)), (0.0, (0.0, 0.4)), (1.0, (0.0, 1.0)), (4.0, (0.0, 1.0))):
        guidance = {"guidance_scale": w, "guidance_interval": interval}

        def standard(pipeline, guidance=guidance):
            return images_of(pipeline, steps=10, **guidance)

        def modular(pipeline, guidance=guidance):
            pipe = make_modular(pipeline)
            pipe.update_components(guider=IntervalGuidance(**guidance))
            return images_of(pipe, steps=10)

        (expected, passes), (images, made) = calls(standard), calls(modular)
        assert made == passes
        assert torch.equal(images, expected)


def test_guiders_of_diffusers_take_the_place_of_ours(both):
    pipe = make_modular(both)

    def run(guider):
        pipe.update_components(guider=guider)
        images = images_of(pipe)
        assert torch.isfinite(images).all()
        return images

    whole = images_of(both, guidance_scale=3.0, guidance_interval=(0.0, 1.0))
    torch.testing.assert_close(run(ClassifierFreeGuidance(guidance_scale=3.0)), whole, rtol=0, atol=1e-6)
    off = images_of(both, guidance_scale=1.0)
    assert torch.equal(run(ClassifierFreeGuidance(guidance_scale=3.0, enabled=False)), off)
    assert torch.equal(run(IntervalGuidance(enabled=False)), off)
    # With a fraction of the steps: 6 steps, of which 2, 3 and 4 are guided, at t of about 1/3 to 4/5.
    part = images_of(both, guidance_scale=3.0, guidance_interval=(0.3, 0.8))
    torch.testing.assert_close(run(ClassifierFreeGuidance(3.0, start=0.34, stop=0.84)), part, rtol=0, atol=1e-6)
    others = [
        AdaptiveProjectedGuidance(guidance_scale=3.0, eta=0.0),
        # These two change layers of the transformer for some of the passes, and put them back.
        SkipLayerGuidance(3.0, skip_layer_config=LayerSkipConfig([0]), skip_layer_guidance_stop=1.0),
        PerturbedAttentionGuidance(3.0, perturbed_guidance_config=LayerSkipConfig([1]), perturbed_guidance_stop=1.0),
    ]
    for guider in others:
        assert (run(guider) - whole).abs().max() > 1e-4, type(guider).__name__
    assert torch.equal(run(IntervalGuidance(3.0, (0.0, 1.0))), whole)


def test_padding_does_not_reach_a_guider_that_looks_at_all_tokens():
    """Adaptive projection takes norms over an image. Padding must count for nothing."""
    short = make_bank(lengths=(4, 4)).gaussians_of(0)[None]
    long = GaussianLayout(make_bank(lengths=(6, 6)).gaussians_of(1)[None])
    pipe = make_modular(make_pipeline("bank", scheduler=FlowMatchEulerDiscreteScheduler()))
    pipe.update_components(guider=AdaptiveProjectedGuidance(guidance_scale=3.0, eta=0.0))
    noise = torch.randn(2, 6, CHANNELS, generator=torch.Generator().manual_seed(0))
    stacked = GaussianLayout.stack([GaussianLayout(short), long])
    together = images_of(pipe, (1, 2), layout=stacked, latents=noise)
    alone = images_of(pipe, (1,), seeds=(0,), layout=GaussianLayout(short), latents=noise[:1, :4])
    torch.testing.assert_close(together[:1], alone, rtol=0, atol=1e-5)


# -- folders, the Hub, the command line


def test_save_and_load(both, saved, tmp_path):
    expected = images_of(both)
    index = json.loads((saved / "modular" / "modular_model_index.json").read_text())
    assert index["_class_name"] == "GPSTokenModularPipeline"
    assert index["_blocks_class_name"] == "GPSTokenBlocks"
    assert index["transformer"][:2] == ["gpstoken_hf.transformer_sit", "SiTTransformer1DModel"]
    shutil.copytree(saved / "modular", tmp_path / "moved")
    for folder, cls in (
        (saved / "modular", ModularPipeline),
        (tmp_path / "moved", GPSTokenModularPipeline),
        (saved / "standard", GPSTokenModularPipeline),
    ):
        pipe = cls.from_pretrained(folder)
        assert type(pipe) is GPSTokenModularPipeline
        pipe.load_components()
        pipe.set_progress_bar_config(disable=True)
        assert torch.equal(images_of(pipe), expected), folder


def test_workflows_load_only_what_they_need(both, saved):
    pipe = ModularPipeline.from_pretrained(saved / "modular", workflow="bank")
    pipe.load_components()
    assert not hasattr(pipe, "layout_transformer")
    pipe.set_progress_bar_config(disable=True)
    assert torch.equal(images_of(pipe), images_of(both, layout="bank"))


def test_components_that_a_pipeline_lacks_and_other_dtypes(tmp_path):
    pipeline = make_pipeline("bank").to(torch.bfloat16)
    pipeline.save_pretrained(tmp_path)
    pipe = GPSTokenModularPipeline.from_pretrained(tmp_path)
    pipe.load_components()
    assert pipe.layout_transformer is None
    assert {pipe.vae.dtype, pipe.transformer.dtype} == {torch.float32}
    pipe = GPSTokenModularPipeline.from_pretrained(tmp_path)
    pipe.load_components(dtype=torch.bfloat16)
    assert {pipe.vae.dtype, pipe.transformer.dtype} == {torch.bfloat16}
    assert torch.isfinite(images_of(pipe, steps=2)).all()


PUSH = """
import torch
from diffusers import ModularPipeline
from tiny_pipeline import make_pipeline
from test_modular import images_of, make_modular
pipe = make_modular(make_pipeline("both"))
pipe.push_to_hub("tester/modular")
pipe.push_to_hub("tester/trusted", remote_code=True)
loaded = ModularPipeline.from_pretrained("tester/modular")
loaded.load_components()
print("same:", torch.equal(images_of(loaded), images_of(pipe)))
"""

# The programs of diffusers do not import this package.
COMMAND_LINE = """
import sys
from diffusers.commands.diffusers_cli import main
for command in (
    ["schema", "-m", "tester/trusted", "--trust-remote-code"],
    ["run", "-m", "tester/trusted", "--trust-remote-code", "--device-map", "cpu", "--seed", "0", "--output-key",
     "images", "-o", sys.argv[1], "--pipeline-kwargs", '{"class_labels": ["dog", 3], "num_inference_steps": 2}'],
):
    sys.argv[1:] = command
    main()
"""


def run(code: str, cache: Path, *arguments: str, hub: LoopbackHub) -> str:
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent / "src")])
    environment = {**os.environ, **hub.env, "HF_HOME": str(cache), "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE"):
        environment.pop(name, None)
    command = [sys.executable, "-c", code, *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_the_hub_and_the_command_line_of_diffusers(tmp_path):
    with LoopbackHub() as hub:
        assert "same: True" in run(PUSH, tmp_path / "cache", hub=hub)
        files = hub.files("tester/modular")
        assert not [path for path in files if path.endswith((".py", ".bin"))]
        assert json.loads(files["modular_model_index.json"])["vae"][2]["pretrained_model_name_or_path"] == (
            "tester/modular"
        )
        assert "gpstoken_blocks.py" in hub.files("tester/trusted")
        (tmp_path / "out").mkdir()
        printed = run(COMMAND_LINE, tmp_path / "other", str(tmp_path / "out"), hub=hub)
    assert "class_labels" in printed
    assert "num_inference_steps" in printed
    assert len(list((tmp_path / "out").glob("*.png"))) == 2


def test_a_diffusers_without_modular_pipelines():
    """One line says what is needed; everything else works."""
    program = (
        "import sys\n"
        "sys.modules['diffusers.modular_pipelines'] = None\n"
        "sys.modules['diffusers.modular_pipelines.modular_pipeline'] = None\n"
        "import gpstoken_hf\n"
        "from tiny_pipeline import make_pipeline, seeded\n"
        "make_pipeline('bank')([1], 2, generator=seeded(0))\n"
        "try:\n"
        "    gpstoken_hf.GPSTokenModularPipeline\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent / "src")])}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    (line,) = result.stdout.strip().splitlines()
    assert line.startswith("modular pipelines need diffusers >= 0.40, got diffusers ")


# -- documentation and errors


@pytest.mark.parametrize("name", gpstoken_hf.MODULAR_NAMES)
def test_examples_run(name):
    tests = [test for test in doctest.DocTestFinder().find(getattr(gpstoken_hf, name), name) if test.examples]
    assert tests
    report: list[str] = []
    for test in tests:
        runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
        runner.run(test, out=report.append)
    assert not report, "".join(report)


def test_blocks_describe_themselves():
    doc = GPSTokenBlocks().doc
    for word in ("class_labels", "layout_source", "guider", "id2label", "generated", "images"):
        assert word in doc
    for block in GPSTokenBlocks().sub_blocks.values():
        assert block.description
        assert block.doc


LATENTS = torch.zeros(1, TOKENS, 5)


@pytest.mark.parametrize(
    ("mode", "arguments", "message"),
    [
        ("both", {"class_labels": "cot"}, r"class names, such as \['cat'\], got 'cot'"),
        ("both", {"class_labels": 10}, "between 0 and 9, got 10"),
        ("both", {"class_labels": None}, "class_labels"),
        ("both", {"num_images_per_label": 0}, "num_images_per_label must be an integer of at least 1, got 0"),
        ("both", {"generator": seeded(0, 1)}, "list of 1, one per label, got 2"),
        ("both", {"layout": GIVEN, "image": IMAGE}, "one of layout, image and layout_source must be given, got"),
        ("both", {"layout_source": "drawn"}, r"layout_source must be one of \['generated', 'bank'\], got 'drawn'"),
        ("bank", {"layout_source": "generated"}, "layout_transformer must be a component"),
        ("bank", {"layout_latents": LATENTS}, "layout_latents must be None unless the layout is generated"),
        ("one_stage", {"layout": GIVEN}, "layout and texture at once"),
        ("both", {"layout": GIVEN.gaussians}, "layout must be a GaussianLayout, got Tensor"),
        ("both", {"layout": GIVEN.expand(3)}, "of 1 or 1 images, got 3"),
        ("both", {"num_inference_steps": 0}, "num_inference_steps must be an integer of at least 1, got 0"),
        ("both", {"num_layout_steps": 0.5}, "num_layout_steps must be an integer of at least 1, got 0.5"),
        ("both", {"latents": torch.zeros(1, 3, 9)}, r"latents must be \(1, 8, 9\), got \(1, 3, 9\)"),
        ("both", {"output_type": "jpeg"}, "output_type must be one of .* got 'jpeg'"),
    ],
)
def test_errors(mode, arguments, message):
    pipe = make_modular(make_pipeline(mode))
    with pytest.raises(ValueError, match=message):
        pipe(**{"class_labels": [1], "num_inference_steps": 2, **arguments})


def test_an_index_that_names_something_else_is_refused(saved, tmp_path):
    """Its module is not imported, either: importing runs it."""
    shutil.copytree(saved / "modular", tmp_path / "other")
    path = tmp_path / "other" / "modular_model_index.json"
    index = json.loads(path.read_text())
    for module, name in (("antigravity", "Antigravity"), ("diffusers", "AutoencoderKL")):
        index["vae"] = [module, name, {**index["vae"][2], "type_hint": [module, name]}]
        path.write_text(json.dumps(index))
        for load in (ModularPipeline.from_pretrained, GPSTokenBlocks().init_pipeline):
            with pytest.raises(ValueError, match=f"vae must be of .*GPSTokenModel.* got '{name}' of '{module}'"):
                load(str(tmp_path / "other"))
    assert "antigravity" not in sys.modules


def test_a_foreign_component_is_named(both):
    pipe = make_modular(both)
    pipe.update_components(scheduler=DDIMScheduler())
    with pytest.raises(ValueError, match="scheduler must be a flow scheduler"):
        pipe(class_labels=1)
    pipe = make_modular(both)
    pipe.update_components(transformer=both.vae)
    with pytest.raises(ValueError, match="transformer must be a SiTTransformer1DModel, got GPSTokenModel"):
        pipe(class_labels=1)


def test_errors_without_components_and_of_the_guider():
    pipe = GPSTokenBlocks().init_pipeline()
    with pytest.raises(ValueError, match=r"transformer must be loaded by load_components .* got None"):
        pipe(class_labels=1)
    with pytest.raises(ValueError, match="guidance_scale must be at least 0, got -1"):
        IntervalGuidance(guidance_scale=-1)
    with pytest.raises(ValueError, match=r"low <= high <= 1, got \(0.8, 0.2\)"):
        IntervalGuidance(guidance_interval=(0.8, 0.2))
    with pytest.raises(OSError, match=r"bundled\(\"gpstoken-digits\"\)"):
        GPSTokenModularPipeline.from_pretrained("gpstoken-digits")
