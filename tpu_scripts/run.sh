#!/usr/bin/env bash
# Runs a command on all workers, in the checkout that setup.sh made. It outlives the connection: Ctrl-C only stops
# watching. Follows one worker until the command ends, gathers the logs of all and exits with the command's code.
# Refused while a run is going on any worker.
#
# usage: run.sh [--detach] [options] -- COMMAND ARGUMENT...
#
#   --detach     start it and return; watch with logs.sh --follow, end it with stop.sh
#   --worker K   0; the worker to follow
#   --workers N  how many workers there are; asked from gcloud if not given
#   --to DIR     runs/tpu/NAME/TIME; a new directory for the logs, worker-0.log and so on

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
DETACH='' WORKER=0 WORKERS='' TO=''
parse "worker workers to" "detach" "$@"
[[ ${#COMMAND[@]} -gt 0 ]] || fail "no command; write it after --, as $SCRIPT -- rlhf-jax quickstart"
at_most 0

[[ ! $TO ]] || new_directory "$TO"

code=0
worker all idle || code=$?
[[ $code != 127 ]] || fail "$TPU_NAME is not set up; run setup.sh first"
[[ $code == 0 ]] || exit "$code"
worker all start "${COMMAND[@]}"
if [[ $DETACH ]]; then exit; fi
say "following worker $WORKER; Ctrl-C leaves the run going, logs.sh --follow comes back to it"
script logs.sh --follow --worker "$WORKER" ${WORKERS:+--workers "$WORKERS"} ${TO:+--to "$TO"}
