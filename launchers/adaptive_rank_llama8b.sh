#!/usr/bin/env bash
#SBATCH --job-name=adaptive_rank_llama8b
#SBATCH --nodes=1
#SBATCH --gpus-per-node=4
#SBATCH --ntasks-per-node=1
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR2@300
#SBATCH --requeue
#SBATCH --open-mode=append
# LLaMA3-8B on Commonsense170K with ranks from the spectra of its weights (LoRA-AR), on 4 GPUs: 16 rows per step.
#
#   bash launchers/adaptive_rank_llama8b.sh --submit --train_dataset commonsense_170k.json --output_dir runs/lora_ar
#   ... --method polar      PoLAR with ranks from the same spectra       ... --method lora      one rank for all
#   ... --adapter.ranks ranks.json      ranks of one's own, from `polar ranks`

set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[ -f "$root/slurm/job.sh" ] || root=${POLAR_ROOT:-$SLURM_SUBMIT_DIR} # sbatch runs a copy of this file
# shellcheck source=slurm/job.sh
source "$root/slurm/job.sh" adaptive_rank_llama8b

recipe=$root/configs/commonsense170k_llama3_8b.yaml
methods="lora_ar polar lora dora"
train_job "$@"
