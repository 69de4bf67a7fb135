#!/usr/bin/env bash
# Which command a job runs: options, site, nodes, rendezvous, container. Sourced by slurm/job.sh, which
# sets `name`, `launcher`, `root`, `run` and `report` and reads what is set here.
# shellcheck disable=SC2034,SC2154

LAUNCHER_OPTIONS='
Options of every launcher; all others are passed on:
  --submit               send this launcher to sbatch, with the options below and the site facts of slurm/cluster.env
  --nodes N              with --submit; in a job, SLURM knows; without SLURM the run uses this machine
  --gpus_per_node N      processes per node; in a job, SLURM knows
  --time T, --sbatch OPT with --submit: time limit, and any other option of sbatch (may be repeated)
  --recipe NAME          of configs/NAME.yaml, or a file (default: that of the launcher)
  --method NAME          of METHODS; the first one by default, and what --variant NAME of polar.train is
  --output_dir FOLDER    the run (default: runs/LAUNCHER_METHOD); a run in it continues
  --container KIND:IMAGE pyxis:IMAGE.sqsh, apptainer:IMAGE.sif or docker:IMAGE (default: POLAR_CONTAINER, else none)
  --no_preflight         do not check nodes and transport first
  --dry_run              print the commands and do nothing'

fail() {
    echo "$name: error: $1" >&2
    exit 2
}

# The head of the launcher, without "# ".
usage() {
    sed -n '/^$/q;/^#\( \|$\)/s/^# \{0,1\}//p' "$launcher"
    echo "${LAUNCHER_OPTIONS/METHODS/$methods}"
}

# What it does not know stays in `arguments`, for the command; what a job needs again, in `for_job`.
read_options() {
    nodes='' gpus_per_node='' time='' method=${methods%% *} output_dir='' container='' sbatch=()
    preflight=1 dry_run=0 submit=0 overwrite=0 arguments=() for_job=()
    local option value
    while [ $# -gt 0 ]; do
        option=$1 && shift
        case $option in
            -h | --help) usage && exit 0 ;;
            --no_preflight) preflight=0 && for_job+=("$option") ;;
            --overwrite) overwrite=1 && for_job+=("$option") ;;
            --dry_run) dry_run=1 ;;
            --submit) submit=1 ;;
            --resume) ;; # always
            --nodes | --gpus_per_node | --time | --recipe | --method | --output_dir | --container | --sbatch)
                [[ $# -gt 0 && ($1 != --* || $option = --sbatch) ]] || fail "$option needs a value"
                set_option "${option#--}" "$1" && shift
                ;;
            --nodes=* | --gpus_per_node=* | --time=* | --recipe=* | --method=* | --output_dir=* | --container=* | --sbatch=*)
                value=${option#*=} option=${option%%=*}
                set_option "${option#--}" "$value"
                ;;
            *) arguments+=("$option") && for_job+=("$option") ;;
        esac
    done
}

set_option() { # NAME VALUE
    case $1 in
        nodes | gpus_per_node) [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "--$1 $2: say a number from 1 on" ;;
        method) [[ " $methods " == *" $2 "* ]] || fail "--method $2: choose one of $methods" ;;
        container)
            [[ $2 =~ ^(pyxis|apptainer|docker):. ]] ||
                fail "--container $2: say pyxis:IMAGE.sqsh, apptainer:IMAGE.sif or docker:IMAGE"
            ;;
    esac
    case $1 in
        sbatch) sbatch+=("$2") ;;
        recipe) if [ -f "$2" ]; then recipe=$(realpath "$2"); else recipe=$root/configs/$2.yaml; fi ;;
        *) printf -v "$1" %s "$2" ;;
    esac
    case $1 in nodes | time | sbatch) ;; *) for_job+=("--$1" "$2") ;; esac
}

read_site() {
    if [ -f "$root/slurm/cluster.env" ]; then
        set -a
        # shellcheck source=/dev/null
        source "$root/slurm/cluster.env"
        set +a
    fi
    container=${container:-${POLAR_CONTAINER:-}}
    python=${POLAR_PYTHON:-python}
    if [ -z "${POLAR_PYTHON:-}$container" ] && [ -x "$root/.venv/bin/python" ]; then python=$root/.venv/bin/python; fi
}

in_job() { [ -n "${SLURM_JOB_ID:-}" ]; }

# The #SBATCH line of the launcher is the default, so that it stands in one place.
sbatch_line() { # NAME
    sed -n "s/^#SBATCH --$1=//p" "$launcher"
}

# In a job from SLURM, elsewhere from the options. Sets `with_srun` too.
find_size() {
    with_srun=1
    [ "$submit" = 1 ] || [ -z "$time${sbatch[*]}" ] || fail "--time and --sbatch are for sbatch: add --submit"
    if in_job; then
        local known=${SLURM_GPUS_ON_NODE:-}
        if [ "${nodes:-$SLURM_NNODES}" != "$SLURM_NNODES" ]; then
            fail "--nodes $nodes, but the job has $SLURM_NNODES: use --submit, or sbatch --nodes=$nodes"
        elif [ -n "$known" ] && [ "${gpus_per_node:-$known}" -gt "$known" ]; then
            fail "--gpus_per_node $gpus_per_node, but the job has $known: use --submit, or sbatch --gpus-per-node=$gpus_per_node"
        fi
        nodes=$SLURM_NNODES gpus_per_node=${gpus_per_node:-${known:-$(sbatch_line gpus-per-node)}}
    elif [ "$submit" = 1 ] || [ "${nodes:-1}" -gt 1 ]; then
        [ "$submit$dry_run" != 00 ] || fail "--nodes $nodes needs SLURM: add --submit; without it the run uses this machine"
        nodes=${nodes:-$(sbatch_line nodes)} gpus_per_node=${gpus_per_node:-$(sbatch_line gpus-per-node)}
    else
        with_srun=0 nodes=1
        if [ -z "$gpus_per_node" ]; then gpus_per_node=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU') || gpus_per_node=1; fi
    fi
}

