"""How this program was called, so that messages name a command that works when it is copied."""

import os
import re
import shlex
import shutil
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from eoepca_security.oauth.text import printable
from eoepca_security.proxy.config.variables import REFRESH_TOKEN

NAME: Final = "oidc-proxy"
LAUNCHER: Final = "run-mitmproxy.py"
MODULE: Final = "eoepca_security.proxy"

_NAMESPACE: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


@dataclass(frozen=True)
class Command:
    """How to call this program again.

    `text` goes into a shell as it is. `options` follow the name of every command, and `serve_options` those of `serve`
    and `check`. If `is_container`, this is the main process of a container, and `text` works while it runs;
    `has_ended` says that this will not be so when the message is read.
    """

    text: str = NAME
    options: tuple[str, ...] = ()
    serve_options: tuple[str, ...] = ()
    is_container: bool = False
    has_ended: bool = False

    @property
    def usage(self) -> str:
        """The name for usage lines and examples, which mostly come from a process that ends at once."""
        return NAME if self.is_container else self.text

    @property
    def program(self) -> str:
        """The name of the program, without what comes before it."""
        return Path(shlex.split(self.text)[-1]).name

    @property
    def completion_variable(self) -> str:
        """The environment variable with which a shell asks for completions."""
        return f"_{self.program}_COMPLETE".replace("-", "_").replace(".", "_").upper()

    @property
    def completion(self) -> str | None:
        """What turns on completion in bash; None where the shell completes another command, such as `uv`."""
        if self.program not in (NAME, LAUNCHER) or len(shlex.split(self.text)) > 1:
            return None
        return f'eval "$({self.completion_variable}=bash_source {self.text})"'

    @property
    def ended(self) -> "Command":
        """The same for messages that are read when this process has ended."""
        return replace(self, has_ended=True)

    def line(self, arguments: str) -> str:
        """Return the command with arguments, of which the first is the command's name."""
        return f"{self.text} {self._with_options(arguments)}"

    def run(self, arguments: str) -> str:
        """Return what to do to run it, for a sentence."""
        if self.is_container and self.has_ended:
            # Nobody runs a Job's pod by hand, and its store may end with it.
            if arguments == "login" and self.text.startswith("kubectl "):
                return (
                    "log in once with the store on a volume, as deploy/kubernetes/login.yaml does, or set "
                    f"{REFRESH_TOKEN.env} to the refresh token of a new login"
                )
            return f"run this container again with `{self._with_options(arguments)}` as its command"
        return f"run `{self.line(arguments)}`"

    def _with_options(self, arguments: str) -> str:
        serves = arguments.partition(" ")[0] in ("serve", "check")
        options = self.options + (self.serve_options if serves else ())
        return " ".join([arguments, *(shlex.quote(printable(option)) for option in options)])


def this_command(*, in_container: bool) -> Command:
    """Return how this process was called. `in_container` is whether it runs in a container."""
    text = shlex.join(_words(sys.argv[0], sys.orig_argv, _parent(), shutil.which))
    pid, parent = os.getpid(), os.getppid()
    if not in_container or not _comes_from_outside(pid, parent, at_terminal=_is_at_terminal()):
        return Command(text)
    inside = NAME if shutil.which(NAME) else text
    return Command(f"{_way_in(os.environ, socket.gethostname())} {inside}", is_container=1 in (pid, parent))


def _words(
    script: str, original: Sequence[str], parent: Sequence[str], which: Callable[[str], str | None]
) -> Sequence[str]:
    """Return the words that call this program.

    They come from `sys.argv[0]`, `sys.orig_argv` and the parent's command line. `which` finds a program on the path.
    """
    called = Path(script).name
    if called == NAME:
        words: Sequence[str] = [_short(script, which)]
    elif called == LAUNCHER:
        words = _launcher(script, original, which)
    elif MODULE in original:
        called, words = MODULE, _until(MODULE, original)
    else:  # mitmdump with the add-on, or a program that calls `main`
        own = Path(sys.executable).with_name(NAME)
        called, words = NAME, [_short(str(own), which)] if own.exists() else [sys.executable, "-m", MODULE]
    if parent and Path(parent[0]).name in ("uv", "uvx"):
        return _with_uv(called, script, parent) or words
    return words


def _launcher(script: str, original: Sequence[str], which: Callable[[str], str | None]) -> Sequence[str]:
    is_executable = "/" in script and os.access(script, os.X_OK)
    if is_executable and list(original[:2]) == ["python3", script]:  # as its first line makes it
        return [script]
    if _is_found(script, which):
        return [LAUNCHER]
    return _until(script, original) or [sys.executable, script]


def _with_uv(called: str, script: str, parent: Sequence[str]) -> Sequence[str]:
    """Return the words of `uv run` up to the program that it started; none if it started another one."""
    names = [Path(word).name for word in parent]
    started = called if called in names else "mitmdump"
    if started not in names:
        return []
    before = parent[: names.index(started)]
    if any("://" in word for word in before):  # an index's address may have a password
        before = ["uv", "run", *(["-m"] if called == MODULE else [])]
    return [*before, script if called == LAUNCHER else called]


def _short(path: str, which: Callable[[str], str | None]) -> str:
    """Return only the name of a program that the shell finds by it."""
    return Path(path).name if _is_found(path, which) else path


def _is_found(path: str, which: Callable[[str], str | None]) -> bool:
    found = which(Path(path).name)
    return found is not None and os.path.realpath(found) == os.path.realpath(path)


def _until(word: str, words: Sequence[str]) -> Sequence[str]:
    return words[: words.index(word) + 1] if word in words else []


def _parent() -> Sequence[str]:
    try:
        return Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except OSError:
        return []


def _is_at_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def _comes_from_outside(pid: int, parent: int, *, at_terminal: bool) -> bool:
    """Return whether somebody outside the container started this process, and not a shell inside.

    `docker exec` starts processes without a parent here; an init process is the parent of what it starts.
    """
    return pid == 1 or parent == 0 or (parent == 1 and not at_terminal)


def _way_in(environ: Mapping[str, str], host: str) -> str:
    """Return the command that runs another one in this container."""
    if "KUBERNETES_SERVICE_HOST" in environ:
        try:
            namespace = f" -n {_NAMESPACE.read_text().strip()}"
        except OSError:
            namespace = ""
        return f"kubectl exec -it{namespace} {host} --"
    engine = "podman" if Path("/run/.containerenv").exists() else "docker"
    # Otherwise somebody chose the host name, and the container has another name.
    return f"{engine} exec -it {host if re.fullmatch('[0-9a-f]{12}', host) else 'NAME'}"
