/*
 * How a task gets into its container: the answer to JOIN, the namespaces, and what the task gives up last.
 *
 * join_wait() and join_network() run as root in task_init_privileged, all others as the user in task_init. From the
 * mount namespace on nothing here may look up a user, a locale or a library: the files that answered would be the
 * image's, and this process still holds slurmstepd's memory.
 */
#define _GNU_SOURCE
#include "enclos.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* The agent has deadlines of its own and says `progress` while an image is imported; this is for a stopped agent. */
#define SILENCE_MS (600 * 1000)
#define FILTER_LIMIT 4096 /* instructions; the kernel's own limit (BPF_MAXINSNS) */

static const int deadly_signals[] = { SIGTERM, SIGINT, SIGHUP, SIGQUIT, 0 };

struct signals {
	sigset_t mask;
	struct sigaction actions[4];
	char name[16];
};

/*
 * slurmstepd blocks these signals until later, and throws pending ones away when it unblocks them. While a task waits
 * for its container they must end it: scancel and Ctrl-C have to work here too. The name has to change as well:
 * proctrack/linuxproc signals no process that is called like slurmstepd itself, not even with SIGKILL.
 */
static void signals_make_deadly(struct signals *saved)
{
	struct sigaction deadly = { .sa_handler = SIG_DFL };
	sigset_t set;

	sigemptyset(&set);
	sigemptyset(&deadly.sa_mask);
	for (int i = 0; deadly_signals[i] != 0; i++) {
		sigaction(deadly_signals[i], &deadly, &saved->actions[i]);
		sigaddset(&set, deadly_signals[i]);
	}
	sigprocmask(SIG_UNBLOCK, &set, &saved->mask);
	prctl(PR_GET_NAME, saved->name);
	prctl(PR_SET_NAME, "enclos-task");
}

static void signals_restore(const struct signals *saved)
{
	prctl(PR_SET_NAME, saved->name);
	sigprocmask(SIG_SETMASK, &saved->mask, NULL);
	for (int i = 0; deadly_signals[i] != 0; i++)
		sigaction(deadly_signals[i], &saved->actions[i], NULL);
}

static void keep_wire_error(int error)
{
	const char *node = report_node();
	char text[PATH_MAX + 256];

	if (error == -ECONNRESET || error == -EPIPE) {
		snprintf(text, sizeof(text), "%s: the agent ended while the container was being made on %s",
			 options_subject(), node);
		report_keep_hint(text, "run the step again; administrator: journalctl -u enclosd");
	} else if (error == -ETIMEDOUT) {
		report_keep("%s: no answer from the agent on %s", options_subject(), node);
	} else {
		report_keep("%s: cannot use the agent's answer (%s) on %s", options_subject(),
			    strerror(-error), node);
	}
}

static void show_notices(const struct wire_in *reply)
{
	const char *key, *value;
	size_t cursor = 0;

	while (wire_next(reply, &cursor, &key, &value)) {
		if (strncmp(key, "notice=", 7) == 0)
			slurm_spank_log("enclos: %s", value);
	}
}

static bool take_filter(struct join *join)
{
	int fd = wire_take_fd(join->reply, "seccomp");
	struct stat status;
	bool whole;

	if (fd < 0)
		return true;
	whole = fstat(fd, &status) == 0 && status.st_size > 0 && status.st_size % sizeof(struct sock_filter) == 0 &&
		(size_t)status.st_size <= FILTER_LIMIT * sizeof(struct sock_filter);
	if (whole) {
		join->filter_bytes = (size_t)status.st_size;
		join->filter = malloc(join->filter_bytes);
		whole = join->filter != NULL &&
			pread(fd, join->filter, join->filter_bytes, 0) == (ssize_t)join->filter_bytes;
	}
	close(fd);
	if (!whole)
		report_keep("%s: cannot read the system call filter on %s", options_subject(),
			    report_node());
	return whole;
}

static bool take_answer(struct join *join, struct wire_in *reply)
{
	const char *status = wire_get(reply, "status");

	if (status == NULL || strcmp(status, "ok") != 0) {
		const char *text = wire_get(reply, "text");

		report_keep_hint(text != NULL ? text : "the agent refused the container without a reason",
				 wire_get(reply, "hint"));
		return false;
	}
	join->reply = reply;
	join->user_fd = wire_take_fd(reply, "user");
	join->mnt_fd = wire_take_fd(reply, "mnt");
	join->ipc_fd = wire_take_fd(reply, "ipc");
	join->uts_fd = wire_take_fd(reply, "uts");
	join->entrypoint_fd = wire_take_fd(reply, "entrypoint");
	join->save_fd = wire_take_fd(reply, "save");
	join->cgroup_fd = wire_take_fd(reply, "cgroup");
	if (join->user_fd < 0 || join->mnt_fd < 0) {
		report_keep("%s: the agent's answer has no namespaces on %s", options_subject(),
			    report_node());
		return false;
	}
	return take_filter(join);
}

