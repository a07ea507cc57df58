"""Daemon and client find each other by one rule; the first source that says something counts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cached.client import settings
from cached.core.errors import InvalidConfig

UID = 1234


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


@pytest.mark.parametrize("given", ['""', "5", '"@"', f'"/{"x" * 107}"', f'"@{"x" * 107}"'])
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
    assert settings.socket_address() == "/mine"


@pytest.mark.parametrize("content", [None, "socket = ", b"\xff"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: str | bytes | None):
    path = tmp_path / "bad.toml"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InvalidConfig, match=r"cannot read .*bad.toml: .*; CACHED_CONFIG must"):
        settings.socket_address({"CACHED_CONFIG": str(path)}, UID)


def test_the_environment_says_where_a_model_is_before_the_file_does(file: Path):
    environ = {
        "CACHED_CONFIG": str(file),
        "CACHED_MODELS": "clip=s3://env/clip.safetensors\n llm=s3://env/a=b/  broken empty=",
    }
    assert settings.model_uri("llm", environ) == "s3://env/a=b/"
    assert settings.model_uri("clip", environ) == "s3://env/clip.safetensors"
    assert settings.model_uri("other", environ) == "s3://file/other/"
    for name in ("broken", "empty", "nope"):
        assert settings.model_uri(name, environ) is None
    assert settings.model_uri("llm", {}) is None


def test_settings_of_the_store_come_from_ours_then_from_the_sdks_then_from_the_file(file: Path):
    assert settings.store_settings({}) == {}
    environ = {
        "CACHED_CONFIG": str(file),
        "AWS_CA_BUNDLE": "/ca.pem",
        "AWS_ENDPOINT_URL": "http://a",
    }
    assert settings.store_settings(environ) == {
        "endpoint_url": "http://a",
        "region": "file",
        "ca_bundle": "/ca.pem",
        "addressing_style": "path",
        "anonymous": "true",
    }
    environ |= {
        "AWS_ENDPOINT_URL_S3": "http://s3",
        "AWS_DEFAULT_REGION": "default",
        "CACHED_ANONYMOUS": "no",
        "CACHED_ALLOW_INSECURE_ENDPOINT": "Yes",
        "CACHED_CA_BUNDLE": "/ours.pem",
    }
    assert settings.store_settings(environ) == {
        "endpoint_url": "http://s3",
        "region": "default",
        "ca_bundle": "/ours.pem",
        "addressing_style": "path",
        "allow_insecure_endpoint": "true",
    }
    environ |= {"CACHED_ENDPOINT_URL": "http://ours", "AWS_REGION": "region"}
    found = settings.store_settings(environ)
    assert (found["endpoint_url"], found["region"]) == ("http://ours", "region")


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
