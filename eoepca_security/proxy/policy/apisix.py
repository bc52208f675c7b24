"""The headers that APISIX's openid-connect plugin sends to its upstream services."""

import base64
import json
import logging
from collections.abc import Callable, Mapping
from typing import Any, Final

from eoepca_security.errors import TokenError
from eoepca_security.issuer.provider import Provider
from eoepca_security.oauth.verify import unverified_claims
from eoepca_security.proxy.policy.headers import Fields
from eoepca_security.session.session import AccessToken

# Headers that APISIX's openid-connect plugin sets, so services behind it trust them.
_APISIX: Final = frozenset({b"x-access-token", b"x-id-token", b"x-raw-id-token", b"x-refresh-token", b"x-userinfo"})

logger = logging.getLogger(__name__)


def without_gateway_headers(fields: Fields) -> Fields:
    """Return the fields without those that only a gateway may set.

    This includes spellings with underscores, which CGI and WSGI treat as the same.
    """
    return tuple(field for field in fields if field[0].lower().replace(b"_", b"-") not in _APISIX)


class ApisixHeaders:
    """The claims that APISIX's openid-connect plugin sends besides the token, as padded base64 JSON.

    `describe` says in the log what an error is and what to do about it.
    """

    def __init__(self, describe: Callable[[TokenError], str] = str) -> None:
        self._describe = describe
        self._userinfo: tuple[str, Mapping[str, Any] | None] = ("", None)
        self._last_error = ""

    def learn(self, provider: Provider, token: str) -> None:
        """Ask the issuer for the claims about the token's user; blocks. Errors are logged, not raised."""
        claims = None
        try:
            claims = provider.userinfo(token)
        except TokenError as error:
            if str(error) != self._last_error:
                logger.warning(
                    "X-Userinfo has the access token's claims, because the issuer sent none: %s",
                    self._describe(error),
                )
            self._last_error = str(error)
        self._userinfo = (token, claims)

    def of(self, token: AccessToken) -> dict[str, str]:
        """Return the headers, without empty ones."""
        known_token, userinfo = self._userinfo
        if known_token != token.value or userinfo is None:
            userinfo = unverified_claims(token.value)
        claims = {"X-ID-Token": unverified_claims(token.id_token or ""), "X-Userinfo": userinfo}
        encoded = {name: _encoded(value) for name, value in claims.items()}
        return {"X-Access-Token": token.value} | {name: value for name, value in encoded.items() if value}


def _encoded(claims: Mapping[str, Any]) -> str:
    try:
        text = json.dumps(claims, separators=(",", ":"), ensure_ascii=False) if claims else ""
    except RecursionError:  # they were read where the stack had more room
        return ""
    # Half a character is valid in JSON only as the escape that it came as.
    return base64.b64encode(text.encode(errors="backslashreplace")).decode()
