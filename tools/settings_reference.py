"""Write what is made from the settings' descriptions: `.env.example` and `docs/settings.md`."""

import re
import textwrap
from pathlib import Path
from typing import Final

from eoepca_security.proxy.config.variables import GROUPS, VARIABLES, Variable

ROOT: Final = Path(__file__).parent.parent

ENV_HEAD: Final = """\
# Settings of run-mitmproxy.py (and of mitmproxy-oidc-addon.py). Copy this file to .env and fill it in.
#
# Order: an add-on option (--set), then the environment, then .env in the working directory. Empty counts as unset.
# Put 'single quotes' around a value that has spaces or a #. (Not for docker's --env-file, which
# takes the quotes, too, for part of the value.) Lines that begin with # show the defaults.
# A variable marked (secret) can be read from a file instead: append _FILE to its name, e.g.
# OPEN_ID_REFRESH_TOKEN_FILE=/run/secrets/refresh-token
# The same as a page: docs/settings.md. Both are written by tools/settings_reference.py.
"""

PAGE_HEAD: Final = """\
# Settings

<!-- Made by `uv run tools/settings_reference.py` from eoepca_security/proxy/config/variables.py: change it there. -->

A setting is looked for in three places, and the first that has it counts:

1. an option of the add-on, `--set name=value`: with `mitmdump -s mitmproxy-oidc-addon.py`, or behind `--` with the
   launcher;
2. the environment;
3. `.env` in the folder that the proxy is started in. `.env.example` has all of them, to be copied.

An empty value counts as none. In `.env`, put 'single quotes' around one that has spaces or
a `#`. (Not for docker's `--env-file`, which takes the quotes, too, for part of the value.)

**Secrets** can be read from a file instead: append `_FILE` to the variable's name, as in
`OPEN_ID_REFRESH_TOKEN_FILE=/run/secrets/refresh-token`. Prefer that, or the environment, to `--set`, which shows in the
process list.

What is wrong ends the start with exit code 2 and a line for each problem, which names the variable and what to do. A
name that looks like one of these but is not is told of, too. `run-mitmproxy.py check` tries whether the settings work.

"""


def env_example() -> str:
    """Return the text of `.env.example`."""
    parts = [ENV_HEAD]
    for group, variables in GROUPS.items():
        parts.append(f"# --- {group} ".ljust(119, "-") + "\n")
        parts += [_env_block(variable) for variable in variables]
    return "\n".join(parts)


def settings_page() -> str:
    """Return the text of `docs/settings.md`."""
    rows = "".join(
        f"| [`{variable.env}`](#{variable.env.lower()}) | {_code(variable.option)} | {_default(variable)} |\n"
        for variable in VARIABLES
    )
    sections = "".join(
        f"\n## {group}\n" + "".join(_page_section(variable) for variable in variables)
        for group, variables in GROUPS.items()
    )
    return f"{PAGE_HEAD}| variable | add-on option | default |\n|---|---|---|\n{rows}{sections}"


def _env_block(variable: Variable) -> str:
    marks = ("Required. " if variable.required else "") + ("(secret) " if variable.secret else "")
    comment = textwrap.fill(
        f"{marks}{variable.help} {variable.more}".rstrip(),
        120,
        initial_indent="# ",
        subsequent_indent="# ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    # A comment, so that a container's own values stand when a copy of the file is its environment.
    shown = f"#{variable.env}={variable.default}" if variable.default else f"{variable.env}="
    return f"{comment}\n{shown}\n"


def _page_section(variable: Variable) -> str:
    marks = ["Required"] if variable.required else []
    marks += [f"Default: {_code(variable.default)}"] if variable.default else []
    marks += [f"Add-on option: {_code(variable.option)}"] if variable.option else []
    marks += [f"Secret: also as {_code(variable.env + '_FILE')}"] if variable.secret else []
    text = _linked(f"{variable.help} {variable.more}".rstrip(), variable)
    return f"\n### `{variable.env}`\n\n" + (f"*{' · '.join(marks)}*\n\n" if marks else "") + f"{text}\n"


def _default(variable: Variable) -> str:
    return "required" if variable.required else _code(variable.default)


def _code(text: str | None) -> str:
    return f"`{text}`" if text else ""


def _linked(text: str, here: Variable) -> str:
    """Return a description with the settings that it names as links."""
    others = "|".join(other.env for other in VARIABLES if other is not here)
    return re.sub(rf"\b({others})\b", lambda match: f"[`{match[0]}`](#{match[0].lower()})", text)


if __name__ == "__main__":
    (ROOT / ".env.example").write_text(env_example(), encoding="utf-8")
    (ROOT / "docs" / "settings.md").write_text(settings_page(), encoding="utf-8")
