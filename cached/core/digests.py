"""``cached.manifest.json``: the SHA-256 of every file of a model, and of every block of it.

::

    {"cached_manifest": 1, "block_bytes": 8388608,
     "files": {"model.safetensors": {"size": 20971520, "sha256": HEX, "blocks": [HEX, HEX, HEX]}}}

``cached digest`` writes it beside the files; a daemon that verifies by digest reads it first.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Final, NamedTuple, NoReturn, TypeGuard

from cached.core.errors import DigestsError, ObjectRefused
from cached.core.manifest import layout_path

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cached.core.objects import Manifest

MANIFEST_NAME: Final = "cached.manifest.json"
FORMAT: Final = 1
BLOCK_BYTES: Final = 8 << 20  # as long as the longest part: one GET brings one block
# Of the file: 230,000 blocks, which are 1.8 TiB of weights. It bounds what parsing one can take:
# 0.1 GiB, or 0.5 GiB for a file made to take as much as it can.
MIN_BLOCK_BYTES: Final = 64 << 10  # each block costs the daemon some events
MAX_BYTES: Final = 16 << 20
_HEX: Final = re.compile(r"[0-9a-f]{64}")
_HINT: Final = "write it anew: cached digest URI"


def has_list(manifest: Manifest) -> bool:
    """Return whether the digests of a version come with it."""
    return any(stored.path == MANIFEST_NAME for stored in manifest.objects)


class FileDigests(NamedTuple):
    """One file.

    Attributes:
        sha256: of the whole.
        blocks: of each block; the last may be shorter. None of an empty file.
    """

    size_bytes: int
    sha256: bytes
    blocks: tuple[bytes, ...]


class Digests(NamedTuple):
    """All files of a model, by path."""

    block_bytes: int
    files: Mapping[str, FileDigests]


def parse(data: bytes) -> Digests:
    """Return what a manifest says.

    Raises:
        DigestsError: it breaks a rule of the format.
    """
    if len(data) > MAX_BYTES:
        _refuse(f"{len(data)} bytes, the limit is {MAX_BYTES}")
    try:
        document = json.loads(data, object_pairs_hook=_once, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        _refuse(f"it is not JSON: {error}", error)
    if not isinstance(document, dict) or document.get("cached_manifest") != FORMAT:
        found = document.get("cached_manifest") if isinstance(document, dict) else None
        _refuse(f"cached_manifest must be {FORMAT}, was {found!r:.40}")
    block_bytes, files = document.get("block_bytes"), document.get("files")
    if not _is_count(block_bytes) or block_bytes < MIN_BLOCK_BYTES:
        least = f"at least {MIN_BLOCK_BYTES}"
        _refuse(f"block_bytes must be a whole number, {least}, was {block_bytes!r:.40}")
    if not isinstance(files, dict):
        _refuse("files must be an object")
    return Digests(block_bytes, {path: _file(path, files[path], block_bytes) for path in files})


def write(digests: Digests) -> bytes:
    """Return the manifest as it is stored; ``parse`` reads it."""
    files = {
        path: {
            "size": file.size_bytes,
            "sha256": file.sha256.hex(),
            "blocks": [block.hex() for block in file.blocks],
        }
        for path, file in sorted(digests.files.items())
    }
    document = {"cached_manifest": FORMAT, "block_bytes": digests.block_bytes, "files": files}
    return json.dumps(document, indent=1).encode() + b"\n"


def _file(path: str, entry: object, block_bytes: int) -> FileDigests:
    try:
        layout_path(path, "")
    except ObjectRefused as error:
        _refuse(error.message, error)
    members = entry if isinstance(entry, dict) else {}
    size, blocks = members.get("size"), members.get("blocks")
    if not _is_count(size):
        _refuse(f"size of {path!r:.200} must be a whole number, was {size!r:.40}")
    if not isinstance(blocks, list) or len(blocks) != -(-size // block_bytes):
        _refuse(f"{path!r:.200} must have {-(-size // block_bytes)} blocks of {block_bytes} bytes")
    whole = _digest(path, members.get("sha256"))
    return FileDigests(size, whole, tuple(_digest(path, block) for block in blocks))


def _digest(path: str, text: object) -> bytes:
    if not isinstance(text, str) or _HEX.fullmatch(text) is None:
        _refuse(f"digests of {path!r:.200} must be 64 hex digits, was {text!r:.80}")
    return bytes.fromhex(text)


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice")
    return found


def _refuse(what: str, cause: Exception | None = None) -> NoReturn:
    message = f"{MANIFEST_NAME}: {what}"
    raise DigestsError(message, hint=_HINT) from cause
