"""start.sh against bad settings, taken addresses, signals, and the death of each of its processes.

Where Ollama itself does not matter, a script of that name stands in for it.
"""

import contextlib
import importlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import app
from helpers.answers import reset, stats
from helpers.clock import clock_environment
from helpers.places import CACHE, ROOT
from helpers.ports import free_port
from helpers.processes import ticks
from helpers.waiting import call, wait_for

BOOT = (
    CACHE.joinpath("/proc/sys/kernel/random/boot_id").read_text().strip()
    + " "
    + os.readlink("/proc/self/ns/pid")
)


def run_start(*arguments, **env):
    """start.sh, run to its end; None removes a variable."""
    env = {**os.environ, "LLM_VENV": sys.prefix, "LLM_API_PORT": str(free_port()), **env}
    env = {name: value for name, value in env.items() if value is not None}
    return subprocess.run(
        ["./start.sh", *arguments],
        cwd=ROOT,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


def assert_one_line(ended, *words):
    assert ended.returncode == 1 and ended.stdout == ""
    assert len(ended.stderr.splitlines()) == 1 and ended.stderr.startswith("llm-service: "), (
        ended.stderr
    )
    for word in words:
        assert word in ended.stderr


@pytest.fixture
def stand_in(make_service, tmp_path):
    """A factory of services whose `ollama` is a shell script; `sleep` is its usual end."""

    def start(script, **kw):
        program = tmp_path / "ollama"
        program.write_text(f"#!/bin/bash\n{script}\n")
        program.chmod(0o755)
        return make_service(wait=False, PATH=f"{tmp_path}:{os.environ['PATH']}", **kw)

    return start


def api_pid(service):
    """gunicorn's master."""
    return wait_for(lambda: psutil.Process(service.worker_pid()).ppid(), 60, "gunicorn's processes")


def readers(service):
    """What reads Ollama's output: start.sh's children that are neither the API nor Ollama."""
    known = {line[0] for line in service.state_lines()} | {api_pid(service)}
    return [
        child for child in psutil.Process(service.process.pid).children() if child.pid not in known
    ]


def both(reading):
    """Return them once no program is among them that the launcher runs for a moment."""
    return reading if len(reading) == 2 else None


def tell_launcher(service, pid):
    """Write to its pipe, as the API does before it ends a server."""
    Path(f"/proc/{api_pid(service)}/fd/8").write_text(f"{pid}\n")


def gone(process):
    """Dead; not every init is quick to reap."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    return True


def line_of(service, words, timeout=60):
    return wait_for(
        lambda: next((line for line in service.log().splitlines() if words in line), None),
        timeout,
        f"a line with {words!r} in the log",
    )


# Settings and addresses


@pytest.mark.parametrize(
    "name, value",
    [
        ("LLM_CONTEXT_LENGTH", "many"),
        ("LLM_API_PORT", "../../x"),
        ("OLLAMA_HOST", "http://[bad"),
        ("LLAMA_ARG_N_GPU_LAYERS", "abc"),
    ],
)
def test_a_setting_that_makes_no_sense_stops_the_start_with_one_line(name, value):
    assert_one_line(run_start(**{name: value}), f"{name} is {value!r}; it takes ")


def test_a_port_that_kubernetes_sets_for_a_service_is_named_with_its_cause():
    ended = run_start(LLM_API_PORT="tcp://10.96.0.7:11435")
    assert_one_line(ended, "LLM_API_PORT is 'tcp://10.96.0.7:11435'; it takes a port")
    assert "enableServiceLinks: false" in ended.stderr


@pytest.fixture
def reloaded(monkeypatch):
    """Change the environment and reload app.py; afterwards both are as before."""
    yield monkeypatch
    monkeypatch.undo()
    importlib.reload(app)


@pytest.mark.parametrize(
    "name, bad, good",
    [
        ("LLM_CONTEXT_LENGTH", ["0", "-1", "8k", "1e4"], ["1", "131072"]),
        ("OLLAMA_CONTEXT_LENGTH", ["8k"], ["4096", "4096\r", "'4096'"]),
        ("LLM_GPU_LAYERS", ["-2", "most", "1.5", "ALL"], ["0", "33", "auto", "all", "-1"]),
        ("LLM_STUCK_SECONDS", ["0", "soon"], ["120"]),
        ("LLM_SELF_HEAL", ["perhaps", "1"], ["on", "off"]),
        ("LLM_PRELOAD", ["true", "ON"], ["on", "off"]),
        ("LLM_LONG_ANSWER_S", ["0", "1h", "-5"], ["1", "7200"]),
        ("LLAMA_ARG_N_GPU_LAYERS", ["abc", "-2", "3x"], ["0", "33", "-1", "all", "auto"]),
        ("LLAMA_ARG_FIT", ["abc", "yes"], ["on", "off", "1", "0", "true", "disabled"]),
        ("LLAMA_ARG_FIT_TARGET", ["abc", "1024,", "1 GiB"], ["1024", "512,1024"]),
        ("LLAMA_ARG_FLASH_ATTN", ["abc"], ["auto", "on", "off"]),
        ("LLAMA_ARG_THREADS", ["abc", "1.5", "two"], ["4", "-1"]),
        ("LLAMA_ARG_FIT_CTX", ["abc"], ["4096"]),
        ("LLM_API_HOST", ["a b", "http://x"], ["0.0.0.0", "::1", "box.lan"]),
        ("LLM_API_PORT", ["0", "65536", "http", "99999"], ["1", "65535"]),
        ("LLM_MAX_PULLS", ["0", "many"], ["4"]),
        (
            "LLM_MODEL",
            ["../etc/passwd", "/", "a b"],
            ["llama3.1:8b", "hf.co/org/repo:Q4_K_M", "h:1/n/m:t"],
        ),
        ("LLM_ALLOWED_HOSTS", ["http://dashboard", "a,,b"], ["a", "a.lan, [::1]"]),
        ("LLM_ALLOWED_ORIGINS", ["dashboard", "*"], ["https://a.lan:3000, http://[::1]"]),
        ("LLM_API_TOKEN", ["two words", "\x7f"], ["s3cret!"]),
        ("OLLAMA_HOST", ["http://[bad"], ["0.0.0.0", "'[::1]:1'\r", "https://x"]),
    ],
)
def test_what_each_setting_takes(reloaded, name, bad, good):
    for value in ["", *good]:
        reloaded.setenv(name, value)
        importlib.reload(app)
    for value in bad:
        reloaded.setenv(name, value)
        with pytest.raises(SystemExit, match=f"{name} is .*; it takes "):
            importlib.reload(app)


def test_what_ollama_reads_too_is_trimmed_as_it_does(make_service, tmp_path):
    """Files of settings that were written on Windows, or with quotes."""
    models = tmp_path / "models"
    port = free_port()
    service = make_service(
        OLLAMA_MODELS=f'"{models}"\r',
        OLLAMA_HOST=f" '127.0.0.1:{port} '\r\n",
        OLLAMA_CONTEXT_LENGTH="2048\r",
        OLLAMA_NOPRUNE="''",
    )
    info = service.get("/api/info").json()
    assert (info["models_path"], info["context_length"]) == (str(models), 2048)
    assert info["ollama_url"] == f"http://127.0.0.1:{port}"
    disk = wait_for(lambda: stats(service)["disk"], 30, "the disk")  # None before the first look
    assert disk["path"] == str(models)
    config = re.compile(r'msg="server config" env="map\[(.*)\]"')  # passed on a moment later
    said = wait_for(lambda: config.search(service.log()), 30, "what Ollama says of it")[1]
    for told in (f"OLLAMA_MODELS:{models} ", "OLLAMA_CONTEXT_LENGTH:2048 ", "OLLAMA_NOPRUNE:true"):
        assert told in said


def test_a_token_that_makes_no_sense_is_not_shown():
    ended = run_start(LLM_API_TOKEN="two words")
    assert_one_line(ended, "LLM_API_TOKEN is (not shown); it takes ")
    assert "two" not in ended.stderr


@pytest.mark.parametrize("host", ["nowhere.invalid", "192.0.2.1"])
def test_an_address_that_cannot_be_listened_on_stops_the_start_with_one_line(host):
    assert_one_line(run_start(LLM_API_HOST=host), f"LLM_API_HOST={host}")


@pytest.mark.parametrize("host", ["*:11434", "http://.x"])
def test_an_ollama_host_that_cannot_be_listened_on_does_so_too(host):
    assert_one_line(run_start(OLLAMA_HOST=host), f"OLLAMA_HOST={host}")


@pytest.mark.parametrize("taken_by", ["LLM_API_PORT", "OLLAMA_HOST"])
def test_an_address_that_is_taken_stops_the_start_and_names_who_has_it(taken_by):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        address = (
            {"LLM_API_PORT": port}
            if taken_by == "LLM_API_PORT"
            else {"OLLAMA_HOST": f"127.0.0.1:{port}"}
        )
        ended = run_start(**address)
    assert_one_line(ended, f"{taken_by}={address[taken_by]}", f"process {os.getpid()}")


def test_both_at_one_address_stop_the_start():
    port = str(free_port())
    assert_one_line(
        run_start(LLM_API_PORT=port, OLLAMA_HOST=f"127.0.0.1:{port}"),
        f"OLLAMA_HOST=127.0.0.1:{port}",
    )


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_an_ollama_that_is_there_stops_the_start_and_is_left_alone(ollama_server, host):
    ollama = ollama_server()
    ended = run_start(OLLAMA_HOST=f"{host}:{ollama.port}")
    assert_one_line(
        ended,
        f"OLLAMA_HOST={host}:{ollama.port}",
        f"ollama, process {ollama.pid}",
        "systemctl stop ollama",
        "OLLAMA_MODELS",
    )
    assert call("GET", ollama.url + "/api/version").ok


@pytest.mark.parametrize(
    "name, advice", [("HOME", f"chown -R {os.geteuid()}"), ("XDG_CACHE_HOME", "set XDG_CACHE_HOME")]
)
def test_a_folder_that_cannot_be_written_to_stops_the_start_with_one_line(name, advice, tmp_path):
    folders = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path), name: "/proc/none"}
    assert_one_line(run_start(**folders), "cannot write to /proc/none/", name, advice)


def test_an_unknown_argument_is_refused():
    ended = run_start("--fast")
    assert ended.returncode == 1 and "--fast" in ended.stderr


def test_a_second_start_on_the_same_port_is_refused(make_service):
    service = make_service()
    assert_one_line(
        run_start(LLM_API_PORT=str(service.port)), "another start.sh", str(service.port)
    )
    assert service.get("/health").status_code == 200


def test_a_second_start_says_what_the_first_one_installs(make_service, tmp_path):
    folders = os.environ["PATH"].split(":")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        service = make_service(
            wait=False,
            XDG_CACHE_HOME=str(tmp_path),
            PATH=":".join(one for one in folders if not os.path.exists(f"{one}/ollama")),
            OLLAMA_RELEASES=f"http://127.0.0.1:{silent.getsockname()[1]}",
        )
        step = "installing, step 1 of 3"
        line_of(service, step)
        second = run_start(LLM_API_PORT=str(service.port), XDG_CACHE_HOME=str(tmp_path))
        assert_one_line(second, str(service.port), step)


@pytest.mark.parametrize(
    "given, context, layers",
    [
        ({}, "8192", "33"),
        ({"LLM_CONTEXT_LENGTH": "1536", "LLM_GPU_LAYERS": "7"}, "1536", "7"),
        (
            {
                "LLM_CONTEXT_LENGTH": "1536",
                "OLLAMA_CONTEXT_LENGTH": "1024",
                "LLM_GPU_LAYERS": "auto",
            },
            "1024",
            "none",
        ),
        ({"LLM_GPU_LAYERS": "-1"}, "8192", "all"),
        ({"LLM_GPU_LAYERS": "all"}, "8192", "all"),
        ({"LLM_GPU_LAYERS": "-1", "LLAMA_ARG_N_GPU_LAYERS": "5"}, "8192", "5"),
    ],
)
def test_ollamas_environment_follows_the_settings(stand_in, given, context, layers):
    script = """layers=${LLAMA_ARG_N_GPU_LAYERS:-none} token=${LLM_API_TOKEN:-none}
                echo "got $OLLAMA_CONTEXT_LENGTH $layers $OLLAMA_NOPRUNE $token"
                exec sleep 60"""
    service = stand_in(script, LLM_API_TOKEN="secret", **given)
    assert line_of(service, "got ") == f"got {context} {layers} 1 none"


# Install


def test_a_set_up_machine_is_not_set_up_again():
    ended = run_start("--setup", "tests/requirements.txt", LLM_VENV=None)
    python, ollama = ended.stdout.splitlines()
    assert ended.returncode == 0 and ended.stderr == ""
    assert os.access(python, os.X_OK) and os.access(ollama, os.X_OK)


def test_a_signal_ends_an_installation_at_once(make_service, tmp_path):
    python = tmp_path / "python3"  # takes for ever to make a virtual environment
    python.write_text('#!/bin/sh\n[ "$1" = -c ] || exec sleep 60\n')
    python.chmod(0o755)
    service = make_service(
        wait=False,
        LLM_VENV=None,
        XDG_CACHE_HOME=str(tmp_path),
        PATH=f"{tmp_path}:{os.environ['PATH']}",
    )
    line_of(service, "installing Python packages")
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(5) == 0
    wait_for(lambda: not service.processes(), 30, "the end of the installation")
    assert not list(tmp_path.glob("llm-service/venv-*/.complete"))


# Signals


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_it_ends_within_10_s_with_status_0_and_leaves_no_process(make_service, gguf, sig):
    service = make_service(models={"gemma": gguf})
    service.generate("gemma")
    began = time.monotonic()
    assert service.stop(sig) == 0
    assert time.monotonic() - began < 10


def traps(pid, sig):
    """Tell whether a process handles a signal yet."""
    mask = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())[1]
    return int(mask, 16) >> (sig - 1) & 1


@pytest.mark.parametrize("after_s", [0, 0.1, 0.2, 0.3, 0.4, 0.6])
def test_stopped_while_it_starts_it_ends_with_status_0(make_service, after_s):
    service = make_service(wait=False)
    wait_for(lambda: traps(service.process.pid, signal.SIGTERM), 30, "bash's trap")
    time.sleep(after_s)
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(20) == 0
    assert not list(service.state_file.parent.glob(f"{service.port}.state*"))


def test_it_ends_within_10_s_though_ollama_hangs(make_service):
    service = make_service()
    os.kill(service.ollama_pid(), signal.SIGSTOP)
    began = time.monotonic()
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(15) == 0
    assert time.monotonic() - began < 10
    wait_for(lambda: not service.processes(), 30, "the end of all processes")


def test_it_ends_within_10_s_though_the_api_hangs(make_service):
    service = make_service()
    for pid in api_pid(service), service.worker_pid():
        os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(15) == 0
    assert time.monotonic() - began < 10
    wait_for(lambda: not service.processes(), 30, "the end of all processes")


# The death of each process


def test_a_killed_launcher_leaves_nothing_that_disturbs_the_next_start(make_service, gguf):
    first = make_service(models={"gemma": gguf})
    first.load("gemma")
    first.process.kill()
    first.process.wait()
    wait_for(lambda: not first.processes(), 60, "the end of all that the killed launcher started")
    second = make_service(LLM_API_PORT=first.port, OLLAMA_HOST=f"127.0.0.1:{first.ollama_port}")
    assert second.get("/health").json()["status"] == "healthy"


def test_what_hangs_when_the_launcher_is_killed_is_ended_by_the_next_start(make_service, gguf):
    first = make_service(models={"gemma": gguf})
    hung = [
        psutil.Process(pid) for pid in (first.ollama_pid(), first.load("gemma").pid, api_pid(first))
    ]
    for process in hung:
        process.suspend()
    first.process.kill()
    first.process.wait()
    assert not any(map(gone, hung))
    second = make_service(LLM_API_PORT=first.port, OLLAMA_HOST=f"127.0.0.1:{first.ollama_port}")
    assert all(map(gone, hung))
    assert second.get("/health").json()["status"] == "healthy"


def test_gunicorns_death_ends_all_with_its_status(make_service):
    service = make_service()
    os.kill(api_pid(service), signal.SIGKILL)
    assert service.process.wait(60) == 128 + signal.SIGKILL
    wait_for(lambda: not service.processes(), 30, "the end of all processes")
    assert "the API ended with status 137" in service.log()


def test_ollamas_death_leaves_no_orphan_and_another_one_starts(make_service, gguf):
    service = make_service(models={"gemma": gguf})
    runner, server = service.load("gemma"), service.ollama_pid()
    os.kill(server, signal.SIGKILL)
    wait_for(lambda: service.ollama_pid() != server, 60, "the next Ollama")
    assert gone(runner)
    service.wait_healthy(60)
    assert (
        "Ollama ended with status 137" in service.log()
        and "starting it again in 0.5 s" in service.log()
    )
    assert [line[2] for line in service.state_lines()] == [0, 1]


@pytest.mark.parametrize("number", [0, 1])
def test_the_death_of_a_reader_of_ollamas_output_is_healed(make_service, gguf, number):
    service = make_service(models={"gemma": gguf})
    reader, server = readers(service)[number], service.ollama_pid()
    reader.kill()

    def another():  # Ollama ends with the next line that it prints
        with contextlib.suppress(Exception):
            service.ollama("GET", "/api/nothing")
            service.ollama("POST", "/api/generate", json={"model": "gemma"})
        return service.ollama_pid() != server

    wait_for(another, 60, "the next Ollama")
    service.wait_healthy(60)
    assert service.stop() == 0


def test_five_deaths_of_ollama_within_a_minute_end_the_service_and_the_reason_is_named(stand_in):
    service = stand_in(
        "echo 'time=1 level=INFO msg=starting' >&2; "
        "echo 'Error: mkdir /x: permission denied' >&2; exit 3"
    )
    assert service.process.wait(90) == 1
    said = [line for line in service.log().splitlines() if "Ollama ended" in line]
    reason = "status 3: Error: mkdir /x: permission denied"
    pauses = [
        f"llm-service: Ollama ended with {reason}; starting it again in {pause} s"
        for pause in ("0.5", "1", "2", "4")
    ]
    assert said == [*pauses, f"llm-service: Ollama ended five times in a minute, with {reason}"]
    assert (
        service.log().count("Error: mkdir /x: permission denied\n") == 5 + 1
    )  # passed on, each of them
    wait_for(lambda: not service.processes(), 30, "the end of all processes")


@pytest.mark.parametrize(
    "script, reason",
    [
        ("echo 'Error: no' >&2; exit 1", "Error: no"),
        ("echo 'loading shared libraries' >&2; exit 127", "loading shared libraries"),
        ("echo 'panic: no' >&2; echo 'goroutine 1' >&2; exit 2", "panic: no"),
        ("echo 'panic: a runner' >&2; echo 'time=1 level=INFO msg=on' >&2; exit 2", ""),
        ("echo 'time=1 level=ERROR msg=no' >&2; exit 1", "time=1 level=ERROR msg=no"),
        ("printf '%0500d\\n' 0 >&2; exit 1", "0" * 300),
        ("exit 1", ""),
    ],
)
def test_the_reason_of_ollamas_end_is_kept_for_health(stand_in, script, reason):
    service = stand_in(f"[[ -e $HOME/again ]] && exec sleep 60; touch $HOME/again; {script}")
    wait_for(lambda: len(service.state_lines()) == 2, 60, "the second start")
    assert (
        service.state_file.with_name(f"{service.state_file.name}.reason").read_text()
        == f"{reason}\n"
    )
    assert re.search(
        rf"Ollama ended with status \d+: {reason or 'no reason given'}; ", service.log()
    )


def test_what_is_recorded_is_bounded(stand_in):
    service = stand_in("echo x >&2; exec sleep 600")
    folder = service.state_file.parent
    for _ in range(14):  # ended on purpose, else it would give up
        pid = wait_for(lambda: service.state_lines() and service.ollama_pid(), 60, "an Ollama")
        tell_launcher(service, pid)
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda pid=pid: service.ollama_pid() != pid, 60, "the next one")
    assert len(service.state_lines()) == 10
    files = [file for file in folder.glob(f"{service.port}.*") if file.suffix != ".spare"]
    assert sum(file.stat().st_size for file in files) < 2000


def test_an_end_on_purpose_is_no_death_and_has_no_pause(stand_in):
    service = stand_in("exec sleep 60")
    for _ in range(7):  # five deaths in a minute would end the service
        pid = wait_for(lambda: service.state_lines() and service.ollama_pid(), 60, "an Ollama")
        tell_launcher(service, pid)
        os.kill(pid, signal.SIGTERM)
        wait_for(lambda pid=pid: service.ollama_pid() != pid, 60, "the next one")
    assert service.log().count("the API ended Ollama; starting it again") == 7
    assert "again in" not in service.log()
    os.kill(service.ollama_pid(), signal.SIGKILL)
    line_of(service, "Ollama ended with status 137: no reason given; starting it again in 0.5 s")


def counted(folder, program):
    """Put a program on the PATH that notes each of its calls; return the notes' path."""
    notes, stand_in = folder / f"{program}.calls", folder / program
    notes.touch()
    stand_in.write_text(f'#!/bin/sh\necho "$*" >>{notes}\nexec {shutil.which(program)} "$@"\n')
    stand_in.chmod(0o755)
    return notes


def end_and_wait(service):
    """End Ollama as the API does; return once the next one is recorded."""
    pid = service.ollama_pid()
    tell_launcher(service, pid)
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: service.ollama_pid() != pid, 60, "the next one")


