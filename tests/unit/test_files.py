"""Ages of files while the clock of the machine jumps."""

import pytest

from llm_service.files import Ages

HOUR, YEAR = 3600, 3600 * 24 * 365
START = 1_700_000_000  # what the clock said at the service's start


class Machine:
    """A machine whose clock can be set: .wall() and .since_boot() as the service asks them."""

    def __init__(self):
        self.boot_s, self.offset = 50.0, START - 50.0

    def since_boot(self):
        return self.boot_s

    def wall(self):
        return self.boot_s + self.offset

    def wait(self, seconds):
        self.boot_s += seconds


@pytest.fixture
def machine():
    return Machine()


@pytest.fixture
def ages(machine):
    return Ages(machine.wall, machine.since_boot)


def test_an_age_is_the_time_since_a_change(machine, ages):
    machine.wait(10)
    assert ages.age_s(START) == 10
    assert ages.age_s(START - HOUR) == HOUR + 10
    assert ages.age_s(START + 10) == 0


def test_what_lies_in_the_future_is_young(ages):
    assert ages.age_s(START + YEAR) == 0


@pytest.mark.parametrize("jump", [HOUR, YEAR, 30 * YEAR])
def test_what_is_seconds_old_stays_so_when_the_clock_jumps_ahead(machine, ages, jump):
    machine.wait(20)
    changed = machine.wall()
    machine.wait(5)
    machine.offset += jump
    assert ages.age_s(changed) == 5
    machine.wait(2 * HOUR)
    assert ages.age_s(changed) == 2 * HOUR + 5


def test_what_was_there_before_the_start_is_as_old_as_the_service_at_least(machine, ages):
    """Its time is of a clock that nobody can tell; it has not changed since the start."""
    machine.offset += YEAR
    machine.wait(60)
    assert ages.age_s(START - 2 * HOUR) == 60
    assert ages.age_s(START - 2 * YEAR) == 60
    machine.wait(HOUR)
    assert ages.age_s(START - 2 * HOUR) == HOUR + 60


def test_a_file_of_the_new_clock_has_its_age_by_it(machine, ages):
    machine.wait(2 * HOUR)
    machine.offset += YEAR
    ages.note_clock()
    changed = machine.wall()
    machine.wait(HOUR)
    assert ages.age_s(changed) == HOUR


def test_a_clock_that_is_set_back_makes_nothing_older(machine, ages):
    machine.wait(HOUR)
    changed = machine.wall()
    machine.wait(60)
    machine.offset -= 4 * HOUR
    assert ages.age_s(changed) == 0  # it lies in the future now
    fresh = machine.wall()
    machine.wait(30)
    assert ages.age_s(fresh) == 30


def test_a_clock_that_went_astray_and_came_back_makes_nothing_older(machine, ages):
    machine.offset -= 30 * YEAR
    ages.note_clock()  # as each look does
    changed = machine.wall()
    machine.wait(10)
    machine.offset += 30 * YEAR
    assert ages.age_s(changed) == 10


def test_a_clock_that_is_set_by_small_steps_has_not_jumped(machine, ages):
    for _ in range(1000):
        machine.wait(2)
        machine.offset += 0.5
        ages.note_clock()
    assert ages.age_s(START - HOUR) == machine.wall() - START + HOUR


def test_only_what_changed_within_a_second_may_change_unseen(machine, ages):
    for seconds, unseen in ((0, True), (0.9, True), (1.1, False), (-YEAR, False)):
        assert ages.just_now(int((machine.wall() - seconds) * 1e9)) is unseen
