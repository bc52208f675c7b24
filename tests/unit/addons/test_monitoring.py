"""What the proxy tells of itself: the probe, the status and the page agree."""

from typing import Any

import pytest
from mitmproxy.addons.proxyserver import Proxyserver
from mitmproxy.test import taddons

from eoepca_security.errors import CredentialsRejected
from eoepca_security.oauth.protocol import Client, TokenResponse
from eoepca_security.proxy.addons.oidc import OIDCAuthProxy
from eoepca_security.proxy.admin.page import page
from eoepca_security.proxy.config.settings import Settings
from eoepca_security.session.service_tokens import Sources
from eoepca_security.session.source import TokenSource
from tests.support.clock import START, Clock
from tests.support.issuer import Issuer

READY, FAILING = (
    (None, True, "ready", ">Ready</strong>"),
    ("credentials_rejected", False, "failing", ">No token</strong>"),
)


@pytest.fixture
async def context() -> Any:
    with taddons.context(Proxyserver()) as context:
        yield context


async def told(addon: OIDCAuthProxy) -> tuple[bool, str, str]:
    """Return what `/status` says, and the page's headline."""
    status = await addon.monitoring.admin_source().status()
    shown = page(status)
    headline = next(one for one in (READY[3], FAILING[3], ">Starting</strong>") if one in shown)
    return status["ready"], status["state"], headline


async def probed(addon: OIDCAuthProxy) -> str | None:
    """Return the code in the answer of `/readyz`."""
    unready = await addon.monitoring.admin_source().ready(None)
    return unready.code if unready is not None else None


async def test_an_idle_proxy_is_ready_for_the_probe_the_status_and_the_page(context: Any) -> None:
    clock, issuer = Clock(), Issuer()
    issuer.answers = [
        TokenResponse("a", expires_in=60, refresh_expires_in=1800),
        TokenResponse("b", expires_in=60),
        CredentialsRejected("no"),
    ]

    def make_sources(_: Settings, *, hooks: Any, **__: Any) -> Sources:
        source = TokenSource(issuer, refresh_token="first", now=clock, observe=hooks(None).observe)
        return Sources(source, {"default": source})

    addon = OIDCAuthProxy(Settings("https://issuer.example", Client("c")), make_sources=make_sources)
    context.master.addons.add(addon)
    context.options.update(mode=["reverse:https://service.example"])
    assert await told(addon) == (False, "starting", ">Starting</strong>")
    assert (await probed(addon), *await told(addon)) == READY
    assert addon.monitoring.status()["session"] == {"login_needed": "later", "ends_at": START + 1800}

    clock.time += 100
    assert await told(addon) == (True, "idle", ">Ready</strong>")
    assert len(issuer.asked) == 1  # looking at it costs no token
    assert (await probed(addon), *await told(addon)) == READY
    assert len(issuer.asked) == 2

    clock.time += 100
    assert await told(addon) == (True, "idle", ">Ready</strong>")
    assert (await probed(addon), *await told(addon)) == FAILING
