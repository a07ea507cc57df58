"""Models in a bucket are found and fetched as they are, or it is said why not."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from typing import TYPE_CHECKING, Any

import pytest

from cached.adapters.credentials import Credentials
from cached.adapters.http_reader.dialer import Reply
from cached.adapters.s3 import store
from cached.adapters.s3.customer_key import headers_of
from cached.adapters.s3.store import S3Store
from cached.adapters.segments.part_sink import OpenFile, PartSink
from cached.cancellation import NEVER, Token
from cached.core.errors import (
    AccessDenied,
    BadReply,
    CredentialsUnavailable,
    ObjectChanged,
    ObjectMissing,
    ObjectRefused,
    OutOfSpace,
    StoreBusy,
    StoreError,
    StoreUnavailable,
)
from cached.core.objects import ModelRef, ObjectFacts
from tests.adapters.s3.composed import ACCOUNT, KEYS, WALL_S, Clock, composed, requests, tools
from tests.fakes import tls
from tests.fakes.s3_objects import SENT_KEY_MD5, Generated, stored
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
    from pathlib import Path

    from cached.core.objects import Manifest, Part
    from cached.ports import Sink
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


def cancel_stalled(bucket: Bucket, token: Token) -> None:
    assert bucket.server.stalled.wait(5)
    token.cancel()


def test_a_listing_that_hangs_is_cut_when_nobody_wants_it_any_more(start: Start):
    bucket = start(faults={("LIST", 0): Stall(FOREVER, -1)})
    token, thread = Token(), threading.Thread(target=lambda: cancel_stalled(bucket, token))
    thread.start()
    with pytest.raises(StoreUnavailable, match="cancelled"):
        bucket.store.resolve(MODEL, token)
    thread.join()
    with pytest.raises(StoreUnavailable, match="cancelled"):
        bucket.store.resolve(MODEL, token)
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


def described(bucket: Bucket) -> ObjectFacts:
    manifest = bucket.store.resolve(MODEL)
    return bucket.store.describe(manifest.uri, manifest.objects[0])


def test_what_the_listing_leaves_out_is_asked_for_at_one_version(start: Start):
    headers = (("x-amz-version-id", "v1"), ("x-amz-checksum-crc32", "AAAA"))
    bucket = start({"llm/a": stored(b"abc")._replace(headers=headers)})
    assert described(bucket) == ObjectFacts("crc32:AAAA", "v1")
    sent = bucket.server.seen[-1]
    assert (sent.method, sent.path) == ("HEAD", "/models/llm/a")
    assert sent.headers["if-match"] == bucket.server.objects["llm/a"].etag
    assert sent.headers["x-amz-checksum-mode"] == "ENABLED"
    assert bucket.server.count("HEAD") == 1
    manifest = bucket.store.resolve(ModelRef("llm", "s3://models/llm/a"))
    bucket.store.describe(manifest.uri, manifest.objects[0])
    assert bucket.server.seen[-1].parameters == {"versionId": "v1"}


def test_a_checksum_of_parts_comes_with_their_length(start: Start):
    headers = (("x-amz-checksum-sha256", "AAAA-3"), ("x-amz-version-id", "v1"))
    bucket = start({"llm/a": stored(bytes(20))._replace(headers=headers, part_bytes=8)})
    assert described(bucket).checksum == "sha256:AAAA-3@8"
    first, last = bucket.server.seen[-2:]
    assert (first.method, first.parameters) == ("HEAD", {"partNumber": "1"})
    assert (last.method, last.parameters) == ("HEAD", {"partNumber": "3"})
    assert "if-match" in first.headers
    assert "if-match" in last.headers
    assert bucket.server.count("HEAD") == 3


@pytest.mark.parametrize("parts", [(8, 9, 7), (5, 6, 4), (8, 16)])
def test_a_checksum_of_parts_that_are_not_equally_long_is_none(start: Start, parts):
    """It cannot be computed: a whole object would be taken for a broken one."""
    headers = (("x-amz-checksum-sha256", f"AAAA-{len(parts)}"),)
    content = stored(bytes(sum(parts)))._replace(headers=headers, part_bytes=parts)
    assert described(start({"llm/a": content})).checksum is None


def test_the_parts_are_not_asked_for_where_the_whole_has_a_checksum(start: Start):
    headers = (("x-amz-checksum-sha256", "AAAA-3"), ("x-amz-checksum-sha1", "BBBB"))
    bucket = start({"llm/a": stored(bytes(20))._replace(headers=headers, part_bytes=8)})
    assert described(bucket).checksum == "sha1:BBBB"
    assert bucket.server.count("HEAD") == 1


@pytest.mark.fault
@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (Status(412), ObjectChanged),
        (OtherEtag(), ObjectChanged),
        (NoEtag(), ObjectRefused),
        (Status(503), StoreUnavailable),
    ],
    ids=["412", "another", "none", "503"],
)
def test_a_look_at_another_version_is_refused(start: Start, fault: Fault, kind: type[StoreError]):
    bucket = start(faults={("HEAD", 0): fault})
    with pytest.raises(kind):
        described(bucket)
    assert bucket.server.gets == 0


@pytest.mark.fault
@pytest.mark.parametrize("number", [1, 2])
def test_the_lengths_of_parts_of_another_version_are_refused(start: Start, number: int):
    headers = (("x-amz-checksum-sha256", "AAAA-3"),)
    objects = {"llm/a": stored(bytes(20))._replace(headers=headers, part_bytes=8)}
    bucket = start(objects, faults={("HEAD", number): OtherEtag()})
    with pytest.raises(ObjectChanged):
        described(bucket)


@pytest.mark.fault
def test_a_look_that_is_refused_says_why(start: Start):
    gone = Status(404, code="NoSuchVersion")
    bucket = start(faults={("HEAD", 0): Status(404), 0: gone})
    with pytest.raises(ObjectChanged, match="NoSuchVersion"):
        described(bucket)


@pytest.mark.fault
def test_a_body_of_another_length_or_version_is_not_read(start: Start):
    bucket = start({"llm/a": b"abcdef"})
    manifest = bucket.store.resolve(MODEL)
    etag = manifest.objects[0].etag.encode()
    raw = b"HTTP/1.1 200 OK\r\netag: %s\r\ncontent-length: 3\r\n\r\nabc" % etag
    bucket.server.faults = {0: Raw(raw)}
    with pytest.raises(BadReply, match="came with 3 bytes, had 6"):
        bucket.store.read(manifest.uri, manifest.objects[0], NEVER, 99)
    bucket.server.faults = {1: OtherEtag()}
    with pytest.raises(ObjectChanged):
        bucket.store.read(manifest.uri, manifest.objects[0], NEVER, 99)


def test_what_is_put_is_json_and_signed(start: Start):
    bucket = start(environ=KEYS)
    bucket.server.account = ACCOUNT
    bucket.server.wall_s = lambda: WALL_S
    bucket.store.put("s3://models/llm/b.json", b'{"a": 1}')
    sent = bucket.server.seen[-1]
    assert (sent.method, sent.body) == ("PUT", b'{"a": 1}')
    assert sent.headers["content-type"] == "application/json"
    assert sent.headers["x-amz-content-sha256"] == hashlib.sha256(sent.body).hexdigest()
    assert "x-amz-checksum-sha256" in sent.headers["authorization"]


def test_what_is_put_can_be_checked_when_it_is_loaded(start: Start):
    bucket = start()
    bucket.store.put("s3://models/llm/b.json", b"{}")
    manifest = bucket.store.resolve(MODEL)
    assert manifest.objects[1].path == "b.json"
    facts = bucket.store.describe(manifest.uri, manifest.objects[1])
    assert facts.checksum == "sha256:RBNvo1WzZ4oRRq0W9+hknpT7T8If536DEMBg9hyq/4o="


def test_a_put_that_is_denied_names_what_to_allow(start: Start):
    bucket = start(faults={("PUT", 0): Status(403, code="AccessDenied")})
    with pytest.raises(AccessDenied, match="allow s3:PutObject on arn:aws:s3:::models/llm/b for"):
        bucket.store.put("s3://models/llm/b", b"{}")


# Objects that are encrypted by a key of the customer.


@pytest.fixture
def key_file(tmp_path: Path) -> str:
    path = tmp_path / "key"
    path.write_bytes(bytes(range(32)))
    return str(path)


def sealed(content: Content, key_file: str) -> Stored:
    return stored(content)._replace(customer_key_md5=headers_of(key_file)[SENT_KEY_MD5])


@pytest.mark.parametrize("with_tls", [False, True], ids=["plain", "tls"])
def test_the_key_goes_with_every_request_of_an_object_and_with_no_other(
    start: Start, key_file: str, with_tls: bool
):
    bucket = start({"llm/a": sealed(DATA, key_file)}, with_tls=with_tls, customer_key=key_file)
    bucket.store.put("s3://models/other", b"{}")
    manifest = bucket.store.resolve(MODEL)
    found = manifest.objects[0]
    bucket.store.describe(manifest.uri, found)
    bucket.store.read(manifest.uri, found, NEVER, found.size_bytes)
    for at in range(0, DATA.size_bytes, 1_000_000):
        part = part_of(manifest, found, at, at + 1_000_000)
        assert fetched(bucket.store, part) == content(part)
    bucket.store.resolve(ModelRef("llm", "s3://models/llm/a"))
    with_key = [(sent.method, SENT_KEY_MD5 in sent.headers) for sent in bucket.server.seen]
    assert with_key == [
        ("PUT", True),
        ("GET", False),  # the listing
        ("HEAD", True),
        ("GET", True),
        *[("GET", True)] * 3,
        ("HEAD", True),
    ]
    assert {sent.headers.get(SENT_KEY_MD5.removesuffix("-md5")) for sent in bucket.server.seen} == {
        None,
        "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=",
    }


def test_the_headers_of_the_key_are_signed(start: Start, key_file: str):
    bucket = start({"llm/a": sealed(b"abc", key_file)}, customer_key=key_file, environ=KEYS)
    bucket.server.account = ACCOUNT
    bucket.server.wall_s = lambda: WALL_S
    assert fetched(bucket.store, whole(bucket.store.resolve(MODEL))) == b"abc"


def ways_to_an_object(bucket: Bucket, key: str) -> Iterator[Callable[[], object]]:
    """Yield every call that asks for an object."""
    manifest = bucket.store.resolve(MODEL)
    found = next(found for found in manifest.objects if found.key == key)
    yield lambda: bucket.store.resolve(ModelRef("llm", f"s3://models/{key}"))
    yield lambda: bucket.store.describe(manifest.uri, found)
    yield lambda: bucket.store.read(manifest.uri, found, NEVER, 99)
    yield lambda: fetched(bucket.store, part_of(manifest, found))


def test_an_object_that_needs_a_key_names_the_option(start: Start, key_file: str):
    bucket = start({"llm/a": sealed(b"abc", key_file)})
    for ask in ways_to_an_object(bucket, "llm/a"):
        with pytest.raises(AccessDenied, match=r"none was sent .* sse_customer_key_file"):
            ask()


def test_a_key_that_is_another_names_the_option(start: Start, key_file: str, tmp_path: Path):
    (tmp_path / "other").write_bytes(bytes(32))
    bucket = start({"llm/a": sealed(b"abc", key_file)}, customer_key=str(tmp_path / "other"))
    for ask in ways_to_an_object(bucket, "llm/a"):
        with pytest.raises(AccessDenied, match="a wrong key in sse_customer_key_file"):
            ask()


def test_an_object_that_needs_no_key_names_the_option(start: Start, key_file: str):
    bucket = start({"llm/a": b"abc"}, customer_key=key_file)
    for ask in ways_to_an_object(bucket, "llm/a"):
        with pytest.raises(AccessDenied, match="leave sse_customer_key_file out"):
            ask()


def test_a_key_that_cannot_be_read_is_told_and_nothing_is_left_open(start: Start, tmp_path: Path):
    bucket = start({"llm/a": b"abc"}, customer_key=str(tmp_path / "none"))
    for ask in ways_to_an_object(bucket, "llm/a"):
        with pytest.raises(CredentialsUnavailable, match="cannot read sse_customer_key_file"):
            ask()
    assert bucket.server.connections == 1
    (tmp_path / "none").write_bytes(bytes(32))  # it is read at each use
    bucket.server.objects["llm/a"] = sealed(b"abc", str(tmp_path / "none"))
    assert fetched(bucket.store, whole(bucket.store.resolve(MODEL))) == b"abc"


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
        (Status(503, code="SlowDown"), StoreBusy, "cannot serve"),
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

    token = Token()

    def run() -> None:
        try:
            bucket.store.fetch(part, sink, token)
        except StoreError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert bucket.server.stalled.wait(5)
    token.cancel()
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

    def accept_from_pipe(self, pipe_fd: int, offset: int, size_bytes: int) -> None:
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


@pytest.mark.fault
@pytest.mark.parametrize("with_tls", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("sent_bytes", [-1, 0, 100_000])
def test_a_stall_is_told_within_0_2_s_also_before_the_first_byte(
    start: Start, with_tls: bool, sent_bytes: int
):
    told: list[tuple[int, float]] = []

    def stalled(part: Part, at: int, idle_s: float) -> None:
        told.append((at, idle_s))
        if idle_s >= 0.15:
            raise StoreUnavailable("given up")

    bucket = start(faults={0: Stall(FOREVER, sent_bytes)}, with_tls=with_tls, stalled=stalled)
    part = whole(bucket.store.resolve(MODEL))
    sink = MemorySink(part.start, part.stop)
    with pytest.raises(StoreUnavailable, match="given up"):
        bucket.store.fetch(part, sink)
    assert sink.watermark == max(0, sent_bytes)
    at, idle_s = told[-1]
    assert at == sink.watermark
    assert 0.15 <= idle_s < 0.2


class WatchedSink(PartSink):
    """A real sink, and somebody who waits for its watermark."""

    def __init__(self, file: OpenFile, start: int, stop: int) -> None:
        super().__init__(file, start, stop)
        self._moved = threading.Condition()

    def accept(self, offset: int, view: memoryview) -> None:
        super().accept(offset, view)
        self._tell()

    def accept_from_pipe(self, *arguments: int) -> None:
        super().accept_from_pipe(*arguments)
        self._tell()

    def _tell(self) -> None:
        with self._moved:
            self._moved.notify_all()

    def wait_for(self, watermark: int) -> None:
        with self._moved:
            assert self._moved.wait_for(lambda: self.watermark >= watermark, 5)


class Attempt:
    """A fetch in a thread of its own."""

    def __init__(self, bucket: Bucket, part: Part, sink: Sink) -> None:
        self.token = Token()
        self.errors: list[BaseException] = []
        self._work = (bucket.store, part, sink)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        store, part, sink = self._work
        try:
            store.fetch(part, sink, self.token)
        except BaseException as error:  # noqa: BLE001 - looked at by the test
            self.errors.append(error)

    def end(self) -> list[type[BaseException]]:
        self._thread.join(10)
        assert not self._thread.is_alive()
        return [type(error) for error in self.errors]


@pytest.fixture
def segment() -> Iterator[OpenFile]:
    made = OpenFile(os.memfd_create("segment"), "a", DATA.size_bytes)
    yield made
    made.close()


both = pytest.mark.parametrize("with_tls", [False, True], ids=["plain", "tls"])
stalls = pytest.mark.parametrize("sent_bytes", [-1, 0, 1_000_003])


@pytest.mark.fault
@both
@stalls
def test_an_attempt_that_hangs_ends_when_another_has_brought_all(
    start: Start, segment: OpenFile, with_tls: bool, sent_bytes: int
):
    bucket = start(faults={0: Stall(FOREVER, sent_bytes)}, with_tls=with_tls)
    part = whole(bucket.store.resolve(MODEL))
    sink = WatchedSink(segment, part.start, part.stop)
    slow = Attempt(bucket, part, sink)
    sink.wait_for(sent_bytes)
    assert bucket.server.stalled.wait(5)
    bucket.store.fetch(part, sink)
    assert slow.end() == [StoreUnavailable]
    assert "came otherwise" in str(slow.errors[0])
    assert os.pread(segment.fd, part.stop, 0) == content(part)


@pytest.mark.fault
@both
@stalls
def test_an_attempt_that_wakes_up_late_changes_nothing(
    start: Start, segment: OpenFile, with_tls: bool, sent_bytes: int
):
    bucket = start(faults={0: Stall(FOREVER, sent_bytes)}, with_tls=with_tls)
    part = whole(bucket.store.resolve(MODEL))
    sink = WatchedSink(segment, part.start, part.stop)
    slow = Attempt(bucket, part, sink)
    sink.wait_for(sent_bytes)
    assert bucket.server.stalled.wait(5)
    bucket.store.fetch(part, sink)
    os.pwrite(segment.fd, b"never written again", 2_000_000)
    bucket.server.resumed.set()
    assert slow.end() in ([], [StoreUnavailable])  # it may have noticed that all is there
    assert os.pread(segment.fd, 19, 2_000_000) == b"never written again"
    assert sink.watermark == part.stop


@pytest.mark.fault
@both
@stalls
def test_an_attempt_goes_on_where_another_one_ended(
    start: Start, segment: OpenFile, with_tls: bool, sent_bytes: int
):
    bucket = start(faults={0: Stall(FOREVER, sent_bytes), 1: ShortBody(700_001)}, with_tls=with_tls)
    part = whole(bucket.store.resolve(MODEL))
    sink = WatchedSink(segment, part.start, part.stop)
    slow = Attempt(bucket, part, sink)
    sink.wait_for(sent_bytes)
    assert bucket.server.stalled.wait(5)
    with pytest.raises(BadReply, match="cut short"):
        bucket.store.fetch(part, sink)
    bucket.server.resumed.set()
    assert slow.end() == []
    assert os.pread(segment.fd, part.stop, 0) == content(part)


@pytest.mark.fault
def test_attempts_that_run_at_full_speed_together_bring_the_right_bytes(
    start: Start, segment: OpenFile
):
    bucket = start(with_tls=True)
    part = whole(bucket.store.resolve(MODEL))
    sink = PartSink(segment, part.start, part.stop)
    attempts = [Attempt(bucket, part, sink) for _ in range(4)]
    assert all(attempt.end() in ([], [StoreUnavailable]) for attempt in attempts)
    assert os.pread(segment.fd, part.stop, 0) == content(part)


@pytest.mark.fault
@both
def test_each_attempt_of_a_part_is_cancelled_alone(start: Start, segment: OpenFile, with_tls: bool):
    bucket = start(faults={0: Stall(FOREVER, 0), 1: Stall(FOREVER, 500)}, with_tls=with_tls)
    part = whole(bucket.store.resolve(MODEL))
    sink = WatchedSink(segment, part.start, part.stop)
    first = Attempt(bucket, part, sink)
    assert bucket.server.stalled.wait(5)
    bucket.server.stalled.clear()
    second = Attempt(bucket, part, sink)
    assert bucket.server.stalled.wait(5)
    first.token.cancel()
    assert first.end() == [StoreUnavailable]
    assert second.errors == []
    bucket.server.resumed.set()
    assert second.end() == []
    assert os.pread(segment.fd, part.stop, 0) == content(part)


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


# Many parts at a time, as a daemon fetches them.

PART_BYTES = 50_000
THREADS = 8


def load(bucket: Bucket, began: Callable[[int], object] = lambda number: None) -> None:
    """Fetch a model in parts, by several threads; check every byte."""
    manifest = bucket.store.resolve(MODEL)
    left = list(enumerate(range(0, DATA.size_bytes, PART_BYTES)))
    errors: list[BaseException] = []

    def run() -> None:
        try:
            while True:
                number, at = left.pop()
                began(number)
                part = part_of(manifest, manifest.objects[0], at, at + PART_BYTES)
                assert fetched(bucket.store, part) == content(part)
        except IndexError:
            pass
        except BaseException as error:  # noqa: BLE001 - looked at below
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert errors == []


class Container:
    """Hands out keys: OLD, then those that the store knows."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes = b""
    ) -> Reply:
        self.asked += 1
        key_id = "OLD" if self.asked == 1 else "AKIDTEST"
        found = {"AccessKeyId": key_id, "SecretAccessKey": "secret", "Token": "t"}
        return Reply(200, {}, json.dumps({**found, "Expiration": "2027-01-16T00:00:00Z"}).encode())


