"""The proxy's log formats: a summary at a terminal, plain lines elsewhere, or JSON for machines."""

import io
import json
import logging
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from typing import Final

from mitmproxy.addons.termlog import TermLog
from mitmproxy.contrib.click import style
from mitmproxy.log import ALERT, MitmFormatter
from mitmproxy.master import Master
from mitmproxy.utils import human

from eoepca_security.proxy.addons.lifecycle import IN_BROWSER, STARTED, STATUS_PAGE, TRY
from eoepca_security.proxy.runtime.output import members, width, wrapped

FORMATS: Final = ("text", "json")


QUIET: Final = 60.0
"""Seconds after which a repeated message is shown again."""


def set_format(master: Master, log_format: str, *, without: Callable[[logging.LogRecord], bool]) -> None:
    """Set the format of mitmproxy's log (one of `FORMATS`). Drop repeats and records for which `without` is true."""
    addon = master.addons.get("termlog")
    if not isinstance(addon, TermLog):
        return
    addon.logger.addFilter(lambda record: not without(record))
    addon.logger.addFilter(NoRepeats())
    if log_format == "json":
        addon.logger.setFormatter(JsonFormatter())
    elif sys.stdout.isatty():
        addon.logger.setFormatter(TerminalFormatter())


def log_plainly(log_format: str) -> None:
    """Set up a log like mitmproxy's, in one of the `FORMATS`, for a process without mitmproxy."""
    handler = logging.StreamHandler(sys.stdout)
    text = TerminalFormatter() if sys.stdout.isatty() else MitmFormatter(colorize=False)
    handler.setFormatter(JsonFormatter() if log_format == "json" else text)
    logging.basicConfig(level=ALERT, handlers=[handler])


class NoRepeats(logging.Filter):
    """Drops a warning that repeats its logger's previous message within `QUIET` seconds."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._now = now
        self._last: dict[str, tuple[str, float]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to show a record."""
        message, now = record.getMessage(), self._now()
        before, at = self._last.get(record.name, ("", 0.0))
        self._last[record.name] = (message, now)
        return record.levelno < logging.WARNING or message != before or now - at > QUIET


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON: `time` (UTC), `level`, `logger`, `message`, and the start-up values."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line = members(record)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        if record.msg is STARTED and isinstance(record.args, tuple):
            line |= zip(("listener", "upstream", "identity", "lifetime"), record.args, strict=True)
        return json.dumps(line)


_LEVELS: Final = {ALERT: ("info", None), logging.WARNING: ("warning", "yellow"), logging.ERROR: ("error", "red")}


class TerminalFormatter(logging.Formatter):
    """Formats a record for a person: time, level and the message, wrapped at words. The start-up line is a summary."""

    default_time_format = "%H:%M:%S"
    default_msec_format = None

    def format(self, record: logging.LogRecord) -> str:
        """Return the lines."""
        if record.msg is STARTED and isinstance(record.args, tuple):
            return _summary(*map(str, record.args), more=getattr(record, "more", {}))
        level, colour = _LEVELS.get(record.levelno, (record.levelname.lower(), None))
        message = record.getMessage()
        if client := getattr(record, "client", None):
            message = f"[{human.format_address(client)}] {message}"
        if record.exc_info:
            message += f"\n{self.formatException(record.exc_info)}"
        head = f"{self.formatTime(record)} {level:<7} "
        text = "\n".join(wrapped(line, width(), len(head)) for line in message.split("\n"))
        return style(head, fg=colour or "cyan", dim=colour is None) + style(text, fg=colour)


def _summary(listener: str, upstream: str, identity: str, lifetime: str, *, more: Mapping[str, str | None]) -> str:
    """Return a summary; `more` has further rows by their names, and leaves out those without a value."""
    from rich.console import Console  # noqa: PLC0415  slow to import, only needed here
    from rich.panel import Panel  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="dim", no_wrap=True)
    rows.add_column(overflow="fold")
    addresses = {"listening at": listener} | {name: more.get(name) for name in (IN_BROWSER, STATUS_PAGE)}
    for name, value in (
        *((name, Text(address, "bold")) for name, address in addresses.items() if address is not None),
        ("forwarding to", Text(upstream)),
        ("as", Text(identity)),
        ("token lifetime", Text(f"{lifetime} s, renewed automatically")),
        *([("try", Text(example))] if (example := more.get(TRY)) is not None else []),
    ):
        rows.add_row(name, value)
    encoding = (sys.stdout.encoding or "ascii").lower()
    out = io.TextIOWrapper(io.BytesIO(), encoding)
    console = Console(file=out, force_terminal=True, width=min(shutil.get_terminal_size().columns, 100))
    console.print(Panel(rows, title="OIDC proxy", subtitle="Ctrl-C to stop", border_style="green", expand=False))
    out.seek(0)
    return out.read().rstrip("\n")
