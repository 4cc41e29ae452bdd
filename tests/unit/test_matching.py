"""Which runner holds which model: every way in which they do not match one to one."""

import json
import subprocess

import psutil
import pytest

from helpers.models import config_json, config_layer, manifest_json, manifest_path
from llm_service.errors import ServiceError
from llm_service.manifests import LENT
from llm_service.matching import REPLACED_S, ListCleaner, Matching
from llm_service.processes import Runner
from llm_service.store import Store
from ollama_client import name_key

WEIGHTS = "application/vnd.ollama.image.model"
ONE, TWO = "1" * 64, "2" * 64


class House:
    """A store, runners that are processes, and a clock.

    .asked      what Ollama was asked to unload: the name, and the weights that it has then
    .parent     the server, which is this test
    .unknown    the children of the server that are not known as runners
    .living     the runners that there are by now
    """

    def __init__(self, models):
        self.models, self.now, self.asked, self.unknown = models, 1000.0, [], []
        self.living = []
        self.parent = psutil.Process()
        self.store = Store(models)
        self.matching = Matching(self, self.store.manifests, self, lambda: self.now)
        self._started, self._ended = [], []

    def model(self, name, *weights, about="a", end=b""):
        """Write a model's manifest; return its line of /api/ps."""
        layers = [{"mediaType": WEIGHTS, "digest": f"sha256:{each}", "size": 1} for each in weights]
        data = manifest_json([*layers, config_layer(config_json(size=about))])
        path = manifest_path(self.models, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data + end)
        return {"name": name, "digest": self.store.manifests.there()[name_key(name)][0].ids[-1]}

    def runner(self, digest=None, model=""):
        self._started.append(subprocess.Popen(["sleep", "60"]))
        process = psutil.Process(self._started[-1].pid)
        return Runner(process, digest, None, model or f"/blobs/sha256-{digest}")

    def start_server_with_runner(self, digest):
        command = ["sh", "-c", "sleep 60 & echo $!; wait"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE)
        self._started.append(server)
        self.parent = psutil.Process(server.pid)
        runner = Runner(psutil.Process(int(server.stdout.readline())), digest, None)
        self._ended.append(runner.process)
        return runner

    def close(self):
        for each in self._ended:
            each.kill()
        for each in self._started:
            each.kill()
            each.wait()

    def names(self, runners, *loaded):
        held = self.matching.match(runners, list(loaded))
        return [held[runner].name for runner in runners]

    def certain(self, model, runner, *loaded):
        """Tell whether a runner holds a model; None where nobody knows."""
        held = self.matching.match([runner], list(loaded))[runner]
        versions = self.matching.versions(model, list(loaded))
        if held.is_one_of(versions):
            return True
        return None if held.may_be_one_of(versions) else False

    # As Ollama, and as Processes

    def unload(self, name, _timeout_s):
        layers = json.loads(manifest_path(self.models, name).read_text())["layers"]
        self.asked.append((name, layers[0]["digest"].removeprefix("sha256:")))

    def server(self):
        return self.parent

    def runners(self):
        return self.living

    def unknown_children(self):
        return self.unknown


@pytest.fixture
def house(tmp_path):
    one = House(tmp_path)
    yield one
    one.close()


# While it is not listed


def test_a_runner_that_loads_is_named_by_its_weights(house):
    house.model("a:latest", ONE)
    house.model("b:latest", TWO)
    runner = house.runner(TWO)
    assert house.names([runner]) == ["b:latest"]
    assert [house.certain(name, runner) for name in "ab"] == [False, True]


def test_one_that_loads_for_one_of_two_models_is_neithers(house):
    house.model("a:latest", ONE)
    house.model("b:latest", ONE, about="another")
    house.model("c:latest", TWO)
    runner = house.runner(ONE)
    assert house.names([runner]) == [None]
    assert [house.certain(name, runner) for name in "abc"] == [None, None, False]


def test_copies_are_one_model(house):
    for name in ("a:latest", "b:latest"):
        house.model(name, ONE)
    runner = house.runner(ONE)
    assert house.names([runner]) == ["a:latest"]
    assert [house.certain(name, runner) for name in "ab"] == [True, True]


def test_one_of_weights_that_nobody_has_seen_may_be_of_any_model(house):
    house.model("a:latest", ONE)
    runner = house.runner(TWO)
    assert house.names([runner]) == [None]
    assert house.certain("a", runner) is None


