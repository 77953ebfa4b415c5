#!/bin/bash
# Pretrains on one node or several, one process a GPU. Preempted, or five minutes before its time is up, the run saves
# itself and ends with exit code 75; this script then queues itself again, and the run goes on where it stopped.
#
#     sbatch --nodes=2 training/launch/slurm.sh vit_b_mae3d --data STORE -o runs/vit_b_mae3d
#
# What follows the script's name goes to `medmim-train pretrain`. Set below, or as options of sbatch, what the cluster
# needs: partition, account, and a node's GPUs as --ntasks-per-node and --gpus-per-node. Submit from the environment that
# has medmim-train; store and run folder must be seen by all nodes.
#SBATCH --job-name=medmim
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=10
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT OMP_NUM_THREADS=1

trap : TERM # is for the processes; this shell has to outlive them
code=0
# Once one process has ended, the others get a minute: they end by themselves unless it crashed. Since Slurm 22.05 srun
# has to be told again of the cores, or all that reads crops shares one with the process that trains.
srun --wait=60 --cpus-per-task="$SLURM_CPUS_PER_TASK" bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    exec medmim-train pretrain "$@"
' pretrain "$@" || code=$?

if [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
