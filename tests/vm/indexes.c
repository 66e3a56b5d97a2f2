/*
 * Which address indexes of an RDMA device a queue pair may be connected with, from where this runs.
 *
 *   indexes DEVICE
 *
 * Tries all that the device's table has, also the empty ones, and prints a line for each kind of answer: the name of the
 * kernel's error, or "ok", and the indexes that had it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <infiniband/verbs.h>
#include <stdio.h>
#include <string.h>

/* An index is a number of eight bits (struct ib_uverbs_global_route). */
#define INDEXES 256

static struct ibv_qp *pair;
static union ibv_gid own;

/* From nothing to ready to receive, with the other end's address where ours is. Returns an errno. */
static int connect_with(int index, struct ibv_context *device)
{
	struct ibv_qp_attr attr = {.qp_state = IBV_QPS_RESET};
	int error = ibv_modify_qp(pair, &attr, IBV_QP_STATE);

	if (error)
		return error;
	attr = (struct ibv_qp_attr){.qp_state = IBV_QPS_INIT, .port_num = 1};
	error = ibv_modify_qp(pair, &attr, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS);
	if (error)
		return error;
	attr = (struct ibv_qp_attr){
		.qp_state = IBV_QPS_RTR,
		.path_mtu = IBV_MTU_256,
		.dest_qp_num = pair->qp_num,
		.max_dest_rd_atomic = 1,
		.min_rnr_timer = 12,
		.ah_attr = {.is_global = 1, .port_num = 1, .grh = {.dgid = own, .hop_limit = 1, .sgid_index = index}},
	};
	/* An empty index has no address; to ask the kernel all the same, the last one that there was. */
	if (!ibv_query_gid(device, 1, index, &attr.ah_attr.grh.dgid))
		own = attr.ah_attr.grh.dgid;
	else
		attr.ah_attr.grh.dgid = own;
	return ibv_modify_qp(pair, &attr,
			     IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
				     IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER);
}

static struct ibv_context *open_device(const char *name)
{
	struct ibv_device **list = ibv_get_device_list(NULL);

	for (; list && *list; list++)
		if (!strcmp(ibv_get_device_name(*list), name))
			return ibv_open_device(*list);
	errno = ENODEV;
	return NULL;
}

int main(int count, char **words)
{
	static int answers[INDEXES];
	struct ibv_context *device = count == 2 ? open_device(words[1]) : NULL;
	struct ibv_port_attr port;

	if (!device || ibv_query_port(device, 1, &port)) {
		perror(words[1] ? words[1] : "indexes DEVICE");
		return 1;
	}
	struct ibv_cq *queue = ibv_create_cq(device, 1, NULL, NULL, 0);
	struct ibv_qp_init_attr wanted = {
		.send_cq = queue,
		.recv_cq = queue,
		.cap = {.max_send_wr = 1, .max_recv_wr = 1, .max_send_sge = 1, .max_recv_sge = 1},
		.qp_type = IBV_QPT_RC,
	};
	struct ibv_pd *domain = ibv_alloc_pd(device);

	pair = domain && queue ? ibv_create_qp(domain, &wanted) : NULL;
	if (!pair) {
		perror("queue pair");
		return 1;
	}
	int all = port.gid_tbl_len < INDEXES ? port.gid_tbl_len : INDEXES;

	for (int index = 0; index < all; index++)
		answers[index] = connect_with(index, device) + 1;
	for (int index = 0; index < all; index++) {
		int answer = answers[index];

		if (!answer)
			continue;
		printf("%s", answer == 1 ? "ok" : strerrorname_np(answer - 1));
		for (int other = index; other < all; other++) {
			if (answers[other] != answer)
				continue;
			printf(" %d", other);
			answers[other] = 0;
		}
		printf("\n");
	}
	return 0;
}
