/* made by 'python -m enclos.runtime.settings --write' from runtime/options.py: change that. */
#ifndef ENCLOS_OPTIONS_GEN_H
#define ENCLOS_OPTIONS_GEN_H

#include "options.h"

static const struct enclos_check enclos_checks_image[] = {
	{ "^(.+)$", "argument required", "", ENCLOS_MATCH, 0, 0 },
	{ "^()$", "longer than 4095 bytes", "", ENCLOS_MATCH, 0, 4095 },
	{ "^((\\.?\\.?/.*|\\.\\.?)|docker://.*|(oci|oci-archive|docker-archive|dir):.*|[^:]*|[^:]*:([^/].*|/[^/].*|/)?)$", "unknown kind of image", "", ENCLOS_MATCH, 0, 0 },
	{ "^((oci|oci-archive|docker-archive|dir):)$", "a path has to follow", "", ENCLOS_AVOID, 0, 0 },
	{ "^((\\.?\\.?/.*|\\.\\.?)|(oci|oci-archive|docker-archive|dir):.*|(docker://)?([^/@#: ]+@)?(([A-Za-z0-9][A-Za-z0-9.-]*|\\[[0-9A-Fa-f:.]+\\])(:[0-9]{1,5})?[/#])?[a-z0-9][a-z0-9._-]*(/[a-z0-9][a-z0-9._-]*)*(:[A-Za-z0-9_][A-Za-z0-9_.-]*)?(@sha256:[0-9a-f]{64})?)$", "neither a path (/…, ./…) nor a name in a registry (docker://REGISTRY/NAME:TAG)", "", ENCLOS_MATCH, 0, 0 },
	{ NULL, NULL, NULL, ENCLOS_MATCH, 0, 0 },
};

