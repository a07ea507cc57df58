"""``cached serve`` hands the daemon one Config, or says before it starts why not."""

from __future__ import annotations

import pytest

from cached.cli import serve
from cached.cli.main import main
from cached.core.options import OPTIONS


def test_help_names_every_flag_with_its_variable_and_default():
    text = " ".join(serve.parser("serve").format_help().split())
    for option in OPTIONS:
        assert option.flag in text
        assert f"({option.env}; default: {option.default_text})" in text
    assert "--model NAME=URI" in text
    assert "CACHED_MODELS" in text


def test_the_daemon_gets_the_config_and_its_exit_code_is_ours(monkeypatch: pytest.MonkeyPatch):
    given = []

    def run(config, config_file):
        given.append((config, config_file))
        return 7

    monkeypatch.setattr("cached.hosts.standalone.run", run)
    arguments = ["serve", "--model=llm=s3://m/llama/", "--http-port=off", "--fetch-threads=2"]
    assert main(arguments) == 7
    ((config, config_file),) = given
    assert (config.http_port, config.fetch_threads, config_file) == (None, 2, None)


@pytest.mark.parametrize("is_flag", [True, False])
def test_the_daemon_is_told_the_file_in_effect_for_its_log(
    monkeypatch: pytest.MonkeyPatch, tmp_path, is_flag: bool
):
    file, given = tmp_path / "cached.toml", []

    def run(config, config_file):
        given.append(config_file)
        return 0

    file.write_text('[models.m]\nuri = "s3://m/m/"\n')
    monkeypatch.setattr("cached.hosts.standalone.run", run)
    monkeypatch.setenv("CACHED_CONFIG", "/elsewhere" if is_flag else str(file))
    assert main(["serve", "--http-port=off", *([f"--config={file}"] if is_flag else [])]) == 0
    assert given == [str(file)]


def test_a_segment_root_that_cannot_be_had_ends_with_2(tmp_path, capsys):
    taken = tmp_path / "file"
    taken.touch()
    arguments = [f"--segment-root={taken}", f"--socket={tmp_path}/s", "--http-port=off"]
    assert main(["serve", "--model=m=file:///nowhere/", *arguments]) == 2
    assert str(taken) in capsys.readouterr().err


def test_a_wrong_value_ends_with_2_before_anything_is_started(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("cached.hosts.standalone.run", lambda *of: pytest.fail("started"))
    assert main(["serve", "--model=llm=s3://m/llama/", "--memory-budget=10MiB"]) == 2
    assert capsys.readouterr().err == (
        "cached: memory_budget must be at least 64 MiB, was 10 MiB (from --memory-budget)\n"
    )
