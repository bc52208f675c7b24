"""Logging in and out from the terminal: a session for all proxies that have the same settings."""

import asyncio
import io
import sys
import threading
import time
import webbrowser
from collections.abc import Callable, Mapping
from typing import Any, Final

import click
import segno

from eoepca_security.errors import CredentialsRejected, IssuerUnavailable, SecurityError, SettingsError, TokenInvalid
from eoepca_security.issuer.provider import Provider
from eoepca_security.oauth.authorization import (
    DEFAULT_SCOPE,
    POLL_INTERVAL,
    AuthorizationRequest,
    DeviceAuthorization,
    Pending,
    build_authorization_request,
    check_nonce,
    is_answer_to,
    read_authorization_response,
)
from eoepca_security.oauth.protocol import TokenResponse
from eoepca_security.oauth.text import identity
from eoepca_security.oauth.verify import unverified_claims
from eoepca_security.proxy.cli.redirect_server import RedirectServer
from eoepca_security.proxy.config.factory import make_provider, make_store
from eoepca_security.proxy.config.settings import Settings
from eoepca_security.proxy.config.variables import GRANT, REFRESH_TOKEN, TOKEN_STORE
from eoepca_security.proxy.policy.remedies import command_remedy, runs_in_container, told
from eoepca_security.session.file_store import TokenStore
from eoepca_security.session.session import Stored

BROWSER_TIMEOUT: Final = 300.0
"""How long a browser may take to come back, in seconds."""

LEEWAY: Final = 10.0
"""Accepted difference between the issuer's clock and ours, in seconds."""

Finish = Callable[[TokenResponse, AuthorizationRequest | None], str]


def login(settings: Settings, *, scope: str | None, browser: bool, port: int = 0) -> int:
    """Get a session and keep it; return the exit code. Raises SecurityError.

    `port` is where the browser comes back to, 0 for a free one.
    """
    if settings.grant == "client_credentials":
        raise SettingsError(f"{GRANT.env}: is client_credentials, which acts for the client itself: no login is needed")
    store = make_store(settings)
    if store is None:
        raise SettingsError(
            f"{TOKEN_STORE.env}: there is nowhere to keep the session: set it to a folder of yours, not to none"
        )
    # What is wrong with the store is better known before somebody logs in.
    with store.locked():
        store.read()
    provider = make_provider(settings)
    scope = scope or _join_scopes(DEFAULT_SCOPE, settings.scope)

    def finish(response: TokenResponse, request: AuthorizationRequest | None) -> str:
        claims = _identity_claims(provider, settings.client.client_id, response, scope, request)
        _keep(store, response)
        return identity(claims)

    who = (
        by_browser(provider, settings, scope, finish, port=port)
        if browser
        else finish(by_device(provider, scope), None)
    )
    click.echo(
        f"Logged in as {who}.\nThe session is kept in {store.place}; proxies with these settings use it, those "
        "that run, too."
    )
    return 0


def logout(settings: Settings) -> int:
    """End the session that is kept, at the issuer and here; return the exit code. Raises SecurityError."""
    store = make_store(settings)
    if store is None:
        click.echo("No session is kept with these settings: there is nothing to do.")
        return 0
    provider, fault = make_provider(settings), None
    with store.locked():
        stored = store.read()
        if stored is None:
            click.echo(f"No session is kept in {store.place.parent} for these settings: there is nothing to do.")
            return 0
        try:
            offered = provider.metadata().revocation_endpoint is not None
            if offered:
                provider.revoke(stored.refresh_token)
        except (IssuerUnavailable, CredentialsRejected) as error:
            fault = error
        store.forget()
    if fault is not None:
        detail = told(fault, command_remedy(fault, settings, in_container=runs_in_container()))
        click.echo(f"{fault.code}: the session may live on at the issuer: {detail}", err=True)
    elif offered:
        click.echo("The issuer has ended the session.")
    else:
        click.echo("The issuer offers no way to end the session (RFC 7009); where it has account pages, use those.")
    click.echo(f"It is forgotten here ({store.place}). A proxy that runs goes on until its access token ends.")
    if settings.refresh_token is not None:
        click.echo(f"{REFRESH_TOKEN.env} is still set: the next start tries it.")
    return 1 if fault is not None else 0


