/*
 * The shim: one callback per Slurm context, in the order in which Slurm calls them.
 *
 * Holds the order of events and nothing else; what they do is in options.c, step.c, join.c, taskprolog.c, report.c and
 * wire.c. In slurmstepd no callback ever returns an error: see report.c. Each runs as root there, but task_init, which
 * runs as the user.
 */
#define _GNU_SOURCE
#pragma GCC visibility push(default)
#include <slurm/spank.h>
SPANK_PLUGIN(enclos, 1)
#pragma GCC visibility pop

#include "enclos.h"

#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define PREPARE_TIMEOUT_S 2 /* nothing waits for PREPARE: without it the JOIN does the same, later */
#define JOIN_TIMEOUT_S 10
#define EXIT_TIMEOUT_S 2
#define REMOVAL_TIMEOUT_S 20 /* of what is below a task's cgroup */
#define PROLOG_TIMEOUT_S 2
#define EPILOG_TIMEOUT_S 5

static struct {
	const char *socket;
	bool wanted;		 /* the step asked for a container: from here on it must not run outside */
	pid_t stepd;		 /* slurmstepd, the parent of all tasks */
	int prepare_fd;		 /* open until slurmstepd ends, so that the agent notices the end at once */
	struct wire_out facts;	 /* what PREPARE and JOIN have in common */
	char cwd[PATH_MAX];
	bool cwd_guessed; /* it is the user's $PWD */
	struct join join;
	bool answered; /* join owns the container's namespaces, and the task is in its network */
} step = { .socket = ENCLOS_SOCKET, .prepare_fd = -1 };

/* plugstack.conf: `required spank_enclos.so [socket=PATH]`. Slurm passes the words to every callback. */
static void read_arguments(int count, char *words[])
{
	for (int i = 0; i < count; i++) {
		if (strncmp(words[i], "socket=", 7) == 0)
			step.socket = words[i] + 7;
		else
			slurm_error("enclos: plugstack.conf: unknown argument %s, ignoring", words[i]);
	}
}

static bool in_command(void)
{
	return spank_context() == S_CTX_LOCAL || spank_context() == S_CTX_ALLOCATOR;
}

int slurm_spank_init(spank_t spank, int count, char *words[])
{
	if (!in_command() && spank_context() != S_CTX_REMOTE)
		return 0;
	read_arguments(count, words);
	if (in_command())
		parts_forget();
	if (spank_context() == S_CTX_LOCAL)
		commands_read_variables();
	options_register(spank);
	return 0;
}

static void keep_connect_error(int error)
{
	const char *cause = strerror(-error), *hint = "administrator: systemctl status enclosd";
	char text[512];

	if (error == -ENOENT)
		cause = "no such file";
	else if (error == -ECONNREFUSED)
		cause = "connection refused";
	else if (error == -ETIMEDOUT)
		cause = "it does not accept the connection";
	else if (error == -EMSGSIZE)
		hint = "the step's options are too long for one message";
	snprintf(text, sizeof(text), "agent is not running (%s: %s) on %s", step.socket, cause, report_node());
	report_keep_hint(text, hint);
}

/* Connects and sends one request. Returns the descriptor, or -errno. */
static int send_request(const struct wire_out *request, int timeout_s)
{
	int fd = wire_connect(step.socket, timeout_s), error;

	if (fd < 0)
		return fd;
	error = wire_send(fd, request, -1);
	if (error == 0)
		return fd;
	close(fd);
	return error;
}

static void send_prepare(spank_t spank)
{
	struct wire_out request;

	wire_begin(&request, "prepare");
	wire_append(&request, &step.facts);
	gpus_add_facts(spank, &request);
	wire_add(&request, "cwd", step.cwd[0] != '\0' ? step.cwd : NULL);
	step.prepare_fd = send_request(&request, PREPARE_TIMEOUT_S);
	/* No error for the user: the JOIN tries again, with the same request. */
	if (step.prepare_fd < 0)
		slurm_verbose("enclos: prepare: %s", strerror(-step.prepare_fd));
	wire_free(&request);
}

