"""One login: when to refresh it, how to renew it and where to store it. May import `issuer`."""
