#!/usr/bin/env bash
# Deletes the TPU, and with it every disk and every result that was not fetched. Asks first.
#
# usage: delete.sh [--queued] [--yes] [options]
#
#   --queued  QUEUED=1  it was made with create.sh --queued: delete the queued resource and its node
#   --yes               do not ask

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
YES=''
parse "" "queued yes" "$@"
at_most 0
no_command

confirm "delete $TPU_NAME and everything on its disks"
if [[ $QUEUED ]]; then
  tpus queued-resources delete "$TPU_NAME" --force --quiet
else
  tpus tpu-vm delete "$TPU_NAME" --quiet
fi
