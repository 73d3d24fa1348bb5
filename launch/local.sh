#!/usr/bin/env bash
# Trains with several processes on this machine, to try a multi-host run without hosts:
#
#   launch/local.sh NUM_PROCESSES CONFIG [--key value ...]
#
#   PYTHON                the interpreter (default: .venv/bin/python of this checkout, else python3)
#   DEVICES_PER_PROCESS   CPU devices of each process (default: jax decides)
#
# Each process gets JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, as a multi-host launcher sets them.
# SIGTERM and SIGINT are passed on. When a process fails the others are ended; its exit code is the script's.
set -uo pipefail

if [ $# -lt 2 ] || ! [[ "$1" =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: launch/local.sh NUM_PROCESSES CONFIG [--key value ...]" >&2
  exit 2
fi
num_processes="$1"
config="$2"
shift 2

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [ -z "${PYTHON:-}" ]; then
  PYTHON="$root/.venv/bin/python"
  [ -x "$PYTHON" ] || PYTHON=python3
fi
port="$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')" || exit 1
export JAX_COORDINATOR_ADDRESS="127.0.0.1:$port"
export JAX_NUM_PROCESSES="$num_processes"
export PYTHONUNBUFFERED=1
[ -z "${DEVICES_PER_PROCESS:-}" ] || export JAX_NUM_CPU_DEVICES="$DEVICES_PER_PROCESS"

GRACE_SECONDS=30
set -m # without job control bash starts background processes deaf to SIGINT
pids=()
prefixers=()
signal_all() {
  # A process that is gone already is no fault.
  [ ${#pids[@]} -eq 0 ] || kill -s "$1" "${pids[@]}" 2>/dev/null || true
}
stop_requested=""
trap 'stop_requested=1; signal_all TERM' TERM
trap 'stop_requested=1; signal_all INT' INT

for ((process = 0; process < num_processes; process++)); do
  exec {output}> >(trap '' INT TERM; exec sed -u "s/^/[$process] /")
  prefixers+=("$!")
  JAX_PROCESS_ID="$process" "$PYTHON" -m r1jax.train --config "$config" "$@" >&"$output" 2>&1 &
  pids+=("$!")
  exec {output}>&-
done

status=0
killer=""
while [ ${#pids[@]} -gt 0 ]; do
  finished=""
  wait -n -p finished "${pids[@]}"
  code=$?
  # A trapped signal ends wait while everything still runs.
  [ -n "${finished:-}" ] || continue
  remaining=()
  for pid in "${pids[@]}"; do
    [ "$pid" = "$finished" ] || remaining+=("$pid")
  done
  pids=("${remaining[@]}")
  [ "$code" -ne 0 ] && [ "$status" -eq 0 ] || continue
  status="$code"
  if [ ${#pids[@]} -gt 0 ] && [ -z "$stop_requested" ]; then
    echo "launch/local.sh: a process ended with exit code $code; ending the others" >&2
    signal_all TERM
    # One that waits inside a collective for the lost process never sees TERM.
    (sleep "$GRACE_SECONDS"; kill -s KILL "${pids[@]}" 2>/dev/null) &
    killer=$!
    disown "$killer" # its own end is not worth a message
  fi
done
[ -z "$killer" ] || kill -- -"$killer" 2>/dev/null
for prefixer in "${prefixers[@]}"; do # their last lines come before our end
  wait "$prefixer" 2>/dev/null
done
exit "$status"
