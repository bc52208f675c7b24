"""What the proxy decides and how it says so, without I/O and without mitmproxy. May import `config`."""
