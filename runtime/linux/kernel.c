/* System calls that Python's os module does not have: mounts, namespaces, credentials, loop devices.
 *
 * What has to be one step (no Python between its halves) is one function here; everything else is one
 * call each, and the Python files beside this one put them together. Structures and numbers that the C
 * library's headers may be too old for are defined here. Nothing here allocates or keeps state. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/loop.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/fsuid.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

#include "kernel.h"

/* The same numbers on every architecture, include/uapi/asm-generic/unistd.h. */
#ifndef SYS_open_tree
#define SYS_open_tree 428
#define SYS_move_mount 429
#define SYS_fsopen 430
#define SYS_fsconfig 431
#define SYS_fsmount 432
#endif
#ifndef SYS_close_range
#define SYS_close_range 436
#endif
#ifndef SYS_openat2
#define SYS_openat2 437
#endif
#ifndef SYS_mount_setattr
#define SYS_mount_setattr 442
#endif

/* struct mount_attr and struct open_how of the kernel, under names that no header can take. */
struct tree_attributes {
	uint64_t set;
	uint64_t clear;
	uint64_t propagation;
	uint64_t userns_fd;
};

struct open_request {
	uint64_t flags;
	uint64_t mode;
	uint64_t resolve;
};

/* MOUNT_ATTR_IDMAP, linux/mount.h from 5.12. */
static const uint64_t attribute_idmap = 0x00100000;
/* FSOPEN_CLOEXEC and FSMOUNT_CLOEXEC. */
static const unsigned int fs_cloexec = 1;

int enclos_fsopen(const char *fstype)
{
	return (int)syscall(SYS_fsopen, fstype, fs_cloexec);
}

int enclos_fsconfig(int fs_fd, unsigned int command, const char *key, const char *value, int aux)
{
	return (int)syscall(SYS_fsconfig, fs_fd, command, key, value, aux);
}

int enclos_fsmount(int fs_fd, unsigned int attributes)
{
	return (int)syscall(SYS_fsmount, fs_fd, fs_cloexec, attributes);
}

int enclos_open_tree(int dir_fd, const char *path, unsigned int flags)
{
	return (int)syscall(SYS_open_tree, dir_fd, path, flags);
}

int enclos_move_mount(int from_fd, const char *from, int to_fd, const char *to, unsigned int flags)
{
	return (int)syscall(SYS_move_mount, from_fd, from, to_fd, to, flags);
}

int enclos_mount_setattr(int fd, const char *path, unsigned int flags, uint64_t set, uint64_t clear,
			 uint64_t propagation, int userns_fd)
{
	struct tree_attributes attributes = {
		.set = set,
		.clear = clear,
		.propagation = propagation,
	};

	if (userns_fd >= 0) {
		attributes.set |= attribute_idmap;
		attributes.userns_fd = (uint64_t)userns_fd;
	}
	return (int)syscall(SYS_mount_setattr, fd, path, flags, &attributes, sizeof(attributes));
}

int enclos_mount(const char *source, const char *target, const char *fstype, unsigned long flags)
{
	return (int)syscall(SYS_mount, source, target, fstype, flags, NULL);
}

int enclos_umount(const char *path, int flags)
{
	return (int)syscall(SYS_umount2, path, flags);
}

int enclos_pivot_root(const char *new_root, const char *old_root)
{
	return (int)syscall(SYS_pivot_root, new_root, old_root);
}

int enclos_openat2(int dir_fd, const char *path, uint64_t flags, uint64_t mode, uint64_t resolve)
{
	struct open_request how = {.flags = flags, .mode = mode, .resolve = resolve};

	return (int)syscall(SYS_openat2, dir_fd, path, &how, sizeof(how));
}

/* A new user namespace is a change of credentials: it sets the dumpable flag to fs.suid_dumpable, which a
 * site may have set to 1. Who was not dumpable before stays so. */
static int stay_undumpable(int before)
{
	return before == 0 ? prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) : 0;
}

int enclos_setns(int fd, int nstype)
{
	int dumpable = prctl(PR_GET_DUMPABLE, 0, 0, 0, 0);

	return setns(fd, nstype) == 0 ? stay_undumpable(dumpable) : -1;
}

int enclos_unshare(int flags)
{
	int dumpable = prctl(PR_GET_DUMPABLE, 0, 0, 0, 0);

	return unshare(flags) == 0 ? stay_undumpable(dumpable) : -1;
}

/* A map is one write: the kernel takes no second one. */
static int write_map(pid_t pid, const char *name, const char *text)
{
	char path[64];
	size_t length = strlen(text);
	ssize_t written;
	int fd;
	int error;

	snprintf(path, sizeof(path), "/proc/%d/%s", (int)pid, name);
	fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		return -1;
	written = write(fd, text, length);
	error = errno;
	close(fd);
	if (written == (ssize_t)length)
		return 0;
	errno = written < 0 ? error : EIO;
	return -1;
}

/* The namespace of a child that waits for the end of a pipe. If this process is killed in between, the
 * pipe ends too. Exit signal 0: a SIGCHLD handler of the caller hears nothing of it. The child is a raw
 * clone and makes only raw system calls, so that threads of the caller do not matter. */