def test_the_sessions_of_all_earlier_ollamas_are_ended_by_one_program(stand_in, tmp_path):
    """Where others have the CPU, each program that is begun takes its time."""
    calls = counted(tmp_path, "pkill")
    service = stand_in("exec sleep 60")
    for _ in range(4):
        end_and_wait(service)
    assert len(service.state_lines()) == 5
    before = len(calls.read_text().splitlines())
    end_and_wait(service)
    assert len(calls.read_text().splitlines()) == before + 1


def test_the_next_ollama_does_not_wait_for_who_reads_the_ended_ones_output(stand_in, tmp_path):
    """As where a process that cannot be ended yet holds the pipe."""
    sleeps = counted(tmp_path, "sleep")
    service = stand_in(f"exec {shutil.which('sleep')} 60")
    wait_for(service.state_lines, 60, "an Ollama")
    reading = wait_for(lambda: both(readers(service)), 60, "who reads both outputs alone")
    for reader in reading:
        reader.suspend()
    before = sleeps.read_text()
    end_and_wait(service)
    assert not any(map(gone, reading))
    assert sleeps.read_text() == before


# The clock


def test_a_clock_that_leaps_ahead_hides_no_death(stand_in, tmp_path):
    service = stand_in("exit 3", **clock_environment(tmp_path, 1000))
    assert service.process.wait(90) == 1
    assert "Ollama ended five times in a minute" in service.log()


