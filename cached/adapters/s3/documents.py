"""The XML of S3: listings and errors. No DTD, no entity of the document's own, bounded."""

from __future__ import annotations

import re
from pyexpat import ExpatError, ParserCreate  # now: later there may be no descriptor left for it
from typing import TYPE_CHECKING, NamedTuple

from cached.core.errors import BadReply, ObjectRefused

if TYPE_CHECKING:
    from typing import NoReturn

MAX_LISTING_BYTES = 16 << 20  # 1,000 keys of 1,024 bytes, quoted, are 4 MiB
MAX_ERROR_BYTES = 64 << 10
_MAX_DEPTH = 16
_MAX_ELEMENTS = 250_000  # 10,000 objects have some 100,000; each becomes Python objects
_SIZE = re.compile(r"[0-9]{1,18}")
_HEX = re.compile(rb"%([0-9A-Fa-f]{2})")


class Listed(NamedTuple):
    """One object of a listing.

    Attributes:
        etag: quotes included; empty if the store told none.
    """

    key: str
    size_bytes: int
    etag: str


class Listing(NamedTuple):
    """One page.

    Attributes:
        next_token: of the next page; empty on the last.
    """

    objects: list[Listed]
    next_token: str


class Fault(NamedTuple):
    """An error reply.

    Attributes:
        code: such as ``AccessDenied``; empty if the body tells none.
        members: all others by name.
    """

    code: str
    message: str
    members: dict[str, str]


def parse_listing(body: bytes) -> Listing:
    """Return a page of ``ListObjectsV2``.

    Raises:
        BadReply: it is not one.
        ObjectRefused: it is one of far too many objects.
    """
    records = _records(body, "Contents")
    top = records.pop(0)
    if top.get("") != "ListBucketResult":
        _refuse(f"a <{top.get('', '')[:40]}> instead of a listing")
    is_quoted = top.get("EncodingType", "") == "url"
    objects = []
    for record in records:
        key, size = record.get("Key", ""), record.get("Size", "")
        if not key or not _SIZE.fullmatch(size):
            _refuse("a listing with an object without key or size")
        objects.append(
            Listed(_unquoted(key) if is_quoted else key, int(size), record.get("ETag", ""))
        )
    is_truncated = top.get("IsTruncated", "false") == "true"
    token = top.get("NextContinuationToken", "")
    if is_truncated and not token:
        _refuse("a listing that goes on without saying where")
    return Listing(objects, token if is_truncated else "")


def parse_fault(body: bytes) -> Fault:
    """Return what an error's body tells; nothing if it is not XML of S3."""
    try:
        top = _records(body, "")[0]
    except BadReply:
        return Fault("", "", {})
    if top.get("") != "Error":
        return Fault("", "", {})
    return Fault(top.get("Code", ""), top.get("Message", ""), top)


def _records(body: bytes, repeated: str) -> list[dict[str, str]]:
    """Return the text of the root's children, and of the children of each ``repeated`` one.

    The name of the root is the member ``""`` of the first record.
    """
    records: list[dict[str, str]] = [{}]
    path: list[str] = []
    texts: list[str] = []
    elements = 0

    def begin(tag: str, _: dict[str, str]) -> None:
        nonlocal elements
        elements += 1
        _check_bounds(elements, len(path) + 1)
        name = tag.rpartition(" ")[2]
        path.append(name)
        texts.clear()
        if len(path) == 1:
            records[0][""] = name
        elif len(path) == 2 and name == repeated:
            records.append({})

    def end(_: str) -> None:
        name = path.pop()
        if len(path) == 1:
            records[0].setdefault(name, "".join(texts))
        elif len(path) == 2 and path[1] == repeated:
            records[-1].setdefault(name, "".join(texts))
        texts.clear()

    def declared(*_: object) -> None:
        _refuse("XML with a document type")

    parser = ParserCreate(namespace_separator=" ")
    parser.StartElementHandler = begin
    parser.EndElementHandler = end
    parser.CharacterDataHandler = texts.append
    parser.StartDoctypeDeclHandler = declared
    try:
        parser.Parse(body, True)
    except ExpatError as error:
        _refuse(f"no XML: {error}")
    return records


def _check_bounds(elements: int, depth: int) -> None:
    if depth > _MAX_DEPTH:
        _refuse("XML that is too deep")
    if elements > _MAX_ELEMENTS:  # not a BadReply: another try would bring it again
        message = f"the store sent XML of more than {_MAX_ELEMENTS} elements"
        raise ObjectRefused(message, hint="name the prefix of one model, with / at its end")


def _unquoted(text: str) -> str:
    """Return a key as it is: S3 quotes it as in a form (``+`` for a space)."""
    data = _HEX.sub(lambda match: bytes((int(match[1], 16),)), text.replace("+", " ").encode())
    try:
        return data.decode()
    except UnicodeDecodeError:
        _refuse(f"a key that is not UTF-8: {text[:80]}")


def _refuse(what: str) -> NoReturn:
    message = f"the store sent {what}"
    raise BadReply(message, hint="check that endpoint_url is an S3-compatible server")
