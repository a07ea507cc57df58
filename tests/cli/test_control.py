"""The commands that load and show, against a real daemon; a script for what that never says."""

from __future__ import annotations

import json
import os
import threading
from typing import TYPE_CHECKING, Any

import pytest

from tests.fakes.commands import HELD, output

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.fakes.local_daemon import ScriptedDaemon


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


# --- refresh

ENTRY: dict[str, Any] = {
    "name": "m",
    "state": "resident",
    "committed_bytes": 100,
    "size_bytes": 100,
    "load_s": 0.5,
    "error": None,
    "version": "v1",
    "refreshing": False,
    "versions": [{"version": "v1", "state": "current", "size_bytes": 100, "path": "/m/v1"}],
}
COMING: dict[str, Any] = {
    "refreshing": True,
    "versions": [
        {"version": "v1", "state": "current", "size_bytes": 100},
        {"version": "v2", "state": "loading", "size_bytes": 400, "committed_bytes": 100},
    ],
}


def answers(
    *entries: dict[str, Any], refreshed: str = "v1", asked: list[dict[str, Any]] | None = None
) -> Callable[[ScriptedDaemon], None]:
    """Return a script: the states of ``m`` one after the other; the second follows the request."""

    def script(daemon: ScriptedDaemon) -> None:
        daemon.greet()
        for number, entry in enumerate(entries):
            request = daemon.expect("status")
            daemon.send({"id": request["id"], "models": [{**ENTRY, **entry}]})
            if number == 0:
                request = daemon.expect("refresh")
                if asked is not None:
                    asked.append(request)
                daemon.send({"id": request["id"], "state": "resident", "version": refreshed})

    return script


def test_refresh_shows_the_new_version_coming_until_it_is_current(scripted, sleeps, capsys):
    asked: list[dict[str, Any]] = []
    sleeps += [lambda: None] * 2
    scripted(answers({}, {"refreshing": True}, COMING, {"version": "v2"}, asked=asked))
    out, err = output(capsys, "refresh", "m")
    assert out == "m: v2 is current, was v1\n"
    assert err.splitlines()[0] == "m: resolving"
    assert err.splitlines()[-1].startswith("m: resident, 100 B")
    assert "version" not in asked[0]


def test_progress_is_never_more_than_all(scripted, sleeps, capsys):
    paged = {"version": "v2", "state": "loading", "size_bytes": 100, "committed_bytes": 4096}
    sleeps += [lambda: None]
    scripted(answers({}, {"refreshing": True, "versions": [paged]}, {"version": "v2"}))
    _, err = output(capsys, "refresh", "m")
    assert err.splitlines()[0] == "m: loading, 100 B of 100 B (100%)"


def test_refresh_tells_how_far_the_new_version_is(scripted, sleeps, capsys):
    sleeps += [lambda: None]
    scripted(answers({}, COMING, {"version": "v2"}))
    _, err = output(capsys, "refresh", "m")
    assert err.splitlines()[0] == "m: loading, 100 B of 400 B (25%)"


def test_refresh_of_what_is_current_says_so(scripted, capsys):
    scripted(answers({}, {}))
    assert output(capsys, "refresh", "m")[0] == "m: v1 is current, as before\n"


def test_refresh_goes_back_to_a_version(scripted, capsys):
    asked: list[dict[str, Any]] = []
    scripted(answers({"version": "v2"}, {}, asked=asked))
    out, _ = output(capsys, "refresh", "m", "--version", "v1")
    assert out == "m: v1 is current, was v2\n"
    assert asked[0]["version"] == "v1"


@pytest.mark.parametrize("flags", [[], ["--version", "v1"]], ids=["found", "named"])
def test_refresh_to_what_is_in_memory_tells_no_speed(scripted, capsys, flags: list[str]):
    kept = [{"version": "v1", "state": "kept", "path": "/m/v1"}]
    scripted(answers({"version": "v2", "versions": kept}, {}))
    assert output(capsys, "refresh", "m", *flags)[1] == "m: resident, 100 B\n"


def test_refresh_to_what_was_loaded_tells_how_fast(scripted, capsys):
    scripted(answers({}, {"version": "v2"}))
    assert output(capsys, "refresh", "m")[1] == "m: resident, 100 B in 500 ms, 0.0 MB/s\n"


def test_refresh_to_the_current_version_is_no_failure_of_the_refresh_before(scripted, capsys):
    failed = {"error": "cannot load m: 403"}
    scripted(answers(failed, failed))
    assert output(capsys, "refresh", "m", "--version", "v1")[0] == "m: v1 is current, as before\n"


def test_refresh_that_fails_tells_why_though_the_old_version_is_served(scripted, capsys):
    scripted(answers({}, {"error": "cannot load m: 403"}))
    out, err = output(capsys, "refresh", "m", code=1)
    assert out == ""
    assert err.splitlines()[-1] == "cached: cannot load m: 403"


def test_refresh_that_waits_for_room_ends_with_the_numbers(scripted, capsys):
    waits = {"refreshing": True, "waits_for_room": True, "error": "m needs 4 GiB, 1 GiB is free"}
    scripted(answers({}, {"refreshing": True}, waits))
    out, err = output(capsys, "refresh", "m", code=1)
    assert out == ""
    assert err.splitlines()[-2:] == ["m: failed", "cached: m needs 4 GiB, 1 GiB is free"]


def test_refresh_of_what_is_evicted_meanwhile_fails(scripted, capsys):
    scripted(answers({}, {"state": "absent", "version": None}))
    _, err = output(capsys, "refresh", "m", code=1)
    assert "cached: m: it was evicted meanwhile; refresh it again" in err


def test_refresh_without_waiting_only_asks(scripted, capsys):
    scripted(answers({}, COMING))
    assert output(capsys, "refresh", "m", "--no-wait") == ("", "")


def test_refresh_prints_the_status_at_the_end_as_json(scripted, capsys):
    scripted(answers({}, {"version": "v2"}))
    out, _ = output(capsys, "refresh", "m", "--json")
    assert json.loads(out)["version"] == "v2"


def test_refresh_gives_up_in_time(scripted, capsys):
    scripted(answers({}, COMING))
    _, err = output(capsys, "refresh", "m", "--timeout", "0s", code=4)
    assert "cached: m: not there after 0 s" in err
