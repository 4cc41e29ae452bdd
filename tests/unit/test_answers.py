"""The answers under way in a runner, and the totals of a model over all of its runners."""

import pytest

from llm_service.answers import Answers, Totals, totals_of


def slot(task=1, decoded=5, active=True):
    """Make a slot as llama.cpp's server tells it."""
    return {
        "id_task": task,
        "is_processing": active,
        "n_prompt_tokens_processed": 10,
        "next_token": [{"n_decoded": decoded}],
    }


# Under way


@pytest.fixture
def answers():
    return Answers()


def test_an_answer_is_as_long_under_way_as_its_task_is_seen(answers):
    for now in (0, 2, 4):
        answers.note(now, [slot(task=7, decoded=now)])
    assert answers.longer_than(4, now=4) == []
    (long,) = answers.longer_than(3, now=4)
    assert (long.task, long.began, long.tokens) == (7, 0, 4)


def test_another_task_in_the_same_slot_begins_anew(answers):
    answers.note(0, [slot(task=7)])
    answers.note(50, [slot(task=8)])
    assert answers.longer_than(10, now=50) == []


def test_a_task_keeps_its_time_while_others_come_and_go(answers):
    answers.note(0, [slot(task=7), slot(task=8)])
    answers.note(50, [slot(task=7), slot(task=8, active=False)])
    answers.note(60, [slot(task=7), slot(task=9)])
    assert [each.task for each in answers.longer_than(20, now=60)] == [7]
    assert len(answers) == 2


def test_a_slot_at_rest_is_no_answer(answers):
    answers.note(0, [slot(active=False), {"id": 1, "is_processing": False}])
    assert len(answers) == 0
    answers.note(2, [slot()])
    answers.note(4, [slot(active=False)])
    assert len(answers) == 0 and answers.longer_than(0, now=99) == []


def test_a_slot_that_tells_no_task_is_an_answer_all_the_same(answers):
    for now in (0, 60):
        answers.note(now, [{"is_processing": True}])
    (long,) = answers.longer_than(50, now=60)
    assert (long.task, long.tokens) == (None, 0)


# Totals


@pytest.fixture
def totals():
    return Totals()


def test_totals_rise_with_what_a_runner_tells(totals):
    for tokens in (5, 5, 12):
        totals.note("runner", "m", {"tokens": tokens, "seconds": tokens / 10})
    assert totals.by_model == {"m": {"tokens": 12, "seconds": pytest.approx(1.2)}}


def test_totals_go_on_when_a_runner_is_replaced(totals):
    totals.note("first", "m", {"tokens": 12})
    totals.keep(set())
    assert totals.by_model == {"m": {"tokens": 12}}
    totals.note("second", "m", {"tokens": 3})
    assert totals.by_model == {"m": {"tokens": 15}}


def test_two_runners_of_one_model_count_together_and_two_models_apart(totals):
    for runner, model in (("a", "m"), ("b", "m"), ("c", "n"), ("a", "m")):
        totals.note(runner, model, {"tokens": 4})
    assert totals.by_model == {"m": {"tokens": 8}, "n": {"tokens": 4}}


def test_totals_never_fall(totals):
    totals.note("runner", "m", {"tokens": 12})
    totals.note("runner", "m", {"tokens": 0})
    assert totals.by_model == {"m": {"tokens": 12}}


def test_what_is_told_once_and_not_again_stays(totals):
    totals.note("runner", "m", {"tokens": 12, "prompt_tokens": 3})
    totals.note("runner", "m", {"tokens": 13})
    totals.note("runner", "m", {"tokens": 13, "prompt_tokens": 4})
    assert totals.by_model == {"m": {"tokens": 13, "prompt_tokens": 4}}


def test_a_runner_that_stays_is_not_counted_twice(totals):
    totals.note("runner", "m", {"tokens": 12})
    totals.keep({"runner", "another"})
    totals.note("runner", "m", {"tokens": 13})
    assert totals.by_model == {"m": {"tokens": 13}}


# As llama.cpp's server b11076 said it, shortened
TOLD = """\
# HELP llamacpp:prompt_tokens_total Number of prompt tokens processed, excluding cached tokens
# TYPE llamacpp:prompt_tokens_total counter
llamacpp:prompt_tokens_total 4
llamacpp:prompt_tokens_cached_total 0
llamacpp:prompt_seconds_total 0.182302
llamacpp:tokens_predicted_total 7
llamacpp:tokens_predicted_seconds_total 0.402685
llamacpp:n_decode_total 7
llamacpp:prompt_tokens_seconds 21.9416
llamacpp:predicted_tokens_seconds 14.9
llamacpp:requests_processing 0
"""


def test_a_runners_own_totals_are_read():
    assert totals_of(TOLD) == {
        "prompt_tokens": 4,
        "prompt_seconds": 0.182302,
        "tokens": 7,
        "seconds": 0.402685,
    }


@pytest.mark.parametrize(
    "said, count", [("999999", 999_999), ("1e+06", 1e6), ("1.23457e+06", 1_234_570), ("0.5", 0.5)]
)
def test_a_large_total_is_told_with_six_digits(said, count):
    assert totals_of(f"llamacpp:tokens_predicted_total {said}\n") == {"tokens": count}


@pytest.mark.parametrize("text", ["", "nonsense", '{"error":"no"}', "llamacpp:tokens 5"])
def test_what_tells_no_totals_has_none(text):
    assert totals_of(text) == {}


@pytest.mark.parametrize("value", ["", "many", "1e999", "nan", "-5"])
def test_a_total_that_is_no_number_is_none(value):
    text = f"llamacpp:tokens_predicted_total {value}\nllamacpp:prompt_tokens_total 4\n"
    assert totals_of(text) == {"prompt_tokens": 4}
