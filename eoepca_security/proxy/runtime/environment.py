"""What the proxy needs from the machine to start: CAs in a file, writable folders and free ports."""

import contextlib
import os
import ssl
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

from mitmproxy.options import CONF_DIR

from eoepca_security.errors import SettingsError
from eoepca_security.proxy.config.factory import ca_bundle_file
from eoepca_security.proxy.config.port_check import USE_LOCAL, cannot_listen
from eoepca_security.proxy.config.settings import Address, Settings
from eoepca_security.proxy.config.variables import ADMIN, HOST, PORT, SERVICES, TOKEN_STORE, WORKERS
from eoepca_security.proxy.patches import certificate_authority
from eoepca_security.proxy.runtime.private_folder import PrivateFolder

MEMORY: Final = Path("/dev/shm")  # noqa: S108  we create a private folder in it
"""Where processes share a session that must stay in memory."""


@contextlib.contextmanager
def shared_session(settings: Settings) -> Iterator[tuple[Settings, PrivateFolder | None]]:
    """Let several processes share the session. Without a token store, they use a temporary folder in memory."""
    if settings.grant != "refresh_token":
        yield settings, None
        return
    if settings.token_store is not None:
        # If each process continued in memory by itself, they would use the same refresh token twice.
        try:
            settings.token_store.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.NamedTemporaryFile(dir=settings.token_store) as probe:
                probe.write(bytes(8192))
                probe.flush()
        except OSError as error:
            raise SettingsError(
                f"{TOKEN_STORE.env}: {settings.token_store} is not writable ({error.strerror}), and several processes "
                f"share the session there: make it writable, or set {settings.name(WORKERS)} to 1"
            ) from None
        yield settings, None
        return
    try:
        folder = PrivateFolder(MEMORY)
    except OSError as error:
        raise SettingsError(
            f"{settings.name(WORKERS)}: several processes need a token store to share the session, and none can be "
            f"created in memory ({error.strerror}): set {TOKEN_STORE.env} to a folder, or this to 1"
        ) from None
    try:
        yield replace(settings, token_store=folder.path), folder
    finally:
        folder.leave()


def taken_address(settings: Settings) -> str | None:
    """Return an error message for the first address that is in use, or None.

    Raises SettingsError for an address that is not on this machine.
    """
    wanted = [(Address(settings.host, settings.port), HOST, PORT, f"another port with {PORT.flag}")]
    wanted += [
        (Address(settings.host, service.port), HOST, SERVICES, f"another port for {service.name}")
        for service in settings.services
        if service.port is not None
    ]
    if settings.admin is not None and settings.admin_is_set:
        wanted.append((settings.admin, ADMIN, ADMIN, f"another address with {ADMIN.flag}, or off"))
    for address, host, port, other in wanted:
        obstacle = cannot_listen(*address)
        if obstacle is not None and obstacle.is_foreign:
            raise SettingsError(f"{settings.name(host)}: {obstacle.detail}: {USE_LOCAL}")
        if obstacle is not None:
            return f"{settings.name(port)}: {obstacle.detail}: stop the program that uses it, or choose {other}"
    return None


@contextlib.contextmanager
def writable_confdir() -> Iterator[str]:
    """Yield the folder for mitmproxy's own CA: the usual one, or a temporary one if that is not writable."""
    usual = Path(CONF_DIR).expanduser()
    try:
        usual.mkdir(parents=True, exist_ok=True)
        writable = os.access(usual, os.W_OK)
    except (OSError, RuntimeError):
        writable = False
    if writable:
        certificate_authority.make(usual)
        yield CONF_DIR
        return
    try:
        temporary = tempfile.TemporaryDirectory(prefix="mitmproxy-")
    except OSError:
        raise SettingsError(
            f"TMPDIR: mitmproxy needs a folder for its own CA, and neither this nor {usual} is writable: set it to a "
            "writable folder, or mount one at /tmp"
        ) from None
    with temporary as folder:
        yield folder


@contextlib.contextmanager
def upstream_trust(settings: Settings) -> Iterator[list[str]]:
    """Yield the arguments that make mitmproxy trust the system's CAs and `TLS_CA_FILE`, not only certifi's."""
    paths = ssl.get_default_verify_paths()
    folder = ["--set", f"ssl_verify_upstream_trusted_confdir={paths.capath}"] if paths.capath else []
    if settings.ca_file is None:
        yield [*folder, "--set", f"ssl_verify_upstream_trusted_ca={paths.cafile}"] if paths.cafile else []
        return
    with ca_bundle_file(settings.ca_file) as file:
        yield [*folder, "--set", f"ssl_verify_upstream_trusted_ca={file.name}"]
