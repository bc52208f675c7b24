"""Finding hooks faster than mitmproxy does, which relies on its insides.

A request runs through a dozen hooks, and mitmproxy looks for each of them on each of its thirty add-ons each time. Here
the search is done once and its result kept until the add-ons change.
"""

import contextlib
import ctypes
import gc
import inspect
from collections.abc import Callable, Iterator
from dataclasses import fields
from types import CoroutineType
from typing import Any, Final

from mitmproxy.addonmanager import AddonManager, safecall
from mitmproxy.exceptions import AddonHalt, AddonManagerError
from mitmproxy.flow import Flow
from mitmproxy.hooks import Hook, UpdateHook
from mitmproxy.master import Master

from eoepca_security.proxy.patches import seams

# The callables of each add-on of the chain that has any, with those of the add-ons inside it.
Calls = tuple[tuple[Callable[..., Any], ...], ...]


# mitmproxy's own add-ons that do nothing with a flow while an option has no value: each still costs its call.
_IDLES_WITHOUT: Final = {
    "anticache": "anticache",
    "anticomp": "anticomp",
    "blocklist": "block_list",
    "dumper": "flow_detail",
    "maplocal": "map_local",
    "mapremote": "map_remote",
    "modifybody": "modify_body",
    "modifyheaders": "modify_headers",
    "onboarding": "onboarding",
    "proxyauth": "proxyauth",
    "save": "save_stream_file",
    "savehar": "hardump",
    "stickyauth": "stickyauth",
    "stickycookie": "stickycookie",
    "upstreamauth": "upstream_auth",
}
_OPTIONS: Final = frozenset(_IDLES_WITHOUT.values())
_FLOW_HOOKS: Final = frozenset({"requestheaders", "request", "responseheaders", "response", "error"})


class CachedAddonManager(AddonManager):
    """An AddonManager that remembers which add-ons have a hook; what it does with them is the same."""

    _calls: dict[str, Calls]
    _chain: list[Any]

    def begin(self) -> None:
        """Do what a constructor would: the manager is there already, with add-ons in it."""
        self.forget()
        self.master.options.changed.connect(self.options_changed)

    def forget(self) -> None:
        """Look for the hooks anew: the add-ons have changed."""
        self._calls = {}
        self._chain = list(self.chain)

    def forget_now_and_soon(self) -> None:
        """Do so again once whoever changes the add-ons is done with that: scripts are put in place after they load."""
        self.forget()
        self.master.event_loop.call_soon(self.forget)

    def options_changed(self, updated: set[str]) -> None:
        """Take up the add-ons that have work now."""
        if not _OPTIONS.isdisjoint(updated):
            self.forget()

    def register(self, addon: Any) -> Any:
        """Register an add-on, in the chain or inside another."""
        self.forget_now_and_soon()
        return super().register(addon)  # type: ignore[no-untyped-call]

    def remove(self, addon: Any) -> None:
        """Remove an add-on, from the chain or from inside another."""
        self.forget_now_and_soon()
        super().remove(addon)  # type: ignore[no-untyped-call]

    def clear(self) -> None:
        """Remove all add-ons."""
        super().clear()  # type: ignore[no-untyped-call]
        self.forget()

    async def handle_lifecycle(self, event: Hook) -> None:
        """Trigger an event and, where it is about a flow, tell that the flow has changed."""
        await self.trigger_event(event)
        if self._calls_of(_UPDATE) != ():
            (message,) = _arguments(event)
            if isinstance(message, Flow):
                await self.trigger_event(UpdateHook([message]))

    async def trigger_event(self, event: Hook) -> None:
        """Call the event's hook on all add-ons that have it, in the order of the chain."""
        calls = self._calls_of(event)
        if calls is None:
            await super().trigger_event(event)
            return
        arguments = _arguments(event)
        for functions in calls:
            # Each add-on of the chain is guarded for itself, together with those inside it.
            try:
                for function in functions:
                    result = function(*arguments)
                    if result is not None and (type(result) is CoroutineType or inspect.isawaitable(result)):
                        await result
            except AddonHalt:
                return
            except Exception:
                # mitmproxy's own guard decides what becomes of it.
                with safecall():
                    raise

    def _calls_of(self, event: Hook) -> Calls | None:
        """Return what the event calls; None when mitmproxy itself has to tell what is wrong with it."""
        if self._chain != self.chain:
            self.forget()
        calls = self._calls.get(event.name)
        if calls is None:
            try:
                found = [tuple(self._working(addon, event)) for addon in self.chain]
            except AddonManagerError:
                return None
            calls = self._calls[event.name] = tuple(functions for functions in found if functions)
        return calls

    def _working(self, addon: Any, event: Hook) -> Iterator[Callable[..., Any]]:
        for inner, function in self._iter_hooks(addon, event):
            name = getattr(inner, "name", None) or type(inner).__name__.lower()
            option = _IDLES_WITHOUT.get(name) if event.name in _FLOW_HOOKS else None
            if option is None or getattr(self.master.options, option, True):
                yield function


def cache_hooks(master: Master) -> None:
    """Make `master` remember which of its add-ons have which hooks; a manager of another kind is left alone."""
    if type(master.addons) is AddonManager:
        seams.replace("mitmproxy.addonmanager:AddonManager", "__class__", CachedAddonManager, of=master.addons)
        CachedAddonManager.begin(master.addons)  # type: ignore[arg-type]


def settle_memory() -> None:
    """Keep the garbage collector away from what was made during the start, and let it look less often at the rest."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(5000, 20, 20)


def collect() -> None:
    """Collect garbage now, and give the system back what is free, as the GNU C library does only at the heap's end."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # other C libraries do not have it
        ctypes.CDLL(None).malloc_trim(0)


_UPDATE = UpdateHook([])
_names: dict[type[Hook], tuple[str, ...]] = {}


def _arguments(event: Hook) -> list[Any]:
    """Return what `event.args()` does, without looking into the class each time."""
    kind = type(event)
    names = _names.get(kind)
    if names is None:
        names = _names[kind] = tuple(field.name for field in fields(event))  # type: ignore[arg-type]
    return [getattr(event, name) for name in names]
