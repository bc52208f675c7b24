"""One login: when to refresh it, how it renews itself, where it is kept. May import `issuer` and `oauth`."""
