"""Large safetensors files that take no disk: holes, with a mark at both ends of each tensor."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

MARK = struct.Struct("<Q")


def name_of(number: int) -> str:
    """Return the name of a tensor by its number in the file."""
    return f"layer.{number:04}.weight"


def write_sparse(path: Path, *, tensors: int, tensor_bytes: int, first: int = 0) -> None:
    """Write a file of equal tensors of bytes, numbered from ``first``; see ``is_whole``."""
    header = {
        name_of(first + at): {
            "dtype": "U8",
            "shape": [tensor_bytes],
            "data_offsets": [at * tensor_bytes, (at + 1) * tensor_bytes],
        }
        for at in range(tensors)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        start = file.tell()
        file.truncate(start + tensors * tensor_bytes)
        for at in range(tensors):
            mark = MARK.pack(first + at + 1)
            for offset in (at * tensor_bytes, (at + 1) * tensor_bytes - MARK.size):
                file.seek(start + offset)
                file.write(mark)


def is_whole(number: int, tensor: Any) -> bool:
    """Return whether a tensor has the marks that ``write_sparse`` gave it."""
    mark = MARK.pack(number + 1)
    return bool(tensor[: MARK.size].tobytes() == mark == tensor[-MARK.size :].tobytes())
