/*
 * The options: registered with Slurm, checked in srun, sbatch and salloc, collected in slurmstepd.
 *
 * The checks are small and only there to answer early; the agent checks everything again, because nothing that comes
 * from the submit side is trusted. Runs as the user in the commands, as root in slurmstepd.
 */
#define _GNU_SOURCE
#include "enclos.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "options.gen.h"

/* Slurm reads this as an option's input from the environment; `sbatch --option` arrives in nested steps under it too. */
#define SLURM_PREFIX "SLURM_SPANK__SLURM_SPANK_OPTION_enclos_"
/* For flags with two spellings: which one won. Names with SLURM_ pass --export=NONE. */
#define FLAGS_VARIABLE "SLURM_ENCLOS_FLAGS"

static const char *chosen[ENCLOS_OPTION_COUNT]; /* value of each row, owned; NULL: not given */
static unsigned int chosen_at[ENCLOS_OPTION_COUNT];
static unsigned int chosen_count;
static bool overridden[ENCLOS_OPTION_COUNT];
static unsigned int times[ENCLOS_OPTION_COUNT]; /* that Slurm named it: from the environment, on the command line */

const char *const *options_sent_variables(void)
{
	return enclos_sent_variables;
}

static const struct enclos_option_row *row_at(int index)
{
	return &enclos_option_rows[index];
}

/* Options that exclude each other: the two forms of a flag, and readonly against writable. */
static const char *group_of(const struct enclos_option_row *row)
{
	return strcmp(row->key, "readonly") == 0 ? "writable" : row->key;
}

static bool same_group(int one, int other)
{
	return strcmp(group_of(row_at(one)), group_of(row_at(other))) == 0;
}

static int find_key(const char *key)
{
	for (int i = 0; i < ENCLOS_OPTION_COUNT; i++) {
		if (strcmp(row_at(i)->key, key) == 0)
			return i;
	}
	return -1;
}

/* ---- Slurm's callback ---- */

static void choose(int index, const char *value)
{
	char *copy = strdup(value);

	if (copy == NULL)
		return;
	free((char *)chosen[index]);
	chosen[index] = copy;
	chosen_at[index] = ++chosen_count;
}

static void slurm_name(int index, char *name, size_t size)
{
	size_t start = (size_t)snprintf(name, size, SLURM_PREFIX "%s", row_at(index)->name);

	for (size_t i = sizeof(SLURM_PREFIX) - 1; i < start && i < size; i++) {
		if (name[i] == '-')
			name[i] = '_';
	}
}

/* srun forwards only the last value of an option, so a second one on its command line would be lost in silence. */
static bool given_twice(int index, const char *value)
{
	char name[256];
	const char *inherited;

	if (spank_context() != S_CTX_LOCAL || chosen[index] == NULL || strcmp(chosen[index], value) == 0)
		return false;
	slurm_name(index, name, sizeof(name));
	inherited = getenv(name);
	return inherited == NULL || strcmp(inherited, chosen[index]) != 0;
}

/* A value as an error shows it: printable, and so short that the reason behind it is not cut off. */
static const char *shown(const char *value)
{
	static char text[256];
	size_t length = 0;

	while (value[length] != '\0' && length < sizeof(text) - sizeof("…")) {
		unsigned char character = (unsigned char)value[length];

		text[length++] = character < ' ' || character == 127 ? '?' : (char)character;
	}
	snprintf(text + length, sizeof(text) - length, "%s", value[length] != '\0' ? "…" : "");
	return text;
}

static int choose_local(int index, const char *value)
{
	const struct enclos_option_row *row = row_at(index);
	const char *wrong = checks_refusal(row->checks, value);

	if (wrong != NULL) {
		slurm_error("enclos: --%s=%s: %s", row->name, shown(value), wrong);
		return -1;
	}
	if (row->has_arg && given_twice(index, value)) {
		slurm_error("enclos: --%s: specified multiple times%s", row->name,
			    strcmp(row->key, "mounts") == 0 ? "; separate several mounts by commas" : "");
		return -1;
	}
	choose(index, value);
	times[index]++;
	return 0;
}

/*
 * Called once per option: in the commands in the order environment, command line, so the last one counts; in
 * slurmstepd with what srun forwarded, then with what the job's environment holds, so there the first one counts.
 */
static int on_option(int index, const char *argument, int remote)
{
	const struct enclos_option_row *row;
	const char *value;

	if (index < 0 || index >= ENCLOS_OPTION_COUNT)
		return 0;
	row = row_at(index);
	value = row->has_arg ? (argument != NULL ? argument : "") : row->fixed;
	if (!remote)
		return choose_local(index, value);
	if (chosen[index] == NULL)
		choose(index, value);
	return 0;
}

/* In the commands and in slurmstepd; Slurm wants the same options in both. */
void options_register(spank_t spank)
{
	for (int i = 0; i < ENCLOS_OPTION_COUNT; i++) {
		const struct enclos_option_row *row = row_at(i);
		struct spank_option option = { .name = (char *)row->name,
					       .arginfo = (char *)row->arginfo,
					       .usage = (char *)row->usage,
					       .has_arg = row->has_arg,
					       .val = i,
					       .cb = on_option };

		if (spank_option_register(spank, &option) != ESPANK_SUCCESS)
			slurm_error("enclos: --%s: cannot register the option", row->name);
	}
}

