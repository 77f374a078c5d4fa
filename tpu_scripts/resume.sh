#!/usr/bin/env bash
# Goes on after a preemption: if the TPU is gone, deletes what is left of it, creates it again and sets it up; then
# runs the command as run.sh does. If it is there, only runs the command.
#
# usage: resume.sh [--yes] [options] [PATH ...] -- COMMAND ARGUMENT...
#
#   PATH        what setup.sh is to copy too: the run directory that fetch.sh brought, data. The disk of a preempted
#               TPU is lost, so a run can only go on from what lies elsewhere
#   --yes       do not ask before deleting and creating
#   --until-done  go on by itself, unasked, until the command ends with another code than 0 on a TPU that is READY, or
#               with 0: for commands that go on where they were, such as those whose --run.output_dir is in a bucket.
#               75 (run.exit_code_when_stopped) counts as stopped by the preemption, and is started again
#   --recreate  delete and create in any state; a preempted pod slice may also say REPAIRING, or READY and not answer
#   and the options of create.sh, setup.sh and run.sh, which must be those that made the TPU:
#   --accelerator-type TYPE, --runtime-version NAME, --queued, --spot, --python-version VERSION,
#   --setup-command COMMAND, --detach, --worker K, --workers N, --to DIR; CREATE_FLAGS, POLL_SECONDS

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
YES='' RECREATE='' DETACH='' UNTIL_DONE='' WORKER='' WORKERS='' TO=''
parse "accelerator-type runtime-version python-version setup-command worker workers to" \
  "queued spot yes recreate detach until-done" "$@"
[[ ${#COMMAND[@]} -gt 0 ]] || fail "no command; write it after --, as $SCRIPT -- rlhf-jax ppo --config ppo.yaml"

# Waits in the queue if our request is still there, else makes a new one.
recreate_queued() {
  local request=''
  ask request SUSPENDED queued-resources describe "$TPU_NAME" '--format=value(state.state)'
  case $request in
    CREATING | ACCEPTED | WAITING_FOR_RESOURCES | PROVISIONING) wait_until_active ;;
    SUSPENDING | DELETING) fail "queued resource $TPU_NAME is $request; try again in a minute" ;;
    *) recreate "$request" ;;
  esac
}

# recreate STATE: delete what is left, if anything is, and create it.
recreate() {
  confirm "delete what is left of $TPU_NAME ($1) and create it again"
  [[ $1 == MISSING ]] || script delete.sh --yes
  script create.sh
}

# state_of_all VARIABLE: READY if all nodes are, else the state of one that is not.
state_of_all() {
  local node one=''
  for node in "${NODES[@]}"; do
    ask one PREEMPTED tpu-vm describe "$node" '--format=value(state)' || return
    printf -v "$1" %s "$one"
    [[ $one == READY ]] || return 0
  done
}

# until_done ARGUMENTS...: what this script was called with, again and again.
until_done() {
  local code argument again=() state=''
  for argument in "$@"; do
    if [[ $argument != --until-done ]]; then again+=("$argument"); fi
  done
  while true; do
    code=0
    UNTIL_DONE='' script resume.sh --yes "${again[@]}" || code=$?
    [[ $code != 0 ]] || return 0
    state_of_all state || state=UNKNOWN
    while [[ $state == READY ]]; do
      [[ $code != 75 ]] || break # saved; the TPU is still there, or does not know yet that it is not
      code=0
      worker all idle || code=$?
      if [[ $code == 0 ]]; then # nothing runs any more: it ended by itself
        worker "${WORKER:-0}" code || return
        return 0
      fi
      [[ $code != 127 ]] || fail "$TPU_NAME is not set up; run setup.sh first"
      say "the connection was lost, not the run; following it again in $POLL_SECONDS s"
      sleep "$POLL_SECONDS"
      code=0
      script logs.sh --follow ${WORKER:+--worker "$WORKER"} ${WORKERS:+--workers "$WORKERS"} || code=$?
      [[ $code != 0 ]] || return 0
      state_of_all state || state=UNKNOWN
    done
    say "stopped with code $code, and $TPU_NAME is $state; going on in $POLL_SECONDS s"
    sleep "$POLL_SECONDS"
  done
}

if [[ $UNTIL_DONE && ! $DRY_RUN ]]; then
  [[ ! $DETACH && ! $TO ]] || fail "--until-done follows each run into new logs; leave out --detach and --to"
  until_done "$@"
  exit
fi

state=''
if [[ $DRY_RUN ]]; then echo "# for a TPU that was preempted; of one that is READY, only what follows the setup"; fi
state_of_all state
if [[ $RECREATE && $state != MISSING ]]; then state=PREEMPTED; fi
case $state in
  READY) say "$TPU_NAME is READY; only the command is run" ;;
  PREEMPTED | TERMINATED | MISSING)
    say "$TPU_NAME is $state"
    if [[ $QUEUED ]]; then recreate_queued; else recreate "$state"; fi
    script setup.sh ${REST[@]+"${REST[@]}"}
    ;;
  STOPPED) fail "$TPU_NAME is STOPPED; start it: gcloud compute tpus tpu-vm start $TPU_NAME" ;;
  *) fail "$TPU_NAME is $state; try again when it is READY, or pass --recreate" ;;
esac
script run.sh ${DETACH:+--detach} ${WORKER:+--worker "$WORKER"} ${WORKERS:+--workers "$WORKERS"} ${TO:+--to "$TO"} \
  -- "${COMMAND[@]}"
