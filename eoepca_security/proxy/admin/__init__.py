"""The admin listener: status page, metrics, probes, the off switch. May import `policy` and `config`."""
