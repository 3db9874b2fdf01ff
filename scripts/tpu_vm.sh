#!/usr/bin/env bash
# One training run on all workers of a TPU VM slice; arguments go to `saejax train`:
#   TPU=my-slice ZONE=us-central2-b SAEJAX='saejax[wandb]' scripts/tpu_vm.sh hydra.run.dir=/mnt/shared/runs/first sae.k=64
# The run directory and the store lie where every worker sees them, say on a mounted bucket or file server.
# The same command after a preemption, with a new slice of the same name, goes on from the last checkpoint.
# Not tried on a real slice. SAEJAX is what pip installs: a release, a wheel or a git address.
set -euo pipefail

: "${TPU:?the name of the slice}" "${ZONE:?its zone}" "${SAEJAX:?what pip installs}"

on_every_worker() {
  gcloud compute tpus tpu-vm ssh "${TPU}" --zone="${ZONE}" --worker=all --command="$1"
}

if [[ " $*" != *" hydra.run.dir="* ]]; then
  echo "tpu_vm.sh: hydra.run.dir=DIR must be given, a directory that all workers see" >&2
  exit 2
fi

on_every_worker "python3 -m venv saejax && saejax/bin/pip install -q 'jax[tpu]' $(printf '%q' "${SAEJAX}")"
on_every_worker "saejax/bin/saejax train mesh.distributed=tpu $(printf '%q ' "$@")"
