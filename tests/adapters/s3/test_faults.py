"""Each refusal of a store is a typed error that says what, why, and what to do next."""

from __future__ import annotations

import pytest

from cached.adapters.s3.documents import Fault
from cached.adapters.s3.faults import Asked, Refusal, date_s, error_of
from cached.core.errors import (
    AccessDenied,
    BadReply,
    CredentialsUnavailable,
    ObjectChanged,
    ObjectMissing,
    ObjectRefused,
    StoreError,
    StoreUnavailable,
)

WALL_S = 1_800_000_000.0
GET = Asked("s3:GetObject", "models", "llm/a")
LIST = Asked("s3:ListBucket", "models", "llm/")
UUID = "1234abcd-12ab-34cd-56ef-1234567890ab"
ARN = "arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"


def error(
    status: int,
    code: str = "",
    message: str = "",
    *,
    asked: Asked = GET,
    headers: dict[str, str] | None = None,
    **members: str,
) -> StoreError:
    fault = Fault(code, message, members)
    return error_of(Refusal(asked, "eu-central-1", status, headers or {}, fault), WALL_S)


@pytest.mark.parametrize(
    ("status", "code", "kind", "words"),
    [
        (404, "NoSuchBucket", ObjectMissing, "bucket models does not exist"),
        (404, "NoSuchKey", ObjectMissing, "s3://models/llm/a does not exist"),
        (404, "", ObjectMissing, "check the model's URI"),
        (412, "PreconditionFailed", ObjectChanged, "was replaced"),
        (416, "InvalidRange", ObjectChanged, "was replaced"),
        (404, "NoSuchVersion", ObjectChanged, "open the model again"),
        (403, "InvalidObjectState", ObjectRefused, "restore it"),
        (400, "ExpiredToken", CredentialsUnavailable, "have expired"),
        (403, "InvalidAccessKeyId", AccessDenied, "check access key"),
        (403, "SignatureDoesNotMatch", AccessDenied, "check access key"),
        (403, "RequestTimeTooSkewed", StoreError, "set the clock"),
        (301, "PermanentRedirect", StoreError, "another region, which the store does not name"),
        (400, "InvalidRequest", StoreError, "check endpoint"),
        (501, "NotImplemented", BadReply, "501 NotImplemented"),
    ],
)
def test_a_refusal_is_translated(status: int, code: str, kind: type[StoreError], words: str):
    found = error(status, code)
    assert type(found) is kind
    assert words in str(found)
    assert str(status) in found.message
    assert found.hint


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_what_passes_is_tried_again(status: int):
    found = error(status)
    assert isinstance(found, StoreUnavailable)
    assert found.transient
    assert found.retry_after_s is None


@pytest.mark.parametrize("code", ["SlowDown", "RequestTimeout", "InternalError"])
def test_what_passes_by_its_code_is_tried_again(code: str):
    assert isinstance(error(400, code), StoreUnavailable)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7.0),
        ("61", 60.0),
        ("999999999", 60.0),
        ("Sat, 16 Jan 2027 08:00:00 GMT", 60.0),
        ("0", 0.0),
        ("Fri, 15 Jan 2027 08:00:30 GMT", 30.0),
        ("Fri, 15 Jan 2027 07:00:00 GMT", 0.0),
        ("soon", None),
        ("-1", None),
        ("1e400", None),
    ],
)
def test_how_long_the_store_wants_us_to_wait_is_told(value: str, seconds: float | None):
    assert error(503, headers={"retry-after": value}).retry_after_s == seconds


@pytest.mark.parametrize(
    ("asked", "action", "resource"),
    [
        (GET, "s3:GetObject", "arn:aws:s3:::models/llm/a"),
        (LIST, "s3:ListBucket", "arn:aws:s3:::models for"),
    ],
)
def test_a_denial_names_what_a_policy_must_allow(asked: Asked, action: str, resource: str):
    found = error(403, "AccessDenied", "Access Denied", asked=asked)
    assert isinstance(found, AccessDenied)
    assert f"allow {action} on {resource}" in found.hint


@pytest.mark.parametrize(
    ("status", "code", "message", "key"),
    [
        (403, "AccessDenied", f"User x is not authorized to perform: kms:Decrypt on {ARN}", ARN),
        (403, "AccessDenied", f"no kms:Decrypt on resource ({ARN}).", ARN),
        (400, "KMS.NotFoundException", "key is gone", "its KMS key"),
        (400, "KMS.NotFoundException", f"Key '{UUID}' does not exist", UUID),
        (403, "AccessDenied", "not authorized to perform: kms:Decrypt", "its KMS key"),
    ],
)
def test_a_key_of_kms_that_may_not_be_used_is_named(status: int, code: str, message: str, key: str):
    found = error(status, code, message)
    assert isinstance(found, AccessDenied)
    assert f"encrypted with {key}, which" in found.message
    assert f"kms:Decrypt on {key} for" in found.hint


