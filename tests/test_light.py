"""What is not loaded at the start, and is when somebody asks for it."""

import subprocess
import sys

SCRIPT = """
import gc, ssl, sys
from eoepca_security.proxy.light import light
whole = ssl.SSLContext.load_default_certs
with light():
    from eoepca_security.proxy import serve
assert gc.isenabled() and ssl.SSLContext.load_default_certs is whole
loaded = {"flask", "ldap3.core", "service_identity.cryptography"} & set(sys.modules)
assert not loaded, loaded

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
"""


def test_what_is_put_off_is_loaded_when_it_is_used() -> None:
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stderr) == (0, "")
