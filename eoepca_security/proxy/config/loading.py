"""Reads settings from add-on options, the environment and `.env`."""

import io
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dotenv.parser import parse_stream

from eoepca_security.errors import SettingsError
from eoepca_security.oauth.protocol import GRANTS
from eoepca_security.proxy.config.settings import NO_VERIFY, Settings
from eoepca_security.proxy.config.validation import Reader, _reason, readable_by_all
from eoepca_security.proxy.config.variables import (
    ACCESS_TOKEN,
    ADMIN,
    ALLOW_HTTP,
    ALLOWED_HOSTS,
    AUDIENCE,
    CLIENT_KEY_FILE,
    CLIENT_SECRET,
    COOKIES,
    COOKIES_CHOICES,
    FORWARD_AS,
    FORWARD_AS_CHOICES,
    GRANT,
    INJECT_HOSTS,
    REFRESH_TOKEN,
    SCOPE,
    TLS_NO_VERIFY,
    UPSTREAM,
    VARIABLES,
)
from eoepca_security.session.file_store import TokenStore


def read_dotenv(folder: Path) -> Mapping[str, str]:
    """Return the variables of `.env` in `folder`, without interpolation; raises SettingsError."""
    path = folder / ".env"
    try:
        if path.is_fifo():
            raise SettingsError(f".env: {path} is a pipe, which may never end: replace it with a file, or remove it")
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f".env: cannot be read ({_reason(error)}); fix or remove {path}") from None
    # Only parse: interpolation would change a secret that contains ${.
    bindings = list(parse_stream(io.StringIO(text)))
    if bad := [binding.original.line for binding in bindings if binding.error]:
        raise SettingsError(*(f".env: line {line} of {path} is not NAME=value: fix or remove it" for line in bad))
    return {binding.key: binding.value for binding in bindings if binding.key and binding.value is not None}


def settings_in(folder: Path, environ: Mapping[str, str], **more: Any) -> Settings:
    """Like `read_settings`, with the variables of `.env` in `folder`. The error says when that file does not exist."""
    try:
        dotenv = read_dotenv(folder)
        settings = read_settings(environ, dotenv=dotenv, **more)
        return replace(settings, warnings=(*settings.warnings, *_secrets_for_all(folder / ".env", dotenv)))
    except SettingsError as error:
        if not error.is_missing or (folder / ".env").exists():
            raise
        raise SettingsError(
            *error.problems, f".env: not found in {folder}, the folder that it is read from", is_missing=True
        ) from None


def _secrets_for_all(path: Path, dotenv: Mapping[str, str]) -> Iterator[str]:
    secrets = [variable.env for variable in VARIABLES if variable.secret and dotenv.get(variable.env)]
    if secrets and readable_by_all(path):
        yield f".env: all users can read {path}, which has {secrets[0]}: set its mode to 0600"


def read_settings(
    environ: Mapping[str, str],
    *,
    dotenv: Mapping[str, str] | None = None,
    options: Mapping[str, str] | None = None,
    need_upstream: bool = True,
    need_session: bool = True,
) -> Settings:
    """Read and check all settings. Options take precedence over the environment, and that over `dotenv`.

    With `need_session=False`, a session is optional. Raises SettingsError with one line for each wrong setting, which
    names the variable and the remedy.
    """
    reader = Reader(options or {}, environ, dotenv or {})
    allow_http = reader.boolean(ALLOW_HTTP)
    issuer_url = reader.issuer(allow_http=allow_http)
    issuer = reader.issuer_name()
    client = reader.client()
    grant = reader.choice(GRANT, GRANTS)
    refresh_token = reader.token(REFRESH_TOKEN)
    access_token = reader.token(ACCESS_TOKEN)
    token_store = reader.token_store(is_used=grant == "refresh_token")
    if grant == "client_credentials":
        if client.secret is None and client.key is None:
            reader.problem(GRANT, f"client_credentials needs {CLIENT_SECRET.env} or {CLIENT_KEY_FILE.env}")
        if refresh_token is not None:
            reader.warnings.append(f"{REFRESH_TOKEN.env} is not used: {GRANT.env} is client_credentials")
            refresh_token = None
    elif (
        need_session
        and refresh_token is None
        and access_token is None
        and reader.is_unset(REFRESH_TOKEN, ACCESS_TOKEN)
        and not _has_session(token_store, issuer or issuer_url, client.client_id)
    ):
        reader.problem(
            REFRESH_TOKEN,
            "is required without a stored login: run `run-mitmproxy.py login`, or set this to the refresh token of a "
            f"login, or set {GRANT.env}=client_credentials with a secret",
        )
    ca_file = reader.ca_file()
    if grant == "refresh_token" and refresh_token is None and access_token is not None and token_store is None:
        reader.warnings.append(f"{REFRESH_TOKEN.env} is not set: this works only until {ACCESS_TOKEN.env} expires")
    tls_no_verify = reader.boolean(TLS_NO_VERIFY)
    if tls_no_verify:
        reader.warnings.append(NO_VERIFY.format(TLS_NO_VERIFY.env))
    host, port = reader.host(), reader.port()
    upstream = reader.upstream(host, port) if need_upstream else None
    admin, admin_is_set = reader.admin(is_on=need_upstream)
    if admin_is_set and admin is not None and admin.port and (admin.host, admin.port) == (host, port):
        reader.problem(ADMIN, f"{admin} is the address of the proxy itself: choose another port")
    inject_hosts = reader.hosts(INJECT_HOSTS)
    if need_upstream and inject_hosts:
        reader.warnings.append(f"{INJECT_HOSTS.env} is not used: the launcher only forwards to {UPSTREAM.env}")
    unknown = reader.unknown_names()
    reader.warnings += unknown
    settings = Settings(
        issuer_url=issuer_url,
        issuer=issuer,
        client=client,
        grant=grant,
        refresh_token=refresh_token,
        access_token=access_token,
        audience=reader.text(AUDIENCE),
        scope=reader.text(SCOPE),
        allow_http=allow_http,
        ca_file=ca_file,
        token_store=token_store,
        upstream=upstream,
        endpoint=reader.endpoint(),
        tls_no_verify=tls_no_verify,
        host=host,
        port=port,
        admin=admin,
        admin_is_set=admin_is_set,
        allowed_hosts=reader.hosts(ALLOWED_HOSTS, wildcard=True),
        allowed_origins=reader.origins(),
        termination_endpoint=reader.termination_endpoint(),
        cookies=reader.choice(COOKIES, COOKIES_CHOICES),
        forward_as=reader.choice(FORWARD_AS, FORWARD_AS_CHOICES),
        workers=reader.workers(),
        client_timeout=reader.client_timeout(),
        inject_hosts=inject_hosts,
        warnings=tuple(reader.warnings),
    )
    if reader.problems:
        # A misspelled name may be why a setting is missing.
        raise SettingsError(*unknown, *reader.problems, is_missing=reader.is_missing)
    return settings


def _has_session(folder: Path | None, issuer_url: str, client_id: str) -> bool:
    if folder is None:
        return False
    return TokenStore(folder, issuer_url=issuer_url, client_id=client_id, origin=None).changed_at() != 0
