"""Folders, and the mark by which a run's processes are found."""

import os
import uuid
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llm-service"
# Stores lie beside the model's file, so that it can be hard-linked into them.
RUNS = CACHE / "tests"
# In the environment of every process that this run's tests start.
MARK = "LLM_TEST_RUN"
RUN = uuid.uuid4().hex
