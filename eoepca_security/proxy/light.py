"""A start without what mitmproxy and others load and the proxy never, or hardly ever, uses.

The first import of mitmproxy stands in a `with light()` block. What is put off here is loaded when somebody asks for
it.
"""

import gc
import importlib.util
import ssl
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Final

# For mitmproxy's own authentication of clients, and for QUIC's certificates.
_PUT_OFF: Final = ("ldap3", "service_identity")
_ONBOARDING: Final = "mitmproxy.addons.onboardingapp"


@contextmanager
def light() -> Iterator[None]:
    """Import what stands in the `with` block without what takes long and is not needed.

    There must be no other threads yet.
    """
    for name in _PUT_OFF:
        if name not in sys.modules and importlib.util.find_spec(name) is not None:
            sys.modules[name] = _PutOff(name)
    if importlib.util.find_spec("mitmproxy") is not None and _ONBOARDING not in sys.modules:
        sys.modules[_ONBOARDING] = _Onboarding(_ONBOARDING)
    was_enabled = gc.isenabled()
    gc.disable()
    # tornado reads the system's CAs for clients of its own, which we have none of.
    load = ssl.SSLContext.load_default_certs
    ssl.SSLContext.load_default_certs = _load_nothing  # type: ignore[method-assign,assignment]
    try:
        import tornado.netutil  # noqa: F401, PLC0415
    finally:
        ssl.SSLContext.load_default_certs = load  # type: ignore[method-assign]
    try:
        yield
    finally:
        # Which would be looked through at once otherwise, and stays anyway.
        gc.freeze()
        if was_enabled:
            gc.enable()


class _PutOff(ModuleType):
    """A module that is loaded when something in it is used.

    importlib's own kind is loaded by the mere `import` statement. The import of a module inside it asks for `__path__`.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":
            raise AttributeError(name)
        if sys.modules[self.__name__] is self:
            del sys.modules[self.__name__]
        self.__dict__.update(vars(importlib.import_module(self.__name__)))
        return self.__dict__[name]


def _load_nothing(*_: Any) -> None:
    pass


class _Onboarding(ModuleType):
    """Takes the place of the web application at mitm.it, which brings Flask and which the proxy turns off."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.app = _App()


class _App:
    def __init__(self) -> None:
        self.config: dict[str, Any] = {}

    def __call__(self, environ: Any, start_response: Any) -> Any:
        del sys.modules[_ONBOARDING]
        app = importlib.import_module(_ONBOARDING).app
        app.config.update(self.config)
        return app(environ, start_response)
