"""gpu.py where GPU and system share the memory, on file trees as public sources describe them.

Five machines: Jetson Orin on JetPack 5, 6 and 7.2, Jetson Thor on JetPack 7, and DGX Spark (GB10),
each as a container sees it, with the answers of its NVML. None of it was seen on a board.
"""

import dataclasses
import os
import tempfile
import threading
import time
from pathlib import Path

import pytest

from helpers.fake_nvml import (
    CALLS,
    DRIVER_NOT_LOADED,
    FUNCTION_NOT_FOUND,
    GPU_IS_LOST,
    LIBRARY_NOT_FOUND,
    NO_PERMISSION,
    NOT_SUPPORTED,
    RM_VERSION_MISMATCH,
    UNKNOWN,
    FakeNvml,
    Gpu,
    load_gpu,
)
from helpers.waiting import wait_for

# ------------------------------------------------------------ five machines

SOC = "sys/devices/soc0"
LOAD, OLD_LOAD = "sys/devices/platform/gpu.0/load", "sys/devices/gpu.0/load"
THOR_LOAD = "sys/class/devfreq/gpu-gpc-0/load"
RELEASE = "etc/nv_tegra_release"
MEMORY = "proc/meminfo"
UUID = "54d0709b-558d-5a59-9c65-0c5fc14a21a4"
ALL_BUT_NAMES = (
    *CALLS[5:],
    "nvmlDeviceGetComputeRunningProcesses",
    "nvmlDeviceGetGraphicsRunningProcesses",
)
NOTHING = dict.fromkeys((*CALLS[3:5], *ALL_BUT_NAMES), NOT_SUPPORTED)
HUGE_MB = (2**64 - 2) // 1024**2  # a process as Orin's NVML may list them


def meminfo(total, available, nvmap=None):
    """Return /proc/meminfo; figures in kB."""
    lines = f"""MemTotal:       {total} kB
MemFree:          412345 kB
MemAvailable:   {available} kB
Active(anon):     123456 kB
HugePages_Total:       0
"""
    return (
        lines
        if nvmap is None
        else f"{lines}NvMapMemFree:          0 kB\nNvMapMemUsed: {nvmap} kB\n"
    )


def zones(**celsius):
    """Return thermal zones of these types, "_" for "-", and temperatures in m°C."""
    files = {}
    for number, (kind, value) in enumerate(celsius.items()):
        folder = f"sys/class/thermal/thermal_zone{number}"
        files |= {f"{folder}/type": kind.replace("_", "-"), f"{folder}/temp": str(value)}
    return files


def ina3221(number, **channels):
    """Return a power monitor with these rails' mV and mA; it sums its shunts in channel 7."""
    folder = f"sys/class/hwmon/hwmon{number}"
    files = {f"{folder}/name": "ina3221", f"{folder}/in7_label": "sum of shunt voltages"}
    for channel, (rail, (millivolts, milliamperes)) in enumerate(channels.items(), start=1):
        files[f"{folder}/in{channel}_label"] = rail
        files[f"{folder}/in{channel}_input"] = str(millivolts)
        files[f"{folder}/curr{channel}_input"] = str(milliamperes)
    return files


@dataclasses.dataclass
class Machine:
    """Files by path below the root, what NVML is and fails with, and the reading of them."""

    files: dict
    gpu: Gpu
    errors: dict
    figures: dict
    source: str


