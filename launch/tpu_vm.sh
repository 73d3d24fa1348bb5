#!/usr/bin/env bash
# Trains on all workers of a Cloud TPU VM, started by gcloud from here:
#
#   launch/tpu_vm.sh NAME ZONE [--max_restarts R] CONFIG [--key value ...]
#
#   DIRECTORY   the checkout on each worker, with its .venv (default: r1jax in the home folder)
#   PYTHON      the interpreter there, seen from DIRECTORY (default: .venv/bin/python)
#   PROJECT     the Google Cloud project (default: gcloud's own)
#
# Each worker runs the same command; JAX asks the metadata server who the others are. output_dir must be seen by all
# workers (a mounted bucket or Filestore). Variables that begin with HF_, R1JAX_, WANDB_, XLA_ or LIBTPU_ go along.
set -euo pipefail

if [ $# -lt 3 ]; then
  echo "usage: launch/tpu_vm.sh NAME ZONE [--max_restarts R] CONFIG [--key value ...]" >&2
  exit 2
fi
name="$1"
zone="$2"
shift 2

settings=()
while IFS= read -r variable; do
  settings+=("$variable=${!variable}")
done < <(compgen -e | grep -E '^(HF_|R1JAX_|WANDB_|XLA_|LIBTPU_)' || true)

# Quoted for the shell there. DIRECTORY is not, so that it may begin with ~.
words="$(printf '%q ' "${settings[@]}" "${PYTHON:-.venv/bin/python}" -m r1jax.launch "$@")"
exec gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" ${PROJECT:+--project="$PROJECT"} --worker=all \
  --command="cd ${DIRECTORY:-r1jax} && exec env ${words% }"