/* Does the step ask for a container? If an earlier plugin kept Slurm from calling us before, the task finds out here. */
static bool step_begun(spank_t spank, pid_t stepd)
{
	if (step.wanted)
		return true;
	if (step_is_extern(spank))
		return false;
	if (!options_of_part(spank))
		return step.wanted = true;
	/* A profile that got lost on the way may have named an image: the agent refuses what is left without one. */
	if (!profile_apply(spank) && options_profile_given())
		slurm_verbose("enclos: the profile's options are not in the step's environment");
	else if (!step_wants_container(spank))
		return false;
	step.wanted = true;
	options_settle(spank);
	step_add_facts(spank, &step.facts);
	step.stepd = stepd;
	wire_add_number(&step.facts, "stepd", (unsigned long long)stepd);
	return true;
}

int slurm_spank_init_post_opt(spank_t spank, int count, char *words[])
{
	(void)count;
	(void)words;
	if (in_command()) {
		/* `optional` would turn a returned error into success, and the step would run without what it asked for. */
		if (commands_check(spank) != 0)
			exit(1);
		return 0;
	}
	if (spank_context() != S_CTX_REMOTE || !step_begun(spank, getpid()))
		return 0;
	report_prepare();
	if (report_kept())
		return 0;
	delegate_begin(&step.facts);
	/* The real one is known in user_init; until then the user's shell has the best guess. */
	if (spank_getenv(spank, "PWD", step.cwd, sizeof(step.cwd)) != ESPANK_SUCCESS)
		step.cwd[0] = '\0';
	send_prepare(spank);
	return 0;
}

/* slurmstepd stands in the step's directory here; later, job_container/tmpfs may have moved the task away from it. */
int slurm_spank_user_init(spank_t spank, int count, char *words[])
{
	(void)spank;
	(void)count;
	(void)words;
	if (step.wanted)
		step.cwd_guessed = !compat_step_directory(step.stepd, step.cwd, sizeof(step.cwd));
	return 0;
}

/* Sends a request and shows the notices of its answer. Whatever goes wrong: the task has ended, nothing depends on it. */
static void show_answer(const struct wire_out *request, int timeout_s)
{
	int fd = send_request(request, timeout_s);
	struct wire_in *reply;
	const char *key, *value;
	size_t cursor = 0;

	if (fd < 0)
		return;
	reply = malloc(sizeof(*reply));
	if (reply != NULL && wire_receive(fd, reply, timeout_s * 1000) == 0) {
		while (wire_next(reply, &cursor, &key, &value)) {
			if (strncmp(key, "notice=", 7) == 0)
				slurm_error("enclos: %s", value);
		}
		wire_close_fds(reply);
	}
	free(reply);
	close(fd);
}

static void join(spank_t spank)
{
	int fd = wire_connect(step.socket, JOIN_TIMEOUT_S), task = step_task(spank);
	struct wire_out request;

	if (fd < 0) {
		keep_connect_error(fd);
		return;
	}
	wire_begin(&request, "join");
	wire_append(&request, &step.facts);
	wire_add(&request, "cwd", step.cwd[0] != '\0' ? step.cwd : NULL);
	wire_add_number(&request, "task", (unsigned long long)(task < 0 ? 0 : task));
	/* By now slurmstepd has written them for sure, in any release; the agent begins anew if they differ. */
	gpus_add_facts(spank, &request);
	step.answered = join_wait(&step.join, fd, &request, task == 0) && join_network(&step.join);
	wire_free(&request);
	/* Before the uid changes: no user may get hold of a connection that root opened. */
	close(fd);
}

/* Root, in the task. The task's end has to wait for task_init: slurmstepd still sets this process up, beside it. */
int slurm_spank_task_init_privileged(spank_t spank, int count, char *words[])
{
	(void)count;
	(void)words;
	if (!step_begun(spank, getppid()))
		return 0;
	taskprolog_arm();
	if (!report_kept())
		join(spank);
	if (step.prepare_fd >= 0)
		close(step.prepare_fd);
	step.prepare_fd = -1;
	return 0;
}

/* Relative paths began at the user's $PWD where the step's directory was not known; here slurmstepd has entered it. */
static bool guessed_wrong(void)
{
	const char *option = step.cwd_guessed ? options_relative() : NULL;
	char here[PATH_MAX];

	if (option == NULL || (getcwd(here, sizeof(here)) != NULL && strcmp(here, step.cwd) == 0))
		return false;
	report_keep("%s: a relative path cannot be used with --chdir here (contain_spank hides the step's directory) on %s",
		    option, report_node());
	return true;
}

