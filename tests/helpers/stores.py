"""Model stores of every kind, made from a seed: the same seed makes the same store anywhere.

What each kind of manifest is to Ollama stands beside it, by hand and not by the service's code.
"""

import contextlib
import hashlib
import json
import os
import random
import re
import struct
import time
from pathlib import Path

from helpers.models import MEDIA, config_json

HOSTS = ["registry.ollama.ai", "hf.co", "localhost:5000", "Registry.Ollama.ai", "host"]
NAMESPACES = ["library", "user", "Org", "library"]
MODELS = ["gemma", "Gemma", "a.b", "m_1"]
TAGS = ["latest", "latest", "8b", "local", "cloud", "8b-cloud", "Q4_K_M", "latest.lock"]
NO_PLACES = [
    ".DS_Store",
    "notes.txt",
    "registry.ollama.ai/.DS_Store",
    "registry.ollama.ai/library/gemma/latest~",
    "registry.ollama.ai/library/gemma/.latest.swp",
    "registry.ollama.ai/my.namespace/gemma/latest",
    "registry.ollama.ai/library/gemma/deeper/still/latest",
    "-host/library/gemma/latest",
]
# Ollama lists them, or can at least be asked to delete them.
READABLE = ["plain"] * 8 + ["dashed", "upper", "null", "object", "cloud", "index", "trailing"]
READABLE += ["keys", "no config", "bad config", "missing", "bad digest", "link", "far link"]
# It takes them for no manifest; what those of TORN need cannot be known.
TYPED = ["list", "typed", "float", "utf-16", "bom"]
TORN = ["empty", "cut", "garbage"]
OLD, YOUNG = 0, 7100  # seconds from now: the store is looked at two hours later


def gguf_bytes(chance):
    """Return a GGUF without tensors, whose header Ollama can read."""

    def text(words):
        return struct.pack("<Q", len(words)) + words.encode()

    pairs = text("general.architecture") + struct.pack("<I", 8) + text("llama")
    pairs += text("general.name") + struct.pack("<I", 8) + text(str(chance.random()))
    return (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + pairs + chance.randbytes(chance.randint(0, 9000))
    )


