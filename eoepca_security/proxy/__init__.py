"""The proxy: everything that knows mitmproxy."""
