# shellcheck shell=bash
# What the scripts share: settings, options, dry runs, and how gcloud is spoken to. It is sourced, not run.

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
SCRIPT=${0##*/}
REMOTE=rlhf_jax # the checkout on every worker, below the home directory

export TPU_NAME=${TPU_NAME:-rlhf-jax} ZONE=${ZONE:-} PROJECT=${PROJECT:-}
export ACCELERATOR_TYPE=${ACCELERATOR_TYPE:-v5litepod-8} RUNTIME_VERSION=${RUNTIME_VERSION:-}
export QUEUED=${QUEUED:-} NODE_COUNT=${NODE_COUNT:-} SPOT=${SPOT:-}
export CREATE_FLAGS=${CREATE_FLAGS:-} POLL_SECONDS=${POLL_SECONDS:-30}
export PYTHON_VERSION=${PYTHON_VERSION:-3.12} SETUP_COMMAND=${SETUP_COMMAND:-} DRY_RUN=${DRY_RUN:-}

COMMON_HELP='
options of every script, the variable that sets the same, and the default:
  --tpu-name NAME   TPU_NAME   rlhf-jax
  --zone ZONE       ZONE       compute/zone of gcloud config
  --project ID      PROJECT    core/project of gcloud config
  --node-count N    NODE_COUNT one slice; with more, queued, the nodes are NAME-0, NAME-1 ...
  --dry-run         DRY_RUN=1  print the commands, run nothing
  --help'

say() { [[ $DRY_RUN ]] || echo "$SCRIPT: $*" >&2; }

# What the user can mend: one line, exit code 2.
fail() {
  echo "$SCRIPT: error: $*" >&2
  exit 2
}

# quote WORDS...: one line that a shell, here or on a worker, reads back as the same words.
quote() {
  local word flag line='' escaped="'\\''"
  for word in "$@"; do
    flag=''
    if [[ $word =~ ^--[a-z-]+= ]]; then flag=${BASH_REMATCH[0]} word=${word#*=}; fi
    if [[ ! $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then word=\'${word//\'/$escaped}\'; fi
    line="$line${line:+ }$flag$word"
  done
  printf '%s\n' "$line"
}

# parse OPTIONS SWITCHES ARGUMENTS...: --zone VALUE or --zone=VALUE sets ZONE, a switch is 1 or empty afterwards. What
# follows -- goes to the array COMMAND, what is no option to REST.
parse() {
  local options=" tpu-name zone project node-count $1 " switches=" dry-run $2 " name variable
  shift 2
  REST=() COMMAND=()
  while [[ $# -gt 0 ]]; do
    name=${1#--}
    name=${name%%[!a-z-]*}
    variable=$(upper "$name")
    if [[ $1 == -- ]]; then
      COMMAND=("${@:2}")
      break
    elif [[ $1 == -h || $1 == --help ]]; then
      sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
      echo "$COMMON_HELP"
      exit 0
    elif [[ $1 != -* ]]; then
      REST+=("$1")
    elif [[ ! $name ]]; then
      fail "unknown option $1; $SCRIPT --help lists all"
    elif [[ $1 == "--$name" && $switches == *" $name "* ]]; then
      printf -v "$variable" 1
    elif [[ $1 == "--$name="* && $options == *" $name "* ]]; then
      printf -v "$variable" %s "${1#*=}"
    elif [[ $1 == "--$name" && $options == *" $name "* ]]; then
      [[ $# -gt 1 && $2 != --* ]] || fail "$1 has no value; write $1 VALUE"
      printf -v "$variable" %s "$2"
      shift
    else
      fail "unknown option $1; $SCRIPT --help lists all"
    fi
    shift
  done
  for name in $switches; do
    variable=$(upper "$name")
    case ${!variable} in
      1 | true | yes) printf -v "$variable" 1 ;;
      '' | 0 | false | no) printf -v "$variable" '' ;;
      *) fail "$variable is '${!variable}'; set it to 1 or 0" ;;
    esac
  done
  [[ $NODE_COUNT =~ ^([1-9][0-9]*)?$ ]] || fail "--node-count is '$NODE_COUNT'; give a whole number above 0"
  NODES=("$TPU_NAME")
  if [[ $NODE_COUNT ]]; then
    NODES=()
    for ((i = 0; i < NODE_COUNT; i++)); do NODES+=("$TPU_NAME-$i"); done
  fi
  [[ $DRY_RUN ]] || command -v gcloud >/dev/null || fail "gcloud is not on PATH; install the Google Cloud CLI"
}

upper() { printf %s "$1" | tr a-z- A-Z_; }

# at_most COUNT: refuse more arguments than a script takes.
at_most() { [[ ${#REST[@]} -le $1 ]] || fail "unexpected argument '${REST[$1]}'; $SCRIPT --help shows the usage"; }

# no_command: refuse what follows -- in a script that has no use for it.
no_command() {
  [[ ${#COMMAND[@]} -eq 0 ]] || fail "unexpected argument '${COMMAND[0]}'; $SCRIPT --help shows the usage"
}

# plain_path PATH: refuse a path that scp, tar or a remote shell could read in another way.
plain_path() {
  [[ $1 =~ ^[A-Za-z0-9_./@%+=,][A-Za-z0-9_./@%+=,-]*$ && /$1/ != */../* ]] ||
    fail "path '$1' has '..', spaces or special characters; rename it or go to another directory"
}

# new_directory PATH: refuse one that exists.
new_directory() {
  plain_path "$1"
  [[ ! -e $1 ]] || fail "$1 exists; choose another --to"
}

# script NAME ARGUMENTS...: another of the scripts, with the same settings.
script() { "$HERE/$1" "${@:2}"; }

# run COMMAND...: run it, saying so; in a dry run only print it.
run() {
  if [[ $DRY_RUN ]]; then
    quote "$@"
  else
    quote "$@" | sed 's/^/+ /' >&2
    "$@"
  fi
}

# tpus GROUP VERB ARGUMENTS...: gcloud's command for TPUs, in our zone and project.
tpus() { run gcloud compute tpus "$@" ${ZONE:+"--zone=$ZONE"} ${PROJECT:+"--project=$PROJECT"}; }

# ask VARIABLE ASSUMED GROUP describe ...: what gcloud answers, MISSING if there is no such TPU; in a dry run, ASSUMED.
ask() {
  local answer=$2 errors='' code=0 command
  command=(gcloud compute tpus "${@:3}" ${ZONE:+"--zone=$ZONE"} ${PROJECT:+"--project=$PROJECT"})
  if [[ $DRY_RUN ]]; then
    quote "${command[@]}"
  else
    errors=$(mktemp)
    answer=$("${command[@]}" 2>"$errors") || code=$?
    if [[ $code != 0 ]] && grep -q NOT_FOUND "$errors"; then
      answer=MISSING code=0
    elif [[ $code != 0 ]]; then
      cat "$errors" >&2
    fi
    rm -f "$errors"
  fi
  printf -v "$1" %s "$answer"
  return "$code"
}

# at_once FUNCTION ARGUMENTS...: of each node of the TPU, its name first; ends with the code of one that failed.
at_once() {
  local code=0 node job jobs=()
  for node in "${NODES[@]}"; do
    if [[ $DRY_RUN || ${#NODES[@]} -eq 1 ]]; then
      "$1" "$node" "${@:2}" || code=$?
    else
      "$1" "$node" "${@:2}" &
      jobs+=($!)
    fi
  done
  for job in ${jobs[@]+"${jobs[@]}"}; do wait "$job" || code=$?; done
  return "$code"
}

remote_on() { tpus tpu-vm ssh "$1" --worker="$2" --command="$3"; }
copy_to() { tpus tpu-vm scp "$2" "$1:" --worker=all; }

# remote WORKERS SHELL_COMMAND: in the home directory of worker 0, or 0,2 of the first node, or of all of all nodes.
remote() {
  if [[ $1 == all ]]; then at_once remote_on "$@"; else remote_on "${NODES[0]}" "$@"; fi
}

# worker WORKERS ACTION...: an action of worker.sh.
worker() { remote "$1" "bash $REMOTE/tpu_scripts/worker.sh $(quote "${@:2}")"; }

# confirm WHAT: go on only if the user agrees, or has agreed with --yes.
confirm() {
  local answer=''
  if [[ $DRY_RUN || $YES ]]; then return; fi
  [[ -t 0 ]] || fail "will not $1 unasked; pass --yes"
  read -r -p "$SCRIPT: $1? [y/N] " answer
  [[ $answer == [yY]* ]] || fail "left as it is; answer y or pass --yes to $1"
}

# wait_until_active: wait for the queue; returns when the nodes of the queued resource are there.
wait_until_active() {
  local state='' before=''
  while true; do
    ask state ACTIVE queued-resources describe "$TPU_NAME" '--format=value(state.state)'
    case $state in
      ACTIVE) return ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING | MISSING)
        fail "queued resource $TPU_NAME is $state; delete it (delete.sh --queued) and create it again"
        ;;
    esac
    [[ $state == "$before" ]] || say "queued resource $TPU_NAME is $state; asking every $POLL_SECONDS s"
    before=$state
    sleep "$POLL_SECONDS"
  done
}
