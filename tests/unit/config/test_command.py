"""The name of this program in messages, for each way to call it."""

import os
import re
import shlex
import sys
from pathlib import Path

import pytest

import eoepca_security
from eoepca_security.proxy.config.command import Command, _comes_from_outside, _way_in, _words

VENV = "/home/u/.venv/bin"
PACKAGE = Path(eoepca_security.__file__).parent
MODULE = "eoepca_security.proxy"


@pytest.mark.parametrize(
    ("script", "original", "parent", "on_path", "expected"),
    [
        (f"{VENV}/oidc-proxy", f"{VENV}/python {VENV}/oidc-proxy check", "bash", f"{VENV}/oidc-proxy", "oidc-proxy"),
        (f"{VENV}/oidc-proxy", f"{VENV}/python {VENV}/oidc-proxy", "bash", None, f"{VENV}/oidc-proxy"),
        (f"{VENV}/oidc-proxy", f"{VENV}/python {VENV}/oidc-proxy", "bash", "/usr/bin/true", f"{VENV}/oidc-proxy"),
        (
            f"{VENV}/oidc-proxy",
            f"{VENV}/python {VENV}/oidc-proxy token",
            "uv run --extra proxy oidc-proxy token",
            None,
            "uv run --extra proxy oidc-proxy",
        ),
        (
            "/cache/bin/oidc-proxy",
            "/cache/bin/python /cache/bin/oidc-proxy demo",
            "uv tool uvx --from '.[proxy]' oidc-proxy demo",
            None,
            "uv tool uvx --from '.[proxy]' oidc-proxy",
        ),
        ("run-mitmproxy.py", "python3.11 run-mitmproxy.py token", "bash", None, "python3.11 run-mitmproxy.py"),
        ("../run-mitmproxy.py", "python -X dev ../run-mitmproxy.py", "sh", None, "python -X dev ../run-mitmproxy.py"),
        (
            "run-mitmproxy.py",
            f"{VENV}/python3 run-mitmproxy.py check",
            ".uv/bin/uv run --no-dev --extra proxy run-mitmproxy.py check",
            None,
            ".uv/bin/uv run --no-dev --extra proxy run-mitmproxy.py",
        ),
        (
            "run-mitmproxy.py",
            "python run-mitmproxy.py",
            "uv run --index https://user:password@index.example run-mitmproxy.py",
            None,
            "uv run run-mitmproxy.py",
        ),
        (f"/x/{MODULE}/__main__.py", f"python -m {MODULE} token", "bash", None, f"python -m {MODULE}"),
        (
            f"/x/{MODULE}/__main__.py",
            f"{VENV}/python -m {MODULE} token",
            f"uv run python -m {MODULE} token",
            None,
            f"uv run python -m {MODULE}",
        ),
        # mitmdump with the add-on
        ("/usr/bin/mitmdump", "python /usr/bin/mitmdump -s x.py", "bash", None, "/venv/bin/python -m " + MODULE),
        ("/usr/bin/mitmdump", "python /usr/bin/mitmdump", "uv run --extra proxy mitmdump", None, "oidc-proxy"),
    ],
)
def test_the_name_is_the_one_that_it_was_called_by(
    script: str, original: str, parent: str, on_path: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/venv/bin/python")
    words = _words(script, shlex.split(original), shlex.split(parent), lambda _name: on_path)
    if "mitmdump" in parent:
        expected = f"uv run --extra proxy {expected}"
    assert shlex.join(words) == expected


def test_a_script_that_was_started_by_its_first_line_is_named_like_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda _path, _mode: True)
    assert _words("./run-mitmproxy.py", ["python3", "./run-mitmproxy.py", "check"], [], lambda _name: None) == [
        "./run-mitmproxy.py"
    ]


def test_a_command_repeats_the_options_that_it_needs() -> None:
    command = Command("oidc-proxy", ("--env-file", "my settings"), ("--port", "9000"))
    assert command.line("login") == "oidc-proxy login --env-file 'my settings'"
    assert command.line("login --browser") == "oidc-proxy login --browser --env-file 'my settings'"
    assert command.run("check") == "run `oidc-proxy check --env-file 'my settings' --port 9000`"
    assert "\n" not in Command(options=("--issuer", "https://x\nexample")).line("login")


def test_the_main_process_of_a_container_names_what_works_while_it_runs_and_afterwards() -> None:
    command = Command("docker exec -it 0123456789ab oidc-proxy", ("--client-id", "c"), is_container=True)
    assert command.run("login") == "run `docker exec -it 0123456789ab oidc-proxy login --client-id c`"
    assert command.ended.run("login") == "run this container again with `login --client-id c` as its command"
    assert command.usage == "oidc-proxy"


def test_a_pod_that_has_ended_is_not_said_to_log_in() -> None:
    command = Command("kubectl exec -it -n n oidc-proxy-x1 -- oidc-proxy", is_container=True)
    assert command.run("login") == "run `kubectl exec -it -n n oidc-proxy-x1 -- oidc-proxy login`"
    assert "deploy/kubernetes/login.yaml" in command.ended.run("login")
    assert "set OPEN_ID_REFRESH_TOKEN to the refresh token of a new login" in command.ended.run("login")
    assert command.ended.run("login --scope openid").startswith("run this container again")


@pytest.mark.parametrize(
    ("environ", "host", "expected"),
    [
        ({}, "0123456789ab", "docker exec -it 0123456789ab"),
        ({}, "proxy.example", "docker exec -it NAME"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "oidc-proxy-x1", "kubectl exec -it oidc-proxy-x1 --"),
    ],
)
def test_a_container_is_entered_from_outside(environ: dict[str, str], host: str, expected: str) -> None:
    assert _way_in(environ, host) == expected


@pytest.mark.parametrize(
    ("pid", "parent", "at_terminal", "is_outside"),
    [
        (1, 0, True, True),  # docker run
        (40, 0, True, True),  # docker exec
        (7, 1, False, True),  # docker run --init
        (30, 1, True, False),  # in a shell that is the main process
        (30, 20, True, False),  # in a shell that docker exec started
    ],
)
def test_a_shell_in_a_container_is_inside(pid: int, parent: int, at_terminal: bool, is_outside: bool) -> None:
    assert _comes_from_outside(pid, parent, at_terminal=at_terminal) is is_outside


def test_no_other_module_decides_the_name() -> None:
    files = [*PACKAGE.rglob("*.py")]
    assert len(files) > 50
    named = {
        file.relative_to(PACKAGE).as_posix()
        for file in files
        if re.search(r"(run-mitmproxy\.py|oidc-proxy) (login|logout|check|token|serve|demo)", file.read_text())
    }
    assert named == {"proxy/config/variables.py"}  # descriptions, which are in documents, too
