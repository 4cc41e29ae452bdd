#!/usr/bin/env bash
# The gguf package leaves out keys with an empty value, without a word.
# Expected: add_string(key, "") and add_array(key, []) write the key with an empty value, as the
# format allows and as a 0 or a false is written; or they raise.
# What happens: both return as always, and the file has no such key. A reader that takes the key for
# given fails on another machine, later. A template of "" cannot be told from no template.
# Versions: gguf 0.19.0. Date: 2026-11-29. Needs: python3 with venv.
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
venv/bin/pip install -q --disable-pip-version-check gguf==0.19.0
venv/bin/python - <<"PYTHON" | tee keys.txt
from importlib.metadata import version
import gguf
import numpy as np

print("gguf", version("gguf"))
writer = gguf.GGUFWriter("tiny.gguf", "llama")
writer.add_uint32("test.zero", 0)
writer.add_bool("test.false", False)
writer.add_string("test.text", "")
writer.add_array("test.list", [])
writer.add_tensor("token_embd.weight", np.ones((4, 32), np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
print("added: test.zero test.false test.text test.list")
print("in the file:", *(key for key in gguf.GGUFReader("tiny.gguf").fields if key[:5] == "test."))
PYTHON
grep -qx 'in the file: test.zero test.false' keys.txt
echo "still so: the empty ones are not there"
