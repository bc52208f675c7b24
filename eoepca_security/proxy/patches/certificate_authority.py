"""mitmproxy's certificate authority, with which it speaks TLS to clients: made once and whole, and there in time."""

import contextlib
import tempfile
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.serialization import load_pem_private_key
from filelock import FileLock, Timeout
from mitmproxy.addons.tlsconfig import TlsConfig
from mitmproxy.certs import CertStore
from mitmproxy.master import Master
from mitmproxy.options import CONF_BASENAME, KEY_SIZE

from eoepca_security.proxy.patches import seams

_FILE: Final = f"{CONF_BASENAME}-ca.pem"


def make(folder: Path) -> None:
    """Make it in `folder` as mitmproxy would, unless it is there: proxies that start together read half-written files.

    What keeps us from that keeps mitmproxy from it, too, which says so.
    """
    with contextlib.suppress(OSError, Timeout), FileLock(folder / "eoepca-security.lock", timeout=10, mode=0o600):
        if (folder / _FILE).exists():
            return
        with tempfile.TemporaryDirectory(dir=folder) as made:
            CertStore.create_store(Path(made), CONF_BASENAME, KEY_SIZE)
            # The file that others look for comes last.
            for file in sorted(Path(made).iterdir(), key=lambda file: file.name == _FILE):
                file.replace(folder / file.name)


def load(master: Master) -> None:
    """Load it now, rather than when mitmproxy does: at the end of a start that waits for the first token.

    A request that comes before finds mitmproxy without it, fails, and ends the start with its failure.
    """
    read_quickly()
    tls = master.addons.get("tlsconfig")
    if not isinstance(tls, TlsConfig) or tls.certstore is not None:
        return
    with contextlib.suppress(OSError, RuntimeError):
        folder = Path(master.options.confdir).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        make(folder)
    # mitmproxy tries again, and tells what is wrong.
    with contextlib.suppress(Exception):
        tls.configure({"confdir"})


def read_quickly() -> None:
    """Let mitmproxy read the key, as it does twice during its start, in a hundredth of the time."""
    seams.replace("mitmproxy.certs", "load_pem_private_key", load_private_key)


def load_private_key(data: bytes, password: bytes | None) -> Any:
    """Read the authority's own key, as mitmproxy does, but for the check of its primes.

    That takes longer than anything else during the start, and the key is one that mitmproxy made itself.
    """
    try:
        return load_pem_private_key(data, password, unsafe_skip_rsa_key_validation=True)
    except TypeError:
        if password is None:
            raise
        return load_pem_private_key(data, None, unsafe_skip_rsa_key_validation=True)
