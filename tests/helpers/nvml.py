"""A stand-in for NVIDIA's library, where there is no GPU that could show these states.

It is a real shared library: what it answers stands in a file, which it reads anew at each call.
"""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

from helpers.places import ROOT

NVML = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static long say(const char *what, long otherwise) {
    char word[64]; long value, found = otherwise;
    FILE *file = fopen(getenv("NVML_ANSWERS"), "r");
    while (file && fscanf(file, "%63s %ld", word, &value) == 2)
        if (!strcmp(word, what)) found = value;
    if (file) fclose(file);
    return found;
}
static int code(const char *call) {
    while (say(call, 0) == -1) usleep(10000);  /* until the file says otherwise */
    return say(call, 0);
}
int nvmlInitWithFlags(unsigned flags) { return code("init"); }
int nvmlShutdown(void) { return code("shutdown"); }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = say("gpus", 1); return code("count"); }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
    *handle = (void *)(long)(index + 1); return code("handle");
}
int nvmlDeviceGetName(void *handle, char *name, unsigned size) {
    strcpy(name, "Stand-in"); return code("name");
}
int nvmlDeviceGetUUID(void *handle, char *uuid, unsigned size) {
    sprintf(uuid, "GPU-%ld", (long)handle - 1); return code("uuid");
}
int nvmlDeviceGetTemperature(void *handle, int sensor, unsigned *celsius) {
    *celsius = say("celsius", 54); return code("temperature");
}
int nvmlDeviceGetPowerUsage(void *handle, unsigned *mw) { *mw = 70250; return code("power"); }
int nvmlDeviceGetUtilizationRates(void *handle, unsigned *rates) {
    rates[0] = say("percent", 37); rates[1] = 0; return code("utilization");
}
int nvmlDeviceGetMemoryInfo(void *handle, unsigned long long *memory) {
    memory[0] = 65536ull << 20; memory[2] = (say("used", 5120) + 615ull) << 20;
    return code("memory_v1");
}
#ifndef OLD
int nvmlDeviceGetMemoryInfo_v2(void *handle, void *info) {
    unsigned long long *memory = (unsigned long long *)info + 1;  /* after the version */
    memory[0] = 65536ull << 20; memory[1] = 615ull << 20;
    memory[3] = (unsigned long long)say("used", 5120) << 20;
    return code("memory");
}
#endif
"""
SAMPLER = """
import json, sys, threading, time
import gpu
for line in sys.stdin:
    began = time.monotonic()
    reading = gpu.sample()
    print(json.dumps([reading, time.monotonic() - began, threading.active_count()]), flush=True)
"""
NOT_SUPPORTED, NO_PERMISSION, DRIVER_NOT_LOADED, LIBRARY_NOT_FOUND = 3, 4, 9, 12
FUNCTION_NOT_FOUND, GPU_IS_LOST, RM_VERSION_MISMATCH, VERSION_MISMATCH, UNKNOWN = (
    13,
    15,
    18,
    25,
    999,
)
HANG = -1


class Nvml:
    """The library in a folder of its own, and a process that samples it on demand.

    .env            by which a process finds it
    .say(**answers) what it answers from now on: say(count=HANG, used=5120)
    """

    def __init__(self, folder, *flags):
        self.answers, source = folder / "answers", folder / "nvml.c"
        source.write_text(NVML)
        subprocess.run(
            ["cc", "-shared", "-fPIC", "-w", *flags, "-o", folder / "libnvidia-ml.so.1", source],
            check=True,
        )
        self.env = {"LD_LIBRARY_PATH": str(folder), "NVML_ANSWERS": str(self.answers)}
        self.say()
        self._sampler = subprocess.Popen(
            [sys.executable, "-c", SAMPLER],
            cwd=ROOT,
            env={**os.environ, **self.env},
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def say(self, **answers):
        new = self.answers.with_suffix(".new")
        new.write_text("".join(f"{name} {value}\n" for name, value in answers.items()))
        new.rename(self.answers)

    def sample(self, **answers):
        self.say(**answers)
        return self.sample_again()

    def sample_again(self):
        print("sample", file=self._sampler.stdin, flush=True)
        reading, seconds, threads = json.loads(self._sampler.stdout.readline())
        return SimpleNamespace(**reading, seconds=seconds, threads=threads)

    def close(self):
        self._sampler.kill()
        self._sampler.communicate()
