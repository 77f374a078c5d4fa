#!/usr/bin/env bash
# Ends the run on all workers: SIGTERM, then up to a minute of waiting.
#
# usage: stop.sh [--kill] [options]
#
#   --kill  SIGKILL, at once; what was not saved is lost

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
KILL=''
parse "" "kill" "$@"
at_most 0
no_command

if [[ $KILL ]]; then worker all stop KILL; else worker all stop TERM; fi
