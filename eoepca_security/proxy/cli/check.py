"""Finding out what is wrong, and what to do about it: one step after the other, as the proxy would go."""

import http.client
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final, NoReturn, TypeVar

from eoepca_security.errors import CredentialsRejected, IssuerUnavailable, StoreError, TokenInvalid
from eoepca_security.issuer.ca_trust import trust
from eoepca_security.issuer.transport import HttpTransport, explain
from eoepca_security.oauth.protocol import Client, choose_auth_method
from eoepca_security.oauth.text import identity, printable, without_secrets
from eoepca_security.oauth.verify import looks_like_jwt, unverified_claims
from eoepca_security.proxy.cli.probes import UPSTREAM_TIMEOUT, Recorder, ask, bounded, is_our_proxy
from eoepca_security.proxy.config.factory import make_provider, make_store
from eoepca_security.proxy.config.port_check import USE_LOCAL, cannot_listen
from eoepca_security.proxy.config.settings import Address, Settings
from eoepca_security.proxy.config.variables import (
    ADMIN,
    AUDIENCE,
    GRANT,
    HOST,
    ISSUER,
    PORT,
    REFRESH_TOKEN,
    TOKEN_STORE,
    UPSTREAM,
    Variable,
)
from eoepca_security.proxy.policy.remedies import (
    BINDING_REMEDY,
    CHECK_CLIENT,
    CHOOSE_CLIENT_AUTH,
    CHOOSE_SCOPE,
    CLIENT_ERRORS,
    CLOCK,
    LOGIN,
    Place,
    audience_remedy,
    client_remedy,
    issuer_remedy,
    network_remedy,
    refusal_remedy,
    session_remedy,
)
from eoepca_security.session.session import AccessToken, RefreshSession, number

MAX_SKEW: Final = 10.0
"""Difference to the issuer's clock in seconds from which tokens may seem to be expired, or from the future."""


T = TypeVar("T")


@dataclass(frozen=True)
class Step:
    """What one step came to; `status` is `ok`, `fault` or `skipped`, and a fault has a `remedy`."""

    name: str
    status: str
    detail: str
    remedy: str | None = None


class _Fault(Exception):
    def __init__(self, detail: str, remedy: str) -> None:
        super().__init__(detail)
        self.detail = detail
        self.remedy = remedy


def check(settings: Settings, *, in_container: bool, now: Callable[[], float] = time.time) -> Iterator[Step]:
    """Go through everything that has to work, and yield what each step came to.

    A step that needs one that failed is skipped. `now` is epoch seconds.
    """
    run = _Run(settings, in_container=in_container, now=now)
    steps: tuple[tuple[str, tuple[str, ...], Callable[[], str]], ...] = (
        ("settings", (), run.settings),
        ("store", (), run.store),
        ("listener", (), run.listener),
        ("discovery", (), run.discovery),
        ("clock", ("discovery",), run.clock),
        # Where what comes cannot be kept, a refresh token that is valid once must not be used up.
        ("client", ("store", "discovery"), run.client),
        ("token", ("client",), run.token),
        ("audience", ("token",), run.audience),
        ("upstream", ("audience",), run.upstream),
    )
    failed: set[str] = set()
    for name, needs, look in steps:
        missing = next((need for need in needs if need in failed), None)
        if missing is not None:
            failed.add(name)
            yield Step(name, "skipped", f"needs {missing}")
            continue
        try:
            yield Step(name, "ok", look())
        except _Fault as fault:
            failed.add(name)
            yield Step(name, "fault", fault.detail, fault.remedy)


