"""A worker sees each tensor as soon as its bytes are there, and for as long as it wants."""

from __future__ import annotations

import gc
import os
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import cached
from cached.core.errors import (
    AccessDenied,
    DaemonUnavailable,
    LoadFailed,
    MissingPackage,
    ModelClosed,
    Stale,
    TensorUnknown,
    TimedOut,
)
from tests.fakes.local_daemon import (
    PAD_BYTES,
    WAIT_S,
    GatedStore,
    open_descriptors,
    padded,
    weights,
)

if TYPE_CHECKING:
    from tests.client.conftest import Serve
    from tests.fakes.local_daemon import Calls

A, B, C = b"a" * 5000, b"b" * 5000, b"c" * 5000
SMALL = weights(
    ("w", "F32", [2, 2], np.arange(4, dtype="f4").tobytes()),
    ("none", "BF16", [0, 3], b""),
    ("größe/../x", "U8", [3], b"xyz"),
    author="nobody",
)
FILES = {
    "a.safetensors": padded("a", A),
    "b.safetensors": padded("b", B),
    "c.safetensors": padded("c", C),
    "config.json": b'{"n": 1}',
    "empty.txt": b"",
    "small.safetensors": SMALL,
}
HELD = ["a.safetensors", "b.safetensors", "c.safetensors"]


def held() -> GatedStore:
    """Return a store that keeps tensors a, b and c back."""
    return GatedStore(FILES, HELD)


def test_a_resident_model_is_a_mapping_of_its_tensors(serve: Serve):
    serve(GatedStore(FILES))
    with cached.open("m", until="ready") as model:
        names = {"a", "a.pad", "b", "b.pad", "c", "c.pad", "w", "none", "größe/../x"}
        assert set(model) == set(model.keys()) == names
        assert len(model) == len(names)
        assert "w" in model
        assert "x" not in model
        assert model["w"].tolist() == [[0, 1], [2, 3]]
        assert bytes(model["a"]) == A
        assert model["größe/../x"].tobytes() == b"xyz"
        assert model["none"].shape == (0, 3)
        assert model.dtype("none") == "BF16"
        assert model.shape("w") == (2, 2)
        assert bytes(model.buffer("b")) == B
        assert bytes(model.buffer("none")) == b""
        assert model.metadata == {"author": "nobody"}
        assert model.name == "m"
        assert repr(model) == f"<cached.Model m@{model.version}: 9 tensors>"


def test_the_directory_and_the_files_are_what_was_stored(serve: Serve):
    serve(GatedStore(FILES))
    with cached.open("m") as model:
        assert model.files == tuple(sorted(FILES))
        for path, content in FILES.items():
            assert bytes(model.file(path)) == content
            with open(f"{model.path}/{path}", "rb") as file:
                assert file.read() == content
        with pytest.raises(KeyError, match="no file 'x'"):
            model.file("x")


def test_a_tensor_is_a_read_only_view_of_the_shared_mapping(serve: Serve):
    serve(GatedStore(FILES))
    with cached.open("m", until="ready") as model, cached.open("m") as again:
        assert np.shares_memory(model["a"], model["a"])
        assert not np.shares_memory(model["a"], again["a"])  # two mappings of the same pages
        assert not model["a"].flags.writeable
        assert model.buffer("a").readonly
        start = model["a"].ctypes.data
        with open("/proc/self/maps") as maps:
            ours = [line for line in maps if "a.safetensors" in line]
        assert any(
            int(low, 16) <= start < int(high, 16) and " r--s " in line
            for line in ours
            for low, high in [line.split(maxsplit=1)[0].split("-")]
        )


def test_a_tensor_is_there_before_the_rest(serve: Serve):
    daemon = serve(held())
    with cached.open("m", timeout_s=WAIT_S) as model:
        assert model["w"].tolist() == [[0, 1], [2, 3]]
        assert len(model["b.pad"]) == PAD_BYTES
        daemon.store.release("b.safetensors")
        assert bytes(model["b"]) == B
        with pytest.raises(TimedOut, match=r"waited 0\.01 s for tensor 'c' of m in vain"):
            model.wait(["c"], timeout_s=0.01)
        daemon.store.release(*HELD)
        assert bytes(model["c"]) == C
        assert model.path


