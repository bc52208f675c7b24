"""Which files the add-on keeps tokens in, and what becomes of them when the services change."""

import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mitmproxy.addons.proxyserver import Proxyserver
from mitmproxy.test import taddons

from eoepca_security.errors import CredentialsRejected, IssuerUnavailable
from eoepca_security.oauth.protocol import TokenResponse
from eoepca_security.proxy.addons.oidc import OIDCAuthProxy
from eoepca_security.proxy.config.services import services_of
from eoepca_security.proxy.config.settings import Service, Settings
from eoepca_security.session.service_tokens import Sources, exchanged_tokens
from eoepca_security.session.source import TokenSource
from tests.support.issuer import Issuer
from tests.support.services import PLAIN, STAC, with_services
from tests.support.state import SETTINGS
from tests.support.waiting import settled


class Proxy:
    """The add-on with services whose tokens have their names, and that of the login."""

    def __init__(self, context: Any, settings: Settings, *, keeps_files: bool = True) -> None:
        self.login = Issuer(lifetime=600)
        self.exchanges: list[str] = []
        self.answers: list[Exception] = []
        self.addon = OIDCAuthProxy(settings, make_sources=self._make_sources, keeps_files=keeps_files)
        context.master.addons.add(self.addon)
        context.options.update(mode=["reverse:https://stac.example"])
        if keeps_files:
            self.addon.token_files.running()

    def _make_sources(self, settings: Settings, *, hooks: Any, login: TokenSource | None = None, **_: Any) -> Sources:
        login = login or TokenSource(self.login, refresh_token="first", observe=hooks(None).observe)

        def exchange(service: Service) -> TokenResponse:
            self.exchanges.append(service.name)
            if self.answers:
                raise self.answers.pop()
            return TokenResponse(f"{service.name}-{service.audience}", expires_in=600)

        def tokens(service: Service) -> Any:
            if settings.services_file is None:
                return login
            return exchanged_tokens(login, lambda _: exchange(service), observe=hooks(service).observe)

        return Sources(login, {service.name: tokens(service) for service in services_of(settings)})

    def change(self, services: Sequence[Service]) -> None:
        """Use other services, as after SIGHUP."""
        state, configuration = self.addon.state, self.addon.addons[0]
        assert state.settings is not None
        assert state.sources is not None
        settings = replace(state.settings, services=tuple(services))
        configuration._use_services(settings, {})
        state.sources = self._make_sources(settings, hooks=configuration._hooks, login=state.sources.login)
        self.addon.token_files.follow()


def contents(folder: Path) -> dict[str, str]:
    """Return the token files by their names."""
    files = {}
    for file in folder.glob("[!.]*"):
        with contextlib.suppress(FileNotFoundError):
            files[file.name] = file.read_text()
    return files


@pytest.fixture
async def context() -> AsyncIterator[Any]:
    with taddons.context(Proxyserver()) as context:
        yield context


def stac(folder: Path, **changes: Any) -> Service:
    return replace(STAC, token_file=folder / "stac", audience="one", **changes)


def plain(folder: Path) -> Service:
    return replace(PLAIN, token_file=folder / "plain")


async def test_each_service_has_its_own_token_in_its_file(context: Any, tmp_path: Path) -> None:
    settings = replace(with_services(stac(tmp_path), plain(tmp_path)), token_file=tmp_path / "login")
    proxy = Proxy(context, settings)
    expected = {"stac": "stac-one", "plain": "plain-None", "login": "token-1"}
    await settled(lambda: contents(tmp_path) == expected)
    await proxy.addon.token_files.done()
    assert contents(tmp_path) == {}


async def test_the_settings_own_file_is_for_the_service_that_they_describe(context: Any, tmp_path: Path) -> None:
    default = Service("default", "https://default.example", audience="own")
    settings = replace(
        with_services(default, plain(tmp_path)), upstream=default.upstream, token_file=tmp_path / "token"
    )
    proxy = Proxy(context, settings)
    await settled(lambda: contents(tmp_path).get("token") == "default-own")
    await proxy.addon.token_files.done()


async def test_without_a_file_of_services_there_is_one_token(context: Any, tmp_path: Path) -> None:
    proxy = Proxy(context, replace(SETTINGS, token_file=tmp_path / "token"))
    await settled(lambda: contents(tmp_path).get("token") == "token-1")
    await proxy.addon.token_files.done()


async def test_of_several_processes_only_one_keeps_files(context: Any, tmp_path: Path) -> None:
    proxy = Proxy(context, replace(SETTINGS, token_file=tmp_path / "token"), keeps_files=False)
    assert proxy.addon.token_files not in proxy.addon.addons
    proxy.addon.token_files.follow()
    assert proxy.addon.state.source is not None
    await proxy.addon.state.source.token()
    assert contents(tmp_path) == {}


async def test_when_the_services_change_their_files_follow(context: Any, tmp_path: Path) -> None:
    proxy = Proxy(context, with_services(stac(tmp_path), plain(tmp_path)))
    await settled(lambda: len(contents(tmp_path)) == 2)
    written = (tmp_path / "plain").stat().st_mtime_ns

    other = replace(PLAIN, name="other", token_file=tmp_path / "other")
    proxy.change([plain(tmp_path), other])
    await settled(lambda: "stac" not in contents(tmp_path) and contents(tmp_path).get("other") == "other-None")
    # What has not changed goes on, without another request.
    assert (tmp_path / "plain").stat().st_mtime_ns == written
    assert proxy.exchanges.count("plain") == 1

    proxy.change([replace(other, audience="two"), plain(tmp_path)])
    await settled(lambda: contents(tmp_path).get("other") == "other-two")
    await proxy.addon.token_files.done()
    assert contents(tmp_path) == {}


async def test_a_file_that_another_service_gets_never_goes_on_with_the_first_ones_token(
    context: Any, tmp_path: Path
) -> None:
    proxy = Proxy(context, with_services(stac(tmp_path), plain(tmp_path)))
    await settled(lambda: len(contents(tmp_path)) == 2)
    swapped = replace(plain(tmp_path), token_file=tmp_path / "stac")
    proxy.answers = [IssuerUnavailable("it is away")]
    proxy.change([swapped])
    await settled(lambda: contents(tmp_path) == {})
    await settled(lambda: contents(tmp_path) == {"stac": "plain-None"})
    await proxy.addon.token_files.done()


async def test_a_rejected_login_costs_all_files_at_once(context: Any, tmp_path: Path) -> None:
    proxy = Proxy(context, with_services(stac(tmp_path), plain(tmp_path)))
    await settled(lambda: len(contents(tmp_path)) == 2)
    proxy.login.answers = [CredentialsRejected("it is over") for _ in range(9)]
    assert proxy.addon.state.source is not None
    with pytest.raises(CredentialsRejected):
        await proxy.addon.state.source.newer("token-1")
    await settled(lambda: contents(tmp_path) == {})
    await proxy.addon.token_files.done()
