"""The server and its runners: who they are, what they have open, how they are ended."""

import contextlib
import functools
import itertools
import math
import os
import pathlib
import re
import signal
import time
import typing

import psutil

from llm_service import messages
from llm_service.sockets import listeners
from ollama_client import DIGEST, ServiceError

MB = 1024 * 1024
DNS_PORT = 53
TICKS_A_S = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
SAID_LINES = 50
SOCKET_LINK = re.compile(r"socket:\[([0-9]+)\]")
KILL_WAIT_S = 0.5  # after SIGKILL, for a server's end
PF_EXITING = 4  # a process has this flag of Linux' before its files are closed


class Runner(typing.NamedTuple):
    """A process that holds one model. ``process`` is its identity: pid and start time."""

    process: psutil.Process
    digest: str | None  # of the weights; None where the command line names another file
    port: str | None
    model: str = ""  # what the command line names as its model: a path or a name
    gpus: str | None = None  # its CUDA_VISIBLE_DEVICES; None where it has none


class OpenFiles(typing.NamedTuple):
    """Names of files, without their folders, that the service's processes have open."""

    held: set[str]  # or mapped, by any of them
    written: set[str]
    of_server: set[str]  # which reads a blob while it verifies a pull, creates or pushes


class Processes:
    """The servers that the launcher has recorded in ``state_file``, and their runners.

    Each server leads a session of its own. By its session a runner shows whose it is, also
    when its server has died. A line of the file is "pid start restarts", the start in ticks
    since boot.
    """

    def __init__(
        self,
        state_file: str | os.PathLike,
        ended_fd: int = -1,
        send: typing.Callable | None = None,
    ):
        """``ended_fd`` is the launcher's pipe, which is told of a server that is ended.

        ``send(process, signal)`` is what signals a process.
        """
        self.state_file = pathlib.Path(state_file)
        self._ended_fd = ended_fd
        self._send = send or end
        self._read: tuple[object, list[tuple[int, int, int]]] = (None, [])
        self._ended: psutil.Process | None = None  # the server that was last told to end
        # As they were found last; a child of one bears its words until it begins another program
        self._runners: dict[tuple[psutil.Process, bytes], Runner] = {}

    def server(self) -> psutil.Process | None:
        """Return the running server, or None."""
        for pid, started, _ in self._records()[-1:]:
            about = _stat(pid)
            if about and about.start == started and about.holds_memory:
                with contextlib.suppress(psutil.Error):
                    return _process(pid, started)
        return None

    def ever_started(self) -> bool:
        """Tell whether the launcher has started a server yet."""
        return bool(self._records())

    def serves(self, port: int) -> bool:
        """Tell whether the server listens on its port, which else another may have.

        It lets go of it at SIGTERM, and may live long after that. Without a launcher, whoever
        answers there is taken for it.
        """
        if self.state_file == pathlib.Path(os.devnull):
            return True
        server = self.server()
        return server is not None and listens_itself_or_by_a_child(server, str(port))

    def ending(self, server: psutil.Process) -> bool:
        """Tell whether a server was told to end, dies, or has been reaped just now.

        At SIGTERM it takes no connection any more. It lives on until its runners have ended.
        """
        seen = life(server)
        return server == self._ended or seen.dying or not seen.alive

    def connecting(self) -> bool:
        """Tell whether the server waits for a connection or for a name service's answer."""
        with contextlib.suppress(psutil.Error):
            server = self.server()
            sockets = server.net_connections("inet") if server else []
            return any(map(_is_waiting, sockets))
        return False

    def restarts(self) -> int:
        """Return how often the launcher had started Ollama anew when ``server`` was called."""
        records = self._read[1]
        return records[-1][2] if records else 0

    def last_lines(self) -> list[str]:
        """Return what Ollama has said last, as far as the launcher keeps it."""
        return messages.last_lines(self.state_file, SAID_LINES)

    def all(self) -> list[psutil.Process]:
        """Return every process of the recorded sessions, zombies included."""
        return [process for process, _ in self._there()]

    def _there(self) -> typing.Iterator[tuple[psutil.Process, "_Stat"]]:
        """Yield these processes, each with what there is of it."""
        sessions = set()
        for pid, started, _ in self._records():
            about = _stat(pid)
            if about is None or about.start == started:  # the leader died, the rest may live
                sessions.add(pid)
        for pid in _members(sessions):
            about = process = None
            with contextlib.suppress(psutil.Error):  # it has ended
                about = _stat(pid)
                process = about and _process(pid, about.start)
            if about and process:
                yield process, about

    def runners(self) -> list[Runner]:
        """Return the living ``llama-server --model …`` and ``ollama runner --model …``."""
        found = {}
        for process, about in self._there():
            with contextlib.suppress(psutil.Error):
                if about.holds_memory:
                    key = process, about.name
                    runner = self._runners.get(key) or as_runner(process)
                    if runner:
                        found[key] = runner
        self._runners = found
        return list(found.values())

    def unknown_children(self) -> list[Runner]:
        """Return the living children of the server that are not known as runners.

        An Ollama of another version may start its runners with other words. A child of
        another kind finds GPUs, or quantizes a model that is being created.
        """
        server = self.server()
        found = []
        for process in self.all():
            with contextlib.suppress(psutil.Error):
                if not alive(process) or is_orphan(process, server):
                    continue
                words = " ".join(process.cmdline())
                child = Runner(
                    process,
                    digest=_digest_in(words),
                    port=None,
                    model=words,
                )
                found.append(child)
        # After them: one that has just been started may become known meanwhile.
        known = {runner.process for runner in self.runners()}
        return [child for child in found if child.process not in known]

    def open_files(self) -> OpenFiles:
        """Return what the processes have open.

        Raises ServiceError ``model_being_pulled`` where one does not let itself be read.
        """
        found = OpenFiles(set(), set(), set())
        server = self.server()
        for process in [*self.all(), psutil.Process()]:
            try:
                for file in process.open_files():
                    name = os.path.basename(file.path)
                    found.held.add(name)
                    if file.mode != "r":
                        found.written.add(name)
                    if process == server:
                        found.of_server.add(name)
                found.held.update(_mapped_files(process.pid))
            except psutil.NoSuchProcess:
                continue
            except (psutil.Error, OSError) as e:
                raise ServiceError(
                    "model_being_pulled",
                    f"What process {process.pid} has open cannot be read: try again.",
                ) from e
        return found

    def end_server(self, term_s: float, why_s: float = 0.0) -> bool:
        """End the server on purpose: the launcher starts a new one at once.

        SIGTERM gets ``term_s``. Of one that hangs, SIGQUIT gets ``why_s``: Go then prints
        what each goroutine waits for. Then it is SIGKILL's turn. Returns whether it is gone.
        """
        server = self.server()
        if server is None:
            return True
        self._ended = server
        self._tell_launcher(server.pid)
        steps = {
            signal.SIGTERM: term_s,
            signal.SIGQUIT: why_s,
            signal.SIGKILL: KILL_WAIT_S,
        }
        for sig, seconds in steps.items():
            if seconds > 0:
                self._send(server, sig)
                until = time.monotonic() + seconds
                if wait_until(lambda: not alive(server), until):
                    return True
        return False

    def _tell_launcher(self, pid: int) -> None:
        """Say that a server ends on purpose: no pause then, and it counts as no death.

        By a pipe that never waits: no full disk and no launcher that hangs is in the way.
        """
        with contextlib.suppress(OSError):
            os.set_blocking(self._ended_fd, False)
            os.write(self._ended_fd, f"{pid}\n".encode())

    def _records(self) -> list[tuple[int, int, int]]:
        """Return the lines of the file: each start of a server makes another file.

        Where that has gone, as in a folder that somebody has cleaned, what was read last holds.
        """
        try:
            about = os.stat(self.state_file)
            key = about.st_ino, about.st_mtime_ns, about.st_size
            if key != self._read[0]:
                records = []
                for line in self.state_file.read_text().splitlines():
                    pid, started, restarts = map(int, line.split())
                    records.append((pid, started, restarts))
                self._read = key, records
            return self._read[1]
        except OSError:
            return self._read[1]
        except ValueError:
            return []


