#!/usr/bin/env bash
#SBATCH --job-name=score
#SBATCH --nodes=1
#SBATCH --gpus-per-node=4
#SBATCH --ntasks-per-node=1
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# `polar eval` of one adapter; all processes share the problems. Options: those of `polar eval --help`.
#
#   bash launchers/score.sh --submit runs/metamath_polar --tasks gsm8k,math
#   bash launchers/score.sh --submit runs/metamath_polar --tasks gsm8k --sbatch --dependency=afterok:JOB
#   bash launchers/score.sh runs/boolq_polar --tasks boolq --gpus_per_node 1

set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[ -f "$root/slurm/job.sh" ] || root=${POLAR_ROOT:-$SLURM_SUBMIT_DIR} # sbatch runs a copy of this file
# shellcheck source=slurm/job.sh
source "$root/slurm/job.sh" score

score_job "$@"
