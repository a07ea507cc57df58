"""The tensor table at the start of a safetensors file.

Format: https://huggingface.co/docs/safetensors ("Format"): 8 bytes N, little-endian; N bytes
of UTF-8 JSON, ``{name: {"dtype", "shape", "data_offsets"}, "__metadata__": {str: str}}``; then
the data without gaps. ``parse`` is for whoever fetched the file: it accepts nothing that the
safetensors library refuses. ``read`` is for whoever got the file from someone that has parsed it.
"""

from __future__ import annotations

import json
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from cached.core.errors import HeaderError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    Buffer = bytes | bytearray | memoryview

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
"""Of the JSON; the limit of the safetensors library (tensor.rs: MAX_HEADER_SIZE)."""

MAX_MARKS = 2_000_000
"""Of ``{``, ``[`` and ``,`` in the JSON: some 220,000 tensors; the largest files have a tenth.

Without it 100 MB of ``[],`` become Python objects of 3 GB, beside the memory budget.
"""

MAX_SIZE = 2**63
"""Numbers stay below it, so that every size fits a signed 64-bit offset."""

DTYPE_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
"""Bits of one element, of each dtype that safetensors 0.8 knows (tensor.rs: Dtype::bitsize)."""

_METADATA = "__metadata__"
_MEMBERS = {"dtype", "shape", "data_offsets"}
_INT = {int}
_DAMAGED = "the file is damaged or not a safetensors file: write it again"
_TAIL = "the file is cut short or damaged: write it again"


class Tensor(NamedTuple):
    """One tensor's place in its file.

    Attributes:
        name: any text; never a path.
        dtype: as safetensors calls it, for example ``BF16``.
        shape: the dimensions; empty for a scalar.
        start: first byte, an offset in the file.
        stop: one past the last byte; equal to ``start`` for a tensor without elements.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Header(NamedTuple):
    """What one safetensors file holds.

    Attributes:
        header_bytes: where the data starts: 8 + the length of the JSON.
        tensors: by name, in the order of the file.
        metadata: free text of the author, ``__metadata__``.
    """

    header_bytes: int
    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def header_bytes(first8: Buffer, file_bytes: int) -> int:
    """Return where the data starts: 8 + N.

    Args:
        first8: at least the first 8 bytes of the file, or all of a shorter one.
        file_bytes: length of the whole file.

    Raises:
        HeaderError: N is over the limit, over the file's end, or too small for ``{}``.
    """
    if file_bytes < LENGTH_BYTES or len(first8) < LENGTH_BYTES:
        size = min(file_bytes, len(first8))
        _refuse(f"a header takes at least 8 bytes, the file has {size}", hint=_TAIL)
    json_bytes = int.from_bytes(first8[:LENGTH_BYTES], "little")
    if json_bytes > MAX_HEADER_BYTES:
        _refuse(f"header must be at most {MAX_HEADER_BYTES} bytes, says {json_bytes}")
    if json_bytes < len("{}"):
        _refuse(f"header must be at least 2 bytes, says {json_bytes}")
    if LENGTH_BYTES + json_bytes > file_bytes:
        message = f"header says it ends at byte {LENGTH_BYTES + json_bytes} of {file_bytes}"
        _refuse(message, hint=_TAIL)
    return LENGTH_BYTES + json_bytes


def parse(raw: Buffer, file_bytes: int) -> Header:
    """Return the header of a file, after checking every rule of the format.

    Args:
        raw: the first ``header_bytes`` of the file; more does no harm.
        file_bytes: length of the whole file.

    Raises:
        HeaderError: a rule is broken; the text names it, and the tensor.
    """
    stop = header_bytes(raw, file_bytes)
    table = _decoded(raw, stop)
    metadata = _metadata(table.pop(_METADATA, {}))
    tensors = sorted(
        [_tensor(name, entry, stop) for name, entry in table.items()],
        key=lambda tensor: tensor[3:],  # (start, stop)
    )
    _check_contiguous(tensors, stop, file_bytes)
    return Header(stop, {tensor.name: tensor for tensor in tensors}, metadata)


def read(raw: Buffer, file_bytes: int) -> Header:
    """Return a header that ``parse`` has accepted before, without checking it again.

    Args:
        raw: the first ``header_bytes`` of the file; more does no harm.
        file_bytes: length of the whole file.

    Raises:
        HeaderError: the length or the JSON is not valid.
    """
    data = header_bytes(raw, file_bytes)
    try:
        table = json.loads(bytes(raw[LENGTH_BYTES:data]))
    except ValueError as error:
        _refuse(f"header is not JSON: {error}", cause=error)
    metadata = table.pop(_METADATA, {})
    made = tuple.__new__  # skips the Python code of NamedTuple.__new__: 0.4 µs a tensor
    tensors = {}
    at = data
    is_sorted = True
    for name, entry in table.items():
        start, stop = entry["data_offsets"]
        is_sorted = is_sorted and start + data >= at
        at = stop + data
        shape = tuple(entry["shape"])
        tensors[name] = made(Tensor, (name, entry["dtype"], shape, start + data, at))
    if not is_sorted:
        tensors = dict(sorted(tensors.items(), key=lambda item: item[1][3:]))
    return Header(data, tensors, metadata)


def write(
    tensors: Iterable[tuple[str, str, Sequence[int]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Return header bytes as the safetensors library writes them: padded to a multiple of 8.

    Args:
        tensors: name, dtype and shape of each, in the order of the data.
        metadata: ``None`` leaves ``__metadata__`` away.
    """
    table: dict[str, object] = {} if metadata is None else {_METADATA: dict(metadata)}
    start = 0
    for name, dtype, shape in tensors:
        stop = start + _size(dtype, shape)
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    body = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    body += b" " * (-len(body) % 8)
    return len(body).to_bytes(LENGTH_BYTES, "little") + body


