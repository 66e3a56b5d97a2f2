# bash completion of enclos(1). Made by 'python -m enclos.runtime.settings --write' from the verbs' --help: change those.

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

_enclos()
{
	local given="" words="" word option value glued

	COMPREPLY=()
	_enclos_option
	_enclos_values "$option" "$value" && return
	case $option in
	--authfile|--container-cgroup|--container-device|--container-env|--container-image|--container-limit|--container-mounts|--container-name|--container-network|--container-profile|--container-rdma|--container-save|--container-unshare|--container-workdir|--count|--file|--gpus|--interval|--job|--reload|--unused|-n)
		return
		;;
	esac
	for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
		[[ $word == -* ]] || given+="${given:+ }$word"
	done
	case $given in
	"profile validate"*)
		words="--help $(enclos profile ls 2>/dev/null | sed '1d; s/ .*//')"
		;;
	"partition attach"*)
		words="--help --file --reload"
		;;
	"partition detach"*)
		words="--help --file --reload --all"
		;;
	"profile options"*)
		words="--help $(enclos profile ls 2>/dev/null | sed '1d; s/ .*//')"
		;;
	"config validate"*)
		words="--help"
		;;
	"image inspect"*)
		words="--help --json $(enclos image ls 2>/dev/null | sed '1d; s/ .*//')"
		;;
	"image resolve"*)
		words="--help --json --registry --authfile $(enclos image ls 2>/dev/null | sed '1d; s/ .*//')"
		;;
	"image export"*)
		words="--help --json $(enclos image ls 2>/dev/null | sed '1d; s/ .*//')"
		;;
	"image import"*)
		words="--help --json"
		;;
	"profile show"*)
		words="--help --json $(enclos profile ls 2>/dev/null | sed '1d; s/ .*//')"
		;;
	"partition ls"*)
		words="--help --file --json"
		;;
	"config show"*)
		words="--help --file --json"
		;;
	"image pull"*)
		words="--help --json --job --authfile"
		;;
	"profile ls"*)
		words="--help --json"
		;;
	"partition")
		words="attach detach ls"
		;;
	"image ls"*)
		words="--help --json"
		;;
	"image rm"*)
		words="--help --json $(enclos image ls 2>/dev/null | sed '1d; s/ .*//')"
		;;
	"image gc"*)
		words="--help --json --unused"
		;;
	"profile")
		words="validate show options ls"
		;;
	"render"*)
		words="--help --container-image --container-mounts --container-profile --container-workdir --container-name --container-save --container-writable --container-readonly --container-remap-root --no-container-remap-root --container-mount-home --no-container-mount-home --container-entrypoint --no-container-entrypoint --container-entrypoint-log --container-slurm --no-container-slurm --container-env --container-device --container-rdma --container-unshare --container-limit --container-cgroup --container-network --gpus --json"
		;;
	"config")
		words="show validate"
		;;
	"image")
		words="pull ls inspect rm gc export import resolve"
		;;
	"shell"*)
		words="--help $(enclos ps 2>/dev/null | sed '1d; s/ .*//')"
		;;
	"check"*)
		words="--help --json"
		;;
	"exec"*)
		words="--help $(enclos ps 2>/dev/null | sed '1d; s/ .*//')"
		;;
	"run"*)
		words="--help --container-image --container-mounts --container-profile --container-workdir --container-name --container-save --container-writable --container-readonly --container-remap-root --no-container-remap-root --container-mount-home --no-container-mount-home --container-entrypoint --no-container-entrypoint --container-entrypoint-log --container-slurm --no-container-slurm --container-env --container-device --container-rdma --container-unshare --container-limit --container-cgroup --container-network"
		;;
	"top"*)
		words="--help --json --interval -n --count"
		;;
	"ps"*)
		words="--help --json"
		;;
	"gc"*)
		words="--help --json"
		;;
	"rm"*)
		words="--help"
		;;
	"")
		words="ps run image exec shell top check gc rm render profile partition config --help --version --debug"
		;;
	esac
	_enclos_offer "$words" "$value" ""
	[[ $value == *:* ]] && COMPREPLY=("${COMPREPLY[@]#"${value%:*}:"}")
}

complete -o bashdefault -o default -F _enclos enclos
