"""Counts and records what happens, for the admin listener and for commands in mitmproxy's user interfaces."""

import asyncio
import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from mitmproxy import command
from mitmproxy.exceptions import CommandError
from mitmproxy.http import HTTPFlow
from mitmproxy.log import ALERT
from prometheus_client import Metric

from eoepca_security.errors import TokenError
from eoepca_security.oauth.text import identity
from eoepca_security.oauth.verify import unverified_claims
from eoepca_security.proxy.addons.addresses import addresses, browser_address
from eoepca_security.proxy.addons.state import State
from eoepca_security.proxy.admin import status
from eoepca_security.proxy.admin.metrics import Metrics, counts
from eoepca_security.proxy.admin.page import duration, lines
from eoepca_security.proxy.admin.recent_errors import RecentError, RecentErrors
from eoepca_security.proxy.admin.status import AdminSource, Answer, Refresh, ServiceState, Unready
from eoepca_security.proxy.config.settings import Service
from eoepca_security.proxy.patches import http_stream
from eoepca_security.proxy.policy.access import Refusal
from eoepca_security.proxy.policy.clearance import clearance
from eoepca_security.proxy.policy.problem_details import CODE, DETAIL, REMEDY, SERVICE
from eoepca_security.session.source import TokenSource

logger = logging.getLogger("eoepca_security.proxy.addon")


