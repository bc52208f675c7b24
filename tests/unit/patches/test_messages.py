"""The proxy's own answers."""

import json

import pytest

from eoepca_security.errors import CredentialsRejected, IssuerUnavailable, TokenInvalid
from eoepca_security.proxy.patches import messages
from eoepca_security.proxy.policy import problem_details


@pytest.mark.parametrize(
    ("code", "status", "retry_after"),
    [
        (IssuerUnavailable.code, 503, "3"),
        (CredentialsRejected.code, 502, None),
        (TokenInvalid.code, 502, None),
        ("host_not_allowed", 403, None),
        ("cross_site_request", 403, None),
    ],
)
def test_each_error_has_its_answer(code: str, status: int, retry_after: str | None) -> None:
    answer = messages.answer(code, "why", method="GET", retry_after=2.1)
    assert answer.status_code == status
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.headers["X-OIDC-Proxy-Error"] == code
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers.get("Retry-After") == retry_after
    body = json.loads(answer.content or b"")
    assert body.pop("title")
    assert body == {"status": status, "detail": "why", "code": code}


def test_an_answer_to_head_has_no_body() -> None:
    answer = messages.answer("token_invalid", "why", method="HEAD", retry_after=1)
    assert (answer.content, answer.headers["X-OIDC-Proxy-Error"]) == (b"", "token_invalid")


def test_text_from_strangers_cannot_break_the_json() -> None:
    answer = messages.answer("token_invalid", 'quote " newline \n \udc80', method="GET", retry_after=1)
    assert json.loads(answer.content or b"")["detail"] == 'quote " newline \n \udc80'


@pytest.mark.parametrize(
    ("reason", "status", "code", "remedy"),
    [
        ("[Errno 111] Connect call failed ('127.0.0.1', 1)", 502, "upstream_unavailable", "REMOTE_PROTECTED_DOMAIN"),
        ("[Errno 110] Connect call failed ('192.0.2.1', 1)", 504, "upstream_timeout", "REMOTE_PROTECTED_DOMAIN"),
        ("Certificate verify failed: self-signed certificate", 502, "upstream_unavailable", "TLS_CA_FILE"),
        ("server closed connection", 502, "upstream_unavailable", "service's log"),
        ("line\nbreak", 502, "upstream_unavailable", "line\N{REPLACEMENT CHARACTER}break"),
    ],
)
def test_a_fault_of_the_service_has_its_code_and_remedy(reason: str, status: int, code: str, remedy: str) -> None:
    fault = problem_details.upstream_error("service.example:443", reason)
    answer = messages.answer(fault.code, fault.detail, method="GET")
    assert (answer.status_code, answer.headers["X-OIDC-Proxy-Error"]) == (status, code)
    body = json.loads(answer.text or "")
    assert body["detail"].startswith("service.example:443: ")
    assert remedy in body["detail"]


def test_a_service_that_hangs_up_without_tls_may_want_it() -> None:
    for is_plain in (True, False):
        fault = problem_details.upstream_error("service.example:9200", "server closed connection", is_plain=is_plain)
        assert ("https://" in fault.detail) is is_plain


@pytest.mark.parametrize(
    ("service", "setting", "ca"),
    [
        ("stac", "url of [service.stac]", "ca_file of [service.stac]"),
        (
            "default",
            "REMOTE_PROTECTED_DOMAIN or url of [service.default]",
            "TLS_CA_FILE or ca_file of [service.default]",
        ),
    ],
)
def test_a_fault_of_one_of_several_services_names_it_and_its_setting(service: str, setting: str, ca: str) -> None:
    fault = problem_details.upstream_error("stac.example:443", "refused", service=service)
    assert fault.reason == f"{service} at stac.example:443: refused"
    assert fault.remedy == f"check {setting}, and that the service is running"
    fault = problem_details.upstream_error("stac.example:443", "Certificate verify failed", service=service)
    assert fault.remedy == f"to trust another CA, set {ca}"


def test_the_last_resort_is_a_new_one_each_time() -> None:
    first = messages.last_resort()
    first.headers["X"] = "y"
    assert "X" not in messages.last_resort().headers
    assert messages.last_resort().status_code == 503


@pytest.mark.parametrize(
    "reason",
    [
        "Invalid header line: b'the-token'",
        "illegal chunk header: bytearray(b'the-token')",
        "Unknown HTTP transfer encoding: 'the-token'",
        'Invalid header name "the-token"',
    ],
)
def test_what_a_service_sent_is_not_repeated(reason: str) -> None:
    error = problem_details.upstream_error("service.example:443", f"{problem_details.MALFORMED}: {reason}")
    assert "the-token" not in error.detail
    assert reason.partition(":")[0].partition('"')[0].strip() in error.detail
