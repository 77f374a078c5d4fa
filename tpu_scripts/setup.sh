#!/usr/bin/env bash
# Installs this checkout on every worker: copies it, gets Python with uv (the images have 3.10), makes a virtual
# environment. What git tracks (git add is enough) is copied as it is now. Run it again after a change.
#
# usage: setup.sh [options] [PATH ...]
#
#   PATH                      files and directories here to copy too, to the same place in the checkout over there:
#                             data, models, a fetched run directory
#   --python-version VERSION  PYTHON_VERSION  3.12
#   --setup-command COMMAND   SETUP_COMMAND   none; a shell command for every worker after the installation, such as
#                                             'hf download HuggingFaceTB/SmolLM2-135M --local-dir models/smol'

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
ROOT=$(dirname "$HERE")
parse "python-version setup-command" "" "$@"
no_command

for path in ${REST[@]+"${REST[@]}"}; do
  plain_path "$path"
  [[ $path != /* ]] || fail "path $path is absolute; give one below the current directory"
  [[ -e $path ]] || fail "there is no $path; check the path"
done

tree=HEAD
if [[ ! $DRY_RUN ]]; then
  changed=$(git -C "$ROOT" -c user.name=setup -c user.email=setup@localhost stash create) # a commit without a branch
  tree=${changed:-HEAD}
fi
archive=$ROOT/build/tpu/rlhf_jax.tar
run mkdir -p "$ROOT/build/tpu"
run git -C "$ROOT" archive --format=tar --output="$archive" "$tree"
if [[ ${#REST[@]} -gt 0 ]]; then run tar -rf "$archive" "${REST[@]}"; fi
run gzip -f "$archive"

worker_sh=$REMOTE/tpu_scripts/worker.sh
at_once copy_to "$archive.gz"
remote all "if [ -f $worker_sh ]; then bash $worker_sh idle; fi \
&& mkdir -p $REMOTE && tar -xzf rlhf_jax.tar.gz -C $REMOTE \
&& bash $worker_sh install $(quote "$PYTHON_VERSION" "$SETUP_COMMAND")"
