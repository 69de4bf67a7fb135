#!/usr/bin/env bash
#SBATCH --job-name=metamath_gemma27b
#SBATCH --nodes=4
#SBATCH --gpus-per-node=4
#SBATCH --ntasks-per-node=1
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR2@900
#SBATCH --requeue
#SBATCH --open-mode=append
# Gemma-3-27B on MetaMathQA, on 16 GPUs of 80 GB: 128 rows per step = 16 x micro batch 2 x 4 accumulation steps.
#
#   bash launchers/metamath_gemma27b.sh --submit --output_dir runs/metamath_polar
#   bash launchers/metamath_gemma27b.sh --submit --nodes 2 --gpus_per_node 8 --method lora --learning_rate 2e-4
#   bash launchers/metamath_gemma27b.sh --submit --engine fsdp2 --output_dir runs/metamath_fsdp2
#   sbatch launchers/metamath_gemma27b.sh --train_dataset MetaMathQA.jsonl       # in the checkout's folder
#   bash launchers/metamath_gemma27b.sh --load_in_4bit true --method lora        # QLoRA on the GPUs of this machine

set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[ -f "$root/slurm/job.sh" ] || root=${POLAR_ROOT:-$SLURM_SUBMIT_DIR} # sbatch runs a copy of this file
# shellcheck source=slurm/job.sh
source "$root/slurm/job.sh" metamath_gemma27b

recipe=$root/configs/metamathqa_gemma3_27b.yaml
[[ " $*" == *\ --engine[\ =]fsdp2* ]] || defaults=(--deepspeed "$root/ds_configs/zero3.json")
train_job "$@"
