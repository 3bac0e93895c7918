# shellcheck shell=bash
# What the exit code of a trainer means to the one who started it; sourced by the launchers beside this file.
#
#   worst_code CODE...     prints the worst of them: 2, then 1 (whatever is a crash), 75, 42, 0
#   run_again              whether to, after the exit code in $code: on 42 (stopped early, all is saved) and 75 (a peer
#                          was lost), unless that is so too often in a row; waits a little
#   rest SECONDS           waits, shorter when the script is told to stop
#   wait_for PID           waits for a process of this shell and leaves its exit code in $code
#
#   watch_signals          from here on $stopping counts SIGTERM, SIGINT, SIGHUP and SIGUSR1; nothing is started again
#                          after one; wait_for then calls on_stop, once, which the script defines

max_restarts=10   # in a row
settled_secs=600  # who ran this long got somewhere: the count begins anew
pause_secs=5
stopping=''
# shellcheck disable=SC2034  # multi_worker.sh reads it
num_interrupts=0
started=$SECONDS num_restarts=0
code=0
severity=([0]=0 [42]=1 [75]=2 [1]=3 [2]=4)

watch_signals() {
  trap 'stopping=$((stopping + 1))' TERM HUP USR1
  trap 'stopping=$((stopping + 1)) num_interrupts=$((num_interrupts + 1))' INT
}

# A pipe that nobody writes to: reading from it is a pause that needs no process.
exec {never}<> <(:)
tick() { read -rt 0.1 -u "$never" || true; }

rest() {
  local until=$((SECONDS + $1))
  while [[ -z $stopping ]] && ((SECONDS < until)); do tick; done
}

is_retry() { [[ $1 == 42 || $1 == 75 ]]; }

worst_code() {
  local one worst=0
  for one in "$@"; do
    [[ -n ${severity[one]-} ]] || one=1
    ((severity[one] <= severity[worst])) || worst=$one
  done
  printf '%s' "$worst"
}

wait_for() {
  local told=
  while kill -0 "$1" 2>/dev/null; do
    if [[ -n $stopping && -z $told ]]; then
      told=1
      on_stop
    fi
    tick
  done
  code=0
  wait "$1" || code=$?
}

run_again() {
  local ran_secs=$((SECONDS - started))
  if ! is_retry "$code" || [[ -n $stopping ]]; then return 1; fi
  ((ran_secs < settled_secs)) || num_restarts=0
  if ((num_restarts >= max_restarts)); then
    ((max_restarts == 0)) || note "gives up after $num_restarts restarts in a row; the same command resumes"
    return 1
  fi
  num_restarts=$((num_restarts + 1))
  note "exit code $code: restart $num_restarts of $max_restarts in a row, in $pause_secs s"
  rest "$pause_secs"
  started=$SECONDS
  [[ -z $stopping ]]
}
