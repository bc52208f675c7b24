"""Shows the status, as an HTML page and as lines for mitmproxy's consoles. Pure."""

import html
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.resources import files
from typing import Any, Final, Literal

from eoepca_security.oauth.text import identity, printable
from eoepca_security.proxy.policy import problem_details

Tone = Literal["good", "warn", "bad", "wait"]

_HEADLINES: Final = {
    "ready": ("Ready", "Requests get a token."),
    "degraded": ("Ready, but not for long", "Requests get a token until it expires; the last refresh failed."),
    "failing": ("No token", "The proxy answers requests with an error."),
    "idle": ("Ready", "Nobody has needed a token for a while. The next request gets a new one."),
    "starting": ("Starting", "Waiting for the first token."),
}

_SERVICE_FAILS: Final = ("Not working", "Requests get a token, but they do not succeed.")
_SOME_FAIL: Final = "Not all services work"

MAX_PROBLEMS: Final = 10
"""How many problems the page begins with; each is also at its service."""

_SERVICE_STATES: Final = {
    "ready": "Ready",
    "degraded": "Ready, but not for long",
    "failing": "No token",
    "idle": "Ready, but not in use",
    "starting": "Not in use yet",
}

_TOKEN_KINDS: Final = {
    "shared": "the session's",
    "scope": "for less than the session's scope",
    "resource": "for its resource",
    "exchange": "exchanged",
}

_TONES: Final[Mapping[str, Tone]] = {
    "ready": "good",
    "degraded": "warn",
    "failing": "bad",
    "idle": "good",
    "starting": "wait",
}

_SIGNS: Final[Mapping[Tone, str]] = {
    "good": "\N{CHECK MARK}",
    "warn": "!",
    "bad": "\N{MULTIPLICATION X}",
    "wait": "\N{HORIZONTAL ELLIPSIS}",
}

