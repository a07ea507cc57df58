"""Checksums are read as stores write them, and those of ranges put together give the whole's."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import itertools
import random
import time
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cached.core import checksums
from cached.core.checksums import Checksum, Sums, combine, composite, parse, summary
from tests.reference.crc import crc

CRCS = ["crc64nvme", "crc32c", "crc32"]
# Check values of "123456789": reveng.sourceforge.io, catalogue of parametrised CRC algorithms.
CHECKS = {"crc64nvme": 0xAE8B14860A799888, "crc32c": 0xE3069283, "crc32": 0xCBF43926}


def text(value: bytes) -> str:
    return base64.b64encode(value).decode()


@pytest.mark.parametrize("algorithm", CRCS)
def test_the_polynomials_are_those_of_the_catalogue(algorithm):
    size = checksums.SIZES[algorithm]

    assert composite(algorithm, [b"1234", b"56789"]) == CHECKS[algorithm].to_bytes(size)
    assert crc(algorithm, b"123456789") == CHECKS[algorithm].to_bytes(size)


@pytest.mark.parametrize("algorithm", CRCS)
@given(left=st.binary(max_size=80), right=st.binary(max_size=80))
def test_two_crcs_combine_to_the_one_of_both(algorithm, left, right):
    both = combine(algorithm, crc(algorithm, left), crc(algorithm, right), len(right))

    assert both == crc(algorithm, left + right)


@pytest.mark.parametrize("algorithm", CRCS)
@given(data=st.data())
def test_combining_agrees_with_awscrt(algorithm, data):
    if importlib.util.find_spec("awscrt") is None:
        pytest.skip("NOT TESTED: awscrt is not installed")
    from awscrt import checksums as crt

    values = st.integers(0, 2 ** (8 * checksums.SIZES[algorithm]) - 1)
    left, right, length = data.draw(values), data.draw(values), data.draw(st.integers(1, 2**63 - 1))
    size = checksums.SIZES[algorithm]

    both = combine(algorithm, left.to_bytes(size), right.to_bytes(size), length)

    assert int.from_bytes(both) == getattr(crt, f"combine_{algorithm}")(left, right, length)


@pytest.mark.parametrize("algorithm", CRCS)
def test_the_longest_file_there_can_be_combines(algorithm):
    nothing = bytes(checksums.SIZES[algorithm])
    one = nothing[1:] + b"\1"
    half = 1 << 62
    both = combine(algorithm, combine(algorithm, one, nothing, half), nothing, half - 1)

    assert combine(algorithm, one, nothing, 2 * half - 1) == both


@given(st.binary(min_size=1, max_size=2000), st.integers(0, 2000))
def test_combining_agrees_with_zlib(data, cut):
    left, right = data[:cut], data[cut:]
    both = combine("crc32", zlib.crc32(left).to_bytes(4), zlib.crc32(right).to_bytes(4), len(right))

    assert both == zlib.crc32(data).to_bytes(4)


@pytest.mark.parametrize("algorithm", CRCS)
def test_gigabytes_combine_in_microseconds(algorithm):
    values = [random.Random(at).randbytes(checksums.SIZES[algorithm]) for at in range(20)]
    combine(algorithm, values[0], values[1], 1)
    began_s = time.perf_counter()
    for value in values:
        combine(algorithm, value, values[0], (5 << 40) + 12345)

    assert (time.perf_counter() - began_s) / 20 < 0.01


@pytest.mark.parametrize("algorithm", CRCS)
@given(
    data=st.binary(min_size=1, max_size=60),
    cuts=st.sets(st.integers(1, 59), max_size=8),
    order=st.randoms(),
)
def test_ranges_in_any_order_make_the_whole(algorithm, data, cuts, order):
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    spans = list(itertools.pairwise(edges))
    order.shuffle(spans)
    sums = Sums(algorithm)
    for at, (start, stop) in enumerate(spans):
        assert (sums.whole(len(data)) is None) == (at < len(spans))
        sums.add(start, stop, crc(algorithm, data[start:stop]))

    assert sums.whole(len(data)) == crc(algorithm, data)
    assert sums.whole(len(data) + 1) is None


def test_a_composite_one_is_the_sum_of_the_values():
    values = [hashlib.sha256(part).digest() for part in (b"one", b"two")]

    assert composite("sha256", values) == hashlib.sha256(values[0] + values[1]).digest()
    assert composite("crc32", [b"\1\2\3\4"]) == zlib.crc32(b"\1\2\3\4").to_bytes(4)


def test_values_are_as_long_as_they_are_computed():
    for algorithm, size in checksums.SIZES.items():
        assert len(crc(algorithm, b"") if algorithm in CRCS else composite(algorithm, [])) == size


@pytest.mark.parametrize("algorithm", checksums.SIZES)
def test_a_checksum_is_read(algorithm):
    value = bytes(range(checksums.SIZES[algorithm]))

    assert parse(f"{algorithm}:{text(value)}") == Checksum(algorithm, value)
    assert parse(f"{algorithm}:{text(value)}-7@8388608") == Checksum(algorithm, value, 8388608)


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        "crc32",
        "crc32:",
        "crc32:AAAA",
        "crc32:AAAAAAA",
        "crc32:AAAAAA==-3",
        "crc32:AAAAAA==-3@0",
        "crc32:AAAAAA==-3@",
        "md5:AAAAAAAAAAAAAAAAAAAAAA==",
        "sha256:AAAAAA==",
        "crc32:AAAAAA==\n",
        "crc32:AAAA AA==",
        "crc32:AAAAAA==-\u0663@5",
    ],
)
def test_anything_else_is_refused(wrong):
    with pytest.raises(ValueError):
        parse(wrong)


@given(st.text())
def test_any_text_is_read_or_refused(wild):
    try:
        parse(wild)
    except ValueError:
        return
    assert wild.partition(":")[0] in checksums.SIZES


@pytest.mark.parametrize(
    ("ways", "told"),
    [
        ((), "length"),
        (("", ""), "length"),
        (("sha256", "", "sha256"), "sha256"),
        (("length", "sha256", "crc32"), "crc32 sha256 length"),
        (("digest", ""), "digest"),
    ],
)
def test_what_files_were_checked_by_is_told_once_and_length_last(ways: tuple[str, ...], told: str):
    assert summary(ways) == told
