"""The checked settings, as one frozen `Settings`."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

from eoepca_security.oauth.protocol import Client
from eoepca_security.oauth.urls import DEFAULT_PORTS, discovery_url, parse_host
from eoepca_security.proxy.config.command import Command
from eoepca_security.proxy.config.variables import Variable
from eoepca_security.session.token_file import MARGIN, MODE

NO_VERIFY: Final = "{} is on: anyone on the network path to the service can read the token"

MAX_WORKERS: Final = 64
"""The maximum number of processes for one listener."""

MAX_CLIENT_TIMEOUT: Final = 86_400
"""The maximum number of seconds for which a client may keep the proxy waiting: a day."""

MAX_TOKEN_FILE_MARGIN: Final = 86_400
"""The maximum number of seconds for which a token in a file has to be good: a day."""

HELD_BYTES: Final = 64 * 1024 * 1024
"""How many bytes of bodies a process holds at a time, unless set."""

T = TypeVar("T")


class Address(NamedTuple):
    """A host (an IPv6 address without brackets) and a port; 0 means any free port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True)
class TerminationEndpoint:
    """Where a request ends the proxy: with POST, or with any method. `host` and `port` are None if any will do."""

    path: str
    host: str | None = None
    port: int | None = None
    any_method: bool = False

    def is_at(self, scheme: str, authority: str, path: str) -> bool:
        """Return whether a request is for this endpoint. `authority` is the host that the client named."""
        if path.rstrip("/") != self.path.rstrip("/"):
            return False
        if self.host is None and self.port is None:
            return True
        try:
            host = parse_host(authority)
        except ValueError:
            return False
        return self.host in (None, host.name) and self.port in (None, host.port or DEFAULT_PORTS[scheme])


TOKEN_PLACE: Final = "{token}"  # noqa: S105  not a token
"""Where `Service.format` has the token."""


class Site(NamedTuple):
    """Where a service is: scheme, host in lower case (an IPv6 address without brackets), and port."""

    scheme: str
    host: str
    port: int


@dataclass(frozen=True)
class Service:
    """A protected service, and the token that it gets.

    `upstream` is scheme, host and port, and `path` comes before the path of each request: empty, or like `/api`.
    Clients reach it at `port`, at `NAME.localhost` and at `hosts`, which have no port.

    `token` says how its tokens are made: `shared` are the session's, `scope` and `resource` are refreshes that ask for
    less (RFC 6749 §6) or for a resource (RFC 8707), and `exchange` is an exchange (RFC 8693). `credential` says
    which one goes into `header`, written as `format`.

    `ca_file` has the CAs for this service; None means those of the proxy. The proxy also keeps the token in the file
    `token_file`, unless that is None.
    """

    name: str
    upstream: str
    path: str = ""
    port: int | None = None
    hosts: tuple[str, ...] = ()
    token: str = "shared"  # noqa: S105  not a token
    audience: str | None = None
    resource: str | None = None
    scope: str | None = None
    credential: str = "access_token"
    header: str = "Authorization"
    format: str = f"Bearer {TOKEN_PLACE}"
    forward_as: str = "bearer"
    forwarded: bool = False
    ca_file: Path | None = None
    tls_no_verify: bool = False
    token_file: Path | None = None

    def header_value(self, token: str) -> str:
        """Return what `header` has with this token."""
        return self.format.replace(TOKEN_PLACE, token)

    @cached_property
    def site(self) -> Site:
        """Where the service is, for comparison."""
        scheme, _, authority = self.upstream.partition("://")
        name, port = parse_host(authority)
        return Site(scheme, name.strip("[]"), port or DEFAULT_PORTS[scheme])

    @property
    def own_name(self) -> str:
        """The name that clients on this machine can always use (RFC 6761 §6.3)."""
        return f"{self.name}.localhost"


@dataclass(frozen=True)
class Settings:
    """All settings, checked. `upstream` is None only when the caller did not need it.

    `issuer` is the issuer's name if it is not the address in `issuer_url`, else None.

    `admin` is None when the admin listener is off. `admin_is_set` is true when the user set it, so that the proxy must
    not start without it. An empty `allowed_hosts` allows the names of loopback and the listening address.

    `services` are those in `services_file`, and before them the one at `upstream`, if there is one.

    `mode` is `reverse` or `forward`. `proxy_auth` is `user:password`, which clients have to send in forward mode.

    `exposed` are warnings about files with secrets that all users can read. `command` calls this program with these
    settings, for messages. `flags` are the options that set some of them.
    """

    issuer_url: str
    client: Client
    issuer: str | None = None
    grant: str = "refresh_token"
    refresh_token: str | None = field(default=None, repr=False)
    access_token: str | None = field(default=None, repr=False)
    audience: str | None = None
    scope: str | None = None
    allow_http: bool = False
    ca_file: Path | None = None
    token_store: Path | None = None
    token_file: Path | None = None
    token_file_mode: int = MODE
    token_file_margin: int = MARGIN
    upstream: str | None = None
    services_file: Path | None = None
    services: tuple[Service, ...] = ()
    endpoint: str = "/"
    tls_no_verify: bool = False
    mode: str = "reverse"
    proxy_auth: str | None = field(default=None, repr=False)
    host: str = "127.0.0.1"
    port: int = 8080
    admin: Address | None = None
    admin_is_set: bool = False
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    termination_endpoint: TerminationEndpoint | None = None
    forward_as: str = "bearer"
    cookies: str = "pass"
    workers: int = 1
    client_timeout: int = 60
    held_bytes: int = HELD_BYTES
    inject_hosts: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    exposed: tuple[str, ...] = ()
    command: Command = field(default_factory=Command)
    flags: frozenset[str] = frozenset()

    def name(self, variable: Variable) -> str:
        """Return where the user set a setting: our option, or else the environment variable."""
        return variable.flag if variable.flag in self.flags else variable.env

    @property
    def known_as(self) -> str:
        """The issuer's name or its discovery document, by which its sessions are known."""
        return self.issuer or self.issuer_url

    @property
    def login(self) -> tuple[str | None, ...]:
        """The settings that identify the login: if one differs, it is another login."""
        return (discovery_url(self.known_as), self.client.client_id, self.grant, self.refresh_token)
