"""The arithmetic of a download, without Ollama and with a clock of the test's own."""

import random

import pytest

from llm_service.progress import SPEED_WINDOW_S, Progress
from ollama_client import ServiceError

A, B, C = (f"sha256:{letter * 64}" for letter in "abc")


def layer(digest, completed, total):
    """Return a line as Ollama sends it, which leaves out what is 0."""
    sizes = {"total": total, "completed": completed}
    shown = {key: size for key, size in sizes.items() if size}
    return {"status": f"pulling {digest[7:19]}", "digest": digest, **shown}


def of_layers(*lines, progress=None, start=0):
    """Note one line a second; return the progress and the figures after each."""
    progress = progress or Progress(start)
    figures = []
    for now, line in enumerate(lines, start):
        progress.note(line, now)
        figures.append(progress.figures(now))
    return progress, figures


def missing_bytes(progress):
    return sum(total - completed for completed, total in progress.layers.values())


def test_before_the_first_line_nothing_is_known():
    assert Progress(0).figures(0) == {
        "percent": 0,
        "completed_bytes": 0,
        "total_bytes": 0,
        "bytes_per_second": 0,
        "eta_seconds": None,
    }


def test_bytes_are_counted_over_all_layers():
    _, figures = of_layers(layer(A, 50, 100), layer(A, 100, 100), layer(B, 10, 100))
    counted = [(each["completed_bytes"], each["total_bytes"]) for each in figures]
    assert counted == [(50, 100), (100, 100), (110, 200)]


def test_a_layer_may_begin_without_sizes():
    _, figures = of_layers(layer(A, 0, 0), layer(A, 0, 100), layer(A, 40, 100))
    assert [each["total_bytes"] for each in figures] == [0, 100, 100]
    assert [each["percent"] for each in figures] == [0, 0, 40]


def test_percent_stays_where_a_later_layer_adds_to_the_total():
    _, figures = of_layers(layer(A, 100, 100), layer(B, 0, 900), layer(B, 850, 900))
    assert [each["percent"] for each in figures] == [99.9, 99.9, 99.9]
    assert [each["total_bytes"] for each in figures] == [100, 1000, 1000]


def test_percent_stays_where_ollama_drops_what_it_had():
    _, figures = of_layers(layer(A, 80, 100), layer(A, 20, 100), layer(A, 90, 100))
    assert [each["percent"] for each in figures] == [80, 80, 90]
    assert [each["completed_bytes"] for each in figures] == [80, 20, 90]


def test_percent_is_100_with_success_alone():
    progress, figures = of_layers(layer(A, 100, 100), {"status": "verifying sha256 digest"})
    assert [each["percent"] for each in figures] == [99.9, 99.9]
    assert progress.figures(9, "error")["percent"] == 99.9
    assert progress.figures(9, "success")["percent"] == 100


def test_percent_is_never_more_than_is_there():
    _, figures = of_layers(layer(A, 1999, 2000), layer(A, 2, 3))
    assert figures[0]["percent"] == 99.9  # of 99.95
    _, figures = of_layers(layer(A, 2, 3))
    assert figures[0]["percent"] == 66.6


def test_more_than_the_total_counts_as_the_total():
    _, figures = of_layers(layer(A, 300, 100))
    assert figures[0]["completed_bytes"] == figures[0]["total_bytes"] == 100


def test_a_layer_is_whole_once_ollama_goes_on():
    progress, _ = of_layers(layer(A, 90, 100), layer(B, 0, 50))
    assert progress.layers == {A: [100, 100], B: [0, 50]}
    progress.note({"status": "verifying sha256 digest"}, 3)
    assert missing_bytes(progress) == 0


def test_a_manifest_asked_for_anew_completes_no_layer():
    progress, _ = of_layers(layer(A, 90, 100), {"status": "pulling manifest"})
    assert missing_bytes(progress) == 10


def test_after_a_reconnect_the_layers_go_on_from_where_they_were():
    lines = [layer(A, 100, 100), layer(B, 50, 100), {"status": "pulling manifest"}]
    _, figures = of_layers(*lines, layer(A, 100, 100), layer(B, 60, 100))
    assert figures[-1]["completed_bytes"] == 160
    percents = [each["percent"] for each in figures]
    assert percents == sorted(percents)


def test_speed_and_eta_are_of_the_bytes_that_came():
    progress, _ = of_layers(*(layer(A, 100 * n, 1000) for n in range(6)))
    figures = progress.figures(5)
    assert (figures["bytes_per_second"], figures["eta_seconds"]) == (100, 5)


def test_what_an_earlier_pull_left_is_no_speed():
    _, figures = of_layers(layer(A, 900, 1000), layer(A, 910, 1000))
    assert [each["bytes_per_second"] for each in figures] == [0, 10]


def test_layers_that_come_at_once_are_no_speed():
    _, figures = of_layers(layer(A, 1000, 1000), layer(B, 10, 10), layer(C, 5, 5))
    assert figures[-1]["completed_bytes"] == 1015
    assert figures[-1]["bytes_per_second"] == 0 and figures[-1]["eta_seconds"] is None


