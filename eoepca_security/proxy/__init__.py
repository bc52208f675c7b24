"""The proxy: everything that depends on mitmproxy."""
