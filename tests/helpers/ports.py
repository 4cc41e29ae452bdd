"""Free ports, also where several test processes look for some at once."""

import random
import socket

from helpers.places import CACHE

_reserved: dict[int, socket.socket] = {}


def free_port():
    """Return a port that nothing listens on, and that no other test process is given.

    It lies below the range from which the kernel takes the ports of outgoing connections. An
    abstract Unix socket of that name reserves it until this process ends.
    """
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        reservation = socket.socket(socket.AF_UNIX)
        try:
            reservation.bind(f"\0llm-test-port-{port}")
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("127.0.0.1", port))
        except OSError:
            reservation.close()
            continue
        # A test run that was killed has left its record: it tells of other processes.
        if CACHE.joinpath("run", f"{port}.state").exists():
            reservation.close()
            continue
        _reserved[port] = reservation
        return port


# The address of a registry that is not there: connections are refused.
NOWHERE = f"127.0.0.1:{free_port()}"
