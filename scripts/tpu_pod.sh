#!/usr/bin/env bash
# Train on a Cloud TPU pod slice: see docs/pods.md.
#
#   export TPU_NAME=lsgd TPU_ZONE=us-west4-a TPU_TYPE=v5litepod-16 TPU_VERSION=v2-alpha-tpuv5-lite
#   scripts/tpu_pod.sh create
#   scripts/tpu_pod.sh install                          # what is committed in this clone, on all hosts
#   scripts/tpu_pod.sh run data prepare cifar10         # any lsgd command, on all hosts at once
#   scripts/tpu_pod.sh run train resnet20-cifar10-16 --run-dir runs/pod --checkpoint-every 0
#   scripts/tpu_pod.sh fetch runs/pod                   # into runs/ here
#   scripts/tpu_pod.sh delete
#
# With DRY_RUN=1 it prints the commands and runs none.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  echo "usage: $0 create | install | run LSGD_ARGUMENTS... | fetch RUN_DIR | delete" >&2
  exit 2
}

carry_out() {
  if [[ -n ${DRY_RUN:-} ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

pod() { # ACTION ARGUMENTS...
  carry_out gcloud compute tpus tpu-vm "$@" --zone="$TPU_ZONE"
}

on_all_hosts() {
  pod ssh "$TPU_NAME" --worker=all --command="$1"
}

for name in TPU_NAME TPU_ZONE; do
  [[ -n ${!name:-} ]] || { echo "$0: set $name, as the comment at its top shows." >&2; exit 2; }
done

action=${1:-}
shift || usage
case $action in
  create)
    for name in TPU_TYPE TPU_VERSION; do
      [[ -n ${!name:-} ]] || { echo "$0: set $name, as the comment at its top shows." >&2; exit 2; }
    done
    pod create "$TPU_NAME" --accelerator-type="$TPU_TYPE" --version="$TPU_VERSION"
    ;;
  install)
    archive=${TMPDIR:-/tmp}/lsgd-jax.tar.gz
    carry_out git archive --format=tar.gz --output="$archive" HEAD
    pod scp "$archive" "$TPU_NAME:" --worker=all
    # The hosts' own Python may be too old; uv brings one.
    on_all_hosts "set -e
      mkdir -p lsgd-jax && tar xzf lsgd-jax.tar.gz -C lsgd-jax
      python3 -m pip install --quiet --user uv
      python3 -m uv venv --quiet --allow-existing --python 3.11 .venv
      python3 -m uv pip install --quiet --python .venv \
        -c lsgd-jax/requirements.txt -c lsgd-jax/requirements-tpu.txt './lsgd-jax[tpu]'"
    ;;
  run)
    (($#)) || usage
    on_all_hosts ".venv/bin/lsgd$(printf ' %q' "$@")"
    ;;
  fetch)
    (($# == 1)) || usage
    carry_out mkdir -p "$(dirname "$1")"
    pod scp --recurse "$TPU_NAME:$1" "$(dirname "$1")" --worker=0 # The first process writes the run's folder.
    ;;
  delete)
    pod delete "$TPU_NAME" --quiet
    ;;
  *)
    usage
    ;;
esac
