#!/usr/bin/env bash
# Entry point of the images: the launchers and commands of a checkout, for folders that are mounted.
#
#   docker run --gpus all -e HF_TOKEN -v "$HF_HOME:/cache" -v "$PWD/out:/out" polar:eval COMMAND
#
#   ADAPTER TASK [BASE_MODEL] [OPTIONS]      launchers/score.sh: score on all GPUs; a second call continues
#   train LAUNCHER [OPTIONS]                 launchers/LAUNCHER.sh, e.g. train metamath_gemma27b --method lora
#   train --config FILE [OPTIONS]            polar.train on all GPUs, e.g. --config configs/gsm8k_tiny.yaml
#   export | eval | report | ranks | spectrum | convert | combine ...      as `polar`
#   self-test                                trains, exports and scores a tiny random model
#   shell [ARGUMENTS OF BASH]                also: python, torchrun, deepspeed, bash, ... with their arguments
#
# /out is for adapters, runs, results and logs (out/... and runs/... are in it too); /cache is HF_HOME, and keeps
# compiled kernels. ADAPTER is a folder there, one mounted elsewhere, or "base" for BASE_MODEL alone; its results are
# in its run folder, or in /out/NAME where that is not below /out. Files belong to the owner of /out; with --user, to
# whom it says. HF_TOKEN and HF_HUB_OFFLINE are read from the environment alone.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
stop_file=
programs=" bash sh python python3 torchrun deepspeed accelerate polar nvidia-smi "

fail() {
    echo "polar: error: $1" >&2
    exit 2
}

usage() {
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
}

main() {
    local command=${1:-}
    case $command in
        '' | -h | --help | help) usage && exit 0 ;;
    esac
    become_caller "$@"
    use_caches
    shift
    case $command in
        shell) exec bash "$@" ;;
        train) train "$@" ;;
        self-test) self_test ;;
        export | eval | report | ranks | spectrum | convert | combine) logged "$command" python -m polar.cli "$command" "$@" ;;
        *)
            if [[ $programs == *" $command "* ]]; then exec "$command" "$@"; fi
            score "$command" "$@"
            ;;
    esac
}

# docker starts an image as root unless --user says otherwise. Whoever mounted /out wants to own what comes: go on as
# its owner, and in rootless engines, where root is the caller, as root. A /out that docker made because it was missing
# is root's and empty; then the owner of the mounted cache is the caller.
become_caller() {
    [ "$(id -u)" = 0 ] && ! is_mapped || return 0
    local owner
    owner=$(stat -c %u:%g /out)
    if [ "${owner%:*}" = 0 ] && mountpoint -q /cache && [ -z "$(ls -A /out)" ]; then
        owner=$(stat -c %u:%g /cache)
        chown "$owner" /out
    fi
    if [ "${owner%:*}" = 0 ]; then
        echo "polar: note: /out belongs to root, so this runs as root; --user \"\$(id -u):\$(id -g)\" names another user" >&2
        return
    fi
    exec setpriv --reuid="${owner%:*}" --regid="${owner#*:}" --clear-groups -- "${BASH_SOURCE[0]}" "$@"
}

is_mapped() { # root of this container is another user outside
    [ "$(awk 'NR == 1 { print $2 }' /proc/self/uid_map)" != 0 ]
}

# What is compiled goes to the cache too; where that is read only, only for this run.
use_caches() {
    local folder=/cache/polar
    if [ ! -w /cache ]; then
        folder=/tmp/polar
        export HF_DATASETS_CACHE=$folder/datasets
    fi
    export TRITON_CACHE_DIR=$folder/triton TORCHINDUCTOR_CACHE_DIR=$folder/inductor \
        TORCH_EXTENSIONS_DIR=$folder/extensions XDG_CACHE_HOME=$folder MPLCONFIGDIR=$folder/matplotlib
}

