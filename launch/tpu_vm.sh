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
  install="python3 -m venv .venv && .venv/bin/pip install -q '.[tpu,data,log]'"
  run "${on_all[@]}" --command "git clone $(quoted "${options[setup]}") $folder && cd $folder && $install"
fi
run "${on_all[@]}" --command "cd $folder && .venv/bin/deepgen $(quoted "${words[@]}") --coordinator auto"
