#!/usr/bin/env bash
# Creates a TPU VM or a pod slice: at once, or through the queue of queued resources, which waits for capacity.
#
# usage: create.sh [--queued] [--spot] [options]
#
#   --accelerator-type TYPE  ACCELERATOR_TYPE  v5litepod-8. v5litepod-N (or v5e-N) and v6e-N count chips, v5p-N and
#                                              older ones cores, two to a chip; more than one host makes a pod slice
#   --runtime-version NAME   RUNTIME_VERSION   the one for PyTorch and JAX that fits the type
#   --node-count N           NODE_COUNT        so many slices of that type, through the queue (mesh.slices)
#   --queued                 QUEUED=1          request it as a queued resource of the same name, and wait for it
#   --spot                   SPOT=1            cheaper, may be taken away at any time
#   --async                                    return as soon as the request is made
#                            CREATE_FLAGS      more flags for gcloud, split at spaces: "--network=mine --labels=a=b"
#                            POLL_SECONDS      30; how often to ask for a queued resource

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
ASYNC=''
parse "accelerator-type runtime-version" "queued spot async" "$@"
at_most 0
no_command

type=${ACCELERATOR_TYPE/#v5e-/v5litepod-} # as gcloud calls it
case $type in
  v5litepod-*) fitting=v2-alpha-tpuv5-lite ;;
  v5p-*) fitting=v2-alpha-tpuv5 ;;
  v6e-*) fitting=v2-alpha-tpuv6e ;;
  v[234]-*) fitting=tpu-ubuntu2204-base ;;
  *) fitting='' ;;
esac
version=${RUNTIME_VERSION:-$fitting}
[[ $version ]] || fail "no runtime version is known for accelerator type '$type'; pass --runtime-version"

flags=(--accelerator-type="$type")
if [[ $SPOT ]]; then flags+=(--spot); fi
if [[ $ASYNC ]]; then flags+=(--async); fi
read -ra more <<<"$CREATE_FLAGS"
flags+=(${more[@]+"${more[@]}"})

if [[ $NODE_COUNT && ! $QUEUED ]]; then fail "--node-count $NODE_COUNT needs --queued; pass both"; fi
if [[ $QUEUED ]]; then
  node=(--node-id="$TPU_NAME")
  if [[ $NODE_COUNT ]]; then node=(--node-count="$NODE_COUNT" --node-prefix="$TPU_NAME"); fi
  tpus queued-resources create "$TPU_NAME" "${node[@]}" --runtime-version="$version" "${flags[@]}"
  [[ $ASYNC ]] || wait_until_active
else
  tpus tpu-vm create "$TPU_NAME" --version="$version" "${flags[@]}"
fi