static const struct enclos_check enclos_checks_mounts[] = {
	{ "^(.+)$", "argument required", "", ENCLOS_MATCH, 0, 0 },
	{ "^(([^\\\\]|\\\\[,:\\\\])*)$", "invalid format: a backslash goes before a comma, a colon or a backslash", "", ENCLOS_MATCH, 0, 0 },
	{ "^(([^:\\\\]|\\\\[,:\\\\])+(:.*)?)$", "invalid format: mount without a source (expected SRC:DST[:FLAGS])", "", ENCLOS_MATCH, 1, 0 },
	{ "^(([^:\\\\]|\\\\[,:\\\\])+(:([^:\\\\]|\\\\[,:\\\\])+(:.*)?)?)$", "invalid format: mount without a target (expected SRC:DST[:FLAGS])", "", ENCLOS_MATCH, 1, 0 },
	{ "^((tmpfs|devpts|umount))$", "invalid format: mount without a target (expected SRC:DST[:FLAGS])", "", ENCLOS_AVOID, 1, 0 },
	{ "^((\\.?\\.?/([^:\\\\]|\\\\[,:\\\\])*|\\.\\.?|(tmpfs|devpts|umount))(:.*)?)$", "mount source must be a relative path (./…), an absolute path, \"tmpfs\", \"devpts\" or \"umount\"", "", ENCLOS_MATCH, 1, 0 },
	{ "^(([^:\\\\]|\\\\[,:\\\\])+:\\.\\..*)$", "mount target leads out of the container (Cross-device link)", "", ENCLOS_AVOID, 1, 0 },
	{ "^(([^:\\\\]|\\\\[,:\\\\])+(:(\\.?/([^:\\\\]|\\\\[,:\\\\])*|\\.)(:.*)?)?)$", "mount target must be an absolute path", "", ENCLOS_MATCH, 1, 0 },
	{ "^(([^:\\\\]|\\\\[,:\\\\])*(:([^:\\\\]|\\\\[,:\\\\])*){0,2})$", "invalid format: too many colons (expected SRC:DST[:FLAGS])", "", ENCLOS_MATCH, 1, 0 },
	{ "^(([^:\\\\]|\\\\[,:\\\\])+:\\.?(/(\\.|\\.\\.)?)*(/([^/:\\\\]|\\\\[,:\\\\])+(/\\.?)*/\\.\\.(/(\\.|\\.\\.)?)*)*(:.*)?|(/(\\.|\\.\\.)?)*(/([^/:\\\\]|\\\\[,:\\\\])+(/\\.?)*/\\.\\.(/(\\.|\\.\\.)?)*)*)$", "the container's root cannot be a target", "", ENCLOS_AVOID, 1, 0 },
	{ "^(tmpfs:.*|([^:\\\\]|\\\\[,:\\\\])+(:([^:\\\\]|\\\\[,:\\\\])+(:((ro|rw|noexec|exec|noatime|nodiratime|relatime|strictatime|nosymfollow|nofail|x-create=auto|x-create=dir|x-create=file|private|rprivate|slave|rslave|shared|rshared|unbindable|runbindable|bind|rbind|nosuid|nodev|suid|dev|defaults|async|silent|loud|atime|diratime|norelatime|nostrictatime|x-detach)([+](ro|rw|noexec|exec|noatime|nodiratime|relatime|strictatime|nosymfollow|nofail|x-create=auto|x-create=dir|x-create=file|private|rprivate|slave|rslave|shared|rshared|unbindable|runbindable|bind|rbind|nosuid|nodev|suid|dev|defaults|async|silent|loud|atime|diratime|norelatime|nostrictatime|x-detach))*)?)?)?)$", "unknown flag of a mount", "", ENCLOS_MATCH, 1, 0 },
	{ "^(tmpfs:([^:\\\\]|\\\\[,:\\\\])+(:(((ro|rw|noexec|exec|noatime|nodiratime|relatime|strictatime|nosymfollow|nofail|x-create=auto|x-create=dir|x-create=file|private|rprivate|slave|rslave|shared|rshared|unbindable|runbindable|bind|rbind|nosuid|nodev|suid|dev|defaults|async|silent|loud|atime|diratime|norelatime|nostrictatime|x-detach)|(size=([1-9][0-9]{0,17}[kmgtKMGT]?|([1-9][0-9]?|100)%)|mode=([0-7]{3,4})|nr_inodes=([1-9][0-9]{0,11}[kmgKMG]?)))([+]((ro|rw|noexec|exec|noatime|nodiratime|relatime|strictatime|nosymfollow|nofail|x-create=auto|x-create=dir|x-create=file|private|rprivate|slave|rslave|shared|rshared|unbindable|runbindable|bind|rbind|nosuid|nodev|suid|dev|defaults|async|silent|loud|atime|diratime|norelatime|nostrictatime|x-detach)|(size=([1-9][0-9]{0,17}[kmgtKMGT]?|([1-9][0-9]?|100)%)|mode=([0-7]{3,4})|nr_inodes=([1-9][0-9]{0,11}[kmgKMG]?))))*)?)?)$", "unknown flag of a mount, or no value for it", "tmpfs:", ENCLOS_MATCH, 1, 0 },
	{ "^(([^:\\\\]|\\\\[,:\\\\])+:([^:\\\\]|\\\\[,:\\\\])+:([^+:]+[+])*(ro[+]([^+:]+[+])*(rw)|rw[+]([^+:]+[+])*(ro))([+].*)?)$", "invalid format: ro and rw exclude each other", "", ENCLOS_AVOID, 1, 0 },
	{ "^(([^:\\\\]|\\\\[,:\\\\])+:([^:\\\\]|\\\\[,:\\\\])+:([^+:]+[+])*(private[+]([^+:]+[+])*(rprivate|slave|rslave|shared|rshared|unbindable|runbindable)|rprivate[+]([^+:]+[+])*(private|slave|rslave|shared|rshared|unbindable|runbindable)|slave[+]([^+:]+[+])*(private|rprivate|rslave|shared|rshared|unbindable|runbindable)|rslave[+]([^+:]+[+])*(private|rprivate|slave|shared|rshared|unbindable|runbindable)|shared[+]([^+:]+[+])*(private|rprivate|slave|rslave|rshared|unbindable|runbindable)|rshared[+]([^+:]+[+])*(private|rprivate|slave|rslave|shared|unbindable|runbindable)|unbindable[+]([^+:]+[+])*(private|rprivate|slave|rslave|shared|rshared|runbindable)|runbindable[+]([^+:]+[+])*(private|rprivate|slave|rslave|shared|rshared|unbindable))([+].*)?)$", "invalid format: private, rprivate, slave, rslave, shared, rshared, unbindable and runbindable exclude each other", "", ENCLOS_AVOID, 1, 0 },
	{ "^(([^:\\\\]|\\\\[,:\\\\])+:([^:\\\\]|\\\\[,:\\\\])+:([^+:]+[+])*(exec[+]([^+:]+[+])*(noexec)|noexec[+]([^+:]+[+])*(exec))([+].*)?)$", "invalid format: exec and noexec exclude each other", "", ENCLOS_AVOID, 1, 0 },
	{ "^(([^:\\\\]|\\\\[,:\\\\])+:([^:\\\\]|\\\\[,:\\\\])+:([^+:]+[+])*(noatime[+]([^+:]+[+])*(relatime|strictatime)|relatime[+]([^+:]+[+])*(noatime|strictatime)|strictatime[+]([^+:]+[+])*(noatime|relatime))([+].*)?)$", "invalid format: noatime, relatime and strictatime exclude each other", "", ENCLOS_AVOID, 1, 0 },
	{ "^(([^:\\\\]|\\\\[,:\\\\])+:([^:\\\\]|\\\\[,:\\\\])+:([^+:]+[+])*(x-create=auto[+]([^+:]+[+])*(x-create=dir|x-create=file)|x-create=dir[+]([^+:]+[+])*(x-create=auto|x-create=file)|x-create=file[+]([^+:]+[+])*(x-create=auto|x-create=dir))([+].*)?)$", "invalid format: x-create=auto, x-create=dir and x-create=file exclude each other", "", ENCLOS_AVOID, 1, 0 },
	{ "^(([^:\\\\]|\\\\[,:\\\\])+:([^:\\\\]|\\\\[,:\\\\])+:([^+:]+[+])*size=.*[+]size=.*)$", "invalid format: size given twice", "", ENCLOS_AVOID, 1, 0 },
	{ "^(([^:\\\\]|\\\\[,:\\\\])+:([^:\\\\]|\\\\[,:\\\\])+:([^+:]+[+])*mode=.*[+]mode=.*)$", "invalid format: mode given twice", "", ENCLOS_AVOID, 1, 0 },
	{ "^(([^:\\\\]|\\\\[,:\\\\])+:([^:\\\\]|\\\\[,:\\\\])+:([^+:]+[+])*nr_inodes=.*[+]nr_inodes=.*)$", "invalid format: nr_inodes given twice", "", ENCLOS_AVOID, 1, 0 },
	{ NULL, NULL, NULL, ENCLOS_MATCH, 0, 0 },
};

