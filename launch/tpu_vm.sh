#!/usr/bin/env bash
# Trains on a Cloud TPU VM, or on every VM of a slice, by way of gcloud: creates it, copies this checkout there,
# installs, runs, and runs again after a preemption.
#
#   ./launch/tpu_vm.sh train --name=ghostnet --zone=us-west4-a --accelerator_type=v5litepod-8 \
#     --version=v2-alpha-tpuv5-lite -- --gin_file=gin/imagenet.gin --gin_file=gin/hardware/tpu_v5e_8.gin --workdir=...
#   ./launch/tpu_vm.sh stop --name=ghostnet --zone=us-west4-a      lets the trainers save and end
#   ./launch/tpu_vm.sh delete --name=ghostnet --zone=us-west4-a
#
# What follows -- goes on to trainer.main. The workdir must be on storage that outlives the VM and that all VMs share;
# see README for what a mounted bucket needs.
#
#   --spot              a cheaper VM, which may be taken away at any time
#   --setup=COMMAND     run on every VM whenever this script comes to it, so again on one that is there already, as to
#                       mount that storage: 'mountpoint -q DIR || mount ... DIR'
#   --worker=all        the VMs of the slice to install and run on: all, or a number
#   --project=P         another project than gcloud's own
#   --delete            deletes the VM when training has finished (exit code 0)
#   --dry_run           prints the commands for a VM that does not exist yet, and does nothing
#   --max_restarts=10   how often in a row training is started again after codes 42 and 75, a preemption or a lost
#                       connection; 0: never
#   --pause_secs=30     before that
#   --settled_secs=600  training that ran this long is no longer in that row
#
# Whoever is logged in to gcloud pays for the VM until it is deleted. SIGTERM and SIGINT stop training, not the VM.
# Exit code: the trainers' as gcloud tells it, that of the first VM which did not end with 0.
#
# Never run against the real cloud: tests/launch/test_tpu_vm.py runs it with a stub of gcloud.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
# shellcheck source=launch/flags.sh
source "$root/launch/flags.sh"
# shellcheck source=launch/restart.sh
source "$root/launch/restart.sh"

action=${1-}
case $action in
  train | stop | delete) shift ;;
  --help | -h) ;;
  *) fail "needs one of train, stop and delete first, not '$action'" ;;
esac
name='' zone='' accelerator_type='' version='' spot='' setup='' worker=all project='' delete='' dry_run=''
pause_secs=30
known='name= zone= project= accelerator_type= version= spot setup= worker= delete dry_run'
read_flags "$known max_restarts= pause_secs= settled_secs=" "$@"
need_integers max_restarts pause_secs settled_secs
required=(name zone)
[[ $action != train ]] || required+=(accelerator_type version)
for flag in "${required[@]}"; do
  [[ -n ${!flag} ]] || fail "$action needs --$flag=..."
done
[[ $action$spot != traintrue || " ${trainer_flags[*]-}" == *' --workdir'* ]] ||
  fail 'train --spot needs --workdir=DIR behind --, on storage that outlives the VM, which is made anew when it was taken'
[[ -n $dry_run ]] || command -v gcloud >/dev/null || fail 'needs gcloud, the client of Google Cloud: install it, log in'

place=ghostnet-training  # in the home directory on the VM
scratch=$(mktemp -d)
trap 'rm -rf -- "$scratch"' EXIT
state='' is_ready='' has_run='' client=''
exec {stdout}>&1

call() {
  if [[ -n $dry_run ]]; then
    { printf '%q ' "$@" && echo; } >&"$stdout"
  else
    "$@"
  fi
}

# tpu VERB ARGUMENT...: the command of gcloud, as the array $command
tpu() { command=(gcloud compute tpus tpu-vm "$@" --zone="$zone" ${project:+"--project=$project"}); }

on_every_vm() {
  local command
  tpu ssh "$name" --worker="$worker" --command="$1"
  call "${command[@]}"
}

find_state() {
  local command
  [[ -z $dry_run ]] || { state=absent; return 0; }
  tpu describe "$name" --format='value(state)'
  ! state=$("${command[@]}" 2>"$scratch/errors") || return 0
  [[ $(<"$scratch/errors") == *NOT_FOUND* ]] || { cat "$scratch/errors" >&2; return 1; }
  state=absent
}

delete_vm() {
  local command
  tpu delete "$name" --quiet
  call "${command[@]}"
}

create_vm() {
  local command
  is_ready=
  note "creating $name: $accelerator_type in $zone"
  tpu create "$name" --accelerator-type="$accelerator_type" --version="$version" ${spot:+--spot}
  call "${command[@]}"
}

install_on_vm() {
  local command archive=$scratch/$place.tar.gz
  call tar -czf "$archive" -C "$root" --exclude=__pycache__ \
    setup.py pyproject.toml README.md gin launch ghostnet input_pipeline trainer &&
    tpu scp "$archive" "$name:" --worker="$worker" &&
    call "${command[@]}" &&
    { [[ -z $setup ]] || on_every_vm "$setup"; } &&
    on_every_vm "mkdir -p $place && tar -xzf $place.tar.gz -C $place && ./$place/launch/tpu_worker.sh install" &&
    is_ready=1
}

# Brings the VM to where it can train.
make_ready() {
  find_state || return
  case $state in
    READY) ;;
    absent) create_vm || return ;;
    PREEMPTED | TERMINATED)
      note "$name is $state"
      delete_vm && create_vm || return
      ;;
    *) note "$name is $state"; return 1 ;;
  esac >&2
  [[ -n $is_ready ]] || install_on_vm >&2
}

# The client does not see what is typed at the terminal: the trainers are to save before it ends.
on_stop() { on_every_vm "./$place/launch/tpu_worker.sh stop" >&2 || true; }

# Trains once and leaves in $code what to make of it.
attempt() {
  local command flags=''
  if ! make_ready; then
    # At first that is a mistake or a lack of capacity, which gcloud has explained; later it is worth another try.
    code=1
    [[ -z $has_run ]] || code=75
    return
  fi
  has_run=1 code=75
  [[ -z $stopping ]] || return 0
  ((${#trainer_flags[@]} == 0)) || flags=$(printf ' %q' "${trainer_flags[@]}")
  tpu ssh "$name" --worker="$worker" --command="cd $place && exec ./launch/tpu_worker.sh run$flags"
  [[ -z $dry_run ]] || { call "${command[@]}"; code=0; return; }
  setsid "${command[@]}" &
  client=$!
  wait_for "$client"
  case $code in 0 | 2 | 42 | 75) return ;; esac
  if ! find_state || [[ $state != READY || $code == 255 ]]; then
    note "lost the connection with exit code $code; $name is ${state:-out of reach}"
    code=75
  fi
}

case $action in
  stop)
    on_every_vm "./$place/launch/tpu_worker.sh stop"
    exit
    ;;
  delete)
    delete_vm
    exit
    ;;
esac
watch_signals
while :; do
  attempt
  run_again || break
done
if ((code == 0)) && [[ -n $delete ]]; then
  delete_vm || code=1
elif [[ -n $has_run && -z $dry_run ]]; then
  project=${project:+ --project=$project}
  note "$name goes on to cost money until: ./launch/tpu_vm.sh delete --name=$name --zone=$zone$project"
fi
exit "$code"
