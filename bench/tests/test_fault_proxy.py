"""Each fault does what it says, on real connections; what is counted is what was sent."""

from __future__ import annotations

import base64
import hashlib
import socket
import threading
import zlib
from typing import NamedTuple
from xml.etree import ElementTree as ET

import pytest

from bench import fault_plan
from bench.fault_objects import digest
from bench.fault_plan import (
    ClosedIdle,
    Corrupt,
    Drip,
    Latency,
    Replaced,
    Reset,
    Short,
    SlowDown,
    Stall,
    WrongRange,
)
from bench.fault_proxy import SHIFT_BYTES, Counts, Order, Server, Session, Setup
from bench.fault_store import FaultStore
from bench.link import Link

SIZE = 3 * SHIFT_BYTES
CONTENT = hashlib.shake_128(b"one").digest(SIZE)
OTHER = hashlib.shake_128(b"other").digest(SIZE)


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


class Client:
    """One connection; reads a body until it is whole or the connection ends."""

    def __init__(self, endpoint_url: str) -> None:
        port = int(endpoint_url.rpartition(":")[2])
        self.stream = socket.create_connection(("127.0.0.1", port), timeout=10)
        self.data = b""

    def ask(self, method: str = "GET", target: str = "/models/key", **headers: str) -> Reply:
        lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
        self.stream.sendall(f"{method} {target} HTTP/1.1\r\nhost: x\r\n{lines}\r\n".encode())
        while b"\r\n\r\n" not in self.data:
            more = self.stream.recv(1 << 16)
            if not more:
                raise ConnectionError("closed before the head")
            self.data += more
        head, _, self.data = self.data.partition(b"\r\n\r\n")
        first, *fields = head.decode().split("\r\n")
        named = dict(field.split(": ", 1) for field in fields)
        length = 0 if method == "HEAD" else int(named["content-length"])
        while len(self.data) < length:
            more = self.stream.recv(1 << 20)
            if not more:
                break
            self.data += more
        body, self.data = self.data[:length], self.data[length:]
        return Reply(int(first.split()[1]), named, body)

    def part(self, start: int, stop: int, **headers: str) -> Reply:
        return self.ask(range=f"bytes={start}-{stop - 1}", **headers)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("objects")
    (directory / "key").write_bytes(CONTENT)
    (directory / "other").write_bytes(OTHER)
    return directory


@pytest.fixture(scope="module")
def server(files):
    setup = Setup(
        "models",
        {"key": str(files / "key")},
        {"key": str(files / "other")},
        ["crc32", "sha256"],
    )
    server = Server(setup)
    yield server
    server.close()


def _no_sleep(wait_s: float) -> None:
    raise AssertionError(f"nothing should wait {wait_s} s")


@pytest.fixture
def follow(server):
    """Return what puts a plan in force and opens a client."""
    clients = []

    def start(*plan, checksums=(), sleep=_no_sleep):
        server.session = Session(Order(fault_plan.to_data(plan), 1, 0, list(checksums)), sleep)
        clients.append(Client(server.endpoint_url))
        return clients[-1]

    yield start
    for client in clients:
        client.stream.close()


def counted(server: Server) -> Counts:
    return server.session.counts()


def test_a_range_is_that_range_and_says_so(server, follow):
    client = follow()
    reply = client.part(100, 200)
    assert (reply.status, reply.body) == (206, CONTENT[100:200])
    assert reply.headers["content-range"] == f"bytes 100-199/{SIZE}"
    assert client.ask(range=f"bytes={SIZE - 5}-").body == CONTENT[-5:]
    assert client.part(SIZE - 5, SIZE + 5).body == CONTENT[-5:]
    assert counted(server)[:3] == (3, 110, 1)


def test_without_a_range_it_is_the_whole_object(follow):
    reply = follow().ask()
    assert (reply.status, reply.body) == (200, CONTENT)
    assert "content-range" not in reply.headers


def test_a_target_may_be_a_whole_url(follow):
    reply = follow().ask(target="http://127.0.0.1/models/key", range="bytes=0-9")
    assert reply.body == CONTENT[:10]


