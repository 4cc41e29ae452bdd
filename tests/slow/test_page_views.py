"""What the page shows and does, against a stand-in that plays answers back."""

import re
import time
from datetime import UTC, datetime

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from helpers.page import wait_for
from helpers.page_stub import H100, H100_TOTAL_MB, gpu_stats, history, model, pull, runner

LLAMA = "llama3.1:8b"


def iso(seconds_ago, now=None):
    return datetime.fromtimestamp((now or time.time()) - seconds_ago, UTC).isoformat()


# What it says of itself and of the service


def test_a_service_that_hangs_is_told_and_its_figures_fade(stub, stub_page):
    stub.models = [model(LLAMA)]
    stub.pulls = [pull("a")]
    stub.stats["callers"] = {"connections": 4, "waiting": 3, "longest_wait_s": 75}
    stub_page.poll()
    assert stub_page.text("state") == "The service works."
    assert "3 callers" in stub_page.text("waiting")
    assert stub_page.browser.title.startswith("✓") and not stub_page.old("stats")
    stub.hung.set()
    stub_page.wait_text("state", "The service has not answered since")
    assert "bad" in stub_page.element("state").get_attribute("class")
    assert stub_page.browser.title.startswith("✕")
    assert "icon-bad" in stub_page.element("icon").get_attribute("href")
    for source in ("stats", "models", "pulls", "history"):
        wait_for(lambda of=source: "old" in stub_page.old(of), 60, f"the age of the {source}")
    assert LLAMA in stub_page.text("models")
    wait_for(lambda: not stub_page.text("waiting"), 30, "nothing of who waits now")
    stub.hung.clear()
    stub_page.wait_text("state", "The service works.")
    wait_for(lambda: not stub_page.old("stats"), 30, "fresh figures")


def test_what_was_never_told_is_not_shown_as_nothing(stub, stub_page):
    stub.hung.set()
    stub_page.open_anew()
    stub_page.wait_text("state", "The service has not answered since")
    assert not stub_page.element("main").is_displayed()
    bug = {"error": "This is a bug in the service.", "code": "bug", "http_status": 500}
    stub.answers["GET", "/api/history"] = bug
    stub.hung.clear()
    stub_page.wait_text("state", "The service works.")
    assert "Nothing was healed" not in stub_page.run("return document.body.innerText")
    assert "Machine" in stub_page.run("return document.body.innerText")


def test_a_look_that_is_old_is_told_though_the_service_answers(stub, stub_page):
    stub.stats["looked_at"] = iso(45, stub_page.now)
    stub_page.poll()
    wait_for(lambda: re.search(r"4[5-9] s old", stub_page.old("stats")), 30, "the look's age")


def test_a_fault_of_the_page_is_no_fault_of_the_service(stub, stub_page):
    good, stub.stats["gpus"] = stub.stats["gpus"], None
    stub_page.poll()
    assert "This page has a fault of its own (TypeError" in stub_page.text("state")
    assert "not reachable" not in stub_page.text("state")
    stub.stats["gpus"] = good
    stub_page.poll()
    assert stub_page.text("state") == "The service works."


def test_an_answer_that_is_no_json_is_told_as_that(stub, stub_page):
    stub.stats["callers"] = {"connections": 4, "waiting": 3, "longest_wait_s": 75}
    stub_page.poll()
    stub.prefix = "/elsewhere"  # a proxy's 404 with a page of its own
    stub_page.poll()
    assert stub_page.text("waiting") == ""
    assert "no proper answer" in stub_page.text("state")
    assert "status 404 was no JSON" in stub_page.text("state")


def test_what_hangs_does_not_hide_what_is_known(stub, stub_page):
    stub.models = [model(LLAMA, share=1)]
    stub_page.poll()
    stub.models = None
    stub.health = {"status": "unhealthy", "reason": "Ollama runs but does not answer."}
    stub.health |= {"recommended_action": "reset_session", "code": "ollama_hung"}
    stub_page.poll()
    assert stub_page.text("state").endswith("does not answer. Reset the session.")
    assert LLAMA in stub_page.text("models")
    assert stub_page.element("advice").text == "Reset session"


def test_a_part_that_does_not_answer_is_told_though_the_service_is_healthy(stub, stub_page):
    stub.models = [model(LLAMA)]
    stub_page.poll()
    stub.models = None
    stub_page.poll()
    assert "not all of it answers" in stub_page.text("state")
    assert "warn" in stub_page.element("state").get_attribute("class")


@pytest.mark.parametrize(
    "state, code, words",
    [
        ("stuck", "runner_stuck", "The runner of llama3.1:8b is stuck"),
        ("silent", "runner_silent", "The runner of llama3.1:8b does not answer"),
        ("ghost", "runner_ghost", "The runner of llama3.1:8b is dead"),
    ],
)
def test_a_fault_is_told_calmly_by_its_code(stub, stub_page, state, code, words):
    stub.models = [model(LLAMA, share=1)]
    stub.health = {"status": "unhealthy", "code": code, "recommended_action": "wait"}
    said = set()
    for seconds in (130, 132, 134):
        stub.stats["runners"] = [runner(LLAMA, state, seconds)]
        stub.health["reason"] = f"For {seconds} s, counters (1, 2, {seconds})."
        stub_page.poll(2)
        said.add((stub_page.text("state"), stub_page.state(LLAMA)[0]))
    assert len(said) == 1
    assert said.pop()[0].startswith(words)


def test_the_head_names_the_machine_its_gpus_and_versions(stub, stub_page):
    stub.stats |= gpu_stats(*H100[10], gpus=2)
    stub_page.poll()
    about = "node1 · 2 × NVIDIA H100 80GB HBM3 · version 1.2.0 · Ollama 0.34.4"
    assert stub_page.text("about") == about
    assert stub_page.browser.title == "✓ node1 – LLM Service"


def test_who_waits_is_told(stub, stub_page):
    stub.stats["callers"] = {"connections": 4, "waiting": 1, "longest_wait_s": 2.5}
    stub_page.poll()
    assert stub_page.text("waiting") == "1 caller waits for an answer."
    assert "warn" not in stub_page.element("waiting").get_attribute("class")
    stub.stats["callers"] |= {"waiting": 3, "longest_wait_s": 75.0}
    stub_page.poll()
    words = "3 callers wait for an answer, the longest for more than 30 s."
    assert stub_page.text("waiting") == words
    assert "warn" in stub_page.element("waiting").get_attribute("class")
    stub.stats["callers"] = {"connections": 0, "waiting": 0, "longest_wait_s": 0.0}
    stub_page.poll()
    assert stub_page.text("waiting") == "No caller waits for an answer."
    stub.stats["callers"] = None  # a kernel that does not tell
    stub_page.poll()
    assert stub_page.text("waiting") == ""


def test_warnings_are_told_in_the_pages_unit_and_calmly(stub, stub_page):
    stub.models = [model(LLAMA, size=5_000_000_000, share=0.8), model("b", share=1)]
    on_cpu = {"code": "model_on_cpu", "message": "953 of 4768 MB of llama3.1:8b lie there."}
    lines = set()
    for seconds in (3700, 3703, 3706):
        long = {"code": "long_answer", "model": "b", "seconds": seconds, "message": f"{seconds} s"}
        waiting = {"code": "callers_waiting", "waiting": 2, "message": f"2 wait for {seconds} s"}
        new = {"code": "new_one", "message": "Something new: do this."}
        stub.health["warnings"] = [on_cpu, long, waiting, new]
        stub_page.poll(3)
        lines.add(stub_page.text("warnings"))
    assert len(lines) == 1
    beside, long, new = lines.pop().split("\n")
    assert beside.startswith("1.0 GB of 5.0 GB of llama3.1:8b lie in system memory")
    assert long == "An answer of b has been under way for more than 1 h."
    assert new == "Something new: do this."
    assert "warn" in stub_page.element("state").get_attribute("class")


