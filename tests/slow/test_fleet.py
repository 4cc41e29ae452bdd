"""Several services behind a real HAProxy, and the files for those who run more than one."""

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import psutil
import pytest
import requests
import yaml

from helpers.answers import GEMMA
from helpers.frozen import frozen
from helpers.generation import Generation
from helpers.places import ROOT
from helpers.ports import free_port
from helpers.waiting import call, wait_for

FLEET = Path(ROOT, "tests", "fleet")
STUCK_S = 20  # ten looks, of which the verdict needs as many, take as long
LONGEST_S = STUCK_S + 15
CALLERS = 4
PAUSE_S = 0.5  # after each answer, so that the tests beside this one get on, too
BODY = {
    "model": GEMMA,
    "prompt": "1 2 3 4 5 6 7",
    "raw": True,
    "stream": False,
    "options": {"num_predict": 4, "temperature": 0},
}


def program(name):
    path = shutil.which(name)
    if not path:
        pytest.skip(f"no {name}: apt-get install haproxy prometheus")
    return path


class Callers:
    """Callers that ask for short answers, one after another.

    .answers    [(began, seconds, node, None or what went wrong)]; HAProxy names the node
    """

    def __init__(self, port):
        self.answers = []
        self._url, self._stop = f"http://127.0.0.1:{port}/api/generate", threading.Event()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(CALLERS)]
        for thread in self._threads:
            thread.start()

    def _run(self):
        with requests.Session() as session:
            session.trust_env = False
            while not self._stop.wait(PAUSE_S):
                began, node, wrong = time.monotonic(), None, None
                try:
                    answer = session.post(self._url, json=BODY, timeout=120)
                    node = answer.headers.get("X-Node")
                    if answer.status_code != 200 or not answer.json().get("response"):
                        wrong = f"{answer.status_code} {answer.text[:200]}"
                except requests.RequestException as error:
                    wrong = repr(error)
                self.answers.append((began, time.monotonic() - began, node, wrong))

    def lost(self):
        return [answer for answer in self.answers if answer[3]]

    def good_of(self, node, since):
        """Return when the first good answer was there that `node` was asked for after that."""
        good = [began + s for began, s, name, wrong in self.answers if not wrong and name == node]
        return min((at for at in good if at > since), default=None)

    def wait_for_answers(self, nodes):
        since = time.monotonic()
        wait_for(
            lambda: all(self.good_of(node, since) for node in nodes), 60, f"answers of {nodes}"
        )

    def stop(self):
        self._stop.set()
        for thread in self._threads:
            thread.join(130)


class Proxy:
    """HAProxy with the configuration of tests/fleet/ before these services, gpu1 and gpu2.

    .port .inference_port .log
    """

    def __init__(self, folder, services):
        self.port, self.inference_port = free_port(), free_port()
        self.log = folder / "haproxy.log"
        text = (FLEET / "haproxy.cfg").read_text()
        text = text.replace("bind :11434", f"bind 127.0.0.1:{self.port}")
        text = text.replace("bind :11433", f"bind 127.0.0.1:{self.inference_port}")
        text = text.replace(" check port 11435", "")
        for number, one in enumerate(services, 1):
            line = rf"server gpu{number} \S+"
            new = f"server gpu{number} 127.0.0.1:{one.ollama_port} check port {one.port}"
            text, count = re.subn(line, new, text)
            assert count == 1
        config = folder / "haproxy.cfg"
        config.write_text(text)
        with open(self.log, "w") as log:
            self._process = subprocess.Popen(
                [program("haproxy"), "-f", config], stdout=log, stderr=log
            )
        wait_for(lambda: call("GET", f"http://127.0.0.1:{self.port}/"), 30, "HAProxy")

    def close(self):
        self._process.terminate()
        self._process.wait(10)


@pytest.fixture(scope="module")
def nodes(make_module_service, gguf):
    return [
        make_module_service(models={GEMMA: gguf}, LLM_STUCK_SECONDS=STUCK_S, OLLAMA_KEEP_ALIVE="1h")
        for _ in range(2)
    ]


@pytest.fixture
def proxy(nodes, tmp_path):
    one = Proxy(tmp_path, nodes)
    yield one
    one.close()


@pytest.fixture
def callers(nodes, proxy):
    for node in nodes:
        node.wait_healthy(60)
        node.load(GEMMA, num_predict=1)
    many = Callers(proxy.port)
    many.wait_for_answers(["gpu1", "gpu2"])
    yield many
    many.stop()


def check(callers, since, what):
    """The rules of the fleet; the node of the fault is gpu1, which must be back by itself."""
    back = wait_for(lambda: callers.good_of("gpu1", since), 90, "gpu1 is back")
    callers.wait_for_answers(["gpu1", "gpu2"])
    callers.stop()
    lost, longest = callers.lost(), max(seconds for _, seconds, _, _ in callers.answers)
    print(
        f"{what}: {len(lost)} of {len(callers.answers)} lost, the longest wait {longest:.1f} s, "
        f"the node answers again after {back - since:.1f} s"
    )
    assert {node for _, _, node, _ in lost} <= {"gpu1"}, lost
    assert len(lost) <= 2 * CALLERS, lost
    assert longest <= LONGEST_S, sorted(callers.answers, key=lambda answer: -answer[1])[:4]


