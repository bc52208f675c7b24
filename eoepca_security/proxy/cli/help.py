"""The help of the commands: summaries in full, and examples that can be copied."""

import inspect
from collections.abc import Sequence
from typing import Any

import click

Examples = Sequence[tuple[str, str]]
"""Arguments of this program, and what they are for."""


class Command(click.Command):
    """A command with examples. `{command}` in its examples is how this program was called."""

    def __init__(self, *positional: Any, examples: Examples = (), **named: Any) -> None:
        super().__init__(*positional, **named)
        self._examples = examples

    def get_short_help_str(self, limit: int = 45) -> str:
        """Return the first line of the help, in full."""
        return inspect.cleandoc(self.help or "").partition("\n")[0]

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the epilog and the examples, which are never wrapped."""
        super().format_epilog(ctx, formatter)
        called = ctx.find_root().info_name or ""
        lines = [
            (line.replace("{command}", called) if "{command}" in line else f"{called} {line}".rstrip(), comment)
            for line, comment in self._examples
        ]
        width = max((len(line) for line, comment in lines if comment), default=0)
        title = "Examples" if len(lines) > 1 else "Example"
        write_lines(formatter, title, [f"{line:{width}}  {comment}".rstrip() for line, comment in lines])


class Group(Command, click.Group):
    """A group of commands with examples."""


def write_lines(formatter: click.HelpFormatter, title: str, lines: Sequence[str]) -> None:
    """Write a section of lines as they are."""
    if not lines:
        return
    with formatter.section(title):
        for line in lines:
            formatter.write(f"{'':{formatter.current_indent}}{line}\n")
