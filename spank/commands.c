/*
 * What srun, sbatch and salloc make of the options when they know them all: variables, flags with two spellings, profile,
 * and what can be refused before anything is allocated. Runs as the user; the node trusts none of it.
 */
#define _GNU_SOURCE
#include "enclos.h"
#include "options.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

/* ---- environment twins, in srun ---- */

static bool from_environment(int index)
{
	char name[256];

	options_slurm_name(index, name, sizeof(name));
	return getenv(name) != NULL;
}

static bool inherited(int index)
{
	for (int i = 0; options_row(i) != NULL; i++) {
		if (options_same_group(i, index) && from_environment(i))
			return true;
	}
	return false;
}

/* sbatch hands both forms of a flag on when both were given; only the one that counted there is inherited. */
static void forget_lost_flags(void)
{
	const char *flags = getenv(FLAGS_VARIABLE);
	char name[256];

	for (int i = 0; flags != NULL && options_row(i) != NULL; i++) {
		for (int j = 0; options_row(j) != NULL; j++) {
			if (!from_environment(j) || !options_lost(flags, i, j))
				continue;
			options_slurm_name(i, name, sizeof(name));
			unsetenv(name);
		}
	}
}

static int opposite_of(int index)
{
	for (int i = 0; options_row(i) != NULL; i++) {
		if (i != index && strcmp(options_row(i)->key, options_row(index)->key) == 0)
			return i;
	}
	return -1;
}

/* Which row a flag's variable means: itself, its no- form, or none (-1). Returns false if the value is no yes or no. */
static bool flag_row(int index, const char *value, int *row)
{
	static const char *const yes[] = { "1", "true", "yes", "on", "y" };
	static const char *const no[] = { "0", "false", "no", "off", "n", "" };

	for (size_t i = 0; i < sizeof(yes) / sizeof(yes[0]); i++) {
		if (strcasecmp(value, yes[i]) == 0) {
			*row = index;
			return true;
		}
	}
	for (size_t i = 0; i < sizeof(no) / sizeof(no[0]); i++) {
		if (strcasecmp(value, no[i]) == 0) {
			*row = value[0] == '\0' ? -1 : opposite_of(index);
			return true;
		}
	}
	return false;
}

static void take_variable(int index, const char *variable, const char *value)
{
	const struct enclos_option_row *row = options_row(index);
	const char *wrong = NULL;
	char name[256];

	if (row->has_arg)
		wrong = checks_refusal(row->checks, value);
	else if (!flag_row(index, value, &index))
		wrong = "neither yes nor no";
	if (wrong != NULL) {
		slurm_error("enclos: %s=%s: %s", variable, options_shown(value), wrong);
		exit(1);
	}
	if (index < 0)
		return;
	options_slurm_name(index, name, sizeof(name));
	setenv(name, row->has_arg ? value : "", 1);
}

/*
 * Hands ENCLOS_CONTAINER_* and PYXIS_CONTAINER_* to Slurm under the name it reads options from, before it reads them:
 * then precedence, forwarding and --export=NONE are Slurm's own. In srun only: sbatch with such a variable would
 * otherwise put the batch script itself, and all its sruns, into the container.
 */
void commands_read_variables(void)
{
	forget_lost_flags();
	for (int i = 0; options_row(i) != NULL; i++) {
		const struct enclos_option_row *row = options_row(i);
		const char *variable = row->env;
		const char *value = variable != NULL ? getenv(variable) : NULL;

		if (value == NULL && row->pyxis_env != NULL) {
			variable = row->pyxis_env;
			value = getenv(variable);
		}
		if (value != NULL && !inherited(i))
			take_variable(i, variable, value);
	}
}

/* ---- after all options are known, in the commands ---- */

/* Of each group with several rows given, the one that Slurm named last: an inherited one comes before the command line. */
static int winner(int index)
{
	int best = index;

	for (int i = 0; options_row(i) != NULL; i++) {
		if (options_same_group(i, index) && options_value(i) != NULL && options_order(i) > options_order(best))
			best = i;
	}
	return best;
}

static int refuse_both(int one, int other)
{
	slurm_error("enclos: both --%s and --%s were specified", options_row(one)->name, options_row(other)->name);
	return -1;
}

/* Tells slurmstepd which form counts where an inherited and an own one meet; both on one command line are an error. */
static int settle_flags(void)
{
	char flags[512] = "";
	size_t used = 0;

	for (int i = 0; options_row(i) != NULL; i++) {
		int best = winner(i);

		if (options_value(i) == NULL || options_row(i)->has_arg)
			continue;
		/* sbatch reads the script's lines, then its command line, which counts more. */
		if (best != i && !from_environment(i) && spank_context() == S_CTX_LOCAL)
			return refuse_both(i, best);
		if (best == i && used < sizeof(flags))
			used += (size_t)snprintf(flags + used, sizeof(flags) - used, "%s ", options_row(i)->name);
	}
	if (used > 0)
		part_setenv(FLAGS_VARIABLE, flags);
	return 0;
}

