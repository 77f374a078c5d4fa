#!/usr/bin/env bash
# The part that runs on a worker; the other scripts call it there. Actions:
#
#   install PYTHON_VERSION COMMAND  virtual environment and package, then a shell command if it is not empty
#   idle                            fails while a run is going
#   start COMMAND ARGUMENT...       runs it detached in the checkout; fails while another is going
#   follow                          prints the last run's log until it ends, exits with its code
#   status                          one line
#   code                            exits with the last run's code
#   stop TERM|KILL                  signals the run and waits for its end

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
JOB=tpu_job # log: of all runs; lock: held by a run; pid, offset, code: of the last one
GOING="a run is going; watch it with logs.sh --follow or end it with stop.sh"
export PATH="$PWD/.venv/bin:$HOME/.local/bin:$PATH"

fail() {
  echo "$(hostname): $*" >&2
  exit 2
}

running() { [[ -e $JOB/lock ]] && ! flock --nonblock "$JOB/lock" true; }

# The exit code of the last run; 1 if it left none, and for 255, which ssh keeps for itself.
last_code() {
  local code=1
  if [[ -s $JOB/code ]]; then code=$(<"$JOB/code"); fi
  [[ $code == 255 ]] && code=1
  return "$code"
}

refuse_if_running() {
  if running; then fail "$GOING"; fi
}

install() {
  command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
  [[ -x .venv/bin/python ]] || uv venv --python "$1" .venv
  uv pip install --python .venv/bin/python --editable '.[tpu]'
  if [[ $2 ]]; then bash -c "$2"; fi
  echo "$(hostname): installed rlhf-jax $(rlhf-jax --version)"
}

# Runs in the background, holding the lock. Survives SIGTERM to its group, so as to keep the command's exit code.
hold() {
  local code=0
  trap : TERM INT
  echo "--- $(date -u +%FT%TZ) started:$(printf ' %q' "$@")"
  "$@" || code=$?
  echo "--- $(date -u +%FT%TZ) ended with code $code"
  echo "$code" >"$JOB/code"
}

start() {
  mkdir -p "$JOB"
  exec 9>"$JOB/lock"
  flock --nonblock 9 || fail "$GOING"
  touch "$JOB/log"
  rm -f "$JOB/code"
  wc -c <"$JOB/log" >"$JOB/offset"
  PYTHONUNBUFFERED=1 setsid bash tpu_scripts/worker.sh hold "$@" >>"$JOB/log" 2>&1 </dev/null &
  echo $! >"$JOB/pid"
  echo "$(hostname): started"
}

follow() {
  [[ -e $JOB/pid ]] || fail "there is no run yet; start one with run.sh"
  local from=$(($(<"$JOB/offset") + 1)) until=()
  if running; then until=(--follow --pid="$(<"$JOB/pid")"); fi # else the pid may be another's by now
  tail --bytes=+"$from" "${until[@]}" "$JOB/log"
  last_code
}

code() { last_code; }

status() {
  local code=0
  if running; then
    echo "$(hostname): a run is going"
  elif [[ ! -e $JOB/pid ]]; then
    echo "$(hostname): no run yet"
  elif [[ ! -s $JOB/code ]]; then
    echo "$(hostname): the last run was killed, or the machine restarted"
  else
    last_code || code=$?
    echo "$(hostname): the last run ended with code $code"
  fi
}

stop() {
  if ! running; then
    echo "$(hostname): nothing to stop"
    return
  fi
  kill -s "$1" -- "-$(<"$JOB/pid")" || true # the whole group; it may have ended by itself
  for _ in {1..60}; do
    if ! running; then
      echo "$(hostname): stopped"
      return
    fi
    sleep 1
  done
  fail "still going after a minute; wait for it to save, or stop.sh --kill"
}

case ${1:-} in
  idle) refuse_if_running ;;
  install | start | follow | status | code | stop | hold) "$@" ;;
  *) fail "unknown action '${1:-}'; the scripts here and on this worker differ: run setup.sh" ;;
esac
