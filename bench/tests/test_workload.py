"""A workload is a file that the safetensors library reads, of exactly the size that it names."""

from __future__ import annotations

import ml_dtypes  # noqa: F401  numpy's bfloat16
import pytest
from safetensors import safe_open

from bench import workload


@pytest.mark.parametrize("tensors", [1, 300])
def test_a_file_has_its_size_and_its_tensors(tmp_path, tensors):
    work = workload.Workload("small", 300_000, tensors)
    path = workload.make(work, tmp_path)
    assert path.stat().st_size == 300_000
    with safe_open(path, framework="np") as file:
        assert len(file.keys()) == tensors


def test_the_same_seed_makes_the_same_bytes(tmp_path):
    one = workload.make(workload.Workload("one", 1 << 20, 30), tmp_path)
    same = workload.make(workload.Workload("same", 1 << 20, 30), tmp_path)
    other = workload.make(workload.Workload("other", 1 << 20, 30, seed=21), tmp_path)
    assert one.read_bytes() == same.read_bytes() != other.read_bytes()


def test_a_size_is_read_from_its_name():
    assert workload.sized("512MiB").size_bytes == 512 << 20
    assert workload.sized("2GiB", 3000) == workload.Workload("2GiB", 2 << 30, 3000)


def test_tensors_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="300 tensors do not fit into 40000 bytes"):
        workload.header(workload.Workload("tiny", 40_000))
