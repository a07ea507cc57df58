"""A command finds its daemon or says why not, and does not wait for one that is stuck."""

from __future__ import annotations

import json
import os
import threading

import pytest

from cached.cli import asking
from cached.cli.asking import model_names
from tests.fakes.commands import output


@pytest.mark.parametrize("command", ["wait m", "path m", "prefetch m"])
def test_a_daemon_that_does_not_listen_yet_is_waited_for_within_the_timeout(
    command, daemon, sleeps, capsys
):
    later = f"{daemon.address}.later"
    sleeps += [lambda: None, lambda: os.symlink(daemon.address, later)]
    sleeps += [lambda: threading.Event().wait(0.01)] * 500  # prefetch polls
    output(capsys, *command.split(), "--socket", later, "--timeout", "10s")
    assert daemon.status()["state"] == "resident"


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
    monkeypatch.setattr(asking, "ANSWER_S", 0.05)
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