# The output also in /out/logs. This is process 1, the only one that docker tells to stop: `stop_file` is made, where
# there is one, and else the signal passed on.
logged() { # NAME COMMAND...
    local log child tee code signalled=1
    log=/out/logs/$1-$(date -u +%Y%m%dT%H%M%SZ)-$$.log
    shift
    if [ ! -w /out ] || ! mkdir -p /out/logs; then
        fail "/out is not writable for user $(id -u): it belongs to $(stat -c %u:%g /out); add --user \"\$(id -u):\$(id -g)\" for the owner, or mount it without :ro"
    fi
    exec 3> >(trap '' TERM INT USR1 USR2 && exec tee -a "$log")
    tee=$!
    "$@" >&3 2>&1 3>&- &
    child=$!
    exec 3>&-
    for signal in TERM INT USR1 USR2; do
        # shellcheck disable=SC2064 # this child, and this signal
        trap "signalled=1; if [ -n '$stop_file' ]; then touch '$stop_file'; else kill -$signal $child; fi" "$signal"
    done
    while [ "$signalled" = 1 ]; do
        signalled=0 code=0
        wait "$child" || code=$?
    done
    wait "$tee"
    exit "$code"
}

train() {
    local first=${1:-} gpus
    if [[ $first == --* ]]; then
        gpus=$(count_gpus)
        # torchrun would take the signal for a failure.
        stop_file=/tmp/polar.stop.$$
        export POLAR_STOP_FILE=$stop_file OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + gpus - 1) / gpus))}
        if [ "$gpus" = 1 ]; then logged train python -m polar.train "$@"; fi
        logged train python -m torch.distributed.run --standalone --nproc_per_node="$gpus" -m polar.train "$@"
    elif [ -f "$root/launchers/$first.sh" ]; then
        logged "$first" bash "$root/launchers/$first.sh" "${@:2}"
    else
        fail "train '$first': say --config FILE, or one of: $(cd "$root/launchers" && echo *.sh | sed 's/\.sh//g; s/\b\(score\|report\) *//g')"
    fi
}

score() { # ADAPTER TASK [BASE_MODEL] [OPTIONS]
    local adapter=$1 task=${2:-} base=() out=() name
    [[ -n $task && $task != --* ]] || fail "'$adapter': say ADAPTER TASK [BASE_MODEL], or one of train, export, eval, report, ranks, spectrum, convert, combine, self-test, shell; --help says more"
    shift 2
    if [[ $# -gt 0 && $1 != --* ]]; then base=(--base "$1") && shift; fi
    if [[ " $* " != *" --out"[\ =]* ]] && [[ $(realpath -m "$adapter") != /out/* ]]; then
        name=$(basename "$adapter")
        if [ "$name" = adapter ]; then name=$(basename "$(dirname "$adapter")"); fi
        out=(--out "/out/$name/eval_$task")
    fi
    # One process where a model is spread over all GPUs.
    if [[ " $* " == *" --parallelize "* || " $* " == *" --backend"[\ =]"vllm "* ]]; then out+=(--gpus_per_node 1); fi
    logged "eval_${task//[^A-Za-z0-9]/_}" bash "$root/launchers/score.sh" "$adapter" --tasks "$task" "${base[@]}" "${out[@]}" "$@"
}

count_gpus() {
    local number
    number=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU')
    echo $((number > 0 ? number : 1))
}

# The demo on weights that were never trained: every part runs, nothing is learned. Then each GPU is asked for a sum.
self_test() {
    self_test_folder=$(mktemp -d)
    trap 'rm -rf "$self_test_folder"' EXIT
    cd "$root" || exit
    python - "$self_test_folder/base" <<'PYTHON' || fail "self-test: the tiny model could not be made"
import sys
from demo.make_base import build_model, train_tokenizer

tokenizer = train_tokenizer(seed=0, num_problems=400)
build_model(tokenizer, seed=0).save_pretrained(sys.argv[1])
tokenizer.save_pretrained(sys.argv[1])
PYTHON
    python -m demo.run --base "$self_test_folder/base" --out "$self_test_folder/demo" --num_train 64 --num_test 8 \
        --max_steps 2 || fail "self-test: see above"
    python - <<'PYTHON' || fail "self-test: a GPU does not work"
import torch

for index in range(torch.cuda.device_count()):
    ones = torch.ones(64, 64, device=index)
    assert (ones @ ones).sum().item() == 64**3, torch.cuda.get_device_name(index)
    print(f"polar: GPU {index}: {torch.cuda.get_device_name(index)}")
print(f"polar: self-test passed: torch {torch.__version__}, {torch.cuda.device_count()} GPUs")
PYTHON
}

main "$@"
