"""The processes that serve: mitmdump in this one or in several, their logs and folders. May import `addons`."""