def test_speed_is_of_the_last_seconds():
    progress, _ = of_layers(*(layer(A, 1000 * n, 100_000) for n in range(10)))
    slow = (layer(A, 9000 + 10 * n, 100_000) for n in range(30))
    progress, figures = of_layers(*slow, progress=progress, start=10)
    assert figures[0]["bytes_per_second"] > 800
    assert figures[-1]["bytes_per_second"] == 10


def test_speed_falls_while_nothing_comes():
    progress, _ = of_layers(layer(A, 0, 1000), layer(A, 100, 1000))
    speeds = [progress.figures(now)["bytes_per_second"] for now in (1, 2, 10, 200)]
    assert speeds == [100, 50, 10, 0]
    assert progress.figures(200)["eta_seconds"] is None


def test_at_the_end_there_is_no_speed():
    progress, _ = of_layers(layer(A, 0, 100), layer(A, 50, 100))
    assert progress.figures(2, "error")["bytes_per_second"] == 0
    assert progress.figures(2, "error")["eta_seconds"] is None


def test_many_lines_a_second_keep_few_samples():
    progress = Progress(0)
    for n in range(5000):
        progress.note(layer(A, n, 5000), n / 250)
    assert progress.figures(20)["bytes_per_second"] in range(240, 260)
    assert len(progress._speed) <= SPEED_WINDOW_S / 0.2 + 2


def test_when_the_last_byte_came_shows_a_stall():
    progress, _ = of_layers(layer(A, 0, 100), layer(A, 10, 100), layer(A, 10, 100))
    assert progress.moved_at == 1
    progress.note(layer(A, 5, 100), 3)  # what it had is gone, nothing came
    assert progress.moved_at == 1
    progress.note(layer(B, 0, 100), 4)
    assert progress.moved_at == 4


def test_a_part_of_the_work_has_its_part_of_the_percents():
    progress = Progress(0)
    progress.part = (0, 50)
    progress, pulled = of_layers(layer(A, 50, 100), layer(A, 100, 100), progress=progress)
    progress.part = (50, 100)
    progress.set_layers({A[7:]: 100, B[7:]: 100}, completed=False)
    begun = progress.figures(2)
    assert (begun["completed_bytes"], begun["total_bytes"]) == (0, 200)
    progress.note(layer(A, 100, 100), 3)
    percents = [each["percent"] for each in (*pulled, begun, progress.figures(3))]
    assert percents == [25, 50, 50, 75]


def test_a_check_that_begins_late_does_not_take_percents_back():
    progress, _ = of_layers(layer(A, 100, 100))  # without a verify, so from 0 to 100
    progress.part = (50, 100)
    progress.set_layers({A[7:]: 100}, completed=False)
    assert progress.figures(1)["percent"] == 99.9


def test_checking_has_speed_and_eta():
    progress = Progress(0)
    progress.part = (50, 100)
    progress.set_layers({A[7:]: 1000}, completed=False)
    for second in range(5):
        progress.note(layer(A, 100 * second, 1000), second)
    figures = progress.figures(4)
    assert (figures["bytes_per_second"], figures["eta_seconds"]) == (100, 6)


def test_a_file_that_is_damaged_is_missing_again():
    progress = Progress(0)
    progress.set_layers({A[7:]: 100, B[7:]: 10}, completed=False)
    progress.note(layer(A, 100, 100), 1)
    progress.note(layer(B, 10, 10), 2)
    progress.set_layers({B[7:]: 10}, completed=True)  # what is left of the model
    progress.note(layer(A, 0, 100), 3)
    assert missing_bytes(progress) == 100 and progress.completed_bytes() == 10


def test_at_the_end_the_layers_are_the_models():
    progress, _ = of_layers(layer(A, 10, 100))
    progress.set_layers({A[7:]: 100, C[7:]: 7}, completed=True)
    last = progress.figures(1, "success")
    assert last["completed_bytes"] == last["total_bytes"] == 107
    assert last["percent"] == 100


def test_layers_without_an_end_are_refused():
    progress = Progress(0)
    with pytest.raises(ServiceError) as caught:
        for n in range(2000):
            progress.note(layer(f"sha256:{n:064}", 1, 1), n)
    assert caught.value.code == "bad_answer"


@pytest.mark.parametrize("seed", range(20))
def test_percent_never_falls_whatever_comes(seed):
    chance, progress, now = random.Random(seed), Progress(0), 0.0
    percents = []
    for _ in range(500):
        now += chance.random()
        total = chance.choice([0, 1, 1000, 10**12])
        digest = chance.choice([A, B, C])
        match chance.randrange(20):
            case 0:
                progress.part = (50, 100)
            case 1:
                progress.set_layers({digest[7:]: total}, completed=chance.random() < 0.5)
            case 2:
                progress.note({"status": "verifying sha256 digest"}, now)
            case _:
                progress.note(layer(digest, chance.randrange(2 * total + 1), total), now)
        figures = progress.figures(now)
        percents.append(figures["percent"])
        assert 0 <= figures["completed_bytes"] <= figures["total_bytes"]
        assert figures["bytes_per_second"] >= 0 and (figures["eta_seconds"] or 0) >= 0
    assert percents == sorted(percents) and percents[-1] < 100
