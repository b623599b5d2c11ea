# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Streams of integers: tables that add up, round trips with both coders, streams of strangers."""

import numpy as np
import pytest

from gpstoken_hf.entropy_coding import (
    CODERS,
    MAX_VALUE,
    NUM_SCALES,
    NUM_SHAPES,
    TOTAL,
    ByteReader,
    StreamReader,
    StreamWriter,
    bit_table,
    constriction_is_available,
    integer_table,
    unzigzag,
    varint,
    zigzag,
)

AVAILABLE = [coder for coder in CODERS if coder == "zlib" or constriction_is_available()]


def test_tables_are_symmetric_and_add_up():
    previous = 0
    for scale in range(NUM_SCALES):
        for shape in range(NUM_SHAPES):
            table = integer_table(scale, shape)
            assert table.sum() == TOTAL
            assert table.min() >= 1
            assert np.array_equal(table[:-1], table[-2::-1])
            middle = len(table) // 2 - 1
            assert (np.diff(table[middle:-1]) <= 0).all()
        assert len(integer_table(scale, 0)) >= previous
        previous = len(integer_table(scale, 0))
    assert bit_table(255).tolist() == [255 * TOTAL // 256, TOTAL // 256]


def test_tables_do_not_change():
    """Files depend on every count: a change here needs a new version of the format."""
    assert integer_table(0, 0).tolist() == [3846, 250046, 16253048, 250046, 3846, 16384]
    tables = [integer_table(scale, shape) for scale in (3, 17, 60) for shape in range(3)]
    assert [int((np.arange(1, len(table) + 1) * table).sum()) for table in tables] == [
        *(67174400, 50380800, 50380800),
        *(151142400, 83968000, 67174400),
        *(34410086400, 3744972800, 1360281600),
    ]


@pytest.mark.parametrize("coder", AVAILABLE)
@pytest.mark.parametrize("width", [0, 0.3, 5, 300, 1e6])
def test_round_trip(coder, width):
    rng = np.random.default_rng(0)
    integers = np.rint(rng.normal(1000, width, 700)).astype(np.int64)
    integers[::100] *= -123456
    bits = (rng.random(1001) < 0.03).astype(np.int64)
    ends = np.array([0, MAX_VALUE, -MAX_VALUE, 1, -1])
    writer = StreamWriter(coder)
    for stream in (integers, np.zeros(0, np.int64), ends):
        writer.integers(stream)
    writer.bits(bits)
    lengths = [("integers", 700), ("integers", 0), ("integers", 5), ("bits", 1001)]
    found = StreamReader(coder, writer.finish(), lengths).read()
    for stream, expected in zip(found, (integers, np.zeros(0), ends, bits)):
        assert np.array_equal(stream, expected)


@pytest.mark.skipif("constriction" not in AVAILABLE, reason="needs constriction")
@pytest.mark.parametrize("draw", ["normal", "laplace"])
@pytest.mark.parametrize("width", [1.0, 10.0])
def test_coding_comes_near_the_entropy(draw, width):
    values = np.rint(getattr(np.random.default_rng(0), draw)(3, width, 20000)).astype(np.int64)
    counts = np.unique(values, return_counts=True)[1]
    entropy = -(counts * np.log2(counts / len(values))).sum() / 8
    writer = StreamWriter("constriction")
    writer.integers(values)
    assert len(writer.finish()) < 1.02 * entropy


def test_numbers():
    values = np.array([0, -1, 1, -2, 2, 2**40, -(2**40)])
    assert zigzag(values).tolist() == [0, 1, 2, 3, 4, 2**41, 2**41 - 1]
    assert np.array_equal(unzigzag(zigzag(values)), values)
    for value in (0, 127, 128, 300, 2**40):
        assert ByteReader(varint(value)).number("a number", 0, 2**40) == value
    with pytest.raises(ValueError, match="a number from 0 to 100, got 300"):
        ByteReader(varint(300)).number("a number", 0, 100)
    with pytest.raises(ValueError, match="got a longer number"):
        ByteReader(b"\xff" * 20).number("a number", 0, 100)
    with pytest.raises(ValueError, match="1 more bytes at byte 2, got 0"):
        ByteReader(b"\xff\xff").number("a number", 0, 100)


@pytest.mark.parametrize("coder", AVAILABLE)
def test_streams_of_strangers_are_refused(coder):
    writer = StreamWriter(coder)
    writer.integers(np.arange(50))
    data = writer.finish()
    rng = np.random.default_rng(0)
    for lengths in ([("integers", 10**9)], [("integers", 49)], [("integers", 50), ("bits", 64)], []):
        with pytest.raises(ValueError, match="got"):
            StreamReader(coder, data, lengths).read()
    for length in range(60):
        for bytes_ in (data[:length], rng.bytes(length)):
            try:
                (stream,) = StreamReader(coder, bytes_, [("integers", 50)]).read()
            except ValueError:
                continue
            assert len(stream) == 50
