# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Model cards: their text, their metadata, their code, and that none is ever replaced."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from loopback_hub import LoopbackHub
from model_helpers import make_images, make_model
from tiny_pipeline import make_pipeline

from gpstoken_hf import AutoencoderGPSToken, GPSTokenModel, GPSTokenPipeline, bundled
from gpstoken_hf.model_cards import CardDetails, Score, front_matter, model_card, remote_code_section
from gpstoken_hf.pushing import add_card

TESTS = Path(__file__).parent
SECTIONS = ["Use", "Training", "Scores", "Licence", "Limits"]
DETAILS = CardDetails(
    license="apache-2.0",
    training_data="1437 digits of scikit-learn.",
    training_command="python -m training.make_digits --work_dir runs/digits",
    scores=[
        Score("PSNR", 33.8, "UCI digits, held out", "dB, mean over 360 images of 32 x 32"),
        Score("FID", 2.18, "ImageNet", "50,000 images", "the paper", "https://arxiv.org/abs/2509.01109"),
    ],
    limits="It knows ten digits.",
)


@pytest.fixture(scope="module")
def objects():
    pipeline = make_pipeline("both")
    return {
        "pipeline": pipeline,
        "tokenizer": pipeline.vae,
        "transformer": pipeline.transformer,
        "layouts": pipeline.layout_transformer,
        "bank": pipeline.layout_bank,
        "scheduler": pipeline.scheduler,
        "processor": pipeline.image_processor,
        "autoencoder": AutoencoderGPSToken.from_gpstoken(make_model(num_tokens=16), [make_images(4, 32, 32)]),
    }


