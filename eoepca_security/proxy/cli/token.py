"""`token`: gets one token, or keeps a current one in a file without a proxy."""

import asyncio
import logging
import signal
from pathlib import Path
from typing import Final

from eoepca_security.errors import CredentialsRejected, SettingsError, TokenError
from eoepca_security.proxy.config.factory import Hooks, make_source, make_sources
from eoepca_security.proxy.config.settings import Service, Settings
from eoepca_security.proxy.policy.remedies import command_remedy, failure_remedy, runs_in_container, told
from eoepca_security.proxy.runtime.output import say
from eoepca_security.session.service_tokens import Sources
from eoepca_security.session.session import AccessToken
from eoepca_security.session.token_cycle import TokenCycle
from eoepca_security.session.token_file import TokenFile, TokenFileKeeper, place_problem

LOGGER: Final = logging.getLogger("eoepca_security.session.token_cycle")
"""Tells of attempts that fail, on standard error."""

_END: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Tokens:
    """The tokens of a service, or the login's own if that is None, and the remedies for their errors."""

    def __init__(self, settings: Settings, service: Service | None) -> None:
        self._settings = settings
        self._service = service
        self.sources: Sources
        self.own: TokenCycle
        hooks = Hooks(describe=self._describe)
        if service is None:
            login = make_source(settings, hooks=hooks)
            self.sources, self.own = Sources(login, {}), login
        else:
            self.sources = make_sources(settings, hooks=lambda _: hooks)
            self.own = self.sources.services[service.name]

    def remedy(self, error: TokenError, settings: Settings, *, in_container: bool) -> str:
        """Like `remedies.command_remedy`."""
        return command_remedy(error, settings, self._whose(error), in_container=in_container)

    def _describe(self, error: TokenError) -> str:
        remedy = failure_remedy(error, self._settings, self._whose(error), in_container=runs_in_container())
        return told(error, remedy)

    def _whose(self, error: TokenError) -> Service | None:
        service = self._service
        return service if service is not None and self.sources.is_own(error, service.name) else None

    async def fresh(self) -> AccessToken:
        """Return a new token."""
        try:
            return await self.own.token()
        finally:
            # A running refresh may get the only valid refresh token.
            await self.sources.login.finish()

    async def watch(self, file: TokenFile) -> None:
        """Keep a current token in the file until a signal; then remove it.

        Raises CredentialsRejected if the first one is refused. Later, it waits for a new login.
        """
        end = asyncio.Event()
        for number in _END:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                asyncio.get_running_loop().add_signal_handler(number, end.set)
        keeper = TokenFileKeeper(file, self.own, self.sources.login, margin=self._settings.token_file_margin)
        keeper.start()
        try:
            await self._until_first(end)
            if not end.is_set():
                say(f"keeping a current token in {file.path}; Ctrl-C ends that, and removes it", err=True)
            await end.wait()
        finally:
            await keeper.stop()
            await self.sources.login.finish()

    async def _until_first(self, end: asyncio.Event) -> None:
        """Wait for the first token, an error or the end. Raises CredentialsRejected, of which the caller tells."""
        LOGGER.addFilter(_is_no_rejection)
        first, ended = asyncio.ensure_future(self.own.token()), asyncio.ensure_future(end.wait())
        try:
            await asyncio.wait({first, ended}, return_when=asyncio.FIRST_COMPLETED)
            if first.done() and isinstance(error := first.exception(), CredentialsRejected):
                raise error
        finally:
            LOGGER.removeFilter(_is_no_rejection)
            first.cancel()
            ended.cancel()


def file_at(place: str, settings: Settings) -> TokenFile:
    """Return the file of `--file`; raises SettingsError for a bad place."""
    path = Path(place).absolute()
    if problem := place_problem(path):
        raise SettingsError(f"--file: {problem}")
    return TokenFile(path, settings.token_file_mode)


def _is_no_rejection(record: logging.LogRecord) -> bool:
    return not isinstance(getattr(record, "error", None), CredentialsRejected)
