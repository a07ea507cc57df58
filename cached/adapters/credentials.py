"""The keys that requests are signed with: read where they are kept, at use, and renewed in time.

The order is botocore's: environment keys; a profile, if one is named; web identity; a
container's URI; else the rest of botocore's own chain (profile files, SSO, instance metadata),
which is imported only then. No secret ever stands in a repr or an error.
"""

from __future__ import annotations

import json
import math
import os
import re
import threading
from typing import TYPE_CHECKING, NamedTuple

from cached.core.config import aws_names
from cached.core.errors import CredentialsUnavailable, StoreError, StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import NoReturn, Protocol

    from cached.ports import Clock

    class Reply(Protocol):
        """What the other side answered."""

        @property
        def status(self) -> int: ...  # noqa: D102
        @property
        def body(self) -> bytes: ...  # noqa: D102

    class Used(Protocol):
        """Keys that a request was signed with."""

        @property
        def access_key_id(self) -> str: ...  # noqa: D102

    class Exchange(Protocol):
        """Makes one small HTTP request; raises StoreError."""

        def __call__(  # noqa: D102
            self, method: str, url: str, headers: Mapping[str, str], body: bytes = b""
        ) -> Reply: ...


RENEW_BEFORE_S = 300.0  # SDKs take 5 to 15 minutes: a GET that is being sent must not expire
RETRY_S = 30.0  # after a renewal failed while the old keys still hold
MAX_TOKEN_BYTES = 64 << 10
# Where keys may be asked for over plain HTTP, beside 127.0.0.0/8: "Container credential
# provider" in the AWS SDKs and Tools reference.
CONTAINER_HOSTS = ("169.254.170.2", "169.254.170.23", "[fd00:ec2::23]", "[::1]", "localhost")
_URL = re.compile(r"(https?)://(\[[0-9a-fA-F:]+\]|[A-Za-z0-9._-]+)(:\d{1,5})?(/[^\s#]*)?")
_LOOPBACK = re.compile(r"127(\.\d{1,3}){3}")
_SOURCES = (
    "AWS_ACCESS_KEY_ID, AWS_WEB_IDENTITY_TOKEN_FILE, AWS_CONTAINER_CREDENTIALS_RELATIVE_URI, "
    "AWS_CONTAINER_CREDENTIALS_FULL_URI"
)
_SET_CLOCK = "check the clock of this machine, and what hands the keys out"
_SET_KEYS = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give this machine a role; "
    "for a public bucket set anonymous"
)


class Keys(NamedTuple):
    """What a request is signed with.

    Attributes:
        access_key_id: public.
        session_token: of temporary keys; else ``None``.
        expires_s: seconds since 1970; ``None``: never, or somebody else cares.
    """

    access_key_id: str
    secret_access_key: str
    session_token: str | None = None
    expires_s: float | None = None

    def __repr__(self) -> str:
        return f"Keys(access_key_id={self.access_key_id!r}, expires_s={self.expires_s})"


