#!/usr/bin/env bash
# SLURM: one task a GPU, which is how JAX finds its processes there.
source "$(dirname "$0")/common.sh"

usage="Usage: launch/slurm.sh --nodes N [--gpus-per-node 8] [--cpus-per-gpu 12] [--time 24:00:00] [--partition NAME]
       [--account NAME] [--name deepgen] [--venv .venv] [--dry-run] -- train CONFIG [KEY=VALUE ...]

Submits a job from this folder, which all nodes must see. Three minutes before its time is up the run saves and ends,
and the job queues itself again: it goes on until the run is done or fails. --dry-run prints the job."
options=([nodes]="" [gpus-per-node]=8 [cpus-per-gpu]=12 [time]=24:00:00 [partition]="" [account]="" [name]=deepgen [venv]=.venv)
parse "$@"
require nodes
require_counts nodes gpus-per-node cpus-per-gpu

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
job="#!/usr/bin/env bash
$directives
set -uo pipefail
source $(quoted "${options[venv]}/bin/activate")
# The signal comes to this script alone: it passes it on, lets the run save, and queues the job again.
again=false
srun --cpus-per-task=${options[cpus-per-gpu]} --kill-on-bad-exit=1 deepgen $(quoted "${words[@]}") --coordinator auto &
trap 'again=true; scancel --signal=TERM \"\$SLURM_JOB_ID.0\"' TERM
until wait -n; status=\$?; ((status < 128)); do :; done
if \$again && ((status == 0)); then
  scontrol requeue \"\$SLURM_JOB_ID\"
fi
exit \"\$status\""
if $dry_run; then
  printf '%s\n' "$job"
else
  sbatch <<<"$job"
fi