class _Run:
    def __init__(self, settings: Settings, *, in_container: bool, now: Callable[[], float]) -> None:
        self._settings = settings
        self._now = now
        self._in_container = in_container
        self._transport = Recorder(HttpTransport(trust(settings.ca_file)), now)
        self._provider = make_provider(settings, self._transport)
        self._store = make_store(settings)
        self._issuer = Place(ISSUER, settings.issuer_url, in_container)
        self._refresh_token = settings.refresh_token
        self._obtained: AccessToken | CredentialsRejected | TokenInvalid | None = None
        self._token = AccessToken("", 0, 0)
        self._rotated = False

    def settings(self) -> str:
        settings = self._settings
        return f"client {printable(settings.client.client_id)} at {settings.issuer_url} for {settings.upstream}"

    def store(self) -> str:
        if self._store is None:
            return "the session is kept in memory only" if self._settings.grant == "refresh_token" else "not needed"
        try:
            with self._store.locked():
                stored = self._store.read()
                with tempfile.TemporaryFile(dir=self._store.place.parent):
                    pass
        except (StoreError, OSError) as error:
            remedy = f"mend that, or set {TOKEN_STORE.env} to a folder that this user can write to"
            raise _Fault(str(error), remedy) from None
        except IssuerUnavailable as error:
            raise _Fault(str(error), "wait until that process is done, or end it") from None
        if stored is None:
            return f"none yet in {self._store.place.parent}"
        self._refresh_token = stored.refresh_token
        return f"a session is in {self._store.place}"

    def listener(self) -> str:
        settings, admin = self._settings, self._settings.admin
        found = _listens(Address(settings.host, settings.port), HOST, f"set {PORT.env} to another port")
        if admin is None:
            return found
        try:
            return f"{found}; admin: {_listens(admin, ADMIN, f'set {ADMIN.env} to another address, or off')}"
        except _Fault as fault:
            if settings.admin_is_set:
                raise
            return f"{found}; there will be no admin listener: {fault.detail}"

    def discovery(self) -> str:
        try:
            return f"issuer {printable(self._provider.metadata().issuer)}"
        except IssuerUnavailable as error:
            self._raise(error)

    def clock(self) -> str:
        skew = self._transport.skew
        if skew is None:
            return "the issuer's answers carry no date to compare with"
        if abs(skew) > MAX_SKEW:
            direction = "behind" if skew > 0 else "ahead of"
            raise _Fault(f"this machine's clock is {abs(skew):.0f} s {direction} the issuer's", CLOCK)
        return "agrees with the issuer's"

    def client(self) -> str:
        settings = self._settings
        client = settings.client
        try:
            method = choose_auth_method(client, self._provider.metadata())
        except CredentialsRejected as error:
            raise _Fault(str(error), CHOOSE_CLIENT_AUTH) from None
        self._obtain()
        refusal = self._obtained
        if isinstance(refusal, CredentialsRejected) and refusal.issuer_error in CLIENT_ERRORS:
            raise _Fault(str(refusal), self._client_remedy(refusal.issuer_error))
        return f"{printable(client.client_id)} ({method})"

    def token(self) -> str:
        settings, token = self._settings, self._obtained
        if token is None:
            raise _Fault("there is no session yet", f"{LOGIN}, or set {REFRESH_TOKEN.env} to the refresh token of one")
        if isinstance(token, CredentialsRejected):
            raise _Fault(str(token), self._token_remedy(token))
        if isinstance(token, TokenInvalid):
            raise _Fault(str(token), CHECK_CLIENT)
        if token.ends_at <= self._now():
            raise _Fault("the access token has ended already", CLOCK)
        self._token = token
        claims = unverified_claims(token.value)
        detail = f"of {identity(claims)}, lives {token.ends_at - token.obtained_at:.0f} s"
        if self._rotated and settings.token_store is None:
            detail += (
                f"; warning: the issuer replaced the refresh token and {TOKEN_STORE.env} is none, so that the one in "
                "the settings may be used up now"
            )
        return detail

    def audience(self) -> str:
        settings, token = self._settings, self._token
        if not looks_like_jwt(token.value):
            return "the access token is opaque: only the service can tell"
        if settings.audience is None:
            return f"the token is for {_audience(token)}; {AUDIENCE.env} is not set, so nothing is compared"
        try:
            self._provider.verify(token.value, settings.audience)
        except IssuerUnavailable as error:
            self._raise(error)
        except TokenInvalid as error:
            if error.claim == "cnf":
                raise _Fault(str(error), BINDING_REMEDY) from None
            if error.claim != "aud":
                raise _Fault(str(error), CLOCK if error.cause == "clock" else CHECK_CLIENT) from None
            remedy = audience_remedy(settings.client.client_id, settings.audience)
            raise _Fault(f"{error} (it is for {_audience(token)})", remedy) from None
        return settings.audience

    def upstream(self) -> str:
        settings = self._settings
        url = str(settings.upstream)
        place = Place(UPSTREAM, url, self._in_container)
        try:
            reply = bounded(lambda: ask(settings, self._token.value), UPSTREAM_TIMEOUT)
        except (OSError, http.client.HTTPException, ValueError) as error:
            cause, reason = explain(error)
            raise _Fault(f"{url} cannot be reached: {reason}", network_remedy(place, cause, by_proxy=False)) from None
        remedy = refusal_remedy(place, reply, audience=_audience(self._token))
        answered = f"{url}{settings.endpoint} answered {reply.status}"
        if remedy is not None:
            challenge = without_secrets(reply.headers.get("www-authenticate"), (self._token.value,))
            raise _Fault(f"{answered} ({challenge})" if challenge else answered, remedy)
        return answered

    def _obtain(self) -> None:
        """Get an access token, or what kept it from coming; raises a fault when the issuer is in trouble."""
        settings = self._settings
        if settings.grant == "refresh_token" and self._refresh_token is None:
            if settings.access_token is not None:
                end = number(unverified_claims(settings.access_token).get("exp")) or self._now()
                self._obtained = AccessToken(settings.access_token, self._now(), end)
                return
            error = self._try_client(settings.client)
            self._obtained = error if error is not None and error.issuer_error in CLIENT_ERRORS else None
            return
        session = RefreshSession(self._provider.request_token, settings.refresh_token, store=self._store, now=self._now)
        try:
            self._obtained = session.renew(None)
        except (CredentialsRejected, TokenInvalid) as error:
            self._obtained = error
        except IssuerUnavailable as error:
            self._raise(error)
        self._rotated = session.rotated

    def _try_client(self, client: Client) -> CredentialsRejected | None:
        """Return what the issuer says to a refresh token that nobody has: about the client, if that is wrong."""
        settings = replace(self._settings, client=client)
        try:
            make_provider(settings, self._transport).request_token("check")
        except CredentialsRejected as error:
            return error
        except (IssuerUnavailable, TokenInvalid):
            return None
        return None

    def _client_remedy(self, error: str) -> str:
        client = self._settings.client
        has_secret = client.secret is not None or client.key is not None
        works_without = False
        if has_secret:
            refusal = self._try_client(Client(client.client_id, auth_method="none"))
            works_without = refusal is not None and refusal.issuer_error not in CLIENT_ERRORS
        remedy = client_remedy(has_secret=has_secret, works_without=works_without, client_id=client.client_id)
        if error == "unauthorized_client" and self._settings.grant == "client_credentials" and not works_without:
            remedy += "; or allow the client this grant (Keycloak: Service accounts roles)"
        return remedy

    def _token_remedy(self, error: CredentialsRejected) -> str:
        if error.issuer_error == "invalid_grant":
            return session_remedy(
                self._refresh_token,
                error,
                client_id=self._settings.client.client_id,
                issuer=self._provider.metadata().issuer,
                now=self._now(),
            )
        return CHOOSE_SCOPE if error.issuer_error == "invalid_scope" else f"{CHECK_CLIENT}, and {GRANT.env}"

    def _raise(self, error: IssuerUnavailable) -> NoReturn:
        raise _Fault(str(error), issuer_remedy(self._issuer, error, self._transport.last)) from None


def _listens(address: Address, variable: Variable, other: str) -> str:
    """Say that the proxy can listen there, or does; raises a fault when neither is so, with `other` as a way out."""
    obstacle = cannot_listen(*address)
    if obstacle is None:
        return f"{address} is free"
    if obstacle.is_foreign:
        raise _Fault(obstacle.detail, f"change {variable.env}: {USE_LOCAL}")
    if is_our_proxy(*address):
        return f"{address} is in use, by an OIDC proxy that runs"
    raise _Fault(obstacle.detail, f"stop what uses it, or {other}")


def _audience(token: AccessToken) -> str:
    audience = unverified_claims(token.value).get("aud", "nobody in particular")
    return printable(", ".join(map(str, audience)) if isinstance(audience, list) else audience)