def test_one_that_was_started_before_an_update_is_of_the_old_version(house):
    house.model("a:latest", ONE)
    house.model("b:latest", ONE, about="another")
    house.names([])  # a look
    house.model("a:latest", TWO)
    house.now += REPLACED_S / 2
    runner = house.runner(ONE)
    assert [house.certain(name, runner) for name in "ab"] == [None, None]
    house.now += REPLACED_S
    house.names([])
    assert [house.certain(name, runner) for name in "ab"] == [None, None]
    assert [house.certain(name, house.runner(ONE)) for name in "ab"] == [False, True]


# While it is listed


def test_one_that_is_listed_is_of_the_model_that_ollama_names(house):
    line = house.model("a:latest", ONE)
    house.model("b:latest", ONE, about="another")
    runner = house.runner(ONE)
    assert house.names([runner], line) == ["a:latest"]
    assert [house.certain(name, runner, line) for name in "ab"] == [True, False]


def test_it_stays_so_when_ollama_does_not_answer_or_the_model_is_gone(house):
    line = house.model("a:latest", ONE)
    house.model("b:latest", ONE, about="another")
    runner = house.runner(ONE)
    house.names([runner], line)
    manifest_path(house.models, "a").unlink()
    assert house.names([runner]) == ["a:latest"]
    assert house.certain("b", runner) is False


def test_old_and_new_version_have_one_name(house):
    old, first = house.model("a:latest", ONE), house.runner(ONE)
    house.names([first])
    new, second = house.model("a:latest", TWO), house.runner(TWO)
    assert house.names([first, second], old, new) == ["a:latest", "a:latest"]
    assert house.certain("a", first, old, new) and house.certain("a", second, old, new)


def test_the_list_tells_better_than_memory(house):
    """A list that was asked for before another runner of the same weights was started."""
    before = house.model("a:latest", ONE)
    after = house.model("b:latest", ONE, about="another")
    runner = house.runner(ONE)
    assert house.names([runner], before) == ["a:latest"]
    assert house.names([runner], after) == ["b:latest"]


def test_one_that_goes_does_not_take_the_line_of_its_successor(house):
    old, goes = house.model("a:latest", ONE), house.runner(ONE)
    house.names([goes], old)
    line, comes = house.model("b:latest", ONE, about="another"), house.runner(ONE)
    assert house.names([goes, comes], line) == ["a:latest", "b:latest"]


def test_a_digest_may_or_may_not_count_a_lines_end(house):
    for about, end in (("a", b"\n"), ("b", b"")):
        line, runner = house.model("a:latest", ONE, about=about, end=end), house.runner(ONE)
        assert house.certain("a", runner, line)
    first, last = house.store.manifests.there()["a:latest"][0].ids[0], line["digest"]
    assert first == last


def test_what_is_left_over_on_both_sides_belongs_together(house):
    """After a restart of the service nobody remembers the old version."""
    line = house.model("a:latest", ONE)
    old = dict(line, digest="0" * 64)
    first, second = house.runner(ONE), house.runner(TWO)
    assert house.names([first, second], line, old) == ["a:latest", "a:latest"]


def test_two_that_are_left_over_on_both_sides_are_not_guessed(house):
    lines = [{"name": name, "digest": "0" * 64} for name in ("a:latest", "b:latest")]
    runners = [house.runner(ONE), house.runner(TWO)]
    assert house.names(runners, *lines) == [None, None]
    assert [house.certain("a", each, *lines) for each in runners] == [None, None]


def test_one_that_may_load_for_a_model_is_not_taken_for_what_is_left_over(house):
    house.model("b:latest", ONE)
    old, runner = {"name": "a:latest", "digest": "0" * 64}, house.runner(ONE)
    assert house.names([runner], old) == [None]
    assert [house.certain(name, runner, old) for name in "ab"] == [None, None]


def test_an_orphan_is_not_what_the_new_server_lists(house):
    line, orphan = house.model("a:latest", ONE), house.runner(ONE)
    house.names([orphan], line)
    runner = house.start_server_with_runner(ONE)
    held = house.matching.match([orphan, runner], [line])
    assert [held[each].line for each in (orphan, runner)] == [None, line]
    assert [held[each].name for each in (orphan, runner)] == ["a:latest", "a:latest"]


# Of other kinds


def test_a_model_of_several_files_is_known_by_its_folder(house):
    line = house.model("a:latest", ONE, TWO)
    other = house.model("b:latest", ONE, TWO, about="another")
    path = "/blobs/.ollama-split-{}-123/model-00001-of-00002.gguf"
    runner = house.runner(model=path.format(other["digest"][:12]))
    assert house.names([runner], line, other) == ["b:latest"]
    assert house.names([house.runner(model=path.format(line["digest"][:12]))]) == ["a:latest"]


