"""A bench's command line: what it takes, and what it says of what it does not take."""

from __future__ import annotations

import pytest

from bench import attach, fetch, options, requirements
from bench.requirements import Need


def test_every_bench_takes_the_same_flags():
    args = options.parser("attach", "").parse_args(["--quick", "--case", "open-*", "--rounds", "7"])
    assert (args.quick, args.case, args.rounds) == (True, "open-*", 7)


def test_rounds_must_be_positive(capsys):
    with pytest.raises(SystemExit):
        options.parser("attach", "").parse_args(["--rounds", "0"])
    assert "must be at least 1, was 0" in capsys.readouterr().err


def test_a_pattern_takes_cases_and_names_them_when_there_is_none():
    cases = list(attach.CASES)
    assert options.chosen(cases, "open-*MiB") == ["open-100MiB", "open-500MiB"]
    with pytest.raises(SystemExit, match="there are: open-100MiB"):
        options.chosen(cases, "close-*")


def test_what_is_missing_is_said_by_name_and_nothing_is_measured(capsys):
    absent = Need("no-such-peer", "no_such_peer")
    with pytest.raises(SystemExit) as stopped:
        requirements.insist([requirements.NUMPY, absent, Need("no-such-program", None)])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "MISSING: no-such-peer, no-such-program " in said
    assert "make bench-setup" in said


def test_a_full_fetch_has_the_sizes_and_threads_of_both_stores():
    assert [case.name for case in fetch.CASES] == [
        f"{store}-{size}-{threads}"
        for store in ("plain", "seaweedfs")
        for size in ("512MiB", "2GiB")
        for threads in (4, 8)
    ]


def test_an_unknown_subject_is_refused():
    with pytest.raises(SystemExit, match="there are: cached, limit"):
        fetch.main(["--subjects", "cached,curl"])


def test_the_rows_of_a_fetch_are_in_the_units_of_their_names():
    samples = [fetch.Sample(wall_s=2.0, cpu_s=1.0, rss_bytes=64 << 20)]
    rows = fetch.rows_of("plain-2GiB-8", "cached", samples, size_bytes=2 << 30)
    figures = {row["metric"]: row["median"] for row in rows}
    assert figures == {"MB_per_s": 1073.7, "cpu_s_per_GiB": 0.5, "rss_MiB": 64.0}