def test_who_has_no_gpu_for_its_models_is_not_told_to_put_more_layers_there(stub, stub_page):
    stub.models = [model(LLAMA, share=0.5)]  # as Ollama claims
    on_cpu = {"code": "model_on_cpu", "message": "Half of it lies there."}
    unused = {"code": "gpu_not_used", "message": "Of that 0 MB are in use."}
    stub.health["warnings"] = [on_cpu, unused]
    stub_page.poll()
    beside, not_used = stub_page.text("warnings").split("\n")
    assert "Ollama sees no GPU" in beside and "LLM_GPU_LAYERS=all" not in beside
    assert not_used.startswith("Ollama says that its models lie on the GPU")
    stub.health["warnings"] = [on_cpu]
    stub_page.poll()
    assert "LLM_GPU_LAYERS=all" in stub_page.text("warnings")


def test_lines_to_copy_name_ollamas_address_and_a_model_that_is_there(stub, stub_page):
    stub.models = [model("gemma3:270m"), model(LLAMA, share=1)]
    stub_page.poll()
    use = stub_page.text("use")
    assert "http://127.0.0.1:11434" in use
    assert "curl http://127.0.0.1:11434/api/generate -d" in use
    assert '"prompt": {{ JSON.stringify($json.text) }}' in use and f'"model": "{LLAMA}"' in use


def test_it_works_under_a_path_prefix(stub, stub_page):
    # The page without the prefix would ask, and its browser complain.
    stub_page.browser.get("about:blank")
    stub_page.complaints()
    stub.prefix = "/some/llm"
    stub.models = [model(LLAMA)]
    stub_page.browser.get(f"{stub.url}/some/llm/")
    stub_page.wait_text("state", "The service works.")
    stub_page.wait_row("models", LLAMA, "not loaded")
    stub_page.press("models", LLAMA, "Load")
    stub_page.wait_text("messages", "is being loaded")
    assert stub.sent == [("POST", "/api/models/load", {"model": LLAMA})]
    assert stub_page.complaints() == []


def test_lines_to_copy_say_that_their_model_is_not_there(stub, stub_page):
    words = f"There is no model yet: these lines work once {LLAMA} is downloaded."
    stub_page.poll()
    assert stub_page.text("use-notes") == words
    stub.models = [model("gemma3:270m")]
    stub_page.poll()
    assert stub_page.text("use-notes") == ""
    elsewhere = stub.url.replace("127.0.0.1", "vm.localhost")  # as from another machine
    stub_page.browser.get(f"{elsewhere}/")
    stub_page.wait_text("use-notes", "up to OLLAMA_HOST, in Docker OLLAMA_BIND")


# The token


def test_the_token_is_not_asked_for_again_after_escape(stub, stub_page):
    wanted = {"error": "Send the token.", "code": "token_wanted", "http_status": 401}
    paths = ("/api/stats", "/api/models", "/api/models/pull", "/api/history", "/api/info")
    stub.answers |= {("GET", path): wanted for path in paths}
    asked = lambda: stub_page.element("token").get_attribute("open")  # noqa: E731
    stub_page.open_anew()
    wait_for(asked, 30, "the question")
    stub_page.browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    wait_for(lambda: not asked(), 30, "the end of the question")
    stub_page.wait_text("state", "Without its token (LLM_API_TOKEN)")
    stub_page.next_rounds()
    assert not asked()
    stub_page.wait_text("advice", "Enter the token")
    stub_page.element("advice").find_element(By.TAG_NAME, "button").click()
    wait_for(asked, 30, "the question again")
    stub.answers.clear()
    stub_page.element("token-input").send_keys("secret", Keys.ENTER)
    wait_for(lambda: stub_page.text("advice") == "", 30, "no more advice")
    assert "Without its token" not in stub_page.text("state")


def test_the_page_has_a_main_part_whatever_is_known(stub, stub_page):
    wanted = {"error": "Send the token.", "code": "token_wanted", "http_status": 401}
    paths = ("/api/stats", "/api/models", "/api/models/pull", "/api/history", "/api/info")
    stub.answers |= {("GET", path): wanted for path in paths}
    stub_page.open_anew()
    wait_for(lambda: stub_page.element("token").get_attribute("open"), 30, "the question")
    stub_page.browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    stub_page.wait_text("state", "Without its token (LLM_API_TOKEN)")
    tree = stub_page.browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    assert "main" in {node["role"]["value"] for node in tree if not node["ignored"]}
    assert stub_page.browser.find_element(By.ID, "h-models").is_displayed() is False


# Models and their runners


@pytest.mark.parametrize(
    "state, words, colour",
    [
        ("loading", "loading", "work"),
        ("idle", "loaded, idle", "good"),
        ("busy", "busy, 31.2 tokens/s", "work"),
        ("unwatched", "busy; its progress cannot be seen", "work"),
        ("stuck", "stuck since", "bad"),
        ("silent", "silent since", "bad"),
        ("ghost", "ghost since", "bad"),
        ("orphan", "orphan since", "warn"),
    ],
)
def test_each_state_has_its_word_and_colour(stub, stub_page, state, words, colour):
    stub.models = [model(LLAMA, share=0.615)]
    stub.stats["runners"] = [runner(LLAMA, state, 12, 31.2)]
    stub_page.poll()
    said, classes = stub_page.state(LLAMA)
    assert said.startswith(words) and colour in classes.split()
    row = stub_page.row_text("models", LLAMA)
    assert "3.0 GB on the GPU (61 %)" in row and "stays loaded" in row


def test_a_runner_whose_model_is_gone_shows_too(stub, stub_page):
    stub.stats["runners"] = [runner(None, "orphan", 12, pid=77)]
    stub_page.poll()
    assert "unknown model, process 77" in stub_page.row_text("models", "77")
    assert stub_page.row("models", "77").find_elements(By.TAG_NAME, "button") == []


def test_a_copy_of_a_loaded_model_is_not_shown_as_loaded(stub, stub_page):
    copy = {**model("copy:latest", share=1), "loaded_as": LLAMA}
    stub.models = [model(LLAMA, share=1), copy]
    stub.stats["runners"] = [runner(LLAMA, "idle")]
    stub_page.poll()
    words, classes = stub_page.state("copy:latest")
    assert words == f"in memory as {LLAMA}, which has the same files"
    assert "off" in classes
    assert stub_page.buttons("models", "copy:latest") == ["Try"]
    assert "Unload" in stub_page.buttons("models", LLAMA)
    assert "GPU" not in stub_page.row_text("models", "copy:latest")


def test_a_version_that_an_update_has_replaced_is_told_while_it_is_in_memory(stub, stub_page):
    stub.models = [{**model(LLAMA, share=1), "loaded_digest": "digest of another"}]
    stub.stats["runners"] = [runner(LLAMA, "idle")]
    stub_page.poll()
    words = "loaded, idle (its version from before the update)"
    assert stub_page.state(LLAMA)[0] == words
    stub.models[0]["loaded_digest"] = stub.models[0]["digest"]
    stub_page.poll()
    assert stub_page.state(LLAMA)[0] == "loaded, idle"


def test_a_models_memory_is_shown_where_it_lies(stub, stub_page):
    stub.models = [model(LLAMA, size=5_000_000_000, share=0.8), model("b", share=0)]
    stub.stats["runners"] = [runner(LLAMA, "idle"), runner("b", "idle", pid=7)]
    stub_page.poll()
    row = stub_page.row_text("models", LLAMA)
    assert "4.0 GB on the GPU (80 %)" in row and "537 MB of system memory" in row
    assert "on the GPU" not in stub_page.row_text("models", "b")


def test_the_context_of_a_model_before_and_after_its_load_are_not_mixed_up(stub, stub_page):
    stub.models = [model(LLAMA), model("b", share=1)]
    stub_page.poll()
    assert "context up to 131,072" in stub_page.row_text("models", LLAMA)
    assert "context 8,192 of 131,072" in stub_page.row_text("models", "b")


