"""Every setting there is: its name, default and description. `.env.example` and `docs/settings.md` are made from this.

After a change, run `uv run tools/settings_reference.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from eoepca_security.oauth.protocol import CLIENT_AUTH_METHODS, GRANTS

FORWARD_AS_CHOICES: Final = ("bearer", "apisix")


@dataclass(frozen=True)
class Variable:
    """A setting: its environment variable, its add-on option if it has one, and what it is for.

    `help` is a sentence that stands alone, as mitmproxy's `--options` shows it; `more` is what else there is to say.
    `default` is the text that an unset one counts as; empty where there is none, or where `more` tells it.
    A secret can be read from a file, too.
    """

    env: str
    option: str | None
    help: str
    more: str = ""
    default: str = ""
    required: bool = False
    secret: bool = False


ISSUER: Final = Variable(
    "OPEN_ID_CONNECT_URL",
    "oidc_url",
    "The OIDC issuer, or its discovery document (…/.well-known/openid-configuration).",
    "For Keycloak: https://keycloak.example/realms/NAME. Use the name under which the session was given.",
    required=True,
)
CLIENT_ID: Final = Variable(
    "OPEN_ID_CONNECT_CLIENT_ID", "oidc_client_id", "The client's ID at the issuer.", required=True
)
CLIENT_SECRET: Final = Variable(
    "OPEN_ID_CONNECT_CLIENT_SECRET", "oidc_client_secret", "The client's secret; none for a public client.", secret=True
)
CLIENT_AUTH: Final = Variable(
    "OPEN_ID_CONNECT_CLIENT_AUTH",
    "oidc_client_auth",
    f"How the client proves itself: {', '.join(CLIENT_AUTH_METHODS)}.",
    "auto chooses from what the issuer offers and the client has.",
    default=CLIENT_AUTH_METHODS[0],
)
CLIENT_KEY_FILE: Final = Variable(
    "OPEN_ID_CONNECT_CLIENT_KEY_FILE",
    "oidc_client_key_file",
    "PEM file with the private key (RSA, EC or Ed25519, without a password) for private_key_jwt.",
)
REFRESH_TOKEN: Final = Variable(
    "OPEN_ID_REFRESH_TOKEN",
    "refresh_token",
    "The refresh token of a login.",
    "Not needed after `run-mitmproxy.py login`, which keeps one in the token store, nor where OPEN_ID_CONNECT_GRANT is "
    "client_credentials.",
    secret=True,
)
ACCESS_TOKEN: Final = Variable(
    "OPEN_ID_AUTH_TOKEN",
    "auth_token",
    "An access token to begin with, used while it lives.",
    "Rarely needed.",
    secret=True,
)
GRANT: Final = Variable(
    "OPEN_ID_CONNECT_GRANT",
    "oidc_grant",
    f"The OAuth grant: {' or '.join(GRANTS)}.",
    "refresh_token acts for the user who logged in; client_credentials acts for the client itself and needs its secret "
    "or key.",
    default=GRANTS[0],
)
TOKEN_STORE: Final = Variable(
    "OPEN_ID_TOKEN_STORE",
    "oidc_token_store",
    "Folder that keeps the newest refresh token, so that a restart continues the session; none is memory only.",
    "Unset is $XDG_STATE_HOME/eoepca-security, or ~/.local/state/eoepca-security.",
)
AUDIENCE: Final = Variable(
    "OPEN_ID_CONNECT_AUDIENCE",
    "oidc_audience",
    "The audience that the protected service expects.",
    "When set, an access token that is a JWT is verified (signature, issuer, audience, times) before it is used, and "
    "one that does not fit is never forwarded.",
)
SCOPE: Final = Variable(
    "OPEN_ID_CONNECT_SCOPE",
    "oidc_scope",
    "Scopes to ask for, separated by spaces.",
    "Unset asks for what the login asked for.",
)
UPSTREAM: Final = Variable(
    "REMOTE_PROTECTED_DOMAIN",
    None,
    "Scheme, host and port of the protected service, without a path, e.g. https://service.example:9200",
    "(mitmdump -s: `--mode reverse:` takes its place.)",
    required=True,
)
ENDPOINT: Final = Variable(
    "REMOTE_PROTECTED_ENDPOINT",
    None,
    "What `run-mitmproxy.py check` asks the service for with the token: a path, or a URL of which the path counts.",
    default="/",
)
TLS_NO_VERIFY: Final = Variable(
    "TLS_NO_VERIFY",
    None,
    "true turns verification of the service's certificate off: whoever is on the way can read the token.",
    "Prefer TLS_CA_FILE. (true, 1, yes, on; or false, 0, no, off)",
    default="false",
)
CA_FILE: Final = Variable(
    "TLS_CA_FILE",
    None,
    "PEM file with CA certificates to trust besides the system's, for the issuer and the service.",
)
HOST: Final = Variable(
    "PROXY_HOST",
    None,
    "Address to listen on.",
    "Everything that can reach it acts with your identity, so keep it on loopback, or inside a container or pod. "
    "(mitmdump -s: `--listen-host` takes its place.)",
    default="127.0.0.1",
)
PORT: Final = Variable(
    "PROXY_PORT",
    None,
    "Port to listen on; 0 takes a free one.",
    "(mitmdump -s: `--listen-port` takes its place.)",
    default="8080",
)
ADMIN: Final = Variable(
    "PROXY_ADMIN",
    "admin_listen",
    "Address of the admin listener, as host:port, or off.",
    "Probes, metrics, status and the off switch. When this is not set and the port is taken, the proxy goes on "
    "without. (mitmdump -s: off unless set.)",
    default="127.0.0.1:8081",
)
ALLOWED_HOSTS: Final = Variable(
    "PROXY_ALLOWED_HOSTS",
    "allowed_hosts",
    "Names, separated by commas, by which clients may address the proxy, with :port where only that one will do; * is "
    "all.",
    "Unset: localhost, 127.0.0.1, [::1] and the address listened on. In a container, set the names it is known by.",
)
ALLOWED_ORIGINS: Final = Variable(
    "PROXY_ALLOWED_ORIGINS",
    "allowed_origins",
    "Web origins, separated by commas, whose pages may use the proxy with your identity and read the answers, e.g. "
    "http://localhost:3000. Each port is an origin of its own.",
)
TERMINATION_ENDPOINT: Final = Variable(
    "PROXY_TERMINATION_ENDPOINT",
    "termination_endpoint",
    "Path on the proxy where a POST ends it, e.g. /quitquitquit (the admin listener has that one anyway).",
)
FORWARD_AS: Final = Variable(
    "PROXY_FORWARD_AS",
    "forward_as",
    f"What the service gets: {' or '.join(FORWARD_AS_CHOICES)}.",
    "bearer sends the token as Authorization; apisix also sends X-Access-Token, X-ID-Token and X-Userinfo as APISIX's "
    "openid-connect plugin does, for developing a service that lives behind it.",
    default=FORWARD_AS_CHOICES[0],
)
WORKERS: Final = Variable(
    "PROXY_WORKERS",
    None,
    "Processes that share the port and the session.",
    "More than one pays from about a thousand requests a second on; each can use a core.",
    default="1",
)
INJECT_HOSTS: Final = Variable(
    "PROXY_INJECT_HOSTS",
    "inject_hosts",
    "In regular mode (mitmdump -s --mode regular): hosts, separated by commas, with :port where it is not the "
    "scheme's, that get the token.",
    "An exact match, and over https only, except on this machine.",
)
ALLOW_HTTP: Final = Variable(
    "OPEN_ID_CONNECT_DANGEROUSLY_ALLOW_HTTP",
    "oidc_dangerously_allow_http",
    "true accepts an http:// issuer beyond localhost: everyone on the way can take the session over.",
    "For test networks.",
    default="false",
)

GROUPS: Final[Mapping[str, tuple[Variable, ...]]] = MappingProxyType(
    {
        "The identity provider": (ISSUER, CLIENT_ID, CLIENT_SECRET, CLIENT_AUTH, CLIENT_KEY_FILE),
        "The session": (REFRESH_TOKEN, ACCESS_TOKEN, GRANT, TOKEN_STORE, AUDIENCE, SCOPE),
        "The protected service": (UPSTREAM, ENDPOINT, TLS_NO_VERIFY, CA_FILE),
        "The proxy": (
            HOST,
            PORT,
            ADMIN,
            ALLOWED_HOSTS,
            ALLOWED_ORIGINS,
            TERMINATION_ENDPOINT,
            FORWARD_AS,
            WORKERS,
            INJECT_HOSTS,
        ),
        "Danger": (ALLOW_HTTP,),
    }
)
VARIABLES: Final = tuple(variable for group in GROUPS.values() for variable in group)
OPTIONS: Final = tuple(variable for variable in VARIABLES if variable.option is not None)
