"""Bad input is answered by a text that says what, why and what to do next; the daemon serves on.

Each case runs as a user meets it: through the command line, against a running daemon that also
has a good model.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pytest

import cached
from bench import gpt2
from tests.e2e.served import MIB, Served, run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from bench.seaweed import Seaweed
    from tests.e2e.conftest import Daemons


def assert_serves(served: Served, tiny: Path) -> None:
    """Check that the good model is served as if nothing had happened."""
    with cached.open("good", timeout_s=15) as model:
        assert model["wte.weight"].tobytes() == gpt2.load_files(tiny)["wte.weight"].tobytes()
    assert served.process.poll() is None


def refusal(served: Served, name: str = "bad") -> str:
    """Return what ``cached prefetch`` says of a model that cannot be loaded."""
    ended = served.run("prefetch", name)
    assert ended.returncode == 1, ended
    assert "Traceback" not in ended.stderr
    return ended.stderr


def assert_told(text: str, *words: str) -> None:
    """Check that a text has all these words, and after a semicolon what to do next."""
    missing = [word for word in words if word.lower() not in text.lower()]
    assert missing == [], text
    assert text.strip().rpartition("; ")[0], f"nothing to do next: {text}"


def safetensors(header: object, data: bytes = b"", *, header_bytes: int | None = None) -> bytes:
    """Return a file with this header, which need not be right."""
    text = header if isinstance(header, bytes) else json.dumps(header, ensure_ascii=False).encode()
    return struct.pack("<Q", len(text) if header_bytes is None else header_bytes) + text + data


def tensor(start: int, stop: int, shape: list[int] | None = None) -> dict[str, object]:
    return {"dtype": "U8", "shape": shape or [stop - start], "data_offsets": [start, stop]}


class Broken(NamedTuple):
    """A file that is no safetensors, and words of its refusal."""

    content: bytes
    words: tuple[str, ...]


BROKEN = {
    "empty": Broken(b"", ("8 bytes", "has 0")),
    "shorter-than-a-length": Broken(b"\x05\x00\x00", ("8 bytes", "has 3")),
    "huge-header": Broken(safetensors(b"{}", header_bytes=1 << 40), ("header",)),
    "header-beyond-the-file": Broken(safetensors(b"{}", header_bytes=1000), ("header",)),
    "not-json": Broken(safetensors(b"not JSON"), ("header",)),
    "truncated": Broken(safetensors({"a": tensor(0, 100)}, bytes(99)), ("end", "file")),
    "overlapping": Broken(
        safetensors({"a": tensor(0, 60), "b": tensor(40, 100)}, bytes(100)), ("overlap", "b")
    ),
    "hole": Broken(
        safetensors({"a": tensor(0, 40), "b": tensor(60, 100)}, bytes(100)), ("hole", "b")
    ),
    "wrong-size": Broken(safetensors({"a": tensor(0, 100, [7])}, bytes(100)), ("a", "7")),
    "twice": Broken(
        safetensors(b'{"a":%s,"a":%s}' % ((json.dumps(tensor(0, 4)).encode(),) * 2), bytes(4)),
        ("a", "twice"),
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_safetensors_file_is_refused(
    daemon: Daemons, tiny: Path, tmp_path: Path, kind: str
):
    (tmp_path / "weights.safetensors").write_bytes(BROKEN[kind].content)
    served = daemon({"good": f"file://{tiny}/", "bad": f"file://{tmp_path}/"})
    assert_told(refusal(served), "weights.safetensors", *BROKEN[kind].words)
    with pytest.raises(cached.LoadFailed):
        cached.open("bad", timeout_s=15)
    assert_serves(served, tiny)


def test_unusual_but_valid_safetensors_are_served(daemon: Daemons, tiny: Path, tmp_path: Path):
    header = {
        "__metadata__": {"format": "pt"},
        "größe 大 🙂": tensor(0, 4),
        "nothing": tensor(4, 4, [0, 3]),
        "../../etc/passwd": tensor(4, 8),
        "scalar": {"dtype": "F32", "shape": [], "data_offsets": [8, 12]},
    }
    data = bytes(range(8)) + np.float32(1.5).tobytes()
    (tmp_path / "m.safetensors").write_bytes(safetensors(header, data))
    served = daemon({"good": f"file://{tiny}/", "odd": f"file://{tmp_path}/"})
    with cached.open("odd", timeout_s=15) as model:
        assert model["größe 大 🙂"].tolist() == [0, 1, 2, 3]
        assert model["nothing"].shape == (0, 3)
        assert model["../../etc/passwd"].tolist() == [4, 5, 6, 7]
        assert model["scalar"][()] == 1.5
    assert_serves(served, tiny)


def test_a_model_that_is_not_there_is_refused(daemon: Daemons, tiny: Path, tmp_path: Path):
    served = daemon(
        {
            "good": f"file://{tiny}/",
            "bad": f"file://{tmp_path}/missing/",
            "empty": f"file://{tmp_path}/",
        }
    )
    assert_told(refusal(served), f"{tmp_path}/missing")
    assert_told(refusal(served, "empty"), str(tmp_path))
    assert_serves(served, tiny)


def test_a_model_over_the_budget_is_refused_with_the_numbers(
    daemon: Daemons, tiny: Path, tmp_path: Path
):
    with (tmp_path / "big.bin").open("wb") as file:
        file.truncate(100 * MIB)
    served = daemon(
        {"good": f"file://{tiny}/", "bad": f"file://{tmp_path}/"}, "--memory-budget=64MiB"
    )
    assert_told(refusal(served), "100", "64", "MiB")
    with pytest.raises(cached.OverBudget):
        cached.open("bad", timeout_s=15)
    assert_serves(served, tiny)


def test_a_name_that_nobody_configured_is_answered_with_those_that_are(daemon: Daemons, tiny: Path):
    served = daemon({"good": f"file://{tiny}/"})
    for command in ("prefetch", "path", "wait", "evict"):
        ended = served.run(command, "goood")
        assert ended.returncode == 1, ended
        assert_told(ended.stderr, "goood", "good")
    with pytest.raises(cached.ModelUnknown, match="good"):
        cached.open("goood", timeout_s=15)
    with cached.open("good", timeout_s=15) as model, pytest.raises(KeyError, match=r"wte\.wei"):
        model["wte.wei"]
    assert_serves(served, tiny)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model=llm"], ("--model", "NAME=URI")),
        (["--model=llm=models/llm"], ("models/llm", "s3://")),
        (["--model=a/b=s3://bucket/k"], ("a/b",)),
        (["--model=llm=https://example.com/llm"], ("https://example.com/llm", "s3://")),
        (["--model=llm=s3://b/k", "--memory-budget=10MiB"], ("memory_budget", "64", "10")),
        (["--model=llm=s3://b/k", "--memory-budget=much"], ("memory_budget", "much")),
        (["--model=llm=s3://b/k", "--memory-bugdet=8GiB"], ("--memory-bugdet", "--memory-budget")),
        (["--model=llm=s3://b/k", f"--socket=/tmp/{'s' * 120}"], ("socket", "107")),
        (["--model=llm=s3://b/k", "--http-port=99999"], ("http_port", "65535")),
        (["--model=llm=s3://b/k", "--config=/nowhere/c.toml"], ("/nowhere/c.toml",)),
        ([], ("no model", "--model")),
    ],
    ids=lambda value: "" if isinstance(value, tuple) else " ".join(value)[:40] or "nothing",
)
def test_a_wrong_argument_is_refused_at_start(arguments: list[str], words: tuple[str, ...]):
    ended = run("serve", *arguments)
    assert ended.returncode == 2, ended
    missing = [word for word in words if word not in ended.stderr]
    assert missing == [], ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('memory_bugdet = "8GiB"', ("memory_bugdet", "memory_budget")),
        ('[models.llm]\nurl = "s3://b/k"', ("url", "uri")),
        ("memory_budget = [", ("cached.toml",)),
    ],
    ids=["unknown key", "unknown key of a model", "no TOML"],
)
def test_a_wrong_file_is_refused_at_start(tmp_path: Path, text: str, words: tuple[str, ...]):
    (tmp_path / "cached.toml").write_text(text)
    ended = run("serve", f"--config={tmp_path}/cached.toml")
    assert ended.returncode == 2, ended
    assert [word for word in words if word not in ended.stderr] == [], ended.stderr


def test_an_unknown_variable_is_refused_at_start():
    ended = run("serve", "--model=llm=s3://b/k", more={"CACHED_MEMORY_BUGDET": "8GiB"})
    assert ended.returncode == 2, ended
    assert "CACHED_MEMORY_BUGDET" in ended.stderr


def test_a_socket_of_a_live_daemon_is_not_taken(daemon: Daemons, tiny: Path, tmp_path: Path):
    served = daemon({"good": f"file://{tiny}/"})
    ended = run(
        "serve",
        f"--model=good=file://{tiny}/",
        f"--socket={served.socket}",
        f"--segment-root={tmp_path}",
        "--http-port=off",
    )
    assert ended.returncode != 0
    assert_told(ended.stderr, str(served.socket))
    assert_serves(served, tiny)


def test_a_socket_that_a_dead_daemon_left_is_replaced(daemon: Daemons, tiny: Path):
    dead = daemon({"good": f"file://{tiny}/"})
    dead.kill()
    assert dead.socket.exists()
    assert_serves(daemon({"good": f"file://{tiny}/"}, at=dead.socket), tiny)


def test_a_port_that_is_taken_is_named(tiny: Path, tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = run(
            "serve",
            f"--model=good=file://{tiny}/",
            f"--socket={tmp_path}/s",
            f"--segment-root={tmp_path}",
            f"--http-port={port}",
        )
    assert ended.returncode != 0
    assert_told(ended.stderr, str(port), "--http-port")
    assert not (tmp_path / "s").exists()


def test_commands_without_a_daemon_say_where_they_looked(tmp_path: Path):
    for command in (["status"], ["prefetch", "llm"], ["path", "llm"], ["evict", "llm"]):
        ended = run(*command, more={"CACHED_SOCKET": f"{tmp_path}/nobody.sock"})
        assert ended.returncode == 3, ended
        assert_told(ended.stderr, f"{tmp_path}/nobody.sock")


GARBAGE = {
    "nothing": b"",
    "half a length": b"\x00\x00",
    "half a frame": struct.pack(">I", 100) + b'{"id": 1',
    "too long": struct.pack(">I", 1 << 31),
    "HTTP": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "no JSON": struct.pack(">I", 4) + b"!!!!",
    "no object": struct.pack(">I", 2) + b"[]",
    "no id": struct.pack(">I", 15) + b'{"op": "hello"}',
    "deep": struct.pack(">I", 100_000) + b"[" * 100_000,
    "no UTF-8": struct.pack(">I", 2) + b"\xff\xfe",
    "random": os.urandom(4096),
}


@pytest.fixture
def talking(daemon: Daemons, tiny: Path) -> Iterator[tuple[Served, socket.socket]]:
    served = daemon({"good": f"file://{tiny}/"})
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(10)
        peer.connect(str(served.socket))
        yield served, peer


@pytest.mark.parametrize("kind", GARBAGE)
def test_garbage_on_the_socket_ends_only_that_connection(
    talking: tuple[Served, socket.socket], tiny: Path, kind: str
):
    served, peer = talking
    peer.sendall(GARBAGE[kind])
    peer.shutdown(socket.SHUT_WR)
    while peer.recv(65536):
        pass
    assert_serves(served, tiny)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("s3://no-such-bucket/llm/", ("no-such-bucket",)),
        ("s3://bad-input/no-such-prefix/", ("bad-input", "no-such-prefix/")),
        ("s3://bad-input/no-such-key.safetensors", ("bad-input", "no-such-key.safetensors")),
        ("s3://bad-input/empty.safetensors", ("empty.safetensors", "has 0")),
    ],
    ids=["bucket", "prefix", "key", "empty file"],
)
def test_what_a_store_does_not_have_is_refused(
    daemon: Daemons, seaweed: Seaweed, tiny: Path, uri: str, words: tuple[str, ...]
):
    client = seaweed.client()
    with contextlib.suppress(client.exceptions.BucketAlreadyOwnedByYou):
        client.create_bucket(Bucket="bad-input")
    client.put_object(Bucket="bad-input", Key="empty.safetensors", Body=b"")
    served = daemon({"good": f"file://{tiny}/", "bad": uri}, more=seaweed.environment())
    assert_told(refusal(served), *words)
    assert_serves(served, tiny)


@pytest.mark.slow
def test_what_the_credentials_do_not_allow_is_refused(
    daemon: Daemons, seaweed: Seaweed, tiny: Path
):
    client = seaweed.client()
    with contextlib.suppress(client.exceptions.BucketAlreadyOwnedByYou):
        client.create_bucket(Bucket="bad-input")
    client.put_object(Bucket="bad-input", Key="secret.bin", Body=b"secret")
    uri = "s3://bad-input/secret.bin"
    stranger = seaweed.stranger_environment()
    for more, words in (
        (stranger, ("403", "bad-input")),
        ({**stranger, "AWS_SECRET_ACCESS_KEY": "wrong"}, ("signature",)),
        ({**stranger, "AWS_ACCESS_KEY_ID": "nobody"}, ("key",)),
        ({"AWS_ENDPOINT_URL": seaweed.endpoint_url, "HOME": "/nonexistent"}, ("credentials",)),
    ):
        served = daemon({"good": f"file://{tiny}/", "bad": uri}, more=more)
        assert_told(refusal(served), *words)
        assert "wrong" not in served.log.read_text()
        assert_serves(served, tiny)
