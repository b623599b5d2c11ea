# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Fréchet distance, Inception Score, precision and recall against closed forms and other implementations."""

import io
import math
import zipfile

import numpy as np
import pytest
import torch

from gpstoken_hf.metrics import (
    FeatureStatistics,
    frechet_distance,
    inception_score,
    precision_recall,
    read_statistics,
    write_statistics,
)


def drawn(count, size, seed=0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=generator, dtype=torch.float64) / math.sqrt(size)
    return torch.randn(count, size, generator=generator, dtype=torch.float64) @ mix + shift


def statistics_of(features, batch_size=1000):
    statistics = FeatureStatistics()
    for batch in features.split(batch_size):
        statistics.update(batch)
    return statistics


@pytest.fixture(scope="module")
def photographs():
    """Patches of real photographs as features: 16 x 16 grey pixels, 256 numbers that are far from Gaussian."""
    data = pytest.importorskip("skimage.data", reason="needs scikit-image")
    found = []
    for name in ("astronaut", "coffee"):
        image = torch.from_numpy(getattr(data, name)()).double().mean(dim=2)
        patches = image.unfold(0, 16, 16).unfold(1, 16, 16).reshape(-1, 256)
        found.append(patches[:700])
    return found


# ----------------------------------------------------------------------------------------------------- statistics


def test_moments_are_numpys_whatever_the_batches():
    """Worst relative difference seen 2e-13, with a mean 1e4 times the deviation."""
    features = drawn(200, 12, shift=1e4)
    for batch_size in (1, 7, 64, 200):
        statistics = statistics_of(features, batch_size)
        assert statistics.count == 200
        assert np.allclose(statistics.mean.numpy(), features.numpy().mean(0), rtol=1e-12)
        assert np.allclose(statistics.covariance.numpy(), np.cov(features.numpy(), rowvar=False), rtol=0, atol=1e-10)


def test_merged_statistics_are_those_of_all_images():
    features = drawn(101, 6, shift=50)
    whole = statistics_of(features)
    first, second, empty = statistics_of(features[:30]), statistics_of(features[30:], 1), FeatureStatistics()
    empty.merge(first)
    empty.merge(FeatureStatistics())
    empty.merge(second)
    assert empty.count == 101
    assert torch.allclose(empty.covariance, whole.covariance, rtol=1e-12)
    assert first.count == 30  # what is merged stays as it is
    assert torch.equal(first.covariance, statistics_of(features[:30]).covariance)


def test_a_state_goes_on_bit_for_bit():
    features = drawn(60, 5)
    whole = statistics_of(features, 20)
    half = statistics_of(features[:40], 20)
    again = FeatureStatistics()
    again.load_state_dict({name: value.clone() for name, value in half.state_dict().items()})
    again.update(features[40:])
    assert torch.equal(again.covariance, whole.covariance)
    assert torch.equal(again.mean, whole.mean)


def test_too_few_images_are_told():
    assert statistics_of(drawn(8, 8)).is_rank_deficient
    assert not statistics_of(drawn(9, 8)).is_rank_deficient


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.zeros(3), r"shape \(N, D\), got \(3,\)"),
        (torch.zeros(0, 4), r"shape \(N, D\), got \(0, 4\)"),
        (torch.tensor([[0.0, math.nan]]), "finite"),
        (torch.zeros(2, 3), "4 columns as before, got 3"),
    ],
)
def test_bad_features(features, message):
    statistics = statistics_of(drawn(4, 4))
    with pytest.raises(ValueError, match=message):
        statistics.update(features)


def test_statistics_of_nothing():
    with pytest.raises(ValueError, match="at least one image"):
        _ = FeatureStatistics().mean
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        _ = statistics_of(drawn(1, 3)).covariance
    with pytest.raises(ValueError, match="same features, got 3 and 4"):
        frechet_distance(statistics_of(drawn(5, 3)), statistics_of(drawn(5, 4)))


# ------------------------------------------------------------------------------------------------- Fréchet distance


def test_of_gaussians_that_commute_it_has_a_closed_form():
    first = FeatureStatistics.from_moments(torch.zeros(3), torch.diag(torch.tensor([1.0, 4.0, 0.0])))
    second = FeatureStatistics.from_moments(torch.tensor([1.0, 0.0, 2.0]), torch.diag(torch.tensor([9.0, 4.0, 25.0])))
    # |m|² + the squared differences of the deviations
    assert frechet_distance(first, second) == pytest.approx(5 + 4 + 0 + 25, rel=1e-12)


def test_equal_statistics_have_distance_0():
    features = drawn(30, 16)
    assert frechet_distance(statistics_of(features), statistics_of(features)) == 0
    assert frechet_distance(statistics_of(features, 7), statistics_of(features, 1)) < 1e-12


