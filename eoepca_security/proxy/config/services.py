"""Reads and checks the file with the services that share one login."""

import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NamedTuple

from eoepca_security.errors import SettingsError
from eoepca_security.issuer.ca_trust import usable_cas
from eoepca_security.oauth.text import printable
from eoepca_security.oauth.urls import EVERYWHERE, LOOPBACK_NAMES, is_loopback, parse_host, split_url
from eoepca_security.proxy.config.settings import NO_VERIFY, TOKEN_PLACE, Address, Service, Settings, Site
from eoepca_security.proxy.config.validation import _meant, _reason, _shown
from eoepca_security.proxy.config.variables import FORWARD_AS_CHOICES, UPSTREAM
from eoepca_security.session.token_file import place_problem

DEFAULT: Final = "default"
"""The name of the service that the settings without a file describe."""

TOKENS: Final = ("shared", "scope", "resource", "exchange")
CREDENTIALS: Final = ("access_token", "id_token")

MAX_SERVICES: Final = 500

_MAX_FILE: Final = 1024 * 1024

_KEYS: Final = (
    *("url", "port", "hosts", "token", "audience", "resource", "scope", "credential", "header", "format"),
    *("forward_as", "forwarded", "ca_file", "tls_no_verify", "token_file"),
)

_NAME: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")  # a DNS label (RFC 1123 §2.1)
# The `pchar` of RFC 3986 §3.3 without % and ; and dots at the end, which servers read in different ways.
_PATH: Final = re.compile(r"(/[A-Za-z0-9._~!$&'()*+,=:@-]+(?<!\.))*")
_SCOPE: Final = re.compile(r"[!#-\[\]-~]+( [!#-\[\]-~]+)*")  # RFC 6749 §3.3
_ABSOLUTE_URI: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:[A-Za-z0-9._~:/?@!$&'()*+,;=%\[\]-]+")  # RFC 3986 §4.3
_FIELD_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110 §5.1
_FORMAT: Final = re.compile(r"(?! )[ -z|~]*\{token\}[ -z|~]*(?<! )")

_HEADERS_OF_OTHERS: Final = frozenset(
    {
        *("host", "connection", "keep-alive", "transfer-encoding", "cookie", "set-cookie", "upgrade", "te", "trailer"),
        *("expect", "forwarded", "origin", "referer", "http2-settings", "service-worker"),
    }
)
_HEADERS_BEGIN: Final = ("proxy-", "x-forwarded-", "sec-", "content-", "access-control-")

# What each kind of token needs one of, and what would have no effect with it.
_NEEDS: Final[Mapping[str, tuple[str, ...]]] = {
    "scope": ("scope",),
    "resource": ("resource",),
    # RFC 8693 §2.1 requires neither, but without them the issuer cannot know whom the token is for.
    "exchange": ("audience", "resource"),
}
_USED_BY: Final[Mapping[str, tuple[str, ...]]] = {
    "scope": ("scope", "resource", "exchange"),
    "resource": ("resource", "exchange"),
}


class ServicesFile(NamedTuple):
    """The services of a file, and warnings about them."""

    services: tuple[Service, ...]
    warnings: tuple[str, ...]


def default_service(
    upstream: str, *, audience: str | None = None, forward_as: str = "bearer", tls_no_verify: bool = False
) -> Service:
    """Return the service that the settings without a file describe. `upstream` is scheme, host and port.

    `audience` is only checked by the session, whose tokens this service gets.
    """
    return Service(DEFAULT, upstream, audience=audience, forward_as=forward_as, tls_no_verify=tls_no_verify)


def services_of(settings: Settings) -> tuple[Service, ...]:
    """Return all services.

    Without any in the settings, there is one whose address mitmproxy's mode says. `default` also gets the requests to
    the hosts in `inject_hosts`.
    """
    services = settings.services
    if services and not (settings.inject_hosts and all(service.name != DEFAULT for service in services)):
        return services
    return (default_service("", audience=settings.audience, forward_as=settings.forward_as), *services)


def read_services(
    path: Path,
    *,
    host: str,
    port: int,
    admin: Address | None,
    default: Service | None = None,
    is_forward: bool = False,
    tells_unused: bool = True,
    source: str = "PROXY_SERVICES",
) -> ServicesFile:
    """Read the `[service.NAME]` tables of a TOML file.

    `host`, `port` and `admin` are the proxy's own addresses, and `default` is the service of the other settings, which
    comes first if there is one. With `is_forward`, clients call the services by their own addresses, so `port` and
    `hosts` have no effect; with `tells_unused`, a warning says so. Raises SettingsError with one line for each problem,
    beginning with `source`.
    """
    try:
        tables, problems = _tables(_content(path))
    except ValueError as error:
        raise SettingsError(f"{source}: {_named(path)} {error}") from None
    if default is not None and DEFAULT in tables:
        problems.append(f"[service.{DEFAULT}]: {UPSTREAM.env} is this service: remove one of the two")
        del tables[DEFAULT]
    if not tables and not problems and default is None:
        problems.append(f"{_shown(path)} has no service: add a table [service.NAME] with a url")
    if len(tables) > MAX_SERVICES:
        problems.append(f"{_shown(path)} has {len(tables)} services: remove some, there may be {MAX_SERVICES}")
        tables = {}
    readers = [_Table(name, table, path.parent) for name, table in tables.items()]
    services = [*([default] if default is not None else []), *(reader.service() for reader in readers)]
    for reader in readers:
        problems += reader.problems
    unused: list[str] = []
    if is_forward:
        unused = [service.name for service in services if service.port is not None or service.hosts]
        services = [replace(service, port=None, hosts=()) for service in services]
    listeners = [Address(host, port), *([admin] if admin is not None else [])]
    problems += [*_port_conflicts(services, listeners), *_name_conflicts(services), *_file_conflicts(services)]
    with_url = [service for service in services if service.upstream]
    problems += [*_loops(with_url, services, listeners), *_site_conflicts(with_url)]
    if problems:
        raise SettingsError(*(f"{source}: {problem}" for problem in problems))
    warnings = [
        warning for service in with_url if service.name != DEFAULT or default is None for warning in _risks(service)
    ]
    if unused and tells_unused:
        warnings.append(
            f"port and hosts of {', '.join(unused)} are not used: in forward mode, clients call services by their own "
            "addresses"
        )
    return ServicesFile(tuple(services), tuple(f"{source}: {warning}" for warning in warnings))


def _named(path: Path) -> str:
    """Return a path for a message. One that begins nowhere may not be where the user looks for it."""
    return _shown(path.absolute() if path.suffix == ".toml" else path)


def _content(path: Path) -> dict[str, Any]:
    """Return the parsed file; raises ValueError with the end of a message."""
    try:
        # It may be read again, and a pipe may never end.
        if not path.is_file() and path.exists():
            raise ValueError("is not a file: name a TOML file that this user can read")
        with path.open("rb") as stream:
            data = stream.read(_MAX_FILE + 1)
        if len(data) > _MAX_FILE:
            raise ValueError("is longer than 1 MiB: shorten it")
        return tomllib.loads(data.decode("utf-8-sig"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"is not valid TOML: {printable(error)}") from None
    except RecursionError:
        raise ValueError("is not valid TOML: it is nested too deeply") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot be read ({_reason(error)}): name a TOML file that this user can read") from None


def _tables(content: Mapping[str, Any]) -> tuple[dict[str, Mapping[str, Any]], list[str]]:
    """Return the tables of the services by name, and the problems of all else."""
    problems = [
        f"{printable(repr(key), 60)} is unknown: all settings are in tables [service.NAME]"
        for key in content
        if key != "service"
    ]
    services = content.get("service", {})
    if not isinstance(services, dict):
        return {}, [*problems, "service is not a table: use [service.NAME]"]
    tables: dict[str, Mapping[str, Any]] = {}
    for name, table in services.items():
        if not isinstance(table, dict):
            problems.append(f"[service] {printable(repr(name), 60)}: must be in a table [service.NAME]")
        elif _NAME.fullmatch(name) is None:
            problems.append(
                f"[service.{printable(repr(name), 80)}]: is not a valid name: use up to 63 of a-z, 0-9 and -, with no "
                "- at the ends"
            )
        else:
            tables[name] = table
    return tables, problems


class _Table:
    """Reads one `[service.NAME]`, and collects errors instead of raising them."""

    def __init__(self, name: str, values: Mapping[str, Any], folder: Path) -> None:
        self._name = name
        self._values = values
        self._folder = folder
        self.problems: list[str] = []

    def _problem(self, key: str, text: str) -> None:
        self.problems.append(f"[service.{self._name}] {key}: {text}")

    def service(self) -> Service:
        """Return the service, which must not be used if there are problems. `upstream` is empty if `url` is wrong."""
        for key in self._values:
            if key not in _KEYS:
                close = _meant(key, _KEYS)
                hint = f"did you mean {close}?" if close else f"use {', '.join(_KEYS)}"
                self._problem(printable(key, 60), f"is unknown: {hint}")
        upstream, path = self._url()
        service = Service(
            name=self._name,
            upstream=upstream,
            path=path,
            port=self._port(),
            hosts=self._hosts(),
            token=self._choice("token", TOKENS),
            audience=self._text("audience"),
            resource=self._resource(),
            scope=self._scope(),
            credential=self._choice("credential", CREDENTIALS),
            header=self._header() or Service.header,
            format=self._format() or Service.format,
            forward_as=self._choice("forward_as", FORWARD_AS_CHOICES),
            forwarded=self._boolean("forwarded"),
            ca_file=self._ca_file(),
            tls_no_verify=self._boolean("tls_no_verify"),
            token_file=self._token_file(),
        )
        self._check_token(service)
        if service.forwarded and service.path:
            self._problem(
                "forwarded", f"has the service repeat {service.path} in its links: leave it out, or the path in url"
            )
        return service

    def _text(self, key: str) -> str | None:
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, str):
            self._problem(key, "must be a text in quotation marks")
        elif not value.strip():
            self._problem(key, "is empty: set or remove it")
        elif not value.isprintable():
            self._problem(key, "has control characters: remove them")
        else:
            return value
        return None

    def _choice(self, key: str, choices: Sequence[str]) -> str:
        value = self._text(key) or choices[0]
        if value not in choices:
            self._problem(key, f"{printable(value, 60)!r} is unknown: use one of {', '.join(choices)}")
            return choices[0]
        return value

    def _boolean(self, key: str) -> bool:
        value = self._values.get(key, False)
        if not isinstance(value, bool):
            self._problem(key, "must be true or false, without quotation marks")
            return False
        return value

    def _url(self) -> tuple[str, str]:
        url = self._text("url")
        if url is None:
            if "url" not in self._values:
                self._problem("url", "is required: set it to the service, e.g. https://stac.example/api")
            return "", ""
        try:
            parts = split_url(url)
            host = parse_host(parts.netloc.rpartition("@")[2])
        except ValueError:
            self._problem("url", "is not a valid URL: it must look like https://stac.example/api")
            return "", ""
        path = parts.path.removesuffix("/")
        if "@" in parts.netloc:
            self._problem("url", "contains a user name or password: remove the part before the @")
        elif "?" in url or "#" in url:
            self._problem("url", "has a ? or # part: remove it")
        elif _PATH.fullmatch(path) is None:
            self._problem(
                "url",
                "has a path that servers could read in different ways: use one like /api, without //, ;, % and ./",
            )
        else:
            return f"{parts.scheme}://{host}", path
        return "", ""

    def _port(self) -> int | None:
        value = self._values.get("port")
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool):
            self._problem("port", "must be a number, without quotation marks")
        elif not 1 <= value <= 65535:
            self._problem("port", f"{value} is not a valid port: use 1 to 65535")
        else:
            return value
        return None

    def _hosts(self) -> tuple[str, ...]:
        values = self._values.get("hosts", [])
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            self._problem("hosts", 'must be a list of names, e.g. ["stac.proxy.svc"]')
            return ()
        hosts: dict[str, None] = {}
        for value in values:
            try:
                name, port = parse_host(value)
            except ValueError:
                name, port = "", None
            if not name or port is not None:
                self._problem(
                    "hosts",
                    f"{printable(value, 100)!r} is not a valid name: use one like stac.proxy.svc, without a port",
                )
            elif name in LOOPBACK_NAMES:
                self._problem("hosts", f"{name} is the proxy itself: use another name")
            else:
                hosts[name] = None
        return tuple(hosts)

    def _resource(self) -> str | None:
        value = self._text("resource")
        if value is not None and _ABSOLUTE_URI.fullmatch(value) is None:
            self._problem("resource", "is not an absolute URI without a # part: use one like https://stac.example")
        return value

    def _scope(self) -> str | None:
        value = self._text("scope")
        if value is not None and _SCOPE.fullmatch(value) is None:
            self._problem("scope", "is not a list of scopes: separate them by one space each")
        return value

    def _header(self) -> str | None:
        value = self._text("header")
        if value is None:
            return None
        # Many programs take _ for -.
        name = value.lower().replace("_", "-")
        if _FIELD_NAME.fullmatch(value) is None:
            self._problem("header", f"{printable(value, 60)!r} is not a header's name: use one like Authorization")
        elif name in _HEADERS_OF_OTHERS or name.startswith(_HEADERS_BEGIN):
            self._problem("header", f"{value} has another meaning: use one like Authorization")
        return value

    def _format(self) -> str | None:
        value = self._text("format")
        if value is not None and _FORMAT.fullmatch(value) is None:
            self._problem(
                "format",
                f"must have {TOKEN_PLACE} once, no other braces, only ASCII, and no spaces at the ends: use one like "
                f"{Service.format}",
            )
        return value

    def _ca_file(self) -> Path | None:
        value = self._text("ca_file")
        if value is None:
            return None
        # Not resolved, as links may change: Kubernetes renews files like that.
        path = (self._folder / value).absolute()
        try:
            return usable_cas(path)
        except (OSError, ValueError) as error:
            self._problem("ca_file", f"{_shown(path)} cannot be used: {_reason(error)}")
            return None

    def _token_file(self) -> Path | None:
        value = self._text("token_file")
        if value is None:
            return None
        path = (self._folder / value).absolute()
        if problem := place_problem(path):
            self._problem("token_file", problem)
        return path

    def _check_token(self, service: Service) -> None:
        needed = _NEEDS.get(service.token, ())
        if needed and not any(key in self._values for key in needed):
            self._problem("token", f"{service.token} needs {' or '.join(needed)}: set it")
        for key, tokens in _USED_BY.items():
            # An unknown kind of token is a problem of its own.
            if key in self._values and service.token not in tokens and self._values.get("token", "shared") in TOKENS:
                self._problem(
                    key,
                    f"has no effect with token = {_quoted(service.token)}: use {_alternatives(tokens)}, or remove it",
                )
        if service.credential == "id_token":
            # OpenID Connect Core §2: `aud` is the client, and the login alone decides what is in it.
            reason = "an ID token is for the client, whatever is asked of the issuer"
            if service.token != "shared":  # noqa: S105  not a token
                self._problem("credential", f'id_token needs token = "shared": {reason}')
            elif "audience" in self._values:
                self._problem("audience", f'has no effect with credential = "id_token": remove it, as {reason}')
        if service.forward_as == "apisix":
            # APISIX sends a fixed set of headers.
            for key in ("credential", "header", "format"):
                if key in self._values and getattr(service, key) != getattr(Service, key):
                    self._problem(key, 'has no effect with forward_as = "apisix": remove one of the two')


