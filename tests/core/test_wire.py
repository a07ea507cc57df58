"""Frames come out as they went in, however the stream is cut; anything else is a typed error."""

from __future__ import annotations

import json
import os
import re
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cached.core import errors, header, wire
from cached.core.errors import (
    BadRequest,
    CachedError,
    FormatError,
    FrameError,
    LoadFailed,
    OverBudget,
    ProtocolMismatch,
    TensorUnknown,
)
from cached.core.objects import Range
from tests.fakes.local_daemon import WAIT_S, GatedStore, LocalDaemon

if TYPE_CHECKING:
    from collections.abc import Callable

LIMIT = 200
WIRE_MD = Path(__file__).parents[2] / "docs" / "wire.md"
TRANSCRIPTS = sorted(Path(__file__).with_name("transcripts").glob("*.json"))

texts = st.text(max_size=8)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
bodies = st.dictionaries(texts, values, max_size=4)
ERRORS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, CachedError) and kind is not CachedError
]


def framed(raw: bytes) -> bytes:
    return len(raw).to_bytes(wire.LENGTH_BYTES, "big") + raw


def outcome(pieces: list[bytes], limit_bytes: int = LIMIT) -> list[object]:
    """Return the frames of a stream that comes in these pieces, and the error that ends it."""
    frames = wire.FrameBuffer(limit_bytes)
    found: list[object] = []
    try:
        for piece in pieces:
            frames.feed(piece)
            found += frames
    except FormatError as error:
        found.append(str(error))
    return found


def byte_at_a_time(stream: bytes) -> list[bytes]:
    return [stream[at : at + 1] for at in range(len(stream))]


@given(st.lists(bodies, max_size=4), st.data())
def test_what_is_written_is_read_however_it_is_cut(sent: list[Any], data: st.DataObject):
    stream = b"".join(map(wire.encode, sent))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=5)))
    pieces = [
        stream[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True)
    ]
    assert outcome(pieces, len(stream)) == sent


@given(
    st.lists(
        st.binary(max_size=12).map(framed)
        | bodies.map(wire.encode)
        | st.binary(max_size=6)
        | values.map(lambda value: framed(json.dumps(value).encode())),
        max_size=4,
    ).map(b"".join)
)
@example(b"\0\0\0\2{}\0\0\0\0")
@example(framed(b"{" * 150))
def test_any_bytes_are_frames_or_a_frame_error_and_the_cuts_do_not_matter(stream: bytes):
    whole = outcome([stream])
    assert outcome(byte_at_a_time(stream)) == whole
    assert all(isinstance(frame, dict) for frame in whole[:-1])


@pytest.mark.parametrize(
    ("stream", "reason"),
    [
        (b"\0\0\0\xc9", "frame of 201 bytes: at most 200 are allowed"),
        (framed(b""), "frame of 0 bytes is not JSON"),
        (framed(b"{"), "frame of 1 bytes is not JSON"),
        (framed(b"{}{}"), "frame of 4 bytes is not JSON"),
        (framed('{"é":1}'.encode("latin-1")), "is not JSON in UTF-8"),
        (framed("{}".encode("utf-16-le")), "is not JSON in UTF-8"),
        (framed(b"\xef\xbb\xbf{}"), "is not JSON in UTF-8"),
        (framed(b'{"a":NaN}'), "is not JSON"),
        (framed(b'{"a":-Infinity}'), "is not JSON"),
        (framed(b"[" * 199), "is not JSON"),
        (framed(b"[]"), "frame holds a list, not an object"),
        (framed(b"null"), "frame holds a NoneType, not an object"),
        (framed(b'{"a":' + b"[" * 8 + b"]" * 8 + b"}"), "nested deeper than 8"),
        (framed(b'{"a":' * 9 + b"1" + b"}" * 9), "nested deeper than 8"),
    ],
)
def test_a_broken_frame_says_why(stream: bytes, reason: str):
    frames = wire.FrameBuffer(LIMIT)
    frames.feed(stream)
    with pytest.raises(FrameError) as caught:
        frames.next_frame()
    assert reason in caught.value.message


@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
@pytest.mark.parametrize("depth", [8, 900, 990, 1_000, 100_000])
def test_a_frame_that_is_nested_deeply_is_a_frame_error(opening: bytes, depth: int):
    closing = b"]" if opening == b"[" else b"}"
    frames = wire.FrameBuffer(wire.MAX_REQUEST_BYTES)
    frames.feed(framed(b'{"protocol":' + opening * depth + b"0" + closing * depth + b"}"))
    with pytest.raises(FrameError):
        frames.next_frame()


