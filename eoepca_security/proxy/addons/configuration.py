"""Declares the add-on's options and reads the settings from them."""

import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, Final

from mitmproxy import ctx
from mitmproxy.addonmanager import Loader
from mitmproxy.exceptions import OptionsError
from mitmproxy.log import ALERT
from mitmproxy.proxy.mode_specs import ProxyMode

from eoepca_security.errors import SettingsError, TokenError
from eoepca_security.issuer.threads import DaemonThreads, in_thread
from eoepca_security.oauth.urls import ANY_LOCALHOST, EVERYWHERE, LOOPBACK_NAMES
from eoepca_security.proxy.addons import mitmproxy_options
from eoepca_security.proxy.addons.state import State
from eoepca_security.proxy.config.command import this_command
from eoepca_security.proxy.config.factory import Hooks, ca_bundle_file
from eoepca_security.proxy.config.loading import check_tls, reread_services, settings_in, tls_of
from eoepca_security.proxy.config.services import services_of
from eoepca_security.proxy.config.settings import Service, Settings, Site
from eoepca_security.proxy.config.variables import OPTIONS, SERVICES
from eoepca_security.proxy.patches import (
    certificate_authority,
    client_timeout,
    header_lookup,
    http_clients,
    http_stream,
    service_tls,
)
from eoepca_security.proxy.patches.hook_cache import cache_hooks
from eoepca_security.proxy.patches.service_tls import Trust
from eoepca_security.proxy.policy.access import Guard
from eoepca_security.proxy.policy.apisix import ApisixHeaders
from eoepca_security.proxy.policy.routing import Routes
from eoepca_security.session.service_tokens import Sources
from eoepca_security.session.source import TokenSource

OPTION_NAMES: Final = frozenset(str(variable.option) for variable in OPTIONS)
"""The names of the add-on's options."""

logger = logging.getLogger("eoepca_security.proxy.addon")

SAME_AS_BEFORE: Final = (
    "the services are the same as before: correct the file and send SIGHUP again, or restart for what needs that"
)

_TRUSTED_CA: Final = "ssl_verify_upstream_trusted_ca"

# When mitmproxy reloads the script, the old add-on hands its session to the new one. By login.
_handed_over: dict[tuple[str | None, ...], TokenSource] = {}


def hand_over(settings: Settings, source: TokenSource) -> None:
    """Hand the session over to the add-on that replaces this one."""
    source.retire()
    _handed_over[settings.login] = source


