#!/usr/bin/env bash
#SBATCH --job-name=report
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --time=1:00:00
# `polar report` of all finished runs in a folder, into FOLDER/report.
#
#   bash launchers/report.sh runs/llama7b
#   bash launchers/report.sh --submit runs/llama7b

# Variables are shared with job.sh, both ways.
# shellcheck disable=SC1091,SC2034,SC2154
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[ -f "$root/slurm/job.sh" ] || root=${POLAR_ROOT:-$SLURM_SUBMIT_DIR} # sbatch runs a copy of this file
# shellcheck source=slurm/job.sh
source "$root/slurm/job.sh" report

export OMP_NUM_THREADS=1
prepare --gpus_per_node 1 "$@"
[ "${#arguments[@]}" = 1 ] || fail "which FOLDER of runs? see --help"
preflight=0 run=$(realpath -m "${arguments[0]}/report")
finished=("${arguments[0]}"/*/done.json)
[ "$dry_run" = 1 ] || [ -e "${finished[0]}" ] || fail "${arguments[0]} holds no finished run (a folder with done.json)"
set_on_nodes
work=("${on_nodes[@]}" "$python" -m polar.cli report "${finished[@]%/done.json}" --out "$run")
submit_show_or run_scoring
