"""Runs mitmdump with the add-on in one process."""

import argparse
import asyncio
import logging
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mitmproxy.options import Options
from mitmproxy.tools import cmdline
from mitmproxy.tools import main as mitmproxy_main
from mitmproxy.tools.dump import DumpMaster

from eoepca_security.errors import CredentialsRejected, TokenError
from eoepca_security.proxy.addons.oidc import OIDCAuthProxy
from eoepca_security.proxy.admin.worker_states import Channel, answer
from eoepca_security.proxy.config.port_check import bind_host
from eoepca_security.proxy.config.settings import Settings
from eoepca_security.proxy.patches import certificate_authority, connection_pool
from eoepca_security.proxy.patches.hook_cache import settle_memory
from eoepca_security.proxy.patches.shared_listeners import share_listeners
from eoepca_security.proxy.policy.remedies import command_remedy, runs_in_container, told
from eoepca_security.proxy.runtime.logs import set_format
from eoepca_security.proxy.runtime.output import print_error

OnStarted = Callable[[DumpMaster, str, TokenError | None], None]


@dataclass(frozen=True)
class Worker:
    """What each of several processes gets: the sockets to listen on, and the channel for questions about its state.

    `listeners` are by port.

    `lifeline` is a file descriptor that reaches its end when the supervisor is gone. `end` stops all processes. Only
    one worker, on its first start, `leads`: it logs the start, and stops the proxy if the credentials are rejected. One
    worker, on each start, `keeps_files` with tokens.
    """

    listeners: Mapping[int, Sequence[socket.socket]]
    line: Channel
    lifeline: int
    end: Callable[[], None]
    leads: bool
    keeps_files: bool


def _run(
    settings: Settings,
    arguments: Sequence[str],
    confdir: str,
    on_started: OnStarted | None,
    log_format: str,
    worker: Worker | None = None,
) -> int:
    exit_code, starting = 0, True
    leads = worker is None or worker.leads

    def is_told_elsewhere(record: logging.LogRecord) -> bool:
        is_rejection = isinstance(getattr(record, "error", None), CredentialsRejected)
        return starting and (is_rejection or (not leads and record.levelno < logging.ERROR))

    class Master(DumpMaster):
        def __init__(self, options: Options) -> None:
            super().__init__(options)
            # Our defaults, which arguments and mitmproxy's config file may override: log the start-up line and errors,
            # not a line for every connection and request.
            options.update(termlog_verbosity="alert", flow_detail=0, confdir=confdir)
            set_format(self, log_format, without=is_told_elsewhere)
            self.event_loop.set_exception_handler(_ignore_cancelled)
            addon = OIDCAuthProxy(
                settings,
                self._started,
                joins=not leads,
                keeps_files=worker is None or worker.keeps_files,
                end=worker.end if worker else None,
            )
            self.addons.add(addon)
            addon.begin()
            # The position of scripts: after mitmproxy's client authentication, before it shows and saves flows.
            chain = self.addons.chain
            chain.insert(chain.index(self.addons.get("scriptloader")) + 1, chain.pop())
            connection_pool.install(connection_pool.Pool())
            if worker is not None:
                share_listeners(bind_host(settings.host), worker.listeners)
                answer(worker.line, addon.admin_source())
                self.event_loop.add_reader(worker.lifeline, self._orphaned, worker.lifeline)

        def _orphaned(self, lifeline: int) -> None:
            self.event_loop.remove_reader(lifeline)
            self.shutdown()  # type: ignore[no-untyped-call]

        def _started(self, listener: str, error: TokenError | None) -> None:
            nonlocal exit_code, starting
            starting = False
            settle_memory()
            if isinstance(error, CredentialsRejected) and leads:
                exit_code = 1
                ended = replace(settings, command=settings.command.ended)
                remedy = command_remedy(error, ended, in_container=runs_in_container())
                print_error(f"{error.code}: {told(error, remedy)}", log_format)
                super().shutdown()  # type: ignore[no-untyped-call]
            elif on_started is not None:
                on_started(self, listener, error)

    own = [
        *(word for mode in _modes(settings) for word in ("--mode", mode)),
        *("--listen-host", bind_host(settings.host), "--listen-port", str(settings.port)),
    ]
    certificate_authority.read_quickly()
    try:
        mitmproxy_main.run(Master, cmdline.mitmdump, [*own, *arguments], _filters)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    except KeyboardInterrupt:
        return 0
    return exit_code


def _modes(settings: Settings) -> list[str]:
    """Return mitmproxy's modes: one for the port that all services share, and one for each port of a service's own.

    Where a request really goes is decided for each request.
    """
    if settings.mode == "forward":
        return ["regular"]
    own = [f"reverse:{service.upstream}@{service.port}" for service in settings.services if service.port is not None]
    return [f"reverse:{settings.services[0].upstream}", *own]


def _ignore_cancelled(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Keep early patch releases of Python 3.11 and 3.12 from reporting connections that are cancelled at exit."""
    if not isinstance(context.get("exception"), asyncio.CancelledError):
        loop.default_exception_handler(context)


def _filters(arguments: argparse.Namespace) -> dict[str, Any]:
    """Apply mitmdump's filter expression, as mitmdump itself does."""
    expression = " ".join(arguments.filter_args)
    names = ("save_stream_filter", "readfile_filter", "dumper_filter")
    return dict.fromkeys(names, expression) if expression else {}
