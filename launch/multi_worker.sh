#!/usr/bin/env bash
# Trains with several worker processes: N on this machine, or one on each host.
#
#   ./launch/multi_worker.sh --workers=2 -- --gin_file=gin/imagenet.gin --gin_file=gin/hardware/multi_worker.gin
#   ./launch/multi_worker.sh --hosts=alpha,beta --index=0 -- --gin_file=...    on alpha; on beta the same with --index=1
#
# What follows -- goes on to trainer.main of every worker. The workers find each other through TF_CONFIG, which this
# script sets. The workdir must be on storage that all hosts share; only worker 0 writes to it.
#
#   --workers=N         processes on this machine. Each has its share of the CPU cores, and of the GPUs unless
#                       CUDA_VISIBLE_DEVICES is set
#   --hosts=A,B         all hosts in the same order everywhere, as NAME or NAME:PORT
#   --index=I           which of the hosts this one is, from 0
#   --port=P            first port of the workers on this machine (default: free ones), or port of each host (2222)
#   --grace_secs=60     when a worker failed the others get this long to end by themselves, then SIGTERM, then SIGKILL
#   --max_restarts=10   how often in a row all workers are started again, together, after codes 42 and 75; 0: never
#   --pause_secs=5      before that
#   --settled_secs=600  workers that ran this long are no longer in that row
#
# stdout is worker 0's; everything else goes to stderr, each line with its worker's number in front.
# SIGTERM and SIGINT go on to the workers, which save; nothing is started again then. A second SIGINT kills them.
# Exit code: the worst of the workers': 2, 1 (any crash), 75, 42, 0. A worker that this script had to kill counts as 75.
# Also 2 when something is missing, and one line says what. On many hosts each script knows only its own worker.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
# shellcheck source=launch/flags.sh
source "$root/launch/flags.sh"
# shellcheck source=launch/restart.sh
source "$root/launch/restart.sh"

workers='' hosts='' index='' port='' grace_secs=60
kill_secs=10  # from SIGTERM to SIGKILL
read_flags 'workers= hosts= index= port= grace_secs= max_restarts= pause_secs= settled_secs=' "$@"
need_integers workers index port grace_secs max_restarts pause_secs settled_secs
((grace_secs >= kill_secs)) || kill_secs=$grace_secs

