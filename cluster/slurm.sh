#!/usr/bin/env bash
# Runs a raydiv command on a Ray cluster of all nodes of a SLURM allocation:
#
#     sbatch --nodes=4 cluster/slurm.sh train /shared/mine.yaml --resume cluster.num_workers=32
#
# All arguments are raydiv's. With --resume, the same line starts a run and resumes a stopped one.
# Before: activate raydiv's environment, on storage that the nodes share (or name it in RAYDIV_VENV), and set RAYDIV_CACHE
# to a folder of that storage. The recipe's output_dir must be there too.
#
#SBATCH --job-name=raydiv
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
# SIGTERM only to this script, five minutes before the time limit: Ray must outlive the checkpoint
#SBATCH --signal=B:TERM@300
#
# To stop it with a checkpoint: scancel --batch --signal=TERM JOBID (a plain scancel kills Ray's processes at once).
# RAYDIV_REQUEUE=1 requeues a job that was stopped with a checkpoint (exit status 143).
# RAY_TMPDIR is the folder of each node for Ray's spilled objects and logs: /tmp/raydiv-JOBID, removed unless the job fails.
# RAYDIV_JOIN_S (600) limits the seconds in which nodes join; RAYDIV_HEAD_IP overrides the first node's address.
# shellcheck disable=SC2329  # functions that traps and attend call
set -euo pipefail

if [ -n "${RAYDIV_VENV:-}" ]; then
    # shellcheck source=/dev/null
    . "$RAYDIV_VENV/bin/activate"
fi

fail() {
    echo "slurm.sh: $*" >&2
    exit 1
}

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
((${#nodes[@]} > 0)) || fail "scontrol names no nodes in $SLURM_JOB_NODELIST"
head=${nodes[0]}

# on a node itself, its name often resolves to loopback, which the others cannot reach
ip=${RAYDIV_HEAD_IP:-$(getent ahostsv4 "$head" | awk '$1 !~ /^127\./ {print $1; exit}' || true)}
ip=${ip:-$(hostname -I | awk '{print $1}')}
[ -n "$ip" ] || fail "no address of $head is known; set RAYDIV_HEAD_IP"

# a port for each job, so that no node joins a Ray of another job or user
export RAY_ADDRESS="$ip:$((20000 + SLURM_JOB_ID % 10000))"
own_tmp=
if [ -z "${RAY_TMPDIR:-}" ]; then
    export RAY_TMPDIR="/tmp/raydiv-$SLURM_JOB_ID"
    own_tmp=1
fi

# Ray requires a token, in a file that only this user can read and that is removed with the job
private=$(mktemp -d "${RAYDIV_PRIVATE:-$HOME}/.raydiv-$SLURM_JOB_ID-XXXXXX")
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$private/token"
unset RAY_AUTH_TOKEN
(
    umask 077
    head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' > "$RAY_AUTH_TOKEN_PATH"
)

running=
steps=()
stopped=
interrupted=

# Forward SIGTERM to the running command; attend then waits for it to end (raydiv writes a checkpoint).
forward_sigterm() {
    stopped=1
    interrupted=1
    if [ -n "$running" ]; then
        kill -TERM "$running" 2> /dev/null || true
    fi
}
trap forward_sigterm TERM

finish() {
    local status=$?
    trap '' TERM
    for step in "${steps[@]}"; do
        kill -TERM "$step" 2> /dev/null || true
    done
    # steps that still run after half a minute are killed
    local patience=300
    for step in "${steps[@]}"; do
        while kill -0 "$step" 2> /dev/null; do
            if ((patience-- <= 0)); then
                kill -KILL "$step" 2> /dev/null || true
                break
            fi
            sleep 0.1
        done
    done
    # Ray's spilled objects, and its logs, which are needed only after a failure
    if [ -n "$own_tmp" ] && ((status == 0 || status == 143)); then
        timeout 60 srun --overlap --ntasks="${#nodes[@]}" rm -rf "$RAY_TMPDIR" || true
    fi
    rm -rf "$private"
    exit "$status"
}
trap finish EXIT

# Run a command and wait for its end, also after signals.
attend() {
    local status=0 again
    if [ -n "$stopped" ]; then
        return 143
    fi
    "$@" &
    running=$!
    wait "$running" || status=$?
    while [ -n "$interrupted" ]; do
        interrupted=
        again=0
        wait "$running" || again=$?
        # 127: the command ended before the signal, and its status is already known
        if ((again != 127)); then
            status=$again
        fi
    done
    running=
    return "$status"
}

# Start Ray on nodes: ray_on NAME SRUN-OPTIONS... -- RAY-OPTIONS...
ray_on() {
    local log="$private/$1.log" where=() cpus=() ray_cpus=()
    shift
    while [ "$1" != -- ]; do
        where+=("$1")
        shift
    done
    shift
    if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
        # srun does not inherit this from sbatch
        cpus=(--cpus-per-task="$SLURM_CPUS_PER_TASK")
        ray_cpus=(--num-cpus="$SLURM_CPUS_PER_TASK")
    fi
    srun --overlap "${where[@]}" "${cpus[@]}" \
        ray start --block --disable-usage-stats "${ray_cpus[@]}" "$@" < /dev/null > "$log" 2>&1 &
    steps+=($!)
}

# Wait until $1 nodes have joined Ray; fail when a step of ray_on ends.
joined() {
    exec python - "$1" "${RAYDIV_JOIN_S:-600}" "${steps[@]}" << 'PYTHON'
import logging
import os
import sys
import time

import ray

expected, seconds, steps = int(sys.argv[1]), float(sys.argv[2]), [int(step) for step in sys.argv[3:]]
joined, end = 0, time.monotonic() + seconds
while time.monotonic() < end:
    if not all(os.path.exists(f"/proc/{step}") for step in steps):
        sys.exit("slurm.sh: Ray ended before all nodes joined")
    try:
        if not ray.is_initialized():
            ray.init(os.environ["RAY_ADDRESS"], logging_level=logging.CRITICAL, log_to_driver=False)
        joined = sum(node["Alive"] for node in ray.nodes())
    except (ConnectionError, RuntimeError):  # Ray has not started yet
        pass
    if joined >= expected:
        sys.exit()
    time.sleep(1)
sys.exit(f"slurm.sh: {joined} of {expected} nodes have joined Ray after {seconds:g} s")
PYTHON
}

require_joined() {
    local status=0
    attend joined "$1" || status=$?
    if ((status != 0)); then
        if [ -z "$stopped" ]; then
            tail -n 20 "$private"/*.log >&2
        fi
        exit "$status"
    fi
}

ray_on head --nodes=1 --ntasks=1 --nodelist="$head" -- \
    --head --node-ip-address="$ip" --port="${RAY_ADDRESS##*:}" --dashboard-host=127.0.0.1
require_joined 1
others=$((${#nodes[@]} - 1))
if ((others > 0)); then
    ray_on others --nodes="$others" --ntasks="$others" --exclude="$head" -- --address="$RAY_ADDRESS"
    require_joined "${#nodes[@]}"
fi
echo "slurm.sh: ${#nodes[@]} nodes have joined Ray at $RAY_ADDRESS" >&2

status=0
attend raydiv "$@" || status=$?
if ((status == 143)) && [ -n "${RAYDIV_REQUEUE:-}" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
