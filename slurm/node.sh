#!/usr/bin/env bash
# One node's part of a job: runs COMMAND with this node's rank, and writes down why it failed.
#
#   node.sh FOLDER COMMAND...     on failure, FOLDER/failure.RANK holds one line: time, host, process rank, reason;
#                                 FOLDER/system.HOST.jsonl has GPUs, memory, load and disk, every 30 s
#
# Each task expands SLURM_NODEID itself: in the batch shell it is 0.
set -uo pipefail

folder=$1 node_rank=${SLURM_NODEID:-0} host=${SLURMD_NODENAME:-$(hostname)}
shift
export PET_NODE_RANK=$node_rank # torchrun's --node_rank
errors=$(mktemp)
trap 'rm -f "$errors"' EXIT
if [[ ${1##*/} == python* ]]; then # COMMAND's Python logs what this node does meanwhile, and ends with this shell
    (trap '' TERM USR2 INT && exec "$1" -IS "${BASH_SOURCE[0]%/*}/../polar/monitor.py" --out "$folder" --pid $$ >&2) &
fi
trap : TERM USR2 # sent to every process of a job: the command handles it, and this shell must outlive the command

# tee ignores signals that end the others: processes that save and leave still write to it.
"$@" 2> >(trap '' TERM USR2 INT && exec tee "$errors" >&2)
code=$?
[ "$code" != 0 ] || exit 0
sleep 0.2 # for tee

# torchrun closes with the process that failed first: "rank : 3 (local_rank: 1)", "exitcode : -9 (pid: 1)", ...
field() { # NAME
    sed -n '/^Root Cause/,$p' "$errors" | sed -n "s/^ *$1 *: //p" | head -n 1
}

# The process's own last word: "[rank3]: ValueError: ..." under torch.distributed, "ValueError: ..." before.
last_word() { # RANK
    local line
    line=$(grep -E "^\[rank$1\]: [A-Za-z_.]+(Error|Exception|Interrupt)\b" "$errors" | tail -n 1)
    [ -n "$line" ] || line=$(grep -E '^([a-z]+: error: |[A-Za-z_.]+(Error|Exception|Interrupt)\b)' "$errors" | grep -v ChildFailedError | tail -n 1)
    line=${line:-what it said is above}
    echo "${line#\[rank*\]: }"
}

rank=$(field rank) exit_code=$(field exitcode) time=$(field time)
rank=${rank%% *} exit_code=${exit_code%% *} time=${time/_/ }
case $exit_code in
    -*) reason="was ended by signal ${exit_code#-} (SIG$(kill -l "${exit_code#-}"))" ;;
    '')
        reason="failed with exit code $code: $(last_word 0)"
        if [[ $reason =~ SignalException.*signal:\ ([0-9]+) ]]; then reason="was told to end by signal ${BASH_REMATCH[1]}"; fi
        ;;
    *) reason="failed with exit code $exit_code: $(last_word "$rank")" ;;
esac
seconds=$(date --date "${time:-now}" +%s)
echo "$seconds node $host${rank:+, process $rank}, $reason" >"$folder/failure.$node_rank"
exit "$code"
