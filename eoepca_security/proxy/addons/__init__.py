"""What mitmproxy calls: public hooks only. May import `patches`, `admin` and `policy`."""