/* The user, in the task, right before exec: into the container, or no further. */
int slurm_spank_task_init(spank_t spank, int count, char *words[])
{
	int status;

	(void)count;
	(void)words;
	if (!step_begun(spank, getppid()))
		return 0;
	if (!step.answered) {
		report_keep("%s: an earlier plugin of plugstack.conf failed on %s",
			    options_subject(), report_node());
		report_exit(1);
	}
	if (guessed_wrong())
		report_exit(1);
	status = taskprolog_run(spank);
	if (status != 0) {
		taskprolog_apply(spank); /* what it printed may say why */
		report_exit(status);
	}
	join_environment(&step.join, spank);
	gpus_renumber(spank, step.join.reply);
	if (!join_container(&step.join))
		report_exit(1);
	/*
	 * If slurmstepd was killed before this task was in the container, the agent did not find it there when it cleaned
	 * up. From here on it does.
	 */
	if (getppid() != step.stepd)
		_exit(1);
	if (!join_confine(&step.join))
		report_exit(1);
	taskprolog_apply(spank);
	status = entrypoint_run(&step.join, spank);
	if (status != 0)
		report_exit(status);
	if (!join_find_command(spank))
		report_exit(127);
	if (step.join.save_fd >= 0)
		save_begin(spank, step.join.save_fd);
	return 0;
}

/*
 * slurmstepd, as root, when a task has ended; its output still reaches srun. Slurm says that something was killed, the
 * agent which limit did it. What is left below the task's own cgroup ends here: Slurm removes that next.
 * With contain_spank (24.11 and later) this runs in a clone, which makes no difference.
 */
int slurm_spank_task_exit(spank_t spank, int count, char *words[])
{
	struct wire_out request;
	pid_t pid = 0;
	int status = 0;

	(void)count;
	(void)words;
	if (!step.wanted || spank_get_item(spank, S_TASK_EXIT_STATUS, &status) != ESPANK_SUCCESS ||
	    (status == 0 && !delegate_wanted()))
		return 0;
	wire_begin(&request, "exit");
	step_add_ids(spank, &request);
	wire_add_number(&request, "stepd", (unsigned long long)step.stepd);
	if (delegate_wanted() && spank_get_item(spank, S_TASK_PID, &pid) == ESPANK_SUCCESS)
		wire_add_number(&request, "pid", (unsigned long long)pid);
	show_answer(&request, delegate_wanted() ? REMOVAL_TIMEOUT_S : EXIT_TIMEOUT_S);
	wire_free(&request);
	delegate_task_ended(spank);
	return 0;
}

/* Sends a request of the prolog or epilog and waits for its answer. Nothing there may fail: it would drain the node. */
static void tell_agent(const struct wire_out *request, const char *what, int timeout_s)
{
	int fd = send_request(request, timeout_s), error = fd;
	struct wire_in *reply;
	const char *text;

	if (fd < 0) {
		slurm_info("enclos: %s: %s: %s", what, step.socket, strerror(-error));
		return;
	}
	reply = malloc(sizeof(*reply));
	error = reply == NULL ? -ENOMEM : wire_receive(fd, reply, timeout_s * 1000);
	if (error != 0) {
		slurm_info("enclos: %s: %s", what, strerror(-error));
	} else {
		text = wire_get(reply, "text");
		if (text != NULL)
			slurm_info("enclos: %s: %s", what, text);
		wire_close_fds(reply);
	}
	free(reply);
	close(fd);
}

int slurm_spank_job_prolog(spank_t spank, int count, char *words[])
{
	struct wire_out request;

	(void)spank;
	read_arguments(count, words);
	wire_begin(&request, "job");
	if (job_add_facts(&request))
		tell_agent(&request, "job", PROLOG_TIMEOUT_S);
	wire_free(&request);
	return 0;
}

int slurm_spank_job_epilog(spank_t spank, int count, char *words[])
{
	const char *job = getenv("SLURM_JOB_ID");
	struct wire_out request;

	(void)spank;
	read_arguments(count, words);
	wire_begin(&request, "end");
	wire_add(&request, "job", job);
	if (job != NULL)
		tell_agent(&request, "end", EPILOG_TIMEOUT_S);
	wire_free(&request);
	return 0;
}
