/*
 * The site's TaskProlog: run outside the container, as the user, with the task's environment.
 *
 * Slurm would run it after task_init, where its path and its interpreter are the image's. So the task runs it before
 * it joins, obeys its output as Slurm does (srun(1), "print", "export" and "unset"), and then takes it out of its own
 * copy of slurm.conf. The task is a process of its own by then: slurmstepd's copy stays as it is.
 */
#define _GNU_SOURCE
#include "enclos.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define OUTPUT_LIMIT (1U << 20)

static char *script; /* the site's; NULL if there is none */
static char *output;

/*
 * Between task_init_privileged and task_init the prolog's path leads nowhere. An earlier plugin whose task_init
 * returns a positive number makes Slurm up to 24.11 leave ours out and run the program all the same, outside: with
 * this Slurm ends the task instead, because its TaskProlog cannot be run.
 */
void taskprolog_arm(void)
{
	static char nowhere[] = "/run/enclos/container-was-not-joined";

	if (compat_conf() == NULL)
		return;
	script = compat_conf()->task_prolog;
	compat_conf()->task_prolog = nowhere;
}

static void run_script(spank_t spank, int output_fd)
{
	char *arguments[] = { script, NULL };
	char **environment;
	int null_fd = open("/dev/null", O_RDWR);

	if (null_fd < 0 || dup2(null_fd, 0) < 0 || dup2(output_fd, 1) < 0 || dup2(output_fd, 2) < 0)
		_exit(127);
	close_range(3, ~0U, 0);
	setpgid(0, 0);
	if (spank_get_item(spank, S_JOB_ENV, &environment) == ESPANK_SUCCESS)
		execve(script, arguments, environment);
	_exit(127);
}

/* Everything up to the end of the file; what is beyond the limit is read and thrown away. */
static void read_output(int fd)
{
	size_t used = 0, size = 4096;
	char discarded[4096];

	output = malloc(size);
	for (;;) {
		bool full = output == NULL || used >= OUTPUT_LIMIT;
		ssize_t count = full ? read(fd, discarded, sizeof(discarded)) : read(fd, output + used, size - used - 1);

		if (count < 0 && errno == EINTR)
			continue;
		if (count <= 0)
			break;
		if (full)
			continue;
		used += (size_t)count;
		if (size - used < 2048) {
			char *larger = realloc(output, size * 2);

			if (larger == NULL)
				break;
			output = larger;
			size *= 2;
		}
	}
	if (output != NULL)
		output[used] = '\0';
}

static int wait_for(pid_t child)
{
	int status;

	while (waitpid(child, &status, 0) < 0) {
		if (errno != EINTR)
			return 1;
	}
	return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
}

/* Returns the script's status; if it is not 0 the error is kept, and the task ends with it, as Slurm has it. */
int taskprolog_run(spank_t spank)
{
	int ends[2], status;
	pid_t child;

	if (compat_conf() != NULL)
		compat_conf()->task_prolog = NULL;
	if (script == NULL || script[0] == '\0')
		return 0;
	spank_setenv(spank, "SLURM_SCRIPT_CONTEXT", "prolog_task", 1);
	if (pipe2(ends, O_CLOEXEC) < 0) {
		report_keep("TaskProlog %s: cannot make a pipe (%s) on %s", script, strerror(errno), report_node());
		return 1;
	}
	child = fork();
	if (child == 0)
		run_script(spank, ends[1]);
	close(ends[1]);
	if (child > 0)
		read_output(ends[0]);
	close(ends[0]);
	status = child > 0 ? wait_for(child) : 1;
	if (status != 0)
		report_keep("TaskProlog %s: failed with status %d on %s", script, status, report_node());
	return status;
}

static char *after_word(char *line, const char *word)
{
	size_t length = strlen(word);

	if (strncmp(line, word, length) != 0 || line[length] != ' ')
		return NULL;
	line += length;
	return line + strspn(line, " \t");
}

static void print_line(const char *text)
{
	/* Not through stdio: its buffer would be lost at exec. */
	dprintf(STDOUT_FILENO, "%s\n", text);
}

static void apply_line(spank_t spank, char *line)
{
	char *text, *equals, *end;

	if ((text = after_word(line, "print")) != NULL) {
		print_line(text);
	} else if ((text = after_word(line, "unset")) != NULL) {
		text[strcspn(text, " \t")] = '\0';
		if (text[0] != '\0')
			spank_unsetenv(spank, text);
	} else if ((text = after_word(line, "export")) != NULL && (equals = strchr(text, '=')) != NULL) {
		for (end = equals; end > text && (end[-1] == ' ' || end[-1] == '\t'); end--)
			;
		*end = '\0';
		if (text[0] != '\0')
			spank_setenv(spank, text, equals + 1, 1);
	}
}

/* After the image's environment: what the site's script says counts more. */
void taskprolog_apply(spank_t spank)
{
	char *rest = output, *line;

	while (rest != NULL && (line = strsep(&rest, "\n")) != NULL)
		apply_line(spank, line);
	free(output);
	output = NULL;
}
