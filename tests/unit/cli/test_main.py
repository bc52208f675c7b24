"""The command line, called in this process: what it prints and how it ends."""

import logging
import re
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from eoepca_security.proxy.cli.main import cli, main
from eoepca_security.proxy.config.variables import VARIABLES
from eoepca_security.testing import Behaviour, FakeIssuer
from tests.support.environment import set_environment
from tests.support.processes import ROOT


@pytest.fixture(autouse=True)
def _clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    for variable in VARIABLES:
        monkeypatch.delenv(variable.env, raising=False)
        monkeypatch.delenv(f"{variable.env}_FILE", raising=False)
    # `token` changes its level, for the rest of its process.
    logger = logging.getLogger("eoepca_security.session.source")
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


def test_an_empty_first_argument_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([""], ["", "--", "--set", "flow_detail=1"]):
        assert main(arguments) == 2
        assert capsys.readouterr().err.startswith("OPEN_ID_CONNECT_URL: ")  # from `serve`
    assert main(["", "token", "--help"]) == 0
    assert "access token" in capsys.readouterr().out


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
    remedy = "stop the program that uses it, or choose another port or PROXY_HOST"
    assert capsys.readouterr().err == f"{said}: {remedy}\n"


def test_options_after_the_dashes_count_as_settings(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--", "--set", "oidc_url=ftp://x", "--set=oidc_client_id=c", "--set", "unrelated=1"]
    assert main(arguments) == 2
    named = [line.partition(":")[0] for line in capsys.readouterr().err.splitlines()]
    assert named == ["OPEN_ID_CONNECT_URL", "OPEN_ID_REFRESH_TOKEN", "REMOTE_PROTECTED_DOMAIN", ".env"]


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
    assert "Usage: run-mitmproxy.py" in capsys.readouterr().err


def test_help_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for word in (*cli.commands, "Examples:"):
        assert word in out


def test_the_launcher_and_the_documents_name_the_commands() -> None:
    launcher = (ROOT / "run-mitmproxy.py").read_text()
    names = re.search(r"^if not \{(.*)\}\.intersection", launcher, re.MULTILINE)
    assert names is not None
    assert set(re.findall(r'"(\w+)"', names[1])) == set(cli.commands) - {"serve"}
    usage = re.search(r"run-mitmproxy\.py \[([\w|]+)\]", launcher)
    assert usage is not None
    assert set(usage[1].split("|")) == set(cli.commands)
    row = re.search(r"^\| `run-mitmproxy\.py` \|.*$", (ROOT / "docs" / "how-it-works.md").read_text(), re.MULTILINE)
    assert row is not None
    assert {name for name in cli.commands if f"`{name}`" in row[0]} == set(cli.commands)


@pytest.mark.parametrize("verb", sorted(cli.commands))
def test_help_of_each_command_has_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    out = capsys.readouterr().out
    assert re.search(rf"Examples?:\n.*run-mitmproxy\.py {verb}", out)
    assert max(map(len, out.splitlines())) <= 80


def test_the_shell_can_complete_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("_RUN_MITMPROXY_PY_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", "run-mitmproxy.py log")
    monkeypatch.setenv("COMP_CWORD", "1")
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 0
    assert capsys.readouterr().out.split() == ["plain,login", "plain,logout"]
