"""All I/O with the issuer: the network, the CAs, the threads that wait for it. May import `oauth`."""