def test_a_time_out_names_what_did_not_come(serve: Serve, call: Calls):
    serve(held())
    with cached.open("m", timeout_s=0.3) as model:
        waits = {
            "tensor 'a' of m": call(lambda: model["a"]),
            "tensor 'b' of m": call(lambda: model.buffer("b")),
            "all of m": call(lambda: model.path),
            "file 'b.safetensors' of m": call(lambda: model.file("b.safetensors")),
        }
        for what, wait in waits.items():
            expected = rf"waited 0.3 s for {what} in vain: \d+ of \d+ bytes are there"
            with pytest.raises(TimedOut, match=expected):
                wait.result(WAIT_S)


def test_a_time_out_says_how_much_is_there(serve: Serve):
    serve(held())
    with cached.open("m", timeout_s=WAIT_S) as model:
        come = (1 << 20) - (len(FILES["a.safetensors"]) - 5000)  # the first GET brings 1 MiB
        assert 0 < come < 5000
        expected = rf"tensor 'a' of m in vain: {come} of 5000 bytes are there; give more time"
        with pytest.raises(TimedOut, match=expected):
            model.wait(["a"], timeout_s=0.05)


def test_names_that_two_files_share_are_told_apart(serve: Serve):
    one, two = (
        weights(("w", "U8", [1], b"1"), ("x", "U8", [1], b"x")),
        weights(("w", "U8", [1], b"2")),
    )
    serve(GatedStore({"text/m.safetensors": one, "unet/m.safetensors": two}))
    with cached.open("m", timeout_s=WAIT_S) as model:
        assert list(model) == ["text/m.safetensors::w", "x", "unet/m.safetensors::w"]
        assert model["text/m.safetensors::w"].tobytes() == b"1"
        assert model["unet/m.safetensors::w"].tobytes() == b"2"
        assert "w" not in model
        with pytest.raises(
            TensorUnknown, match=r"m has 2 tensors named 'w'; .*unet/m.safetensors::w"
        ):
            model["w"]


def test_threads_wait_for_different_tensors_at_once(serve: Serve, call: Calls):
    daemon = serve(held())
    with cached.open("m", timeout_s=WAIT_S) as model:
        waiting = {name: call(lambda name=name: bytes(model[name])) for name in "abc" * 4}
        for name, content in (("c", C), ("a", A)):
            daemon.store.release(f"{name}.safetensors")
            assert waiting[name].result(WAIT_S) == content
        assert not waiting["b"].done()
        daemon.store.release(*HELD)
        assert waiting["b"].result(WAIT_S) == B


def test_many_tensors_are_waited_for_together(serve: Serve, call: Calls):
    daemon = serve(held())
    with cached.open("m", timeout_s=WAIT_S) as model:
        waiting = call(model.wait, ["a", "b", "none", "w"])
        daemon.store.release("a.safetensors")
        assert bytes(model["a"]) == A
        assert not waiting.done()
        daemon.store.release("b.safetensors")
        waiting.result(WAIT_S)
        everything = call(model.wait)
        daemon.store.release("c.safetensors")
        everything.result(WAIT_S)
        assert bytes(model["c"]) == C


def test_items_come_in_the_order_of_arrival_each_once(serve: Serve):
    daemon = serve(held())
    with cached.open("m", timeout_s=WAIT_S) as model:
        coming = model.items(order="arrival")
        first: dict[str, Any] = {}
        while len(first) < 6:
            name, tensor = next(coming)
            first[name] = tensor
        assert first.keys() == {"a.pad", "b.pad", "c.pad", "w", "none", "größe/../x"}
        for name, content in (("b", B), ("c", C), ("a", A)):
            daemon.store.release(f"{name}.safetensors")
            found, tensor = next(coming)
            assert (found, bytes(tensor)) == (name, content)
        assert list(coming) == []


def test_items_come_in_the_order_of_the_files(serve: Serve):
    serve(GatedStore(FILES))
    with cached.open("m", timeout_s=WAIT_S) as model:
        names = [name for name, _ in model.items()]
        assert names == list(model)
        assert names[:3] == ["a.pad", "a", "b.pad"]
        model.wait()
        assert [name for name, _ in model.items(order="arrival")] == names
        with pytest.raises(ValueError, match="order must be 'file' or 'arrival', was 'x'"):
            model.items(order="x")


