"""The part of `check` that goes through the services of a file: each gets its own token, and its own faults."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from eoepca_security.errors import CredentialsRejected, IssuerUnavailable, TokenError
from eoepca_security.issuer.provider import Provider
from eoepca_security.issuer.threads import in_thread
from eoepca_security.oauth.text import identity, printable
from eoepca_security.oauth.verify import unverified_claims
from eoepca_security.proxy.cli.service_steps import check_audience, check_upstream
from eoepca_security.proxy.cli.steps import SERVICE_STEPS, NotOk, Step, not_tried
from eoepca_security.proxy.config.settings import Service, Settings
from eoepca_security.proxy.policy.remedies import (
    CHECK_CLIENT,
    known_remedy,
    login_scope_remedy,
    narrowing_services,
    widening_remedy,
)
from eoepca_security.proxy.runtime.output import waiting
from eoepca_security.session.service_tokens import Sources
from eoepca_security.session.session import AccessToken

AT_ONCE: Final = 8
"""How many services are looked at at a time."""

TOTAL: Final = 120.0
"""The time limit in seconds for all services together."""

_LASTING: Final = frozenset({"openid", "offline_access"})
"""Scopes that each refresh keeps, and that issuers may leave out of what they name."""


@dataclass(frozen=True)
class Login:
    """The login that the services share: its sources, and the token that it just got."""

    provider: Provider
    sources: Sources
    token: AccessToken = field(repr=False)
    in_container: bool


def skip_services(settings: Settings, cause: str) -> Iterator[Step]:
    """Yield the steps of each service, none of which is tried because of the fault of the step `cause`."""
    for service in settings.services:
        for step in SERVICE_STEPS:
            yield not_tried(f"{step}:{service.name}", cause)


def check_services(settings: Settings, login: Login) -> Iterator[Step]:
    """Check several services at a time, and yield their steps in the order of the settings.

    A last step, `scope`, is about the issuer where services have tokens of narrower scopes.
    """
    with asyncio.Runner() as runner:
        run = _Services(settings, login)
        try:
            tasks = runner.run(run.start())
            for service, task in tasks.items():
                with waiting(f"waiting for {service.name}"):
                    steps = runner.run(_result(task))
                yield from steps
            if settings.grant == "refresh_token" and narrowing_services(settings):
                with waiting("waiting for the identity provider"):
                    step = runner.run(run.widening())
                yield step
        finally:
            # A running refresh may get the only valid refresh token.
            runner.run(login.sources.login.finish())
            login.sources.login.retire()


async def _result(task: "asyncio.Task[list[Step]]") -> list[Step]:
    return await task


class _Services:
    def __init__(self, settings: Settings, login: Login) -> None:
        self._settings = settings
        self._login = login
        self._turns = asyncio.Semaphore(AT_ONCE)
        # Refreshes go one after the other, and the wait for the others must not count.
        self._refreshes = asyncio.Lock()
        self._scope = settings.scope or login.sources.login.session.scope
        self._narrow: dict[Service, AccessToken] = {}

    async def start(self) -> "dict[Service, asyncio.Task[list[Step]]]":
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + TOTAL
        return {service: loop.create_task(self._steps(service, ends_at)) for service in self._settings.services}

    async def _steps(self, service: Service, ends_at: float) -> list[Step]:
        settings, login = self._settings, self._login
        token = AccessToken("", 0, 0)

        async def get_token() -> tuple[str, str]:
            nonlocal token
            token = await self._token(service)
            return _describe(service, token)

        async def audience() -> tuple[str, str]:
            try:
                return await in_thread(lambda: check_audience(settings, service, login.provider, token)), ""
            except IssuerUnavailable as error:
                raise NotOk(str(error), self._remedy(error, None)) from None

        async def upstream() -> tuple[str, str]:
            said = await in_thread(lambda: check_upstream(settings, service, token, in_container=login.in_container))
            return said, said.removeprefix(f"{service.upstream}{service.path}{settings.endpoint} ")

        steps: list[Step] = []
        cause = None
        async with self._turns:
            for name, look in zip(SERVICE_STEPS, (get_token, audience, upstream), strict=True):
                step = await _step(f"{name}:{service.name}", cause, look, ends_at)
                steps.append(step)
                cause = step.name if step.status == "fault" else cause
        return steps

    async def _token(self, service: Service) -> AccessToken:
        source = self._login.sources.services[service.name]
        try:
            if service.token not in ("scope", "resource"):
                return await source.token()
            async with self._refreshes:
                token = await source.token()
        except TokenError as error:
            whose = service if self._login.sources.is_own(error, service.name) else None
            raise NotOk(str(error), self._remedy(error, whose)) from None
        if service.token == "scope":  # noqa: S105  the kind of token
            self._narrow[service] = token
        return token

    def _remedy(self, error: TokenError, service: Service | None) -> str:
        known = known_remedy(error, self._settings, service, in_container=self._login.in_container)
        return known or ("try again later" if isinstance(error, IssuerUnavailable) else CHECK_CLIENT)

    async def widening(self) -> Step:
        """Return whether the issuer gives all scopes of the login again after a refresh for fewer."""
        try:
            return Step("scope", "ok", await self._widen())
        except NotOk as result:
            return result.step("scope")

    async def _widen(self) -> str:
        settings, session = self._settings, self._login.sources.login.session
        narrowing = narrowing_services(settings)
        wanted = {name for service in narrowing for name in str(service.scope).split()}
        if self._scope is not None and (lacks := wanted - _scopes(self._scope)):
            raise NotOk(f"the login is without {_list(lacks)}", login_scope_remedy(settings), status="unproven")
        if not self._narrow:
            raise NotOk("not compared, because there is no token of a narrower scope", status="skipped")
        service, token = next(iter(self._narrow.items()))
        after = f"after a refresh for {service.scope}"
        try:
            # The token may be a stored one, so make sure that the last refresh is one for less.
            await self._login.sources.services[service.name].newer(token.value)
            # It has limits of its own. Nobody may cut it short: it may get the only valid refresh token.
            wide = await in_thread(lambda: session.renew(None))
        except CredentialsRejected as error:
            if error.issuer_error != "invalid_scope":
                raise NotOk(f"{after}: {error}", self._remedy(error, None)) from None
            remedy = widening_remedy(settings, narrowing)
            raise NotOk(f"{after}, the issuer refuses the login's scopes", remedy, status="unproven") from None
        except TokenError as error:
            raise NotOk(f"not compared, because {error}", status="skipped") from None
        lost = _scopes(_claim(self._login.token)) - _scopes(_claim(wide))
        if self._scope is not None:
            lost |= _scopes(self._scope) - _scopes(session.scope or self._scope)
        if lost - _LASTING:
            remedy = widening_remedy(settings, narrowing)
            raise NotOk(f"{after}, the login's token is without {_list(lost)}", remedy, status="unproven")
        return f"{after}, the issuer gives all scopes of the login again"


async def _step(name: str, cause: str | None, look: Callable[[], Awaitable[tuple[str, str]]], ends_at: float) -> Step:
    if cause is not None:
        return not_tried(name, cause)
    try:
        async with asyncio.timeout_at(ends_at):
            detail, brief = await look()
            return Step(name, "ok", detail, brief=brief)
    except NotOk as result:
        return result.step(name)
    except TimeoutError:
        remedy = "fix the faults of the others first, and check again"
        return Step(name, "fault", f"not finished: all services together took over {TOTAL:g} s", remedy)


def _describe(service: Service, token: AccessToken) -> tuple[str, str]:
    """Return what the token is, and the same in brief."""
    lifetime = f"valid for {token.ends_at - token.obtained_at:.0f} s"
    kind = service.credential if service.credential != "access_token" else service.token
    what = {
        "shared": "the login's token",
        "id_token": "the login's ID token",
        "exchange": "by exchange",
        "scope": f"for the scope {service.scope}",
        "resource": f"for the resource {service.resource}",
    }[kind]
    audience = f", for {service.audience}" if service.audience is not None else ""
    return (
        f"{printable(what)}, for {identity(unverified_claims(token.value))}, {lifetime}",
        printable(f"{what}{audience}"),
    )


def _scopes(scope: str | None) -> set[str]:
    return set((scope or "").split())


def _claim(token: AccessToken) -> str | None:
    """Return the token's own scope (RFC 9068 §2.2.3), which may be less than what the issuer's answer says."""
    scope = unverified_claims(token.value).get("scope")
    return scope if isinstance(scope, str) else None


def _list(scopes: set[str]) -> str:
    return printable(" ".join(sorted(scopes - _LASTING)))
