"""Keys come from where AWS's own SDKs take them, are renewed in time, and never show."""

from __future__ import annotations

import json
import sys
import threading
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import parse_qs

import pytest

from cached.adapters.credentials import Credentials, Keys
from cached.core.errors import CredentialsUnavailable, StoreError, StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

NOW_S = 1_700_000_000.0  # 2023-11-14T22:13:20Z
SECRET = "a-very-secret-key"
TOKEN = "a-very-secret-token"
FROM_ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "AKID", "AWS_SECRET_ACCESS_KEY": SECRET}
CONTAINER = {"AWS_CONTAINER_CREDENTIALS_RELATIVE_URI": "/v2/credentials/x"}


class Clock:
    def __init__(self) -> None:
        self.at_s = NOW_S

    def now_s(self) -> float:
        return self.at_s

    def wall_s(self) -> float:
        return self.at_s


class Reply(NamedTuple):
    status: int
    body: bytes


class Request(NamedTuple):
    method: str
    url: str
    headers: Mapping[str, str]
    body: bytes


class Exchange:
    """Answers with what ``answer`` returns for the number of the request, from 0."""

    def __init__(self, answer: Callable[[int], Reply]) -> None:
        self.answer = answer
        self.requests: list[Request] = []

    def __call__(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes = b""
    ) -> Reply:
        self.requests.append(Request(method, url, headers, body))
        return self.answer(len(self.requests) - 1)


def of_container(key_id: str = "ASIA", expiration: str = "2023-11-14T23:13:20Z") -> Reply:
    found = {"AccessKeyId": key_id, "SecretAccessKey": SECRET, "Token": TOKEN}
    return Reply(200, json.dumps({**found, "Expiration": expiration, "RoleArn": "x"}).encode())


STS_REPLY = Reply(
    200,
    f"""<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/">
  <AssumeRoleWithWebIdentityResult>
    <SubjectFromWebIdentityToken>x</SubjectFromWebIdentityToken>
    <Credentials>
      <SessionToken>{TOKEN}</SessionToken>
      <SecretAccessKey>{SECRET}</SecretAccessKey>
      <Expiration>2023-11-14T23:13:20Z</Expiration>
      <AccessKeyId>ASIA</AccessKeyId>
    </Credentials>
  </AssumeRoleWithWebIdentityResult>
</AssumeRoleWithWebIdentityResponse>""".encode(),
)


def silent(number: int) -> Reply:
    raise AssertionError("nothing may be asked for")


def found_in(
    environ: Mapping[str, str], answer: Callable[[int], Reply] = silent
) -> tuple[Credentials, Exchange, Clock]:
    exchange, clock = Exchange(answer), Clock()
    return Credentials(exchange, clock, environ), exchange, clock


# --- environment


def test_environment_keys_are_used_without_asking_anybody():
    credentials, _, _ = found_in(FROM_ENVIRONMENT)
    assert credentials.keys() == Keys("AKID", SECRET)


def test_environment_keys_come_before_all_else_and_bring_their_session_token():
    credentials, _, _ = found_in({**FROM_ENVIRONMENT, **CONTAINER, "AWS_SESSION_TOKEN": TOKEN})
    assert credentials.keys() == Keys("AKID", SECRET, TOKEN)


def test_environment_keys_are_read_at_each_use():
    environ = dict(FROM_ENVIRONMENT)
    credentials, _, _ = found_in(environ)
    credentials.keys()
    environ["AWS_ACCESS_KEY_ID"] = "NEW"
    assert credentials.keys().access_key_id == "NEW"


def test_half_of_the_environment_keys_is_an_error_that_names_the_other_half():
    credentials, _, _ = found_in({"AWS_ACCESS_KEY_ID": "AKID"})
    with pytest.raises(CredentialsUnavailable, match="AWS_SECRET_ACCESS_KEY is not"):
        credentials.keys()


def test_expired_environment_keys_cannot_be_replaced_by_themselves():
    credentials, _, _ = found_in({**FROM_ENVIRONMENT, "AWS_SESSION_TOKEN": TOKEN})
    with pytest.raises(CredentialsUnavailable, match="AKID have expired") as caught:
        credentials.replace(credentials.keys())
    assert SECRET not in str(caught.value)
    assert TOKEN not in str(caught.value)


# --- container