def scipy_distance(first, second):
    linalg = pytest.importorskip("scipy.linalg", reason="needs scipy")
    m1, m2 = first.numpy().mean(0), second.numpy().mean(0)
    c1, c2 = (np.cov(x.numpy(), rowvar=False) for x in (first, second))
    root = linalg.sqrtm(c1 @ c2)
    return ((m1 - m2) ** 2).sum() + np.trace(c1 + c2 - 2 * root.real)


def test_against_scipys_matrix_root(photographs):
    """Worst relative difference seen 3e-10."""
    for first, second in ((drawn(400, 20), drawn(300, 20, 1, 0.3)), photographs):
        ours = frechet_distance(statistics_of(first, 64), statistics_of(second, 64))
        assert ours == pytest.approx(scipy_distance(first, second), rel=1e-7)


def test_against_torch_fidelity_and_torchmetrics(photographs):
    """Worst relative difference seen 4e-10; torchmetrics takes eigenvalues of a matrix that is not symmetric."""
    fid = pytest.importorskip("torch_fidelity.metric_fid", reason="needs torch-fidelity")
    image = pytest.importorskip("torchmetrics.image.fid", reason="needs torchmetrics")
    for first, second in ((drawn(400, 20), drawn(300, 20, 1, 0.3)), photographs):
        ours = frechet_distance(statistics_of(first, 64), statistics_of(second, 64))
        pair = [fid.fid_features_to_statistics(features) for features in (first, second)]
        theirs = fid.fid_statistics_to_metric(*pair, verbose=False)["frechet_inception_distance"]
        assert ours == pytest.approx(theirs, rel=1e-7)

        class Same(torch.nn.Module):
            num_features = first.shape[1]

            def forward(self, features):
                return features

        metric = image.FrechetInceptionDistance(feature=Same()).set_dtype(torch.float64)
        metric.update(first, real=True)
        metric.update(second, real=False)
        assert ours == pytest.approx(metric.compute().item(), rel=1e-6)


def test_fewer_images_than_features():
    """Real, and exact: moved along one axis, the distance is the square of the step."""
    features = drawn(20, 64)
    step = torch.zeros(64, dtype=torch.float64)
    step[3] = 2.0
    distance = frechet_distance(statistics_of(features), statistics_of(features + step, 3))
    assert distance == pytest.approx(4.0, abs=1e-9)
    other = drawn(30, 64, 1)
    distances = [frechet_distance(statistics_of(features, n), statistics_of(other, n)) for n in (1, 7, 64)]
    assert max(distances) - min(distances) < 1e-6 * min(distances)


@pytest.mark.parametrize(("num_samples", "num_references"), [(50, 40), (5, 40), (4, 6)])
def test_against_roots_of_singular_covariances(num_samples, num_references):
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(num_samples, 8)), 2 * rng.normal(size=(num_references, 8)) + 1
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    values, vectors = np.linalg.eigh(cov_a)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    mixed = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * mixed
    pair = [FeatureStatistics.from_features(torch.from_numpy(part)) for part in (a, b)]
    assert frechet_distance(*pair) == pytest.approx(expected, rel=1e-6)


# ---------------------------------------------------------------------------------------------------- other scores


def test_inception_score_is_torch_fidelitys():
    isc = pytest.importorskip("torch_fidelity.metric_isc", reason="needs torch-fidelity")
    logits = drawn(203, 30, seed=3) * 4
    theirs = isc.isc_features_to_metric(logits, splits=10, shuffle=True, rng_seed=2020)
    mean, deviation = inception_score(logits)
    assert mean == pytest.approx(theirs["inception_score_mean"], rel=1e-12)
    assert deviation == pytest.approx(theirs["inception_score_std"], rel=1e-9)


def test_inception_score_of_certain_and_of_undecided_networks():
    certain = 100.0 * torch.eye(5).repeat(4, 1)
    assert inception_score(certain, 1)[0] == pytest.approx(5)
    assert inception_score(torch.zeros(20, 5), 4) == (pytest.approx(1), pytest.approx(0, abs=1e-12))
    with pytest.raises(ValueError, match="number of images, 20, got 21"):
        inception_score(torch.zeros(20, 5), 21)
    with pytest.raises(ValueError, match="finite"):
        inception_score(torch.full((20, 5), math.inf))


