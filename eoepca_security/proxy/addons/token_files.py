"""Keeps the files that the settings want tokens in, for programs that no proxy reaches."""

import asyncio
from pathlib import Path
from typing import NamedTuple

from eoepca_security.proxy.addons.state import State
from eoepca_security.proxy.config.settings import Service, Settings
from eoepca_security.session.token_file import TokenFile, TokenFileKeeper


class _Wanted(NamedTuple):
    """Whose token a file has (None is the login's own), and how. If anything differs, it is another file."""

    service: Service | None
    login: tuple[str | None, ...]
    mode: int
    margin: int


class TokenFiles:
    """Keeps the token files of the settings while the proxy runs, whether or not there are requests."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._kept: dict[Path, tuple[_Wanted, TokenFileKeeper]] = {}
        self._ending: dict[Path, asyncio.Task[None]] = {}
        self._is_running = False

    def running(self) -> None:
        """Begin."""
        self._is_running = True
        self.follow()

    def follow(self) -> None:
        """Keep the files of the settings that are in force now, and remove all others."""
        if not self._is_running:
            return
        state = self._state
        wanted = self._wanted(state.settings) if state.settings is not None else {}
        for path, (before, _) in tuple(self._kept.items()):
            if wanted.get(path) != before:
                self._stop(path)
        for path, want in wanted.items():
            tokens = state.tokens_of(want.service) if want.service is not None else state.source
            if tokens is None or state.source is None:
                continue
            if path in self._kept:
                self._kept[path][1].use(tokens, state.source)
            else:
                keeper = TokenFileKeeper(TokenFile(path, want.mode), tokens, state.source, margin=want.margin)
                self._kept[path] = want, keeper
                keeper.start(after=self._ending.get(path))

    def refreshed(self) -> None:
        """Look at the tokens: there has been an attempt to get one."""
        for _, keeper in self._kept.values():
            keeper.wake()

    def done(self) -> "asyncio.Future[list[None]]":
        """Remove the files. This is not a coroutine function, for the same reason as `Lifecycle.done`."""
        self._is_running = False
        for path in tuple(self._kept):
            self._stop(path)
        return asyncio.gather(*self._ending.values())

    def _stop(self, path: Path) -> None:
        _, keeper = self._kept.pop(path)
        self._ending[path] = keeper.stop()

    def _wanted(self, settings: Settings) -> dict[Path, _Wanted]:
        files = {service.token_file: service for service in settings.services}
        # The settings without a file describe a service, too. Otherwise their file is for the login's own token.
        own = self._state.default if settings.services_file is None or settings.upstream is not None else None
        wanted: dict[Path | None, Service | None] = {**files, settings.token_file: own}
        return {
            path: _Wanted(service, settings.login, settings.token_file_mode, settings.token_file_margin)
            for path, service in wanted.items()
            if path is not None
        }
