"""What a store's refusal means: which error, why, and what to do next."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from cached.core.errors import (
    AccessDenied,
    BadReply,
    CredentialsUnavailable,
    ObjectChanged,
    ObjectMissing,
    ObjectRefused,
    StoreBusy,
    StoreError,
    StoreUnavailable,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cached.adapters.s3.documents import Fault

EXPIRED = frozenset({"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"})
SKEWED = frozenset({"RequestTimeTooSkewed", "RequestExpired"})
MAX_SAID = 300  # characters of a store's own text in a message
_BAD_KEYS = frozenset(
    {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "InvalidClientTokenId"}
)
_PASSING = frozenset(
    {
        "InternalError",
        "KMS.DependencyTimeoutException",
        "KMS.InternalException",
        "KMS.KeyUnavailableException",
        "KMS.ThrottlingException",
        "RequestLimitExceeded",
        "RequestTimeout",
        "ServiceUnavailable",
        "SlowDown",
        "Throttling",
        "ThrottlingException",  # of KMS, by way of S3
    }
)
_BUSY = frozenset(
    {
        "KMS.ThrottlingException",
        "RequestLimitExceeded",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
    }
)
_BUSY_STATUS = frozenset({429, 503})
_PASSING_STATUS = frozenset({408, 429, 500, 502, 503, 504})
_KMS_KEY = re.compile(
    r"arn:aws[\w-]*:kms:[\w:/.-]*[\w-]|\b(mrk-[0-9a-f]{32}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12})\b"
)
_KMS_HEADER = "x-amz-server-side-encryption-aws-kms-key-id"
_KMS_UNUSABLE = frozenset({"KMS.DisabledException", "KMS.KMSInvalidStateException"})
_NEEDS_OWN_KEY = re.compile(  # AWS and MinIO; SeaweedFS
    "stored using a form of server side encryption|encryption with customer provided keys",
    re.IGNORECASE,
)
_NEEDS_NO_KEY = re.compile("encryption parameters are not applicable", re.IGNORECASE)
_CUSTOMER_KEY = "sse_customer_key_file"  # the option


class Asked(NamedTuple):
    """What was asked for, in words for messages.

    Attributes:
        action: ``s3:GetObject``, ``s3:PutObject`` or ``s3:ListBucket``.
        bucket: its name.
        key: of the object, or the prefix; may be empty.
    """

    action: str
    bucket: str
    key: str

    @property
    def url(self) -> str:
        """The s3:// URI."""
        return f"s3://{self.bucket}/{self.key}"

    @property
    def resource(self) -> str:
        """The resource of a policy that allows it."""
        tail = "" if self.action == "s3:ListBucket" else f"/{self.key}"
        return f"arn:aws:s3:::{self.bucket}{tail}"


class Refusal(NamedTuple):
    """A reply that is not a success.

    Attributes:
        region: where the request was sent to.
        headers: names in lower case.
        fault: what the body says.
        has_customer_key: the request had a key of SSE-C.
    """

    asked: Asked
    region: str
    status: int
    headers: Mapping[str, str]
    fault: Fault
    has_customer_key: bool = False

    @property
    def said(self) -> str:
        """Status, code and message of the store, and the request's id for its support."""
        words = f"{self.status} {self.fault.code}".strip()
        if self.fault.message:
            words += f": {self.fault.message[:MAX_SAID]}"
        request_id = self.headers.get("x-amz-request-id")
        return f"{words}, request {request_id}" if request_id else words

    @property
    def bucket_region(self) -> str | None:
        """Where the bucket is, if the store says so."""
        return self.headers.get("x-amz-bucket-region") or self.fault.members.get("Region") or None


def error_of(refusal: Refusal, wall_s: float) -> StoreError:
    """Return the error for a status of 300 and above.

    Args:
        refusal: the reply.
        wall_s: the time, for a Retry-After that is a date.
    """
    return (
        _passing(refusal, wall_s)
        or _gone(refusal)
        or _customer_key(refusal)
        or _kms_key(refusal)
        or _credentials(refusal, wall_s)
        or _denied(refusal)
        or _elsewhere(refusal)
    )


def _passing(refusal: Refusal, wall_s: float) -> StoreError | None:
    if refusal.status not in _PASSING_STATUS and refusal.fault.code not in _PASSING:
        return None
    is_busy = refusal.status in _BUSY_STATUS or refusal.fault.code in _BUSY
    error = StoreBusy if is_busy else StoreUnavailable
    return error(
        f"the store cannot serve {refusal.asked.url} now ({refusal.said})",
        hint="try again later",
        retry_after_s=_retry_after_s(refusal.headers.get("retry-after"), wall_s),
    )


def _gone(refusal: Refusal) -> StoreError | None:
    asked, code = refusal.asked, refusal.fault.code
    if refusal.status in {412, 416} or code in {"PreconditionFailed", "NoSuchVersion"}:
        message = f"{asked.url} was replaced since it was listed ({refusal.said})"
        return ObjectChanged(message, hint="open the model again for its new version")
    if code == "NoSuchBucket":
        message = f"bucket {asked.bucket} does not exist ({refusal.said})"
        return ObjectMissing(message, hint="check the model's URI, the region and the endpoint")
    if refusal.status == 404:
        message = f"{asked.url} does not exist ({refusal.said})"
        return ObjectMissing(message, hint="check the model's URI; a prefix ends with /")
    if code == "InvalidObjectState":
        message = f"{asked.url} is archived ({refusal.said})"
        return ObjectRefused(message, hint="restore it to a storage class that can be read at once")
    return None


