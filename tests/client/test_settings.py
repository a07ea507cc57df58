"""Daemon and client find each other by one rule; the first source that says something counts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cached.client import settings
from cached.core.config import Level, resolve
from cached.core.errors import InvalidConfig
from cached.core.options import OPTIONS

UID = 1234
ROOT = Path(__file__).parents[2]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "cached.toml"
    path.write_text(
        'socket = "/from/file.sock"\nregion = "file"\nanonymous = true\n'
        'addressing_style = "path"\n'
        '[models.llm]\nuri = "s3://file/llm/"\n[models.other]\nuri = "s3://file/other/"\n'
    )
    return path


def test_the_first_that_is_set_is_the_address(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    sidecar, runtime = tmp_path / "sidecar", tmp_path / "run"
    sidecar.mkdir()
    runtime.mkdir()
    monkeypatch.setattr(settings, "SIDECAR_DIRECTORY", str(sidecar))
    environ = {
        "CACHED_SOCKET": "@name",
        "CACHED_CONFIG": str(file),
        "AWS_LAMBDA_RUNTIME_API": "127.0.0.1:9001",
        "XDG_RUNTIME_DIR": str(runtime),
    }
    assert settings.socket_address(environ, UID) == "@name"
    del environ["CACHED_SOCKET"]
    assert settings.socket_address(environ, UID) == "/from/file.sock"
    del environ["CACHED_CONFIG"]
    assert settings.socket_address(environ, UID) == "@cached-1234"
    del environ["AWS_LAMBDA_RUNTIME_API"]
    assert settings.socket_address(environ, UID) == f"{sidecar}/cached.sock"
    sidecar.rmdir()
    assert settings.socket_address(environ, UID) == f"{runtime}/cached.sock"
    runtime.rmdir()
    assert settings.socket_address(environ, UID) == "/tmp/cached-1234/cached.sock"
    assert settings.socket_address({"CACHED_SOCKET": "  "}, UID) == "/tmp/cached-1234/cached.sock"


@pytest.mark.parametrize(
    "given", ['""', '"  "', '"/a\\nb"', "5", '"@"', f'"/{"x" * 107}"', f'"@{"x" * 107}"']
)
def test_what_no_socket_can_have_is_refused_with_rule_value_and_source(tmp_path: Path, given: str):
    path = tmp_path / "cached.toml"
    path.write_text(f"socket = {given}")
    with pytest.raises(InvalidConfig, match=r"socket must be .* 107 bytes, .* was .*cached.toml"):
        settings.socket_address({"CACHED_CONFIG": str(path)}, UID)


def test_the_longest_address_is_taken():
    for address in (f"/{'x' * 106}", f"@{'x' * 106}"):
        assert settings.socket_address({"CACHED_SOCKET": address}, UID) == address


def test_a_relative_address_begins_where_this_process_is_or_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert settings.socket_address({"CACHED_SOCKET": "run/s"}, UID) == f"{tmp_path}/run/s"
    assert settings.socket_address({"CACHED_SOCKET": "~/s"}, UID) == "/home/me/s"


def test_without_arguments_it_is_this_process(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CACHED_SOCKET", "/mine")
    assert settings.socket_address() == settings.daemon_address() == "/mine"


def test_a_file_that_cannot_be_read_is_named_with_the_reason(tmp_path: Path):
    (tmp_path / "bad").write_text("\nmemory_budget 1")
    with pytest.raises(InvalidConfig, match=r"cannot read /nowhere/c\.toml: No such file"):
        settings.from_file("/nowhere/c.toml", "--config")
    with pytest.raises(InvalidConfig, match=r"Is a directory \(from CACHED_CONFIG\)"):
        settings.from_file(str(tmp_path), "CACHED_CONFIG")
    with pytest.raises(InvalidConfig, match=r"is not TOML: .*line 2.*\(from --config\)"):
        settings.from_file(str(tmp_path / "bad"), "--config")
    (tmp_path / "latin").write_bytes(b'region = "\xe4"')
    with pytest.raises(InvalidConfig, match="is not TOML"):
        settings.from_file(str(tmp_path / "latin"), "--config")


def test_the_file_that_the_environment_names_is_read_if_nothing_above_it_says_where(
    tmp_path: Path, file: Path
):
    environ = {"CACHED_CONFIG": str(tmp_path / "none")}
    with pytest.raises(InvalidConfig, match=r"cannot read .*none: .* \(from CACHED_CONFIG\)"):
        settings.daemon_address(environ=environ)
    assert settings.daemon_address("/given", environ=environ) == "/given"
    assert settings.daemon_address(environ=environ | {"CACHED_SOCKET": "/set"}) == "/set"
    assert settings.daemon_address(environ={"CACHED_CONFIG": str(file)}) == "/from/file.sock"


@pytest.mark.parametrize("given", [None, "/given"])
def test_a_variable_that_nobody_reads_is_an_error_for_a_worker_too(given: str | None):
    with pytest.raises(InvalidConfig) as caught:
        settings.daemon_address(given, environ={"CACHED_SOKET": "/x", "PATH": "/bin"})
    assert str(caught.value) == (
        "unknown variable CACHED_SOKET (from the environment); did you mean CACHED_SOCKET?"
    )


def test_a_key_that_nobody_reads_is_an_error_for_a_worker_too(tmp_path: Path):
    path = tmp_path / "cached.toml"
    path.write_text('sokcet = "/x"')
    with pytest.raises(InvalidConfig) as caught:
        settings.daemon_address(environ={"CACHED_CONFIG": str(path)})
    assert str(caught.value) == f"unknown key sokcet (from {path}); did you mean socket?"


def test_what_the_daemon_or_kubernetes_is_told_does_not_bother_a_worker():
    environ = {option.env: "x" for option in OPTIONS if option.key != "socket"}
    environ |= {"CACHED_MODELS": "", "CACHED_CONFIG": "", "CACHED_PORT_9400_TCP": "tcp://1:9400"}
    assert settings.daemon_address("/given", environ=environ) == "/given"


def test_a_worker_with_the_usual_variables_does_not_import_the_table_of_options():
    code = (
        "import sys; from cached.client import settings; settings.daemon_address()\n"
        "assert not {'cached.core.options', 'tomllib', 'difflib'} & set(sys.modules)\n"
        "settings.daemon_address(environ={'CACHED_REGION': 'r', 'CACHED_SOCKET': '/s'})\n"
        "assert 'cached.core.options' in sys.modules and 'difflib' not in sys.modules\n"
    )
    environ = {"CACHED_SOCKET": "/s", "CACHED_MODELS": "m=s3://b/", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-c", code], env=environ, check=False, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr


def test_environment_and_file_are_the_levels_of_the_daemon(file: Path):
    environ = {"CACHED_CONFIG": str(file), "CACHED_ANONYMOUS": "", "CACHED_REGION": "env"}
    config = resolve(settings.levels(environ))
    assert (config.region, config.anonymous, config.addressing_style) == ("env", True, "path")
    assert [model.name for model in config.models] == ["llm", "other"]
    assert settings.levels({}) == [Level({}, {})]


def test_only_a_socket_in_the_shared_directory_is_checked(tmp_path: Path):
    settings.check_owner("/run/user/1/cached.sock")
    settings.check_owner(str(tmp_path / "cached.sock"))
    settings.check_owner("@cached-1")
    settings.check_owner("/tmp/cached-none-such/cached.sock")


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o722])
def test_a_directory_that_others_may_write_is_refused(mode: int):
    path = Path(f"/tmp/cached-test-{os.getpid()}-{mode:o}")
    path.mkdir(mode=0o700)
    try:
        settings.check_owner(f"{path}/cached.sock")
        path.chmod(mode)
        with pytest.raises(InvalidConfig, match=f"{path} .*; another user may have put"):
            settings.check_owner(f"{path}/cached.sock")
    finally:
        path.rmdir()


def test_a_link_in_place_of_the_directory_is_refused(tmp_path: Path):
    path = Path(f"/tmp/cached-test-{os.getpid()}-link")
    path.symlink_to(tmp_path)
    try:
        with pytest.raises(InvalidConfig):
            settings.check_owner(f"{path}/cached.sock")
    finally:
        path.unlink()
