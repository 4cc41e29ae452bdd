#!/usr/bin/env bash
# Reading llama-server's metrics with prometheus_client renames one of them.
# Expected: what the parser of prometheus_client reads has the names that were sent, and a counter is
# something that adds up.
# What happens: llama-server declares n_tokens_max, a largest value, as a counter. The parser gives
# each counter the suffix _total, so the sample is llamacpp:n_tokens_max_total, a name that no
# llama-server ever sent; written out again it stays so. A dashboard's query by the old name is empty
# then, while Prometheus itself keeps the old name. The lines below have the form of
# tools/server/server-task.cpp (to_metrics).
# Versions: llama.cpp b11076 (its form), prometheus_client 0.26.0. Date: 2026-11-29.
# Needs: python3 with venv.
set -euo pipefail

work=$(mktemp -d)
leave() {
    local rc=$?
    ((rc == 0)) || echo "the finding did not show: it changed, or something is missing here" >&2
    rm -rf "$work"
}
trap leave EXIT
cd "$work"

python3 -m venv venv
venv/bin/pip install -q --disable-pip-version-check prometheus_client==0.26.0
cat >metrics.txt <<METRICS
# HELP llamacpp:n_decode_total Total number of decode calls
# TYPE llamacpp:n_decode_total counter
llamacpp:n_decode_total 12
# HELP llamacpp:n_tokens_max Largest observed sequence length
# TYPE llamacpp:n_tokens_max counter
llamacpp:n_tokens_max 14
# HELP llamacpp:requests_processing Number of requests processing
# TYPE llamacpp:requests_processing gauge
llamacpp:requests_processing 1
METRICS
venv/bin/python - <<"PYTHON" | tee names.txt
from importlib.metadata import version
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

print("prometheus_client", version("prometheus_client"))
families = list(text_string_to_metric_families(open("metrics.txt").read()))
print("read:", *(sample.name for family in families for sample in family.samples))

class Again:
    def collect(self):
        return families

registry = CollectorRegistry()
registry.register(Again())
lines = generate_latest(registry).decode().splitlines()
print("written:", *(line.split()[0] for line in lines if not line.startswith("#")))
PYTHON
names='llamacpp:n_decode_total llamacpp:n_tokens_max_total llamacpp:requests_processing'
grep -qx "read: $names" names.txt
grep -qx "written: $names" names.txt
echo "still so: n_tokens_max is n_tokens_max_total to prometheus_client"
