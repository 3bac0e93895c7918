#!/usr/bin/env bash
# Trains on the TPU VM that it runs on; launch/tpu_vm.sh calls it on every VM of a slice.
#
#   ./launch/tpu_worker.sh install      makes .venv, with tensorflow-tpu and whatever of Python the image lacks
#   ./launch/tpu_worker.sh run FLAGS    trains; the flags go on to trainer.main, whose exit code this is
#   ./launch/tpu_worker.sh stop         lets the trainer save and end
#
# A trainer that an earlier call left behind, since its connection broke, is stopped before another is started.
# Never run on a TPU: tests/launch/test_tpu_worker.py runs it with stubs of Python and apt-get.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
pid_file=$venv/.trainer.pid
stop_secs=120  # for a last checkpoint

add_python() {
  local python
  if ! python=$(find_python 2>/dev/null); then
    python=python3.11
    sudo apt-get update --quiet
    sudo apt-get install --quiet --yes "$python"
  fi
  "$python" -c 'import ensurepip, venv' 2>/dev/null || sudo apt-get install --quiet --yes "${python##*/}-venv"
}

# Whether the process in the file still is a trainer: its number may have gone to another since.
is_running() {
  local words=()
  [[ -f $pid_file ]] || return 1
  { mapfile -d '' -t words <"/proc/$(<"$pid_file")/cmdline"; } 2>/dev/null || return 1
  [[ " ${words[*]-} " == *" trainer.main "* ]]
}

stop_trainer() {
  local until=$((SECONDS + stop_secs))
  is_running || return 0
  note "stopping the trainer that runs here as process $(<"$pid_file")"
  kill -TERM "$(<"$pid_file")" || true  # once: a second signal would end it unsaved
  while is_running; do
    ((SECONDS < until)) || kill -KILL "$(<"$pid_file")" || true
    sleep 1
  done
}

case ${1-} in
  install)
    is_installed tpu || add_python >&2
    prepare tpu
    ;;
  stop) stop_trainer ;;
  run)
    prepare tpu
    stop_trainer
    # TensorFlow reads these while it is imported.
    TF_PLUGGABLE_DEVICE_LIBRARY_PATH=$("$venv/bin/python" -c 'import libtpu; print(libtpu.get_library_path())') ||
      fail "finds no libtpu in $venv, which tensorflow-tpu should have brought"
    export PJRT_DEVICE=TPU NEXT_PLUGGABLE_DEVICE_USE_C_API=true TF_PLUGGABLE_DEVICE_LIBRARY_PATH
    printf '%s' "$$" >"$pid_file"
    exec "$venv/bin/python" -m trainer.main "${@:2}"
    ;;
  *) fail "needs one of install, run and stop, not '${1-}'" ;;
esac
