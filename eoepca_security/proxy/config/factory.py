"""Builds what the settings describe: the provider, the store, the token source and a file with the CAs."""

import contextlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

from eoepca_security.errors import CredentialsRejected, SettingsError, TokenError
from eoepca_security.issuer.ca_trust import ca_bundle, trust
from eoepca_security.issuer.provider import Provider
from eoepca_security.issuer.transport import HttpTransport, Transport
from eoepca_security.oauth.protocol import TokenResponse, narrow_scope
from eoepca_security.oauth.verify import looks_like_jwt
from eoepca_security.proxy.config.services import services_of
from eoepca_security.proxy.config.settings import Service, Settings
from eoepca_security.proxy.config.variables import CA_FILE
from eoepca_security.session.file_store import TokenStore
from eoepca_security.session.service_tokens import (
    Sources,
    client_tokens,
    exchanged_tokens,
    id_tokens,
    refreshed_tokens,
    shared_tokens,
)
from eoepca_security.session.session import Purpose
from eoepca_security.session.source import TokenSource
from eoepca_security.session.token_cycle import TokenCycle


def ca_bundle_file(ca_file: Path) -> IO[bytes]:
    """Return a temporary file with all trusted CAs, for mitmproxy. Closing it deletes it.

    Raises SettingsError.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(tempfile.NamedTemporaryFile(suffix=".pem"))
            file.write(ca_bundle(ca_file))
            file.flush()
        except OSError as error:
            raise SettingsError(
                f"{CA_FILE.env}: cannot be combined with the system's CAs ({error.strerror}): set TMPDIR to a writable "
                "folder"
            ) from None
        stack.pop_all()
        return file


def make_provider(settings: Settings, transport: Transport | None = None) -> Provider:
    """Return the provider for the issuer and client in the settings. The default `transport` is the network."""
    return Provider(
        settings.issuer_url,
        settings.client,
        transport or HttpTransport(partial(trust, settings.ca_file)),
        issuer=settings.issuer,
        scope=settings.scope,
        allow_http=settings.allow_http,
    )


def make_store(settings: Settings) -> TokenStore | None:
    """Return the store for the session in the settings, or None when there is no session or store."""
    if settings.token_store is None or settings.grant != "refresh_token":
        return None
    return TokenStore(
        settings.token_store,
        issuer_url=settings.known_as,
        client_id=settings.client.client_id,
        origin=settings.refresh_token,
    )


def make_logins(settings: Settings) -> TokenStore | None:
    """Return the store of logins, where one can take over from a rejected refresh token in the settings, or None."""
    return make_store(replace(settings, refresh_token=None)) if settings.refresh_token is not None else None


@dataclass(frozen=True)
class Hooks:
    """What is called about the tokens of one service, or of the login.

    `observe` and `describe` are the same as for TokenSource. `learn` is called with the provider and each new valid
    access token, in the thread that fetched it.
    """

    observe: Callable[[TokenError | None, float], None] | None = None
    describe: Callable[[TokenError], str] = str
    learn: Callable[[Provider, str], object] | None = None


def make_source(settings: Settings, *, hooks: Hooks | None = None) -> TokenSource:
    """Return the source of the login's own tokens. It does not ask the issuer yet."""
    (service,) = services_of(replace(settings, services=()))
    return _login_source(settings, make_provider(settings), service, hooks or Hooks(), continues=None, joins=False)


def make_sources(
    settings: Settings,
    *,
    login: TokenSource | None = None,
    provider: Provider | None = None,
    verifies: bool = True,
    continues: TokenSource | None = None,
    joins: bool = False,
    hooks: Callable[[Service | None], Hooks] = lambda _service: Hooks(),
) -> Sources:
    """Return the token sources of the login and of each service. They do not ask the issuer yet.

    `login` is the source of the login's own tokens if there is one already; otherwise `continues` and `joins` are the
    same as for TokenSource. `provider` is that of the settings, if there is one already. Without `verifies`, the tokens
    of services are not compared with what they must be for. `hooks` returns those of a service, or those of the login
    for None. The service of the settings without a file shares the login's source.
    """
    provider = provider or make_provider(settings)
    services = services_of(settings)
    if settings.services_file is None:
        login = _login_source(settings, provider, services[0], hooks(services[0]), continues=continues, joins=joins)
        return Sources(login, {services[0].name: login})
    login = login or _login_source(settings, provider, None, hooks(None), continues=continues, joins=joins)
    cycles = {}
    for service in services:
        own = hooks(service)
        options: dict[str, Any] = {
            "check": _check(provider, service if verifies else None, own),
            "observe": own.observe,
            "describe": own.describe,
            "service": service.name,
        }
        cycles[service.name] = _service_tokens(settings, provider, login, service, options)
    return Sources(login, cycles)


def _login_source(
    settings: Settings,
    provider: Provider,
    service: Service | None,
    hooks: Hooks,
    *,
    continues: TokenSource | None,
    joins: bool,
) -> TokenSource:
    """Return the source of the login's own tokens. If they are for one service only, they have to fit it."""

    def request_token(refresh_token: str | None) -> TokenResponse:
        # After a refresh for less, some issuers give no more than that unless they are asked (RFC 6749 §6).
        scope = source.session.scope if settings.services_file is not None else None
        return provider.request_token(_session_token(settings, refresh_token), scope=settings.scope or scope)

    source = TokenSource(
        request_token,
        refresh_token=settings.refresh_token,
        access_token=settings.access_token,
        store=make_store(settings),
        logins=make_logins(settings),
        check=_check(provider, service, hooks),
        continues=continues,
        joins=joins,
        observe=hooks.observe,
        describe=hooks.describe,
    )
    return source


def _service_tokens(
    settings: Settings, provider: Provider, login: TokenSource, service: Service, options: dict[str, Any]
) -> TokenCycle:
    if service.token == "exchange":  # noqa: S105  as above
        return exchanged_tokens(
            login,
            partial(provider.exchange_token, audience=service.audience, resource=service.resource, scope=service.scope),
            **options,
        )
    if service.token in ("scope", "resource"):

        def request(refresh_token: str | None, login_scope: str | None) -> TokenResponse:
            scope = narrow_scope(service.scope, settings.scope or login_scope) if service.scope is not None else None
            return provider.request_token(
                _session_token(settings, refresh_token), scope=scope, resource=service.resource
            )

        if settings.grant == "client_credentials":
            return client_tokens(lambda: request(None, None), **options)
        key = json.dumps([service.name, service.token, service.scope, service.resource])
        return refreshed_tokens(login, Purpose(key, request), **options)
    if service.credential == "id_token":
        return id_tokens(login, **options)
    return shared_tokens(login, **options)


def _session_token(settings: Settings, refresh_token: str | None) -> str | None:
    if settings.grant == "refresh_token" and refresh_token is None:
        raise CredentialsRejected("there is no session", cause="no_session")
    return refresh_token


def _check(provider: Provider, service: Service | None, hooks: Hooks) -> Callable[[str], None]:
    """Return what looks at each new token: it must be for the service, if the settings say what that takes.

    Some issuers ignore a resource that they are asked for, and answer with a token for everything.
    """
    audience = (service.audience or service.resource) if service is not None else None

    def check(token: str) -> None:
        if audience is not None and looks_like_jwt(token):
            provider.verify(token, audience)
        if hooks.learn is not None:
            hooks.learn(provider, token)

    return check
