# bash completion of enclos(1). Made by 'python -m enclos.runtime.settings --write' from the verbs' --help: change those.

_enclos()
{
	local current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD - 1]} given="" words="" word

	for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
		[[ $word == -* ]] || given+="${given:+ }$word"
	done
	COMPREPLY=()
	case $previous in
	--container-device|--container-env|--container-image|--container-mounts|--container-network|--container-profile|--container-unshare|--container-workdir|--file|--gpus)
		return
		;;
	esac
	case $given in
	"profile validate"*)
		words="--help $(enclos profile ls 2>/dev/null | sed '1d; s/ .*//')"
		;;
	"profile options"*)
		words="--help $(enclos profile ls 2>/dev/null | sed '1d; s/ .*//')"
		;;
	"config validate"*)
		words="--help"
		;;
	"profile show"*)
		words="--help --json $(enclos profile ls 2>/dev/null | sed '1d; s/ .*//')"
		;;
	"config show"*)
		words="--help --file --json"
		;;
	"profile ls"*)
		words="--help --json"
		;;
	"profile")
		words="validate show options ls"
		;;
	"render"*)
		words="--help --container-image --container-mounts --container-profile --container-workdir --container-writable --container-readonly --container-remap-root --no-container-remap-root --container-mount-home --no-container-mount-home --container-entrypoint --no-container-entrypoint --container-entrypoint-log --container-slurm --no-container-slurm --container-env --container-device --container-unshare --container-network --gpus --json"
		;;
	"config")
		words="show validate"
		;;
	"check"*)
		words="--help --json"
		;;
	"ps"*)
		words="--help --json"
		;;
	"gc"*)
		words="--help --json"
		;;
	"")
		words="ps check gc render profile config --help --version --debug"
		;;
	esac
	mapfile -t COMPREPLY < <(compgen -W "$words" -- "$current")
}

complete -o bashdefault -o default -F _enclos enclos
