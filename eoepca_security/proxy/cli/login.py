"""The commands `login` and `logout`: a session for all proxies with the same settings."""

import asyncio
import io
import os
import sys
import threading
import time
import webbrowser
from collections.abc import Callable, Collection, Mapping
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
from eoepca_security.proxy.config.factory import make_logins, make_provider, make_store
from eoepca_security.proxy.config.settings import Service, Settings
from eoepca_security.proxy.config.variables import GRANT, REFRESH_TOKEN, SCOPE, TOKEN_STORE
from eoepca_security.proxy.policy.remedies import command_remedy, named, runs_in_container, told
from eoepca_security.proxy.runtime.output import say, waiting
from eoepca_security.session.file_store import TokenStore
from eoepca_security.session.session import Stored

ISSUER_ANSWERS: Final = "waiting for the identity provider"

BROWSER_TIMEOUT: Final = 300.0
"""How long to wait for the browser to come back, in seconds."""

LEEWAY: Final = 10.0
"""The accepted difference between the issuer's clock and ours, in seconds."""

Finish = Callable[[TokenResponse, AuthorizationRequest | None], str]


def login(settings: Settings, *, scope: str | None, browser: bool, port: int = 0) -> int:
    """Log in and store the session; return the exit code. Raises SecurityError.

    `port` is the port of the redirect URI; 0 means any free port.
    """
    if settings.grant == "client_credentials":
        raise SettingsError(f"{GRANT.env}: client_credentials acts for the client itself, so it needs no login")
    store = make_store(settings)
    if store is None:
        raise SettingsError(
            f"{TOKEN_STORE.env}: there is no place to store the session: set it to a folder, not to none"
        )
    # Report errors of the store before the user logs in.
    with store.locked():
        store.read()
    provider = make_provider(settings)
    chosen, scope = scope, scope or _login_scope(settings)
    if missing := _missing_scopes(settings, scope):
        name = "--scope" if chosen else SCOPE.env
        say(f"warning: the login is without {missing}, which services want: add it to {name}", err=True)

    def finish(response: TokenResponse, request: AuthorizationRequest | None) -> str:
        with waiting(ISSUER_ANSWERS):
            claims = _identity_claims(provider, settings.client.client_id, response, scope, request)
        _keep(store, response, scope)
        return identity(claims)

    who = (
        by_browser(provider, settings, scope, finish, port=port)
        if browser
        else finish(by_device(provider, scope, _resources(settings)), None)
    )
    services = f" for {named(settings.services)}" if settings.services_file is not None else ""
    say(
        f"Logged in as {who}{services}.\nThe session is stored in {store.place}.\n"
        f"A running proxy with these settings uses it from now on. To start one, {settings.command.run('serve')}."
    )
    return 0


def logout(settings: Settings) -> int:
    """End the stored session, at the issuer and here; return the exit code. Raises SecurityError."""
    store = make_store(settings)
    if store is None:
        say("These settings store no session: there is nothing to do.")
        return 0
    provider, failed = make_provider(settings), None
    with store.locked():
        stored = store.read()
        if stored is None:
            say(f"There is no session for these settings in {store.place.parent}: there is nothing to do.")
            return 0
        try:
            with waiting(ISSUER_ANSWERS):
                offered = provider.metadata().revocation_endpoint is not None
            if offered:
                with waiting(ISSUER_ANSWERS):
                    provider.revoke(stored.refresh_token)
        except (IssuerUnavailable, CredentialsRejected) as error:
            failed = error
        store.forget()
    if failed is not None:
        detail = told(failed, command_remedy(failed, settings, in_container=runs_in_container()))
        say(f"{failed.code}: the session may still be valid at the issuer: {detail}", err=True)
    elif offered:
        say("The issuer has ended the session.")
    else:
        say("The issuer does not support revocation (RFC 7009). If it has account pages, end the session there.")
    say(f"The session is removed here ({store.place}). A running proxy works until its access token expires.")
    if settings.refresh_token is not None:
        say(f"{REFRESH_TOKEN.env} is still set: the next start uses it.")
        if (logins := make_logins(settings)) is not None and logins.changed_at():
            say(
                f"A login without it is stored, too, and takes over when the issuer rejects it. To end that, unset "
                f"{REFRESH_TOKEN.env} and log out again."
            )
    return 1 if failed is not None else 0


