"""The machine's GPUs: what NVML says of them, and on a Jetson what the system's files say.

NVML is NVIDIA's library, here through the package nvidia-ml-py (import name pynvml).

- No library on the machine: ``nvmlInit`` raises LibraryNotFound. A library without its
  driver: DriverNotLoaded.
- Driver updated under a running container: LibRmVersionMismatch, until the host reboots.
- Off the bus: GpuIsLost or Unknown. Unknown also when the host's systemd has reloaded its
  device rules under a container, which a restart of the container heals.
- Device nodes closed to the user: NoPermission at ``nvmlInit``.
- MIG: utilization is NotSupported, and in a container memory is NoPermission.
- GB10, Jetson Thor: memory is NotSupported, since it is the system's; processes are listed.
- Jetson Orin: name and UUID at most. The rest is NotSupported, or zeros that count as
  success. JetPack 5 and older have no NVML.
- A broken driver: the call never returns.

Seen on an H200 (driver 580): memory info of version 1 counts 615 MB of the driver's own as
used; a sample takes 0.03 ms, the first one 25 ms.

A Jetson's files are in sysfs, and everyone may read them, in a container too. Sources:
jetson_stats, tegrastats, NVIDIA's Jetson Linux guide. None of it was tried on a board.
"""

import contextlib
import ctypes
import dataclasses
import glob
import importlib
import logging
import math
import os
import queue
import re
import threading
import time
from collections.abc import Callable
from typing import Any

TIMEOUT_S = 0.4
UNRESPONSIVE_S = 30  # a driver may take its time at a start, after a pause, in a swap storm
LIBRARY_S = 10  # between two searches for NVIDIA's library, which go through many folders
PAUSE_S = 6  # more than that between two samples was a pause of this process
ACTIONS: dict[str, str] = {  # recommended_action of each state
    "ok": "none",
    "none": "none",
    "unified": "none",
    "lost": "restart_service",
    "driver_mismatch": "reboot_host",
    "no_permission": "none",
    "slow": "wait",
    "unresponsive": "reboot_host",
    "unknown": "none",
}
FIGURES = (
    "name",
    "uuid",
    "utilization_percent",
    "memory_used_mb",
    "memory_total_mb",
    "temperature_c",
    "power_w",
    "board_power_w",
    "power_rail",
)
ERRORS: dict[str, str] = {  # the state of each of NVML's; any other is "lost"
    "NVMLError_LibraryNotFound": "none",
    "NVMLError_DriverNotLoaded": "none",
    "NVMLError_NotSupported": "none",
    "NVMLError_LibRmVersionMismatch": "driver_mismatch",
    "NVMLLibraryMismatchError": "driver_mismatch",
    "NVMLError_NoPermission": "no_permission",
}
MB = 1024 * 1024
ROOT = "/"  # where the system's files are

NOTHING_READ: dict[str, Any] = {
    "state": "unknown",
    "memory_shared": False,
    "memory_source": None,
    "gpus": [],
}
pynvml: Any = None  # the module takes 2 MB: imported once the library is there
log = logging.getLogger("llm-service")

# ------------------------------------------------------------ what callers use


def sample(
    timeout_s: float = TIMEOUT_S, clock: Callable[[], float] = time.monotonic
) -> dict[str, Any]:
    """Read every GPU once; never raises.

    Returns ``{"state", "memory_shared", "memory_source", "gpus": [{"index", "name", "uuid",
    "utilization_percent", "memory_used_mb", "memory_total_mb", "temperature_c", "power_w",
    "board_power_w", "power_rail"}]}``, None where the device does not say.

    `state` is one of ACTIONS. `memory_shared`: GPU and system share one memory, as on a Jetson
    and GB10. The total is then the system's, and used is by `memory_source`: "nvmap" (the
    GPU's part by the Jetson's own count), "nvml" (the sum of the GPU's processes), or "system"
    (all that is in use). `board_power_w` is what the board's rail `power_rail` carries, never
    the GPU alone.

    One thread reads at a time, so that a call or a file that does not return costs its callers
    `timeout_s` once. Until it returns, the state is "slow", and "unresponsive" after
    UNRESPONSIVE_S. An error of the service's own is logged, and the last reading stays; without
    one the state is "unknown".
    """
    global _probe
    with _lock:
        if _probe is None or _probe.ended.is_set():
            probe = _Probe(clock())
            _read_beside(probe)
            _probe = probe
        probe = _probe
    if not probe.overdue:
        probe.overdue = not probe.ended.wait(timeout_s)
    return probe.reading or _reading(probe.wait(clock()), [])


