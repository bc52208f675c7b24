"""`mitmdump -s` loads a script again when somebody edits it: what serves then, or ends, while requests run."""

import contextlib
import itertools
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from eoepca_security.testing import Behaviour, FakeIssuer
from tests.support.environment import settings_for
from tests.support.processes import ROOT, ProxyProcess, run_process
from tests.support.service import Service
from tests.support.waiting import eventually

GOOD = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n" + (ROOT / "mitmproxy-oidc-addon.py").read_text()
RAISE = "raise RuntimeError('edited')"
AGAIN = "the OIDC add-on was loaded again: the edited script serves from now on"
GONE = "the OIDC add-on was unloaded, and the edited script brought no other: stopping with exit code 1"
NOT_STARTED = "the edited script could not start the OIDC add-on: stopping with exit code 1"


class Clients:
    """Three that ask again and again, and keep what they get: a status, or None where the connection ended."""

    def __init__(self, url: str) -> None:
        self.statuses: list[int | None] = []
        self._url, self._over = url, threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(3)]

    def __enter__(self) -> "Clients":
        for thread in self._threads:
            thread.start()
        eventually(lambda: self.statuses.count(200) > 10)
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, number: int) -> None:
        body = b"x" * number or None
        with httpx.Client(trust_env=False, timeout=20) as client:
            while not self._over.is_set():
                try:
                    self.statuses.append(client.request("POST" if body else "GET", self._url, content=body).status_code)
                except httpx.TransportError:
                    self.statuses.append(None)
                    time.sleep(0.01)


@contextlib.contextmanager
def proxy_of(script: Path, service: str, environment: dict[str, str]) -> Iterator[ProxyProcess]:
    mitmdump = str(Path(sys.executable).parent / "mitmdump")
    command = [mitmdump, "--set", "flow_detail=0", "-s", str(script), "--mode", f"reverse:{service}@127.0.0.1:0"]
    proxy = ProxyProcess(run_process(command, environment, script.parent)).wait_until_started()
    try:
        yield proxy
    finally:
        proxy.stop()


_later = itertools.count(5, 5)


def edit(script: Path, text: str | None) -> None:
    """Write the script anew, all at once, as editors do; None deletes it."""
    if text is None:
        script.unlink()
        return
    new = script.with_suffix(".new")
    new.write_text(text)
    at = time.time() + next(_later)  # mitmproxy compares times, and looks once a second
    os.utime(new, (at, at))
    new.replace(script)


EDITS = {
    "no Python": ("this is no Python", GONE),
    "deleted": (None, GONE),
    "without the add-on": ("addons = []", GONE),
    "raises first": (f"{RAISE}\n{GOOD}", GONE),
    "cannot load": (f"{GOOD}\ndef load(_):\n    {RAISE}", GONE),
    "cannot be configured": (f"{GOOD}\ndef configure(_):\n    {RAISE}", NOT_STARTED),
    "cannot run": (f"{GOOD}\ndef running():\n    {RAISE}", NOT_STARTED),
}


OFTEN = {"no Python", "deleted", "cannot run"}


@pytest.mark.parametrize(
    ("text", "told"),
    [pytest.param(*EDITS[name], id=name, marks=() if name in OFTEN else pytest.mark.soak) for name in EDITS],
)
def test_a_script_that_is_spoilt_ends_the_proxy_with_1_and_sends_nothing_without_a_token(
    text: str | None, told: str, base_environment: dict[str, str], tmp_path: Path
) -> None:
    script = tmp_path / "addon.py"
    script.write_text(GOOD)
    with FakeIssuer() as issuer, Service(issuer) as service:
        environment = base_environment | settings_for(issuer)
        with proxy_of(script, service.url, environment) as proxy, Clients(proxy.url) as clients:
            edit(script, text)
            assert proxy.wait_until_ended() == 1
            assert proxy.output.count(told) == 1
            assert AGAIN not in proxy.output
            assert "SystemExit" not in proxy.output
        assert set(clients.statuses) <= {200, 403, 503, None}
        assert all(seen.authorized for seen in service.seen)


def test_a_script_that_is_edited_and_still_good_goes_on_with_the_session(
    base_environment: dict[str, str], tmp_path: Path
) -> None:
    script = tmp_path / "addon.py"
    script.write_text(GOOD)
    token_file = tmp_path / "token"
    # The store is none: what the first one got to is in memory only.
    with FakeIssuer(Behaviour(refresh_tokens="rotate")) as issuer, Service(issuer) as service:
        environment = base_environment | settings_for(issuer, OPEN_ID_TOKEN_FILE=str(token_file))
        with proxy_of(script, service.url, environment) as proxy, Clients(proxy.url) as clients:
            edit(script, GOOD + "\n# edited")
            eventually(lambda: AGAIN in proxy.output and proxy.output.count("OIDC proxy listening") == 2)
            served = len(clients.statuses)
            eventually(lambda: len(clients.statuses) > served + 10)
            # The first one does not remove what the second one has written.
            assert issuer.accepts(token_file.read_text())
            assert proxy.stop() == 0
            assert not token_file.exists()
        assert set(clients.statuses[: served + 10]) == {200}
        assert all(seen.authorized for seen in service.seen)
        assert issuer.reuses == 0
