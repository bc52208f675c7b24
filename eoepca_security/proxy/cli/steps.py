"""A step of `check`: its result, and how it ends early."""

from dataclasses import dataclass
from typing import Final

from eoepca_security.oauth.text import printable
from eoepca_security.oauth.verify import unverified_claims
from eoepca_security.session.session import AccessToken

SERVICE_STEPS: Final = ("token", "audience", "upstream")
"""The names of the steps for each of several services, without the service's."""

LAST: Final = f"{SERVICE_STEPS[-1]}:"
"""How the name of a service's last step begins."""


@dataclass(frozen=True)
class Step:
    """The result of one step.

    `name` ends in `:` and a service's name where it is about one of several. `status` is `ok`, `unproven` (it ran, and
    shows nothing), `fault` or `skipped`. Where it is `unproven` or `fault`, `remedy` says what to set or do. `brief` is
    what the line about a service that works has of `detail`.
    """

    name: str
    status: str
    detail: str
    remedy: str | None = None
    brief: str = ""

    @property
    def service(self) -> str:
        """The name of the service that it is about, or an empty string."""
        return self.name.partition(":")[2]


class NotOk(Exception):
    """Ends a step that is not `ok`."""

    def __init__(self, detail: str, remedy: str | None = None, *, status: str = "fault") -> None:
        super().__init__(detail)
        self.detail = detail
        self.remedy = remedy
        self.status = status

    def step(self, name: str) -> Step:
        """Return the step that it ended."""
        return Step(name, self.status, self.detail, self.remedy)


def not_tried(name: str, cause: str) -> Step:
    """Return a step that needs another one, `cause`, which has a fault."""
    return Step(name, "skipped", f"not tried, because of {cause}")


def audience_of(token: AccessToken) -> str:
    """Return whom the token is for, for a message."""
    audience = unverified_claims(token.value).get("aud", "no particular audience")
    return printable(", ".join(map(str, audience)) if isinstance(audience, list) else audience)