class SeededStore:
    """A store below ``folder``.

    path        OLLAMA_MODELS
    places      {"host/namespace/model/tag": kind}: where Ollama looks for manifests
    needs       {place: {digest, …}}: what its model needs, as far as it says
    """

    def __init__(self, folder, seed):
        self.random = random.Random(seed)
        self.folder, self.path = Path(folder), Path(folder) / "models"
        self.places, self.needs, self.texts = {}, {}, {}
        self.pool = [gguf_bytes(self.random) for _ in range(5)]
        self.path.mkdir(parents=True)
        for name in ("blobs", "manifests"):
            if self.random.random() < 0.2:  # on another disk
                (self.folder / f"far {name}").mkdir()
                (self.path / name).symlink_to(self.folder / f"far {name}")
            else:
                (self.path / name).mkdir()
        for _ in range(self.random.randint(1, 6)):
            self.add_manifest()
        for _ in range(self.random.choice([0, 0, 1, 3])):
            self.add_foreign()
        for _ in range(self.random.randint(0, 5)):
            self.add_unused()
        self.add_metadata()
        self.link_some()

    # Manifests

    def add_manifest(self):
        parts = [self.random.choice(each) for each in (HOSTS, NAMESPACES, MODELS, TAGS)]
        place = "/".join(parts)
        path = self.path / "manifests" / place
        kinds = self.random.choices([READABLE, TYPED, TORN], [30, 2, 1])[0]
        kind = self.random.choice(kinds)
        if path.exists() or (kind == "link" and not self.plain_places()):
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        digests, text = self.manifest(kind)
        if kind == "link":
            other = self.random.choice(self.plain_places())
            path.symlink_to(self.path / "manifests" / other)
            digests = self.needs[other]
        elif kind == "far link":
            file = self.folder / f"manifest {len(self.places)}"
            file.write_bytes(text)
            path.symlink_to(file)
        else:
            path.write_bytes(text)
        self.places[place], self.texts[place] = kind, text
        if kind in TORN:  # what is left of it
            digests = re.findall(r"sha256:[0-9a-f]{64}", text.decode())
        self.needs[place] = {digest[7:] for digest in digests}

    def plain_places(self):
        return [place for place, kind in self.places.items() if kind == "plain"]

    def manifest(self, kind):
        """Return the digests that it needs, as it writes them, and its text."""
        remote = {"remote_host": "https://ollama.com:443", "remote_model": "gpt-oss:20b"}
        config = b"no JSON" if kind == "bad config" else config_json("llama", self.word(), "F32")
        if kind == "cloud":
            config = json.dumps(remote).encode()
        weights = [self.random.choice(self.pool) for _ in range(self.random.choice([1, 1, 1, 2]))]
        layers = [self.layer(MEDIA + "model", blob, kind) for blob in weights]
        last = self.layer("application/vnd.docker.container.image.v1+json", config, kind)
        if kind == "no config":
            (self.path / "blobs" / last["digest"].replace(":", "-")).unlink()
        manifest = {"schemaVersion": 2, "mediaType": "x", "config": last, "layers": layers}
        digests = [layer["digest"] for layer in [*layers, last]]
        if kind in ("null", "object", "index", "list", "empty", "garbage"):
            inside = {"digest": digests[0], "size": 7}
            texts = {
                "null": "null",
                "object": "{}",
                "index": json.dumps({"schemaVersion": 2, "manifests": [inside]}),
                "list": json.dumps([inside]),
                "empty": "",
                "garbage": "\0\1Bud1",
            }
            # Of an index Ollama reads nothing, and so needs nothing.
            return digests[:1] if kind == "list" else [], texts[kind].encode()
        if kind == "cloud":
            manifest["layers"] = None
            digests = digests[-1:]
        if kind == "bad digest":
            layers.insert(0, {"mediaType": MEDIA + "license", "digest": "sha256:../x", "size": 1})
        if kind in ("typed", "float"):
            layers[0]["size"] = "7" if kind == "typed" else 7.5
        text = json.dumps(manifest)
        if kind == "keys":
            text = text.replace('"layers"', '"Layers"').replace('"digest"', '"DIGEST"')
        if kind == "trailing":
            text += "\n}{ and more"
        if kind == "cut":
            text = text[:-30]
        encoding = {"utf-16": "utf-16", "bom": "utf-8-sig"}.get(kind, "utf-8")
        return digests, text.encode(encoding)

    def layer(self, media, blob, kind):
        """Write the blob; return the layer that names it."""
        hexes = hashlib.sha256(blob).hexdigest()
        hexes = hexes.upper() if kind == "upper" else hexes
        path = self.path / "blobs" / f"sha256-{hexes}"
        if kind == "missing":
            path.unlink(missing_ok=True)
        elif not path.is_symlink():
            path.write_bytes(blob)
        sign = "-" if kind == "dashed" else ":"
        return {"mediaType": media, "digest": f"sha256{sign}{hexes}", "size": len(blob)}

    def word(self):
        return f"{self.random.randint(1, 4)}B"

    # What else lies in a store

    def add_foreign(self):
        path = self.path / "manifests" / self.random.choice(NO_PLACES)
        with contextlib.suppress(FileExistsError, NotADirectoryError):  # a file is in the way
            path.parent.mkdir(parents=True, exist_ok=True)
            digest = hashlib.sha256(self.random.choice(self.pool)).hexdigest()
            named = json.dumps([f"sha256-{digest}"]).encode()
            path.write_bytes(self.random.choice([b"", b"{", b"\0\1Bud1", named]))

    def add_unused(self):
        digest = self.random.randbytes(32).hex()
        names = [f"sha256-{digest}", f"sha256-{digest}", f"sha256-{digest}-partial"]
        names += [f"sha256-{digest}-partial-3", "sha256-123456", f"sha256-{digest}.tmp"]
        names += ["README", f"sha256-{digest}.bak", f"sha256-{digest[1:]}", f"sha512-{digest}"]
        path = self.path / "blobs" / self.random.choice(names)
        path.write_bytes(self.random.randbytes(self.random.randint(0, 9000)))
        later = self.random.choice([OLD, OLD, OLD, YOUNG, 10**6])
        if later:
            os.utime(path, (time.time() + later,) * 2)

    def add_metadata(self):
        folder = self.path / "metadata"
        folder.mkdir()
        for blob in sorted(os.listdir(self.path / "blobs")):
            if self.random.random() < 0.5:
                (folder / f"{blob}.json").write_text('{"kv":{"general.architecture":"llama"}}')
        if self.random.random() < 0.3:
            (folder / f"sha256-{self.random.randbytes(32).hex()}.json").write_text("{}")
            (folder / ".gguf-metadata-77.tmp").write_text("{")

    def link_some(self):
        """Let some blobs lie elsewhere, or be shared with other places."""
        for name in sorted(os.listdir(self.path / "blobs")):
            blob, far = self.path / "blobs" / name, self.folder / f"far {name}"
            way = self.random.random()
            if way < 0.1:
                blob.rename(far)
                blob.symlink_to(far)
            elif way < 0.2:
                os.link(blob, far)

    # What is known of it

    def readable(self, place):
        return self.places[place] in READABLE

    def named(self):
        """Return every digest that any file among the manifests names."""
        found = set()
        for folder, _, files in os.walk(self.path / "manifests", followlinks=True):
            for file in files:
                raw = Path(folder, file).read_bytes().replace(b"\0", b"")
                found |= set(re.findall(r"sha256[:-]([0-9a-f]{64})", raw.decode("latin-1").lower()))
        return found

    def files(self):
        """Map every file below to what ``lstat`` says; paths are relative."""
        found = {}
        for folder, _, files in os.walk(self.folder):
            for file in files:
                path = Path(folder, file)
                found[str(path.relative_to(self.folder))] = path.lstat()
        return found


def disk_bytes(files):
    """Return what files take on the disk, as `du` counts."""
    return sum({(each.st_dev, each.st_ino): each.st_blocks * 512 for each in files}.values())
