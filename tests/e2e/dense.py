"""A model in a store whose every byte tells where it belongs: four files of tensors, two others."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote

import numpy as np

from cached.core.ranges import RangeSet
from tests.e2e.served import MIB
from tests.fakes.s3_objects import Stored, stored

if TYPE_CHECKING:
    from tests.e2e.served import Served
    from tests.fakes.store_server import StoreServer

PREFIX = "llm/"
URI = f"s3://models/{PREFIX}"
SHARDS = 4
TENSORS = 6  # of a shard
TENSOR_BYTES = 860_000  # so that parts, marks and tensors end at different places
SMALL = {"config.json": b'{"layers": 24}', "tokenizer/vocabulary.txt": b"a word\n" * 3000}


class Dense(NamedTuple):
    """A model.

    Attributes:
        files: by path in the model's directory.
        tensors: content by name.
    """

    files: dict[str, bytes]
    tensors: dict[str, bytes]

    @property
    def size_bytes(self) -> int:
        return sum(map(len, self.files.values()))

    def objects(self) -> dict[str, Stored]:
        """Return what a store holds of it, each object with the checksum that S3 would keep."""
        return {
            PREFIX + path: stored(content)._replace(headers=_checksum(content))
            for path, content in self.files.items()
        }


def dense(seed: int = 0) -> Dense:
    """Return a model of random bytes; another seed, another model of the same names."""
    random = np.random.default_rng(seed)
    files = dict(SMALL)
    tensors: dict[str, bytes] = {}
    for shard in range(SHARDS):
        names = [f"layer.{shard}.{number}.weight" for number in range(TENSORS)]
        made = {name: random.bytes(TENSOR_BYTES) for name in names}
        tensors |= made
        files[f"model-{shard}.safetensors"] = _safetensors(made)
    return Dense(files, tensors)


def _safetensors(tensors: dict[str, bytes]) -> bytes:
    at, table = 0, {}
    for name, content in tensors.items():
        offsets = [at, at + len(content)]
        table[name] = {"dtype": "U8", "shape": [len(content)], "data_offsets": offsets}
        at = offsets[1]
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(tensors.values())


def _checksum(content: bytes) -> tuple[tuple[str, str], ...]:
    value = base64.b64encode(zlib.crc32(content).to_bytes(4, "big")).decode()
    return ("x-amz-checksum-crc32", value), ("x-amz-checksum-type", "FULL_OBJECT")


def path_of(url_path: str) -> str:
    """Return the path in the model's directory of an object that is asked for."""
    return unquote(url_path).removeprefix("/models/").removeprefix(PREFIX)


def asked_for(server: StoreServer) -> dict[str, list[tuple[int, int]]]:
    """Return the ranges that were asked for by GET, by path: no byte of a body came otherwise."""
    found: dict[str, list[tuple[int, int]]] = {}
    for asked in list(server.seen):
        if asked.method == "GET" and "list-type" not in asked.parameters:
            start, _, last = asked.headers["range"].removeprefix("bytes=").partition("-")
            found.setdefault(path_of(asked.path), []).append((int(start), int(last) + 1))
    return found


def bytes_asked(server: StoreServer) -> Counter[str]:
    """Return how many bytes were asked for, by path."""
    sums = {
        path: sum(stop - start for start, stop in ranges)
        for path, ranges in asked_for(server).items()
    }
    return Counter(sums)


def fetched(served: Served) -> dict[str, RangeSet]:
    """Return what a daemon wrote that it had fetched, by path; its log level must be ``debug``."""
    found: dict[str, RangeSet] = {}
    for line in served.records():
        if line["event"] == "part fetched":
            path = str(line["key"]).removeprefix(PREFIX)
            found.setdefault(path, RangeSet()).add(line["start"], line["stop"])
    return found


def settled(there: RangeSet, size_bytes: int) -> list[tuple[int, int]]:
    """Return what the next daemon must have of a file, given what came: whole MiB, and the end."""
    return [
        (first, stop)
        for first in range(0, size_bytes, MIB)
        if there.covers(first, stop := min(first + MIB, size_bytes))
    ]
