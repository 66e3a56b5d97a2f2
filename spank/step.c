/*
 * The facts of a step, as slurmstepd knows them, and of a job, as slurmctld told the prolog.
 *
 * Uid, groups and ids come from the credential. What comes from the job's environment is marked as such: the agent
 * treats it as the user's word. Runs as root.
 */
#define _GNU_SOURCE
#include "enclos.h"

#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static uint32_t item_u32(spank_t spank, spank_item_t item, uint32_t otherwise)
{
	uint32_t value;

	return spank_get_item(spank, item, &value) == ESPANK_SUCCESS ? value : otherwise;
}

bool step_is_extern(spank_t spank)
{
	return item_u32(spank, S_JOB_STEPID, 0) == ENCLOS_EXTERN_STEP;
}

/* Local id of the calling task; -1 outside of tasks. */
int step_task(spank_t spank)
{
	int task;

	return spank_get_item(spank, S_TASK_ID, &task) == ESPANK_SUCCESS ? task : -1;
}

/* With an oci.conf beside slurm.conf, Slurm's own OCI code takes --container. */
static bool slurm_runs_oci(void)
{
	const char *conf = compat_conf() != NULL ? compat_conf()->slurm_conf : NULL;
	char path[PATH_MAX];
	const char *slash;

	if (conf == NULL)
		conf = getenv("SLURM_CONF");
	slash = conf != NULL ? strrchr(conf, '/') : NULL;
	if (slash == NULL)
		snprintf(path, sizeof(path), "/etc/slurm/oci.conf");
	else
		snprintf(path, sizeof(path), "%.*s/oci.conf", (int)(slash - conf), conf);
	return access(path, F_OK) == 0;
}

/* Does this step ask for a container, by our option or by Slurm's --container? Costs one look at the environment. */
bool step_wants_container(spank_t spank)
{
	char image[PATH_MAX];

	if (options_container_given())
		return true;
	if (spank_getenv(spank, "SLURM_CONTAINER", image, sizeof(image)) != ESPANK_SUCCESS || image[0] == '\0')
		return false;
	if (slurm_runs_oci())
		return false;
	options_use_image(image);
	return true;
}

static void add_groups(spank_t spank, struct wire_out *out)
{
	char *text;
	gid_t *groups;
	size_t used = 0, size;
	int count;

	if (spank_get_item(spank, S_JOB_SUPPLEMENTARY_GIDS, &groups, &count) != ESPANK_SUCCESS || count < 0)
		return;
	size = (size_t)count * 11 + 1;
	text = malloc(size);
	if (text == NULL) {
		out->error = ENOMEM;
		return;
	}
	text[0] = '\0';
	for (int i = 0; i < count; i++)
		used += (size_t)snprintf(text + used, size - used, "%s%u", i > 0 ? "," : "", groups[i]);
	wire_add(out, "groups", text);
	free(text);
}

/*
 * A path of slurm.conf with %n and %h replaced. The node's name is what slurmd was told it is; where that is not in
 * slurmstepd's environment, the host's name, as slurmd itself begins.
 */
static void add_slurm_path(struct wire_out *out, const char *key, const char *pattern)
{
	const char *node = getenv("SLURMD_NODENAME");
	char path[PATH_MAX];
	size_t used = 0;

	if (pattern == NULL)
		return;
	for (; *pattern != '\0' && used < sizeof(path) - 1; pattern++) {
		const char *insert = NULL;

		if (pattern[0] == '%' && pattern[1] == 'n')
			insert = node != NULL ? node : report_node();
		else if (pattern[0] == '%' && pattern[1] == 'h')
			insert = report_node();
		if (insert == NULL) {
			path[used++] = *pattern;
			continue;
		}
		used += (size_t)snprintf(path + used, sizeof(path) - used, "%s", insert);
		pattern++;
	}
	if (used >= sizeof(path))
		return;
	path[used] = '\0';
	wire_add(out, key, path);
}

static void add_variable(spank_t spank, struct wire_out *out, const char *key, const char *variable)
{
	char value[PATH_MAX];

	if (spank_getenv(spank, variable, value, sizeof(value)) == ESPANK_SUCCESS)
		wire_add(out, key, value);
}

static void add_sent_variables(spank_t spank, struct wire_out *out)
{
	const char *const *names = options_sent_variables();

	for (; *names != NULL; names++) {
		char key[128];

		snprintf(key, sizeof(key), "env.%s", *names);
		add_variable(spank, out, key, *names);
	}
}

void step_add_ids(spank_t spank, struct wire_out *out)
{
	wire_add_number(out, "job", item_u32(spank, S_JOB_ID, 0));
	wire_add_number(out, "step", item_u32(spank, S_JOB_STEPID, 0));
}

/* Everything of `prepare` and `join` that does not differ between the two. Called in slurmstepd itself, not in a task. */
void step_add_facts(spank_t spank, struct wire_out *out)
{
	uid_t uid;
	gid_t gid;

	step_add_ids(spank, out);
	if (spank_get_item(spank, S_JOB_UID, &uid) == ESPANK_SUCCESS)
		wire_add_number(out, "uid", uid);
	if (spank_get_item(spank, S_JOB_GID, &gid) == ESPANK_SUCCESS)
		wire_add_number(out, "gid", gid);
	add_groups(spank, out);
	wire_add_number(out, "tasks", item_u32(spank, S_JOB_LOCAL_TASK_COUNT, 1));
	if (compat_conf() != NULL) {
		add_slurm_path(out, "spool", compat_conf()->slurmd_spooldir);
		add_slurm_path(out, "tmpfs", compat_conf()->tmp_fs);
	}
	add_variable(spank, out, "home", "HOME");
	add_variable(spank, out, "authfile", "REGISTRY_AUTH_FILE");
	add_variable(spank, out, "runtime", "XDG_RUNTIME_DIR");
	pin_add_field(spank, out);
	add_sent_variables(spank, out);
	options_add_fields(out);
	profile_add_fields(spank, out);
}

/*
 * The facts of a job in slurm_spank_job_prolog, where the environment is slurmd's: what a user could set in it has the
 * prefix SPANK_. Returns false if this is no prolog.
 */
bool job_add_facts(struct wire_out *out)
{
	const char *job = getenv("SLURM_JOB_ID"), *uid = getenv("SLURM_JOB_UID");

	if (job == NULL)
		return false;
	wire_add(out, "job", job);
	wire_add(out, "uid", uid);
	wire_add(out, "nodelist", compat_prolog_nodes());
	wire_add(out, "account", getenv("SLURM_JOB_ACCOUNT"));
	wire_add(out, "partition", getenv("SLURM_JOB_PARTITION"));
	wire_add(out, "leader", getenv("SLURM_HET_JOB_ID"));
	/* The user's word, unlike the others. */
	wire_add(out, "image", getenv("SPANK_" IMAGE_FOR_PROLOGS));
	return true;
}