# The last value of an option, else the recipe's, or DEFAULT.
value_of() { # KEY [DEFAULT]
    local value='' index
    for ((index = 0; index < ${#arguments[@]}; index++)); do
        case ${arguments[index]} in
            "--$1") value=${arguments[index + 1]:-} ;;
            "--$1="*) value=${arguments[index]#*=} ;;
        esac
    done
    if [ -z "$value" ]; then value=${2-$(sed -n "s/^$1: *\([^ #]*\).*/\1/p" "$recipe")}; fi
    echo "$value"
}

# polar.train checks it too, but only after the job has waited for its nodes.
check_batch() {
    local rows micro_batch product
    if [[ " ${arguments[*]}" =~ \ --variant[=\ ]tiny ]]; then return 0; fi # has a batch of its own
    rows=$(value_of global_batch_size) micro_batch=$(value_of per_device_train_batch_size)
    if [[ ! $rows =~ ^[0-9]+$ || ! $micro_batch =~ ^[1-9][0-9]*$ ]]; then return 0; fi
    product=$((micro_batch * nodes * gpus_per_node))
    [ $((rows % product)) = 0 ] ||
        fail "global_batch_size $rows does not divide by $nodes nodes x $gpus_per_node GPUs x per_device_train_batch_size $micro_batch = $product: change one of them"
}

# Read by torchrun where its options are missing. One port per job, as jobs share nodes; one id per start, so that a
# requeued job does not meet its old self.
set_rendezvous() {
    PET_MASTER_ADDR=$(head_node)
    PET_MASTER_PORT=$((15000 + SLURM_JOB_ID % 15000))
    PET_RDZV_ID=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
    export PET_MASTER_ADDR PET_MASTER_PORT PET_RDZV_ID
    if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi # srun >= 22.05
    # accelerate and torchrun guess: all cores of the machine, or one.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((SLURM_CPUS_ON_NODE > gpus_per_node ? SLURM_CPUS_ON_NODE / gpus_per_node : 1))}
}

# Asked here, since images often lack scontrol. Where compute nodes have no names of their own, SLURM's address of it:
# a name that nobody resolves would leave every node waiting for another.
head_node() {
    local node
    node=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    node=${node%%$'\n'*}
    [ -n "$node" ] || fail "scontrol does not name the nodes of this job ($SLURM_JOB_NODELIST)"
    getent hosts "$node" >/dev/null || node=$(scontrol show node "$node" --oneliner | grep -o ' NodeAddr=[^ ]*' | cut -d = -f 2)
    echo "$node"
}

# `on_nodes`: what stands before the command that every node runs.
set_on_nodes() {
    local image=${container#*:} mounts=$root:$root,$run:$run${POLAR_MOUNTS:+,$POLAR_MOUNTS} variable mount
    on_nodes=()
    if [ "$with_srun" = 1 ]; then on_nodes=(srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=1 --wait=60); fi
    case $container in
        pyxis:*)
            [ "$with_srun" = 1 ] || fail "--container $container: pyxis is a part of srun; here use docker: or apptainer:"
            on_nodes+=(--container-image="$image" --container-mounts="$mounts" --container-workdir="$PWD")
            ;;
        apptainer:*) on_nodes+=(apptainer exec --nv --bind "$mounts" --pwd "$PWD" "$image") ;;
        docker:*) # passes no variable by itself; the values are those of each task
            on_nodes+=(docker run --rm --init --gpus=all --network=host --ipc=host --user="$(id -u):$(id -g)" --workdir="$PWD")
            for variable in $(compgen -e | grep -E '^(SLURM|PET_|POLAR_|PYTHONPATH|HF_|NCCL_|WANDB_|OMP_|TOKENIZERS_|CUDA_VIS)'); do
                on_nodes+=(--env "$variable")
            done
            for mount in ${mounts//,/ }; do on_nodes+=(--volume "$mount"); done
            on_nodes+=("$image")
            ;;
    esac
    on_nodes+=(bash "$root/slurm/node.sh" "$run/job")
}

# Without SIGUSR2 in the list, one that reaches every process of a job would end the agent at once. A worker that hangs
# after another one died is killed after 25 s, before SLURM ends the agent itself (KillWait, 30 s).
set_torchrun() {
    torchrun=("$python" -m torch.distributed.run --nnodes="$nodes" --nproc_per_node="$gpus_per_node" --max_restarts=0
        "--signals_to_handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2" --shutdown_timeout=25)
    if [ "$with_srun" = 1 ]; then torchrun+=(--rdzv_backend=static); else torchrun+=(--standalone); fi
}

# Each command in a form that can be pasted into a shell of the job.
show() { # COMMAND...
    local word text=''
    for word in "$@"; do
        if [[ $word =~ ^[][A-Za-z0-9_./:=,@%+-]+$ ]]; then text+=" $word"; else text+=" '${word//\'/\'\\\'\'}'"; fi
    done
    echo "${text# }"
}

show_environment() {
    echo "export PYTHONPATH=$PYTHONPATH"
    if in_job; then
        echo "export PET_MASTER_ADDR=$PET_MASTER_ADDR PET_MASTER_PORT=$PET_MASTER_PORT PET_RDZV_ID=$PET_RDZV_ID"
    elif [ "$with_srun" = 1 ]; then
        # shellcheck disable=SC2016
        echo 'export PET_MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)' \
            'PET_MASTER_PORT=$((15000 + SLURM_JOB_ID % 15000)) PET_RDZV_ID=$SLURM_JOB_ID'
    fi
}
