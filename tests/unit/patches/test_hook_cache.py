"""mitmproxy's add-on manager, with a memory: the same hooks in the same order, whatever happens to the add-ons."""

import logging
from typing import Any

import pytest
from mitmproxy.addonmanager import AddonManager
from mitmproxy.exceptions import AddonHalt
from mitmproxy.http import HTTPFlow
from mitmproxy.options import Options
from mitmproxy.proxy.layers.http._hooks import HttpRequestHook, HttpResponseHook
from mitmproxy.test import tflow
from mitmproxy.tools.dump import DumpMaster

from eoepca_security.proxy.patches.hook_cache import _IDLES_WITHOUT, CachedAddonManager, cache_hooks

calls: list[str] = []


class Addon:
    def __init__(self, name: str, failure: Exception | None = None, addons: list[Any] | None = None) -> None:
        self.name = name
        self.failure = failure
        self.addons = addons or []

    def request(self, flow: HTTPFlow) -> None:
        calls.append(self.name)
        if self.failure is not None:
            raise self.failure


class AsyncAddon(Addon):
    async def request(self, flow: HTTPFlow) -> None:  # type: ignore[override]
        super().request(flow)


@pytest.fixture(params=[True, False], ids=["with a memory", "mitmproxy's own"])
async def master(request: pytest.FixtureRequest) -> Any:
    """A master of each kind: what holds for one has to hold for the other."""
    calls.clear()
    master = DumpMaster(Options(), with_termlog=False)
    # Which wants a certificate authority.
    master.addons.remove(master.addons.get("tlsconfig"))
    if request.param:
        cache_hooks(master)
        assert isinstance(master.addons, CachedAddonManager)
    yield master
    master._legacy_log_events.uninstall()


async def ask(master: DumpMaster) -> list[str]:
    calls.clear()
    await master.addons.handle_lifecycle(HttpRequestHook(tflow.tflow()))
    return list(calls)


async def test_hooks_run_in_the_order_of_the_chain_and_inside_out(master: DumpMaster) -> None:
    master.addons.add(Addon("a", addons=[Addon("b"), AsyncAddon("c")]), AsyncAddon("d"))
    assert await ask(master) == ["a", "b", "c", "d"]
    assert await ask(master) == ["a", "b", "c", "d"]


async def test_a_halt_ends_it(master: DumpMaster) -> None:
    master.addons.add(Addon("a"), Addon("b", AddonHalt()), Addon("c"))
    assert await ask(master) == ["a", "b"]


async def test_an_error_ends_its_addon_only_and_is_logged(master: DumpMaster, caplog: pytest.LogCaptureFixture) -> None:
    master.addons.add(
        Addon("a", RuntimeError("oh"), addons=[Addon("b")]), AsyncAddon("c", ValueError("no")), Addon("d")
    )
    assert await ask(master) == ["a", "c", "d"]
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert messages == ["Addon error: oh", "Addon error: no"]


async def test_what_comes_and_goes_at_run_time_counts_at_once(master: DumpMaster) -> None:
    first, second = Addon("a"), Addon("b")
    master.addons.add(first)
    assert await ask(master) == ["a"]
    master.addons.add(second)
    assert await ask(master) == ["a", "b"]
    master.addons.remove(first)
    assert await ask(master) == ["b"]
    master.addons.chain.insert(0, Addon("c"))
    assert await ask(master) == ["c", "b"]


async def test_what_is_put_inside_another_after_it_was_registered_counts_too(master: DumpMaster) -> None:
    # As mitmproxy does with scripts.
    outer, inner = Addon("outer"), Addon("inner")
    master.addons.add(outer)
    assert await ask(master) == ["outer"]
    master.addons.register(inner)
    outer.addons = [inner]
    await ask(master)
    assert await ask(master) == ["outer", "inner"]


async def test_a_hook_that_cannot_be_called_is_mitmproxys_to_complain_about(
    master: DumpMaster, caplog: pytest.LogCaptureFixture
) -> None:
    odd: Any = Addon("odd")
    odd.request = "not a function"
    master.addons.add(odd, Addon("b"))
    assert await ask(master) == ["b"]
    assert "not callable" in caplog.text


async def test_an_addon_of_mitmproxy_works_as_soon_as_its_option_has_a_value(master: DumpMaster) -> None:
    flow = tflow.tflow()
    flow.request.headers["If-None-Match"] = "x"
    await master.addons.handle_lifecycle(HttpRequestHook(flow))
    assert "If-None-Match" in flow.request.headers
    master.options.update(anticache=True)
    await master.addons.handle_lifecycle(HttpRequestHook(flow))
    assert "If-None-Match" not in flow.request.headers
    master.options.update(modify_body=["/~s/^message$/changed"])
    answered = tflow.tflow(resp=True)
    answered.live = True
    await master.addons.handle_lifecycle(HttpResponseHook(answered))
    assert answered.response is not None
    assert answered.response.text == "changed"


async def test_every_addon_that_idles_is_there_with_its_option(master: DumpMaster) -> None:
    for name, option in _IDLES_WITHOUT.items():
        assert master.addons.get(name) is not None, name
        assert option in master.options, option


async def test_a_manager_of_another_kind_is_left_alone() -> None:
    class Other(AddonManager):
        pass

    master = DumpMaster(Options(), with_termlog=False)
    master.addons.__class__ = Other
    cache_hooks(master)
    assert type(master.addons) is Other
    master._legacy_log_events.uninstall()
