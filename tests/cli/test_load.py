"""Every option can be given in each of its ways, by the same rule for daemon and workers."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest

from cached.cli import serve
from cached.cli.load import from_flags, load, segment_root
from cached.client import settings
from cached.core.config import Given
from cached.core.errors import InvalidConfig
from cached.core.kinds import SWITCH
from cached.core.objects import ModelRef
from cached.core.options import OPTIONS
from tests.reference.settings import SAMPLES

if TYPE_CHECKING:
    from pathlib import Path

    from cached.core.config import Config

FIELDS = {option.key: option.field for option in OPTIONS}
SWITCHES = {option.key for option in OPTIONS if option.kind is SWITCH}
LLM = "llm=s3://models/llama/"
CASES = [(key, text, meant) for key, samples in SAMPLES.items() for text, meant in samples]


def flag(key: str, text: str, meant: object) -> list[str]:
    name = key.replace("_", "-")
    if key in SWITCHES:
        return [f"--{name}" if meant else f"--no-{name}"]
    return [f"--{name}={text}"]


def loaded(*arguments: str, environ: dict[str, str] | None = None) -> Config:
    options = serve.parser("serve").parse([f"--model={LLM}", *arguments])
    return load(vars(options), environ or {})


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "cached.toml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(("key", "text", "meant"), CASES)
def test_by_flag(key: str, text: str, meant: object):
    assert getattr(loaded(*flag(key, text, meant)), FIELDS[key]) == meant


@pytest.mark.parametrize(("key", "text", "meant"), CASES)
def test_by_environment(key: str, text: str, meant: object):
    config = loaded(environ={"CACHED_" + key.upper(): text})
    assert getattr(config, FIELDS[key]) == meant


@pytest.mark.parametrize(("key", "text", "meant"), CASES)
def test_by_file(tmp_path: Path, key: str, text: str, meant: object):
    path = written(tmp_path, f"{key} = {json.dumps(text)}")
    assert getattr(loaded(f"--config={path}"), FIELDS[key]) == meant
    assert getattr(loaded(environ={"CACHED_CONFIG": path}), FIELDS[key]) == meant


def test_a_file_may_use_the_types_of_toml(tmp_path: Path):
    text = "memory_budget = 1073741824\nfetch_threads = 3\nanonymous = true\ndrain_timeout = 1.5"
    config = loaded(f"--config={written(tmp_path, text)}")
    assert config.memory_budget_bytes == 1 << 30
    assert config.fetch_threads == 3
    assert config.anonymous is True
    assert config.drain_timeout_s == 1.5


def test_flags_go_before_the_environment_and_that_before_the_file(tmp_path: Path):
    path = written(tmp_path, "fetch_threads = 1\nmax_attempts = 1\nregion = 'file'")
    environ = {"CACHED_FETCH_THREADS": "2", "CACHED_MAX_ATTEMPTS": "2", "CACHED_CONFIG": path}
    config = loaded("--fetch-threads=3", environ=environ)
    assert (config.fetch_threads, config.max_attempts, config.region) == (3, 2, "file")


def test_the_flag_names_the_file_before_the_environment(tmp_path: Path):
    path = written(tmp_path, "fetch_threads = 3")
    environ = {"CACHED_CONFIG": "/nowhere/cached.toml"}
    assert loaded(f"--config={path}", environ=environ).fetch_threads == 3


def test_what_the_aws_sdks_read_is_below_our_own_names():
    environ = {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:1",
        "AWS_DEFAULT_REGION": "default",
        "AWS_CA_BUNDLE": "/etc/hosts",
    }
    config = loaded(environ=environ)
    assert config.endpoint_url == "http://127.0.0.1:1"
    assert config.region == "default"
    assert config.ca_bundle == "/etc/hosts"
    environ |= {"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:2", "AWS_REGION": "region"}
    config = loaded(environ=environ)
    assert (config.endpoint_url, config.region) == ("http://127.0.0.1:2", "region")
    environ |= {"CACHED_ENDPOINT_URL": "http://127.0.0.1:3", "CACHED_REGION": "ours"}
    config = loaded(environ=environ)
    assert (config.endpoint_url, config.region) == ("http://127.0.0.1:3", "ours")


def test_endpoints_are_ignored_where_the_sdks_are_told_so():
    environ = {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:1",
        "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true",
        "AWS_REGION": "region",
    }
    assert loaded(environ=environ).endpoint_url is None
    assert loaded(environ=environ).region == "region"


def test_an_empty_variable_is_not_set():
    environ = {"CACHED_REGION": "", "CACHED_MODELS": "", "CACHED_CONFIG": "", "AWS_REGION": "r"}
    assert loaded(environ=environ).region == "r"


def test_models_come_from_all_levels(tmp_path: Path):
    path = written(
        tmp_path,
        '[models.llm]\nuri = "s3://old/"\npinned = true\n'
        '[models.clip]\nuri = "s3://c/clip.safetensors"\nprefetch = false',
    )
    environ = {"CACHED_MODELS": "a=s3://m/a/\n\tb=s3://m/b/", "CACHED_CONFIG": path}
    assert loaded(environ=environ).models == (
        ModelRef("llm", "s3://models/llama/", prefetch=True, pinned=True),
        ModelRef("a", "s3://m/a/"),
        ModelRef("b", "s3://m/b/"),
        ModelRef("clip", "s3://c/clip.safetensors", prefetch=False),
    )


def test_a_command_may_bring_its_own_models():
    ours = (ModelRef("m", "s3://m/"),)
    config = load({"region": "r"}, {"CACHED_MODELS": "a=s3://a/"}, ours)
    assert (config.models, config.region) == (ours, "r")


def test_a_uri_may_hold_an_equals_sign():
    level = from_flags({"model": ["m=s3://b/x=y/"]})
    assert level.models == {"m": {"uri": Given("s3://b/x=y/", "--model")}}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"model": ["s3://b/x"]}, "a model must be NAME=URI, was 's3://b/x' (from --model)"),
        ({"model": ["s3://b/x=y"]}, "a model must be NAME=URI, was 's3://b/x=y' (from --model)"),
        ({"model": ["=s3://b/x"]}, "a model must be NAME=URI, was '=s3://b/x' (from --model)"),
        ({"model": [LLM, LLM]}, "model llm is named twice (from --model)"),
    ],
)
def test_a_model_that_is_not_one_is_refused(flags: dict[str, object], message: str):
    with pytest.raises(InvalidConfig) as caught:
        from_flags(flags)
    assert caught.value.message == message


def test_relative_paths_start_at_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    config = loaded("--segment-root=segments", "--socket=./s", environ={})
    assert config.segment_root == f"{tmp_path}/segments"
    assert config.socket == f"{tmp_path}/s"


def test_a_socket_is_where_workers_look_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    path = written(tmp_path, "socket = '~/file.sock'")
    for environ in (
        {"CACHED_SOCKET": "run/s"},
        {"CACHED_SOCKET": "~/s"},
        {"CACHED_SOCKET": " /run/s "},
        {"CACHED_SOCKET": "  ", "CACHED_CONFIG": path},
        {"CACHED_SOCKET": f"/{'x' * 106}"},
        {"AWS_LAMBDA_RUNTIME_API": "127.0.0.1:9001"},
    ):
        assert loaded(environ=environ).socket == settings.daemon_address(environ=environ)
    for bad in (f"/{'x' * 107}", "@", "a\nb", "\x7f"):
        with pytest.raises(InvalidConfig) as for_the_daemon:
            loaded(environ={"CACHED_SOCKET": bad})
        with pytest.raises(InvalidConfig) as for_a_worker:
            settings.daemon_address(environ={"CACHED_SOCKET": bad})
        assert for_the_daemon.value.message[:40] == for_a_worker.value.message[:40]


def test_certificates_that_cannot_be_read_are_refused_at_start():
    with pytest.raises(InvalidConfig, match=r"ca_bundle must be a readable file, was '/no/where'"):
        loaded("--ca-bundle=/no/where")


def test_a_key_file_that_cannot_be_read_is_refused_at_start():
    words = "sse_customer_key_file must be a readable file, was '/no/where'"
    with pytest.raises(InvalidConfig, match=words) as caught:
        loaded("--sse-customer-key-file=/no/where")
    assert "--sse-customer-key-file, CACHED_SSE_CUSTOMER_KEY_FILE or" in caught.value.hint


def test_the_machine_gives_socket_and_segment_root():
    config = loaded(environ={"AWS_LAMBDA_RUNTIME_API": "127.0.0.1:9001"})
    assert config.socket == f"@cached-{os.getuid()}"
    assert config.segment_root == f"/dev/shm/cached-{os.getuid()}"


def test_without_a_tmpfs_the_segment_root_is_private_and_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("cached.cli.load.SHARED_MEMORY", str(tmp_path / "none"))
    assert loaded().segment_root == f"/tmp/cached-{os.getuid()}/models"
    assert loaded("--segment-root=/mnt/m").segment_root == "/mnt/m"


def test_the_environment_of_the_process_is_the_default(monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in os.environ if name.startswith(("CACHED_", "AWS_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("CACHED_MODELS", LLM)
    monkeypatch.setenv("CACHED_REGION", "here")
    config = load({})
    assert (config.models[0].name, config.region) == ("llm", "here")


@pytest.mark.parametrize(
    ("given", "environ", "root"),
    [
        ("/a", {"CACHED_SEGMENT_ROOT": "/b"}, "/a"),
        (None, {"CACHED_SEGMENT_ROOT": "/b"}, "/b"),
        (None, {}, f"/dev/shm/cached-{os.getuid()}"),
    ],
)
def test_the_segment_root_is_found_without_a_model(given, environ, root):
    assert segment_root(given, environ) == root


def test_the_segment_root_of_a_file_is_found(tmp_path):
    (tmp_path / "c.toml").write_text('segment_root = "/c"')
    assert segment_root(None, {"CACHED_CONFIG": str(tmp_path / "c.toml")}) == "/c"


def test_a_token_that_nobody_could_send_is_refused():
    flags = {"model": [LLM], "http_token_file": "/t"}
    assert load(flags, {}).http_token_file == "/t"
    with pytest.raises(InvalidConfig, match="http_token_file needs the HTTP side, which http_port"):
        load({**flags, "http_port": "off"}, {})


def test_an_audit_that_would_not_be_written_is_refused():
    flags = {"model": [LLM], "audit": True}
    assert load(flags, {}).audit
    with pytest.raises(InvalidConfig, match="audit needs log_level info or debug, was warning"):
        load({**flags, "log_level": "warning"}, {})
