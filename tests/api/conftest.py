"""The shared service is left with its one model, whatever a test that is red has left in it."""

import contextlib

import pytest

from helpers.answers import GEMMA
from helpers.models import manifest_path


@pytest.fixture(autouse=True)
def only_gemma(request):
    yield
    if "service" not in request.fixturenames:
        return
    models = request.getfixturevalue("service").models
    for path in (models / "manifests").rglob("*"):
        if path.is_file() and path != manifest_path(models, GEMMA):
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # others lie there
                path.parent.rmdir()
