"""The mitmproxy add-on: options -> TokenSource -> Authorization header.

mitmproxy goes on with a request whose hook raises, and a hook that hangs hangs the client. So a request has an answer,
an error, while it is decided about; nothing leaves without a clearance (`wire`); and every wait has a bound.
"""

import asyncio
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary, WeakSet

from mitmproxy import command, ctx
from mitmproxy.addonmanager import Loader, traverse
from mitmproxy.addons.proxyserver import Proxyserver
from mitmproxy.exceptions import CommandError, OptionsError
from mitmproxy.http import HTTPFlow, Response
from mitmproxy.log import ALERT
from mitmproxy.master import Master
from mitmproxy.proxy.layer import NextLayer
from mitmproxy.proxy.layers import TCPLayer
from mitmproxy.proxy.mode_specs import RegularMode, ReverseMode
from mitmproxy.proxy.server_hooks import ServerConnectionHookData
from prometheus_client import Metric

from eoepca_security.errors import CredentialsRejected, IssuerUnavailable, SettingsError, TokenError
from eoepca_security.issuer.threads import DaemonThreads
from eoepca_security.oauth.text import identity, printable
from eoepca_security.oauth.urls import LOOPBACK_NAMES, is_loopback
from eoepca_security.oauth.verify import unverified_claims
from eoepca_security.proxy.addons import mitmproxy_options
from eoepca_security.proxy.addons.configuration import _OPTION_NAMES, _TRUSTED_CA, _looks_like_ours, _own_hosts
from eoepca_security.proxy.addons.drain import DRAIN_TIMEOUT, drain, end_quietly, end_with_the_terminal
from eoepca_security.proxy.addons.lifecycle import STARTED, _exit_if_rejected, _shut_down
from eoepca_security.proxy.addons.retry import _may_be_repeated
from eoepca_security.proxy.addons.state import _addresses, _left, exposure
from eoepca_security.proxy.admin.metrics import Metrics, counts
from eoepca_security.proxy.admin.page import duration, lines
from eoepca_security.proxy.admin.recent_errors import RecentErrors
from eoepca_security.proxy.admin.status import AdminSource, Answer, Refresh, State, Unready, status, unready
from eoepca_security.proxy.config.factory import ca_bundle_file, make_source
from eoepca_security.proxy.config.loading import settings_in
from eoepca_security.proxy.config.settings import NO_VERIFY, Settings
from eoepca_security.proxy.config.variables import OPTIONS
from eoepca_security.proxy.patches import certificate_authority, header_lookup, http_clients, http_stream
from eoepca_security.proxy.patches.hook_cache import cache_hooks
from eoepca_security.proxy.patches.lazy_imports import without_cas
from eoepca_security.proxy.policy import apisix, buffering, clearance, destination, problem_details, rewrite
from eoepca_security.proxy.policy import headers as forwarding
from eoepca_security.proxy.policy.access import Guard, Refusal
from eoepca_security.proxy.policy.clearance import Clearance
from eoepca_security.proxy.policy.destination import Target, _is_elsewhere, _may_inject, _target
from eoepca_security.proxy.policy.remedies import failure_remedy, runs_in_container, told
from eoepca_security.session.session import AccessToken
from eoepca_security.session.source import TokenSource

if TYPE_CHECKING:
    from eoepca_security.proxy.admin.server import Admin


logger = logging.getLogger("eoepca_security.proxy.addon")


