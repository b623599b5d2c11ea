# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Quality on demand: nested partitions, the search for the fewest tokens, targets of encode, the fast mode."""

import math

import numpy as np
import pytest
import torch
from model_helpers import make_images, make_model

from gpstoken_hf import GPSTokenConfig, GPSTokenModel, bundled, partition_images
from gpstoken_hf.metrics import psnr, ssim
from gpstoken_hf.partition import split_sequence
from gpstoken_hf.quality import CountSearch, NestedPartition, predict_psnr, predicted_counts, search_budget

SETTINGS = {"complexity_exponent": 2.5, "min_region_size": 4}


@pytest.fixture(scope="module")
def nano():
    return GPSTokenModel.from_pretrained(bundled("gpstoken-nano")).eval()


@pytest.fixture(scope="module")
def photographs():
    """Four crops of a photograph, (4, 3, 64, 64) in [-1, 1], from smooth to busy."""
    data = pytest.importorskip("skimage.data", reason="needs scikit-image")
    image = torch.from_numpy(data.astronaut().copy()).permute(2, 0, 1).float() / 127.5 - 1
    crops = [image[:, y : y + 256, x : x + 256] for y, x in ((0, 0), (0, 150), (256, 0), (256, 256))]
    return torch.nn.functional.interpolate(torch.stack(crops), (64, 64), mode="area")


class Counter:
    """Counts the calls of the encoder and the decoder of a model."""

    def __init__(self, model):
        self.encodes = self.decodes = 0
        self.hooks = [
            model.encoder.register_forward_hook(lambda *_: self.add("encodes")),
            model.decoder.register_forward_hook(lambda *_: self.add("decodes")),
        ]

    def add(self, name):
        setattr(self, name, getattr(self, name) + 1)

    def close(self):
        for hook in self.hooks:
            hook.remove()


def decoded(model, images, out):
    with torch.no_grad():
        return model.decode(out.tokens, tuple(images.shape[-2:]), out.attention_mask).sample


