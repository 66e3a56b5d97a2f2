"""What a shell completes: of `enclos` from the verbs' --help, of srun's options from their rows in options.py.

generate.py writes conf/completion with these texts. For developers and tests; no daemon imports it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from enclos.runtime import early, limits
from enclos.runtime.cli.main import GLOBAL_OPTIONS, VERBS
from enclos.runtime.manual import NOTE, Verb, _help, _metavar, verbs
from enclos.runtime.options import OPTIONS
from enclos.runtime.settings import NETWORKS

# What is known of an option's values, by its key. Others are files or free texts.
VALUES = {
    "network": NETWORKS,
    "unshare": early.NAMESPACES,
    "rdma": ("auto", "none"),
    "cgroup": ("readonly", "delegate"),
    "limit": tuple(f"{name}=" for name in limits.NAMES),
}
LISTS = ("unshare", "limit")
FILES = ("image", "mounts", "save", "profile")

# Names that only the machine knows. All of it runs when somebody presses Tab.
PROFILES = "enclos profile ls 2>/dev/null | sed '1d; s/ .*//'"
IMAGES = "enclos image ls 2>/dev/null | sed '1d; s/ .*//'"
JOBS = "enclos ps 2>/dev/null | sed '1d; s/ .*//'"
# Those that the site offers; all where its settings cannot be read.
OFFERED = "enclos config show 2>/dev/null | sed -n 's/^step.networks *\\[\\(.*\\)\\].*/\\1/p' | tr , ' '"
NAMES = {"profile": PROFILES, "image": IMAGES}
# What follows a verb's options.
ARGUMENTS = {
    **dict.fromkeys(("profile show", "profile validate", "profile options"), PROFILES),
    **dict.fromkeys(("image rm", "image inspect", "image export", "image resolve"), IMAGES),
    **dict.fromkeys(("exec", "shell"), JOBS),
}


def _value_cases() -> Iterator[str]:
    """Of `case OPTION in` in bash: which words are its values."""
    for option in OPTIONS:
        known = VALUES.get(option.key, ())
        if not option.arginfo or not (known or option.key in NAMES):
            continue
        words = f'words="{" ".join(known)}"' if known else f"words=$({NAMES[option.key]})"
        if option.key == "network":
            words = f'words=$({OFFERED})\n\t\twords=${{words:-{" ".join(known)}}}'
        yield f"\t--{option.name})\n\t\t{words}\n\t\t;;"


BASH_VALUES = """\
# Those of some words that begin with a text, with a prefix, into COMPREPLY. Not compgen -W, which expands each word:
# names of profiles are names of files, perhaps another user's. What a shell would not take as it stands is not offered.
_enclos_offer()
{
	local IFS=$' \\t\\n' word all=()

	COMPREPLY=()
	read -rd '' -a all <<<"$1"
	for word in "${all[@]}"; do
		[[ $word == "$2"* && $word != *[^[:alnum:]_.,:/@#=+-]* ]] && COMPREPLY+=("$3$word")
	done
	return 0
}

# The values of an option, the first argument, that go on from the second one: into COMPREPLY. Readline takes the part
# behind the last : or = for the word, so only that is replied. Fails where nothing is known of the option.
_enclos_values()
{
	local words="" list="" typed=$2 cut=""

	case $1 in
CASES
	*)
		return 1
		;;
	esac
	case $1 in
	LISTS)
		[[ $typed == *,* ]] && list=${typed%,*},
		;;
	esac
	_enclos_offer "$words" "${typed#"$list"}" "$list"
	[[ $COMP_WORDBREAKS == *:* && $typed == *:* ]] && cut=${typed%:*}:
	[[ $COMP_WORDBREAKS == *=* || $glued == no ]] || COMPREPLY=("${COMPREPLY[@]/#/"$1="}")
	COMPREPLY=("${COMPREPLY[@]#"$cut"}")
	[[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *= ]] && compopt -o nospace 2>/dev/null
	return 0
}

# The option whose value is being typed, and what there is of it, from what stands before the cursor; else nothing.
_enclos_option()
{
	local typed=${COMP_LINE:0:COMP_POINT}
	local token=${typed##*[[:space:]]} before=${typed%[[:space:]]*}

	option="" value="" glued=no
	if [[ $token == --*=* ]]; then
		option=${token%%=*} value=${token#*=} glued=yes
	else
		before=${before%"${before##*[![:space:]]}"}
		option=${before##*[[:space:]]} value=$token
	fi
}
"""


def _bash_values() -> str:
    lists = "|".join(f"--{option.name}" for option in OPTIONS if option.key in LISTS)
    return BASH_VALUES.replace("CASES", "\n".join(_value_cases())).replace("LISTS", lists)


def bash() -> str:
    """conf/completion/enclos.bash."""
    cases, values = [], set()
    for words, choices in _choices():
        extra = f" $({ARGUMENTS[words]})" if words in ARGUMENTS else ""
        cases.append(f"\t{_pattern(words)})\n\t\twords=\"{' '.join(choices)}{extra}\"\n\t\t;;")
    for verb in verbs():
        values |= {text for action in verb.parser._actions if action.nargs != 0 for text in action.option_strings}
    return f"""\
# bash completion of enclos(1). {NOTE}

{_bash_values()}
_enclos()
{{
	local given="" words="" word option value glued

	COMPREPLY=()
	_enclos_option
	_enclos_values "$option" "$value" && return
	case $option in
	{"|".join(sorted(values))})
		return
		;;
	esac
	for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
		[[ $word == -* ]] || given+="${{given:+ }}$word"
	done
	case $given in
{chr(10).join(cases)}
	esac
	_enclos_offer "$words" "$value" ""
	[[ $value == *:* ]] && COMPREPLY=("${{COMPREPLY[@]#"${{value%:*}}:"}}")
}}

complete -o bashdefault -o default -F _enclos enclos
"""


def _pattern(words: str) -> str:
    """A verb without further verbs goes on with whatever is typed after it."""
    leaves = {verb.words for verb in verbs()}
    return f'"{words}"*' if words in leaves else f'"{words}"'


def _choices() -> Iterator[tuple[str, list[str]]]:
    """(words typed so far, what may follow), the longest first."""
    found: dict[str, list[str]] = {"": [*VERBS, *GLOBAL_OPTIONS]}
    for verb in verbs():
        parts = verb.words.split()
        for depth in range(1, len(parts)):
            found.setdefault(" ".join(parts[:depth]), []).append(parts[depth])
        options = [text for action in verb.parser._actions for text in action.option_strings if text != "-h"]
        found[verb.words] = options
    for words in sorted(found, key=len, reverse=True):
        yield words, list(dict.fromkeys(found[words]))


def bash_slurm() -> str:
    """conf/completion/enclos-srun.bash, for srun, sbatch and salloc."""
    options = " ".join(f"--{option.name}{'=' if option.arginfo else ''}" for option in OPTIONS)
    return f"""\
# bash completion of the container options of srun, sbatch and salloc; all else is left to Slurm's own, where it is
# installed. bash-completion finds this file first, because /usr/local/share stands before /usr/share in XDG_DATA_DIRS.
# Made by 'python -m enclos.runtime.settings --write' from runtime/options.py: change that.

{_bash_values()}
_enclos_srun()
{{
	local option value glued word own=() command=${{1##*/}}

	_enclos_option
	COMPREPLY=()
	_enclos_values "$option" "$value" && return
	if [[ $option == --container-* && " {options} " == *" $option= "* ]]; then
		compopt -o default -o bashdefault 2>/dev/null
		return
	fi
	[[ $value == -* ]] && _enclos_offer "{options}" "$value" "" && own=("${{COMPREPLY[@]}}")
	COMPREPLY=()
	[[ -n ${{_enclos_before[$command]}} ]] && "${{_enclos_before[$command]}}" "$@" 2>/dev/null
	[[ $value == -* ]] || return 0
	for word in "${{COMPREPLY[@]}}"; do
		[[ $word == "$value"* && " ${{own[*]}} " != *" $word "* ]] && own+=("$word")
	done
	COMPREPLY=("${{own[@]}}")
	[[ ${{#COMPREPLY[@]}} == 1 && ${{COMPREPLY[0]}} == *= ]] && compopt -o nospace 2>/dev/null
	return 0
}}

# Slurm's own completion of this command, from the first place that has one.
_enclos_load_before()
{{
	local directory file IFS=:

	complete -r "$1" 2>/dev/null
	for directory in ${{XDG_DATA_DIRS:-/usr/local/share:/usr/share}}; do
		file=$directory/bash-completion/completions/$1
		if [[ -r $file ]] && ! grep -q _enclos_srun "$file"; then
			IFS=$' \\t\\n'
			source "$file"
			[[ $(complete -p "$1" 2>/dev/null) =~ -F\\ ([^\\ ]+) ]] && _enclos_before[$1]=${{BASH_REMATCH[1]}}
			return
		fi
	done
}}

declare -gA _enclos_before
for _enclos_command in srun sbatch salloc; do
	_enclos_load_before $_enclos_command
done
for _enclos_command in srun sbatch salloc; do
	complete -o bashdefault -o default -F _enclos_srun $_enclos_command
done
unset _enclos_command
"""


def zsh() -> str:
    """conf/completion/_enclos."""
    lines = []
    groups: dict[str, list[Verb]] = {}
    for verb in verbs():
        groups.setdefault(verb.words.split()[0], []).append(verb)
    for name, members in groups.items():
        lines.append(f"\t{name})")
        if members[0].words == name:
            lines.append(f"\t\t_arguments {' '.join(_zsh_specs(members[0]))}")
        else:
            rows = " ".join(_zsh_quote(f"{member.words.split()[1]}:{_plain(member.text)}") for member in members)
            lines += ["\t\tif (( CURRENT == 3 )); then", f"\t\t\tlocal -a nested=({rows})"]
            lines += ["\t\t\t_describe 'verb' nested", "\t\telse", "\t\t\tcase $words[3] in"]
            for member in members:
                lines += [f"\t\t\t{member.words.split()[1]}) _arguments {' '.join(_zsh_specs(member))} ;;"]
            lines += ["\t\t\tesac", "\t\tfi"]
        lines.append("\t\t;;")
    rows = " ".join(_zsh_quote(f"{name}:{_plain(text)}") for name, (_, text) in VERBS.items())
    body = "\n".join(lines)
    return f"""\
#compdef enclos
# zsh completion of enclos(1). {NOTE}

{_zsh_functions()}

_enclos()
{{
	local -a verbs=({rows})

	if (( CURRENT == 2 )); then
		_describe 'verb' verbs
		return
	fi
	case $words[2] in
{body}
	esac
}}

_enclos "$@"
"""


def _zsh_specs(verb: Verb) -> Iterator[str]:
    for action in verb.parser._actions:
        for text in action.option_strings:
            if text != "-h":
                value = "" if action.nargs == 0 else f":{_metavar(action).replace(':', ' ')}:{_zsh_values(action)}"
                yield _zsh_quote(f"{text}[{_plain(_help(action) or text)}]{value}")
    names = ARGUMENTS.get(verb.words)
    yield f"'*:name:{_zsh_names(names)}'" if names else "'*:file:_files'"


def _zsh_values(action: argparse.Action) -> str:
    option = next((o for o in OPTIONS if f"--{o.name}" in action.option_strings), None)
    if option is None or not (option.key in VALUES or option.key in NAMES):
        return "_files"
    if option.key in NAMES:
        return _zsh_names(NAMES[option.key])
    return f"({' '.join(VALUES[option.key])})"


def _zsh_names(command: str) -> str:
    """The function that offers the names that a command prints, and files."""
    return {PROFILES: "_enclos_profiles", IMAGES: "_enclos_images", JOBS: "_enclos_jobs"}[command]


def _zsh_functions() -> str:
    """Those functions."""
    rows = []
    for command in (PROFILES, IMAGES, JOBS):
        name = _zsh_names(command)
        files = "" if command == JOBS else "; _files"
        rows.append(f'{name}() {{ local -a names=(${{(f)"$({command})"}}); compadd -a names{files} }}')
    return "\n".join(rows)


def _zsh_quote(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def _plain(text: str) -> str:
    """Without the characters that mean something to _arguments and _describe."""
    return " ".join(text.translate({ord(c): " " for c in "[]:\\`$"}).split())
