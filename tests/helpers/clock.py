"""A wall clock that runs as a test wants, for what bash asks of it: a real shared library."""

import shutil
import subprocess

import pytest

SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>
#include <time.h>

static double shown(void) {  /* seconds; only bash is shown another time */
    static double began;
    struct timespec real;
    int (*ask)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
    ask(CLOCK_REALTIME, &real);
    double now = real.tv_sec + real.tv_nsec / 1e9;
    if (strcmp(program_invocation_short_name, "bash")) return now;
    if (!began) began = now;
    return began + (now - began) * atof(getenv("CLOCK_SPEED"));
}
int gettimeofday(struct timeval *restrict at, void *restrict zone) {
    double now = shown();
    at->tv_sec = now; at->tv_usec = (now - at->tv_sec) * 1e6;
    return 0;
}
time_t time(time_t *at) {
    time_t now = shown();
    if (at) *at = now;
    return now;
}
"""


def clock_environment(folder, speed):
    """Return variables with which bash's time of day runs so many times as fast as time does."""
    if not shutil.which("cc"):
        pytest.skip("no C compiler to build the clock with")
    source, library = folder / "clock.c", folder / "clock.so"
    source.write_text(SOURCE)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return {"LD_PRELOAD": str(library), "CLOCK_SPEED": str(speed)}