def _size(dtype: str, shape: Iterable[int]) -> int:
    """Return the bytes of a tensor; sub-byte types are packed."""
    bits = DTYPE_BITS[dtype]
    for dimension in shape:
        bits *= dimension
    return bits // 8


def _decoded(raw: Buffer, stop: int) -> dict[str, object]:
    if len(raw) < stop:
        _refuse(f"only {len(raw)} of {stop} bytes of the header are there", hint=_TAIL)
    body = bytes(raw[LENGTH_BYTES:stop])
    marks = sum(map(body.count, (b"{", b"[", b",")))
    if marks > MAX_MARKS:
        rule = f"must have at most {MAX_MARKS} of '{{', '[' and ',', has {marks}"
        _refuse(f"header {rule}", hint="split the file into several with fewer tensors each")
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        _refuse(f"header is not UTF-8: {error}", cause=error)
    if not text.startswith("{"):
        _refuse(f"header must start with '{{', was {text[0]!r}")
    # Python reads -0 as 0, the library refuses it; a hook for each number costs a third of parse
    hook = _unsigned if "-0" in text else None
    try:
        table: dict[str, object] = json.loads(text, object_pairs_hook=_unique, parse_int=hook)
    except (ValueError, RecursionError) as error:
        _refuse(f"header is not JSON: {error}", cause=error)
    if "\\u" in text:
        _check_unicode(table)
    return table


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) != len(pairs):
        names = sorted(name for name, _ in pairs)
        twice = next(name for name, after in pairwise(names) if name == after)
        _refuse(f"header has {_shown(twice)} twice")
    return members


def _unsigned(digits: str) -> int:
    if digits.startswith("-"):
        _refuse(f"numbers in a header must have no sign, was {digits[:24]}")
    return int(digits)