def in_mid_answer(node):
    """Wait until a node is in the middle of an answer; return its runner."""
    runner = node.runners()[0]
    words = runner.cmdline()
    slots = f"http://127.0.0.1:{words[words.index('--port') + 1]}/slots"
    wait_for(lambda: any(s["is_processing"] for s in requests.get(slots).json()), 30, "an answer")
    return runner


def healed_runners(node):
    return node.get("/api/stats").json()["healed"]["runners"]


def test_a_frozen_decode_loop(nodes, callers):
    runner = in_mid_answer(nodes[0])
    with frozen(runner):
        since = time.monotonic()
        wait_for(lambda: not runner.is_running(), 90, "the runner is ended")
    check(callers, since, "frozen decode loop")
    # A healing counts once its outcome has been looked at; a caller may be served before.
    wait_for(lambda: healed_runners(nodes[0]), 30, "the healing is counted")
    assert healed_runners(nodes[0]) == 1


def test_a_killed_server(nodes, callers):
    since = time.monotonic()
    os.kill(nodes[0].ollama_pid(), signal.SIGKILL)
    time.sleep(0.5)  # an answer under way may have come all the same
    check(callers, since + 0.5, "killed server")


def test_a_stopped_server(nodes, callers):
    server = psutil.Process(nodes[0].ollama_pid())
    server.suspend()
    since = time.monotonic()
    with contextlib.suppress(psutil.NoSuchProcess):
        server.wait(90)  # healed: ended by the service
    check(callers, since, "stopped server")


def test_a_node_that_stops(nodes, callers):
    since = time.monotonic()
    os.kill(nodes[0].process.pid, signal.SIGTERM)
    nodes[0].process.wait(60)
    callers.wait_for_answers(["gpu2"])
    nodes[0].start()
    check(callers, since + 1, "stop and start of a node")


# ---------------------------------------------------------------------------------------
# The port for programs that may use models, and not change them
# ---------------------------------------------------------------------------------------

MAY = [
    ("GET", "/api/tags", None),
    ("GET", "/api/ps", None),
    ("GET", "/api/version", None),
    ("POST", "/api/show", {"model": GEMMA}),
    ("POST", "/api/generate", BODY),
    ("POST", "/api/chat", {"model": GEMMA}),
    ("GET", "/v1/models", None),
    ("POST", "/v1/completions", {"model": GEMMA, "prompt": "1 2", "max_tokens": 2}),
]
MAY_NOT = [
    ("POST", "/api/pull"),
    ("POST", "/api/push"),
    ("POST", "/api/create"),
    ("POST", "/api/copy"),
    ("DELETE", "/api/delete"),
    ("POST", "/api/blobs/sha256:" + 64 * "0"),
    ("DELETE", "/v1/../api/delete"),
    ("DELETE", "/v1/%2e%2e/api/delete"),
    ("DELETE", "//api/delete"),
    ("DELETE", "/api/show/../delete"),
    ("DELETE", "/api/tags%2f..%2fdelete"),
    ("POST", "/API/pull"),
    ("GET", "/metrics"),
]


def send(port, method, path, body):
    """Return the status and the text; the path goes out as it is."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    with contextlib.closing(connection):
        connection.request(method, path, json.dumps(body) if body else None)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


@pytest.mark.parametrize(("method", "path", "body"), MAY)
def test_the_port_for_inference_passes_what_uses_a_model(proxy, method, path, body):
    status, text = send(proxy.inference_port, method, path, body)
    assert status == 200, text


@pytest.mark.parametrize(("method", "path"), MAY_NOT)
def test_the_port_for_inference_refuses_what_changes_a_model(proxy, nodes, method, path):
    body = {"model": GEMMA, "source": GEMMA, "destination": "copy", "from": GEMMA}
    status, text = send(proxy.inference_port, method, path, body)
    assert (status, "Forbidden" in text) == (403, True)
    assert [one.get("/api/models").json()["count"] for one in nodes] == [1, 1]


# ---------------------------------------------------------------------------------------
# The files
# ---------------------------------------------------------------------------------------


def test_haproxy_takes_its_configuration():
    run = subprocess.run(
        [program("haproxy"), "-c", "-f", FLEET / "haproxy.cfg"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "WARNING" not in run.stderr.upper(), run.stderr


def test_prometheus_takes_its_configuration_and_the_alerts():
    run = subprocess.run(
        [program("promtool"), "check", "config", FLEET / "prometheus.yml"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "3 rules found" in run.stdout


RULES_TEST = """
rule_files: [{alerts}]
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      - {{series: 'up{{job="llm-service",instance="off"}}', values: '1 0x100'}}
      - {{series: 'llm_up{{job="llm-service",instance="ill"}}', values: '1 0x100'}}
      - {{series: 'llm_up{{job="llm-service",instance="well"}}', values: '1 1x100'}}
      - {{series: 'llm_healings_total{{instance="ill",what="runners"}}', values: '0 0x9 1 2 4x90'}}
      - {{series: 'llm_healings_total{{instance="well",what="runners"}}', values: '0 0x9 1x92'}}
      - {{series: 'llm_disk_free_bytes{{instance="ill"}}', values: '5x100'}}
      - {{series: 'llm_disk_free_bytes{{instance="well"}}', values: '50x100'}}
      - {{series: 'llm_disk_total_bytes{{instance="ill"}}', values: '100x100'}}
      - {{series: 'llm_disk_total_bytes{{instance="well"}}', values: '100x100'}}
    promql_expr_test:
      - expr: sort(count by (alertname, instance) (ALERTS{{alertstate="firing"}}))
        eval_time: 30m
        exp_samples:
          - {{labels: '{{alertname="LLMNodeUnhealthy",instance="off"}}', value: 1}}
          - {{labels: '{{alertname="LLMNodeUnhealthy",instance="ill"}}', value: 1}}
          - {{labels: '{{alertname="LLMNodeHealedOften",instance="ill"}}', value: 1}}
          - {{labels: '{{alertname="LLMDiskAlmostFull",instance="ill"}}', value: 1}}
