#!/usr/bin/env bash
# Train on several machines without a scheduler. Run the same command on each, in any order.
#
#   ./launch/torchrun.sh HOST[:PORT] NODES CONFIG [key=value …]
#
# HOST is the address of one of the machines. Each machine runs one rank per GPU, or RANKS_PER_NODE;
# without GPUs, CPU ranks. The run's folder must be on a disk that all machines share. On a single
# machine: torchrun --standalone --nproc-per-node N -m dti_dist.training
set -euo pipefail

if [ $# -lt 3 ]; then
  sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
host=$1 nodes=$2
shift 2
[[ $host == *:* ]] || host=$host:29500
here=$(cd "$(dirname "$0")/.." && pwd)
[ -x "$here/.venv/bin/torchrun" ] && PATH="$here/.venv/bin:$PATH"

ranks=${RANKS_PER_NODE:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}
[ "$ranks" -gt 0 ] || ranks=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# The launcher passes signals to the ranks, which make a checkpoint, and ends with rank 0's exit code.
exec python -m dti_dist.launcher --nnodes "$nodes" --nproc-per-node "$ranks" --rdzv-backend c10d \
  --rdzv-endpoint "$host" --rdzv-id "${RENDEZVOUS_ID:-dti-dist}" -- train "$@"
