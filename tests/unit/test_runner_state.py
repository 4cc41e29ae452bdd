"""The states of a runner and of the server, by looks that are made by hand."""

import threading
import time
import types

import psutil
import pytest

from helpers.fake_ollama import FakeOllama, http
from helpers.watches import FRESH, STUCK_S, make_watch, slot
from llm_service import processes
from llm_service.processes import age_s
from llm_service.runner_state import GAP_S, STUCK_LOOKS, Look, RunnerState
from llm_service.server_state import ServerState


class Runner:
    """A RunnerState, and looks at it every two seconds.

    .look(…)        one look; returns the state
    .for_(s, …)     the same look again and again for so many seconds
    """

    def __init__(self):
        self.now = 1000.0
        process = types.SimpleNamespace(pid=7)
        self.state = RunnerState(types.SimpleNamespace(process=process), self.now, STUCK_S)

    def look(self, *slots, after=2.0, health="ok", **fields):
        self.now += after
        seen = list(slots) if slots else None
        look = {"passed_s": after, **fields}
        self.state.note(Look(self.now, health=health, slots=seen, **look))
        return self.state.state

    def for_(self, seconds, *slots, cpu_share=0.0, step=2.0, **fields):
        states = set()
        for _ in range(int(seconds / step)):
            used = self.state_cpu = getattr(self, "state_cpu", 0.0) + cpu_share * step
            states.add(self.look(*slots, after=step, main_cpu_s=used, **fields))
        return states


@pytest.fixture
def runner():
    one = Runner()
    assert one.look(FRESH) == "idle"
    return one


@pytest.fixture
def busy(runner):
    assert runner.look(slot()) == "busy"
    return runner


def seconds(runner):
    return runner.state.report(runner.now)["seconds"]


# Loading, idle, busy


def test_it_loads_until_its_health_is_ok():
    runner = Runner()
    assert runner.look(health="loading") == "loading"
    assert runner.state.under_way
    assert runner.look(FRESH) == "idle"
    assert not runner.state.under_way


def test_a_load_may_take_as_long_as_it_takes():
    assert Runner().for_(STUCK_S * 20, health="loading") == {"loading"}


def test_what_was_not_asked_stays_as_it_was(runner):
    assert runner.for_(STUCK_S * 3, health="unasked") == {"idle"}
    assert seconds(runner) == STUCK_S * 3


def test_it_is_busy_while_tokens_come_and_then_idle(runner):
    for decoded in range(1, 60):
        assert runner.look(slot(decoded=decoded)) == "busy"
    assert runner.look(slot(decoded=60, active=False)) == "idle"
    assert not runner.state.under_way


def test_a_runner_that_ends_while_it_is_asked_is_no_bug():
    process = psutil.Popen(["true"])
    process.wait()
    gone = processes.Runner(process, digest=None, port="1")
    watch = make_watch([gone])
    watch.look()
    assert [each["pid"] for each in watch.runners()] == [process.pid]


def test_the_machines_cpu_is_told_however_many_runners_came_and_went():
    there = []
    watch = make_watch(there)
    watch.processes.runners = lambda: list(there)
    for _ in range(70):
        process = psutil.Popen(["sleep", "60"])
        one = processes.Runner(process, digest=None, port="1")
        there[:] = [one]
        watch.look()
        process.kill()
        process.wait()
    watch.machine.measure()
    assert isinstance(watch.machine.cpu_percent, float)
    assert [each["pid"] for each in watch.runners()] == [process.pid]


@pytest.mark.parametrize("it_listens", [True, False])
def test_what_another_answers_on_its_port_is_no_answer_of_a_runner(it_listens):
    """Ollama finds a port that is free: it is the runner's only once that listens there."""
    me = psutil.Process()
    with FakeOllama({"/health": http("{}")}) as listener, psutil.Popen(["sleep", "60"]) as child:
        process, server = (me, me.parent()) if it_listens else (child, me)
        runner = processes.Runner(process, None, str(listener.port))
        state = RunnerState(runner, time.monotonic(), STUCK_S)
        make_watch()._look_at_runners([state], server)
        child.kill()
    assert (state.state == "loading") is not it_listens


def test_seconds_count_from_the_change(busy):
    assert seconds(busy) == 0
    busy.look(slot(decoded=6))
    assert seconds(busy) == 2


