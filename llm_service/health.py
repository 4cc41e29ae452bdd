"""The code, the reason and the action of /health, and its warnings."""

import contextlib
import pathlib
import time

import psutil

import gpu
from llm_service.answers import Answer
from llm_service.downloads import DISK_RESERVE_BYTES
from llm_service.errors import TimedOut, Unreachable, clean, failure
from llm_service.healing import Healing
from llm_service.processes import MB, cpu_clock_s, is_held_up, life
from llm_service.session import Session
from llm_service.sharing import SharedRun, began_since
from llm_service.watch import Watch, bytes_of
from ollama_client import Json, ServiceError, name_key, timestamp

HEALTH_S = 3
ASK_S = 0.6  # two such questions and a list stay within HEALTH_S
LIST_S = 1.2
COMPUTING_SHARE = 0.03  # of a core, as others may want it; one that hangs uses none
DISK_LOW_BYTES = DISK_RESERVE_BYTES  # where downloads stop, too
ENDED_S = 60  # the launcher starts the next server within 11 s
UNENDED_S = 15  # a server that was killed and is still there does not end
SEVERITY = ("reboot_host", "restart_service", "reset_session", "wait")
Diagnosis = tuple[str, str, str]  # a code, its reason and the action that heals
Places = dict[str | None, dict[int, int]]  # by model: its GPUs and the MB in use there


