"""Settings, and what the proxy builds from them: provider, store and token source. May import `session`."""
