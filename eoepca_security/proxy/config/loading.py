"""Reads settings from our command line, add-on options, the environment and `.env`."""

import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from dotenv.parser import parse_stream

from eoepca_security.errors import SettingsError
from eoepca_security.oauth.protocol import GRANTS
from eoepca_security.oauth.urls import is_loopback
from eoepca_security.proxy.config.command import Command
from eoepca_security.proxy.config.services import ServicesFile, default_service, read_services
from eoepca_security.proxy.config.settings import NO_VERIFY, Service, Settings, Site
from eoepca_security.proxy.config.validation import Reader, _reason, readable_by_all
from eoepca_security.proxy.config.variables import (
    ACCESS_TOKEN,
    ADMIN,
    ALLOW_HTTP,
    ALLOWED_HOSTS,
    AUDIENCE,
    AUTH_FILE,
    CLIENT_KEY_FILE,
    CLIENT_SECRET,
    COMMON_FLAGS,
    COOKIES,
    COOKIES_CHOICES,
    FORWARD_AS,
    FORWARD_AS_CHOICES,
    GRANT,
    HOST,
    INJECT_HOSTS,
    MODE,
    MODES,
    PORT,
    REFRESH_TOKEN,
    SCOPE,
    SERVE_FLAGS,
    SERVICES,
    TERMINATION_ENDPOINT,
    TLS_NO_VERIFY,
    TOKEN_FILE,
    VARIABLES,
    WORKERS,
    Variable,
)
from eoepca_security.session.file_store import TokenStore

ENV_FILE: Final = "--env-file"
"""The option that takes the place of `.env`."""

_FOR_COMMAND: Final = {
    MODE: "forward",
    HOST: "127.0.0.1",
    PORT: "0",
    ADMIN: "off",
    WORKERS: "1",
    AUTH_FILE: "",
    ALLOWED_HOSTS: "",
    TERMINATION_ENDPOINT: "",
    TOKEN_FILE: "",
}
"""The settings of a proxy for one command, which runs beside a proxy for others with the same `.env`."""


def read_dotenv(folder: Path, env_file: str | None = None) -> Mapping[str, str]:
    """Return the variables of `.env` in `folder`, or of `env_file`, without interpolation; raises SettingsError."""
    path, name = _dotenv_file(folder, env_file)
    try:
        if env_file is None and path.is_fifo():
            raise SettingsError(f".env: {path} is a pipe, which may never end: replace it with a file, or remove it")
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        if env_file is None:
            return {}
        raise SettingsError(f"{ENV_FILE}: {path} does not exist: check the name") from None
    except (OSError, UnicodeDecodeError) as error:
        remedy = "fix or remove" if env_file is None else "fix"
        raise SettingsError(f"{name}: cannot be read ({_reason(error)}); {remedy} {path}") from None
    # Only parse: interpolation would change a secret that contains ${.
    bindings = list(parse_stream(io.StringIO(text)))
    if bad := [binding.original.line for binding in bindings if binding.error]:
        raise SettingsError(*(f"{name}: line {line} of {path} is not NAME=value: fix or remove it" for line in bad))
    return {binding.key: binding.value for binding in bindings if binding.key and binding.value is not None}


def _dotenv_file(folder: Path, env_file: str | None) -> tuple[Path, str]:
    """Return the file, and what messages call it."""
    return (folder / ".env", ".env") if env_file is None else (folder / env_file, ENV_FILE)


def settings_in(
    folder: Path,
    environ: Mapping[str, str],
    *,
    flags: Mapping[str, str] | None = None,
    command: Command = Command(),  # noqa: B008  it is frozen
    **more: Any,
) -> Settings:
    """Like `read_settings`, with the variables of `.env` in `folder`, or of the file that `flags` name.

    If a required setting is missing, the error says that `.env` does not exist. Without `flags`, this is not our own
    command line, which could name another file.
    """
    env_file = flags.get(ENV_FILE) if flags is not None else None
    try:
        dotenv = read_dotenv(folder, env_file)
        settings = read_settings(environ, dotenv=dotenv, flags=flags, command=command, **more)
        return replace(settings, exposed=(*settings.exposed, *_secrets_for_all(folder, env_file, dotenv)))
    except SettingsError as error:
        if not error.is_missing or env_file is not None or (folder / ".env").exists():
            raise
        instead = f", or name the file with {ENV_FILE}" if flags is not None else ""
        is_copied = (folder / ".env.example").exists()
        remedy = "copy .env.example to .env and fill it in" if is_copied else "run this in the folder that has it"
        hint = f".env: not found in {folder}: {remedy}{instead}"
        if command.is_container:
            hint = f".env: not found in {folder}: give this container its settings as environment variables"
        raise SettingsError(*error.problems, hint, is_missing=True) from None


