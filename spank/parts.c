/*
 * The parts of a heterogeneous step, `srun A : B`: each has the options that were given for it.
 *
 * Slurm keeps one set of a plugin's options for the whole command and hands the last part's to all. So in such a step
 * srun leaves what each part's options come to in variables of the step with the part's number behind their names, and
 * slurmstepd takes those of its own part. All of it is the user's word, as options are. Elsewhere the variables have no
 * number.
 */
#define _GNU_SOURCE
#include "enclos.h"

#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define PART "_PART_"
#define PREFIX "SLURM_ENCLOS_"
/* That a step has such parts. */
#define PARTS_VARIABLE PREFIX "PARTS"
#define PARTS_LIMIT 128 /* MAX_HET_JOB_COMPS of Slurm */
#define COMMAND_LINE_LIMIT (1U << 21)

extern char **environ;

/* The part of each call of init_post_opt in srun, in their order. */
static struct {
	int part[PARTS_LIMIT], count, at;
	int components; /* of the command line; 0: not looked at yet */
} calls;

/* ---- in srun: which part an init_post_opt is about ---- */

static void add_call(int part)
{
	if (calls.count < PARTS_LIMIT && part < PARTS_LIMIT)
		calls.part[calls.count++] = part;
}

/* --het-group=0,2-3: Slurm goes through the options once for each of them, in ascending order. */
static void add_group(const char *list)
{
	bool listed[PARTS_LIMIT] = { false };
	char *end;

	while (*list != '\0') {
		long first, last;

		if (!isdigit((unsigned char)*list)) {
			list++;
			continue;
		}
		first = last = strtol(list, &end, 10);
		if (*end == '-' && isdigit((unsigned char)end[1]))
			last = strtol(end + 1, &end, 10);
		for (long part = first; part <= last && part < PARTS_LIMIT; part++)
			listed[part] = true;
		list = end;
	}
	for (int part = 0; part < PARTS_LIMIT; part++) {
		if (listed[part])
			add_call(part);
	}
}

/* The value of --het-group, also in a shorter form of it, if this word is one; `next` is the word behind it, or NULL. */
static const char *het_group(const char *word, const char *next)
{
	static const char name[] = "--het-group";
	size_t length = strcspn(word, "=");
	const char *value = word[length] == '=' ? word + length + 1 : next;

	if (length < sizeof("--he") - 1 || length > sizeof(name) - 1 || strncmp(word, name, length) != 0 || value == NULL)
		return NULL;
	return *value != '\0' && value[strspn(value, "0123456789,-")] == '\0' ? value : NULL;
}

/* May the word behind this one be its value? What has one in it (-n4, --ntasks=4) takes no other. */
static bool may_take_next(const char *word)
{
	if (strncmp(word, "--", 2) == 0)
		return word[2] != '\0' && strchr(word, '=') == NULL;
	return word[0] == '-' && word[1] != '\0' && word[2] == '\0';
}

/*
 * Cuts the words of srun's own command line at each `:`, as srun does. A step without one has one component. What
 * follows a component's program is the program's, whatever it looks like. Which options take a value is not known here:
 * where a flag hides the program, a word of it may be taken for srun's. Then some part is not among the calls, and has
 * no options in its slurmstepd, which is an error there.
 */
static void read_components(const char *words, const char *end)
{
	const char *group = NULL;
	bool in_program = false, value = false;

	for (const char *word = words + strlen(words) + 1, *next; word < end; word = next) {
		bool separator = strcmp(word, ":") == 0;

		next = word + strlen(word) + 1;
		if (!separator && !in_program) {
			in_program = strcmp(word, "--") == 0 || (word[0] != '-' && !value);
			value = may_take_next(word);
			if (group == NULL && !in_program)
				group = het_group(word, next < end ? next : NULL);
		}
		if (!separator && next < end)
			continue;
		if (group != NULL)
			add_group(group);
		else
			add_call(calls.components);
		group = NULL;
		in_program = value = false;
		calls.components++;
	}
}

static void read_command_line(void)
{
	char *words = malloc(COMMAND_LINE_LIMIT + 1);
	FILE *file = fopen("/proc/self/cmdline", "re");
	size_t used = 0;

	if (words != NULL && file != NULL)
		used = fread(words, 1, COMMAND_LINE_LIMIT, file);
	if (used > 0) {
		words[used] = '\0';
		read_components(words, words + used);
	}
	if (file != NULL)
		fclose(file);
	free(words);
	if (calls.components == 0)
		calls.components = 1;
}

static bool several(void)
{
	if (calls.components == 0 && spank_context() == S_CTX_LOCAL)
		read_command_line();
	return calls.components > 1;
}

/* The part whose options srun has just read; -1 in a step that has no parts. */
int parts_current(void)
{
	return several() && calls.at < calls.count ? calls.part[calls.at] : -1;
}

bool parts_last(void)
{
	return calls.at + 1 >= calls.count;
}