def test_stuck_ones_come_first_then_what_is_in_memory_then_the_rest_by_name(stub, stub_page):
    stub.models = [model(name) for name in ("m10", "m9", "a")]
    stub.models += [model("z", share=1), model("y", share=1), model("x", share=1)]
    runners = [runner("z", "idle", pid=1), runner("x", "stuck", 9, pid=3)]
    for state in ("idle", "busy"):  # which moves nothing
        stub.stats["runners"] = [*runners, runner("y", state, pid=2)]
        stub_page.poll()
        order = [row.get_attribute("data-key") for row in stub_page.rows_of("models")]
        assert order == ["x", "y", "z", "a", "m9", "m10"]


def test_from_ten_models_on_there_is_a_filter_that_hides_no_fault(stub, stub_page):
    stub.models = [model(f"model-{n}") for n in range(9)]
    stub_page.poll()
    assert not stub_page.element("filter").is_displayed()
    stub.models += [model("llava"), model("hung", share=1)]
    stub.stats["runners"] = [runner("hung", "stuck", 9)]
    stub_page.poll()
    stub_page.element("filter").send_keys("LLAVA")
    wait_for(lambda: len(stub_page.rows_of("models")) == 2, 30, "the filter")
    assert stub_page.row("models", "llava") and stub_page.row("models", "hung")
    assert stub_page.text("model-count") == "2 of 11 models"
    stub_page.poll()
    assert len(stub_page.rows_of("models")) == 2


def test_load_asks_nothing_and_says_what_came_of_it(stub, stub_page):
    stub.models = [model(LLAMA)]
    loading = {"status": "accepted", "model": LLAMA, "model_state": "loading"}
    stub.answers["POST", "/api/models/load"] = {**loading, "http_status": 202}
    stub_page.poll()
    stub_page.press("models", LLAMA, "Load")
    stub_page.wait_text("messages", f"{LLAMA} is being loaded.")
    assert stub.sent == [("POST", "/api/models/load", {"model": LLAMA})]


def test_the_outcome_of_a_load_is_told_in_the_words_of_its_code(stub, stub_page):
    stub.models = [model(LLAMA)]
    loading = {"status": "accepted", "model": LLAMA, "model_state": "loading"}
    stub.answers["POST", "/api/models/load"] = {**loading, "http_status": 202}
    said = 'EOF: POST /api/models/pull with "verify": true checks its files.'
    failed = {"state": "failed", "code": "model_damaged", "error": said}
    for outcome, words in (
        ({"state": "loaded", "code": None, "error": None}, f"{LLAMA} is loaded."),
        (failed, f"{LLAMA} was not loaded: A file of this model is damaged."),
    ):
        stub.health["load"] = {"model": LLAMA, "state": "loading", "error": None, "code": None}
        stub_page.poll()
        stub_page.press("models", LLAMA, "Load")
        stub_page.wait_text("messages", "is being loaded.")
        stub_page.next_rounds()
        stub.health["load"] = {"model": LLAMA, **outcome}
        stub_page.wait_text("messages", words)
    stub.health["warnings"] = [{"code": "load_failed", "message": f"{LLAMA} did not load: {said}"}]
    stub_page.poll()
    assert stub_page.text("warnings").startswith(f"{LLAMA} was not loaded: A file of this model")
    assert "POST" not in stub_page.run("return document.body.innerText")  # it is in a fold


def test_an_act_that_gets_no_answer_is_not_told_as_not_done(stub, stub_page):
    stub.models = [model(LLAMA)]
    stub_page.poll()
    stub.hung.set()
    stub_page.press("models", LLAMA, "Load")
    stub_page.wait_text("messages", "did not answer in time. It may still do what was asked.")
    stub.hung.clear()


def test_verbs_stand_on_the_buttons_of_a_question(stub, stub_page):
    stub.models = [{**model(LLAMA, share=1), "frees_bytes": 4_700_000_000}]
    stub_page.poll()
    stub_page.press("models", LLAMA, "Delete")
    wait_for(lambda: stub_page.text("ask-yes") == "Delete, frees 4.7 GB", 30, "the verb")
    stub_page.answer("ask-no")
    stub_page.press("models", LLAMA, "Unload")
    wait_for(lambda: stub_page.text("ask-yes") == "Unload", 30, "the verb")
    stub_page.answer("ask-no")
    assert stub.sent == []


# Checking files, and updates


def test_check_files_reads_and_changes_nothing(stub, stub_page):
    stub.models = [model(LLAMA)]
    done = {"name": LLAMA, "ok": True, "damaged": [], "missing": []}
    lines = [{"status": "verifying", "percent": 40.0}, {"status": "success", "models": [done]}]
    stub.answers["POST", "/api/models/verify"] = lines
    stub_page.poll()
    stub_page.press("models", LLAMA, "Check files")
    stub_page.wait_text("messages", f"The files of {LLAMA} are whole.")
    assert stub.sent == [("POST", "/api/models/verify", {"model": LLAMA})]


def test_a_check_shows_how_far_it_is_and_is_stopped(stub, stub_page):
    stub.models = [model(LLAMA)]
    lines = [{"status": "checking", "percent": 40 + n / 10} for n in range(600)]
    stub.answers["POST", "/api/models/verify"], stub.slow_lines_s = lines, 0.1
    stub_page.poll()
    stub_page.press("models", LLAMA, "Check files")

    def percent():
        row = stub_page.row_text("pulls", f"check {LLAMA}")
        told = re.search(r"the files are read · ([\d.]+)", row)
        return float(told[1]) if told else 0

    first = wait_for(lambda: percent() >= 40 and percent(), 30, "how far it is")
    wait_for(lambda: percent() > first, 30, "that it is further")
    stub_page.poll()  # which leaves it there
    stub_page.press("pulls", f"check {LLAMA}", "Stop")
    stub_page.wait_no_row("pulls", f"check {LLAMA}")
    stub_page.wait_text("messages", f"Check files {LLAMA}: stopped.")
    left = ("LEFT", "/api/models/verify", None)
    wait_for(lambda: left in stub.sent, 30, "the end of the connection")


def test_damaged_files_are_told_and_repaired_only_when_asked_for(stub, stub_page):
    stub.models = [model(LLAMA)]
    bad = {"name": LLAMA, "ok": False, "damaged": ["sha256-1"], "missing": ["a", "b"]}
    stub.answers["POST", "/api/models/verify"] = [{"status": "success", "models": [bad]}]
    stub_page.poll()
    stub_page.press("models", LLAMA, "Check files")
    stub_page.wait_text("messages", f"{LLAMA}: 1 file damaged, 2 files missing.")
    stub.sent.clear()
    stub_page.element("messages").find_element(By.CSS_SELECTOR, "[aria-label^=Repair]").click()
    stub_page.answer("ask-yes")
    body = {"model": LLAMA, "verify": True, "detach": True}
    wait_for(lambda: stub.sent == [("POST", "/api/models/pull", body)], 30, "the repair")


def test_an_update_says_what_it_fetches(stub, stub_page):
    stub.models = [model(LLAMA), model("b"), model("c")]
    newer = {"name": LLAMA, "state": "newer", "download_bytes": 1_200_000_000}
    current = {"name": "b", "state": "current", "download_bytes": 0}
    reason = "Its registry does not know this name."
    unknown = {"name": "c", "state": "unknown", "code": "not_in_registry", "reason": reason}
    stub.updates = [newer, current, unknown]
    stub_page.poll()
    stub_page.element("list-actions").find_element(By.TAG_NAME, "button").click()
    stub_page.wait_text("messages", "1 model can be updated. Of 1 model it is not known.")
    assert stub_page.element("messages").find_elements(By.CLASS_NAME, "warn")
    stub_page.wait_row("models", LLAMA, "the registry has a newer one: 1.2 GB to fetch")
    stub_page.wait_row("models", "b", "is the registry's newest, asked at ")
    stub_page.wait_row("models", "c", reason)
    stub_page.press("models", LLAMA, "Update, fetches 1.2 GB")
    stub_page.answer("ask-yes")
    body = {"model": LLAMA, "detach": True}
    wait_for(lambda: stub.sent == [("POST", "/api/models/pull", body)], 30, "the download")
    stub_page.wait_text("messages", "is under way")
    stub_page.press("models", "c", "Update")
    stub_page.wait_text("messages", f"c was not updated: {reason}")
    assert len(stub.sent) == 1


