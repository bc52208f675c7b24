#!/usr/bin/env python3
"""The launcher: `run-mitmproxy.py [serve|check|exec|login|logout|token|demo] [-- mitmdump arguments]`."""

from eoepca_security.proxy.cli.launch import main

main()
