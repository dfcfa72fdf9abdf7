# shellcheck shell=bash
# What the launchers share: options before "--", the words of `deepgen` after it, and --dry-run.
# A launcher lists its options in the array `options` (name -> default value; one of "false" is a switch without a value),
# those that may be repeated in `lists` as well (their values come one a line), and says how it is used in `usage`.
set -euo pipefail

declare -A options
lists=()
usage=""
words=()
dry_run=false

fail() {
  printf '%s: error: %s; see %s --help\n' "$(basename "$0")" "$1" "$0" >&2
  exit 2
}

# Fills `options`, `words` and `dry_run` from the command line.
parse() {
  while (($#)); do
    case $1 in
      -h | --help)
        printf '%s\n' "$usage"
        exit 0
        ;;
      --dry-run) dry_run=true ;;
      --)
        shift
        words=("$@")
        break
        ;;
      --*)
        local name=${1#--}
        [[ -v options[$name] ]] || fail "unknown option $1"
        if [[ ${options[$name]} == false ]]; then
          options[$name]=true
        else
          (($# > 1)) || fail "$1 needs a value"
          if [[ " ${lists[*]-} " == *" $name "* ]]; then
            options[$name]+="$2"$'\n'
          else
            options[$name]=$2
          fi
          shift
        fi
        ;;
      *) fail "unexpected word '$1'; the words of deepgen come after --" ;;
    esac
    shift
  done
}

# Fails if there are no arguments for deepgen.
require_words() {
  ((${#words[@]})) || fail "nothing to run; write the words of deepgen after --, such as -- train sft out=runs/sft"
}

# Takes the names of options that must have a value.
require() {
  local name
  for name in "$@"; do
    [[ -n ${options[$name]} ]] || fail "--$name is missing"
  done
}

# Takes the names of options that must be whole numbers above 0.
require_counts() {
  local name
  for name in "$@"; do
    [[ ${options[$name]} =~ ^[1-9][0-9]*$ ]] || fail "--$name is '${options[$name]}'; it must be a whole number above 0"
  done
}

# Fails if a line of --env is not NAME=VALUE.
require_environment() {
  local line
  while IFS= read -r line; do
    [[ -z $line || $line =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || fail "--env is '$line'; it must be NAME=VALUE"
  done <<<"${options[env]}"
}

# Quotes the arguments as one line of shell.
quoted() {
  local line
  printf -v line '%q ' "$@"
  printf '%s' "${line% }"
}

# Runs a command, or prints it.
run() {
  if $dry_run; then
    printf '%s\n' "$(quoted "$@")"
  else
    "$@"
  fi
}
