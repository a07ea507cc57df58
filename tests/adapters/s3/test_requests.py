"""A request reaches the store signed as it is sent; what can be mended is mended, once."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from cached.adapters.credentials import Keys
from cached.adapters.s3.faults import Asked
from cached.adapters.s3.requests import Call, Requests
from cached.core.errors import (
    AccessDenied,
    BadReply,
    CredentialsUnavailable,
    StoreError,
    StoreUnavailable,
)
from tests.adapters.s3.composed import ACCOUNT, KEYS, REGION, WALL_S, Warnings, requests, tools
from tests.fakes import tls
from tests.fakes.store_faults import ClosedIdle, Mute, Raw, Reset, Stall, Status
from tests.fakes.store_server import StoreServer

if TYPE_CHECKING:
    from tests.fakes.store_faults import Fault

GET = Call("GET", Asked("s3:GetObject", "models", "a"), "a")


def server_at(wall_s: float, **settings: object) -> StoreServer:
    """Return a server whose clock says so."""
    made = StoreServer({"a": b"abc"}, **settings)  # type: ignore[arg-type]
    made.wall_s = lambda: wall_s
    return made


def body_of(made: Requests, call: Call = GET) -> bytes:
    connection, _ = made.send(call)
    body = connection.read(1 << 20)
    made.keep(connection)
    return body


@pytest.mark.parametrize(
    "key",
    [
        "a",
        "a b",
        "a+b",
        "a%20b",
        "a//b",
        "../a",
        "/a",
        "./a/../b",
        "ü-日本-🙂",
        "q?x=1&y=2#z",
        "~!$'()*,;=:@[]{}|\\^`\"<>",
    ],
)
def test_what_is_signed_is_what_is_sent(key: str):
    with server_at(WALL_S, account=ACCOUNT) as server:
        server.objects[key] = server.objects["a"]
        made = requests(server, tools(KEYS))
        call = Call("GET", Asked("s3:GetObject", "models", key), key, (("versionId", "a+/ =&"),))
        assert body_of(made, call) == b"abc"
        assert server.count("GET") == 1
        made.close()


def test_all_that_is_sent_for_the_store_is_signed():
    with server_at(WALL_S, account=ACCOUNT) as server:
        made = requests(server, tools(KEYS))
        assert body_of(made, GET._replace(headers=(("range", "bytes=0-1"),))) == b"ab"
        made.close()
    sent = server.seen[0].headers
    listed = sent["authorization"].partition("SignedHeaders=")[2].partition(",")[0].split(";")
    assert set(sent) == {*listed, "authorization"}


def test_a_session_token_is_signed_and_sent():
    account = ACCOUNT._replace(session_token="token/+=")
    with server_at(WALL_S, account=account) as server:
        made = requests(server, tools({**KEYS, "AWS_SESSION_TOKEN": "token/+="}))
        assert body_of(made) == b"abc"
        made.close()


def test_without_credentials_nothing_is_signed():
    with server_at(WALL_S) as server:
        made = requests(server)
        assert body_of(made) == b"abc"
        made.close()
    assert "authorization" not in server.seen[0].headers


def test_the_bucket_in_the_host_name_is_signed_too():
    with server_at(WALL_S, account=ACCOUNT) as server:
        server.endpoint_url = f"http://localhost:{server.port}"
        made_tools = tools(KEYS)
        connect = made_tools.connect
        # Not every resolver knows the names below localhost.
        by_address = made_tools._replace(
            connect=lambda host, port, *, is_tls: connect("127.0.0.1", port, is_tls=is_tls)
        )
        made = requests(server, by_address, style="virtual")
        assert body_of(made) == b"abc"
        made.close()
    assert server.seen[0].headers["host"] == f"models.localhost:{server.port}"
    assert server.seen[0].path == "/a"


def test_a_secret_that_is_wrong_is_told():
    with server_at(WALL_S, account=ACCOUNT) as server:
        made = requests(server, tools({**KEYS, "AWS_SECRET_ACCESS_KEY": "wrong"}))
        with pytest.raises(AccessDenied, match="SignatureDoesNotMatch"):
            made.send(GET)
        made.close()


def test_requests_share_a_connection():
    with server_at(WALL_S) as server:
        made = requests(server)
        for _ in range(3):
            assert body_of(made) == b"abc"
        made.close()
    assert server.connections == 1


def test_a_connection_that_is_in_use_is_not_shared():
    with server_at(WALL_S) as server:
        made = requests(server)
        first, _ = made.send(GET)
        second, _ = made.send(GET)
        assert first.read(9) == second.read(9) == b"abc"
        made.keep(first)
        made.keep(second)
        made.close()
    assert server.connections == 2


def test_a_reply_that_was_not_read_ends_its_connection():
    with server_at(WALL_S) as server:
        made = requests(server)
        connection, _ = made.send(GET)
        made.keep(connection)
        assert body_of(made) == b"abc"
        made.close()
    assert server.connections == 2


def test_a_refusal_that_was_read_keeps_its_connection():
    with server_at(WALL_S, faults={0: Status(403, code="AccessDenied")}) as server:
        made = requests(server)
        with pytest.raises(AccessDenied):
            made.send(GET)
        assert body_of(made) == b"abc"
        made.close()
    assert server.connections == 1


@pytest.mark.fault
def test_a_connection_that_the_store_closed_meanwhile_is_replaced():
    with server_at(WALL_S, faults={0: ClosedIdle()}) as server:
        made = requests(server)
        assert body_of(made) == b"abc"
        server.wait_for_closed(1)
        assert body_of(made) == b"abc"
        made.close()
    assert server.count("GET") == 2


@pytest.mark.fault
@pytest.mark.parametrize("fault", [Mute(), Reset()], ids=["closed", "reset"])
def test_a_kept_connection_that_dies_under_a_request_is_replaced_once(fault: Fault):
    with server_at(WALL_S, faults={1: fault}) as server:
        made = requests(server)
        assert body_of(made) == body_of(made) == b"abc"
        made.close()
    assert server.connections == 2
    assert server.count("GET") == 3


@pytest.mark.fault
@pytest.mark.parametrize("fault", [Mute(), Reset()], ids=["closed", "reset"])
def test_a_new_connection_that_dies_is_an_error(fault: Fault):
    with server_at(WALL_S, faults={0: fault}) as server:
        made = requests(server)
        with pytest.raises(StoreUnavailable):
            made.send(GET)
        made.close()
    assert server.count("GET") == 1


@pytest.mark.fault
def test_a_kept_connection_that_is_silent_is_not_tried_again():
    with server_at(WALL_S, faults={1: Stall(float("inf"), -1)}) as server:
        made = requests(server, tools(receive_timeout_s=0.2))
        assert body_of(made) == b"abc"
        with pytest.raises(StoreUnavailable, match="nothing was received"):
            made.send(GET)
        made.close()
    assert server.count("GET") == 2


@pytest.mark.fault
def test_something_else_than_http_is_told():
    with server_at(WALL_S, faults={0: Raw(b"220 mail.example ESMTP\r\n\r\n")}) as server:
        made = requests(server)
        with pytest.raises(BadReply, match="no HTTP/1 status line"):
            made.send(GET)
        made.close()


@pytest.mark.fault
def test_nobody_listening_is_told():
    with server_at(WALL_S) as server:
        made = requests(server)
    with pytest.raises(StoreUnavailable, match="cannot connect to 127"):
        made.send(GET)


@pytest.mark.parametrize("region", [None, "us-west-2"])
def test_a_wrong_region_is_followed_once_and_remembered(region: str | None):
    with server_at(WALL_S, account=ACCOUNT) as server:
        made = requests(server, tools(KEYS), region=region)
        assert body_of(made) == body_of(made) == b"abc"
        made.close()
    assert [REGION in asked.headers["authorization"] for asked in server.seen] == [
        False,
        True,
        True,
    ]


def test_a_region_that_is_only_in_the_headers_is_followed():
    moved = Status(301, {"x-amz-bucket-region": "ap-south-1"})
    with server_at(WALL_S, faults={0: moved}) as server:
        made = requests(server, tools(KEYS))
        assert body_of(made) == b"abc"
        made.close()
    assert "/ap-south-1/s3/" in server.seen[1].headers["authorization"]


def test_a_region_that_leads_to_another_ends_there():
    moved = {k: Status(301, {"x-amz-bucket-region": f"region-{k}"}) for k in range(3)}
    with server_at(WALL_S, faults=moved) as server:
        made = requests(server, tools(KEYS))
        with pytest.raises(StoreError, match="in region-1, not in region-0"):
            made.send(GET)
        made.close()
    assert server.count("GET") == 2


@pytest.mark.parametrize("ahead_s", [3600.0, -86_400.0])
def test_a_wrong_clock_is_corrected_by_the_stores_and_said_once(ahead_s: float):
    said = Warnings()
    with server_at(WALL_S + ahead_s, account=ACCOUNT) as server:
        made = requests(server, tools(KEYS, warn=said))
        assert body_of(made) == body_of(made) == b"abc"
        made.close()
    assert server.count("GET") == 3
    assert [fields["skew_s"] for _, fields in said] == [ahead_s]


def test_a_clock_that_cannot_be_corrected_is_told():
    skewed = {k: Status(403, code="RequestTimeTooSkewed") for k in range(3)}
    with server_at(WALL_S + 3600, faults=skewed) as server:
        made = requests(server, tools(KEYS))
        with pytest.raises(StoreError, match="set the clock"):
            made.send(GET)
        made.close()
    assert server.count("GET") == 2


def test_credentials_that_expired_are_read_again_once():
    credentials = Renewing(Keys("OLD", "old"), Keys("AKIDTEST", "secret"))
    with server_at(WALL_S, account=ACCOUNT._replace(expired=frozenset({"OLD"}))) as server:
        made = requests(server, tools()._replace(credentials=credentials))
        assert body_of(made) == body_of(made) == b"abc"
        made.close()
    assert credentials.replaced == [Keys("OLD", "old")]
    assert server.count("GET") == 3


class Renewing:
    """Credentials that turn out to have expired."""

    def __init__(self, old: Keys, new: Keys) -> None:
        self._old = old
        self._new = new
        self.replaced: list[Keys] = []

    def keys(self) -> Keys:
        return self._new if self.replaced else self._old

    def replace(self, refused: Keys) -> Keys:
        self.replaced.append(refused)
        return self._new


def test_credentials_that_stay_expired_are_an_error():
    environ = dict(KEYS, AWS_ACCESS_KEY_ID="OLD")
    with server_at(WALL_S, account=ACCOUNT._replace(expired=frozenset({"OLD"}))) as server:
        made = requests(server, tools(environ))
        with pytest.raises(CredentialsUnavailable, match="OLD have expired"):
            made.send(GET)
        made.close()
    assert server.count("GET") == 1


def test_a_region_a_clock_and_credentials_are_mended_in_one_request():
    with server_at(WALL_S + 3600, account=ACCOUNT) as server:
        made = requests(server, tools(KEYS), region="us-west-2")
        assert body_of(made) == b"abc"
        made.close()
    assert server.count("GET") == 3


def test_a_request_over_tls_is_answered():
    with server_at(WALL_S, account=ACCOUNT, tls=tls.server_context()) as server:
        made = requests(server, tools(KEYS, ca_bundle=tls.AUTHORITY))
        assert body_of(made) == body_of(made) == b"abc"
        made.close()
    assert server.connections == 1


def test_a_certificate_that_is_not_trusted_is_told():
    with server_at(WALL_S, tls=tls.server_context()) as server:
        made = requests(server, tools())
        with pytest.raises(StoreError, match="not trusted"):
            made.send(GET)
        made.close()


def test_threads_share_what_was_learnt():
    with server_at(WALL_S, account=ACCOUNT) as server:
        made = requests(server, tools(KEYS), region="us-west-2")
        assert body_of(made) == b"abc"
        bodies: list[bytes] = []
        threads = [threading.Thread(target=lambda: bodies.append(body_of(made))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        made.close()
    assert bodies == [b"abc"] * 8
    assert server.count("GET") == 10
