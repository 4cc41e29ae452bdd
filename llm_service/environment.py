"""What of the environment reaches Ollama, and with it the runners."""

import re
import typing

from ollama_client import trimmed

_SWITCH = "on|off|true|false|enabled|disabled|1|0"
_NUMBERS = (
    "BATCH CACHE_RAM CACHE_REUSE CTX_CHECKPOINTS CTX_SIZE FIT_CTX MAIN_GPU N_CPU_FFN "
    "N_CPU_MOE N_PARALLEL N_PREDICT THREADS THREADS_HTTP TIMEOUT UBATCH"
)
_WHOLE = ("-?[0-9]{1,9}", "a whole number")
# By its name: the pattern of a variable that runners read, and what it takes in words. Where
# one makes no sense, no model loads.
RUNNER_SETTINGS = {f"LLAMA_ARG_{name}": _WHOLE for name in _NUMBERS.split()}
RUNNER_SETTINGS["LLAMA_ARG_N_GPU_LAYERS"] = (
    "-1|[0-9]{1,6}|all|auto",
    "a whole number from 0, all or auto",
)
RUNNER_SETTINGS["LLAMA_ARG_FIT"] = (_SWITCH, "on or off")
RUNNER_SETTINGS["LLAMA_ARG_FIT_TARGET"] = (
    "[0-9]{1,9}(,[0-9]{1,9})*",
    "a number of MiB, or one for each GPU, separated by commas",
)
RUNNER_SETTINGS["LLAMA_ARG_FLASH_ATTN"] = (f"auto|{_SWITCH}", "on, off or auto")

# With these a runner could not be watched: neither its port nor its output would tell.
_BLINDING = re.compile(
    "LLAMA_API_KEY|LLAMA_ARG_(API_KEY|API_KEY_FILE|API_PREFIX|(NO_)?(ENDPOINT_SLOTS|LOG_[A-Z_]+))"
)


def blinding(environ: typing.Mapping[str, str]) -> list[str]:
    """Return the names of the variables that would blind the watch."""
    return sorted(name for name in environ if _BLINDING.fullmatch(name))


def changes(
    environ: typing.Mapping[str, str],
    context_length: str,
    gpu_layers: str,
) -> list[str]:
    """Return words for env(1), by which Ollama's environment differs from the service's."""
    hidden = [*blinding(environ), *_empty(environ), "LLM_API_TOKEN"]
    layers = {"-1": "all", "auto": ""}.get(gpu_layers, gpu_layers)
    layers = environ.get("LLAMA_ARG_N_GPU_LAYERS") or layers
    no_prune = trimmed(environ.get("OLLAMA_NOPRUNE", "")) or "1"
    options = [f"--unset={name}" for name in hidden]
    options.append("LLAMA_ARG_ENDPOINT_METRICS=1")  # for the watch; "yes" is silently off
    options.append(f"OLLAMA_CONTEXT_LENGTH={context_length}")
    options.append(f"OLLAMA_NOPRUNE={no_prune}")
    if layers:
        options.append(f"LLAMA_ARG_N_GPU_LAYERS={layers}")
    return options


def _empty(environ: typing.Mapping[str, str]) -> list[str]:
    """Return what is set to nothing, as compose passes what .env leaves empty."""
    names = [name for name, value in environ.items() if not value]
    return [name for name in names if re.fullmatch(r"LLAMA_ARG_\w+", name)]
