"""What a store answers wrongly becomes a text that names it, or is mended; nothing wrong is served.

The store is a real server on loopback whose faults are data (tests/fakes/store_server.py).
"""

from __future__ import annotations

import contextlib
import math
import time
from typing import TYPE_CHECKING

import pytest

import cached
from tests.e2e.conftest import aws
from tests.e2e.served import MIB, run
from tests.e2e.test_bad_input import assert_serves, assert_told, refusal
from tests.fakes.s3_objects import Account, Generated, Stored, stored
from tests.fakes.store_faults import (
    Changed,
    Duplicate,
    IgnoredRange,
    Mute,
    NoEtag,
    OtherEtag,
    Raw,
    Reset,
    ShortBody,
    Stall,
    Status,
    WrongLength,
    WrongRange,
    WrongTotal,
)

if TYPE_CHECKING:
    from pathlib import Path

    from tests.e2e.conftest import Daemons, Stores
    from tests.e2e.served import Served
    from tests.fakes.store_faults import Fault
    from tests.fakes.store_server import StoreServer

KEY = "llm/weights.bin"
URI = "s3://models/llm/"
CONTENT = Generated(20 * MIB + 12345)
ACCOUNT = Account("id", "key", "eu-central-1")
KMS_KEY = "arn:aws:kms:eu-central-1:111122223333:key/1234abcd"


def start(daemon: Daemons, server: StoreServer, tiny: Path, **more: str) -> Served:
    models = {"good": f"file://{tiny}/", "bad": URI}
    return daemon(models, more={**aws(server), "AWS_REGION": "eu-central-1", **more})


