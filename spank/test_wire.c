/*
 * Tests of wire.c under the address and undefined behaviour sanitizers: no Slurm, no agent, no root.
 *
 * Every reply goes over a real SOCK_SEQPACKET socket, as the agent's does. After each the descriptors of the process
 * are counted: a refused reply must not leave one open.
 */
#define _GNU_SOURCE
#include "wire.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sanitizer/asan_interface.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#define ROUNDS 50000

static int failures;

static void expect(const char *what, long found, long wanted)
{
	if (found == wanted)
		return;
	fprintf(stderr, "%s: found %ld, wanted %ld\n", what, found, wanted);
	failures++;
}

static void expect_text(const char *what, const char *found, const char *wanted)
{
	if (found != NULL && wanted != NULL && strcmp(found, wanted) == 0)
		return;
	if (found == NULL && wanted == NULL)
		return;
	fprintf(stderr, "%s: found %s, wanted %s\n", what, found ? found : "nothing", wanted ? wanted : "nothing");
	failures++;
}

static int open_descriptors(void)
{
	DIR *folder = opendir("/proc/self/fd");
	int count = -1; /* the folder's own */

	if (folder == NULL)
		abort();
	while (readdir(folder) != NULL)
		count++;
	closedir(folder);
	return count;
}

static void send_packet(int fd, const char *data, size_t size, unsigned int fd_count)
{
	char control[CMSG_SPACE(64 * sizeof(int))] __attribute__((aligned(8))) = { 0 };
	struct iovec part = { .iov_base = (char *)data, .iov_len = size };
	struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1 };
	int null_fd = open("/dev/null", O_RDONLY | O_CLOEXEC);

	if (fd_count > 0) {
		struct cmsghdr *header = (struct cmsghdr *)control;

		message.msg_control = control;
		message.msg_controllen = CMSG_SPACE(fd_count * sizeof(int));
		header->cmsg_level = SOL_SOCKET;
		header->cmsg_type = SCM_RIGHTS;
		header->cmsg_len = CMSG_LEN(fd_count * sizeof(int));
		for (unsigned int i = 0; i < fd_count; i++)
			memcpy(CMSG_DATA(header) + i * sizeof(int), &null_fd, sizeof(int));
	}
	if (sendmsg(fd, &message, 0) != (ssize_t)size)
		abort();
	close(null_fd);
}

/* Sends a packet, receives it with wire_receive(), closes all, and counts descriptors. Returns its result. */
static int pass(struct wire_in *in, const char *data, size_t size, unsigned int fd_count)
{
	int pair[2], before = open_descriptors(), bytes = 1 << 20, result;

	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0)
		abort();
	setsockopt(pair[0], SOL_SOCKET, SO_SNDBUF, &bytes, sizeof(bytes));
	send_packet(pair[0], data, size, fd_count);
	result = wire_receive(pair[1], in, 1000);
	close(pair[0]);
	close(pair[1]);
	if (result != 0)
		expect("descriptors left after a refused reply", open_descriptors(), before);
	return result;
}

#define REPLY(text) text, sizeof(text) - 1

static void test_good_replies(struct wire_in *in)
{
	int fd;

	expect("plain", pass(in, REPLY("version=1\0status=ok\0"), 0), 0);
	expect_text("status", wire_get(in, "status"), "ok");
	expect_text("absent", wire_get(in, "stat"), NULL);
	expect("unknown keys", pass(in, REPLY("version=1\0new=thing\0status=ok\0text=a=b\0hint=\0"), 0), 0);
	expect_text("value with =", wire_get(in, "text"), "a=b");
	expect_text("empty value", wire_get(in, "hint"), "");
	expect("descriptors", pass(in, REPLY("version=1\0status=ok\0fds=net,newer,mnt\0"), 3), 0);
	fd = wire_take_fd(in, "mnt");
	expect("close-on-exec", fcntl(fd, F_GETFD), FD_CLOEXEC);
	close(fd);
	expect("taken twice", wire_take_fd(in, "mnt"), -1);
	expect("part of a name", wire_take_fd(in, "ne"), -1);
	expect("absent name", wire_take_fd(in, "uts"), -1);
	wire_close_fds(in);
}