@pytest.mark.fault
@pytest.mark.parametrize("status", [400, 403])
def test_keys_that_expire_in_mid_load_are_renewed_once_for_all_threads(status: int):
    old = ACCOUNT._replace(access_key="OLD", session_token="t")
    new = ACCOUNT._replace(session_token="t", expired=frozenset({"OLD"}), expired_status=status)
    container = Container()
    environ = {"AWS_CONTAINER_CREDENTIALS_RELATIVE_URI": "/x"}
    made = tools()._replace(credentials=Credentials(container, Clock(WALL_S), environ))
    with StoreServer({"llm/a": DATA}, account=old) as server:
        server.wall_s = lambda: WALL_S
        bucket = Bucket(server, S3Store(requests(server, made)))

        def began(number: int) -> None:
            if number == 40:
                server.account = new

        load(bucket, began)
        bucket.store.close()
    assert container.asked == 2
    signed_by = [sent.headers["authorization"].partition("Credential=")[2] for sent in server.seen]
    is_old = [key.startswith("OLD/") for key in signed_by]
    after = is_old[is_old.index(False) :]
    assert len(after) > 30
    assert sum(after) < THREADS, "only those that the other threads had under way"


def test_a_load_has_as_many_connections_as_threads(start: Start):
    bucket = start()
    load(bucket)
    load(bucket)
    assert bucket.server.connections <= THREADS


def test_after_close_nothing_is_kept(start: Start):
    bucket = start()
    bucket.store.resolve(MODEL)
    bucket.store.close()
    bucket.server.wait_for_closed(1)
