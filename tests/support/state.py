"""What a proxy that works knows of itself."""

from eoepca_security.oauth.protocol import Client
from eoepca_security.proxy.admin.status import Answer, Refresh, State
from eoepca_security.proxy.config.settings import Settings
from eoepca_security.session.session import AccessToken

NOW = 1_800_000_000.0
SECRETS = ("the-access-token", "the-id-token", "the-refresh-token", "the-initial-token", "the-client-secret")

SETTINGS = Settings(
    "https://issuer.example/realms/x",
    Client("my-client", SECRETS[4]),
    refresh_token=SECRETS[2],
    access_token=SECRETS[3],
    audience="my-service",
)

STATE = State(
    at=NOW,
    started_at=NOW - 7265,
    listener="http://127.0.0.1:8080",
    upstream="https://service.example:9200",
    in_container=False,
    settings=SETTINGS,
    token=AccessToken(SECRETS[0], NOW - 19, NOW + 41, SECRETS[1]),
    claims={"sub": "6f0c", "preferred_username": "alice", "email": "a@b.example"},
    session_ends_at=NOW + 1781,
    error=None,
    last_refresh=Refresh(NOW - 19, 0.031, None),
    last_answer=Answer(200, NOW - 3),
    recent_errors=(),
    counts={
        "refreshes": {"success": 3, "issuer_unavailable": 1},
        "requests": {"2xx": 5, "4xx": 7, "5xx": 1},
        "service_answers": {"2xx": 5, "4xx": 4},
        "errors": {"host_not_allowed": 3, "upstream_unavailable": 1},
    },
    in_flight=2,
    held_bytes=4096,
)
