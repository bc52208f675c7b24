"""Runs mitmdump in one process or several, with their logs and folders. May import `addons`."""
