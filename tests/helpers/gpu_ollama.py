"""A real Ollama that takes the machine for one with a GPU.

So it unloads as it does there: one model after another, and after each it waits up to 5 s for its
memory, while it lists the next one. Its models lie in system memory all the same.
"""

import os
import shutil
from pathlib import Path

RUNNER = """#!/bin/sh
case " $* " in
*" --list-devices "*) printf 'Available devices:\\n  CUDA0: A GPU (16379 MiB, 14900 MiB free)\\n' ;;
*) exec "{}" "$@" ;;
esac
"""
# The runner of an Ollama that names its model by another option.
RENAMING = """#!/bin/bash
[[ $1 != --model ]] || set -- -m "${{@:2}}"
exec "{}" "$@"
"""


def gpu_ollama(folder, binary, runner=RUNNER):
    """Put it together in this folder from an installed one; return its path.

    ``runner`` is the script that stands for its llama-server.
    """
    installed = Path(binary).resolve()
    made = Path(folder, "bin", "ollama")
    made.parent.mkdir()
    try:
        os.link(installed, made)  # Ollama would look where a symbolic link leads
    except OSError:
        shutil.copy2(installed, made)
    libraries = Path(folder, "lib", "ollama")
    libraries.mkdir(parents=True)
    for file in (installed.parents[1] / "lib" / "ollama").iterdir():
        if file.name != "llama-server":
            (libraries / file.name).symlink_to(file)
            continue
        script = libraries / file.name
        script.write_text(runner.format(file))
        script.chmod(0o755)
    return made
