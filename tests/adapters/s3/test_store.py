"""Models in a bucket are found and fetched as they are, or it is said why not."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest

from cached.adapters.s3 import store
from cached.adapters.s3.store import S3Store
from cached.core.errors import (
    AccessDenied,
    BadReply,
    ObjectChanged,
    ObjectMissing,
    ObjectRefused,
    OutOfSpace,
    StoreError,
    StoreUnavailable,
)
from cached.core.objects import ModelRef
from tests.adapters.s3.composed import ACCOUNT, KEYS, WALL_S, composed, requests, tools
from tests.fakes import tls
from tests.fakes.s3_objects import Generated, stored
from tests.fakes.sinks import MemorySink
from tests.fakes.store_cases import ObjectStoreCases, fetched, part_of
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
from tests.fakes.store_server import StoreServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from cached.core.objects import Manifest, Part
    from tests.fakes.s3_objects import Content, Stored
    from tests.fakes.store_faults import Fault

    Start = Callable[..., "Bucket"]

MODEL = ModelRef("llm", "s3://models/llm/")
DATA = Generated(3_000_000)
FOREVER = float("inf")


class Bucket:
    """A store over a server, and the server's objects."""

    def __init__(self, server: StoreServer, store: S3Store) -> None:
        self.server = server
        self.store = store

    def put(self, key: str, content: bytes) -> None:
        self.server.objects[key] = stored(content)

    def uri(self, key: str) -> str:
        return f"s3://models/{key}"


@pytest.fixture(params=["plain", "tls", "signed"])
def place(request: pytest.FixtureRequest) -> Iterator[Bucket]:
    context = tls.server_context() if request.param == "tls" else None
    account = ACCOUNT if request.param == "signed" else None
    with StoreServer({}, account=account, tls=context, page_keys=2) as server:
        server.wall_s = lambda: WALL_S
        store = composed(server, environ=account and KEYS, ca_bundle=context and tls.AUTHORITY)
        yield Bucket(server, store)
        store.close()