FAN = {"sys/class/hwmon/hwmon0/name": "pwmfan", "sys/class/hwmon/hwmon0/in1_label": "VDD_IN"}
ORIN_5 = Machine(  # AGX Orin 64 GB
    files={
        f"{SOC}/family": "Tegra",
        f"{SOC}/machine": "Jetson AGX Orin",
        OLD_LOAD: "345",
        **zones(CPU_therm=50_000, GPU_therm=51_500, Tboard_tegra=42_000, tj_therm=52_000),
        **FAN,
        **ina3221(3, VDD_GPU_SOC=(19_120, 420), VDD_CPU_CV=(19_100, 90), VIN_SYS_5V0=(5040, 900)),
        **ina3221(4, NC=(0, 0), VDDQ_VDD2_1V8AO=(5000, 100)),
        MEMORY: meminfo(64_319_488, 50_331_648, nvmap=5_242_880),
    },
    gpu=Gpu(),
    errors={"nvmlInit": LIBRARY_NOT_FOUND},
    figures={
        "index": 0,
        "name": "Jetson AGX Orin",
        "uuid": None,
        "utilization_percent": 34,
        "memory_used_mb": 5120,
        "memory_total_mb": 62_812,
        "temperature_c": 52,
        "power_w": None,
        "board_power_w": 8.0,
        "power_rail": "VDD_GPU_SOC",
    },
    source="nvmap",
)
ORIN_6 = Machine(  # Orin Nano 8 GB; NVML answers zeros, and lists processes that there are not
    files={
        f"{SOC}/family": "Tegra",
        f"{SOC}/machine": "NVIDIA Jetson Orin Nano Developer Kit",
        LOAD: "872",
        **zones(cpu_thermal=49_000, gpu_thermal=53_406, soc0_thermal=48_000, tj_thermal=55_000),
        **FAN,
        **ina3221(1, VDD_IN=(5056, 2480), VDD_CPU_GPU_CV=(5056, 960), VDD_SOC=(5056, 520)),
        MEMORY: meminfo(7_802_880, 3_145_728, nvmap=2_097_152),
    },
    gpu=Gpu("Orin (nvgpu)", UUID, 0, 0, 0, 0, 0, computing=[(0, 0), (2**32 - 1, HUGE_MB)]),
    errors={},
    figures={
        "index": 0,
        "name": "Orin (nvgpu)",
        "uuid": UUID,
        "utilization_percent": 87,
        "memory_used_mb": 2048,
        "memory_total_mb": 7620,
        "temperature_c": 53,
        "power_w": None,
        "board_power_w": 12.5,
        "power_rail": "VDD_IN",
    },
    source="nvmap",
)
ORIN_7 = Machine(  # Orin NX 16 GB; its NVML supports nothing
    files={
        f"{SOC}/family": "Tegra",
        f"{SOC}/machine": "NVIDIA Jetson Orin NX Engineering Reference Developer Kit",
        RELEASE: "# R39 (release), REVISION: 2.0",
        LOAD: "0",
        **zones(tj_thermal=47_000, cpu_thermal=46_000, gpu_thermal=45_125),
        **FAN,
        **ina3221(2, VDD_IN=(19_200, 310), VDD_CPU_GPU_CV=(19_200, 60), VDD_SOC=(19_200, 90)),
        MEMORY: meminfo(15_990_784, 12_582_912, nvmap=0),
    },
    gpu=Gpu(),
    errors=NOTHING,
    figures={
        "index": 0,
        "name": "NVIDIA Jetson Orin NX Engineering Reference Developer Kit",
        "uuid": None,
        "utilization_percent": 0,
        "memory_used_mb": 0,
        "memory_total_mb": 15_616,
        "temperature_c": 45,
        "power_w": None,
        "board_power_w": 6.0,
        "power_rail": "VDD_IN",
    },
    source="nvmap",
)
THOR = Machine(
    files={
        f"{SOC}/family": "Tegra",
        f"{SOC}/machine": "NVIDIA Jetson AGX Thor Developer Kit",
        RELEASE: "# R38 (release), REVISION: 4.0",
        THOR_LOAD: "111",
        **zones(tj_thermal=59_000, soc012_thermal=57_000, gpu_thermal=58_400),
        **FAN,
        **ina3221(1, VDD_GPU=(5000, 6480), VDD_CPU_SOC_MSS=(5000, 1300), VIN_SYS_5V0=(5000, 1300)),
        "sys/class/hwmon/hwmon2/name": "ina238",
        "sys/class/hwmon/hwmon2/in0_input": "3",
        "sys/class/hwmon/hwmon2/in1_input": "19800",
        "sys/class/hwmon/hwmon2/curr1_input": "2690",
        MEMORY: meminfo(128_808_960, 100_663_296),
    },
    gpu=Gpu("NVIDIA Thor", UUID, percent=62, computing=[(4711, 25_700)], drawing=[(900, 61)]),
    errors={
        "nvmlDeviceGetMemoryInfo": NOT_SUPPORTED,
        "nvmlDeviceGetTemperature": NOT_SUPPORTED,
        "nvmlDeviceGetPowerUsage": NOT_SUPPORTED,
    },
    figures={
        "index": 0,
        "name": "NVIDIA Thor",
        "uuid": UUID,
        "utilization_percent": 62,
        "memory_used_mb": 25_761,
        "memory_total_mb": 125_790,
        "temperature_c": 58,
        "power_w": None,
        "board_power_w": 53.3,
        "power_rail": "VIN",
    },
    source="nvml",
)
GB10 = Machine(
    files={
        f"{SOC}/family": "jep106:0426",
        f"{SOC}/machine": "NVIDIA DGX Spark",
        **zones(acpitz=61_000),
        **FAN,
        MEMORY: meminfo(127_600_748, 118_566_368),
    },
    gpu=Gpu("NVIDIA GB10", "GPU-2dee1e25", 96, 68, 38_040, computing=[(4711, 25_000), (4712, 700)]),
    errors={"nvmlDeviceGetMemoryInfo": NOT_SUPPORTED},
    figures={
        "index": 0,
        "name": "NVIDIA GB10",
        "uuid": "GPU-2dee1e25",
        "utilization_percent": 96,
        "memory_used_mb": 25_700,
        "memory_total_mb": 124_610,
        "temperature_c": 68,
        "power_w": 38.0,
        "board_power_w": None,
        "power_rail": None,
    },
    source="nvml",
)
MACHINES = {"orin-5": ORIN_5, "orin-6": ORIN_6, "orin-7": ORIN_7, "thor": THOR, "gb10": GB10}
JETSONS = [name for name in MACHINES if name != "gb10"]


