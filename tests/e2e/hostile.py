"""Peers that mean no good, each a process: ``python -m tests.e2e.hostile KIND SOCKET``.

They go on until their input ends, then print how often they did what they do.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import select
import socket
import struct
import sys
from collections import deque
from typing import TYPE_CHECKING

from cached.core.wire import (
    MAX_DESCRIPTORS,
    MAX_NAMES,
    MAX_NUMBER,
    MAX_RANGES,
    MAX_REPLY_BYTES,
    MAX_REQUEST_BYTES,
    MAX_VALUES,
    FrameBuffer,
    encode,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HELLO = encode({"id": 1, "op": "hello", "protocol": [1, 1], "client": "hostile"})
STATUS = encode({"id": 2, "op": "status"})
OPEN = encode({"id": 3, "op": "open", "model": "good"})
HELD = 60
CROWD = 100
HEAVY = 8
HOARDED = 300
TRICKLES = 700
AHEAD = 16  # requests on a connection: as many as the daemon takes


def is_over() -> bool:
    return bool(select.select([sys.stdin], [], [], 0)[0])


def connected(address: str, *, is_patient: bool = True) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.setblocking(is_patient)
    sock.connect(address)
    sock.settimeout(0.05)
    return sock


def flood(address: str) -> int:
    """Ask and never read, as long as the daemon bears it; then once more."""
    lost = 0
    while not is_over():
        with connected(address) as sock:
            sock.sendall(HELLO + OPEN)
            sock.settimeout(0.5)
            with contextlib.suppress(TimeoutError):
                try:
                    while not is_over():
                        sock.sendall(STATUS * 16)
                except ConnectionError:
                    lost += 1
    return lost


def garbage(rng: random.Random) -> bytes:
    """Return frames that are none, or of what is nobody's business."""
    return rng.choice(
        (
            rng.randbytes(rng.randrange(1, 4000)),
            struct.pack(">I", 0xFFFFFFFF) + b"{",
            struct.pack(">I", 100) + b"{" * 50,
            HELLO + encode({"id": -1, "op": "status"}),
            HELLO + encode({"id": 5, "op": "x" * rng.randrange(9000), "more": [[1]] * 99}),
            HELLO + encode({"id": 6, "op": "wait", "ranges": [[0, 0, 1 << 60]] * 300}),
            HELLO + OPEN + encode({"id": 7, "op": "wait", "ranges": [[1 << 50, 5, 1]] * 300}),
            HELLO + OPEN * 40,
            HELLO + encode({"id": 8, "op": "open", "model": "no such" * 1000}),
        )
    )


def babble(address: str) -> int:
    """Send garbage, go without a word, come again."""
    rng = random.Random(4711)
    count = 0
    while not is_over():
        with contextlib.suppress(OSError), connected(address) as sock:
            sock.sendall(garbage(rng))
            if rng.random() < 0.5:
                sock.recv(1 << 16)
        count += 1
    return count


def hold(address: str) -> int:
    """Open many connections, with a lease or a piece of a frame each, and keep them."""
    held = [connected(address) for _ in range(HELD)]
    for number, sock in enumerate(held):
        sock.sendall(HELLO + (OPEN if number % 2 else OPEN[:-1]))
    sys.stdin.read()
    return sum(bool(sock.recv(1 << 16)) for sock in held)


def crowd(address: str) -> int:
    """Ask on many connections and read what comes, as fast as the daemon answers."""
    socks = [connected(address) for _ in range(CROWD)]
    poll = select.epoll()
    by_fd = {sock.fileno(): sock for sock in socks}
    buffers = {sock.fileno(): FrameBuffer(MAX_REPLY_BYTES) for sock in socks}
    for sock in socks:
        sock.sendall(HELLO + STATUS * (AHEAD - 1))
        poll.register(sock, select.EPOLLIN)
    poll.register(sys.stdin, select.EPOLLIN)
    count = 0
    while True:
        for fd, _ in poll.poll():
            if fd not in by_fd:
                return count
            frames = buffers[fd]
            frames.feed(by_fd[fd].recv(1 << 18))
            answers = sum(1 for _ in iter(frames.next_frame, None))
            by_fd[fd].sendall(STATUS * answers)
            count += answers


