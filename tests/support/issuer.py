"""An issuer as a function, for tests of what asks for tokens and when."""

import threading

from eoepca_security.oauth.protocol import TokenResponse


class Issuer:
    """Gives numbered tokens; `answers`, when there are any, come first."""

    def __init__(self, lifetime: float = 60) -> None:
        self.lifetime = lifetime
        self.asked: list[str | None] = []
        self.answers: list[TokenResponse | Exception] = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, refresh_token: str | None) -> TokenResponse:
        self.asked.append(refresh_token)
        assert self.gate.wait(10)
        if self.answers:
            answer = self.answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer
        return TokenResponse(f"token-{len(self.asked)}", expires_in=self.lifetime)