class Running:
    """A machine whose files and NVML a test may change between two samples."""

    def __init__(self, machine, root):
        self.files, self.figures, self.source = machine.files, machine.figures, machine.source
        self.root = root
        self.nvml = FakeNvml(dataclasses.replace(machine.gpu))
        self.nvml.answer(**machine.errors)
        self.errors = machine.errors
        self.gpu = load_gpu(root, self.nvml)
        self.sample = self.gpu.sample
        self.restore()

    def write(self, path, text):
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")

    def restore(self, within=""):
        """Write a file, or all files of a folder, as they were."""
        for path, text in self.files.items():
            if path.startswith(within):
                self.write(path, text)

    def remove(self, path):
        (self.root / path).unlink()

    def expect(self, source=..., state="unified", **changed):
        """The next reading is this machine's but for what changed."""
        reading = self.sample()
        assert reading == {
            "state": state,
            "memory_shared": True,
            "memory_source": self.source if source is ... else source,
            "gpus": [self.figures | changed],
        }
        return reading


@pytest.fixture
def start():
    running = []
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None  # many small files
    with tempfile.TemporaryDirectory(dir=memory) as root:

        def start(name):
            running.append(Running(MACHINES[name], Path(root)))
            return running[-1]

        yield start
        for one in running:
            one.nvml.answer()  # lets a call go that still hangs


@pytest.fixture(params=MACHINES)
def machine(request, start):
    return start(request.param)


@pytest.fixture(params=JETSONS)
def jetson(request, start):
    return start(request.param)


@pytest.fixture
def thor(start):
    return start("thor")


@pytest.fixture
def orin(start):
    return start("orin-6")


# ------------------------------------------------------------ what each of them says


def test_every_figure_is_told_time_and_again(machine):
    for _ in range(3):
        reading = machine.expect()
    used, total = machine.figures["memory_used_mb"], machine.figures["memory_total_mb"]
    assert machine.gpu.memory_totals(reading) == (used, total)
    measured_by = "nvml" if machine.source == "nvml" else "system"
    assert machine.gpu.memory_in_use(reading) == (measured_by, used)
    assert machine.gpu.ACTIONS[reading["state"]] == "none"


def test_no_temperature_but_the_wanted_one_is_read(machine, monkeypatch):
    opened, real = [], os.open
    monkeypatch.setattr(
        os, "open", lambda path, *rest: opened.append(str(path)) or real(path, *rest)
    )
    machine.expect()
    temperatures = [path for path in opened if path.endswith("/temp")]
    assert len(temperatures) == (0 if machine.figures["name"] == "NVIDIA GB10" else 1)


