"""What a start needs of the machine: CAs in a file, folders that can be written to, free ports."""

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
from eoepca_security.proxy.config.variables import ADMIN, HOST, PORT, TOKEN_STORE, WORKERS
from eoepca_security.proxy.patches import certificate_authority
from eoepca_security.proxy.runtime.private_folder import PrivateFolder

MEMORY: Final = Path("/dev/shm")  # noqa: S108  in it, a folder that only we can read
"""Where processes share what is to be kept in memory only."""


@contextlib.contextmanager
def shared_session(settings: Settings) -> Iterator[tuple[Settings, PrivateFolder | None]]:
    """Let processes share the session also where it is to be kept in memory only: in a folder for now, in memory."""
    if settings.grant != "refresh_token":
        yield settings, None
        return
    if settings.token_store is not None:
        # Processes that go on in memory, each for itself, would use the same refresh token twice.
        try:
            settings.token_store.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.NamedTemporaryFile(dir=settings.token_store) as probe:
                probe.write(bytes(8192))
                probe.flush()
        except OSError as error:
            raise SettingsError(
                f"{TOKEN_STORE.env}: {settings.token_store} cannot be written to ({error.strerror}), and several "
                f"processes share the session there: mend that, or set {WORKERS.env} to 1"
            ) from None
        yield settings, None
        return
    try:
        folder = PrivateFolder(MEMORY)
    except OSError as error:
        raise SettingsError(
            f"{WORKERS.env}: several processes share the session through the token store, and there is no place in "
            f"memory for one ({error.strerror}): set {TOKEN_STORE.env} to a folder, or this to 1"
        ) from None
    try:
        yield replace(settings, token_store=folder.path), folder
    finally:
        folder.leave()


def taken_address(settings: Settings) -> str | None:
    """Return a line about the first address that is in use, or None.

    Raises SettingsError where one is not an address of this machine.
    """
    wanted = [(Address(settings.host, settings.port), HOST, PORT, f"another port or {HOST.env}")]
    if settings.admin is not None and settings.admin_is_set:
        wanted.append((settings.admin, ADMIN, ADMIN, "another address, or off"))
    for address, host, port, other in wanted:
        obstacle = cannot_listen(*address)
        if obstacle is not None and obstacle.is_foreign:
            raise SettingsError(f"{host.env}: {obstacle.detail}: {USE_LOCAL}")
        if obstacle is not None:
            return f"{port.env}: {obstacle.detail}: stop what uses it, or choose {other}"
    return None


@contextlib.contextmanager
def writable_confdir() -> Iterator[str]:
    """Give the folder in which mitmproxy keeps the CA that it makes: its usual one, or one for now in its place."""
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
            f"TMPDIR: mitmproxy needs a folder for its own CA, and neither this nor {usual} can be written to: set it "
            "to one that can, or mount one at /tmp"
        ) from None
    with temporary as folder:
        yield folder


@contextlib.contextmanager
def upstream_trust(settings: Settings) -> Iterator[list[str]]:
    """Give the arguments with which mitmproxy trusts the system's CAs and `TLS_CA_FILE`; alone it trusts certifi's."""
    paths = ssl.get_default_verify_paths()
    folder = ["--set", f"ssl_verify_upstream_trusted_confdir={paths.capath}"] if paths.capath else []
    if settings.ca_file is None:
        yield [*folder, "--set", f"ssl_verify_upstream_trusted_ca={paths.cafile}"] if paths.cafile else []
        return
    with ca_bundle_file(settings.ca_file) as file:
        yield [*folder, "--set", f"ssl_verify_upstream_trusted_ca={file.name}"]