def _secrets_for_all(folder: Path, env_file: str | None, dotenv: Mapping[str, str]) -> Iterator[str]:
    path, name = _dotenv_file(folder, env_file)
    secrets = [variable.env for variable in VARIABLES if variable.secret and dotenv.get(variable.env)]
    if secrets and readable_by_all(path):
        yield f"{name}: all users can read {path}, which has {secrets[0]}: set its mode to 0600"


def read_settings(
    environ: Mapping[str, str],
    *,
    dotenv: Mapping[str, str] | None = None,
    options: Mapping[str, str] | None = None,
    flags: Mapping[str, str] | None = None,
    command: Command = Command(),  # noqa: B008  it is frozen
    need_upstream: bool = True,
    need_session: bool = True,
    for_command: bool = False,
) -> Settings:
    """Read and check all settings.

    Those in `flags`, by the names of our command line's options, take precedence over mitmproxy's `options`, these over
    the environment, and that over `dotenv`. `command` is how this program was called, for the remedies.

    With `need_session=False`, a session is optional. With `for_command`, they are those of a forward proxy for one
    command, whatever they say about a proxy for others. Raises SettingsError with one line for each wrong setting,
    which names the variable and the remedy.
    """
    # All of our commands know all services; with mitmdump -s, its mode says where the default one is.
    knows_upstream = need_upstream or flags is not None
    flags, dotenv = flags or {}, dotenv or {}
    if for_command:
        fixed = {variable.env: value for variable, value in _FOR_COMMAND.items()}
        environ, dotenv = {**environ, **fixed}, {**dotenv, **fixed}
    reader = Reader(flags, options or {}, environ, dotenv)
    command = _with_options(command, flags, reader)
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
        grant == "refresh_token"
        and need_session
        and refresh_token is None
        and access_token is None
        and reader.is_unset(REFRESH_TOKEN, ACCESS_TOKEN)
        and not _has_session(token_store, issuer or issuer_url, client.client_id)
    ):
        reader.problem(
            REFRESH_TOKEN,
            f"is required without a stored login: {command.run('login')}, or set this to the refresh token of a login, "
            f"or set {GRANT.env}=client_credentials with a secret",
        )
    ca_file = reader.ca_file()
    if grant == "refresh_token" and refresh_token is None and access_token is not None and token_store is None:
        reader.warnings.append(f"{REFRESH_TOKEN.env} is not set: this works only until {ACCESS_TOKEN.env} expires")
    tls_no_verify = reader.boolean(TLS_NO_VERIFY)
    if tls_no_verify:
        reader.warnings.append(NO_VERIFY.format(TLS_NO_VERIFY.env))
    host, port = reader.host(), reader.port()
    forwarding = _forwarding(reader, host, port, need_upstream=need_upstream, knows_upstream=knows_upstream)
    admin, admin_is_set = reader.admin(is_on=need_upstream)
    if admin_is_set and admin is not None and admin.port and (admin.host, admin.port) == (host, port):
        reader.problem(ADMIN, f"{admin} is the address of the proxy itself: choose another port")
    token_file = reader.token_file()
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
        token_file=token_file,
        token_file_mode=reader.token_file_mode(),
        token_file_margin=reader.token_file_margin(),
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
        held_bytes=reader.held_bytes(),
        exposed=tuple(reader.exposed),
        command=command,
        **forwarding,
        flags=frozenset(flag for flag, value in flags.items() if value),
    )
    settings = _with_services(settings, reader, tells_unused=not for_command)
    if reader.problems:
        # A misspelled name may be why a setting is missing.
        raise SettingsError(*unknown, *reader.problems, is_missing=reader.is_missing)
    return replace(settings, warnings=tuple(reader.warnings))


def _forwarding(reader: Reader, host: str, port: int, *, need_upstream: bool, knows_upstream: bool) -> dict[str, Any]:
    """Return the settings that say how clients use the proxy, and for what. `host` and `port` are its own."""
    mode, proxy_auth, inject_hosts = reader.choice(MODE, MODES), reader.proxy_auth(), reader.hosts(INJECT_HOSTS)
    is_forward, services_file = mode == "forward", reader.services_file()
    if need_upstream and is_forward:
        _check_forward_mode(reader, host)
    elif need_upstream:
        if proxy_auth is not None:
            reader.problem(AUTH_FILE, f"works only with {MODE.env}=forward: set that, or unset this")
        if inject_hosts:
            reader.warnings.append(f"{INJECT_HOSTS.env} is not used: it needs {MODE.env}=forward")
            inject_hosts = ()
    is_enough = services_file is not None or (is_forward and reader.is_given(INJECT_HOSTS))
    reads_upstream = need_upstream if services_file is None else knows_upstream
    upstream = reader.upstream(host, port, is_required=not is_enough) if reads_upstream else None
    return {
        "mode": mode,
        "proxy_auth": proxy_auth,
        "inject_hosts": inject_hosts,
        "services_file": services_file,
        "upstream": upstream,
    }