def test_a_frame_may_be_nested_as_deeply_as_the_limit():
    frames = wire.FrameBuffer(wire.MAX_REQUEST_BYTES)
    frames.feed(framed(b'{"a":' + b"[" * 7 + b"0" + b"]" * 7 + b"}"))
    assert frames.next_frame() == {"a": [[[[[[[0]]]]]]]}


def test_a_number_with_thousands_of_digits_is_a_frame_error():
    frames = wire.FrameBuffer(wire.MAX_REQUEST_BYTES)
    frames.feed(framed(b'{"id":' + b"9" * 5_000 + b"}"))
    with pytest.raises(FrameError):
        frames.next_frame()


def test_a_frame_that_is_too_long_is_refused_before_it_has_come():
    frames = wire.FrameBuffer(wire.MAX_REQUEST_BYTES)
    frames.feed((wire.MAX_REQUEST_BYTES + 1).to_bytes(4, "big"))
    with pytest.raises(FrameError):
        frames.next_frame()


@pytest.mark.parametrize(
    "value", [[0] * 8200, [[]] * 4200, {str(at): 0 for at in range(4200)}, [{}] * 4200]
)
def test_a_request_of_many_values_is_refused_before_it_is_read(
    value: object, monkeypatch: pytest.MonkeyPatch
):
    """Each takes time to be made, which others wait for."""
    frames = wire.FrameBuffer(wire.MAX_REQUEST_BYTES, wire.MAX_VALUES)
    frames.feed(wire.encode({"a": value}))
    monkeypatch.setattr(wire, "_DECODER", None)
    with pytest.raises(FrameError, match="more than 8192 values"):
        frames.next_frame()


@pytest.mark.parametrize(
    "fields",
    [
        {"tensors": ["layers::of:a,name"] * wire.MAX_NAMES},
        {"ranges": [[0, 1 << 50, 1 << 51]] * wire.MAX_RANGES},
        {"files": list(range(wire.MAX_DESCRIPTORS))},
    ],
)
def test_the_longest_of_each_list_fits_a_request(fields: dict[str, object]):
    frames = wire.FrameBuffer(wire.MAX_REQUEST_BYTES, wire.MAX_VALUES)
    frames.feed(wire.encode({"id": 1, "op": "open", **fields}))
    body = frames.next_frame()
    assert body is not None
    if "tensors" in fields:
        assert len(wire.names(body, "tensors") or ()) == wire.MAX_NAMES
    if "ranges" in fields:
        assert len(wire.ranges(body) or ()) == wire.MAX_RANGES


def test_more_names_than_the_limit_are_refused():
    with pytest.raises(BadRequest, match="at most 1024 names, were 1025"):
        wire.names({"tensors": ["x"] * 1025}, "tensors")


def test_frames_are_compact_and_plain_text():
    assert wire.encode({"id": 1, "name": "ä"}) == b'\0\0\0\x18{"id":1,"name":"\\u00e4"}'


@pytest.mark.parametrize("kind", ERRORS)
def test_an_error_arrives_as_the_type_that_was_sent(kind: type[CachedError]):
    sent = kind("needs 3.1 GiB, 2.4 GiB free", hint="raise the budget")
    came = wire.error_from(wire.error_body(sent))
    assert type(came) is kind
    assert (came.message, came.hint, str(came)) == (sent.message, sent.hint, str(sent))


def test_each_code_belongs_to_one_type():
    codes = [kind.code for kind in ERRORS]
    assert len(set(codes)) == len(codes)


@pytest.mark.parametrize("code", ["of_tomorrow", "internal", None, 7])
def test_an_unknown_code_is_a_permanent_failure_that_keeps_its_text(code: object):
    body = {"id": 1, "error": {"code": code, "message": "the moon is full", "hint": "wait"}}
    came = wire.error_from(body)
    assert type(came) is LoadFailed
    assert str(came) == "the moon is full; wait"
    assert not came.transient


@given(values)
def test_any_error_member_becomes_a_typed_error(error: Any):
    assert isinstance(wire.error_from({"error": error}), CachedError)


def test_transient_errors_stay_transient_on_the_way():
    assert wire.error_from(wire.error_body(OverBudget("full"))).transient


def test_an_unknown_tensor_stays_a_key_error_on_the_way():
    came = wire.error_from(wire.error_body(TensorUnknown("no tensor 'x'")))
    assert isinstance(came, KeyError)
    assert str(came) == "no tensor 'x'"


def test_every_minor_version_of_our_major_number_is_served():
    for minor in (0, 1, 99):
        wire.check_protocol([wire.PROTOCOL[0], minor])


