"""What is not loaded at the start, and is when somebody asks for it."""

import subprocess
import sys

SCRIPT = """
import gc, sys
from eoepca_security.proxy.patches.lazy_imports import lazy_imports
with lazy_imports():
    from eoepca_security.proxy.runtime import serve
assert gc.isenabled()
put_off = {"flask", "ldap3.core", "service_identity.cryptography", "pyparsing.core", "werkzeug", "tornado"}
assert not put_off & set(sys.modules), put_off & set(sys.modules)
assert "Png" not in vars(sys.modules["mitmproxy.contrib.kaitaistruct.png"])

from mitmproxy.addons import proxyauth
assert proxyauth.ldap3.Server.__name__ == "Server"
assert proxyauth.ldap3.utils.conv.escape_filter_chars("*") == "\\\\2a"

import mitmproxy.addons.onboarding
import ldap3.core.exceptions
from aioquic import tls
assert tls.service_identity.VerificationError and tls.service_identity.cryptography
app = sys.modules["mitmproxy.addons.onboardingapp"].app
app.config["CONFDIR"] = "/nonexistent"
from io import BytesIO
answers = []
environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/", "SERVER_NAME": "mitm.it", "SERVER_PORT": "80",
           "wsgi.url_scheme": "http", "wsgi.input": BytesIO()}
body = b"".join(app(environ, lambda status, headers, *_: answers.append(status)))
assert answers == ["200 OK"] and b"mitmproxy" in body

from mitmproxy import command, command_lexer
from mitmproxy.addons import maplocal, save
from mitmproxy.test import tflow
assert command.unquote("'a b'") == command_lexer.unquote("'a b'") == "a b"
assert command.command_lexer.quote("a b") == '"a b"'
assert [*command.command_lexer.expr.parse_string("replay.client @all")][0] == "replay.client"
assert save.flowfilter.match("~m GET & ~u address", tflow.tflow()) is True
assert "pyparsing.core" in sys.modules
assert maplocal.safe_join("/a", "b") == "/a/b" and maplocal.safe_join("/a", "../b") is None
# Anyone's import finds the whole module.
from werkzeug.security import check_password_hash
from pyparsing import ZeroOrMore
from mitmproxy.flowfilter import TFilter
assert TFilter.__name__ == "TFilter"

from mitmproxy.contrib.kaitaistruct import png
assert png.Png.__name__ == "Png"
"""

CHECKS = """
import sys
from eoepca_security.proxy.patches.lazy_imports import lazy_imports
if sys.argv[1] == "light":
    with lazy_imports():
        from eoepca_security.proxy.runtime import serve
from mitmproxy.http import ResponseData
from mitmproxy.proxy import layers, utils
from mitmproxy.proxy.layers.http import HttpLayer, HttpStream

class Layer:
    @utils.expect(int)
    def handle(self, event):
        return event

try:
    Layer().handle("1")
except AssertionError:
    print("checks those that come later")
else:
    print("checks nothing")
handlers = [function for kind in (HttpLayer, HttpStream, layers.TCPLayer, layers.ClientTLSLayer)
            for function in vars(kind).values() if callable(function)]
print(sum(hasattr(handler, "__wrapped__") for handler in handlers) > 5)
try:
    ResponseData(http_version=b"HTTP/1.1", headers="none", content=b"", trailers=None, timestamp_start=0,
                 timestamp_end=None, status_code=200, reason=b"")
except TypeError:
    print(True)
else:
    print(False)
"""

CAS = """
import ssl, sys, threading
from eoepca_security.proxy.patches.lazy_imports import without_cas
whole = ssl.SSLContext.load_default_certs
counts = {}

def load(who):
    counts[who] = ssl.create_default_context().cert_store_stats()["x509"]

load("before")
with without_cas():
    load("within")
    thread = threading.Thread(target=load, args=["elsewhere"])
    thread.start()
    thread.join()
load("after")
assert ssl.SSLContext.load_default_certs is whole
assert counts["within"] == 0
# None where a machine has no CAs in a file.
assert counts["before"] == counts["elsewhere"] == counts["after"]
"""


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, "-c", script, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.stderr == ""
    assert result.returncode == 0
    return result.stdout


def test_what_is_put_off_is_loaded_when_it_is_used() -> None:
    run(SCRIPT)


def test_the_checks_of_mitmproxys_layers_are_left_out_and_only_those() -> None:
    later = "checks those that come later"
    assert run(CHECKS, "plain").splitlines() == [later, "True", "True"]
    assert run(CHECKS, "light").splitlines() == [later, "False", "False"]


def test_other_threads_have_the_cas_while_tornado_is_loaded_without() -> None:
    run(CAS)