# ------------------------------------------------------------ a file that does not tell

POWER = {"board_power_w": None, "power_rail": None}
UNTOLD = {"source": None, "memory_used_mb": None, "memory_total_mb": None}
ZONE, MONITOR = "sys/class/thermal/thermal_zone{}", "sys/class/hwmon/hwmon{}"
FILES = [  # machine, file, what changes in the reading when it does not tell
    ("orin-5", f"{SOC}/family", {}),
    ("orin-5", f"{SOC}/machine", {"name": None}),
    ("orin-5", OLD_LOAD, {"utilization_percent": None}),
    ("orin-5", ZONE.format(0) + "/type", {}),
    ("orin-5", ZONE.format(0) + "/temp", {}),
    ("orin-5", ZONE.format(1) + "/type", {"temperature_c": None}),
    ("orin-5", ZONE.format(1) + "/temp", {"temperature_c": None}),
    ("orin-5", MONITOR.format(3) + "/name", POWER),
    ("orin-5", MONITOR.format(3) + "/in1_label", POWER),
    ("orin-5", MONITOR.format(3) + "/in1_input", POWER),
    ("orin-5", MONITOR.format(3) + "/curr1_input", POWER),
    ("orin-5", MONITOR.format(4) + "/name", {}),
    ("orin-5", MEMORY, UNTOLD),
    ("orin-6", f"{SOC}/family", {}),
    ("orin-6", f"{SOC}/machine", {}),
    ("orin-6", LOAD, {"utilization_percent": None}),
    ("orin-6", ZONE.format(1) + "/type", {"temperature_c": 55}),
    ("orin-6", ZONE.format(1) + "/temp", {"temperature_c": None}),
    ("orin-6", ZONE.format(3) + "/temp", {}),
    ("orin-6", MONITOR.format(1) + "/name", POWER),
    (
        "orin-6",
        MONITOR.format(1) + "/in1_label",
        {"board_power_w": 4.9, "power_rail": "VDD_CPU_GPU_CV"},
    ),
    ("orin-6", MONITOR.format(1) + "/in1_input", POWER),
    ("orin-6", MONITOR.format(1) + "/curr1_input", POWER),
    ("orin-6", MEMORY, UNTOLD),
    ("orin-7", f"{SOC}/family", {}),
    ("orin-7", f"{SOC}/machine", {"name": None}),
    ("orin-7", RELEASE, {}),
    ("orin-7", LOAD, {"utilization_percent": None}),
    ("orin-7", ZONE.format(2) + "/type", {"temperature_c": 47}),
    ("orin-7", ZONE.format(2) + "/temp", {"temperature_c": None}),
    ("orin-7", MONITOR.format(2) + "/name", POWER),
    ("orin-7", MONITOR.format(2) + "/curr1_input", POWER),
    ("orin-7", MEMORY, UNTOLD),
    ("thor", f"{SOC}/family", {}),
    ("thor", f"{SOC}/machine", {}),
    ("thor", THOR_LOAD, {}),
    ("thor", ZONE.format(2) + "/type", {"temperature_c": 59}),
    ("thor", ZONE.format(2) + "/temp", {"temperature_c": None}),
    ("thor", MONITOR.format(1) + "/name", {}),
    ("thor", MONITOR.format(2) + "/name", {"board_power_w": 32.4, "power_rail": "VDD_GPU"}),
    ("thor", MONITOR.format(2) + "/in1_input", POWER),
    ("thor", MONITOR.format(2) + "/curr1_input", POWER),
    ("thor", MEMORY, {"memory_total_mb": None}),
    ("gb10", f"{SOC}/family", {}),
    ("gb10", ZONE.format(0) + "/type", {}),
    ("gb10", MEMORY, {"memory_total_mb": None}),
]


def missing(file):
    file.unlink()


def empty(file):
    file.write_text("")


def unreadable(file):
    file.unlink()
    file.mkdir()  # read: EISDIR


def closed(file):
    file.unlink()
    file.symlink_to(file)  # open: ELOOP, also for root