def test_a_listing_has_key_size_and_etag_and_a_prefix_chooses(server, follow):
    client = follow()
    etag = client.ask("HEAD").headers["etag"]
    space = "{http://s3.amazonaws.com/doc/2006-03-01/}"

    def listed(prefix: str) -> list[tuple[str | None, ...]]:
        page = ET.fromstring(client.ask(target=f"/models?list-type=2&prefix={prefix}").body)
        return [
            tuple(each.findtext(space + name) for name in ("Key", "Size", "ETag"))
            for each in page.iter(f"{space}Contents")
        ]

    assert listed("k") == [("key", str(SIZE), etag)]
    assert listed("x") == []
    assert counted(server) == Counts(heads=1, lists=2)


def test_another_key_is_404_and_another_etag_412(server, follow):
    client = follow()
    assert client.ask(target="/models/no").status == 404
    assert client.ask("HEAD", target="/models/no").status == 404
    assert client.part(0, 10, if_match='"no"').status == 412
    etag = client.ask("HEAD").headers["etag"]
    assert client.part(0, 10, if_match=etag).body == CONTENT[:10]
    assert counted(server).changed == 1


def test_a_checksum_is_told_to_who_asks_if_it_is_offered_and_not_with_a_range(follow):
    client = follow(checksums=["crc32"])
    crc = base64.b64encode(zlib.crc32(CONTENT).to_bytes(4, "big")).decode()
    told = client.ask("HEAD", x_amz_checksum_mode="ENABLED").headers
    assert told["x-amz-checksum-crc32"] == crc
    assert told["x-amz-checksum-type"] == "FULL_OBJECT"
    assert "x-amz-checksum-sha256" not in told
    for headers in (
        client.ask("HEAD").headers,
        client.part(0, 10, x_amz_checksum_mode="ENABLED").headers,
        follow().ask("HEAD", x_amz_checksum_mode="ENABLED").headers,
    ):
        assert not [name for name in headers if name.startswith("x-amz-checksum")]


def test_checksums_are_those_of_the_catalogue_of_crcs(tmp_path):
    path = tmp_path / "check"
    path.write_bytes(b"123456789")
    assert digest("crc32", str(path)).hex() == "cbf43926"
    assert digest("sha256", str(path)) == hashlib.sha256(b"123456789").digest()
    pytest.importorskip("awscrt")
    assert digest("crc32c", str(path)).hex() == "e3069283"
    assert digest("crc64nvme", str(path)).hex() == "ae8b14860a799888"


def test_a_stall_sends_what_comes_before_waits_and_then_sends_the_rest(follow):
    got_first, waits = threading.Event(), []

    def wait_until_the_first_bytes_came(wait_s: float) -> None:
        waits.append(wait_s)
        assert got_first.wait(10)

    client = follow(Stall(3.0, byte=500), sleep=wait_until_the_first_bytes_came)
    client.stream.sendall(b"GET /models/key HTTP/1.1\r\nrange: bytes=0-999\r\n\r\n")
    data = b""
    while not data.endswith(CONTENT[:500]):
        data += client.stream.recv(1 << 16)
    got_first.set()
    while not data.endswith(CONTENT[:1000]):
        data += client.stream.recv(1 << 16)
    assert client.part(0, 1000).body == CONTENT[:1000]
    assert waits == [3.0]


def test_a_drip_is_slow_for_a_while_and_loses_nothing(server, follow):
    sent: list[int] = []

    def look(wait_s: float) -> None:
        sent.append(counted(server).body_bytes)

    client = follow(Drip(2e4, 0.2, byte=500), sleep=look)
    assert client.part(0, SIZE).body == CONTENT
    assert sent == [1500, 2500, 3500, 4500]  # 20 kB/s, every 50 ms
    assert counted(server).body_bytes == SIZE


def test_a_reset_comes_before_the_head_or_in_the_body(server, follow):
    client = follow(Reset(before_head=True, get=0), Reset(byte=500))
    with pytest.raises(ConnectionResetError):
        client.part(0, 1000)
    client = Client(server.endpoint_url)
    with client.stream, pytest.raises(ConnectionResetError):
        client.part(0, SIZE)


def test_a_short_body_ends_early_and_the_connection_with_it(server, follow):
    client = follow(Short(byte=500))
    reply = client.part(100, 1000)
    assert (reply.headers["content-length"], reply.body) == ("900", CONTENT[100:500])
    assert counted(server).body_bytes == 400