/* Waits for the last reply, showing the lines before it. Returns 0 or -errno. */
static int receive_final(int fd, struct wire_in *reply, bool show)
{
	int error;

	for (;;) {
		const char *status, *text;

		error = wire_receive(fd, reply, SILENCE_MS);
		if (error != 0)
			return error;
		status = wire_get(reply, "status");
		if (status == NULL || strcmp(status, "progress") != 0)
			return 0;
		text = wire_get(reply, "text");
		if (show && text != NULL)
			slurm_spank_log("enclos: %s", text);
		wire_close_fds(reply);
	}
}

/*
 * Sends JOIN with the task's mount namespace and waits for the container. Returns false with the error kept. The
 * descriptors that `join` then owns are close-on-exec.
 */
bool join_wait(struct join *join, int fd, const struct wire_out *request, bool show)
{
	struct wire_in *reply = malloc(sizeof(*reply));
	int mount_fd = open("/proc/self/ns/mnt", O_RDONLY | O_CLOEXEC);
	struct signals saved;
	int error;

	*join = (struct join){ .user_fd = -1, .mnt_fd = -1, .ipc_fd = -1, .uts_fd = -1, .save_fd = -1, .entrypoint_fd = -1, .cgroup_fd = -1 };
	error = reply == NULL ? -ENOMEM : wire_send(fd, request, mount_fd);
	if (mount_fd >= 0)
		close(mount_fd);
	if (error == 0) {
		signals_make_deadly(&saved);
		error = receive_final(fd, reply, show);
		signals_restore(&saved);
	}
	if (error != 0) {
		keep_wire_error(error);
		free(reply);
		return false;
	}
	if (show)
		show_notices(reply);
	if (take_answer(join, reply))
		return true;
	wire_close_fds(reply);
	return false;
}

static bool enter(int *fd, int type, const char *name)
{
	int error = 0;

	if (*fd < 0)
		return true;
	if (setns(*fd, type) < 0)
		error = errno;
	close(*fd);
	*fd = -1;
	if (error != 0)
		report_keep("%s: cannot join the container's %s namespace (%s) on %s",
			    options_subject(), name, strerror(error), report_node());
	return error == 0;
}

/*
 * The network is joined while the task is root: it belongs to the initial user namespace, so that not even root inside
 * the container has power over it. What else the agent sent is closed here.
 */
bool join_network(struct join *join)
{
	int net_fd = wire_take_fd(join->reply, "net");
	bool entered = enter(&net_fd, CLONE_NEWNET, "network");

	wire_close_fds(join->reply);
	/* Slurm's log writes local time: the zone is read here, not from the image. */
	tzset();
	return entered;
}

static void set_variable(spank_t spank, const char *field, int overwrite)
{
	char name[256];
	size_t length = strcspn(field, "=");

	if (field[length] != '=' || length == 0 || length >= sizeof(name))
		return;
	memcpy(name, field, length);
	name[length] = '\0';
	spank_setenv(spank, name, field + length + 1, overwrite);
}

/* Applies `set`, `default` and `unset`, in their order. */
void join_environment(struct join *join, spank_t spank)
{
	const char *key, *value;
	size_t cursor = 0;

	while (wire_next(join->reply, &cursor, &key, &value)) {
		if (strncmp(key, "set=", 4) == 0)
			set_variable(spank, value, 1);
		else if (strncmp(key, "default=", 8) == 0)
			set_variable(spank, value, 0);
		else if (strncmp(key, "unset=", 6) == 0)
			spank_unsetenv(spank, value);
	}
}

/*
 * slurmstepd's sockets are of the node's network. Slurm's PMIx plugin leaves a listening one to the program, which
 * could take connections by it, or give it up and connect to anywhere: no network that the step asked for would hold.
 * PMI-2's is a unix socket and stays, as do the standard descriptors, whatever they are.
 */
static bool forget_node_sockets(void)
{
	DIR *directory = opendir("/proc/self/fd");
	struct dirent *entry;

	if (directory == NULL) {
		report_keep("%s: cannot list the task's descriptors (%s) on %s", options_subject(),
			    strerror(errno), report_node());
		return false;
	}
	while ((entry = readdir(directory)) != NULL) {
		int fd = atoi(entry->d_name), domain;
		socklen_t length = sizeof(domain);

		if (fd > STDERR_FILENO && getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &length) == 0 &&
		    domain != AF_UNIX)
			fcntl(fd, F_SETFD, FD_CLOEXEC);
	}
	closedir(directory);
	return true;
}

/*
 * The user namespace comes first: it gives the power to join the others. The cgroup namespace is made here, by each
 * task, because it is rooted where its maker stands, and only now has Slurm placed the task.
 */