def memory_totals(reading: dict[str, Any]) -> tuple[int | None, int | None]:
    """Return the used and the total MB of all GPUs that say both; (None, None) if none does."""
    used, total = None, None
    for gpu in reading["gpus"]:
        if None not in (gpu["memory_used_mb"], gpu["memory_total_mb"]):
            used = (used or 0) + gpu["memory_used_mb"]
            total = (total or 0) + gpu["memory_total_mb"]
    return used, total


def fullest(reading: dict[str, Any]) -> tuple[int | None, int | None]:
    """Return the used and the total MB of the fullest GPU; (None, None) if none says both.

    A sum would hide one that is full beside one that is empty.
    """
    shares = []
    for each in reading["gpus"]:
        used, total = memory_totals({"gpus": [each]})
        if used is not None and total:
            shares.append((used / total, used, total))
    return max(shares)[1:] if shares else (None, None)


def visible(gpus: list[dict[str, Any]], setting: str | None) -> list[dict[str, Any]]:
    """Return those GPUs of a reading that a process with this CUDA_VISIBLE_DEVICES can use.

    CUDA takes numbers and beginnings of UUIDs, up to the first that fits no GPU. Its numbers are
    NVML's where all GPUs are alike: else the fastest is its first one. Where it cannot be told,
    as of MIG slices, it may be any.
    """
    words = [word.strip() for word in (setting or "").split(",")]
    if setting is None or not _can_be_told(gpus, words):
        return gpus
    found = []
    for word in words:
        fitting = _fitting(gpus, word)
        if len(fitting) != 1:
            break
        found += fitting
    return found


def _can_be_told(gpus: list[dict[str, Any]], words: list[str]) -> bool:
    """Tell whether CUDA's words for GPUs are clear by NVML's figures."""
    names = {gpu["name"] for gpu in gpus}
    if any(map(str.isdigit, words)) and len(names) > 1:
        return False
    return not words[0].startswith("MIG-") and all(gpu["uuid"] for gpu in gpus)


def _fitting(gpus: list[dict[str, Any]], word: str) -> list[dict[str, Any]]:
    """Return the GPUs with this number, or a UUID that begins so."""
    if not word or word.isdigit():
        return [gpu for gpu in gpus if word == str(gpu["index"])]
    return [gpu for gpu in gpus if gpu["uuid"].startswith(word)]


def memory_in_use(reading: dict[str, Any]) -> tuple[str, int | None]:
    """Return where the models' memory was measured, "nvml" or "system", and the MB in use.

    None: only the whole system's figure is known, which moves by itself, or nothing.
    """
    source = reading["memory_source"]
    if source not in ("nvml", "nvmap"):
        return "system", None
    used = sum(gpu["memory_used_mb"] or 0 for gpu in reading["gpus"])
    return ("nvml" if source == "nvml" else "system"), used


# ------------------------------------------------------------ the reading thread


