"""Orders over HTTP and the audit, against the real daemon: what is done, by whom, and no secret."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from typing import TYPE_CHECKING

import pytest

import cached

if TYPE_CHECKING:
    from pathlib import Path

    from tests.e2e.conftest import Daemons
    from tests.e2e.served import Served

TOKEN = "0123456789abcdef0123456789abcdef"


def post(served: Served, path: str, token: str = TOKEN) -> tuple[int, dict[str, object]]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{served.http_port}{path}",
        method="POST",
        headers={"Authorization": f"Bearer {token}"},
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


@pytest.fixture
def token(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text(TOKEN)
    path.chmod(0o600)
    return path


def test_orders_are_done_for_who_knows_the_token_and_the_log_says_who(
    daemon: Daemons, tiny: Path, token: Path
):
    served = daemon({"llm": f"file://{tiny}/"}, f"--http-token-file={token}", "--audit")
    served.get("/healthz")
    assert post(served, "/models/llm/prefetch", "wrong")[0] == 403
    status, reply = post(served, "/models/llm/prefetch")
    assert (status, set(reply)) == (200, {"state"})
    served.wait_for_state("llm", "resident")
    with cached.open("llm", timeout_s=10) as model:
        version = model.version
        status, reply = post(served, "/models/llm/evict")
        assert (status, "is leased by 1 worker" in str(reply["error"])) == (409, True)
    del model
    deadline_s = time.monotonic() + 10
    while post(served, "/models/llm/evict")[0] != 200:  # until the lease has ended
        assert time.monotonic() < deadline_s
    assert post(served, "/models/nobody/evict")[0] == 404
    served.stop()
    records = served.records()
    granted, ended = (
        next(each for each in records if each["event"] == event)
        for event in ("lease granted", "lease ended")
    )
    assert granted["version"] == ended["version"] == version
    assert granted["uid"] == ended["uid"]
    evicted = next(each for each in records if each["event"] == "model evicted by order")
    assert (evicted["model"], evicted["via"]) == ("llm", "http")
    assert TOKEN not in served.log.read_text()


def test_a_token_that_others_can_read_is_refused_at_start(tiny: Path, token: Path):
    from tests.e2e.served import run

    token.chmod(0o644)
    ended = run("serve", f"--model=llm=file://{tiny}/", f"--http-token-file={token}")
    assert ended.returncode == 2
    assert f"http_token_file {token} has mode 0644: others may read or change it" in ended.stderr
    assert TOKEN not in ended.stderr