def as_runner(process: psutil.Process) -> Runner | None:
    """Return what a process's command line says of the model that it holds; None if it is none."""
    words = process.cmdline()
    if "--model" not in words or not ("llama-server" in words[0] or "runner" in words):
        return None
    options = dict(itertools.pairwise(words))
    model = options["--model"]
    return Runner(
        process,
        digest=_digest_in(model),
        port=options.get("--port"),
        model=model,
        gpus=_visible_gpus(process),
    )


def _visible_gpus(process: psutil.Process) -> str | None:
    """Return the GPUs that CUDA shows a process. Of several, Ollama gives each runner its own."""
    with contextlib.suppress(psutil.Error):
        return process.environ().get("CUDA_VISIBLE_DEVICES")
    return None


def _is_waiting(socket: typing.Any) -> bool:
    asks_a_name = bool(socket.raddr) and socket.raddr.port == DNS_PORT
    return asks_a_name or socket.status == psutil.CONN_SYN_SENT


class Life(typing.NamedTuple):
    """How a process stands, by one look at it.

    A zombie with threads is alive and dying at once.
    """

    alive: bool = False  # it holds memory: it runs, or a zombie's other threads do
    dying: bool = False  # dead and not reaped, or killed and not ended yet
    parent: int | None = None  # None where it is gone


