"""The headers that APISIX's openid-connect plugin sends to the services behind it."""

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

# What APISIX's openid-connect plugin sets, and so what a service behind it believes.
_APISIX: Final = frozenset({b"x-access-token", b"x-id-token", b"x-raw-id-token", b"x-refresh-token", b"x-userinfo"})

logger = logging.getLogger(__name__)


def without_gateway_headers(fields: Fields) -> Fields:
    """Return the fields without a client's copies of what only a gateway may say.

    CGI and WSGI would take other spellings for them, too.
    """
    return tuple(field for field in fields if field[0].lower().replace(b"_", b"-") not in _APISIX)


class ApisixHeaders:
    """What APISIX's openid-connect plugin sends besides the token: claims, as padded base64 of JSON.

    `describe` says in the log what an error is and what to do about it.
    """

    def __init__(self, describe: Callable[[TokenError], str] = str) -> None:
        self._describe = describe
        self._userinfo: tuple[str, Mapping[str, Any] | None] = ("", None)
        self._trouble = ""

    def learn(self, provider: Provider, token: str) -> None:
        """Ask the issuer about the user to whom `token` belongs; blocks. That it fails is no reason to stop."""
        claims = None
        try:
            claims = provider.userinfo(token)
        except TokenError as error:
            if str(error) != self._trouble:
                logger.warning(
                    "no X-Userinfo from the issuer, so it is what the access token says: %s", self._describe(error)
                )
            self._trouble = str(error)
        self._userinfo = (token, claims)

    def of(self, token: AccessToken) -> dict[str, str]:
        """Return the headers, without those for which there is nothing to say."""
        known_token, userinfo = self._userinfo
        if known_token != token.value or userinfo is None:
            userinfo = unverified_claims(token.value)
        claims = {"X-ID-Token": unverified_claims(token.id_token or ""), "X-Userinfo": userinfo}
        return {"X-Access-Token": token.value} | {name: _encoded(value) for name, value in claims.items() if value}


def _encoded(claims: Mapping[str, Any]) -> str:
    return base64.b64encode(json.dumps(claims, separators=(",", ":"), ensure_ascii=False).encode()).decode()
