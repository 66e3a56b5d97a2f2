# bash completion of the container options of srun, sbatch and salloc; all else is left to Slurm's own, where it is
# installed. bash-completion finds this file first, because /usr/local/share stands before /usr/share in XDG_DATA_DIRS.
# Made by 'python -m enclos.runtime.settings --write' from runtime/options.py: change that.

# Those of some words that begin with a text, with a prefix, into COMPREPLY. Not compgen -W, which expands each word:
# names of profiles are names of files, perhaps another user's. What a shell would not take as it stands is not offered.
_enclos_offer()
{
	local IFS=$' \t\n' word all=()

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
	--container-image)
		words=$(enclos image ls 2>/dev/null | sed '1d; s/ .*//')
		;;
	--container-profile)
		words=$(enclos profile ls 2>/dev/null | sed '1d; s/ .*//')
		;;
	--container-rdma)
		words="auto none"
		;;
	--container-unshare)
		words="net ipc uts"
		;;
	--container-limit)
		words="memory= swap= cpu= cpuset= pids= io= hugetlb= rdma="
		;;
	--container-cgroup)
		words="readonly delegate"
		;;
	--container-network)
		words=$(enclos config show 2>/dev/null | sed -n 's/^step.networks *\[\(.*\)\].*/\1/p' | tr , ' ')
		words=${words:-host job none}
		;;
	*)
		return 1
		;;
	esac
	case $1 in
	--container-unshare|--container-limit)
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

_enclos_srun()
{
	local option value glued word own=() command=${1##*/}

	_enclos_option
	COMPREPLY=()
	_enclos_values "$option" "$value" && return
	if [[ $option == --container-* && " --container-image= --container-mounts= --container-profile= --container-workdir= --container-name= --container-save= --container-writable --container-readonly --container-remap-root --no-container-remap-root --container-mount-home --no-container-mount-home --container-entrypoint --no-container-entrypoint --container-entrypoint-log --container-slurm --no-container-slurm --container-env= --container-device= --container-rdma= --container-unshare= --container-limit= --container-cgroup= --container-network= " == *" $option= "* ]]; then
		compopt -o default -o bashdefault 2>/dev/null
		return
	fi
	[[ $value == -* ]] && _enclos_offer "--container-image= --container-mounts= --container-profile= --container-workdir= --container-name= --container-save= --container-writable --container-readonly --container-remap-root --no-container-remap-root --container-mount-home --no-container-mount-home --container-entrypoint --no-container-entrypoint --container-entrypoint-log --container-slurm --no-container-slurm --container-env= --container-device= --container-rdma= --container-unshare= --container-limit= --container-cgroup= --container-network=" "$value" "" && own=("${COMPREPLY[@]}")
	COMPREPLY=()
	[[ -n ${_enclos_before[$command]} ]] && "${_enclos_before[$command]}" "$@" 2>/dev/null
	[[ $value == -* ]] || return 0
	for word in "${COMPREPLY[@]}"; do
		[[ $word == "$value"* && " ${own[*]} " != *" $word "* ]] && own+=("$word")
	done
	COMPREPLY=("${own[@]}")
	[[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *= ]] && compopt -o nospace 2>/dev/null
	return 0
}

# Slurm's own completion of this command, from the first place that has one.
_enclos_load_before()
{
	local directory file IFS=:

	complete -r "$1" 2>/dev/null
	for directory in ${XDG_DATA_DIRS:-/usr/local/share:/usr/share}; do
		file=$directory/bash-completion/completions/$1
		if [[ -r $file ]] && ! grep -q _enclos_srun "$file"; then
			IFS=$' \t\n'
			source "$file"
			[[ $(complete -p "$1" 2>/dev/null) =~ -F\ ([^\ ]+) ]] && _enclos_before[$1]=${BASH_REMATCH[1]}
			return
		fi
	done
}

declare -gA _enclos_before
for _enclos_command in srun sbatch salloc; do
	_enclos_load_before $_enclos_command
done
for _enclos_command in srun sbatch salloc; do
	complete -o bashdefault -o default -F _enclos_srun $_enclos_command
done
unset _enclos_command
