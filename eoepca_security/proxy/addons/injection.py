"""Gives a request the token and clears it for its destination, or answers it with an error."""

import logging

from mitmproxy.http import HTTPFlow, Request

from eoepca_security.errors import IssuerUnavailable, TokenError
from eoepca_security.proxy.addons.state import State
from eoepca_security.proxy.patches import messages
from eoepca_security.proxy.policy.buffering import MAX_HELD
from eoepca_security.proxy.policy.clearance import Clearance, clear, clearance
from eoepca_security.proxy.policy.destination import Destination
from eoepca_security.proxy.policy.headers import PLACEHOLDER, is_websocket
from eoepca_security.proxy.policy.problem_details import CODE, DETAIL, REMEDY
from eoepca_security.session.session import AccessToken
from eoepca_security.session.token_cycle import TokenCycle

logger = logging.getLogger("eoepca_security.proxy.addon")


class Injection:
    """Gives requests the current token."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._last: dict[str, Clearance] = {}

    async def authorize(self, flow: HTTPFlow, where: Destination) -> None:
        """Clear the request for its destination, or set a response that says why it cannot be sent."""
        flow.response = flow.response or messages.last_resort()
        source = self._state.tokens_of(where.service)
        try:
            token = await self._token(source, is_served=where.is_served)
        except TokenError as error:
            flow.metadata[CODE] = error.code
            if source is None or error is not source.error:  # the refresh already reported its own error
                flow.metadata |= {DETAIL: str(error), REMEDY: self._state.remedy(error, where.service)}
            flow.response = messages.answer(
                error.code,
                self._state.describe(error, where.service),
                method=flow.request.method,
                retry_after=source.retry_after() if source is not None else 1.0,
            )
            return
        self._clear(flow.request, where, token)
        flow.response = None

    async def renew(self, flow: HTTPFlow) -> None:
        """Do the same for a request that was cleared before, if its token is not the current one."""
        sent = clearance(flow.request)
        if sent is None or not sent.headers:
            return
        source = self._state.tokens_of(sent.service)
        token = source.at_hand if source is not None else None
        if token is None or token.value != sent.token:
            await self.authorize(flow, _destination(sent, flow.request))

    async def replace(self, flow: HTTPFlow) -> None:
        """Get another token after the service refused this one; clear the flow's response to send the request again.

        It also gets a token if this request cannot be sent again: the next request will use it.
        """
        sent = clearance(flow.request)
        source = self._state.tokens_of(sent.service) if sent is not None else None
        if source is None or sent is None or not sent.headers or flow.is_replay is not None:
            return
        try:
            token = await source.replace(sent.token)
            if token is not None and _may_be_repeated(flow):
                self._clear(flow.request, _destination(sent, flow.request), token)
                flow.response = None
        except TokenError as error:
            whose = f" {name}" if (name := self._state.name_of(sent.service)) else ""
            logger.info("the service%s refused the token, and no other is available: %s", whose, error)
        except Exception as error:  # noqa: BLE001  the client still gets the service's own answer
            to = f" to {name}" if (name := self._state.name_of(sent.service)) else ""
            logger.warning(
                "a refused request%s was not sent again because of an unexpected %s", to, type(error).__name__
            )

    def _clear(self, request: Request, where: Destination, token: AccessToken) -> None:
        service = where.service
        if service is None:
            raise RuntimeError("a token is for a service")
        apisix = self._state.apisix.get(service.name)
        headers = {service.header: service.header_value(token.value)} | (apisix.of(token) if apisix else {})
        new = Clearance(where.target, headers, service, token.value, where.called)
        # Usually nothing changed; the last clearance has its cached properties.
        if new != (last := self._last.get(service.name)):
            last = self._last[service.name] = new
        clear(request, last)
        if service.header != "Authorization":
            request.headers.pop("Authorization", None)
        request.headers[service.header] = PLACEHOLDER

    async def _token(self, source: TokenCycle | None, *, is_served: bool) -> AccessToken:
        if source is None or self._state.settings is None:
            raise IssuerUnavailable("the proxy is not configured", cause="not_configured")
        if not is_served:
            raise IssuerUnavailable("the proxy does not support this mode", cause="not_configured")
        try:
            return await source.token()
        except TokenError:
            raise
        except Exception as error:
            raise IssuerUnavailable(f"unexpected {type(error).__name__}") from error


def _destination(sent: Clearance, request: Request) -> Destination:
    """Return where a request goes that was cleared before."""
    return Destination(sent.target, request.path, sent.called is not None, True, sent.service, sent.called)


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