/* srun has more parts than were found on its command line: nobody knows which one this is. */
bool parts_lost(void)
{
	return several() && calls.at >= calls.count;
}

/* Its options are settled; the next one's follow. */
void parts_next(void)
{
	calls.at++;
}

/* What a step around this srun has left: of other parts. */
void parts_forget(void)
{
	char name[256];

	for (char **variable = environ; *variable != NULL;) {
		size_t length = strcspn(*variable, "=");

		if (strncmp(*variable, PREFIX, sizeof(PREFIX) - 1) != 0 || length >= sizeof(name) ||
		    (strncmp(*variable, PARTS_VARIABLE "=", sizeof(PARTS_VARIABLE)) != 0 &&
		     memmem(*variable, length, PART, sizeof(PART) - 1) == NULL)) {
			variable++;
			continue;
		}
		snprintf(name, sizeof(name), "%.*s", (int)length, *variable);
		unsetenv(name); /* the next one takes its place */
	}
}

/* ---- variables of the part, or of the step where it has none ---- */

static void variable_of(const char *name, int part, char *text, size_t size)
{
	if (part < 0)
		snprintf(text, size, "%s", name);
	else
		snprintf(text, size, "%s" PART "%d", name, part);
}

/* In the commands. Gives what was inherited where the part has no value of its own yet. */
const char *part_getenv(const char *name)
{
	char own[256];
	const char *value;

	variable_of(name, parts_current(), own, sizeof(own));
	value = getenv(own);
	return value != NULL ? value : getenv(name);
}

void part_setenv(const char *name, const char *value)
{
	char own[256];

	variable_of(name, parts_current(), own, sizeof(own));
	setenv(own, value, 1);
	/* A step none of whose parts has an option of ours is none of our business. */
	if (parts_current() >= 0 && value[0] != '\0')
		setenv(PARTS_VARIABLE, "", 1);
}

void part_unsetenv(const char *name)
{
	char own[256];

	variable_of(name, parts_current(), own, sizeof(own));
	unsetenv(own);
	if (parts_current() < 0)
		return;
	/* Not to be taken for what was inherited. */
	unsetenv(name);
}

/* ---- in slurmstepd ---- */

/* slurmstepd calls itself `slurmstepd: [JOB.STEP+PART]` where the parts share a job (not from 26.05 on). */
static int part_in_title(void)
{
	char title[64] = "";
	FILE *file = fopen("/proc/self/cmdline", "re");
	size_t used = 0;
	const char *plus;

	if (file != NULL) {
		used = fread(title, 1, sizeof(title) - 1, file);
		fclose(file);
	}
	title[used] = '\0';
	plus = strncmp(title, "slurmstepd:", 11) == 0 ? strchr(title, '+') : NULL;
	return plus != NULL && isdigit((unsigned char)plus[1]) ? atoi(plus + 1) : -1;
}

static bool is_job_of(spank_t spank, const char *pattern, int part, uint32_t job)
{
	char name[64], value[32];

	snprintf(name, sizeof(name), "%s%d", pattern, part);
	return spank_getenv(spank, name, value, sizeof(value)) == ESPANK_SUCCESS && strtoul(value, NULL, 10) == job;
}

/* Where each part is a job of its own, their ids are in the step's environment: salloc's and sbatch's, or srun's own. */
static int part_of_job(spank_t spank)
{
	uint32_t job;

	if (spank_get_item(spank, S_JOB_ID, &job) != ESPANK_SUCCESS)
		return -1;
	for (int part = 0; part < PARTS_LIMIT; part++) {
		if (is_job_of(spank, "SLURM_JOB_ID_HET_GROUP_", part, job) ||
		    is_job_of(spank, "SLURM_JOB_ID_PACK_GROUP_", part, job))
			return part;
	}
	return -1;
}

/* The part that this slurmstepd runs: PARTS_NONE if the step has none, PARTS_UNKNOWN if it cannot be told. */
int parts_own(spank_t spank)
{
	static int part = -3;
	char value[2];

	if (part >= PARTS_UNKNOWN)
		return part;
	part = PARTS_NONE;
	if (spank_getenv(spank, PARTS_VARIABLE, value, sizeof(value)) != ESPANK_SUCCESS)
		return part;
	/* Not for what the tasks start: a script that they submit has no parts. */
	spank_unsetenv(spank, PARTS_VARIABLE);
	part = part_in_title();
	if (part < 0)
		part = part_of_job(spank);
	if (part < 0)
		part = PARTS_UNKNOWN;
	return part;
}

/* As part_getenv(). */
bool part_spank_getenv(spank_t spank, const char *name, char *text, size_t size)
{
	char own[256];

	variable_of(name, parts_own(spank), own, sizeof(own));
	return spank_getenv(spank, own, text, (int)size) == ESPANK_SUCCESS ||
	       spank_getenv(spank, name, text, (int)size) == ESPANK_SUCCESS;
}
