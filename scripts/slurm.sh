#!/usr/bin/env bash
# Trains on several nodes of a SLURM cluster. Edit what is between the lines; a
# process drives all accelerators of its node. See docs/processes.md.
# usage: sbatch scripts/slurm.sh [more flags of experiments.pretrain]
# ------------------------------------------------------------------------------
#SBATCH --job-name=dsv3
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.txt
#SBATCH --no-requeue
variant=small           # reads the folder corpus: scripts/prepare_data.py
workdir=runs/slurm      # on a file system that all nodes share
mesh=node=2,expert=8    # multiplies to all accelerators of the job
# ------------------------------------------------------------------------------
# Each process is started again after a crash or a preemption, and all find each
# other; bad input (exit code 2) would be refused again and ends the job.
# The same sbatch command resumes from the newest checkpoint.
set -euo pipefail
[ "${1:-}" != --help ] || { sed -n '2,/^[^#]/s/^# //p' "$0"; exit 0; }
cd "${SLURM_SUBMIT_DIR:?start it with sbatch}"
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
port=$((20000 + SLURM_JOB_ID % 10000))  # jobs may share a node
# $SLURM_PROCID differs between the processes, so each has to read its own.
# If one process fails for good, srun ends the others, which would wait for it.
exec srun --kill-on-bad-exit=1 bash -c 'exec "$@" --process="$SLURM_PROCID"' - \
  scripts/supervise.sh .venv/bin/python -m experiments.pretrain \
  --variant="$variant" --workdir="$workdir" --mesh="$mesh" \
  --coordinator="${hosts[0]}:$port" --processes="$SLURM_NTASKS" "$@"