class Credentials:
    """Keys, renewed when less than five minutes are left. Any thread.

    Args:
        exchange: makes the requests to a container's endpoint and to STS.
        clock: expiry is in wall-clock time.
        environ: where the variables are; ``None``: those of this process, at each use.
    """

    __slots__ = (
        "_chain",
        "_clock",
        "_environ",
        "_exchange",
        "_kept",
        "_lock",
        "_newest",
        "_retry_at_s",
    )

    def __init__(
        self, exchange: Exchange, clock: Clock, environ: Mapping[str, str] | None = None
    ) -> None:
        self._exchange = exchange
        self._clock = clock
        self._environ: Mapping[str, str] = os.environ if environ is None else environ
        self._lock = threading.Lock()  # held by the one thread that asks for new keys
        self._kept: Keys | None = None
        self._newest: Keys | None = None  # of all that were asked for; botocore's as well
        self._retry_at_s = -math.inf
        self._chain: Callable[[], Keys] | None = None

    def keys(self) -> Keys:
        """Return keys that hold.

        One thread renews; the others go on with the old keys, or wait if those are over.

        Raises:
            CredentialsUnavailable: there are none; the text says where was looked.
            StoreError: whoever has them does not answer.
        """
        if self._environ.get("AWS_ACCESS_KEY_ID"):
            return _from_environment(self._environ)
        now_s = self._clock.wall_s()
        kept = self._kept
        left_s = _left_s(kept, now_s)
        if kept is not None and left_s > 0:
            is_good = left_s > RENEW_BEFORE_S or now_s < self._retry_at_s
            if is_good or not self._lock.acquire(blocking=False):
                return kept
        else:
            kept = None
            self._lock.acquire()
        try:
            return self._renew(kept, now_s)
        finally:
            self._lock.release()

    def replace(self, refused: Used) -> Keys:
        """Return other keys than those that the store called expired.

        Threads whose requests met the same old keys ask once for new ones, together.

        Raises:
            CredentialsUnavailable: there are no others, or none at all.
            StoreError: whoever has them does not answer.
        """
        with self._lock:
            if self._newest == refused:
                self._kept = self._chain = None
        keys = self.keys()
        if keys == refused:
            message = f"the keys {refused.access_key_id} have expired and there are no newer ones"
            hint = "renew them where they come from: they are read again at each use"
            raise CredentialsUnavailable(message, hint=hint)
        return keys

    def _renew(self, old: Keys | None, now_s: float) -> Keys:
        """Ask for new keys, unless another thread just did; the lock is held."""
        kept = self._kept
        if kept is not None and kept is not old and _left_s(kept, now_s) > 0:
            return kept
        try:
            keys = self._ask()
            if _left_s(keys, now_s) <= 0:
                _refuse(f"the keys {keys.access_key_id} had expired when they came", _SET_CLOCK)
        except StoreError:
            if old is None:
                raise
            self._retry_at_s = now_s + RETRY_S
            return old
        self._newest = keys
        self._kept = keys if self._chain is None else None  # botocore keeps and renews its own
        return keys

    def _ask(self) -> Keys:
        environ = self._environ
        if not environ.get("AWS_PROFILE"):
            if environ.get("AWS_WEB_IDENTITY_TOKEN_FILE"):
                return self._from_web_identity()
            relative = environ.get("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI")
            url = environ.get("AWS_CONTAINER_CREDENTIALS_FULL_URI")
            if relative or url:
                return self._from_container(f"http://169.254.170.2{relative}" if relative else url)
        if self._chain is None:
            self._chain = _botocore_chain()
        return self._chain()

    def _from_container(self, url: str | None) -> Keys:
        url = _checked(url or "", "AWS_CONTAINER_CREDENTIALS_FULL_URI")
        token = self._environ.get("AWS_CONTAINER_AUTHORIZATION_TOKEN", "")
        path = self._environ.get("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE")
        if path:
            token = _token(path, "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE")
        if "\r" in token or "\n" in token:
            _refuse("AWS_CONTAINER_AUTHORIZATION_TOKEN holds a line break", "take it out")
        headers = {"accept": "application/json"}
        if token:
            headers["authorization"] = token
        reply = self._exchange("GET", url, headers)
        if reply.status != 200:
            raise _unfit(reply, f"the container's credentials at {url}", token)
        try:
            found = json.loads(reply.body)
            keys = found["AccessKeyId"], found["SecretAccessKey"], found["Token"]
            expires_s = _instant(found["Expiration"]) if found.get("Expiration") else None
            if not all(isinstance(key, str) and key for key in keys):
                raise TypeError  # noqa: TRY301 - as if it were not there
        except (ValueError, KeyError, TypeError):
            message = f"the container's credentials at {url} are not as documented"
            raise CredentialsUnavailable(message, hint=_SET_KEYS) from None
        return Keys(*keys, expires_s)

    def _from_web_identity(self) -> Keys:
        from urllib.parse import urlencode

        environ = self._environ
        role = environ.get("AWS_ROLE_ARN")
        if not role:
            _refuse("AWS_WEB_IDENTITY_TOKEN_FILE is set, AWS_ROLE_ARN is not", "set both or none")
        fields = {
            "Action": "AssumeRoleWithWebIdentity",
            "Version": "2011-06-15",
            "RoleArn": role,
            "RoleSessionName": environ.get("AWS_ROLE_SESSION_NAME") or "cached",
            "WebIdentityToken": _token(
                environ["AWS_WEB_IDENTITY_TOKEN_FILE"], "AWS_WEB_IDENTITY_TOKEN_FILE"
            ),
        }
        headers = {"content-type": "application/x-www-form-urlencoded", "accept": "text/xml"}
        url, name = _sts_url(environ)
        _checked(url, name)
        reply = self._exchange("POST", url, headers, urlencode(fields).encode())
        if reply.status != 200:
            raise _unfit(reply, f"AssumeRoleWithWebIdentity for {role}", fields["WebIdentityToken"])
        text = reply.body.decode(errors="replace")
        names = ("AccessKeyId", "SecretAccessKey", "SessionToken")
        key_id, secret, token = (_element(text, name) for name in names)
        if not (key_id and secret and token):
            _refuse(f"the reply of STS at {url} holds no keys", f"check {name}")
        expiration = _element(text, "Expiration")
        try:
            expires_s = _instant(expiration) if expiration else None
        except ValueError:
            _refuse(f"the reply of STS at {url} has no time in Expiration", f"check {name}")
        return Keys(key_id, secret, token, expires_s)


def _from_environment(environ: Mapping[str, str]) -> Keys:
    secret = environ.get("AWS_SECRET_ACCESS_KEY")
    if not secret:
        _refuse("AWS_ACCESS_KEY_ID is set, AWS_SECRET_ACCESS_KEY is not", "set both or none")
    token = environ.get("AWS_SESSION_TOKEN") or environ.get("AWS_SECURITY_TOKEN")
    return Keys(environ["AWS_ACCESS_KEY_ID"], secret, token or None)


