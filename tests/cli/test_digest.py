"""``cached digest`` writes the list of a whole model that did not change meanwhile, or nothing."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
from typing import TYPE_CHECKING

import pytest

from cached.adapters.local_files import LocalFiles
from cached.cli import digest, hashing
from cached.cli.arguments import described
from cached.cli.main import main
from cached.core.digests import BLOCK_BYTES, MANIFEST_NAME, FileDigests, parse
from cached.core.objects import ModelRef
from tests.fakes import tls
from tests.fakes.s3_objects import Generated
from tests.fakes.store_faults import Changed, ShortBody, Stall, Status
from tests.fakes.store_server import StoreServer

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from tests.fakes.s3_objects import Content

URI = "s3://models/llm/"
LIST = f"llm/{MANIFEST_NAME}"
LONG = Generated(BLOCK_BYTES + (1 << 20))
FILES: Mapping[str, Content] = {"a.safetensors": LONG, "sub/b.json": b"{}", "sub/empty": b""}
RUN = ["digest", URI, "--anonymous"]


def digests(data: bytes) -> FileDigests:
    blocks = [data[at : at + BLOCK_BYTES] for at in range(0, len(data), BLOCK_BYTES)]
    whole = hashlib.sha256(data).digest()
    return FileDigests(len(data), whole, tuple(hashlib.sha256(each).digest() for each in blocks))


WANTED = {
    "a.safetensors": digests(LONG.content(0, LONG.size_bytes)),
    "sub/b.json": digests(b"{}"),
    "sub/empty": digests(b""),
}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[StoreServer]:
    with StoreServer({f"llm/{path}": content for path, content in FILES.items()}) as server:
        monkeypatch.setenv("CACHED_ENDPOINT_URL", server.endpoint_url)
        monkeypatch.setattr(hashing, "delay_s", lambda *_: 0.0)
        yield server


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A model of two files."""
    model = tmp_path / "llm"
    (model / "sub").mkdir(parents=True)
    (model / "a.bin").write_bytes(b"abc")
    (model / "sub" / "b").write_bytes(b"de")
    return model


def listed(server: StoreServer) -> dict[str, FileDigests]:
    content = server.objects[LIST].content
    assert isinstance(content, bytes)
    found = parse(content)
    assert found.block_bytes == BLOCK_BYTES
    return dict(found.files)


def test_the_list_is_written_beside_the_files(server: StoreServer, capsys):
    assert main(RUN) == 0
    assert listed(server) == WANTED
    out, err = capsys.readouterr()
    assert out.startswith("s3://models/llm/: 3 files, 9.0 MiB in ")
    assert out.endswith(f", written to s3://models/{LIST}\n")
    assert "llm: reading, 9.0 MiB of 9.0 MiB (100%)" in err


def test_each_file_is_read_once_and_the_old_list_is_no_part_of_the_new(server: StoreServer):
    assert main(RUN) == 0
    gets = server.gets
    assert gets == 2  # an empty file needs none
    before = server.objects[LIST]
    assert main(RUN) == 0
    assert server.gets == 2 * gets
    assert server.objects[LIST].content == before.content


def test_the_list_of_a_directory_is_written_into_it(directory: Path, capsys):
    for uri in (f"file://{directory}", f"file://{directory}/"):
        assert main(["digest", uri]) == 0
        assert capsys.readouterr().out.endswith(f"to file://{directory}/{MANIFEST_NAME}\n")
        assert parse((directory / MANIFEST_NAME).read_bytes()).files == {
            "a.bin": digests(b"abc"),
            "sub/b": digests(b"de"),
        }


def test_a_file_takes_it_instead(server: StoreServer, tmp_path: Path, capsys):
    path = tmp_path / "list.json"
    assert main([*RUN, f"--output={path}"]) == 0
    assert parse(path.read_bytes()).files == WANTED
    assert capsys.readouterr().out.endswith(f"written to {path}\n")
    assert LIST not in server.objects


def test_stdout_takes_it_and_nothing_else(directory: Path, capsys):
    assert main(["digest", f"file://{directory}", "--output", "-"]) == 0
    out, err = capsys.readouterr()
    assert set(parse(out.encode()).files) == {"a.bin", "sub/b"}
    assert f"file://{directory}: 2 files, 5 B in " in err
    assert err.endswith("written to stdout\n")
    assert not (directory / MANIFEST_NAME).exists()


def test_one_file_is_not_files(directory: Path, capsys):
    (directory / "a.bin").unlink()
    assert main(["digest", f"file://{directory}"]) == 0
    assert f"file://{directory}: 1 file, 2 B in " in capsys.readouterr().out