if [[ -n $hosts ]]; then
  [[ -z $workers ]] || fail '--hosts means one worker a host: leave out --workers'
  IFS=, read -ra cluster <<<"$hosts"
  for i in "${!cluster[@]}"; do
    [[ ${cluster[i]} =~ ^[A-Za-z0-9._-]+(:[0-9]{1,5})?$ ]] ||
      fail "--hosts=$hosts: '${cluster[i]}' is neither NAME nor NAME:PORT (TensorFlow listens on IPv4 only)"
    [[ ${cluster[i]} =~ :[0-9]+$ ]] || cluster[i]+=:${port:-2222}
  done
  if [[ -z $index ]] || ((index >= ${#cluster[@]})); then
    fail "--hosts names ${#cluster[@]} hosts: say which this one is, with --index=0 to --index=$((${#cluster[@]} - 1))"
  fi
  local_workers=("$index")
elif [[ -n $workers ]] && ((workers > 0)); then
  [[ -z $index ]] || fail '--index belongs to --hosts'
  ((${port:-0} + workers <= 65536)) || fail "--port=$port leaves no room for $workers ports"
  mapfile -t local_workers < <(seq 0 $((workers - 1)))
else
  fail 'needs --workers=N, or --hosts=A,B with --index=I; the flags of the trainer come after --'
fi

# Prints COUNT free ports, from FIRST on or, with FIRST 0, such as the kernel picks.
free_ports() {
  "$venv/bin/python" -c '
import socket, sys
count, first = map(int, sys.argv[1:])
sockets = []
for i in range(count):
    sockets.append(socket.socket())
    sockets[i].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what an earlier run left in TIME_WAIT is free
    try:
        sockets[i].bind(("", first and first + i))
    except (OSError, OverflowError) as error:
        sys.exit(f"{first + i} ({error})")
print(*(each.getsockname()[1] for each in sockets), sep="\n")' "$@"
}

find_cluster() {
  local ports
  if [[ -n $hosts ]]; then
    ports=$(free_ports 1 "${cluster[index]##*:}" 2>&1) || fail "cannot listen on port ${ports##*$'\n'}"
    return
  fi
  ports=$(free_ports "$workers" "${port:-0}" 2>&1) || fail "cannot listen on port ${ports##*$'\n'}"
  mapfile -t cluster <<<"127.0.0.1:${ports//$'\n'/$'\n'127.0.0.1:}"
}

# Several workers on one machine would each take every core and every GPU. Fills cpus and gpus: a list for each worker.
share_machine() {
  local key list range i share all=() num=${#local_workers[@]}
  cpus=() gpus=()
  ((num > 1)) || return 0
  while read -r key list; do
    [[ $key != Cpus_allowed_list: ]] || break
  done </proc/self/status
  for range in ${list//,/ }; do
    mapfile -t -O "${#all[@]}" all < <(seq "${range%-*}" "${range#*-}")
  done
  share=$((${#all[@]} / num))
  if ((share > 0)) && command -v taskset >/dev/null; then
    for i in "${local_workers[@]}"; do cpus[i]=$(IFS=,; echo "${all[*]:i * share:share}"); done
  fi

  [[ -z ${CUDA_VISIBLE_DEVICES+set} ]] || return 0
  mapfile -t all < <(nvidia-smi -L 2>/dev/null | sed -n 's/^GPU \([0-9]*\):.*/\1/p')
  ((${#all[@]} > 0)) || return 0
  share=$((${#all[@]} / num))
  ((share > 0)) ||
    fail "has ${#all[@]} GPUs for $num workers: start fewer, or say with CUDA_VISIBLE_DEVICES what each may use"
  ((share * num == ${#all[@]})) || note "takes $((share * num)) of ${#all[@]} GPUs: the same number for each worker"
  for i in "${local_workers[@]}"; do gpus[i]=$(IFS=,; echo "${all[*]:i * share:share}"); done
}

# Each worker leads a session of its own: what is typed at the terminal reaches it only through this script, and what it
# started can be ended with it. Should this script be killed, the kernel tells the worker to save and end.
start_worker() {
  local i=$1 log out command=(setsid) list
  if setpriv --pdeathsig TERM sh -c : 2>/dev/null; then command+=(setpriv --pdeathsig TERM); fi
  [[ -z ${cpus[i]-} ]] || command+=(taskset -c "${cpus[i]}")
  list=$(printf ', "%s"' "${cluster[@]}")
  exec {log}> >(trap '' HUP INT TERM; exec sed -u "s/^/[worker $i] /" >&2)
  logs+=($!)
  if ((i == 0)); then exec {out}>&1; else exec {out}>&"$log"; fi
  (
    export TF_CONFIG="{\"cluster\": {\"worker\": [${list#, }]}, \"task\": {\"type\": \"worker\", \"index\": $i}}"
    [[ -z ${gpus[i]-} ]] || export CUDA_VISIBLE_DEVICES=${gpus[i]}
    exec "${command[@]}" "$venv/bin/python" -m trainer.main "${trainer_flags[@]}" \
      >&"$out" 2>&"$log" {out}>&- {log}>&- {never}>&-
  ) &
  pids[i]=$!
  exec {log}>&- {out}>&-
}

tell_workers() {
  local i
  for i in "${!pids[@]}"; do
    told[i]=1
    kill "-$1" "${pids[i]}" 2>/dev/null || true
  done
}

kill_workers() {
  local i
  for i in "${!pids[@]}"; do
    told[i]=1
    kill -KILL -- "${pids[i]}" "-${pids[i]}" 2>/dev/null || true
  done
}

# Takes the codes of those who have ended. Who ended only because this script sent a signal hung, or had not begun.
collect_codes() {
  local i one
  for i in "${!pids[@]}"; do
    ! kill -0 "${pids[i]}" 2>/dev/null || continue
    one=0
    { wait "${pids[i]}" || one=$?; } 2>/dev/null
    kill -KILL -- "-${pids[i]}" 2>/dev/null || true  # what it left running
    unset "pids[i]"
    ((one == 0)) || note "worker $i ended with exit code $one"
    [[ -z ${told[i]-} ]] || case $one in 137 | 143) one=75 ;; esac
    codes[i]=$one
  done
}

# Sees to it that all end soon once this script was told to stop, or one of the workers failed.
hurry_workers() {
  if [[ -n $stopping && -z $forwarded ]]; then
    forwarded=1
    tell_workers TERM
  fi
  if ((num_interrupts > 1)); then
    kill_workers
  elif [[ -z $deadline ]]; then
    [[ ${codes[*]} != *[1-9]* ]] || deadline=$((SECONDS + grace_secs))
  elif ((SECONDS < deadline)) || ((${#pids[@]} == 0)); then
    return 0
  elif [[ -z $ended_grace ]]; then
    ended_grace=1 deadline=$((SECONDS + kill_secs))
    note "$grace_secs s after another failed still running: worker ${!pids[*]}"
    tell_workers TERM
  else
    kill_workers
  fi
}

# Runs all workers of this machine once and leaves the worst of their codes in $code.
run_workers() {
  local i deadline='' forwarded='' ended_grace=''
  pids=() codes=() told=() logs=()
  find_cluster
  for i in "${local_workers[@]}"; do start_worker "$i"; done
  while ((${#pids[@]} > 0)); do
    tick
    collect_codes
    hurry_workers
  done
  for i in "${logs[@]}"; do
    while kill -0 "$i" 2>/dev/null; do tick; done
  done
  code=$(worst_code "${codes[@]}")
}

prepare_trainer
share_machine
watch_signals
pids=()
trap kill_workers EXIT
while :; do
  run_workers
  run_again || break
done
exit "$code"
