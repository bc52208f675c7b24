"""OAuth 2.0 and OpenID Connect messages and tokens, without I/O. May import `errors`."""
