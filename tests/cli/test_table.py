"""``cached status`` is a table whose columns line up, whatever the daemon says."""

from __future__ import annotations

import re

import pytest

from cached.cli.table import status_table
from cached.cli.terminal import Terminal

MIB = 1 << 20


def model(name: str, state: str, **members: object) -> dict[str, object]:
    return {"name": name, "state": state} | members


def reply(*models: dict[str, object]) -> dict[str, object]:
    return {
        "daemon": "0.1.0",
        "pid": 4711,
        "uptime_s": 75.2,
        "ready": True,
        "socket": "/run/cached.sock",
        "memory": {
            "budget_bytes": 8192 * MIB,
            "reserved_bytes": 40 * MIB,
            "committed_bytes": 200 * MIB,
            "leased_bytes": 0,
            "free_bytes": 7952 * MIB,
        },
        "models": list(models),
    }


LLM = model(
    "llm",
    "resident",
    size_bytes=200 * MIB,
    committed_bytes=200 * MIB,
    leases=3,
    version="9f2c",
    path="/dev/shm/cached-0/llm",
    pinned=True,
)
CLIP = model("clip", "loading", size_bytes=40 * MIB, committed_bytes=10 * MIB, leases=0)
SDXL = model("sdxl", "failed", size_bytes=None, version=None, path=None, error="no key s3://m/x")


def test_pages_are_never_more_than_all():
    small = model("small", "loading", size_bytes=10, committed_bytes=4096)
    assert " 100% " in status_table(reply(small), Terminal())


def test_a_model_is_as_far_as_the_version_that_it_shows():
    coming = {"version": "v2", "state": "loading", "committed_bytes": 4 * MIB}
    gone = {"version": "v2", "state": "leaving", "committed_bytes": 16 * MIB}
    kept = {"version": "v1", "state": "kept", "committed_bytes": 16 * MIB}
    both = model(
        "both",
        "loading",
        size_bytes=16 * MIB,
        committed_bytes=20 * MIB,
        version="v2",
        versions=[gone, coming, kept],
    )
    assert " 25% " in status_table(reply(both), Terminal())


def test_the_table_as_a_whole():
    assert status_table(reply(LLM, CLIP, SDXL), Terminal()) == (
        "daemon 0.1.0, pid 4711, up 1m15s, ready, on /run/cached.sock\n"
        "memory: 240 MiB of 8 GiB used, 0 B leased, 7.8 GiB free\n"
        "\n"
        "NAME          STATE        SIZE  DONE  LEASES  VERSION  PATH\n"
        "llm (pinned)  resident  200 MiB  100%       3  9f2c     /dev/shm/cached-0/llm\n"
        "clip          loading    40 MiB   25%       0  -        -\n"
        "sdxl          failed          -     -       0  -        -\n"
        "\n"
        "sdxl: no key s3://m/x\n"
    )


def test_colours_do_not_move_columns():
    coloured = status_table(reply(LLM, SDXL), Terminal(has_colour=True))
    assert "\x1b[31mfailed\x1b[0m" in coloured
    assert re.sub(r"\x1b\[[0-9]*m", "", coloured) == status_table(reply(LLM, SDXL), Terminal())


def test_a_model_named_as_a_state_is_not_coloured():
    coloured = status_table(reply(model("failed", "failed")), Terminal(has_colour=True))
    assert "\nfailed  \x1b[31m" in coloured


def test_members_that_a_daemon_does_not_send_are_left_out():
    assert "llm   absent" in status_table({"models": [model("llm", "absent")]}, Terminal())


@pytest.mark.parametrize("why", ["cannot load a: no key", "a needs 2 GiB, 1 GiB free"])
def test_an_error_names_its_model_once(why: str):
    table = status_table(reply(model("a", "failed", error=why)), Terminal())
    assert table.endswith(f"\n\n{why}\n")


def test_an_error_text_from_afar_stays_on_one_line():
    table = status_table(reply(model("a", "failed", error="x\n\x1b[2Jy")), Terminal())
    assert table.endswith("\na: x  [2Jy\n")


def test_versions_beside_the_current_one_have_rows_of_their_own():
    def version(name: str, state: str, **members: object) -> dict[str, object]:
        return {"version": name, "state": state, "size_bytes": 40 * MIB, "leases": 0} | members

    both = model(
        "llm",
        "resident",
        size_bytes=200 * MIB,
        committed_bytes=200 * MIB,
        version="9f2c",
        path="/r/9f2c",
        confirmed=False,
        versions=[
            version("9f2c", "current", path="/r/9f2c"),
            version("77aa", "kept", leases=2, path="/r/77aa"),
            version("55bb", "loading", path=None, size_bytes=None),
        ],
    )
    table = status_table(reply(both), Terminal())
    assert table.splitlines()[3:] == [
        "NAME  STATE        SIZE  DONE  LEASES  VERSION             PATH",
        "llm   resident  200 MiB  100%       0  9f2c (unconfirmed)  /r/9f2c",
        "      kept       40 MiB     -       2  77aa                /r/77aa",
        "      loading         -     -       0  55bb                -",
    ]


def test_one_version_that_is_confirmed_has_one_row():
    one = {**LLM, "confirmed": True, "versions": [{"version": "9f2c", "state": "current"}]}
    assert status_table(reply(one), Terminal()) == status_table(reply(LLM), Terminal())
