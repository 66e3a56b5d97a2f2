/* The wire between shim and agent; see wire.h. */
#define _GNU_SOURCE
#include "wire.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

static bool wire_reserve(struct wire_out *out, size_t more)
{
	size_t size = out->size ? out->size : 4096;
	char *data;

	if (out->error != 0)
		return false;
	if (more > WIRE_LIMIT - out->used) {
		out->error = EMSGSIZE;
		return false;
	}
	while (size < out->used + more)
		size *= 2;
	if (size == out->size)
		return true;
	data = realloc(out->data, size);
	if (data == NULL) {
		out->error = ENOMEM;
		return false;
	}
	out->data = data;
	out->size = size;
	return true;
}

void wire_begin(struct wire_out *out, const char *verb)
{
	*out = (struct wire_out){ 0 };
	wire_add_number(out, "version", WIRE_VERSION);
	wire_add_number(out, "oldest", WIRE_OLDEST);
	wire_add(out, "verb", verb);
}

/* Adds one field; a NULL value adds nothing, so that absent facts need no test at the caller. */
void wire_add(struct wire_out *out, const char *key, const char *value)
{
	size_t key_length = strlen(key), value_length;

	if (value == NULL)
		return;
	value_length = strlen(value);
	/* Checked before they are added up: the value is the user's, of any length. */
	if (value_length > WIRE_LIMIT || key_length > WIRE_LIMIT) {
		out->error = out->error ? out->error : EMSGSIZE;
		return;
	}
	if (!wire_reserve(out, key_length + value_length + 2))
		return;
	memcpy(out->data + out->used, key, key_length);
	out->data[out->used + key_length] = '=';
	memcpy(out->data + out->used + key_length + 1, value, value_length + 1);
	out->used += key_length + value_length + 2;
}

void wire_add_number(struct wire_out *out, const char *key, unsigned long long value)
{
	char text[24];

	snprintf(text, sizeof(text), "%llu", value);
	wire_add(out, key, text);
}

/* Adds all fields of another message under construction, and its error. */
void wire_append(struct wire_out *out, const struct wire_out *fields)
{
	if (fields->error != 0 && out->error == 0)
		out->error = fields->error;
	if (fields->used == 0 || !wire_reserve(out, fields->used))
		return;
	memcpy(out->data + out->used, fields->data, fields->used);
	out->used += fields->used;
}

void wire_free(struct wire_out *out)
{
	free(out->data);
	*out = (struct wire_out){ 0 };
}

/*
 * Connects to the agent. A unix socket's connect() blocks while the backlog is full; it obeys the send timeout, so a
 * stopped agent cannot hold a step longer than that. Returns a close-on-exec descriptor, or -errno.
 */
int wire_connect(const char *path, int timeout_s)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	struct timeval timeout = { .tv_sec = timeout_s };
	struct ucred peer;
	socklen_t length = sizeof(peer);
	int fd, error;

	if (strlen(path) >= sizeof(address.sun_path))
		return -ENAMETOOLONG;
	memcpy(address.sun_path, path, strlen(path) + 1);
	fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return -errno;
	if (setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof(timeout)) < 0 ||
	    connect(fd, (const struct sockaddr *)&address, sizeof(address)) < 0 ||
	    getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &length) < 0) {
		error = errno == EAGAIN ? ETIMEDOUT : errno;
		close(fd);
		return -error;
	}
	/* The folder belongs to root; this holds also where an administrator put the socket elsewhere. */
	if (peer.uid != 0) {
		close(fd);
		return -EPERM;
	}
	return fd;
}

/* Sends a request as one packet, with one descriptor if attached_fd is not negative. Returns 0 or -errno. */
int wire_send(int fd, const struct wire_out *out, int attached_fd)
{
	union {
		char space[CMSG_SPACE(sizeof(int))];
		struct cmsghdr align;
	} control = { 0 };
	struct iovec part = { .iov_base = out->data, .iov_len = out->used };
	struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1 };
	ssize_t sent;

	if (out->error != 0)
		return -out->error;
	if (attached_fd >= 0) {
		struct cmsghdr *header;

		message.msg_control = control.space;
		message.msg_controllen = sizeof(control.space);
		header = CMSG_FIRSTHDR(&message);
		header->cmsg_level = SOL_SOCKET;
		header->cmsg_type = SCM_RIGHTS;
		header->cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(header), &attached_fd, sizeof(int));
	}
	do {
		sent = sendmsg(fd, &message, MSG_NOSIGNAL);
	} while (sent < 0 && errno == EINTR);
	if (sent < 0)
		return errno == EAGAIN ? -ETIMEDOUT : -errno;
	return (size_t)sent == out->used ? 0 : -EMSGSIZE;
}

static long long now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000LL + now.tv_nsec / 1000000;
}

/* Waits until a packet, or the end of the connection, is there. Returns 0 or -errno. */
static int wire_wait(int fd, int timeout_ms)
{
	struct pollfd wanted = { .fd = fd, .events = POLLIN };
	long long deadline = now_ms() + timeout_ms;
	int ready;

	do {
		long long left = deadline - now_ms();

		ready = poll(&wanted, 1, left > 0 ? (int)left : 0);
	} while (ready < 0 && errno == EINTR);
	if (ready < 0)
		return -errno;
	return ready == 0 ? -ETIMEDOUT : 0;
}

