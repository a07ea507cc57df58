"""Versions of a small model whose content is known, and a store that goes from one to another.

Of every model two files stay and two differ between its versions. Every file fills whole pages, so
that what the daemon says of its memory equals what the kernel says.
"""

from __future__ import annotations

import base64
import json
import mmap
import random
import zlib
from typing import TYPE_CHECKING, Any, NamedTuple

from cached.core.manifest import version_of
from cached.core.objects import StoredObject
from tests.e2e.served import MIB
from tests.fakes.s3_objects import stored

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from tests.fakes.s3_objects import Stored
    from tests.fakes.store_server import StoreServer

TENSORS = 5
TENSOR_BYTES = 4 * MIB
SAME, OWN = "same.safetensors", "own.safetensors"
SAME_CONFIG, CONFIG = "tokenizer.json", "config.json"


class Edition(NamedTuple):
    """One version of a model.

    Attributes:
        version: the id that a daemon gives it.
        objects: by key.
        sums: the CRC32 of every tensor and of every file that has none, by name.
    """

    version: str
    objects: dict[str, Stored]
    sums: dict[str, int]

    @property
    def size_bytes(self) -> int:
        return sum(each.size_bytes for each in self.objects.values())


def uri_of(name: str) -> str:
    """Return where a model's objects are."""
    return f"s3://models/{name}/"


def edition(name: str, number: int, tensor_bytes: int = TENSOR_BYTES) -> Edition:
    """Return a version of a model; those of equal numbers are equal."""
    files: dict[str, bytes] = {}
    sums: dict[str, int] = {}
    for path, seed in ((SAME, f"{name} same"), (OWN, f"{name} {number}")):
        files[path], found = _weights(path.partition(".")[0], seed, tensor_bytes)
        sums |= found
    for path, seed in ((SAME_CONFIG, name), (CONFIG, f"{name} {number}")):
        files[path] = _padded(json.dumps({"of": seed}).encode())
        sums[path] = zlib.crc32(files[path])
    objects = {f"{name}/{path}": _summed(content) for path, content in files.items()}
    listed = [
        StoredObject(key, key.removeprefix(f"{name}/"), each.size_bytes, each.etag)
        for key, each in objects.items()
    ]
    return Edition(version_of(uri_of(name), listed), objects, sums)


def _summed(content: bytes) -> Stored:
    """Return an object with the checksum that the store keeps of it."""
    told = base64.b64encode(zlib.crc32(content).to_bytes(4, "big")).decode()
    headers = (("x-amz-checksum-crc32", told), ("x-amz-checksum-type", "FULL_OBJECT"))
    return stored(content)._replace(headers=headers)


def _weights(prefix: str, seed: str, tensor_bytes: int) -> tuple[bytes, dict[str, int]]:
    source = random.Random(seed)
    data = {f"{prefix}.{at}": source.randbytes(tensor_bytes) for at in range(TENSORS)}
    table = {
        name: {
            "dtype": "U8",
            "shape": [tensor_bytes],
            "data_offsets": [at * tensor_bytes, (at + 1) * tensor_bytes],
        }
        for at, name in enumerate(data)
    }
    text = json.dumps(table).encode()
    text += b" " * (-(8 + len(text)) % mmap.PAGESIZE)
    header = len(text).to_bytes(8, "little") + text
    return header + b"".join(data.values()), {name: zlib.crc32(each) for name, each in data.items()}


def _padded(text: bytes) -> bytes:
    return text + b" " * (-len(text) % mmap.PAGESIZE)


def put(server: StoreServer, given: Edition) -> None:
    """Replace a model's objects, all in one step: no listing and no GET comes in between."""
    server.objects = {**server.objects, **given.objects}


def write_sums(path: Path, editions: Iterable[Edition]) -> None:
    """Write what readers (reader.py) compare with."""
    path.write_text(json.dumps({each.version: each.sums for each in editions}))


def wrong_in(model: Any, sums: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Return what of an open model is not what its version says; reads all of it.

    Args:
        model: of ``cached.open``.
        sums: those of every version, by its id.
    """
    expected = sums.get(model.version)
    if expected is None:
        return [f"there never was a version {model.version}"]
    names = {*model.keys(), SAME_CONFIG, CONFIG}
    if names != expected.keys():
        return [f"{sorted(names)} instead of {sorted(expected)}"]
    return [name for name in expected if zlib.crc32(_bytes_of(model, name)) != expected[name]]


def _bytes_of(model: Any, name: str) -> memoryview:
    view: memoryview = model.buffer(name) if name in model else model.file(name)
    return view
