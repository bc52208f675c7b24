"""The commands, one file each. May import every other wing, and `testing` for the demo."""
