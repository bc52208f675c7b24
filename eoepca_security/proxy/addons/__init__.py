"""The mitmproxy add-ons, which use public hooks only. May import `patches` and `admin`."""