def _check_forward_mode(reader: Reader, host: str) -> None:
    """Add problems and warnings about settings that do not fit forward mode to the reader's."""
    if not (reader.is_given(AUTH_FILE) or is_loopback(host)):
        reader.problem(
            AUTH_FILE,
            f"is required, so that not everybody who reaches {host} can use the proxy: name a file with user:password, "
            f"or set {reader.name(HOST)} to {HOST.default}",
        )
    for variable in (ALLOWED_HOSTS, TERMINATION_ENDPOINT):
        if reader.is_given(variable):
            reader.warnings.append(f"{variable.env} is not used with {MODE.env}=forward")


def _with_services(settings: Settings, reader: Reader, *, tells_unused: bool) -> Settings:
    """Return the settings with the services. Adds problems and warnings to the reader's.

    `tells_unused` is the same as for `read_services`.
    """
    try:
        services, warnings = _services(settings, reader.name(SERVICES), tells_unused=tells_unused)
    except SettingsError as error:
        reader.problems += error.problems
        return settings
    reader.warnings += warnings
    reader.problems += [
        f"{reader.name(SERVICES)}: [service.{service.name}] token_file: is the file of another setting: choose another "
        "one"
        for service in services
        if service.token_file in reader.files
    ]
    return replace(settings, services=services)


def reread_services(settings: Settings) -> tuple[Settings, tuple[str, ...]]:
    """Read the file with the services again; return the settings with them, and warnings about them.

    Raises SettingsError with one line for each problem, also for changes that a running proxy cannot make.
    """
    name = settings.name(SERVICES)
    services, warnings = _services(settings, name)
    ports, before = ({service.port for service in all_of} - {None} for all_of in (services, settings.services))
    if ports != before:
        changed = ", ".join(str(port) for port in sorted(ports ^ before, key=str))
        raise SettingsError(f"{name}: port: services with other ports than before need a restart ({changed})")
    check_tls(services, tls_of(settings.services), name)
    return replace(settings, services=services), warnings


def tls_of(services: Iterable[Service]) -> dict[Site, tuple[Path | None, bool]]:
    """Return what decides about the certificates of each site with services: `ca_file` and `tls_no_verify`."""
    return {service.site: (service.ca_file, service.tls_no_verify) for service in services}


def check_tls(services: Iterable[Service], before: Mapping[Site, tuple[Path | None, bool]], source: str) -> None:
    """Raise SettingsError if a site's certificates are to be verified in another way than `before`.

    Connections that are there were made in the old way. `source` is where the services are from.
    """
    for service in services:
        wanted = (service.ca_file, service.tls_no_verify)
        if before.get(service.site, wanted) != wanted:
            raise SettingsError(f"{source}: [service.{service.name}] ca_file, tls_no_verify: a change needs a restart")


def _services(settings: Settings, source: str, *, tells_unused: bool = True) -> ServicesFile:
    default = None
    if settings.upstream is not None:
        default = default_service(
            settings.upstream,
            audience=settings.audience,
            forward_as=settings.forward_as,
            tls_no_verify=settings.tls_no_verify,
        )
    if settings.services_file is None:
        return ServicesFile((default,) if default is not None else (), ())
    found = read_services(
        settings.services_file,
        host=settings.host,
        port=settings.port,
        admin=settings.admin,
        default=default,
        is_forward=settings.mode == "forward",
        tells_unused=tells_unused,
        source=source,
    )
    problems = [
        f"{source}: [service.{service.name}] credential: id_token needs a login, which {GRANT.env}={settings.grant} is "
        "not"
        for service in found.services
        if service.credential == "id_token" and settings.grant == "client_credentials"
    ]
    problems += [
        f"{source}: [service.{service.name}] token_file: is also in {TOKEN_FILE.env}: choose another one"
        for service in found.services
        if service.token_file is not None and service.token_file == settings.token_file
    ]
    if problems:
        raise SettingsError(*problems)
    return found


def _with_options(command: Command, flags: Mapping[str, str], reader: Reader) -> Command:
    """Return the command with the options that it needs to have the same settings."""

    def given(variables: Iterable[Variable]) -> tuple[str, ...]:
        values = ((variable.flag, reader.option(variable)) for variable in variables)
        return tuple(word for flag, value in values if flag and value for word in (flag, value))

    env_file = (ENV_FILE, flags[ENV_FILE]) if flags.get(ENV_FILE) else ()
    return replace(command, options=(*env_file, *given(COMMON_FLAGS)), serve_options=given(SERVE_FLAGS))


def _has_session(folder: Path | None, issuer_url: str, client_id: str) -> bool:
    if folder is None:
        return False
    return TokenStore(folder, issuer_url=issuer_url, client_id=client_id, origin=None).changed_at() != 0
