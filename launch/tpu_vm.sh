#!/usr/bin/env bash
# TPU VMs over ssh: the same command on every worker of a slice.
source "$(dirname "$0")/common.sh"

usage="Usage: launch/tpu_vm.sh --tpu NAME --zone ZONE [--project PROJECT] [--folder deepgen-jax] [--setup REPOSITORY]
       [--dry-run] -- train CONFIG [KEY=VALUE ...]

Runs deepgen on all workers of a TPU VM, in a folder that holds the project with a virtual environment .venv.
--setup REPOSITORY clones and installs it there first."
options=([tpu]="" [zone]="" [project]="" [folder]=deepgen-jax [setup]="")
parse "$@"
require tpu zone

on_all=(gcloud compute tpus tpu-vm ssh "${options[tpu]}" --zone "${options[zone]}" --worker all)
[[ -z ${options[project]} ]] || on_all+=(--project "${options[project]}")
folder=$(quoted "${options[folder]}")
if [[ -n ${options[setup]} ]]; then
  # The images of TPU VMs have an older Python than 3.11; uv brings one.
  install="python3 -m pip install -q uv && python3 -m uv venv -q --python 3.11 .venv"
  install+=" && python3 -m uv pip install -q --python .venv/bin/python '.[tpu,data,log,rewards]'"
  run "${on_all[@]}" --command "git clone $(quoted "${options[setup]}") $folder && cd $folder && $install"
fi
run "${on_all[@]}" --command "cd $folder && .venv/bin/deepgen $(quoted "${words[@]}") --coordinator auto"