class Health:
    """Tells whether the service works, and what would heal it."""

    def __init__(
        self,
        watch: Watch,
        session: Session,
        healing: Healing,
        gpu_layers: str,
        long_answer_s: float,
    ):
        self._watch = watch
        self._session = session
        self._healing = healing
        self._machine = watch.machine
        self._processes = watch.processes
        self._gpu_layers = gpu_layers
        self._long_answer_s = long_answer_s
        self._checks = SharedRun(began_since)

    def report(self) -> Json:
        """Return the answer of ``GET /health``; raise the 503 that tells what would heal it."""
        try:
            return self._checks.get(self.check, HEALTH_S)
        except ServiceError as e:
            if "recommended_action" in e.fields:
                raise
            raise unhealthy(e.code, str(e), "wait") from e

    def check(self) -> Json:
        """Ask Ollama, and return the report or raise what is wrong."""
        fault = self._gpu_fault()
        if fault:
            raise fault
        # Before it is asked: the next one may be there afterwards
        server = self._watch.server
        try:
            names, loaded, slow = self._ask()
        except ServiceError as e:
            raise unhealthy(*self.diagnose(e, server)) from e
        fault = self._runner_fault() or self._caller_fault()
        if fault:
            raise fault
        reading = self._machine.gpu
        warnings = self.find_warnings(self._watch.gpu, loaded, slow)
        return {
            "status": "healthy",
            "models_count": len(names),
            "models": names,
            "loaded": [model["name"] for model in loaded],
            "ollama_version": self._watch.server_state.known_version(),
            "gpu": reading["state"],
            "recommended_action": self._machine.gpu_action(),
            "load": self._session.loader.load,
            "runners": self._watch.runners(),
            "looked_at": timestamp(self._watch.looked_at),
            "warnings": warnings,
            "warning": warnings[0]["message"] if warnings else None,
        }

    def is_up(self, server: psutil.Process | None) -> bool:
        """Tell whether the last look found no fault with this server; nothing is asked."""
        state = self._watch.server_state
        has_answered = server is not None and server == state.answered
        answers = has_answered and state.state == "answering"
        fault = self._gpu_fault() or self._runner_fault() or self._caller_fault()
        return answers and self._watch.well and not fault

    def _ask(self) -> tuple[list[str], list[Json], bool]:
        """Return the models on disk, what is loaded, and whether that is as of the last look.

        Ollama holds its lock while it settles with a runner, for 20 s, and reads each model's
        header once: only a server that does not answer ``/api/version`` either hangs.
        """
        state = self._watch.server_state
        with contextlib.suppress(TimedOut):
            if not self._machine.store_is_slow():
                names = [model["name"] for model in state.tags(LIST_S)]
                return names, state.loaded_now(ASK_S), False
        self._ask_version()
        return list(self._machine.models), self._watch.loaded, True

    def _ask_version(self) -> None:
        """Ask what hangs only if that is not answered: raise then.

        A server that computes, or would if others let it, is slow, until the watch has seen it
        silent for long: it reads what somebody has sent it.
        """
        state = self._watch.server_state
        server = self._processes.server()
        before_s = cpu_clock_s(server)
        try:
            self._watch.ollama.version(ASK_S)
        except TimedOut:
            computes = cpu_clock_s(server) - before_s >= COMPUTING_SHARE * ASK_S
            works = computes or is_held_up(server)
            if not works or server != state.answered or state.hung(server):
                raise
        else:
            state.note_answer(server)

    def _gpu_fault(self) -> ServiceError | None:
        if not self._machine.gpu_is_lost():
            return None
        words = "The GPU is lost to this container: restart it; if that fails, reboot the host."
        return unhealthy("gpu_lost", words, gpu.ACTIONS["lost"])

    def _runner_fault(self) -> ServiceError | None:
        """Return the 503 of the worst of the runners that are stuck, silent or ghosts."""
        faults = [(self._healing.action(state), state) for state in self._watch.faults()]
        if not faults:
            return None
        action, state = min(faults, key=lambda each: SEVERITY.index(each[0]))
        survives = self._watch.survives(state.runner)
        word = "survived" if survives else state.state
        words = f"The runner of {state.model or state.process.pid} is "
        words += f"{'a ' if word == 'ghost' else ''}{word}: {state.evidence}."
        if survives:
            words = f"Process {state.process.pid} does not end, not even by SIGKILL."
        error = unhealthy(f"runner_{word}", words, action)
        error.fields["runners"] = self._watch.runners()
        return error

    def _caller_fault(self) -> ServiceError | None:
        """Return the 503 of a server whose callers wait while nothing works."""
        starved = self._watch.callers.starved
        if not starved:
            return None
        words = f"Nothing works for those who wait for Ollama: {starved}."
        return unhealthy("callers_starved", words, self._healing.starved_action())

    def diagnose(self, error: ServiceError, asked: psutil.Process | None) -> Diagnosis:
        """Tell what is wrong from the error of the server that was asked."""
        server = self._processes.server()
        state = self._watch.server_state
        if not isinstance(error, (TimedOut, Unreachable)):
            return diagnose_store(error)
        if server is None and not self._processes.ever_started():
            return "ollama_starting", "Ollama is about to be started.", "wait"
        if server is None or self._processes.ending(server):
            return self._diagnose_end(server)
        if server != asked or state.starting(server):
            return "ollama_starting", "Ollama is starting.", "wait"
        action = self._healing.server_action()
        if isinstance(error, TimedOut):
            return "ollama_hung", "Ollama runs but does not answer.", action
        return "ollama_unreachable", "Ollama runs but takes no connection.", action

    def _diagnose_end(self, server: psutil.Process | None) -> Diagnosis:
        """Tell what is wrong with an Ollama that ends or has ended; that may take a while."""
        ended_s = self._watch.server_state.ended_s()
        if server is not None and ended_s > UNENDED_S:
            words = "Ollama was killed and does not end: reboot the host."
            return "ollama_dead", words, "reboot_host"
        code, words, action = diagnose_end(self._last_words())
        if ended_s > ENDED_S:
            return code, f"{words} That takes too long.", "restart_service"
        return code, words, action

    def _last_words(self) -> str:
        """Return what Ollama said at its last end, as the launcher noted it."""
        noted = pathlib.Path(f"{self._processes.state_file}.reason")
        try:
            return noted.read_text(errors="replace").strip()
        except OSError:
            return ""

    def find_warnings(
        self,
        reading: Json,
        loaded: list[Json],
        slow: bool = False,
    ) -> list[Json]:
        """Return what does not make the service unhealthy: ``[{"code", "message"}]``."""
        warnings = []
        free = self._machine.free_bytes()
        low = free is not None and free < DISK_LOW_BYTES
        if low and not self._machine.store_read_only:  # there no advice would help
            words = "The disk is almost full: delete a model, or prune."
            warnings.append(("disk_low", words))
        if not self._machine.store_writable:
            path = self._watch.store.path
            words = f"{path} cannot be written: chown -R it to the user of the service."
            warnings.append(("store_not_writable", words))
        warnings += failed_load(self._session.loader.load, loaded)
        if slow:
            words = "Ollama or the models' disk is slow: what is listed is as of the last look."
            warnings.append(("ollama_slow", words))
        if reading["state"] in ("ok", "unified"):
            there = self._measured_models(reading)
            measured = [model for model in loaded if model["name"] in there]
            warnings += self.gpu_warnings(reading, measured, there)
        told = [{"code": code, "message": message} for code, message in warnings]
        return told + self._watch.callers.warnings() + self._long_answers()

    def _measured_models(self, reading: Json) -> Places:
        """Return the models whose memory the reading of the GPUs can show, and their GPUs.

        Ollama may list dead ones, and one that still loaded then had not filled its memory.
        """
        read_at = self._watch.gpu_read_at
        found: Places = {}
        for state in self._watch.states():
            was_loaded = state.loaded_at is not None and state.loaded_at <= read_at
            if was_loaded and not life(state.process).dying:
                cards = gpu.visible(reading["gpus"], state.runner.gpus)
                its = found.setdefault(state.model, {})
                its.update((card["index"], card["memory_used_mb"] or 0) for card in cards)
        return found

    def _long_answers(self) -> list[Json]:
        """Return a warning for each answer that has been under way for very long."""
        found = []
        now = time.monotonic()
        for state in self._watch.states():
            for each in state.answers.longer_than(self._long_answer_s, now):
                found.append(long_answer(state.model or "unknown", each, now))
        return found

    def gpu_warnings(
        self,
        reading: Json,
        loaded: list[Json],
        places: Places,
    ) -> list[tuple[str, str]]:
        """Compare where Ollama says that models lie with what was asked for and measured."""
        warnings: list[tuple[str, str]] = []
        # Where GPU and system share the memory, what is in use tells nothing of the models
        shared = reading["memory_shared"]
        for model in loaded:
            used_mb = None if shared else sum(places[model["name"]].values())
            words = self._part_on_cpu(model, used_mb)
            if words:
                warnings.append(("model_on_cpu", words))
        return warnings if shared else warnings + not_used(loaded, places)

    def _part_on_cpu(self, model: Json, used_mb: int | None) -> str:
        """Say how much of a model lies in system memory, and what to do about it.

        That is "" where nothing should. ``used_mb`` is the memory in use on its GPUs.
        """
        size_mb = bytes_of(model, "size") // MB
        vram_mb = bytes_of(model, "size_vram") // MB
        if self._gpu_layers == "0" or vram_mb >= size_mb:
            return ""
        hidden = not vram_mb or (used_mb is not None and vram_mb > used_mb)
        advice = NO_GPU_ADVICE if hidden else PARTLY_ADVICE
        if not hidden and self._gpu_layers in ("all", "-1"):
            advice = ALL_LAYERS_ADVICE
        missing_mb = size_mb - vram_mb
        missing = f"{missing_mb} of {size_mb} MB of {model['name']} lie in system memory"
        return f"{missing}, which is slow. {advice}"


