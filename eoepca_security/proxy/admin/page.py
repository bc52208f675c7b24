"""Shows the status, as an HTML page and as lines for mitmproxy's consoles. Pure."""

import html
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib.resources import files
from typing import Any, Final

from eoepca_security.oauth.text import identity

_HEADLINES: Final = {
    "ready": ("Ready", "Requests get a token."),
    "degraded": ("Ready, but not for long", "Requests get a token until it expires; the last refresh failed."),
    "failing": ("No token", "The proxy answers requests with an error."),
    "idle": ("Idle", "The last token has expired. The next request gets a new one."),
    "starting": ("Starting", "Waiting for the first token."),
}

_STATUS_CLASSES: Final = {
    "2xx": "2xx, success",
    "3xx": "3xx, redirected",
    "4xx": "4xx, refused",
    "5xx": "5xx, failed",
    "none": "no answer",
}

RESOURCES: Final = {
    f"/{name}": (media_type, (files("eoepca_security.proxy.admin") / "static" / name).read_bytes())
    for name, media_type in (
        ("status.css", "text/css; charset=utf-8"),
        ("status.js", "text/javascript; charset=utf-8"),
        ("icon.svg", "image/svg+xml"),
    )
}
"""The page's resources, by path: media type and content."""


@dataclass(frozen=True)
class Moment:
    """A time in epoch seconds, shown as the time of day and how long ago it is."""

    at: float


Value = str | Moment


def page(status: Mapping[str, Any]) -> str:
    """Return the status (see `eoepca_security.proxy.admin.status`) as an HTML page.

    The page is complete without its script, which only keeps it up to date.
    """
    now = status["at"]
    headline, explanation = _HEADLINES[status["state"]]
    sections = [
        *[_alert(problem) for problem in status["problems"]],
        _section("token", "Access token", _countdown(status) + _list(_token_rows(status), now)),
        _section("way", "Identity and addresses", _list(_way_rows(status), now)),
        _section("requests", "Requests since the start", _table("Answer", _request_rows(status))),
        _section("own", "Answered by the proxy itself", _table("Error", _own_rows(status))),
        _section("errors", "Recent errors", _errors(status)),
    ]
    started = _html(Moment(now - status["uptime_seconds"]), now)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{headline} - OIDC proxy</title>
