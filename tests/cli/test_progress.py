"""Progress is one line a model that fits the terminal, or at most one plain line a second."""

from __future__ import annotations

import io
import re

from hypothesis import given
from hypothesis import strategies as st

from cached.cli.progress import Progress, Rate, Sample, bar_line, plain_line
from cached.cli.terminal import Terminal

MIB = 1 << 20
PLAIN = Terminal()
WIDE = Terminal(is_terminal=True, columns=100, has_blocks=True)


def loading(done_bytes: int, name: str = "llm") -> Sample:
    return Sample(name, "loading", done_bytes, 240 * MIB)


def resident(name: str = "llm") -> Sample:
    return Sample(name, "resident", 240 * MIB, 240 * MIB, load_s=0.5)


samples = st.builds(
    Sample,
    name=st.text("abcdef.-", min_size=1, max_size=40),
    state=st.sampled_from(["absent", "resolving", "loading", "publishing", "resident", "failed"]),
    done_bytes=st.integers(0, 1 << 44),
    size_bytes=st.integers(0, 1 << 44),
    load_s=st.none() | st.floats(0.001, 1e5),
)


def test_a_plain_line_tells_state_amount_rate_and_time_left():
    assert plain_line(loading(60 * MIB), 90e6) == (
        "llm: loading, 60 MiB of 240 MiB (25%), 90 MB/s, 2 s left"
    )


def test_a_plain_line_of_a_finished_load_tells_size_and_time():
    assert plain_line(resident(), 0.0) == "llm: resident, 240 MiB in 500 ms, 503 MB/s"


def test_before_the_size_is_known_the_state_is_all():
    assert plain_line(Sample("llm", "resolving", 0, 0), 0.0) == "llm: resolving"
    line = bar_line(Sample("llm", "resolving", 0, 0), 0.0, 3, WIDE)
    assert line == "llm  resolving   " + "░" * 33


def test_long_times_are_told_in_minutes():
    assert plain_line(loading(0), 4e6).endswith("4.0 MB/s, 1:03 min left")


def test_what_does_not_fit_is_left_out_from_the_end():
    whole = bar_line(loading(60 * MIB), 90e6, 3, WIDE).split("  ")
    assert whole[-4:] == [" 25%", "60 MiB of 240 MiB", "90 MB/s", "2 s left"]
    narrow = bar_line(loading(60 * MIB), 90e6, 3, WIDE._replace(columns=75))
    assert narrow.split("  ")[-1] == "60 MiB of 240 MiB"
    assert bar_line(loading(60 * MIB), 90e6, 3, WIDE._replace(columns=20)) == "llm 25% loading"


def test_the_bar_is_as_full_as_the_load():
    bar = re.search("█+░+", bar_line(loading(60 * MIB), 90e6, 3, WIDE))
    assert bar is not None
    assert bar[0].count("█") == len(bar[0]) // 4
    assert "░" not in bar_line(resident(), 0.0, 3, WIDE)


def test_a_terminal_without_block_characters_gets_hashes():
    line = bar_line(loading(120 * MIB), 0.0, 3, WIDE._replace(has_blocks=False))
    assert "####" in line
    assert line.isascii()


@given(samples, st.floats(0, 1e11), st.integers(10, 250), st.integers(0, 40))
def test_a_bar_line_never_reaches_the_edge(
    sample: Sample, rate: float, columns: int, name_width: int
):
    terminal = WIDE._replace(columns=columns)
    assert len(bar_line(sample, rate, name_width, terminal)) < columns


@given(samples, st.floats(0, 1e11))
def test_colours_change_nothing_but_colours(sample: Sample, rate: float):
    coloured = bar_line(sample, rate, 3, WIDE._replace(has_colour=True))
    assert re.sub(r"\x1b\[[0-9]*m", "", coloured) == bar_line(sample, rate, 3, WIDE)


def test_plain_lines_come_at_most_once_a_second():
    stream = io.StringIO()
    progress = Progress(stream, PLAIN)
    for tick in range(21):  # two seconds
        progress.show([loading(tick * MIB)], now_s=100 + tick / 10)
    assert stream.getvalue().count("\n") == 3


def test_the_end_is_told_at_once_and_once():
    stream = io.StringIO()
    progress = Progress(stream, PLAIN)
    progress.show([loading(0), loading(0, "b")], now_s=0.0)
    for tick in range(1, 30):
        progress.show([resident(), loading(tick, "b")], now_s=tick / 10)
    lines = stream.getvalue().splitlines()
    assert [line for line in lines if line.startswith("llm")][1:] == [
        "llm: resident, 240 MiB in 500 ms, 503 MB/s"
    ]
    assert len(lines) == 5  # and b at 0, 1 and 2 s


def test_bars_are_drawn_over_their_predecessors():
    stream = io.StringIO()
    progress = Progress(stream, WIDE)
    progress.show([loading(0), loading(0, "b")], now_s=0.0)
    first = stream.getvalue()
    assert "\x1b[2A" not in first
    progress.show([loading(MIB), loading(MIB, "b")], now_s=0.1)
    assert stream.getvalue().removeprefix(first).startswith("\x1b[2A\x1b[2Kllm")


def test_the_rate_is_of_the_last_seconds():
    rate = Rate()
    assert rate.add(0.0, 0) == 0.0
    assert rate.add(1.0, 100) == 100.0
    found = 0.0
    for second in range(2, 10):
        found = rate.add(float(second), 100 + 10 * (second - 1))
    assert found == 10.0


def test_a_load_that_begins_anew_has_a_new_rate():
    rate = Rate()
    rate.add(0.0, 1000)
    assert rate.add(1.0, 10) == 0.0
    assert rate.add(2.0, 30) == 20.0


def test_headers_that_come_at_once_are_no_pace_of_a_load_that_is_queued():
    rate = Rate()
    for tick in range(50):  # five seconds; 2 MiB in the first half second, then nothing
        assert rate.add(tick / 10, min(tick, 5) * 400_000) == 0.0
    assert rate.add(5.0, 3_000_000) > 0.0


@given(st.lists(st.tuples(st.floats(0, 5), st.integers(0, 1 << 40)), max_size=30))
def test_a_rate_is_never_negative(steps: list[tuple[float, int]]):
    rate = Rate()
    now_s = 0.0
    for step_s, done_bytes in steps:
        now_s += step_s
        assert rate.add(now_s, done_bytes) >= 0