def nonsense(file):
    file.write_bytes(b"\xff\x00 n/a -- 12 monkeys\n")


def pipe(file):
    file.unlink()
    os.mkfifo(file)  # an ordinary open would wait for a writer


def busy(file):
    pipe(file)
    return os.open(file, os.O_RDWR)  # a writer that writes nothing: read gives EAGAIN


@pytest.mark.parametrize(("name", "path", "changed"), FILES)
def test_a_file_that_does_not_tell_costs_its_own_figure_and_passes(start, name, path, changed):
    machine = start(name)
    file = machine.root / path
    for fault in (missing, empty, unreadable, closed, nonsense, pipe, busy):
        kept = fault(file)
        machine.expect(**changed)
        if kept:
            os.close(kept)
        if file.is_dir():
            file.rmdir()
        elif fault is not nonsense:
            file.unlink(missing_ok=True)
        machine.restore(path)
        machine.expect()


def test_whole_folders_may_be_missing_and_come(machine):
    """A Jetson is still told by its soc0."""
    folders = {os.path.dirname(path) for path in machine.files} - {SOC}
    for folder in folders | {"sys/class/thermal", "sys/class/hwmon", "sys/class"}:
        (machine.root / folder).rename(machine.root / "away")
        reading = machine.sample()
        assert (reading["state"], len(reading["gpus"])) == ("unified", 1)
        (machine.root / "away").rename(machine.root / folder)
        machine.expect()


@pytest.mark.parametrize(
    "text", ["-256000", "-60001", "200001", "999999999999", "51.5", "nan", "0x10"]
)
def test_a_temperature_that_cannot_be_is_none(jetson, text):
    for path in jetson.files:
        if path.endswith("/temp"):
            jetson.write(path, text)
    jetson.expect(temperature_c=None)


@pytest.mark.parametrize(("text", "celsius"), [("0", 0), ("-5000", -5), ("104900", 105)])
def test_a_temperature_that_can_be_is_told(jetson, text, celsius):
    for path in jetson.files:
        if path.endswith("/temp"):
            jetson.write(path, text)
    jetson.expect(temperature_c=celsius)


@pytest.mark.parametrize(("text", "percent"), [("0", 0), ("4", 0), ("999", 100), ("1000", 100)])
def test_load_is_per_mille(orin, text, percent):
    orin.write(LOAD, text)
    orin.expect(utilization_percent=percent)


@pytest.mark.parametrize("text", ["1001", "-1", "4294967295", "87.2"])
def test_a_load_that_cannot_be_is_none_and_nvml_s_zero_is_no_load(orin, text):
    orin.write(LOAD, text)
    orin.expect(utilization_percent=None)


def test_the_newer_load_file_comes_first_and_the_older_stands_in(orin):
    orin.write(OLD_LOAD, "120")
    orin.expect()
    orin.remove(LOAD)
    orin.expect(utilization_percent=12)


@pytest.mark.parametrize("text", ["-80", "99999999999"])
def test_a_power_that_cannot_be_is_none(orin, text):
    orin.write("sys/class/hwmon/hwmon1/curr1_input", text)
    orin.expect(**POWER)


@pytest.mark.parametrize(
    ("rails", "shown"),
    [
        (("VDD_CPU_GPU_CV", "VDD_SOC", "VDD_IN"), "VDD_IN"),
        (("VDD_GPU_SOC", "VDD_CPU_CV", "VDD_IN"), "VDD_IN"),
        (("VDD_CPU_GPU_CV", "VDD_GPU_SOC", "VIN_SYS_5V0"), "VDD_GPU_SOC"),
        (("VDD_CPU_GPU_CV", "VDD_SOC"), "VDD_CPU_GPU_CV"),
        (("VDD_SOC", "VIN_SYS_5V0"), None),
    ],
)
def test_the_whole_board_s_rail_comes_first_then_the_gpu_s_nearest(orin, rails, shown):
    for number, rail in enumerate(rails, start=1):
        orin.write(f"sys/class/hwmon/hwmon1/in{number}_label", rail)
    for number in range(len(rails) + 1, 4):
        orin.remove(f"sys/class/hwmon/hwmon1/in{number}_label")
    assert orin.sample()["gpus"][0]["power_rail"] == shown