@pytest.mark.parametrize(
    ("theirs", "peer", "message"),
    [
        ([2, 1], "client", "the client speaks protocol 2.1, the daemon 1.1; upgrade the daemon"),
        ([0, 9], "client", "the client speaks protocol 0.9, the daemon 1.1; upgrade the client"),
        ([2, 1], "daemon", "the daemon speaks protocol 2.1, the client 1.1; upgrade the client"),
        ([0, 9], "daemon", "the daemon speaks protocol 0.9, the client 1.1; upgrade the daemon"),
    ],
)
def test_another_major_number_is_refused_with_both_and_which_to_upgrade(
    theirs: list[int], peer: str, message: str
):
    with pytest.raises(ProtocolMismatch) as caught:
        wire.check_protocol(theirs, peer=peer)
    assert str(caught.value) == message


@pytest.mark.parametrize("theirs", [None, "1.0", [], [1], [1, 0, 0], [1.0, 0], [True, 0], ["1", 0]])
def test_what_is_not_a_version_is_a_bad_request(theirs: object):
    with pytest.raises(BadRequest, match=r"protocol must be \[major, minor\], was"):
        wire.check_protocol(theirs)


READERS = [wire.text, wire.optional_text, wire.number, wire.numbers, wire.names]


def refusal(reader: Callable[[dict[str, object]], object], fields: dict[str, object]) -> str:
    try:
        reader(fields)
    except BadRequest as error:
        return error.message
    return ""


@pytest.mark.parametrize("reader", READERS)
@given(value=values)
def test_a_reader_returns_a_value_or_a_bad_request(reader: Any, value: object):
    message = refusal(lambda fields: reader(fields, "it"), {"it": value})
    assert not message or message.startswith("it must be ")


@given(values)
def test_ranges_are_ranges_or_a_bad_request(value: object):
    message = refusal(wire.ranges, {"ranges": value})
    assert not message or message.startswith("ranges must be ")


def test_members_are_read_as_what_they_are():
    fields = {"model": "llm", "n": 2**53 - 1, "files": [0, 2], "tensors": ["a", "é"]}
    assert wire.text(fields, "model") == wire.optional_text(fields, "model") == "llm"
    assert wire.optional_text(fields, "absent") is None
    assert wire.number(fields, "n") == 2**53 - 1
    assert wire.numbers(fields, "files") == [0, 2]
    assert wire.names(fields, "tensors") == ("a", "é")
    assert wire.names(fields, "absent") is None
    assert wire.ranges({"ranges": "all"}) is None
    assert wire.ranges({"ranges": [[1, 0, 8], [0, 3, 3]]}) == [(1, Range(0, 8)), (0, Range(3, 3))]


@pytest.mark.parametrize(
    ("reader", "value", "message"),
    [
        ("text", 5, "it must be text, was 5"),
        ("text", None, "it must be text, was None"),
        ("optional_text", [], "it must be text, was a list of 0"),
        ("number", 2**53, f"it must be a whole number from 0 to 2^53 - 1, was {2**53}"),
        ("number", -1, "it must be a whole number from 0 to 2^53 - 1, was -1"),
        ("number", True, "it must be a whole number from 0 to 2^53 - 1, was True"),
        ("number", 1.0, "it must be a whole number from 0 to 2^53 - 1, was 1.0"),
        ("numbers", 3, "it must be a list of whole numbers, was 3"),
        ("numbers", [0, "1"], "it must be a whole number from 0 to 2^53 - 1, was '1'"),
        ("names", "wte", "it must be a list of names, was 'wte'"),
        ("names", ["wte", 1], "it must be a list of names, was a list of 2"),
    ],
)
def test_a_refusal_names_the_member_the_rule_and_the_value(
    reader: str, value: object, message: str
):
    with pytest.raises(BadRequest) as caught:
        getattr(wire, reader)({"it": value}, "it")
    assert caught.value.message == message


@pytest.mark.parametrize(
    ("ranges", "rule"),
    [
        (None, 'a list or "all"'),
        ("some", 'a list or "all"'),
        ([[0, 1]], "a list of [file, start, stop]"),
        ([7], "a list of [file, start, stop]"),
        ([[0, 2, 1]], "start <= stop"),
        ([[0, 0, -1]], "a whole number"),
    ],
)
def test_ranges_must_be_ranges(ranges: object, rule: str):
    with pytest.raises(BadRequest, match="ranges must be ") as caught:
        wire.ranges({"ranges": ranges})
    assert rule in caught.value.message