static const struct enclos_check enclos_checks_profile[] = {
	{ "^(.+)$", "argument required", "", ENCLOS_MATCH, 0, 0 },
	{ "^()$", "longer than 4095 bytes", "", ENCLOS_MATCH, 0, 4095 },
	{ NULL, NULL, NULL, ENCLOS_MATCH, 0, 0 },
};

static const struct enclos_check enclos_checks_workdir[] = {
	{ "^(.+)$", "argument required", "", ENCLOS_MATCH, 0, 0 },
	{ "^()$", "longer than 4095 bytes", "", ENCLOS_MATCH, 0, 4095 },
	{ NULL, NULL, NULL, ENCLOS_MATCH, 0, 0 },
};

static const struct enclos_check enclos_checks_name[] = {
	{ "^(.+)$", "argument required", "", ENCLOS_MATCH, 0, 0 },
	{ "^([^:].*)$", "empty name", "", ENCLOS_MATCH, 0, 0 },
	{ "^([^/:]+(:.*)?)$", "a name has no slash", "", ENCLOS_MATCH, 0, 0 },
	{ "^([^\001-\037\177]*)$", "a name has no control character", "", ENCLOS_MATCH, 0, 0 },
	{ "^([^:]{1,128}(:.*)?)$", "a name has at most 128 bytes", "", ENCLOS_MATCH, 0, 0 },
	{ "^([^:]*(:(auto|create|exec|no_exec)?)?)$", "flag must be \"auto\", \"create\", \"exec\" or \"no_exec\"", "", ENCLOS_MATCH, 0, 0 },
	{ NULL, NULL, NULL, ENCLOS_MATCH, 0, 0 },
};

static const struct enclos_check enclos_checks_save[] = {
	{ "^(.+)$", "argument required", "", ENCLOS_MATCH, 0, 0 },
	{ "^(.*[^/])$", "target is a directory", "", ENCLOS_MATCH, 0, 0 },
	{ "^()$", "longer than 4095 bytes", "", ENCLOS_MATCH, 0, 4095 },
	{ NULL, NULL, NULL, ENCLOS_MATCH, 0, 0 },
};

static const struct enclos_check enclos_checks_env[] = {
	{ "^(.+)$", "argument required", "", ENCLOS_MATCH, 0, 0 },
	{ "^([A-Za-z_][A-Za-z0-9_.-]*)$", "invalid format: not a list of names of variables", "", ENCLOS_MATCH, 1, 0 },
	{ NULL, NULL, NULL, ENCLOS_MATCH, 0, 0 },
};

