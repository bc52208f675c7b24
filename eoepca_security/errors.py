"""What can go wrong, as one small tree.

::

    SecurityError
    ├── SettingsError          a setting is wrong, missing or contradictory
    ├── StoreError             the session cannot be kept on disk
    └── TokenError             there is no access token to give; has a `code` of the public interface
        ├── IssuerUnavailable      the issuer did not answer, or not sensibly; trying again may help
        ├── CredentialsRejected    the issuer answered "no"; a person has to act
        └── TokenInvalid           the issuer gave a token that must not be used

Messages name the remedy and never contain a token or a secret.
"""

from typing import ClassVar


class SecurityError(Exception):
    """Base of every error that this package raises on purpose."""


class SettingsError(SecurityError, ValueError):
    """One or more settings are wrong; `problems` has a line for each."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class StoreError(SecurityError):
    """The token store cannot be read or written; the session can go on in memory."""


class TokenError(SecurityError):
    """There is no usable access token, for the reason that the subclass names."""

    code: ClassVar[str]


class IssuerUnavailable(TokenError):
    """The issuer is unreachable, slow, failing, or not speaking its protocol.

    `retry_after` is what the issuer asked for, in seconds, or None. `was_sent` says that the request had left and no
    sensible answer came, so that it may have been served all the same. `cause` names what kept the network from it, as
    `eoepca_security.issuer.transport.explain` does, or is None; `by_proxy` says that the way led through a proxy.
    """

    code = "issuer_unavailable"

    def __init__(
        self,
        message: str,
        *,
        retry_after: float | None = None,
        was_sent: bool = False,
        cause: str | None = None,
        by_proxy: bool = False,
    ) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.was_sent = was_sent
        self.cause = cause
        self.by_proxy = by_proxy


class CredentialsRejected(TokenError):
    """The issuer refused the refresh token or the client (RFC 6749 §5.2); `error` is its error code, or None."""

    code = "credentials_rejected"

    def __init__(self, message: str, *, error: str | None = None) -> None:
        super().__init__(message)
        self.error = error


class TokenInvalid(TokenError):
    """A token fails a check: shape, signature, issuer, audience or time.

    `claim` is the claim that is wrong, where one is. `refresh_token` is the one that came with the token: it must
    not be lost, as the one before may be used up.
    """

    code = "token_invalid"
    refresh_token: str | None = None

    def __init__(self, message: str, *, claim: str | None = None) -> None:
        super().__init__(message)
        self.claim = claim
