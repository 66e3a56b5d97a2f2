/*
 * --container-cgroup=delegate: the task gets cgroups of its own to make, and Slurm's signals still reach it.
 *
 * Slurm signals the processes that it finds in a task's cgroup, and looks no deeper (22.05 to 24.11,
 * src/plugins/cgroup/v2/cgroup_v2.c, cgroup_p_step_get_pids). A cgroup with processes in it can have no controllers
 * below, so the task has to stand deeper. But Slurm also looks where slurmstepd itself stands. A child of it there, the
 * keeper, gets every signal that a task would get (src/plugins/proctrack/cgroup/proctrack_cgroup.c,
 * proctrack_p_signal) and hands it on. SIGKILL ends it, and by that the agent knows that all has to end.
 *
 * delegate_begin() and delegate_task_ended() run as root in slurmstepd, the others as the user in the task.
 */
#define _GNU_SOURCE
#include "enclos.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/mount.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define OPTION "--container-cgroup=delegate"
#define ANSWER_MS 60000
/* As runtime/delegation.py names it. */
#define PLACE "/delegated"

static struct {
	pid_t keeper;
	unsigned int ended; /* tasks */
} state;

bool delegate_wanted(void)
{
	const char *value = options_given("cgroup");

	return value != NULL && strcmp(value, "delegate") == 0;
}

/* ---- the keeper: a fork of slurmstepd that allocates nothing ---- */

static size_t read_file(const char *path, char *text, size_t size)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	size_t used = 0;
	ssize_t count = 1;

	while (fd >= 0 && count > 0 && used < size - 1) {
		count = read(fd, text + used, size - 1 - used);
		used += count > 0 ? (size_t)count : 0;
	}
	if (fd >= 0)
		close(fd);
	text[used] = '\0';
	return used;
}

/* Whether a process is where Slurm does not look: below the cgroup of one of this step's tasks. */
static bool out_of_sight(const char *pid)
{
	static char own[4096], other[4096];
	char path[64], *slash;

	snprintf(path, sizeof(path), "/proc/%.16s/cgroup", pid);
	if (read_file("/proc/self/cgroup", own, sizeof(own)) == 0 || read_file(path, other, sizeof(other)) == 0)
		return false;
	/* …/step_S/slurm is where the keeper is, …/step_S/user/task_T/delegated where the task is, or deeper. */
	slash = strrchr(own, '/');
	return slash != NULL && strncmp(own, other, (size_t)(slash - own) + 1) == 0 && strstr(other, PLACE) != NULL;
}

static void hand_on(pid_t stepd, int number)
{
	static char children[16384];
	char path[64], *rest = children, *pid;

	/* All tasks are forked by the thread that called us. */
	snprintf(path, sizeof(path), "/proc/%d/task/%d/children", (int)stepd, (int)stepd);
	read_file(path, children, sizeof(children));
	while ((pid = strsep(&rest, " ")) != NULL) {
		/* The process that is looked at is the one that gets the signal, also if its pid is given to another. */
		int pidfd = atoi(pid) > 1 ? (int)syscall(SYS_pidfd_open, atoi(pid), 0) : -1;

		if (pidfd < 0)
			continue;
		if (out_of_sight(pid))
			syscall(SYS_pidfd_send_signal, pidfd, number, NULL, 0);
		close(pidfd);
	}
}

static void keep(pid_t stepd) __attribute__((noreturn));
static void keep(pid_t stepd)
{
	siginfo_t info;
	sigset_t every;
	int number;

	sigfillset(&every);
	sigprocmask(SIG_SETMASK, &every, NULL);
	close_range(0, ~0U, 0);
	prctl(PR_SET_NAME, "enclos-keeper");
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	while (getppid() == stepd) {
		number = sigwaitinfo(&every, &info);
		if (number > 0 && number != SIGCHLD && info.si_code == SI_USER && info.si_pid == stepd)
			hand_on(stepd, number);
	}
	_exit(0);
}

/* Before the tasks are forked; slurmstepd stands in its cgroup of the step already. Failing is told by the agent. */
void delegate_begin(struct wire_out *facts)
{
	pid_t stepd = getpid();

	if (!delegate_wanted())
		return;
	state.keeper = fork();
	if (state.keeper == 0)
		keep(stepd);
	if (state.keeper > 0)
		wire_add_number(facts, "keeper", (unsigned long long)state.keeper);
}

/* With the last task the keeper has to be gone, or Slurm would wait a second for it. */
void delegate_task_ended(spank_t spank)
{
	uint32_t tasks = 0;

	if (state.keeper <= 0 || spank_get_item(spank, S_JOB_LOCAL_TASK_COUNT, &tasks) != ESPANK_SUCCESS ||
	    ++state.ended < tasks)
		return;
	kill(state.keeper, SIGKILL);
	/* Slurm may have reaped it, or be another process here (contain_spank). */
	while (waitpid(state.keeper, NULL, 0) < 0 && errno == EINTR)
		;
	state.keeper = 0;
}

/* ---- the task ---- */

/*
 * Has the agent make the cgroup and put this process there. Not earlier: slurmstepd places its tasks while they are in
 * task_init_privileged.
 */
bool delegate_enter(struct join *join)
{
	struct wire_in *reply = malloc(sizeof(*reply));
	struct wire_out request;
	const char *status, *text;
	int error;

	if (join->cgroup_fd < 0) {
		free(reply);
		return true;
	}
	wire_begin(&request, "delegate");
	error = reply == NULL ? -ENOMEM : wire_send(join->cgroup_fd, &request, -1);
	if (error == 0)
		error = wire_receive(join->cgroup_fd, reply, ANSWER_MS);
	wire_free(&request);
	close(join->cgroup_fd);
	join->cgroup_fd = -1;
	if (error != 0) {
		report_keep(OPTION ": no answer from the agent (%s) on %s", strerror(-error), report_node());
		free(reply);
		return false;
	}
	status = wire_get(reply, "status");
	text = wire_get(reply, "text");
	join->delegated = status != NULL && strcmp(status, "ok") == 0;
	if (!join->delegated)
		report_keep_hint(text != NULL ? text : OPTION ": refused", wire_get(reply, "hint"));
	wire_close_fds(reply);
	free(reply);
	return join->delegated;
}

/*
 * Over the mount of the step's cgroup. mount(2) refuses that (EBUSY): it is of the same file system
 * (fs/namespace.c, do_add_mount).
 */
static bool mount_cgroups(void)
{
	int context = (int)syscall(SYS_fsopen, "cgroup2", FSOPEN_CLOEXEC), mount_fd = -1, error;
	bool done = context >= 0 && syscall(SYS_fsconfig, context, FSCONFIG_CMD_CREATE, NULL, NULL, 0) == 0;

	if (done)
		mount_fd = (int)syscall(SYS_fsmount, context, FSMOUNT_CLOEXEC,
					MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC);
	done = mount_fd >= 0 &&
	       syscall(SYS_move_mount, mount_fd, "", AT_FDCWD, "/sys/fs/cgroup", MOVE_MOUNT_F_EMPTY_PATH) == 0;
	error = errno;
	if (mount_fd >= 0)
		close(mount_fd);
	if (context >= 0)
		close(context);
	errno = error;
	return done;
}

/* /sys/fs/cgroup as the task's own cgroup namespace has it; its mounts are the task's own from here on. */
bool delegate_mount(const struct join *join)
{
	if (!join->delegated || (unshare(CLONE_NEWNS) == 0 && mount_cgroups()))
		return true;
	report_keep(OPTION ": cannot mount /sys/fs/cgroup (%s) on %s", strerror(errno), report_node());
	return false;
}
