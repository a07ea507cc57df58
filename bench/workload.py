"""Models to measure with: safetensors files of an exact size, the same for the same seed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, NamedTuple

from bench.record import ROOT

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.random import Generator

CACHE = ROOT / "bench" / ".cache"
MIB = 1 << 20
GIB = 1 << 30
BLOCK_BYTES = 32 * MIB
ENTRY_BYTES = 128  # room in the header for one tensor; the rest is padding
ITEM_BYTES = 2  # bfloat16


class Workload(NamedTuple):
    """One safetensors file.

    Attributes:
        name: for people and file names, for example ``512MiB``.
        size_bytes: of the whole file, header included.
        tensors: how many.
        seed: of shapes and values.
    """

    name: str
    size_bytes: int
    tensors: int = 300
    seed: int = 20

    @property
    def key(self) -> str:
        """The file's name."""
        return f"{self.name}-{self.tensors}.safetensors"


def sized(name: str, tensors: int = 300) -> Workload:
    """Return the workload of a size such as ``512MiB`` or ``2GiB``."""
    unit = name[-3:]
    return Workload(name, int(name[:-3]) * {"MiB": MIB, "GiB": GIB}[unit], tensors)


def make(workload: Workload, directory: Path = CACHE) -> Path:
    """Return the path of the workload's file, written first unless it is there.

    Afterwards its bytes are in the page cache.
    """
    path = directory / workload.key
    if path.exists() and path.stat().st_size == workload.size_bytes:
        _read_through(path)
        return path
    directory.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    _write(workload, part)
    part.replace(path)
    return path


def header(workload: Workload) -> bytes:
    """Return the start of the file, length included; the data fills the file exactly."""
    import numpy as np

    header_bytes = 8 * -(-workload.tensors * ENTRY_BYTES // 8)
    data_bytes = workload.size_bytes - 8 - header_bytes
    sizes = _tensor_sizes(workload, data_bytes, np.random.Generator(np.random.SFC64(workload.seed)))
    table: dict[str, object] = {}
    start = 0
    for index, size in enumerate(sizes):
        items = size // ITEM_BYTES
        shape = [items // 64, 64] if items % 64 == 0 else [items]
        table[f"model.layers.{index}.weight"] = {
            "dtype": "BF16",
            "shape": shape,
            "data_offsets": [start, start + size],
        }
        start += size
    text = json.dumps(table, separators=(",", ":")).encode()
    return header_bytes.to_bytes(8, "little") + text.ljust(header_bytes)


def _tensor_sizes(workload: Workload, data_bytes: int, rng: Generator) -> list[int]:
    """Share ``data_bytes`` out: sizes differ by a factor of about ten, the last takes the rest."""
    weights = rng.lognormal(sigma=0.6, size=workload.tensors)
    step = 64 * ITEM_BYTES
    shares = weights / weights.sum() * data_bytes
    sizes = [max(step, int(share) // step * step) for share in shares]
    sizes[-1] += data_bytes - sum(sizes)
    if sizes[-1] <= 0:
        raise ValueError(f"{workload.tensors} tensors do not fit into {workload.size_bytes} bytes")
    return sizes


def _write(workload: Workload, path: Path) -> None:
    import numpy as np

    rng = np.random.Generator(np.random.SFC64(workload.seed))
    block = rng.integers(0, 1 << 64, size=BLOCK_BYTES // 8, dtype=np.uint64)
    start = header(workload)
    with path.open("wb", buffering=0) as file:
        file.write(start)
        left_bytes = workload.size_bytes - len(start)
        while left_bytes:
            block += np.uint64(0x9E3779B97F4A7C15)  # no two blocks are equal
            left_bytes -= file.write(block.data.cast("B")[: min(left_bytes, BLOCK_BYTES)])
    path.chmod(0o644)  # nginx's workers read it under another uid


def _read_through(path: Path) -> None:
    buffer = bytearray(MIB)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
