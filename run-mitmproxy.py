#!/usr/bin/env python3
"""The launcher: `run-mitmproxy.py [serve|check|login|logout|token|demo] [-- mitmdump arguments]`."""

import os
import signal
import sys

if __debug__ and __name__ == "__main__":
    # mitmproxy checks the types of all that it handles, which takes a third of its time; -O leaves that out.
    os.execv(sys.executable, [sys.executable, "-O", *sys.orig_argv[1:]])  # noqa: S606  there is no shell on purpose

if os.getpid() == 1:
    # A container's first process: a signal that it has no handler for is lost, and whoever stops it would wait in vain.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))

try:
    from eoepca_security.proxy.launcher import main
except KeyboardInterrupt:
    sys.exit(130)
except ModuleNotFoundError as error:
    sys.exit(
        f"not all that the proxy needs is installed ({error.name} is missing): run this with "
        "`uv run --no-dev --extra proxy run-mitmproxy.py`"
    )

sys.exit(main())
