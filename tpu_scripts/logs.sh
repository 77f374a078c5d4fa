#!/usr/bin/env bash
# Gathers the logs of the runs on all workers, one file for each, into a new directory, and says how each worker is.
#
# usage: logs.sh [--follow] [options]
#
#   --follow     first print the log of the last run until it ends; then exit with the code of its command
#   --worker K   0; the worker to follow
#   --workers N  how many workers there are; asked from gcloud if not given (a dry run takes one)
#   --to DIR     runs/tpu/NAME/TIME; a new directory for the logs, worker-0.log and so on

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
FOLLOW='' WORKER=0 WORKERS='' TO=''
parse "worker workers to" "follow" "$@"
at_most 0
no_command
TO=${TO:-runs/tpu/$TPU_NAME/$(date +%Y%m%d-%H%M%S)}
new_directory "$TO"
[[ $WORKERS =~ ^([1-9][0-9]*)?$ ]] || fail "--workers is '$WORKERS'; give a whole number above 0"

# log_of NODE K: to worker-K.log, or where there are several nodes to NODE-worker-K.log.
log_of() {
  local name=worker-$2.log
  if [[ ${#NODES[@]} -gt 1 ]]; then name=$1-$name; fi
  tpus tpu-vm scp "$1:$REMOTE/tpu_job/log" "$TO/$name" --worker="$2"
}

# All at once: a pod slice has many workers. Ends with the code of one that failed.
gather() {
  local code=0 k node job jobs=()
  if [[ ! $WORKERS ]]; then
    ask WORKERS 1 tpu-vm describe "${NODES[0]}" '--format=value(networkEndpoints.len())' || return
    [[ $WORKERS =~ ^[1-9][0-9]*$ ]] || fail "gcloud counts '$WORKERS' workers of ${NODES[0]}; pass --workers"
  fi
  run mkdir -p "$TO" || return
  for node in "${NODES[@]}"; do
    for ((k = 0; k < WORKERS; k++)); do
      if [[ $DRY_RUN ]]; then
        log_of "$node" "$k"
      else
        log_of "$node" "$k" &
        jobs+=($!)
      fi
    done
  done
  for job in ${jobs[@]+"${jobs[@]}"}; do wait "$job" || code=$?; done
  [[ $code != 0 ]] || say "logs of $((WORKERS * ${#NODES[@]})) worker(s) are in $TO"
  return "$code"
}

code=0
if [[ $FOLLOW ]]; then
  worker "$WORKER" follow || code=$?
else
  worker all status
fi
if [[ $code == 0 ]]; then
  gather
else
  gather || say "not all logs came; run logs.sh again"
fi
exit "$code"
