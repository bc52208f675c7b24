"""All I/O with the issuer: the network, the CAs and the threads that wait for them. May import `oauth`."""