class _Probe:
    """Takes one reading; `reading` is None until then."""

    def __init__(self, now: float) -> None:
        self.overdue = False
        self.ended = threading.Event()
        self.reading: dict[str, Any] | None = None
        self._asked_at = now
        self._waited_s = 0.0

    def run(self) -> None:
        global _last
        try:
            _last = _read_machine()
        except Exception:
            log.exception("the GPU's figures: a bug")
        finally:
            self.reading = _last
            self.ended.set()

    def wait(self, now: float) -> str:
        """Return the state of a GPU that is waited for. A pause of this process is no waiting."""
        with _lock:
            self._waited_s += min(now - self._asked_at, PAUSE_S)
            self._asked_at = now
        return "unresponsive" if self._waited_s >= UNRESPONSIVE_S else "slow"


@dataclasses.dataclass
class _Known:
    """What earlier readings have shown."""

    library_due: float = 0.0  # when NVML is looked for again (monotonic)
    initialised: bool = False  # NVML
    memory_shared: bool = False
    lists_processes: bool = False  # NVML has listed one: an empty list then means none


_lock = threading.Lock()
_probe: _Probe | None = None
_probes: queue.SimpleQueue[_Probe] = queue.SimpleQueue()
_reader: threading.Thread | None = None
_last = NOTHING_READ
_known = _Known()


def _read_beside(probe: _Probe) -> None:
    """Have a probe take its reading in the thread that does so for all: to begin one costs CPU."""
    global _reader
    if _reader is None or not _reader.is_alive():
        reader = threading.Thread(target=_read_for_ever, name="gpu", daemon=True)
        reader.start()  # which fails where there can be no more threads
        _reader = reader
    _probes.put(probe)


def _read_for_ever() -> None:
    while True:
        _probes.get().run()


def _read_machine() -> dict[str, Any]:
    jetson = _is_jetson()
    _known.memory_shared |= jetson
    state, gpus = _read_nvml(jetson)
    if jetson:
        state, gpus = _add_files(state, gpus)
    _known.memory_shared |= state == "unified"
    return _reading(state, gpus)


def _reading(state: str, gpus: list[dict[str, Any]]) -> dict[str, Any]:
    """Put a reading together; on a machine with shared memory, fill in the memory."""
    source = None
    for gpu in gpus:
        if gpu["memory_total_mb"] is not None:
            source = source or "nvml"
        elif _known.memory_shared:
            source = _fill_memory(gpu)
    return {
        "state": state,
        "memory_shared": _known.memory_shared,
        "memory_source": source,
        "gpus": gpus,
    }


def _unknown(index: int) -> dict[str, Any]:
    """Return the figures of a GPU that says nothing."""
    return {"index": index, **dict.fromkeys(FIGURES)}


# ------------------------------------------------------------ NVML


def _has_nvml() -> bool:
    """Tell whether NVIDIA's library is there, and import its module then."""
    global pynvml
    if pynvml is None:
        now = time.monotonic()
        if now < _known.library_due:
            return False
        try:
            ctypes.CDLL("libnvidia-ml.so.1")
        except OSError:
            _known.library_due = now + LIBRARY_S
            return False
        pynvml = importlib.import_module("pynvml")
    return True


def _read_nvml(jetson: bool) -> tuple[str, list[dict[str, Any]]]:
    """Return NVML's state and the figures of each GPU; never raises."""
    if not _has_nvml():
        return "none", []
    try:
        if not _known.initialised:
            pynvml.nvmlInit()
            _known.initialised = True
        count = pynvml.nvmlDeviceGetCount()
        answers = [_read_device(index, jetson) for index in range(count)]
    except (pynvml.NVMLError, pynvml.NVMLLibraryMismatchError) as error:
        # A device that comes back is seen only by a fresh initialisation.
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()
        _known.initialised = False
        return ERRORS.get(type(error).__name__, "lost"), []
    states = [state for state, _ in answers]
    worst = next((state for state in states if state != "ok"), "ok" if states else "none")
    return worst, [figures for _, figures in answers]


