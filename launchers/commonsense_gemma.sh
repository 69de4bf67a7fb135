#!/usr/bin/env bash
#SBATCH --job-name=commonsense_gemma
#SBATCH --nodes=1
#SBATCH --gpus-per-node=4
#SBATCH --ntasks-per-node=1
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR2@300
#SBATCH --requeue
#SBATCH --open-mode=append
# Gemma-3-12B (or Gemma-2-2B: --recipe commonsense_gemma2_2b) on one of the eight commonsense tasks, on 4 GPUs.
#
#   bash launchers/commonsense_gemma.sh --submit --task boolq --output_dir runs/boolq_12b
#   bash launchers/commonsense_gemma.sh --submit --recipe commonsense_gemma2_2b --task boolq --method lora --output_dir runs/boolq_2b

set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[ -f "$root/slurm/job.sh" ] || root=${POLAR_ROOT:-$SLURM_SUBMIT_DIR} # sbatch runs a copy of this file
# shellcheck source=slurm/job.sh
source "$root/slurm/job.sh" commonsense_gemma

recipe=$root/configs/commonsense_gemma3_12b.yaml
train_job "$@"
