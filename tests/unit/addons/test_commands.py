"""The add-on's commands in mitmproxy's own user interfaces."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from mitmproxy.addons.proxyserver import Proxyserver
from mitmproxy.exceptions import CommandError
from mitmproxy.test import taddons

from eoepca_security.errors import CredentialsRejected, IssuerUnavailable
from eoepca_security.oauth.protocol import Client
from eoepca_security.proxy.addons.oidc import OIDCAuthProxy
from eoepca_security.proxy.config.settings import Settings
from eoepca_security.session.service_tokens import Sources
from eoepca_security.session.source import TokenSource
from eoepca_security.session.token_cycle import FORCED_INTERVAL
from tests.support.clock import Clock
from tests.support.issuer import Issuer
from tests.support.waiting import settled


@pytest.fixture
async def context() -> Any:
    with taddons.context(Proxyserver()) as context:
        yield context


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def issuer() -> Issuer:
    return Issuer()


@pytest.fixture
def addon(context: Any, issuer: Issuer, clock: Clock) -> OIDCAuthProxy:
    def make_sources(_: Settings, *, hooks: Any, **__: Any) -> Sources:
        source = TokenSource(issuer, refresh_token="first", now=clock, observe=hooks(None).observe)
        return Sources(source, {"default": source})

    settings = Settings("https://issuer.example", Client("c"), refresh_token="the-refresh-token")
    addon = OIDCAuthProxy(settings, make_sources=make_sources)
    context.master.addons.add(addon)
    context.options.update(mode=["reverse:https://service.example"])
    return addon


@pytest.fixture
def source(addon: OIDCAuthProxy) -> TokenSource:
    assert addon.state.source is not None
    return addon.state.source


async def refresh(context: Any, addon: OIDCAuthProxy) -> None:
    context.master.commands.execute("oidc.refresh")
    assert addon.monitoring._asked is not None
    await addon.monitoring._asked


async def test_a_refresh_gets_another_token_and_tells_of_it(
    context: Any, addon: OIDCAuthProxy, source: TokenSource, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    await source.token()
    await refresh(context, addon)
    assert (await source.token()).value == "token-2"
    assert "new access token for someone (the token does not say), valid for 60 s" in caplog.messages
    assert "token-" not in caplog.text


async def test_without_a_token_a_refresh_gets_the_first(
    context: Any, addon: OIDCAuthProxy, source: TokenSource, issuer: Issuer
) -> None:
    await refresh(context, addon)
    assert source.at_hand is not None
    assert issuer.asked == ["first"]


async def test_refreshes_keep_to_the_limits_and_share_one_that_is_under_way(
    context: Any, addon: OIDCAuthProxy, source: TokenSource, issuer: Issuer, clock: Clock
) -> None:
    await source.token()
    issuer.gate.clear()
    context.master.commands.execute("oidc.refresh")
    first = addon.monitoring._asked
    await settled(lambda: len(issuer.asked) == 2)
    context.master.commands.execute("oidc.refresh")
    assert source.forced_in() == 0
    issuer.gate.set()
    assert first is not None
    assert addon.monitoring._asked is not None
    await asyncio.gather(first, addon.monitoring._asked)
    assert len(issuer.asked) == 2
    clock.time += 10
    with pytest.raises(CommandError, match=r"^no refresh now; try again in 1 min 50 s$"):
        context.master.commands.execute("oidc.refresh")
    assert len(issuer.asked) == 2
    clock.time += FORCED_INTERVAL
    assert source.forced_in() == 0


async def test_a_refresh_that_fails_tells_the_remedy(
    context: Any, addon: OIDCAuthProxy, source: TokenSource, issuer: Issuer, caplog: pytest.LogCaptureFixture
) -> None:
    await source.token()
    issuer.answers = [
        CredentialsRejected("the issuer answered invalid_grant: over; done", issuer_error="invalid_grant")
    ]
    await refresh(context, addon)
    assert (
        "no new access token (credentials_rejected): the issuer answered invalid_grant: over; done; remedy: "
        "run `oidc-proxy login`, which a running proxy picks up"
    ) in caplog.text
    with pytest.raises(CommandError, match=r"the last attempt failed \(credentials_rejected\); try again in "):
        context.master.commands.execute("oidc.refresh")
    [problem] = [line for line in context.master.commands.execute("oidc.status") if line.startswith("remedy: ")]
    assert "login" in problem


async def test_a_first_refresh_that_fails_is_told_too(
    context: Any, addon: OIDCAuthProxy, source: TokenSource, issuer: Issuer, caplog: pytest.LogCaptureFixture
) -> None:
    issuer.answers = [IssuerUnavailable("it is down")]
    await refresh(context, addon)
    assert "remedy: the proxy retries automatically" in caplog.text


async def test_without_settings_the_commands_say_so(
    context: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPEN_ID_CONNECT_URL", raising=False)
    addon = OIDCAuthProxy()
    context.master.addons.add(addon)
    status = context.master.commands.execute("oidc.status")
    assert status[0].startswith("No token")
    assert "The proxy is not configured: its settings are missing or wrong" in status
    with pytest.raises(CommandError, match="not configured"):
        context.master.commands.execute("oidc.refresh")