static void test_bad_replies(struct wire_in *in)
{
	static char large[WIRE_LIMIT + 4096];

	expect("no NUL at the end", pass(in, REPLY("version=1\0status=ok"), 0), -EBADMSG);
	expect("no =", pass(in, REPLY("version=1\0status\0"), 0), -EBADMSG);
	expect("no key", pass(in, REPLY("version=1\0=ok\0"), 0), -EBADMSG);
	expect("empty field", pass(in, REPLY("version=1\0\0"), 0), -EBADMSG);
	expect("one NUL", pass(in, REPLY("\0"), 0), -EBADMSG);
	expect("no version", pass(in, REPLY("status=ok\0"), 0), -EBADMSG);
	expect("version not first", pass(in, REPLY("status=ok\0version=1\0"), 0), -EBADMSG);
	expect("version no number", pass(in, REPLY("version=1x\0"), 0), -EBADMSG);
	expect("newer version", pass(in, REPLY("version=2\0status=ok\0"), 0), -EPROTONOSUPPORT);
	expect("version 0", pass(in, REPLY("version=0\0status=ok\0"), 0), -EPROTONOSUPPORT);
	expect("more descriptors than names", pass(in, REPLY("version=1\0fds=net\0"), 2), -EBADMSG);
	expect("descriptors without names", pass(in, REPLY("version=1\0status=ok\0"), 1), -EBADMSG);
	expect("fewer descriptors than names", pass(in, REPLY("version=1\0fds=net,mnt\0"), 1), -EBADMSG);
	expect("too many descriptors", pass(in, REPLY("version=1\0status=ok\0"), WIRE_FDS + 8), -EBADMSG);
	memset(large, 'x', sizeof(large));
	memcpy(large, "version=1\0text=", 15);
	large[sizeof(large) - 1] = '\0';
	expect("too long", pass(in, large, sizeof(large), 1), -EBADMSG);
	large[WIRE_LIMIT - 1] = '\0';
	expect("just short enough", pass(in, large, WIRE_LIMIT, 0), 0);
}

static void test_ends(struct wire_in *in)
{
	int pair[2];

	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0)
		abort();
	expect("silence", wire_receive(pair[1], in, 20), -ETIMEDOUT);
	close(pair[0]);
	expect("end", wire_receive(pair[1], in, 1000), -ECONNRESET);
	close(pair[1]);
	expect("no socket", wire_connect("/nonexistent/agent.sock", 1), -ENOENT);
}

static void test_requests(void)
{
	static const char wanted[] = "version=1\0oldest=1\0verb=join\0job=7\0text=a\nb\0";
	struct wire_out out, facts = { 0 };
	char *large = malloc(WIRE_LIMIT * 2);

	wire_add_number(&facts, "job", 7);
	wire_add(&facts, "absent", NULL);
	wire_begin(&out, "join");
	wire_append(&out, &facts);
	wire_add(&out, "text", "a\nb");
	expect("bytes", (long)out.used, sizeof(wanted) - 1);
	expect("content", memcmp(out.data, wanted, out.used), 0);
	memset(large, 'x', WIRE_LIMIT * 2 - 1);
	large[WIRE_LIMIT * 2 - 1] = '\0';
	wire_add(&out, "text", large);
	expect("too long", out.error, EMSGSIZE);
	expect("not sent", wire_send(-1, &out, -1), -EMSGSIZE);
	wire_free(&out);
	wire_begin(&out, "join");
	large[WIRE_LIMIT - 64] = '\0';
	wire_add(&out, "text", large);
	expect("fits", out.error, 0);
	wire_add(&out, "text", large);
	expect("two do not", out.error, EMSGSIZE);
	wire_free(&out);
	wire_free(&facts);
	free(large);
}

/* Any bytes: what is accepted can be walked and looked up without a step beyond the packet. */
static void test_random(struct wire_in *in)
{
	static const char *const pieces[] = { "version=1", "status=ok", "fds=", "net,mnt", "=", ",", "\0", "x", "text=" };
	unsigned int seed = 1;

	for (int round = 0; round < ROUNDS; round++) {
		const char *key, *value;
		size_t cursor = 0;

		__asan_unpoison_memory_region(in->data, sizeof(in->data));
		in->used = 0;
		if (rand_r(&seed) % 2) {
			memcpy(in->data, "version=1", 10);
			in->used = 10;
		}
		for (int i = rand_r(&seed) % 8; i >= 0; i--) {
			const char *piece = pieces[(unsigned int)rand_r(&seed) % (sizeof(pieces) / sizeof(pieces[0]))];
			size_t length = strlen(piece) + (unsigned int)rand_r(&seed) % 2;

			memcpy(in->data + in->used, piece, length);
			in->used += length;
		}
		in->fd_count = (unsigned int)rand_r(&seed) % 4;
		for (unsigned int i = 0; i < in->fd_count; i++)
			in->fds[i] = -1;
		__asan_poison_memory_region(in->data + in->used, sizeof(in->data) - in->used);
		if (wire_check(in) != 0)
			continue;
		while (wire_next(in, &cursor, &key, &value))
			expect("key before value", value > key && value[-1] == '=', 1);
		expect("walked to the end", (long)cursor, (long)in->used);
		wire_get(in, "text");
		wire_take_fd(in, "mnt");
	}
	__asan_unpoison_memory_region(in->data, sizeof(in->data));
}

int main(void)
{
	struct wire_in *in = malloc(sizeof(*in));

	if (in == NULL)
		return 1;
	test_good_replies(in);
	test_bad_replies(in);
	test_ends(in);
	test_requests();
	test_random(in);
	free(in);
	printf("wire: %s\n", failures == 0 ? "ok" : "FAILED");
	return failures != 0;
}