REFUSALS: dict[str, tuple[dict[int | tuple[str, int], Fault], tuple[str, ...]]] = {
    "a denied listing": (
        {("LIST", k): Status(403, code="AccessDenied") for k in range(20)},
        ("s3:ListBucket", "models"),
    ),
    "a denied object": (
        {k: Status(403, code="AccessDenied") for k in range(200)},
        ("s3:GetObject", "models"),
    ),
    "a denied key of KMS": (
        {
            k: Status(
                403,
                code="AccessDenied",
                message=f"User is not authorized to perform: kms:Decrypt on resource: {KMS_KEY}",
            )
            for k in range(200)
        },
        ("kms:Decrypt", KMS_KEY),
    ),
    "no ETag": ({k: NoEtag() for k in range(200)}, ("etag", "weights.bin")),
    "another range": ({k: WrongRange() for k in range(200)}, ("range",)),
    "another total": ({k: WrongTotal() for k in range(200)}, ("weights.bin",)),
    "another length": ({k: WrongLength() for k in range(200)}, ("1048577 bytes",)),
    "the whole object": ({k: IgnoredRange() for k in range(200)}, ("200", "weights.bin", "range")),
    "another ETag": ({k: OtherEtag() for k in range(200)}, ("weights.bin",)),
    "no HTTP": ({k: Raw(b"SSH-2.0-OpenSSH_9.6\r\n\r\n") for k in range(200)}, ("http",)),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", REFUSALS)
def test_what_a_store_refuses_or_gets_wrong_is_told(
    daemon: Daemons, store: Stores, tiny: Path, kind: str
):
    faults, words = REFUSALS[kind]
    server = store({KEY: CONTENT}, faults=faults)
    served = start(daemon, server, tiny, CACHED_MAX_ATTEMPTS="2")
    assert_told(refusal(served), *words)
    assert_serves(served, tiny)


MENDED: dict[str, Fault] = {
    "503": Status(503, code="SlowDown"),
    "500": Status(500, code="InternalError"),
    "429 that says when": Status(429, headers={"retry-after": "0"}),
    "a short body": ShortBody(100_000),
    "a reset in the body": Reset(100_000),
    "a reset before the head": Reset(),
    "no reply": Mute(),
    "a body twice": Duplicate(),
    "a range once wrong": WrongRange(),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", MENDED)
def test_what_goes_wrong_once_is_mended(daemon: Daemons, store: Stores, tiny: Path, kind: str):
    server = store({KEY: CONTENT}, faults={1: MENDED[kind], 3: MENDED[kind]})
    served = start(daemon, server, tiny)
    with cached.open("bad", timeout_s=30) as model:
        assert bytes(model.file("weights.bin")) == CONTENT.content(0, CONTENT.size_bytes)
    assert_serves(served, tiny)


@pytest.mark.slow
def test_a_stalled_body_is_cut_and_resumed_where_it_stopped(
    daemon: Daemons, store: Stores, tiny: Path
):
    """Both GETs of a part stall, the first and the one that was sent after 0.15 s."""
    stalled = dict.fromkeys(range(1, 12), Stall(math.inf, 100_000))
    server = store({KEY: CONTENT}, faults=stalled)
    served = start(daemon, server, tiny, CACHED_RECEIVE_TIMEOUT="300ms")
    with cached.open("bad", timeout_s=30) as model:
        assert bytes(model.file("weights.bin")) == CONTENT.content(0, CONTENT.size_bytes)
    assert served.metric("cached_fetch_bytes_total") == CONTENT.size_bytes
    again = served.metric("cached_retries_total") + served.metric("cached_hedges_total")
    assert again >= 1
    assert_serves(served, tiny)


def eventually_read(timeout_s: float) -> bytes:
    """Return the file as a worker reads it that opens the model again when it is told ``Stale``."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        with contextlib.suppress(cached.Stale), cached.open("bad", timeout_s=timeout_s) as model:
            return bytes(model.file("weights.bin"))
    pytest.fail(f"stale for {timeout_s} s")


@pytest.mark.slow
def test_an_object_that_is_replaced_in_mid_load_is_loaded_anew_and_never_mixed(
    daemon: Daemons, store: Stores, tiny: Path
):
    server = store({KEY: CONTENT, "llm/a.txt": b"a"}, faults={3: Changed()})
    served = start(daemon, server, tiny)
    read = eventually_read(30)
    new, old = server.objects[KEY], CONTENT.content(0, CONTENT.size_bytes)
    assert new.content != old
    if read == old:  # a second GET was sent for the one that met the change, and was before it
        assert served.metric("cached_hedges_total") >= 1
        return
    assert read == new.content
    etags = {
        asked.headers["if-match"]
        for asked in server.seen
        if asked.method == "GET" and asked.path.endswith("weights.bin")
    }
    assert etags == {stored(CONTENT).etag, new.etag}  # bytes of both were asked for
    assert_serves(served, tiny)


@pytest.mark.slow
def test_an_object_that_its_client_encrypted_is_refused(daemon: Daemons, store: Stores, tiny: Path):
    headers = (("x-amz-meta-x-amz-key-v2", "AAAA"), ("x-amz-meta-x-amz-matdesc", "{}"))
    server = store({KEY: Stored(CONTENT, '"etag"', headers)})
    served = start(daemon, server, tiny)
    assert_told(refusal(served), "encrypt", "weights.bin")
    assert_serves(served, tiny)


@pytest.mark.slow
def test_a_wrong_region_is_followed(daemon: Daemons, store: Stores, tiny: Path):
    server = store({KEY: b"bytes"}, account=ACCOUNT)
    served = start(daemon, server, tiny, AWS_REGION="us-east-1")
    with cached.open("bad", timeout_s=15) as model:
        assert bytes(model.file("weights.bin")) == b"bytes"
    assert_serves(served, tiny)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("account", "words"),
    [
        (ACCOUNT._replace(expired=frozenset({"id"})), ("expired",)),
        (ACCOUNT._replace(access_key="other"), ("key",)),
        (ACCOUNT._replace(secret_key="other"), ("signature",)),
    ],
    ids=["expired token", "unknown key", "wrong secret"],
)
def test_credentials_that_the_store_does_not_take_are_told(
    daemon: Daemons, store: Stores, tiny: Path, account: Account, words: tuple[str, ...]
):
    served = start(daemon, store({KEY: b"bytes"}, account=account), tiny)
    assert_told(refusal(served), *words)
    assert_serves(served, tiny)


@pytest.mark.slow
def test_a_clock_that_is_wrong_is_corrected_by_the_stores(
    daemon: Daemons, store: Stores, tiny: Path
):
    server = store({KEY: b"bytes"}, account=ACCOUNT)
    server.wall_s = lambda: time.time() + 7200
    served = start(daemon, server, tiny)
    with cached.open("bad", timeout_s=15) as model:
        assert bytes(model.file("weights.bin")) == b"bytes"
    assert any("clock" in record["event"] for record in served.records())
    assert_serves(served, tiny)


@pytest.mark.slow
@pytest.mark.parametrize(
    "key", ["../up.bin", "a/../../up.bin", "a//b.bin", "./here.bin", "a\x00b.bin", "/root.bin"]
)
def test_a_key_that_would_leave_the_directory_is_refused(
    daemon: Daemons, store: Stores, tiny: Path, key: str
):
    served = start(daemon, store({f"llm/{key}": b"bytes", "llm/ok": b"ok"}), tiny)
    assert_told(refusal(served), "key")
    assert_serves(served, tiny)


@pytest.mark.slow
def test_keys_with_spaces_plus_signs_and_unicode_are_laid_out(
    daemon: Daemons, store: Stores, tiny: Path
):
    names = ("a b.bin", "a+b.bin", "größe/大.bin", "100%.bin", "a&b=c?.bin", "~tilde'(1)*.bin")
    account = ACCOUNT  # so that what is quoted wrongly is refused
    objects = {f"llm/{name}": name.encode() for name in names}
    served = start(daemon, store(objects, account=account), tiny)
    with cached.open("bad", timeout_s=15) as model:
        assert {name: bytes(model.file(name)) for name in names} == {
            name: name.encode() for name in names
        }
    assert_serves(served, tiny)


def test_plain_http_to_another_machine_is_refused_at_start():
    ended = run("serve", f"--model=llm={URI}", "--endpoint-url=http://192.0.2.1:9000")
    assert ended.returncode == 2, ended
    assert_told(ended.stderr, "192.0.2.1", "--allow-insecure-endpoint")
