"""The machine: its GPUs, memory, CPU and the models' disk, read beside the watch.

A slow disk or driver holds up these threads only, and neither blinds the watch nor restarts its
counts.
"""

import logging
import threading
import time
import typing

import psutil

import gpu
from llm_service.downloads import Downloads
from llm_service.matching import Matching
from llm_service.store import Store
from ollama_client import Json, ServiceError

log = logging.getLogger("llm-service")
LOOK_S = 2
DISK_LOOK_S = 60
SLOW_S = 1.0  # a look at the store that is under way for longer
SAME_LOOKS = 3  # in a row, until a state of the GPU counts: one bad answer is none


class Machine:
    """Looks at the GPUs and at the store every LOOK_S; all read what it saw last."""

    def __init__(self, store: Store, downloads: Downloads, matching: Matching):
        self._store = store
        self._downloads = downloads
        self.matching = matching
        self.gpu: Json = gpu.NOTHING_READ
        self.memory: typing.Any = psutil.virtual_memory()
        self.cpu_percent: float | None = None
        self.disk: Json | None = None
        self.store_writable = True
        self.store_read_only = False
        self.models: dict[str, list[str]] = {}  # as Store.models gives them
        self.quiet = False  # as the watch tells: then every other look is left out
        self.read_at = 0.0  # when the GPUs were read last, monotonic
        self._same_looks = 0
        self._disk_key: object = None
        self._began: float | None = None  # the look at the store that is under way, monotonic

    def start(self) -> None:
        """Begin to look."""
        self.measure()
        for look in (self.measure, self.look_at_store):
            threading.Thread(target=self._repeat, args=(look,), daemon=True).start()

    def gpu_is_lost(self) -> bool:
        """Tell whether the GPU has been lost for some looks."""
        return self.gpu["state"] == "lost" and self._same_looks >= SAME_LOOKS

    def gpu_action(self) -> str:
        """Return what heals the GPU's state; "wait" until that has been so for some looks."""
        action = gpu.ACTIONS[self.gpu["state"]]
        counts = action == "none" or self._same_looks >= SAME_LOOKS
        return action if counts else "wait"

    def store_is_slow(self) -> bool:
        """Tell whether the models' disk keeps a look waiting."""
        began = self._began
        return began is not None and time.monotonic() - began > SLOW_S

    def free_bytes(self) -> int | None:
        """Return the free bytes of the models' disk as of the last look."""
        return self.disk["free_bytes"] if self.disk else None

    def measure(self) -> None:
        """Take the figures of the GPUs, the memory and the CPU."""
        began = time.monotonic()
        reading = gpu.sample()
        same = reading["state"] == self.gpu["state"]
        self._same_looks = self._same_looks + 1 if same else 1  # before others see the state
        self.gpu = reading
        self.read_at = began  # later than that: who takes it before is on the safe side
        self.memory = psutil.virtual_memory()
        self.cpu_percent = psutil.cpu_percent()  # since the look before

    def look_at_store(self) -> None:
        """Take the figures of the models' disk, as far as something may have changed."""
        self._began = time.monotonic()
        try:
            self.models = self._store.models()
            signature, manifests = self._store.manifests.last
            self.matching.note_models(manifests)
            # Parts grow, and their folder does not change
            downloading = self._downloads.running_count()
            minute = time.monotonic() // DISK_LOOK_S
            free = self._store.free_bytes()
            changed = signature, self._store.changed_ns(), free is None
            key = (changed, downloading, minute)
            if downloading or key != self._disk_key:
                self.disk = self._store.disk()
                self.store_writable = self._store.writable()
                self.store_read_only = self._store.read_only()
                self._disk_key = key
            elif self.disk:  # what others write to the disk
                self.disk = {**self.disk, "free_bytes": free}
        finally:
            self._began = None

    def pause_s(self) -> float:
        """Return how long the next look may wait."""
        rests = self.quiet and self._same_looks >= SAME_LOOKS
        return 2 * LOOK_S if rests else LOOK_S

    def _repeat(self, look: typing.Callable[[], None]) -> None:
        while True:
            try:
                look()
            except ServiceError as e:
                log.warning("the machine: %s", e)
            except Exception:
                log.exception("the machine: a bug")
            time.sleep(self.pause_s())