def _quoted(value: str) -> str:
    return f'"{value}"'


def _alternatives(values: Sequence[str]) -> str:
    return "token = " + " or ".join(map(_quoted, values))


def _port_conflicts(services: Iterable[Service], listeners: Sequence[Address]) -> Iterator[str]:
    owners = dict(zip((listener.port for listener in listeners), ("the proxy", "the admin listener"), strict=False))
    for service in services:
        if service.port is None:
            continue
        if owner := owners.get(service.port):
            yield f"[service.{service.name}] port: {service.port} is the port of {owner}: choose another"
        owners.setdefault(service.port, service.name)


def _name_conflicts(services: Sequence[Service]) -> Iterator[str]:
    owners = {service.own_name: service for service in services}
    for service in services:
        for host in service.hosts:
            if (owner := owners.setdefault(host, service)) is not service:
                yield f"[service.{service.name}] hosts: {host} is a name of {owner.name}: choose another"


def _file_conflicts(services: Iterable[Service]) -> Iterator[str]:
    owners: dict[Path, str] = {}
    for service in services:
        if service.token_file is not None:
            owner = owners.setdefault(service.token_file, service.name)
            if owner != service.name:
                yield f"[service.{service.name}] token_file: is that of {owner}: choose another one"


def _loops(with_url: Iterable[Service], services: Iterable[Service], listeners: Sequence[Address]) -> Iterator[str]:
    own = [*listeners, *(Address(listeners[0].host, service.port) for service in services if service.port)]
    for service in with_url:
        _, host, port = service.site
        if any(
            port == listener.port and (host == listener.host.lower() or (_is_here(host) and _is_here(listener.host)))
            for listener in own
        ):
            yield f"[service.{service.name}] url: is the address of the proxy itself: change it or the proxy's port"


def _is_here(host: str) -> bool:
    return is_loopback(host) or host in EVERYWHERE or host.endswith(".localhost")


def _site_conflicts(services: Iterable[Service]) -> Iterator[str]:
    at_site: dict[Site, Service] = {}
    at_path: dict[tuple[Site, str], Service] = {}
    for service in services:
        # Some servers ignore the case of paths.
        same = at_path.setdefault((service.site, service.path.lower()), service)
        if same is not service:
            yield f"[service.{service.name}] url: is that of {same.name}: remove one, or give each a path of its own"
        other = at_site.setdefault(service.site, service)
        if (other.ca_file, other.tls_no_verify) != (service.ca_file, service.tls_no_verify):
            yield (
                f"[service.{service.name}] ca_file, tls_no_verify: must be those of {other.name}, because both have "
                "the same scheme, host and port"
            )


def _risks(service: Service) -> Iterator[str]:
    if service.tls_no_verify:
        yield NO_VERIFY.format(f"[service.{service.name}] tls_no_verify")
    if service.site.scheme == "http" and not is_loopback(service.site.host):
        yield (
            f"[service.{service.name}] url is plain http: anyone on the network path to {service.site.host} can read "
            "the token"
        )
