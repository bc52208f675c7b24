"""The command `check`: finds errors and their remedies, step by step, in the proxy's own order."""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Final, NoReturn

from eoepca_security.errors import CredentialsRejected, IssuerUnavailable, StoreError, TokenInvalid
from eoepca_security.issuer.ca_trust import trust
from eoepca_security.issuer.transport import HttpTransport
from eoepca_security.oauth.protocol import MAX_LIFETIME, Client, choose_auth_method
from eoepca_security.oauth.text import identity, printable
from eoepca_security.oauth.verify import unverified_claims
from eoepca_security.proxy.cli.check_services import Login, check_services, skip_services
from eoepca_security.proxy.cli.probes import Recorder, is_our_proxy
from eoepca_security.proxy.cli.service_steps import check_audience, check_upstream
from eoepca_security.proxy.cli.steps import NotOk, Step, not_tried
from eoepca_security.proxy.config.factory import make_logins, make_provider, make_sources, make_store
from eoepca_security.proxy.config.port_check import USE_LOCAL, cannot_listen
from eoepca_security.proxy.config.services import default_service
from eoepca_security.proxy.config.settings import Address, Settings
from eoepca_security.proxy.config.variables import (
    ACCESS_TOKEN,
    ADMIN,
    GRANT,
    HOST,
    ISSUER,
    PORT,
    REFRESH_TOKEN,
    TOKEN_STORE,
)
from eoepca_security.proxy.policy.remedies import (
    CHECK_CLIENT,
    CHOOSE_CLIENT_AUTH,
    CLIENT_ERRORS,
    CLOCK,
    Place,
    client_remedy,
    command_remedy,
    issuer_remedy,
    scope_remedy,
    session_remedy,
)
from eoepca_security.proxy.runtime.output import waiting
from eoepca_security.session.service_tokens import Sources
from eoepca_security.session.session import SESSION_ERRORS, AccessToken, number

MAX_SKEW: Final = 10.0
"""The difference to the issuer's clock, in seconds, above which tokens may seem expired or from the future."""


_WAITS: Final = {
    "store": "the token store",
    "listener": "the program on the port",
    "upstream": "the protected service",
}


def check(settings: Settings, *, in_container: bool) -> Iterator[Step]:
    """Check everything that must work, and yield the result of each step.

    A step is skipped if one that it needs has a fault, or if there is nothing to look at. With a file of services, each
    has steps of its own, and those of a service come together.
    """
    run = _Run(settings, in_container=in_container)
    has_services = settings.services_file is not None
    steps: tuple[tuple[str, tuple[str, ...], Callable[[], str]], ...] = (
        ("settings", (), run.settings),
        ("store", (), run.store),
        ("listener", (), run.listener),
        ("discovery", (), run.discovery),
        ("clock", ("discovery",), run.clock),
        # If the store does not work, do not use up a refresh token that is valid only once.
        ("client", ("store", "discovery"), run.client),
        ("token", ("client",), run.token),
        *(() if has_services else (("audience", ("token",), run.audience), ("upstream", ("audience",), run.upstream))),
    )
    causes: dict[str, str] = {}  # the step with the fault, by each step that did not succeed because of it
    for name, needs, look in steps:
        cause = next((causes[need] for need in needs if need in causes), None)
        if cause is not None:
            causes[name] = cause
            yield not_tried(name, cause)
            continue
        try:
            with waiting(f"waiting for {_WAITS.get(name, 'the identity provider')}"):
                detail = look()
            yield Step(name, "ok", detail)
        except NotOk as result:
            if result.status == "fault":
                causes[name] = name
            yield result.step(name)
    if has_services:
        yield from skip_services(settings, causes["token"]) if "token" in causes else run.services()


