"""The code, the reason and the action of /health, and its warnings."""

import pathlib

import psutil

import gpu
from llm_service.downloads import DISK_RESERVE_BYTES
from llm_service.errors import TimedOut, Unreachable, clean, failure
from llm_service.healing import Healing
from llm_service.processes import MB
from llm_service.watch import ASK_S, Watch, bytes_of
from ollama_client import Json, ServiceError, timestamp

LIST_S = 1.2
DISK_LOW_BYTES = DISK_RESERVE_BYTES  # where downloads stop, too


class Health:
    """Tells whether the service works, and what would heal it."""

    def __init__(self, watch: Watch, healing: Healing, gpu_layers: str):
        self._watch, self._healing = watch, healing
        self._processes = watch.processes
        self._gpu_layers = gpu_layers

    def check(self) -> Json:
        """Return the health report, or raise the 503 that tells what would heal it."""
        if self._watch.gpu["state"] == "lost":
            words = "The GPU is lost to this container: restart it; if that fails, reboot the host."
            raise unhealthy("gpu_lost", words, gpu.ACTIONS["lost"])
        server = self._watch.server  # before it is asked: the next one may be there afterwards
        try:
            names = [model["name"] for model in self._watch.server_state.tags(LIST_S)]
            loaded = self._loaded_or_seen()
        except ServiceError as e:
            raise unhealthy(*self.diagnose(e, server)) from e
        self._raise_fault()
        warnings = self.find_warnings(self._watch.gpu, loaded)
        return {
            "status": "healthy",
            "models_count": len(names),
            "models": names,
            "loaded": [model["name"] for model in loaded],
            "ollama_version": self._watch.server_state.known_version(),
            "gpu": self._watch.gpu["state"],
            "recommended_action": gpu.ACTIONS[self._watch.gpu["state"]],
            "load": self._healing.load,
            "runners": self._watch.runners(),
            "looked_at": timestamp(self._watch.looked_at),
            "warnings": warnings,
            "warning": warnings[0]["message"] if warnings else None,
        }

    def _loaded_or_seen(self) -> list[Json]:
        """Return what Ollama has loaded, or had at the last look while it holds its lock.

        It holds it while it settles with a runner, for 20 s; only a server that does not answer
        ``/api/version`` either hangs.
        """
        try:
            return self._watch.server_state.loaded_now(ASK_S)
        except TimedOut:
            server = self._processes.server()
            self._watch.ollama.version(ASK_S)
            self._watch.server_state.note_answer(server)
            return self._watch.loaded

    def _raise_fault(self) -> None:
        """Raise the 503 of /health for a runner that is stuck, silent or a ghost."""
        for state in self._watch.faults():
            words = f"The runner of {state.model or state.process.pid} is "
            words += f"{'a ' if state.state == 'ghost' else ''}{state.state}: {state.evidence}."
            raise ServiceError(
                f"runner_{state.state}",
                words,
                reason=words,
                recommended_action=self._healing.action(state),
                runners=self._watch.runners(),
            )

    def diagnose(self, error: ServiceError, asked: psutil.Process | None) -> tuple[str, str, str]:
        """Tell code, reason and the action that heals from the error of the server asked."""
        server = self._processes.server()
        if not isinstance(error, (TimedOut, Unreachable)):
            words = f"Ollama cannot list the models: {error}"
            # A restart mends nothing that is in the way among its files.
            action = "wait" if error.code == "store_damaged" else "restart_service"
            return "model_store_unreadable", words, action
        if server is None and not self._processes.ever_started():
            return "ollama_starting", "Ollama is about to be started.", "wait"
        if server is None or self._processes.ending(server):
            return diagnose_end(self._last_words())
        if server != asked or self._watch.server_state.starting(server):
            return "ollama_starting", "Ollama is starting.", "wait"
        if isinstance(error, TimedOut):
            return "ollama_hung", "Ollama runs but does not answer.", "reset_session"
        return "ollama_unreachable", "Ollama runs but takes no connection.", "reset_session"

    def _last_words(self) -> str:
        """Return what Ollama said at its last end, as the launcher noted it."""
        try:
            return (
                pathlib.Path(f"{self._processes.state_file}.reason")
                .read_text(errors="replace")
                .strip()
            )
        except OSError:
            return ""

    def find_warnings(self, reading: Json, loaded: list[Json]) -> list[Json]:
        """Return what does not make the service unhealthy: ``[{"code", "message"}]``."""
        warnings = []
        free = self._watch.store.free_bytes()
        low = free is not None and free < DISK_LOW_BYTES
        if low and not self._watch.store.read_only():  # there no advice would help
            warnings.append(("disk_low", "The disk is almost full: delete a model, or prune."))
        if not self._watch.store_writable:
            path = self._watch.store.path
            words = f"{path} cannot be written: chown -R it to the user of the service."
            warnings.append(("store_not_writable", words))
        if self._healing.load and self._healing.load["state"] == "failed":
            words = f"{self._healing.load['model']} did not load: {self._healing.load['error']}"
            warnings.append(("load_failed", words))
        # Ollama may list dead ones, and one that still loads has not filled its memory.
        there = {each["model"] for each in self._watch.runners() if each["state"] != "loading"}
        warnings += self.gpu_warnings(reading, [each for each in loaded if each["name"] in there])
        return [{"code": code, "message": message} for code, message in warnings]

    def gpu_warnings(self, reading: Json, loaded: list[Json]) -> list[tuple[str, str]]:
        """Compare where Ollama says that its models lie with what was asked for and measured."""
        warnings: list[tuple[str, str]] = []
        if reading["state"] != "ok" or reading["memory_shared"]:
            return warnings
        used_mb, _ = gpu.memory_totals(reading)
        for model in loaded:
            words = self._part_on_cpu(model, used_mb)
            if words:
                warnings.append(("model_on_cpu", words))
        claimed_mb = sum(bytes_of(model, "size_vram") for model in loaded) // MB
        if used_mb is not None and claimed_mb > used_mb:
            words = (
                f"Ollama says that {claimed_mb} MB of its models lie on the GPU, of which only "
                f"{used_mb} MB are in use: the models run on the CPU. {GPU_ADVICE}"
            )
            warnings.append(("gpu_not_used", words))
        return warnings

    def _part_on_cpu(self, model: Json, used_mb: int | None) -> str:
        """Say how much of a model lies in system memory, and what to do; "" where nothing should.

        ``used_mb`` is the memory in use on the GPUs.
        """
        size_mb = bytes_of(model, "size") // MB
        vram_mb = bytes_of(model, "size_vram") // MB
        if self._gpu_layers == "0" or vram_mb >= size_mb:
            return ""
        hidden = not vram_mb or (used_mb is not None and vram_mb > used_mb)
        advice = NO_GPU_ADVICE if hidden else PARTLY_ADVICE
        missing = f"{size_mb - vram_mb} of {size_mb} MB of {model['name']} lie in system memory"
        return f"{missing}, which is slow. {advice}"


def unhealthy(code: str, reason: str, action: str) -> ServiceError:
    """Make the 503 of /health."""
    return ServiceError(code, reason, reason=reason, recommended_action=action)


def diagnose_end(said: str) -> tuple[str, str, str]:
    """Tell the same of an Ollama that has ended, from what it said last."""
    words = "Ollama has ended and is being started again."
    if not said:
        return "ollama_dead", words, "wait"
    reason = failure(said)
    if reason.code in ("store_not_writable", "store_read_only"):
        return reason.code, f"{words} It said: {reason}", "wait"
    return "ollama_dead", f"{words} It said: {clean(said)}.", "wait"


GPU_ADVICE = (
    "Check CUDA_VISIBLE_DEVICES, the container's runtime (LLM_RUNTIME=nvidia) and the driver."
)
NO_GPU_ADVICE = f"Ollama sees no GPU, whatever LLM_GPU_LAYERS says. {GPU_ADVICE}"
PARTLY_ADVICE = (
    "Set LLM_GPU_LAYERS=all where it fits the GPU, else choose a smaller model or context; in "
    "Docker check LLM_RUNTIME=nvidia."
)
