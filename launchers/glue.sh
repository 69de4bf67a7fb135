#!/usr/bin/env bash
#SBATCH --job-name=glue
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --ntasks-per-node=1
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR2@120
#SBATCH --requeue
#SBATCH --open-mode=append
# DeBERTa-v3-base on one GLUE task, on one GPU: 32 rows per step.
#
#   bash launchers/glue.sh --submit --task rte --seed 1 --output_dir runs/rte_1
#   bash launchers/glue.sh --submit --task mrpc --method lora --output_dir runs/mrpc_lora
#   bash launchers/glue.sh --task cola --gpus_per_node 4 --per_device_train_batch_size 8

set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[ -f "$root/slurm/job.sh" ] || root=${POLAR_ROOT:-$SLURM_SUBMIT_DIR} # sbatch runs a copy of this file
# shellcheck source=slurm/job.sh
source "$root/slurm/job.sh" glue

recipe=$root/configs/glue_deberta_v3_base.yaml
methods="polar lora"
train_job "$@"