def life(process: psutil.Process) -> Life:
    """Return how a process stands; that of a process which is gone says no to everything."""
    # First: as soon as SIGKILL waits no more, what is read next shows the end
    killed = _is_killed(process.pid)
    about = _stat_of(process)
    if about is None:
        return Life()
    return Life(
        alive=about.holds_memory,
        dying=about.dead or about.exiting or killed,
        parent=about.parent,
    )


def alive(process: psutil.Process) -> bool:
    """Tell whether a process holds memory: one that is dead and has threads yet does."""
    about = _stat_of(process)
    return about is not None and about.holds_memory


def runs(process: psutil.Process) -> bool:
    """Tell whether a process is neither dead nor stopped, by a signal or a tracer."""
    about = _stat_of(process)
    return about is not None and about.state not in "ZXTt"


def is_ending(process: psutil.Process) -> bool:
    """Tell whether a process is dead, or is to end by a signal that it got."""
    seen = life(process)
    return seen.dying or not seen.alive


def is_orphan(process: psutil.Process, server: psutil.Process | None) -> bool:
    """Tell whether a runner's server has died, or the runner has gone."""
    about = _stat_of(process)
    return server is None or about is None or about.parent != server.pid


def unreaped(process: psutil.Process, server: psutil.Process | None) -> bool:
    """Tell whether a runner is dead or killed, and its server still waits for its end."""
    seen = life(process)
    return seen.dying and server is not None and seen.parent == server.pid


def age_s(process: psutil.Process) -> float:
    """Return for how long a process has been there, whatever the clock was set to meanwhile."""
    boot_s = time.clock_gettime(time.CLOCK_BOOTTIME)
    try:
        return boot_s - _start_ticks(process) / TICKS_A_S
    except (psutil.Error, OSError):
        return 0.0


def may_hold_model(child: Runner) -> bool:
    """Tell whether a child that is not known as a runner may be one all the same."""
    program, *words = child.model.split() or [""]
    if program.endswith("llama-quantize"):
        return False
    if child.digest or "runner" in words or ".ollama-split-" in child.model:
        return True
    with contextlib.suppress(OSError):
        return any(map(_digest_in, _mapped_files(child.process.pid)))
    return False