/* A step of srun that names container options, but no image in any of the ways there are, was meant otherwise. */
static int check_image_given(void)
{
	int image = options_find_key("image");
	char *given = profile_value(options_row(image)->name);

	if (given != NULL) {
		free(given);
		return 0;
	}
	if (spank_context() != S_CTX_LOCAL || options_container_given() || getenv("SLURM_CONTAINER") != NULL)
		return 0;
	for (int i = 0; options_row(i) != NULL; i++) {
		if (options_value(i) == NULL || from_environment(i))
			continue;
		slurm_error("enclos: --%s%s%s: needs --%s", options_row(i)->name, options_row(i)->has_arg ? "=" : "",
			    options_row(i)->has_arg ? options_shown(options_value(i)) : "", options_row(image)->name);
		return -1;
	}
	return 0;
}

static bool on_command_line(int index)
{
	return options_times(index) > (from_environment(index) ? 1U : 0U);
}

/* A profile that was inherited has been read already, and what it says is in the environment. */
static int expand_profile(void)
{
	int index = options_find_key("profile");
	char own[2048] = "";
	size_t used = 0;

	if (options_value(index) != NULL && !(from_environment(index) && !on_command_line(index) && profile_inherited()) &&
	    !profile_expand(options_value(index)))
		return -1;
	for (int i = 0; options_row(i) != NULL && used < sizeof(own); i++) {
		if (on_command_line(i))
			used += (size_t)snprintf(own + used, sizeof(own) - used, "%s ", options_row(i)->name);
	}
	profile_note_own(own);
	return 0;
}

/* What the step gets of an option: its own, else the profile's, else what was inherited. For the caller to free. */
static char *settled(const char *key)
{
	int index = options_find_key(key);
	char *given = on_command_line(index) ? NULL : profile_value(options_row(index)->name);

	return given != NULL || options_value(index) == NULL ? given : strdup(options_value(index));
}

/* --container-unshare=net means a network: none. */
static int check_networks(void)
{
	char *unshare = settled("unshare"), *network = settled("network"), *rest = unshare, *name;
	bool against = false;

	while (network != NULL && strcmp(network, "none") != 0 && rest != NULL && (name = strsep(&rest, ",")) != NULL)
		against |= strcmp(name, "net") == 0;
	if (against)
		slurm_error("enclos: --container-unshare=net: cannot be combined with --container-network=%s", network);
	free(unshare);
	free(network);
	return against ? -1 : 0;
}

/* Of srun alone: a batch script's steps begin later, and each asks for itself. */
static int settle_image(void)
{
	char *image = settled("image");
	bool refused = spank_context() == S_CTX_LOCAL && image != NULL && !pin_image(image);

	free(image);
	return refused ? -1 : 0;
}

/* So that nodes fetch the image while the job's prolog runs. Failing here only makes its first step wait longer. */
static void tell_prologs(spank_t spank)
{
	const char *image = options_value(options_find_key("image"));

	if (image != NULL && spank_job_control_setenv(spank, IMAGE_FOR_PROLOGS, image, 1) != ESPANK_SUCCESS)
		slurm_verbose("enclos: the image cannot be named to prologs, ignoring");
}

/* Of a part of a heterogeneous step: what was given for it, as LENGTH:NAME=VALUE one behind the other. */
static int keep_part(void)
{
	char *text = NULL;
	size_t size = 0;
	FILE *file = open_memstream(&text, &size);

	for (int i = 0; file != NULL && options_row(i) != NULL; i++) {
		const char *name = options_row(i)->name, *value = options_value(i);

		if (value != NULL)
			fprintf(file, "%zu:%s=%s", strlen(name) + 1 + strlen(value), name, value);
	}
	if (file == NULL || fclose(file) != 0 || size >= PART_LIMIT) {
		slurm_error("enclos: the container options of part %d are too long", parts_current());
		free(text);
		return -1;
	}
	/* Also where there is none: a part that nothing is known of does not run (options_of_part). */
	part_setenv(PART_OPTIONS_VARIABLE, text);
	free(text);
	return 0;
}

static bool wants_container(void)
{
	char *image = settled("image"), *name = settled("name");
	bool wants = image != NULL || name != NULL || getenv("SLURM_CONTAINER") != NULL;

	free(image);
	free(name);
	return wants;
}

/* Where some parts of a step ask for a container, those that do not are named: with other plugins they would be in one. */
static void tell_outside(bool last)
{
	static char outside[512];
	static bool inside;
	size_t used = strlen(outside);

	if (wants_container())
		inside = true;
	else
		snprintf(outside + used, sizeof(outside) - used, "%s%d", used > 0 ? ", " : "", parts_current());
	if (last && inside && outside[0] != '\0')
		slurm_spank_log("enclos: part %s of this step asks for no container and runs outside", outside);
}

/* Called in the commands when the options are known, in a heterogeneous srun once per part. */
int commands_check(spank_t spank)
{
	if (parts_lost()) {
		slurm_error("enclos: which container options are which part's cannot be told; write --het-group=N before them");
		return -1;
	}
	if (settle_flags() != 0 || expand_profile() != 0 || check_image_given() != 0 || check_networks() != 0 ||
	    settle_image() != 0)
		return -1;
	tell_prologs(spank);
	if (parts_current() >= 0) {
		if (keep_part() != 0)
			return -1;
		tell_outside(parts_last());
		parts_next();
	}
	options_forget();
	return 0;
}