bool join_container(struct join *join)
{
	if (!forget_node_sockets() || !delegate_enter(join) || !enter(&join->user_fd, CLONE_NEWUSER, "user") ||
	    !enter(&join->mnt_fd, CLONE_NEWNS, "mount") || !enter(&join->ipc_fd, CLONE_NEWIPC, "ipc") ||
	    !enter(&join->uts_fd, CLONE_NEWUTS, "uts"))
		return false;
	if (unshare(CLONE_NEWCGROUP) < 0 && errno != EINVAL) {
		report_keep("%s: cannot make a cgroup namespace (%s) on %s", options_subject(),
			    strerror(errno), report_node());
		return false;
	}
	return delegate_mount(join);
}

/* setns(CLONE_NEWUSER) fills the bounding set again, so this comes after it. */
static bool drop_capabilities(unsigned long long keep)
{
	struct __user_cap_header_struct header = { .version = _LINUX_CAPABILITY_VERSION_3 };
	struct __user_cap_data_struct data[2] = { 0 };

	for (unsigned long capability = 0; capability < 64; capability++) {
		if (keep & (1ULL << capability))
			continue;
		if (prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) < 0 && errno != EINVAL)
			return false;
	}
	if (prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) < 0)
		return false;
	/* With no_new_privs an exec as root of the container keeps of these what the bounding set has, and adds none. */
	for (int i = 0; i < 2; i++) {
		data[i].permitted = (unsigned int)(keep >> (32 * i));
		data[i].effective = data[i].permitted;
	}
	return syscall(SYS_capset, &header, data) == 0;
}

static bool install_filter(struct join *join)
{
	struct sock_fprog program = { .len = (unsigned short)(join->filter_bytes / sizeof(struct sock_filter)),
				      .filter = join->filter };

	return join->filter == NULL || syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program) == 0;
}

static unsigned long long kept_capabilities(const struct join *join)
{
	const char *mask = wire_get(join->reply, "keep_caps");
	char *end;
	unsigned long long value;

	if (mask == NULL || mask[0] == '\0')
		return 0;
	errno = 0;
	value = strtoull(mask, &end, 16);
	return errno == 0 && *end == '\0' ? value : 0;
}

/* An empty working directory means the root: the host's, which the task still has, must not stay reachable. */
static bool enter_workdir(const struct join *join)
{
	const char *workdir = wire_get(join->reply, "workdir");

	if (workdir == NULL || workdir[0] == '\0')
		workdir = "/";
	if (chdir(workdir) == 0)
		return true;
	report_keep("--container-workdir=%s: cannot enter the directory in the container (%s) on %s", workdir,
		    strerror(errno), report_node());
	return false;
}

/* Gives up what the user must not have inside. The working directory is entered with the user's own rights. */
bool join_confine(struct join *join)
{
	const char *what = NULL;

	if (!drop_capabilities(kept_capabilities(join)))
		what = "drop capabilities";
	else if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
		what = "set no_new_privs";
	else if (!enter_workdir(join))
		return false;
	else if (!install_filter(join))
		what = "install the system call filter";
	if (what != NULL)
		report_keep("%s: cannot %s (%s) on %s", options_subject(), what, strerror(errno),
			    report_node());
	return what == NULL;
}

/* ---- the command ---- */

static bool is_file(const char *path)
{
	struct stat status;

	return stat(path, &status) == 0 && !S_ISDIR(status.st_mode);
}

/* As slurmstepd will look: absolute and ./names as they are, others along PATH, at last as they are. */
static const char *find_file(spank_t spank, const char *command, char *path, size_t size)
{
	static char directories[65536];
	char *rest = directories, *directory;

	if (command[0] == '/' || command[0] == '.')
		return command;
	if (spank_getenv(spank, "PATH", directories, sizeof(directories)) != ESPANK_SUCCESS)
		return command;
	while ((directory = strsep(&rest, ":")) != NULL) {
		if (directory[0] == '\0')
			continue;
		if (snprintf(path, size, "%s/%s", directory, command) < (int)size && is_file(path))
			return path;
	}
	return command;
}

/*
 * Is the step's command there? slurmstepd's own words ("execve(): x: No such file or directory") do not say where it
 * looked. Returns false with the error kept.
 */
bool join_find_command(spank_t spank)
{
	char path[PATH_MAX];
	const char *file;
	char **arguments;
	int count;

	if (spank_get_item(spank, S_JOB_ARGV, &count, &arguments) != ESPANK_SUCCESS || count < 1)
		return true;
	/* --multi-prog: the second argument is the text of the file that names each task's command. */
	if (count > 1 && strchr(arguments[1], '\n') != NULL)
		return true;
	file = find_file(spank, arguments[0], path, sizeof(path));
	if (access(file, F_OK) < 0 && (errno == ENOENT || errno == ENOTDIR)) {
		report_keep("%s: command not found in the container on %s", arguments[0], report_node());
		return false;
	}
	mpi_check(spank, file);
	return true;
}
