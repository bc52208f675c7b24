"""Whether the proxy could listen where it is to."""

import errno
import os
import socket

from eoepca_security.errors import SettingsError
from eoepca_security.proxy.config.settings import Address
from eoepca_security.proxy.config.variables import HOST, Variable


def cannot_listen(host: str, port: int, variable: Variable = HOST) -> str | None:
    """Say why nothing can listen there, or return None.

    Raises SettingsError, naming the variable that says so, where it is no address of this machine.
    """
    use = "use 127.0.0.1, or 0.0.0.0 for all"
    foreign = SettingsError(f"{variable.env}: {host!r} is no address of this machine: {use}")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError):
        raise foreign from None
    try:
        with socket.create_server(address[:2], family=family):
            return None
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            raise foreign from None
        # What Python adds to the system's words is the address again.
        reason = os.strerror(error.errno) if error.errno else str(error)
        other = f"another port or {variable.env}" if variable is HOST else "another address, or off"
        return f"cannot listen on {Address(host, port)} ({reason}): stop what uses it, or choose {other}"
