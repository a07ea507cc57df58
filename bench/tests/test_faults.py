"""Who hands over wrong bytes is wrong, however fast; how a fetch ended is told by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from bench import fault_plan, faults, record, requirements
from bench.fault_proxy import Counts
from bench.faults import Ending, Sample

if TYPE_CHECKING:
    from pathlib import Path

OLD = bytes(range(256)) * 1000
NEW = OLD[::-1]


def file(directory: Path, name: str, content: bytes) -> Path:
    (directory / name).write_bytes(content)
    return directory / name


@pytest.mark.parametrize(
    ("copy", "wrong_bytes"),
    [
        (OLD, 0),
        (NEW, 0),
        (b"\xff" + OLD[1:], 1),
        (OLD[:-3], 3),
        (OLD + b"\0\0", 2),
        (OLD[:1000] + NEW[1000:], 1000),
    ],
    ids=["old", "new", "one byte", "short", "long", "mixed"],
)
def test_a_copy_is_right_if_it_is_one_of_the_versions_and_a_mix_is_none(
    tmp_path, monkeypatch, copy, wrong_bytes
):
    monkeypatch.setattr(faults, "BLOCK_BYTES", 999)  # several blocks
    versions = [file(tmp_path, "old", OLD), file(tmp_path, "new", NEW)]
    ending = faults.judged(1.5, file(tmp_path, "copy", copy), versions)
    assert ending == Ending("wrong" if wrong_bytes else "ok", 1.5, wrong_bytes)


def test_an_error_goes_by_the_class_that_the_last_traceback_ends_with():
    text = (
        "Traceback (most recent call last):\n"
        '  File "x.py", line 1, in <module>\n'
        "ValueError: the cause\n\n"
        "During handling of the above exception, another exception occurred:\n\n"
        "Traceback (most recent call last):\n"
        '  File "x.py", line 2, in <module>\n'
        "botocore.exceptions.ClientError: An error occurred (503): SlowDown\n"
        "Debug: and what it says in more lines {\n"
        "}\n"
    )
    assert faults.error_name(text) == "ClientError"
    assert faults.error_name(text.partition("botocore")[0] + "KeyboardInterrupt\n") == (
        "KeyboardInterrupt"
    )
    assert faults.error_name("") == "unknown"


def test_rows_have_the_figures_and_count_the_endings():
    samples = [
        Sample(Ending("ok", 1.0), Counts(gets=64, body_bytes=1 << 20, peak_in_flight=8)),
        Sample(Ending("wrong", 3.0, 7), Counts(gets=66, body_bytes=3 << 20, peak_in_flight=9)),
        Sample(Ending("ok", 2.0), Counts(gets=65, body_bytes=2 << 20, slow_downs=2)),
    ]
    rows = {row["metric"]: row for row in faults.rows_of("corrupt", "obstore", samples)}
    assert {(row["case"], row["subject"], row["n"]) for row in rows.values()} == {
        ("corrupt", "obstore", 3)
    }
    medians = {metric: row["median"] for metric, row in rows.items()}
    assert medians == {
        "seconds": 2.0,
        "wrong_bytes": 0.0,
        "gets": 65.0,
        "sent_MiB": 2.0,
        "peak_in_flight": 8.0,
        "slow_downs": 0.0,
        f"{record.ENDED}ok": 2,
        f"{record.ENDED}wrong": 1,
    }
    assert rows["wrong_bytes"]["max"] == 7


def test_only_a_replaced_object_may_be_another(tmp_path):
    old, new = file(tmp_path, "old", OLD), file(tmp_path, "new", NEW)
    right = {
        case: faults.right_versions((old, new), fault_plan.plan_for(case, 1, 1 << 30))
        for case in fault_plan.CASES
    }
    assert right.pop("replaced") == (old, new)
    assert set(right.values()) == {(old,)}


def test_who_is_not_installed_is_left_out_loudly(monkeypatch, capsys):
    monkeypatch.setattr(requirements, "missing", lambda needs: ["boto3"])
    args = faults._parser().parse_args(["--subjects", "cached,boto3,s5cmd"])
    assert faults._clients(args) == ["cached", "s5cmd"]
    assert "MISSING: boto3: NOT MEASURED" in capsys.readouterr().err


def test_a_client_that_nobody_knows_is_refused():
    with pytest.raises(SystemExit, match=r"no subject \['nobody'\]; there are: cached, obstore"):
        faults._clients(faults._parser().parse_args(["--subjects", "nobody"]))
