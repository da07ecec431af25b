#!/bin/bash
#SBATCH --job-name=demo
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@300
#SBATCH --output=demo.%j.log

# Written by tailor launch slurm. One task is one rank; submit it with: sbatch FILE
# Since when the devices are held, for the run's books.
export TAILOR_ALLOCATED_AT=${SLURM_JOB_START_TIME:-$(date +%s)}
cd /work || exit 74
command=(tailor train /recipes/demo.yaml --resume)
restarts_max=3

echo "tailor: job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, restart ${SLURM_RESTART_COUNT:-0}" >&2
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
export MASTER_ADDR=${address:-$first}
export MASTER_PORT=$((20000 + (SLURM_JOB_ID * 8 + ${SLURM_RESTART_COUNT:-0}) % 12000))
export WORLD_SIZE=1 LOCAL_WORLD_SIZE=1
export TAILOR_LAUNCHER=slurm TAILOR_LAUNCHER_JOB=$SLURM_JOB_ID
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
  export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
fi
codes=$(mktemp -d "$PWD/.tailor-$SLURM_JOB_ID.XXXXXX") || exit 74
export TAILOR_CODES=$codes

# Signals reach every rank by themselves; this shell only has to outlive them.
trap : TERM USR1 INT
rank='trap : TERM USR1 INT
RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID "$@"
code=$?
: >"$TAILOR_CODES/$code.$SLURM_PROCID"
# Left in order: the others may still be writing, and a code would have Slurm kill them.
case $code in 0 | 75 | 76) exit 0 ;; esac
# The others notice, name this rank and leave; then Slurm ends those that do not.
for ((i = 0; i < 100; i++)); do
  left=("$TAILOR_CODES"/*)
  [ ${#left[@]} -ge "$WORLD_SIZE" ] && break
  sleep 0.1
done
exit $code'
srun --kill-on-bad-exit=1 bash -c "$rank" rank "${command[@]}"
code=$?
# srun gives the largest code of all. A rank says first why it failed by itself, last that it was
# asked to stop (75) or lost another one (69).
for telling in 2 65 66 76 70 74 75 69; do
  set -- "$codes/$telling".*
  if [ -e "$1" ]; then code=$telling; break; fi
done
rm -rf "$codes"

# A job that was cancelled, or that Slurm requeues by itself, is no longer RUNNING here. One that is
# preempted is, as long as it leaves within the grace time, and then has to requeue itself.
state=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.*JobState=\([A-Z]*\).*/\1/p')
again=no
case $code in
  0 | 2 | 65 | 66 | 70 | 76 | 126 | 127) ;;
  75) again=yes ;;
  *) [ "${SLURM_RESTART_COUNT:-0}" -lt "$restarts_max" ] && again=yes ;;
esac
echo "tailor: the ranks left with $code; requeue: $again, the job is $state" >&2
if [ "$again" = yes ] && [ "$state" = RUNNING ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