def _botocore_chain() -> Callable[[], Keys]:
    """Return what gives botocore's keys, as new as they are then.

    Raises:
        CredentialsUnavailable: it is not installed, or finds none.
    """
    try:
        from botocore.exceptions import BotoCoreError, ClientError
        from botocore.session import Session
    except ImportError:
        message = f"no credentials were found in {_SOURCES}; botocore is not installed"
        hint = f"{_SET_KEYS}; for profiles and instance roles: pip install botocore"
        raise CredentialsUnavailable(message, hint=hint) from None
    failures = (BotoCoreError, ClientError)  # one for itself, one for what a service answers
    try:
        credentials = Session().get_credentials()
    except failures as error:
        raise _of_botocore(error) from error
    if credentials is None:
        message = f"no credentials were found in {_SOURCES}, profile files or instance metadata"
        raise CredentialsUnavailable(message, hint=_SET_KEYS)

    def frozen() -> Keys:
        try:
            found = credentials.get_frozen_credentials()
        except failures as error:
            raise _of_botocore(error) from error
        return Keys(found.access_key, found.secret_key, found.token)

    return frozen


def _of_botocore(error: Exception) -> CredentialsUnavailable:
    # Only the kind: the text may hold what a credential process printed.
    message = f"botocore's credential chain failed: {type(error).__name__}"
    hint = "see what `aws sts get-caller-identity` says as the daemon's user"
    return CredentialsUnavailable(message, hint=hint)


def _left_s(keys: Keys | None, now_s: float) -> float:
    if keys is None:
        return -math.inf
    return math.inf if keys.expires_s is None else keys.expires_s - now_s


def _sts_url(environ: Mapping[str, str]) -> tuple[str, str]:
    """Return where STS is, and who says so."""
    for name in aws_names(("AWS_ENDPOINT_URL_STS", "AWS_ENDPOINT_URL"), environ):
        if environ.get(name):
            return environ[name], name
    region = environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION")
    domain = "amazonaws.com.cn" if region and region.startswith("cn-") else "amazonaws.com"
    url = f"https://sts.{region}.{domain}/" if region else "https://sts.amazonaws.com/"
    return url, "AWS_REGION"


def _checked(url: str, name: str) -> str:
    """Return a URL that a secret may be sent to or asked from."""
    match = _URL.fullmatch(url)
    if match is None:
        _refuse(f"{name} is not an http or https URL: {url[:200]!r}", "correct or unset it")
    host = match[2].lower()
    if match[1] == "http" and host not in CONTAINER_HOSTS and not _LOOPBACK.fullmatch(host):
        allowed = ", ".join(("127.0.0.0/8", *CONTAINER_HOSTS))
        _refuse(f"{name} sends keys to {host} in the clear", f"use https, or one of {allowed}")
    return url


def _token(path: str, name: str) -> str:
    try:
        with open(path, encoding="ascii") as file:
            token = file.read(MAX_TOKEN_BYTES).strip()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        message = f"cannot read the token file {path}: {reason}"
        raise CredentialsUnavailable(message, hint=f"check {name}") from None
    if not token:
        _refuse(f"the token file {path} is empty", f"check {name}")
    return token


def _element(text: str, name: str) -> str | None:
    match = re.search(rf"<{name}>\s*([^<>&\s]+)\s*</{name}>", text)
    return match[1] if match else None


def _instant(text: str) -> float:
    """Return seconds since 1970 for a time as in ISO 8601, UTC if it does not say.

    Raises:
        ValueError: it is not one.
    """
    import datetime  # 1 ms that environment keys do not need

    when = datetime.datetime.fromisoformat(text)
    return when.replace(tzinfo=when.tzinfo or datetime.UTC).timestamp()


def _unfit(reply: Reply, what: str, secret: str) -> StoreError:
    """Return the error for a reply without keys; ``secret`` was sent and may come back in it."""
    text = reply.body.decode(errors="replace")
    if secret:
        text = text.replace(secret, "***")
    code = re.search(r"""(?:<Code>|"code"\s*:\s*")([^<>"]{1,80})""", text)
    said = re.search(r"""(?:<Message>|"message"\s*:\s*")([^<>"]{1,300})""", text)
    words = [str(reply.status), *(match[1] for match in (code, said) if match)]
    message = f"{what}: refused with {': '.join(words)}"
    if reply.status >= 500 or reply.status == 429 or "IDPCommunicationError" in words:
        return StoreUnavailable(message, hint="try again later")
    return CredentialsUnavailable(message, hint="check the role and whom its trust policy names")


def _refuse(message: str, hint: str) -> NoReturn:
    raise CredentialsUnavailable(message, hint=hint)
