#!/usr/bin/env bash
# Runs the tests on a fresh machine; arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
mapfile -t paths < <(./start.sh --setup tests/requirements.txt)
export LLM_TEST_OLLAMA=${paths[1]:?the set-up failed: see above}
exec "${paths[0]}" -m pytest -p no:cacheprovider -ra "${@:-tests}"
