"""Tensors as numpy arrays and as torch tensors, without a copy.

numpy, ml_dtypes and torch are imported when the first tensor is asked for, and not before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cached.core.errors import MissingPackage

if TYPE_CHECKING:
    import mmap
    from collections.abc import Iterator, Mapping, Sequence

    import numpy as np
    import torch

    from cached.client.mappings import File
    from cached.core.header import Tensor

    Array = np.ndarray[Any, Any]
    DType = np.dtype[Any]

# safetensors name → (numpy name, ml_dtypes name or None)
_PLAIN = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
    "C64": "complex64",
}
_EXTENDED = {
    "BF16": ("uint16", "bfloat16"),
    "F8_E5M2": ("uint8", "float8_e5m2"),
    "F8_E4M3": ("uint8", "float8_e4m3fn"),
    "F8_E8M0": ("uint8", "float8_e8m0fnu"),
    "F8_E5M2FNUZ": ("uint8", "float8_e5m2fnuz"),
    "F8_E4M3FNUZ": ("uint8", "float8_e4m3fnuz"),
}
TORCH_DTYPES = {  # safetensors name → torch name
    "BOOL": "bool",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "BF16": "bfloat16",
    **{name: numpy for name, numpy in _PLAIN.items() if name != "BOOL"},
}


class Arrays:
    """Makes numpy views of tensors.

    Raises:
        MissingPackage: numpy is not installed.
    """

    __slots__ = ("_dtypes", "_ndarray", "_np")

    def __init__(self) -> None:
        try:
            import numpy as np
        except ImportError as error:
            message = "numpy is not installed in this environment"
            hint = "install it, or read the bytes with model.buffer(name)"
            raise MissingPackage(message, hint=hint) from error
        self._np = np
        self._ndarray: Any = np.ndarray
        self._dtypes: dict[str, DType] = {}

    def view(self, file: File, tensor: Tensor) -> Array:
        """Return a tensor as a read-only array over its file's mapping.

        Sub-byte types (F4, F6) come as the raw bytes, of shape ``(bytes,)``; bf16 and fp8 as
        ml_dtypes' types if it is installed, else as uint16 and uint8.
        """
        _, name, shape, start, stop = tensor  # 3,000 times in an open: each step counts
        dtype = self._dtypes.get(name)
        if dtype is None:
            dtype = self._dtype(name)
        if name not in TORCH_DTYPES:
            shape = (stop - start,)
        if start == stop:
            empty: Array = self._np.empty(shape, dtype)
            empty.flags.writeable = False
            return empty
        array: Array = self._ndarray(shape, dtype, file.base(self._whole), start)
        return array

    def views(
        self, files: Sequence[File], tensors: Mapping[str, tuple[int, Tensor]]
    ) -> Iterator[tuple[str, Array]]:
        """Yield every tensor as ``view`` makes it, with its name: in half the time."""
        ndarray, known = self._ndarray, self._dtypes
        bases: dict[int, object] = {}
        for name, (index, tensor) in tensors.items():
            _, dtype, shape, start, stop = tensor
            if index in bases and start != stop and dtype in known and dtype in TORCH_DTYPES:
                yield name, ndarray(shape, known[dtype], bases[index], start)
                continue
            yield name, self.view(files[index], tensor)
            if start != stop:
                bases[index] = files[index].base(self._whole)

    def _whole(self, mapping: mmap.mmap) -> Array:
        return self._np.frombuffer(mapping, self._np.uint8)

    def _dtype(self, name: str) -> DType:
        np = self._np
        plain, extended = _EXTENDED.get(name, (_PLAIN.get(name, "uint8"), ""))
        dtype: DType = np.dtype(plain)
        if extended:
            try:
                import ml_dtypes
            except ImportError:
                pass
            else:
                dtype = np.dtype(getattr(ml_dtypes, extended, plain))
        self._dtypes[name] = dtype
        return dtype


def import_torch() -> Any:
    """Return torch.

    Raises:
        MissingPackage: it is not installed.
    """
    try:
        import torch
    except ImportError as error:
        message = "torch is not installed in this environment"
        hint = "install it, or read numpy views with model[name]"
        raise MissingPackage(message, hint=hint) from error
    return torch


def torch_tensor(mapping: mmap.mmap | None, tensor: Tensor) -> torch.Tensor:
    """Return a tensor over a private mapping; a write to it stays in this process.

    A type that this torch does not know comes as raw bytes, of shape ``(bytes,)``.

    Raises:
        MissingPackage: torch is not installed.
    """
    torch = import_torch()

    dtype = getattr(torch, TORCH_DTYPES.get(tensor.dtype, ""), None)
    shape = tensor.shape
    size_bytes = tensor.stop - tensor.start
    if not isinstance(dtype, torch.dtype):
        dtype, shape = torch.uint8, (size_bytes,)
    if mapping is None or not size_bytes:
        return torch.empty(shape, dtype=dtype)
    flat = torch.frombuffer(mapping, dtype=torch.uint8, count=size_bytes, offset=tensor.start)
    if tensor.start % dtype.itemsize:  # a writer that did not align its header: torch needs a copy
        flat = flat.clone()
    return flat.view(dtype).reshape(shape)