def test_a_containers_keys_are_asked_for_once():
    credentials, exchange, _ = found_in(CONTAINER, lambda _: of_container())
    assert credentials.keys() == credentials.keys() == Keys("ASIA", SECRET, TOKEN, NOW_S + 3600)
    assert [request.url for request in exchange.requests] == [
        "http://169.254.170.2/v2/credentials/x"
    ]


def test_a_containers_keys_are_renewed_when_less_than_five_minutes_are_left():
    credentials, exchange, clock = found_in(
        CONTAINER,
        lambda number: of_container(f"ASIA{number}", f"2023-11-{14 + number}T23:13:20Z"),
    )
    credentials.keys()
    clock.at_s = NOW_S + 3300 - 1
    assert credentials.keys().access_key_id == "ASIA0"
    clock.at_s = NOW_S + 3300
    assert credentials.keys().access_key_id == "ASIA1"
    assert len(exchange.requests) == 2


def test_a_failed_renewal_leaves_the_old_keys_until_they_expire():
    def answer(number: int) -> Reply:
        return of_container() if number == 0 else Reply(500, b"")

    credentials, exchange, clock = found_in(CONTAINER, answer)
    kept = credentials.keys()
    clock.at_s = NOW_S + 3400
    assert [credentials.keys() for _ in range(3)] == [kept] * 3
    assert len(exchange.requests) == 2
    clock.at_s = NOW_S + 3431
    assert credentials.keys() == kept
    assert len(exchange.requests) == 3
    clock.at_s = NOW_S + 3600
    with pytest.raises(StoreUnavailable):
        credentials.keys()


def test_keys_that_the_store_calls_expired_are_replaced():
    credentials, exchange, _ = found_in(CONTAINER, lambda number: of_container(f"ASIA{number}"))
    old = credentials.keys()
    assert credentials.replace(old).access_key_id == "ASIA1"
    assert credentials.replace(old).access_key_id == "ASIA1", "another thread did it already"
    assert len(exchange.requests) == 2


def test_threads_that_meet_an_expired_key_ask_for_one_new_key_together():
    started = threading.Barrier(8)
    asked = threading.Event()

    def answer(number: int) -> Reply:
        asked.wait(5)
        return of_container(f"ASIA{number}")

    credentials, exchange, _ = found_in(CONTAINER, answer)
    got: list[Keys] = []

    def use() -> None:
        started.wait(5)
        got.append(credentials.keys())

    threads = [threading.Thread(target=use) for _ in range(7)]
    for thread in threads:
        thread.start()
    started.wait(5)
    asked.set()
    for thread in threads:
        thread.join()
    assert {keys.access_key_id for keys in got} == {"ASIA0"}
    assert len(exchange.requests) == 1


def test_while_one_thread_renews_the_others_go_on_with_the_old_keys():
    renewing, done = threading.Event(), threading.Event()

    def answer(number: int) -> Reply:
        if number:
            renewing.set()
            done.wait(5)
        return of_container(f"ASIA{number}", f"2023-11-{14 + number}T23:13:20Z")

    credentials, _, clock = found_in(CONTAINER, answer)
    credentials.keys()
    clock.at_s = NOW_S + 3400
    thread = threading.Thread(target=credentials.keys)
    thread.start()
    assert renewing.wait(5)
    assert credentials.keys().access_key_id == "ASIA0"
    done.set()
    thread.join()
    assert credentials.keys().access_key_id == "ASIA1"


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:8080/x",
        "http://localhost/x",
        "http://[::1]:80/x",
        "http://169.254.170.23/v1/credentials",
        "http://[fd00:ec2::23]/v1/credentials",
        "https://keys.example.com/x",
    ],
)
def test_a_full_uri_may_lead_to_loopback_the_agents_addresses_or_https(url: str):
    environ = {
        "AWS_CONTAINER_CREDENTIALS_FULL_URI": url,
        "AWS_CONTAINER_AUTHORIZATION_TOKEN": TOKEN,
    }
    credentials, exchange, _ = found_in(environ, lambda _: of_container())
    credentials.keys()
    assert exchange.requests[0].url == url
    assert exchange.requests[0].headers["authorization"] == TOKEN


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/x",
        "http://169.254.169.254/x",
        "http://127.0.0.1.example.com/x",
        "http://localhost@example.com/x",
        "ftp://localhost/x",
        "file:///etc/passwd",
        "http://localhost/x y",
    ],
)
def test_a_full_uri_that_leads_elsewhere_is_refused(url: str):
    credentials, _, _ = found_in({"AWS_CONTAINER_CREDENTIALS_FULL_URI": url})
    with pytest.raises(CredentialsUnavailable, match="AWS_CONTAINER_CREDENTIALS_FULL_URI"):
        credentials.keys()