class OIDCAuthProxy:
    """Puts an access token into every request that goes to the protected service, and answers those it has none for.

    `settings` come from the launcher; without them they are read from the add-on's options, the environment and `.env`.
    `on_started` is called once with the proxy's URL and what kept the first token from coming, if anything did.
    One that `joins` others goes on with their session, rather than ask the issuer whether it is good. `end` is
    called when a client ends the proxy, mitmproxy's shutdown unless it is given.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        on_started: Callable[[str, TokenError | None], None] | None = None,
        *,
        joins: bool = False,
        end: Callable[[], None] | None = None,
    ) -> None:
        self._given = settings
        self._end_all = end or _shut_down
        self._joins = joins
        self._on_started = on_started or _exit_if_rejected
        self._settings: Settings | None = None
        self._source: TokenSource | None = None
        self._settings_problems: list[str] | None = None
        self._problems: list[str] = []
        self._running = False
        self._ending = False
        self._guard = Guard(())
        self._apisix: apisix.ApisixHeaders | None = None
        self._admin: Admin | None = None
        self._in_flight: WeakSet[HTTPFlow] = WeakSet()
        self._codes: WeakKeyDictionary[HTTPFlow, str] = WeakKeyDictionary()
        self._metrics = Metrics(lambda: len(self._in_flight))
        self._last_clearance = Clearance(Target("", "", 0))
        self._first: asyncio.Future[AccessToken] | None = None
        self._last_refresh: Refresh | None = None
        self._last_answer: Answer | None = None
        self._claims: Mapping[str, Any] = {}
        self._mishaps = RecentErrors()
        self._in_container = runs_in_container()
        self._asked: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Get the first token while mitmproxy still starts; the settings are known. There has to be an event loop."""
        if self._source is not None and not self._settings_problems:
            self._first = asyncio.ensure_future(self._source.token())
            # Nobody may come to look at it.
            self._first.add_done_callback(lambda first: first.cancelled() or first.exception())

    # --- start, settings, end ----------------------------------------------------------------------------------------

    def load(self, loader: Loader) -> None:
        """Declare the options: all are strings, as a mistyped value of another type would unload the add-on."""
        http_clients.install()
        http_stream.install()
        header_lookup.install()
        cache_hooks(loader.master)
        loader.master.event_loop.set_default_executor(DaemonThreads())
        for variable in OPTIONS:
            loader.add_option(str(variable.option), str, "", f"{variable.help} Otherwise {variable.env} is used.")
        mitmproxy_options.enforce(loader.master.options)

    def configure(self, updated: set[str]) -> None:
        """Read the settings; what is wrong ends the start, and later is refused so that the old ones stay."""
        certificate_authority.load(ctx.master)
        # Only when they may have changed: this is called for every option, and a secret's file may be a pipe.
        if self._settings_problems is None or not _OPTION_NAMES.isdisjoint(updated):
            self._read_settings()
        problems = mitmproxy_options.problems(ctx.options, self._settings) + (self._settings_problems or [])
        if problems and self._running:
            raise OptionsError("; ".join(problems))
        self._problems = problems
        if self._settings is not None:
            hosts = self._settings.allowed_hosts or (*LOOPBACK_NAMES, *_own_hosts())
            self._guard = Guard(hosts, self._settings.allowed_origins)

    def _read_settings(self) -> None:
        try:
            settings = self._given or settings_in(
                Path.cwd(),
                os.environ,
                options={name: getattr(ctx.options, name) for name in _OPTION_NAMES},
                need_upstream=False,
            )
        except SettingsError as error:
            self._settings_problems = list(error.problems)
            return
        self._settings_problems = []
        if settings == self._settings:
            return
        if self._given is None:
            self._trust_upstream(settings)
        before = self._source or _left.pop(settings.login, None)
        # A new source would forget what is kept in memory only.
        goes_on = self._settings is None or self._settings.login == settings.login
        self._settings = settings
        self._apisix = apisix.ApisixHeaders() if settings.forward_as == "apisix" else None
        self._source = make_source(
            settings,
            continues=before if goes_on else None,
            joins=self._joins,
            observe=self._refreshed,
            describe=self._describe,
            learn=self._apisix.learn if self._apisix is not None else None,
        )
        if before is not None:
            before.retire()

    def _trust_upstream(self, settings: Settings) -> None:
        """Do for mitmdump -s what the launcher does with mitmproxy's arguments."""
        changes: dict[str, Any] = {"ssl_insecure": True} if settings.tls_no_verify else {}
        if settings.ca_file is not None and not getattr(ctx.options, _TRUSTED_CA, None):
            try:
                self._bundle = ca_bundle_file(settings.ca_file)  # it is used until the end
            except SettingsError as error:
                self._settings_problems = list(error.problems)
                return
            changes[_TRUSTED_CA] = self._bundle.name
        ctx.options.update_known(**changes)

    def running(self) -> "asyncio.Task[None]":
        """Begin the first refresh.

        This is no coroutine function, because mitmproxy refuses those where it reloads a script that was edited.
        """
        self._running = True
        end_with_the_terminal(ctx.master.shutdown)
        return asyncio.get_running_loop().create_task(self._start())

    def done(self) -> "asyncio.Task[None]":
        """Let requests and a refresh that are under way end; end mitmproxy when it is the add-on alone that ends.

        A script that is edited badly is unloaded, and requests would go on without tokens.
        """
        master = ctx.master
        is_end = master.should_exit.is_set()
        if self._running and not is_end:
            # A script that is edited well is loaded anew before the loop comes to this.
            master.event_loop.call_soon(_exit_if_unprotected, master)
            # And its admin listener needs the address, and goes on with the session.
            self._stop_admin()
            if self._settings is not None and self._source is not None:
                self._source.retire()
                _left[self._settings.login] = self._source
        return asyncio.get_running_loop().create_task(self._end(master if is_end else None))

    async def _end(self, master: Master | None) -> None:
        finishing = asyncio.ensure_future(self._source.finish()) if self._source is not None else None
        server = master.addons.get("proxyserver") if master is not None else None
        hurried = False
        if isinstance(server, Proxyserver):
            self._ending = True
            if (number := self._serving()) > 0:
                requests = "1 request" if number == 1 else f"{number} requests"
                logger.log(
                    ALERT,
                    "stopping: waiting up to %g s for %s; a second signal ends it at once",
                    DRAIN_TIMEOUT,
                    requests,
                )
            hurried = await drain(server, lambda: self._serving() > 0 or not (finishing is None or finishing.done()))
        if finishing is not None and not hurried:
            await finishing
        self._stop_admin()
        if master is not None:
            end_quietly()

    def _serving(self) -> int:
        return sum(bool(flow.live and not flow.websocket) for flow in self._in_flight)

    # --- requests ----------------------------------------------------------------------------------------------------

    async def requestheaders(self, flow: HTTPFlow) -> None:
        """Decide about the request before any of it leaves."""
        await self._decide(flow)
        if flow.response is None:
            flow.request.stream = buffering.streams_request(flow.request)
        else:
            # Nobody is asked to go on with a body.
            flow.request.headers.pop("Expect", None)

    async def _decide(self, flow: HTTPFlow) -> None:
        if flow.is_replay is None:
            self._in_flight.add(flow)
        # mitmproxy calls this for requests that it has refused already, too.
        if flow.error is not None or flow.response is not None:
            forwarding.hide_credentials(flow.request.headers)
            return
        # Whatever goes wrong: without a token nothing leaves. Requests are answered, never killed: mitmproxy 12 leaves
        # the connection open when it kills a request whose body is still arriving, and its client hangs.
        flow.response = problem_details.last_resort()
        if _is_elsewhere(flow, self._settings):
            clearance.clear(flow.request, Clearance(_target(flow)))
            flow.response = None
            return
        forwarding.hide_credentials(flow.request.headers)
        if (answer := self._own_answer(flow)) is not None:
            flow.response = answer
            return
        self._prepare(flow)
        await self._authorize(flow)

    async def request(self, flow: HTTPFlow) -> None:
        """Authorize again what was held back until its body was complete: the token may have ended meanwhile."""
        is_ours = flow.error is None and flow.response is None and flow.request.raw_content is not None
        if is_ours and not self._is_current(flow) and not _is_elsewhere(flow, self._settings):
            await self._authorize(flow)

    def responseheaders(self, flow: HTTPFlow) -> None:
        """Say who may read the answer, lead to the proxy, and say on kept connections when the proxy ends."""
        if flow.response is None or flow.response.status_code == 101 or _is_elsewhere(flow, self._settings):
            return
        flow.response.stream = buffering.streams_response(flow.response)
        headers = flow.response.headers
        rewrite.share(headers, flow.metadata.get(rewrite.SHARING))
        if (proxy := flow.metadata.get(rewrite.ORIGIN)) is not None:
            rewrite.name_the_proxy(headers, proxy, _target(flow).origin)
        if self._ending and not (flow.request.is_http2 or flow.request.is_http3):
            headers["Connection"] = "close"

    def response(self, flow: HTTPFlow) -> None:
        """Count what has its answer."""
        self._ended(flow)

    def request_refused(self, refusal: Refusal) -> None:
        """Count what was refused before it became a flow."""
        self._metrics.request_ended(400, refusal.code)
        self._mishaps.add(refusal.code, refusal.detail)

    def websocket_message(self, flow: HTTPFlow) -> None:
        """Keep a long conversation from piling up in memory."""
        if flow.websocket is not None:
            del flow.websocket.messages[:-1]

    def error(self, flow: HTTPFlow) -> None:
        """Count what ended without an answer of the service."""
        self._ended(flow)

    def server_connect(self, data: ServerConnectionHookData) -> None:
        """Verify the host that the token is for, and no other that the client named when it spoke TLS to us."""
        server, address = data.server, data.server.address
        mode = data.client.proxy_mode
        if address is not None and (isinstance(mode, ReverseMode) or _may_inject(self._settings, "https", address)):
            server.sni = address[0]

    def server_connect_error(self, data: ServerConnectionHookData) -> None:
        """Say what keeps requests from the service; the client gets mitmproxy's 502."""
        logger.warning(
            "the protected service cannot be reached: %s; `run-mitmproxy.py check` says what to do",
            printable(data.server.error),
        )

    def next_layer(self, data: NextLayer) -> None:
        """In forward mode, look into no connection to a host that gets no token."""
        context, address = data.context, data.context.server.address
        if data.layer is not None or address is None or not isinstance(context.client.proxy_mode, RegularMode):
            return
        if not any(_may_inject(self._settings, scheme, address) for scheme in ("http", "https")):
            data.layer = TCPLayer(context, ignore=True)

    def _own_answer(self, flow: HTTPFlow) -> Response | None:
        """Return the answer to a request that must not or need not be forwarded."""
        request = flow.request
        is_explicit = isinstance(flow.client_conn.proxy_mode, RegularMode) and flow.server_conn.address is None
        if not forwarding.is_one_request(request) or (is_explicit and destination.is_origin_form(request)):
            return self._refuse(flow, Refusal("bad_request", "no server would be certain what it asks for"))
        # A replay was let in before, or comes from whoever sits at mitmproxy's console.
        if flow.is_replay is None:
            # Before the service's name takes the place of the proxy's: the service's own origin may be an allowed one.
            if (sharing := self._guard.sharing(request.method, request.headers.get_all)) is not None:
                flow.metadata[rewrite.SHARING] = sharing
            if (refusal := self._refusal(flow)) is not None:
                return self._refuse(flow, refusal)
        if self._guard.preflight(request.method, request.headers.get_all) is not None:
            return Response.make(204)
        return self._termination(flow)

    def _refuse(self, flow: HTTPFlow, refusal: Refusal) -> Response:
        self._codes[flow] = refusal.code
        self._mishaps.add(refusal.code, refusal.detail)
        return problem_details.answer(refusal.code, refusal.detail, method=flow.request.method)

    def _termination(self, flow: HTTPFlow) -> Response | None:
        endpoint = self._settings.termination_endpoint if self._settings is not None else None
        is_meant = flow.request.path.partition("?")[0] == endpoint
        if not is_meant or not isinstance(flow.client_conn.proxy_mode, ReverseMode):
            return None
        if flow.request.method != "POST":
            return Response.make(405, b"", {"Allow": "POST"})
        # Which does not end before this request has its answer.
        self._end_all()
        return Response.make(200, b"ending\n", {"Content-Type": "text/plain; charset=utf-8"})

    def _refusal(self, flow: HTTPFlow) -> Refusal | None:
        request, values = flow.request, flow.request.headers.get_all
        if isinstance(flow.client_conn.proxy_mode, RegularMode):
            target = _target(flow)
            return self._guard.cross_site(f"{target.scheme}://{target.authority}", values)
        authority = [request.authority] if request.authority else []
        scheme = "https" if flow.client_conn.tls else "http"
        return self._guard.refusal(scheme, [*authority, *values("Host")], values)

    def _prepare(self, flow: HTTPFlow) -> None:
        """Make of the client's request the one that the service is to see."""
        request = flow.request
        forwarding.drop_hop_by_hop(request)
        if self._apisix is not None:
            apisix.drop_gateway_headers(request.headers)
        target = _target(flow)
        if isinstance(flow.client_conn.proxy_mode, ReverseMode):
            scheme = "https" if flow.client_conn.tls else "http"
            # A replay has the name that the client used from the first time.
            proxy = flow.metadata.setdefault(rewrite.ORIGIN, f"{scheme}://{request.host_header}")
            rewrite.name_the_service(request.headers, proxy, target.origin)
        request.host_header = target.authority
        if not (request.is_http2 or request.is_http3):
            # An absolute target (RFC 9112 §3.2.2) would be forwarded as it is.
            request.authority = ""

    def _is_current(self, flow: HTTPFlow) -> bool:
        """Tell whether the request is to be sent with the token that is good now."""
        token, sent = self._source.at_hand if self._source is not None else None, clearance.clearance(flow.request)
        return token is not None and sent is not None and sent.headers.get("Authorization") == f"Bearer {token.value}"

    async def _authorize(self, flow: HTTPFlow) -> None:
        flow.response = flow.response or problem_details.last_resort()
        try:
            token = await self._token(flow)
        except TokenError as error:
            self._codes[flow] = error.code
            if self._source is None or error is not self._source.failure:
                self._mishaps.add(error.code, str(error), self._remedy(error))
            retry_after = self._source.retry_after() if self._source else 1.0
            flow.response = problem_details.answer(
                error.code, self._describe(error), method=flow.request.method, retry_after=retry_after
            )
            return
        clearance.clear(flow.request, self._clearance(_target(flow), token))
        flow.request.headers["Authorization"] = forwarding.PLACEHOLDER
        flow.response = None

    def _clearance(self, target: Target, token: AccessToken) -> Clearance:
        """Return the last one where it is the same again, as it mostly is."""
        headers = {"Authorization": f"Bearer {token.value}"} | (self._apisix.of(token) if self._apisix else {})
        new = Clearance(target, headers)
        if new != self._last_clearance:
            self._last_clearance = new
        return self._last_clearance

    async def _token(self, flow: HTTPFlow) -> AccessToken:
        if self._source is None or self._settings is None:
            raise IssuerUnavailable("the proxy is not configured", cause="not_configured")
        mode = flow.client_conn.proxy_mode
        # A flow that is replayed from a file brings a mode of its own.
        if mode.full_spec not in ctx.options.mode or not destination.is_protected(mode, self._settings):
            raise IssuerUnavailable("the proxy does not work in this mode", cause="not_configured")
        try:
            return await self._source.token()
        except TokenError:
            raise
        except Exception as error:
            raise IssuerUnavailable(f"unexpected {type(error).__name__}") from error

    async def token_refused(self, flow: HTTPFlow) -> None:
        """Get another token when the service refuses this one, and have it asked again, where that can be done."""
        sent = clearance.clearance(flow.request)
        if sent is None or not sent.headers or self._source is None or flow.is_replay is not None:
            return
        try:
            token = await self._source.replace(sent.headers["Authorization"].removeprefix("Bearer "))
            if token is not None and _may_be_repeated(flow):
                clearance.clear(flow.request, self._clearance(_target(flow), token))
                flow.response = None
        except TokenError as error:
            logger.info("the service refused the token, and there is no other: %s", error)
        except Exception as error:  # noqa: BLE001  the client still has the service's own answer
            logger.warning("a refused request was not repeated because of an unexpected %s", type(error).__name__)

    def _ended(self, flow: HTTPFlow) -> None:
        if flow.is_replay is None:
            status = flow.response.status_code if flow.response is not None else None
            code = self._codes.get(flow) or flow.metadata.get(problem_details.CODE, "")
            self._metrics.request_ended(status, code)
            if status is not None and not code and clearance.clearance(flow.request) is not None:
                self._last_answer = Answer(status, time.time())
            elif problem_details.DETAIL in flow.metadata:
                remedy = flow.metadata.get(problem_details.REMEDY, "")
                self._mishaps.add(code, flow.metadata[problem_details.DETAIL], remedy)
            if not self._ending:
                self._in_flight.discard(flow)

    # --- what the admin listener tells of ----------------------------------------------------------------------------

    def _refreshed(self, failure: TokenError | None, seconds: float) -> None:
        self._metrics.refreshed(failure, seconds)
        token = self._source.at_hand if self._source is not None else None
        self._metrics.token_ends(token.ends_at if token is not None else None)
        self._last_refresh = Refresh(time.time(), seconds, failure)
        if failure is not None:
            self._mishaps.add(failure.code, str(failure), self._remedy(failure))
        elif token is not None:
            self._claims = unverified_claims(token.value)

    def subject(self) -> AdminSource:
        """Return what can be told of the proxy, and how to end it."""
        return AdminSource(self._ready, self._told, self._families, self._end_all)

    async def _ready(self) -> Unready | None:
        error = await unready(self._source)
        return Unready(error.code, self._describe(error)) if error is not None else None

    def _remedy(self, error: TokenError) -> str:
        return failure_remedy(error, self._settings, in_container=self._in_container)

    def _describe(self, error: TokenError) -> str:
        return told(error, self._remedy(error))

    async def _families(self) -> list[Metric]:
        return self._metrics.families()

    async def _told(self) -> dict[str, Any]:
        return self._status()

    def _status(self) -> dict[str, Any]:
        listener, upstream = _addresses(self._settings)
        source = self._source
        return status(
            State(
                at=time.time(),
                started_at=self._metrics.started_at,
                listener=listener,
                upstream=upstream,
                in_container=self._in_container,
                settings=self._settings,
                token=source.at_hand if source is not None else None,
                claims=self._claims,
                failure=source.failure if source is not None else None,
                last_refresh=self._last_refresh,
                last_answer=self._last_answer,
                recent_errors=self._mishaps.latest(),
                counts=counts(self._metrics.families()),
                in_flight=len(self._in_flight),
            )
        )

    @command.command("oidc.status")  # type: ignore[untyped-decorator]
    def show_status(self) -> Sequence[str]:
        """Show whose token the proxy holds, for how long, and what is wrong, if anything is."""
        return lines(self._status())

    @command.command("oidc.refresh")  # type: ignore[untyped-decorator]
    def refresh(self) -> None:
        """Get a new access token now. The event log tells what came of it."""
        source = self._source
        if source is None:
            raise CommandError("the proxy is not configured: oidc.status tells more")
        wait = source.forced_in() if source.at_hand is not None else 0.0
        if wait > 0:
            failed = f": the last attempt failed ({source.failure.code})" if source.failure is not None else ""
            raise CommandError(f"no refresh now{failed}; try again in {duration(math.ceil(wait))}")
        # Kept, or it might be collected while it runs.
        self._asked = asyncio.get_running_loop().create_task(self._refresh_now(source))

    async def _refresh_now(self, source: TokenSource) -> None:
        """Force a refresh, under the same limits as when the service refuses a token, and log what came of it."""
        try:
            before = source.at_hand
            token = await (source.replace(before.value) if before is not None else source.token())
            failure = source.failure
        except TokenError as error:
            token, failure = None, error
        if token is not None:
            logger.log(
                ALERT,
                "a new access token: of %s, lives %d s",
                identity(unverified_claims(token.value)),
                math.ceil(token.ends_at - token.obtained_at),
            )
        elif failure is not None:
            remedy = self._remedy(failure)
            logger.warning("no new access token (%s): %s; what to do: %s", failure.code, failure, remedy)
        else:
            logger.warning("no new access token: the issuer gave the one that was there already")

    def _start_admin(self, settings: Settings) -> None:
        if settings.admin is None:
            return
        # Takes long to load, which is done when the proxy listens already.
        with without_cas():
            from eoepca_security.proxy.admin.server import Admin  # noqa: PLC0415

        admin = Admin(settings, self.subject())
        if admin.start() is not None:
            self._admin = admin

    def _stop_admin(self) -> None:
        if self._admin is not None:
            self._admin.stop()
            self._admin = None

    async def _start(self) -> None:
        # With -s an unknown option is put aside without a word.
        unknown = [f"{name}: there is no such option" for name in ctx.options.deferred if _looks_like_ours(name)]
        for line in self._problems + unknown:
            logger.error("%s", line)  # mitmproxy ends with exit code 1 when an error is logged while it starts
        if self._problems or unknown or self._source is None or self._settings is None:
            return
        for line in self._settings.warnings:
            logger.warning("%s", line)
        if ctx.options.ssl_insecure and not self._settings.tls_no_verify:
            logger.warning("%s", NO_VERIFY.format("ssl_insecure"))
        listener, upstream = _addresses(self._settings)
        if not is_loopback(urlsplit(listener).hostname):
            logger.warning("%s", exposure(listener, self._settings))
        self._start_admin(self._settings)
        # mitmproxy does not end before this does, so whoever stops it now would wait for a silent issuer.
        first = self._first or asyncio.ensure_future(self._source.token())
        stopped = asyncio.ensure_future(ctx.master.should_exit.wait())
        either: set[asyncio.Future[Any]] = {first, stopped}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if not first.done():
            first.cancel()
            return
        failure: TokenError | None = None
        try:
            token = first.result()
        except TokenError as error:
            failure = error
            if not isinstance(error, CredentialsRejected):
                logger.log(ALERT, "OIDC proxy listening at %s -> %s, without a token yet", listener, upstream)
        else:
            logger.log(
                ALERT,
                STARTED,
                listener,
                upstream,
                identity(unverified_claims(token.value)),
                math.ceil(token.ends_at - token.obtained_at),
            )
        self._on_started(listener, failure)


def _exit_if_unprotected(master: Master) -> None:
    if not any(isinstance(addon, OIDCAuthProxy) for addon in traverse(master.addons.chain)):
        logger.error("the OIDC add-on was unloaded: ending, as requests would be forwarded without tokens")
        master.shutdown()
