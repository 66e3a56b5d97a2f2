/*
 * --container-profile: a file that holds options, read where the command is typed.
 *
 * The shim cannot read TOML or YAML. So srun, sbatch and salloc run `enclos profile options NAME`, as the user, when the
 * option is given and only then; what it prints travels with the job in one variable. In slurmstepd these options take
 * the place of inherited ones and of variables, but not of those on the command line of the same command.
 */
#define _GNU_SOURCE
#include "enclos.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define OUTPUT_LIMIT 65536
/* Names with SLURM_ pass --export=NONE. One option a line; names of options; names of variables. */
#define OPTIONS_VARIABLE "SLURM_ENCLOS_PROFILE"
#define OWN_VARIABLE "SLURM_ENCLOS_OWN"
#define KEPT_VARIABLE "SLURM_ENCLOS_KEPT"
/* Variables of one part of a heterogeneous step, a line each. Elsewhere srun sets them itself. */
#define SET_VARIABLE "SLURM_ENCLOS_SET"

static bool expanded;

static void be_reader(const char *name, int output_fd)
{
	if (dup2(output_fd, STDOUT_FILENO) < 0)
		_exit(126);
	execlp("enclos", "enclos", "profile", "options", name, NULL);
	dprintf(STDERR_FILENO, "enclos: --container-profile=%s: cannot run 'enclos' (%s)\n", name, strerror(errno));
	_exit(127);
}

static int wait_for(pid_t child)
{
	int status = 1;

	while (child > 0 && waitpid(child, &status, 0) < 0 && errno == EINTR)
		;
	return status;
}

/* What the reader prints, as a string; NULL after an error was printed, by the reader or here. */
static char *read_profile(const char *name)
{
	char *text = calloc(1, OUTPUT_LIMIT + 1);
	int ends[2] = { -1, -1 };
	size_t used = 0;
	ssize_t count;
	pid_t child;

	if (text == NULL || pipe(ends) < 0 || (child = fork()) < 0) {
		slurm_error("enclos: --container-profile=%s: cannot read it (%s)", name, strerror(errno));
		free(text);
		return NULL;
	}
	if (child == 0)
		be_reader(name, ends[1]);
	close(ends[1]);
	while (used < OUTPUT_LIMIT && (count = read(ends[0], text + used, OUTPUT_LIMIT - used)) != 0) {
		if (count < 0 && errno != EINTR)
			break;
		used += count > 0 ? (size_t)count : 0;
	}
	close(ends[0]);
	if (wait_for(child) == 0)
		return text;
	free(text);
	return NULL;
}

/* `set NAME=VALUE`: a variable of the job's, which counts more than the image's. */
static void set_variable(char *text, char *kept, size_t size, FILE *of_part)
{
	char *equals = strchr(text, '=');
	size_t used = strlen(kept);

	if (equals == NULL)
		return;
	if (parts_current() >= 0)
		fprintf(of_part, "%s\n", text);
	*equals = '\0';
	if (parts_current() < 0)
		setenv(text, equals + 1, 1);
	snprintf(kept + used, size - used, "%s%s", used > 0 ? "," : "", text);
}

/* In the commands. Returns false after an error was printed. */
bool profile_expand(const char *name)
{
	char *text = read_profile(name), *rest, *line, *options = NULL, *set = NULL, kept[4096] = "";
	size_t options_size, set_size;
	FILE *options_file, *set_file;

	if (text == NULL)
		return false;
	options_file = open_memstream(&options, &options_size);
	set_file = open_memstream(&set, &set_size);
	for (rest = text; options_file != NULL && set_file != NULL && (line = strsep(&rest, "\n")) != NULL;) {
		if (strncmp(line, "set ", 4) == 0)
			set_variable(line + 4, kept, sizeof(kept), set_file);
		else if (line[0] != '\0')
			fprintf(options_file, "%s\n", line);
	}
	if (options_file != NULL && fclose(options_file) == 0)
		part_setenv(OPTIONS_VARIABLE, options);
	if (set_file != NULL && fclose(set_file) == 0 && set_size > 0)
		part_setenv(SET_VARIABLE, set);
	if (kept[0] != '\0')
		part_setenv(KEPT_VARIABLE, kept);
	expanded = true;
	free(options);
	free(set);
	free(text);
	return true;
}

/* In the commands, after all: which options the command line itself has. They count more than any profile. */
void profile_note_own(const char *names)
{
	if (expanded || part_getenv(OPTIONS_VARIABLE) != NULL)
		part_setenv(OWN_VARIABLE, names);
	expanded = false;
}

/* Did an allocation, whose environment this is, read a profile? */
bool profile_inherited(void)
{
	return !expanded && part_getenv(OPTIONS_VARIABLE) != NULL;
}

/* In the commands: what the profile says of an option, for the caller to free; NULL if it says nothing. */
char *profile_value(const char *option)
{
	const char *text = part_getenv(OPTIONS_VARIABLE);
	size_t length = strlen(option);

	for (; text != NULL && *text != '\0'; text += strcspn(text, "\n"), text += *text == '\n') {
		if (strncmp(text, option, length) == 0 && text[length] == '=')
			return strndup(text + length + 1, strcspn(text + length + 1, "\n"));
	}
	return NULL;
}

static void set_variables_of_part(spank_t spank)
{
	static char text[OUTPUT_LIMIT];
	char *rest = text, *line, *equals;

	if (!part_spank_getenv(spank, SET_VARIABLE, text, sizeof(text)))
		return;
	while ((line = strsep(&rest, "\n")) != NULL) {
		equals = strchr(line, '=');
		if (equals == NULL)
			continue;
		*equals = '\0';
		spank_setenv(spank, line, equals + 1, 1);
	}
}

/*
 * In slurmstepd: the profile's options in place of what was inherited. All of this is the user's word. Returns false if
 * what srun read has not come along.
 */
bool profile_apply(spank_t spank)
{
	static char text[OUTPUT_LIMIT], own[2048];
	char *rest = text, *line, *equals;

	if (!part_spank_getenv(spank, OPTIONS_VARIABLE, text, sizeof(text)))
		return false;
	if (!part_spank_getenv(spank, OWN_VARIABLE, own, sizeof(own)))
		own[0] = '\0';
	while ((line = strsep(&rest, "\n")) != NULL) {
		equals = strchr(line, '=');
		if (equals == NULL)
			continue;
		*equals = '\0';
		options_replace(line, equals + 1, own);
	}
	set_variables_of_part(spank);
	return true;
}

/* The variables that a profile sets: they stay as the job has them. */
void profile_add_fields(spank_t spank, struct wire_out *out)
{
	static char kept[4096];

	if (part_spank_getenv(spank, KEPT_VARIABLE, kept, sizeof(kept)))
		wire_add(out, "option.env", kept);
}