def test_what_no_registry_told_is_no_newest_version(stub, stub_page):
    stub.models = [model(LLAMA)]
    told = {"name": LLAMA, "state": "unknown", "code": "registry_unreachable", "reason": "No."}
    stub.updates = [told]
    stub_page.poll()
    stub_page.element("list-actions").find_element(By.TAG_NAME, "button").click()
    words = "No newer version was found. Of 1 model it is not known."
    stub_page.wait_text("messages", words)
    assert stub_page.element("messages").find_elements(By.CLASS_NAME, "warn")


def test_what_was_told_of_a_version_is_void_once_another_one_is_here(stub, stub_page):
    stub.models = [model(LLAMA)]
    stub.updates = [{"name": LLAMA, "state": "newer", "download_bytes": 1_200_000_000}]
    stub_page.poll()
    stub_page.element("list-actions").find_element(By.TAG_NAME, "button").click()
    stub_page.wait_row("models", LLAMA, "the registry has a newer one")
    stub.models = [{**model(LLAMA), "digest": "of what another tab has fetched"}]
    stub_page.poll()
    assert "newer" not in stub_page.row_text("models", LLAMA)
    assert "Update, fetches" not in stub_page.row_text("models", LLAMA)


def test_a_question_that_is_answered_by_no_leaves_no_message_of_what_it_was_for(stub, stub_page):
    stub.models = [model(LLAMA)]
    stub.updates = [{"name": LLAMA, "state": "newer", "download_bytes": 1_200_000_000}]
    stub_page.poll()
    stub_page.press("models", LLAMA, "Update")
    stub_page.answer("ask-no")
    assert stub_page.text("messages") == ""
    assert stub.sent == []


def test_a_model_made_here_is_not_replaced_without_a_warning(stub, stub_page):
    stub.models = [model(LLAMA)]
    told = {"name": LLAMA, "state": "unknown", "made_here": True, "code": "made_here"}
    stub.updates = [{**told, "reason": "Made here.", "download_bytes": 4_900_000_000}]
    stub_page.poll()
    stub_page.press("models", LLAMA, "Update")
    stub_page.wait_text("ask-text", f"{LLAMA} was made on this machine.")
    assert stub_page.text("ask-yes") == "Replace it, fetches 4.9 GB"
    stub_page.answer("ask-no")
    assert stub.sent == []


# Downloads


def test_ended_downloads_are_folded_and_each_has_what_can_be_done(stub, stub_page):
    stub.pulls = [
        pull("a", "cancelled", code="cancelled", error="By request.", kept_bytes=2_000_000_000),
        pull("b", "error", code="registry_unreachable", error="dial tcp: no such host."),
        pull("c", "error", code="parts_damaged", error="remove x-partial-0: no such file."),
        pull("d", "success", percent=100),
    ]
    stub_page.poll()
    assert stub_page.text("ended-count") == "Ended downloads: 4, of which 2 failed"
    assert not stub_page.element("ended").get_attribute("open")
    stub_page.click("ended-count")
    buttons = {name: stub_page.buttons("ended-pulls", name) for name in "abcd"}
    assert buttons["a"] == ["Resume", "Remove parts", "Dismiss"]
    assert buttons["b"] == ["Retry", "Dismiss"]
    assert buttons["c"] == ["Remove parts", "Dismiss"]
    assert buttons["d"] == ["Dismiss"]
    assert "Cancelled. 2.0 GB of it are kept." in stub_page.row_text("ended-pulls", "a")
    assert "The registry does not answer. Check" in stub_page.row_text("ended-pulls", "b")
    assert "dial tcp" not in stub_page.row_text("ended-pulls", "b")  # it is in a fold


def test_a_download_is_resumed_its_parts_removed_and_its_row_dismissed(stub, stub_page):
    kept = {"code": "cancelled", "kept_bytes": 7_000_000}
    stub.pulls = [pull("a", "cancelled", **kept), pull("b", "cancelled", **kept)]
    stub_page.poll()
    stub_page.click("ended-count")
    stub_page.press("ended-pulls", "a", "Resume")
    body = {"model": "a", "insecure": False, "detach": True}
    wait_for(lambda: stub.sent == [("POST", "/api/models/pull", body)], 30, "the download")
    stub_page.wait_text("messages", "is under way")
    stub.answers["DELETE", "/api/models/pull"] = {"status": "success", "freed_bytes": 7_000_000}
    stub_page.press("ended-pulls", "b", "Remove parts")
    wait_for(lambda: stub_page.text("ask-yes") == "Remove parts, frees 7.0 MB", 30, "the verb")
    stub.pulls[1] |= {"kept_bytes": 0}
    stub_page.answer("ask-yes")
    stub_page.wait_text("messages", "The parts of b are removed: 7.0 MB came free.")
    stub_page.next_rounds()
    assert stub_page.buttons("ended-pulls", "b") == ["Retry", "Dismiss"]
    assert "kept" not in stub_page.row_text("ended-pulls", "b")
    assert stub_page.focused() == "Retry the download of b"
    assert stub.sent[-1] == ("DELETE", "/api/models/pull", {"model": "b", "purge": True})
    stub_page.press("ended-pulls", "a", "Dismiss")
    stub_page.wait_no_row("ended-pulls", "a")
    stub_page.open()
    stub_page.wait_text("ended-count", "Ended downloads: 1")


def test_a_registry_without_tls_is_used_only_after_a_warning(stub, stub_page):
    stub.pulls = [pull("localhost:5000/a", "error", code="registry_insecure", error="http: no.")]
    stub_page.poll()
    stub_page.click("ended-count")
    row = stub_page.row_text("ended-pulls", "localhost:5000/a")
    assert "This registry has no TLS" in row and "insecure" not in row
    stub_page.press("ended-pulls", "localhost:5000/a", "Download without TLS")
    stub_page.wait_text("ask-text", "can read and change it")
    stub_page.answer("ask-yes")
    body = {"model": "localhost:5000/a", "insecure": True, "detach": True}
    wait_for(lambda: stub.sent == [("POST", "/api/models/pull", body)], 30, "the download")


def test_the_end_of_a_download_is_announced(stub, stub_page):
    for state, words in (
        ("success", "a is downloaded, 4.9 GB."),
        ("error", "The download of a failed: The disk is full."),
    ):
        stub.pulls = [pull("a")]
        stub_page.poll()
        stub.pulls = [pull("a", state, code="disk_full", error="no space left", ended_at=state)]
        stub_page.poll()
        stub_page.wait_text("messages", words)
    assert stub_page.element("ended").get_attribute("open")


def test_a_percentage_is_never_rounded_up_to_the_end(stub, stub_page):
    stub.pulls = [pull("a", percent=99.97)]
    stub_page.poll()
    assert "99.9 %" in stub_page.row_text("pulls", "a")


def test_a_download_of_which_nothing_is_known_shows_no_zeros(stub, stub_page):
    stub.pulls = [pull("a", percent=0.0, completed_bytes=0, total_bytes=0, bytes_per_second=0)]
    stub.pulls[0] |= {"status": "pulling manifest", "eta_seconds": None}
    assert not stub_page.element("under-way").is_displayed()
    stub_page.poll()
    assert "0 MB" not in stub_page.row_text("pulls", "a")
    assert stub_page.text("under-way") == "Under way"


def test_what_the_service_said_of_a_failure_is_in_a_fold(stub, stub_page):
    stub.pulls = [pull("a")]
    stub_page.poll()
    said = 'tls: first record: send "insecure": true'
    stub.pulls = [pull("a", "error", code="registry_insecure", error=said, ended_at="now")]
    stub_page.poll()
    stub_page.wait_text("messages", "This registry has no TLS")
    assert "insecure" not in stub_page.text("messages")
    stub_page.element("messages").find_element(By.TAG_NAME, "summary").click()
    stub_page.wait_text("messages", said)


