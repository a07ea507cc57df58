"""A tensor that a worker waits for overtakes the rest of the model, wherever it lies."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

import cached
from tests.e2e.conftest import aws
from tests.e2e.served import MIB
from tests.e2e.sparse import is_whole, name_of

if TYPE_CHECKING:
    from tests.e2e.conftest import Daemons, SparseModels, Stores

TENSORS = 128
TENSOR_BYTES = 16 * MIB
LINK_BYTES_PER_S = 75e6
PREFETCH_AGE_S = 1.0
MAX_WAIT_S = 0.5


@pytest.mark.slow
@pytest.mark.parametrize("number", [TENSORS - 1, TENSORS // 2, 100, 17])
def test_a_tensor_that_is_asked_for_arrives_before_the_rest(
    daemon: Daemons, store: Stores, sparse_model: SparseModels, number: int
):
    path = sparse_model(tensors=TENSORS, tensor_bytes=TENSOR_BYTES)
    server = store({f"llm/{path.name}": path}, throttle_bytes_per_s=LINK_BYTES_PER_S)
    daemon({"llm": "s3://models/llm/"}, more=aws(server))
    with cached.open("llm", timeout_s=15) as model:
        time.sleep(PREFETCH_AGE_S)
        began_s = time.monotonic()
        tensor = model[name_of(number)]
        wait_s = time.monotonic() - began_s
        assert is_whole(number, tensor)
        del tensor
    assert wait_s <= MAX_WAIT_S
    # Not faster than the link: the tensor had not come before it was asked for.
    assert wait_s >= TENSOR_BYTES / LINK_BYTES_PER_S * 0.5
