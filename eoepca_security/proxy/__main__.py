"""`python -m eoepca_security.proxy`: the same as the command `oidc-proxy`."""

from eoepca_security.proxy.cli.launch import main

if __name__ == "__main__":
    main()
