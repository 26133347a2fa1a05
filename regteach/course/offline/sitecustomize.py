"""Blocks the network for the Python process that imports it; Python itself does, at its start.

Loopback stays open, because kernels and debuggers talk over it. An attempt raises PermissionError and is written to
the file named by REGTEACH_NETWORK_LOG, so that a lesson which swallows the error is found out all the same.
"""

import importlib.machinery
import importlib.util
import os
import socket
import sys

_NAMES = {"", "localhost", "ip6-localhost", socket.gethostname()}
_WATCHED = {"socket.connect": 1, "socket.sendto": 1, "socket.getaddrinfo": 0, "socket.gethostbyname": 0}


def _host(address: object) -> object:
    if isinstance(address, tuple):
        address = address[0]
    return address.decode("latin-1") if isinstance(address, bytes) else address


def _is_local(host: object) -> bool:
    if not isinstance(host, str):  # None: this machine; a number: netlink
        return True
    return host in _NAMES or host.startswith(("127.", "/", "\0", "::1", "0.0.0.0", "::ffff:127."))


def _block(event: str, arguments: tuple) -> None:
    if event not in _WATCHED:
        return
    host = _host(arguments[_WATCHED[event]])
    if _is_local(host):
        return
    sentence = f"lessons run without a network, and this one asked for {host}"
    log = os.environ.get("REGTEACH_NETWORK_LOG")
    if log:
        with open(log, "a", encoding="utf-8") as file:
            file.write(sentence + "\n")
    raise PermissionError(sentence)


def _run_the_hidden_one() -> None:
    """Run the sitecustomize that this file hides, where the system has one."""
    here = os.path.dirname(os.path.abspath(__file__))
    path = [folder for folder in sys.path if os.path.abspath(folder) != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", path)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


sys.addaudithook(_block)
_run_the_hidden_one()
