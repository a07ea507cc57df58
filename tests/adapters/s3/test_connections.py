"""Connections are used again while they are fresh, and never more are open than there may be."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cached.adapters.s3.addresses import Place
from cached.adapters.s3.connections import MAX_IDLE_S, Connections
from cached.core.errors import StoreUnavailable


class Line:
    """A connection that goes nowhere."""

    def __init__(self, peer: str) -> None:
        self.peer = peer
        self.is_open = True
        self.is_reusable = True
        self.is_cancelled = False
        self.is_untouched = False
        self.watching: object = "somebody"

    def is_quiet(self) -> bool:
        return self.is_open

    def watch(self, on_idle: object) -> None:
        self.watching = on_idle

    def cancel(self) -> None: ...

    def close(self) -> None:
        self.is_open = False

    def send(self, request: bytes) -> None: ...

    def head(self, *, has_body: bool = True):
        raise NotImplementedError

    def read(self, most_bytes: int, *, may_cut: bool = False) -> bytes:
        raise NotImplementedError

    def stream(self, start: int, stop: int, sink: object) -> None: ...


class Net:
    """Opens lines; its own clock."""

    def __init__(self, most: int) -> None:
        self.opened: list[Line] = []
        self.at_s = 1000.0
        self.is_down = False
        self.pool = Connections(self.connect, self, most)

    def connect(self, host: str, port: int, *, is_tls: bool) -> Line:
        if self.is_down:
            raise StoreUnavailable("down")
        self.opened.append(Line(f"{host}:{port}"))
        return self.opened[-1]

    def now_s(self) -> float:
        return self.at_s

    def wall_s(self) -> float:
        return 0.0

    @property
    def open(self) -> int:
        return sum(line.is_open for line in self.opened)


def place(host: str = "a") -> Place:
    return Place(is_tls=True, host=host, port=443, authority=host, path="/")


def test_the_connection_used_last_is_used_again():
    net = Net(8)
    lines = [net.pool.take(place())[0] for _ in range(3)]
    for line in lines:
        net.pool.keep(line)
    assert net.pool.take(place()) == (lines[-1], True)
    assert lines[-1].watching is None  # type: ignore[attr-defined]


def test_one_that_is_for_another_host_or_not_usable_is_not_used():
    net = Net(8)
    first, _ = net.pool.take(place("a"))
    net.pool.keep(first)
    assert net.pool.take(place("b")) == (net.opened[1], False)
    net.opened[0].is_open = False  # the store closed it meanwhile
    assert net.pool.take(place("a")) == (net.opened[2], False)
    net.opened[2].is_reusable = False
    net.pool.keep(net.opened[2])
    assert not net.opened[2].is_open


@pytest.mark.parametrize(
    ("idle_s", "is_used_again"), [(MAX_IDLE_S, True), (MAX_IDLE_S + 0.1, False)]
)
def test_one_that_was_idle_for_too_long_is_closed_and_not_used(idle_s: float, is_used_again: bool):
    net = Net(8)
    for host in ("a", "b"):
        net.pool.keep(net.pool.take(place(host))[0])
    net.at_s += idle_s
    assert net.pool.take(place("a"))[1] == is_used_again
    assert net.opened[1].is_open == is_used_again  # of other hosts as well


def test_a_new_one_takes_the_room_of_the_one_that_was_idle_longest():
    net = Net(2)
    for host in ("a", "b"):
        net.pool.keep(net.pool.take(place(host))[0])
    net.pool.take(place("c"))
    assert [line.is_open for line in net.opened] == [False, True, True]


def test_one_that_could_not_be_opened_takes_no_room():
    net = Net(1)
    net.is_down = True
    with pytest.raises(StoreUnavailable):
        net.pool.take(place())
    net.is_down = False
    net.pool.keep(net.pool.take(place())[0])
    assert net.open == 1


def test_after_close_nothing_is_kept():
    net = Net(8)
    first, second = net.pool.take(place())[0], net.pool.take(place())[0]
    net.pool.keep(first)
    net.pool.close()
    net.pool.keep(second)
    assert net.open == 0


class Ceiling(RuleBasedStateMachine):
    """Up to five requests at a time to three hosts; at most five connections."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net(5)
        self.used: list[Line] = []

    @precondition(lambda self: len(self.used) < 5)
    @rule(host=st.sampled_from("abc"), is_down=st.booleans())
    def take(self, host: str, is_down: bool) -> None:
        self.net.is_down = is_down
        try:
            line, _ = self.net.pool.take(place(host))
        except StoreUnavailable:
            return
        assert isinstance(line, Line)
        assert line.is_open
        assert line not in self.used
        assert line.peer == f"{host}:443"
        self.used.append(line)

    @precondition(lambda self: self.used)
    @rule(data=st.data(), is_reusable=st.booleans(), is_dropped=st.booleans())
    def end(self, data: st.DataObject, is_reusable: bool, is_dropped: bool) -> None:
        line = data.draw(st.sampled_from(self.used))
        self.used.remove(line)
        line.is_reusable = is_reusable
        (self.net.pool.drop if is_dropped else self.net.pool.keep)(line)
        assert line.is_open == (is_reusable and not is_dropped)

    @rule(seconds=st.sampled_from([1.0, 15.0, 30.0]))
    def wait(self, seconds: float) -> None:
        self.net.at_s += seconds

    @invariant()
    def at_most_five_are_open(self) -> None:
        assert self.net.open <= 5
        assert all(line.is_open for line in self.used)


TestCeiling = Ceiling.TestCase
