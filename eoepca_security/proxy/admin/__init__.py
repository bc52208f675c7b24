"""The admin listener: status page, metrics, probes and shutdown. May import `policy`."""