def test_precision_and_recall_are_torch_fidelitys(photographs):
    prc = pytest.importorskip("torch_fidelity.metric_prc", reason="needs torch-fidelity")
    for samples, reference in ((drawn(250, 8), drawn(300, 8, 1)), photographs):
        theirs = prc.prc_features_to_metric(
            samples, reference, prc_neighborhood=3, prc_batch_size=100, save_cpu_ram=False, verbose=False
        )
        precision, recall = precision_recall(samples, reference)
        assert precision == pytest.approx(theirs["precision"], abs=1e-6)
        assert recall == pytest.approx(theirs["recall"], abs=1e-6)
        assert 0 < precision < 1


def test_precision_and_recall_by_hand():
    line = torch.arange(6.0)[:, None]
    far = line + 100
    assert precision_recall(line, line) == (1, 1)
    assert precision_recall(far, line) == (0, 0)
    # From 0 to 5, each point reaches its nearest neighbour, 1 away: 5.9 is covered, 7 is not.
    assert precision_recall(torch.tensor([[5.9], [7.0], [9.0]]), line, 1)[0] == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="6 samples and 3 of the reference, got 3"):
        precision_recall(line, line[:3])
    with pytest.raises(ValueError, match=r"\(6, 1\) and \(6, 2\)"):
        precision_recall(line, torch.zeros(6, 2))


# ----------------------------------------------------------------------------------------------------------- files


def test_files_are_adms(tmp_path):
    pool, spatial = statistics_of(drawn(30, 6)), statistics_of(drawn(30, 4))
    write_statistics(tmp_path / "reference.npz", {"pool": pool, "spatial": spatial})
    with np.load(tmp_path / "reference.npz", allow_pickle=False) as file:
        assert {"mu", "sigma", "mu_s", "sigma_s"} <= set(file)
        assert np.array_equal(file["sigma_s"], spatial.covariance.numpy())
    found = read_statistics(tmp_path / "reference.npz")
    assert found["pool"].count == 30
    assert torch.allclose(found["pool"].covariance, pool.covariance, rtol=1e-14)
    found["pool"].update(drawn(10, 6))
    assert found["pool"].count == 40


def test_a_file_of_adm_has_no_counts_and_is_read(tmp_path):
    moments = statistics_of(drawn(30, 6))
    arrays = {"mu": moments.mean.float().numpy(), "sigma": moments.covariance.float().numpy()}
    # Its reference batches also hold the images.
    np.savez_compressed(tmp_path / "adm.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8), **arrays)
    found = read_statistics(tmp_path / "adm.npz")
    assert set(found) == {"pool"}
    assert found["pool"].count is None
    assert not found["pool"].is_rank_deficient
    assert frechet_distance(found["pool"], moments) < 1e-5
    with pytest.raises(ValueError, match="must know their number of images"):
        found["pool"].update(drawn(3, 6))
    with pytest.raises(ValueError, match="without it"):
        moments.merge(found["pool"])


def test_files_that_are_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "marker"), "w")

    def npz(**arrays):
        file = io.BytesIO()
        np.savez(file, **arrays)
        return file.getvalue()

    def with_header(shape):
        file = io.BytesIO()
        member = io.BytesIO()
        np.lib.format.write_array_header_1_0(member, {"descr": "<f8", "fortran_order": False, "shape": shape})
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("mu.npy", member.getvalue() + bytes(16))
            archive.writestr("sigma.npy", member.getvalue() + bytes(16))
        return file.getvalue()

    good = npz(mu=np.zeros(3), sigma=np.eye(3))
    hostile = {
        "text": b"not an archive",
        "cut": good[: len(good) // 2],
        "no sigma": npz(mu=np.zeros(3)),
        "nothing": npz(arr_0=np.zeros(3)),
        "objects": npz(mu=np.array([Evil()], dtype=object), sigma=np.eye(1)),
        "integers": npz(mu=np.zeros(3, int), sigma=np.eye(3)),
        "shapes": npz(mu=np.zeros(3), sigma=np.eye(4)),
        "flat": npz(mu=np.zeros(3), sigma=np.zeros(9)),
        "asymmetric": npz(mu=np.zeros(2), sigma=np.array([[1.0, 1.0], [0.0, 1.0]])),
        "negative": npz(mu=np.zeros(2), sigma=-np.eye(2)),
        "nan": npz(mu=np.full(2, np.nan), sigma=np.eye(2)),
        "huge": with_header((2**40,)),
        "short": with_header((100,)),
    }
    for name, content in hostile.items():
        path = tmp_path / f"{name}.npz"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}\.npz must") as error:
            read_statistics(path)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "marker").exists()
    with pytest.raises(FileNotFoundError):
        read_statistics(tmp_path / "absent.npz")
    with pytest.raises(ValueError, match="'pool' and at most 'spatial'"):
        write_statistics(tmp_path / "x.npz", {"spatial": statistics_of(drawn(4, 2))})
