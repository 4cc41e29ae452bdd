"""After whatever came, a store holds what its manifests name and nothing else."""

import contextlib
import hashlib
import itertools
import json
import os
import random
from collections import Counter

from helpers.listener import PULL, Listener
from helpers.models import MEDIA
from helpers.waiting import wait_for

SEED, STEPS = 18, int(os.environ.get("LLM_TEST_STORE_STEPS") or 100)
PRUNE, DELETE = "/api/models/prune", "/api/models/delete"
PIECE = 100_000


class RandomUse:
    """Models whose layers come from a small pool, so that many share some."""

    def __init__(self, service, registry):
        self.service, self.registry = service, registry
        self.random, self.done = random.Random(SEED), Counter()
        self.names = [self.publish(f"ns/model{n}:latest") for n in range(6)]

    def publish(self, name):
        seeds = self.random.sample(range(12), self.random.randint(1, 4))
        first, *others = (random.Random(seed).randbytes((seed + 1) * PIECE) for seed in seeds)
        extra = [(MEDIA + "adapter", layer) for layer in others]
        return self.registry.add(name, first, extra_layers=extra)

    def name(self):
        return self.random.choice(self.names)

    # What callers do

    def pull(self):
        verify = self.random.random() < 0.3
        return Listener(self.service, self.name(), verify=verify).end()["status"]

    def update(self):
        name = self.name()
        self.publish(name.partition("/")[2])
        return Listener(self.service, name).end()["status"]

    def cancel(self):
        name = self.name()
        self.registry.rate = 1e6
        listener = Listener(self.service, name)
        with contextlib.suppress(AssertionError):
            wait_for(lambda: listener.done or len(listener.lines) > 3, 1, "some lines")
        purge = self.random.random() < 0.5
        answer = self.service.delete(PULL, json={"model": name, "purge": purge})
        self.registry.rate = None
        listener.end()
        return answer.status_code

    def two_at_once(self):
        listeners = [Listener(self.service, name) for name in self.random.sample(self.names, 2)]
        return [listener.end()["status"] for listener in listeners]

    def delete(self):
        return self.service.delete(DELETE, json={"model": self.name()}).status_code

    def prune(self):
        age = self.random.choice([0, 3600])
        return self.service.post(PRUNE, json={"older_than_s": age}).status_code

    def damage(self):
        """Flip a bit of a model's blob, and let the next pulls repair it."""
        digests = sorted(named(self.service))
        if digests:
            flip(self.service, self.random.choice(digests), self.random)
        return [Listener(self.service, name, verify=True).end()["status"] for name in self.there()]

    def there(self):
        listed = self.service.get("/api/models").json()["models"]
        return [model["name"] for model in listed]

    def step(self):
        acts = [self.pull, self.update, self.cancel, self.two_at_once, self.delete, self.prune]
        act = self.random.choices([*acts, self.damage], [4, 4, 4, 2, 2, 3, 1])[0]
        self.done[f"{act.__name__} {act()}"] += 1


def flip(service, digest, chance):
    with open(service.models / "blobs" / f"sha256-{digest}", "r+b") as file:
        at = chance.randrange(os.fstat(file.fileno()).st_size)
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << chance.randrange(8)]))


def named(service):
    """Return the digests that the manifests name."""
    found = set()
    for path in (service.models / "manifests").rglob("*"):
        if path.is_file():
            manifest = json.loads(path.read_bytes())
            layers = itertools.chain(manifest["layers"], [manifest["config"]])
            found |= {layer["digest"].removeprefix("sha256:") for layer in layers}
    return found


def test_the_store_holds_exactly_what_its_manifests_name(make_service, registry):
    service = make_service()
    use = RandomUse(service, registry)
    for _ in range(STEPS):
        use.step()
    print(dict(sorted(use.done.items())))
    for name in use.there():  # what a cancelled update damaged or left is whole again
        assert Listener(service, name, verify=True).end()["status"] == "success"
    pruned = wait_for(
        lambda: (answer := service.post(PRUNE, json={"older_than_s": 0})).ok and answer, 60, "rest"
    )
    print(pruned.json())
    blobs = {path.name: path.read_bytes() for path in (service.models / "blobs").iterdir()}
    assert set(blobs) == {f"sha256-{digest}" for digest in named(service)} and blobs
    for name, data in blobs.items():
        assert hashlib.sha256(data).hexdigest() == name.removeprefix("sha256-")
    assert service.get("/health").json()["status"] == "healthy"
    assert not [act for act in use.done if act.endswith((" 500", " 502", " 503"))]