def test_it_ends_within_10_s_though_the_clock_runs_backwards(stand_in, tmp_path):
    service = stand_in("exec sleep 60", **clock_environment(tmp_path, -1))
    wait_for(lambda: service.get("/livez").ok and service.state_lines(), 60, "the start")
    for pid in api_pid(service), service.worker_pid():
        os.kill(pid, signal.SIGSTOP)
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(15) == 0
    wait_for(lambda: not service.processes(), 30, "the end of all processes")


# A full disk, and what does not end


def test_a_cleaned_folder_hides_no_ollama_from_the_api(make_service, tmp_path):
    service = make_service(XDG_CACHE_HOME=tmp_path, OLLAMA_MODELS=tmp_path / "models")
    service.state_file = tmp_path / "llm-service" / "run" / service.state_file.name
    server = service.ollama_pid()
    shutil.rmtree(tmp_path / "llm-service")
    os.kill(server, signal.SIGKILL)
    wait_for(lambda: service.ollama_pid() != server, 60, "the record of the next Ollama")
    service.wait_healthy(60)
    assert service.get("/api/stats").json()["ollama"]["pid"] == service.ollama_pid()


def test_a_full_disk_hides_no_ollama_from_the_api(make_service, small_disk, tmp_path):
    models = tmp_path / "models"
    service = make_service(wait=False, XDG_CACHE_HOME=str(small_disk), OLLAMA_MODELS=models)
    service.state_file = small_disk / "llm-service" / "run" / service.state_file.name
    service.wait_healthy(60)
    with open(small_disk / "filled", "wb", buffering=0) as file, pytest.raises(OSError):
        while True:
            file.write(bytes(1 << 16))
    with open(small_disk / "filled", "ab", buffering=0) as file, pytest.raises(OSError):
        while True:
            file.write(b"0")
    server = service.ollama_pid()
    os.kill(server, signal.SIGKILL)
    wait_for(lambda: service.ollama_pid() != server, 60, "the record of the next Ollama")
    service.wait_healthy(60)
    reset(service, restart=True)
    line_of(service, "the API ended Ollama; starting it again")
    service.wait_healthy(60)
    assert service.get("/api/stats").json()["ollama"]["pid"] == service.ollama_pid()


