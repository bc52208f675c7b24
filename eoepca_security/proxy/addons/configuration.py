"""Declares the add-on's options and reads the settings from them."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, Any, Final

from mitmproxy import ctx
from mitmproxy.addonmanager import Loader
from mitmproxy.exceptions import OptionsError
from mitmproxy.proxy.mode_specs import ProxyMode

from eoepca_security.errors import SettingsError, TokenError
from eoepca_security.issuer.threads import DaemonThreads
from eoepca_security.oauth.urls import ANY_LOCALHOST, EVERYWHERE, LOOPBACK_NAMES
from eoepca_security.proxy.addons import mitmproxy_options
from eoepca_security.proxy.addons.state import State
from eoepca_security.proxy.config.command import this_command
from eoepca_security.proxy.config.factory import Hooks, ca_bundle_file
from eoepca_security.proxy.config.loading import settings_in
from eoepca_security.proxy.config.services import DEFAULT, services_of
from eoepca_security.proxy.config.settings import Service, Settings
from eoepca_security.proxy.config.variables import OPTIONS
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
    """

    def __init__(
        self,
        state: State,
        settings: Settings | None,
        *,
        joins: bool,
        make_sources: Callable[..., Sources],
        observe: Callable[[Service | None, TokenError | None, float], None],
    ) -> None:
        self._state = state
        self._given = settings
        self._joins = joins
        self._make_sources = make_sources
        self._observe = observe
        self._settings_problems: list[str] | None = None
        # Keep references: closing a file deletes it.
        self._bundles: list[IO[bytes]] = []

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
            hosts = state.settings.allowed_hosts or (*LOOPBACK_NAMES, ANY_LOCALHOST, *_own_hosts())
            if state.routes is None:
                state.guard = Guard(hosts, state.settings.allowed_origins)
            else:
                names = state.routes.names
                state.guard = Guard((*hosts, *names), state.settings.allowed_origins, names=names)

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
            if self._given is None:
                self._trust_upstream(settings)
        except SettingsError as error:
            return list(error.problems)
        before = state.source or _handed_over.pop(settings.login, None)
        # A new source would lose a session that is only in memory.
        is_same_login = state.settings is None or state.settings.login == settings.login
        state.settings = settings
        client_timeout.set_limit(settings.client_timeout)
        http_stream.budget.limit = settings.held_bytes // settings.workers
        services = services_of(settings)
        state.trust = {service.site: trust for service in settings.services if (trust := self._trust(service))}
        state.routes = Routes(settings.services) if settings.services else None
        state.default = next((service for service in services if service.name == DEFAULT), None)
        state.apisix = {
            service.name: ApisixHeaders(state.describe) for service in services if service.forward_as == "apisix"
        }
        state.sources = self._make_sources(
            settings, continues=before if is_same_login else None, joins=self._joins, hooks=self._hooks
        )
        if before is not None:
            before.retire()
        return []

    def _hooks(self, service: Service | None) -> Hooks:
        apisix = self._state.apisix.get(service.name) if service is not None else None
        return Hooks(
            partial(self._observe, service), self._state.describe, apisix.learn if apisix is not None else None
        )

    def _trust(self, service: Service) -> Trust | None:
        """Return whom to trust instead of those whom mitmproxy's options name, or None."""
        if service.tls_no_verify:
            return Trust(None)
        if service.ca_file is None:
            return None
        file = ca_bundle_file(service.ca_file)
        self._bundles.append(file)
        return Trust(Path(file.name))

    def _trust_upstream(self, settings: Settings) -> None:
        """Set for mitmdump -s what the launcher sets with mitmproxy's arguments."""
        changes: dict[str, Any] = {"ssl_insecure": True} if settings.tls_no_verify else {}
        if settings.ca_file is not None and not getattr(ctx.options, _TRUSTED_CA, None):
            file = ca_bundle_file(settings.ca_file)
            self._bundles.append(file)
            changes[_TRUSTED_CA] = file.name
        ctx.options.update_known(**changes)


def _own_hosts() -> list[str]:
    """Return the listening addresses as they appear in `Host`, without wildcard addresses."""
    hosts = [ProxyMode.parse(mode).listen_host(ctx.options.listen_host) for mode in ctx.options.mode]
    return [f"[{host}]" if ":" in host else host for host in hosts if host not in EVERYWHERE]
