"""Files as they are on the disk: what they take, how old they are, and when they change."""

import collections
import contextlib
import errno
import hashlib
import os
import time
import typing

CLOCK_JUMP_S = 10
PIECE_BYTES = 1 << 20


class File(typing.NamedTuple):
    """A file as it was seen."""

    path: str
    about: os.stat_result

    @property
    def name(self) -> str:
        """Return the name without the folder."""
        return os.path.basename(self.path)


class Ages:
    """How old files are. No jump of the wall clock makes one older than it is."""

    def __init__(self, wall: typing.Callable[[], float], since_boot: typing.Callable[[], float]):
        self._wall, self._since_boot = wall, since_boot
        self._began = since_boot()
        # Of the wall clock, as often as it was seen to jump
        self._offsets = collections.deque([wall() - self._began], maxlen=16)

    def note_clock(self) -> float:
        """Note a jump of the wall clock; return the seconds since boot."""
        now = self._since_boot()
        offset = self._wall() - now
        if abs(offset - self._offsets[-1]) > CLOCK_JUMP_S:
            self._offsets.append(offset)
        self._offsets[-1] = offset
        return now

    def age_s(self, changed: float) -> float:
        """Return the least age that a time of a file can mean; 0 for one in the future."""
        now = self.note_clock()
        ages = [now + offset - changed for offset in self._offsets]
        if ages[-1] < 0:
            return 0.0
        if len(ages) > 1:  # it may be of an earlier clock yet, and has not changed since the start
            ages.append(now - self._began)
        return min(age for age in ages if age >= 0)

    def just_now(self, changed_ns: int) -> bool:
        """Tell whether a change now might leave the same time."""
        return abs(self._wall() - changed_ns / 1e9) < 1


def seconds_since_boot() -> float:
    """Return a clock that nobody sets."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def bytes_freed(files: typing.Iterable[File]) -> int:
    """Return what comes free on the disk with these files: a hard link elsewhere keeps it."""
    about = [file.about for file in files]
    gone = collections.Counter((each.st_dev, each.st_ino) for each in about)
    sizes = {(each.st_dev, each.st_ino): each for each in about}
    return sum(
        sizes[inode].st_blocks * 512
        for inode, links in gone.items()
        if links == sizes[inode].st_nlink
    )


def seen_files(paths: typing.Iterable[str]) -> typing.Iterator[File]:
    """Look at files as they are, without following links; those that are not there are left out."""
    for path in paths:
        with contextlib.suppress(OSError):
            yield File(path, os.lstat(path))


def content_digest(path: os.PathLike, note: typing.Callable[[int], None]) -> str | None:
    """Return a file's SHA-256; None where it is missing or the disk cannot read it.

    ``note`` is told the bytes read so far, and may raise.
    """
    checksum = hashlib.sha256()
    done = 0
    note(done)
    try:
        with open(path, "rb", buffering=0) as file:
            while piece := file.read(PIECE_BYTES):
                checksum.update(piece)
                done += len(piece)
                note(done)
    except OSError as e:
        if e.errno not in (errno.ENOENT, errno.EIO):
            raise
        return None
    return checksum.hexdigest()


def below(
    folder: str, depth: int = 1, seen: set[tuple[int, int]] | None = None
) -> typing.Iterator[os.DirEntry[str]]:
    """Yield what lies below: by every way as deep as Ollama looks, then each folder once."""
    seen = set() if seen is None else seen
    try:
        about = os.stat(folder)
        entries = list(os.scandir(folder))
    except FileNotFoundError:
        if depth == 1 or os.path.lexists(folder):
            raise
        return  # Ollama has removed it just now
    if depth > 4 and (about.st_dev, about.st_ino) in seen:
        return
    seen.add((about.st_dev, about.st_ino))
    for entry in entries:
        yield entry
        if entry.is_dir():
            yield from below(entry.path, depth + 1, seen)


def stamp(path: str) -> tuple[str, int, int, int]:
    """Return what changes with a file: its ctime above all, which nobody sets."""
    try:
        about = os.stat(path)
    except OSError:
        return path, 0, 0, 0
    return path, about.st_ctime_ns, about.st_mtime_ns, about.st_size