def test_what_outlives_its_ollama_is_ended_as_soon_as_that_can_be(stand_in, tmp_path):
    file, marker = tmp_path / "orphan", tmp_path / "ends"
    program = tmp_path / "pkill"  # whose signal ends nothing before the marker is there
    program.write_text(
        f'#!/bin/sh\n[ -e {marker} ] || {{ shift; exec pgrep "$@" >/dev/null; }}\n'
        f'exec {shutil.which("pkill")} "$@"\n'
    )
    program.chmod(0o755)
    service = stand_in(f"[[ -e {file} ]] || {{ sleep 300 & echo $! >{file}; }}; exec sleep 60")
    orphan = psutil.Process(int(wait_for(lambda: file.exists() and file.read_text(), 60, "it")))
    server = wait_for(lambda: service.state_lines() and service.ollama_pid(), 60, "its record")
    os.kill(server, signal.SIGKILL)
    line_of(service, f"processes of Ollama do not end yet (sessions {server})")
    wait_for(lambda: service.ollama_pid() != server, 60, "the next Ollama")
    assert not gone(orphan)
    marker.touch()
    wait_for(lambda: gone(orphan), 60, "its end")
    assert not gone(psutil.Process(service.ollama_pid()))


# What blinds the watch


def test_what_would_blind_the_watch_does_not_reach_a_runner(make_service, gguf):
    service = make_service(
        models={"gemma": gguf},
        LLAMA_API_KEY="secret",
        LLAMA_ARG_ENDPOINT_SLOTS="0",
        LLAMA_ARG_API_PREFIX="/hidden",
        LLAMA_ARG_FIT="",
        LLAMA_ARG_FIT_TARGET="",
        LLAMA_ARG_N_GPU_LAYERS="",
    )
    service.generate("gemma")

    def watched():
        (runner,) = service.get("/api/stats").json()["runners"] or [None]
        return runner and runner["state"] == "busy" and runner["tokens"]

    wait_for(watched, 60, "a busy runner whose tokens are counted")
    kept = [line for line in service.log().splitlines() if "kept from Ollama" in line]
    assert len(kept) == 1 and "secret" not in service.log()
    assert "LLAMA_API_KEY, LLAMA_ARG_API_PREFIX, LLAMA_ARG_ENDPOINT_SLOTS" in kept[0]


