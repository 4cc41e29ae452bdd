"""How a clear and a reset are told: their steps, the sentence, the error."""

import time
import typing

from ollama_client import Json, ServiceError


class Steps(list):
    """The steps of a clear or reset, as they are answered."""

    def __init__(self, steps: typing.Iterable[Json] = ()):
        super().__init__(steps)
        self._began = time.monotonic()  # of the step under way

    def note(self, step: str, ok: bool, done: str, failed: str = "") -> None:
        """Note how a step went that has just ended."""
        now = time.monotonic()
        seconds = round(now - self._began, 3)
        detail = done if ok else failed
        self.append(
            {
                "step": step,
                "ok": ok,
                "seconds": seconds,
                "detail": detail,
            }
        )
        self._began = now


def clear_message(report: Json) -> str:
    """Say in a sentence what a clear did."""
    unloaded, killed, left = report["unloaded_models"], report["killed"], report["left"]
    if not unloaded and not killed and not left:
        return "Cache cleared: nothing was loaded."
    done = f"{len(unloaded)} unloaded, {report['memory']['freed_mb']} MB came free"
    if killed:
        done += f", {len(killed)} runner(s) ended"
    if left:
        why = "not unloaded by Ollama" if not_agreed(report) else "still busy"
        done += f", {why}: {', '.join(left)}"
    return f"Cache cleared: {done}."


def not_agreed(report: Json) -> bool:
    """Tell whether Ollama was too late to list or to unload what is loaded."""
    for step in report["steps"]:
        if step["step"] in ("list", "unload") and not step["ok"]:
            return True
    return False


def clear_failure(report: Json) -> ServiceError:
    """Make the 503 of a clear that did not free all."""
    if report["survived"]:
        words = "A runner does not end, not even by SIGKILL: reboot the host."
        return _failure("runner_survived", words, "reboot_host", report)
    if report["ending"]:
        words = "A runner has not ended yet that was told to by SIGKILL: GET /health tells more."
        return _failure("runner_ending", words, "wait", report)
    if report["unknown_processes"]:
        words = (
            f"Process {report['unknown_processes'][0]} may hold that memory, and Ollama does not "
            "say what it is for: if it is not just loading, POST /api/session/reset."
        )
        return _failure("runner_unknown", words, "reset_session", report)
    words = "Ollama goes on listing a runner that is dead: POST /api/session/reset."
    return _failure("runner_ghost", words, "reset_session", report)


def _failure(code: str, words: str, action: str, report: Json) -> ServiceError:
    return ServiceError(code, words, recommended_action=action, **report)