def not_used(models: list[Json], places: Places) -> list[tuple[str, str]]:
    """Return a warning of each model's GPUs where less is in use than Ollama's models claim.

    Other GPUs do not count: what another program holds there would hide it.
    """
    found = {}
    for model in models:
        cards = places[model["name"]]
        there = [each for each in models if places[each["name"]].keys() <= cards.keys()]
        claimed_mb = sum(bytes_of(each, "size_vram") for each in there) // MB
        used_mb = sum(cards.values())
        numbers = ", ".join(map(str, cards))
        where = f"GPU {numbers}" if cards else "the GPU"
        if claimed_mb > used_mb:
            found[where] = (
                f"Ollama says that {claimed_mb} MB of its models lie on {where}, of which only "
                f"{used_mb} MB are in use: the models run on the CPU. {GPU_ADVICE}"
            )
    return [("gpu_not_used", words) for words in found.values()]


def failed_load(load: Json | None, loaded: list[Json]) -> list[tuple[str, str]]:
    """Return the warning of a load that has failed, unless another caller's has not since."""
    if not load or load["state"] != "failed":
        return []
    listed = {name_key(line["name"]) for line in loaded}
    words = f"{load['model']} did not load: {load['error']}"
    return [] if name_key(load["model"]) in listed else [("load_failed", words)]


def long_answer(model: str, answer: Answer, now: float) -> Json:
    """Make the warning of an answer that has been under way for very long."""
    seconds = round(now - answer.began)
    words = (
        f"{model} has been at one answer for {seconds // 60} minutes, {answer.tokens} tokens so "
        f'far: if nobody wants it, POST /api/cache/clear with "model": "{model}".'
    )
    return {
        "code": "long_answer",
        "message": words,
        "model": model,
        "task": answer.task,
        "seconds": seconds,
        "tokens": answer.tokens,
    }


def unhealthy(code: str, reason: str, action: str) -> ServiceError:
    """Make the 503 of /health."""
    return ServiceError(code, reason, reason=reason, recommended_action=action)


def diagnose_store(error: ServiceError) -> Diagnosis:
    """Tell what is wrong with an Ollama that answers with an error: a restart mends no files."""
    no_help = error.code in ("store_damaged", "store_not_writable", "store_read_only")
    action = "wait" if no_help else "restart_service"
    return "model_store_unreadable", f"Ollama cannot list the models: {error}", action


def diagnose_end(said: str) -> Diagnosis:
    """Tell what is wrong with an Ollama that has ended, from what it said last."""
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
ALL_LAYERS_ADVICE = "All layers are wanted there already: choose a smaller model or context."
PARTLY_ADVICE = (
    "Set LLM_GPU_LAYERS=all where it fits the GPU, else choose a smaller model or context; in "
    "Docker check LLM_RUNTIME=nvidia."
)