@pytest.mark.parametrize(
    "moves",
    [
        lambda n: [slot(decoded=n)],
        lambda n: [slot(decoded=0, prompt=n * 1024)],
        lambda n: [slot(task=n)],  # short answers, one after another
        lambda n: [slot(), slot(task=2, decoded=n)],  # one waits for the other
        lambda n: [slot(task=2, decoded=n), slot()],
    ],
)
def test_each_counter_of_any_slot_is_progress(runner, moves):
    assert {runner.look(*moves(n)) for n in range(100)} == {"busy"}


# Stuck


def test_it_is_stuck_after_the_time(busy):
    assert busy.for_(STUCK_S - 2, slot()) == {"busy"}
    assert busy.look(slot()) == "stuck"
    assert str(STUCK_S) in busy.state.evidence and "counters" in busy.state.evidence
    assert busy.for_(100, slot()) == {"stuck"}
    assert seconds(busy) == 100


def test_it_takes_ten_looks_too(busy):
    assert busy.for_(9 * 5.9, slot(), step=5.9) == {"busy"}
    assert busy.look(slot()) == "stuck"


def test_a_token_in_the_last_moment_is_progress(busy):
    busy.for_(STUCK_S - 2, slot())
    assert busy.look(slot(decoded=6)) == "busy"
    assert busy.for_(STUCK_S - 2, slot(decoded=6)) == {"busy"}


def test_a_stuck_one_that_goes_on_is_busy(busy):
    assert "stuck" in busy.for_(STUCK_S + 2, slot())
    assert busy.look(slot(decoded=6)) == "busy"


def test_idle_with_the_same_counters_is_no_standstill(busy):
    assert busy.for_(STUCK_S * 3, slot(active=False)) == {"idle"}
    assert busy.for_(STUCK_S - 2, slot()) == {"busy"}


def test_slots_that_do_not_answer_are_a_standstill(busy):
    assert busy.for_(STUCK_S - 2, late=True) == {"busy"}
    assert busy.look(late=True) == "stuck"
    assert "/slots" in busy.state.evidence


