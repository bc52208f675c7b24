"""Runs the proxy, in this process or in several."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from eoepca_security.errors import SettingsError
from eoepca_security.proxy.addons.drain import has_terminal, hold_hangup
from eoepca_security.proxy.config.settings import Settings
from eoepca_security.proxy.config.variables import SERVICES, UPSTREAM
from eoepca_security.proxy.runtime.environment import (
    shared_session,
    taken_address,
    upstream_trust,
    writable_confdir,
)
from eoepca_security.proxy.runtime.mitmdump import OnStarted, _run
from eoepca_security.proxy.runtime.output import print_error
from eoepca_security.proxy.runtime.processes import run_workers

if TYPE_CHECKING:
    pass


def run(
    settings: Settings, extra: Sequence[str] = (), on_started: OnStarted | None = None, log_format: str = "text"
) -> int:
    """Run the proxy until it is stopped; return the exit code.

    `extra` are mitmdump's own arguments. `on_started` is called in the event loop after the first refresh, but not with
    several workers. `log_format` is one of `logs.FORMATS`. If the credentials are rejected at the start, the exit code
    is 1. Raises SettingsError.
    """
    if not (settings.services or (settings.mode == "forward" and settings.inject_hosts)):
        raise SettingsError(f"{UPSTREAM.env}: is required, or {SERVICES.env}")
    if settings.services_file is not None and not has_terminal():
        hold_hangup()
    if message := taken_address(settings):
        print_error(message, log_format)
        return 1
    with upstream_trust(settings) as trust_arguments, writable_confdir() as confdir:
        arguments = [*trust_arguments, *extra]
        if settings.workers == 1:
            return _run(settings, arguments, confdir, on_started, log_format)
        with shared_session(settings) as (shared, folder):
            return run_workers(shared, arguments, confdir, log_format, folder)
