"""Logins of FakeIssuer: they need no user, and tests choose the outcome."""

import base64
import hashlib
import secrets
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlencode

from eoepca_security.oauth.authorization import DEVICE_GRANT

LOGIN_GRANTS: Final = ("authorization_code", DEVICE_GRANT)


@dataclass
class LoginBehaviour:
    """How logins behave. You can change it at any time. Times are in seconds."""

    polls: list[str] = field(default_factory=list)
    """Errors for the polls of a device login, one for each poll, before the tokens."""
    interval: float | None = None
    """The time to wait between polls of a device login, or None. Earlier polls get `slow_down`."""
    expires_in: float = 600
    """How long the user can confirm a device login."""
    redirect: dict[str, str | None] = field(default_factory=dict)
    """Changes to the answer of the authorization endpoint. None removes a parameter."""
    id_claims: dict[str, Any] | None = field(default_factory=dict)
    """Changes to the ID token. None means no ID token."""
    refresh_token: bool = True
    """Whether a login returns a refresh token."""
    without: Collection[str] = ()
    """Members to leave out of the discovery document."""


@dataclass
class _Started:
    form: Mapping[str, str]
    expires_at: float
    polled_at: float = 0.0


class Logins:
    """The pending logins at the issuer `url`, by code and by device code.

    `seen` lists the queries and forms that started a login.
    """

    def __init__(self, url: str, client_id: str) -> None:
        self._url = url
        self._client_id = client_id
        self._started: dict[str, _Started] = {}
        self.seen: list[Mapping[str, str]] = []

    def discovery(self, behaviour: LoginBehaviour) -> dict[str, Any]:
        """Return the members of the discovery document about logins."""
        members = {
            "authorization_endpoint": f"{self._url}/auth",
            "device_authorization_endpoint": f"{self._url}/auth/device",
            "revocation_endpoint": f"{self._url}/revoke",
            "authorization_response_iss_parameter_supported": True,
            "code_challenge_methods_supported": ["S256"],
            "response_types_supported": ["code"],
        }
        return {name: value for name, value in members.items() if name not in behaviour.without}

    def begin_by_browser(self, behaviour: LoginBehaviour, query: Mapping[str, str]) -> str | None:
        """Return the URL to redirect the browser to, or None for an invalid request, which must not be redirected."""
        wanted = {"response_type": "code", "client_id": self._client_id, "code_challenge_method": "S256"}
        if {name: query.get(name) for name in wanted} != wanted or "redirect_uri" not in query:
            return None
        code = self._start(query, 60)
        own = {"code": code, "state": query.get("state"), "iss": self._url}
        answer = {name: value for name, value in {**own, **behaviour.redirect}.items() if value is not None}
        return f"{query['redirect_uri']}?{urlencode(answer)}"

    def begin_by_device(self, behaviour: LoginBehaviour, form: Mapping[str, str]) -> dict[str, Any]:
        """Return the answer of the device authorization endpoint."""
        page = f"{self._url}/device"
        answer = {
            "device_code": self._start(form, behaviour.expires_in),
            "user_code": "WDJB-MJHT",
            "verification_uri": page,
            "verification_uri_complete": f"{page}?user_code=WDJB-MJHT",
            "expires_in": behaviour.expires_in,
        }
        return answer if behaviour.interval is None else answer | {"interval": behaviour.interval}

    def finish(self, behaviour: LoginBehaviour, form: Mapping[str, str]) -> tuple[str | None, str | None]:
        """Return a token request's error and the nonce of the login that it completes."""
        by_device = form["grant_type"] == DEVICE_GRANT
        code = form.get("device_code" if by_device else "code", "")
        started = self._started.get(code)
        if started is None:
            return "invalid_grant", None
        now = time.monotonic()
        if now > started.expires_at:
            return "expired_token", None
        if by_device:
            too_soon = now - started.polled_at < (behaviour.interval or 0) - 0.05
            started.polled_at = now
            if too_soon:
                return "slow_down", None
            if behaviour.polls:
                return behaviour.polls.pop(0), None
        del self._started[code]
        if not _fits(started.form, form):
            return "invalid_grant", None
        return None, started.form.get("nonce")

    def _start(self, form: Mapping[str, str], expires_in: float) -> str:
        self.seen.append(form)
        code = secrets.token_urlsafe(24)
        self._started[code] = _Started(form, time.monotonic() + expires_in)
        return code


def _fits(query: Mapping[str, str], form: Mapping[str, str]) -> bool:
    """Return whether the client that redeems a code is the one that asked for it (RFC 6749 §4.1.3, RFC 7636 §4.6)."""
    digest = hashlib.sha256(form.get("code_verifier", "").encode()).digest()
    challenge = base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
    return query.get("code_challenge") == challenge and query.get("redirect_uri") == form.get("redirect_uri")
