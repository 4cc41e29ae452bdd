"""Whether Ollama's server does something itself, beside what its runners do."""

import os
import time
import typing

import psutil

from llm_service.processes import Processes, alive, cpu_clock_s, inodes_of, links
from llm_service.sockets import ports_of

WORKING_SHARE = 0.2  # of a core; lists of many models take a tenth of that


class ServerWork:
    """Looks for what a server does: a pull, a create, a question to a model in the cloud."""

    def __init__(
        self,
        processes: Processes,
        port: int,
        folder: str | os.PathLike,
        clock: typing.Callable[[], float] = time.monotonic,
    ):
        """``port`` is the one that the server listens on, ``folder`` the models'."""
        self._processes = processes
        self._clock = clock
        self._asked_at = 0.0
        self._cpu_s = 0.0
        self._port = port
        self._folder = os.path.realpath(folder)

    def is_seen(self) -> bool:
        """Tell whether the server works, as far as that can be seen, or nobody can tell."""
        server = self._processes.server()
        if server is None:
            return False
        try:
            held = links(server.pid)
            return any(
                (
                    self._computes(server),
                    self._has_files(held),
                    self._has_helpers(server),
                    self._talks(held),
                )
            )
        except (OSError, psutil.Error):
            return True

    def _computes(self, server: psutil.Process) -> bool:
        """Tell whether it has used much CPU since it was looked at last."""
        now = self._clock()
        cpu_s = cpu_clock_s(server)
        passed_s = now - self._asked_at
        used_s = cpu_s - self._cpu_s
        self._asked_at = now
        self._cpu_s = cpu_s
        return used_s >= WORKING_SHARE * passed_s

    def _has_files(self, held: list[str]) -> bool:
        """Tell whether it has a file of the models' folder open."""
        place = f"{self._folder}/"
        return any(link.startswith(place) for link in held)

    def _has_helpers(self, server: psutil.Process) -> bool:
        """Tell whether it has a child that is no runner, such as one that looks for GPUs."""
        runners = {runner.process for runner in self._processes.runners()}
        for process in self._processes.all():
            known = process == server or process in runners
            if not known and alive(process):
                return True
        return False

    def _talks(self, held: list[str]) -> bool:
        """Tell whether it has a connection to others than callers and runners."""
        runners = {runner.port for runner in self._processes.runners()}
        for port, peer_port in ports_of(inodes_of(held)):
            if port != self._port and str(peer_port) not in runners:
                return True
        return False
