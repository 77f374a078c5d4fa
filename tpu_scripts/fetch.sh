#!/usr/bin/env bash
# Copies a run directory from a worker to here. It arrives whole or not at all, and replaces nothing unasked.
#
# usage: fetch.sh [--overwrite] [options] RUN_DIR
#
#   RUN_DIR      as the run was told: below the checkout over there, or absolute
#   --to DIR     RUN_DIR, here; where it goes
#   --overwrite  replace what is there, once the copy has arrived
#   --worker K   0; the first worker writes a run's results

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
TO='' OVERWRITE='' WORKER=0
parse "to worker" "overwrite" "$@"
at_most 1
no_command
[[ ${#REST[@]} -eq 1 ]] || fail "no run directory; write $SCRIPT runs/NAME"

from=${REST[0]%/}
plain_path "$from"
[[ $from != /* || $TO ]] || fail "$from is absolute; say where to put it with --to"
to=${TO:-$from}
to=${to%/}
plain_path "$to"
[[ $from == /* ]] || from=$REMOTE/$from
[[ ! -e $to || $OVERWRITE ]] || fail "$to exists; choose another --to or pass --overwrite"

run mkdir -p "$(dirname "$to")"
run rm -rf "$to.partial"
tpus tpu-vm scp --recurse "${NODES[0]}:$from" "$to.partial" --worker="$WORKER"
[[ ! $OVERWRITE ]] || run rm -rf "$to"
run mv "$to.partial" "$to"