def by_device(
    provider: Provider,
    scope: str,
    resources: Collection[str] = (),
    *,
    sleep: Callable[[float], None] = time.sleep,
    now: Callable[[], float] = time.monotonic,
) -> TokenResponse:
    """Let the user confirm the login in a browser on any device, and wait for it (RFC 8628).

    `now` returns seconds of any clock. Raises CredentialsRejected when the user refuses or does not confirm in time.
    """
    with waiting(ISSUER_ANSWERS):
        device = provider.begin_device_login(scope, resources)
    ends_at = now() + device.expires_in
    _show_device(device)
    interval = device.interval
    while now() + interval < ends_at:
        sleep(interval)
        try:
            answer = provider.poll_device_login(device)
        except IssuerUnavailable as error:
            # RFC 8628 §3.5: poll less often after an error.
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
    """Open the issuer in a browser on this machine, and wait for the redirect (RFC 8252).

    Returns the result of `finish`. Raises CredentialsRejected when the login is refused or takes longer than `timeout`
    seconds, and SettingsError when `port` is not available.
    """
    with waiting(ISSUER_ANSWERS):
        metadata = provider.metadata()
    try:
        server = RedirectServer(port)
    except OSError as error:
        raise SettingsError(f"--port: cannot listen on 127.0.0.1:{port}: {error.strerror}") from None
    with server as loopback:
        request = build_authorization_request(
            settings.client,
            metadata,
            scope,
            redirect_uri=loopback.redirect_uri,
            resources=_resources(settings),
        )
        loopback.is_expected = lambda parameters: is_answer_to(request, parameters)
        # Two addresses, in case the browser that opens is not the right one.
        opened, shown = loopback.one_time_address(request.url), loopback.one_time_address(request.url)
        say(f"Log in with your browser on this machine. If it does not open, go to\n\n  {shown}\n")
        if "SSH_CONNECTION" in os.environ:
            say(
                "If your browser is on the machine that you came from with ssh, run there while this waits, and open "
                f"the same address:\n\n  ssh -N -L {loopback.port}:127.0.0.1:{loopback.port} THIS-MACHINE\n"
            )
        say(_waiting_for("the browser", timeout))
        # In a thread, because a browser in the terminal blocks.
        threading.Thread(target=webbrowser.open, args=(opened,), daemon=True).start()
        try:
            parameters = loopback.wait(timeout)
        except TimeoutError:
            raise CredentialsRejected(
                f"nothing came back to {loopback.redirect_uri} within {timeout / 60:g} minutes", cause="no_answer"
            ) from None
        try:
            code = read_authorization_response(request, metadata, parameters)
            with waiting(ISSUER_ANSWERS):
                response = provider.redeem_code(request, code)
            who = finish(response, request)
        except SecurityError:
            loopback.finish("Login failed", "See the terminal for the reason. You can close this window.", ok=False)
            raise
        loopback.finish("You are logged in", f"as {who}. You can close this window.", ok=True)
        return who


def _identity_claims(
    provider: Provider, client_id: str, response: TokenResponse, scope: str, request: AuthorizationRequest | None
) -> Mapping[str, Any]:
    """Return the verified claims of the ID token, or the access token's claims if no ID token was requested."""
    if response.id_token is None:
        if request is not None and "openid" in scope.split():
            raise TokenInvalid("the issuer sent no ID token, so the login's user is uncertain")
        return unverified_claims(response.access_token)
    claims, _ = asyncio.run(provider.verify_id_token(response.id_token, {client_id}, LEEWAY))
    if request is not None:
        check_nonce(request, claims)
    return claims


def _keep(store: TokenStore, response: TokenResponse, scope: str) -> None:
    if response.refresh_token is None:
        raise CredentialsRejected("the issuer sent no refresh token", cause="no_refresh_token")
    lifetime = response.refresh_expires_in
    session_ends_at = time.time() + lifetime if lifetime else None
    with store.locked():
        store.read()  # so that the new session's serial number is higher
        # Without the access token: a starting proxy gets its own in any case.
        # An issuer that grants what was asked for may leave the scope out (RFC 6749 §5.1).
        granted = response.scope or scope
        store.write(Stored(response.refresh_token, session_ends_at=session_ends_at, scope=granted))


def _show_device(device: DeviceAuthorization) -> None:
    url = device.verification_uri_complete or device.verification_uri
    # A page that knows the code from its address may not show it, and then nobody could compare it.
    action = "on any device. If it asks for a code, enter"
    if not device.verification_uri_complete:
        action = "on any device and enter the code"
    click.echo(f"To log in, open\n\n  {click.style(url, bold=True)}\n")
    if sys.stdout.isatty() and sys.stdout.encoding.lower().startswith("utf"):
        code = io.StringIO()
        segno.make(url, error="l").terminal(code, compact=True, border=2)
        click.echo(code.getvalue())
    click.echo(f"{action}\n\n  {click.style(device.user_code, bold=True)}\n")
    click.echo(_waiting_for("confirmation", device.expires_in))


def _waiting_for(what: str, seconds: float) -> str:
    return f"Waiting for {what}, at most {max(seconds / 60, 1):.0f} min (Ctrl-C to cancel)."


def _login_scope(settings: Settings) -> str:
    """Return the scope to ask for: refreshes for services cannot get more than the login had (RFC 6749 §6)."""
    if settings.scope is not None:
        return _join_scopes(DEFAULT_SCOPE, settings.scope)
    return _join_scopes(DEFAULT_SCOPE, *map(_refresh_scope, settings.services))


def _missing_scopes(settings: Settings, scope: str) -> str:
    wanted = ("openid" if service.credential == "id_token" else None for service in settings.services)
    names = _join_scopes(*wanted, *map(_refresh_scope, settings.services)).split()
    return " ".join(name for name in names if name not in scope.split())


def _refresh_scope(service: Service) -> str | None:
    return service.scope if service.token in ("scope", "resource") else None


def _resources(settings: Settings) -> list[str]:
    """Return the resources that refreshes ask for: a login has to name them all (RFC 8707 §2.2)."""
    return [service.resource for service in settings.services if service.token == "resource" and service.resource]  # noqa: S105


def _join_scopes(*scopes: str | None) -> str:
    return " ".join(dict.fromkeys(name for scope in scopes for name in (scope or "").split()))