@pytest.mark.parametrize("start", [0, 2 * SHIFT_BYTES], ids=["at the start", "at the end"])
@pytest.mark.parametrize("is_told", [True, False], ids=["told", "untold"])
def test_a_wrong_range_is_of_other_bytes_and_may_say_so(follow, start, is_told):
    reply = follow(WrongRange(is_told=is_told, get=0)).part(start, start + 1000)
    first = start + SHIFT_BYTES if start < SHIFT_BYTES else start - SHIFT_BYTES
    assert reply.body == CONTENT[first : first + 1000]
    told = first if is_told else start
    assert reply.headers["content-range"] == f"bytes {told}-{told + 999}/{SIZE}"


def test_a_wrong_range_of_the_whole_object_goes_on_at_its_start(follow):
    reply = follow(WrongRange(is_told=False, get=0)).part(0, SIZE)
    assert reply.body == CONTENT[SHIFT_BYTES:] + CONTENT[:SHIFT_BYTES]


def test_a_corrupt_byte_is_one_and_nothing_else_tells(server, follow):
    client = follow(Corrupt(byte=500), checksums=["sha256"])
    etag = client.ask("HEAD").headers["etag"]
    reply = client.part(0, 1000)
    assert [at for at in range(1000) if reply.body[at] != CONTENT[at]] == [500]
    assert reply.headers["etag"] == etag
    assert counted(server).body_bytes == 1000
    assert client.part(0, 1000).body == CONTENT[:1000]


def test_a_replaced_object_has_another_etag_and_content_from_then_on(server, follow):
    client = follow(Replaced(byte=1500), checksums=["sha256"])
    before = client.part(0, 1000)
    assert client.part(1000, 2000, if_match=before.headers["etag"]).status == 412
    after = client.part(0, 1000)
    assert (before.body, after.body) == (CONTENT[:1000], OTHER[:1000])
    assert after.headers["etag"] != before.headers["etag"]
    assert client.ask("HEAD").headers["etag"] == after.headers["etag"]


def test_a_burst_of_503_says_so_is_counted_and_keeps_the_connection(server, follow):
    client = follow(SlowDown(60.0, get=0, retry_after_s=7))
    reply = client.part(0, 10)
    assert (reply.status, reply.headers["retry-after"]) == (503, "7")
    assert b"<Code>SlowDown</Code>" in reply.body
    assert client.part(0, 10).status == 503
    assert counted(server)[:4] == (2, 0, 1, 2)
    assert "retry-after" not in follow(SlowDown(60.0, get=0)).part(0, 10).headers


def test_latency_is_before_each_reply(follow):
    waits: list[float] = []
    client = follow(Latency(0.05), sleep=waits.append)
    for number in (1, 2):
        client.part(0, 10)
        assert waits == [0.05] * number


def test_an_idle_connection_is_closed_after_a_whole_reply(follow):
    client = follow(ClosedIdle())
    assert client.part(0, 1000).body == CONTENT[:1000]
    assert client.stream.recv(1) == b""


def test_the_most_gets_at_a_time_are_counted(server, follow):
    both = threading.Barrier(2, timeout=10)
    one = follow(Latency(1.0), sleep=lambda _: both.wait())
    other = Client(server.endpoint_url)
    with other.stream:
        for client in (one, other):
            client.stream.sendall(b"GET /models/key HTTP/1.1\r\nrange: bytes=0-9\r\n\r\n")
        for client in (one, other):
            assert client.stream.recv(1)
    assert counted(server).peak_in_flight == 2


def test_a_link_is_as_fast_as_it_says_and_makes_up_for_a_thread_that_wakes_late():
    now_s, late_s = [100.0], 0.001

    def sleep(wait_s: float) -> None:
        now_s[0] += wait_s + late_s

    link = Link(1e6, lambda: now_s[0], sleep)
    for _ in range(100):
        link.take(10_000)
    assert 0.98 <= now_s[0] - 100 <= 1.002


def test_no_link_does_not_wait():
    Link(0, lambda: 0.0, _no_sleep).take(1 << 30)


def test_the_store_is_a_process_that_counts_anew_for_each_plan(files):
    with FaultStore(files / "key", files / "other") as store:
        assert store.follow([Corrupt(byte=3)]) == Counts()
        client = Client(store.store.endpoint_url)
        with client.stream:
            body = client.part(0, 10).body
        assert [at for at in range(10) if body[at] != CONTENT[at]] == [3]
        assert store.follow() == Counts(gets=1, body_bytes=10, peak_in_flight=1)
        assert store.follow() == Counts()
