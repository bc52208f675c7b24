"""The output of `check`: in colour at a terminal, plain elsewhere, or JSON for machines."""

import json
import sys
from collections.abc import Callable, Iterable
from typing import Final

import click

from eoepca_security.proxy.cli.steps import LAST, Step
from eoepca_security.proxy.config.settings import Service
from eoepca_security.proxy.runtime.output import width, wrapped

_COLUMN: Final = 10
_MEMBERS: Final = ("name", "status", "detail", "remedy")


def report(steps: Iterable[Step], *, as_json: bool, strict: bool = False, column: int = _COLUMN) -> int:
    """Show each step when it is done, or with `as_json` all at the end; return the exit code.

    Those of a service are one line if all is well. `column` is how wide the names are. The exit code is 1 if a step has
    a fault; with `strict`, also if one is unproven.
    """
    show = (lambda _step: None) if as_json else _at_terminal(column) if sys.stdout.isatty() else _plainly(column)
    seen: list[Step] = []
    of_service: list[Step] = []
    for step in steps:
        seen.append(step)
        of_service += [step] if step.service else []
        if not step.service:
            show(step)
        elif step.name.startswith(LAST):
            for line in _lines(of_service):
                show(line)
            of_service.clear()
    ok = not any(step.status == "fault" or (strict and step.status == "unproven") for step in seen)
    if as_json:
        click.echo(
            json.dumps(
                {"ok": ok, "steps": [{name: getattr(step, name) for name in _MEMBERS} for step in seen]}, indent=2
            )
        )
    return 0 if ok else 1


def column_for(services: Iterable[Service]) -> int:
    """Return how wide the names of steps are with these services, of which some may be very long."""
    return min(max(_COLUMN, *(len(service.name) for service in services), 0), 3 * _COLUMN)


def _lines(steps: list[Step]) -> list[Step]:
    """Return what to show of one service: all in one line, or only what is wrong, and not what follows from that."""
    if wrong := [step for step in steps if step.status in ("unproven", "fault")]:
        return wrong
    name, last = steps[0].service, steps[-1]
    if last.status == "skipped":
        return [Step(name, "skipped", last.detail)]
    return [Step(name, "ok", "; ".join(step.brief for step in steps if step.brief))]


def _plainly(column: int) -> Callable[[Step], None]:
    def show(step: Step) -> None:
        remedy = f"; remedy: {step.remedy}" if step.remedy else ""
        click.echo(f"{step.name:<{column}} {step.status:<8} {step.detail}{remedy}")

    return show


def _at_terminal(column: int) -> Callable[[Step], None]:
    from rich.console import Console  # noqa: PLC0415  not needed elsewhere
    from rich.text import Text  # noqa: PLC0415

    console = Console(highlight=False)
    symbols = "✓?✗·" if console.encoding.startswith("utf") else "+?!-"
    styles = {"ok": "green", "unproven": "yellow", "fault": "bold red", "skipped": "dim"}
    marks = {status: (symbol, style) for symbol, (status, style) in zip(symbols, styles.items(), strict=True)}

    def show(step: Step) -> None:
        symbol, style = marks[step.status]
        head = f"{symbol} {step.name:<{column}} "
        console.print(Text.assemble((head, style), wrapped(step.detail, width(), len(head))), soft_wrap=True)
        if step.remedy:
            remedy = f"{'':{len(head)}}{wrapped(step.remedy, width(), len(head))}"
            console.print(Text(remedy, "yellow"), soft_wrap=True)

    return show
