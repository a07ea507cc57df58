"""The commands that talk to a daemon: what they print, and what they end with."""

from __future__ import annotations

import json
import os

import cached
from cached.cli.control import model_names
from cached.cli.main import main


def test_prefetch_loads_a_model_and_tells_its_progress_in_lines(served, capsys):
    assert main(["prefetch", "m"]) == 0

    assert "m: resident" in capsys.readouterr().err
    assert served.status()["state"] == "resident"


def test_prefetch_can_leave_the_load_to_the_daemon_and_print_json(served, capsys):
    assert main(["prefetch", "m", "--no-wait", "--json"]) == 0

    (model,) = json.loads(capsys.readouterr().out)
    assert model["name"] == "m"


def test_status_is_a_table_or_the_daemons_reply(served, capsys):
    main(["prefetch", "m"])
    capsys.readouterr()

    assert main(["status"]) == 0
    table = capsys.readouterr().out
    assert main(["status", "m", "--json"]) == 0
    reply = json.loads(capsys.readouterr().out)

    assert "resident" in table
    assert "memory:" in table
    assert reply["models"][0]["state"] == "resident"
    assert "id" not in reply


def test_wait_loads_what_is_absent(served):
    assert main(["wait", "m", "--until", "header", "--timeout", "10s"]) == 0
    assert main(["wait", "m"]) == 0

    assert served.status()["state"] == "resident"


def test_path_prints_a_directory_with_the_files(served, capsys):
    assert main(["path", "m"]) == 0

    assert sorted(os.listdir(capsys.readouterr().out.strip())) == ["a.safetensors", "config.json"]


def test_evict_frees_and_is_refused_while_the_model_is_leased(served, capsys):
    with cached.open("m", timeout_s=10) as model:
        model.wait()
        assert main(["evict", "m"]) == 1
        assert "leased" in capsys.readouterr().err
    served.wait_for_leases(0)

    assert main(["evict", "m"]) == 0

    assert "freed" in capsys.readouterr().out


def test_an_unknown_model_is_named_with_those_that_are_known(served, capsys):
    assert main(["wait", "nobody"]) == 1

    assert "known are m" in capsys.readouterr().err


def test_without_a_daemon_every_command_says_how_to_start_one(tmp_path, capsys):
    nowhere = str(tmp_path / "none.sock")
    for command in (["status"], ["prefetch", "m"], ["wait", "m"], ["path", "m"], ["evict", "m"]):
        assert main([*command, "--socket", nowhere]) == 3
        error = capsys.readouterr().err
        assert nowhere in error
        assert "cached serve" in error


def test_model_names_are_those_of_the_daemon(served):
    assert model_names() == ["m"]