def test_slots_that_answer_now_and_then_with_the_same_are_a_standstill(busy):
    for _ in range(STUCK_S // 4):
        busy.look(late=True)
        busy.look(slot())
    assert busy.state.state == "stuck"


def test_late_slots_that_have_moved_are_progress(busy):
    for n in range(6, 100):
        assert busy.for_(20, late=True) == {"busy"}
        assert busy.look(slot(decoded=n)) == "busy"


def test_an_idle_one_that_was_held_and_then_asked_is_stuck(runner):
    runner.for_(30, health="unasked")
    assert runner.for_(STUCK_S - 2, late=True) == {"busy"}
    assert runner.look(late=True) == "stuck"


# Ten times as long on the CPU


@pytest.mark.parametrize("share", [0.06, 0.5, 1.0])
def test_a_batch_on_the_cpu_gets_ten_times_as_many_seconds_of_cpu_time(busy, share):
    assert busy.for_(STUCK_S * 10 / share, slot(), cpu_share=share) == {"busy"}
    assert "stuck" in busy.for_(2 / share + 8, slot(), cpu_share=share)


def test_where_others_take_the_cpu_a_batch_takes_as_long_as_it_takes(busy):
    """It is ready to run all the time and gets hardly any CPU: a standstill waits for nothing."""
    for n in range(STUCK_S * 20):
        assert busy.look(slot(), main_cpu_s=n * 0.02, main_wait_s=n * 1.98) == "busy"


def test_a_clock_that_jumps_is_no_progress_and_no_verdict(busy, monkeypatch):
    for moment in (0, 4e9):
        monkeypatch.setattr("time.time", lambda moment=moment: moment)
        assert busy.for_(STUCK_S / 2 - 2, slot()) == {"busy"}
    busy.for_(4, slot())
    assert busy.state.state == "stuck"


@pytest.mark.parametrize("share", [0.0, 0.01, 0.04])
def test_one_that_does_not_compute_gets_no_more(busy, share):
    assert busy.for_(STUCK_S - 2, slot(), cpu_share=share) == {"busy"}
    assert busy.look(slot(), main_cpu_s=busy.state_cpu) == "stuck"


def test_one_that_is_wholly_on_the_gpu_gets_no_more(busy):
    # It may turn in a loop that waits for the GPU.
    assert busy.for_(STUCK_S - 2, slot(), cpu_share=1.0, on_gpu=True) == {"busy"}
    assert busy.look(slot(), on_gpu=True, main_cpu_s=99) == "stuck"


def test_one_that_ceases_to_compute_is_stuck_soon(busy):
    busy.for_(STUCK_S * 5, slot(), cpu_share=1.0)
    assert "stuck" in busy.for_(STUCK_LOOKS * 2 + 2, slot())


# A gap


def test_a_gap_between_two_looks_starts_the_count_anew(busy):
    busy.for_(STUCK_S - 2, slot())
    assert busy.look(slot(), after=GAP_S + 0.1) == "busy"
    assert busy.for_(STUCK_S - 2, slot()) == {"busy"}
    assert busy.look(slot()) == "stuck"


def test_after_a_pause_of_an_hour_nothing_is_stuck_or_silent_or_a_ghost(runner, busy):
    for health in ("silent", "dead"):
        runner.for_(8, health=health)
        assert runner.look(health=health, after=3600) == "busy"
    assert busy.look(slot(decoded=6)) == "busy"


def test_looks_six_seconds_apart_are_no_gap(busy):
    assert "stuck" in busy.for_(STUCK_S * 2, slot(), step=GAP_S)


# Silent


def test_it_is_silent_after_three_looks_over_ten_seconds(busy):
    assert busy.for_(10, health="silent") == {"busy"}
    assert busy.look(health="silent") == "silent"
    assert "/health" in busy.state.evidence
    assert busy.state.under_way


def test_ten_seconds_of_silence_in_two_looks_are_not_enough(busy):
    busy.look(health="silent")
    assert busy.look(health="silent", after=5.9) == "busy"
    assert busy.look(health="silent", after=5.9) == "silent"


def test_one_answer_ends_the_silence(busy):
    for _ in range(20):
        assert busy.for_(8, health="silent") == {"busy"}
        busy.look(slot())
        busy.look(slot(decoded=busy.now))


def test_one_that_computes_is_not_silent_for_its_patience(busy):
    """As one whose HTTP threads all wait, since it embeds thousands of texts of one request."""
    computes = {"health": "silent", "cpu_s": 2.0}
    assert busy.for_(10 * STUCK_S - 2, **computes) == {"busy"}
    assert busy.for_(4, **computes) == {"silent"}


def test_one_that_computes_on_a_gpu_has_the_patience_of_a_loop_that_stands(busy):
    computes = {"health": "silent", "cpu_s": 2.0, "on_gpu": True}
    assert busy.for_(STUCK_S, **computes) == {"busy"}
    assert busy.for_(4, **computes) == {"silent"}


def test_one_that_has_computed_and_is_stopped_is_silent(busy):
    assert busy.for_(20, health="silent", cpu_s=2.0) == {"busy"}
    assert busy.look(health="silent") == "silent"


def test_an_answer_gives_one_that_computes_all_its_patience_back(busy):
    computes = {"health": "silent", "cpu_s": 2.0}
    for _ in range(2):
        assert busy.for_(6 * STUCK_S, **computes) == {"busy"}
        assert busy.look(slot(decoded=1)) == "busy"


def test_a_silent_one_that_answers_is_well(busy):
    assert "silent" in busy.for_(14, health="silent")
    assert busy.look(slot(decoded=6)) == "busy"


def test_an_idle_one_can_be_silent(runner):
    assert runner.look(health="silent") == "idle"
    assert runner.state.under_way  # so it is asked again soon
    assert "silent" in runner.for_(10, health="silent")


# Ghost, orphan


def test_it_is_a_ghost_after_ten_seconds(busy):
    assert busy.for_(10, health="dead") == {"busy"}
    assert busy.look(health="dead") == "ghost"
    assert busy.state.evidence


def test_a_stuck_one_that_was_killed_is_a_ghost(busy):
    busy.for_(STUCK_S, slot())
    assert busy.for_(10, health="dead") == {"stuck"}
    assert busy.look(health="dead") == "ghost"


def test_one_whose_server_has_died_is_an_orphan_for_ever(busy):
    assert busy.for_(STUCK_S * 3, health="orphan") == {"orphan"}
    assert not busy.state.under_way


# Without /slots


def test_without_slots_it_is_unwatched_while_it_uses_cpu(runner):
    assert runner.for_(STUCK_S * 30, cpu_s=1.0) == {"unwatched"}
    assert runner.state.under_way
    runner.look()
    assert runner.for_(10) == {"idle"}
    assert not runner.state.under_way


def test_without_slots_one_look_without_cpu_is_no_idleness(runner):
    runner.look(cpu_s=1.0)
    for _ in range(3):
        assert [runner.look(), runner.look(cpu_s=1.0)] == ["unwatched", "unwatched"]
    assert [runner.look(), runner.look()] == ["unwatched", "idle"]


@pytest.mark.parametrize(("passed_s", "working"), [(0.1, True), (2, False)])
def test_it_works_by_its_share_of_cpu_however_soon_the_look_comes(passed_s, working):
    assert Look(1000.0, cpu_s=0.09, passed_s=passed_s).working is working


def test_what_its_own_questions_took_makes_the_watch_ask_no_idle_runner_again(monkeypatch):
    """On a GPU it shows some time after the answers: each look would ask, for ever."""
    monkeypatch.setattr("llm_service.watch.SETTLE_S", 0.5)  # a busy machine's timers are late
    me = psutil.Process()
    watch = make_watch()
    used = {"s": 1.0}
    questions = []

    def slots(*_):
        questions.append(1)
        threading.Timer(0.005, used.update, [{"s": used["s"] + 0.001}]).start()
        return [FRESH]

    monkeypatch.setattr("llm_service.watch.cpu_seconds", lambda _: used["s"])
    monkeypatch.setattr(watch.ollama, "runner_health", lambda *_: "ok")
    monkeypatch.setattr(watch.ollama, "runner_slots", slots)
    monkeypatch.setattr(watch.ollama, "runner_metrics", lambda *_: "")
    state = RunnerState(processes.Runner(me, None, "a"), time.monotonic(), STUCK_S)
    for _ in range(5):
        watch._look_at_runners([state], me.parent())
    assert len(questions) == 1
    used["s"] += 0.001  # a request
    watch._look_at_runners([state], me.parent())
    assert len(questions) == 2


# Tokens


def test_the_end_of_an_answer_takes_no_tokens_away(runner):
    runner.look(slot(task=4, decoded=300))
    runner.look(slot(task=4, decoded=0, active=False))  # as llama.cpp leaves it
    assert (runner.state.tokens, runner.state.tokens_per_second) == (300, 0.0)
    runner.look(slot(task=5, decoded=20))
    assert (runner.state.tokens, runner.state.tokens_per_second) == (320, 10.0)


def test_tokens_are_counted_over_slots_and_tasks(runner):
    runner.look(slot(1, 10), slot(2, 0))
    assert (runner.state.tokens, runner.state.tokens_per_second) == (10, 5.0)
    runner.look(slot(1, 30), slot(2, 20))
    assert (runner.state.tokens, runner.state.tokens_per_second) == (50, 20.0)
    runner.look(slot(3, 6), slot(2, 24))  # the next task begins anew
    assert (runner.state.tokens, runner.state.tokens_per_second) == (60, 5.0)
    runner.look(slot(3, 6, active=False), slot(2, 24, active=False))
    assert (runner.state.tokens, runner.state.tokens_per_second) == (60, 0.0)


def test_the_speed_is_that_of_the_last_look_also_after_a_long_idleness(runner):
    runner.for_(40, health="unasked")
    runner.look(slot(1, 100))
    assert runner.state.tokens_per_second == 50.0


def test_what_was_decoded_before_the_first_look_does_not_count():
    runner = Runner()
    runner.look(slot(1, 500))
    assert (runner.state.tokens, runner.state.tokens_per_second) == (0, 0.0)


def test_a_standstill_has_no_speed(busy):
    busy.for_(4, slot())
    assert busy.state.tokens_per_second == 0.0
    busy.look(slot(decoded=9))
    busy.look(late=True)
    assert busy.state.tokens_per_second == 0.0


@pytest.mark.parametrize("token", [None, [], [{}], {}, {"n_decoded": 4}, [{"n_decoded": "4"}]])
def test_odd_slots_break_nothing(runner, token):
    assert runner.look({"is_processing": True, "next_token": token}) == "busy"


# The server


@pytest.fixture
def server():
    """This very process: what is asked is its age and whether it is the same."""
    return psutil.Process()


class ServerClock:
    """A ServerState that is looked at every two seconds."""

    def __init__(self):
        self.now = self.age = 1000.0
        watch = make_watch()
        self.state = ServerState(
            watch.ollama, watch.store, watch.processes, lambda: self.now, lambda _: self.age
        )

    def silence(self, server, looks, step=2):
        for _ in range(looks):
            self.now += step
            self.state.note_silence(server)
        return self.state.hung(server)


@pytest.fixture
def watched():
    return ServerClock()


def test_a_server_that_answered_is_hung_after_fifteen_looks(server, watched):
    watched.state.note_answer(server)
    assert not watched.silence(server, 14)
    assert watched.silence(server, 1)
    watched.state.note_answer(server)
    assert not watched.silence(server, 14)


def test_the_looks_of_callers_do_not_hasten_the_verdict(server, watched):
    """Twenty clears at once look twenty times, while a slow server takes one second."""
    watched.state.note_answer(server)
    assert not watched.silence(server, 14)
    for _ in range(20):
        watched.state.note_silence(server, counts=False)
    assert not watched.state.hung(server)
    assert watched.silence(server, 1)


def test_a_server_that_has_not_answered_yet_is_hung_once_its_time_is_over(server, watched):
    watched.age = 299
    assert watched.state.starting(server)
    assert not watched.silence(server, 500)
    watched.age = 301
    assert not watched.state.starting(server)
    assert watched.state.hung(server)


def test_a_pause_of_everything_starts_the_count_of_silent_looks_anew(server, watched):
    watched.state.note_answer(server)
    assert not watched.silence(server, 14)
    assert not watched.silence(server, 1, step=3600)
    assert not watched.silence(server, 13)
    assert watched.silence(server, 1)


def test_the_age_of_a_server_does_not_move_with_the_clock(monkeypatch):
    state = make_watch().server_state
    server = psutil.Popen(["sleep", "60"])  # a young one, however long the tests run
    try:
        for moment in (0, 4e9):  # a board without a battery for its clock
            monkeypatch.setattr("time.time", lambda moment=moment: moment)
            assert 0 <= age_s(server) < 60
            assert state.starting(server)
    finally:
        server.kill()
        server.wait()


def test_no_server_is_never_hung(watched):
    assert not watched.silence(None, 50)


def test_the_next_server_starts_again(server, watched):
    watched.age = 10
    watched.state.note_answer(server)
    following = psutil.Process(server.ppid())
    assert not watched.silence(following, 50)
    watched.silence(server, 15)
    assert not watched.silence(None, 1)


def test_each_change_of_a_server_is_a_line_in_the_log(server, watched, caplog):
    caplog.set_level("INFO")
    watched.state.note_answer(server)
    watched.silence(server, 20)
    watched.state.note_answer(server)
    assert [line.message.split(",")[0] for line in caplog.records] == [
        "Ollama is answering",
        "Ollama is silent",
        "Ollama is answering",
    ]


def test_each_change_of_a_runner_is_a_line_in_the_log(busy, caplog):
    caplog.set_level("INFO")
    busy.for_(STUCK_S, slot())
    busy.for_(20, slot())
    busy.look(slot(decoded=6))
    assert [(line.levelname, line.message) for line in caplog.records] == [
        ("WARNING", f"runner 7 of None: stuck, after {STUCK_S} s of busy"),
        ("INFO", "runner 7 of None: busy, after 22 s of stuck"),
    ]


# What SIGKILL does not end


def test_one_that_sigkill_does_not_end_is_a_fault_though_its_server_has_gone(busy):
    assert busy.for_(9, health="orphan", killed=True) == {"orphan"}
    assert not busy.state.faulty
    busy.for_(4, health="orphan", killed=True)
    assert busy.state.survives and busy.state.faulty


def test_a_killed_one_that_ends_in_time_does_not_survive(busy):
    busy.for_(8, health="dead", killed=True)
    busy.look(health="dead")  # a zombie holds nothing
    busy.for_(8, health="dead", killed=True)
    assert not busy.state.survives


# What is under way, for those who wait


def test_an_idle_runner_does_nothing_for_anybody(runner):
    assert runner.state.tasks == 0


def test_each_answer_under_way_is_a_task(runner):
    runner.look(slot(task=1), slot(task=2), FRESH)
    assert runner.state.tasks == 2
    assert runner.state.report(runner.now)["answers"] == 2


def test_a_runner_that_loads_is_a_task(runner):
    runner.look(health="loading")
    assert runner.state.tasks == 1


def test_a_runner_without_slots_that_computes_is_a_task(runner):
    assert runner.look(cpu_s=1.0, passed_s=2.0, active=True) == "unwatched"
    assert runner.state.tasks == 1


def test_an_answer_shorter_than_a_look_is_a_task(runner):
    assert runner.look(slot(active=False), active=True) == "idle"
    assert runner.state.tasks == 1
    runner.look(health="unasked")
    assert runner.state.tasks == 0


def test_a_runner_with_a_fault_of_its_own_is_no_idle_one(runner):
    runner.look(slot())
    for _ in range(10):
        runner.look(health="silent")
    assert runner.state.state == "silent"
    assert runner.state.tasks == 1
