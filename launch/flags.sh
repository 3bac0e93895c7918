# shellcheck shell=bash
# Reads the flags of the launchers beside this file; sourced after environment.sh.
#
#   read_flags 'workers= dry_run' "$@"   sets $workers from --workers=VALUE, $dry_run to true from --dry_run, the array
#                                        trainer_flags to what stands after --; --help prints the head of the script
#   need_integers NAME...                refuses what is no number in these variables; an empty one passes

# shellcheck disable=SC2034  # the launchers read it
trainer_flags=()

# shellcheck disable=SC2034
read_flags() {
  local known=" $1 " flag
  shift
  while (($#)); do
    flag=${1#--} flag=${flag%%=*}
    if [[ $1 == -- ]]; then
      shift
      trainer_flags=("$@")
      return
    elif [[ $1 == --help || $1 == -h ]]; then
      sed -n '2,/^[^#]/s/^#\( \|$\)//p' "${BASH_SOURCE[-1]}"
      exit 0
    elif [[ $1 == --*=* && $known == *" $flag= "* ]]; then
      printf -v "$flag" %s "${1#*=}"
    elif [[ $1 == --"$flag" && $known == *" $flag "* ]]; then
      printf -v "$flag" true
    elif [[ $known == *" $flag= "* ]]; then
      fail "$1 needs a value: --$flag=..."
    else
      known=${known# } known=${known% }
      fail "does not know $1: its flags are --${known// /, --}; those of the trainer come after --"
    fi
    shift
  done
}

need_integers() {
  local name
  for name in "$@"; do
    [[ ${!name} =~ ^(0|[1-9][0-9]{0,8})?$ ]] || fail "--$name=${!name} is no number"
  done
}