# What it may end


@pytest.fixture
def record():
    """Records processes for a port, as a killed launcher leaves them; returns the port."""
    port = free_port()
    folder = CACHE / "run"

    def write(*lines, boot=BOOT):
        folder.mkdir(parents=True, exist_ok=True)
        folder.joinpath(f"{port}.lock").write_text(f"{boot}\n")
        folder.joinpath(f"{port}.state").write_text(
            "".join(f"{pid} {started} 0\n" for pid, started in lines)
        )
        return port

    yield write
    for file in folder.glob(f"{port}.*"):
        file.unlink()


@contextlib.contextmanager
def session(script):
    """A session of its own: its leader runs the script and ends with it."""
    leader = subprocess.Popen(["setsid", "bash", "-c", script], stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(leader.stdout.readline()))
    try:
        yield leader, child
    finally:
        leader.kill()
        with contextlib.suppress(psutil.Error):
            child.kill()
        leader.wait()


def start_and_fail(port):
    """A start that ends its predecessor's leftovers, and then at a bad setting."""
    assert_one_line(run_start(LLM_API_PORT=str(port), LLM_MODEL="/"), "LLM_MODEL")


def test_a_recorded_session_is_ended_though_its_leader_is_dead(record):
    with session("sleep 60 >&2 & echo $!") as (leader, orphan):
        leader.wait()
        start_and_fail(record((leader.pid, 1)))
        assert gone(orphan)


