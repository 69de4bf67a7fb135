#!/usr/bin/env bash
# A real SLURM of two nodes with four (pretended) GPUs each, on one Debian machine, beside anything else on it.
#
#   slurm/local_cluster.sh up          # packages if they are missing, munged, slurmctld, two slurmd; again: does nothing
#   eval "$(slurm/local_cluster.sh env)"; sinfo; sbatch --nodes=2 --gpus-per-node=1 launchers/metamath_gemma27b.sh ...
#   slurm/local_cluster.sh status      # what runs; exit code 1 if it is not up
#   slurm/local_cluster.sh down        # ends jobs and daemons of this cluster, no others
#
# Options of up: --nodes N (2), --gpus_per_node N (4). Everything lives in $POLAR_SLURM_HOME (polar-slurm in $TMPDIR); another
# folder is another cluster beside it, with its own ports and job numbers. The GPUs are device files that nothing opens:
# jobs run on the CPU. A requeued job waits 16 s instead of SLURM's 2 minutes (cred_expire), and less after
# `scontrol update JobId=N StartTime=now`; not within a second, or messages of the old start end the new one.
# Needs root, for munge, slurmd and mknod. Exit code 2, with the reason in one line, where it cannot run.
set -euo pipefail

home=${POLAR_SLURM_HOME:-${TMPDIR:-/tmp}/polar-slurm}
packages=(munge slurmctld slurmd slurm-client)

fail() {
    echo "local_cluster: $1" >&2
    exit 2
}

usage() {
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
}

main() {
    local command=${1:-} nodes=2 gpus_per_node=4
    shift || true
    while [ $# -gt 0 ]; do
        case $1 in
            --nodes) nodes=${2:?--nodes N} && shift 2 ;;
            --gpus_per_node) gpus_per_node=${2:?--gpus_per_node N} && shift 2 ;;
            -h | --help) usage && exit 0 ;;
            *) fail "unknown option '$1': see --help" ;;
        esac
    done
    export SLURM_CONF=$home/slurm.conf
    case $command in
        up) up ;;
        down) down ;;
        status) status ;;
        env) print_environment ;;
        -h | --help) usage ;;
        *) fail "say up, down, status or env: see --help" ;;
    esac
}

up() {
    if is_up; then
        echo "local_cluster: already up in $home"
        return
    fi
    [ "$(id -u)" = 0 ] || fail "needs root (munge, slurmd, mknod): run it in a container or a virtual machine"
    install_packages
    down_daemons
    [ -z "$(ls -A "$home" 2>/dev/null)" ] || grep -q '^ClusterName=polar$' "$home/slurm.conf" 2>/dev/null ||
        fail "$home holds other files: name an empty or a new folder in POLAR_SLURM_HOME"
    rm -rf "$home"
    mkdir -p "$home"/{munge,state,log,spool,dev}
    chmod 755 "$home"
    make_devices
    local slot
    slot=$(free_slot)
    write_config "$slot"
    start_daemons
    wait_for_nodes
    echo "local_cluster: $nodes nodes with $gpus_per_node GPUs each are up in $home; to use it: eval \"\$(${BASH_SOURCE[0]} env)\""
}

install_packages() {
    if has_programs; then return; fi
    command -v apt-get >/dev/null || fail "there is no SLURM here, and no apt-get to install ${packages[*]}"
    local policy=/usr/sbin/policy-rc.d log made=0
    log=$(mktemp)
    if [ ! -e "$policy" ]; then # the packages would start daemons of their own
        printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod +x "$policy" && made=1
    fi
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${packages[@]}"; } \
        >"$log" 2>&1 </dev/null || true
    if [ "$made" = 1 ]; then rm -f "$policy"; fi
    has_programs ||
        fail "apt-get could not install ${packages[*]}: $(grep -v '^\s*$' "$log" | tail -n 1)"
    rm -f "$log"
}

has_programs() {
    local program
    for program in munged slurmctld slurmd sbatch; do command -v "$program" >/dev/null || return 1; done
}

make_devices() {
    local gpu
    for ((gpu = 0; gpu < gpus_per_node; gpu++)); do
        mknod "$home/dev/gpu$gpu" c 1 3 2>/dev/null || fail "mknod is not permitted here (the container needs CAP_MKNOD)"
    done
}

# Clusters in other folders get other slots: ten ports from 30000 on, and job numbers apart from each other, since the
# port of a job's rendezvous follows from its number.
free_slot() {
    local slot port taken
    slot=$(($(cksum <<<"$home" | cut -d ' ' -f 1) % 270))
    while :; do
        taken=0
        for ((port = 30000 + 10 * slot; port <= 30000 + 10 * slot + nodes; port++)); do
            if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then taken=1; fi
        done
        if [ "$taken" = 0 ]; then break; fi
        slot=$(((slot + 1) % 270))
    done
    echo "$slot"
}

