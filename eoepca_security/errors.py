"""The errors that this package raises.

::

    SecurityError
    ├── SettingsError          a setting is wrong, missing or contradictory
    ├── StoreError             the session cannot be read from or written to disk
    └── TokenError             no usable access token is available; `code` is part of the public interface
        ├── IssuerUnavailable      the issuer gave no usable answer; retrying may help
        ├── CredentialsRejected    the issuer refused; a person must act
        └── TokenInvalid           the issuer gave a token that must not be used

Messages say what happened and never contain a token or a secret. The remedy depends on who uses the package, so callers
choose it from the attributes and never parse a message.
"""

from typing import ClassVar, Literal

Cause = Literal[
    # The network: see `eoepca_security.issuer.transport.explain`.
    "certificate",
    "ended",
    "no_tls",
    "proxy",
    "refused",
    "timeout",
    "unknown_ca",
    "unknown_host",
    # The issuer is not at the configured URL, or is not the configured issuer.
    "not_there",
    "other_issuer",
    "plain_http",
    "redirect",
    # An environment variable that many programs read, such as one for a proxy, is wrong.
    "environment",
    # The issuer answered 400, 401 or 403 without saying whether it refuses the client, the session, or neither.
    "unclear_refusal",
    # Something is missing: here,
    "no_session",
    "not_configured",
    # There is a session, but of another user than before.
    "other_user",
    # and at the issuer, in the order of a login.
    "no_auth_method",
    "no_device_login",
    "no_browser_login",
    "no_refresh_token",
    "no_id_token",
    # The issuer refuses to exchange the session's access token. This client may not exchange any,
    "no_exchange",
    # because it has no secret or key;
    "public_client",
    # the audience is none that the issuer knows,
    "unknown_audience",
    # or none that this client and user may ask for;
    "no_audience",
    # the access token has ended, or was issued to another client.
    "subject_token",
    # The browser did not come back in time,
    "no_answer",
    # or came back from an issuer that we did not send it to.
    "mix_up",
    # The token's times do not match this machine's clock.
    "clock",
]
"""What happened, where it has a remedy of its own."""


class SecurityError(Exception):
    """Base class of all errors that this package raises."""


class SettingsError(SecurityError, ValueError):
    """One or more settings are wrong; `problems` has one line for each.

    `is_missing` is true when a required setting is unset.
    """

    def __init__(self, *problems: str, is_missing: bool = False) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems
        self.is_missing = is_missing


class StoreError(SecurityError):
    """The token store cannot be read or written. The session can continue in memory."""


class TokenError(SecurityError):
    """No usable access token is available. The subclass says why; `cause` is more specific, or None."""

    code: ClassVar[str]

    def __init__(self, message: str, *, cause: Cause | None = None) -> None:
        super().__init__(message)
        self.cause = cause


class IssuerUnavailable(TokenError):
    """The issuer is unreachable, slow or failing, or its answer does not follow the protocol.

    `retry_after` is the delay that the issuer asked for, in seconds, or None. `was_sent` is true when the request was
    sent but no usable answer came back: the issuer may have processed it. `url` is the requested URL, if known.
    `by_proxy` is true when the request went through a proxy.
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
    """The issuer refused the refresh token or the client, or there is no refresh token.

    `issuer_error` is the issuer's error code (RFC 6749 §5.2) and `description` its text for people, or None.
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

    `claim` names the wrong claim, or is None. `refresh_token` is the refresh token that came with the token. Keep it:
    the previous one may be used up.
    """

    code = "token_invalid"
    refresh_token: str | None = None

    def __init__(self, message: str, *, cause: Cause | None = None, claim: str | None = None) -> None:
        super().__init__(message, cause=cause)
        self.claim = claim
