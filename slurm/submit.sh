#!/usr/bin/env bash
# Submit a grid of runs, their scoring and a report; what there is already is left out. See --help.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=slurm/light_python.sh
source "$root/slurm/light_python.sh"
run_light sweep.py "$@"
