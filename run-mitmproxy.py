#!/usr/bin/env python3
"""The launcher: `run-mitmproxy.py [serve|token|demo] [-- mitmdump arguments]`."""

import sys

try:
    from eoepca_security.proxy.launcher import main
except KeyboardInterrupt:
    sys.exit(130)
except ModuleNotFoundError as error:
    sys.exit(f"{error.name} is not installed: run this with `uv run --no-dev --extra proxy run-mitmproxy.py`")

sys.exit(main())
