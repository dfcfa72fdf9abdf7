#!/usr/bin/env bash
# GKE with xpk: TPU slices as a JobSet, one process a host.
source "$(dirname "$0")/common.sh"

usage="Usage: launch/gke.sh --cluster NAME --tpu-type v6e-256 --image IMAGE [--slices 1] [--name deepgen] [--zone ZONE]
       [--project PROJECT] [--restarts 10] [--env NAME=VALUE ...] [--dry-run] -- train CONFIG [KEY=VALUE ...]

Creates an xpk workload. The image is built from launch/Dockerfile (--build-arg DEVICE=tpu); models and out= are folders
that all hosts mount (Filestore, or a bucket through GCS FUSE), data too, or gs:// where a format reads it. A slice that is
lost restarts all processes, which continue from the newest checkpoint; so do errors, --restarts times, and training that
was asked to end, as when a node is drained, once it has saved."
options=([cluster]="" [tpu-type]="" [image]="" [slices]=1 [name]=deepgen [zone]="" [project]="" [restarts]=10 [env]="")
lists=(env)
parse "$@"
require_words
require cluster tpu-type image
require_counts slices restarts
require_environment

# Exit status of processes that have lost a peer, as of all errors.
restart=2
# Training that a drained node ends is not done.
[[ ${words[0]} != train ]] || words+=(--stopped-status "$restart")

command=(
  xpk workload create
  --cluster "${options[cluster]}" --workload "${options[name]}"
  --tpu-type "${options[tpu-type]}" --num-slices "${options[slices]}"
  --docker-image "${options[image]}" --max-restarts "${options[restarts]}"
  --restart-on-exit-codes "$restart"
)
for name in zone project; do
  [[ -z ${options[$name]} ]] || command+=("--$name" "${options[$name]}")
done
while IFS= read -r line; do
  [[ -z $line ]] || command+=(--env "$line")
done <<<"${options[env]}"
run "${command[@]}" --command "deepgen $(quoted "${words[@]}") --coordinator auto"
