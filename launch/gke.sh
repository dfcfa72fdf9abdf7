#!/usr/bin/env bash
# GKE with xpk: TPU slices as a JobSet, one process a host.
source "$(dirname "$0")/common.sh"

usage="Usage: launch/gke.sh --cluster NAME --tpu-type v6e-256 --image IMAGE [--slices 1] [--name deepgen] [--zone ZONE]
       [--project PROJECT] [--restarts 10] [--dry-run] -- train CONFIG [KEY=VALUE ...]

Creates an xpk workload. The image holds deepgen-jax with its tpu, data and rewards extras; models, data and out= are
paths that the workload mounts, or gs:// where a format reads it. A slice that is lost restarts all, which go on from the
newest checkpoint; so does any error, --restarts times, and training that was asked to end, as when a node is drained, once
it has saved."
options=([cluster]="" [tpu-type]="" [image]="" [slices]=1 [name]=deepgen [zone]="" [project]="" [restarts]=10)
parse "$@"
require cluster tpu-type image
require_counts slices restarts

# What processes end with whose peer is lost.
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
run "${command[@]}" --command "deepgen $(quoted "${words[@]}") --coordinator auto"