class Configuration:
    """Declares the options, and creates the settings, the guard and the token source from their values.

    `settings` come from the launcher, or are None. `make_sources` is that of `config.factory`. `observe` is told
    of each attempt to get a token: for which service (None is the login), its error or None, and its seconds.
    `on_sources` is called when there are other sources of tokens.
    """

    def __init__(
        self,
        state: State,
        settings: Settings | None,
        *,
        joins: bool,
        make_sources: Callable[..., Sources],
        observe: Callable[[Service | None, TokenError | None, float], None],
        on_sources: Callable[[], None],
    ) -> None:
        self._state = state
        self._given = settings
        self._joins = joins
        self._make_sources = make_sources
        self._observe = observe
        self._on_sources = on_sources
        self._settings_problems: list[str] | None = None
        # Keep references: closing a file deletes it.
        self._bundle: IO[bytes] | None = None
        self._bundles: list[IO[bytes]] = []
        self._tls: dict[Site, tuple[Path | None, bool]] = {}

    def load(self, loader: Loader) -> None:
        """Declare the options. All are strings, because an invalid value of another type would unload the add-on."""
        http_clients.install()
        http_stream.install()
        header_lookup.install()
        service_tls.install()
        cache_hooks(loader.master)
        loader.master.event_loop.set_default_executor(DaemonThreads())
        for variable in OPTIONS:
            loader.add_option(str(variable.option), str, "", f"{variable.help} Otherwise {variable.env} is used.")
        mitmproxy_options.enforce(loader.master.options)

    def configure(self, updated: set[str]) -> None:
        """Read the settings. Errors end the start; later, they are raised, and the old settings stay."""
        certificate_authority.load(ctx.master)
        state = self._state
        # Only if they may have changed: mitmproxy calls this for every option, and a secret's file may be a pipe.
        if self._settings_problems is None or not OPTION_NAMES.isdisjoint(updated):
            self._settings_problems = []  # reading them may set mitmproxy's options, which calls this again
            self._settings_problems = self._read_settings()
        problems = mitmproxy_options.problems(ctx.options, state.settings) + self._settings_problems
        if problems and state.is_running:
            raise OptionsError("; ".join(problems))
        state.problems = problems
        if state.settings is not None:
            self._set_guard(state.settings)

    async def reread(self) -> None:
        """Read the file with the services again, and use it if it is right. The log says what happened."""
        state, before = self._state, self._state.settings
        if before is None or state.sources is None:
            return
        try:
            settings, warnings = await in_thread(lambda: reread_services(before))
            if state.settings is not before:  # something else was faster
                return
            trust = self._trust_of(settings.services)
        except SettingsError as error:
            for line in error.problems:
                logger.warning("%s", line)
            logger.warning("%s", SAME_AS_BEFORE)
            return
        for line in warnings:
            logger.warning("%s", line)
        self._given = settings if self._given is not None else None
        self._use_services(settings, trust)
        state.sources = self._make_sources(settings, login=state.sources.login, hooks=self._hooks)
        self._set_guard(settings)
        self._on_sources()
        logger.log(ALERT, "the services were read again: there are %d", len(settings.services))

    def _read_settings(self) -> list[str]:
        """Apply the settings, or return a line for each error in them."""
        state = self._state
        try:
            settings = self._given or settings_in(
                Path.cwd(),
                os.environ,
                options={name: getattr(ctx.options, name) for name in OPTION_NAMES},
                command=this_command(in_container=state.in_container),
                need_upstream=False,
            )
            if settings == state.settings:
                return []
            trust = self._trust_of(settings.services)
            if self._given is None:
                self._trust_upstream(settings)
        except SettingsError as error:
            return list(error.problems)
        before = state.source or _handed_over.pop(settings.login, None)
        # A new source would lose a session that is only in memory.
        is_same_login = state.settings is None or state.settings.login == settings.login
        client_timeout.set_limit(settings.client_timeout)
        http_stream.budget.limit = settings.held_bytes // settings.workers
        self._use_services(settings, trust)
        state.sources = self._make_sources(
            settings, continues=before if is_same_login else None, joins=self._joins, hooks=self._hooks
        )
        if before is not None:
            before.retire()
        self._on_sources()
        return []

    def _set_guard(self, settings: Settings) -> None:
        hosts = settings.allowed_hosts or (*LOOPBACK_NAMES, ANY_LOCALHOST, *_own_hosts())
        if self._state.routes is None or settings.services_file is None:
            self._state.guard = Guard(hosts, settings.allowed_origins)
        else:
            names = self._state.routes.names
            self._state.guard = Guard((*hosts, *names), settings.allowed_origins, names=names)

    def _use_services(self, settings: Settings, trust: dict[Site, Trust]) -> None:
        state, services = self._state, services_of(settings)
        state.settings = settings
        state.trust = trust
        state.routes = Routes(settings.services) if settings.services else None
        state.services = {service.name: service for service in services}
        state.apisix = {
            service.name: ApisixHeaders(state.describe) for service in services if service.forward_as == "apisix"
        }

    def _hooks(self, service: Service | None) -> Hooks:
        apisix = self._state.apisix.get(service.name) if service is not None else None
        return Hooks(
            partial(self._observe, service),
            partial(self._state.describe, service=service),
            apisix.learn if apisix is not None else None,
        )

    def _trust_of(self, services: Sequence[Service]) -> dict[Site, Trust]:
        """Return the services that trust others than mitmproxy's options name.

        Connections that are there do not change, so a service keeps what it had from its start. Raises SettingsError.
        """
        check_tls(services, self._tls, SERVICES.env)
        # One for each file, however many services name it: each has all CAs of the system, too.
        bundles: dict[Path, IO[bytes]] = {}
        trust = {}
        for service in services:
            if service.tls_no_verify:
                trust[service.site] = Trust(None)
            elif service.ca_file is not None:
                if service.ca_file not in bundles:
                    bundles[service.ca_file] = ca_bundle_file(service.ca_file)
                trust[service.site] = Trust(Path(bundles[service.ca_file].name))
        self._tls |= tls_of(services)
        self._bundles = list(bundles.values())
        return trust

    def _trust_upstream(self, settings: Settings) -> None:
        """Set for mitmdump -s what the launcher sets with mitmproxy's arguments."""
        changes: dict[str, Any] = {"ssl_insecure": True} if settings.tls_no_verify else {}
        if settings.ca_file is not None and not getattr(ctx.options, _TRUSTED_CA, None):
            self._bundle = ca_bundle_file(settings.ca_file)
            changes[_TRUSTED_CA] = self._bundle.name
        ctx.options.update_known(**changes)


def _own_hosts() -> list[str]:
    """Return the listening addresses as they appear in `Host`, without wildcard addresses."""
    hosts = [ProxyMode.parse(mode).listen_host(ctx.options.listen_host) for mode in ctx.options.mode]
    return [f"[{host}]" if ":" in host else host for host in hosts if host not in EVERYWHERE]
