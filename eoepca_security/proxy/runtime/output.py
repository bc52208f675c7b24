"""Error messages on standard error. This works without mitmproxy, and when its names have moved."""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any


def print_error(message: str, log_format: str) -> None:
    """Write an error message to standard error, in one of `logs.FORMATS`."""
    if log_format == "json":
        record = logging.LogRecord("eoepca_security.proxy", logging.ERROR, "", 0, message, None, None)
        message = json.dumps(members(record))
    print(message, file=sys.stderr)  # noqa: T201  the command's own output


def members(record: logging.LogRecord) -> dict[str, Any]:
    """Return the members of a JSON log line: `time` (UTC), `level`, `logger`, `message`."""
    return {
        "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
        # ALERT is mitmproxy's own level, between INFO and WARNING.
        "level": "info" if record.levelname == "ALERT" else record.levelname.lower(),
        "logger": record.name,
        "message": record.getMessage(),
    }
