"""Reads and checks single settings, and collects the errors."""

import difflib
import ipaddress
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import parse_qsl

from eoepca_security.issuer.ca_trust import usable_cas
from eoepca_security.oauth.protocol import (
    ASSERTION_AUDIENCES,
    CLIENT_AUTH_METHODS,
    RESERVED_PARAMS,
    Client,
    PrivateKey,
    load_private_key,
)
from eoepca_security.oauth.urls import (
    ANY_LOCALHOST,
    DEFAULT_PORTS,
    EVERYWHERE,
    WELL_KNOWN,
    is_loopback,
    issuer_url_problem,
    parse_host,
    parse_origin,
    split_url,
)
from eoepca_security.proxy.config.settings import (
    MAX_CLIENT_TIMEOUT,
    MAX_TOKEN_FILE_MARGIN,
    MAX_WORKERS,
    Address,
    TerminationEndpoint,
)
from eoepca_security.proxy.config.variables import (
    ADMIN,
    ALLOW_HTTP,
    ALLOWED_ORIGINS,
    ASSERTION_AUDIENCE,
    AUTH_FILE,
    CA_FILE,
    CLIENT_AUTH,
    CLIENT_ID,
    CLIENT_KEY_FILE,
    CLIENT_SECRET,
    CLIENT_TIMEOUT,
    ENDPOINT,
    HELD_BYTES,
    HOST,
    ISSUER,
    ISSUER_NAME,
    PARAMS,
    PORT,
    SERVICES,
    TERMINATION_ENDPOINT,
    TOKEN_FILE,
    TOKEN_FILE_MARGIN,
    TOKEN_FILE_MODE,
    TOKEN_STORE,
    UPSTREAM,
    VARIABLES,
    WORKERS,
    Variable,
)
from eoepca_security.session.file_store import folder_problem
from eoepca_security.session.token_file import place_problem

_MAX_FILE: Final = 64 * 1024

_TERMINATION_PATH: Final = re.compile(r"(/[A-Za-z0-9._~-]+)+/?")

_TYPO: Final = 0.86  # how similar a name in the environment must be to one of ours to count as a typo
_TYPO_LETTERS: Final = 3  # how many letters may be missing or too many for a suggestion; a wrong one is both

T = TypeVar("T")


