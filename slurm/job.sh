#!/usr/bin/env bash
# What the launchers share: a launcher sources it with its own name, and calls train_job or score_job.
#
# The same file is a batch job under sbatch and a plain command under bash. A job runs one srun task per node, and in
# it torchrun. Asked to stop (USR2 ahead of the time limit; TERM), the batch shell makes the file that POLAR_STOP_FILE
# names, so nothing has to cross srun, a container or torchrun: all ranks save the same step and end, the job requeues
# itself, and its next start continues from there.
# shellcheck disable=SC2154,SC2034 # variables are shared with the launcher and with command.sh

name=$1 # a batch job is a copy with another name
launcher=$root/launchers/$name.sh
# shellcheck source=slurm/command.sh
source "$root/slurm/command.sh"
defaults=() methods="polar lora dora rslora"

# A training run. The launcher sets `recipe`; it may set `defaults`, options that the command line overrides, and
# `methods`: what --method calls the recipe itself, then its variants.
train_job() {
    prepare "$@"
    [ -f "$recipe" ] || fail "there is no recipe $recipe"
    local task
    task=$(value_of task '')
    run=$(realpath -m "${output_dir:-runs/$name${task:+_$task}_$method}")
    if [ "$method" != "${methods%% *}" ]; then defaults+=(--variant "$method"); fi
    arguments=(--config "$recipe" "${defaults[@]}" "${arguments[@]}" --output_dir "$run" "$(take_up)")
    check_batch
    set_on_nodes
    check=("${on_nodes[@]}" "${torchrun[@]}" -m polar.preflight "${arguments[@]}")
    work=("${on_nodes[@]}" "${torchrun[@]}" -m polar.train "${arguments[@]}")
    submit_show_or run_training
}

# `polar eval ADAPTER ...`, the problems shared by all processes. A start after a requeue keeps what was scored.
score_job() {
    prepare "$@"
    [ "${#arguments[@]}" -gt 0 ] || fail "which ADAPTER? see --help"
    preflight=0 run=$(realpath -m "$(value_of out "${arguments[0]}")")
    set_on_nodes
    work=("${on_nodes[@]}" "${torchrun[@]}" -m polar.cli eval "${arguments[@]}" "$(take_up)")
    submit_show_or run_scoring
}

prepare() {
    read_options "$@"
    read_site
    find_size
    if [ "$with_srun" = 1 ] && in_job; then set_rendezvous; fi
    export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
    set_torchrun
}

# A job that began with --overwrite continues what its first start has made.
take_up() {
    if [ "$overwrite" = 1 ] && [ "${SLURM_RESTART_COUNT:-0}" = 0 ]; then echo --overwrite; else echo --resume; fi
}

submit_show_or() { # FUNCTION
    local site submission
    if [ "$submit" = 1 ]; then
        read -ra site <<<"${POLAR_SBATCH_OPTIONS:-}"
        submission=(sbatch --nodes="$nodes" --gpus-per-node="$gpus_per_node" --output="$run/slurm-%j.out"
            ${time:+--time="$time"} "${site[@]}" "${sbatch[@]}" "$launcher" "${for_job[@]}")
    fi
    if [ "$dry_run" = 1 ]; then
        if [ "$submit" = 1 ]; then show env POLAR_ROOT="$root" "${submission[@]}"; fi
        show_environment
        if [ "$preflight" = 1 ]; then show "${check[@]}"; fi
        show "${work[@]}"
    elif [ "$submit" = 1 ]; then
        command -v sbatch >/dev/null || fail "--submit: there is no sbatch here; without --submit the run uses this machine"
        mkdir -p "$run"
        POLAR_ROOT=$root exec "${submission[@]}"
    else
        report=$run/job
        mkdir -p "$report"
        rm -f "$report"/failure.*
        "$1"
    fi
}

run_scoring() {
    local code=0
    "${work[@]}" || code=$?
    [ "$code" = 0 ] || report_failure "$code"
}

run_training() {
    local code=0
    if [ -e "$run/done.json" ] && [ "$(take_up)" = --resume ]; then
        echo "$name: $run is finished: nothing to do"
        return
    fi
    export POLAR_STOP_FILE=$report/stop.${SLURM_JOB_ID:-$$}.${SLURM_RESTART_COUNT:-0}
    stopping='' start_step=0
    if [ "$(take_up)" = --resume ]; then start_step=$(newest_step); fi
    trap 'request_stop USR2' USR2
    trap 'request_stop TERM' TERM
    if [ "$preflight" = 1 ]; then supervise "${check[@]}" || code=$?; fi
    if [ "$code" = 0 ]; then supervise "${work[@]}" || code=$?; fi
    rm -f "$POLAR_STOP_FILE"
    # TERM may have reached torchrun as well, which then reports it as a failure although its ranks have saved.
    if [ "$code" != 0 ] && { [ "$stopping" != TERM ] || [ "$(newest_step)" -le "$start_step" ]; }; then
        report_failure "$code"
    elif [ ! -e "$run/done.json" ]; then
        after_stop
    fi
}

request_stop() { # SIGNAL
    stopping=$1 interrupted=1
    echo "$name: $1: asking the run to save and stop" >&2
    touch "$POLAR_STOP_FILE"
}

# Returns the command's exit code; a trapped signal interrupts only the waiting.
supervise() { # COMMAND...
    local code
    "$@" &
    while :; do
        interrupted=0 code=0
        wait $! || code=$?
        [ "$interrupted" = 1 ] || return "$code"
    done
}

newest_step() { # of the whole checkpoints: those with a manifest
    local file step newest=0
    for file in "$run"/checkpoint-*/checkpoint.json; do
        step=${file%/*} step=${step##*/checkpoint-}
        if [[ $step =~ ^[0-9]+$ ]] && [ "$step" -gt "$newest" ]; then newest=$step; fi
    done
    echo "$newest"
}

# A run that ended well before its end.
after_stop() {
    local step
    step=$(newest_step)
    if [ -z "$stopping" ]; then
        echo "$name: stopped by hand at step $step; the same command continues" >&2
    elif [ "$step" -le "$start_step" ]; then
        fail "stopped by $stopping before a step beyond $start_step was saved, and a requeue would end the same way: give the job more time, or a later signal (sbatch --signal=B:USR2@SECONDS)"
    elif in_job && [[ $(scontrol show job "$SLURM_JOB_ID") == *JobState=RUNNING* ]]; then
        echo "$name: stopped by $stopping at step $step; job $SLURM_JOB_ID requeues itself" >&2
        trap '' USR2 TERM # sent to this shell by the requeue
        scontrol requeue "$SLURM_JOB_ID" || fail "scontrol requeue failed: submit the same command again, it continues"
    else # cancelled, or requeued by SLURM: not for this job to decide
        echo "$name: stopped by $stopping at step $step; the same command continues" >&2
    fi
}

# The last lines of a failed job's log: host, process and reason per node, in the order in which they failed.
report_failure() { # EXIT_CODE
    local reasons=("$report"/failure.*)
    echo "$name: failed with exit code $1; newest checkpoint: step $(newest_step); first to fail first:" >&2
    if [ -e "${reasons[0]}" ]; then
        sort -n "${reasons[@]}" | cut -d ' ' -f 2- | sed "s/^/$name: /" >&2
    else
        echo "$name: no node could say why: see above" >&2
    fi
    exit "$1"
}