def test_a_number_that_has_passed_to_a_stranger_is_left_alone(record):
    with session("echo $$; exec sleep 60 >&2") as (leader, _):
        started = ticks(leader.pid)
        start_and_fail(record((leader.pid, started - 1)))
        assert leader.poll() is None
        start_and_fail(record((leader.pid, started)))
        assert leader.wait(30) == -signal.SIGKILL


def test_numbers_of_another_boot_or_container_are_left_alone(record):
    with session("echo $$; exec sleep 60 >&2") as (leader, _):
        start_and_fail(record((leader.pid, ticks(leader.pid)), boot="another"))
        assert leader.poll() is None


# Ollama's output


def test_access_lines_of_the_apis_own_questions_stay_out_of_the_log(make_service):
    service = make_service()
    for path in "/api/ps", "/api/version", "/api/tags", "/api/nothing":
        service.ollama("GET", path)
    service.ollama("POST", "/api/show", json={"model": "nothing"})
    line_of(service, '"/api/show"')
    seen = re.findall(r'^\[GIN\].*\| (\d+) \|.* (\w+) +"(.*)"', service.log(), re.M)
    assert seen == [("404", "GET", "/api/nothing"), ("404", "POST", "/api/show")]


def test_access_lines_that_tell_something_are_passed_on(stand_in):
    def access(status, address, method, path):
        line = f'{status} |       5.549µs | {address:>15} | {method:<8} "{path}"'
        return f"[GIN] 2026/11/24 - 16:33:59 | {line}"

    kept = [
        access(500, "127.0.0.1", "GET", "/api/ps"),
        access(200, "10.0.0.7", "GET", "/api/ps"),
        access(200, "127.0.0.1", "POST", "/api/ps"),
        access(200, "::1", "GET", "/api/ps2"),
        "anything else",
    ]
    dropped = [
        access(200, "127.0.0.1", "GET", "/api/ps"),
        access(200, "::1", "GET", "/api/tags"),
        access(200, "127.0.0.1", "GET", "/api/version"),
    ]
    text = "\n".join([*dropped, *kept, "the last"])
    service = stand_in(f"cat <<'END'\n{text}\nEND\nexec sleep 60")
    line_of(service, "the last")
    assert [line for line in kept if line in service.log()] == kept
    assert [line for line in dropped if line in service.log()] == []
