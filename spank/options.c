/*
 * The options: registered with Slurm, checked one by one in the commands, collected in slurmstepd.
 *
 * The checks are only there to answer early; the agent checks everything again, because nothing that comes from the
 * submit side is trusted. Runs as the user in srun, sbatch and salloc, as root in slurmstepd.
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
/* What srun itself leaves in the step's environment begins behind this. */
#define COMMANDS_PREFIX "SLURM_SPANK_"
static const char *chosen[ENCLOS_OPTION_COUNT]; /* value of each row, owned; NULL: not given */
static unsigned int chosen_at[ENCLOS_OPTION_COUNT];
static unsigned int chosen_count;
static bool overridden[ENCLOS_OPTION_COUNT];
static unsigned int times[ENCLOS_OPTION_COUNT]; /* that Slurm named it: from the environment, on the command line */

const char *const *options_sent_variables(void)
{
	return enclos_sent_variables;
}

const struct enclos_option_row *options_row(int index)
{
	return index < ENCLOS_OPTION_COUNT ? &enclos_option_rows[index] : NULL;
}

const char *options_value(int index)
{
	return chosen[index];
}

unsigned int options_order(int index)
{
	return chosen_at[index];
}

unsigned int options_times(int index)
{
	return times[index];
}

void options_forget(void)
{
	for (int i = 0; i < ENCLOS_OPTION_COUNT; i++) {
		free((char *)chosen[i]);
		chosen[i] = NULL;
		times[i] = 0;
	}
}

/* Options that exclude each other: the two forms of a flag, and readonly against writable. */
static const char *group_of(const struct enclos_option_row *row)
{
	return strcmp(row->key, "readonly") == 0 ? "writable" : row->key;
}

bool options_same_group(int one, int other)
{
	return strcmp(group_of(options_row(one)), group_of(options_row(other))) == 0;
}