static bool listed(const char *list, const char *name)
{
	size_t length = strlen(name);

	for (const char *at = list; (at = strstr(at, name)) != NULL; at += length) {
		if ((at == list || at[-1] == ' ') && (at[length] == ' ' || at[length] == '\0'))
			return true;
	}
	return false;
}

/* Of two rows of one group: does the list of winners name the other one, and not this one? */
static bool lost(const char *flags, int index, int other)
{
	return index != other && same_group(index, other) && !listed(flags, row_at(index)->name) &&
	       listed(flags, row_at(other)->name);
}

/* ---- environment twins, in srun ---- */

static bool from_environment(int index)
{
	char name[256];

	slurm_name(index, name, sizeof(name));
	return getenv(name) != NULL;
}

static bool inherited(int index)
{
	for (int i = 0; i < ENCLOS_OPTION_COUNT; i++) {
		if (same_group(i, index) && from_environment(i))
			return true;
	}
	return false;
}

/* sbatch hands both forms of a flag on when both were given; only the one that counted there is inherited. */
static void forget_lost_flags(void)
{
	const char *flags = getenv(FLAGS_VARIABLE);
	char name[256];

	for (int i = 0; flags != NULL && i < ENCLOS_OPTION_COUNT; i++) {
		for (int j = 0; j < ENCLOS_OPTION_COUNT; j++) {
			if (!from_environment(j) || !lost(flags, i, j))
				continue;
			slurm_name(i, name, sizeof(name));
			unsetenv(name);
		}
	}
}

