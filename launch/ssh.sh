#!/usr/bin/env bash
# Trains with processes on several hosts, started by ssh from here:
#
#   launch/ssh.sh HOSTFILE [--max_restarts R] CONFIG [--key value ...]
#
#   HOSTFILE                a host a line, `[user@]host [processes]` (1); # begins a comment. The first has process 0
#   PYTHON                  the interpreter, the same path on all hosts (default: .venv/bin/python of this checkout)
#   SSH                     the command (default: ssh, asking nothing, that takes 20 s of silence for a lost host)
#   JAX_COORDINATOR_PORT    the port of process 0 that the others connect to (default: a free one is guessed)
#
# Each host has this directory, the checkout and output_dir under the same paths. The first host must be reachable from
# the others under the name in the file. Variables that begin with HF_, JAX_, LIBTPU_, NCCL_, R1JAX_, WANDB_ or XLA_ go
# along.
set -euo pipefail

if [ $# -lt 2 ]; then
  echo "usage: launch/ssh.sh HOSTFILE [--max_restarts R] CONFIG [--key value ...]" >&2
  exit 2
fi
hosts="$1"
shift

if [ -z "${PYTHON:-}" ]; then
  PYTHON="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin/python"
  [ -x "$PYTHON" ] || PYTHON=python3
fi
exec "$PYTHON" -m r1jax.launch --hosts "$hosts" "$@"
