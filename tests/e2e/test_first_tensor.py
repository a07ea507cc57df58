"""A tensor that a worker waits for overtakes the rest of the model, wherever it lies."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

import cached
from tests.e2e.served import MIB
from tests.e2e.sparse import is_whole, name_of

if TYPE_CHECKING:
    from tests.e2e.conftest import Daemons, SlowStores

TENSORS = 128
TENSOR_BYTES = 16 * MIB
LINK_BYTES_PER_S = 75e6
PREFETCH_AGE_S = 1.0
MAX_WAIT_S = 0.5


@pytest.mark.slow
@pytest.mark.parametrize("number", [TENSORS - 1, TENSORS // 2, 100, 17])
def test_a_tensor_that_is_asked_for_arrives_before_the_rest(
    daemon: Daemons, slow_stores: SlowStores, number: int
):
    store = slow_stores(TENSORS, TENSOR_BYTES, LINK_BYTES_PER_S)
    daemon({"llm": store.uri}, more=store.environment)
    with cached.open("llm", timeout_s=15) as model:
        time.sleep(PREFETCH_AGE_S)
        began_s = time.monotonic()
        tensor = model[name_of(number)]
        wait_s = time.monotonic() - began_s
        assert is_whole(number, tensor)
        del tensor
    assert wait_s <= MAX_WAIT_S
    # It took the link to itself for the most part: 16 MiB alone are 0.22 s.
    assert wait_s >= TENSOR_BYTES / LINK_BYTES_PER_S * 0.5
