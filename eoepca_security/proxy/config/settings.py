"""Settings from add-on options, the environment and `.env`: one frozen `Settings`, or all that is wrong at once."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

from eoepca_security.oauth.protocol import Client
from eoepca_security.oauth.urls import discovery_url

NO_VERIFY: Final = "{} is on: whoever is between here and the service can read the token"

MAX_WORKERS: Final = 64
"""Most processes that one listener may have."""

T = TypeVar("T")


class Address(NamedTuple):
    """A host, an IPv6 address without brackets, and a port, which may be 0 for a free one."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True)
class Settings:
    """Everything that can be set, checked. `upstream` is None only where it was not asked for.

    `admin` is None where there is to be no admin listener; `admin_is_set` says that it must not be left out. Without
    `allowed_hosts` those of loopback and the listening address are allowed.
    """

    issuer_url: str
    client: Client
    grant: str = "refresh_token"
    refresh_token: str | None = field(default=None, repr=False)
    access_token: str | None = field(default=None, repr=False)
    audience: str | None = None
    scope: str | None = None
    allow_http: bool = False
    ca_file: Path | None = None
    token_store: Path | None = None
    upstream: str | None = None
    endpoint: str = "/"
    tls_no_verify: bool = False
    host: str = "127.0.0.1"
    port: int = 8080
    admin: Address | None = None
    admin_is_set: bool = False
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    termination_endpoint: str | None = None
    forward_as: str = "bearer"
    workers: int = 1
    inject_hosts: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def login(self) -> tuple[str | None, ...]:
        """What makes another login where it differs."""
        return (discovery_url(self.issuer_url), self.client.client_id, self.grant, self.refresh_token)
