"""mitmproxy add-on: `mitmdump -s mitmproxy-oidc-addon.py --set oidc_url=… --mode reverse:https://service.example`."""

from eoepca_security.proxy.addon import OIDCAuthProxy

addons = [OIDCAuthProxy()]