class Reader:
    """Reads one setting at a time, and collects errors instead of raising them."""

    def __init__(
        self,
        flags: Mapping[str, str],
        options: Mapping[str, str],
        environ: Mapping[str, str],
        dotenv: Mapping[str, str],
    ) -> None:
        self._flags = flags
        self._options = options
        self._layers = (environ, dotenv)
        self.problems: list[str] = []
        self.warnings: list[str] = []
        self.exposed: list[str] = []
        self.is_missing = False
        """Whether a required setting is unset."""
        self.files: set[Path] = set()
        """The files that secrets were read from."""
        self._unreadable: set[Variable] = set()

    def name(self, variable: Variable) -> str:
        """Return where the value comes from: our command line's option, or else the environment variable."""
        return variable.flag if variable.flag and self._flags.get(variable.flag) else variable.env

    def problem(self, variable: Variable, text: str) -> None:
        self.problems.append(f"{self.name(variable)}: {text}")

    def option(self, variable: Variable) -> str | None:
        """Return the value that an option has, ours or mitmproxy's, or None."""
        flag = self._flags.get(variable.flag) if variable.flag else None
        names = (variable.option, variable.mitmproxy_option)
        return flag or next((value for name in names if name and (value := self._options.get(name))), None)

    def raw(self, variable: Variable) -> str | None:
        """Return the value from the first source that has one. An empty value counts as unset."""
        if value := self.option(variable):
            return value
        for layer in self._layers:
            value, file = layer.get(variable.env), layer.get(variable.env + "_FILE") if variable.secret else None
            if value and file:
                self._unreadable.add(variable)
                self.problem(variable, f"is set together with {variable.env}_FILE: unset one of the two")
                return None
            if value:
                return value
            if file:
                return self._from_file(variable, f"{variable.env}_FILE", Path(file))
        return None

    def _from_file(self, variable: Variable, name: str, path: Path) -> str | None:
        value, error_text = None, "is empty"
        self.files.add(path.absolute())
        try:
            with path.open("rb") as stream:
                data = stream.read(_MAX_FILE + 1)
            value = data.decode().removesuffix("\n").removesuffix("\r")
            if len(data) > _MAX_FILE:
                value, error_text = None, "is longer than 64 KiB"
        except (OSError, ValueError) as error:
            error_text = f"cannot be read ({_reason(error)})"
        if not value:
            self._unreadable.add(variable)
            self.problems.append(f"{name}: {_shown(path)} {error_text}: put the secret there, readable by this user")
            return None
        self._check_readers(name, path)
        return value

    def _check_readers(self, name: str, path: Path) -> None:
        if readable_by_all(path):
            self.exposed.append(f"{name}: all users can read {_shown(path)}: set its mode to 0600")

    def unknown_names(self) -> list[str]:
        """Return a warning for each unknown name that looks like a setting: misspelled settings have no effect."""
        known = {variable.env for variable in VARIABLES} | {f"{v.env}_FILE" for v in VARIABLES if v.secret}
        environ, dotenv = self._layers
        ours = ("OPEN_ID_", "OPENID_", "PROXY_", "TLS_", "REMOTE_")
        names = {name for name in environ if name.startswith(ours[:2])} | {n for n in dotenv if n.startswith(ours)}
        # Variables of other programs begin with these prefixes too, so in the environment only report likely typos.
        names |= {n for n in environ if n.startswith(ours) and difflib.get_close_matches(n, known, 1, _TYPO)}
        lines = []
        for name in sorted(names - known):
            close = _meant(name, known)
            lines.append(f"{name} is not a setting" + (f": did you mean {close}?" if close else " of this program"))
        return lines

    def is_unset(self, *variables: Variable) -> bool:
        """Return whether none of these was set, even to an unusable value: only then report that one is required."""
        return self._unreadable.isdisjoint(variables)

    def is_given(self, variable: Variable) -> bool:
        """Return whether there is a value, right or wrong. Not for secrets."""
        return bool((self.raw(variable) or "").strip())

    def text(self, variable: Variable) -> str | None:
        value = self.raw(variable)
        if value is not None and not value.isprintable():
            self.problem(variable, "has control characters: a line break may have been copied with it")
            return None
        return value.strip() or None if value else None

    def secret(self, variable: Variable) -> str | None:
        """Like `text`, but keep spaces at both ends."""
        value = self.raw(variable)
        if value is not None and not value.isprintable():
            self._unreadable.add(variable)
            self.problem(variable, "has control characters: a line break may have been copied with it")
            return None
        return value

    def token(self, variable: Variable) -> str | None:
        value = self.secret(variable)
        if value is not None and not re.fullmatch(r"[!-~]+", value.strip("'\"")):
            self._unreadable.add(variable)
            self.problem(variable, "has spaces or characters outside ASCII: copy the token alone, without quotes")
            return None
        if value is not None and value[0] in "'\"":
            # Docker's --env-file and Kubernetes keep quotes as part of the value.
            self._unreadable.add(variable)
            self.problem(variable, "starts with a quotation mark: copy the token alone, without quotes")
            return None
        return value

    def boolean(self, variable: Variable) -> bool:
        value = (self.text(variable) or variable.default).lower()
        if value not in ("true", "1", "yes", "on", "false", "0", "no", "off"):
            self.problem(variable, f"{value!r} is not a valid boolean: use true or false")
        return value in ("true", "1", "yes", "on")

    def choice(self, variable: Variable, choices: Sequence[str]) -> str:
        value = self.text(variable) or variable.default
        if value not in choices:
            self.problem(variable, f"{value!r} is unknown: use one of {', '.join(choices)}")
        return value

    def required(self, variable: Variable, hint: str) -> str:
        problems = len(self.problems)
        value = self.text(variable)
        if value is None and len(self.problems) == problems:
            self.is_missing = True
            self.problem(variable, f"is required: {hint}")
        return value or ""

    def proxy_auth(self) -> str | None:
        """Return `user:password` (RFC 7617 §2), or None."""
        path = self.text(AUTH_FILE)
        value = self._from_file(AUTH_FILE, AUTH_FILE.env, Path(path)) if path else None
        if value is None:
            return None
        user, _, password = value.partition(":")
        if not (user and password and value.isprintable()):
            self._unreadable.add(AUTH_FILE)
            self.problem(AUTH_FILE, "does not have user:password on one line, without control characters: write it so")
            return None
        return value

    def issuer(self, *, allow_http: bool) -> str:
        url = self.required(ISSUER, "set it to the issuer's URL, e.g. https://keycloak.example/realms/eoepca")
        if not url:
            return url
        problem = issuer_url_problem(url, allow_http=allow_http)
        if problem is not None and issuer_url_problem(url, allow_http=True) is None:
            problem += f"; {ALLOW_HTTP.env}=true allows it anyway"
        if problem:
            self.problem(ISSUER, problem)
        return url

    def issuer_name(self) -> str | None:
        name = self.text(ISSUER_NAME)
        if name is None:
            return None
        # A name is only compared, so plain http is safe here.
        problem = issuer_url_problem(name, allow_http=True)
        if problem is None and name.rstrip("/").partition("?")[0].endswith(WELL_KNOWN):
            problem = f"must be the issuer itself, without {WELL_KNOWN}"
        if problem:
            self.problem(ISSUER_NAME, problem)
        return name

    def client(self) -> Client:
        client_id = self.required(CLIENT_ID, "set it to the client's ID at the issuer")
        secret, key = self.secret(CLIENT_SECRET), self._client_key()
        method = self.choice(CLIENT_AUTH, CLIENT_AUTH_METHODS)
        if method.startswith("client_secret") and secret is None and self.is_unset(CLIENT_SECRET):
            self.problem(CLIENT_AUTH, f"{method} needs {CLIENT_SECRET.env}")
        if method == "private_key_jwt" and key is None and self.is_unset(CLIENT_KEY_FILE):
            self.problem(CLIENT_AUTH, f"{method} needs {CLIENT_KEY_FILE.env}")
        if method == "none" and (secret is not None or key is not None):
            given = CLIENT_SECRET.env if secret is not None else CLIENT_KEY_FILE.env
            self.problem(CLIENT_AUTH, f"none contradicts {given}: unset one of the two")
        audience = self.choice(ASSERTION_AUDIENCE, ASSERTION_AUDIENCES)
        return Client(client_id, secret, method, key, audience, self._params())

    def _params(self) -> dict[str, str]:
        text = self.text(PARAMS)
        if text is None:
            return {}
        try:
            pairs = parse_qsl(text, keep_blank_values=True, strict_parsing=True, max_num_fields=100)
        except ValueError:
            self.problem(PARAMS, "is not form-encoded: write it like audience=https%3A%2F%2Fapi.example&prompt=login")
            return {}
        params = dict(pairs)
        if len(params) != len(pairs) or "" in params:
            self.problem(PARAMS, "must give each parameter a name, and name it once")
        if reserved := sorted(RESERVED_PARAMS & params.keys()):
            self.problem(PARAMS, f"must not set {', '.join(reserved)}: the protocol or another setting does")
        return params

    def _client_key(self) -> PrivateKey | None:
        path = self.text(CLIENT_KEY_FILE)
        if path is None:
            return None
        key = self._load(CLIENT_KEY_FILE, path, lambda file: load_private_key(file.read_bytes()))
        if key is not None:
            self._check_readers(CLIENT_KEY_FILE.env, Path(path))
        return key

    def ca_file(self) -> Path | None:
        path = self.text(CA_FILE)
        return self._load(CA_FILE, path, usable_cas) if path else None

    def _load(self, variable: Variable, path: str, load: Callable[[Path], T]) -> T | None:
        try:
            return load(Path(path))
        except (OSError, ValueError) as error:
            self._unreadable.add(variable)
            self.problem(variable, f"{_shown(path)} cannot be used: {_reason(error)}")
            return None

    def token_store(self, *, is_used: bool) -> Path | None:
        """Return the folder; the default follows the XDG Base Directory Specification. None means memory only.

        A folder that `is_used` must be safe to use.
        """
        folder = self._token_store()
        if is_used and folder is not None and (problem := folder_problem(folder)):
            self.problem(TOKEN_STORE, problem)
        return folder

    def _token_store(self) -> Path | None:
        environ = self._layers[0]
        value = self.text(TOKEN_STORE)
        if value == "none":
            return None
        if value is not None:
            return self._at_home(value)
        if state := environ.get("XDG_STATE_HOME"):
            return Path(state, "eoepca-security")
        if home := environ.get("HOME"):
            return Path(home, ".local", "state", "eoepca-security")
        self.warnings.append(f"{TOKEN_STORE.env} and HOME are unset: the session is only in memory")
        return None

    def _at_home(self, value: str) -> Path:
        home = self._layers[0].get("HOME")
        return Path(value.replace("~", home, 1) if home and value.startswith("~/") else value)

    def token_file(self) -> Path | None:
        value = self.text(TOKEN_FILE)
        if value is None:
            return None
        path = self._at_home(value).absolute()
        if not value.startswith(("/", "./", "../", "~/")):  # it may be a token, by mistake
            self.problem(TOKEN_FILE, "is not the path of a file: begin it with / or ./")
        elif value.endswith("/"):
            self.problem(TOKEN_FILE, f"{path} is a folder: choose a file in it, such as {path / 'token'}")
        elif path in self.files:
            self.problem(TOKEN_FILE, f"{path} is the file of another setting: choose another one")
        elif problem := place_problem(path):
            self.problem(TOKEN_FILE, problem)
        return path

    def token_file_mode(self) -> int:
        value = self.text(TOKEN_FILE_MODE) or TOKEN_FILE_MODE.default
        if not re.fullmatch(r"0?[46][04][04]", value):
            self.problem(TOKEN_FILE_MODE, f"{value!r} is not a valid mode: use 0600, 0640 or 0644")
            return int(TOKEN_FILE_MODE.default, 8)
        return int(value, 8)

    def token_file_margin(self) -> int:
        """Return for how long a token in a file has to be good, in seconds."""
        value = self.text(TOKEN_FILE_MARGIN) or TOKEN_FILE_MARGIN.default
        if not re.fullmatch(r"[0-9]{1,5}", value) or not 1 <= int(value) <= MAX_TOKEN_FILE_MARGIN:
            self.problem(
                TOKEN_FILE_MARGIN, f"{value!r} is not a valid number of seconds: use 1 to {MAX_TOKEN_FILE_MARGIN}"
            )
            return int(TOKEN_FILE_MARGIN.default)
        return int(value)

    def host(self) -> str:
        value = (self.text(HOST) or HOST.default).removeprefix("[").removesuffix("]")
        try:
            ipaddress.ip_address(value)
        except ValueError:
            if not re.fullmatch(r"(?!-)[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)*\.?", value) or re.fullmatch(r"[0-9.]+", value):
                self.problem(HOST, f"{value!r} is not a valid address: use 127.0.0.1, or 0.0.0.0 inside a container")
        return value

    def port(self) -> int:
        value = self.text(PORT) or PORT.default
        if not _is_port(value):
            self.problem(PORT, f"{value!r} is not a valid port: use a number from 1 to 65535, or 0 for any free port")
            return int(PORT.default)
        return int(value)

    def admin(self, *, is_on: bool) -> tuple[Address | None, bool]:
        """Return the admin listener's address or None, and whether the user set it. `is_on` is the default."""
        given = self.text(ADMIN)
        value = given or (ADMIN.default if is_on else "off")
        if value == "off":
            return None, given is not None
        host, _, port = value.rpartition(":")
        if not re.fullmatch(r"\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+", host) or not _is_port(port):
            self.problem(ADMIN, f"{value!r} is not a valid address: use host:port, e.g. {ADMIN.default}, or off")
            return None, True
        return Address(host.strip("[]"), int(port)), given is not None

    def items(self, variable: Variable) -> tuple[str, ...]:
        """Return the items of a comma-separated list."""
        return tuple(item.strip() for item in (self.text(variable) or "").split(",") if item.strip())

    def hosts(self, variable: Variable, *, wildcard: bool = False) -> tuple[str, ...]:
        hosts = []
        for item in self.items(variable):
            if wildcard and item in ("*", ANY_LOCALHOST):
                hosts.append(item)
                continue
            try:
                # Accept an IPv6 address without brackets.
                hosts.append(str(parse_host(f"[{item}]" if item.count(":") > 1 and "[" not in item else item)))
            except ValueError:
                self.problem(
                    variable, f"{item!r} is not a valid host: use names like service.example, with :port if needed"
                )
        return tuple(hosts)

    def origins(self) -> tuple[str, ...]:
        origins = []
        for item in self.items(ALLOWED_ORIGINS):
            try:
                origins.append(parse_origin(item))
            except ValueError:
                self.problem(
                    ALLOWED_ORIGINS, f"{item!r} is not a valid origin: use scheme://host:port, e.g. https://app.example"
                )
        return tuple(origins)

    def termination_endpoint(self) -> TerminationEndpoint | None:
        value = self.text(TERMINATION_ENDPOINT)
        if value is None:
            return None
        if "://" in value:
            return self._termination_url(value)
        if not _TERMINATION_PATH.fullmatch(value):
            self.problem(TERMINATION_ENDPOINT, f"{value!r} is not a valid path: use one like /quitquitquit")
        return TerminationEndpoint(value)

    def _termination_url(self, url: str) -> TerminationEndpoint | None:
        """Return the endpoint of a URL as eoepca-security 2.0 takes it."""
        try:
            parts = split_url(url)
            host, port = parse_host(parts.netloc)
        except ValueError:
            parts = None
        if parts is None or parts.query or parts.fragment or not _TERMINATION_PATH.fullmatch(parts.path):
            self.problem(
                TERMINATION_ENDPOINT,
                "must have a host and a path, such as http://0.0.0.0/quitquitquit (0.0.0.0 is any host), or be a path "
                "like /quitquitquit",
            )
            return None
        return TerminationEndpoint(parts.path, None if parts.hostname in EVERYWHERE else host, port, any_method=True)

    def services_file(self) -> Path | None:
        path = self.text(SERVICES)
        return Path(path) if path else None

    def upstream(self, host: str, port: int, *, is_required: bool) -> str | None:
        hint = f"set it to the protected service, e.g. https://service.example:9200, or use {SERVICES.env} for several"
        url = self.required(UPSTREAM, hint) if is_required else self.text(UPSTREAM)
        if not url:
            return None
        try:
            parts = split_url(url)
            parse_host(parts.netloc.rpartition("@")[2])
        except ValueError:
            self.problem(UPSTREAM, "is not a valid URL: it must look like https://service.example:9200")
            return None
        if parts.username is not None or parts.path.strip("/") or parts.query or parts.fragment:
            self.problem(
                UPSTREAM, "must be only scheme, host and port: requests have their own path, so put the rest into those"
            )
            return None
        if (
            is_loopback(parts.hostname)
            and (parts.port or DEFAULT_PORTS[parts.scheme]) == port
            and (is_loopback(host) or host in EVERYWHERE)
        ):
            self.problem(UPSTREAM, f"is the address of the proxy itself: change it or {self.name(PORT)}")
            return None
        if parts.scheme == "http" and not is_loopback(parts.hostname):
            name, service = self.name(UPSTREAM), parts.hostname
            self.warnings.append(f"{name} is plain http: anyone on the network path to {service} can read the token")
        return f"{parts.scheme}://{parts.netloc.lower()}"

    def workers(self) -> int:
        value = self.text(WORKERS) or WORKERS.default
        if not re.fullmatch(r"[0-9]{1,3}", value) or not 1 <= int(value) <= MAX_WORKERS:
            self.problem(WORKERS, f"{value!r} is not a valid number of processes: use 1 to {MAX_WORKERS}")
            return 1
        if int(value) > 1 and not hasattr(os, "fork"):
            self.problem(WORKERS, "must be 1 on this system, which cannot fork")
        return int(value)

    def client_timeout(self) -> int:
        """Return how long a client may keep the proxy waiting, in seconds."""
        value = self.text(CLIENT_TIMEOUT) or CLIENT_TIMEOUT.default
        if not re.fullmatch(r"[0-9]{1,5}", value) or not 1 <= int(value) <= MAX_CLIENT_TIMEOUT:
            self.problem(CLIENT_TIMEOUT, f"{value!r} is not a valid number of seconds: use 1 to {MAX_CLIENT_TIMEOUT}")
            return int(CLIENT_TIMEOUT.default)
        return int(value)

    def held_bytes(self) -> int:
        """Return how many bytes of bodies a process may hold."""
        value = self.text(HELD_BYTES) or HELD_BYTES.default
        if not re.fullmatch(r"[0-9]{1,15}", value):
            self.problem(
                HELD_BYTES, f"{value!r} is not a valid number of bytes: use one like {HELD_BYTES.default}, or 0"
            )
            return int(HELD_BYTES.default)
        return int(value)

    def endpoint(self) -> str:
        """Return the path and query to request from the service. Ignores the host of a URL."""
        value = self.text(ENDPOINT) or ENDPOINT.default
        path = re.sub(r"^https?://[^/?#]*", "", value).partition("#")[0] or "/"
        if not re.fullmatch(r"/[!-~]*", path):
            self.problem(ENDPOINT, "is not a valid path: use one like /collections")
        return path