def test_the_token_file_is_read_again_at_each_renewal(tmp_path: Path):
    file = tmp_path / "token"
    environ = {
        "AWS_CONTAINER_CREDENTIALS_FULL_URI": "http://169.254.170.23/v1/credentials",
        "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": str(file),
        "AWS_CONTAINER_AUTHORIZATION_TOKEN": "not this one",
    }
    credentials, exchange, _ = found_in(environ, lambda number: of_container(f"ASIA{number}"))
    file.write_text("one\n")
    old = credentials.keys()
    file.write_text("two\n")
    credentials.replace(old)
    assert [request.headers["authorization"] for request in exchange.requests] == ["one", "two"]


@pytest.mark.parametrize("content", [None, "", "two\nlines", "t\u00f6ken"])
def test_an_unusable_token_file_is_an_error_that_names_it(tmp_path: Path, content: str | None):
    file = tmp_path / "token"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    environ = {**CONTAINER, "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": str(file)}
    credentials, _, _ = found_in(environ)
    with pytest.raises(CredentialsUnavailable, match="AWS_CONTAINER_AUTHORIZATION_TOKEN") as caught:
        credentials.keys()
    assert "lines" not in str(caught.value)


@pytest.mark.parametrize(
    "reply",
    [
        Reply(200, b"not json"),
        Reply(200, b"[]"),
        Reply(200, b'{"AccessKeyId": "a"}'),
        of_container(expiration="soon"),
        Reply(200, b'{"AccessKeyId": 1, "SecretAccessKey": "s", "Token": "t"}'),
        Reply(200, b'{"AccessKeyId": "a", "SecretAccessKey": null, "Token": "t"}'),
    ],
)
def test_a_reply_of_another_form_is_a_typed_error_without_its_text(reply: Reply):
    credentials, _, _ = found_in(CONTAINER, lambda _: reply)
    with pytest.raises(CredentialsUnavailable, match="not as documented") as caught:
        credentials.keys()
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (Reply(403, b'{"code": "AccessDenied", "message": "no role"}'), CredentialsUnavailable),
        (Reply(503, b""), StoreUnavailable),
        (Reply(429, b""), StoreUnavailable),
    ],
)
def test_a_refusal_by_the_container_says_why(reply: Reply, error: type[StoreError]):
    credentials, _, _ = found_in(CONTAINER, lambda _: reply)
    with pytest.raises(error, match=str(reply.status)) as caught:
        credentials.keys()
    if reply.body:
        assert "AccessDenied: no role" in str(caught.value)


def test_a_token_that_a_refusal_repeats_does_not_stand_in_the_error():
    environ = {**CONTAINER, "AWS_CONTAINER_AUTHORIZATION_TOKEN": TOKEN}
    body = json.dumps({"code": "InvalidToken", "message": f"not known: {TOKEN}"}).encode()
    credentials, _, _ = found_in(environ, lambda _: Reply(403, body))
    with pytest.raises(CredentialsUnavailable, match=r"not known: \*\*\*") as caught:
        credentials.keys()
    assert TOKEN not in str(caught.value)


def test_keys_that_had_expired_when_they_came_are_refused():
    credentials, _, _ = found_in(
        CONTAINER, lambda _: of_container(expiration="2001-01-01T00:00:00Z")
    )
    with pytest.raises(CredentialsUnavailable, match="had expired when they came"):
        credentials.keys()


def test_an_endpoint_that_does_not_answer_is_reported_as_such():
    def answer(number: int) -> Reply:
        raise StoreUnavailable("cannot connect")

    credentials, _, _ = found_in(CONTAINER, answer)
    with pytest.raises(StoreUnavailable, match="cannot connect"):
        credentials.keys()


# --- web identity


@pytest.fixture
def web_identity(tmp_path: Path) -> dict[str, str]:
    file = tmp_path / "token"
    file.write_text("the.web.token\n")
    return {
        "AWS_WEB_IDENTITY_TOKEN_FILE": str(file),
        "AWS_ROLE_ARN": "arn:aws:iam::1:role/reader",
        "AWS_REGION": "eu-central-1",
    }


