"""The commands, one file each. May import `runtime`, and `testing` for the demo."""