def test_models_to_begin_with_say_how_large_they_are_once_that_is_asked_for(stub, stub_page):
    unknown = {"description": "d", "vram_bytes": 12_000_000_000, "size_bytes": None}
    unknown |= {"download_bytes": None, "code": None, "reason": None}
    stub.recommended += [{"name": name, **unknown} for name in ("a", "b")]
    stub_page.open_anew()
    stub_page.wait_row("suggestions", "llama3.1:8b", "about 4.9 GB to fetch")
    stub_page.wait_row("suggestions", "a", "size not asked for")
    asked = "/api/models/recommendations?sizes=true"
    assert not stub.polled[asked]
    stub.recommended[2] |= {"size_bytes": 9_600_000_000, "download_bytes": 9_600_000_000}
    stub.recommended[3] |= {"code": "registry_unreachable", "reason": "no such host"}
    stub_page.element("suggested").find_element(By.XPATH, "./button").click()
    stub_page.wait_row("suggestions", "a", "9.6 GB to fetch")
    stub_page.wait_row("suggestions", "b", "size not known")
    words = "Of 1 model the size is not known: The registry does not answer."
    stub_page.wait_text("messages", words)
    assert stub.polled[asked] == 1


def test_models_to_begin_with_tell_what_is_here_and_what_has_no_room(stub, stub_page):
    stub_page.open_anew()
    stub_page.wait_row("suggestions", "llama3.1:8b", "needs about 6.9 GB of memory · fits")
    assert stub_page.buttons("suggestions", "llama3.1:8b") == ["Download"]
    stub.models, stub.pulls = [model(LLAMA)], [pull("LLAMA3.2:1b")]
    stub.stats["disk"]["free_bytes"] = 5_500_000_000
    stub_page.poll()
    rows = [stub_page.row_text("suggestions", name) for name in ("llama3.1:8b", "llama3.2:1b")]
    assert rows[0].endswith("fits · is on the disk")
    assert rows[1].endswith("fits · is being downloaded")
    assert "fetch" not in "".join(rows)
    assert stub_page.buttons("suggestions", "llama3.1:8b") == []
    stub.models = []
    stub_page.poll()
    row = stub_page.row_text("suggestions", "llama3.1:8b")
    assert "about 4.9 GB to fetch · too large for the disk, which has 5.5 GB free" in row


def test_a_list_of_models_to_begin_with_that_does_not_come_is_asked_for_again(stub, stub_page):
    failed = {"error": "Not there.", "code": "ollama_unreachable"}
    stub.answers["GET", "/api/models/recommendations"] = failed
    stub_page.open_anew()
    stub_page.wait_text("rests-on", "The list of them is not known")
    stub.answers.clear()
    fold = stub_page.element("suggested").find_element(By.TAG_NAME, "summary")
    fold.click()
    fold.click()
    stub_page.wait_row("suggestions", "llama3.1:8b", "fits")


def test_models_to_begin_with_say_whether_they_fit_and_by_what(stub, stub_page):
    stub.recommended = [
        {"name": "small", "description": "Small", "vram_bytes": 12_000_000_000},
        {"name": "large", "description": "Large", "vram_bytes": 100_000_000_000},
    ]
    stub.stats |= gpu_stats(*H100[10], gpus=2)
    stub_page.open_anew()
    stub_page.wait_row("suggestions", "small", "needs about 12 GB of memory · fits")
    stub_page.wait_row("suggestions", "large", "does not fit")
    stub_page.wait_text("rests-on", "the memory of the largest GPU as measured: 86 GB")
    stub_page.press("suggestions", "small", "Download")
    body = {"model": "small", "detach": True}
    wait_for(lambda: stub.sent == [("POST", "/api/models/pull", body)], 30, "the download")


# The machine


def test_each_gpu_has_figures_of_its_own(stub, stub_page):
    stub.stats |= gpu_stats(*H100[10], gpus=4)
    stub.stats["gpus"][1]["memory_used_mb"] = 81_000
    stub.stats["gpus"][2]["temperature_c"] = None
    stub_page.poll()
    full = stub_page.row_text("gpus", "GPU-1")
    assert full.startswith("GPU 1 · NVIDIA H100 80GB HBM3") and "85 GB of 86 GB" in full
    assert "19 GB of 86 GB" in stub_page.row_text("gpus", "GPU-0")
    assert "°C" not in stub_page.row_text("gpus", "GPU-2")
    meters = {key: stub_page.meter("gpus", key, "memory") for key in ("GPU-0", "GPU-1")}
    assert meters["GPU-1"]["value"] > meters["GPU-1"]["high"]
    assert meters["GPU-0"]["value"] < meters["GPU-0"]["low"]


@pytest.mark.parametrize(
    "state, words",
    [
        ("none", "No GPU: models run on the CPU."),
        ("unified", "The GPU shares the system's memory."),
        ("lost", "The GPU is lost"),
        ("driver_mismatch", "The GPU's driver was updated under it"),
        ("no_permission", "The GPU may not be read"),
        ("unresponsive", "The GPU's driver does not answer"),
        ("slow", "The GPU's driver is slow to answer"),
        ("unknown", "The GPU's figures are not known."),
    ],
)
def test_what_there_is_of_gpus_is_said_in_words(stub, stub_page, state, words):
    stub.stats["gpu"] = state
    stub.health["gpu"] = state
    stub_page.poll()
    assert words in stub_page.text("gpu-state")
    calm = state in ("none", "unified", "no_permission", "unknown")
    assert (words in stub_page.text("state")) != calm


def test_what_a_gpu_does_not_tell_is_no_idle_gpu(stub, stub_page):
    stub.models = [model(LLAMA, share=1)]
    stub.stats |= gpu_stats(*H100[10], gpus=2)
    stub.stats["gpus"][1] |= {"utilization_percent": None, "memory_used_mb": None}
    stub_page.poll()
    assert "load not known · memory not known" in stub_page.row_text("gpus", "GPU-1")
    assert "not known" not in stub_page.row_text("gpus", "GPU-0")
    assert "4.9 GB on the GPUs (100 %)" in stub_page.row_text("models", LLAMA)
    stub.stats["gpu"] = "unified"  # where the system tells the memory
    stub_page.poll()
    assert "memory not known" not in stub_page.row_text("gpus", "GPU-1")
    stub.stats["cpu_percent"] = None
    stub_page.poll()
    assert stub_page.row("meters", "load") is None


def test_a_disk_that_is_almost_full_is_not_green(stub, stub_page):
    stub.stats["disk"] |= {"total_bytes": 3_840_000_000_000, "unused_bytes": 4096}
    stub_page.poll()
    assert "3.8 TB of 3.8 TB, 76 GB free" in stub_page.row_text("meters", "disk")
    assert "files that no model uses under 0.1 MB" in stub_page.text("disk")
    stub.stats["disk"] |= {"total_bytes": 270_553_174_016}
    stub_page.poll()
    assert "194 GB of 271 GB, 76 GB free" in stub_page.row_text("meters", "disk")
    meter = stub_page.meter("meters", "disk")
    assert meter["value"] < meter["low"]
    warning = {"code": "disk_low", "message": "The disk is almost full: delete a model."}
    stub.health["warnings"] = [warning]
    stub_page.poll()
    meter = stub_page.meter("meters", "disk low")
    assert meter["value"] > meter["high"]
    assert "almost full" in stub_page.row_text("meters", "disk low")


def test_one_unit_everywhere(stub, stub_page):
    stub.models = [model(LLAMA, share=1)]
    stub.stats |= gpu_stats(*H100[10])
    stub.stats["runners"] = [runner(LLAMA, "idle")]
    stub.pulls = [pull("a")]
    cleared = {"status": "success", "unloaded_models": ["a"], "killed": []}
    cleared |= {"memory": {"freed_mb": 5120}, "message": "Cache cleared: 5120 MB came free."}
    stub.answers["POST", "/api/cache/clear"] = cleared
    stub_page.poll()
    stub_page.click("clear")
    stub_page.answer("ask-yes")
    stub_page.wait_text("messages", "1 model unloaded, 5.4 GB came free")
    seen = stub_page.run("return document.body.innerText")
    assert "GB" in seen and not re.search(r"\b([KMGT]iB|[kKT]B|bytes)\b", seen)


