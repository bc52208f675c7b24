"""The proxy's own answers."""

import json

import pytest

from eoepca_security.errors import CredentialsRejected, IssuerUnavailable, TokenError, TokenInvalid
from eoepca_security.proxy import problem
from eoepca_security.proxy.guard import Refusal


@pytest.mark.parametrize(
    ("error", "status", "code", "retry_after"),
    [
        (IssuerUnavailable("why"), 503, "issuer_unavailable", "3"),
        (CredentialsRejected("why"), 502, "credentials_rejected", None),
        (TokenInvalid("why"), 502, "token_invalid", None),
        (Refusal("host_not_allowed", "why"), 403, "host_not_allowed", None),
        (Refusal("cross_site_request", "why"), 403, "cross_site_request", None),
    ],
)
def test_each_error_has_its_answer(
    error: TokenError | Refusal, status: int, code: str, retry_after: str | None
) -> None:
    answer = problem.answer(error, method="GET", retry_after=2.1)
    assert answer.status_code == status
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.headers["X-OIDC-Proxy-Error"] == code
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers.get("Retry-After") == retry_after
    body = json.loads(answer.content or b"")
    assert body.pop("title")
    assert body == {"status": status, "detail": "why", "code": code}


def test_an_answer_to_head_has_no_body() -> None:
    answer = problem.answer(TokenInvalid("why"), method="HEAD", retry_after=1)
    assert (answer.content, answer.headers["X-OIDC-Proxy-Error"]) == (b"", "token_invalid")


def test_text_from_strangers_cannot_break_the_json() -> None:
    answer = problem.answer(IssuerUnavailable('quote " newline \n \udc80'), method="GET", retry_after=1)
    assert json.loads(answer.content or b"")["detail"] == 'quote " newline \n \udc80'