static const struct enclos_check enclos_checks_device[] = {
	{ "^(.+)$", "argument required", "", ENCLOS_MATCH, 0, 0 },
	{ "^([A-Za-z]([A-Za-z0-9._-]*[A-Za-z0-9])?/[A-Za-z]([A-Za-z0-9._-]*[A-Za-z0-9])?=[A-Za-z0-9]([A-Za-z0-9._:-]*[A-Za-z0-9])?)$", "invalid format: expected VENDOR/CLASS=NAME, or VENDOR/CLASS=all", "", ENCLOS_MATCH, 1, 0 },
	{ NULL, NULL, NULL, ENCLOS_MATCH, 0, 0 },
};

static const struct enclos_check enclos_checks_rdma[] = {
	{ "^(.+)$", "argument required", "", ENCLOS_MATCH, 0, 0 },
	{ "^([1-9][0-9]?|[A-Za-z][A-Za-z0-9._-]*(,[A-Za-z][A-Za-z0-9._-]*)*)$", "invalid format: expected auto, none, names of RDMA devices or how many (1 to 99)", "", ENCLOS_MATCH, 0, 0 },
	{ NULL, NULL, NULL, ENCLOS_MATCH, 0, 0 },
};

static const struct enclos_check enclos_checks_unshare[] = {
	{ "^(.+)$", "argument required", "", ENCLOS_MATCH, 0, 0 },
	{ "^((net|ipc|uts|pid))$", "unknown namespace (net, ipc or uts)", "", ENCLOS_MATCH, 1, 0 },
	{ "^((net|ipc|uts))$", "pid is not possible: tasks are started by Slurm, and no process can join a pid namespace", "", ENCLOS_MATCH, 1, 0 },
	{ NULL, NULL, NULL, ENCLOS_MATCH, 0, 0 },
};