def _read_device(index: int, jetson: bool) -> tuple[str, dict[str, Any]]:
    """Return a GPU's state and figures; where memory is shared, used is its processes' sum."""
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    figures = _unknown(index)
    name = figures["name"] = _ask(pynvml.nvmlDeviceGetName, handle)
    figures["uuid"] = _ask(pynvml.nvmlDeviceGetUUID, handle)
    # Orin's driver, nvgpu, answers zeros for what it does not know.
    stub = "nvgpu" in name if name else jetson
    if stub:
        return "unified", figures
    utilization = _ask(pynvml.nvmlDeviceGetUtilizationRates, handle)
    figures["utilization_percent"] = utilization and utilization.gpu
    celsius = _ask(pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU)
    figures["temperature_c"] = celsius
    milliwatts = _ask(pynvml.nvmlDeviceGetPowerUsage, handle)
    figures["power_w"] = milliwatts and round(milliwatts / 1000, 1)
    state, memory = ("unified", None) if jetson else _memory(handle)
    if memory:
        figures["memory_used_mb"] = round(memory.used / MB)
        figures["memory_total_mb"] = round(memory.total / MB)
    elif state == "unified":
        figures["memory_used_mb"] = _processes_mb(handle)
    return state, figures


def _memory(handle: Any) -> tuple[str, Any]:
    """Return the state that a GPU's memory shows, and its memory info or None.

    Version 2 leaves the driver's reserve out, as nvidia-smi does. Older drivers know one
    version.
    """
    try:
        try:
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle, pynvml.nvmlMemory_v2)
        except (pynvml.NVMLError_FunctionNotFound, pynvml.NVMLError_ArgumentVersionMismatch):
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    except pynvml.NVMLError_NotSupported:
        return "unified", None
    except pynvml.NVMLError_NoPermission:
        return "no_permission", None
    return ("ok", memory) if memory.total else ("unified", None)


def _processes_mb(handle: Any) -> int | None:
    """Return the MB that a GPU's processes hold; None unless NVML tells it of each of them.

    An empty list means 0 only where NVML has listed a process before: in some containers it
    lists none at all. A process that computes and draws is in both lists.
    """
    computing = _ask(pynvml.nvmlDeviceGetComputeRunningProcesses_v3, handle)
    drawing = _ask(pynvml.nvmlDeviceGetGraphicsRunningProcesses_v3, handle) or []
    if computing is None:
        return None
    held = {process.pid: process.usedGpuMemory for process in drawing + computing}
    _known.lists_processes |= bool(held)
    if None in held.values() or not _known.lists_processes:
        return None
    return round(sum(held.values()) / MB)


def _ask(call: Callable[..., Any], *args: Any) -> Any:
    """Call NVML; None where this device does not offer the figure."""
    try:
        return call(*args)
    except (
        pynvml.NVMLError_NotSupported,
        pynvml.NVMLError_NoPermission,
        pynvml.NVMLError_FunctionNotFound,
    ):
        return None


# ------------------------------------------------------------ a Jetson's files

LOADS = ("sys/devices/platform/gpu.0/load", "sys/devices/gpu.0/load")  # up to Orin
THOR_LOAD = "sys/class/devfreq/gpu-gpc-0/load"
ZONES = ("gpu-thermal", "gpu-therm", "tj-thermal")  # the last one is the whole chip's
RAILS = ("VDD_IN", "VIN", "VDD_GPU_SOC", "VDD_GPU", "VDD_CPU_GPU_CV")  # the first two: the board


def _is_jetson() -> bool:
    """Tell a Jetson, in a container too, where /proc/device-tree is masked."""
    family = _text("sys/devices/soc0/family") or ""
    signs = ("etc/nv_tegra_release", *LOADS)
    return family.startswith("Tegra") or any(os.path.exists(f"{ROOT}/{sign}") for sign in signs)


