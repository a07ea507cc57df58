"""Whatever a peer sends, the daemon stays up, serves others, and answers by the protocol.

Conversations that are valid are spoilt at random: members of requests, bytes of frames, where they
end. After each a worker that waits beside it asks for something, and gets it.
"""

from __future__ import annotations

import contextlib
import random
import socket
from typing import TYPE_CHECKING, Any

import pytest

import cached
from cached.core import errors
from cached.core.wire import FrameBuffer, encode
from tests.fakes.hosted_daemon import HostedDaemon, config_of
from tests.fakes.local_daemon import open_descriptors, weights

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SEEDS_PER_SHARD = 1500
SHARDS = 4
CODES = {
    *("bad_request", "checksum_mismatch", "daemon_unavailable", "load_failed", "model_unknown"),
    *("not_permitted", "out_of_space", "over_budget", "protocol_mismatch", "stale"),
    *("tensor_unknown", "timed_out", "version_unknown"),
}
"""As docs/wire.md lists them."""
REQUESTS: tuple[dict[str, Any], ...] = (
    {"op": "hello", "protocol": [1, 1], "client": "fuzz"},
    {"op": "open", "model": "m", "tensors": ["a"], "until": "ready", "version": "x"},
    {"op": "open", "model": "m", "until": "header"},
    {"op": "descriptors", "files": [0, 1]},
    {"op": "wait", "ranges": [[0, 0, 100], [1, 0, 2]]},
    {"op": "wait", "ranges": "all"},
    {"op": "arrivals", "seen": 0},
    {"op": "check"},
    {"op": "cancel", "request": 3},
    {"op": "status", "model": "m"},
    {"op": "status"},
    {"op": "prefetch", "model": "m"},
    {"op": "refresh", "model": "m", "version": "y"},
    {"op": "refresh", "model": "m"},
    {"op": "evict", "model": "m"},
    {"op": "purge"},
)
LAST_ID = 999
LAST = encode({"id": LAST_ID, "op": "status"})
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 1 << 31, 1 << 53, 1 << 63, 1 << 64, -(1 << 64)),
    *(0.5, 1e300, "", "m", "a", "all", "ready", "\0", "\ud800", "é" * 300, "x" * 5000),
    *([], {}, [[]], [[0]], [[0, 1]], [[0, 5, 1]], [[9, 0, 1]], [[0, 0, 1 << 60]], {"a": {}}),
    *([1, 1], [2, 0], [1], ["m"], ["a", "a"], [0] * 200, [[0, 0, 1]] * 9000, [[[[[[]]]]]]),
)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[HostedDaemon]:
    directory = tmp_path / "m"
    directory.mkdir()
    (directory / "m.safetensors").write_bytes(weights(("a", "U8", [4], b"abcd")))
    (directory / "config.json").write_bytes(b"{}")
    flags: dict[str, object] = {
        "model": [f"m=file://{directory}/"],
        "socket": str(tmp_path / "s"),
        "segment_root": str(tmp_path / "root"),
        "segments": "auto",
    }
    with HostedDaemon(config_of(flags, drain_timeout_s=0.1)) as daemon:
        yield daemon


def spoilt(rng: random.Random, request: dict[str, Any]) -> bytes:
    """Return a request as a frame, maybe spoilt."""
    told = {"id": rng.randrange(1, 30), **request}
    kind = rng.random()
    if kind < 0.5:
        for _ in range(rng.randrange(1, 3)):
            told[rng.choice([*request, *request, *request, "id", "more"])] = rng.choice(ODD)
    elif kind < 0.6:
        del told[rng.choice([*request, *request, "id"])]
    frame = bytearray(encode(told))
    if kind > 0.96:
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(frame))
            frame[at : at + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
    return bytes(frame)


def conversation(rng: random.Random) -> bytes:
    if rng.random() < 0.05:
        return rng.randbytes(rng.randrange(1, 3000))
    requests = [rng.choice(REQUESTS) for _ in range(rng.randrange(1, 12))]
    greeting = encode({"id": 0, **REQUESTS[0]}) if rng.random() < 0.9 else b""
    data = greeting + b"".join(spoilt(rng, request) for request in requests)
    return data[: rng.randrange(1, len(data) + 1)] if rng.random() < 0.2 else data


def talk(address: str, rng: random.Random) -> int:
    """Have a conversation in pieces; check what comes back, and return how many replies."""
    data = conversation(rng) + LAST
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(5)
        sock.connect(address)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while data:
                size = rng.choice((1, 5, 100, len(data)))
                sock.sendall(data[:size])
                data = data[size:]
        if rng.random() < 0.05:
            return 0  # without a word
        sock.settimeout(0.02)  # the last one may lie in a frame that has not ended
        return heard(sock)


def heard(sock: socket.socket) -> int:
    """Read until the last reply, or the end; return how many came."""
    frames: FrameBuffer = FrameBuffer(64 << 20)
    count = 0
    with contextlib.suppress(ConnectionResetError, TimeoutError):
        while came := sock.recv(1 << 16):
            frames.feed(came)
            while (frame := frames.next_frame()) is not None:
                count += 1
                error: Any = frame.get("error")
                assert "id" in frame
                assert error is None or error["code"] in CODES, frame
                assert error is None or "unexpected" not in error["message"], frame
                if frame["id"] == LAST_ID:
                    return count
    return count


def serves(daemon: HostedDaemon) -> None:
    with cached.open("m", socket=daemon.config.socket, timeout_s=5) as model:
        assert bytes(model["a"]) == b"abcd"
        assert bytes(model.file("config.json")) == b"{}"


def talk_all(daemon: HostedDaemon, seeds: range) -> None:
    serves(daemon)
    before = len(open_descriptors())
    replies = 0
    for seed in seeds:
        try:
            replies += talk(daemon.config.socket, random.Random(seed))
            if not seed % 10:
                serves(daemon)
        except BaseException as error:
            error.add_note(f"SEED {seed}")
            raise
    assert replies > len(seeds)
    serves(daemon)
    daemon.ask("purge")
    memory = daemon.memory()
    assert (memory["reserved_bytes"], memory["committed_bytes"]) == (0, 0)
    assert len(open_descriptors()) <= before


def test_some_spoilt_conversations(daemon: HostedDaemon):
    talk_all(daemon, range(-200, 0))


def test_the_codes_are_those_that_errors_have():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    assert {kind.code for kind in kinds if issubclass(kind, errors.CachedError)} > CODES


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.parametrize("shard", range(SHARDS))
def test_whatever_a_peer_sends_others_are_served(daemon: HostedDaemon, shard: int):
    talk_all(daemon, range(shard * SEEDS_PER_SHARD, (shard + 1) * SEEDS_PER_SHARD))
