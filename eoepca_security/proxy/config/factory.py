"""Builds what the settings describe: the provider, the store, the token source and a file with the CAs."""

import contextlib
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO

from eoepca_security.errors import CredentialsRejected, SettingsError, TokenError
from eoepca_security.issuer.ca_trust import ca_bundle, trust
from eoepca_security.issuer.provider import Provider
from eoepca_security.issuer.transport import HttpTransport, Transport
from eoepca_security.oauth.protocol import TokenResponse
from eoepca_security.oauth.verify import looks_like_jwt
from eoepca_security.proxy.config.settings import Settings
from eoepca_security.proxy.config.variables import CA_FILE
from eoepca_security.session.file_store import TokenStore
from eoepca_security.session.source import TokenSource


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


def make_source(
    settings: Settings,
    *,
    continues: TokenSource | None = None,
    joins: bool = False,
    observe: Callable[[TokenError | None, float], None] | None = None,
    describe: Callable[[TokenError], str] = str,
    learn: Callable[[Provider, str], object] | None = None,
) -> TokenSource:
    """Return the token source that the settings describe. It does not ask the issuer yet.

    `continues`, `joins`, `observe` and `describe` are the same as for TokenSource. `learn` is called with the provider
    and each new valid access token, in the thread that fetched it.
    """
    provider = make_provider(settings)

    def request_token(refresh_token: str | None) -> TokenResponse:
        if settings.grant == "refresh_token" and refresh_token is None:
            raise CredentialsRejected("there is no session", cause="no_session")
        return provider.request_token(refresh_token)

    def check(token: str) -> None:
        check_audience(token)
        if learn is not None:
            learn(provider, token)

    def check_audience(token: str) -> None:
        if settings.audience is not None and looks_like_jwt(token):
            provider.verify(token, settings.audience)

    return TokenSource(
        request_token,
        refresh_token=settings.refresh_token,
        access_token=settings.access_token,
        store=make_store(settings),
        logins=make_logins(settings),
        check=check,
        continues=continues,
        joins=joins,
        observe=observe,
        describe=describe,
    )
