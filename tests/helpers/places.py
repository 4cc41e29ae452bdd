"""Folders, and the mark by which a run's processes are found."""

import os
import uuid
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llm-service"
# Stores lie beside the model's file, so that it can be hard-linked into them.
RUNS = CACHE / "tests"
# Test processes that run side by side inherit this from the one that has started them.
WHOLE_RUN = os.environ.setdefault("LLM_TEST_WHOLE_RUN", uuid.uuid4().hex)
# In the environment of every process that the tests start: the run, and which of its processes.
MARK = "LLM_TEST_RUN"
RUN = f"{WHOLE_RUN}/{uuid.uuid4().hex}"
