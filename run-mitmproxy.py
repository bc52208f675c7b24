#!/usr/bin/env python3
"""The launcher: `run-mitmproxy.py [serve|check|login|logout|token|demo] [-- mitmdump arguments]`."""

import os
import signal
import sys

for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
    if getattr(sys, name) is None:  # closed: otherwise the next opened file takes its number
        os.open(os.devnull, os.O_RDWR)
        setattr(sys, name, open(descriptor, "r" if descriptor == 0 else "w"))  # noqa: SIM115, PTH123

if not {"check", "demo", "login", "logout", "token"}.intersection(sys.argv):
    # The proxy has nothing to shut down yet. It installs its own handlers later.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
elif os.getpid() == 1:
    # The kernel ignores signals without a handler for a container's first process, so `docker stop` would time out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))

try:
    from eoepca_security.proxy.cli.main import main
except KeyboardInterrupt:
    sys.exit(130)
except ModuleNotFoundError as error:
    command = " ".join(["uv run --no-dev --extra proxy run-mitmproxy.py", *sys.argv[1:2]])
    sys.exit(f"a dependency of the proxy is not installed ({error.name}): run it as `{command}`")

sys.exit(main())
