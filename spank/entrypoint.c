/*
 * The image's entrypoint: run once per node, by the first task that gets here, inside the container.
 *
 * It is started as ENTRYPOINT... COMMAND, and ends by executing COMMAND, which is a program of ours (environ.c) that
 * leaves its environment behind: what differs from the task's own becomes every task's. So the user's command is still
 * executed by Slurm, whatever the entrypoint does. The tasks share what came out in a memfd of the agent's, under a lock.
 * Runs as the user, after the capabilities are gone; the memfd is his, and can harm nobody else.
 */
#define _GNU_SOURCE
#include "enclos.h"
#include "environ.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define WORD_LIMIT 256
#define CHANGES_LIMIT (4U << 20)
#define SHOWN_BYTES 4096 /* of the output of an entrypoint that failed */
#define SUBJECT "--container-entrypoint"

/* environ.c, as the Makefile has built it. */
__asm__(".section .rodata\n"
	".balign 16\n"
	"enclos_environ_begin:\n"
	".incbin \"" ENCLOS_ENVIRON_FILE "\"\n"
	"enclos_environ_end:\n"
	".previous\n");
extern const char enclos_environ_begin[] __attribute__((visibility("hidden")));
extern const char enclos_environ_end[] __attribute__((visibility("hidden")));

/* What has to survive of the one run: the status, then changes, each `+NAME=VALUE` or `-NAME`, ended by a NUL. */
struct outcome {
	int status;
	char changes[];
};

static bool write_all(int fd, const void *bytes, size_t size)
{
	const char *at = bytes;

	while (size > 0) {
		ssize_t count = write(fd, at, size);

		if (count <= 0 && errno != EINTR)
			return false;
		if (count > 0) {
			at += count;
			size -= (size_t)count;
		}
	}
	return true;
}

/* All of a file as a string that ends with two NULs; NULL without memory or beyond the limit. */
static char *read_all(int fd, size_t *size)
{
	struct stat status;
	char *text;
	ssize_t count;

	if (fstat(fd, &status) < 0 || status.st_size > CHANGES_LIMIT)
		return NULL;
	text = calloc(1, (size_t)status.st_size + 2);
	count = text != NULL ? pread(fd, text, (size_t)status.st_size, 0) : 0;
	*size = count > 0 ? (size_t)count : 0;
	return text;
}

/* A memfd at a number that neither of our fixed ones has. */
static int scratch(const char *name)
{
	int fd = memfd_create(name, MFD_CLOEXEC), high;

	if (fd < 0)
		return -1;
	high = fcntl(fd, F_DUPFD_CLOEXEC, ENVIRON_OUTPUT + 1);
	close(fd);
	return high;
}

/* The shell's own notes, and what Slurm and MPI depend on: an entrypoint cannot move a task to another rank. */
static bool stays(const char *variable)
{
	static const char *const names[] = { "_=", "PWD=", "OLDPWD=", "SHLVL=", "SLURM", "SPANK_", "PMI", NULL };

	for (int i = 0; names[i] != NULL; i++) {
		if (strncmp(variable, names[i], strlen(names[i])) == 0)
			return true;
	}
	return strchr(variable, '=') == NULL;
}

static bool same_name(const char *one, const char *other)
{
	size_t length = strcspn(one, "=");

	return strncmp(one, other, length) == 0 && other[length] == '=';
}

static const char *find_name(char **environment, const char *variable)
{
	for (; *environment != NULL; environment++) {
		if (same_name(variable, *environment))
			return *environment;
	}
	return NULL;
}

static const char *find_in_block(const char *block, const char *variable)
{
	for (; *block != '\0'; block += strlen(block) + 1) {
		if (same_name(variable, block))
			return block;
	}
	return NULL;
}

static void write_change(int fd, char sign, const char *variable)
{
	size_t length = sign == '-' ? strcspn(variable, "=") : strlen(variable);

	write_all(fd, &sign, 1);
	write_all(fd, variable, length);
	write_all(fd, "", 1);
}

/* What the entrypoint made of the environment: `after` is a block of strings, ended by an empty one. */
static void write_changes(int fd, char **before, const char *after)
{
	for (const char *at = after; *at != '\0'; at += strlen(at) + 1) {
		const char *old = find_name(before, at);

		if (!stays(at) && (old == NULL || strcmp(old, at) != 0))
			write_change(fd, '+', at);
	}
	for (; *before != NULL; before++) {
		if (!stays(*before) && find_in_block(after, *before) == NULL)
			write_change(fd, '-', *before);
	}
}

struct run {
	char *words[WORD_LIMIT + 2];
	char **environment;
	int program_fd, output_fd, log_fd; /* log_fd: -1 if its output is the task's */
};

