"""Debian's Apache with mod_auth_openidc on loopback, as a gateway before a service."""

import base64
import os
import shutil
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.interop.kc_process import accepts, running
from tests.interop.kc_server import GATEWAY
from tests.support.network import free_port

MODULES = Path("/usr/lib/apache2/modules")
START_SECONDS = 30.0

CONFIGURATION = """
ServerRoot "{folder}"
ServerName 127.0.0.1
Listen 127.0.0.1:{port}
PidFile "{folder}/apache.pid"
DefaultRuntimeDir "{folder}"
ErrorLog "{folder}/error.log"
LogLevel warn
{users}
LoadModule mpm_event_module {modules}/mod_mpm_event.so
LoadModule authn_core_module {modules}/mod_authn_core.so
LoadModule authz_core_module {modules}/mod_authz_core.so
LoadModule authz_user_module {modules}/mod_authz_user.so
LoadModule proxy_module {modules}/mod_proxy.so
LoadModule proxy_http_module {modules}/mod_proxy_http.so
LoadModule auth_openidc_module {modules}/mod_auth_openidc.so

OIDCProviderMetadataURL {issuer}/.well-known/openid-configuration
OIDCClientID {client_id}
OIDCClientSecret {client_secret}
OIDCRedirectURI http://127.0.0.1:{port}/redirect_uri
OIDCCryptoPassphrase test-only-passphrase
OIDCScope "openid profile email"
# Keys by URL it takes over https only.
OIDCOAuthVerifyCertFiles {key_id}#{folder}/issuer.pem
{server_settings}

ProxyPass /redirect_uri !
ProxyPass / {service}/

<Location />
  Require valid-user
  {location_settings}
</Location>
"""


class ApacheError(Exception):
    """Apache cannot be had on this machine; the message says what is missing."""


def signing_certificate(issuer: str) -> tuple[str, str]:
    """Return the id of the issuer's RS256 key and its certificate."""
    answer = httpx.get(f"{issuer}/protocol/openid-connect/certs", trust_env=False).raise_for_status()
    (key,) = (key for key in answer.json()["keys"] if key["use"] == "sig" and key["alg"] == "RS256")
    return key["kid"], ssl.DER_cert_to_PEM_cert(base64.b64decode(key["x5c"][0]))


@contextmanager
def running_apache(folder: Path, issuer: str, service: str, settings: list[str]) -> Iterator[str]:
    """Run Apache before `service`, with `settings` of the module; yields its URL."""
    apache = shutil.which("apache2", path=f"{os.environ['PATH']}:/usr/sbin")
    if apache is None or not (MODULES / "mod_auth_openidc.so").exists():
        raise ApacheError("Debian's package libapache2-mod-auth-openidc is needed")
    port = free_port()
    key_id, certificate = signing_certificate(issuer)
    (folder / "issuer.pem").write_text(certificate)
    configuration = folder / "apache.conf"
    configuration.write_text(
        CONFIGURATION.format(
            folder=folder,
            port=port,
            modules=MODULES,
            # It does not serve as root.
            users="User www-data\nGroup www-data" if os.geteuid() == 0 else "",
            issuer=issuer,
            key_id=key_id,
            client_id=GATEWAY.client_id,
            client_secret=GATEWAY.secret,
            service=service,
            server_settings="\n".join(line for line in settings if line.startswith("OIDC")),
            location_settings="\n  ".join(line for line in settings if not line.startswith("OIDC")),
        )
    )
    command = [apache, "-D", "FOREGROUND", "-f", str(configuration)]
    with running(command, {"PATH": os.environ["PATH"], "LANG": "C"}, folder, folder / "apache.log") as child:
        child.wait_until(lambda: accepts(port), START_SECONDS)
        yield f"http://127.0.0.1:{port}"
