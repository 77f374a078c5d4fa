"""Completion of commands, options and choices by a shell: a script that is made once and asks nobody."""

from __future__ import annotations

import typing
from typing import Literal

from rlhf_jax.cli.commands import COMMANDS, OF_A_RUN, OF_COMMANDS, Hint, fields

SHELLS = {"bash": "", "zsh": "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"}

SCRIPT = """# rlhf-jax completion {shell}
{head}_rlhf_jax() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} command=${{COMP_WORDS[1]}} words=
    if (( COMP_CWORD == 1 )); then
        words="{commands}"
    elif [[ $command == data ]] && (( COMP_CWORD == 2 )); then
        words="{of_data}"
    else
        [[ $command == data ]] && command="data ${{COMP_WORDS[2]}}"
        case "$command $before" in
{choices}
        esac
        if [[ -z $words && $current == -* ]]; then
            case $command in
{options}
            esac
        fi
    fi
    COMPREPLY=()
    [[ -n $words ]] && COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _rlhf_jax rlhf-jax
"""


def completion(shell: str) -> str:
    """The script of one of `SHELLS`; where it knows nothing else the shell completes paths."""
    choices, options = [], []
    for name, command in COMMANDS.items():
        known = command.options
        options.append(f'                "{name}") words="{" ".join(f"--{option}" for option in known)}" ;;')
        for option, hint in known.items():
            if found := choices_of(hint):
                choices.append(f'            "{name} --{option}") words="{" ".join(found)}" ;;')
    names = dict.fromkeys(name.split()[0] for name in (*COMMANDS, *OF_A_RUN, *OF_COMMANDS))
    return SCRIPT.format(
        shell=shell,
        head=SHELLS[shell],
        commands=" ".join(names),
        of_data=" ".join(name.split()[1] for name in COMMANDS if name.startswith("data ")),
        choices="\n".join(choices),
        options="\n".join(options),
    )


def choices_of(hint: Hint) -> list[str]:
    """What may be given for an option of few values; else nothing."""
    if hint is bool:
        return ["true", "false"]
    if fields(hint):
        return []
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return [str(part) for part in parts]
    return [choice for part in parts for choice in choices_of(part)]