static void wire_collect_fds(struct wire_in *in, struct msghdr *message)
{
	struct cmsghdr *header;

	for (header = CMSG_FIRSTHDR(message); header != NULL; header = CMSG_NXTHDR(message, header)) {
		size_t count, i;

		if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS)
			continue;
		count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
		for (i = 0; i < count; i++) {
			int fd;

			memcpy(&fd, CMSG_DATA(header) + i * sizeof(int), sizeof(int));
			if (in->fd_count < WIRE_FDS)
				in->fds[in->fd_count++] = fd;
			else
				close(fd);
		}
	}
}

/*
 * Receives and checks one reply. Returns 0, or -errno: -ECONNRESET if the agent ended the connection, -ETIMEDOUT,
 * -EBADMSG or -EPROTONOSUPPORT for a reply that cannot be used. After an error no descriptor is left open.
 */
int wire_receive(int fd, struct wire_in *in, int timeout_ms)
{
	union {
		char space[CMSG_SPACE(WIRE_FDS * sizeof(int))];
		struct cmsghdr align;
	} control = { 0 };
	struct iovec part = { .iov_base = in->data, .iov_len = sizeof(in->data) };
	struct msghdr message = { .msg_iov = &part,
				  .msg_iovlen = 1,
				  .msg_control = control.space,
				  .msg_controllen = sizeof(control.space) };
	ssize_t received;
	int error;

	in->used = 0;
	in->fd_count = 0;
	error = wire_wait(fd, timeout_ms);
	if (error != 0)
		return error;
	do {
		received = recvmsg(fd, &message, MSG_CMSG_CLOEXEC);
	} while (received < 0 && errno == EINTR);
	if (received < 0)
		return -errno;
	wire_collect_fds(in, &message);
	in->used = (size_t)received;
	if (received == 0)
		error = -ECONNRESET;
	else if (message.msg_flags & (MSG_TRUNC | MSG_CTRUNC))
		error = -EBADMSG;
	else
		error = wire_check(in);
	if (error != 0) {
		wire_close_fds(in);
		in->used = 0;
	}
	return error;
}

static unsigned int count_names(const char *names)
{
	unsigned int count = 1;

	if (names == NULL || names[0] == '\0')
		return 0;
	for (; *names != '\0'; names++)
		count += *names == ',';
	return count;
}

/* Is the packet made of whole KEY=VALUE fields, of a version we speak, with as many descriptors as names? */
int wire_check(struct wire_in *in)
{
	const char *version;
	size_t start = 0;
	char *end;
	long number;

	if (in->used == 0 || in->used > sizeof(in->data) || in->data[in->used - 1] != '\0')
		return -EBADMSG;
	while (start < in->used) {
		const char *field = in->data + start;
		const char *equals = strchr(field, '=');

		if (equals == NULL || equals == field)
			return -EBADMSG;
		start += strlen(field) + 1;
	}
	version = wire_get(in, "version");
	if (version == NULL || strncmp(in->data, "version=", 8) != 0)
		return -EBADMSG;
	number = strtol(version, &end, 10);
	if (end == version || *end != '\0')
		return -EBADMSG;
	if (number < WIRE_OLDEST || number > WIRE_VERSION)
		return -EPROTONOSUPPORT;
	return count_names(wire_get(in, "fds")) == in->fd_count ? 0 : -EBADMSG;
}

/*
 * Steps through the fields of a checked reply; start with *cursor = 0. Key and value point into the reply; the key
 * is not ended by NUL but by '=', so compare it with wire_key_is() style prefixes: key[0..value - key - 1).
 */
bool wire_next(const struct wire_in *in, size_t *cursor, const char **key, const char **value)
{
	if (*cursor >= in->used)
		return false;
	*key = in->data + *cursor;
	*value = strchr(*key, '=') + 1;
	*cursor += strlen(*key) + 1;
	return true;
}

/* The first value of a key, or NULL. */
const char *wire_get(const struct wire_in *in, const char *key)
{
	const char *found, *value;
	size_t cursor = 0, length = strlen(key);

	while (wire_next(in, &cursor, &found, &value)) {
		if ((size_t)(value - found) == length + 1 && memcmp(found, key, length) == 0)
			return value;
	}
	return NULL;
}

/* Hands the descriptor of that name over to the caller, who closes it; -1 if there is none, or it was taken. */
int wire_take_fd(struct wire_in *in, const char *name)
{
	const char *names = wire_get(in, "fds");
	size_t length = strlen(name);
	unsigned int i;

	for (i = 0; names != NULL && i < in->fd_count; i++) {
		size_t this_length = strcspn(names, ",");

		if (this_length == length && memcmp(names, name, length) == 0) {
			int fd = in->fds[i];

			in->fds[i] = -1;
			return fd;
		}
		names += this_length + (names[this_length] == ',');
	}
	return -1;
}

void wire_close_fds(struct wire_in *in)
{
	unsigned int i;

	for (i = 0; i < in->fd_count; i++) {
		if (in->fds[i] >= 0)
			close(in->fds[i]);
	}
	in->fd_count = 0;
}
