"""The command line, called in this process: what it prints and how it ends."""

import inspect
import io
import logging
import os
import re
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from eoepca_security.oauth.verify import unverified_claims
from eoepca_security.proxy.cli import launch
from eoepca_security.proxy.cli.main import cli
from eoepca_security.proxy.cli.main import main as run
from eoepca_security.proxy.config.command import Command
from eoepca_security.proxy.config.variables import VARIABLES
from eoepca_security.proxy.runtime import output
from eoepca_security.testing import Behaviour, FakeIssuer
from tests.support.environment import set_environment
from tests.support.processes import ROOT

FLAGS = [variable.flag for variable in VARIABLES if variable.flag]


def main(arguments: Sequence[str], command: Command = Command()) -> int:  # noqa: B008  it is frozen
    return run(arguments, command)


@pytest.fixture(autouse=True)
def _clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    for variable in VARIABLES:
        monkeypatch.delenv(variable.env, raising=False)
        monkeypatch.delenv(f"{variable.env}_FILE", raising=False)
    # `token` changes its level, for the rest of its process.
    logger = logging.getLogger("eoepca_security.session.token_cycle")
    level = logger.level
    yield
    logger.setLevel(level)


def test_token_prints_an_access_token_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeIssuer() as issuer:
        set_environment(monkeypatch, issuer)
        assert main(["token"]) == 0
        out, err = capsys.readouterr()
        assert issuer.accepts(out.removesuffix("\n"))
        assert err == ""


def test_token_writes_it_into_a_file_and_prints_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeIssuer() as issuer:
        set_environment(monkeypatch, issuer, OPEN_ID_TOKEN_FILE_MODE="0640", PROXY_SERVICES=write_services(tmp_path))
        for arguments, audience in (([], "service"), (["--service", "stac"], "stac-api")):
            assert main(["token", "--file", "token", *arguments]) == 0
            assert capsys.readouterr() == ("", "")
            token = (tmp_path / "token").read_text()
            assert issuer.accepts(token)
            assert unverified_claims(token)["aud"] == audience
            assert (tmp_path / "token").stat().st_mode & 0o777 == 0o640


def test_a_bad_place_for_the_token_ends_with_2_before_anybody_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "precious").write_text("not a token\n")
    with FakeIssuer() as issuer:
        set_environment(monkeypatch, issuer)
        for place in (".", "nowhere/token", "precious"):
            assert main(["token", "--file", place]) == 2
            assert capsys.readouterr().err.startswith(f"--file: {tmp_path}")
        assert main(["token", "--watch"]) == 2
        assert "--watch needs --file" in capsys.readouterr().err
        assert issuer.requests == []
    assert (tmp_path / "precious").read_text() == "not a token\n"


def test_a_token_that_cannot_be_written_ends_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fchmod", full)
    with FakeIssuer() as issuer:
        set_environment(monkeypatch, issuer)
        assert main(["token", "--file", "token"]) == 1
    assert capsys.readouterr().err.startswith(f"--file: {tmp_path}/token cannot be used (No space left on device)")


def write_services(folder: Path) -> str:
    """Write a file with a service of each kind, and return its path."""
    file = folder / "services.toml"
    file.write_text(
        """
        [service.stac]
        url = "https://stac.example"
        token = "exchange"
        audience = "stac-api"
        format = "oidc/{token}"
        [service.data]
        url = "https://data.example"
        token = "scope"
        scope = "data:read"
        [service.plain]
        url = "https://plain.example"
        """
    )
    return str(file)