def test_no_power_is_a_figure(orin):
    orin.write("sys/class/hwmon/hwmon1/curr1_input", "0")
    orin.expect(board_power_w=0)


@pytest.mark.parametrize(
    ("memory", "source", "used", "total"),
    [
        (meminfo(8_000_000, 6_000_000), "system", 7812 - 5859, 7812),
        ("MemTotal: 8000000 kB", None, None, 7812),
        ("MemAvailable: 6000000 kB", None, None, None),
        ("MemTotal: 8000000 kB\nNvMapMemUsed: 1048576 kB", "nvmap", 1024, 7812),
        ("NvMapMemUsed: 1048576 kB", "nvmap", 1024, None),
        ("MemTotal: 8000000 kB\nNvMapMemUsed: lots kB", None, None, 7812),
        ("MemTotal: 8000000\nMemAvailable: -6 kB", None, None, None),
    ],
)
def test_orin_s_memory_is_what_the_system_says_of_it(orin, memory, source, used, total):
    orin.write(MEMORY, memory)
    reading = orin.expect(source, memory_used_mb=used, memory_total_mb=total)
    both = None not in (used, total)
    assert orin.gpu.memory_totals(reading) == ((used, total) if both else (None, None))
    in_use = used if source == "nvmap" else None  # the whole system's figure measures no model
    assert orin.gpu.memory_in_use(reading) == ("system", in_use)


# ------------------------------------------------------------ telling a Jetson


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (f"{SOC}/family", "Tegra"),
        (f"{SOC}/family", "Tegra210"),
        (RELEASE, "# R35 (release), REVISION: 4.1"),
        (RELEASE, ""),
        (LOAD, "0"),
        (OLD_LOAD, "0"),
        (OLD_LOAD, ""),
    ],
)
def test_one_sign_is_enough(start, path, text):
    machine = start("orin-5")
    for name in (f"{SOC}/family", OLD_LOAD, MEMORY):
        machine.remove(name)
    assert machine.sample()["state"] == "none"
    machine.write(path, text)
    reading = machine.sample()
    assert (reading["state"], reading["memory_shared"]) == ("unified", True)


@pytest.mark.parametrize("family", ["jep106:0426", "Freescale i.MX", "", "Not Tegra"])
def test_other_machines_are_none(start, family):
    machine = start("orin-5")
    machine.remove(OLD_LOAD)
    machine.write(f"{SOC}/family", family)
    machine.write("proc/device-tree/compatible", "nvidia,tegra234")  # masked in a container
    nothing = {"state": "none", "memory_shared": False, "memory_source": None, "gpus": []}
    assert machine.sample() == nothing


def test_a_gpu_with_memory_of_its_own_is_untouched_by_such_files(start):
    machine = start("gb10")
    machine.nvml.answer()
    for path, text in THOR.files.items():
        if path not in (f"{SOC}/family", RELEASE):
            machine.write(path, text)
    reading = machine.sample()
    assert (reading["state"], reading["memory_shared"]) == ("ok", False)
    figures = {"memory_used_mb": 5120, "memory_total_mb": 65_536}
    assert reading["gpus"] == [machine.figures | figures]


def test_nodes_that_appear_late_and_go_away_are_followed(jetson):
    late = [path for path in jetson.files if "soc0" not in path]
    for path in late:
        jetson.remove(path)
    jetson.nvml.answer(nvmlInit=DRIVER_NOT_LOADED, nvmlDeviceGetCount=DRIVER_NOT_LOADED)
    figures = dict.fromkeys(jetson.figures) | {"index": 0, "name": jetson.files[f"{SOC}/machine"]}
    for _ in range(2):
        reading = jetson.sample()
        assert (reading["state"], reading["gpus"]) == ("unified", [figures])
        assert jetson.gpu.memory_in_use(reading) == ("system", None)
        for path in late:
            jetson.write(path, jetson.files[path])
        jetson.nvml.answer(**jetson.errors)
        jetson.expect()
        for path in late:
            jetson.remove(path)
        jetson.nvml.answer(nvmlInit=DRIVER_NOT_LOADED, nvmlDeviceGetCount=DRIVER_NOT_LOADED)
        jetson.sample()


