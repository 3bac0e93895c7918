# shellcheck shell=bash
# Makes the Python environment that the scripts beside this file run in; sourced by them.
#
#   prepare EXTRA        installs the package with EXTRA ('' = none) into $venv, unless that is done already; the EXTRA
#                        tpu takes the TensorFlow that TPU VMs need in the place of the usual one
#   is_installed EXTRA   whether it is
#   prepare_trainer      prepares what this machine trains with: with cuda where there is an NVIDIA GPU
#
# $venv is $VENV, or .venv in the repository. $PYTHON names the Python to make it with.

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
venv=${VENV:-$root/.venv}
[[ $venv == /* ]] || venv=$PWD/$venv

note() { printf '%s: %s\n' "${0##*/}" "$1" >&2; }
fail() { note "$1"; exit 2; }

# What has to stay the same for an installation to count: the requirements, the place of the checkout, the Python.
fingerprint() { printf '%s\n' "$(sha256sum <"$root/setup.py")" "$root" "$(readlink -f -- "$venv/bin/python")"; }

stamp() { printf '%s' "$venv/.installed${1:+-$1}"; }

is_installed() { [[ -x $venv/bin/python && -f $(stamp "$1") && $(<"$(stamp "$1")") == "$(fingerprint)" ]]; }

find_python() {
  local candidate version found='' candidates=(python3 python3.13 python3.12 python3.11)
  [[ -z ${PYTHON-} ]] || candidates=("$PYTHON")
  for candidate in "${candidates[@]}"; do
    version=$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
    case $version in
      3.11 | 3.12 | 3.13) printf '%s' "$candidate"; return ;;
    esac
    found+="${found:+, }$candidate is $version"
  done
  found=${found:-${candidates[0]} does not run}
  fail "needs Python 3.11, 3.12 or 3.13 ($found): install one, or name one with PYTHON=..."
}

check_disk() {
  local free_kb min_free_gb=4
  [[ $1 != cuda ]] || min_free_gb=7  # CUDA's libraries
  free_kb=$(df -Pk -- "$venv" | awk 'NR == 2 { print $4 }')
  ((free_kb >= min_free_gb << 20)) ||
    fail "needs $min_free_gb GB of free disk for $venv, found $((free_kb >> 10)) MB: free some, or choose with VENV=..."
}

# `tensorflow-tpu` must not stand beside the `tensorflow` that setup.py asks for: everything else first, then the
# package without its requirements.
install_for_tpu() {
  local requirements
  requirements=$("$venv/bin/python" -c '
import ast, sys
call = next(node for node in ast.walk(ast.parse(open(sys.argv[1]).read()))
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "setup")
required = next(ast.literal_eval(k.value) for k in call.keywords if k.arg == "install_requires")
print(*(name for name in required if not name.startswith("tensorflow>")), sep="\n")' "$root/setup.py") &&
    mapfile -t requirements <<<"$requirements" &&
    "${pip[@]}" 'tensorflow-tpu==2.20.*' "${requirements[@]}" >&2 &&
    "${pip[@]}" --no-deps --editable "$root" >&2
}

install() {
  local python pip
  python=$(find_python) || exit
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "needs the venv module, which $python lacks: on Debian and Ubuntu, apt-get install python3-venv"
  if [[ -e $venv/.unfinished || (-e $venv/pyvenv.cfg && ! -x $venv/bin/python) ]]; then
    note "the installation in $venv is incomplete: making it again"
    find "$venv" -mindepth 1 -maxdepth 1 ! -name .unfinished ! -name .lock -exec rm -rf {} +
  fi
  check_disk "$1"
  [[ -e $venv/pyvenv.cfg ]] || : >"$venv/.unfinished"
  note "installing into $venv, this once: 2.5 GB, with cuda 6 GB, a few minutes"
  "$python" -m venv "$venv"
  pip=("$venv/bin/python" -m pip install --disable-pip-version-check)
  [[ -t 2 ]] || pip+=(--quiet)
  if [[ $1 == tpu ]]; then install_for_tpu; else "${pip[@]}" --editable "$root${1:+[$1]}" >&2; fi || {
    note "the installation into $venv failed for the reason above: the same command tries again"
    exit 1
  }
  fingerprint >"$(stamp "$1")"
  rm -f -- "$venv/.unfinished"
}

prepare() {
  ! is_installed "$1" || return 0
  # The look inside comes first: what it finds may be the lock of another start at this very moment.
  if [[ -d $venv && -n $(ls -A -- "$venv") && ! -e $venv/pyvenv.cfg && ! -e $venv/.lock ]]; then
    fail "$venv holds other files and is no Python environment: name a new directory with VENV=..."
  fi
  mkdir -p -- "$venv"
  (
    flock -n 9 || { note "waiting for another installation into $venv"; flock 9; }
    is_installed "$1" || install "$1"
  ) 9>>"$venv/.lock"
}

prepare_trainer() {
  local extra=
  if is_installed cuda || nvidia-smi -L >/dev/null 2>&1; then extra=cuda; fi
  prepare "$extra"
}
