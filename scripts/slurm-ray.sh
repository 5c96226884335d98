#!/bin/bash
# A Slurm job that runs a study on all of its nodes: Ray on each, its head and the command itself on the first.
#
#   sbatch --nodes=4 --gpus-per-node=4 --cpus-per-task=32 scripts/slurm-ray.sh my-study.yaml [options of `sweep run`]
#
# Submit it with your environment active, from a folder that all nodes see; study, model, data and home lie where they
# see them too. A minute before its time is over the study stops; submit the same again and it goes on.
#
#SBATCH --job-name=sweep
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:TERM@60
set -euo pipefail

export RAY_ADDRESS="$SLURMD_NODENAME:$((20000 + SLURM_JOB_ID % 20000))"
export RAY_USAGE_STATS_ENABLED=0
export RAY_worker_niceness=0 # else workers give way to whatever else runs, and probes are slow
# A token of this job alone; in the environment, since a command line can be read by all users of a node.
RAY_AUTH_TOKEN=$(head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"

# Runs on each node until it is told to end, and leaves nothing there. Ports are free ones: others may use the node.
ray_node() {
    folder=$(mktemp -d /tmp/sweep-ray-XXXXXX)
    ray start "$@" --block --temp-dir="$folder" --num-cpus="$SLURM_CPUS_ON_NODE" --object-store-memory=200000000 \
        --min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port=0 >/dev/null &
    trap 'kill $!; wait; rm -rf "$folder"' EXIT
    trap 'exit 0' TERM
    wait $!
}

ray_node --head --port="${RAY_ADDRESS#*:}" --include-dashboard=false &
for _ in $(seq 60); do
    ray health-check 2>/dev/null && break
    sleep 1
done
ray health-check 2>/dev/null || {
    echo "Ray's head did not start on $SLURMD_NODENAME" >&2
    exit 1
}
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    others=$((SLURM_JOB_NUM_NODES - 1))
    srun --overlap --nodes="$others" --ntasks="$others" --exclude="$SLURMD_NODENAME" \
        bash -c "$(declare -f ray_node); ray_node --address=$RAY_ADDRESS" &
fi

trap 'kill $(jobs -p) 2>/dev/null; wait' EXIT
sweep run "$@" --executor ray &
sweep=$!
trap 'kill -TERM "$sweep"' TERM
code=0
wait "$sweep" || code=$?
while kill -0 "$sweep" 2>/dev/null; do # the signal ended the waiting, not the command
    code=0
    wait "$sweep" || code=$?
done
exit "$code"
