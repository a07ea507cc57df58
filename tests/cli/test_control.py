"""The control commands against a real daemon; a scripted one for what that never says."""

from __future__ import annotations

import json
import os
import socket
import threading
from typing import TYPE_CHECKING

import pytest

import cached
from cached.cli import control
from cached.cli.control import model_names
from cached.cli.main import main
from cached.client.deadline import Deadline
from tests.fakes.local_daemon import (
    GatedStore,
    LocalDaemon,
    ScriptedDaemon,
    open_descriptors,
    padded,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

WEIGHTS = padded("w", bytes(range(256)) * 32)
HELD = "model.safetensors"


@pytest.fixture
def hold() -> None:
    """Let nothing past the first GET come, until ``store.release``."""


@pytest.fixture
def store(request: pytest.FixtureRequest) -> GatedStore:
    return GatedStore({HELD: WEIGHTS}, {HELD} if "hold" in request.fixturenames else ())


@pytest.fixture
def daemon(
    tmp_path: Path, store: GatedStore, monkeypatch: pytest.MonkeyPatch
) -> Iterator[LocalDaemon]:
    started = LocalDaemon(tmp_path, store, names=("m", "clip"))
    monkeypatch.setenv("CACHED_SOCKET", started.address)
    yield started
    store.release(HELD)
    started.stop()


@pytest.fixture
def sleeps(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], object]]:
    """Do these one after the other instead of sleeping; then Ctrl-C."""
    doings: list[Callable[[], object]] = []

    def sleep(deadline: Deadline, seconds: float) -> None:
        if not doings:
            raise KeyboardInterrupt
        doings.pop(0)()

    monkeypatch.setattr(Deadline, "sleep", sleep)
    return doings


@pytest.fixture
def scripted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[Callable[[ScriptedDaemon], None]], None]]:
    """Return a function that plays a script to the next command."""
    address = str(tmp_path / "scripted.sock")
    monkeypatch.setenv("CACHED_SOCKET", address)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    threads = []

    def play(script: Callable[[ScriptedDaemon], None]) -> None:
        def serve() -> None:
            connected, _ = listener.accept()
            daemon = ScriptedDaemon(connected)
            try:
                script(daemon)
            finally:
                daemon.close()

        threads.append(threading.Thread(target=serve))
        threads[-1].start()

    yield play
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    listener.close()


