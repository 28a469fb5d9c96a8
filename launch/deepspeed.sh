#!/usr/bin/env bash
# Train with DeepSpeed's launcher, from one machine, on all machines in a hostfile:
#
#   ./launch/deepspeed.sh HOSTFILE CONFIG [key=value …]
#
# HOSTFILE has a line per machine, such as `worker-1 slots=8`, with a slot per rank. All must be
# reachable by ssh without a password, and have the project and the run's folder at the same paths.
# A hostfile with only this machine needs no ssh. DEEPSPEED_OPTIONS: more options of the launcher.
set -euo pipefail

if [ $# -lt 2 ]; then
  sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
hostfile=$1
shift
if [ ! -f "$hostfile" ]; then
  echo "launch/deepspeed.sh: expected a hostfile, found none at $hostfile." >&2
  exit 2
fi
here=$(cd "$(dirname "$0")/.." && pwd)
[ -x "$here/.venv/bin/deepspeed" ] && PATH="$here/.venv/bin:$PATH"

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Without GPUs the launcher counts slots only if it is told that CPUs are meant.
nvidia-smi --list-gpus >/dev/null 2>&1 || export DS_ACCELERATOR=cpu
read -r -a options <<<"${DEEPSPEED_OPTIONS:-}"
# The launcher asks the first machine by ssh, even where that is this one.
grep -vE '^(#|$|localhost )' "$hostfile" >/dev/null ||
  options+=(--no_ssh_check --master_addr 127.0.0.1)
exec deepspeed --hostfile "$hostfile" "${options[@]}" --module dti_dist.training "$@"
