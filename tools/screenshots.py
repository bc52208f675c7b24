"""Take the documentation's pictures of the running product: `uv run --group browser tools/screenshots.py [FOLDER]`.

This runs the launcher in front of an identity provider for tests, and shows its status page to Chromium. Pictures of
the terminal are made from what the commands print. Run it after a change to either, and look at the pictures.
"""

import base64
import contextlib
import fcntl
import http.client
import io
import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text
from selenium.webdriver import Chrome

from eoepca_security.testing import Behaviour, FakeIssuer
from eoepca_security.testing.local_server import Handler, LocalServer

ROOT: Final = Path(__file__).resolve().parent.parent
FOLDER: Final = ROOT / "docs" / "assets" / "screenshots"
COLUMNS: Final = 104
TIMEOUT: Final = 60.0
_DESKTOP: Final = 860
_PHONE: Final = (375, 667)

sys.path.insert(0, str(ROOT))

from tests.support.browser import chromium  # noqa: E402  needs the path


class Service(Handler):
    """A protected service that has some pages and not others."""

    def respond(self) -> None:
        """Answer by the path."""
        self.answer({"/collections": 200, "/moved": 307, "/secret": 401}.get(self.path, 404), {"path": self.path})


class Terminal:
    """A command in a terminal of its own. `text` is what it has printed so far, with its colours."""

    def __init__(self, arguments: list[str], environment: Mapping[str, str], folder: Path) -> None:
        self._ours, theirs = os.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
        self._process = subprocess.Popen(
            ["oidc-proxy", *arguments],
            cwd=folder,
            env=dict(environment),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        self.text = ""

    def wait_for(self, pattern: str) -> str:
        """Return the first group of `pattern` once it was printed. Raises TimeoutError and EOFError."""
        ends_at = time.monotonic() + TIMEOUT
        while (found := re.search(pattern, self.text)) is None:
            self._read(ends_at)
        return found[1] if found.groups() else found[0]

    def finish(self) -> str:
        """Return everything that the command prints until it ends."""
        with contextlib.suppress(EOFError):
            while True:
                self._read(time.monotonic() + TIMEOUT)
        self._process.wait(TIMEOUT)
        return self.text

    def stop(self) -> None:
        """End the command."""
        self._process.send_signal(signal.SIGTERM)
        self.finish()
        os.close(self._ours)

    def _read(self, ends_at: float) -> None:
        if not select.select([self._ours], [], [], max(0.0, ends_at - time.monotonic()))[0]:
            raise TimeoutError(self.text)
        try:
            self.text += os.read(self._ours, 65536).decode(errors="replace")
        except OSError:  # Linux says so when the command has closed its side
            raise EOFError(self.text) from None


def main(folder: Path) -> None:
    """Take all pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    behaviour = Behaviour(lifetime=300, refresh_tokens="rotate", refresh_expires_in=1800)
    behaviour.claims = {"sub": "6f0c9a1e-2b1f-4c57-9a55-0c8f3f1b7e21", "preferred_username": "alice"}
    with (
        tempfile.TemporaryDirectory() as home,
        FakeIssuer(behaviour, client_id="my-client", path="/realms/eoepca") as issuer,
        LocalServer(Service) as service,
    ):
        environment = {
            "HOME": home,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "LANG": "C.UTF-8",
            "TERM": "xterm-256color",
            "OPEN_ID_CONNECT_URL": issuer.url,
            "OPEN_ID_CONNECT_CLIENT_ID": "my-client",
            "REMOTE_PROTECTED_DOMAIN": service.url,
            "REMOTE_PROTECTED_ENDPOINT": "/collections",
            "PROXY_PORT": str(_free(8080)),
            "PROXY_ADMIN": f"127.0.0.1:{_free(8081)}",
        }
        for name in ("login", "check"):
            said = Terminal([name], environment, Path(home)).finish()
            _draw(folder / f"{name}.svg", f"oidc-proxy {name}", said.replace(home, "/home/alice"))
        proxy = Terminal([], environment, Path(home))
        try:
            proxy.wait_for("Ctrl-C")
            proxy.wait_for(r"╰.*╯")
            _draw(folder / "serve.svg", "oidc-proxy", proxy.text)
            with chromium(Path(home) / "chromium", "--hide-scrollbars") as driver:
                _photograph(folder, driver, issuer, environment)
        finally:
            proxy.stop()


def _photograph(folder: Path, driver: Chrome, issuer: FakeIssuer, environment: Mapping[str, str]) -> None:
    admin, proxy = f"http://{environment['PROXY_ADMIN']}/", f"127.0.0.1:{environment['PROXY_PORT']}"
    for path, number in (("/collections", 12), ("/moved", 1), ("/missing", 2)):
        for _ in range(number):
            _ask(proxy, path)
    _ask(proxy, "/collections", host="evil.example")
    _page(folder / "status.webp", driver, admin, "light", _DESKTOP, None)
    _page(folder / "status-phone.webp", driver, admin, "light", *_PHONE)
    _end_session(proxy, issuer)
    _page(folder / "status-problem.webp", driver, admin, "dark", _DESKTOP, 520)


def _end_session(proxy: str, issuer: FakeIssuer) -> None:
    """Leave the proxy without a token and without a session."""
    issuer.behaviour.lifetime = 1
    # After a 401 the proxy gets another token, which lives for a second.
    for path in ("/secret", "/collections"):
        _ask(proxy, path)
    issuer.behaviour.fault = _reject
    ends_at = time.monotonic() + TIMEOUT
    while _ask(proxy, "/collections") != 502:
        if time.monotonic() > ends_at:
            raise TimeoutError("the proxy still has a token")
        time.sleep(0.1)


def _reject(handler: Handler) -> bool:
    handler.answer(400, {"error": "invalid_grant", "error_description": "Token is not active"})
    return True


def _ask(address: str, path: str, host: str = "localhost") -> int:
    connection = http.client.HTTPConnection(address, timeout=TIMEOUT)
    try:
        connection.request("GET", path, headers={"Host": host})
        return connection.getresponse().status
    finally:
        connection.close()


def _free(port: int) -> int:
    """Return the usual port, or another one if it is taken."""
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind(("127.0.0.1", port))
        except OSError:
            tried.bind(("127.0.0.1", 0))
        return int(tried.getsockname()[1])


def _page(file: Path, driver: Chrome, url: str, scheme: str, width: int, height: int | None) -> None:
    """Save a picture of the page, or of its beginning if it is to have a certain `height`, in CSS pixels."""
    media = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
    size = {"width": width, "height": 600, "deviceScaleFactor": 1.5, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.get(url)
    height = height or driver.execute_script("return document.documentElement.scrollHeight")
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size | {"height": height})
    picture = driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "webp", "quality": 75})
    file.write_bytes(base64.b64decode(picture["data"]))


def _draw(file: Path, title: str, text: str) -> None:
    """Save what a command printed as a picture."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    console.print(Text.from_ansi(text.replace("\r\n", "\n").strip("\n")))
    # A picture fetches nothing, so it uses the reader's fonts.
    style = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    drawn = console.export_svg(title=title, code_format=style, unique_id=file.stem)
    file.write_text("\n".join(line.strip() for line in drawn.splitlines() if line.strip()) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