class _Run:
    def __init__(self, settings: Settings, *, in_container: bool) -> None:
        self._settings = settings
        self._now = time.time
        self._in_container = in_container
        self._transport = Recorder(HttpTransport(partial(trust, settings.ca_file)), self._now)
        self._provider = make_provider(settings, self._transport)
        self._store = make_store(settings)
        self._issuer = Place(settings.name(ISSUER), settings.issuer_url, in_container)
        self._refresh_token = settings.refresh_token
        self._obtained: AccessToken | CredentialsRejected | TokenInvalid | None = None
        self._token = AccessToken("", 0, 0)
        self._sources: Sources | None = None
        self._service = default_service(
            str(settings.upstream), audience=settings.audience, tls_no_verify=settings.tls_no_verify
        )

    def settings(self) -> str:
        settings = self._settings
        client = printable(settings.client.client_id)
        what = f"service {settings.upstream}"
        if settings.services_file is not None:
            number = len(settings.services)
            what = f"{number} service{'s' if number != 1 else ''}"
        return f"client {client}, issuer {settings.issuer_url}, {what}"

    def store(self) -> str:
        if self._store is None:
            is_kept = self._settings.grant == "refresh_token"
            return "keeps the session in memory only" if is_kept else "not needed: the client logs in by itself"
        try:
            with self._store.locked():
                stored = self._store.read()
                with tempfile.TemporaryFile(dir=self._store.place.parent):
                    pass
        except (StoreError, OSError) as error:
            remedy = f"fix that, or set {TOKEN_STORE.env} to a folder that this user can write to"
            raise NotOk(str(error), remedy) from None
        except IssuerUnavailable as error:
            raise NotOk(str(error), "wait for that process to finish, or stop it") from None
        if stored is None:
            return f"no session yet in {self._store.place.parent}"
        self._refresh_token = stored.refresh_token
        if stored.rejected and (logins := make_logins(self._settings)) is not None and logins.changed_at():
            return f"found a login in {logins.place}, which took over from {REFRESH_TOKEN.env}"
        return f"found a session in {self._store.place}"

    def listener(self) -> str:
        settings, admin = self._settings, self._settings.admin
        found = _listens(
            Address(settings.host, settings.port), settings.name(HOST), f"set {settings.name(PORT)} to another port"
        )
        self._service_ports()
        if admin is None:
            return found
        name = settings.name(ADMIN)
        try:
            return f"{found}; admin: {_listens(admin, name, f'set {name} to another address, or off')}"
        except NotOk as error:
            if settings.admin_is_set:
                raise
            return f"{found}; there will be no admin listener: {error.detail}"

    def _service_ports(self) -> None:
        settings = self._settings
        for service in settings.services:
            if service.port is not None:
                address = Address(settings.host, service.port)
                _listens(address, settings.name(HOST), f"set [service.{service.name}] port to another one")

    def discovery(self) -> str:
        try:
            return f"issuer {printable(self._provider.metadata().issuer)}"
        except IssuerUnavailable as error:
            self._raise(error)

    def clock(self) -> str:
        skew = self._transport.skew
        if skew is None:
            raise NotOk("not compared, because the issuer's answers have no date", status="skipped")
        if self._is_off():
            direction = "behind" if skew > 0 else "ahead of"
            raise NotOk(f"this machine's clock is {abs(skew):.0f} s {direction} the issuer's", CLOCK)
        return "agrees with the issuer's clock"

    def _is_off(self) -> bool:
        return abs(self._transport.skew or 0) > MAX_SKEW

    def client(self) -> str:
        settings = self._settings
        client = settings.client
        try:
            method = choose_auth_method(client, self._provider.metadata())
        except CredentialsRejected as error:
            raise NotOk(str(error), CHOOSE_CLIENT_AUTH) from None
        refusal = self._obtain()
        if refusal is not None and refusal.issuer_error in CLIENT_ERRORS:
            raise NotOk(str(refusal), self._client_remedy(refusal.issuer_error))
        how = "no client authentication" if method == "none" else method
        return f"the issuer accepts {printable(client.client_id)} ({how})"

    def token(self) -> str:
        settings, token = self._settings, self._obtained
        if token is None:
            raise NotOk(
                "there is no session yet",
                f"{settings.command.run('login')}, or set {REFRESH_TOKEN.env} to the refresh token of a login",
            )
        if isinstance(token, CredentialsRejected):
            raise NotOk(str(token), self._token_remedy(token))
        if isinstance(token, TokenInvalid):
            raise NotOk(str(token), CHECK_CLIENT)
        if token.ends_at <= self._now():
            raise NotOk("the access token has already expired", "correct the clock first" if self._is_off() else CLOCK)
        self._token = token
        claims = unverified_claims(token.value)
        detail = f"for {identity(claims)}, valid for {token.ends_at - token.obtained_at:.0f} s"
        session = self._sources.login.session if self._sources is not None else None
        if session is not None and session.login_took_over:
            detail += f", from the stored login: the issuer rejected {REFRESH_TOKEN.env}"
        if session is not None and session.rotated and settings.token_store is None:
            detail += (
                f"; warning: the issuer replaced the refresh token, and {TOKEN_STORE.env} is none, so the one in the "
                "settings may be used up"
            )
        return detail

    def audience(self) -> str:
        try:
            return check_audience(self._settings, self._service, self._provider, self._token)
        except IssuerUnavailable as error:
            self._raise(error)

    def upstream(self) -> str:
        return check_upstream(self._settings, self._service, self._token, in_container=self._in_container)

    def _obtain(self) -> CredentialsRejected | None:
        """Get an access token; return the issuer's refusal, which the client or the session may be the reason for.

        Raises NotOk when the issuer does not say anything about the client.
        """
        settings = self._settings
        if settings.grant == "refresh_token" and self._refresh_token is None:
            if settings.access_token is not None:
                self._sources = self._make_sources(settings)
                end = number(unverified_claims(settings.access_token).get("exp")) or self._now()
                self._obtained = AccessToken(settings.access_token, self._now(), min(end, self._now() + MAX_LIFETIME))
                raise NotOk(f"not tried, because {ACCESS_TOKEN.env} is used as it is", status="skipped")
            if (refusal := self._try_client(settings.client)) is None:
                remedy = settings.command.run("login")
                raise NotOk("the issuer does not say whether it accepts the client", remedy, status="unproven")
            return refusal
        self._sources = self._make_sources(replace(settings, access_token=None))  # to request a new one instead
        try:
            self._obtained = self._sources.login.session.renew(None)
        except (CredentialsRejected, TokenInvalid) as error:
            self._obtained = error
        except IssuerUnavailable as error:
            self._raise(error)
        return self._obtained if isinstance(self._obtained, CredentialsRejected) else None

    def _make_sources(self, settings: Settings) -> Sources:
        # They start with the token that the step `client` gets and stores.
        return make_sources(settings, provider=self._provider, joins=True, verifies=False)

    def services(self) -> Iterator[Step]:
        """Yield the steps of each service, once there is a token."""
        if self._sources is None:
            raise RuntimeError("there is no token")
        login = Login(self._provider, self._sources, self._token, in_container=self._in_container)
        return check_services(self._settings, login)

    def _try_client(self, client: Client) -> CredentialsRejected | None:
        """Return the issuer's error for an invalid refresh token: it shows whether the issuer accepts the client."""
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
        works_with = next(filter(self._is_accepted, self._other_methods()), None) if has_secret else None
        remedy = client_remedy(self._settings, works_with=works_with.auth_method if works_with is not None else None)
        if error == "unauthorized_client" and self._settings.grant == "client_credentials" and works_with is None:
            remedy += "; or enable this grant for the client (Keycloak: Service accounts roles)"
        return remedy

    def _other_methods(self) -> Iterator[Client]:
        """Yield the client with every other authentication method that the issuer offers, and with none."""
        client, metadata = self._settings.client, self._provider.metadata()
        chosen = choose_auth_method(client, metadata)
        for method in ("client_secret_basic", "client_secret_post", "client_secret_jwt"):
            if client.secret is not None and method != chosen and method in metadata.auth_methods:
                yield replace(client, auth_method=method)
        yield Client(client.client_id, auth_method="none")

    def _is_accepted(self, client: Client) -> bool:
        refusal = self._try_client(client)
        return refusal is not None and refusal.issuer_error not in CLIENT_ERRORS

    def _token_remedy(self, error: CredentialsRejected) -> str:
        if error.cause == "other_user":
            return command_remedy(error, self._settings, in_container=self._in_container)
        if error.issuer_error in SESSION_ERRORS:
            return session_remedy(
                self._refresh_token,
                error,
                self._settings,
                issuer=self._provider.metadata().issuer,
                now=self._now(),
            )
        if error.issuer_error == "invalid_scope":
            return scope_remedy(self._settings)
        return f"{CHECK_CLIENT}, and {GRANT.env}"

    def _raise(self, error: IssuerUnavailable) -> NoReturn:
        raise NotOk(
            str(error), issuer_remedy(self._issuer, error, self._transport.last, self._settings.command)
        ) from None


def _listens(address: Address, name: str, other: str) -> str:
    """Return whether the address is free or a proxy of ours uses it; otherwise raises NotOk.

    `name` is where the user set the host, and `other` an alternative remedy for an address in use.
    """
    obstacle = cannot_listen(*address)
    if obstacle is None:
        return f"{address} is free"
    if obstacle.is_foreign:
        raise NotOk(obstacle.detail, f"change {name}: {USE_LOCAL}")
    if is_our_proxy(*address):
        return f"{address} is in use by a running OIDC proxy"
    raise NotOk(obstacle.detail, f"stop the program that uses it, or {other}")
