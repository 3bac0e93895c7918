#!/usr/bin/env bash
# Trains on this machine: makes .venv and installs the package on the first start, then runs the trainer.
#
#   ./launch/local.sh                                    the quickstart
#   ./launch/local.sh --gin_file=gin/fashion_mnist.gin   another recipe; every flag goes on to trainer.main
#
# After codes 42 (stopped by somebody else, all is saved) and 75 (a step hangs, data cannot be read) the trainer is
# started again, MAX_RESTARTS=10 times in a row. SIGTERM and SIGINT go on to it, which saves; then nothing is started
# again. PYTHON=python3.12 chooses the Python, VENV=DIR the place of the environment.
# Exit code 2: something is missing, and one line says what. Otherwise the exit code is the trainer's,
# or 1 with pip's own words where the installation failed.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
# shellcheck source=launch/restart.sh
source "$root/launch/restart.sh"
max_restarts=${MAX_RESTARTS:-10}
[[ $max_restarts =~ ^(0|[1-9][0-9]{0,8})$ ]] || fail "MAX_RESTARTS=$max_restarts is no number"

prepare_trainer
recipe=gin/quickstart.gin
for flag in "$@"; do
  case $flag in --gin_file | -gin_file | --gin_file=* | -gin_file=*) recipe= ;; esac
done
command=("$venv/bin/python" -m trainer.main ${recipe:+"--gin_file=$recipe"} "$@")
# Who kills this script kills the trainer, or it would go on beside the next start.
if setpriv --pdeathsig KILL sh -c : 2>/dev/null; then command=(setpriv --pdeathsig KILL "${command[@]}"); fi

# It ignores what a terminal sends to all of its processes, which reaches it through this script, as SIGTERM.
run_trainer() {
  local trainer told=''
  (trap '' INT HUP; exec "${command[@]}") &
  trainer=$!
  tick  # until then bash itself would take a signal
  while kill -0 "$trainer" 2>/dev/null; do
    if [[ $stopping != "$told" ]]; then
      told=$stopping
      kill -TERM "$trainer" 2>/dev/null || true
    fi
    tick
  done
  code=0
  wait "$trainer" || code=$?
}

watch_signals
while :; do
  run_trainer
  run_again || break
done
exit "$code"