def _check_unicode(table: dict[str, object]) -> None:
    """Refuse half a surrogate pair, which JSON can spell and UTF-8 cannot."""
    strings = list(table)
    metadata = table.get(_METADATA)
    if isinstance(metadata, dict):
        strings += [*metadata, *(text for text in metadata.values() if isinstance(text, str))]
    for text in strings:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            _refuse(f"{_shown(text)} is not unicode text", cause=error)


def _metadata(found: object) -> dict[str, str]:
    if not isinstance(found, dict):
        _refuse(f"{_METADATA} must be an object, was {_shown(found)}")
    for key, text in found.items():
        if not isinstance(text, str):
            message = f"{_METADATA} must map text to text, {_shown(key)} was {_shown(text)}"
            _refuse(message)
    return found


def _tensor(name: str, entry: object, data: int) -> Tensor:
    if not isinstance(entry, dict) or entry.keys() != _MEMBERS:
        rule = "must have dtype, shape and data_offsets, nothing else"
        _refuse(f"tensor {_shown(name)} {rule}: {_shown(entry)}")
    dtype = entry["dtype"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        message = f"tensor {_shown(name)} has the unknown dtype {_shown(dtype)}"
        _refuse(message, hint="a newer version of cached may know it")
    shape = _numbers(name, "shape", entry["shape"])
    offsets = _numbers(name, "data_offsets", entry["data_offsets"])
    if len(offsets) != 2:
        message = f"tensor {_shown(name)} must have two data_offsets, was {_shown(offsets)}"
        _refuse(message)
    start, stop = offsets
    size = _checked_size(name, dtype, shape)
    if stop - start != size:
        takes = f"takes {size} bytes ({dtype} {_shown(list(shape))})"
        _refuse(f"tensor {_shown(name)} {takes}, its data_offsets span {stop - start}")
    return Tensor(name, dtype, shape, start + data, stop + data)


def _numbers(name: str, member: str, found: object) -> tuple[int, ...]:
    # by type: bool is a subclass of int
    if not isinstance(found, list) or not _INT.issuperset(map(type, found)):
        message = f"tensor {_shown(name)}: {member} must be whole numbers, was {_shown(found)}"
        _refuse(message)
    if found and min(found) < 0:
        message = f"tensor {_shown(name)}: {member} must not be negative, was {_shown(found)}"
        _refuse(message)
    return tuple(found)


def _checked_size(name: str, dtype: str, shape: tuple[int, ...]) -> int:
    """Return the bytes of a tensor, or refuse what overflows or does not fill a byte.

    A dimension of 0 does not excuse the others: numpy refuses such a shape as well.
    """
    bits = DTYPE_BITS[dtype]
    for dimension in shape:
        bits *= dimension or 1
        if bits >= MAX_SIZE:
            what = f"{dtype} {_shown(list(shape))}"
            _refuse(f"tensor {_shown(name)} must take less than 2^63 bits: {what}")
    if 0 in shape:
        return 0
    if bits % 8:
        _refuse(f"tensor {_shown(name)} must fill whole bytes, has {bits} bits")
    return bits // 8


def _check_contiguous(tensors: list[Tensor], data: int, file_bytes: int) -> None:
    at = data
    for tensor in tensors:
        if tensor.start != at:
            what = "overlaps the one before it" if tensor.start < at else "leaves a hole before it"
            message = f"tensor {_shown(tensor.name)} {what}: starts at {tensor.start}, not {at}"
            _refuse(message)
        at = tensor.stop
    if at != file_bytes:
        _refuse(f"the tensors end at byte {at}, the file at {file_bytes}", hint=_TAIL)


def _refuse(message: str, *, hint: str = _DAMAGED, cause: BaseException | None = None) -> NoReturn:
    raise HeaderError(message, hint=hint) from cause


def _shown(value: object) -> str:
    """Return a short form for messages: names may be as long as the header, lists as deep."""
    from reprlib import Repr

    short = Repr()  # of a few members of each, and a few levels
    short.maxstring = short.maxother = 100
    text = short.repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
