"""A stand-in for the module pynvml, and a gpu.py of one's own that uses it.

The stand-in keeps the real module's exceptions and constants, and is as strict as the library: a
call before nvmlInit or with a handle from before the last nvmlInit is refused, a second nvmlInit
without a shutdown is an error of the test, and after an error of the whole library (lost, driver
mismatch) every call fails until it was shut down and initialised again. A call that it does not
know fails the test rather than reach a real library.
"""

import contextlib
import dataclasses
import functools
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pynvml

GPU_PY = Path(__file__).resolve().parents[2] / "gpu.py"
MB = 1024 * 1024
RESERVE_MB = 615  # the driver's own, which memory info of version 1 counts as used
NOT_SUPPORTED = pynvml.NVML_ERROR_NOT_SUPPORTED
NO_PERMISSION = pynvml.NVML_ERROR_NO_PERMISSION
DRIVER_NOT_LOADED = pynvml.NVML_ERROR_DRIVER_NOT_LOADED
LIBRARY_NOT_FOUND = pynvml.NVML_ERROR_LIBRARY_NOT_FOUND
FUNCTION_NOT_FOUND = pynvml.NVML_ERROR_FUNCTION_NOT_FOUND
GPU_IS_LOST = pynvml.NVML_ERROR_GPU_IS_LOST
RM_VERSION_MISMATCH = pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH
VERSION_MISMATCH = pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH
UNKNOWN = pynvml.NVML_ERROR_UNKNOWN
LASTING = {GPU_IS_LOST, RM_VERSION_MISMATCH, UNKNOWN}  # until the library is initialised again
CALLS = (
    "nvmlInit",
    "nvmlDeviceGetCount",
    "nvmlDeviceGetHandleByIndex",
    "nvmlDeviceGetName",
    "nvmlDeviceGetUUID",
    "nvmlDeviceGetUtilizationRates",
    "nvmlDeviceGetTemperature",
    "nvmlDeviceGetPowerUsage",
    "nvmlDeviceGetMemoryInfo",
)


@dataclasses.dataclass
class Gpu:
    """What one GPU answers; processes are pairs of pid and MB (None: not available)."""

    name: str = "Stand-in"
    uuid: str = "GPU-0"
    percent: int = 37
    celsius: int = 54
    milliwatts: int = 70_250
    used_mb: int = 5120
    total_mb: int = 65_536
    computing: list = dataclasses.field(default_factory=list)
    drawing: list = dataclasses.field(default_factory=list)


class FakeNvml:
    """`gpus` answer; `errors` (a call's name to a code) fail; `hung` names calls that wait."""

    def __init__(self, *gpus):
        self.gpus = list(gpus)
        self.errors: dict[str, int] = {}
        self.hung: set[str] = set()
        self.calls: list[str] = []
        self._go_on = threading.Condition()
        self._handles: list[object] = []
        self._initialised = False
        self._lasting = None

    def __getattr__(self, name):
        if name.startswith("nvml") and callable(getattr(pynvml, name)):
            raise AssertionError(f"{name} has no stand-in")
        return getattr(pynvml, name)

    def answer(self, *hung, **errors):
        """From now on these calls hang, and those fail; no other does."""
        with self._go_on:
            self.hung, self.errors = set(hung), errors
            self._go_on.notify_all()

    def _enter(self, call):
        self.calls.append(call)
        with self._go_on:
            self._go_on.wait_for(lambda: call not in self.hung, timeout=30)
        if call not in ("nvmlInit", "nvmlShutdown"):
            if not self._initialised:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_UNINITIALIZED)
            if self._lasting:
                raise pynvml.NVMLError(self._lasting)
        code = self.errors.get(call)
        if code in LASTING:
            self._lasting = code
        if code:
            raise pynvml.NVMLError(code)

    def _device(self, call, handle):
        self._enter(call)
        if handle not in self._handles:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return self.gpus[self._handles.index(handle)]

    def nvmlInit(self):
        self._enter("nvmlInit")
        assert not self._initialised, "initialised twice"
        self._initialised, self._lasting = True, None
        self._handles = [object() for _ in self.gpus]

    def nvmlShutdown(self):
        was_initialised, self._initialised = self._initialised, False
        self._enter("nvmlShutdown")
        if not was_initialised:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_UNINITIALIZED)

    def nvmlDeviceGetCount(self):
        self._enter("nvmlDeviceGetCount")
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index):
        self._enter("nvmlDeviceGetHandleByIndex")
        return self._handles[index]

    def nvmlDeviceGetName(self, handle):
        return self._device("nvmlDeviceGetName", handle).name

    def nvmlDeviceGetUUID(self, handle):
        return self._device("nvmlDeviceGetUUID", handle).uuid

    def nvmlDeviceGetUtilizationRates(self, handle):
        percent = self._device("nvmlDeviceGetUtilizationRates", handle).percent
        return SimpleNamespace(gpu=percent, memory=0)

    def nvmlDeviceGetTemperature(self, handle, sensor):
        celsius = self._device("nvmlDeviceGetTemperature", handle).celsius
        assert sensor == pynvml.NVML_TEMPERATURE_GPU
        return celsius

    def nvmlDeviceGetPowerUsage(self, handle):
        return self._device("nvmlDeviceGetPowerUsage", handle).milliwatts

    def nvmlDeviceGetMemoryInfo(self, handle, version=None):
        """Errors of "nvmlDeviceGetMemoryInfo" are of both versions, of "v2" of the newer one."""
        gpu = self._device("nvmlDeviceGetMemoryInfo", handle)
        if version is None:
            return SimpleNamespace(total=gpu.total_mb * MB, used=(gpu.used_mb + RESERVE_MB) * MB)
        assert version == pynvml.nvmlMemory_v2
        if "v2" in self.errors:
            raise pynvml.NVMLError(self.errors["v2"])
        reserved = RESERVE_MB * MB
        return SimpleNamespace(total=gpu.total_mb * MB, reserved=reserved, used=gpu.used_mb * MB)

    def nvmlDeviceGetComputeRunningProcesses_v3(self, handle):
        return listed(self._device("nvmlDeviceGetComputeRunningProcesses", handle).computing)

    def nvmlDeviceGetGraphicsRunningProcesses_v3(self, handle):
        return listed(self._device("nvmlDeviceGetGraphicsRunningProcesses", handle).drawing)

    def nvmlDeviceGetComputeRunningProcesses(self, handle):
        with mismatch_raised():
            return self.nvmlDeviceGetComputeRunningProcesses_v3(handle)

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle):
        with mismatch_raised():
            return self.nvmlDeviceGetGraphicsRunningProcesses_v3(handle)


def listed(processes):
    return [
        SimpleNamespace(pid=pid, usedGpuMemory=None if mb is None else mb * MB)
        for pid, mb in processes
    ]


@contextlib.contextmanager
def mismatch_raised():
    """As the real module's calls without a version do where the library is older."""
    try:
        yield
    except pynvml.NVMLError_FunctionNotFound as error:
        raise pynvml.NVMLLibraryMismatchError("unversioned function called") from error


@functools.cache
def code():
    return compile(GPU_PY.read_text(), GPU_PY, "exec")


def load_gpu(root, nvml=None) -> ModuleType:
    """Return a gpu.py of one's own, which has seen nothing yet, with its files below `root`."""
    module = ModuleType("gpu_of_this_test")
    sys.modules[module.__name__] = module  # dataclasses look there
    exec(code(), vars(module))
    module.ROOT = root
    if nvml:
        module.pynvml = nvml
    return module