static const struct enclos_check enclos_checks_limit[] = {
	{ "^(.+)$", "argument required", "", ENCLOS_MATCH, 0, 0 },
	{ "^((memory|swap|cpu|cpuset|pids|io|hugetlb|rdma)=.+|[0-9]+(-[0-9]+)?)$", "not a limit (memory, swap, cpu, cpuset, pids, io, hugetlb or rdma, then = and a value)", "", ENCLOS_MATCH, 1, 0 },
	{ "^(memory=(([0-9]{1,18}|[0-9]{1,15}[Kk]|[0-9]{1,12}[Mm]|[0-9]{1,9}[Gg]|[0-9]{1,6}[Tt])i?B?))$", "expected a size such as 512M or 8G", "memory=", ENCLOS_MATCH, 1, 0 },
	{ "^(memory=((0*([0-9]{1,6}|[0-0][0-9]{6}|10[0-3][0-9]{4}|104[0-7][0-9]{3}|1048[0-4][0-9]{2}|10485[0-6][0-9]{1}|104857[0-5])i?B?|0*([0-9]{1,3}|[0-0][0-9]{3}|10[0-1][0-9]{1}|102[0-3])[Kk]i?B?|0+[KMGTkmgt]?i?B?)))$", "less than 1M", "memory=", ENCLOS_AVOID, 1, 0 },
	{ "^(swap=(([0-9]{1,18}|[0-9]{1,15}[Kk]|[0-9]{1,12}[Mm]|[0-9]{1,9}[Gg]|[0-9]{1,6}[Tt])i?B?))$", "expected a size such as 512M or 8G", "swap=", ENCLOS_MATCH, 1, 0 },
	{ "^(cpu=([0-9]{1,5}(\\.[0-9]{1,3})?))$", "expected a number of processors such as 2 or 0.5", "cpu=", ENCLOS_MATCH, 1, 0 },
	{ "^(cpu=(0+(\\.(0|00[0-9]?))?))$", "less than 0.01 of a processor", "cpu=", ENCLOS_AVOID, 1, 0 },
	{ "^([^0-9].*|[0-9]{1,4}(-[0-9]{1,4})?)$", "expected processors such as 0-3,8", "", ENCLOS_MATCH, 1, 0 },
	{ "^(cpuset=([0-9]{1,4}(-[0-9]{1,4})?))$", "expected processors such as 0-3,8", "cpuset=", ENCLOS_MATCH, 1, 0 },
	{ "^([a-z=]*([0-9]{1,4})-([0-9]{1,4}))$", "expected processors such as 0-3,8", "", ENCLOS_ORDER, 1, 0 },
	{ "^(pids=([0-9]{1,9}))$", "expected a whole number from 1", "pids=", ENCLOS_MATCH, 1, 0 },
	{ "^(pids=(0+))$", "expected a whole number from 1", "pids=", ENCLOS_AVOID, 1, 0 },
	{ "^(io=([0-9]{1,4}:[0-9]{1,7}(:((rbps|wbps)=([0-9]{1,18}|[0-9]{1,15}[Kk]|[0-9]{1,12}[Mm]|[0-9]{1,9}[Gg]|[0-9]{1,6}[Tt])i?B?|(riops|wiops)=[0-9]{1,9}))+))$", "expected MAJ:MIN:KEY=N, such as 8:0:rbps=100M", "io=", ENCLOS_MATCH, 1, 0 },
	{ "^(io=(.*=0+[KMGTkmgt]?i?B?(:.*)?))$", "0 would stop every access", "io=", ENCLOS_AVOID, 1, 0 },
	{ "^(io=((.*:rbps=.*:rbps=.*|.*:wbps=.*:wbps=.*|.*:riops=.*:riops=.*|.*:wiops=.*:wiops=.*)))$", "given twice", "io=", ENCLOS_AVOID, 1, 0 },
	{ "^(hugetlb=(([0-9]{1,18}|[0-9]{1,15}[Kk]|[0-9]{1,12}[Mm]|[0-9]{1,9}[Gg]|[0-9]{1,6}[Tt])i?B?:([0-9]{1,18}|[0-9]{1,15}[Kk]|[0-9]{1,12}[Mm]|[0-9]{1,9}[Gg]|[0-9]{1,6}[Tt])i?B?))$", "expected PAGESIZE:SIZE, such as 2M:1G", "hugetlb=", ENCLOS_MATCH, 1, 0 },
	{ "^(hugetlb=(0+[KMGTkmgt]?i?B?:.*))$", "expected PAGESIZE:SIZE, such as 2M:1G", "hugetlb=", ENCLOS_AVOID, 1, 0 },
	{ "^(rdma=([A-Za-z0-9_][A-Za-z0-9_.-]{0,62}(:(hca_handle|hca_object)=[0-9]{1,9})+))$", "expected DEVICE:KEY=N, such as mlx5_0:hca_handle=4", "rdma=", ENCLOS_MATCH, 1, 0 },
	{ "^(rdma=((.*:hca_handle=.*:hca_handle=.*|.*:hca_object=.*:hca_object=.*)))$", "given twice", "rdma=", ENCLOS_AVOID, 1, 0 },
	{ "^(((memory|swap|cpu|cpuset|pids|io|hugetlb|rdma)=[^,]+|cpuset=[^,=]+(,[^,=]+)+)(,((memory|swap|cpu|cpuset|pids|io|hugetlb|rdma)=[^,]+|cpuset=[^,=]+(,[^,=]+)+))*)$", "only cpuset has a list of numbers", "", ENCLOS_MATCH, 0, 0 },
	{ "^((memory|swap|cpu|cpuset|pids)=.*)$", "given twice", "", ENCLOS_ONCE, 1, 0 },
	{ "^((io=[^:]+:[^:]+:[a-z]+|rdma=[^:]+:[a-z_]+)=.*)$", "given twice", "", ENCLOS_ONCE, 1, 0 },
	{ "^((hugetlb=[^:]+):.*)$", "given twice", "", ENCLOS_ONCE, 1, 0 },
	{ NULL, NULL, NULL, ENCLOS_MATCH, 0, 0 },
};

static const struct enclos_check enclos_checks_cgroup[] = {
	{ "^(.+)$", "argument required", "", ENCLOS_MATCH, 0, 0 },
	{ "^((readonly|delegate))$", "expected readonly or delegate", "", ENCLOS_MATCH, 0, 0 },
	{ NULL, NULL, NULL, ENCLOS_MATCH, 0, 0 },
};

static const struct enclos_check enclos_checks_network[] = {
	{ "^(.+)$", "argument required", "", ENCLOS_MATCH, 0, 0 },
	{ "^((job|host|none))$", "no such network (job, host or none)", "", ENCLOS_MATCH, 0, 0 },
	{ NULL, NULL, NULL, ENCLOS_MATCH, 0, 0 },
};

#define ENCLOS_OPTION_COUNT 24

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
		"[enclos] RDMA devices of the container, of those that the site lists",
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
		"container-cgroup", "readonly|delegate",
		"[enclos] what a task may do with cgroups: see its step's, or make some below its own",
		1, "ENCLOS_CONTAINER_CGROUP", NULL, "cgroup", NULL,
		enclos_checks_cgroup,
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
	"SLURM_OOM_KILL_STEP",
	NULL,
};

#endif
