"""Every dtype of the format becomes an array, without a copy, that nobody can write to."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest

from cached.client.arrays import TORCH_DTYPES, Arrays, torch_tensor
from cached.client.mappings import File, Lease, private_mapping
from cached.core import header
from cached.core.errors import MissingPackage, ModelClosed
from cached.core.header import DTYPE_BITS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from cached.core.header import Tensor

    Made = Callable[..., tuple[File, Tensor]]

EXTENDED = {
    "BF16": (ml_dtypes.bfloat16, "uint16"),
    "F8_E5M2": (ml_dtypes.float8_e5m2, "uint8"),
    "F8_E4M3": (ml_dtypes.float8_e4m3fn, "uint8"),
    "F8_E8M0": (ml_dtypes.float8_e8m0fnu, "uint8"),
    "F8_E5M2FNUZ": (ml_dtypes.float8_e5m2fnuz, "uint8"),
    "F8_E4M3FNUZ": (ml_dtypes.float8_e4m3fnuz, "uint8"),
}
RAW = {"F4", "F6_E2M3", "F6_E3M2"}
KINDS = {"BOOL": "b", "U": "u", "I": "i", "F": "f", "C": "c"}
DATA = bytes([0, 1]) * 64


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """Map a file with one tensor, after ``odd`` bytes of another."""

    def make(dtype: str, shape: list[int], *, odd: int = 0) -> tuple[File, Tensor]:
        table = [("odd", "U8", [odd]), ("w", dtype, shape)]
        raw = header.write(table)
        size_bytes = header.parse(raw, len(raw) + odd + _size(dtype, shape)).tensors["w"].stop
        content = (raw + bytes(odd) + DATA)[:size_bytes]
        path = tmp_path / "file"
        path.write_bytes(content)
        file = File("file", len(content), len(raw))
        file.map(os.open(path, os.O_RDONLY), Lease(lambda: None))
        return file, header.read(raw, len(content)).tensors["w"]

    return make


def _size(dtype: str, shape: list[int]) -> int:
    count = 1
    for dimension in shape:
        count *= dimension
    return count * DTYPE_BITS[dtype] // 8


def address(file: File) -> int:
    return int(np.frombuffer(file.mapping, np.uint8).ctypes.data)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", sorted(DTYPE_BITS))
def test_a_tensor_is_a_read_only_view_into_the_mapping(made: Made, dtype: str):
    file, tensor = made(dtype, [2, 4])
    array = Arrays().view(file, tensor)
    assert array.ctypes.data == address(file) + tensor.start
    assert array.nbytes == tensor.stop - tensor.start
    assert array.tobytes() == DATA[: array.nbytes]
    assert not array.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        array[...] = 0
    with pytest.raises(ValueError, match="cannot set WRITEABLE"):
        array.flags.writeable = True
    assert array.shape == ((array.nbytes,) if dtype in RAW else (2, 4))


@pytest.mark.parametrize("dtype", sorted(DTYPE_BITS.keys() - EXTENDED.keys() - RAW))
def test_plain_types_are_numpys_own(made: Made, dtype: str):
    array = Arrays().view(*made(dtype, [2]))
    assert array.dtype.kind == KINDS.get(dtype, KINDS.get(dtype[0]))
    assert array.dtype.itemsize * 8 == DTYPE_BITS[dtype]


@pytest.mark.parametrize("dtype", EXTENDED)
def test_short_floats_are_those_of_ml_dtypes(made: Made, dtype: str):
    assert Arrays().view(*made(dtype, [4])).dtype == np.dtype(EXTENDED[dtype][0])


@pytest.mark.parametrize("dtype", EXTENDED)
def test_without_ml_dtypes_they_are_plain_numbers_of_their_size(
    made: Made, dtype: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    array = Arrays().view(*made(dtype, [4]))
    assert array.dtype == np.dtype(EXTENDED[dtype][1])
    assert array.tobytes() == DATA[: array.nbytes]


def test_a_scalar_has_no_dimensions(made: Made):
    array = Arrays().view(*made("U16", []))
    assert array.shape == ()
    assert array == 256


@pytest.mark.parametrize("shape", [[0], [3, 0, 2]])
def test_a_tensor_without_elements_keeps_its_shape(made: Made, shape: list[int]):
    array = Arrays().view(*made("BF16", shape))
    assert array.shape == tuple(shape)
    assert array.dtype == ml_dtypes.bfloat16
    assert not array.flags.writeable


def test_a_tensor_that_is_not_aligned_is_still_a_view(made: Made):
    file, tensor = made("F32", [3], odd=3)
    array = Arrays().view(file, tensor)
    assert array.ctypes.data == address(file) + tensor.start
    assert array.tobytes() == DATA[:12]


def test_views_of_one_file_share_its_base(made: Made):
    file, tensor = made("U8", [8])
    arrays = Arrays()
    assert np.shares_memory(arrays.view(file, tensor), arrays.view(file, tensor))


def test_all_views_together_are_those_of_each_alone(made: Made):
    shapes: list[list[int]] = [[2, 4], [], [0], [8]]
    pairs = [
        made(dtype, shape, odd=number)
        for number, dtype in enumerate(sorted(DTYPE_BITS))
        for shape in shapes
        if _size(dtype, shape) or 0 in shape
    ]
    files = [file for file, _ in pairs]
    tensors = {str(index): (index // 3, pairs[index // 3][1]) for index in range(3 * len(pairs))}
    together = dict(Arrays().views(files, tensors))
    assert list(together) == list(tensors)
    for name, (index, tensor) in tensors.items():
        alone = Arrays().view(files[index], tensor)
        assert (together[name].dtype, together[name].shape) == (alone.dtype, alone.shape)
        assert together[name].tobytes() == alone.tobytes()
        assert not together[name].flags.writeable
        if alone.size:
            assert together[name].ctypes.data == alone.ctypes.data


def test_a_view_of_a_closed_file_is_refused(made: Made):
    file, tensor = made("U8", [8])
    file.drop()
    with pytest.raises(ModelClosed):
        Arrays().view(file, tensor)


def test_without_numpy_the_error_says_what_can_be_done(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "numpy", None)
    with pytest.raises(MissingPackage, match=r"install it, or read the bytes with model.buffer"):
        Arrays()


def test_the_types_that_torch_is_asked_for_are_all_but_those_below_a_byte():
    assert TORCH_DTYPES.keys() == DTYPE_BITS.keys() - RAW


@pytest.mark.parametrize("dtype", sorted(TORCH_DTYPES))
def test_a_type_that_torch_is_asked_for_is_the_one_of_the_array(made: Made, dtype: str):
    name = TORCH_DTYPES[dtype]  # torch, numpy and ml_dtypes call them the same
    assert np.dtype(getattr(ml_dtypes, name, name)) == Arrays().view(*made(dtype, [4])).dtype


@pytest.mark.parametrize("dtype", sorted(DTYPE_BITS))
def test_a_torch_tensor_shares_the_private_mapping(
    torch: Any, made: Made, dtype: str, tmp_path: Path
):
    file, tensor = made(dtype, [2, 4])
    descriptor = os.open(tmp_path / "file", os.O_RDONLY)
    mapping = private_mapping(descriptor, file, Lease(lambda: None))
    found = torch_tensor(mapping, tensor)
    start = np.frombuffer(mapping, np.uint8).ctypes.data
    assert found.data_ptr() == start + tensor.start
    assert found.nbytes == tensor.stop - tensor.start
    is_known = found.dtype != torch.uint8 or dtype == "U8"
    assert tuple(found.shape) == ((2, 4) if is_known else (found.nbytes,))


@pytest.mark.usefixtures("torch")
def test_torch_gets_a_copy_of_what_is_not_aligned(made: Made, tmp_path: Path):
    file, tensor = made("F32", [3], odd=3)
    descriptor = os.open(tmp_path / "file", os.O_RDONLY)
    mapping = private_mapping(descriptor, file, Lease(lambda: None))
    assert torch_tensor(mapping, tensor).numpy().tobytes() == DATA[:12]


@pytest.mark.usefixtures("torch")
def test_torch_gets_empty_tensors_with_their_shape(made: Made):
    _, tensor = made("BF16", [3, 0])
    assert tuple(torch_tensor(None, tensor).shape) == (3, 0)
