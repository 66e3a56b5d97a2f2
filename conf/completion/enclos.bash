# bash completion of enclos(1). Made by 'python -m enclos.runtime.settings --write' from the verbs' --help: change those.

_enclos()
{
	local current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD - 1]} given="" words="" word

	for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
		[[ $word == -* ]] || given+="${given:+ }$word"
	done
	COMPREPLY=()
	case $previous in
	--authfile|--container-cgroup|--container-device|--container-env|--container-image|--container-limit|--container-mounts|--container-name|--container-network|--container-profile|--container-rdma|--container-save|--container-unshare|--container-workdir|--count|--file|--gpus|--interval|--job|--reload|--unused|-n)
		return
		;;
	esac
	case $given in
	"profile validate"*)
		words="--help $(enclos profile ls 2>/dev/null | sed '1d; s/ .*//')"
		;;
	"partition attach"*)
		words="--help --file --reload"
		;;
	"partition detach"*)
		words="--help --file --reload"
		;;
	"profile options"*)
		words="--help $(enclos profile ls 2>/dev/null | sed '1d; s/ .*//')"
		;;
	"config validate"*)
		words="--help"
		;;
	"image inspect"*)
		words="--help --json"
		;;
	"image resolve"*)
		words="--help --json --registry --authfile"
		;;
	"image export"*)
		words="--help --json"
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
		words="--help --json"
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
		words="--help"
		;;
	"check"*)
		words="--help --json"
		;;
	"exec"*)
		words="--help"
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
		words="ps image exec shell top check gc rm render profile partition config --help --version --debug"
		;;
	esac
	mapfile -t COMPREPLY < <(compgen -W "$words" -- "$current")
}

complete -o bashdefault -o default -F _enclos enclos