def cpu_clock_s(process: psutil.Process | None) -> float:
    """Return the CPU time of a process; NaN, which no comparison holds for, if it has none.

    Asked of its clock, as clock_getcpuclockid makes it: /proc tells it in steps of 10 ms, and
    a request takes one. What a running thread uses may show some milliseconds later.
    """
    if process is None:
        return math.nan
    clock = ~process.pid << 3 | 2
    try:
        return time.clock_gettime(clock)
    except OSError:
        return math.nan


def cpu_seconds(process: psutil.Process) -> float:
    """Return the CPU time of a process, as exactly as it can be had."""
    used_s = cpu_clock_s(process)
    if math.isnan(used_s):
        used_s = sum(process.cpu_times()[:2])  # by itself and by the kernel for it
    return used_s


def main_thread_s(process: psutil.Process) -> tuple[float, float]:
    """Return the CPU seconds that the thread which decodes used, and those it waited for a CPU.

    Its id is the process's. Where the kernel keeps no such account, it has not waited.
    """
    task = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}")
    try:
        account = (task / "schedstat").read_text()
        used_ns, waited_ns, _ = map(int, account.split())
        if used_ns:
            return used_ns / 1e9, waited_ns / 1e9
        about = (task / "stat").read_text()
        words = about.rpartition(")")[2].split()  # the name before may hold anything
        ticks = int(words[11]) + int(words[12])
        return ticks / TICKS_A_S, 0.0
    except (OSError, ValueError):
        return 0.0, 0.0


def is_held_up(process: psutil.Process | None) -> bool:
    """Tell whether a thread of a process would go on if it got a CPU, or its disk answered."""
    if process is None:
        return False
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{process.pid}/task"):
            about = _stat(f"{process.pid}/task/{thread}")
            if about and about.state in "RD":
                return True
    return False


def listens(process: psutil.Process, port: str | None) -> bool:
    """Tell whether a process itself listens on a port; yes where nobody can tell."""
    try:
        inodes = listeners(int(port or ""))
        held = links(process.pid)
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        return False
    except (OSError, ValueError, OverflowError):  # or no port has that number
        return True
    return not inodes.isdisjoint(inodes_of(held))


def listens_itself_or_by_a_child(process: psutil.Process, port: str) -> bool:
    """Do so for a server, in whose place a child listens where a wrapper has started it."""
    if listens(process, port):
        return True
    with contextlib.suppress(psutil.Error):
        return any(listens(child, port) for child in process.children(recursive=True))
    return False


def links(pid: int) -> list[str]:
    """Return what a process has open, as Linux names it."""
    folder = f"/proc/{pid}/fd"
    found = []
    for name in os.listdir(folder):
        try:
            found.append(os.readlink(f"{folder}/{name}"))
        except FileNotFoundError:  # it was closed just now
            continue
    return found


def inodes_of(held: list[str]) -> set[int]:
    """Return the kernel's numbers of the sockets among what a process has open."""
    matches = map(SOCKET_LINK.fullmatch, held)
    return {int(match[1]) for match in matches if match}


def memory_mb(process: psutil.Process | None) -> int:
    """Return the memory of a process; 0 where it has ended."""
    words = (_read(f"{process.pid}/statm") or b"").split() if process else []
    return int(words[1]) * PAGE_BYTES // MB if words else 0


def bytes_read(pid: int) -> int:
    """Return the bytes that a process has read from files and connections; 0 where unknown."""
    words = (_read(f"{pid}/io") or b"").split()
    return int(words[1]) if words else 0


def end(process: psutil.Process, sig: int = signal.SIGKILL) -> None:
    """Signal a process, unless its number has passed to another."""
    with contextlib.suppress(psutil.Error):
        process.send_signal(sig)


def wait_until(condition: typing.Callable[[], object], deadline: float) -> bool:
    """Wait for the condition until ``deadline`` (monotonic); return whether it came true.

    It is asked once more after the deadline: where others have the CPU, the last look may lie
    long before it.
    """
    while True:
        is_last = time.monotonic() >= deadline
        if condition():
            return True
        if is_last:
            return False
        time.sleep(0.02)