int enclos_userns_with_map(const char *uid_map, const char *gid_map)
{
	char path[64];
	char byte;
	int pipe_fds[2];
	int fd = -1;
	int error;
	pid_t pid;

	if (pipe2(pipe_fds, O_CLOEXEC) < 0)
		return -1;
	pid = (pid_t)syscall(SYS_clone, (unsigned long)CLONE_NEWUSER, NULL, NULL, NULL, 0UL);
	if (pid == 0) {
		syscall(SYS_close, pipe_fds[1]);
		while (syscall(SYS_read, pipe_fds[0], &byte, 1UL) < 0 && errno == EINTR)
			;
		syscall(SYS_exit_group, 0);
	}
	error = errno;
	close(pipe_fds[0]);
	if (pid < 0) {
		close(pipe_fds[1]);
		errno = error;
		return -1;
	}
	if (write_map(pid, "uid_map", uid_map) == 0 && write_map(pid, "gid_map", gid_map) == 0) {
		snprintf(path, sizeof(path), "/proc/%d/ns/user", (int)pid);
		fd = open(path, O_RDONLY | O_CLOEXEC);
	}
	error = errno;
	close(pipe_fds[1]);
	while (waitpid(pid, NULL, __WALL) < 0 && errno == EINTR)
		;
	errno = error;
	return fd;
}

int enclos_close_range(unsigned int first, unsigned int last)
{
	return (int)syscall(SYS_close_range, first, last, 0U);
}

int enclos_prctl(int option, unsigned long a, unsigned long b, unsigned long c, unsigned long d)
{
	return prctl(option, a, b, c, d);
}

int enclos_capset(uint64_t effective, uint64_t permitted, uint64_t inheritable)
{
	struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3, .pid = 0};
	struct __user_cap_data_struct data[_LINUX_CAPABILITY_U32S_3];
	unsigned int word;

	for (word = 0; word < _LINUX_CAPABILITY_U32S_3; word++) {
		data[word].effective = (uint32_t)(effective >> (32 * word));
		data[word].permitted = (uint32_t)(permitted >> (32 * word));
		data[word].inheritable = (uint32_t)(inheritable >> (32 * word));
	}
	return (int)syscall(SYS_capset, &header, data);
}

int enclos_capget(uint64_t *effective, uint64_t *permitted, uint64_t *inheritable)
{
	struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3, .pid = 0};
	struct __user_cap_data_struct data[_LINUX_CAPABILITY_U32S_3];

	if (syscall(SYS_capget, &header, data) < 0)
		return -1;
	*effective = data[0].effective | (uint64_t)data[1].effective << 32;
	*permitted = data[0].permitted | (uint64_t)data[1].permitted << 32;
	*inheritable = data[0].inheritable | (uint64_t)data[1].inheritable << 32;
	return 0;
}

/* setfsuid() reports no failure: only asking again (with an impossible id) tells. */
int enclos_set_filesystem_ids(uint32_t uid, uint32_t gid)
{
	setfsgid(gid);
	setfsuid(uid);
	if ((uint32_t)setfsgid((gid_t)-1) == gid && (uint32_t)setfsuid((uid_t)-1) == uid)
		return 0;
	errno = EPERM;
	return -1;
}

/* The raw calls: glibc's would signal every thread of the process, and its builder has only this one. */
int enclos_become(uint32_t uid, uint32_t gid, const uint32_t *groups, size_t count, uint64_t capabilities)
{
	if (prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0) < 0)
		return -1;
	if (syscall(SYS_setgroups, count, groups) < 0)
		return -1;
	if (syscall(SYS_setresgid, gid, gid, gid) < 0)
		return -1;
	if (syscall(SYS_setresuid, uid, uid, uid) < 0)
		return -1;
	/* The change of uid set the flag to fs.suid_dumpable. Until here, and as long as one capability
	 * is left, the kernel lets no process with fewer capabilities look into this one. */
	if (prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) < 0)
		return -1;
	if (prctl(PR_SET_KEEPCAPS, 0, 0, 0, 0) < 0)
		return -1;
	return enclos_capset(capabilities, capabilities, 0);
}

/* Leave the session keyring that was inherited for an empty one (keyctl(2), KEYCTL_JOIN_SESSION_KEYRING). */
int enclos_new_session_keyring(void)
{
	return syscall(SYS_keyctl, 1, NULL) < 0 ? -1 : 0;
}

/* How many supplementary groups the peer of a unix socket had when it connected; ERANGE when there are more. */
int enclos_peer_groups(int socket_fd, uint32_t *groups, unsigned int capacity)
{
	socklen_t size = capacity * sizeof(*groups);

	if (getsockopt(socket_fd, SOL_SOCKET, SO_PEERGROUPS, groups, &size) < 0)
		return -1;
	return (int)(size / sizeof(*groups));
}

int enclos_seccomp(const void *program, size_t count)
{
	struct sock_fprog prog = {.len = (unsigned short)count, .filter = (struct sock_filter *)program};

	if (count == 0 || count > BPF_MAXINSNS) {
		errno = EINVAL;
		return -1;
	}
	return prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, (unsigned long)&prog, 0, 0);
}

int enclos_loop_free(int control_fd)
{
	return ioctl(control_fd, LOOP_CTL_GET_FREE);
}

int enclos_loop_configure(int loop_fd, int file_fd, const char *name, uint64_t offset, uint64_t size, int writable)
{
	struct loop_config config = {
		.fd = (uint32_t)file_fd,
		.info = {.lo_flags = (writable ? 0 : LO_FLAGS_READ_ONLY) | LO_FLAGS_AUTOCLEAR,
			 .lo_offset = offset,
			 .lo_sizelimit = size},
	};

	snprintf((char *)config.info.lo_file_name, sizeof(config.info.lo_file_name), "%s", name);
	return ioctl(loop_fd, LOOP_CONFIGURE, &config);
}

int enclos_inotify(const char *path, uint32_t events)
{
	int fd = inotify_init1(IN_CLOEXEC);

	if (fd < 0 || inotify_add_watch(fd, path, events) >= 0)
		return fd;
	close(fd);
	return -1;
}