_STATUS_CLASSES: Final = {
    "1xx": "1xx, switched protocols",
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


@dataclass(frozen=True)
class Command:
    """A command to copy."""

    text: str


Value = tuple[str | Moment | Command, ...]
"""What a row says, in parts."""


@dataclass(frozen=True)
class Verdict:
    """Whether the proxy works, in a few words, and what that means for requests."""

    tone: Tone
    headline: str
    explanation: str


def page(status: Mapping[str, Any]) -> str:
    """Return the status (see `eoepca_security.proxy.admin.status`) as an HTML page.

    It begins with whose tokens requests get, whether that works, and when the next login is due. The page is complete
    without its script, which keeps it up to date and copies.
    """
    now = status["at"]
    verdict = _verdict(status)
    name, subject = _who(status)
    has_several = len(status["services"]) > 1
    called = "services" if has_several else "service"
    sections = [
        *([_section("services", "Services", _services(status))] if has_several else []),
        _section("way", "Addresses", _list(_way_rows(status), now)),
        _section("token", "Access token", _list(_token_rows(status), now)),
        _section(
            "requests",
            f"Answers from the protected {called}",
            _table("Answer", _request_rows(status)),
        ),
        _section("own", "Answers from the proxy itself", _table("Reason", _own_rows(status))),
        _section("errors", "Recent errors", _errors(status)),
    ]
    started = _html((Moment(now - status["uptime_seconds"]),), now)
    subject_line = f'<p class="subject">sub {html.escape(subject)}</p>\n' if subject else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{verdict.headline} - OIDC proxy</title>
<link rel="icon" href="icon.svg" type="image/svg+xml">
<link rel="stylesheet" href="status.css">
<script src="status.js" defer></script>
</head>
<body data-now="{now:.3f}">
<header>
<div id="who">
<h1><span>OIDC proxy for</span> {html.escape(name)}</h1>
{subject_line}</div>
<p id="lost" class="box warn" role="alert" hidden></p>
<div id="state" class="box {verdict.tone}" role="status">
<p><span class="sign" aria-hidden="true">{_SIGNS[verdict.tone]}</span> <strong>{verdict.headline}</strong> \
{verdict.explanation}</p>
{_problems(status["problems"])}</div>
<div id="lead">
{_list([("Next login", _login(status)), *_example_rows(status)], now)}</div>
<p id="copied" role="status"></p>
</header>
<main id="main">
{"".join(sections)}</main>
<footer id="about">
<p>Version {html.escape(str(status["version"]))}, running since {started}. As of {_html((Moment(now),), now)}.</p>
<p>For machines: <a href="status">status</a>, <a href="metrics">metrics</a>, <a href="readyz">readiness</a>.</p>
</footer>
</body>
</html>
"""


def lines(status: Mapping[str, Any]) -> list[str]:
    """Return the status as lines of plain text."""
    now = status["at"]
    verdict = _verdict(status)
    name, subject = _who(status)
    found = [f"{verdict.headline}: {verdict.explanation}"]
    for problem in status["problems"]:
        found += [f"{_title(problem)}: {problem['detail']}", f"remedy: {problem['remedy']}"]
    who = f"{name} (sub {subject})" if subject else name
    rows: list[tuple[str, Value]] = [("Identity", (who,)), ("Next login", _login(status)), *_example_rows(status)]
    rows += [*_way_rows(status), *_token_rows(status)]
    rows += [(f"Answers from the service, {label}", (number,)) for label, number in _request_rows(status)]
    rows += [(f"Answers from the proxy, {code}", (str(number),)) for code, number in sorted(status["errors"].items())]
    found += [f"{label.lower()}: {_text(value, now)}" for label, value in rows]
    if len(status["services"]) > 1:
        for service in status["services"]:
            rows = [("State", (_service_verdict(service, _of(service, status)).headline,)), *_service_rows(service)]
            told = "; ".join(f"{label.lower()}: {_text(value, now)}" for label, value in rows)
            found.append(f"service {service['name']}: {told}")
    found += [
        f"error {_text((Moment(error['at']),), now)}: {_about(error)}{error['code']}: {error['detail']}"
        f"{_times(error['count'])}"
        for error in status["recent_errors"]
    ]
    return found


def _verdict(status: Mapping[str, Any]) -> Verdict:
    of_session = Verdict(_TONES[status["state"]], *_HEADLINES[status["state"]])
    if not status["ready"]:
        return of_session
    return (
        _verdict_of_several(status, of_session) if len(status["services"]) > 1 else _verdict_of_one(status, of_session)
    )


def _verdict_of_one(status: Mapping[str, Any], of_session: Verdict) -> Verdict:
    if any(problem["about"] == "service" for problem in status["problems"]):
        return Verdict("bad", *_SERVICE_FAILS)
    # The service may need another token than the session's.
    states = [service["state"] for service in status["services"] if _of(service, status)]
    return Verdict(_TONES[states[0]], *_HEADLINES[states[0]]) if states else of_session


def _verdict_of_several(status: Mapping[str, Any], of_session: Verdict) -> Verdict:
    tones = {service["name"]: _service_verdict(service, _of(service, status)).tone for service in status["services"]}
    failing = [name for name, tone in tones.items() if tone == "bad"]
    if len(failing) == len(tones):
        return Verdict("bad", _SERVICE_FAILS[0], "Requests to all services fail.")
    if failing:
        return Verdict("warn", _SOME_FAIL, f"Requests to {_some(failing)} fail.")
    if of_session.tone == "good" and (ending := [name for name, tone in tones.items() if tone == "warn"]):
        headline = _HEADLINES["degraded"][0]
        return Verdict("warn", headline, f"The last refresh failed for {_some(ending)}, whose token will expire.")
    return of_session


def _service_verdict(service: Mapping[str, Any], problems: Sequence[Mapping[str, str]]) -> Verdict:
    state = service["state"]
    if state != "failing" and any(problem["about"] == "service" for problem in problems):
        return Verdict("bad", _SERVICE_FAILS[0], "")
    return Verdict(_TONES[state], _SERVICE_STATES[state], "")


def _of(service: Mapping[str, Any], status: Mapping[str, Any]) -> list[Mapping[str, str]]:
    """Return the problems of one service."""
    return [problem for problem in status["problems"] if problem.get("service") == service["name"]]


def _some(names: Sequence[str]) -> str:
    """Return names for a sentence, but not very many."""
    if len(names) > 5:
        return f"{len(names)} services"
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)


def _who(status: Mapping[str, Any]) -> tuple[str, str]:
    """Return the user's name and, if that is another text, the subject."""
    claims = status["identity"]
    if not claims:
        return "an unnamed user" if status["token"] is not None else "nobody yet", ""
    name, subject = claims.get("preferred_username"), claims.get("sub")
    if isinstance(name, str) and isinstance(subject, str):
        return printable(name), printable(subject)
    return identity(claims), ""


def _login(status: Mapping[str, Any]) -> Value:
    match status["session"]:
        case {"login_needed": "never"}:
            return ("never: the client acts for itself",)
        case {"login_needed": "now"}:
            return ("now",)
        case {"login_needed": "later", "ends_at": ends_at} if ends_at > status["at"]:
            return ("not before ", Moment(ends_at), "; refreshes may extend the session")
        case {"login_needed": "later", "ends_at": ends_at}:
            return ("soon: the session was to end ", Moment(ends_at))
    return ("unknown: the identity provider does not say when the session ends",)


def _example_rows(status: Mapping[str, Any]) -> list[tuple[str, Value]]:
    return [("Try it", (Command(status["example"]),))] if status["example"] else []


def _token_rows(status: Mapping[str, Any]) -> list[tuple[str, Value]]:
    token, refresh, refreshes = status["token"], status["last_refresh"], status["refreshes"]
    rows: list[tuple[str, Value]] = []
    if token is not None:
        rows += [
            ("Expires", (Moment(token["ends_at"]),)),
            ("Obtained", (Moment(token["obtained_at"]),)),
            ("Lifetime", (f"{duration(math.ceil(token['lifetime_seconds']))}, renewed automatically",)),
        ]
    if refresh is not None:
        rows += [
            ("Last refresh", (Moment(refresh["at"]),)),
            ("Result", (f"{refresh['result']}, after {_took(refresh['seconds'])}",)),
        ]
    rows.append(("Refreshes", (_counts(refreshes) or "none yet",)))
    return rows


def _way_rows(status: Mapping[str, Any]) -> list[tuple[str, Value]]:
    browser_address = status["browser_address"]
    return [
        ("Listening at", (str(status["listener"]),)),
        *([("In a browser", (str(browser_address),))] if browser_address is not None else []),
        ("Forwarding to", (str(status["upstream"]),)),
        ("Identity provider", (str(status["issuer"] or "unknown"),)),
    ]


def _request_rows(status: Mapping[str, Any]) -> list[tuple[str, str]]:
    answers = sorted(status["service_answers"].items())
    rows = [(_STATUS_CLASSES.get(name, name), str(number)) for name, number in answers]
    return [*rows, ("in progress", str(status["requests_in_flight"]))]


def _own_rows(status: Mapping[str, Any]) -> list[tuple[str, str]]:
    known = problem_details.ANSWERS
    errors = sorted(status["errors"].items())
    return [(f"{problem_details.title(code)} ({code})" if code in known else code, str(n)) for code, n in errors]


def _service_rows(service: Mapping[str, Any]) -> list[tuple[str, Value]]:
    token, refresh, answer = service["token"], service["last_refresh"], service["last_answer"]
    kind = _TOKEN_KINDS[service["token_kind"]]
    rows: list[tuple[str, Value]] = [
        ("At", (", ".join(service["addresses"]),)),
        ("Forwarding to", (service["upstream"],)),
        ("Token", (kind, ", expires ", Moment(token["ends_at"])) if token is not None else (f"{kind}, none now",)),
    ]
    if refresh is not None:
        rows.append(("Last refresh", (f"{refresh['result']} ", Moment(refresh["at"]))))
    if answer is not None:
        rows.append(("Last answer", (f"{answer['status']} ", Moment(answer["at"]))))
    return rows


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


def _services(status: Mapping[str, Any]) -> str:
    items = []
    for service in status["services"]:
        problems = _of(service, status)
        verdict, name = _service_verdict(service, problems), html.escape(service["name"])
        rows = _service_rows(service)
        rows += [("Problem", (f"{problem['title']}: {problem['detail']}",)) for problem in problems]
        items.append(
            f'<li class="{verdict.tone}">\n<h3><span class="sign" aria-hidden="true">{_SIGNS[verdict.tone]}</span> '
            f"{name}: <strong>{verdict.headline}</strong></h3>\n{_list(rows, status['at'])}</li>\n"
        )
    return f"<ul>\n{''.join(items)}</ul>\n"


def _problems(problems: Sequence[Mapping[str, str]]) -> str:
    more = len(problems) - MAX_PROBLEMS
    rest = f'<div class="problem">\n<p>And {more} more: see the services below.</p>\n</div>\n' if more > 0 else ""
    return "".join(_problem(problem) for problem in problems[:MAX_PROBLEMS]) + rest


def _title(problem: Mapping[str, str]) -> str:
    return _about(problem) + problem["title"]


def _about(told: Mapping[str, Any]) -> str:
    """Return the beginning of what is told about a service that has a name."""
    return f"{told['service']}: " if "service" in told else ""


def _problem(problem: Mapping[str, str]) -> str:
    remedy = problem["remedy"][:1].upper() + problem["remedy"][1:]
    return (
        f'<div class="problem">\n<h2>{html.escape(_title(problem))}</h2>\n<p>{_prose(problem["detail"])}</p>\n'
        f"<p><strong>Remedy:</strong> {_prose(remedy)}</p>\n</div>\n"
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
        f"<li><p>{_html((Moment(error['at']),), status['at'])} <code>{html.escape(error['code'])}</code>"
        f"{_times(error['count'])}</p><p>{_prose(_about(error) + error['detail'])}</p></li>\n"
        for error in status["recent_errors"]
    )
    return f"<ol>\n{items}</ol>\n"


def _html(value: Value, now: float) -> str:
    return "".join(_part(part, now) for part in value)


def _part(part: str | Moment | Command, now: float) -> str:
    match part:
        case Moment(at):
            iso = _local(at).isoformat(timespec="seconds")
            return f'<time datetime="{iso}" data-at="{at:.3f}">{html.escape(_text((part,), now))}</time>'
        case Command(text):
            button = '<button type="button" aria-label="Copy the command">Copy</button>'
            return f'<span class="command"><code>{html.escape(text)}</code>{button}</span>'
    return html.escape(part)


def _prose(text: str) -> str:
    """Return text as HTML; backticks mark commands."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(text))


def _text(value: Value, now: float) -> str:
    return "".join(_plain(part, now) for part in value)


def _plain(part: str | Moment | Command, now: float) -> str:
    match part:
        case Moment(at):
            moment = _local(at)
            day = "" if moment.date() == _local(now).date() else f"{moment:%Y-%m-%d} "
            return f"{day}{moment:%H:%M:%S %Z} ({relative(at - now)})"
        case Command(text):
            return text
    return part


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