<link rel="icon" href="icon.svg" type="image/svg+xml">
<link rel="stylesheet" href="status.css">
<script src="status.js" defer></script>
</head>
<body data-now="{now:.3f}">
<header>
<h1>OIDC proxy</h1>
<p id="lost" role="alert" hidden></p>
<p id="state" class="{status["state"]}" role="status"><strong>{headline}</strong> {explanation}</p>
</header>
<main id="main">
{"".join(sections)}</main>
<footer id="about">
<p>Version {html.escape(str(status["version"]))}, running since {started}. As of {_html(Moment(now), now)}.</p>
<p>For machines: <a href="status">status</a>, <a href="metrics">metrics</a>, <a href="readyz">readiness</a>.</p>
</footer>
</body>
</html>
"""


def lines(status: Mapping[str, Any]) -> list[str]:
    """Return the status as lines of plain text."""
    now = status["at"]
    headline, explanation = _HEADLINES[status["state"]]
    found = [f"{headline}: {explanation}"]
    for problem in status["problems"]:
        found += [f"{problem['title']}: {problem['detail']}", f"remedy: {problem['remedy']}"]
    rows = [*_way_rows(status), *_token_rows(status)]
    rows += [(f"Requests, {label}", number) for label, number in [*_request_rows(status), *_own_rows(status)]]
    found += [f"{label.lower()}: {_text(value, now)}" for label, value in rows]
    found += [
        f"error {_text(Moment(error['at']), now)}: {error['code']}: {error['detail']}{_times(error['count'])}"
        for error in status["recent_errors"]
    ]
    return found


def _token_rows(status: Mapping[str, Any]) -> list[tuple[str, Value]]:
    token, refresh, refreshes = status["token"], status["last_refresh"], status["refreshes"]
    rows: list[tuple[str, Value]] = []
    if token is not None:
        rows += [
            ("Expires", Moment(token["ends_at"])),
            ("Obtained", Moment(token["obtained_at"])),
            ("Lifetime", f"{duration(math.ceil(token['lifetime_seconds']))}, renewed automatically"),
        ]
    if refresh is not None:
        rows += [
            ("Last refresh", Moment(refresh["at"])),
            ("Result", f"{refresh['result']}, after {_took(refresh['seconds'])}"),
        ]
    rows.append(("Refreshes", _counts(refreshes) or "none yet"))
    return rows


def _way_rows(status: Mapping[str, Any]) -> list[tuple[str, Value]]:
    browser_address = status["browser_address"]
    return [
        ("Identity", identity(status["identity"]) if status["identity"] else "unknown"),
        ("Listening at", str(status["listener"])),
        *([("In a browser", str(browser_address))] if browser_address is not None else []),
        ("Forwarding to", str(status["upstream"])),
        ("Identity provider", str(status["issuer"] or "unknown")),
    ]


def _request_rows(status: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [(_STATUS_CLASSES.get(name, name), str(number)) for name, number in sorted(status["requests"].items())]
    return [*rows, ("in progress", str(status["requests_in_flight"]))]


def _own_rows(status: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(code, str(number)) for code, number in sorted(status["errors"].items())]


def _counts(counts: Mapping[str, int]) -> str:
    names = sorted(counts, key=lambda name: (name != "success", name))
    return ", ".join(f"{counts[name]} {name}" for name in names)


def _took(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms"


def _times(count: int) -> str:
    return f" ({count} times)" if count > 1 else ""


def _section(name: str, title: str, content: str) -> str:
    heading = f'<h2 id="{name}-title">{title}</h2>'
    return f'<section id="{name}" aria-labelledby="{name}-title">\n{heading}\n{content}</section>\n'


def _alert(problem: Mapping[str, str]) -> str:
    remedy = problem["remedy"][:1].upper() + problem["remedy"][1:]
    return (
        f'<section class="problem">\n<h2>{html.escape(problem["title"])}</h2>\n<p>{_prose(problem["detail"])}</p>\n'
        f"<p><strong>Remedy:</strong> {_prose(remedy)}</p>\n</section>\n"
    )


def _countdown(status: Mapping[str, Any]) -> str:
    token = status["token"]
    if token is None:
        return '<p class="countdown">none</p>\n'
    left, lifetime = max(token["seconds_left"], 0.0), max(token["lifetime_seconds"], 1.0)
    return (
        f'<p class="countdown"><span data-ends="{token["ends_at"]:.3f}">{duration(left)}</span> left</p>\n'
        f'<progress aria-label="Remaining lifetime" data-ends="{token["ends_at"]:.3f}" '
        f'max="{lifetime:.0f}" value="{left:.0f}"></progress>\n'
    )


def _list(rows: list[tuple[str, Value]], now: float) -> str:
    items = "".join(f"<div><dt>{html.escape(label)}</dt><dd>{_html(value, now)}</dd></div>\n" for label, value in rows)
    return f"<dl>\n{items}</dl>\n"


def _table(title: str, rows: list[tuple[str, str]]) -> str:
    if not rows:
        return "<p>None.</p>\n"
    body = "".join(
        f'<tr><th scope="row">{html.escape(label)}</th><td>{html.escape(number)}</td></tr>\n' for label, number in rows
    )
    head = f'<tr><th scope="col">{title}</th><th scope="col">Number</th></tr>'
    return f"<table>\n<thead>{head}</thead>\n<tbody>\n{body}</tbody>\n</table>\n"


def _errors(status: Mapping[str, Any]) -> str:
    if not status["recent_errors"]:
        return "<p>None.</p>\n"
    items = "".join(
        f"<li><p>{_html(Moment(error['at']), status['at'])} <code>{html.escape(error['code'])}</code>"
        f"{_times(error['count'])}</p><p>{_prose(error['detail'])}</p></li>\n"
        for error in status["recent_errors"]
    )
    return f"<ol>\n{items}</ol>\n"


def _html(value: Value, now: float) -> str:
    if isinstance(value, Moment):
        iso = _local(value.at).isoformat(timespec="seconds")
        return f'<time datetime="{iso}" data-at="{value.at:.3f}">{html.escape(_text(value, now))}</time>'
    return html.escape(value)


def _prose(text: str) -> str:
    """Return text as HTML; backticks mark commands."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(text))


def _text(value: Value, now: float) -> str:
    if not isinstance(value, Moment):
        return value
    moment = _local(value.at)
    day = "" if moment.date() == _local(now).date() else f"{moment:%Y-%m-%d} "
    return f"{day}{moment:%H:%M:%S %Z} ({relative(value.at - now)})"


def _local(at: float) -> datetime:
    return datetime.fromtimestamp(at).astimezone()


def relative(seconds: float) -> str:
    """Describe the distance to a moment: `12 s ago`, `in 3 min 5 s`, `now`."""
    if abs(seconds) < 1:
        return "now"
    return f"in {duration(seconds)}" if seconds > 0 else f"{duration(-seconds)} ago"


def duration(seconds: float) -> str:
    """Format a duration in its two largest units: `41 s`, `3 min 5 s`, `2 h 10 min`, `3 d 4 h`."""
    left = math.floor(seconds)
    parts = []
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        number, left = divmod(left, size)
        parts.append((number, unit))
    while len(parts) > 1 and parts[0][0] == 0:
        parts.pop(0)
    return " ".join(f"{number} {unit}" for number, unit in parts[:2] if number or len(parts) == 1)