def heavy(address: str) -> int:
    """Send what takes longest to be read and answered, on a few connections; read what comes."""
    frames = [
        encode({"id": 4, "op": "status", "more": [[]] * (MAX_VALUES // 2 - 20)}),
        encode(
            {"id": 4, "op": "status", "more": {str(at): 0 for at in range(MAX_VALUES // 2 - 20)}}
        ),
        encode({"id": 4, "op": "status", "more": "\n" * (MAX_REQUEST_BYTES // 2 - 99)}),
        encode({"id": 4, "op": "open", "model": "good", "tensors": ["x::y"] * MAX_NAMES}),
        encode({"id": 4, "op": "wait", "ranges": [[0, at, at + 1] for at in range(MAX_RANGES)]}),
        encode({"id": 4, "op": "wait", "ranges": [[0, 0, MAX_NUMBER]] * MAX_RANGES}),
    ]
    if "ONLY" in os.environ:
        frames = [frames[int(os.environ["ONLY"])]]
    return sum(pestered(address, HEAVY, frames))


def pestered(address: str, count: int, frames: list[bytes]) -> Iterator[int]:
    """Ask on a few connections, each time for something else, and yield answers as they come."""
    socks = [connected(address) for _ in range(count)]
    for sock in socks:
        sock.settimeout(5)
        sock.sendall(HELLO + OPEN)
    for number in itertools.count():
        if is_over():
            return
        for sock in socks:
            sock.sendall(frames[number % len(frames)])
        for sock in socks:
            yield bool(sock.recv(1 << 18))


def hoard(address: str) -> int:
    """Begin long requests on many connections, and never end them."""
    return kept(address, HOARDED, HELLO + struct.pack(">I", MAX_REQUEST_BYTES) + b"x" * (60 << 10))


def grab(address: str) -> int:
    """Have descriptors sent on many connections, and receive none of them."""
    ask = encode({"id": 4, "op": "descriptors", "files": [0] * MAX_DESCRIPTORS})
    return kept(address, CROWD, HELLO + OPEN + ask * 14)


def kept(address: str, count: int, sent: bytes) -> int:
    """Say something on many connections, read nothing; make those anew that are closed."""
    poll = select.epoll()
    socks: dict[int, socket.socket] = {}
    made = 0
    while not is_over():
        with contextlib.suppress(OSError):
            while len(socks) < count:
                sock = connected(address)
                socks[sock.fileno()] = sock
                poll.register(sock, 0)  # its end alone
                made += 1
                sock.sendall(sent)
        for fd, _ in poll.poll(0.01):
            socks.pop(fd).close()
    return made


def trickle(address: str) -> int:
    """Send long requests a byte at a time, on very many connections, and never end one."""
    socks = [connected(address) for _ in range(TRICKLES)]
    for sock in socks:
        sock.setblocking(False)
        sock.sendall(HELLO + struct.pack(">I", MAX_REQUEST_BYTES))
    count = 0
    while not is_over():
        for sock in socks:
            with contextlib.suppress(OSError):
                count += sock.send(b"x")
    return count


def knock(address: str) -> int:
    """Come, say hello, hear the answer, go."""
    count = 0
    while not is_over():
        with contextlib.suppress(OSError), connected(address) as sock:
            sock.sendall(HELLO)
            count += bool(sock.recv(1 << 16))
    return count


def besiege(address: str) -> int:
    """Come again and again on many connections at once, and wait for no answer."""
    socks: deque[socket.socket] = deque()
    count = 0
    while not is_over():
        with contextlib.suppress(OSError):
            socks.append(connected(address, is_patient=False))
            socks[-1].sendall(HELLO)
            count += 1
        if len(socks) > CROWD:
            socks.popleft().close()
    return count


KINDS: dict[str, Callable[[str], int]] = {
    "flood": flood,
    "babble": babble,
    "hold": hold,
    "crowd": crowd,
    "knock": knock,
    "besiege": besiege,
    "heavy": heavy,
    "hoard": hoard,
    "grab": grab,
    "trickle": trickle,
}

if __name__ == "__main__":
    os.nice(19)  # what they do to the daemon counts, not the processor that they take from others
    print("ready", flush=True)
    print(KINDS[sys.argv[1]](sys.argv[2]))
