"""What Ollama prints: passed on to the log, and its last lines kept. start.sh runs this file.

``python messages.py STATE_FILE`` copies its standard input to its standard error. It imports
little, as it is a process of its own.
"""

import contextlib
import fcntl
import os
import signal
import sys
import time

GATHER_S = 0.05  # lines gather for so long, as a read for each of them costs most of the CPU
PIPE_BYTES = 1 << 20  # a full pipe keeps Ollama waiting; 64 kB fill at 500 requests a second
READ_BYTES = 1 << 16
KEPT_BYTES = 1 << 16  # in each of the two files, the older of which goes
REASON_BYTES = 1 << 18  # a stack trace stands behind its reason
REASON_CHARACTERS = 300
ADDRESS_ENDS = b" \t\r\n\"'\\"
# A stack trace may follow
FATAL = (
    b"Error: ",
    b"panic: ",
    b"fatal error: ",
)


def last_lines(state_file: str | os.PathLike, count: int) -> list[str]:
    """Return the last lines that Ollama has printed, as far as they could be kept."""
    kept = b""
    for name in (f"{state_file}.said.old", f"{state_file}.said"):
        with contextlib.suppress(OSError):
            with open(name, "rb") as file:
                kept += file.read()
    return kept.decode(errors="replace").splitlines()[-count:]


def reason(printed: bytes) -> bytes:
    """Return the line that says why Ollama has ended; nothing where it went on after it."""
    said = b""
    for line in printed.split(b"\n")[:-1]:
        if not said.startswith(FATAL):
            said = line
        _, _, level = line.partition(b" level=")
        if line.startswith(b"time=") and level.startswith((b"D", b"I", b"W")):
            said = b""  # debug, info, warning
    return said


def write_all(number: int, data: bytes) -> None:
    """Write all of it; what is not taken is lost, as Ollama must not wait for a reader."""
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(number, data) :]


def without_queries(printed: bytes) -> bytes:
    """Leave out of addresses who asks and what stands behind the path, such as a signature."""
    first, *rest = printed.split(b"://")
    pieces = [first]
    for piece in rest:
        places = (n for n, byte in enumerate(piece) if byte in ADDRESS_ENDS)
        end = next(places, len(piece))
        address = piece[:end]
        address = address.partition(b"?")[0]
        address = address.partition(b"#")[0]
        host, slash, path = address.partition(b"/")
        host = host.rpartition(b"@")[2]
        pieces.append(host + slash + path + piece[end:])
    return b"://".join(pieces)


class Kept:
    """The last lines in a file, and the one before it. A full disk is no reason to stop."""

    def __init__(self, state_file: str):
        self._name = f"{state_file}.said"
        self._bytes = KEPT_BYTES
        self._file = -1

    def add(self, data: bytes) -> None:
        """Add what was printed."""
        if self._bytes >= KEPT_BYTES:
            self._begin()
        write_all(self._file, data)
        self._bytes += len(data)

    def _begin(self) -> None:
        self._bytes = 0
        with contextlib.suppress(OSError):
            os.close(self._file)
        self._file = -1
        with contextlib.suppress(OSError):
            os.replace(self._name, f"{self._name}.old")
        with contextlib.suppress(OSError):
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            self._file = os.open(self._name, flags, 0o600)


def pass_on(state_file: str) -> None:
    """Copy the input to the end of it, and write down the reason that it gives."""
    kept = Kept(state_file)
    printed = bytearray()
    with contextlib.suppress(OSError):  # it may be no pipe, or this user's are many
        fcntl.fcntl(0, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    while data := os.read(0, READ_BYTES):
        is_full = len(data) == READ_BYTES
        data = without_queries(data)
        write_all(2, data)
        kept.add(data)
        printed += data
        if len(printed) > 2 * REASON_BYTES:
            del printed[:-REASON_BYTES]
        if not is_full:
            time.sleep(GATHER_S)
    said = reason(bytes(printed))
    text = said.decode(errors="replace")
    text = text[:REASON_CHARACTERS]
    with contextlib.suppress(OSError):
        with open(f"{state_file}.reason", "w") as file:
            file.write(f"{text}\n")


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # it ends with what it reads
    pass_on(sys.argv[1])
