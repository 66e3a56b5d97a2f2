/* made by 'python -m enclos.runtime.settings --write' from runtime/settings.py: change that. */
#ifndef ENCLOS_OPTIONS_GEN_H
#define ENCLOS_OPTIONS_GEN_H

#include <stddef.h>

struct enclos_check {
	const char *pattern; /* extended regular expression that the whole value matches */
	const char *words;   /* what is wrong if it does not */
	int each;            /* the parts between commas have to match, not the value */
};

static const struct enclos_check enclos_checks_image[] = {
	{ "^(.+)$", "argument required", 0 },
	{ NULL, NULL, 0 },
};

static const struct enclos_check enclos_checks_mounts[] = {
	{ "^(.+)$", "argument required", 0 },
	{ "^([^:]+(:.*)?)$", "invalid format: mount without a source (expected SRC:DST[:FLAGS])", 1 },
	{ "^([^:]+(:[^:]+(:.*)?)?)$", "invalid format: mount without a target (expected SRC:DST[:FLAGS])", 1 },
	{ "^((\\.?\\.?/[^:]*|\\.\\.?|tmpfs|devpts|umount)(:.*)?)$", "mount source must be a relative path (./…), an absolute path, \"tmpfs\", \"devpts\" or \"umount\"", 1 },
	{ "^([^:]+(:([^.:][^:]*|\\.([^.:][^:]*)?)(:.*)?)?)$", "mount target leads out of the container (Cross-device link)", 1 },
	{ "^([^:]+(:(\\.?/[^:]*|\\.)(:.*)?)?)$", "mount target must be an absolute path", 1 },
	{ "^([^:]*(:[^:]*){0,2})$", "invalid format: too many colons (expected SRC:DST[:FLAGS])", 1 },
	{ "^([^:]+(:[^:]+(:((ro|rw|noexec|exec|noatime|nodiratime|relatime|strictatime|nosymfollow|nofail|x-create=auto|x-create=dir|x-create=file|private|rprivate|slave|rslave|shared|rshared|unbindable|runbindable|bind|rbind|nosuid|nodev|suid|dev|defaults|async|silent|loud|atime|diratime|norelatime|nostrictatime|x-detach|size=[^:+]+|mode=[^:+]+|nr_inodes=[^:+]+)(\\+|$))*)?)?)$", "unknown flag of a mount", 1 },
	{ NULL, NULL, 0 },
};

static const struct enclos_check enclos_checks_profile[] = {
	{ "^(.+)$", "argument required", 0 },
	{ NULL, NULL, 0 },
};

static const struct enclos_check enclos_checks_workdir[] = {
	{ "^(.+)$", "argument required", 0 },
	{ NULL, NULL, 0 },
};

static const struct enclos_check enclos_checks_name[] = {
	{ "^(.+)$", "argument required", 0 },
	{ "^([^:].*)$", "empty name", 0 },
	{ "^([^/:]+(:.*)?)$", "a name has no slash", 0 },
	{ "^([^:]*(:(auto|create|exec|no_exec)?)?)$", "flag must be \"auto\", \"create\", \"exec\" or \"no_exec\"", 0 },
	{ NULL, NULL, 0 },
};

static const struct enclos_check enclos_checks_save[] = {
	{ "^(.+)$", "argument required", 0 },
	{ "^(.*[^/])$", "target is a directory", 0 },
	{ NULL, NULL, 0 },
};

static const struct enclos_check enclos_checks_env[] = {
	{ "^(.+)$", "argument required", 0 },
	{ "^([A-Za-z_][A-Za-z0-9_.-]*)$", "invalid format: not a list of names of variables", 1 },
	{ NULL, NULL, 0 },
};

static const struct enclos_check enclos_checks_device[] = {
	{ "^(.+)$", "argument required", 0 },
	{ "^([A-Za-z][A-Za-z0-9._-]*/[A-Za-z][A-Za-z0-9._-]*=[A-Za-z0-9][A-Za-z0-9._:-]*)$", "invalid format: expected VENDOR/CLASS=NAME, or VENDOR/CLASS=all", 1 },
	{ NULL, NULL, 0 },
};

static const struct enclos_check enclos_checks_rdma[] = {
	{ "^(.+)$", "argument required", 0 },
	{ "^([1-9][0-9]?|[A-Za-z][A-Za-z0-9._-]*(,[A-Za-z][A-Za-z0-9._-]*)*)$", "invalid format: expected auto, none, names of RDMA devices or how many (1 to 99)", 0 },
	{ NULL, NULL, 0 },
};

