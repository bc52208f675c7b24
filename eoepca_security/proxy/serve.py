"""Running mitmdump in this process, with our add-on as an instance in it."""

import argparse
import asyncio
import contextlib
import logging
import os
import ssl
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mitmproxy.options import CONF_DIR, Options
from mitmproxy.tools import cmdline
from mitmproxy.tools import main as mitmproxy_main
from mitmproxy.tools.dump import DumpMaster

from eoepca_security.errors import CredentialsRejected, SettingsError, TokenError
from eoepca_security.proxy import authority, pool
from eoepca_security.proxy.addon import OIDCAuthProxy
from eoepca_security.proxy.fast import cache_hooks, settle_memory
from eoepca_security.proxy.listening import cannot_listen
from eoepca_security.proxy.logs import complain, set_format
from eoepca_security.proxy.settings import ADMIN, CA_FILE, PORT, UPSTREAM, Settings
from eoepca_security.transport import ca_bundle

OnStarted = Callable[[DumpMaster, str, TokenError | None], None]


def run(
    settings: Settings, extra: Sequence[str] = (), on_started: OnStarted | None = None, log_format: str = "text"
) -> int:
    """Run the proxy until it is told to stop; return the exit code.

    `extra` are mitmdump's own arguments. `on_started` is called in the event loop once the first refresh has ended.
    `log_format` is one of `logs.FORMATS`.
    A rejected credential ends the start with exit code 1.
    """
    if settings.upstream is None:
        raise SettingsError(f"{UPSTREAM.env}: is required")
    exit_code, starting = 0, True

    def ends_the_start(record: logging.LogRecord) -> bool:
        return starting and f"({CredentialsRejected.code})" in record.getMessage()

    class Master(DumpMaster):
        def __init__(self, options: Options) -> None:
            super().__init__(options)
            # Ours rather than mitmproxy's defaults, which arguments and its config file may change: our start-up line
            # and what goes wrong, not a line for every connection and request.
            options.update(termlog_verbosity="alert", flow_detail=0, confdir=confdir)
            set_format(self, log_format, without=ends_the_start)
            self.event_loop.set_exception_handler(_ignore_cancelled)
            self.addons.add(OIDCAuthProxy(settings, self._started))
            # Where mitmproxy has scripts: behind its authentication of clients, ahead of what shows and saves flows.
            chain = self.addons.chain
            chain.insert(chain.index(self.addons.get("scriptloader")) + 1, chain.pop())
            cache_hooks(self)
            pool.install(pool.Pool())

        def _started(self, listener: str, failure: TokenError | None) -> None:
            nonlocal exit_code, starting
            starting = False
            settle_memory()
            if isinstance(failure, CredentialsRejected):
                exit_code = 1
                complain(f"{failure.code}: {failure}", log_format)
                super().shutdown()  # type: ignore[no-untyped-call]
            elif on_started is not None:
                on_started(self, listener, failure)

    if problem := _taken_address(settings):
        complain(problem, log_format)
        return 1
    with _upstream_trust(settings) as trust_arguments, _writable_confdir() as confdir:
        arguments = [
            *("--mode", f"reverse:{settings.upstream}"),
            *("--listen-host", settings.host, "--listen-port", str(settings.port)),
            *(["--ssl-insecure"] if settings.tls_no_verify else []),
            *trust_arguments,
            *extra,
        ]
        try:
            mitmproxy_main.run(Master, cmdline.mitmdump, arguments, _filters)
        except SystemExit as error:
            return error.code if isinstance(error.code, int) else 1
        except KeyboardInterrupt:
            return 0
    return exit_code


def _taken_address(settings: Settings) -> str | None:
    if problem := cannot_listen(settings.host, settings.port):
        return f"{PORT.env}: {problem}"
    admin = settings.admin if settings.admin_is_set else None
    if admin is not None and (problem := cannot_listen(admin.host, admin.port, ADMIN)):
        return f"{ADMIN.env}: {problem}"
    return None


@contextlib.contextmanager
def _writable_confdir() -> Iterator[str]:
    """Give the folder in which mitmproxy keeps the CA that it makes: its usual one, or one for now in its place."""
    usual = Path(CONF_DIR).expanduser()
    try:
        usual.mkdir(parents=True, exist_ok=True)
        writable = os.access(usual, os.W_OK)
    except (OSError, RuntimeError):
        writable = False
    if writable:
        authority.make(usual)
        yield CONF_DIR
        return
    try:
        temporary = tempfile.TemporaryDirectory(prefix="mitmproxy-")
    except OSError:
        raise SettingsError(
            f"TMPDIR: mitmproxy needs a folder for its own CA, and neither this nor {usual} can be written to: set it "
            "to one that can, or mount one at /tmp"
        ) from None
    with temporary as folder:
        yield folder


def _ignore_cancelled(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Keep early patch releases of Python 3.11 and 3.12 from reporting connections that end with the program."""
    if not isinstance(context.get("exception"), asyncio.CancelledError):
        loop.default_exception_handler(context)


def _filters(arguments: argparse.Namespace) -> dict[str, Any]:
    """Apply mitmdump's filter expression, as mitmdump itself does."""
    expression = " ".join(arguments.filter_args)
    names = ("save_stream_filter", "readfile_filter", "dumper_filter")
    return dict.fromkeys(names, expression) if expression else {}


@contextlib.contextmanager
def _upstream_trust(settings: Settings) -> Iterator[list[str]]:
    """Give the arguments with which mitmproxy trusts the system's CAs and `TLS_CA_FILE`; alone it trusts certifi's."""
    paths = ssl.get_default_verify_paths()
    folder = ["--set", f"ssl_verify_upstream_trusted_confdir={paths.capath}"] if paths.capath else []
    if settings.ca_file is None:
        yield [*folder, "--set", f"ssl_verify_upstream_trusted_ca={paths.cafile}"] if paths.cafile else []
        return
    with contextlib.ExitStack() as stack:
        try:
            # mitmproxy wants a file that holds all.
            file = stack.enter_context(tempfile.NamedTemporaryFile(suffix=".pem"))
            file.write(ca_bundle(settings.ca_file))
            file.flush()
        except OSError as error:
            raise SettingsError(
                f"{CA_FILE.env}: cannot be joined with the system's CAs ({error.strerror}): set TMPDIR to a folder "
                "that can be written to"
            ) from None
        yield [*folder, "--set", f"ssl_verify_upstream_trusted_ca={file.name}"]
