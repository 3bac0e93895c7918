#!/usr/bin/env bash
# Checks everything: makes the environment, lints, counts the lines, runs the tests.
#
#   ./launch/test.sh                          all of it
#   ./launch/test.sh tests/trainer -x   arguments go on to pytest
#
# PYTHON=python3.12 chooses the Python, VENV=DIR the environment's directory (.venv, shared with local.sh).
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
max_lines=5000  # the system can be read in one afternoon

prepare dev
cd "$root"
"$venv/bin/ruff" check .
"$venv/bin/shellcheck" --external-sources launch/*.sh launch/slurm.sbatch .ci/run

num_lines=$(find ghostnet input_pipeline trainer -name '*.py' -exec cat {} + | wc -l)
echo "ghostnet + input_pipeline + trainer: $num_lines lines of Python, under $max_lines allowed"
((num_lines < max_lines)) || { note "$num_lines lines are too many: delete or simplify"; exit 1; }

# Most of the time goes to tracing, which keeps one core busy: two processes, each with whole files.
exec "$venv/bin/python" -m pytest --numprocesses=2 --dist=loadfile "$@"
