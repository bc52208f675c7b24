"""What can go wrong, as one small tree.

::

    SecurityError
    ├── SettingsError          a setting is wrong, missing or contradictory
    ├── StoreError             the session cannot be kept on disk
    └── TokenError             there is no access token to give; has a `code` of the public interface
        ├── IssuerUnavailable      the issuer did not answer, or not sensibly; trying again may help
        ├── CredentialsRejected    the issuer answered "no"; a person has to act
        └── TokenInvalid           the issuer gave a token that must not be used

A message says what happened, without a token or a secret. What to do about it depends on who uses the package, so the
attributes have what is needed to say that; none has to be read out of a message.
"""

from typing import ClassVar, Literal

Cause = Literal[
    # The network kept us from the issuer, as `eoepca_security.issuer.transport.explain` finds.
    "certificate",
    "ended",
    "no_tls",
    "proxy",
    "refused",
    "timeout",
    "unknown_ca",
    "unknown_host",
    # The issuer is not where, or not what, it was said to be.
    "not_there",
    "other_issuer",
    "plain_http",
    "redirect",
    # It answered 400, 401 or 403 without saying whether that refuses the client, the session, or neither.
    "unclear_refusal",
    # Something that is needed is missing: here,
    "no_session",
    "not_configured",
    # and at the issuer, in the order of a login.
    "no_auth_method",
    "no_device_login",
    "no_browser_login",
    "no_refresh_token",
    # The browser came back from an issuer that it was not sent to.
    "mix_up",
    # The token's times do not fit this machine's clock.
    "clock",
]
"""What happened, where something particular can be done about it."""


class SecurityError(Exception):
    """Base of every error that this package raises on purpose."""


class SettingsError(SecurityError, ValueError):
    """One or more settings are wrong; `problems` has a line for each.

    `is_missing` says that a required one is unset.
    """

    def __init__(self, *problems: str, is_missing: bool = False) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems
        self.is_missing = is_missing


class StoreError(SecurityError):
    """The token store cannot be read or written; the session can go on in memory."""


class TokenError(SecurityError):
    """There is no usable access token, for the reason that the subclass names; `cause` is more exact, or None."""

    code: ClassVar[str]

    def __init__(self, message: str, *, cause: Cause | None = None) -> None:
        super().__init__(message)
        self.cause = cause


class IssuerUnavailable(TokenError):
    """The issuer is unreachable, slow, failing, or not speaking its protocol.

    `retry_after` is what the issuer asked for, in seconds, or None. `was_sent` says that the request had left and no
    sensible answer came, so that it may have been served all the same. `url` is what was asked, where that is known;
    `by_proxy` says that the way led through a proxy.
    """

    code = "issuer_unavailable"

    def __init__(
        self,
        message: str,
        *,
        retry_after: float | None = None,
        was_sent: bool = False,
        cause: Cause | None = None,
        url: str | None = None,
        by_proxy: bool = False,
    ) -> None:
        super().__init__(message, cause=cause)
        self.retry_after = retry_after
        self.was_sent = was_sent
        self.url = url
        self.by_proxy = by_proxy


class CredentialsRejected(TokenError):
    """The issuer refused the refresh token or the client, or there is none.

    `issuer_error` is the issuer's error code (RFC 6749 §5.2), `description` what it says to people; None where it said
    nothing.
    """

    code = "credentials_rejected"

    def __init__(
        self,
        message: str,
        *,
        cause: Cause | None = None,
        issuer_error: str | None = None,
        description: str | None = None,
    ) -> None:
        super().__init__(message, cause=cause)
        self.issuer_error = issuer_error
        self.description = description


class TokenInvalid(TokenError):
    """A token fails a check: shape, signature, issuer, audience or time.

    `claim` is the claim that is wrong, where one is. `refresh_token` is the one that came with the token: it must
    not be lost, as the one before may be used up.
    """

    code = "token_invalid"
    refresh_token: str | None = None

    def __init__(self, message: str, *, cause: Cause | None = None, claim: str | None = None) -> None:
        super().__init__(message, cause=cause)
        self.claim = claim
