#!/usr/bin/env bash
# How a login node runs a file of slurm/: with the site's facts, and any Python from 3.9 on. Sourced; wants `root`.
# shellcheck disable=SC2154

run_light() { # FILE ARGUMENTS...
    local python=${POLAR_PYTHON:-python3}
    if [ -f "$root/slurm/cluster.env" ]; then
        set -a
        # shellcheck source=/dev/null
        source "$root/slurm/cluster.env"
        set +a
        python=${POLAR_PYTHON:-$python}
    fi
    if [ -z "${POLAR_PYTHON:-}" ] && [ -x "$root/.venv/bin/python" ]; then python=$root/.venv/bin/python; fi
    PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "$python" -S "$root/slurm/$1" "${@:2}"
}
