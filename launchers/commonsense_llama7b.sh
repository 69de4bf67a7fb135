#!/usr/bin/env bash
#SBATCH --job-name=commonsense_llama7b
#SBATCH --nodes=1
#SBATCH --gpus-per-node=4
#SBATCH --ntasks-per-node=1
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR2@300
#SBATCH --requeue
#SBATCH --open-mode=append
# Llama-2-7B on one of the eight commonsense tasks, on 4 GPUs: 128 rows per step = 4 x micro batch 8 x 4 accumulation steps.
#
#   bash launchers/commonsense_llama7b.sh --submit --task boolq --output_dir runs/boolq_polar
#   bash launchers/commonsense_llama7b.sh --submit --task boolq --adapter.r 8 --method dora --output_dir runs/boolq_dora_8
#   bash launchers/commonsense_llama7b.sh --task piqa                            # on the GPUs of this machine

set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[ -f "$root/slurm/job.sh" ] || root=${POLAR_ROOT:-$SLURM_SUBMIT_DIR} # sbatch runs a copy of this file
# shellcheck source=slurm/job.sh
source "$root/slurm/job.sh" commonsense_llama7b

recipe=$root/configs/commonsense_llama2_7b.yaml
train_job "$@"
