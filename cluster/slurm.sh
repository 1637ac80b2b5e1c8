#!/usr/bin/env bash
# Runs a raydiv command on the nodes of a SLURM allocation, each of which becomes a node of one Ray cluster:
#
#     sbatch --nodes=4 cluster/slurm.sh train /shared/mine.yaml --resume cluster.num_workers=32
#
# All arguments are raydiv's. With --resume the same line is a first start, and goes on with what was stopped.
# Before: activate the environment that raydiv is in, on storage that the nodes share (or name it in RAYDIV_VENV), and set
# RAYDIV_CACHE to a folder there; output_dir of the recipe must lie there too.
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
# five minutes before the time is over, SIGTERM to this script alone: the nodes' Ray must outlive the checkpoint
#SBATCH --signal=B:TERM@300
#
# To stop it with a checkpoint: scancel --batch --signal=TERM JOBID (a plain scancel ends Ray's processes at once).
# RAYDIV_REQUEUE=1 puts a job that was stopped with a checkpoint (exit status 143) back into the queue.
# RAY_TMPDIR, on each node, is where Ray spills and logs: /tmp/raydiv-JOBID, which goes with the job unless the job failed.
# RAYDIV_JOIN_S (600) is how long nodes may take to join; RAYDIV_HEAD_IP the first node's address, where it is found wrong.
# shellcheck disable=SC2329  # functions that traps call, and attend
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

# the name of a node often means loopback on the node itself, which the others could not reach
ip=${RAYDIV_HEAD_IP:-$(getent ahostsv4 "$head" | awk '$1 !~ /^127\./ {print $1; exit}' || true)}
ip=${ip:-$(hostname -I | awk '{print $1}')}
[ -n "$ip" ] || fail "no address of $head is known; set RAYDIV_HEAD_IP"

# a port of the job's own: what is left of another job, or somebody else's Ray, is not joined by mistake
export RAY_ADDRESS="$ip:$((20000 + SLURM_JOB_ID % 10000))"
own_tmp=
if [ -z "${RAY_TMPDIR:-}" ]; then
    export RAY_TMPDIR="/tmp/raydiv-$SLURM_JOB_ID"
    own_tmp=1
fi

# Ray lets in who has the token, which lies in a file that only this user can read, for as long as the job lives
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

# Tell whoever is waited for; what it then does (a checkpoint, for raydiv) is waited for too.
pass_on() {
    stopped=1
    interrupted=1
    if [ -n "$running" ]; then
        kill -TERM "$running" 2> /dev/null || true
    fi
}
trap pass_on TERM

finish() {
    local status=$?
    trap '' TERM
    for step in "${steps[@]}"; do
        kill -TERM "$step" 2> /dev/null || true
    done
    # what does not go by itself in half a minute is ended
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
    # what Ray spilled, and its logs, which are of use only after a failure
    if [ -n "$own_tmp" ] && ((status == 0 || status == 143)); then
        timeout 60 srun --overlap --ntasks="${#nodes[@]}" rm -rf "$RAY_TMPDIR" || true
    fi
    rm -rf "$private"
    exit "$status"
}
trap finish EXIT

# Run a command and wait for it; signals that arrive meanwhile do not end the waiting.
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
        # 127: it had ended before the signal, and its status is known
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
        # srun does not take this over from sbatch
        cpus=(--cpus-per-task="$SLURM_CPUS_PER_TASK")
        ray_cpus=(--num-cpus="$SLURM_CPUS_PER_TASK")
    fi
    srun --overlap "${where[@]}" "${cpus[@]}" \
        ray start --block --disable-usage-stats "${ray_cpus[@]}" "$@" < /dev/null > "$log" 2>&1 &
    steps+=($!)
}

# Wait until so many nodes have joined Ray, as long as all that were started are there.
joined() {
    exec python - "$1" "${RAYDIV_JOIN_S:-600}" "${steps[@]}" << 'PYTHON'
import logging
import os
import sys
import time

import ray

wanted, seconds, steps = int(sys.argv[1]), float(sys.argv[2]), [int(step) for step in sys.argv[3:]]
there, end = 0, time.monotonic() + seconds
while time.monotonic() < end:
    if not all(os.path.exists(f"/proc/{step}") for step in steps):
        sys.exit("slurm.sh: Ray has ended before all nodes had joined")
    try:
        if not ray.is_initialized():
            ray.init(os.environ["RAY_ADDRESS"], logging_level=logging.CRITICAL, log_to_driver=False)
        there = sum(node["Alive"] for node in ray.nodes())
    except (ConnectionError, RuntimeError):  # not there yet
        pass
    if there >= wanted:
        sys.exit()
    time.sleep(1)
sys.exit(f"slurm.sh: {there} of {wanted} nodes have joined Ray after {seconds:g} s")
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
