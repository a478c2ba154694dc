#!/bin/bash
# Pretrain on the hosts of a host file, started by Open MPI's mpirun: one process per GPU.
#
#   launchers/mpi/pretrain.sh hosts 8 --config recipes/llama_1b.yaml data.train=data/c4
#
# The first argument is the host file ("node1 slots=8", a line per host), the second the number of
# GPUs of each host; the rest goes to launchers/pretrain.py. The repository, its environment and the
# data must be at the same path on every host, and the hosts must be reachable by ssh.

# ---- Edit here ----------------------------------------------------------------------------------
PYTHON=${PYTHON:-.venv/bin/python}
MPIRUN=${MPIRUN:-mpirun}
# Variables that every rank gets from here; add NCCL's, such as NCCL_SOCKET_IFNAME.
PASS=(PATH LD_LIBRARY_PATH OMP_NUM_THREADS NCCL_SOCKET_IFNAME NCCL_IB_HCA NCCL_DEBUG)
# -------------------------------------------------------------------------------------------------

set -euo pipefail
if [[ $# -lt 3 || ! -f $1 || ! $2 =~ ^[1-9][0-9]*$ ]]; then
    echo "error: usage: $0 HOSTFILE GPUS_PER_HOST --config RECIPE ...; got: $*" >&2
    exit 2
fi
hostfile=$1 gpus=$2
shift 2

# Without them the ranks meet at the first address of rank 0's host, port 29500.
options=()
for name in "${PASS[@]}" MASTER_ADDR MASTER_PORT DS_ACCELERATOR; do
    if [[ -v $name ]]; then options+=(-x "$name"); fi
done
hosts=$(grep -cv -e '^[[:space:]]*#' -e '^[[:space:]]*$' "$hostfile")

exec "$MPIRUN" --hostfile "$hostfile" -n $((hosts * gpus)) --map-by "ppr:$gpus:node" --bind-to none \
    "${options[@]}" ${MPIRUN_OPTIONS:-} "$PYTHON" launchers/pretrain.py "$@"
