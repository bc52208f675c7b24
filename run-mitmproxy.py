#!/usr/bin/env python3
"""The launcher: `run-mitmproxy.py [serve|token|demo] [-- mitmdump arguments]`."""

import sys

from eoepca_security.proxy.launcher import main

sys.exit(main())
