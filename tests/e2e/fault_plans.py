"""Plans of what goes wrong: a small model, how it is kept and checked, the faults of its store.

A plan follows from its seed alone. What may come of it follows from the faults that were met.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from typing import TYPE_CHECKING, NamedTuple

from cached.core.digests import BLOCK_BYTES, MANIFEST_NAME, Digests, FileDigests, write
from cached.core.errors import ChecksumMismatch, LoadFailed, Stale
from cached.core.manifest import manifest_of
from cached.core.objects import StoredObject
from tests.fakes.local_daemon import weights
from tests.fakes.s3_objects import Generated, Stored, replaced, stored, summed
from tests.fakes.store_faults import (
    Changed,
    ClosedIdle,
    Corrupted,
    Duplicate,
    Fault,
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

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from cached.core.errors import CachedError

PREFIX = "llm/"
URI = f"s3://models/{PREFIX}"
MIB = 1 << 20
SHORT_STALL_S = 0.15  # less than the time-out, twice as long as a tick of the reader
RECEIVE_TIMEOUT_S = 0.4
EVER = 400  # more requests than any plan makes


class Mode(NamedTuple):
    """How bytes are checked.

    Attributes:
        verify: of the daemon.
        algorithm: of the checksums that the store offers; empty: none.
    """

    verify: str
    algorithm: str = ""

    @property
    def finds_wrong_bytes(self) -> bool:
        return self.verify == "digest" or (self.verify == "checksum" and bool(self.algorithm))


MODES = (
    Mode("checksum", "crc64nvme"),
    Mode("checksum", "crc32c"),
    Mode("checksum", "crc32"),
    Mode("checksum", "sha256"),
    Mode("checksum", "sha1"),
    Mode("checksum"),
    Mode("digest"),
    Mode("off", "crc32"),
)


class Plan(NamedTuple):
    """One try.

    Attributes:
        tls: the store speaks it.
        segments: back end.
        sizes: of the files, by path.
        part_bytes: of the uploads; 0: in one.
        faults: as ``StoreServer`` takes them.
    """

    seed: int
    tls: bool
    segments: str
    mode: Mode
    sizes: dict[str, int]
    part_bytes: int
    faults: dict[int | tuple[str, int], Fault]

    def objects(self) -> dict[str, Stored]:
        """Return what the store holds, by key."""
        files = {path: _content(path, size, self.seed) for path, size in self.sizes.items()}
        if self.mode.verify == "digest":
            files[MANIFEST_NAME] = _digests(files)
        return {PREFIX + path: self._stored(content) for path, content in files.items()}

    def _stored(self, content: bytes) -> Stored:
        made = stored(content)
        if not self.mode.algorithm or not content:
            return made
        is_whole = self.mode.algorithm == "crc64nvme"  # S3 keeps no other of these
        part_bytes = 0 if is_whole else self.part_bytes
        return summed(made._replace(part_bytes=part_bytes), self.mode.algorithm)


def _content(path: str, size_bytes: int, seed: int) -> bytes:
    data = Generated(size_bytes, seed % 16).content(0, size_bytes)
    if not path.endswith(".safetensors"):
        return data
    half = size_bytes // 2
    return weights(
        (f"{path}:a", "U8", [half], data[:half]),
        (f"{path}:b", "I8", [size_bytes - half], data[half:]),
    )


def _digests(files: Mapping[str, bytes]) -> bytes:
    listed = {}
    for path, data in files.items():
        starts = range(0, len(data), BLOCK_BYTES)
        blocks = tuple(hashlib.sha256(data[at : at + BLOCK_BYTES]).digest() for at in starts)
        listed[path] = FileDigests(len(data), hashlib.sha256(data).digest(), blocks)
    return write(Digests(BLOCK_BYTES, listed))


def draw(seed: int) -> Plan:
    """Return the plan of a seed."""
    rng = random.Random(seed)
    names = rng.sample(
        ("a.safetensors", "b.safetensors", "config.json", "sub/tokenizer.bin", "z.bin"),
        rng.randint(2, 5),
    )
    return Plan(
        seed=seed,
        tls=rng.random() < 0.4,
        segments=rng.choice(("tmpfs", "memfd", "file")),
        mode=rng.choice(MODES),
        sizes={name: _size(rng) for name in names},
        part_bytes=rng.choice((0, 0, MIB, 300_000)),
        faults={k: fault for _ in range(rng.randint(1, 5)) for k, fault in _drawn(rng).items()},
    )


def _size(rng: random.Random) -> int:
    kind = rng.random()
    if kind < 0.05:
        return 0
    if kind < 0.45:
        return rng.randrange(MIB, 3 * MIB)  # several parts
    return int(2 ** rng.uniform(0, math.log2(3 * MIB)))


BODY: tuple[Callable[[random.Random], Fault], ...] = (
    lambda rng: ShortBody(_place(rng)),
    lambda rng: Reset(_place(rng)),
    lambda rng: Stall(rng.choice((SHORT_STALL_S, math.inf)), _place(rng)),
    lambda rng: WrongRange(rng.choice((-1, 1, 4096))),
    lambda rng: WrongTotal(rng.choice((-1, 1, 100_000))),
    lambda rng: WrongLength(rng.choice((-1, 1, 5000))),
    lambda _: Duplicate(),
    lambda _: IgnoredRange(),
    lambda rng: Corrupted(rng.choice((rng.randrange(300), rng.randrange(3 * MIB)))),
    lambda rng: Corrupted(rng.randrange(3 * MIB)),
    lambda _: Changed(),
    lambda _: Changed(),
)
HEAD: tuple[Callable[[random.Random], Fault], ...] = (
    lambda _: NoEtag(),
    lambda _: OtherEtag(),
)
ANY: tuple[Callable[[random.Random], Fault], ...] = (
    lambda _: Mute(),
    lambda _: Reset(),
    lambda _: ClosedIdle(),
    lambda rng: Stall(rng.choice((SHORT_STALL_S, math.inf)), -1),
    lambda rng: Raw(rng.choice(RAWS)),
    lambda _: Status(503, code="SlowDown"),
    lambda _: Status(500, code="InternalError"),
    lambda _: Status(429, headers={"retry-after": "0"}),
    lambda rng: Status(*rng.choice(((403, {}, "AccessDenied"), (404, {}, "NoSuchKey")))),
)
RAWS: tuple[bytes, ...] = (
    b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
    b"HTTP/1.1 206 Partial\r\ncontent-le",
    b"HTTP/1.1 206 Partial\r\nno colon\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\ncontent-length: 10\r\n\r\n<Listing>",
    b"HTTP/1.1 200 OK\r\ncontent-length: 99999\r\n\r\n<ListBucketResult>",
    b"HTTP/1.1 200 OK\r\ncontent-length: 18\r\n\r\n<ListBucketResult>",
    b"HTTP/1.1 206 Partial\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    bytes(300),
)


def _place(rng: random.Random) -> int:
    return rng.choice((0, 1, rng.randrange(2000), rng.randrange(MIB)))


def _drawn(rng: random.Random) -> dict[int | tuple[str, int], Fault]:
    """Return one fault: at one request, sometimes at all from then on."""
    kind = rng.choices(("GET", "HEAD", "LIST"), (8, 2, 1))[0]
    choices = {"GET": BODY + BODY + HEAD + ANY, "HEAD": HEAD + ANY, "LIST": ANY}[kind]
    fault = rng.choice(choices)(rng)
    first = rng.randrange({"GET": 12, "HEAD": 5, "LIST": 2}[kind])
    is_lasting = rng.random() < 0.12 and not isinstance(fault, Stall | Changed)
    numbers = range(first, first + EVER) if is_lasting else range(first, first + 1)
    return {k if kind == "GET" else (kind, k): fault for k in numbers}


# --- what may come of it

PASSING: dict[type, tuple[str, ...]] = {
    ShortBody: ("cut short",),
    Stall: ("nothing was received",),
    Reset: ("broke:", "cut short", "closed the connection", "no TLS connection"),
    Mute: ("closed the connection", "broke:"),
    ClosedIdle: (),
    Duplicate: (),
    WrongRange: ("asked for bytes", "cut short", "the content-length"),
    WrongTotal: ("asked for bytes",),
    WrongLength: ("a body of", "cut short"),
    IgnoredRange: ("answered 200 and all of",),
    Raw: (" sent ", "closed the connection", "does not tell", "no ETag", "XML"),
}
"""Faults that the next GET mends, and how they are told if they come again and again."""

FINAL: dict[type, tuple[type[CachedError], str]] = {
    Changed: (Stale, "was replaced"),
    OtherEtag: (Stale, "has the ETag"),
    NoEtag: (LoadFailed, "no ETag"),
}
"""Faults that no further GET mends, and how they are told."""


def explains(fault: Fault, error: CachedError) -> bool:
    """Return whether this is how a fault is told."""
    text = str(error)
    if isinstance(fault, Status):
        words = {403: "denied", 404: "does not exist"}.get(fault.status, "cannot serve")
        return type(error) is LoadFailed and words in text
    if isinstance(fault, Corrupted):
        is_twice = type(error) is ChecksumMismatch and "were wrong twice" in text
        return is_twice or (type(error) is LoadFailed and any(word in text for word in UNREADABLE))
    if type(fault) in FINAL:
        kind, word = FINAL[type(fault)]
        return type(error) is kind and word in text
    return type(error) is LoadFailed and any(word in text for word in PASSING[type(fault)])


UNREADABLE = (".safetensors of ", MANIFEST_NAME)
"""What a flipped bit can make of a header, or of the list of digests, before it is found wrong."""


def passes(fault: Fault) -> bool:
    """Return whether a load goes on after a fault that does not last."""
    if isinstance(fault, Status):
        return fault.status in {429, 500, 503}
    if isinstance(fault, Raw):
        return not fault.data.startswith(REPLIES)
    return type(fault) in PASSING


REPLIES = tuple(raw for raw in RAWS if b" OK" in raw or b"chunked" in raw)
"""Those that are whole heads: they have no ETag."""


def versions(plan: Plan, changes: int) -> dict[str, dict[str, bytes]]:
    """Return what each version of the model holds, by path, after so many changes at most."""
    chains = []
    for key, first in plan.objects().items():
        chain = [first]
        for _ in range(changes):
            chain.append(replaced(chain[-1]))
        chains.append([(key, each) for each in chain])
    found = {}
    for objects in itertools.product(*chains):
        listed = [
            StoredObject(key, key.removeprefix(PREFIX), each.size_bytes, each.etag)
            for key, each in objects
        ]
        content = {
            key.removeprefix(PREFIX): each.content_of(0, each.size_bytes) for key, each in objects
        }
        found[manifest_of(URI, listed).version] = content
    return found