write_config() { # SLOT
    local port=$((30000 + 10 * $1)) node
    cat >"$home/slurm.conf" <<CONFIG
ClusterName=polar
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$port
FirstJobId=$((1 + 50 * $1))
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$home/munge/socket,cred_expire=15
StateSaveLocation=$home/state
SlurmdSpoolDir=$home/spool/%n
SlurmctldPidFile=$home/slurmctld.pid
SlurmdPidFile=$home/slurmd-%n.pid
SlurmctldLogFile=$home/log/slurmctld
SlurmdLogFile=$home/log/slurmd-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
MailProg=/bin/true
ReturnToService=2
MinJobAge=86400
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=2
CONFIG
    for ((node = 0; node < nodes; node++)); do
        echo "NodeName=polar-n$node NodeAddr=127.0.0.1 Port=$((port + 1 + node)) CPUs=16 RealMemory=100000 Gres=gpu:$gpus_per_node State=UNKNOWN"
    done >>"$home/slurm.conf"
    echo "PartitionName=local Nodes=ALL Default=YES MaxTime=INFINITE State=UP" >>"$home/slurm.conf"
    echo "Name=gpu File=$home/dev/gpu[0-$((gpus_per_node - 1))]" >"$home/gres.conf"
    echo "CgroupAutomount=no" >"$home/cgroup.conf"
}

start_daemons() {
    local node
    dd if=/dev/urandom of="$home/munge/key" bs=1024 count=1 status=none
    chmod 700 "$home/munge"
    chmod 600 "$home/munge/key"
    munged --force --key-file="$home/munge/key" --socket="$home/munge/socket" --pid-file="$home/munged.pid" \
        --log-file="$home/log/munged" --seed-file="$home/munge/seed" 2>"$home/log/munged.start" ||
        fail "munged does not start: $(tail -n 1 "$home/log/munged.start")"
    slurmctld -c 2>"$home/log/slurmctld.start" || fail "slurmctld does not start: $(tail -n 1 "$home/log/slurmctld.start")"
    for ((node = 0; node < nodes; node++)); do
        slurmd -N "polar-n$node" 2>"$home/log/slurmd.start" || fail "slurmd does not start: $(tail -n 1 "$home/log/slurmd.start")"
    done
}

wait_for_nodes() {
    local deadline=$((SECONDS + 30))
    until [ "$(sinfo -h -N -t idle -o %N 2>/dev/null | wc -l)" = "$nodes" ]; do
        [ $SECONDS -lt $deadline ] || fail "the nodes do not come up: $(tail -n 1 "$home"/log/slurmd-* | tr '\n' ' ')"
        sleep 0.2
    done
}

down() {
    if [ -e "$home/slurm.conf" ] && command -v scancel >/dev/null && is_up; then
        squeue -h -o %A | xargs -r scancel --full 2>/dev/null || true
        local deadline=$((SECONDS + 40)) # jobs may save first; SLURM kills them after 30 s
        while [ -n "$(squeue -h 2>/dev/null)" ] && [ $SECONDS -lt $deadline ]; do sleep 0.2; done
    fi
    down_daemons
    echo "local_cluster: down ($home keeps the logs)"
}

down_daemons() { # slurmd first: it tells slurmctld
    local file pid
    for file in "$home"/slurmd-*.pid "$home/slurmctld.pid" "$home/munged.pid"; do
        pid=$(daemon_of "$file") || continue
        kill "$pid" 2>/dev/null || true
        for _ in {1..100}; do
            if ! daemon_of "$file" >/dev/null; then break; fi
            sleep 0.1
        done
        if pid=$(daemon_of "$file"); then kill -9 "$pid"; fi
        rm -f "$file"
    done
}

daemon_of() { # PIDFILE: its process, if that is still a daemon of this cluster
    local pid name
    pid=$(cat "$1" 2>/dev/null) && [ -n "$pid" ] || return 1
    name=$(cat "/proc/$pid/comm" 2>/dev/null) || return 1
    case $name in munged | slurmctld | slurmd) echo "$pid" ;; *) return 1 ;; esac
}

is_up() {
    daemon_of "$home/slurmctld.pid" >/dev/null && daemon_of "$home/munged.pid" >/dev/null &&
        [ "$(sinfo -h -N -r -o %N 2>/dev/null | wc -l)" -gt 0 ]
}

status() {
    if ! is_up; then
        echo "local_cluster: not up ($home)"
        return 1
    fi
    sinfo -N -o '%N %T %c CPUs %G'
    squeue -o '%i %j %T %M %N %r'
}

print_environment() {
    is_up || fail "not up: slurm/local_cluster.sh up"
    echo "export SLURM_CONF=$SLURM_CONF"
}

main "$@"
