"""Registration networks, one model a file: a configuration, and the network that it fixes."""
