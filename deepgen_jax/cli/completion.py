"""``deepgen completion``: scripts that complete commands and options in bash, zsh and fish."""

from __future__ import annotations

import dataclasses
import importlib
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from deepgen_jax.cli.commands import COMMANDS, Subcommand


@dataclass(frozen=True)
class CompletionCommand:
    """Prints a completion script; file names are completed wherever no command or option fits."""

    shell: Annotated[Positional[Literal["bash", "zsh", "fish"]], arg(metavar="SHELL")]
    """bash, zsh or fish."""

    def run(self) -> int:
        """Prints the script; returns the exit status."""
        words = completions()
        print(_fish(words) if self.shell == "fish" else _bash(words, zsh=self.shell == "zsh"))
        return 0


def completions() -> dict[str, list[str]]:
    """Words that may follow each command: "" -> commands, "data" -> its commands, "generate" -> its options."""
    found = {"": [*COMMANDS, "--help", "--version"]}
    for name, entry in COMMANDS.items():
        if isinstance(entry, Subcommand):
            found[name] = _options(entry)
        else:
            found[name] = [*entry.commands, "--help", *(_options(entry.other) if entry.other else ())]
            found |= {f"{name} {inner}": _options(command) for inner, command in entry.commands.items()}
    return found


def _options(entry: Subcommand) -> list[str]:
    command = getattr(importlib.import_module(entry.module), entry.name)
    return [*_fields(command), "--help", "--debug"]


def _fields(cls: Any) -> list[str]:
    options: list[str] = []
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        inner = typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint
        if dataclasses.is_dataclass(inner):
            options += _fields(inner)
        elif "positional" not in repr(hint).lower():
            options.append(f"--{field.name.replace('_', '-')}")
    return options


def _bash(words: Mapping[str, list[str]], zsh: bool) -> str:
    cases = "\n".join(f'      "{name}") words="{" ".join(options)}" ;;' for name, options in words.items() if name)
    start = "autoload -Uz compinit bashcompinit && compinit -u && bashcompinit\n" if zsh else ""
    return f"""{start}_deepgen() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" command="" words="" word
  for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
    case "$word" in -*) break ;; esac
    command="${{command:+$command }}$word"
  done
  while :; do
    case "$command" in
{cases}
      "") words="{" ".join(words[""])}" ;;
      *" "*) command="${{command% *}}"; continue ;;
    esac
    break
  done
  COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _deepgen deepgen"""


def _fish(words: Mapping[str, list[str]]) -> str:
    lines = ["complete -c deepgen -e"]
    for name, options in words.items():
        seen = [f"__fish_seen_subcommand_from {word}" for word in name.split()]
        condition = "; and ".join(seen) or "__fish_use_subcommand"
        for option in options:
            given = f"-l {option[2:]}" if option.startswith("--") else f"-a {option}"
            lines.append(f"complete -c deepgen -n '{condition}' {given}")
    return "\n".join(lines)
