"""mitmproxy add-on: `mitmdump -s mitmproxy-oidc-addon.py --set oidc_url=… --mode reverse:https://service.example`."""

from eoepca_security.proxy.addons.oidc import OIDCAuthProxy

addons = [OIDCAuthProxy()]
