"""A start without what mitmproxy and others load and check and the proxy never, or hardly ever, uses.

The first import of mitmproxy stands in a `with lazy_imports()` block. What is put off here is loaded when somebody
asks for it.
"""

import gc
import importlib.util
import ssl
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Final

from eoepca_security.proxy.patches import seams

_ONBOARDING: Final = "mitmproxy.addons.onboardingapp"


@contextmanager
def lazy_imports() -> Iterator[None]:
    """Import what stands in the `with` block without what takes long and is not needed.

    There must be no other threads yet that import.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    for name, known in _PUT_OFF.items():
        if name not in sys.modules and importlib.util.find_spec(name.partition(".")[0]) is not None:
            sys.modules[name] = _PutOff(name, known)
    try:
        with _unchecked():
            yield
    finally:
        # Which would be looked through at once otherwise, and stays anyway.
        gc.freeze()
        if was_enabled:
            gc.enable()


@contextmanager
def without_cas() -> Iterator[None]:
    """Import tornado in the `with` block without the system's CAs, which it reads for clients that we have none of."""
    load, importer = ssl.SSLContext.load_default_certs, threading.get_ident()

    def load_elsewhere(context: ssl.SSLContext, *arguments: Any) -> None:
        if threading.get_ident() != importer:
            load(context, *arguments)

    seams.replace("ssl:SSLContext", "load_default_certs", load_elsewhere)
    try:
        yield
    finally:
        seams.replace("ssl:SSLContext", "load_default_certs", load)


@contextmanager
def _unchecked() -> Iterator[None]:
    """Leave out mitmproxy's checks of the types of all that it handles, which take a third of its time.

    They find mistakes in mitmproxy itself: `python -O` leaves them out, too.
    """
    expect = seams.replace("mitmproxy.proxy.utils", "expect", _expect_anything)
    try:
        if __debug__:
            seams.replace("mitmproxy.http:MessageData", "__post_init__", _check_nothing)
        yield
    finally:
        seams.replace("mitmproxy.proxy.utils", "expect", expect)


def _expect_anything(*_: type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return lambda handler: handler


def _check_nothing(_: object) -> None:
    pass


class _PutOff(ModuleType):
    """A module that is loaded when something in it is used, but for what is `known` of it.

    importlib's own kind is loaded by the mere `import` statement.
    """

    def __init__(self, name: str, known: Mapping[str, Any]) -> None:
        super().__init__(name)
        self.__dict__.update(known)

    def __getattr__(self, name: str) -> Any:
        # The import of a module inside a package asks for its __path__. Those that have a dot in their names are none.
        if name.startswith("__") and (name != "__path__" or "." in self.__name__):
            raise AttributeError(name)
        self.__dict__.update(vars(_load(self.__name__)))
        return self.__dict__[name]


def _load(name: str) -> ModuleType:
    """Return the module itself, in whose place another one may stand so far."""
    if isinstance(sys.modules.get(name), _PutOff):
        sys.modules.pop(name, None)
    return importlib.import_module(name)


def _function(module: str, name: str) -> Callable[..., Any]:
    """Return a function that is in a module that is put off, for `from module import name`."""

    def call(*arguments: Any) -> Any:
        return getattr(_load(module), name)(*arguments)

    return call


class _Onboarding:
    """Takes the place of the web application at mitm.it, which brings Flask and which the proxy turns off."""

    def __init__(self) -> None:
        self.config: dict[str, Any] = {}

    def __call__(self, environ: Any, start_response: Any) -> Any:
        app = _load(_ONBOARDING).app
        app.config.update(self.config)
        return app(environ, start_response)


# With what others use of them while they are loaded themselves.
_PUT_OFF: Final[Mapping[str, Mapping[str, Any]]] = {
    # For mitmproxy's own authentication of clients, and for QUIC's certificates.
    "ldap3": {},
    "service_identity": {},
    # For filter expressions and commands.
    "mitmproxy.flowfilter": {"TFilter": Any},
    "mitmproxy.command_lexer": {name: _function("mitmproxy.command_lexer", name) for name in ("quote", "unquote")},
    "pyparsing": {},
    _ONBOARDING: {"app": _Onboarding()},
    # For answers from files.
    "werkzeug.security": {"safe_join": _function("werkzeug.security", "safe_join")},
    # For showing images.
    **{f"mitmproxy.contrib.kaitaistruct.{kind}": {} for kind in ("gif", "ico", "jpeg", "png")},
}