def test_one_that_names_its_model_is_known_by_the_name(house):
    old, runner = house.model("a:latest"), house.runner(model="a")
    assert house.names([runner], old) == ["a:latest"]
    new, second = house.model("a:latest", about="another"), house.runner(model="a")
    assert house.names([runner, second], old, new) == ["a:latest", "a:latest"]
    assert house.certain("a", runner, old, new) and house.certain("a", second, old, new)


# By which name it is unloaded


def test_it_is_unloaded_by_its_own_name_while_that_reaches_it(house):
    line = house.model("a:latest", ONE)
    house.names([])  # a look
    house.model("a:latest", ONE, about="updated, of the same weights")
    assert house.matching.unload(line) is True
    assert house.asked == [("a:latest", ONE)]


def test_it_is_unloaded_by_another_name_of_its_weights(house):
    line = house.model("a:latest", ONE)
    house.names([])
    house.model("a:latest", TWO)
    house.model("b:latest", ONE, about="another")
    assert house.matching.unload(line) is True
    assert house.asked == [("b:latest", ONE)]


@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.parametrize("updated", [True, False])
def test_what_has_no_name_gets_one_for_that_moment(house, seen, updated):
    line, runner = house.model("a:latest", ONE), house.runner(ONE)
    if seen:
        house.names([])
    else:
        house.matching = Matching(house, house.store.manifests, house)
    if updated:
        house.model("a:latest", TWO)
    else:
        manifest_path(house.models, "a").unlink()
    house.model("llm-service/own:latest", TWO)
    assert house.matching.unload(line, runner) is True
    ((name, weights),) = house.asked
    assert name.startswith(f"{LENT}:") and weights == ONE
    assert not manifest_path(house.models, name).parent.exists()
    assert "llm-service/own:latest" in house.store.models()


def test_a_name_that_is_another_versions_now_is_not_used(house, caplog):
    """An `ollama runner` has no weights that could be named, and nobody saw this manifest."""
    house.model("a:latest", TWO)
    line = {"name": "a:latest", "digest": "0" * 64}
    assert house.matching.unload(line, house.runner(model="a")) is False
    assert house.asked == [] and "another version's name" in caplog.text


def test_a_refusal_is_told(house, monkeypatch):
    line = house.model("a:latest", ONE)

    def refuse(*_):
        raise ServiceError("ollama_timeout", "no")

    monkeypatch.setattr(house, "unload", refuse)
    assert house.matching.unload(line) is False


def test_a_lent_name_is_no_model_and_is_taken_back_after_an_end_in_between(house):
    with house.store.manifests.lent_name([ONE]) as name:
        path = manifest_path(house.models, name)
        data = path.read_bytes()
        assert house.store.models() == {}
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    house.store.manifests.take_names_back()
    assert not path.parent.exists()


# The list without processes


def clean(house, cleaner, runners, *loaded):
    held = house.matching.match(runners, list(loaded))
    cleaner.clean(cleaner.due(list(loaded), held.values()))
    return [name for name, _ in house.asked]


@pytest.fixture
def cleaner(house):
    return ListCleaner(house.matching, house)


def test_a_line_without_a_process_for_two_looks_is_cleaned(house, cleaner):
    lines = [house.model("a:latest", ONE), house.model("b:latest", TWO)]
    runner = house.runner(ONE)
    assert clean(house, cleaner, [runner], *lines) == []
    assert clean(house, cleaner, [runner], *lines) == ["b:latest"]


def test_one_that_was_loaded_anew_since_the_look_is_not_cleaned(house, cleaner):
    """Ollama would unload it as soon as it has loaded."""
    line = house.model("a:latest", ONE)
    assert clean(house, cleaner, [], line) == []
    house.living = [house.runner(ONE)]
    assert clean(house, cleaner, [], line) == []
    assert clean(house, cleaner, house.living, line) == []


def test_none_is_cleaned_while_the_server_has_a_child_that_is_not_known(house, cleaner):
    line = house.model("a:latest", ONE)
    house.unknown = [house.runner()]
    for _ in range(3):
        assert clean(house, cleaner, [], line) == []


def test_one_that_a_runner_may_stand_behind_is_not_cleaned(house, cleaner):
    house.model("a:latest", TWO)
    old = {"name": "a:latest", "digest": "0" * 64}
    runners = [house.runner(ONE), house.runner(ONE)]
    for _ in range(3):
        assert clean(house, cleaner, runners, old) == []


def test_one_that_comes_back_is_not_cleaned(house, cleaner):
    line = house.model("a:latest", ONE)
    assert clean(house, cleaner, [], line) == []
    assert clean(house, cleaner, [house.runner(ONE)], line) == []
    assert clean(house, cleaner, [], line) == []
