"""The trusted CAs: the system's, certifi's, and those in a file."""

import ssl
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import requests

_begun: dict[Path | None, "Future[ssl.SSLContext]"] = {}


def begin_to_trust(ca_file: Path | None = None) -> None:
    """Start to read the CAs in a thread, for the next call of `trust` with the same `ca_file`."""
    # Not a daemon thread: OpenSSL crashes when the process exits while it reads CAs.
    executor = ThreadPoolExecutor(1)
    _begun[ca_file] = executor.submit(_read_trust, ca_file)
    executor.shutdown(wait=False)


def trust(ca_file: Path | None = None) -> ssl.SSLContext:
    """Return a client context that trusts the system's CAs, certifi's, and those in `ca_file`.

    Raises OSError (ssl.SSLError is one) when `ca_file` cannot be used, or SSLKEYLOGFILE.
    """
    begun = _begun.pop(ca_file, None)
    return begun.result() if begun is not None else _read_trust(ca_file)


def usable_cas(ca_file: Path) -> Path:
    """Return `ca_file`; raises OSError when it cannot be used, like `trust`, but without reading all other CAs."""
    _refuse_hidden(ca_file)
    ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(ca_file)
    return ca_file


def _refuse_hidden(ca_file: Path) -> None:
    """Raise OSError for a certificate that OpenSSL silently skips, because a byte order mark precedes it.

    Also for what is no file: reading a pipe or a device may never end.
    """
    if not ca_file.is_file() and ca_file.exists():
        raise OSError("it is not a file")
    if b"\xef\xbb\xbf-----BEGIN" in ca_file.read_bytes():
        raise OSError("a byte order mark precedes a certificate in it: save the file without one")


def _read_trust(ca_file: Path | None) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context()
    except OSError as error:
        raise OSError(f"SSLKEYLOGFILE is set but cannot be written: {error.strerror}") from None
    # Python 3.13 turned this flag on. It refuses the many private CAs that have no key identifier.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    context.load_verify_locations(requests.utils.DEFAULT_CA_BUNDLE_PATH)
    if ca_file is not None:
        _refuse_hidden(ca_file)
        context.load_verify_locations(ca_file)
    return context


def ca_bundle(ca_file: Path) -> bytes:
    """Return the CAs that `trust(ca_file)` trusts in PEM format, for programs that need a file; raises OSError.

    If the system also has a folder of CAs besides its file, that folder is not included.
    """
    _refuse_hidden(ca_file)
    system = ssl.get_default_verify_paths().cafile
    files = [Path(requests.utils.DEFAULT_CA_BUNDLE_PATH), ca_file, *([Path(system)] if system else [])]
    return b"\n".join(file.read_bytes() for file in files)