def test_web_identity_is_one_unsigned_call_to_the_regions_sts(web_identity: dict[str, str]):
    credentials, exchange, _ = found_in(web_identity, lambda _: STS_REPLY)
    assert credentials.keys() == Keys("ASIA", SECRET, TOKEN, NOW_S + 3600)
    (request,) = exchange.requests
    assert (request.method, request.url) == ("POST", "https://sts.eu-central-1.amazonaws.com/")
    assert "authorization" not in request.headers
    assert parse_qs(request.body.decode()) == {
        "Action": ["AssumeRoleWithWebIdentity"],
        "Version": ["2011-06-15"],
        "RoleArn": ["arn:aws:iam::1:role/reader"],
        "RoleSessionName": ["cached"],
        "WebIdentityToken": ["the.web.token"],
    }


@pytest.mark.parametrize(
    ("more", "url"),
    [
        ({"AWS_REGION": ""}, "https://sts.amazonaws.com/"),
        ({"AWS_REGION": "cn-north-1"}, "https://sts.cn-north-1.amazonaws.com.cn/"),
        ({"AWS_ENDPOINT_URL_STS": "http://127.0.0.1:9/sts"}, "http://127.0.0.1:9/sts"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9/all"}, "http://127.0.0.1:9/all"),
        (
            {"AWS_ENDPOINT_URL_STS": "https://sts.example/", "AWS_ENDPOINT_URL": "https://other/"},
            "https://sts.example/",
        ),
        (
            {
                "AWS_ENDPOINT_URL_STS": "https://sts.example/",
                "AWS_ENDPOINT_URL": "https://other/",
                "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true",
            },
            "https://sts.eu-central-1.amazonaws.com/",
        ),
    ],
)
def test_sts_is_asked_where_the_environment_says(
    web_identity: dict[str, str], more: dict[str, str], url: str
):
    credentials, exchange, _ = found_in({**web_identity, **more}, lambda _: STS_REPLY)
    credentials.keys()
    assert exchange.requests[0].url == url


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL_STS", "AWS_ENDPOINT_URL"])
def test_a_web_token_is_never_sent_in_the_clear(web_identity: dict[str, str], name: str):
    environ = {**web_identity, name: "http://sts.example.com/"}
    credentials, _, _ = found_in(environ)
    with pytest.raises(CredentialsUnavailable, match=f"{name} sends keys to .* in the clear"):
        credentials.keys()


def test_web_identity_comes_before_the_container(web_identity: dict[str, str]):
    credentials, exchange, _ = found_in({**web_identity, **CONTAINER}, lambda _: STS_REPLY)
    credentials.keys()
    assert "sts" in exchange.requests[0].url


def test_web_identity_without_a_role_says_what_is_missing(web_identity: dict[str, str]):
    del web_identity["AWS_ROLE_ARN"]
    credentials, _, _ = found_in(web_identity)
    with pytest.raises(CredentialsUnavailable, match="AWS_ROLE_ARN is not"):
        credentials.keys()


@pytest.mark.parametrize(
    ("status", "code", "error"),
    [
        (403, "AccessDenied", CredentialsUnavailable),
        (400, "ExpiredTokenException", CredentialsUnavailable),
        (400, "IDPCommunicationError", StoreUnavailable),
        (500, "InternalFailure", StoreUnavailable),
    ],
)
def test_a_refusal_of_sts_names_role_and_reason(
    web_identity: dict[str, str], status: int, code: str, error: type[StoreError]
):
    body = f"<ErrorResponse><Error><Code>{code}</Code><Message>so it is</Message></Error>"
    credentials, _, _ = found_in(web_identity, lambda _: Reply(status, body.encode()))
    with pytest.raises(error) as caught:
        credentials.keys()
    assert f"arn:aws:iam::1:role/reader: refused with {status}: {code}: so it is" in str(
        caught.value
    )


def test_a_web_token_that_sts_repeats_does_not_stand_in_the_error(web_identity: dict[str, str]):
    body = (
        b"<Error><Code>InvalidIdentityToken</Code><Message>the.web.token is bad</Message></Error>"
    )
    credentials, _, _ = found_in(web_identity, lambda _: Reply(400, body))
    with pytest.raises(CredentialsUnavailable) as caught:
        credentials.keys()
    assert "the.web.token" not in str(caught.value)


def test_an_expiration_of_sts_that_is_no_time_is_a_typed_error(web_identity: dict[str, str]):
    body = STS_REPLY.body.replace(b"2023-11-14T23:13:20Z", b"soon")
    credentials, _, _ = found_in(web_identity, lambda _: Reply(200, body))
    with pytest.raises(CredentialsUnavailable, match="no time in Expiration"):
        credentials.keys()


@pytest.mark.parametrize("body", [b"", b"<html/>", STS_REPLY.body.replace(b"SessionToken", b"S")])
def test_a_reply_of_sts_without_keys_is_a_typed_error(web_identity: dict[str, str], body: bytes):
    credentials, _, _ = found_in(web_identity, lambda _: Reply(200, body))
    with pytest.raises(CredentialsUnavailable, match="holds no keys") as caught:
        credentials.keys()
    assert SECRET not in str(caught.value)


# --- botocore's chain


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No source of keys but a profile file, which is not there yet."""
    for name in FROM_ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    file = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setenv("BOTO_CONFIG", str(tmp_path / "none"))
    return file


def test_a_profile_file_is_found_through_botocore(alone: Path):
    alone.write_text(
        f"[default]\naws_access_key_id = AKPROFILE\naws_secret_access_key = {SECRET}\n"
    )
    credentials, _, _ = found_in({})
    assert credentials.keys() == credentials.keys() == Keys("AKPROFILE", SECRET)


def test_what_a_service_answers_botocore_is_a_typed_error(monkeypatch: pytest.MonkeyPatch):
    from botocore.exceptions import ClientError
    from botocore.session import Session

    def denied(self: Session) -> None:
        raise ClientError({"Error": {"Code": "AccessDenied", "Message": TOKEN}}, "AssumeRole")

    monkeypatch.setattr(Session, "get_credentials", denied)
    credentials, _, _ = found_in({})
    with pytest.raises(CredentialsUnavailable, match="ClientError") as caught:
        credentials.keys()
    assert TOKEN not in str(caught.value)


def test_a_changed_profile_file_replaces_expired_keys(alone: Path):
    text = "[default]\naws_access_key_id = {}\naws_secret_access_key = x\naws_session_token = t\n"
    alone.write_text(text.format("OLD"))
    credentials, _, _ = found_in({})
    old = credentials.keys()
    alone.write_text(text.format("NEW"))
    assert credentials.replace(old).access_key_id == "NEW"


def test_threads_that_meet_an_expired_profile_read_it_again_once(
    alone: Path, monkeypatch: pytest.MonkeyPatch
):
    from botocore.session import Session

    text = "[default]\naws_access_key_id = {}\naws_secret_access_key = x\n"
    alone.write_text(text.format("OLD"))
    credentials, _, _ = found_in({})
    old = credentials.keys()
    alone.write_text(text.format("NEW"))
    sessions: list[Session] = []
    real = Session.get_credentials

    def counted(self: Session) -> object:
        sessions.append(self)
        return real(self)

    monkeypatch.setattr(Session, "get_credentials", counted)
    assert [credentials.replace(old).access_key_id for _ in range(4)] == ["NEW"] * 4
    assert len(sessions) == 1


def test_a_named_profile_comes_before_the_container(alone: Path, monkeypatch: pytest.MonkeyPatch):
    alone.write_text("[p]\naws_access_key_id = AKP\naws_secret_access_key = x\n")
    monkeypatch.setenv("AWS_PROFILE", "p")
    credentials, _, _ = found_in({**CONTAINER, "AWS_PROFILE": "p"})
    assert credentials.keys().access_key_id == "AKP"


def test_no_keys_anywhere_is_an_error_that_says_where_was_looked(alone: Path):
    credentials, _, _ = found_in({})
    with pytest.raises(CredentialsUnavailable) as caught:
        credentials.keys()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "FULL_URI", "profile files"):
        assert name in str(caught.value)
    assert "anonymous" in caught.value.hint


def test_without_botocore_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "botocore.session", None)
    credentials, _, _ = found_in({})
    with pytest.raises(CredentialsUnavailable, match="pip install botocore"):
        credentials.keys()


def test_a_failure_of_botocore_is_a_typed_error(alone: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    credentials, _, _ = found_in({"AWS_PROFILE": "nobody"})
    with pytest.raises(CredentialsUnavailable, match="ProfileNotFound"):
        credentials.keys()


# --- secrets


def test_keys_do_not_show_what_is_secret():
    keys = Keys("AKID", SECRET, TOKEN, NOW_S)
    for shown in (repr(keys), str(keys), f"{keys}", f"{[keys]}", f"{Credentials!r}"):
        assert SECRET not in shown
        assert TOKEN not in shown
    assert "AKID" in repr(keys)
