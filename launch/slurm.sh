#!/usr/bin/env bash
# SLURM: one task a GPU, which is how JAX finds its processes there.
source "$(dirname "$0")/common.sh"

usage="Usage: launch/slurm.sh --nodes N [--gpus-per-node 8] [--cpus-per-gpu 12] [--time 24:00:00] [--partition NAME]
       [--account NAME] [--name deepgen] [--venv .venv] [--restarts 10] [--sbatch OPTION ...] [--env NAME=VALUE ...]
       [--dry-run] -- train CONFIG [KEY=VALUE ...]

Submits a job from this folder. The folder, its virtual environment, models, data and out= must be on storage that all
nodes share. Three minutes before its time is up the run saves and ends, and the job queues itself again. So it does,
--restarts times, when a process was killed or has lost another one (any error ends with the same status): the run
continues from its newest checkpoint. --sbatch and --env may be repeated: further options of sbatch, such as
--sbatch --qos=high --sbatch --constraint=h100, and variables of the run. The environment of sbatch is passed on as well.
--dry-run prints the job."
options=(
  [nodes]="" [gpus-per-node]=8 [cpus-per-gpu]=12 [time]=24:00:00 [partition]="" [account]="" [name]=deepgen [venv]=.venv
  [restarts]=10 [sbatch]="" [env]=""
)
lists=(sbatch env)
parse "$@"
require_words
require nodes
require_counts nodes gpus-per-node cpus-per-gpu
[[ ${options[restarts]} =~ ^[0-9]+$ ]] || fail "--restarts is '${options[restarts]}'; it must be a whole number"
require_environment

directives="#SBATCH --job-name=${options[name]}
#SBATCH --nodes=${options[nodes]}
#SBATCH --ntasks-per-node=${options[gpus-per-node]}
#SBATCH --gpus-per-node=${options[gpus-per-node]}
#SBATCH --cpus-per-task=${options[cpus-per-gpu]}
#SBATCH --time=${options[time]}
#SBATCH --signal=B:TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log"
for name in partition account; do
  [[ -z ${options[$name]} ]] || directives+=$'\n'"#SBATCH --$name=${options[$name]}"
done
while IFS= read -r line; do
  [[ -z $line ]] && continue
  [[ $line == -* ]] || fail "--sbatch is '$line'; it must be an option of sbatch, such as --qos=high"
  # The last option of a name applies, so these override those above.
  directives+=$'\n'"#SBATCH $line"
done <<<"${options[sbatch]}"
exports=""
while IFS= read -r line; do
  [[ -z $line ]] || exports+="export ${line%%=*}=$(quoted "${line#*=}")"$'\n'
done <<<"${options[env]}"
job="#!/usr/bin/env bash
$directives
set -uo pipefail
${exports}source $(quoted "${options[venv]}/bin/activate")
# Only this script receives the signal: it forwards it, lets the run save, and requeues the job.
again=false
srun --cpus-per-task=${options[cpus-per-gpu]} --kill-on-bad-exit=1 deepgen $(quoted "${words[@]}") --coordinator auto &
run=\$!
trap 'again=true; scancel --signal=TERM \"\$SLURM_JOB_ID.0\"' TERM
# A signal ends the waiting, not the run.
while status=0 && { wait \"\$run\" || status=\$?; } && kill -0 \"\$run\" 2>/dev/null; do :; done
if ! \$again && ((status == 2 || status == 134 || status == 137)); then
  # 2: a process was lost, or another error; 134 and 137: this one was aborted or killed.
  ((\${SLURM_RESTART_COUNT:-0} < ${options[restarts]})) && again=true
elif ((status != 0)); then
  again=false
fi
if \$again; then
  echo \"status \$status: queued again\"
  scontrol requeue \"\$SLURM_JOB_ID\"
fi
exit \"\$status\""
if $dry_run; then
  printf '%s\n' "$job"
else
  sbatch <<<"$job"
fi
