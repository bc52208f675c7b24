"""All settings: name, default and description. `.env.example` and `docs/settings.md` are generated from this file.

After a change, run `uv run tools/settings_reference.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from eoepca_security.oauth.protocol import ASSERTION_AUDIENCES, CLIENT_AUTH_METHODS, GRANTS

FORWARD_AS_CHOICES: Final = ("bearer", "apisix")
COOKIES_CHOICES: Final = ("pass", "drop")
MODES: Final = ("reverse", "forward")


@dataclass(frozen=True)
class Variable:
    """A setting: its environment variable, its options, and its description.

    `option` is that of the add-on, `flag` that of our command line, and `mitmproxy_option` one that mitmproxy has
    anyway. There are none where these are None.

    `help` is a complete sentence, which mitmproxy's `--options` shows; `more` has the details. `default` is the value
    of an unset variable; it is empty if there is none, or if `more` describes it. Secrets can also be read from a file.
    """

    env: str
    option: str | None
    help: str
    more: str = ""
    default: str = ""
    required: bool = False
    secret: bool = False
    flag: str | None = None
    mitmproxy_option: str | None = None


ISSUER: Final = Variable(
    "OPEN_ID_CONNECT_URL",
    "oidc_url",
    "The OIDC issuer, or its discovery document (…/.well-known/openid-configuration).",
    "For Keycloak: https://keycloak.example/realms/NAME. Use the same name as for the login. Only the document's "
    "address may have a query (?p=POLICY for Azure AD B2C).",
    required=True,
    flag="--issuer",
)
ISSUER_NAME: Final = Variable(
    "OPEN_ID_CONNECT_ISSUER",
    "oidc_issuer",
    "The issuer's name, if it is not the address in OPEN_ID_CONNECT_URL (inside a cluster, say).",
    "The discovery document must name this issuer. Sessions belong to it, whatever address it is reached at.",
)
PARAMS: Final = Variable(
    "OPEN_ID_CONNECT_PARAMS",
    "oidc_params",
    "Further parameters for token requests and logins, form-encoded: name=value&name=value.",
    "For issuers that need them, such as Auth0: audience=https%3A%2F%2Fapi.example. Not for secrets.",
)
CLIENT_ID: Final = Variable(
    "OPEN_ID_CONNECT_CLIENT_ID",
    "oidc_client_id",
    "The client's ID at the issuer.",
    required=True,
    flag="--client-id",
)
CLIENT_SECRET: Final = Variable(
    "OPEN_ID_CONNECT_CLIENT_SECRET", "oidc_client_secret", "The client's secret; none for a public client.", secret=True
)
CLIENT_AUTH: Final = Variable(
    "OPEN_ID_CONNECT_CLIENT_AUTH",
    "oidc_client_auth",
    f"How the client authenticates: {', '.join(CLIENT_AUTH_METHODS)}.",
    "auto chooses a method that the issuer supports and the client has credentials for.",
    default=CLIENT_AUTH_METHODS[0],
)
CLIENT_KEY_FILE: Final = Variable(
    "OPEN_ID_CONNECT_CLIENT_KEY_FILE",
    "oidc_client_key_file",
    "PEM file with the private key (RSA, EC or Ed25519, without a password) for private_key_jwt.",
)
ASSERTION_AUDIENCE: Final = Variable(
    "OPEN_ID_CONNECT_CLIENT_ASSERTION_AUDIENCE",
    "oidc_client_assertion_audience",
    f"The audience of private_key_jwt and client_secret_jwt assertions: {' or '.join(ASSERTION_AUDIENCES)}.",
    "issuer is safer; token_endpoint is for issuers that still require it.",
    default=ASSERTION_AUDIENCES[0],
)
REFRESH_TOKEN: Final = Variable(
    "OPEN_ID_REFRESH_TOKEN",
    "refresh_token",
    "The refresh token of a login.",
    "Not needed after `oidc-proxy login`, which stores one in the token store, or with "
    "OPEN_ID_CONNECT_GRANT=client_credentials.",
    secret=True,
)
ACCESS_TOKEN: Final = Variable(
    "OPEN_ID_AUTH_TOKEN",
    "auth_token",
    "An initial access token, used until it expires.",
    "Rarely needed.",
    secret=True,
)
GRANT: Final = Variable(
    "OPEN_ID_CONNECT_GRANT",
    "oidc_grant",
    f"The OAuth grant: {' or '.join(GRANTS)}.",
    "refresh_token acts for the user who logged in. client_credentials acts for the client itself and needs its secret "
    "or key.",
    default=GRANTS[0],
)
TOKEN_STORE: Final = Variable(
    "OPEN_ID_TOKEN_STORE",
    "oidc_token_store",
    "Folder for the newest refresh token, so that a restart continues the session; none keeps it in memory only.",
    "The default is $XDG_STATE_HOME/eoepca-security, or ~/.local/state/eoepca-security.",
)
TOKEN_FILE: Final = Variable(
    "OPEN_ID_TOKEN_FILE",
    "oidc_token_file",
    "File in which the proxy keeps a current access token, for programs that read it from there.",
    "It has the token and nothing else, not even a line break. The proxy replaces it in one step before the token "
    "ends, and removes it when the token has ended, when the credentials are rejected, and at its own end.",
)
TOKEN_FILE_MODE: Final = Variable(
    "OPEN_ID_TOKEN_FILE_MODE",
    "oidc_token_file_mode",
    "Who may read files with tokens: 0600 (this user), 0640 (its group, too) or 0644 (all users).",
    "In a pod, containers of other users need more than 0600.",
    default="0600",
)
TOKEN_FILE_MARGIN: Final = Variable(
    "OPEN_ID_TOKEN_FILE_MARGIN",
    "oidc_token_file_margin",
    "Seconds for which the token in a file is good at least, while the issuer answers.",
    "It is at most a quarter of the token's lifetime.",
    default="30",
)
AUDIENCE: Final = Variable(
    "OPEN_ID_CONNECT_AUDIENCE",
    "oidc_audience",
    "The audience that the protected service expects.",
    "If set, access tokens that are JWTs are verified (signature, issuer, audience, times) before use, and are never "
    "forwarded if they fail.",
)
SCOPE: Final = Variable(
    "OPEN_ID_CONNECT_SCOPE",
    "oidc_scope",
    "Scopes to request, separated by spaces.",
    "If unset, the scopes of the login apply.",
)
UPSTREAM: Final = Variable(
    "REMOTE_PROTECTED_DOMAIN",
    None,
    "Scheme, host and port of the protected service, without a path, e.g. https://service.example:9200",
    "(Not required with PROXY_SERVICES, or with PROXY_INJECT_HOSTS in forward mode. mitmdump -s: use `--mode reverse:` "
    "instead.)",
    required=True,
    flag="--upstream",
)
SERVICES: Final = Variable(
    "PROXY_SERVICES",
    "services",
    "TOML file with several protected services behind one login, each with a token of its own.",
    "It has a table `[service.NAME]` for each, with at least a `url`. The service in REMOTE_PROTECTED_DOMAIN, if that "
    "is set, is `default`.",
    flag="--services",
)
ENDPOINT: Final = Variable(
    "REMOTE_PROTECTED_ENDPOINT",
    None,
    "What `oidc-proxy check` requests from the service: a path, or a URL, of which only the path is used.",
    "Choose one that needs a login, so that the answer shows whether the service accepts the token.",
    default="/",
)
TLS_NO_VERIFY: Final = Variable(
    "TLS_NO_VERIFY",
    None,
    "true turns off verification of the service's certificate: anyone on the network path can read the token.",
    "Prefer TLS_CA_FILE. (true, 1, yes or on; false, 0, no or off)",
    default="false",
)
CA_FILE: Final = Variable(
    "TLS_CA_FILE",
    None,
    "PEM file with CA certificates to trust in addition to the system's, for the issuer and the service.",
)
MODE: Final = Variable(
    "PROXY_MODE",
    None,
    f"How clients use the proxy: {' or '.join(MODES)}.",
    "In reverse mode, they call the proxy instead of the service. In forward mode, they call the services by their "
    "real addresses, with the proxy as their HTTP proxy; all other connections pass untouched. (mitmdump -s: use "
    "`--mode` instead.)",
    default=MODES[0],
)
AUTH_FILE: Final = Variable(
    "PROXY_AUTH_FILE",
    None,
    "In forward mode: file with `user:password`, which clients of the proxy must then send.",
    "Required when the proxy listens beyond this machine. Without TLS, anyone on the network path can read it.",
)
HOST: Final = Variable(
    "PROXY_HOST",
    None,
    "Address to listen on.",
    "Anything that can reach it acts with your identity, so keep it on loopback, or inside a container or pod. "
    "`0.0.0.0` is all IPv4 addresses, `::` all addresses of both families. (mitmdump -s: use `--listen-host` instead.)",
    default="127.0.0.1",
    flag="--host",
    mitmproxy_option="listen_host",
)
PORT: Final = Variable(
    "PROXY_PORT",
    None,
    "Port to listen on; 0 picks a free port.",
    "(mitmdump -s: use `--listen-port` instead.)",
    default="8080",
    flag="--port",
    mitmproxy_option="listen_port",
)
ADMIN: Final = Variable(
    "PROXY_ADMIN",
    "admin_listen",
    "Address of the admin listener, as host:port, or off.",
    "It serves probes, metrics, the status page and the shutdown endpoint. If this is unset and the port is in use, "
    "the proxy starts without it. (mitmdump -s: off unless set.)",
    default="127.0.0.1:8081",
    flag="--admin",
)
ALLOWED_HOSTS: Final = Variable(
    "PROXY_ALLOWED_HOSTS",
    "allowed_hosts",
    "Names that clients may use in `Host`, separated by commas; add :port to allow only that port; * allows all.",
    "The default is localhost, 127.0.0.1, [::1], the listening address, and names such as service.localhost "
    "(`*.localhost`). In a container, set the names that clients use for it.",
)
ALLOWED_ORIGINS: Final = Variable(
    "PROXY_ALLOWED_ORIGINS",
    "allowed_origins",
    "Web origins whose pages may use the proxy with your identity and read the answers, separated by commas, e.g. "
    "http://localhost:3000. Each port is a separate origin.",
)
TERMINATION_ENDPOINT: Final = Variable(
    "PROXY_TERMINATION_ENDPOINT",
    "termination_endpoint",
    "Path on the proxy where a POST stops it, e.g. /quitquitquit (the admin listener always has that path).",
    "Written as a URL, e.g. http://0.0.0.0/quitquitquit, every method stops it, as in EOEPCA's eoepca-security 2.0. "
    "The host and port must then be those that the client uses; 0.0.0.0 is every allowed host, and no port is every "
    "port. A link that you follow in a browser can then stop it, too.",
)
FORWARD_AS: Final = Variable(
    "PROXY_FORWARD_AS",
    "forward_as",
    f"Which headers the service gets: {' or '.join(FORWARD_AS_CHOICES)}.",
    "bearer sends the token in Authorization. apisix also sends X-Access-Token, X-ID-Token and X-Userinfo, like "
    "APISIX's openid-connect plugin, for developing a service that runs behind it.",
    default=FORWARD_AS_CHOICES[0],
)
COOKIES: Final = Variable(
    "PROXY_COOKIES",
    "cookies",
    f"What happens to cookies: {' or '.join(COOKIES_CHOICES)}.",
    "drop removes Cookie from requests and Set-Cookie from answers, for tools and services that need none.",
    default=COOKIES_CHOICES[0],
)
WORKERS: Final = Variable(
    "PROXY_WORKERS",
    None,
    "Processes that share the port and the session.",
    "More than one helps from about a thousand requests per second; each can use one core.",
    default="1",
    flag="--workers",
)
CLIENT_TIMEOUT: Final = Variable(
    "PROXY_CLIENT_TIMEOUT",
    "client_timeout",
    "Seconds for which a client may send nothing of what it has begun, or read nothing of its answer.",
    "Then the proxy ends the exchange. Uploads and downloads may take as long as they want while they move, and so may "
    "a client that waits for the service. Raise this if your programs pause for longer in the middle of a download.",
    default="60",
)
HELD_BYTES: Final = Variable(
    "PROXY_HELD_BYTES",
    "held_bytes",
    "How many bytes of bodies the proxy may hold at a time, to send them again if the service refuses the token.",
    "What does not fit streams and is sent only once. Workers share this equally. The proxy needs up to twice as much "
    "memory for it.",
    default="67108864",
)
INJECT_HOSTS: Final = Variable(
    "PROXY_INJECT_HOSTS",
    "inject_hosts",
    "In forward mode (mitmdump -s: `--mode regular`): hosts that get the token, separated by commas, with :port if it "
    "is not the scheme's default.",
    "Hosts must match exactly, and only over https, except on this machine.",
)
ALLOW_HTTP: Final = Variable(
    "OPEN_ID_CONNECT_DANGEROUSLY_ALLOW_HTTP",
    "oidc_dangerously_allow_http",
    "true allows an http:// issuer beyond localhost: anyone on the network path can take over the session.",
    "For test networks.",
    default="false",
)

GROUPS: Final[Mapping[str, tuple[Variable, ...]]] = MappingProxyType(
    {
        "The identity provider": (
            ISSUER,
            ISSUER_NAME,
            CLIENT_ID,
            CLIENT_SECRET,
            CLIENT_AUTH,
            CLIENT_KEY_FILE,
            ASSERTION_AUDIENCE,
            PARAMS,
        ),
        "The session": (REFRESH_TOKEN, ACCESS_TOKEN, GRANT, TOKEN_STORE, AUDIENCE, SCOPE),
        "Files with tokens": (TOKEN_FILE, TOKEN_FILE_MODE, TOKEN_FILE_MARGIN),
        "The protected service": (UPSTREAM, SERVICES, ENDPOINT, TLS_NO_VERIFY, CA_FILE),
        "The proxy": (
            MODE,
            AUTH_FILE,
            HOST,
            PORT,
            ADMIN,
            ALLOWED_HOSTS,
            ALLOWED_ORIGINS,
            TERMINATION_ENDPOINT,
            FORWARD_AS,
            COOKIES,
            WORKERS,
            CLIENT_TIMEOUT,
            HELD_BYTES,
            INJECT_HOSTS,
        ),
        "Danger": (ALLOW_HTTP,),
    }
)
VARIABLES: Final = tuple(variable for group in GROUPS.values() for variable in group)
OPTIONS: Final = tuple(variable for variable in VARIABLES if variable.option is not None)
COMMON_FLAGS: Final = (ISSUER, CLIENT_ID, SERVICES)
"""The settings that every command has an option for."""
SERVE_FLAGS: Final = tuple(variable for variable in VARIABLES if variable.flag and variable not in COMMON_FLAGS)
"""The settings that `serve` and `check` also have an option for."""