def _customer_key(refusal: Refusal) -> StoreError | None:
    """Return the error for an object of SSE-C and no key or another; or for a key too many."""
    asked, said, message = refusal.asked, refusal.said, refusal.fault.message
    if _NEEDS_NO_KEY.search(message):
        text = f"{asked.url} is not encrypted by a customer's key, but one was sent ({said})"
        return AccessDenied(text, hint=f"leave {_CUSTOMER_KEY} out for this model")
    if not _NEEDS_OWN_KEY.search(message):
        return None
    if refusal.has_customer_key:
        text = f"{asked.url} is encrypted by another customer's key than was sent ({said})"
        return AccessDenied(text, hint=f"name the file with its key: {_CUSTOMER_KEY}")
    text = f"{asked.url} is encrypted by a customer's key (SSE-C), and none was sent ({said})"
    return AccessDenied(text, hint=f"name the file with that key: {_CUSTOMER_KEY}")


def _kms_key(refusal: Refusal) -> StoreError | None:
    """Return the error for a key of KMS that may not, or cannot, be used."""
    asked, fault, said = refusal.asked, refusal.fault, refusal.said
    if "AWS KMS" in fault.message and refusal.status == 400:
        message = f"{asked.url} is encrypted by KMS, which takes signed requests only ({said})"
        return AccessDenied(message, hint="leave anonymous out, and use https://")
    is_kms = fault.code.startswith("KMS.") or "kms:" in fault.message
    if not is_kms:
        return None
    found = _KMS_KEY.search(fault.message)
    key = found[0] if found else refusal.headers.get(_KMS_HEADER, "its KMS key")
    message = f"{asked.url} is encrypted with {key}, which may not be used ({said})"
    needed = "kms:Decrypt"
    if asked.action == "s3:PutObject":
        needed = "kms:GenerateDataKey and kms:Decrypt"
    hint = f"allow {needed} on {key} for the daemon's role, in its policy and in the key's"
    if fault.code in _KMS_UNUSABLE:
        hint = f"enable {key}, or cancel its deletion: kms:Decrypt needs it"
    return AccessDenied(message, hint=hint)


def _credentials(refusal: Refusal, wall_s: float) -> StoreError | None:
    url, code = refusal.asked.url, refusal.fault.code
    if code in EXPIRED:
        message = f"the credentials for {url} have expired ({refusal.said})"
        return CredentialsUnavailable(message, hint="renew them: they are read at each use")
    if code in SKEWED:
        message = (
            f"this machine's clock, {_date(wall_s)}, is too far from the store's, "
            f"{refusal.headers.get('date', 'not told')} ({refusal.said})"
        )
        return StoreError(message, hint="set the clock (NTP), then try again")
    if code in _BAD_KEYS:
        message = f"the store does not know the credentials for {url} ({refusal.said})"
        hint = "check access key, secret and session token, and that they are of this store"
        return AccessDenied(message, hint=hint)
    return None


def _denied(refusal: Refusal) -> StoreError | None:
    asked = refusal.asked
    if refusal.status not in {401, 403}:
        return None
    message = f"{asked.action} on {asked.resource} was denied ({refusal.said})"
    hint = f"allow {asked.action} on {asked.resource} for the daemon's role"
    if asked.action == "s3:GetObject":
        hint += "; without s3:ListBucket a key that does not exist is denied, too"
    if refusal.has_customer_key:
        hint += f"; a wrong key in {_CUSTOMER_KEY} is denied as well"
    return AccessDenied(message, hint=hint)


def _elsewhere(refusal: Refusal) -> StoreError:
    asked, said = refusal.asked, refusal.said
    if 300 <= refusal.status < 400 or refusal.fault.code == "AuthorizationHeaderMalformed":
        region = refusal.bucket_region or "another region, which the store does not name"
        message = f"bucket {asked.bucket} is in {region}, not in {refusal.region} ({said})"
        return StoreError(message, hint="set the region: --region or AWS_REGION")
    if 400 <= refusal.status < 500:
        message = f"the store refused {asked.action} on {asked.url} ({said})"
        return StoreError(message, hint="check endpoint, region and addressing style")
    message = f"the store answered {asked.action} on {asked.url} with {said}"
    return BadReply(message, hint="check that the endpoint is an S3-compatible server")


def _retry_after_s(value: str | None, wall_s: float) -> float | None:
    if value is None:
        return None
    if re.fullmatch(r"[0-9]{1,9}", value):
        return float(value)
    at_s = date_s(value)
    return None if at_s is None else max(0.0, at_s - wall_s)


def _date(wall_s: float) -> str:
    from time import gmtime, strftime

    return strftime("%a, %d %b %Y %H:%M:%S GMT", gmtime(wall_s))


def date_s(text: str) -> float | None:
    """Return the seconds since 1970 of an HTTP date (RFC 9110, 5.6.7); None if it is none."""
    from calendar import timegm
    from time import strptime

    try:
        return float(timegm(strptime(text, "%a, %d %b %Y %H:%M:%S GMT")))
    except ValueError:
        return None
