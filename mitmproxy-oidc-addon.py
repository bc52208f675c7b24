"""mitmproxy add-on: `mitmdump -s mitmproxy-oidc-addon.py --set oidc_url=… --mode reverse:https://service.example`."""

from eoepca_security.proxy.patches import seams

try:
    seams.check()
    from eoepca_security.proxy.addons.oidc import OIDCAuthProxy

    addons = [OIDCAuthProxy()]
except seams.Moved as error:
    moved = error

    def load(_loader: object) -> None:
        """End mitmproxy. mitmproxy 11 goes on without an add-on whose import tries to."""
        raise moved