int options_find_key(const char *key)
{
	for (int i = 0; i < ENCLOS_OPTION_COUNT; i++) {
		if (strcmp(options_row(i)->key, key) == 0)
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

void options_slurm_name(int index, char *name, size_t size)
{
	size_t start = (size_t)snprintf(name, size, SLURM_PREFIX "%s", options_row(index)->name);

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
	options_slurm_name(index, name, sizeof(name));
	inherited = getenv(name);
	return inherited == NULL || strcmp(inherited, chosen[index]) != 0;
}

/* A value as an error shows it: printable, and so short that the reason behind it is not cut off. */
const char *options_shown(const char *value)
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
	const struct enclos_option_row *row = options_row(index);
	const char *wrong = checks_refusal(row->checks, value);

	if (wrong != NULL) {
		slurm_error("enclos: --%s=%s: %s", row->name, options_shown(value), wrong);
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
	row = options_row(index);
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
		const struct enclos_option_row *row = options_row(i);
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

bool options_listed(const char *list, const char *name)
{
	size_t length = strlen(name);

	for (const char *at = list; (at = strstr(at, name)) != NULL; at += length) {
		if ((at == list || at[-1] == ' ') && (at[length] == ' ' || at[length] == '\0'))
			return true;
	}
	return false;
}

/* The value of an option that takes one, in slurmstepd after options_settle(); NULL where it was not given. */
const char *options_given(const char *key)
{
	int index = options_find_key(key);

	return index >= 0 ? chosen[index] : NULL;
}

/* Of two rows of one group: does the list of winners name the other one, and not this one? */
bool options_lost(const char *flags, int index, int other)
{
	return index != other && options_same_group(index, other) && !options_listed(flags, options_row(index)->name) &&
	       options_listed(flags, options_row(other)->name);
}

/* ---- in slurmstepd ---- */

static int find_name(const char *name)
{
	for (int i = 0; i < ENCLOS_OPTION_COUNT; i++) {
		if (strcmp(options_row(i)->name, name) == 0)
			return i;
	}
	return -1;
}

/* Takes `LENGTH:NAME=VALUE...` as srun left it, instead of what Slurm handed over. Returns false if it is something else. */
static bool take_all(char *text)
{
	options_forget();
	while (*text != '\0') {
		char *end, *value, *name;
		size_t length = strtoul(text, &end, 10);
		char after;

		if (*end != ':' || length > strlen(end + 1))
			return false;
		name = end + 1;
		text = name + length;
		after = *text;
		*text = '\0';
		value = strchr(name, '=');
		if (value == NULL)
			return false;
		*value++ = '\0';
		if (find_name(name) >= 0)
			choose(find_name(name), value);
		*text = after;
	}
	return true;
}

/* In later releases (24.11) the options of all parts stay in the step's environment, for steps inside it. */
static void unset_handed_over(spank_t spank)
{
	char name[256];

	for (int i = 0; i < ENCLOS_OPTION_COUNT; i++) {
		options_slurm_name(i, name, sizeof(name));
		spank_unsetenv(spank, name + sizeof(COMMANDS_PREFIX) - 1);
	}
}

/* In a heterogeneous step: this part's options, for Slurm has handed over the last part's. False with the error kept. */
bool options_of_part(spank_t spank)
{
	static char text[PART_LIMIT];

	if (parts_own(spank) == PARTS_NONE)
		return true;
	/* A part without options has an empty variable. */
	if (parts_own(spank) != PARTS_UNKNOWN) {
		unset_handed_over(spank);
		if (part_spank_getenv(spank, PART_OPTIONS_VARIABLE, text, sizeof(text)) && take_all(text))
			return true;
	}
	report_keep_hint("container options: which part of the heterogeneous step this is cannot be told",
			 "start each part with an srun of its own");
	return false;
}

/* Drops the forms of flags that lost in srun. The list is the user's, as the options are. */
void options_settle(spank_t spank)
{
	char flags[512];

	if (!part_spank_getenv(spank, FLAGS_VARIABLE, flags, sizeof(flags)))
		return;
	for (int i = 0; i < ENCLOS_OPTION_COUNT; i++) {
		for (int j = 0; j < ENCLOS_OPTION_COUNT; j++) {
			if (chosen[i] != NULL && chosen[j] != NULL && options_lost(flags, i, j))
				overridden[i] = true;
		}
	}
}

/* A profile's option in place of an inherited one of its group, unless the command line has one of them (`own`). */
void options_replace(const char *name, const char *value, const char *own)
{
	int index = find_name(name);

	for (int i = 0; i < ENCLOS_OPTION_COUNT && index >= 0; i++) {
		if (options_same_group(i, index) && options_listed(own, options_row(i)->name))
			return;
	}
	for (int i = 0; i < ENCLOS_OPTION_COUNT && index >= 0; i++) {
		if (options_same_group(i, index)) {
			free((char *)chosen[i]);
			chosen[i] = NULL;
		}
	}
	if (index >= 0)
		choose(index, options_row(index)->has_arg ? value : options_row(index)->fixed);
}

/* An image, or the name of a container: either asks for one. */
bool options_container_given(void)
{
	return chosen[options_find_key("image")] != NULL || chosen[options_find_key("name")] != NULL;
}

bool options_profile_given(void)
{
	return chosen[options_find_key("profile")] != NULL;
}

/* The container as an error's subject. */
const char *options_subject(void)
{
	static char subject[PATH_MAX];
	int row = options_find_key(chosen[options_find_key("image")] != NULL ? "image" : "name");

	snprintf(subject, sizeof(subject), "--%s=%s", options_row(row)->name, chosen[row] != NULL ? chosen[row] : "");
	return subject;
}

static bool starts_relative(const char *path)
{
	return strncmp(path, "./", 2) == 0 || strncmp(path, "../", 3) == 0;
}

/* The first option with a path that starts at the step's directory, as --container-NAME; NULL if there is none. */
const char *options_relative(void)
{
	const char *entry = chosen[options_find_key("mounts")], *image = chosen[options_find_key("image")];

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
	choose(options_find_key("image"), image);
}

void options_add_fields(struct wire_out *out)
{
	for (int i = 0; i < ENCLOS_OPTION_COUNT; i++) {
		char key[64];

		if (chosen[i] == NULL || overridden[i])
			continue;
		snprintf(key, sizeof(key), "option.%s", options_row(i)->key);
		wire_add(out, key, chosen[i]);
	}
}
