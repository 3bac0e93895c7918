#!/usr/bin/env bash
# Trains on this machine: makes .venv and installs the package on the first start, then runs the trainer.
#
#   ./launch/local.sh                                    the quickstart
#   ./launch/local.sh --gin_file=gin/fashion_mnist.gin   another recipe; every flag goes on to trainer.main
#
# PYTHON=python3.12 chooses the Python, VENV=DIR the place of the environment.
# Exit code 2: something is missing, and one line says what. Otherwise the exit code is the trainer's,
# or 1 with pip's own words where the installation failed.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

prepare_trainer
recipe=gin/quickstart.gin
for flag in "$@"; do
  case $flag in --gin_file | -gin_file | --gin_file=* | -gin_file=*) recipe= ;; esac
done
exec "$venv/bin/python" -m trainer.main ${recipe:+"--gin_file=$recipe"} "$@"
