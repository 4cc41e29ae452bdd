"""The modules import only what lies below them; none of the folder reads the environment."""

import ast
import re

import pytest

from helpers.places import ROOT

FLOORS = {
    "gunicorn.conf": 12,
    "app": 11,
    "llm_service.health": 9,
    "llm_service.metrics": 10,
    "llm_service.stats": 9,
    "llm_service.history": 9,
    "llm_service.models": 9,
    "llm_service.streaming": 9,
    "llm_service.access": 0,
    "llm_service.fields": 0,
    "llm_service.healing": 8,
    "llm_service.session": 7,
    "llm_service.clearing": 6,
    "llm_service.loading": 5,
    "llm_service.watch": 5,
    "llm_service.machine": 4,
    "llm_service.server_state": 3,
    "llm_service.server_work": 3,
    "llm_service.callers": 3,
    "llm_service.downloads": 3,
    "llm_service.trying": 3,
    "llm_service.matching": 3,
    "llm_service.verifying": 3,
    "llm_service.updates": 3,
    "llm_service.recommended": 4,
    "llm_service.runner_state": 2,
    "llm_service.unused": 1.5,
    "llm_service.reports": 2,
    "llm_service.store": 2,
    "llm_service.parts": 1,
    "llm_service.progress": 2,
    "llm_service.manifests": 1,
    "llm_service.registry": 1,
    "llm_service.network": 0,
    "llm_service.files": 0,
    "llm_service.processes": 1,
    "llm_service.sockets": 0,
    "llm_service.sharing": 1,
    "llm_service.environment": 1,
    "llm_service.messages": 0,
    "llm_service.answers": 1,
    "ollama_client": 0,
    "llm_service.errors": -1,
    "gpu": 0,
}
MODULES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts): file
    for pattern in ("*.py", "llm_service/*.py")
    for file in ROOT.glob(pattern)
    if file.name != "__init__.py"
}


def imports(name):
    """Yield the modules of the service that a module imports, wherever in its text."""
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        yield from (each for each in names if each in MODULES)


def test_each_module_has_a_floor():
    assert MODULES.keys() <= FLOORS.keys()


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_from_floors_below(name):
    upwards = {other for other in imports(name) if FLOORS[other] >= FLOORS[name]}
    assert upwards == set()


def test_the_imports_that_are_known_to_be_there_are_found():
    assert {"llm_service.watch", "ollama_client", "gpu"} <= set(imports("llm_service.clearing"))
    assert {"app"} <= set(imports("gunicorn.conf"))


@pytest.mark.parametrize("name", [each for each in MODULES if each.startswith("llm_service.")])
def test_a_module_of_the_folder_is_told_its_settings_and_makes_no_object_of_the_service(name):
    tree = ast.parse(MODULES[name].read_text())
    assert not any(
        isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv")
        for node in ast.walk(tree)
    )
    classes = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    made = [
        node.value.func.id
        for node in tree.body
        if isinstance(node, (ast.Assign, ast.AnnAssign))
        and isinstance(node.value, ast.Call)
        and isinstance(node.value.func, ast.Name)
    ]
    assert not classes.intersection(made)


def test_compose_builds_on_the_image_that_the_dockerfile_names():
    image = re.search("^ARG OLLAMA_IMAGE=(.*)", ROOT.joinpath("Dockerfile").read_text(), re.M)[1]
    assert (
        f"OLLAMA_IMAGE=${{OLLAMA_IMAGE:-{image}}} "
        in ROOT.joinpath("docker-compose.yml").read_text()
    )
