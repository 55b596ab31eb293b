#!/usr/bin/env bash
# Submit a batch script of this folder with the options of slurm/cluster.env.
#
#   slurm/submit.sh [OPTION OF SBATCH …] train|pseudolabel|evaluate|shard [ARGUMENT …]
#
# Your options come last, so they override those of the file. --array= of your own sets the number of tasks.
set -euo pipefail

stop() {
  echo "error: $*" >&2
  exit 1
}

[[ -f train.py && -f slurm/cluster.env ]] || stop "no slurm/cluster.env in $PWD; run this in the project's folder"
ACCOUNT='' PARTITION='' CPU_PARTITION='' QOS='' TIME='' CPUS_PER_TASK='' MEMORY_PER_CPU='' MORE_OPTIONS=''
GPUS_PER_NODE='' GPU_OPTION='' NODES=1 LABEL_TASKS=1 EVALUATE_TASKS=1 SHARD_TASKS=1
# shellcheck source=slurm/cluster.env
source slurm/cluster.env

typed=() script=''
while (($#)); do
  case $1 in
    train | pseudolabel | evaluate | shard) script=$1 && shift && break ;;
    *) typed+=("$1") && shift ;;
  esac
done
[[ -n "$script" ]] || stop "type  slurm/submit.sh [OPTION …] train|pseudolabel|evaluate|shard [ARGUMENT …]"
if [[ ! "$GPUS_PER_NODE" =~ ^[0-9]+$ ]]; then
  found=$(sinfo --noheader --format=%G 2> /dev/null | sort -u | paste -s -d ' ') || found=unknown
  stop "GPUS_PER_NODE in slurm/cluster.env is \"$GPUS_PER_NODE\"; write the GPUs of a node, 0 for none (sinfo: $found)"
fi

gpus=0 partition=$PARTITION options=()
case $script in
  train)
    gpus=$GPUS_PER_NODE
    options=(--nodes="$NODES" --ntasks-per-node="$((gpus > 0 ? gpus : 1))")
    ;;
  pseudolabel) gpus=$((GPUS_PER_NODE > 0)) options=(--array="0-$((LABEL_TASKS - 1))") ;;
  evaluate) gpus=$((GPUS_PER_NODE > 0)) options=(--array="0-$((EVALUATE_TASKS - 1))") ;;
  shard) partition=${CPU_PARTITION:-$PARTITION} options=(--array="0-$((SHARD_TASKS - 1))") ;;
esac
((gpus == 0)) || [[ -z "$GPU_OPTION" ]] || options+=("$GPU_OPTION$gpus")
[[ -z "$ACCOUNT" ]] || options+=(--account="$ACCOUNT")
[[ -z "$partition" ]] || options+=(--partition="$partition")
[[ -z "$QOS" ]] || options+=(--qos="$QOS")
[[ -z "$TIME" ]] || options+=(--time="$TIME")
[[ -z "$CPUS_PER_TASK" ]] || options+=(--cpus-per-task="$CPUS_PER_TASK")
[[ -z "$MEMORY_PER_CPU" ]] || options+=(--mem-per-cpu="$MEMORY_PER_CPU")
mapfile -t more < <(xargs -r printf '%s\n' <<< "$MORE_OPTIONS") # words may be in quotes
exec sbatch "${options[@]}" ${more[@]+"${more[@]}"} ${typed[@]+"${typed[@]}"} "slurm/$script.sbatch" "$@"
