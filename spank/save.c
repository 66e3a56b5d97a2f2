/*
 * --container-save: the task's own process waits for the user's program, then for the agent to save the container.
 *
 * Slurm has nothing that runs after a task's end and can still speak to its user and fail the step. So in these steps
 * the program is a child of the task: same session, process group, cgroup and descriptors, and the task ends as it did.
 * Runs as the user, inside the container, when everything is given up. The socket leads to nothing but the saving of
 * this container to this path, so it may be in a process of the user's.
 */
#define _GNU_SOURCE
#include "enclos.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#define SAVE_TIMEOUT_MS (7 * 24 * 3600 * 1000) /* the step's time limit comes earlier */

static int wait_for(pid_t child)
{
	int status;

	while (waitpid(child, &status, 0) < 0) {
		if (errno != EINTR)
			return 1 << 8;
	}
	return status;
}

/* Ends as the program did; where it ended well and the container was not saved, with 1. */
__attribute__((noreturn)) static void end_as(int status, bool saved)
{
	struct rlimit none = { 0 };
	sigset_t set;

	if (WIFSIGNALED(status)) {
		setrlimit(RLIMIT_CORE, &none);
		signal(WTERMSIG(status), SIG_DFL);
		sigemptyset(&set);
		sigaddset(&set, WTERMSIG(status));
		kill(getpid(), WTERMSIG(status));
		sigprocmask(SIG_UNBLOCK, &set, NULL);
		_exit(128 + WTERMSIG(status));
	}
	_exit(WEXITSTATUS(status) == 0 && !saved ? 1 : WEXITSTATUS(status));
}

static void show(const struct wire_in *reply)
{
	const char *key, *value;
	size_t cursor = 0;

	while (wire_next(reply, &cursor, &key, &value)) {
		if (strncmp(key, "text=", 5) == 0 || strncmp(key, "notice=", 7) == 0)
			slurm_spank_log("enclos: %s", value);
	}
}

static bool ask_to_save(int fd)
{
	struct wire_in *reply = malloc(sizeof(*reply));
	struct wire_out request;
	const char *status, *text;
	int error;

	wire_begin(&request, "ended");
	error = reply == NULL ? -ENOMEM : wire_send(fd, &request, -1);
	if (error == 0)
		error = wire_receive(fd, reply, SAVE_TIMEOUT_MS);
	if (error != 0) {
		report_keep_hint("--container-save: the agent ended before the container was saved",
				 "run the step again; administrator: journalctl -u enclosd");
		return false;
	}
	status = wire_get(reply, "status");
	if (status != NULL && strcmp(status, "ok") == 0) {
		show(reply);
		return true;
	}
	text = wire_get(reply, "text");
	report_keep_hint(text != NULL ? text : "--container-save: the container was not saved", wire_get(reply, "hint"));
	return false;
}

/* Returns in a child that becomes the program; the task itself stays here until its end. */
void save_begin(spank_t spank, int fd)
{
	sigset_t every, before;
	char pid[16];
	pid_t child;
	int status;
	bool saved;

	sigfillset(&every);
	sigprocmask(SIG_BLOCK, &every, &before);
	child = fork();
	if (child < 0) {
		report_keep("--container-save: cannot start a process (%s) on %s", strerror(errno), report_node());
		report_exit(1);
	}
	if (child == 0) {
		close(fd);
		snprintf(pid, sizeof(pid), "%d", (int)getpid());
		spank_setenv(spank, "SLURM_TASK_PID", pid, 1);
		sigprocmask(SIG_SETMASK, &before, NULL);
		return;
	}
	/* It holds a copy of slurmstepd's memory for as long as the program runs. */
	prctl(PR_SET_DUMPABLE, 0);
	prctl(PR_SET_NAME, "enclos-task");
	close(STDIN_FILENO);
	close(STDOUT_FILENO);
	if (dup2(fd, 3) == 3)
		close_range(4, ~0U, 0);
	status = wait_for(child);
	/*
	 * Killed with the step, or by the kernel for its memory: this process may be next, and asks for nothing more. A
	 * shell whose child was killed a moment before ends with 128 + SIGKILL.
	 */
	if (WIFSIGNALED(status) ? WTERMSIG(status) == SIGKILL : WEXITSTATUS(status) == 128 + SIGKILL)
		end_as(status, true);
	saved = ask_to_save(3);
	if (!saved)
		report_show();
	end_as(status, saved);
}
