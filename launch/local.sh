#!/usr/bin/env bash
# Trains with several processes on this machine:
#
#   launch/local.sh NUM_PROCESSES [--max_restarts R] CONFIG [--key value ...]
#
#   PYTHON                the interpreter (default: .venv/bin/python of this checkout, else python3)
#   DEVICES_PER_PROCESS   CPU devices of each process (default: jax decides)
#
# Each process gets JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. SIGTERM and SIGINT are passed on. When
# a process is lost one line says which and why, the others are ended, and its exit code is the script's.
set -euo pipefail

if [ $# -lt 2 ] || ! [[ "$1" =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: launch/local.sh NUM_PROCESSES [--max_restarts R] CONFIG [--key value ...]" >&2
  exit 2
fi
num_processes="$1"
shift

if [ -z "${PYTHON:-}" ]; then
  PYTHON="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin/python"
  [ -x "$PYTHON" ] || PYTHON=python3
fi
[ -z "${DEVICES_PER_PROCESS:-}" ] || export JAX_NUM_CPU_DEVICES="$DEVICES_PER_PROCESS"
exec "$PYTHON" -m r1jax.launch --num_processes "$num_processes" "$@"
