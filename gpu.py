"""The GPU through NVML; nothing else in this service knows of it.

Source: NVIDIA's NVML by the package nvidia-ml-py (import name pynvml). What raises what:

- no library on the machine: ``nvmlInit`` raises LibraryNotFound; a library without its driver:
  DriverNotLoaded
- driver updated under a running container: LibRmVersionMismatch; until the host reboots
- fallen off the bus: GpuIsLost or Unknown; Unknown also when the host's systemd reloaded its
  device rules under a container, which a restart of the container heals
- GB10: memory info is NotSupported (the memory is the system's), the rest works; Jetson Orin
  says little, older Jetsons have no NVML at all
- MIG: utilization NotSupported; in a container memory NoPermission
- a broken driver: the call never returns

Seen on an H200 (driver 580): device nodes closed to the user give NoPermission at ``nvmlInit``, and
nodes that are no devices neither that nor DriverNotLoaded (so: lost); memory info of version 1
counts 615 MB of the driver's own as used; a sample takes 0.03 ms, the first one 25 ms.
"""

import contextlib
import pathlib
import threading

import pynvml

TIMEOUT_S = 0.4
ACTIONS = {
    "ok": "none",
    "none": "none",
    "unified": "none",
    "lost": "restart_service",
    "driver_mismatch": "reboot_host",
    "no_permission": "restart_service",
    "unresponsive": "reboot_host",
}
MB = 1024 * 1024

_lock = threading.Lock()
_probe = None


class GpuError(Exception):
    """Root of this module's errors; `state` is one of ACTIONS."""

    def __init__(self, state):
        super().__init__(state)
        self.state = state


def sample(timeout_s=TIMEOUT_S):
    """Read every GPU once.

    Returns ``{"state": str, "gpus": [{"index", "name", "uuid", "utilization_percent",
    "memory_used_mb", "memory_total_mb", "temperature_c", "power_w"}]}``; None where the device
    does not say. Never raises. The NVML calls run in a thread of their own, one at a time, so
    that a call that does not return costs its caller `timeout_s` once, and one thread in all.
    """
    global _probe
    with _lock:
        if _probe is None or not _probe.is_alive():
            _probe = _Probe()
            _probe.start()
        probe = _probe
    if not probe.overdue:
        probe.join(timeout_s)
        probe.overdue = probe.is_alive()
    return probe.result


def memory_mb(reading):
    """Sum a reading's memory over its GPUs: `(used, total)`; (None, None) where no GPU says."""
    told = [g for g in reading["gpus"] if g["memory_total_mb"] is not None]
    if not told:
        return None, None
    return sum(g["memory_used_mb"] for g in told), sum(g["memory_total_mb"] for g in told)


class _Probe(threading.Thread):
    def __init__(self):
        super().__init__(name="nvml", daemon=True)
        self.overdue = False
        self.result = {"state": "unresponsive", "gpus": []}

    def run(self):
        try:
            self.result = _read_all()
        except GpuError as e:
            self.result = {"state": e.state, "gpus": []}


_initialised = False


def _read_all():
    global _initialised
    try:
        if not _initialised:
            pynvml.nvmlInit()
            _initialised = True
        gpus = [_read(index) for index in range(pynvml.nvmlDeviceGetCount())]
    except (pynvml.NVMLError, pynvml.NVMLLibraryMismatchError) as e:
        # A device that comes back is seen only by a fresh initialisation.
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()
        _initialised = False
        raise GpuError(_state(e)) from e
    states = [state for state, _ in gpus]
    return {"state": next((s for s in states if s != "ok"), "ok" if states else "none"),
            "gpus": [figures for _, figures in gpus]}


def _read(index):
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    state, memory = _memory(handle)
    utilization = _ask(pynvml.nvmlDeviceGetUtilizationRates, handle)
    power_mw = _ask(pynvml.nvmlDeviceGetPowerUsage, handle)
    return state, {
        "index": index,
        "name": _ask(pynvml.nvmlDeviceGetName, handle),
        "uuid": _ask(pynvml.nvmlDeviceGetUUID, handle),
        "utilization_percent": utilization and utilization.gpu,
        "memory_used_mb": memory and round(memory.used / MB),
        "memory_total_mb": memory and round(memory.total / MB),
        "temperature_c": _ask(pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU),
        "power_w": None if power_mw is None else round(power_mw / 1000, 1),
    }


def _memory(handle):
    """Ask by version 2, which leaves the driver's reserve out as nvidia-smi does; older drivers know one version."""
    try:
        try:
            return "ok", pynvml.nvmlDeviceGetMemoryInfo(handle, pynvml.nvmlMemory_v2)
        except (pynvml.NVMLError_FunctionNotFound, pynvml.NVMLError_ArgumentVersionMismatch):
            return "ok", pynvml.nvmlDeviceGetMemoryInfo(handle)
    except pynvml.NVMLError_NotSupported:
        return "unified", None
    except pynvml.NVMLError_NoPermission:
        return "no_permission", None


def _ask(call, *args):
    """Call NVML; None where this device does not offer the figure."""
    try:
        return call(*args)
    except (pynvml.NVMLError_NotSupported, pynvml.NVMLError_NoPermission,
            pynvml.NVMLError_FunctionNotFound):
        return None


def _state(error):
    if isinstance(error, (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded)):
        return "unified" if _is_tegra() else "none"
    if isinstance(error, (pynvml.NVMLError_LibRmVersionMismatch, pynvml.NVMLLibraryMismatchError)):
        return "driver_mismatch"
    if isinstance(error, pynvml.NVMLError_NoPermission):
        return "no_permission"
    return "lost"


def _is_tegra():
    """Tell a Jetson, whose older releases have no NVML, by its device tree."""
    try:
        return "nvidia,tegra" in pathlib.Path("/proc/device-tree/compatible").read_text()
    except (OSError, UnicodeDecodeError):
        return False