# ------------------------------------------------------------ files and NVML together


@pytest.mark.parametrize("name", ["Orin (nvgpu)", None])
@pytest.mark.parametrize("path", [LOAD, MEMORY, "sys/class/thermal/thermal_zone1/temp"])
def test_orin_s_zeros_by_nvml_are_never_shown(orin, name, path):
    if name is None:
        orin.nvml.answer(nvmlDeviceGetName=NOT_SUPPORTED)
    orin.remove(path)
    figures = orin.sample()["gpus"][0]
    assert figures["utilization_percent"] in (87, None)
    assert figures["temperature_c"] in (53, None)
    assert figures["memory_used_mb"] in (2048, None)
    assert figures["memory_total_mb"] in (7620, None)
    assert figures["power_w"] is None


def test_orin_s_zeros_are_not_shown_where_no_file_tells_a_jetson(orin):
    for path in orin.files:
        if path != MEMORY:
            orin.remove(path)
    untold = {"utilization_percent": None, "temperature_c": None, **POWER}
    orin.expect(**untold)


@pytest.mark.parametrize("first", [0, 1])
def test_a_gpu_with_memory_of_its_own_beside_one_that_shares_the_system_s(start, first):
    machine = start("gb10")
    machine.nvml.answer()
    machine.nvml.gpus[0] = Gpu("NVIDIA GB10", total_mb=0)
    machine.nvml.gpus.insert(first, Gpu())
    reading = machine.sample()
    assert (reading["state"], reading["memory_source"]) == ("unified", "system")
    assert machine.gpu.memory_in_use(reading) == ("system", None)


def test_a_library_that_reports_no_memory_at_all_shares_the_system_s(start):
    machine = start("gb10")
    machine.nvml.answer()
    machine.nvml.gpus[0].total_mb = machine.nvml.gpus[0].used_mb = 0
    machine.expect()


@pytest.mark.parametrize(
    "code", [LIBRARY_NOT_FOUND, NOT_SUPPORTED, UNKNOWN, GPU_IS_LOST, NO_PERMISSION]
)
@pytest.mark.parametrize("call", CALLS[:3])
def test_orin_s_library_is_not_believed_against_its_load_file(orin, call, code):
    orin.nvml.answer(**{call: code})
    machine = orin.files[f"{SOC}/machine"]
    orin.expect(name=machine, uuid=None)
    orin.nvml.answer()
    orin.expect()


@pytest.mark.parametrize(
    ("code", "state"),
    [
        (LIBRARY_NOT_FOUND, "unified"),
        (DRIVER_NOT_LOADED, "unified"),
        (NOT_SUPPORTED, "unified"),
        (RM_VERSION_MISMATCH, "driver_mismatch"),
        (GPU_IS_LOST, "lost"),
        (UNKNOWN, "lost"),
        (NO_PERMISSION, "no_permission"),
    ],
)
def test_thor_s_error_is_its_state_beside_what_the_files_say(thor, code, state):
    thor.nvml.answer(nvmlDeviceGetCount=code)
    reading = thor.expect(
        "system",
        state,
        name="NVIDIA Jetson AGX Thor Developer Kit",
        uuid=None,
        utilization_percent=11,
        memory_used_mb=125_790 - 98_304,
    )
    assert thor.gpu.memory_in_use(reading) == ("system", None)


def test_thor_s_nvml_fills_what_the_files_leave_out(thor):
    thor.nvml.answer()
    thor.expect(power_w=70.2)  # the file's temperature comes first, and the processes' memory
    thor.remove("sys/class/thermal/thermal_zone2/temp")
    thor.expect(power_w=70.2, temperature_c=54)
    thor.nvml.answer(**thor.errors, nvmlDeviceGetUtilizationRates=NOT_SUPPORTED)
    thor.expect(temperature_c=None, utilization_percent=11)