@pytest.mark.parametrize(
    ("service", "claims"),
    [
        ("stac", {"aud": "stac-api"}),
        ("data", {"scope": "data:read openid offline_access"}),
        ("plain", {"aud": "service"}),
        ("default", {"aud": "service"}),
    ],
)
def test_token_prints_that_of_a_service_and_nothing_else(
    service: str,
    claims: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with FakeIssuer(Behaviour(scope="openid offline_access data:read")) as issuer:
        set_environment(monkeypatch, issuer, REMOTE_PROTECTED_DOMAIN="https://service.example")
        assert main(["token", "--services", write_services(tmp_path), "--service", service]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        token = out.removesuffix("\n")
        assert issuer.accepts(token)
        assert unverified_claims(token).items() >= claims.items()


def test_the_token_of_an_unknown_service_ends_with_2_and_the_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeIssuer() as issuer:
        set_environment(monkeypatch, issuer, PROXY_SERVICES=write_services(tmp_path))
        assert main(["token", "--service", "geo"]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert "--service: 'geo' is unknown: use one of stac, data, plain" in err
        monkeypatch.delenv("PROXY_SERVICES")
        assert main(["token", "--service", "stac"]) == 2
        assert "use one of default" in capsys.readouterr().err
        assert issuer.requests == []


def test_a_refused_token_of_a_service_names_what_is_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeIssuer(Behaviour(exchange=False)) as issuer:
        set_environment(monkeypatch, issuer, PROXY_SERVICES=write_services(tmp_path))
        assert main(["token", "--service", "stac"]) == 1
        assert "Standard Token Exchange" in capsys.readouterr().err
        issuer.end_sessions()
        assert main(["token", "--service", "stac"]) == 1
        err = capsys.readouterr().err
        assert "login --services" not in err  # the environment has the file
        assert "run `oidc-proxy login`" in err


def test_the_logins_token_has_all_its_scopes_after_that_of_a_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeIssuer(Behaviour(scope="openid data:read", refresh_tokens="rotate")) as issuer:
        services = write_services(tmp_path)
        set_environment(monkeypatch, issuer, PROXY_SERVICES=services, OPEN_ID_TOKEN_STORE=str(tmp_path / "store"))
        assert main(["token", "--service", "data"]) == 0
        assert main(["token"]) == 0
        assert capsys.readouterr().err == ""
        assert issuer.requests[-1].form["scope"] == "openid data:read"
        assert issuer.reuses == 0


def test_the_token_of_a_service_warns_when_the_refresh_token_is_used_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeIssuer(Behaviour(refresh_tokens="rotate")) as issuer:
        set_environment(monkeypatch, issuer, PROXY_SERVICES=write_services(tmp_path))
        assert main(["token", "--service", "data"]) == 0
        assert "replaced the refresh token" in capsys.readouterr().err
        assert issuer.reuses == 0


def test_an_empty_first_argument_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([""], ["", "--", "--set", "flow_detail=1"]):
        assert main(arguments) == 2
        assert capsys.readouterr().err.startswith("OPEN_ID_CONNECT_URL: ")  # from `serve`
    assert main(["", "token", "--help"]) == 0
    assert "access token" in capsys.readouterr().out


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("verb", "says"),
    [
        ("token", "waiting for a token from http"),
        ("check", "waiting for the identity provider ..."),
        ("login", "waiting for the identity provider ..."),
    ],
)
def test_a_terminal_shows_what_a_command_waits_for(
    verb: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(output, "PATIENCE", 0.01)
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with FakeIssuer() as issuer:
        issuer.behaviour.login.interval = 0.01
        store = {"OPEN_ID_TOKEN_STORE": str(tmp_path / "store")} if verb == "login" else {}
        set_environment(monkeypatch, issuer, REMOTE_PROTECTED_DOMAIN=issuer.url.partition("/realms")[0], **store)
        issuer.behaviour.delay = 0.05
        main([verb])
    assert says in terminal.getvalue()
    assert terminal.getvalue().endswith("\r\x1b[K")
    assert "waiting for" not in capsys.readouterr().out


def test_token_with_client_credentials(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeIssuer(client_secret="s") as issuer:
        set_environment(monkeypatch, issuer, OPEN_ID_CONNECT_GRANT="client_credentials", OPEN_ID_REFRESH_TOKEN="")
        assert main(["token"]) == 0
        assert issuer.accepts(capsys.readouterr().out.removesuffix("\n"))
        assert issuer.requests[0].form["grant_type"] == "client_credentials"


def test_token_warns_when_the_refresh_token_is_used_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeIssuer(Behaviour(refresh_tokens="rotate")) as issuer:
        set_environment(monkeypatch, issuer)
        assert main(["token"]) == 0
        assert "replaced the refresh token" in capsys.readouterr().err


def test_a_token_that_cannot_be_had_ends_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeIssuer() as issuer:
        issuer.end_sessions()
        set_environment(monkeypatch, issuer)
        assert main(["token"]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert "credentials_rejected" in err
        assert "OPEN_ID_REFRESH_TOKEN" in err
        assert issuer.refresh_token not in err


def test_a_token_for_another_audience_is_not_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeIssuer(Behaviour(audience="service")) as issuer:
        set_environment(monkeypatch, issuer, OPEN_ID_CONNECT_AUDIENCE="service")
        assert main(["token"]) == 0
        capsys.readouterr()
        set_environment(monkeypatch, issuer, OPEN_ID_CONNECT_AUDIENCE="another")
        assert main(["token"]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert "token_invalid" in err
        assert "OPEN_ID_CONNECT_AUDIENCE" in err


@pytest.mark.parametrize("verb", [[], ["serve"], ["token"]])
def test_wrong_settings_end_with_2_and_a_line_each(verb: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(verb) == 2
    out, err = capsys.readouterr()
    assert out == ""
    named = [line.partition(":")[0] for line in err.splitlines()]
    expected = ["OPEN_ID_CONNECT_URL", "OPEN_ID_CONNECT_CLIENT_ID", "OPEN_ID_REFRESH_TOKEN"]
    assert named == expected + ([] if verb == ["token"] else ["REMOTE_PROTECTED_DOMAIN"]) + [".env"]


@pytest.mark.parametrize("host", ["no-such-host.invalid", f"{'a' * 70}.example", "203.0.113.7"])
def test_an_address_that_cannot_be_listened_on_is_a_wrong_setting(
    host: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeIssuer() as issuer:
        set_environment(monkeypatch, issuer, PROXY_HOST=host, REMOTE_PROTECTED_DOMAIN="http://127.0.0.1:9")
        assert main(["serve"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("PROXY_HOST: ")


def test_a_port_that_is_taken_ends_with_1_and_one_short_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeIssuer() as issuer, socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        more = {"PROXY_PORT": address.rpartition(":")[2], "REMOTE_PROTECTED_DOMAIN": "http://127.0.0.1:9"}
        set_environment(monkeypatch, issuer, **more)
        assert main(["serve"]) == 1
    said = f"PROXY_PORT: cannot listen on {address} (Address already in use)"
    remedy = "stop the program that uses it, or choose another port with --port"
    assert capsys.readouterr().err == f"{said}: {remedy}\n"


def test_options_after_the_dashes_count_as_settings(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--", "--set", "oidc_url=ftp://x", "--set=oidc_client_id=c", "--set", "unrelated=1"]
    arguments += ["--set", "listen_port=x"]
    assert main(arguments) == 2
    named = [line.partition(":")[0] for line in capsys.readouterr().err.splitlines()]
    assert named == ["OPEN_ID_CONNECT_URL", "OPEN_ID_REFRESH_TOKEN", "PROXY_PORT", "REMOTE_PROTECTED_DOMAIN", ".env"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["bogus"],
        ["--bogus"],
        ["serve", "extra"],
        ["serve", "--log-format", "xml"],
        ["--log-format", "json", "check"],
        *([verb, "--", "--set", "x=y"] for verb in ("check", "login", "logout", "token", "demo")),
    ],
)
def test_wrong_arguments_end_with_2(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert "Usage: oidc-proxy" in capsys.readouterr().err


def test_help_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for word in (*cli.commands, "Examples:"):
        assert word in out


def test_the_launcher_and_the_documents_name_the_commands() -> None:
    launcher = (ROOT / "run-mitmproxy.py").read_text()
    assert set(launch.COMMANDS) == set(cli.commands) - {"serve"}
    usage = re.search(r"run-mitmproxy\.py \[([\w|]+)\]", launcher)
    assert usage is not None
    assert set(usage[1].split("|")) == set(cli.commands)
    row = re.search(r"^\| `oidc-proxy`.*$", (ROOT / "docs" / "how-it-works.md").read_text(), re.MULTILINE)
    assert row is not None
    assert {name for name in cli.commands if f"`{name}`" in row[0]} == set(cli.commands)


@pytest.mark.parametrize("verb", sorted(cli.commands))
def test_help_of_each_command_has_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    out = capsys.readouterr().out
    assert re.search(rf"Examples?:\n.*oidc-proxy {verb}", out)
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize(("called", "name"), [("oidc-proxy", "OIDC_PROXY"), ("x/run-mitmproxy.py", "RUN_MITMPROXY_PY")])
@pytest.mark.parametrize(
    ("typed", "completions"),
    [
        ("log", {"login", "logout"}),
        ("--", {"--version", "--env-file", "--log-format", "--help", *FLAGS}),
        (
            "token --",
            {"--env-file", "--issuer", "--client-id", "--services", "--service", "--file", "--watch", "--help"},
        ),
        ("serve --p", {"--port"}),
    ],
)
def test_the_shell_can_complete_commands_and_options(
    called: str,
    name: str,
    typed: str,
    completions: set[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(f"_{name}_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", f"{called} {typed}")
    monkeypatch.setenv("COMP_CWORD", str(1 + typed.count(" ")))
    with pytest.raises(SystemExit) as ended:
        main([], Command(called))
    assert ended.value.code == 0
    assert set(capsys.readouterr().out.split()) == {f"plain,{completion}" for completion in completions}


def test_the_help_has_completion_only_for_what_a_shell_completes(capsys: pytest.CaptureFixture[str]) -> None:
    for called, line in (
        ("oidc-proxy", 'eval "$(_OIDC_PROXY_COMPLETE=bash_source oidc-proxy)"'),
        ("./run-mitmproxy.py", 'eval "$(_RUN_MITMPROXY_PY_COMPLETE=bash_source ./run-mitmproxy.py)"'),
        ("/home/u/.venv/bin/oidc-proxy", 'eval "$(_OIDC_PROXY_COMPLETE=bash_source /home/u/.venv/bin/oidc-proxy)"'),
        ("python -m eoepca_security.proxy", None),
        ("python run-mitmproxy.py", None),
        ("uv run --no-dev --extra proxy run-mitmproxy.py", None),
        ("uv run oidc-proxy", None),
        ("docker exec -it 0123456789ab oidc-proxy", None),
    ):
        assert main(["--help"], Command(called)) == 0
        out = capsys.readouterr().out
        assert line in out if line is not None else "eval" not in out


# --- our own options -------------------------------------------------------------------------------------------------


def test_no_summary_is_cut_short(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for command in cli.commands.values():
        assert inspect.cleandoc(command.help or "").partition("\n")[0] in out


def test_our_options_come_before_all_others_and_messages_name_what_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.env").write_text("OPEN_ID_CONNECT_URL=https://file.example\nOPEN_ID_CONNECT_CLIENT_ID=ftp\n")
    monkeypatch.setenv("OPEN_ID_CONNECT_URL", "https://environment.example")
    monkeypatch.setenv("REMOTE_PROTECTED_DOMAIN", "https://service.example")
    arguments = ["serve", "--env-file", "other.env", "--port", "x", "--issuer", "ftp://option", "--upstream", ""]
    assert main([*arguments, "--", "--set", "oidc_url=ftp://set"]) == 2
    issuer, session, port = capsys.readouterr().err.splitlines()
    assert issuer.startswith("--issuer: ")
    assert "run `oidc-proxy login --env-file other.env --issuer ftp://option`" in session
    assert port.startswith("--port: 'x' is not a valid port")
    assert main([*arguments[:-4], "--", "--set", "oidc_url=ftp://set"]) == 2
    assert capsys.readouterr().err.startswith("OPEN_ID_CONNECT_URL: ")


def test_a_file_for_settings_takes_the_place_of_dotenv(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ".env").write_text("OPEN_ID_CONNECT_SCOPE=a\tb\n")
    with FakeIssuer() as issuer:
        (tmp_path / "other").write_text(
            f"OPEN_ID_CONNECT_URL={issuer.url}\nOPEN_ID_CONNECT_CLIENT_ID={issuer.client_id}\n"
            f"OPEN_ID_REFRESH_TOKEN={issuer.refresh_token}\nOPEN_ID_TOKEN_STORE=none\n"
        )
        (tmp_path / "other").chmod(0o644)
        for arguments in (["token", "--env-file", "other"], ["--env-file", str(tmp_path / "other"), "token"]):
            assert main(arguments) == 0
            out, err = capsys.readouterr()
            assert issuer.accepts(out.removesuffix("\n"))
            assert err == ""  # scripts may take it for an error; the proxy warns that all users can read the file


@pytest.mark.parametrize("verb", sorted(cli.commands))
def test_a_file_for_settings_that_is_not_there_ends_with_2(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in ([verb, "--env-file", "gone"], ["--env-file", "gone", verb]):
        assert main(arguments) == 2
        out, err = capsys.readouterr()
        assert (out, err) == ("", f"--env-file: {tmp_path / 'gone'} does not exist: check the name\n")


@pytest.mark.parametrize("arguments", [["--port", "1", "login"], ["--workers", "2", "token"]])
def test_an_option_of_another_command_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert f"{arguments[0]} before the command is an option of serve" in capsys.readouterr().err


def test_no_option_is_for_a_secret() -> None:
    assert not [variable for variable in VARIABLES if variable.flag and variable.secret]