def readable_by_all(path: Path) -> bool:
    """Return whether all users can read a file, and its owner can change that.

    Containers get their secrets readable, but on read-only mounts, which no other user sees.
    """
    if not hasattr(os, "geteuid"):  # Windows has other means
        return False
    try:
        mode, mount = path.stat().st_mode, os.statvfs(path)
    except OSError:
        return False
    return stat.S_ISREG(mode) and mode & 0o004 != 0 and not mount.f_flag & os.ST_RDONLY


def _meant(name: str, known: Iterable[str]) -> str | None:
    """Return the setting that was probably meant, or None if none is near: they all begin alike."""
    words = name.split("_")
    # SECRET is CLIENT_SECRET, although ISSUER has more letters in common.
    pattern = "(.+_)?".join(f"{re.escape(word)}_" for word in words)
    longer = [one for one in known if len(words) > 2 and re.fullmatch(f"{pattern}(.+_)?", f"{one}_")]
    close = difflib.get_close_matches(name, longer, 1, 0) or difflib.get_close_matches(name, known, 1)
    if not close:
        return None
    similarity = difflib.SequenceMatcher(None, close[0], name).ratio()
    different = round((1 - similarity) * (len(name) + len(close[0])))
    return close[0] if close[0] in longer or different <= _TYPO_LETTERS else None


def _is_port(text: str) -> bool:
    return re.fullmatch(r"[0-9]{1,5}", text) is not None and int(text) <= 65535


def _shown(path: Path | str) -> str:
    """Return a path for a message, unless it may be a secret that was set instead of a file name."""
    text = str(path)
    return text if re.match(r"[~./]", text) and len(text) < 200 else "the file"


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error)
