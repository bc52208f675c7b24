"""The proxy's wings. `policy` and `config`, and what is below them, do without mitmproxy."""