# ---- Nested partitions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (37, 23), (5, 90), (1, 64)])
@pytest.mark.parametrize("with_importance", [False, True])
def test_every_partition_is_that_of_partition_images(size, with_importance):
    images = make_images(2, *size)
    importance = torch.randint(0, 9, (2, *size), generator=torch.Generator().manual_seed(1)).float()
    options = {**SETTINGS, "importance": importance if with_importance else None}
    largest = partition_images(images, 1, **SETTINGS).boxes.shape[1]
    while True:
        try:
            partition_images(images, largest + 1, **SETTINGS)
        except ValueError:
            break
        largest += 1
    nested = NestedPartition(split_sequence(images, largest, **options), size)
    for counts in ([1, largest], [largest // 2 or 1, min(3, largest)]):
        expected = partition_images(images, counts, **options)
        found = nested.layout([0, 1], counts, 2 / 3, True)
        assert torch.equal(found.boxes, expected.boxes)
        assert torch.equal(found.gaussians, expected.gaussians)
        assert torch.equal(found.attention_mask, expected.attention_mask)


def test_a_partition_refines_every_smaller_one():
    images = make_images(1, 64, 64)
    nested = NestedPartition(split_sequence(images, 60, **SETTINGS), (64, 64))
    for count in range(1, 60):
        few = {tuple(box) for box in nested.boxes(0, count)}
        more = {tuple(box) for box in nested.boxes(0, count + 1)}
        assert len(few - more) == 1
        assert len(more - few) == 2


def test_splits_are_the_same_without_numba(monkeypatch):
    images = make_images(2, 64, 48)
    fast = split_sequence(images, 40, **SETTINGS)
    monkeypatch.setattr("gpstoken_hf.partition.numba_is_available", lambda: False)
    assert torch.equal(split_sequence(images, 40, **SETTINGS), fast)


# ---- The search -----------------------------------------------------------------------------------------------------


def run_search(quality, high, start):
    search = CountSearch(1, high, start, search_budget(1, high))
    while (count := search.next_count()) is not None:
        assert count not in search.tried
        assert 1 <= count <= high
        search.tried[count] = quality(count)
    assert len(search.tried) <= max(math.ceil(math.log2(high + 1)), 1.3 * math.log2(high))
    return search


@pytest.mark.parametrize("high", [1, 2, 3, 7, 16, 64, 100, 500, 4096])
def test_search_finds_the_fewest_where_quality_grows(high):
    for answer in sorted({1, 2, 3, high // 3 + 1, high - 1, high, high + 1} & set(range(1, high + 2))):
        for start in {1, (high + 1) // 2, high}:
            for steps in (lambda n, a=answer: math.log2(n / a), lambda n, a=answer: -1.0 if n < a else 1.0):
                found = run_search(steps, high, start)
                assert found.passed == (answer if answer <= high else None)


def test_search_finds_targets_that_only_a_peak_reaches():
    """The quality of a model falls again beyond the number of tokens that it was trained with."""
    for peak in (24, 40, 64, 100):
        found = run_search(lambda n, p=peak: 0.3 - abs(math.log2(n / p)), 256, 32)
        assert found.passed is not None
        assert abs(math.log2(found.passed / peak)) <= 0.3


def test_search_returns_the_best_where_none_suffices():
    assert run_search(lambda n: n - 100.0, 64, 32).best == 64
    found = run_search(lambda n: -5 - abs(math.log2(n / 40)), 256, 32)
    assert abs(math.log2(found.best / 40)) < 0.25


# ---- encode ---------------------------------------------------------------------------------------------------------


def test_each_image_gets_the_fewest_tokens(nano, photographs):
    with torch.no_grad():
        scores = [
            psnr(nano.decode(nano.encode(photographs, n).tokens, (64, 64)).sample, photographs) for n in range(1, 37)
        ]
    scores = torch.stack(scores)  # (36, B)
    target = scores[27].quantile(0.5).item()
    out = nano.encode(photographs, target_psnr=target, max_tokens=36)
    reachable = (scores >= target).any(0)
    assert torch.equal(out.reached, reachable)
    assert out.tokens.shape[:2] == (4, int(out.layout.num_tokens.max()))
    assert len(set(out.layout.num_tokens.tolist())) > 1
    for image, count in enumerate(out.layout.num_tokens.tolist()):
        if out.reached[image]:
            assert scores[count - 1, image] >= target
            assert count == 1 or scores[count - 2, image] < target
        else:
            assert scores[count - 1, image] > scores[:, image].max() - 0.1
    achieved = psnr(decoded(nano, photographs, out), photographs)
    assert torch.equal(achieved >= target, out.reached)
    # The tokens are those of the same number without a target.
    plain = nano.encode(photographs, out.layout.num_tokens.tolist())
    assert torch.equal(plain.layout.boxes, out.layout.boxes)
    torch.testing.assert_close(plain.tokens, out.tokens, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("max_tokens", [16, 64, 128])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_search_costs_few_reconstructions(max_tokens, batch_size):
    model = make_model()
    images = make_images(batch_size, 64, 64)
    with torch.no_grad():
        middle = psnr(model(images, 30).sample, images).min().item()
    for target in (-50.0, middle, 90.0):
        counter = Counter(model)
        model.encode(images, target_psnr=target, max_tokens=max_tokens)
        counter.close()
        assert counter.encodes == counter.decodes
        limit = 1.3 * math.log2(max_tokens)
        bisection = math.ceil(math.log2(max_tokens + 1))
        assert counter.encodes <= max(limit, bisection + (batch_size > 1))


def test_other_targets(nano, photographs):
    def closeness(image, reconstruction):
        assert image.shape == reconstruction.shape == (1, 3, 64, 64)
        return -(image - reconstruction).abs().mean()

    images = photographs[:2]
    with torch.no_grad():
        sample = nano(images, 12).sample
    target = ssim(sample, images).max().item() - 0.01  # one image or both reach it
    out = nano.encode(images, target_ssim=target, max_tokens=16)
    assert torch.equal(ssim(decoded(nano, images, out), images) >= target, out.reached)
    assert out.reached.any()

    target = max(closeness(image, other).item() for image, other in zip(images.split(1), sample.split(1))) - 0.01
    out = nano.encode(images, metric=closeness, target=target, max_tokens=16)
    differences = (decoded(nano, images, out) - images).abs().mean(dim=(1, 2, 3))
    assert torch.equal(-differences >= target, out.reached)
    assert out.reached.any()


def test_targets_beside_other_arguments():
    model = make_model()
    images = make_images(2, 64, 64)
    importance = torch.zeros(2, 64, 64)
    importance[:, :16] = 1000.0
    focused = model.encode(images, target_psnr=90.0, importance=importance, max_tokens=20)
    plain = model.encode(images, focused.layout.num_tokens.tolist(), importance=importance)
    assert torch.equal(focused.layout.boxes, plain.layout.boxes)
    assert not focused.reached.any()

    tiled = model.encode(images, target_psnr=90.0, tile_size=32, max_tokens=40)
    counts = tiled.layout.num_tokens.tolist()
    assert all(4 <= count <= 40 for count in counts)
    assert torch.equal(tiled.layout.boxes, model.encode(images, counts, tile_size=32).layout.boxes)

    model.enable_tiling(32)
    assert model.encode(images, target_psnr=90.0, max_tokens=8).layout.num_tokens.tolist() >= [4, 4]
    model.disable_tiling()
    model.enable_slicing()
    sliced = model.encode(images, target_psnr=90.0, importance=importance, max_tokens=20)
    assert sliced.layout.num_tokens.tolist() == focused.layout.num_tokens.tolist()

    one = model.encode(make_images(1, 16, 24), target_psnr=-90.0)
    assert one.tokens.shape[:2] == (1, 1)
    assert one.reached.tolist() == [True]
    assert not one.tokens.requires_grad
    assert model.encode(images, 4).reached is None


def test_max_tokens_is_cut_to_what_the_image_allows():
    model = make_model()
    out = model.encode(make_images(1, 8, 8), target_psnr=90.0, max_tokens=10**6)
    assert out.layout.num_tokens.item() <= 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_psnr": math.nan}, "target_psnr must be a finite number"),
        ({"target_psnr": math.inf}, "target_psnr must be a finite number"),
        ({"target_psnr": "30"}, "target_psnr must be a finite number"),
        ({"target_psnr": True}, "target_psnr must be a finite number"),
        ({"target_psnr": [30.0, 20.0]}, "target_psnr must be a finite number"),
        ({"target_ssim": 1.5}, "target_ssim must be at most 1"),
        ({"target_psnr": 20.0, "target_ssim": 0.5}, "one target, got target_psnr and target_ssim"),
        ({"metric": psnr}, "metric and target must be given together"),
        ({"target": 3.0}, "metric and target must be given together"),
        ({"metric": 3, "target": 3.0}, "metric must be callable"),
        ({"metric": lambda a, b: math.nan, "target": 3.0}, "metric must return a number, got NaN"),
        ({"metric": lambda a, b: a, "target": 3.0}, "metric must return one number per image, got Tensor"),
        ({"metric": lambda a, b: None, "target": 3.0}, "metric must return one number per image, got NoneType"),
        ({"max_tokens": 8}, "max_tokens must come with a target"),
        ({"target_psnr": 20.0, "max_tokens": 0}, "max_tokens must be an integer of at least 1, got 0"),
        ({"target_psnr": 20.0, "max_tokens": 2.5}, "max_tokens must be an integer of at least 1, got 2.5"),
        ({"target_psnr": 20.0, "max_tokens": 3, "tile_size": 32}, "at least 1 for each of the 4 tiles, got 3"),
        ({"target_psnr": 20.0, "num_tokens": 8}, "num_tokens and layout must be None with a target"),
        ({"fast": True}, "fast must come with target_psnr"),
        ({"target_ssim": 0.5, "fast": True}, "fast must come with target_psnr"),
        ({"target_psnr": 20.0, "fast": True}, "without config.quality_predictor"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_model().encode(make_images(1, 64, 64), **arguments)


def test_ssim_needs_a_window():
    with pytest.raises(ValueError, match="at least 11 x 11"):
        make_model().encode(make_images(1, 8, 64), target_ssim=0.5)


# ---- The fast mode --------------------------------------------------------------------------------------------------


def test_the_flat_psnr_is_that_of_constant_regions():
    images = make_images(1, 48, 64)
    nested = NestedPartition(split_sequence(images, 30, **SETTINGS), (48, 64))
    features = nested.features(0, images[0], 64 * 64, 20)
    assert features.shape == (20, len(GPSTokenConfig.preset("tiny", quality_predictor=[0.0] * 7).quality_predictor))
    for count in (1, 2, 17, 20, 30):
        flat = images.clone()
        for x0, y0, x1, y1 in nested.boxes(0, count):
            region = (0, slice(None), slice(y0, y1 + 1), slice(x0, x1 + 1))
            flat[region] = images[region].mean(dim=(1, 2), keepdim=True)
        expected = psnr(flat, images).item()
        # 1e-5 is added to the error. The finest partition has 30 regions, fewer than four times 20.
        found = features[count - 1, 1] if count <= 20 else features[19, 2]
        assert found == pytest.approx(expected, abs=0.01)
    np.testing.assert_array_equal(features[:5, 2], features[3:20:4, 1])
    np.testing.assert_allclose(features[:, 3], np.log2(np.arange(1, 21) / 0.75))


def test_fast_mode_encodes_once_and_decodes_never(tmp_path):
    model = make_model(quality_predictor=[0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0])  # the PSNR of constant regions
    images = make_images(3, 64, 64)
    nested = NestedPartition(split_sequence(images, 256, **SETTINGS), (64, 64))
    weights = model.config.quality_predictor
    predicted = [predict_psnr(nested.features(i, images[i], 32 * 32, 100), weights) for i in range(3)]
    target = float(predicted[0][40])
    counter = Counter(model)
    out = model.encode(images, target_psnr=target, max_tokens=100, fast=True)
    counter.close()
    assert (counter.encodes, counter.decodes) == (1, 0)
    assert out.reached is None
    counts = out.layout.num_tokens.tolist()
    assert counts == predicted_counts(nested, images, 32 * 32, 100, weights, target)
    assert predicted[0][counts[0] - 1] >= target > predicted[0][counts[0] - 2]
    assert model.encode(images, target_psnr=500.0, max_tokens=100, fast=True).layout.num_tokens.tolist() == [100] * 3
    model.save_pretrained(tmp_path)
    assert GPSTokenModel.from_pretrained(tmp_path).config.quality_predictor == model.config.quality_predictor
    with pytest.raises(ValueError, match="fast must be False for an image that is encoded in tiles"):
        model.encode(images, target_psnr=target, fast=True, tile_size=32)


@pytest.mark.parametrize("weights", [[], [1.0] * 6, [math.nan] * 7, [1e9] * 7, ["a"] * 7])
def test_a_bad_predictor_is_refused(weights):
    with pytest.raises(ValueError, match="quality_predictor"):
        GPSTokenConfig.preset("tiny", quality_predictor=weights)
