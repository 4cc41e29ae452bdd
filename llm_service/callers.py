"""Who waits for an answer of Ollama's, and whether anything works for him."""

import typing

from llm_service.processes import bytes_read, links
from llm_service.sockets import Connection, again, connections, own_ends
from ollama_client import Json

CHECK_S = 4  # of waiting, before it is asked what Ollama does itself
LOOKS = 10  # for a verdict
GAP_S = 6  # between two looks: the machine was asleep, what was counted is void
FILES_BYTES = 1000  # less than a manifest and what it names
FEW = 32  # connections are asked for one by one, where no new one can have come
ALL_LOOKS = 5  # then for all: a server that stands takes no new one
CONTINUE = "HTTP/1.1 100 Continue\r\n\r\n"  # no answer is as short


class Request(typing.NamedTuple):
    """The last request of a connection."""

    received: int = 0  # bytes of the connection
    sent: int = 0  # the same, as of the last look
    at: float = 0.0  # when they were seen
    whole: bool = False  # Ollama has read files since, as it does for a model
    invited: bool = False  # what was sent since the request before is no answer


class Callers:
    """Looks at the connections of Ollama's port."""

    def __init__(self, port: int, stuck_s: float, works: typing.Callable[[], bool]):
        """``works()`` tells whether the server does something itself."""
        self.report: Json | None = None  # ``callers`` in /api/stats
        self.suspicion = ""  # the evidence, where nothing seems to work for who waits
        self.starved = ""  # the same, once it is confirmed
        self._excused_until = 0.0  # who has sent nothing since is no evidence
        self._queue = ""  # who waits for long while others are served
        self._port = port
        self._stuck_s = stuck_s
        self._works = works
        self._requests: dict[bytes, Request] = {}
        self._seen: list[Connection] = []
        self._sockets: set[str] = set()  # of the server, before those were looked for
        self._looks = 0  # since all were looked for by turn
        self._keys: set[bytes] = set()  # of the connections when the own ones were looked for
        self._own: set[tuple[bytes, bytes]] = set()
        self._pid = 0  # of the server, and what it had read at the last look
        self._read_bytes = 0
        self._looked_at = 0.0
        self._quiet_since = 0.0
        self._quiet_looks = 0

    def look(self, now: float, pid: int, tasks: int) -> None:
        """Look at a server's connections; ``tasks`` are its runners' answers and loads."""
        # Before the connections: what it reads for a request shows with that or after it
        new_bytes = self._new_bytes(pid)
        try:
            seen = self._seen = self._connections(pid)
        except OSError:
            self.report = None
            self._sockets = set()
            return self.judge(now, [], whole_s=0, tasks=tasks)
        own = self._own_ends(seen)
        whole = self._note_requests(seen, now, new_bytes)
        callers = [each for each in seen if each.peer not in own]
        waits = []
        whole_s = 0.0
        for each in callers:
            wait_s = self._wait_s(each)
            if wait_s:
                waits.append(wait_s)
            if each.key in whole:
                whole_s = max(whole_s, wait_s)
        longest_s = max(waits, default=0)
        self.report = {
            "connections": len(callers),
            "waiting": len(waits),
            "longest_wait_s": round(longest_s, 1),
        }
        if not tasks and longest_s > CHECK_S and self._works():
            tasks += 1
        # Also to this service, such as a pull's progress
        streams = sum(each.streams for each in seen)
        return self.judge(now, waits, whole_s, tasks, streams)

    def judge(
        self, now: float, waits: list[float], whole_s: float, tasks: int, streams: int = 0
    ) -> None:
        """Judge by the waits in seconds; ``whole_s`` is the longest for a whole request.

        Of the answers under way, ``streams`` are for those who do not wait.
        """
        quiet_s = self._quiet_for(now, waits, tasks)
        self.suspicion = ""
        if min(quiet_s, whole_s) >= self._stuck_s and self._quiet_looks >= LOOKS:
            self.suspicion = (
                f"callers have waited for up to {whole_s:.0f} s; "
                f"for {quiet_s:.0f} s no runner has worked, "
                "and Ollama has used neither its store nor another machine"
            )
        self.starved = self.suspicion if self.starved else ""
        self._queue = ""
        long = [wait_s for wait_s in waits if wait_s >= self._stuck_s]
        if not self.starved and len(long) > max(0, tasks - streams):
            self._queue = f"{len(long)} callers of Ollama have waited for up to {max(long):.0f} s"

    def _quiet_for(self, now: float, waits: list[float], tasks: int) -> float:
        """Return for how long somebody has waited and nothing has worked, by the looks at it."""
        quiet = not tasks and max(waits, default=0) > CHECK_S
        asleep = now - self._looked_at > GAP_S
        self._looked_at = now
        if not quiet or asleep or not self._quiet_looks:
            self._quiet_since = now
            self._quiet_looks = 0
        if quiet:
            self._quiet_looks += 1
        return now - self._quiet_since

    def confirm(self) -> None:
        """Take the suspicion for a fault, as long as it holds."""
        self.starved = self.suspicion

    def starved_since(self, moment: float) -> bool:
        """Tell whether they have waited in vain since before that moment (monotonic)."""
        return bool(self.starved) and self._quiet_since < moment

    def excuse(self, until: float) -> None:
        """Take who waited then for no evidence until he sends something: a load has passed.

        What he has sent is no whole request: others' files were read just after it.
        """
        self._excused_until = until

    def warnings(self) -> list[Json]:
        """Return the warning of /health where callers wait for long."""
        if not self._queue or not self.report:
            return []
        advice = "something is at work meanwhile, or what they sent is no whole request"
        warning = {
            "code": "callers_waiting",
            "message": f"{self._queue}: {advice}.",
            **self.report,
        }
        return [warning]

    def _connections(self, pid: int) -> list[Connection]:
        """Return the connections. To look for all takes 1.5 ms of CPU, for one 0.02 ms."""
        before = self._sockets
        self._sockets = sockets_of(pid)
        self._looks = (self._looks + 1) % ALL_LOOKS
        same = self._sockets and self._sockets == before
        if same and self._looks and len(self._seen) <= FEW:
            seen = again(self._seen)
            if len(seen) == len(self._seen):
                return seen
        return connections(self._port)

    def _own_ends(self, seen: list[Connection]) -> set[tuple[bytes, bytes]]:
        """Return the ends of this service's own ones: a connection stays whose it is.

        They are looked for by turn all the same. Where no file could be opened, some were missed.
        """
        keys = set()
        for each in seen:
            keys.add(each.key)
        if not self._looks or keys != self._keys:
            self._keys = keys
            self._own = own_ends(self._port)
        return self._own

    def _note_requests(self, seen: list[Connection], now: float, new_bytes: int) -> set[bytes]:
        """Return the connections whose last request is whole, as far as can be told."""
        noted = {}
        received = 0
        for each in seen:
            last = self._requests.get(each.key) or Request()
            received += each.received - last.received
            noted[each.key] = note_request(last, each, now)
        self._requests = noted
        if new_bytes - received >= FILES_BYTES:
            for key, last in noted.items():
                if now - last.at <= GAP_S:  # it may read after the look that saw its bytes
                    noted[key] = last._replace(whole=True)
        whole = set()
        for key, last in noted.items():
            if last.whole and last.at > self._excused_until:
                whole.add(key)
        return whole

    def _wait_s(self, connection: Connection) -> float:
        """Return for how long a connection's last request has waited; 0 where it does not.

        Who was told to go on, and has done so within the same tick, is not answered.
        """
        invited = self._requests[connection.key].invited
        return connection.wait_s or (connection.tied_s if invited else 0)

    def _new_bytes(self, pid: int) -> int:
        """Return how many bytes the server has read since the last look, or since its start."""
        before = self._read_bytes if pid == self._pid else 0
        self._pid = pid
        self._read_bytes = bytes_read(pid)
        return self._read_bytes - before


def note_request(last: Request, seen: Connection, now: float) -> Request:
    """Return a connection's last request, as a look has seen it."""
    if seen.received > last.received:
        invited = seen.sent - last.sent == len(CONTINUE)
        return Request(seen.received, seen.sent, now, invited=invited)
    if seen.sent != last.sent:
        return last._replace(sent=seen.sent)
    return last


def sockets_of(pid: int) -> set[str]:
    """Return the sockets that a process has, by the kernel's numbers; none where it cannot be."""
    try:
        return {link for link in links(pid) if link.startswith("socket:")}
    except OSError:
        return set()
