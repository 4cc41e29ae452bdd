"""The records that Ollama keeps of an unfinished download: one for each part."""

import json
import pathlib
import stat


def usable(parts: list[pathlib.Path]) -> bool:
    """Tell whether Ollama can go on from these files of a download: its data and records.

    After a full disk or a power cut a record may be empty, cut off or missing, and each pull
    of that model fails.
    """
    numbers = set()
    for part in parts:
        number = part.name.partition("-partial-")[2]
        try:
            if not stat.S_ISREG(part.lstat().st_mode):
                return False
            if number:
                numbers.add(_check(part.read_bytes(), int(number)))
        except FileNotFoundError:
            return True  # it changes just now
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return False
    return numbers == set(range(len(numbers)))


def _check(text: bytes, number: int) -> int:
    """Return the number of a part whose record makes sense; raise ValueError else."""
    record = json.loads(text)
    sizes = 0 <= record["Completed"] <= record["Size"]
    if record["N"] != number or not sizes:
        raise ValueError(text)
    return number