static void be_entrypoint(const struct run *run)
{
	struct sigaction standard = { .sa_handler = SIG_DFL };
	int null_fd = open("/dev/null", O_RDONLY), log_fd = run->log_fd >= 0 ? run->log_fd : STDERR_FILENO;
	sigset_t none;

	for (int number = 1; number < NSIG; number++)
		sigaction(number, &standard, NULL);
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	if (null_fd < 0 || dup2(null_fd, 0) < 0 || dup2(log_fd, 1) < 0 || dup2(log_fd, 2) < 0 ||
	    dup2(run->program_fd, ENVIRON_PROGRAM) < 0 || dup2(run->output_fd, ENVIRON_OUTPUT) < 0)
		_exit(126);
	close_range(3, ENVIRON_PROGRAM - 1, 0);
	close_range(ENVIRON_OUTPUT + 1, ~0U, 0);
	environ = run->environment;
	execvp(run->words[0], run->words);
	dprintf(STDERR_FILENO, "%s: %s\n", run->words[0], strerror(errno));
	_exit(errno == ENOENT ? 127 : 126);
}

static int wait_for(pid_t child)
{
	int status;

	while (waitpid(child, &status, 0) < 0) {
		if (errno != EINTR)
			return 1;
	}
	return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

static void show_log(int fd)
{
	char text[SHOWN_BYTES];
	off_t end = fd >= 0 ? lseek(fd, 0, SEEK_END) : 0;
	ssize_t count = end > 0 ? pread(fd, text, sizeof(text), end > SHOWN_BYTES ? end - SHOWN_BYTES : 0) : 0;

	if (count > 0)
		write_all(STDERR_FILENO, text, (size_t)count);
}

/* Runs it, and leaves the outcome in `fd`. */
static void run_once(int fd, struct run *run)
{
	struct outcome outcome = { .status = 126 };
	size_t size = 0;
	char *after = NULL;
	pid_t child;

	run->program_fd = scratch("enclos-environ");
	run->output_fd = scratch("enclos-environment");
	if (run->program_fd >= 0 && run->output_fd >= 0 &&
	    write_all(run->program_fd, enclos_environ_begin, (size_t)(enclos_environ_end - enclos_environ_begin))) {
		child = fork();
		if (child == 0)
			be_entrypoint(run);
		outcome.status = child > 0 ? wait_for(child) : 126;
		after = read_all(run->output_fd, &size);
	}
	/* It ended well, but never executed what it was given. */
	if (outcome.status == 0 && size == 0)
		outcome.status = -1;
	if (outcome.status != 0)
		show_log(run->log_fd);
	write_all(fd, &outcome, sizeof(outcome));
	if (outcome.status == 0)
		write_changes(fd, run->environment, after);
	free(after);
	close(run->program_fd);
	close(run->output_fd);
}

static void apply_changes(spank_t spank, char *at)
{
	while (*at != '\0') {
		char *next = at + strlen(at) + 1, *equals = strchr(at, '=');

		if (*at == '-') {
			spank_unsetenv(spank, at + 1);
		} else if (equals != NULL) {
			*equals = '\0';
			spank_setenv(spank, at + 1, equals + 1, 1);
		}
		at = next;
	}
}

static bool collect_words(const struct join *join, struct run *run)
{
	static char program[32];
	const char *key, *value;
	size_t cursor = 0, count = 0;

	while (wire_next(join->reply, &cursor, &key, &value) && count < WORD_LIMIT) {
		if (strncmp(key, "entrypoint=", 11) == 0)
			run->words[count++] = (char *)value;
	}
	snprintf(program, sizeof(program), "/proc/self/fd/%d", ENVIRON_PROGRAM);
	run->words[count] = program;
	return count > 0;
}

static int report_failure(int status)
{
	char text[256];

	if (status < 0)
		snprintf(text, sizeof(text), SUBJECT ": the image's entrypoint did not execute its arguments on %s",
			 report_node());
	else
		snprintf(text, sizeof(text), SUBJECT ": the image's entrypoint failed with status %d on %s", status,
			 report_node());
	report_keep_hint(text, "--no-container-entrypoint leaves it out; --container-entrypoint-log shows what it prints");
	return status > 0 ? status : 1;
}

/* Returns 0, or the status with which the task has to end; the error is kept then. */
int entrypoint_run(struct join *join, spank_t spank)
{
	struct flock lock = { .l_type = F_WRLCK, .l_whence = SEEK_SET };
	struct run run = { .log_fd = -1 };
	struct outcome *outcome;
	struct stat file;
	size_t size;
	int fd = join->entrypoint_fd, status = 0;

	if (fd < 0 || !collect_words(join, &run) || spank_get_item(spank, S_JOB_ENV, &run.environment) != ESPANK_SUCCESS)
		return 0;
	while (fcntl(fd, F_SETLKW, &lock) < 0 && errno == EINTR)
		;
	if (fstat(fd, &file) == 0 && file.st_size == 0) {
		run.log_fd = wire_get(join->reply, "entrypoint_log") == NULL ? scratch("enclos-entrypoint") : -1;
		run_once(fd, &run);
		if (run.log_fd >= 0)
			close(run.log_fd);
	}
	outcome = (struct outcome *)read_all(fd, &size);
	/* Gives up the lock as well. */
	close(fd);
	join->entrypoint_fd = -1;
	if (outcome == NULL || size < sizeof(*outcome))
		status = report_failure(126);
	else if (outcome->status != 0)
		status = report_failure(outcome->status);
	else
		apply_changes(spank, outcome->changes);
	free(outcome);
	return status;
}
