/* made by 'python -m enclos.runtime.settings --write' from runtime/settings.py: change that. */
#ifndef ENCLOS_OPTIONS_GEN_H
#define ENCLOS_OPTIONS_GEN_H

#include <stddef.h>

struct enclos_option_row {
	const char *name;      /* without the leading -- */
	const char *arginfo;   /* NULL when it takes no value */
	const char *usage;     /* for --help */
	int has_arg;
	const char *env;       /* read when no option with this key was given; NULL on a no- form */
	const char *pyxis_env; /* the same under pyxis' name */
	const char *key;       /* NAME of option.NAME on the wire */
	const char *fixed;     /* the value when has_arg is 0 */
};

#define ENCLOS_OPTION_COUNT 11

static const struct enclos_option_row enclos_option_rows[] = {
	{
		"container-image", "PATH",
		"[enclos] run the step in a container made from this image: a squashfs file or a directory on the node",
		1, "ENCLOS_CONTAINER_IMAGE", "PYXIS_CONTAINER_IMAGE", "image", NULL,
	},
	{
		"container-mounts", "SRC[:DST[:FLAGS]][,...]",
		"[enclos] show files or directories of the node inside the container; flags are joined by \"+\", e.g. \"ro+noexec\"",
		1, "ENCLOS_CONTAINER_MOUNTS", "PYXIS_CONTAINER_MOUNTS", "mounts", NULL,
	},
	{
		"container-workdir", "PATH",
		"[enclos] working directory inside the container",
		1, "ENCLOS_CONTAINER_WORKDIR", "PYXIS_CONTAINER_WORKDIR", "workdir", NULL,
	},
	{
		"container-writable", NULL,
		"[enclos] let the step write to the container's root file system; what it writes is gone at its end",
		0, "ENCLOS_CONTAINER_WRITABLE", "PYXIS_CONTAINER_WRITABLE", "writable", "1",
	},
	{
		"container-readonly", NULL,
		"[enclos] make the container's root file system read-only",
		0, "ENCLOS_CONTAINER_READONLY", "PYXIS_CONTAINER_READONLY", "readonly", "1",
	},
	{
		"container-remap-root", NULL,
		"[enclos] be root inside the container; this gives no rights outside",
		0, "ENCLOS_CONTAINER_REMAP_ROOT", "PYXIS_CONTAINER_REMAP_ROOT", "remap-root", "1",
	},
	{
		"no-container-remap-root", NULL,
		"[enclos] keep your user id inside the container",
		0, NULL, NULL, "remap-root", "0",
	},
	{
		"container-mount-home", NULL,
		"[enclos] mount your home directory inside the container",
		0, "ENCLOS_CONTAINER_MOUNT_HOME", "PYXIS_CONTAINER_MOUNT_HOME", "mount-home", "1",
	},
	{
		"no-container-mount-home", NULL,
		"[enclos] do not mount your home directory inside the container",
		0, NULL, NULL, "mount-home", "0",
	},
	{
		"container-env", "NAME[,NAME...]",
		"[enclos] variables that keep the job's value even if the image sets them",
		1, "ENCLOS_CONTAINER_ENV", "PYXIS_CONTAINER_ENV", "env", NULL,
	},
	{
		"container-network", "job|host|none",
		"[enclos] network of the container: private to this job, the node's, or none",
		1, "ENCLOS_CONTAINER_NETWORK", NULL, "network", NULL,
	},
};

/* Variables that name an interface; ends with NULL. */
static const char *const enclos_interface_variables[] = {
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
	NULL,
};

#endif