static const struct enclos_check enclos_checks_unshare[] = {
	{ "^(.+)$", "argument required", 0 },
	{ "^((net|ipc|uts|pid))$", "unknown namespace (net, ipc or uts)", 1 },
	{ "^((net|ipc|uts))$", "pid is not possible: tasks are started by Slurm, and no process can join a pid namespace", 1 },
	{ NULL, NULL, 0 },
};

static const struct enclos_check enclos_checks_limit[] = {
	{ "^(.+)$", "argument required", 0 },
	{ "^((memory|swap|cpu|cpuset|pids|io|hugetlb|rdma)=[^,]+|[0-9]+(-[0-9]+)?)$", "not a limit (memory, swap, cpu, cpuset, pids, io, hugetlb or rdma, then = and a value)", 1 },
	{ NULL, NULL, 0 },
};

static const struct enclos_check enclos_checks_network[] = {
	{ "^(.+)$", "argument required", 0 },
	{ "^((job|host|none))$", "no such network (job, host or none)", 0 },
	{ NULL, NULL, 0 },
};

struct enclos_option_row {
	const char *name;      /* without the leading -- */
	const char *arginfo;   /* NULL when it takes no value */
	const char *usage;     /* for --help */
	int has_arg;
	const char *env;       /* read when no option with this key was given; NULL on a no- form */
	const char *pyxis_env; /* the same under pyxis' name */
	const char *key;       /* NAME of option.NAME on the wire */
	const char *fixed;     /* the value when has_arg is 0 */
	const struct enclos_check *checks; /* ends with a pattern of NULL */
};

#define ENCLOS_OPTION_COUNT 23

