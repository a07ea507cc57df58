"""One thread moves the bodies of many sockets; what happens to one is nothing to the others."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import select
import socket
import threading
from typing import TYPE_CHECKING

import pytest

from cached.adapters.http_reader import mover as mover_module
from cached.adapters.http_reader.mover import Mover, Transfer
from cached.adapters.segments.part_sink import OpenFile, PartSink
from cached.core.errors import OutOfSpace

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cached.ports import Sink

BODIES = [random.Random(seed).randbytes(700_001) for seed in range(6)]
JOIN_S = 10.0


class Way:
    """A connection, a pipe, and a place in a file for one body."""

    def __init__(self, index: int, file: OpenFile) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            self.near = socket.create_connection(listening.getsockname())
            self.far, _ = listening.accept()
        self.near.setblocking(False)
        self.pipe = os.pipe()
        self.body = BODIES[index]
        self.start = index * len(self.body)
        self.sink = PartSink(file, self.start, self.start + len(self.body))
        self.left: list[int] = []

    def transfer(self, sink: Sink | None = None, *, is_copied: bool = False) -> Transfer:
        stop = self.start + len(self.body)
        source = self.near.fileno()
        pipe = None if is_copied else self.pipe
        return Transfer(source, pipe, self.start, stop, sink or self.sink, self.left.append)

    def close(self) -> None:
        self.near.close()
        self.far.close()
        for fd in self.pipe:
            os.close(fd)


@pytest.fixture
def ways() -> Iterator[list[Way]]:
    fd = os.memfd_create("target")
    file = OpenFile(fd, "a", sum(map(len, BODIES)))
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, fd)
        yield [stack.enter_context(contextlib.closing(Way(i, file))) for i in range(len(BODIES))]


@pytest.fixture
def mover() -> Mover:
    return Mover()


def movers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "mover"]


def wait(transfer: Transfer) -> None:
    assert transfer.over.acquire(timeout=JOIN_S)


class Full:
    """A sink without room."""

    sees_bytes = False
    checksum = None

    def __init__(self, watermark: int) -> None:
        self.watermark = watermark

    def accept(self, offset: int, view: memoryview) -> None:
        raise OutOfSpace("full")

    def accept_from_pipe(self, pipe_fd: int, offset: int, size_bytes: int) -> None:
        raise OutOfSpace("full")


@pytest.mark.parametrize("copied", [0, 1, 2], ids=["spliced", "copied", "some of each"])
def test_bodies_of_many_sockets_come_whole_at_the_same_time(mover, ways, copied):
    which = [(i % 2 if copied == 2 else copied) == 1 for i in range(len(ways))]
    transfers = [way.transfer(is_copied=it) for way, it in zip(ways, which, strict=True)]
    senders = [threading.Thread(target=way.far.sendall, args=(way.body,)) for way in ways]
    for transfer in transfers:
        mover.add(transfer)
    for sender in senders:
        sender.start()
    for way, transfer in zip(ways, transfers, strict=True):
        wait(transfer)
        mover.remove(transfer)
        assert transfer.error is None
        assert transfer.at == way.start + len(way.body)
        assert os.pread(way.sink._file.fd, len(way.body), way.start) == way.body
        assert way.left[-1] == 0
        assert way.left == sorted(way.left, reverse=True)
    for sender in senders:
        sender.join()


@pytest.mark.parametrize("is_copied", [False, True], ids=["spliced", "copied"])
def test_a_sink_without_room_ends_its_own_transfer_alone(mover, ways, is_copied):
    full, good = ways[:2]
    failing = full.transfer(Full(full.start), is_copied=is_copied)
    going = good.transfer()
    mover.add(failing)
    mover.add(going)
    full.far.sendall(b"x")
    wait(failing)
    mover.remove(failing)
    assert isinstance(failing.error, OutOfSpace)
    good.far.sendall(good.body[:1000])
    good.far.close()
    wait(going)
    mover.remove(going)
    assert going.at == good.start + 1000
    assert going.error is None


def test_a_socket_that_broke_ends_with_the_error_of_the_system(mover, ways):
    way = ways[0]
    way.far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    transfer = way.transfer()
    mover.add(transfer)
    way.far.close()
    wait(transfer)
    mover.remove(transfer)
    assert isinstance(transfer.error, ConnectionResetError)


def test_what_was_removed_moves_no_more(mover, ways):
    way = ways[0]
    transfer = way.transfer()
    mover.add(transfer)
    mover.remove(transfer)
    way.far.sendall(way.body[:1000])
    transfer.step(memoryview(bytearray(1)))
    assert transfer.at == way.start
    assert way.sink.watermark == way.start
    assert way.near.recv(2000) == way.body[:1000]


def test_a_transfer_goes_on_when_another_attempt_moved_the_watermark(mover, ways):
    way = ways[0]
    transfer = way.transfer()
    way.sink.accept(way.start, memoryview(way.body[:10]))
    mover.add(transfer)
    way.far.sendall(b"X" * 10 + way.body[10:])
    wait(transfer)
    mover.remove(transfer)
    assert (transfer.at, transfer.error) == (way.start + len(way.body), None)
    assert os.pread(way.sink._file.fd, len(way.body), way.start) == way.body


def test_two_transfers_of_one_part_bring_it_once(mover, ways):
    first, second = ways[:2]
    transfers = [
        Transfer(way.near.fileno(), way.pipe, 0, len(first.body), first.sink, way.left.append)
        for way in (first, second)
    ]
    for transfer in transfers:
        mover.add(transfer)
    for at in range(0, len(first.body), 100_000):
        for way in (first, second) if at % 200_000 else (second, first):
            way.far.sendall(first.body[at : at + 100_000])
    for transfer in transfers:
        wait(transfer)
        mover.remove(transfer)
        assert (transfer.at, transfer.error) == (len(first.body), None)
    assert os.pread(first.sink._file.fd, len(first.body), 0) == first.body


def test_the_thread_ends_when_nothing_is_under_way_and_another_follows(mover, ways):
    for way in ways[:2]:
        transfer = way.transfer()
        mover.add(transfer)
        (thread,) = movers()
        way.far.sendall(way.body[:1])
        way.far.shutdown(socket.SHUT_WR)
        wait(transfer)
        mover.remove(transfer)
        thread.join(JOIN_S)
        assert movers() == []
        assert way.sink.watermark == way.start + 1


def test_a_silent_transfer_keeps_the_thread(mover, ways, monkeypatch):
    monkeypatch.setattr(mover_module, "REST_S", 0.001)
    transfer = ways[0].transfer()
    mover.add(transfer)
    (thread,) = movers()
    thread.join(0.05)
    assert thread.is_alive()
    mover.remove(transfer)


def test_without_a_descriptor_nothing_is_started_and_the_next_one_is(mover, ways, monkeypatch):
    def refuse() -> select.epoll:
        raise OSError(errno.EMFILE, "Too many open files")

    transfer = ways[0].transfer()
    with monkeypatch.context() as patched:
        patched.setattr(select, "epoll", refuse)
        with pytest.raises(OSError, match="Too many"):
            mover.add(transfer)
    assert movers() == []
    mover.add(transfer)
    ways[0].far.sendall(ways[0].body[:10])
    ways[0].far.close()
    wait(transfer)
    mover.remove(transfer)
    assert transfer.at == ways[0].start + 10


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_dies_ends_all_that_wait_for_it(mover, ways, monkeypatch):
    transfer = ways[0].transfer()
    mover.add(transfer)
    (thread,) = movers()

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Transfer, "step", fail)
    ways[0].far.sendall(b"x")
    wait(transfer)
    thread.join(JOIN_S)
    mover.remove(transfer)
    assert isinstance(transfer.error, ZeroDivisionError)
    monkeypatch.undo()
    again = ways[1].transfer()
    mover.add(again)
    ways[1].far.close()
    wait(again)
    mover.remove(again)
