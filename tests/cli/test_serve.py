"""``cached serve``: every option is a flag, and what is wrong ends it before it starts."""

from __future__ import annotations

from cached.cli.main import main
from cached.cli.serve import parser
from cached.core.options import OPTIONS


def test_every_option_is_a_flag_with_its_variable_and_default():
    text = " ".join(parser("serve").format_help().split())

    for option in OPTIONS:
        assert option.flag in text
        assert option.env in text


def test_a_wrong_value_is_a_usage_error(capsys):
    assert main(["serve", "--model", "m=s3://b/m/", "--memory-budget", "1KiB"]) == 2

    assert "memory_budget must be at least" in capsys.readouterr().err


def test_a_segment_root_that_cannot_be_had_is_a_usage_error(tmp_path, capsys):
    taken = tmp_path / "file"
    taken.write_text("")
    arguments = [
        "--segment-root",
        str(taken),
        "--socket",
        str(tmp_path / "s"),
        "--http-port",
        "off",
    ]

    assert main(["serve", "--model", "m=file:///nowhere/", *arguments]) == 2

    assert "segment root" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()