static const struct enclos_option_row enclos_option_rows[] = {
	{
		"container-image", "IMAGE",
		"[enclos] run the step in a container made from this image: docker://REGISTRY/NAME:TAG, or a path on the node",
		1, "ENCLOS_CONTAINER_IMAGE", "PYXIS_CONTAINER_IMAGE", "image", NULL,
		enclos_checks_image,
	},
	{
		"container-mounts", "SRC[:DST[:FLAGS]][,...]",
		"[enclos] show files or directories of the node inside the container; flags are joined by \"+\", e.g. \"ro+noexec\"",
		1, "ENCLOS_CONTAINER_MOUNTS", "PYXIS_CONTAINER_MOUNTS", "mounts", NULL,
		enclos_checks_mounts,
	},
	{
		"container-profile", "NAME|FILE",
		"[enclos] take options from this TOML or YAML file, where the command line does not say otherwise",
		1, "ENCLOS_CONTAINER_PROFILE", NULL, "profile", NULL,
		enclos_checks_profile,
	},
	{
		"container-workdir", "PATH",
		"[enclos] working directory inside the container",
		1, "ENCLOS_CONTAINER_WORKDIR", "PYXIS_CONTAINER_WORKDIR", "workdir", NULL,
		enclos_checks_workdir,
	},
	{
		"container-name", "NAME[:auto|create|exec|no_exec]",
		"[enclos] keep the container under this name for later steps of the job on the node; with one of that name, use it",
		1, "ENCLOS_CONTAINER_NAME", "PYXIS_CONTAINER_NAME", "name", NULL,
		enclos_checks_name,
	},
	{
		"container-save", "PATH",
		"[enclos] at the step's end, save the container with all that was written into it as a squashfs file",
		1, "ENCLOS_CONTAINER_SAVE", "PYXIS_CONTAINER_SAVE", "save", NULL,
		enclos_checks_save,
	},
	{
		"container-writable", NULL,
		"[enclos] let the step write to the container's root file system; what it writes is gone at its end",
		0, "ENCLOS_CONTAINER_WRITABLE", "PYXIS_CONTAINER_WRITABLE", "writable", "1",
		NULL,
	},
	{
		"container-readonly", NULL,
		"[enclos] make the container's root file system read-only",
		0, "ENCLOS_CONTAINER_READONLY", "PYXIS_CONTAINER_READONLY", "readonly", "1",
		NULL,
	},
	{
		"container-remap-root", NULL,
		"[enclos] be root inside the container; this gives no rights outside",
		0, "ENCLOS_CONTAINER_REMAP_ROOT", "PYXIS_CONTAINER_REMAP_ROOT", "remap-root", "1",
		NULL,
	},
	{
		"no-container-remap-root", NULL,
		"[enclos] keep your user id inside the container",
		0, NULL, NULL, "remap-root", "0",
		NULL,
	},
	{
		"container-mount-home", NULL,
		"[enclos] mount your home directory inside the container",
		0, "ENCLOS_CONTAINER_MOUNT_HOME", "PYXIS_CONTAINER_MOUNT_HOME", "mount-home", "1",
		NULL,
	},
	{
		"no-container-mount-home", NULL,
		"[enclos] do not mount your home directory inside the container",
		0, NULL, NULL, "mount-home", "0",
		NULL,
	},
	{
		"container-entrypoint", NULL,
		"[enclos] run the image's entrypoint, once per node and before the tasks, which get the environment it makes",
		0, "ENCLOS_CONTAINER_ENTRYPOINT", "PYXIS_CONTAINER_ENTRYPOINT", "entrypoint", "1",
		NULL,
	},
	{
		"no-container-entrypoint", NULL,
		"[enclos] do not run the image's entrypoint",
		0, NULL, NULL, "entrypoint", "0",
		NULL,
	},
	{
		"container-entrypoint-log", NULL,
		"[enclos] show on standard error what the entrypoint prints",
		0, "ENCLOS_CONTAINER_ENTRYPOINT_LOG", "PYXIS_CONTAINER_ENTRYPOINT_LOG", "entrypoint-log", "1",
		NULL,
	},
	{
		"container-slurm", NULL,
		"[enclos] bring srun and Slurm's other commands into the container of a batch or interactive step",
		0, "ENCLOS_CONTAINER_SLURM", NULL, "slurm", "1",
		NULL,
	},
	{
		"no-container-slurm", NULL,
		"[enclos] do not bring Slurm's commands into the container",
		0, NULL, NULL, "slurm", "0",
		NULL,
	},
	{
		"container-env", "NAME[,NAME...]",
		"[enclos] variables that keep the job's value even if the image sets them",
		1, "ENCLOS_CONTAINER_ENV", "PYXIS_CONTAINER_ENV", "env", NULL,
		enclos_checks_env,
	},
	{
		"container-device", "VENDOR/CLASS=NAME|all[,...]",
		"[enclos] devices of the node's CDI files besides the GPUs that Slurm granted, where the site allows it",
		1, "ENCLOS_CONTAINER_DEVICE", NULL, "device", NULL,
		enclos_checks_device,
	},
	{
		"container-rdma", "auto|none|NAME[,NAME]|N",
		"[enclos] RDMA devices whose nodes the container has, of those that the site lists, on the node's network",
		1, "ENCLOS_CONTAINER_RDMA", NULL, "rdma", NULL,
		enclos_checks_rdma,
	},
	{
		"container-unshare", "net|ipc|uts[,...]",
		"[enclos] namespaces of the container's own: net leaves it only the loopback interface, ipc and uts every container has",
		1, "ENCLOS_CONTAINER_UNSHARE", "PYXIS_CONTAINER_UNSHARE", "unshare", NULL,
		enclos_checks_unshare,
	},
	{
		"container-limit", "NAME=VALUE[,...]",
		"[enclos] tighten what the job was granted: memory, swap, cpu, cpuset, pids, io, hugetlb, rdma",
		1, "ENCLOS_CONTAINER_LIMIT", NULL, "limit", NULL,
		enclos_checks_limit,
	},
	{
		"container-network", "job|host|none",
		"[enclos] network of the container: private to this job, the node's, or none",
		1, "ENCLOS_CONTAINER_NETWORK", NULL, "network", NULL,
		enclos_checks_network,
	},
};

/* Variables of the job that the agent has to know; ends with NULL. */
static const char *const enclos_sent_variables[] = {
	"NCCL_SOCKET_IFNAME",
	"GLOO_SOCKET_IFNAME",
	"TP_SOCKET_IFNAME",
	"UCX_NET_DEVICES",
	"OMPI_MCA_btl_tcp_if_include",
	"OMPI_MCA_oob_tcp_if_include",
	"PRTE_MCA_prte_if_include",
	"MPIR_CVAR_CH3_NETWORK_IFNAME",
	"FI_TCP_IFACE",
	"FI_SOCKETS_IFACE",
	"FI_UDP_IFACE",
	"FI_VERBS_IFACE",
	"NVIDIA_VISIBLE_DEVICES",
	"AMD_VISIBLE_DEVICES",
	NULL,
};

#endif
