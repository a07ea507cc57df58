"""Without a daemon a worker reads the model itself, if it asked for that, with one warning."""

from __future__ import annotations

import gc
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import cached
from cached.adapters.s3.customer_key import headers_of
from cached.core.errors import (
    AccessDenied,
    DaemonUnavailable,
    InsecureEndpoint,
    InvalidConfig,
    LoadFailed,
    ObjectMissing,
    StoreUnavailable,
    TimedOut,
)
from cached.core.header import write
from tests.fakes.local_daemon import WAIT_S, GatedStore, open_descriptors, weights
from tests.fakes.s3_objects import SENT_KEY_MD5
from tests.fakes.store_faults import Reset, ShortBody, Stall, Status
from tests.fakes.store_server import StoreServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.client.conftest import Serve

DATA = write([("t", "U8", (5,))]) + b"12345"


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model on disk, and no daemon."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a.safetensors").write_bytes(DATA)
    (folder / "config.json").write_bytes(b"{}")
    monkeypatch.setenv("CACHED_SOCKET", str(tmp_path / "none"))
    monkeypatch.setenv("CACHED_MODELS", f"m=file://{folder}/")
    return folder


@pytest.mark.usefixtures("alone")
def test_without_leave_a_missing_daemon_is_an_error():
    with pytest.raises(DaemonUnavailable):
        cached.open("m")


@pytest.mark.usefixtures("alone")
def test_the_model_is_read_from_its_uri_with_one_warning():
    with pytest.warns(RuntimeWarning, match="m") as warned:
        model = cached.open("m", fallback="s3")
    with model:
        assert bytes(model.buffer("t")) == b"12345"
        assert bytes(model.file("config.json")) == b"{}"
        path = model.path
        assert sorted(os.listdir(path)) == ["a.safetensors", "config.json"]

    assert len(warned) == 1


@pytest.mark.usefixtures("alone")
def test_a_model_without_a_uri_says_where_to_name_it():
    with pytest.raises(InvalidConfig, match="CACHED_MODELS"):
        cached.open("other", fallback="s3")


BIG = os.urandom((9 << 20) + 1)  # two parts
OBJECTS = {
    "llm/a.safetensors": weights(("big", "U8", [len(BIG)], BIG), ("none", "U8", [0], b"")),
    "llm/deep/b.safetensors": weights(("small", "BF16", [2], b"abcd")),
    "llm/config.json": b"{}",
    "llm/empty.txt": b"",
}


def left_over() -> set[str]:
    """Return the private directories that are there."""
    return {path.name for path in Path("/dev/shm").glob("cached-fallback-*")}