"""


def test_the_alerts_fire_for_what_they_are_for_and_nothing_else(tmp_path):
    file = tmp_path / "test.yml"
    file.write_text(RULES_TEST.format(alerts=FLEET / "alerts.yml"))
    run = subprocess.run(
        [program("promtool"), "test", "rules", file], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr


def kubernetes_objects():
    return list(yaml.safe_load_all((FLEET / "kubernetes.yaml").read_text()))


def pre_stop(container, port=11435):
    """Return the command that the end of a pod waits for, asking that port."""
    command = container["lifecycle"]["preStop"]["exec"]["command"]
    assert command[-1].count(":11435/health") == 1
    return [word.replace(":11435/", f":{port}/") for word in command]


def test_the_end_of_a_pod_waits_for_an_answer_under_way_and_for_nothing_else(nodes):
    node = nodes[0]
    node.wait_healthy(60)
    (container,) = kubernetes_objects()[-1]["spec"]["template"]["spec"]["containers"]
    command = pre_stop(container, node.port)
    answer = Generation(node.ollama_port, GEMMA).flowing()
    wait_for(lambda: '"state":"busy"' in node.get("/health").text, 60, "busy is seen")
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run(command, timeout=15)
    assert not answer.done
    answer.close()
    assert subprocess.run(command, timeout=120).returncode == 0
    # Nor for an API that is dead
    assert subprocess.run(pre_stop(container, free_port()), timeout=60).returncode == 0


def test_kubernetes_schemas_take_the_objects():
    validate = pytest.importorskip("kubernetes_validate").validate
    objects = kubernetes_objects()
    for one in objects:
        for version in ("1.27", "1.37"):
            validate(one, version, strict=True)
    objects[-1]["spec"]["replicas"] = "two"
    with pytest.raises(Exception, match="two"):
        validate(objects[-1], "1.37", strict=True)


def test_the_kubernetes_objects_fit_together_and_the_image():
    kinds = {}
    for one in kubernetes_objects():
        kinds.setdefault(one["kind"], []).append(one)
    services, (nodes,) = kinds["Service"], kinds["StatefulSet"]
    pod = nodes["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"ollama": 11434, "api": 11435}
    for service in services:
        assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
        (port,) = service["spec"]["ports"]
        assert ports[port["targetPort"]] == port["port"]
    assert nodes["spec"]["serviceName"] in [one["metadata"]["name"] for one in services]
    for name, selector in [("NetworkPolicy", "podSelector"), ("PodDisruptionBudget", "selector")]:
        (one,) = kinds[name]
        assert one["spec"][selector] == nodes["spec"]["selector"]
    # Else a Service named llm-api would set LLM_API_PORT, to what is no port.
    assert pod["spec"]["enableServiceLinks"] is False
    assert container["livenessProbe"]["httpGet"]["path"] == "/livez"
    assert container["readinessProbe"]["httpGet"]["path"] == "/health"
    # gunicorn replaces a worker that hangs after 31 s, and start.sh ends within 10 s.
    liveness = container["livenessProbe"]
    assert liveness["periodSeconds"] * (liveness["failureThreshold"] - 1) > 40
    (most,) = re.findall(r"SECONDS < (\d+)", pre_stop(container)[-1])
    assert int(most) + 7 + 10 < pod["spec"]["terminationGracePeriodSeconds"]
    claims = [claim["metadata"]["name"] for claim in nodes["spec"]["volumeClaimTemplates"]]
    volumes = [volume["name"] for volume in pod["spec"]["volumes"]]
    assert sorted(claims + volumes) == sorted(v["name"] for v in container["volumeMounts"])
