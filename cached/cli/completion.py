"""``cached completion``: the shells' completion scripts, made from the parsers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cached.cli.arguments import Parser, described
from cached.cli.main import COMMANDS, OK, command_parser
from cached.cli.terminal import say
from cached.core.errors import CachedError

if TYPE_CHECKING:
    import argparse

    from cached.cli.arguments import Argument

SHELLS = ("bash", "zsh", "fish")
NAMES = "names"  # for the scripts: the models that the daemon knows, one a line
PRINT_NAMES = f"cached completion {NAMES} 2>/dev/null"
EXAMPLES = (
    'eval "$(cached completion bash)"      # in ~/.bashrc',
    'eval "$(cached completion zsh)"       # in ~/.zshrc, after compinit',
    "cached completion fish > ~/.config/fish/completions/cached.fish",
)


def parser(name: str) -> Parser:
    """Return the parser of ``cached completion``."""
    parser = Parser(
        name,
        "Print a completion script for your shell; it asks the daemon for the models.",
        EXAMPLES,
    )
    parser.add_argument(
        "shell", choices=(*SHELLS, NAMES), metavar="|".join(SHELLS), help="your shell"
    )
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> int:
    """Print what is asked for."""
    if options.shell == NAMES:
        say("".join(f"{name}\n" for name in _names()))
    else:
        say({"bash": bash, "zsh": zsh, "fish": fish}[options.shell]())
    return OK


def _names() -> list[str]:
    from cached.cli.asking import model_names

    try:
        return model_names()
    except CachedError:
        return []  # a shell that completes has no place for errors


def bash() -> str:
    """Return the script for bash."""
    cases = "".join(_bash_case(command) for command in COMMANDS)
    return f"""\
_cached() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} words=
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then
    words="{" ".join(COMMANDS)} --version --help"
  else
    case "${{COMP_WORDS[1]}} $before" in
{cases}    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -F _cached cached
"""


def _bash_case(command: str) -> str:
    arguments = described(command_parser(command))
    words = [name for argument in arguments for name in argument.names]
    words += [word for argument in arguments if not argument.names for word in _values(argument)]
    models = f" $({PRINT_NAMES})" if _takes_models(arguments) else ""
    lines = []
    for argument in arguments:
        if not argument.names or not argument.metavar:
            continue
        pattern = "|".join(f'"{command} {name}"' for name in argument.names)
        if _is_path(argument):
            lines.append(f'      {pattern}) COMPREPLY=($(compgen -f -- "$word")); return ;;\n')
        else:
            lines.append(f'      {pattern}) words="{" ".join(_values(argument))}" ;;\n')
    return "".join(lines) + f'      "{command} "*) words="{" ".join(words)}{models}" ;;\n'


def zsh() -> str:
    """Return the script for zsh."""
    commands = " ".join(_quoted(f"{name}:{command.about}") for name, command in COMMANDS.items())
    cases = "".join(
        f"    {name}) _arguments {' '.join(_zsh_specs(name))} ;;\n" for name in COMMANDS
    )
    return f"""\
#compdef cached
_cached() {{
  if (( CURRENT == 2 )); then
    local -a commands=({commands})
    _describe command commands
    return
  fi
  shift words
  (( CURRENT-- ))
  case $words[1] in
{cases}  esac
}}
compdef _cached cached
"""


def _zsh_specs(command: str) -> list[str]:
    return [
        _quoted(spec) for argument in described(command_parser(command)) for spec in _zsh(argument)
    ]


def _zsh(argument: Argument) -> list[str]:
    if _takes_models([argument]):
        return [f"*:model:($({PRINT_NAMES}))"]
    values = f"({' '.join(_values(argument))})" if _values(argument) else " "
    values = "_files" if _is_path(argument) else values
    if not argument.names:
        return [f"1:{argument.metavar}:{values}"]
    about = _about(argument).replace("[", "(").replace("]", ")").replace(":", "\\:")
    value = f":{argument.metavar.replace(':', ' ')}:{values}" if argument.metavar else ""
    return [f"*{name}[{about}]{value}" for name in argument.names]


def fish() -> str:
    """Return the script for fish."""
    lines = ["complete -c cached -f"]
    for name, command in COMMANDS.items():
        about = _fish_quoted(command.about)
        lines.append(f"complete -c cached -n __fish_use_subcommand -a {name} -d {about}")
        arguments = described(command_parser(name))
        lines += [_fish_line(name, argument) for argument in arguments]
    return "\n".join(lines) + "\n"


def _fish_line(command: str, argument: Argument) -> str:
    head = f"complete -c cached -n '__fish_seen_subcommand_from {command}'"
    if _takes_models([argument]):
        return f"{head} -a '({PRINT_NAMES})'"
    values = f" -a '{' '.join(_values(argument))}'" if _values(argument) else ""
    if not argument.names:
        return head + values
    names = "".join(f" -l {name.removeprefix('--')}" for name in argument.names)
    takes = (" -r -F" if _is_path(argument) else " -x") if argument.metavar else ""
    return f"{head}{names}{takes}{values} -d {_fish_quoted(_about(argument))}"


def _about(argument: Argument) -> str:
    return argument.about.split(". ")[0]


def _takes_models(arguments: list[Argument]) -> bool:
    return any(not argument.names and argument.metavar == "NAME" for argument in arguments)


def _values(argument: Argument) -> list[str]:
    if argument.choices:
        return [choice for choice in argument.choices if choice != NAMES]
    words = argument.metavar.split("|")  # json|text; not SIZE|auto
    return words if len(words) > 1 and argument.metavar.islower() else []


def _is_path(argument: Argument) -> bool:
    return "PATH" in argument.metavar


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def _fish_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