static int opposite_of(int index)
{
	for (int i = 0; i < ENCLOS_OPTION_COUNT; i++) {
		if (i != index && strcmp(row_at(i)->key, row_at(index)->key) == 0)
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
	const struct enclos_option_row *row = row_at(index);
	const char *wrong = NULL;
	char name[256];

	if (row->has_arg)
		wrong = checks_refusal(row->checks, value);
	else if (!flag_row(index, value, &index))
		wrong = "neither yes nor no";
	if (wrong != NULL) {
		slurm_error("enclos: %s=%s: %s", variable, shown(value), wrong);
		exit(1);
	}
	if (index < 0)
		return;
	slurm_name(index, name, sizeof(name));
	setenv(name, row->has_arg ? value : "", 1);
}

/*
 * Hands ENCLOS_CONTAINER_* and PYXIS_CONTAINER_* to Slurm under the name it reads options from, before it reads them:
 * then precedence, forwarding and --export=NONE are Slurm's own. In srun only: sbatch with such a variable would
 * otherwise put the batch script itself, and all its sruns, into the container.
 */
void options_from_environment(void)
{
	forget_lost_flags();
	for (int i = 0; i < ENCLOS_OPTION_COUNT; i++) {
		const struct enclos_option_row *row = row_at(i);
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

	for (int i = 0; i < ENCLOS_OPTION_COUNT; i++) {
		if (same_group(i, index) && chosen[i] != NULL && chosen_at[i] > chosen_at[best])
			best = i;
	}
	return best;
}

static int refuse_both(int one, int other)
{
	slurm_error("enclos: both --%s and --%s were specified", row_at(one)->name, row_at(other)->name);
	return -1;
}

/* Tells slurmstepd which form counts where an inherited and an own one meet; both on one command line are an error. */
static int settle_flags(void)
{
	char flags[512] = "";
	size_t used = 0;

	for (int i = 0; i < ENCLOS_OPTION_COUNT; i++) {
		int best = winner(i);

		if (chosen[i] == NULL || row_at(i)->has_arg)
			continue;
		/* sbatch reads the script's lines, then its command line, which counts more. */
		if (best != i && !from_environment(i) && spank_context() == S_CTX_LOCAL)
			return refuse_both(i, best);
		if (best == i && used < sizeof(flags))
			used += (size_t)snprintf(flags + used, sizeof(flags) - used, "%s ", row_at(i)->name);
	}
	if (used > 0)
		setenv(FLAGS_VARIABLE, flags, 1);
	return 0;
}

/* A step of srun that names container options, but no image in any of the ways there are, was meant otherwise. */
static int check_image_given(void)
{
	int image = find_key("image");
	char *given = profile_value(row_at(image)->name);

	if (given != NULL) {
		free(given);
		return 0;
	}
	if (spank_context() != S_CTX_LOCAL || options_container_given() || getenv("SLURM_CONTAINER") != NULL)
		return 0;
	for (int i = 0; i < ENCLOS_OPTION_COUNT; i++) {
		if (chosen[i] == NULL || from_environment(i))
			continue;
		slurm_error("enclos: --%s%s%s: needs --%s", row_at(i)->name, row_at(i)->has_arg ? "=" : "",
			    row_at(i)->has_arg ? shown(chosen[i]) : "", row_at(image)->name);
		return -1;
	}
	return 0;
}

static bool on_command_line(int index)
{
	return times[index] > (from_environment(index) ? 1U : 0U);
}

/* A profile that was inherited has been read already, and what it says is in the environment. */
static int expand_profile(void)
{
	int index = find_key("profile");
	char own[2048] = "";
	size_t used = 0;

	if (chosen[index] != NULL && !(from_environment(index) && !on_command_line(index) && profile_inherited()) &&
	    !profile_expand(chosen[index]))
		return -1;
	for (int i = 0; i < ENCLOS_OPTION_COUNT && used < sizeof(own); i++) {
		if (on_command_line(i))
			used += (size_t)snprintf(own + used, sizeof(own) - used, "%s ", row_at(i)->name);
	}
	profile_note_own(own);
	return 0;
}

/* What the step gets of an option: its own, else the profile's, else what was inherited. For the caller to free. */
static char *settled(const char *key)
{
	int index = find_key(key);
	char *given = on_command_line(index) ? NULL : profile_value(row_at(index)->name);

	return given != NULL || chosen[index] == NULL ? given : strdup(chosen[index]);
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
	const char *image = chosen[find_key("image")];

	if (image != NULL && spank_job_control_setenv(spank, IMAGE_FOR_PROLOGS, image, 1) != ESPANK_SUCCESS)
		slurm_verbose("enclos: the image cannot be named to prologs, ignoring");
}

int options_check_local(spank_t spank)
{
	if (settle_flags() != 0 || expand_profile() != 0 || check_image_given() != 0 || check_networks() != 0 ||
	    settle_image() != 0)
		return -1;
	tell_prologs(spank);
	/* With het steps Slurm goes through the options once per component. */
	for (int i = 0; i < ENCLOS_OPTION_COUNT; i++) {
		free((char *)chosen[i]);
		chosen[i] = NULL;
		times[i] = 0;
	}
	return 0;
}

/* ---- in slurmstepd ---- */

/* Drops the forms of flags that lost in srun. The list is the user's, as the options are. */
void options_settle(spank_t spank)
{
	char flags[512];

	if (spank_getenv(spank, FLAGS_VARIABLE, flags, sizeof(flags)) != ESPANK_SUCCESS)
		return;
	for (int i = 0; i < ENCLOS_OPTION_COUNT; i++) {
		for (int j = 0; j < ENCLOS_OPTION_COUNT; j++) {
			if (chosen[i] != NULL && chosen[j] != NULL && lost(flags, i, j))
				overridden[i] = true;
		}
	}
}

static int find_name(const char *name)
{
	for (int i = 0; i < ENCLOS_OPTION_COUNT; i++) {
		if (strcmp(row_at(i)->name, name) == 0)
			return i;
	}
	return -1;
}

/* A profile's option in place of an inherited one of its group, unless the command line has one of them (`own`). */
void options_replace(const char *name, const char *value, const char *own)
{
	int index = find_name(name);

	for (int i = 0; i < ENCLOS_OPTION_COUNT && index >= 0; i++) {
		if (same_group(i, index) && listed(own, row_at(i)->name))
			return;
	}
	for (int i = 0; i < ENCLOS_OPTION_COUNT && index >= 0; i++) {
		if (same_group(i, index)) {
			free((char *)chosen[i]);
			chosen[i] = NULL;
		}
	}
	if (index >= 0)
		choose(index, row_at(index)->has_arg ? value : row_at(index)->fixed);
}

/* An image, or the name of a container: either asks for one. */
bool options_container_given(void)
{
	return chosen[find_key("image")] != NULL || chosen[find_key("name")] != NULL;
}

bool options_profile_given(void)
{
	return chosen[find_key("profile")] != NULL;
}

/* The container as an error's subject. */
const char *options_subject(void)
{
	static char subject[PATH_MAX];
	int row = find_key(chosen[find_key("image")] != NULL ? "image" : "name");

	snprintf(subject, sizeof(subject), "--%s=%s", row_at(row)->name, chosen[row] != NULL ? chosen[row] : "");
	return subject;
}

static bool starts_relative(const char *path)
{
	return strncmp(path, "./", 2) == 0 || strncmp(path, "../", 3) == 0;
}

/* The first option with a path that starts at the step's directory, as --container-NAME; NULL if there is none. */
const char *options_relative(void)
{
	const char *entry = chosen[find_key("mounts")], *image = chosen[find_key("image")];

	if (image != NULL && starts_relative(image))
		return "--container-image";
	for (; entry != NULL; entry = strchr(entry, ',')) {
		entry += *entry == ',';
		if (starts_relative(entry))
			return "--container-mounts";
	}
	return NULL;
}

/* For Slurm's own --container. */
void options_use_image(const char *image)
{
	choose(find_key("image"), image);
}

void options_add_fields(struct wire_out *out)
{
	for (int i = 0; i < ENCLOS_OPTION_COUNT; i++) {
		char key[64];

		if (chosen[i] == NULL || overridden[i])
			continue;
		snprintf(key, sizeof(key), "option.%s", row_at(i)->key);
		wire_add(out, key, chosen[i]);
	}
}
