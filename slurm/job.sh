# shellcheck shell=bash
# What the batch scripts share; they source it. Reads slurm/cluster.env.
#
# After this: $python is an array, the command before the arguments of Python; require_gpus, set_share and run_step.

stop() {
  echo "error: $*" >&2
  exit 1
}

MODULES='' CONTAINER='' SCRATCH='' GPUS_PER_NODE='' CRASH_RESTARTS=0
# shellcheck source=slurm/cluster.env
source slurm/cluster.env

if [[ -n "$MODULES" ]]; then
  set +u # the functions of some module systems use unset variables
  for file in /etc/profile.d/{lmod,z00_lmod,modules}.sh; do
    # shellcheck disable=SC1090
    type module &> /dev/null || [[ ! -r "$file" ]] || source "$file"
  done
  # shellcheck disable=SC2086
  module load $MODULES || stop "module load $MODULES failed on $(hostname); correct MODULES in slurm/cluster.env"
  set -u
fi

python=(python)
if [[ -n "$CONTAINER" ]]; then
  mapfile -t python < <(xargs printf '%s\n' <<< "$CONTAINER python") # words may be in quotes
elif [[ -x .venv/bin/python ]]; then
  python=(.venv/bin/python)
elif ! type python &> /dev/null; then
  stop "no python on $(hostname): type make install in $PWD, activate an environment before sbatch, or write CONTAINER" \
    "into slurm/cluster.env"
fi

# The folder on the node's disk is for temporary files, and for what is staged there.
if [[ -n "$SCRATCH" && -n "${SLURM_JOB_ID:-}" ]]; then
  DEPTH_ANYTHING_SCRATCH=$(eval "echo \"$SCRATCH\"")
  export DEPTH_ANYTHING_SCRATCH TMPDIR="$DEPTH_ANYTHING_SCRATCH"
  make=(mkdir -p "$DEPTH_ANYTHING_SCRATCH")
  nodes=${SLURM_JOB_NUM_NODES:-1}
  ((nodes == 1)) || make=(srun --ntasks="$nodes" --ntasks-per-node=1 "${make[@]}")
  "${make[@]}" || stop "SCRATCH=$SCRATCH of slurm/cluster.env cannot be made on $(hostname)"
fi

# With these names Lightning takes the tasks of a job for processes that have nothing to do with each other.
[[ "${SLURM_JOB_NAME:-}" != bash && "${SLURM_JOB_NAME:-}" != interactive ]] || export SLURM_JOB_NAME=depth-anything

# srun does not take this over from sbatch by itself (since Slurm 22.05).
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"

# This script, and not Python, queues the job again: Python may be in a container without scontrol, or be starting. Of
# an array only this task is meant; its SLURM_JOB_ID can be that of the whole array.
job=${SLURM_JOB_ID:-}
[[ -z "${SLURM_ARRAY_JOB_ID:-}" ]] || job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
export DEPTH_ANYTHING_SCRIPT_REQUEUES="$job"

# End a job that would train on CPUs by mistake.
require_gpus() {
  [[ "$GPUS_PER_NODE" != 0 ]] || return 0
  local found="${SLURM_GPUS_ON_NODE:-}${SLURM_JOB_GPUS:-}${SLURM_GPUS_PER_NODE:-}${CUDA_VISIBLE_DEVICES:-}"
  [[ -n "$found" || -e /dev/nvidiactl || -e /dev/kfd ]] ||
    stop "this job has no GPU. Submit with slurm/submit.sh, or give sbatch --gpus-per-node=N; for a cluster" \
      "without GPUs write GPUS_PER_NODE=0 into slurm/cluster.env"
}

# Set $share to this task's share of the array, "K/N".
set_share() {
  local first="${SLURM_ARRAY_TASK_MIN:-0}" step="${SLURM_ARRAY_TASK_STEP:-1}" count="${SLURM_ARRAY_TASK_COUNT:-1}"
  local last="${SLURM_ARRAY_TASK_MAX:-$((first + (count - 1) * step))}"
  (((last - first) / step + 1 == count)) ||
    stop "--array is a list with gaps; give a range, as --array=0-7 (what is written already is not written again)"
  # shellcheck disable=SC2034
  share="$(((${SLURM_ARRAY_TASK_ID:-0} - first) / step + 1))/$count"
}

# Run Python in every task of the job, then queue the job again if it should continue, and end with its exit code.
run_step() {
  local status=0
  srun "${python[@]}" "$@" || status=$?
  case $status in
    138) is_outdated || requeue ;; # 128 + SIGUSR1: the time limit is near
    # 128 + SIGABRT, SIGBUS, SIGKILL or SIGSEGV: a process did not end by itself. 200: a rank hung
    # (docs/troubleshooting-clusters.md).
    134 | 135 | 137 | 139 | 200) is_outdated || restart ;;
  esac
  exit "$status"
}

# Return whether Slurm has queued the job again already, as when it lost this node: a later start must be left alone.
is_outdated() {
  local restarts
  restarts=$(squeue --noheader --jobs="$job" --Format=RestartCnt) || return 1
  restarts=${restarts//[^0-9]/}
  ((${restarts:-0} > ${SLURM_RESTART_COUNT:-0})) || return 1
  echo "job $job was queued again already (restart $restarts); this start of it ends" >&2
}

# Run a command of Slurm up to five times: the controller may be busy.
retry() {
  local attempt
  for attempt in 1 2 3 4 5; do
    ! "$@" || return 0
    ((attempt == 5)) || sleep 10
  done
  return 1
}

requeue() {
  retry scontrol requeue "$job" || name_unqueued
}

name_unqueued() {
  echo "error: Slurm's job $job is not queued again; submit the same command again" >&2
}

# Queue the job again after a crash. The job's comment, which a requeued job keeps, counts the crashes in a row; a start
# that ran for an hour begins a new count.
restart() {
  local crashes=0 comment
  comment=$(squeue --noheader --jobs="$job" --format=%k)
  [[ ! "$comment" =~ ^crashes:([0-9]+)$ ]] || ((SECONDS >= 3600)) || crashes=${BASH_REMATCH[1]}
  if ((crashes >= CRASH_RESTARTS)); then
    echo "error: job $job crashed (exit code $status); it is not queued again (CRASH_RESTARTS=$CRASH_RESTARTS in" \
      "slurm/cluster.env). Read its last lines above, then submit the same command again" >&2
    return
  fi
  echo "job $job crashed (exit code $status): restart $((crashes + 1)) of $CRASH_RESTARTS" >&2
  # Without the count it could restart for ever.
  if retry scontrol update "JobId=$job" "Comment=crashes:$((crashes + 1))"; then requeue; else name_unqueued; fi
}