def wait_for_threads() -> None:
    """Wait for those that are left behind when time is up, and for the one that rests a while."""
    for thread in threading.enumerate():
        if thread.name.startswith(("cached-fallback", "mover")):
            thread.join(WAIT_S)


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Check that directory and descriptors are gone at the end."""
    wait_for_threads()
    before = left_over(), len(open_descriptors())
    yield
    wait_for_threads()
    gc.collect()  # what an exception's traceback held
    assert (left_over(), len(open_descriptors())) == before


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., StoreServer]]:
    """Start an S3 server; no daemon."""
    started: list[StoreServer] = []

    def start(**settings: Any) -> StoreServer:
        server = StoreServer(OBJECTS, **settings)
        server.__enter__()
        started.append(server)
        monkeypatch.setenv("CACHED_ENDPOINT_URL", server.endpoint_url)
        return server

    for name, value in {
        "CACHED_SOCKET": str(tmp_path / "none"),
        "CACHED_MODELS": "m=s3://models/llm/",
        "CACHED_ANONYMOUS": "true",
        "CACHED_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    yield start
    for server in started:
        server.__exit__(None, None, None)


def opened(**arguments: Any) -> cached.Model:
    with pytest.warns(RuntimeWarning, match="every worker does again"):
        return cached.open("m", fallback="s3", **arguments)


@pytest.mark.usefixtures("nothing_left")
def test_a_model_in_s3_is_there_whole(s3: Callable[..., StoreServer]):
    server = s3()
    with opened() as model:
        assert set(model) == {"big", "none", "small"}
        assert bytes(model["big"]) == BIG
        assert model["small"].tobytes() == b"abcd"
        assert bytes(model.file("config.json")) == b"{}"
        assert bytes(model.file("empty.txt")) == b""
        assert {name for name, _ in model.items(order="arrival")} == set(model)
        model.wait()
        assert not model["big"].flags.writeable
        assert Path(model.path, "deep/b.safetensors").read_bytes().endswith(b"abcd")
    assert server.gets == 4  # two parts, one, one, and none for what is empty


@pytest.mark.usefixtures("nothing_left")
def test_objects_are_read_with_the_customers_key(
    s3: Callable[..., StoreServer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    key = tmp_path / "key"
    key.write_bytes(bytes(32))
    monkeypatch.setenv("CACHED_SSE_CUSTOMER_KEY_FILE", str(key))
    server = s3()
    md5 = headers_of(str(key))[SENT_KEY_MD5]
    server.objects = {
        name: found._replace(customer_key_md5=md5) for name, found in server.objects.items()
    }
    with opened() as model:
        assert bytes(model["big"]) == BIG


@pytest.mark.parametrize("is_replaced", [False, True])
def test_the_store_is_asked_whether_the_model_is_stale(
    s3: Callable[..., StoreServer], *, is_replaced: bool
):
    server = s3()
    with opened() as model:
        if is_replaced:
            server.objects["llm/config.json"] = server.objects["llm/empty.txt"]
        assert model.is_stale == is_replaced


@pytest.mark.usefixtures("nothing_left")
def test_the_directory_is_there_until_the_last_view_is_gone(s3: Callable[..., StoreServer]):
    s3()
    with opened() as model:
        path = Path(model.path)
        view = model["small"]
        assert path.stat().st_mode & 0o777 == 0o700
    del model
    assert path.is_dir()
    assert view.tobytes() == b"abcd"
    del view
    assert not path.exists()


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("fault", [Status(503), Reset(100), ShortBody(1 << 20)])
def test_a_fault_that_passes_is_tried_again(s3: Callable[..., StoreServer], fault: Any):
    server = s3(faults={0: fault, 1: fault})
    with opened() as model:
        assert bytes(model["big"]) == BIG
    assert server.gets > 4


@pytest.mark.usefixtures("nothing_left")
def test_a_listing_that_fails_for_a_moment_is_tried_again(s3: Callable[..., StoreServer]):
    faults = {("LIST", 0): Status(503), ("LIST", 1): Reset(), ("LIST", 3): Status(503)}
    server = s3(faults=faults)
    with opened() as model:
        assert server.count("LIST") == 3
        assert not model.is_stale
        assert server.count("LIST") == 5


@pytest.mark.usefixtures("nothing_left")
def test_a_listing_that_keeps_failing_is_the_stores_error(
    s3: Callable[..., StoreServer], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CACHED_MAX_ATTEMPTS", "2")
    server = s3(faults={("LIST", number): Status(503) for number in range(9)})
    with pytest.raises(StoreUnavailable, match="503"):
        opened()
    assert server.count("LIST") == 2


@pytest.mark.usefixtures("nothing_left")
def test_a_store_that_says_nothing_does_not_outlast_the_time_out(s3: Callable[..., StoreServer]):
    began_s = time.monotonic()
    s3(faults={("LIST", 0): Stall(math.inf, -1)})
    with pytest.raises(TimedOut, match=r"waited 0\.6 s for s3://models/llm/ in vain"):
        opened(timeout_s=0.6)
    assert 0.6 <= time.monotonic() - began_s < 1.0  # with the wait for a daemon


@pytest.mark.usefixtures("nothing_left")
def test_a_store_that_is_busy_does_not_outlast_the_time_out(s3: Callable[..., StoreServer]):
    busy = Status(503, {"retry-after": "30"})
    s3(faults={("LIST", number): busy for number in range(9)})
    with pytest.raises(TimedOut, match="in vain") as caught:
        opened(timeout_s=0.1)
    assert isinstance(caught.value.__cause__, StoreUnavailable)


@pytest.mark.usefixtures("nothing_left")
def test_whether_a_model_is_stale_is_told_in_time(
    s3: Callable[..., StoreServer], monkeypatch: pytest.MonkeyPatch
):
    s3(faults={("LIST", 1): Stall(math.inf, -1)})
    monkeypatch.setenv("CACHED_SOCKET", "/dev/null/none")  # no daemon will ever listen there
    with opened(timeout_s=0.5) as model:
        began_s = time.monotonic()
        with pytest.raises(TimedOut, match=r"waited 0\.5 s for s3://models/llm/ in vain"):
            assert model.is_stale
        assert time.monotonic() - began_s < 1.5


@pytest.mark.usefixtures("nothing_left")
def test_a_name_server_that_hangs_does_not_outlast_the_time_out(
    s3: Callable[..., StoreServer], monkeypatch: pytest.MonkeyPatch
):
    s3()
    hangs, ends = threading.Event(), threading.Event()

    def connect(*arguments: object, **members: object) -> None:
        hangs.set()
        ends.wait(WAIT_S)
        raise TimeoutError

    monkeypatch.setattr("socket.create_connection", connect)
    with pytest.raises(TimedOut, match=r"waited 0\.1 s for"):
        opened(timeout_s=0.1)
    assert hangs.is_set()
    ends.set()


@pytest.mark.usefixtures("nothing_left")
def test_the_endpoint_is_ignored_where_the_sdks_are_told_so(
    s3: Callable[..., StoreServer], monkeypatch: pytest.MonkeyPatch
):
    server = s3()
    monkeypatch.delenv("CACHED_ENDPOINT_URL")
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint_url)
    opened().close()
    assert server.count("LIST") == 1
    monkeypatch.setenv("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "true")
    asked: list[str] = []

    def connect(address: tuple[str, int], timeout: float) -> None:
        asked.append(address[0])
        raise TimeoutError

    monkeypatch.setattr("socket.create_connection", connect)
    monkeypatch.setenv("CACHED_MAX_ATTEMPTS", "1")
    with pytest.raises(StoreUnavailable):
        opened()
    assert asked == ["models.s3.us-east-1.amazonaws.com"]


@pytest.mark.usefixtures("nothing_left")
def test_an_empty_variable_leaves_the_word_to_the_file(
    s3: Callable[..., StoreServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    server = s3()
    path = tmp_path / "cached.toml"
    path.write_text("anonymous = true")
    monkeypatch.setenv("CACHED_CONFIG", str(path))
    monkeypatch.setenv("CACHED_ANONYMOUS", "")
    opened().close()
    assert all("authorization" not in asked.headers for asked in server.seen)


@pytest.mark.usefixtures("s3")
def test_a_setting_of_the_store_that_breaks_its_rule_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CACHED_ANONYMOUS", "maybe")
    with pytest.raises(InvalidConfig, match=r"anonymous must be true or false, was 'maybe'"):
        cached.open("m", fallback="s3")


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(
    ("settings", "arguments", "error", "text"),
    [
        ({"faults": {0: Status(403, code="AccessDenied")}}, {}, AccessDenied, "llm/"),
        (
            {"faults": {0: Stall(math.inf, 10)}},
            {"timeout_s": 0.2},
            TimedOut,
            r"waited 0\.2 s for s3:",
        ),
    ],
    ids=["refused", "stalled"],
)
def test_what_does_not_pass_is_a_typed_error(
    s3: Callable[..., StoreServer], settings: Any, arguments: Any, error: Any, text: str
):
    s3(**settings)
    with pytest.raises(error, match=text):
        opened(**arguments)


@pytest.mark.usefixtures("nothing_left")
def test_a_file_that_is_not_safetensors_is_named(s3: Callable[..., StoreServer]):
    server = s3()
    server.objects["llm/x.safetensors"] = server.objects["llm/config.json"]
    with pytest.raises(LoadFailed, match=r"x\.safetensors: "):
        opened()


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(
    ("uri", "error", "text"),
    [
        ("file:///no/such/model", ObjectMissing, "no/such/model"),
        ("s3://models/none/", ObjectMissing, "no objects are under s3://models/none/"),
    ],
)
def test_a_wrong_uri_is_a_typed_error(
    s3: Callable[..., StoreServer],
    uri: str,
    error: Any,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
):
    s3()
    monkeypatch.setenv("CACHED_MODELS", f"m={uri}")
    with pytest.raises(error, match=text):
        opened()


@pytest.mark.usefixtures("alone")
def test_what_is_no_uri_is_refused_with_the_rule_of_the_daemon(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CACHED_MODELS", "m=http://x/y")
    with pytest.raises(InvalidConfig, match=r"models.m.uri must be s3://.*was 'http://x/y'"):
        cached.open("m", fallback="s3")


@pytest.mark.usefixtures("s3")
def test_plain_http_goes_to_this_machine_only(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CACHED_ENDPOINT_URL", "http://192.0.2.1:9000")
    with pytest.raises(InsecureEndpoint):
        opened()


def test_a_daemon_that_answers_is_used(serve: Serve):
    daemon = serve(GatedStore({"config.json": b"{}"}))
    with cached.open("m", fallback="s3", timeout_s=WAIT_S):
        assert daemon.leases == 1


PROGRAM = """
import os, warnings
warnings.simplefilter("ignore")
import cached
model = cached.open("m", fallback="s3")
path = model.path
child = os.fork()
if not child:
    model.close()
    del model
    os._exit(0)
os.waitpid(child, 0)
assert os.path.isdir(path) and bytes(model.buffer("t")) == b"12345"
print(path)
"""


@pytest.mark.usefixtures("alone")
def test_a_process_that_ends_leaves_nothing_and_its_children_take_nothing():
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("/")
    assert not os.path.exists(ended.stdout.strip())


@pytest.mark.usefixtures("alone", "nothing_left", "torch")
def test_torch_tensors_come_the_same_way():
    with opened() as model:
        assert bytes(model.torch()["t"].numpy()) == b"12345"
