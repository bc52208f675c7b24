"""Gives a request the token and clears it for its destination, or answers it with an error."""

import logging

from mitmproxy.http import HTTPFlow, Request

from eoepca_security.errors import IssuerUnavailable, TokenError
from eoepca_security.proxy.addons.state import State
from eoepca_security.proxy.patches import messages
from eoepca_security.proxy.policy.buffering import MAX_HELD
from eoepca_security.proxy.policy.clearance import Clearance, clear, clearance
from eoepca_security.proxy.policy.destination import Destination, Target
from eoepca_security.proxy.policy.headers import PLACEHOLDER, is_websocket
from eoepca_security.proxy.policy.problem_details import CODE, DETAIL, REMEDY
from eoepca_security.session.session import AccessToken

logger = logging.getLogger("eoepca_security.proxy.addon")


class Injection:
    """Gives requests the current token."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._last = Clearance(Target("", "", 0))

    async def authorize(self, flow: HTTPFlow, where: Destination) -> None:
        """Clear the request for its destination, or set a response that says why it cannot be sent."""
        flow.response = flow.response or messages.last_resort()
        source = self._state.source
        try:
            token = await self._token(where)
        except TokenError as error:
            flow.metadata[CODE] = error.code
            if source is None or error is not source.error:  # the refresh already reported its own error
                flow.metadata |= {DETAIL: str(error), REMEDY: self._state.remedy(error)}
            flow.response = messages.answer(
                error.code,
                self._state.describe(error),
                method=flow.request.method,
                retry_after=source.retry_after() if source is not None else 1.0,
            )
            return
        self._clear(flow.request, where.target, token)
        flow.response = None

    def is_current(self, request: Request) -> bool:
        """Return whether the request has the current token."""
        source, sent = self._state.source, clearance(request)
        token = source.at_hand if source is not None else None
        return token is not None and sent is not None and sent.headers.get("Authorization") == f"Bearer {token.value}"

    async def replace(self, flow: HTTPFlow) -> None:
        """Get another token after the service refused this one; clear the flow's response to send the request again.

        It also gets a token if this request cannot be sent again: the next request will use it.
        """
        source, sent = self._state.source, clearance(flow.request)
        if source is None or sent is None or not sent.headers or flow.is_replay is not None:
            return
        try:
            token = await source.replace(sent.headers["Authorization"].removeprefix("Bearer "))
            if token is not None and _may_be_repeated(flow):
                self._clear(flow.request, sent.target, token)
                flow.response = None
        except TokenError as error:
            logger.info("the service refused the token, and no other is available: %s", error)
        except Exception as error:  # noqa: BLE001  the client still gets the service's own answer
            logger.warning("a refused request was not sent again because of an unexpected %s", type(error).__name__)

    def _clear(self, request: Request, target: Target, token: AccessToken) -> None:
        apisix = self._state.apisix
        new = Clearance(target, {"Authorization": f"Bearer {token.value}"} | (apisix.of(token) if apisix else {}))
        # Usually nothing changed; the last clearance has its cached properties.
        if new != self._last:
            self._last = new
        clear(request, self._last)
        request.headers["Authorization"] = PLACEHOLDER

    async def _token(self, where: Destination) -> AccessToken:
        source = self._state.source
        if source is None or self._state.settings is None:
            raise IssuerUnavailable("the proxy is not configured", cause="not_configured")
        if not where.is_served:
            raise IssuerUnavailable("the proxy does not support this mode", cause="not_configured")
        try:
            return await source.token()
        except TokenError:
            raise
        except Exception as error:
            raise IssuerUnavailable(f"unexpected {type(error).__name__}") from error


def _may_be_repeated(flow: HTTPFlow) -> bool:
    """Return whether the whole request is buffered and the client has not received any part of the answer."""
    request, response = flow.request, flow.response
    return (
        response is not None
        and request.raw_content is not None
        and response.raw_content is not None
        and len(request.raw_content) <= MAX_HELD
        and not is_websocket(request.data)
    )