class TestS3Store(ObjectStoreCases):
    pass


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a server and a store: ``faults``, and settings of ``tools``."""
    started: list[Bucket] = []

    def begin(
        objects: Mapping[str, Content | Stored] | None = None,
        faults: Mapping[int | tuple[str, int], Fault] | None = None,
        *,
        stalled: Callable[[Part, int, float], None] | None = None,
        with_tls: bool = False,
        **settings: Any,
    ) -> Bucket:
        context = tls.server_context() if with_tls else None
        server = StoreServer(objects or {"llm/a": DATA}, faults=faults, tls=context)
        server.__enter__()
        made = tools(ca_bundle=tls.AUTHORITY if with_tls else None, **settings)
        started.append(Bucket(server, S3Store(requests(server, made), stalled)))
        return started[-1]

    yield begin
    for bucket in started:
        bucket.store.close()
        bucket.server.__exit__(None, None, None)


def whole(manifest: Manifest) -> Part:
    return part_of(manifest, manifest.objects[0])


def content(part: Part) -> bytes:
    return DATA.content(part.start, part.stop)


# Listings.


def test_all_pages_of_a_listing_are_read(start: Start):
    bucket = start({f"llm/{number:04}": b"x" for number in range(2500)})
    assert len(bucket.store.resolve(MODEL).objects) == 2500
    assert bucket.server.count("LIST") == 3


def test_a_whole_bucket_is_a_prefix(start: Start):
    bucket = start({"a": b"x", "b/c": b"y"})
    for uri in ("s3://models", "s3://models/"):
        found = bucket.store.resolve(ModelRef("llm", uri)).objects
        assert [stored.path for stored in found] == ["a", "b/c"]


def test_the_markers_of_directories_are_left_out(start: Start):
    bucket = start({"llm/": b"", "llm/sub/": b"", "llm/sub/a": b"x"})
    assert [found.path for found in bucket.store.resolve(MODEL).objects] == ["sub/a"]


def test_a_prefix_that_holds_markers_only_is_empty(start: Start):
    bucket = start({"llm/": b"", "llm/sub/": b""})
    with pytest.raises(ObjectMissing, match="no objects are under s3://models/llm/; check"):
        bucket.store.resolve(MODEL)


@pytest.mark.parametrize("key", ["llm/../a", "llm//a", "llm/./a", "llm/a/../../../etc/passwd"])
def test_a_key_that_would_leave_the_directory_is_refused(start: Start, key: str):
    bucket = start({key: b"x", "llm/b": b"y"})
    with pytest.raises(ObjectRefused, match="cannot be a file name"):
        bucket.store.resolve(MODEL)


def test_a_slash_too_many_is_noticed(start: Start):
    bucket = start({"llm/a": b"x"})
    with pytest.raises(ObjectMissing, match="did you mean the object s3://models/llm/a\\?"):
        bucket.store.resolve(ModelRef("llm", "s3://models/llm/a/"))


def test_a_slash_too_few_is_noticed(start: Start):
    bucket = start({"llm/a": b"x"})
    with pytest.raises(ObjectMissing, match="did you mean the objects under s3://models/llm/\\?"):
        bucket.store.resolve(ModelRef("llm", "s3://models/llm"))


def test_a_key_that_is_not_there_is_named(start: Start):
    with pytest.raises(ObjectMissing, match=r"s3://models/none does not exist .*NoSuchKey"):
        start().store.resolve(ModelRef("llm", "s3://models/none"))


@pytest.mark.parametrize("uri", ["s3://nowhere/llm/", "s3://nowhere/llm"])
def test_a_bucket_that_is_not_there_is_named(start: Start, uri: str):
    with pytest.raises(ObjectMissing, match="bucket nowhere does not exist"):
        start().store.resolve(ModelRef("llm", uri))


def test_a_denied_listing_names_what_to_allow(start: Start):
    bucket = start(faults={("LIST", 0): Status(403, code="AccessDenied")})
    with pytest.raises(AccessDenied, match="allow s3:ListBucket on arn:aws:s3:::models for"):
        bucket.store.resolve(MODEL)


def test_a_denied_object_names_what_to_allow(start: Start):
    denied = Status(403, code="AccessDenied")
    bucket = start(faults={("HEAD", 0): denied, 0: denied})
    with pytest.raises(AccessDenied, match="allow s3:GetObject on arn:aws:s3:::models/llm/a for"):
        bucket.store.resolve(ModelRef("llm", "s3://models/llm/a"))


def test_a_reason_that_is_gone_with_the_second_look_is_none(start: Start):
    bucket = start({"empty": b""}, {("HEAD", 0): Status(400)})
    found = bucket.store.resolve(ModelRef("llm", "s3://models/empty")).objects
    assert [stored.size_bytes for stored in found] == [0]


def test_a_listing_that_is_throttled_is_transient(start: Start):
    bucket = start(faults={("LIST", 0): Status(503, {"retry-after": "3"}, "SlowDown")})
    with pytest.raises(StoreUnavailable) as caught:
        bucket.store.resolve(MODEL)
    assert caught.value.retry_after_s == 3


def test_a_listing_that_is_no_listing_is_told(start: Start):
    page = b"HTTP/1.1 200 OK\r\ncontent-length: 13\r\n\r\n<html></html>"
    bucket = start(faults={("LIST", 0): Raw(page)})
    with pytest.raises(BadReply, match="<html> instead of a listing"):
        bucket.store.resolve(MODEL)


def test_a_listing_that_never_ends_is_cut(start: Start):
    bucket = start({"llm/a": b"x", "llm/b": b"y"})
    same = (
        b"<ListBucketResult><IsTruncated>true</IsTruncated>"
        b"<NextContinuationToken>t</NextContinuationToken></ListBucketResult>"
    )
    raw = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(same), same)
    bucket.server.faults = {("LIST", 0): Raw(raw), ("LIST", 1): Raw(raw)}
    with pytest.raises(BadReply, match="again and again"):
        bucket.store.resolve(MODEL)


def page(keys: int, token: str) -> Raw:
    """Return a page of a listing that goes on."""
    one = "<Contents><Key>llm/{}</Key><Size>1</Size><ETag>e</ETag></Contents>"
    body = (
        "<ListBucketResult><IsTruncated>true</IsTruncated>"
        f"<NextContinuationToken>{token}</NextContinuationToken>"
        f"{''.join(one.format(f'{token}-{number}') for number in range(keys))}</ListBucketResult>"
    ).encode()
    return Raw(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))


def test_a_prefix_with_more_objects_than_a_model_has_is_refused(
    start: Start, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(store, "MAX_OBJECTS", 20)
    bucket = start({f"llm/{number:02}": b"x" for number in range(21)})
    with pytest.raises(ObjectRefused, match=r"more than 20 objects are under s3://models/llm/; na"):
        bucket.store.resolve(MODEL)
    del bucket.server.objects["llm/20"]
    assert len(bucket.store.resolve(MODEL).objects) == 20


def test_a_listing_whose_tokens_differ_for_ever_is_cut(
    start: Start, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(store, "MAX_PAGES", 3)
    pages = {("LIST", number): page(0, f"t{number}") for number in range(4)}
    bucket = start(faults=pages)
    with pytest.raises(ObjectRefused, match="does not end after 3 pages; check that the endpoint"):
        bucket.store.resolve(MODEL)
    assert bucket.server.count("LIST") == 3


def test_a_close_cuts_a_listing_that_hangs(start: Start):
    bucket = start(faults={("LIST", 0): Stall(FOREVER, -1)})
    errors: list[StoreError] = []

    def run() -> None:
        try:
            bucket.store.resolve(MODEL)
        except StoreError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert bucket.server.stalled.wait(5)
    bucket.store.close()
    thread.join(2)  # less than the time-out of receiving
    assert not thread.is_alive()
    assert [type(error) for error in errors] == [StoreUnavailable]
    with pytest.raises(StoreUnavailable):
        bucket.store.resolve(MODEL)
    assert bucket.server.count("LIST") == 1


def test_a_listing_that_hangs_is_cut_when_nobody_wants_it_any_more(start: Start):
    bucket = start(faults={("LIST", 0): Stall(FOREVER, -1)})
    with pytest.raises(StoreUnavailable, match="cancelled"):
        bucket.store.resolve(MODEL, bucket.server.stalled.is_set)
    with pytest.raises(StoreUnavailable, match="cancelled"):
        bucket.store.resolve(MODEL, lambda: True)
    assert bucket.server.count("LIST") == 1
    assert len(bucket.store.resolve(MODEL).objects) == 1


DENIED = Status(403, code="AccessDenied")


def test_a_hint_that_cannot_be_checked_is_left_out(start: Start):
    bucket = start({"llm": b"x", "other/a": b"y"}, {("HEAD", 0): DENIED, 0: DENIED})
    with pytest.raises(ObjectMissing, match="check the prefix"):
        bucket.store.resolve(MODEL)
    bucket.server.faults = {("LIST", 1): DENIED}
    with pytest.raises(ObjectMissing, match="a prefix ends with /"):
        bucket.store.resolve(ModelRef("llm", "s3://models/other"))


def test_an_empty_bucket_is_told(start: Start):
    bucket = start()
    bucket.server.objects.clear()
    with pytest.raises(ObjectMissing, match="no objects are under s3://models/; check"):
        bucket.store.resolve(ModelRef("llm", "s3://models/"))


def test_a_head_that_is_throttled_is_transient(start: Start):
    bucket = start(faults={("HEAD", 0): Status(503, {"retry-after": "2"})})
    with pytest.raises(StoreUnavailable) as caught:
        bucket.store.resolve(ModelRef("llm", "s3://models/llm/a"))
    assert caught.value.retry_after_s == 2
    assert bucket.server.gets == 0


def test_a_reason_that_is_mended_for_a_get_is_mended_for_the_head(start: Start):
    bucket = start(faults={("HEAD", 0): Status(403)})
    found = bucket.store.resolve(ModelRef("llm", "s3://models/llm/a")).objects
    assert [stored.size_bytes for stored in found] == [DATA.size_bytes]


def test_a_head_without_a_size_is_told(start: Start):
    bucket = start(faults={("HEAD", 0): Raw(b'HTTP/1.1 200 OK\r\netag: "e"\r\n\r\n')})
    with pytest.raises(BadReply, match="does not tell the size of s3://models/llm/a"):
        bucket.store.resolve(ModelRef("llm", "s3://models/llm/a"))


# What one object's head tells.


def test_version_and_checksum_of_one_object_are_kept(start: Start):
    headers = (("x-amz-version-id", "v1/+"), ("x-amz-checksum-crc64nvme", "AAAA"))
    bucket = start({"a": stored(b"abc")._replace(headers=headers)})
    manifest = bucket.store.resolve(ModelRef("llm", "s3://models/a"))
    assert manifest.objects[0].version_id == "v1/+"
    assert manifest.objects[0].checksum == "crc64nvme:AAAA"
    assert fetched(bucket.store, whole(manifest)) == b"abc"
    assert bucket.server.seen[-1].parameters == {"versionId": "v1/+"}


@pytest.mark.parametrize(
    "headers",
    [
        (("x-amz-checksum-sha256", "AAAA-3"),),
        (("x-amz-checksum-crc32", "AAAA"), ("x-amz-checksum-type", "COMPOSITE")),
        (("x-amz-version-id", "null"),),
    ],
)
def test_what_is_not_of_the_whole_object_is_left_out(
    start: Start, headers: tuple[tuple[str, str], ...]
):
    bucket = start({"a": stored(b"abc")._replace(headers=headers)})
    found = bucket.store.resolve(ModelRef("llm", "s3://models/a")).objects[0]
    assert (found.version_id, found.checksum) == (None, None)


ENCRYPTED = ["key", "key-v2", "iv", "cek-alg", "wrap-alg", "matdesc", "tag-len", "c", "3", "w", "i"]


@pytest.mark.parametrize("name", ENCRYPTED)
def test_an_object_that_its_client_encrypted_is_refused(start: Start, name: str):
    headers = ((f"x-amz-meta-x-amz-{name}", "secret"),)
    bucket = start({"llm/a": stored(b"abc")._replace(headers=headers)})
    with pytest.raises(ObjectRefused, match=f"encrypted by its client .x-amz-{name}"):
        bucket.store.resolve(ModelRef("llm", "s3://models/llm/a"))
    manifest = bucket.store.resolve(MODEL)
    with pytest.raises(ObjectRefused, match="SSE-S3 or SSE-KMS"):
        fetched(bucket.store, whole(manifest))


def test_other_metadata_is_no_reason_to_refuse(start: Start):
    headers = (("x-amz-meta-author", "x"), ("x-amz-server-side-encryption", "aws:kms"))
    bucket = start({"llm/a": stored(b"abc")._replace(headers=headers)})
    assert fetched(bucket.store, whole(bucket.store.resolve(MODEL))) == b"abc"


@pytest.mark.parametrize("etag", ["", 'W/"weak"'])
def test_an_object_without_a_strong_etag_is_refused(start: Start, etag: str):
    bucket = start({"llm/a": stored(b"abc")._replace(etag=etag)})
    for uri in ("s3://models/llm/", "s3://models/llm/a"):
        with pytest.raises(ObjectRefused, match="ETag of s3://models/llm/a"):
            bucket.store.resolve(ModelRef("llm", uri))


# Fetches.


@pytest.mark.parametrize(
    "etag", ["&quot;a&#10;b&quot;", "&quot;a&#9;b&quot;", "&quot;\u533a&quot;"]
)
def test_an_etag_that_no_request_could_repeat_is_a_bad_reply(start: Start, etag: str):
    one = f"<Contents><Key>llm/a</Key><Size>1</Size><ETag>{etag}</ETag></Contents>"
    body = f"<ListBucketResult>{one}</ListBucketResult>".encode()
    raw = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)
    bucket = start(faults={("LIST", 0): Raw(raw)})
    with pytest.raises(BadReply, match="an ETag of s3://models/llm/a that no header can hold"):
        bucket.store.resolve(MODEL)


@pytest.mark.parametrize("with_tls", [False, True], ids=["plain", "tls"])
def test_parts_make_the_whole(start: Start, with_tls: bool):
    bucket = start(with_tls=with_tls)
    manifest = bucket.store.resolve(MODEL)
    step = 700_001
    pieces = []
    for at in range(0, DATA.size_bytes, step):
        part = part_of(manifest, manifest.objects[0], at, min(at + step, DATA.size_bytes))
        pieces.append(fetched(bucket.store, part))
    assert b"".join(pieces) == DATA.content(0, DATA.size_bytes)
    assert bucket.server.connections == 1
    assert bucket.server.served_bytes == DATA.size_bytes


def test_every_get_is_pinned_to_the_etag(start: Start):
    bucket = start()
    manifest = bucket.store.resolve(MODEL)
    fetched(bucket.store, part_of(manifest, manifest.objects[0], 5, 9))
    sent = bucket.server.seen[-1].headers
    assert sent["if-match"] == manifest.objects[0].etag
    assert sent["range"] == "bytes=5-8"


@pytest.mark.fault
@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        (Changed(), ObjectChanged, "was replaced"),
        (OtherEtag(), ObjectChanged, 'has the ETag "another" now'),
        (NoEtag(), ObjectRefused, "no ETag"),
        (OtherEtag('W/"weak"'), ObjectRefused, "only a weak ETag"),
        (IgnoredRange(), BadReply, "200 and all of"),
        (WrongRange(), BadReply, "asked for bytes 10-99/3000000"),
        (WrongTotal(), BadReply, "asked for bytes 10-99/3000000"),
        (WrongLength(), BadReply, "a body of 91 bytes instead of 90"),
        (WrongLength(-1), BadReply, "a body of 89 bytes instead of 90"),
        (Status(404, code="NoSuchKey"), ObjectMissing, "does not exist"),
        (Status(503, code="SlowDown"), StoreUnavailable, "cannot serve"),
        (Status(500), StoreUnavailable, "cannot serve"),
        (Raw(b"\x00\x01\r\n\r\n"), BadReply, "no HTTP/1 status line"),
    ],
    ids=lambda value: repr(value) if isinstance(value, tuple) else "",
)
@pytest.mark.parametrize("with_tls", [False, True], ids=["plain", "tls"])
def test_a_wrong_reply_gives_no_byte(
    start: Start, with_tls: bool, fault: Fault, kind: type[StoreError], words: str
):
    bucket = start(faults={0: fault}, with_tls=with_tls)
    manifest = bucket.store.resolve(MODEL)
    sink = MemorySink(10, 100)
    with pytest.raises(kind, match=words) as caught:
        bucket.store.fetch(part_of(manifest, manifest.objects[0], 10, 100), sink)
    assert type(caught.value) is kind
    assert sink.watermark == 10


@pytest.mark.fault
@pytest.mark.parametrize("with_tls", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("fault", [ShortBody(1_000_003), Reset(1_000_003)], ids=["short", "reset"])
def test_a_body_that_is_cut_goes_on_where_it_ended(start: Start, with_tls: bool, fault: Fault):
    bucket = start(faults={0: fault}, with_tls=with_tls)
    part = whole(bucket.store.resolve(MODEL))
    sink = MemorySink(part.start, part.stop)
    with pytest.raises(StoreError) as caught:
        bucket.store.fetch(part, sink)
    assert caught.value.transient
    cut_at = sink.watermark
    if isinstance(fault, ShortBody):
        assert cut_at == 1_000_003
    bucket.store.fetch(part, sink)
    assert bytes(sink.data) == content(part)
    assert bucket.server.seen[-1].headers["range"] == f"bytes={cut_at}-{part.stop - 1}"


@pytest.mark.fault
def test_a_reply_of_200_will_do_for_a_whole_object(start: Start):
    bucket = start(faults={0: IgnoredRange()})
    part = whole(bucket.store.resolve(MODEL))
    assert fetched(bucket.store, part) == content(part)


@pytest.mark.fault
def test_a_body_that_comes_twice_ends_its_connection(start: Start):
    bucket = start({"llm/a": b"0123456789"}, {0: Duplicate()})
    part = whole(bucket.store.resolve(MODEL))
    assert fetched(bucket.store, part) == b"0123456789"
    assert fetched(bucket.store, part) == b"0123456789"
    assert bucket.server.connections == 2


@pytest.mark.fault
@pytest.mark.parametrize("with_tls", [False, True], ids=["plain", "tls"])
def test_a_body_that_stalls_is_told_of_and_given_up(start: Start, with_tls: bool):
    waits: list[tuple[int, float]] = []
    bucket = start(
        faults={0: Stall(FOREVER, 1000)},
        with_tls=with_tls,
        stalled=lambda part, at, idle_s: waits.append((at, idle_s)),
        receive_timeout_s=0.3,
    )
    part = whole(bucket.store.resolve(MODEL))
    sink = MemorySink(part.start, part.stop)
    with pytest.raises(StoreUnavailable, match="nothing was received"):
        bucket.store.fetch(part, sink)
    assert sink.watermark == 1000
    assert waits
    assert {at for at, _ in waits} <= {0, 1000}


@pytest.mark.fault
@pytest.mark.parametrize("with_tls", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("sent_bytes", [-1, 0, 100_000])
def test_a_running_fetch_is_cancelled_from_outside(start: Start, with_tls: bool, sent_bytes: int):
    bucket = start(faults={0: Stall(FOREVER, sent_bytes)}, with_tls=with_tls)
    part = whole(bucket.store.resolve(MODEL))
    sink = MemorySink(part.start, part.stop)
    errors: list[BaseException] = []

    def run() -> None:
        try:
            bucket.store.fetch(part, sink)
        except StoreError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert bucket.server.stalled.wait(5)
    bucket.store.cancel(part)
    thread.join(5)
    assert not thread.is_alive()
    assert [type(error) for error in errors] == [StoreUnavailable]
    assert bytes(sink.data) == DATA.content(0, sink.watermark)
    assert bucket.server.count("GET") == 1  # not tried again behind our back
    bucket.store.fetch(part, sink)
    assert bytes(sink.data) == content(part)
    assert bucket.server.connections == 2  # the connection that was cut is not used again


class FullSink(MemorySink):
    """Has no room."""

    def accept(self, offset: int, view: memoryview) -> None:
        raise OutOfSpace("no space")

    def accept_from_pipe(self, pipe_fd: int, size_bytes: int) -> None:
        raise OutOfSpace("no space")


@pytest.mark.fault
@pytest.mark.parametrize("with_tls", [False, True], ids=["plain", "tls"])
def test_a_sink_that_is_full_ends_the_connection(start: Start, with_tls: bool):
    bucket = start(with_tls=with_tls)
    part = whole(bucket.store.resolve(MODEL))
    with pytest.raises(OutOfSpace):
        bucket.store.fetch(part, FullSink(part.start, part.stop))
    assert fetched(bucket.store, part) == content(part)
    assert bucket.server.connections == 2


def test_a_part_can_be_fetched_by_two_at_once(start: Start):
    bucket = start(faults={0: Stall(FOREVER, 0)})
    part = whole(bucket.store.resolve(MODEL))
    slow, quick = MemorySink(part.start, part.stop), MemorySink(part.start, part.stop)
    errors: list[StoreError] = []

    def run() -> None:
        try:
            bucket.store.fetch(part, slow)
        except StoreError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert bucket.server.stalled.wait(5)
    bucket.store.fetch(part, quick)
    assert bytes(quick.data) == content(part)
    bucket.store.cancel(part)
    thread.join(5)
    assert len(errors) == 1


@pytest.mark.fault
@pytest.mark.parametrize(
    "fault",
    [Status(503, code="SlowDown"), Reset(), Mute(), ShortBody(9), Stall(FOREVER), WrongLength()],
    ids=lambda fault: type(fault).__name__,
)
def test_no_error_promises_another_try_for_it_may_be_the_last_word(start: Start, fault: Fault):
    bucket = start(faults={0: fault, 1: fault}, receive_timeout_s=0.2)
    with pytest.raises(StoreError) as caught:
        fetched(bucket.store, whole(bucket.store.resolve(MODEL)))
    assert caught.value.transient
    assert caught.value.hint
    assert "tried again" not in str(caught.value)


def test_after_close_nothing_is_kept(start: Start):
    bucket = start()
    bucket.store.resolve(MODEL)
    bucket.store.close()
    bucket.server.wait_for_closed(1)
