#!/usr/bin/env bash
# Submit teacher, pseudo-labels, students and evaluation, each waiting for what it needs.
#
#   slurm/pipeline.sh --dry-run size=paper                   print the plan
#   slurm/pipeline.sh size=paper                             print it and submit; with sbatch in front also from a job
#   slurm/pipeline.sh size=paper encoder=vits,vitb           fewer students
#   slurm/pipeline.sh size=paper -- --benchmarks nyu kitti --root data/benchmarks      another evaluation
#
# The words are those of train.py; each goes to every stage that knows its key. After something failed, type the same
# command again: it submits only what is not finished and not queued.
#SBATCH --job-name=depth-anything-pipeline
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --time=00:15:00
#SBATCH --output=slurm-%j.out
set -euo pipefail

[[ -f train.py && -f slurm/job.sh ]] || {
  echo "error: no train.py in $PWD; run this in the project's folder: slurm/pipeline.sh $*" >&2
  exit 1
}
source slurm/job.sh
if [[ -n "${SLURM_JOB_ID:-}" ]]; then # the jobs do not inherit the variables of the job that runs this script
  for name in "${!SLURM_@}"; do
    [[ "$name" == SLURM_CONF ]] || unset "$name"
  done
fi

dry_run=no
[[ "${1:-}" != --dry-run ]] || { dry_run=yes && shift; }
[[ " $*" != *" dry_run=true"* ]] || stop "type --dry-run as the first word"
listed=$("${python[@]}" slurm/list_stages.py "$@")

# Without the queue, stages that are queued already would be submitted twice.
queue=$(squeue --noheader --user="$(id -un)" --format='%F|%t|%Z|%j') ||
  [[ "$dry_run" == yes ]] || stop "squeue does not answer, so nothing is submitted"

# Print the queued job of a name and of this folder, "ID STATE": PD only if no task of it runs. Slurm knows the folder
# by its path without symbolic links.
find_job() {
  FOLDER=$(pwd -P) NAME=$1 awk -F '|' '
    $3 == ENVIRON["FOLDER"] && $4 == ENVIRON["NAME"] && (!job || $2 != "PD") {job = $1 " " $2} END {print job}
  ' <<< "$queue"
}

# Plan. Slurm cancels jobs that wait for a failed job; those that wait for a stage that is submitted again are replaced.
kinds=() names=() actions=() old=() words=() labels_change=no students_change=no
while IFS=$'\t' read -r kind name state arguments; do
  read -r id job_state <<< "$(find_job "$name")"
  changed=$labels_change
  [[ "$kind" != evaluation ]] || changed=$students_change
  action=submit
  if [[ "$state" == finished ]]; then
    action=finished
  elif [[ -n "$id" && ("$changed" == no || "$job_state" != PD) ]]; then
    action="queued as $id"
  elif [[ -n "$id" ]]; then
    action="replace $id"
  fi
  if [[ "$action" == submit || "$action" == replace* ]]; then
    students_change=yes
    [[ "$kind" == student ]] || labels_change=yes
  fi
  kinds+=("$kind") names+=("$name") actions+=("$action") old+=("$id") words+=("$arguments")
  printf '%-11s %-12s %s: %s\n' "$kind" "$action" "$name" "$arguments"
done <<< "$listed"
[[ "$dry_run" == no ]] || exit 0

teacher='' labels='' models='' # job ids with a colon in front, as --dependency wants them
for i in "${!kinds[@]}"; do
  id=''
  case ${actions[i]} in
    queued*) id=${old[i]} ;;
    submit | replace*)
      # An array that lost a task may have labeled everything all the same; a student rejects an unfinished set.
      case ${kinds[i]} in
        teacher) script=train after='' ;;
        labels) script=pseudolabel after=${teacher:+afterok$teacher} ;;
        student) script=train after=${teacher:+afterok$teacher,}${labels:+afterany$labels} ;;
        evaluation) script=evaluate after=${models:+afterok$models} ;;
      esac
      [[ "${actions[i]}" == submit ]] || scancel "${old[i]}"
      options=(--parsable --job-name="${names[i]}" --kill-on-invalid-dep=yes)
      [[ -z "${after%,}" ]] || options+=(--dependency="${after%,}")
      eval "arguments=(${words[i]})" # quoted by list_stages.py
      id=$(slurm/submit.sh "${options[@]}" "$script" "${arguments[@]}")
      id=${id%%;*} # of several clusters sbatch prints ID;CLUSTER
      echo "submitted ${kinds[i]} as job $id"
      ;;
  esac
  [[ -n "$id" ]] || continue
  case ${kinds[i]} in
    teacher) teacher=:$id models+=:$id ;;
    labels) labels=:$id ;;
    student) models+=:$id ;;
  esac
done
