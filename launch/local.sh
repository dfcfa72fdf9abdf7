#!/usr/bin/env bash
# One machine: one process for all its devices, or several processes that share them.
source "$(dirname "$0")/common.sh"

usage="Usage: launch/local.sh [--processes N] [--port PORT] [--dry-run] -- train CONFIG [KEY=VALUE ...]

Runs deepgen on this machine. One process takes all devices. With --processes N on a machine with GPUs, each takes one,
in their order or that of CUDA_VISIBLE_DEVICES. When one process ends with an error, all end."
options=([processes]=1 [port]=12355)
parse "$@"
require_words
require_counts processes port
count=${options[processes]}
if ((count == 1)); then
  run deepgen "${words[@]}"
  exit
fi

gpus=()
if command -v nvidia-smi >/dev/null; then
  if [[ -v CUDA_VISIBLE_DEVICES ]]; then
    IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
    # Empty hides all GPUs, and processes inherit it.
    ((${#gpus[@]} == 0 || count <= ${#gpus[@]})) || fail "--processes is $count, but CUDA_VISIBLE_DEVICES has ${#gpus[@]}"
  else
    for ((i = 0; i < count; i++)); do gpus+=("$i"); done
  fi
fi
pids=()
# Passed on, so that the run saves; the processes are waited for.
trap '((${#pids[@]} == 0)) || kill "${pids[@]}" 2>/dev/null || true' TERM
for ((i = 0; i < count; i++)); do
  command=(deepgen "${words[@]}" --coordinator "localhost:${options[port]}" --num-processes "$count" --process-id "$i")
  if ((${#gpus[@]})); then
    command=(env "CUDA_VISIBLE_DEVICES=${gpus[i]}" "${command[@]}")
  fi
  if $dry_run; then
    run "${command[@]}"
  else
    "${command[@]}" &
    pids+=($!)
  fi
done
status=0
for pid in "${pids[@]}"; do
  # A signal ends `wait`, not the process.
  while ended=0 && { wait "$pid" || ended=$?; } && kill -0 "$pid" 2>/dev/null; do :; done
  ((ended == 0)) || status=$ended
done
exit "$status"