def test_a_key_of_kms_that_only_a_header_names_is_named():
    headers = {"x-amz-server-side-encryption-aws-kms-key-id": ARN}
    found = error(403, "AccessDenied", "not authorized to perform: kms:Decrypt", headers=headers)
    assert f"kms:Decrypt on {ARN} for" in found.hint


@pytest.mark.parametrize("code", ["KMS.DisabledException", "KMS.KMSInvalidStateException"])
def test_a_key_of_kms_that_is_switched_off_is_named(code: str):
    found = error(400, code, f"{ARN} is disabled.")
    assert isinstance(found, AccessDenied)
    assert f"encrypted with {ARN}, which" in found.message
    assert f"enable {ARN}" in found.hint
    assert "kms:Decrypt" in found.hint


def test_who_writes_needs_two_rights_to_a_key_of_kms():
    asked = Asked("s3:PutObject", "models", "llm/a")
    found = error(403, "AccessDenied", "to perform: kms:GenerateDataKey", asked=asked)
    assert "allow kms:GenerateDataKey and kms:Decrypt on its KMS key" in found.hint


def test_kms_takes_no_unsigned_requests():
    text = "Requests specifying Server Side Encryption with AWS KMS managed keys require SigV4."
    found = error(400, "InvalidArgument", text)
    assert isinstance(found, AccessDenied)
    assert "signed requests only" in found.message
    assert "leave anonymous out" in found.hint


@pytest.mark.parametrize("code", ["ThrottlingException", "KMS.ThrottlingException"])
def test_kms_that_is_asked_too_often_is_asked_again(code: str):
    text = "You have exceeded the rate at which you may call KMS."
    assert isinstance(error(400, code, text), StoreUnavailable)


NEEDS_KEY = (
    "The object was stored using a form of Server Side Encryption. "
    "The correct parameters must be provided to retrieve the object."
)

NEEDS_KEY_TOO = (
    "Requests specifying Server Side Encryption with Customer provided keys must provide "
    "the customer key."
)


@pytest.mark.parametrize(
    ("message", "has_key", "words"),
    [
        (NEEDS_KEY, False, "by a customer's key (SSE-C), and none was sent"),
        (NEEDS_KEY_TOO, False, "by a customer's key (SSE-C), and none was sent"),
        (NEEDS_KEY, True, "by another customer's key than was sent"),
        ("The encryption parameters are not applicable to this object.", True, "is not encrypted"),
    ],
)
def test_a_key_of_the_customer_that_does_not_fit_names_the_option(
    message: str, has_key: bool, words: str
):
    fault = Fault("InvalidRequest", message, {})
    found = error_of(Refusal(GET, "eu-central-1", 400, {}, fault, has_key), WALL_S)
    assert isinstance(found, AccessDenied)
    assert words in found.message
    assert "sse_customer_key_file" in found.hint


@pytest.mark.parametrize("has_key", [False, True])
def test_a_denial_may_be_for_a_wrong_key_of_the_customer(has_key: bool):
    fault = Fault("AccessDenied", "Access Denied", {})
    found = error_of(Refusal(GET, "eu-central-1", 403, {}, fault, has_key), WALL_S)
    assert isinstance(found, AccessDenied)
    assert ("sse_customer_key_file" in found.hint) == has_key


def test_a_wrong_region_names_both():
    found = error(400, "AuthorizationHeaderMalformed", "wrong", Region="us-west-2")
    assert "in us-west-2, not in eu-central-1" in found.message
    assert "--region" in found.hint
    found = error(301, headers={"x-amz-bucket-region": "ap-south-1"})
    assert "in ap-south-1, not in eu-central-1" in found.message


def test_a_wrong_clock_names_both_times():
    headers = {"date": "Fri, 15 Jan 2027 09:00:00 GMT"}
    found = error(403, "RequestTimeTooSkewed", headers=headers)
    assert "Fri, 15 Jan 2027 09:00:00 GMT" in found.message
    assert "Fri, 15 Jan 2027 08:00:00 GMT" in found.message


def test_the_stores_own_words_are_kept_within_bounds():
    found = error(403, "AccessDenied", "x" * 10_000, headers={"x-amz-request-id": "ABC"})
    assert len(found.message) < 600
    assert "request ABC" in found.message


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("Thu, 01 Jan 1970 00:00:01 GMT", 1.0),
        ("Fri, 15 Jan 2027 08:00:00 GMT", WALL_S),
        ("", None),
        ("2027-01-15", None),
        ("Fri, 31 Feb 2027 08:00:00 GMT", None),
    ],
)
def test_a_date_of_http_is_read(text: str, seconds: float | None):
    assert date_s(text) == seconds