class Monitoring:
    """Counts requests and refreshes, and keeps the most recent events.

    It reads a flow's metadata: the code and the detail of the proxy's own answer.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        self._metrics = Metrics(lambda: len(state.in_flight), lambda: http_stream.budget.held)
        self._recent_errors = RecentErrors()
        self._last_refresh: Refresh | None = None
        self._last_answer: Answer | None = None
        # By the services' names, or for no name the only one.
        self._refreshes: dict[str, Refresh] = {}
        self._answers: dict[str, Answer] = {}
        self._faults: dict[str, RecentError] = {}
        self._claims: Mapping[str, Any] = {}
        self._asked: asyncio.Task[None] | None = None

    def requestheaders(self, flow: HTTPFlow) -> None:
        """Record that a request is running."""
        if flow.is_replay is None:
            self._state.in_flight.add(flow)

    def response(self, flow: HTTPFlow) -> None:
        """Count a request that got its answer."""
        self._ended(flow)

    def error(self, flow: HTTPFlow) -> None:
        """Count a request that ended without an answer from the service."""
        self._ended(flow)

    def http_connect_error(self, flow: HTTPFlow) -> None:
        """Count a tunnel that was refused, or whose other end cannot be reached."""
        self._ended(flow)

    def request_refused(self, refusal: Refusal) -> None:
        """Count a request that was refused before it became a flow."""
        self._metrics.request_ended(400, refusal.code)
        self._recent_errors.add(refusal.code, refusal.detail)

    def _ended(self, flow: HTTPFlow) -> None:
        if flow.is_replay is not None:
            return
        code, service = flow.metadata.get(CODE, ""), flow.metadata.get(SERVICE, "")
        http_status = flow.response.status_code if flow.response is not None else None
        self._metrics.request_ended(http_status, code, service)
        if DETAIL in flow.metadata:
            error = self._recent_errors.add(code, flow.metadata[DETAIL], flow.metadata.get(REMEDY, ""), service)
            if code.startswith("upstream_"):
                self._faults[service] = error
        elif http_status is not None and not code and (sent := clearance(flow.request)) is not None and sent.headers:
            self._last_answer = Answer(http_status, time.time())
            if sent.service is not None:
                self._answers[service] = self._last_answer
        if not self._state.is_ending:
            self._state.in_flight.discard(flow)

    def refreshed(self, service: Service | None, error: TokenError | None, seconds: float) -> None:
        """Record an attempt to get a token for a service, or the login if None: its error or None, and its seconds."""
        state, name = self._state, self._state.name_of(service)
        login, refresh = state.source, Refresh(time.time(), seconds, error)
        self._refreshes[name] = refresh
        # A service that is alone may share the login's source.
        source = state.tokens_of(service) if service is not None else login
        if is_login := source is None or source is login:
            source, self._last_refresh = login, refresh
        token = source.at_hand if source is not None else None
        ends_at = token.ends_at if token is not None else None
        self._metrics.refreshed(error, seconds, "" if is_login else name)
        for label in {name} | ({""} if is_login else set()):
            self._metrics.token_ends(ends_at, label)
        if error is not None:
            # The login has told of its own errors.
            if is_login or login is None or error is not login.error:
                self._recent_errors.add(error.code, str(error), state.remedy(error, service), "" if is_login else name)
        elif token is not None and is_login:
            self._claims = unverified_claims(token.value)

    def admin_source(self) -> AdminSource:
        """Return what the admin listener needs to describe and stop the proxy."""

        async def ready(name: str | None) -> Unready | None:
            sources = self._state.sources
            source = self._state.source if name is None or sources is None else sources.services.get(name)
            error = await status.unready(source)
            service = self._state.services.get(name) if name is not None else None
            return Unready(error.code, self._state.describe(error, service)) if error is not None else None

        async def told() -> dict[str, Any]:
            return self.status()

        async def families() -> list[Metric]:
            return self._metrics.families(self._names)

        def services() -> list[str]:
            return list(self._state.sources.services) if self._state.sources is not None else []

        return AdminSource(ready, services, told, families, self._state.end_all)

    @property
    def _named(self) -> tuple[Service, ...]:
        """The services of the file, if there is one."""
        settings = self._state.settings
        return settings.services if settings is not None and settings.services_file is not None else ()

    @property
    def _names(self) -> set[str] | None:
        return {service.name for service in self._named} or None

    def status(self) -> dict[str, Any]:
        """Return the state, as in `/status`."""
        settings, source = self._state.settings, self._state.source
        listener, upstream = addresses(settings)
        return status.status(
            status.State(
                at=time.time(),
                started_at=self._metrics.started_at,
                listener=listener,
                browser_address=browser_address(listener, upstream, self._state.guard, self._named),
                upstream=upstream,
                in_container=self._state.in_container,
                settings=settings,
                token=source.at_hand if source is not None else None,
                claims=self._claims,
                session_ends_at=source.session_ends_at if source is not None else None,
                error=source.error if source is not None else None,
                last_refresh=self._last_refresh,
                last_answer=self._last_answer,
                recent_errors=self._recent_errors.latest(),
                counts=counts(self._metrics.families(self._names)),
                in_flight=len(self._state.in_flight),
                held_bytes=http_stream.budget.held,
                services=tuple(map(self._service_state, settings.services if settings is not None else ())),
            )
        )

    def _service_state(self, service: Service) -> ServiceState:
        name, source = self._state.name_of(service), self._state.tokens_of(service)
        return ServiceState(
            service,
            token=source.at_hand if source is not None else None,
            error=source.error if source is not None else None,
            last_refresh=self._refreshes.get(name),
            last_answer=self._answers.get(name),
            fault=self._faults.get(name),
        )

    @command.command("oidc.status")  # type: ignore[untyped-decorator]
    def show_status(self) -> Sequence[str]:
        """Show the token's user and lifetime, and current errors."""
        return lines(self.status())

    @command.command("oidc.refresh")  # type: ignore[untyped-decorator]
    def refresh(self) -> None:
        """Get a new access token now. The event log shows the result."""
        source = self._state.source
        if source is None:
            raise CommandError("the proxy is not configured: see oidc.status")
        wait = source.forced_in() if source.at_hand is not None else 0.0
        if wait > 0:
            failed = f": the last attempt failed ({source.error.code})" if source.error is not None else ""
            raise CommandError(f"no refresh now{failed}; try again in {duration(math.ceil(wait))}")
        # Keep a reference, so that the task is not garbage-collected while it runs.
        self._asked = asyncio.get_running_loop().create_task(self._refresh_now(source))

    async def _refresh_now(self, source: TokenSource) -> None:
        """Force a refresh, with the same limits as after a refused token, and log the result."""
        try:
            before = source.at_hand
            token = await (source.replace(before.value) if before is not None else source.token())
            error = source.error
        except TokenError as raised:
            token, error = None, raised
        if token is not None:
            logger.log(
                ALERT,
                "new access token for %s, valid for %d s",
                identity(unverified_claims(token.value)),
                math.ceil(token.ends_at - token.obtained_at),
            )
        elif error is not None:
            remedy = self._state.remedy(error)
            logger.warning("no new access token (%s): %s; remedy: %s", error.code, error, remedy)
        else:
            logger.warning("no new access token: the issuer sent the same one again")