def test_an_unknown_tensor_is_a_key_error_that_says_where_to_look(serve: Serve):
    serve(GatedStore(FILES))
    with cached.open("m") as model:
        for ask in (model.__getitem__, model.buffer, model.dtype, model.shape):
            with pytest.raises(TensorUnknown, match=r"m has no tensor named 'x'; it has 9"):
                ask("x")
        with pytest.raises(KeyError):
            model.wait(["w", "x"])


def test_the_lease_lasts_as_long_as_a_view_and_not_longer(serve: Serve):
    daemon = serve(GatedStore(FILES))
    gc.disable()
    try:
        with cached.open("m", until="ready") as model:
            array, buffer = model["a"][10:20], model.buffer("b")
        del model
        assert daemon.leases == 1
        assert bytes(array) == A[10:20]
        del array
        assert daemon.leases == 1
        assert bytes(buffer) == B
        del buffer
        daemon.wait_for_leases(0)
    finally:
        gc.enable()


def test_a_model_that_is_only_dropped_gives_its_lease_back(serve: Serve):
    daemon = serve(GatedStore(FILES))
    gc.disable()
    try:
        model = cached.open("m")
        assert daemon.leases == 1
        del model
        daemon.wait_for_leases(0)
    finally:
        gc.enable()


def test_closing_again_does_nothing_and_use_after_it_is_refused(serve: Serve):
    serve(GatedStore(FILES))
    model = cached.open("m")
    pairs = model.items()
    next(pairs)
    model.close()
    model.close()
    calls: list[Any] = [
        *(lambda: model["w"], lambda: model["none"], lambda: model.buffer("w")),
        *(lambda: model.path, lambda: model.is_stale, model.items, model.wait),
        *(lambda: model.file("config.json"), lambda: model.wait(["w"]), lambda: next(pairs)),
    ]
    for call in calls:
        with pytest.raises(ModelClosed, match="views stay valid"):
            call()
    assert model.shape("w") == (2, 2)
    assert len(model.files) == 6


def test_closing_while_a_thread_waits_is_an_error_for_that_thread(serve: Serve, call: Calls):
    daemon = serve(held())
    model = cached.open("m", timeout_s=WAIT_S)
    waiting = call(lambda: model["a"])
    with pytest.raises(TimedOut):
        model.wait(["b"], timeout_s=0.05)  # by now the other waits too
    model.close()
    daemon.store.release(*HELD)
    with pytest.raises(ModelClosed):
        waiting.result(WAIT_S)
    daemon.wait_for_leases(0)


def test_views_and_what_was_there_survive_the_daemon(serve: Serve):
    daemon = serve(held())
    with cached.open("m", timeout_s=WAIT_S) as model:
        early = model["w"]
        daemon.hang_up()
        assert early.tolist() == [[0, 1], [2, 3]]
        assert model["w"].tolist() == [[0, 1], [2, 3]]
        assert model["none"].shape == (0, 3)
        for ask in (lambda: model["a"], lambda: model.path, lambda: model.is_stale):
            with pytest.raises(DaemonUnavailable, match="what is mapped stays valid"):
                ask()


def test_all_who_wait_hear_of_the_daemons_death(serve: Serve, call: Calls):
    daemon = serve(held())
    with cached.open("m", timeout_s=WAIT_S) as model:
        waits = [call(lambda name=name: model[name]) for name in "abc"]
        waits.append(call(lambda: list(model.items(order="arrival"))))
        with pytest.raises(TimedOut):
            model.wait(["b"], timeout_s=0.05)
        daemon.hang_up()
        for wait in waits:
            with pytest.raises(DaemonUnavailable):
                wait.result(WAIT_S)


def test_a_load_that_fails_is_told_to_who_waits(serve: Serve, call: Calls):
    daemon = serve(held())
    with cached.open("m", timeout_s=WAIT_S) as model:
        waiting = call(lambda: model["a"])
        with pytest.raises(TimedOut):
            model.wait(["b"], timeout_s=0.05)
        daemon.store.release(*HELD, error=AccessDenied("403 for a.safetensors"))
        with pytest.raises(LoadFailed, match=r"403 for a.safetensors"):
            waiting.result(WAIT_S)
        assert model.is_stale