class _Stat(typing.NamedTuple):
    """What ``/proc/PID/stat`` says of a process."""

    name: bytes  # of the program, as far as it fits
    state: str  # such as "S"
    parent: int
    exiting: bool
    threads: int
    start: int  # in ticks after boot

    @property
    def dead(self) -> bool:
        return self.state in "ZX"

    @property
    def holds_memory(self) -> bool:
        return not self.dead or self.threads > 1


def _members(sessions: set[int]) -> typing.Iterator[int]:
    """Yield the processes of these sessions. Each look goes through all of the machine's."""
    for name in filter(str.isdigit, os.listdir("/proc")):
        pid = int(name)
        try:
            if os.getsid(pid) in sessions:
                yield pid
        except ProcessLookupError:  # it has ended
            continue


def _stat(place: int | str) -> _Stat | None:
    """Return what there is of a process, or of a thread (PID/task/TID); None if it is gone.

    Read by hand: psutil gives the start as a time of day, which moves with the clock.
    """
    about = _read(f"{place}/stat")
    if about is None:
        return None
    name, _, rest = about.rpartition(b")")  # the name may hold anything
    words = rest.split()
    return _Stat(
        name=name.partition(b"(")[2],
        state=words[0].decode(),
        parent=int(words[1]),
        exiting=bool(int(words[6]) & PF_EXITING),
        threads=int(words[17]),
        start=int(words[19]),
    )


def _stat_of(process: psutil.Process) -> _Stat | None:
    """Return what there is of this process, not of another that has got its number."""
    about = _stat(process.pid)
    with contextlib.suppress(psutil.Error, OSError):
        if about and about.start == _start_ticks(process):
            return about
    return None


@functools.lru_cache(256)
def _start_ticks(process: psutil.Process) -> int:
    """Return a process's start. Raises psutil.NoSuchProcess where it cannot be read.

    That is not kept: it may be so for a moment, as where no file can be opened any more.
    """
    about = _stat(process.pid)
    if about is None or not process.is_running():
        raise psutil.NoSuchProcess(process.pid)
    return about.start


def _is_killed(pid: int) -> bool:
    """Tell whether SIGKILL waits for a process: it has not got to its end yet."""
    status = _read(f"{pid}/status") or b""
    pending = re.findall(rb"^S(?:ig|hd)Pnd:\s*(\w+)", status, re.MULTILINE)
    sigkill_bit = 1 << (signal.SIGKILL - 1)
    return any(int(mask, 16) & sigkill_bit for mask in pending)


def _read(path: str) -> bytes | None:
    """Read a file below /proc to its end; None if its process is gone.

    Each request reads some, and each call of the kernel lets another thread in, which costs more
    than the call: so these are as few as can be.
    """
    try:
        file = os.open(f"/proc/{path}", os.O_RDONLY)
        try:
            return os.read(file, 1 << 16)  # the kernel gives such files in one piece
        finally:
            os.close(file)
    except OSError:
        return None


def _digest_in(text: str) -> str | None:
    """Return the digest (hex) in the name of a blob."""
    found = DIGEST.search(text)
    return found and found[1]


@functools.lru_cache(256)
def _process(pid: int, _started: int) -> psutil.Process:
    """Return the process that began then; kept, as each request asks for some."""
    return psutil.Process(pid)


def _mapped_files(pid: int) -> set[str]:
    """Return the names of the files that a process has mapped.

    Read by hand: psutil measures every mapping, which takes seconds for a large model.
    """
    maps = pathlib.Path(f"/proc/{pid}/maps").read_text(errors="replace")
    found = set()
    for line in maps.splitlines():
        _, slash, name = line.rpartition("/")
        if slash:
            found.add(name.removesuffix(" (deleted)"))
    return found
