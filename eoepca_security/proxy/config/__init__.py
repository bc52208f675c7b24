"""Settings, and what is made from them: a provider, a store, a token source. May import `session`."""