# The last hour


def test_the_last_hour_is_drawn_as_the_service_has_it(stub, stub_page):
    samples = [[load, used, load] for load, used, *_ in H100]
    stub.stats |= gpu_stats(*H100[10])
    stub.history = history(["cpu_percent", "gpu0_memory_mb", "gpu0_percent"], samples)
    stub_page.open_anew()
    wait_for(lambda: stub_page.charts() == ["load", "vram", "cpu"], 30, "the charts")
    (points,) = stub_page.curve("load")
    assert [100 - y for _, y in points] == [load for load, *_ in H100]
    assert points[-1][0] == 600 and points[0][0] == pytest.approx(600 - 35 / 6 * 10, abs=1)
    assert "\n0 MB" in stub_page.row_text("charts", "vram")
    full = max(100 - y for line in stub_page.curve("vram") for _, y in line)
    assert full == pytest.approx(100 * 18269 / H100_TOTAL_MB, abs=1)  # of the GPU's memory


def test_a_gap_is_no_line_and_a_value_that_is_not_known_is_no_zero(stub, stub_page):
    stub.history = history(["cpu_percent"], [[5]] * 10 + [[None]] * 10 + [[7]] * 10)
    stub_page.open_anew()
    wait_for(lambda: stub_page.charts() == ["cpu"], 30, "the chart")
    assert [len(line) for line in stub_page.curve("cpu")] == [10, 10]
    stub.history["samples"][-1][1] = None
    stub_page.open_anew()
    stub_page.wait_row("charts", "cpu", "not known")


def test_what_happened_stands_in_words_and_in_the_charts(stub, stub_page):
    healed = {
        "what": LLAMA,
        "why": "stuck: for 20 s, counters (1, 2)",
        "state": "stuck",
        "freed_mb": 512,
        "ok": True,
    }
    stub.history = history(["cpu_percent"], [[1]] * 300)
    stub.history["marks"] = [
        {"at": iso(900), "kind": "healed", **healed},
        {"at": iso(1800), "kind": "reset", "freed_mb": None},
        {"at": iso(2000), "kind": "restarted"},
    ]
    stub_page.open_anew()
    stub_page.wait_text("marks", f"Healed: {LLAMA} (stuck): 537 MB came free.")
    assert re.search(r"2 · \d\d:\d\d:\d\d Session reset\.", stub_page.text("marks"))
    assert re.search(r"1 · \d\d:\d\d:\d\d Ollama restarted\.", stub_page.text("marks"))
    places = [float(x.rstrip("%")) for x in stub_page.drawn("cpu", "line.mark", "x1")]
    assert places[:2] == [pytest.approx(75, abs=1), pytest.approx(50, abs=1)]


def test_what_was_before_the_service_has_started_is_not_told_as_nothing(stub, stub_page):
    stub.history = history(["cpu_percent"], [[1]] * 30)
    stub_page.open_anew()
    stub_page.wait_text("marks", "Nothing was healed, cleared, reset or restarted since ")
    stub.history = history(["cpu_percent"], [[1]] * 360)
    stub_page.open_anew()
    stub_page.wait_text("marks", "Nothing was healed, cleared, reset or restarted in the last hour")


def test_the_numbers_of_marks_do_not_lie_on_each_other(stub, stub_page):
    stub.history = history(["cpu_percent"], [[1]] * 300)
    marks = [(900, "cleared"), (1790, "restarted"), (1795, "cleared"), (1800, "reset")]
    stub.history["marks"] = [{"at": iso(seconds), "kind": kind} for seconds, kind in marks]
    stub_page.resize(390)
    stub_page.open_anew()
    stub_page.wait_text("marks", "4 · ")
    numbers = "return [...document.querySelectorAll('#axis .mark')].map((each) => each.textContent)"
    assert stub_page.run(numbers) == ["4", "1–3"]


def test_an_hour_that_is_old_does_not_end_now(stub, stub_page):
    stub.history = history(["cpu_percent"], [[1]] * 300)
    stub_page.open_anew()
    wait_for(lambda: stub_page.charts() == ["cpu"], 30, "the chart")
    ends = "return document.getElementById('axis').textContent"
    assert stub_page.run(ends) == "1 h agonow"
    stub.hung.set()
    wait_for(lambda: re.fullmatch(r"(\d\d:\d\d:\d\d){2}", stub_page.run(ends)), 60, "the times")


def test_a_healing_that_failed_is_not_told_as_one(stub, stub_page):
    stub.history = history(["cpu_percent"], [[1]] * 10)
    mark = {"at": iso(50), "kind": "healed", "what": "Ollama", "freed_mb": 0, "ok": False}
    stub.history["marks"] = [mark]
    stub_page.open_anew()
    stub_page.wait_text("marks", "Healing failed: Ollama.")


def test_values_show_under_the_pointer_and_in_a_table(stub, stub_page):
    stub.history = history(["cpu_percent"], [[n % 100] for n in range(360)])
    stub_page.open_anew()
    wait_for(lambda: stub_page.charts() == ["cpu"], 30, "the chart")
    move = """const chart = document.querySelector("#charts .chart");
        const { left, width } = chart.getBoundingClientRect();
        chart.dispatchEvent(new PointerEvent("pointermove", { clientX: left + width / 2 }))"""
    stub_page.run(move)
    value = wait_for(
        lambda: re.search(r"\d\d:\d\d:\d\d (\d+) %", stub_page.row_text("charts", "cpu")),
        30,
        "the value under the pointer",
    )
    assert int(value[1]) == pytest.approx(80, abs=2)  # half an hour ago
    stub_page.element("values").find_element(By.TAG_NAME, "summary").click()

    def table():  # each round makes it anew
        rows = stub_page.element("values").find_elements(By.CSS_SELECTOR, "tr")
        return [row.text for row in rows]

    rows = wait_for(table, 30, "the table")
    assert rows[0] == "From CPU load" and len(rows) in (13, 14)
    assert re.fullmatch(r"\d\d:\d\d \d+ %", rows[2])


def test_of_several_gpus_each_value_stays_with_its_number(stub, stub_page):
    for gpus, head, figure in (
        (1, "From GPU load GPU memory", "38\u00a0%"),
        (
            2,
            "From GPU 0 load GPU 1 load GPU 0 memory GPU 1 memory",
            "0:\u00a038\u00a0%, 1:\u00a038\u00a0%",
        ),
    ):
        series = [f"gpu{n}_{what}" for n in range(gpus) for what in ("percent", "memory_mb")]
        stub.stats |= gpu_stats(*H100[10], gpus=gpus)
        stub.history = history(series, [[38, 18269] * gpus] * 5)
        stub_page.open_anew()
        wait_for(lambda: stub_page.charts() == ["load", "vram"], 30, "the charts")
        shown = "return document.querySelector('#charts [data-key=load] b').textContent"
        assert stub_page.run(shown) == figure
        stub_page.element("values").find_element(By.TAG_NAME, "summary").click()
        stub_page.wait_text("values", head)


# Messages, focus, scroll


def test_a_message_moves_nothing_and_can_be_dismissed(stub, stub_page):
    stub.models = [model(f"m{n}") for n in range(30)]
    stub_page.resize(390, 800)
    stub_page.poll()
    stub_page.run("scrollTo(0, 1200)")
    before = stub_page.run("return [scrollY, document.querySelector('h2').offsetTop]")
    stub_page.run("document.getElementById('clear').click()")
    stub_page.answer("ask-yes")
    stub_page.wait_text("messages", "The memory is cleared")
    after = stub_page.run("return [scrollY, document.querySelector('h2').offsetTop]")
    assert after == before
    stub_page.element("messages").find_element(By.TAG_NAME, "button").click()
    wait_for(lambda: not stub_page.element("messages").is_displayed(), 30, "the end of it")
    assert stub_page.run("return scrollY") == before[0]


