#!/usr/bin/env bash
# The state of all runs in a folder: state, step, loss, restarts, scores. Works without SLURM too.
#
#   slurm/status.sh runs/llama7b
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=slurm/light_python.sh
source "$root/slurm/light_python.sh"
run_light run_status.py "$@"