def _add_files(state: str, gpus: list[dict[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    """Put the figures of a Jetson's files before NVML's; without NVML they stand alone.

    NVML's error is the state only where the GPU's own load file does not speak against it.
    """
    figures = gpus[0] if gpus else _unknown(0)
    load = _load(*LOADS)
    if load is not None or state in ("ok", "none"):
        state = "unified"
    told = {"utilization_percent": load, "temperature_c": _temperature()}
    figures.update({name: figure for name, figure in told.items() if figure is not None})
    if figures["utilization_percent"] is None:
        figures["utilization_percent"] = _load(THOR_LOAD)
    figures["name"] = figures["name"] or _text("sys/devices/soc0/machine")
    figures["board_power_w"], figures["power_rail"] = _board_power()
    return state, [figures]


def _load(*paths: str) -> int | None:
    """Return the percent of the first load file that tells; the files are per mille."""
    for path in paths:
        load = _number(path, 0, 1000)
        if load is not None:
            return round(load / 10)
    return None


def _temperature() -> int | None:
    """Return the °C of the first of ZONES; None where it cannot be read.

    A GPU that is gated off answers EAGAIN or −256 °C. No other zone's temperature is read:
    that can hang.
    """
    files = {(_text(path) or "").lower(): path for path in _find("thermal/thermal_zone*/type")}
    for zone in ZONES:
        if zone in files:
            millidegrees = _number(files[zone].replace("/type", "/temp"), -60_000, 200_000)
            return None if millidegrees is None else round(millidegrees / 1000)
    return None


def _board_power() -> tuple[float | None, str | None]:
    """Return the watts and the name of the first of RAILS that the board measures."""
    channels = {}
    for path in _find("hwmon/hwmon*/name"):
        chip, folder = _text(path), os.path.dirname(path)
        if chip == "ina3221":
            for number in (1, 2, 3):
                channels[_text(f"{folder}/in{number}_label")] = folder, number
        elif chip == "ina238":
            channels["VIN"] = folder, 1
    for rail in RAILS:
        if rail in channels:
            folder, number = channels[rail]
            millivolts = _number(f"{folder}/in{number}_input")
            milliamperes = _number(f"{folder}/curr{number}_input")
            if millivolts is None or milliamperes is None:
                break
            watts = round(millivolts * milliamperes / 1e6, 1)
            return (watts, rail) if 0 <= watts < 1000 else (None, None)
    return None, None


def _fill_memory(figures: dict[str, Any]) -> str | None:
    """Fill in the memory of a GPU that shares the system's; return the source of used."""
    text = _text("proc/meminfo") or ""
    system = {
        name: int(kb) // 1024 for name, kb in re.findall(r"^(\w+): +(\d+) kB$", text, re.MULTILINE)
    }
    figures["memory_total_mb"] = system.get("MemTotal")
    if "NvMapMemUsed" in system:
        figures["memory_used_mb"] = system["NvMapMemUsed"]
        return "nvmap"
    if figures["memory_used_mb"] is not None:
        return "nvml"
    if not {"MemTotal", "MemAvailable"} <= system.keys():
        return None
    figures["memory_used_mb"] = system["MemTotal"] - system["MemAvailable"]
    return "system"


# ------------------------------------------------------------ reading files


def _find(pattern: str) -> list[str]:
    """Return the names in sysfs's classes that fit; none where a folder is missing or closed."""
    return sorted(glob.glob(f"sys/class/{pattern}", root_dir=ROOT))


def _number(name: str, least: float = -math.inf, most: float = math.inf) -> int | None:
    """Return a file's whole number; None where it has none, or one that cannot be."""
    try:
        number = int(_text(name) or "")
    except ValueError:
        return None
    return number if least <= number <= most else None


def _text(name: str) -> str | None:
    """Return a file's text; None where it is missing, empty, unreadable or would block."""
    try:
        file = os.open(f"{ROOT}/{name}", os.O_RDONLY | os.O_NONBLOCK)
        try:
            return os.read(file, 65536).decode().strip() or None
        finally:
            os.close(file)
    except (OSError, UnicodeDecodeError):
        return None
