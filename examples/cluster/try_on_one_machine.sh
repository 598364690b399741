#!/usr/bin/env bash
# The two-node recipe of README.md in small: both nodes are this machine, on the loopback addresses 127.0.0.2 and 127.0.0.3.
#   bash examples/cluster/try_on_one_machine.sh        PYTHON=... chooses the interpreter; some minutes on 2 cores, 6 GB of memory
# Everything goes to runs/cluster. What is started here is ended here, and nothing else is: a Ray of yours goes on.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-.venv/bin/python}
OUT=runs/cluster HEAD=127.0.0.2 OTHER=127.0.0.3  # not 127.0.0.1: Ray takes that for the machine's own address
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 DS_ACCELERATOR=cpu GLOO_SOCKET_IFNAME=lo
export RAY_USAGE_STATS_ENABLED=0 VLLM_LOGGING_LEVEL=WARNING

groups=()
ray_files=$(mktemp -d /tmp/ray-XXXX)       # short: Ray puts sockets below it
"$PYTHON" -c 'import secrets; print(secrets.token_hex(32), end="")' >"$ray_files/token"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$ray_files/token
end() {
    exec 2>/dev/null
    for signal in TERM KILL; do
        for g in "${groups[@]}"; do kill -$signal -- "-$g" || true; done
        [ $signal = KILL ] || sleep 5
    done
    rm -rf "$ray_files"
}
trap end EXIT
background() {  # LOG COMMAND...: in a process group of its own
    setsid "${@:2}" >"$OUT/$1.log" 2>&1 &
    groups+=($!)
}
free_port() { "$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
until_it_works() {  # SECONDS COMMAND...
    for _ in $(seq "$1"); do "${@:2}" >"$OUT/wait.log" 2>&1 && return; sleep 1; done
    echo "failed $1 times: ${*:2}" >&2; tail -n 3 "$OUT/wait.log"; return 1
}
train_on_two_nodes() {  # NAME OPTIONS...: a launcher for each node, one rank each
    local port; port=$(free_port)
    local launch=("$PYTHON" -m torch.distributed.run --nnodes 2 --nproc-per-node 1 --master-addr "$HEAD" --master-port "$port")
    local train=(-m rlpretrain.cli train examples/cluster/small.yaml --output_dir "$OUT/$1" "${@:2}")
    rm -rf "${OUT:?}/$1"
    local node ranks=()
    for node in 2 1; do
        background "node-$node-$1" "${launch[@]}" --node-rank $((node - 1)) "${train[@]}"
        ranks+=($!)
    done
    wait "${ranks[0]}" && wait "${ranks[1]}" || { tail -n 40 "$OUT"/node-?-"$1".log; return 1; }
}

mkdir -p "$OUT"
echo "== a corpus and a base model of 40 steps"
[ -f $OUT/corpus/train.jsonl ] || "$PYTHON" -m rlpretrain.cli corpus dial --out $OUT/corpus --base 5000 --train 2000
[ -f $OUT/base/model/model.safetensors ] || { rm -rf $OUT/base
    "$PYTHON" -m rlpretrain.cli train examples/dial_base.yaml --model.path $OUT/corpus/model --data.path $OUT/corpus/base.jsonl \
        --max_steps 40 --output_dir $OUT/base --console false; }

echo "== Ray on two nodes, engines as actors, ZeRO 3 over two ranks"
port=$(free_port)
ray=("$PYTHON" -m ray.scripts.scripts start --block --num-cpus 1 --object-store-memory 200000000 --temp-dir "$ray_files")
background node-1-ray "${ray[@]}" --head --node-ip-address $HEAD --port "$port" --include-dashboard false
export RAY_ADDRESS=$HEAD:$port             # what `address: auto` looks at first
until_it_works 30 "$PYTHON" -m ray.scripts.scripts status
background node-2-ray "${ray[@]}" --address "$RAY_ADDRESS" --node-ip-address $OTHER
until_it_works 30 bash -c "'$PYTHON' -m ray.scripts.scripts status | grep '/2.0 CPU'"
train_on_two_nodes actors

echo "== a vLLM server on the second node, ZeRO 3 over two ranks"
port=$(free_port)
VLLM_SERVER_DEV_MODE=1 background node-2-server "$PYTHON" -m vllm.entrypoints.openai.api_server --model $OUT/base/model \
    --host $OTHER --port "$port" --dtype float32 --enforce-eager --no-enable-chunked-prefill --block-size 32 --kv-cache-memory-bytes 67108864 --max-num-seqs 64 \
    --logprobs-mode processed_logprobs --generation-config vllm
train_on_two_nodes servers --engine.name vllm_server --engine.urls "[http://$OTHER:$port]"

echo "== what came of it"
"$PYTHON" - $OUT/actors $OUT/servers <<'EOF'
import json, sys
from pathlib import Path
for folder in map(Path, sys.argv[1:]):
    run = json.loads((folder / "run.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    worst = {name: max(row[name] for row in rows) for name in ("sampling/probe_difference", "sampling/abs_log_ratio_max")}
    assert run["status"] == "done" and run["ranks"] == 2 and (folder / "model" / "model.safetensors").is_file()
    assert all(value < 1e-3 for value in worst.values()), worst
    print(f"{folder}: {run['engine']['kind']}, {run['backend']} on {run['ranks']} ranks, {run['step']} steps,", worst)
    print("    gradient norms", *(f"{row['grad_norm']:.3f}" for row in rows))
EOF
