"""OIDC tokens for callers, verified claims for services."""