@pytest.mark.parametrize("value", [["x" * 1_000_000], {"x": "x" * 1_000_000}, "x" * 1_000_000])
def test_a_long_value_is_shown_in_part(value: object):
    with pytest.raises(BadRequest) as caught:
        wire.number({"n": value}, "n")
    assert len(caught.value.message) < 200


def test_a_refusal_shows_nothing_of_what_is_nested():
    """``repr`` of what JSON can nest ends in a RecursionError."""
    value: list[object] = []
    for _ in range(5_000):
        value = [value]
    for reader in READERS:
        with pytest.raises(BadRequest):
            reader({"it": value}, "it")
    with pytest.raises(BadRequest):
        wire.check_protocol(value)
    with pytest.raises(BadRequest):
        wire.ranges({"ranges": value})


def test_more_ranges_than_the_limit_are_refused():
    most = [[0, at, at + 1] for at in range(wire.MAX_RANGES)]
    assert wire.ranges({"ranges": most}) == [(0, Range(at, stop)) for _, at, stop in most]
    with pytest.raises(BadRequest, match="at most 512"):
        wire.ranges({"ranges": [*most, [0, 0, 1]]})


# --- recorded conversations

HEAD = header.write([("head", "U8", [1 << 20]), ("tail", "U8", [6032])])
MODEL = {
    "config.json": b"{}",
    "empty.txt": b"",
    "model.safetensors": HEAD + bytes((1 << 20) + 6032),
}


class Conversation:
    """A worker that sends and expects what a transcript says; ``*`` stands for anything.

    Replies are taken by their ids: those of an earlier request may come later.
    """

    def __init__(self, daemon: LocalDaemon) -> None:
        self.daemon = daemon
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(WAIT_S)
        self.socket.connect(daemon.address)
        self.frames = wire.FrameBuffer(wire.MAX_REPLY_BYTES)
        self.replies: dict[object, dict[str, object]] = {}
        self.descriptors: list[int] = []

    def play(self, step: dict[str, Any]) -> None:
        match step:
            case {"send": request}:
                self.socket.sendall(wire.encode(request))
            case {"send_hex": digits}:
                self.socket.sendall(bytes.fromhex(digits))
            case {"expect": expected}:
                reply = self.reply(expected["id"])
                assert agrees(reply, expected), (reply, expected)
                count = reply.get("fds", 0)
                assert isinstance(count, int)
                assert len(self.descriptors) >= count
                for _ in range(count):
                    os.close(self.descriptors.pop(0))
            case {"expect_end": _}:
                assert self.socket.recv(1) == b""
            case {"hold": False}:
                self.daemon.store.release("model.safetensors")
            case _:
                assert step.keys() <= {"about", "hold"}

    def reply(self, request_id: object) -> dict[str, object]:
        while request_id not in self.replies:
            data, received, _, _ = socket.recv_fds(self.socket, 1 << 16, wire.MAX_DESCRIPTORS)
            assert data, f"the connection ended before the reply to {request_id}"
            self.descriptors += received
            self.frames.feed(data)
            for frame in self.frames:
                self.replies[frame["id"]] = frame
        return self.replies.pop(request_id)

    def close(self) -> None:
        self.socket.close()


def agrees(found: object, expected: object) -> bool:
    """Return whether all that is expected is there; more members do no harm."""
    if expected == "*":
        return True
    if isinstance(expected, dict):
        return isinstance(found, dict) and all(
            key in found and agrees(found[key], value) for key, value in expected.items()
        )
    if isinstance(expected, list):
        return (
            isinstance(found, list)
            and len(found) == len(expected)
            and all(map(agrees, found, expected))
        )
    return type(found) is type(expected) and found == expected


@pytest.mark.parametrize("path", TRANSCRIPTS, ids=lambda path: path.stem)
def test_the_daemon_answers_as_recorded(path: Path, tmp_path: Path):
    steps = json.loads(path.read_text())
    held = ["model.safetensors"] if {"hold": True} in steps else []
    daemon = LocalDaemon(tmp_path, GatedStore(MODEL, held))
    conversation = Conversation(daemon)
    try:
        for step in steps:
            conversation.play(step)
        assert conversation.replies == {}
        assert conversation.descriptors == []
    finally:
        conversation.close()
        daemon.stop()


def test_the_conversations_cover_every_operation_and_are_many():
    sent = [step["send"]["op"] for path in TRANSCRIPTS for step in json.loads(path.read_text())
            if "send" in step]  # fmt: skip
    documented = set(re.findall(r"^→ .*\"op\": \"(\w+)\"", WIRE_MD.read_text(), re.MULTILINE))
    assert documented - set(sent) == set()
    assert len(documented) == 12
