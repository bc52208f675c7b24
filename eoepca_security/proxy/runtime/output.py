"""Messages of the commands: plain where a program reads them, wrapped at a terminal.

This works without mitmproxy, and when its names have moved.
"""

import contextlib
import json
import logging
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, Final

PATIENCE: Final = 1.0
"""Seconds after which a terminal shows that we wait."""


def width() -> int:
    """Return how many characters a line of text has at this terminal: 80, if it is not narrower."""
    return min(shutil.get_terminal_size().columns, 80)


def say(message: str, *, err: bool = False) -> None:
    """Write a message to standard output, or with `err` to standard error; at a terminal, wrap its lines at words."""
    stream = sys.stderr if err else sys.stdout
    if stream.isatty():
        message = "\n".join(wrapped(line, width()) for line in message.split("\n"))
    print(message, file=stream, flush=True)


def wrapped(line: str, width: int, indent: int = 0) -> str:
    """Return a line as lines of at most `width` characters, where all but the first one begin with `indent` spaces.

    What can be copied stays in one piece: the words between backticks, and a line that begins with a space.
    """
    if line.startswith(" ") or indent + len(line) <= width:
        return line
    lines = [""]
    for word in re.findall(r"(?:`[^`]*`|\S)+", line):
        if lines[-1] and indent + len(lines[-1]) + 1 + len(word) > width:
            lines.append(word)
        else:
            lines[-1] += f" {word}" if lines[-1] else word
    return f"\n{'':{indent}}".join(lines)


@contextlib.contextmanager
def waiting(for_what: str) -> Iterator[None]:
    """Show at a terminal that we wait, if the block takes longer than a second."""
    if not sys.stderr.isatty():
        yield
        return

    # In one piece, so that it does not appear after it was removed.
    lock, is_over, is_shown = threading.Lock(), False, False

    def show() -> None:
        nonlocal is_shown
        with lock:
            if not is_over:
                is_shown = True
                room = shutil.get_terminal_size().columns - 1
                print(f"{for_what} ..."[:room], end="", file=sys.stderr, flush=True)  # noqa: T201

    timer = threading.Timer(PATIENCE, show)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        with lock:
            is_over = True
        if is_shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)  # noqa: T201


def print_error(message: str, log_format: str) -> None:
    """Write an error message to standard error, in one of `logs.FORMATS`."""
    if log_format == "json":
        record = logging.LogRecord("eoepca_security.proxy", logging.ERROR, "", 0, message, None, None)
        print(json.dumps(members(record)), file=sys.stderr)  # noqa: T201  the command's own output
    else:
        say(message, err=True)


def members(record: logging.LogRecord) -> dict[str, Any]:
    """Return the members of a JSON log line: `time` (UTC), `level`, `logger`, `message`."""
    return {
        "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
        # ALERT is mitmproxy's own level, between INFO and WARNING.
        "level": "info" if record.levelname == "ALERT" else record.levelname.lower(),
        "logger": record.name,
        "message": record.getMessage(),
    }
