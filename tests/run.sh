#!/usr/bin/env bash
# Checks how the code is written, then runs the tests.
#   tests/run.sh                      everything
#   tests/run.sh unit|api|faults|slow one folder; more arguments go to pytest
#   tests/run.sh ARGUMENT…            pytest's own, such as `-k clear` or a file
#   tests/run.sh --system             as root: installs the programs that some tests want, and runs nothing
# LINT=off leaves the checks out.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf 'tests: %s\n' "$*" >&2; }

# --- The programs that come with the machine's package manager ---
programs=() packages=()
need() { # PROGRAM PACKAGE…
    type -P "$1" >/dev/null || { programs+=("$1"); packages+=("${@:2}"); }
}
need chromedriver chromium chromium-driver # the page
need chromium-headless-shell chromium-headless-shell # the same, with a third of the CPU time
need haproxy haproxy                       # more than one machine
need nginx nginx-light                     # the page behind a proxy
need apache2 apache2
need caddy caddy
need lighttpd lighttpd lighttpd-mod-openssl
need squid squid
need varnishd varnish
need promtool prometheus                   # /metrics
need c++ g++                               # the stand-in for NVIDIA's library; Ollama where it is built
need node nodejs                           # one of the clients; the scripts of the page
need npx npm

install_programs() {
    local package known=()
    ((${#packages[@]})) || return 0
    apt-get update -q || return
    for package in "${packages[@]}"; do
        if apt-cache show "$package" >/dev/null 2>&1; then known+=("$package"); else say "no package $package here"; fi
    done
    DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${known[@]}"
}
if [[ ${1:-} == --system ]]; then
    install_programs || { say "could not install ${packages[*]} (see above)"; exit 1; }
    exit
fi
if [[ ${1:-} != unit ]] && ((${#programs[@]})); then
    say "not there, so that some tests are skipped, or slower: ${programs[*]}. As root, tests/run.sh --system installs them."
fi

# --- Python, Ollama, the checks, the tests ---

setup=--setup
if [[ ${1:-} == unit ]] && grep -q -e --setup-python start.sh; then
    setup=--setup-python # which needs no Ollama
fi
mapfile -t paths < <(./start.sh "$setup" tests/requirements.txt)
python=${paths[0]:?the set-up failed: see above}
export LLM_TEST_OLLAMA=${paths[1]:-}
unset PYTHONDONTWRITEBYTECODE # else each service that a test starts compiles all of it anew
bin=$(dirname "$python")

lint_page() { # its scripts, where Node is there
    local biome
    if type -P npx >/dev/null &&
        biome=$(npx --yes --package=@biomejs/biome@2.6.8 -c 'command -v biome' 2>/dev/null) &&
        "$biome" --version >/dev/null 2>&1; then
        "$biome" ci --colors=off --log-level=warn static
    else
        say 'no Biome (npx @biomejs/biome): the scripts of the page are not checked'
    fi
}
lint() {
    local scripts of_scripts others=0
    mapfile -t scripts < <(grep -rlI --exclude-dir=.git '^#!.*sh$' .)
    # Beside the others, as it takes as long as they do; the codes are of functions called by a trap or by name
    "$bin/shellcheck" -e SC2317,SC2329 "${scripts[@]}" &
    of_scripts=$!
    { "$bin/ruff" check -q . && "$bin/ruff" format -q --check . && "$bin/mypy" --no-error-summary && lint_page; } ||
        others=1
    wait "$of_scripts" && return "$others"
}
# In a new clone the tests are compiled once, beside the checks, instead of by each process
[[ -d tests/__pycache__ ]] || "$python" -m pytest --collect-only -q >/dev/null 2>&1 &
if [[ ${LINT:-} != off ]]; then
    lint || { say 'the checks failed (see above); LINT=off runs the tests without them'; exit 1; }
fi
wait

workers=12              # on two cores: most tests wait
share=(--dist loadfile) # the tests of one file share services, and load a machine in the same way
if [[ ${1:-} == unit ]]; then
    workers=8 # each takes 0.6 s of CPU time to start
    share=(--dist load --maxschedchunk 1) # the longest first, so that all end at about the same time
fi
case ${1:-} in
unit | api | faults | slow) set -- "tests/$1" "${@:2}" ;;
esac
[[ ${1:-} != *.py* ]] || workers=0
exec "$python" -m pytest -n "$workers" "${share[@]}" --no-loadscope-reorder "$@"