def output(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> tuple[str, str]:
    """Run a command, and return what it printed and what it said on stderr."""
    found = main(list(arguments))
    out, err = capsys.readouterr()
    assert found == code, err
    return out, err


def test_prefetch_waits_until_the_model_is_resident(daemon, capsys):
    out, err = output(capsys, "prefetch", "m")
    assert daemon.status()["state"] == "resident"
    assert out == ""
    assert err.splitlines()[-1].startswith("m: resident, 1.0 MiB in ")


def test_prefetch_shows_how_far_it_is(daemon, store, hold, sleeps, capsys):
    sleeps += [lambda: None] * 3 + [lambda: store.release(HELD)]
    sleeps += [lambda: threading.Event().wait(0.01)] * 500  # the rest comes from another thread
    _, err = output(capsys, "prefetch", "m")
    assert err.splitlines()[-1].startswith("m: resident, ")
    assert len(err.splitlines()) >= 2


def test_prefetch_prints_the_status_at_the_end_as_json(daemon, capsys):
    out, _ = output(capsys, "prefetch", "m", "clip", "--json")
    assert [(each["name"], each["state"]) for each in json.loads(out)] == [
        ("m", "resident"),
        ("clip", "resident"),
    ]


def test_prefetch_without_waiting_only_begins(daemon, hold, capsys):
    assert output(capsys, "prefetch", "m", "--no-wait") == ("", "")
    assert daemon.status()["state"] in {"resolving", "admitting", "loading"}
    out, _ = output(capsys, "prefetch", "m", "--no-wait", "--json")
    assert [each["name"] for each in json.loads(out)] == ["m"]


def test_prefetch_gives_up_in_time_and_the_load_goes_on(daemon, hold, capsys):
    _, err = output(capsys, "prefetch", "m", "--timeout", "0s", code=4)
    assert "cached: m: not there after 0 s; the load goes on, see cached status" in err
    assert daemon.status()["state"] != "absent"


def test_prefetch_begins_nothing_if_one_name_is_unknown(daemon, capsys):
    _, err = output(capsys, "prefetch", "m", "mm", code=1)
    assert err.startswith("cached: no model named 'mm' is configured")
    assert daemon.status()["state"] == "absent"


def test_prefetch_of_what_cannot_be_loaded_tells_why(daemon, store, capsys):
    store.objects.clear()
    _, err = output(capsys, "prefetch", "m", code=1)
    assert "m: failed\n" in err
    assert err.splitlines()[-1].startswith("cached: cannot load m: ")  # the name once


def test_prefetch_tells_that_a_model_was_evicted_meanwhile(scripted, capsys):
    entry = {"name": "m", "committed_bytes": 0, "size_bytes": None, "load_s": None, "error": None}

    def script(daemon):
        daemon.greet()
        for op, state in (("status", "absent"), ("prefetch", ""), ("status", "absent")):
            request = daemon.expect(op)
            models = {"models": [{**entry, "state": state}]} if op == "status" else {}
            daemon.send({"id": request["id"], "state": "resolving", **models})

    scripted(script)
    _, err = output(capsys, "prefetch", "m", code=1)
    assert "cached: m: it was evicted before it was complete; prefetch it again\n" in err


def test_status_is_a_table(daemon, capsys):
    output(capsys, "prefetch", "m")
    out, _ = output(capsys, "status")
    lines = out.splitlines()
    assert lines[0].startswith("daemon 0.1.0, pid ")
    assert lines[1].startswith("memory: 1.0 MiB of 1 GiB used, ")
    assert [line.split()[:2] for line in lines[3:]] == [
        ["NAME", "STATE"],
        ["m", "resident"],
        ["clip", "absent"],
    ]
    assert lines[4].endswith(daemon.status()["path"])


def test_status_of_some_models_shows_those(daemon, capsys):
    out, _ = output(capsys, "status", "clip", "--json")
    assert [each["name"] for each in json.loads(out)["models"]] == ["clip"]
    out, _ = output(capsys, "status", "clip", "m", "--json")
    assert [each["name"] for each in json.loads(out)["models"]] == ["clip", "m"]
    _, err = output(capsys, "status", "nobody", code=1)
    assert "nobody" in err


def test_status_as_json_is_the_daemons_reply(daemon, capsys):
    out, _ = output(capsys, "status", "--json")
    reply = json.loads(out)
    assert reply["socket"] == daemon.address
    assert {each["name"] for each in reply["models"]} == {"m", "clip"}
    assert reply.keys().isdisjoint({"id", "fds"})


def test_watching_ends_with_ctrl_c(daemon, sleeps, capsys):
    sleeps += [lambda: None]
    out, err = output(capsys, "status", "--watch", "--json", code=130)
    assert [json.loads(line)["pid"] for line in out.splitlines()] == [os.getpid()] * 2
    assert err == ""
    sleeps += [lambda: None]
    out, _ = output(capsys, "status", "--watch", code=130)
    assert out.count("\nNAME") == 2
    assert "\x1b" not in out


def test_watching_a_daemon_that_ends_is_told(daemon, sleeps, capsys):
    sleeps += [daemon.hang_up]
    _, err = output(capsys, "status", "--watch", code=3)
    assert "closed the connection" in err


def test_wait_loads_what_is_absent(daemon, capsys):
    assert output(capsys, "wait", "m", "--timeout", "10s") == ("", "")
    assert daemon.status()["state"] == "resident"


@pytest.mark.parametrize("command", ["wait m", "path m", "prefetch m"])
def test_a_daemon_that_does_not_listen_yet_is_waited_for_within_the_timeout(
    command, daemon, sleeps, capsys
):
    later = f"{daemon.address}.later"
    sleeps += [lambda: None, lambda: os.symlink(daemon.address, later)]
    sleeps += [lambda: threading.Event().wait(0.01)] * 500  # prefetch polls
    output(capsys, *command.split(), "--socket", later, "--timeout", "10s")
    assert daemon.status()["state"] == "resident"


def test_wait_for_a_daemon_that_does_not_come_ends_with_the_timeout(sleeps, capsys):
    arguments = ("wait", "m", "--socket", "/nowhere/s", "--timeout", "1ms")
    sleeps += [lambda: threading.Event().wait(0.002)]
    _, err = output(capsys, *arguments, code=3)
    assert "nothing is there" in err


def test_wait_until_the_header_does_not_wait_for_the_rest(daemon, hold, capsys):
    assert output(capsys, "wait", "m", "--until", "header") == ("", "")
    assert daemon.status()["state"] == "loading"


def test_wait_gives_up_in_time(daemon, hold, capsys):
    _, err = output(capsys, "wait", "m", "--timeout", "50ms", code=4)
    assert err == (
        "cached: m: not there after 50 ms; the load goes on, see cached status; or give more time\n"
    )


def test_path_prints_the_directory(daemon, capsys):
    out, _ = output(capsys, "path", "m")
    with open(f"{out.strip()}/{HELD}", "rb") as file:
        assert file.read() == WEIGHTS


def test_path_of_a_model_without_one_says_so(scripted, capsys):
    def script(daemon):
        daemon.greet()
        request = daemon.expect("open")
        daemon.send({"id": request["id"], "path": None, "complete": True})

    scripted(script)
    _, err = output(capsys, "path", "m", code=1)
    assert "m has no directory" in err


def test_no_command_keeps_a_lease_or_a_descriptor(daemon, capsys):
    def of_the_model() -> list[str]:
        return [path for path in open_descriptors().values() if HELD in path]

    output(capsys, "prefetch", "m")
    before = of_the_model()  # those of the daemon, which runs in this process
    for _ in range(3):
        output(capsys, "path", "m")
        output(capsys, "wait", "m")
    daemon.wait_for_leases(0)
    assert of_the_model() == before
    assert output(capsys, "evict", "m")[0] == "m: evicted, freeing 1.0 MiB\n"


def test_evicting_what_is_absent_tells_that_nothing_was_there(daemon, capsys):
    assert output(capsys, "evict", "m")[0] == "m: nothing of it was in memory\n"


def test_evict_is_refused_while_a_worker_holds_the_model(daemon, capsys):
    with cached.open("m", timeout_s=10, until="ready"):
        _, err = output(capsys, "evict", "m", code=1)
        assert "m is leased by 1 worker;" in err
    daemon.wait_for_leases(0)
    assert output(capsys, "evict", "m")[0] == "m: evicted, freeing 1.0 MiB\n"


def test_evict_goes_on_after_one_that_cannot(daemon, capsys):
    output(capsys, "prefetch", "m")
    out, err = output(capsys, "evict", "nobody", "m", code=1)
    assert out == "m: evicted, freeing 1.0 MiB\n"
    assert "nobody" in err


@pytest.mark.parametrize("given", ["@", "", "/" + "x" * 107])
def test_what_no_socket_can_have_is_refused_as_in_the_client(given, capsys):
    _, err = output(capsys, "status", "--socket", given, code=2)
    assert err.startswith("cached: socket must be a path of at most 107 bytes, or @NAME (abstract)")
    assert "(from --socket); name a shorter path" in err


def test_a_relative_socket_begins_where_the_command_is(daemon, monkeypatch, capsys):
    monkeypatch.chdir(os.path.dirname(daemon.address))
    output(capsys, "status", "--socket", os.path.basename(daemon.address))


@pytest.mark.parametrize("more", [(), ("--socket", "/nowhere/s")])
def test_a_variable_that_nobody_reads_is_an_error_of_a_command(daemon, monkeypatch, capsys, more):
    monkeypatch.setenv("CACHED_SOKET", "/x")
    _, err = output(capsys, "status", *more, code=2)
    assert "unknown variable CACHED_SOKET" in err
    assert "did you mean CACHED_SOCKET?" in err


def test_the_flag_names_the_socket_before_the_environment(daemon, monkeypatch, capsys):
    monkeypatch.setenv("CACHED_SOCKET", "/nowhere/s")
    out, _ = output(capsys, "status", "--socket", daemon.address, "--json")
    assert json.loads(out)["socket"] == daemon.address
    _, err = output(capsys, "status", code=3)
    assert "/nowhere/s" in err


@pytest.mark.parametrize("command", ["status", "prefetch m", "wait m", "path m", "evict m"])
def test_without_a_daemon_a_command_says_how_to_start_one(command, capsys):
    _, err = output(capsys, *command.split(), "--socket", "/nowhere/s", code=3)
    assert err.startswith("cached: cannot connect to the daemon at /nowhere/s: nothing is there")
    assert "cached serve" in err


def test_a_daemon_of_another_generation_is_named(scripted, capsys):
    def script(daemon):
        request = daemon.expect("hello")
        error = {"code": "protocol_mismatch", "message": "yours 1, mine 2", "hint": "upgrade"}
        daemon.send({"id": request["id"], "error": error})

    scripted(script)
    _, err = output(capsys, "status", code=1)
    assert err == "cached: yours 1, mine 2; upgrade\n"


def test_a_daemon_that_does_not_answer_is_not_waited_for_for_ever(scripted, monkeypatch, capsys):
    monkeypatch.setattr(control, "ANSWER_S", 0.05)
    done = threading.Event()

    def script(daemon):
        daemon.greet()
        done.wait(10)

    scripted(script)
    try:
        _, err = output(capsys, "status", code=3)
    finally:
        done.set()
    assert "the daemon has not answered for 50 ms" in err


def test_names_are_those_of_the_daemon(daemon, capsys):
    assert model_names() == ["m", "clip"]
    assert output(capsys, "completion", "names") == ("m\nclip\n", "")