KINDS = ["pipeline", "tokenizer", "transformer", "layouts", "bank", "scheduler", "processor", "autoencoder"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("details", [None, DETAILS])
def test_a_card_says_everything(objects, kind, details):
    text = model_card(objects[kind], f"tester/{kind}", details, tags=["mine"])
    card = ModelCard(text)  # raises for a block that is no legal YAML
    assert card.data.library_name in ("diffusers", "transformers")
    assert {"gpstoken", "mine", "arxiv:2509.01109"} <= set(card.data.tags)
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == SECTIONS
    assert text.count("\n# ") == 1
    assert f'from_pretrained("tester/{kind}")' in text
    assert text.count("```") % 2 == 0
    assert "None" not in text.replace("None were given", "")
    if details is None:
        assert card.data.license == "unknown"
        assert card.data.eval_results is None
        assert "Not stated by the uploader" in text
    else:
        assert card.data.license == "apache-2.0"
        for part in (DETAILS.training_data, DETAILS.training_command, DETAILS.limits, DETAILS.scores[0].protocol):
            assert part in text
        index = card.data.to_dict()["model-index"]
        assert [entry["name"] for entry in index] == [kind]
        metrics = {r["metrics"][0]["type"]: r["metrics"][0]["value"] for e in index for r in e["results"]}
        assert metrics == {"psnr": 33.8, "fid": 2.18}
        assert "reported by the paper, not measured with these weights" in text


def test_the_sizes_are_those_of_the_model(objects):
    assert "8 tokens of 5 + 4 numbers" in model_card(objects["tokenizer"])
    assert "It generates texture for a given layout." in model_card(objects["transformer"])
    assert "It generates layouts." in model_card(objects["layouts"])
    assert "20, of 8 tokens" in model_card(objects["bank"])
    assert "a bank of 20 layouts" in model_card(objects["pipeline"])


def test_foreign_objects_have_no_card():
    with pytest.raises(ValueError, match=r"model must be one of .*GPSTokenPipeline, got Linear"):
        model_card(torch.nn.Linear(1, 1))


@pytest.mark.parametrize("name", ["gpstoken-nano", "gpstoken-digits"])
def test_cards_of_the_bundled_checkpoints_are_valid(name):
    text = (Path(bundled(name)) / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.license == "apache-2.0"
    assert card.data.library_name in ("diffusers", "transformers")
    # The index says what the tables of the card say, where shares are percentages.
    for result in card.data.eval_results:
        value = result.metric_value
        shown = f"{100 * value:.1f} %" if result.metric_type == "accuracy" else f"{value:g}"
        assert shown in text[text.index("\n# ") :], result.metric_name


def test_front_matter_needs_no_scores():
    matter = front_matter("diffusers", ["one"], base_model="owner/name")
    assert ModelCard(matter).data.to_dict() == {
        "library_name": "diffusers",
        "license": "unknown",
        "base_model": "owner/name",
        "tags": ["gpstoken", "one", "arxiv:2509.01109"],
    }


def test_the_section_on_remote_code_names_the_loader():
    assert "AutoImageProcessor" in remote_code_section("GPSTokenModel", "a/b")
    assert 'DiffusionPipeline.from_pretrained("a/b", trust_remote_code=True)' in remote_code_section(
        "DiffusionPipeline", "a/b"
    )
    assert "from diffusers import AutoModel" in remote_code_section("SiTTransformer1DModel")


# -- folders


def test_a_card_that_is_there_is_kept(objects, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    add_card(objects["tokenizer"], tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_the_card_of_the_folder_that_was_loaded_goes_along(tmp_path):
    source = Path(bundled("gpstoken-digits"))
    pipeline = GPSTokenPipeline.from_pretrained(source)
    pipeline.save_pretrained(tmp_path / "same")
    assert not (tmp_path / "same" / "README.md").exists()
    add_card(pipeline, tmp_path / "same")
    assert (tmp_path / "same" / "README.md").read_text() == (source / "README.md").read_text()
    assert (tmp_path / "same" / "samples.png").read_bytes() == (source / "samples.png").read_bytes()
    # Other weights have other scores, so the card of the folder would be wrong.
    with torch.no_grad():
        next(pipeline.transformer.parameters()).add_(1)
    pipeline.save_pretrained(tmp_path / "changed")
    add_card(pipeline, tmp_path / "changed")
    assert "Recognised" not in (tmp_path / "changed" / "README.md").read_text()


def test_a_card_takes_no_file_from_outside_its_folder(objects, tmp_path):
    (tmp_path / "secret.png").write_text("secret")
    objects["tokenizer"].save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "README.md").write_text("![x](../secret.png) ![y](nothing.png)")
    model = GPSTokenModel.from_pretrained(tmp_path / "source")
    model.save_pretrained(tmp_path / "copies" / "one")
    add_card(model, tmp_path / "copies" / "one")
    assert not list((tmp_path / "copies").rglob("*.png"))


# -- the Hub

PUSH = """
import re, sys
from pathlib import Path
import numpy as np
import PIL.Image
import pytest
from huggingface_hub import HfApi
from model_helpers import make_images, make_model
from tiny_pipeline import make_pipeline
from gpstoken_hf import AutoencoderGPSToken, GPSTokenPipeline, SiTTransformer1DModel, bundled
from gpstoken_hf.model_cards import CardDetails

api = HfApi()
PIL.Image.fromarray(np.full((40, 50, 3), 99, "u1")).save("photo.jpg")
pipeline = make_pipeline("both")
objects = {
    "pipeline": pipeline, "tokenizer": pipeline.vae, "transformer": pipeline.transformer,
    "layouts": pipeline.layout_transformer, "bank": pipeline.layout_bank, "scheduler": pipeline.scheduler,
    "processor": pipeline.image_processor,
    "autoencoder": AutoencoderGPSToken.from_gpstoken(make_model(num_tokens=16), [make_images(4, 32, 32)]),
}
for name, value in objects.items():
    value.push_to_hub(f"tester/{name}", commit_message=f"Push {name}")
    readme = Path(api.hf_hub_download(f"tester/{name}", "README.md")).read_text()
    blocks = re.findall(r"```python\\n(.*?)```", readme, re.DOTALL)
    assert len(blocks) == 1
    exec(blocks[0], {})
    # A card that is there stays, whatever is pushed and however.
    api.create_repo(f"tester/kept-{name}")
    api.upload_file(repo_id=f"tester/kept-{name}", path_in_repo="README.md", path_or_fileobj=b"mine")
    value.push_to_hub(f"tester/kept-{name}")
    value.save_pretrained(f"kept-{name}", push_to_hub=True)
    value.save_pretrained(f"saved-{name}", push_to_hub=True, repo_id=f"tester/saved-{name}")

# All the arguments of the two libraries.
pipeline.transformer.push_to_hub(
    "tester/options", "A message", True, None, False, revision="side", tags=["mine"], variant="fp16",
    details=CardDetails(license="mit"),
)
pipeline.transformer.push_to_hub("tester/options", subfolder="deep", max_shard_size="100KB")
pipeline.vae.push_to_hub("tester/shards", max_shard_size="200KB", private=True)
with pytest.raises(TypeError, match="takes no argument 'privte'"):
    pipeline.vae.push_to_hub("tester/shards", privte=True)
loaded = SiTTransformer1DModel.from_pretrained("tester/transformer")
loaded.push_to_hub("tester/copy")
GPSTokenPipeline.from_pretrained(bundled("gpstoken-digits")).push_to_hub("tester/digits")
print("done")
"""


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cards")
    with LoopbackHub() as hub:
        paths = os.pathsep.join([str(TESTS.parent / "src"), str(TESTS)])
        environment = {**os.environ, **hub.env, "HF_HOME": str(folder / "cache"), "PYTHONPATH": paths}
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE"):
            environment.pop(name, None)
        result = subprocess.run(
            [sys.executable, "-c", PUSH], env=environment, cwd=folder, capture_output=True, text=True, timeout=600
        )
        assert result.returncode == 0, result.stderr[-4000:]
        assert result.stdout.endswith("done\n")
        yield hub


@pytest.mark.parametrize("kind", KINDS)
def test_every_class_is_pushed_with_its_card(pushed, objects, kind):
    card = pushed.files(f"tester/{kind}")["README.md"].decode()
    assert card == model_card(objects[kind], f"tester/{kind}")
    assert pushed.files(f"tester/saved-{kind}")["README.md"].decode() == model_card(
        objects[kind], f"tester/saved-{kind}"
    )
    kept = pushed.files(f"tester/kept-{kind}")
    assert kept["README.md"] == b"mine"
    assert len(kept) > 1
    titles = [commit.title for commit in pushed.store.repos[f"models/tester/{kind}"].commits.values()]
    assert f"Push {kind}" in titles


def test_the_bundled_pipeline_keeps_its_card(pushed):
    files, source = pushed.files("tester/digits"), Path(bundled("gpstoken-digits"))
    assert files["README.md"] == (source / "README.md").read_bytes()
    assert files["samples.png"] == (source / "samples.png").read_bytes()


def test_arguments_of_both_libraries(pushed):
    repo = pushed.store.repos["models/tester/options"]
    assert repo.is_private
    side = pushed.files("tester/options", revision="side")
    assert "diffusion_pytorch_model.fp16.safetensors" in side
    card = ModelCard(side["README.md"].decode())
    assert card.data.license == "mit"
    assert "mine" in card.data.tags
    main = pushed.files("tester/options")
    assert "deep/config.json" in main
    assert not [path for path in main if path.endswith("README.md")]
    assert len([path for path in pushed.files("tester/shards") if path.endswith(".safetensors")]) > 1


def test_a_copy_names_its_source(pushed):
    assert ModelCard(pushed.files("tester/copy")["README.md"].decode()).data.base_model == "tester/transformer"