def by_device(
    provider: Provider,
    scope: str,
    *,
    sleep: Callable[[float], None] = time.sleep,
    now: Callable[[], float] = time.monotonic,
) -> TokenResponse:
    """Let the user confirm the login in a browser anywhere, and wait for it (RFC 8628).

    `now` is seconds of any clock. Raises CredentialsRejected when it is refused or nobody does it in time.
    """
    device = provider.begin_device_login(scope)
    ends_at = now() + device.expires_in
    _show_device(device)
    interval = device.interval
    while now() + interval < ends_at:
        sleep(interval)
        try:
            answer = provider.poll_device_login(device)
        except IssuerUnavailable as error:
            # RFC 8628 §3.5: an issuer in trouble is asked more rarely.
            interval = min(max(2 * interval, error.retry_after or 0), 60.0)
            continue
        if isinstance(answer, TokenResponse):
            return answer
        interval += POLL_INTERVAL if answer is Pending.SLOW_DOWN else 0
    raise CredentialsRejected("nobody confirmed the login in time")


def by_browser(
    provider: Provider,
    settings: Settings,
    scope: str,
    finish: Finish,
    *,
    port: int = 0,
    timeout: float = BROWSER_TIMEOUT,
) -> str:
    """Send a browser on this machine to the issuer and wait until it comes back (RFC 8252).

    Returns what `finish` makes of the tokens. Raises CredentialsRejected when the login is refused, or after `timeout`
    seconds, and SettingsError when `port` cannot be listened on.
    """
    metadata = provider.metadata()
    try:
        server = RedirectServer(port)
    except OSError as error:
        raise SettingsError(f"--port: cannot listen on 127.0.0.1:{port}: {error.strerror}") from None
    with server as loopback:
        request = build_authorization_request(settings.client, metadata, scope, redirect_uri=loopback.redirect_uri)
        loopback.is_expected = lambda parameters: is_answer_to(request, parameters)
        click.echo(f"Log in with your browser, on this machine. If none opens, go to\n\n  {request.url}\n")
        # In a thread, as a browser in the terminal does not return.
        threading.Thread(target=webbrowser.open, args=(request.url,), daemon=True).start()
        try:
            parameters = loopback.wait(timeout)
        except TimeoutError:
            raise CredentialsRejected(f"nobody logged in within {timeout / 60:g} minutes") from None
        try:
            code = read_authorization_response(request, metadata, parameters)
            who = finish(provider.redeem_code(request, code), request)
        except SecurityError:
            loopback.finish("The login failed", "The terminal says why. You can close this window.", ok=False)
            raise
        loopback.finish("You are logged in", f"as {who}. You can close this window.", ok=True)
        return who


def _identity_claims(
    provider: Provider, client_id: str, response: TokenResponse, scope: str, request: AuthorizationRequest | None
) -> Mapping[str, Any]:
    """Return the claims of the ID token, verified; those of the access token where no ID token was asked for."""
    if response.id_token is None:
        if request is not None and "openid" in scope.split():
            raise TokenInvalid("the issuer gave no ID token, so it is not certain whose login this is")
        return unverified_claims(response.access_token)
    claims, _ = asyncio.run(provider.verify_id_token(response.id_token, {client_id}, LEEWAY))
    if request is not None:
        check_nonce(request, claims)
    return claims


def _keep(store: TokenStore, response: TokenResponse) -> None:
    if response.refresh_token is None:
        raise CredentialsRejected("the issuer gave no refresh token", cause="no_refresh_token")
    lifetime = response.refresh_expires_in
    with store.locked():
        store.read()  # so that what is written counts as its successor
        # Without the access token: a proxy that starts gets one of its own in any case.
        store.write(Stored(response.refresh_token, session_ends_at=time.time() + lifetime if lifetime else None))


def _show_device(device: DeviceAuthorization) -> None:
    url = device.verification_uri_complete or device.verification_uri
    todo = "check that it shows the code" if device.verification_uri_complete else "enter the code"
    click.echo(f"To log in, open\n\n  {click.style(url, bold=True)}\n")
    if sys.stdout.isatty() and sys.stdout.encoding.lower().startswith("utf"):
        code = io.StringIO()
        segno.make(url, error="l").terminal(code, compact=True, border=2)
        click.echo(code.getvalue())
    click.echo(f"on any device and {todo}\n\n  {click.style(device.user_code, bold=True)}\n")
    click.echo(f"Waiting for that, at most {max(device.expires_in / 60, 1):.0f} min (Ctrl-C gives up).")


def _join_scopes(*scopes: str | None) -> str:
    return " ".join(dict.fromkeys(name for scope in scopes for name in (scope or "").split()))