def test_cancel_keeps_the_focus_on_the_page_also_on_a_phone(stub, stub_page):
    stub.models = [model(f"m{n}") for n in range(12)]
    stub.pulls = [pull("a")]
    stub_page.resize(390, 800)
    stub_page.run("document.getElementById('suggested').open = false")
    stub_page.poll()
    cancel = stub_page.row("pulls", "a").find_element(By.TAG_NAME, "button")
    cancel.send_keys(Keys.ENTER)
    wait_for(lambda: stub.sent, 30, "the request")
    stub.pulls = [pull("a", "cancelled", code="cancelled")]
    stub_page.poll()
    assert stub_page.focused() == "h-models"
    assert stub_page.run("return scrollY") < 400


def test_the_focus_goes_from_load_to_unload_when_they_change_places(stub, stub_page):
    stub.models = [model("a")]
    stub_page.poll()
    stub_page.focus("a", "Load")
    stub.models = [model("a", share=1)]
    stub_page.poll()
    assert stub_page.focused() == "Unload a"
    stub.models = [model("a")]
    stub_page.poll()
    assert stub_page.focused() == "Load a"


def test_the_focus_stays_when_rows_change_places(stub, stub_page):
    stub.models = [model(name) for name in ("a", "b", "c")]
    stub_page.poll()
    stub_page.focus("c", "Try")
    stub.models = [model("a"), model("b"), model("c", share=1)]
    stub.stats["runners"] = [runner("c", "stuck", 3)]
    stub_page.poll()
    assert [row.get_attribute("data-key") for row in stub_page.rows_of("models")][0] == "c"
    assert stub_page.focused() == "Try c"


def test_the_focus_finds_a_place_when_its_own_row_goes(stub, stub_page):
    stub.models = [model(name) for name in ("a", "b", "c")]
    stub_page.poll()
    stub_page.focus("b", "Delete")
    stub.models = [model(name) for name in ("new", "b", "c")]
    stub_page.poll()
    assert stub_page.focused() == "Delete b"
    stub.models = [model("c")]
    stub_page.poll()
    assert stub_page.focused() == "h-models"


def test_the_focus_finds_a_place_when_the_button_of_the_head_goes(stub, stub_page):
    stub.models = [model("a")]
    stub.health |= {"status": "unhealthy", "code": "ollama_hung", "reason": "It hangs."}
    stub.health["recommended_action"] = "reset_session"
    stub_page.poll()
    stub_page.run("document.querySelector('#advice button').focus()")
    stub.health = {"status": "healthy", "gpu": "none", "recommended_action": "none"}
    stub_page.poll()
    stub_page.poll()  # a fault of the page's own would be told now
    assert stub_page.text("state") == "The service works."
    assert stub_page.focused() == "h-models"


def test_a_question_is_asked_and_answered_by_keys_alone(stub, stub_page):
    stub.models = [model("a", share=1)]
    stub_page.poll()
    for label, path in (("Unload", "/api/cache/clear"), ("Delete", "/api/models/delete")):
        stub_page.focus("a", label).send_keys(Keys.ENTER)
        wait_for(lambda: stub_page.focused() == "ask-no", 30, "the question")
        stub_page.browser.switch_to.active_element.send_keys(Keys.ESCAPE)
        wait_for(lambda what=label: stub_page.focused() == f"{what} a", 30, "the focus is back")
        stub_page.settle()
        assert stub.sent == []
        stub_page.browser.switch_to.active_element.send_keys(Keys.ENTER)
        wait_for(lambda: stub_page.focused() == "ask-no", 30, "the question")
        stub_page.element("ask-yes").send_keys(Keys.ENTER)
        wait_for(lambda: stub.sent, 30, "the request")
        assert stub.sent.pop()[1:] == (path, {"model": "a"})
        wait_for(lambda what=label: stub_page.focused() == f"{what} a", 30, "the focus is back")


def test_whatever_is_there_has_a_role_and_a_name(stub, stub_page):
    stub.models = [model("a", share=1)]
    stub.stats |= gpu_stats(*H100[10])
    stub.history = history(["gpu0_percent"], [[38]] * 5)
    stub.pulls = [pull("b")]
    stub_page.open_anew()
    wait_for(lambda: stub_page.charts() == ["load"], 30, "the chart")
    tree = stub_page.browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    named = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in tree
        if not node["ignored"]
    ]
    need_names = ("button", "image", "meter", "progressbar", "ProgressIndicator", "textbox", "log")
    assert not [role for role, name in named if role in need_names and not name]
    assert ("image", "GPU load: 38\u00a0%, in the last hour at most 38\u00a0%") in named
    assert ("button", "Unload a") in named and ("textbox", "Download a model") in named
    assert ("log", "What happened in the last hour") in named
    assert {role for role, _ in named} >= {"status", "region", "heading", "list", "listitem"}


