#!/usr/bin/env bash
# TPU VMs over ssh: the same command on every worker of a slice.
source "$(dirname "$0")/common.sh"

usage="Usage: launch/tpu_vm.sh --tpu NAME --zone ZONE [--project PROJECT] [--folder deepgen-jax] [--setup REPOSITORY]
       [--env NAME=VALUE ...] [--dry-run] -- train CONFIG [KEY=VALUE ...]
       launch/tpu_vm.sh --tpu NAME --zone ZONE --follow | --stop

Starts deepgen on all workers of a TPU VM, in a folder that holds the project with a virtual environment .venv, detached
from this terminal: output goes to deepgen.log there. --setup REPOSITORY clones and installs it first, or brings it up to
date. --follow shows the log of the first worker, --stop lets the run save and end. Models and out= must be on storage
that all workers share, such as a Filestore share or a bucket mounted with GCS FUSE."
options=([tpu]="" [zone]="" [project]="" [folder]=deepgen-jax [setup]="" [env]="" [follow]=false [stop]=false)
lists=(env)
parse "$@"
require tpu zone
require_environment

ssh=(gcloud compute tpus tpu-vm ssh "${options[tpu]}" --zone "${options[zone]}")
[[ -z ${options[project]} ]] || ssh+=(--project "${options[project]}")
folder=$(quoted "${options[folder]}")
# Whether the run of deepgen.pid is alive; a process that has ended may be a zombie.
# shellcheck disable=SC2016  # the worker expands it
alive='alive() { kill -0 "$(cat deepgen.pid 2>/dev/null)" 2>/dev/null && ! grep -qs "^State:.Z" "/proc/$(cat deepgen.pid)/status"; }'
if ${options[follow]}; then
  run "${ssh[@]}" --worker 0 --command "tail -n 50 -F $folder/deepgen.log"
  exit
fi
if ${options[stop]}; then
  # shellcheck disable=SC2016  # the worker expands it
  stop='kill "$(cat deepgen.pid)" && while alive; do sleep 1; done; tail -n 3 deepgen.log'
  run "${ssh[@]}" --worker all --command "$alive; cd $folder && $stop"
  exit
fi
require_words
if [[ -n ${options[setup]} ]]; then
  clone="if [ -d $folder/.git ]; then git -C $folder pull -q --ff-only; else git clone -q $(quoted "${options[setup]}") $folder; fi"
  # The images of TPU VMs have an older Python than 3.11; uv brings one.
  install="python3 -m pip install -q uv && { [ -x .venv/bin/python ] || python3 -m uv venv -q --python 3.11 .venv; }"
  install+=" && python3 -m uv pip install -q --python .venv/bin/python '.[tpu,data,log,rewards]'"
  run "${ssh[@]}" --worker all --command "$clone && cd $folder && $install"
fi
environment=()
while IFS= read -r line; do
  [[ -z $line ]] || environment+=("$line")
done <<<"${options[env]}"
((${#environment[@]} == 0)) || environment=(env "${environment[@]}")
start="${environment[*]+$(quoted "${environment[@]}") }.venv/bin/deepgen $(quoted "${words[@]}") --coordinator auto"
start="setsid nohup $start >>deepgen.log 2>&1 </dev/null & echo \$! >deepgen.pid"
run "${ssh[@]}" --worker all --command \
  "$alive; cd $folder || exit 1; if alive; then echo 'a run is active; --stop ends it' >&2; exit 1; fi; $start"