@pytest.mark.parametrize("name", ["thor", "gb10"])
@pytest.mark.parametrize(
    ("computing", "drawing", "used"),
    [
        ([(1, 4000), (2, 300)], [(3, 20)], 4320),
        ([(1, 4000)], [(1, 4000), (2, 20)], 4020),  # one that computes and draws
        ([], [(2, 20)], 20),
        ([(1, 0)], [], 0),
        ([(1, 4000), (2, None)], [], None),
        ([(1, 4000)], [(2, None)], None),
        ([], [], None),  # none has been listed yet: some containers list none
    ],
)
def test_shared_memory_in_use_is_the_sum_of_the_gpu_s_processes(
    start, name, computing, drawing, used
):
    machine = start(name)
    machine.nvml.gpus[0].computing, machine.nvml.gpus[0].drawing = computing, drawing
    reading = machine.sample()
    if used is None:
        assert reading["memory_source"] == "system"
        assert reading["gpus"][0]["memory_used_mb"] > 4320
        assert machine.gpu.memory_in_use(reading) == ("system", None)
    else:
        machine.expect(memory_used_mb=used)
        assert machine.gpu.memory_in_use(reading) == ("nvml", used)


@pytest.mark.parametrize("name", ["thor", "gb10"])
def test_an_empty_list_of_processes_is_zero_once_one_has_been_listed(start, name):
    machine = start(name)
    device = machine.nvml.gpus[0]
    before = machine.gpu.memory_in_use(machine.sample())
    device.computing = device.drawing = []
    after = machine.gpu.memory_in_use(machine.expect(memory_used_mb=0))
    assert (before, after) == (("nvml", machine.figures["memory_used_mb"]), ("nvml", 0))


@pytest.mark.parametrize("name", ["thor", "gb10"])
@pytest.mark.parametrize("code", [NOT_SUPPORTED, NO_PERMISSION, FUNCTION_NOT_FOUND])
def test_without_a_list_of_processes_the_memory_is_the_system_s(start, name, code):
    machine = start(name)
    machine.nvml.answer(**machine.errors, nvmlDeviceGetComputeRunningProcesses=code)
    used = {"thor": 125_790 - 98_304, "gb10": 124_610 - 115_787}[name]
    reading = machine.expect("system", memory_used_mb=used)
    assert machine.gpu.memory_in_use(reading) == ("system", None)
    assert machine.gpu.memory_totals(reading) == (used, machine.figures["memory_total_mb"])
    machine.nvml.answer(**machine.errors, nvmlDeviceGetGraphicsRunningProcesses=code)
    computing = sum(mb for _, mb in machine.nvml.gpus[0].computing)
    machine.expect(memory_used_mb=computing)


# ------------------------------------------------------------ what does not return


def readers():
    """Return the threads that read a GPU: other tests may have left others."""
    return {thread for thread in threading.enumerate() if thread.name == "gpu"}


def test_a_read_that_does_not_return_costs_its_time_once_and_passes(jetson, monkeypatch):
    real, go_on = os.read, threading.Event()

    def read(file, size):
        if os.readlink(f"/proc/self/fd/{file}").endswith("/temp"):
            go_on.wait(120)
        return real(file, size)

    monkeypatch.setattr(os, "read", read)
    before = readers()
    first = jetson.sample(0.05)
    assert first == {
        "state": "slow",
        "memory_shared": True,
        "memory_source": None,
        "gpus": [],
    }
    began = time.monotonic()
    for _ in range(20):
        assert jetson.sample(20) == first
        assert len(readers() - before) == 1
    assert time.monotonic() - began < 20  # no one has waited
    go_on.set()
    wait_for(lambda: jetson.sample()["state"] != "slow", 30, "the file is read")
    jetson.expect()


@pytest.mark.parametrize("name", ["orin-6", "thor", "gb10"])
def test_a_call_of_nvml_that_does_not_return_leaves_known_what_the_memory_is(start, name):
    machine = start(name)
    if name == "gb10":
        machine.expect()  # only NVML tells it from a machine with memory of its own
    machine.nvml.answer("nvmlDeviceGetCount", **machine.errors)
    for _ in range(2):
        reading = machine.sample(0.05)
        assert (reading["state"], reading["memory_shared"]) == ("slow", True)
    machine.nvml.answer(**machine.errors)
    wait_for(lambda: machine.sample()["state"] != "slow", 30, "NVML answers")
    machine.expect()
