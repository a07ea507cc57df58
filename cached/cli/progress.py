"""How far loads have come: a bar for each on a terminal, else at most one line a second."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from cached.core.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import TextIO

    from cached.cli.terminal import Terminal

PLAIN_EVERY_S = 1.0
WARM_UP_S = 1.0  # the headers come at once, also those of a load that is queued behind another
RATE_WINDOW_S = 3.0  # long enough to be steady, short enough to show a stall
MAX_BAR = 40
MIN_BAR = 8
STATE_WIDTH = len("publishing")  # the longest


class Sample(NamedTuple):
    """How far one load is; from one reply to ``status``.

    Attributes:
        name: of the model.
        state: as the daemon calls it.
        done_bytes: in memory.
        size_bytes: of the version; 0 while it is not known.
        load_s: how long the load took; ``None`` before its end.
    """

    name: str
    state: str
    done_bytes: int
    size_bytes: int
    load_s: float | None = None

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come."""
        return self.state in {"resident", "failed", "absent"}

    @property
    def done_ratio(self) -> float:
        """The share that is there, in [0, 1]."""
        return min(1.0, self.done_bytes / self.size_bytes) if self.size_bytes else 0.0


class Rate:
    """Bytes per second over the last few seconds."""

    __slots__ = ("_began_s", "_seen")

    def __init__(self) -> None:
        self._began_s = 0.0
        self._seen: deque[tuple[float, int]] = deque()

    def add(self, now_s: float, done_bytes: int) -> float:
        """Note how much is there and return the rate since then; 0.0 for the first WARM_UP_S."""
        seen = self._seen
        if seen and done_bytes < seen[-1][1]:
            seen.clear()  # the load began anew
        if not seen:
            self._began_s = now_s
        elif now_s - self._began_s < WARM_UP_S:
            seen.clear()
        seen.append((now_s, done_bytes))
        while len(seen) > 2 and now_s - seen[1][0] >= RATE_WINDOW_S:
            seen.popleft()
        span_s = now_s - seen[0][0]
        return (done_bytes - seen[0][1]) / span_s if span_s > 0 else 0.0


class Progress:
    """Shows samples as they come.

    Args:
        stream: where to; stays open.
        terminal: what it can show.
    """

    __slots__ = ("_drawn", "_last_s", "_over", "_rates", "_stream", "_terminal")

    def __init__(self, stream: TextIO, terminal: Terminal) -> None:
        self._stream = stream
        self._terminal = terminal
        self._rates: dict[str, Rate] = {}
        self._drawn = 0
        self._last_s: float | None = None
        self._over: set[str] = set()

    def show(self, samples: Iterable[Sample], now_s: float) -> None:
        """Draw the bars anew, or print the lines that are due.

        Args:
            samples: the same models every time, in the same order.
            now_s: monotonic seconds.
        """
        rated = [(sample, self._rate(sample, now_s)) for sample in samples]
        if self._terminal.is_terminal:
            self._draw(rated)
        else:
            self._print(rated, now_s)
        self._stream.flush()

    def _rate(self, sample: Sample, now_s: float) -> float:
        return self._rates.setdefault(sample.name, Rate()).add(now_s, sample.done_bytes)

    def _draw(self, rated: list[tuple[Sample, float]]) -> None:
        width = max(len(sample.name) for sample, _ in rated)
        up = f"\x1b[{self._drawn}A" if self._drawn else ""
        lines = [bar_line(sample, rate, width, self._terminal) for sample, rate in rated]
        self._stream.write(up + "".join(f"\x1b[2K{line}\n" for line in lines))
        self._drawn = len(lines)

    def _print(self, rated: list[tuple[Sample, float]], now_s: float) -> None:
        is_due = self._last_s is None or now_s - self._last_s >= PLAIN_EVERY_S
        for sample, rate in rated:
            if sample.name in self._over or not (is_due or sample.is_over):
                continue
            self._stream.write(plain_line(sample, rate) + "\n")
            if sample.is_over:
                self._over.add(sample.name)
        if is_due:
            self._last_s = now_s


def plain_line(sample: Sample, bytes_per_s: float) -> str:
    """Return one line about a load for logs and pipes."""
    if sample.is_over or not sample.size_bytes:
        return ", ".join([f"{sample.name}: {sample.state}", *_ending(sample)])
    amount = f"{format_bytes(sample.done_bytes)} of {format_bytes(sample.size_bytes)}"
    share = f"({sample.done_ratio:.0%})"
    return ", ".join(
        [f"{sample.name}: {sample.state}", f"{amount} {share}", *_pace(sample, bytes_per_s)]
    )


def bar_line(sample: Sample, bytes_per_s: float, name_width: int, terminal: Terminal) -> str:
    """Return one line with a bar; what does not fit into the terminal's width is left out."""
    bar_width = max(MIN_BAR, min(MAX_BAR, terminal.columns // 3))
    name = f"{sample.name:<{name_width}}"
    state = f"{sample.state:<{STATE_WIDTH}}"
    parts = [name, state, _bar(sample, bar_width, terminal), *_tail(sample, bytes_per_s)]
    while len("  ".join(parts)) >= terminal.columns and len(parts) > 3:
        parts.pop()
    if len("  ".join(parts)) >= terminal.columns:
        return f"{sample.name} {sample.done_ratio:.0%} {sample.state}"[: terminal.columns - 1]
    parts[1] = state.replace(sample.state, terminal.state(sample.state))
    return "  ".join(parts)


def _tail(sample: Sample, bytes_per_s: float) -> list[str]:
    if sample.is_over or not sample.size_bytes:
        return _ending(sample)
    amount = f"{format_bytes(sample.done_bytes)} of {format_bytes(sample.size_bytes)}"
    return [f"{sample.done_ratio:4.0%}", amount, *_pace(sample, bytes_per_s)]


def _bar(sample: Sample, width: int, terminal: Terminal) -> str:
    full, empty = ("█", "░") if terminal.has_blocks else ("#", ".")
    filled = width if sample.state == "resident" else int(sample.done_ratio * width)
    return full * filled + empty * (width - filled)


def _pace(sample: Sample, bytes_per_s: float) -> list[str]:
    if bytes_per_s < 1:
        return []
    left_s = max(0, sample.size_bytes - sample.done_bytes) / bytes_per_s
    return [_rate_text(bytes_per_s), f"{_whole_seconds(left_s)} left"]


def _rate_text(bytes_per_s: float) -> str:
    megabytes_per_s = bytes_per_s / 1e6
    return f"{megabytes_per_s:.{0 if megabytes_per_s >= 10 else 1}f} MB/s"


def _whole_seconds(seconds: float) -> str:
    """Return a guess without more digits than it deserves: ``1:05``, ``12 s``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02} min" if minutes else f"{rest} s"


def _ending(sample: Sample) -> list[str]:
    if sample.state != "resident":
        return []
    size = format_bytes(sample.size_bytes)
    if not sample.load_s:
        return [size]
    rate = _rate_text(sample.size_bytes / sample.load_s)
    return [f"{size} in {format_seconds(sample.load_s)}", rate]