def test_a_child_of_fork_asks_for_itself_and_shares_the_lease(serve: Serve, call: Calls):
    daemon = serve(held())
    with cached.open("m", timeout_s=WAIT_S) as model:
        in_parent = call(lambda: bytes(model["a"]))
        with pytest.raises(TimedOut):
            model.wait(["b"], timeout_s=0.05)
        asked, told = os.pipe(), os.pipe()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                early = model["w"].tolist() == [[0, 1], [2, 3]]
                os.write(asked[1], b"?")
                is_right = early and bytes(model["c"]) == C and bytes(model["a"]) == A
                os.write(told[1], b"y" if is_right else b"n")
                status = 0 if os.read(asked[0], 1) == b"!" else 2
            finally:
                os._exit(status)
        assert os.read(asked[0], 1) == b"?"
        daemon.store.release(*HELD)
        assert in_parent.result(WAIT_S) == A
        assert bytes(model["b"]) == B
        assert os.read(told[0], 1) == b"y"
    assert daemon.leases == 2  # the parent's, which the child keeps, and the child's own
    os.write(asked[1], b"!")
    assert os.waitpid(child, 0)[1] == 0
    daemon.wait_for_leases(0)
    for end in (*asked, *told):
        os.close(end)


def test_a_child_of_fork_lets_go_of_what_threads_of_its_parent_wait_for(serve: Serve, call: Calls):
    daemon = serve(held())
    model = cached.open("m", timeout_s=WAIT_S)
    waiting = call(model.wait, ["a"])
    with pytest.raises(TimedOut):
        model.wait(["b"], timeout_s=0.05)  # by now the other waits too
    asked, told = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(asked[1])  # so that the end of this process is the child's, too
            model.close()
            os.write(told[1], b"c")
            os.read(asked[0], 1)
        finally:
            os._exit(0)
    assert os.read(told[0], 1) == b"c"
    daemon.store.release(*HELD)
    waiting.result(WAIT_S)
    model.close()
    daemon.wait_for_leases(0)  # while the child lives
    os.write(asked[1], b"!")
    assert os.waitpid(child, 0)[1] == 0
    for end in (*asked, *told):
        os.close(end)


def test_opening_using_and_closing_leaves_no_descriptor(serve: Serve):
    serve(GatedStore(FILES))
    cached.open("m", until="ready").close()
    before = {path for path in open_descriptors().values() if "safetensors" in path}
    for _ in range(3):
        with cached.open("m") as model:
            dict(model.items())
            assert model.path
    after = {path for path in open_descriptors().values() if "safetensors" in path}
    assert after == before


def test_without_torch_that_is_said_before_anything_is_waited_for(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "torch", None)
    serve(held())
    said = r"torch is not installed.*read numpy views"
    with (
        cached.open("m", timeout_s=WAIT_S) as model,
        pytest.raises(MissingPackage, match=said),
    ):
        model.torch()


def test_torch_tensors_share_memory_and_keep_writes_to_themselves(torch: Any, serve: Serve):
    daemon = serve(GatedStore(FILES))
    with cached.open("m") as model:
        state = model.torch()
        assert state.keys() == set(model)
        assert state["w"].dtype == torch.float32
        assert state["none"].dtype == torch.bfloat16
        assert bytes(state["a"].numpy()) == A
        state["w"].add_(1)
        assert state["w"].tolist() == [[1, 2], [3, 4]]
        assert model["w"].tolist() == [[0, 1], [2, 3]]
    del model
    kept = state.pop("c")
    state.clear()
    assert daemon.leases == 1
    assert bytes(kept.numpy()) == C
    del kept
    daemon.wait_for_leases(0)


def is_stale(model: cached.Model) -> bool:
    return model.is_stale  # a function, as mypy takes it that a property stays what it was


def test_a_model_says_when_it_is_stale(serve: Serve, call: Calls):
    daemon = serve(held())
    with cached.open("m", timeout_s=WAIT_S) as old:
        assert not is_stale(old)
        daemon.store.objects["a.safetensors"] = padded("a", C)
        waiting = call(lambda: old["a"])
        daemon.store.release(*HELD)
        with pytest.raises(Stale, match="safetensors was replaced"):
            waiting.result(WAIT_S)
        assert is_stale(old)
        with cached.open("m", timeout_s=WAIT_S) as new:
            assert new.version != old.version
            assert bytes(new["a"]) == C
            assert not is_stale(new)
            assert is_stale(old)