def test_json_tells_the_version_that_a_daemon_will_know(directory: Path, capsys):
    uri = f"file://{directory}/"
    assert main(["digest", uri, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report.pop("seconds") >= 0
    assert report == {
        "uri": uri,
        "version": LocalFiles().resolve(ModelRef("m", uri)).version,
        "files": 2,
        "size_bytes": 5,
        "written": f"{uri}{MANIFEST_NAME}",
    }


# --- refused before anything is read


@pytest.mark.parametrize("uri", ["s3://models/llm/a.safetensors", "s3://models/llm"])
def test_an_object_is_refused(server: StoreServer, uri: str, capsys):
    assert main(["digest", uri, "--anonymous"]) == 2
    assert capsys.readouterr().err == (
        f"cached: digests are those of a directory of files, {uri} names one object; "
        "name the prefix that it is in, with / at the end\n"
    )
    assert server.seen == []


def test_a_local_file_is_refused(directory: Path, capsys):
    assert main(["digest", f"file://{directory}/a.bin"]) == 2
    assert "a.bin names one object; " in capsys.readouterr().err


def test_a_whole_bucket_is_a_model(server: StoreServer):
    assert main(["digest", "s3://models", "--anonymous"]) == 0
    found = parse(server.objects[MANIFEST_NAME].content_of(0, 1 << 20))
    assert set(found.files) == {f"llm/{path}" for path in FILES}


def test_what_is_no_uri_is_refused_with_what_to_write(capsys):
    assert main(["digest", "/srv/llm"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("cached: URI must be s3://BUCKET/PREFIX/, ")
    assert said.endswith("was '/srv/llm' (from the command line); write file:///srv/llm\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--output=/no/where/list.json"], "--output must be in a directory that is there, was "),
        (["--output=-", "--json"], "--output - and --json both print to stdout"),
        (["--max-attempts=0"], "max_attempts must be at least 1, was 0"),
    ],
)
def test_what_would_fail_at_the_end_is_refused_at_the_start(
    server: StoreServer, arguments: list[str], words: str, capsys
):
    assert main([*RUN, *arguments]) == 2
    assert words in capsys.readouterr().err
    assert server.seen == []


def test_the_options_are_those_of_the_daemon_about_its_stores(tmp_path: Path, capsys):
    names = {name for each in described(digest.parser("digest")) for name in each.names}
    assert {"--endpoint-url", "--ca-bundle", "--sse-customer-key-file", "--config"} <= names
    assert {"--connect-timeout", "--receive-timeout", "--fetch-threads"} <= names
    assert not names & {"--verify", "--refresh-interval", "--memory-budget", "--socket"}
    with StoreServer({"llm/a": b"1"}) as server:
        config = tmp_path / "cached.toml"
        config.write_text(f'endpoint_url = "{server.endpoint_url}"\nanonymous = true\n')
        assert main(["digest", URI, f"--config={config}"]) == 0
        assert listed(server) == {"a": digests(b"1")}


def test_bytes_may_come_over_tls(monkeypatch: pytest.MonkeyPatch):
    objects = {f"llm/{path}": content for path, content in FILES.items()}
    with StoreServer(objects, tls=tls.server_context()) as server:
        monkeypatch.setenv("CACHED_ENDPOINT_URL", server.endpoint_url)
        assert main([*RUN, f"--ca-bundle={tls.AUTHORITY}"]) == 0
        assert listed(server) == WANTED


# --- what goes wrong


def test_a_file_that_breaks_is_resumed(server: StoreServer):
    server.faults = {0: ShortBody(1000), 1: ShortBody(1000)}
    assert main([*RUN, "--fetch-threads=1", "--max-attempts=2"]) == 0
    assert listed(server) == WANTED
    ranges = [asked.headers["range"] for asked in server.seen if "range" in asked.headers]
    last = LONG.size_bytes - 1
    assert ranges[:3] == [f"bytes={start}-{last}" for start in (0, 1000, 2000)]


def test_a_store_that_brings_nothing_is_given_up(server: StoreServer, capsys):
    server.faults = {count: Status(503) for count in range(20)}
    assert main([*RUN, "--fetch-threads=1", "--max-attempts=3"]) == 1
    asked = [each for each in server.seen if each.path.endswith("/a.safetensors")]
    assert len(asked) == 3
    assert "503" in capsys.readouterr().err
    assert LIST not in server.objects


def test_requests_beside_the_files_are_tried_again_too(server: StoreServer):
    server.faults = {("LIST", 0): Status(503), ("PUT", 0): Status(503)}
    assert main(RUN) == 0
    assert listed(server) == WANTED


def test_nothing_is_written_of_a_model_that_changes(server: StoreServer, capsys):
    server.faults = {0: Changed()}
    assert main(RUN) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert "cached: s3://models/llm/" in said.err
    assert said.err.endswith("; nothing was written; run it again once nobody writes there\n")
    assert LIST not in server.objects


def test_a_store_that_takes_no_list_is_told(server: StoreServer, capsys):
    server.faults = {("PUT", 0): Status(403, code="AccessDenied")}
    assert main(RUN) == 1
    assert "s3:PutObject" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_told(directory: Path, tmp_path: Path, capsys):
    assert main(["digest", f"file://{directory}", f"--output={tmp_path}"]) == 1
    assert f"cached: cannot write {tmp_path}: Is a directory; " in capsys.readouterr().err


def test_ctrl_c_ends_it_at_once_with_130(server: StoreServer, capsys):
    server.faults = {1: Stall(float("inf"), body_bytes=1)}

    def interrupt() -> None:
        assert server.stalled.wait(10)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert main([*RUN, "--receive-timeout=1h"]) == 130
    thread.join()
    assert capsys.readouterr().out == ""
    assert LIST not in server.objects
    for each in threading.enumerate():
        if each.name.startswith("hash"):  # one that was just being started is not waited for
            each.join(5)
            assert not each.is_alive()
