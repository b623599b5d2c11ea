# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Values of tokens as integers: exact ones come back bit for bit, quantised ones within half a step."""

import numpy as np
import pytest

from gpstoken_hf.entropy_coding import StreamReader, StreamWriter
from gpstoken_hf.token_values import GAUSSIAN_STEP, add_exact, add_quantised, exact_values, quantised_values


def draw(count, channels, seed=0):
    rng = np.random.default_rng(seed)
    gaussians = np.stack(
        [*rng.uniform(0.01, 0.9, (2, count)), rng.uniform(-0.9, 0.9, count), *rng.uniform(-1.2, 1.2, (2, count))], 1
    )
    texture = rng.normal(rng.normal(0, 3, channels), rng.uniform(0.01, 9, channels), (count, channels))
    return np.concatenate([gaussians, texture], 1)


def test_exact_values_come_back():
    rows = draw(50, 7).astype(np.float32)
    special = [0.0, -0.0, 1e-45, -1e-40, 3.4e38, -3.4e38, 1.0]
    rows[:7, 6] = special
    writer = StreamWriter("zlib")
    rest = add_exact(rows, writer)
    assert len(rest) == 3 * rows.size
    exponents = StreamReader("zlib", writer.finish(), [("integers", 50)] * 12).read()
    found = exact_values(rest, exponents, rows.shape)
    assert found.dtype == np.float32
    assert found.tobytes() == rows.tobytes()


@pytest.mark.parametrize("step", [0.01, 0.3, 2.0])
@pytest.mark.parametrize("with_regions", [True, False])
def test_quantised_values_are_within_half_a_step(step, with_regions):
    rows, channels = draw(80, 6), 6
    initial = draw(80, 1, seed=1)[:, :5] if with_regions else None
    writer = StreamWriter("zlib")
    add_quantised(rows, initial, step, writer)
    lengths = [("integers", n) for n in (channels, channels, 160, 80, 160, 80 * channels)]
    found = quantised_values(StreamReader("zlib", writer.finish(), lengths).read(), initial, step, 80)
    half = 0.5 * step * GAUSSIAN_STEP * (1 + 1e-4)
    sigma, rho = found[:, :2].astype(float), found[:, 2].astype(float)
    assert (np.abs(np.log(sigma) - np.log(rows[:, :2]))[sigma < 0.999] <= half).all()
    assert (np.abs(np.arctanh(rho) - np.arctanh(rows[:, 2])) <= half).all()
    unclipped = (sigma < 0.999).all(1)
    assert (np.abs(found[:, 3:5] - rows[:, 3:5])[unclipped] <= (half * sigma)[unclipped] + 1e-6).all()
    assert (sigma < 1).all()
    deviation = rows[:, 5:].std(0)
    # Scales are rounded to a quarter of an octave.
    assert (np.abs(found[:, 5:] - rows[:, 5:]) <= 0.5 * step * deviation * 2 ** (1 / 8) + 1e-5).all()


def test_constant_channels_and_values_at_the_ends():
    rows = draw(4, 3)
    rows[:, 5:] = [0.0, 7.0, -1e-20]
    rows[0, :5] = [1 - 1e-7, 1e-12, 1 - 1e-7, 1.0, -1.0]
    writer = StreamWriter("zlib")
    add_quantised(rows, None, 0.5, writer)
    lengths = [("integers", n) for n in (3, 3, 8, 4, 8, 12)]
    found = quantised_values(StreamReader("zlib", writer.finish(), lengths).read(), None, 0.5, 4)
    np.testing.assert_allclose(found[:, 6], 7.0, rtol=1e-3)
    assert (np.abs(found[:, [5, 7]]) < 1e-8).all()
    assert (found[:, :2] > 0).all()
    assert (found[:, :2] < 1).all()
    assert (np.abs(found[:, 2]) < 1).all()


def test_what_no_stream_holds_is_refused():
    rows = draw(4, 3)
    rows[0, 0], rows[0, 3] = 1e-30, 1e12
    with pytest.raises(ValueError, match="use a larger step, or lossless"):
        add_quantised(rows, None, 0.5, StreamWriter("zlib"))