def test_whoever_speaks_the_words_on_a_button_presses_it(stub, stub_page):
    stub.models = [model("a", share=1), model("b")]
    stub.pulls = [pull("c"), pull("d", "cancelled", code="cancelled", kept_bytes=1)]
    stub.updates = [{"name": "b", "state": "newer", "download_bytes": 1_200_000_000}]
    stub_page.poll()
    stub_page.element("list-actions").find_element(By.TAG_NAME, "button").click()
    stub_page.wait_text("messages", "can be updated")
    stub_page.run("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    stub_page.poll()
    names = stub_page.run("""return [...document.querySelectorAll("button, summary")]
        .map((each) => [each.textContent, each.ariaLabel ?? each.textContent])""")
    assert ["Update, fetches 1.2\u00a0GB", "Update, fetches 1.2\u00a0GB b"] in names
    assert [name for name in names if not name[1].startswith(name[0])] == []


# A try


def test_a_try_says_when_nothing_comes_and_why_it_ended(stub, stub_page):
    stub.models = [model(LLAMA)]
    piece = {"model": LLAMA, "response": "One ", "done": False}
    said = "an error was encountered while running the model: unexpected EOF"
    lines = [piece, piece, {**piece, "response": ""}, {"error": said, "code": "answer_interrupted"}]
    stub.answers["POST", "/api/models/try"], stub.slow_lines_s = lines, 3.5
    stub_page.poll()
    stub_page.press("models", LLAMA, "Try")
    stub_page.element("try-prompt").send_keys("Count.")
    stub_page.click("try-ask")
    stub_page.wait_text("try-figures", "nothing has come for 3 s")
    stub_page.wait_text("try-figures", "The model's process ended in the middle of the answer.")
    assert stub_page.text("try-answer").strip() == "One One"
    assert stub_page.element("try-answer").get_attribute("aria-busy") == "false"
    stub_page.click("try-close")


# Sizes, colours, movement


BOXES = """return [...document.querySelectorAll("h1, h2, li, .meter, .meter *, button, svg, p")]
    .filter((each) => each.checkVisibility() && !each.closest(".chart > *"))
    .map((each) => [each.tagName, each.textContent.slice(0, 20).replace(/[0-9.]+/g, "#"),
      ...["x", "y", "height"].map((side) => each.getBoundingClientRect()[side])].join(" "))"""


def test_nothing_moves_and_a_selection_stays_while_figures_change(stub, stub_page):
    stub.models = [model(name, share=1) for name in (LLAMA, "gemma3:270m")]
    boxes = []
    for n, figures in enumerate(H100[3:12]):
        stub.stats |= gpu_stats(*figures)
        stub.stats["runners"] = [runner(LLAMA, "busy", n, 9.9 + 11 * n)]
        stub.stats["disk"]["free_bytes"] += 10_000_000_000 * (-1) ** n
        stub_page.poll(5)
        if n == 0:
            stub_page.run("""getSelection().selectAllChildren(
                document.querySelectorAll('#models .name')[1])""")
        boxes.append(stub_page.run(BOXES))
    assert [set(each) ^ set(boxes[0]) for each in boxes] == [set()] * len(boxes)
    assert stub_page.run("return getSelection().toString()").strip() == LLAMA


SHIFTS = """const done = arguments[0];
    let sum = 0;
    new PerformanceObserver((list) => { for (const { value } of list.getEntries()) sum += value; })
        .observe({ type: "layout-shift", buffered: true });
    setTimeout(() => done(sum), 1500)"""


@pytest.mark.parametrize("width", [390, 1440])
def test_what_comes_shifts_nothing(stub, stub_page, width):
    stub.models = [model(f"m{n}", share=1 if n < 2 else None) for n in range(12)]
    stub.stats |= gpu_stats(*H100[10], gpus=2)
    stub.history = history(["cpu_percent", "tokens_per_second"], [[1, 2]] * 100)
    stub.health["warnings"] = [{"code": "x", "message": "A warning, which takes a line."}]
    stub_page.resize(width)
    stub_page.open_anew()
    assert stub_page.browser.execute_async_script(SHIFTS) < 0.05


@pytest.mark.parametrize("width", [390, 1440])
def test_what_there_is_to_begin_with_shifts_nothing(stub, stub_page, width):
    stub.slow["/api/models/recommendations"] = 0.7
    stub_page.resize(width)
    stub_page.open_anew()
    wait_for(lambda: stub_page.rows_of("suggestions"), 30, "the models to begin with")
    assert stub_page.browser.execute_async_script(SHIFTS) < 0.05


NAMES = ("gemma3:270m", "hf.co/bartowski/Llama-3.2-1B-Instruct-GGUF:Q4_K_M", "llama3.1:8b")
# The lines in which a name is set, found by the height at which each of its letters stands.
LINES = """const lines = [], text = arguments[0].firstChild, range = document.createRange();
    for (let at = 0, last = null; at < text.length; at++) {
      range.setStart(text, at); range.setEnd(text, at + 1);
      const { top } = range.getBoundingClientRect();
      if (top !== last) lines.push("");
      lines[lines.length - 1] += text.data[at]; last = top; }
    return lines;"""


@pytest.mark.parametrize("gpu", [True, False], ids=["gpu", "no_gpu"])
@pytest.mark.parametrize("width", [390, 1440, 2560])
def test_it_fits_and_names_wrap_between_words(stub, stub_page, width, gpu):
    stub.models = [model(name, share=1) for name in NAMES]
    stub.stats["runners"] = [runner(name, "busy", 5, 131.5, pid=len(name)) for name in NAMES]
    stub.stats |= gpu_stats(*H100[10]) if gpu else {}
    stub_page.resize(width)
    stub_page.poll()
    wide = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert stub_page.run(wide) <= 0
    for name in NAMES:
        lines = stub_page.run(
            LINES, stub_page.row("models", name).find_element(By.CLASS_NAME, "name")
        )
        assert "".join(lines) == name
        assert all(line[-1] in "/-" for line in lines[:-1]), lines
        assert len(lines) == 1 or width == 390 and len(name) > 20
    used = stub_page.run("return document.querySelector('main').getBoundingClientRect().width")
    assert used >= min(width, 2400) - 2 * 16 - 15  # the margins, a scroll bar


def test_on_a_phone_models_come_first_with_the_download_field_on_top(stub, stub_page):
    stub.models = [model(f"m{n}") for n in range(35)]
    stub_page.resize(390)
    stub_page.poll()
    tops = [
        stub_page.run("return arguments[0].getBoundingClientRect().top", stub_page.element(id))
        for id in ("pull-name", "models", "h-machine", "h-history")
    ]
    assert tops == sorted(tops) and tops[0] < 400


# The contrast of each text with what lies behind it, by WCAG's formula: those below 4.5.
CONTRAST = """const light = (colour) => { const [r, g, b] = colour.match(/[0-9.]+/g).map((part) =>
      (part /= 255) <= .03928 ? part / 12.92 : ((part + .055) / 1.055) ** 2.4);
      return .2126 * r + .7152 * g + .0722 * b; };
    const behind = (each) => { for (; each; each = each.parentElement) {
      const colour = getComputedStyle(each).backgroundColor;
      if (!/, 0\\)$/.test(colour)) return colour; } return "rgb(255, 255, 255)"; };
    return [...document.querySelectorAll("body *")].filter((each) => each.checkVisibility() &&
      [...each.childNodes].some((node) => node.nodeType === 3 && node.data.trim()) &&
      each.ariaDisabled !== "true").map((each) => {
        const style = getComputedStyle(each);
        const own = each.closest("svg") ? style.fill : style.color;
        const [a, b] = [own, behind(each)].map(light).sort((x, y) => y - x);
        return [each.tagName, each.textContent, (a + .05) / (b + .05)]; });"""
# The same of borders and placeholders of what can be used: those below 3, below 4.5.
EDGES = (
    CONTRAST[: CONTRAST.index("return [...document")]
    + """
    const ratio = (one, other) => { const [a, b] = [one, other].map(light).sort((x, y) => y - x);
      return (a + .05) / (b + .05); };
    return [...document.querySelectorAll("button, input, textarea")]
      .filter((each) => each.checkVisibility() && each.ariaDisabled !== "true")
      .flatMap((each) => { const style = getComputedStyle(each);
        const clear = /, 0\\)$/.test(style.backgroundColor);
        const own = clear ? style.borderColor : style.backgroundColor;
        const edge = [each.id || each.textContent, ratio(own, behind(each.parentElement)), 3];
        const words = getComputedStyle(each, "::placeholder").color;
        const inner = [each.id, ratio(words, behind(each)), 4.5];
        return each.placeholder ? [edge, inner] : [edge]; });"""
)


def show_states(stub, stub_page, scheme):
    states = ("busy", "idle", "loading", "stuck", "orphan")
    stub.models = [model(state, share=1) for state in states] + [model("not loaded")]
    stub.stats["runners"] = [runner(state, state, 5, 9, pid=len(state)) for state in states]
    stub.stats |= gpu_stats(*H100[10], gpus=2)
    stub.history = history(["gpu0_percent"], [[1]] * 5, [{"at": iso(20), "kind": "reset"}])
    stub.health |= {"warnings": [{"code": "disk_low", "message": "The disk is almost full."}]}
    stub.pulls = [pull("a"), pull("b", "error", code="disk_full", error="no space left")]
    stub_page.prefer(scheme)
    stub_page.open_anew()
    wait_for(lambda: stub_page.charts() == ["load"], 30, "the chart")
    stub_page.run("document.querySelectorAll('details').forEach((each) => { each.open = true; })")


@pytest.mark.parametrize("old", [False, True], ids=["fresh", "old"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read(stub, stub_page, scheme, old):
    show_states(stub, stub_page, scheme)
    if old:
        mark = "document.querySelectorAll('[data-source]').forEach((e) => e.classList.add('old'))"
        stub_page.run(mark)
    seen = stub_page.run(CONTRAST)
    assert len(seen) > 40
    assert [each for each in seen if each[2] < 4.5] == []
    ground = stub_page.run("return getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(243, 245, 248)", "dark": "rgb(18, 21, 26)"}[scheme]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_borders_and_placeholders_can_be_seen(stub, stub_page, scheme):
    show_states(stub, stub_page, scheme)
    seen = stub_page.run(EDGES)
    assert len(seen) > 20
    assert [each for each in seen if each[1] < each[2]] == []


# Polling


def test_what_has_not_changed_is_not_sent_again(stub, stub_page):
    stub.models = [model(f"m{n}") for n in range(35)]
    stub_page.poll()
    before, rounds = stub.bytes, stub.polled["/api/models"]
    stub_page.next_rounds(5)
    polls = stub.polled["/api/models"] - rounds
    assert polls >= 5
    # Six rounds of an idle tab in 30 s, of whose 65 kB a sample each 10 s takes little
    assert 6 * (stub.bytes - before) / polls < 60_000
