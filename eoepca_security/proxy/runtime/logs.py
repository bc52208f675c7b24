"""The proxy's log formats: a summary at a terminal, plain lines elsewhere, or JSON for machines."""

import io
import json
import logging
import shutil
import sys
import time
from collections.abc import Callable
from typing import Final

from mitmproxy.addons.termlog import TermLog
from mitmproxy.log import ALERT, MitmFormatter
from mitmproxy.master import Master

from eoepca_security.proxy.addons.lifecycle import STARTED
from eoepca_security.proxy.runtime.output import members

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
        addon.logger.setFormatter(SummaryFormatter(colorize=True))


def log_plainly(log_format: str) -> None:
    """Set up a log like mitmproxy's, in one of the `FORMATS`, for a process without mitmproxy."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonFormatter() if log_format == "json" else MitmFormatter(colorize=sys.stdout.isatty()))
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


class SummaryFormatter(MitmFormatter):
    """Like mitmproxy's formatter, but shows the start-up line as a summary."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line or the summary."""
        if record.msg is STARTED and isinstance(record.args, tuple):
            return _summary(*map(str, record.args), browser_address=getattr(record, "browser_address", None))
        return super().format(record)


def _summary(listener: str, upstream: str, identity: str, lifetime: str, *, browser_address: str | None) -> str:
    from rich.console import Console  # noqa: PLC0415  slow to import, only needed here
    from rich.panel import Panel  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="dim", no_wrap=True)
    rows.add_column(overflow="fold")
    in_browser = [("in a browser", Text(browser_address, "bold"))] if browser_address is not None else []
    for name, value in (
        ("listening at", Text(listener, "bold")),
        *in_browser,
        ("forwarding to", Text(upstream)),
        ("as", Text(identity)),
        ("token lifetime", Text(f"{lifetime} s, renewed automatically")),
        ("try", Text(f"curl {listener}/")),
    ):
        rows.add_row(name, value)
    encoding = (sys.stdout.encoding or "ascii").lower()
    out = io.TextIOWrapper(io.BytesIO(), encoding)
    console = Console(file=out, force_terminal=True, width=min(shutil.get_terminal_size().columns, 100))
    console.print(Panel(rows, title="OIDC proxy", subtitle="Ctrl-C to stop", border_style="green", expand=False))
    out.seek(0)
    return out.read().rstrip("\n")
