"""Starts the command. Imports the rest only when signals are taken care of."""

import os
import signal
import sys
from typing import Final, NoReturn

COMMANDS: Final = ("check", "demo", "exec", "login", "logout", "token")
"""The commands that do not run the proxy for others."""


def main() -> None:
    """Run the command line, and exit with its code."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # closed: otherwise the next opened file takes its number
            os.open(os.devnull, os.O_RDWR)
            vars(sys)[name] = open(descriptor, "r" if descriptor == 0 else "w")  # noqa: SIM115, PTH123

    if sys.platform == "win32":
        _refuse("this needs a POSIX system: on Windows, use a container or the Windows Subsystem for Linux (WSL)")

    if not set(COMMANDS).intersection(sys.argv):
        # The proxy has nothing to shut down yet. It installs its own handlers later.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: sys.exit(0))
    elif os.getpid() == 1:
        # The kernel ignores signals without a handler for a container's first process, so `docker stop` would time out.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))

    try:
        from eoepca_security.proxy.cli.main import main as run  # noqa: PLC0415  only now

        code = run()
    except KeyboardInterrupt:
        sys.exit(130)
    except ModuleNotFoundError as error:
        _refuse(_what_is_missing(error))
    sys.exit(code)


def _refuse(message: str) -> NoReturn:
    sys.stderr.write(f"{message}\n")
    sys.exit(2)


def _what_is_missing(error: ModuleNotFoundError) -> str:
    from eoepca_security.proxy.config.command import LAUNCHER, this_command  # noqa: PLC0415  not needed elsewhere

    command = this_command(in_container=False).text
    if command.endswith(LAUNCHER):
        remedy = f"run it as `uv run --no-dev --extra proxy {' '.join([LAUNCHER, *sys.argv[1:2]])}`"
    else:
        remedy = "install it, in the folder of the source with `uv tool install '.[proxy]'`"
    return f"{command} needs the extra `proxy`, which is not installed ({error.name} is missing): {remedy}"
