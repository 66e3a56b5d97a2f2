/*
 * ring: the MPI program of the trial cluster's image.
 *
 * Each rank tells where it runs: node name, the address that this name has there, the interface with that address.
 * Then a buffer travels around all ranks, and all ranks add up a number; both are checked and timed. Rank 0 prints.
 *
 *   ring [--size BYTES] [--rounds N] [--seconds S]
 *
 * With --seconds it goes on for that long, and prints a line per second: for tests that disturb it meanwhile.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <getopt.h>
#include <ifaddrs.h>
#include <limits.h>
#include <mpi.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define LINE_BYTES 256
#define REDUCTIONS 100

struct options {
	int size;
	int rounds;
	double seconds;
};

static int parse(int argc, char **argv, struct options *options)
{
	static const struct option known[] = {
		{"size", required_argument, NULL, 's'},
		{"rounds", required_argument, NULL, 'r'},
		{"seconds", required_argument, NULL, 't'},
		{NULL, 0, NULL, 0},
	};
	int letter;

	while ((letter = getopt_long(argc, argv, "", known, NULL)) != -1) {
		switch (letter) {
		case 's':
			options->size = atoi(optarg);
			break;
		case 'r':
			options->rounds = atoi(optarg);
			break;
		case 't':
			options->seconds = atof(optarg);
			break;
		default:
			return -1;
		}
	}
	return options->size > 0 && options->rounds > 0 && optind == argc ? 0 : -1;
}

/* The name of the interface that has this IPv4 address, or "?". */
static void interface_of(const struct in_addr *address, char *name, size_t bytes)
{
	struct ifaddrs *all = NULL;

	snprintf(name, bytes, "?");
	if (getifaddrs(&all) != 0)
		return;
	for (struct ifaddrs *one = all; one != NULL; one = one->ifa_next) {
		if (one->ifa_addr == NULL || one->ifa_addr->sa_family != AF_INET)
			continue;
		if (((struct sockaddr_in *)(void *)one->ifa_addr)->sin_addr.s_addr == address->s_addr)
			snprintf(name, bytes, "%s", one->ifa_name);
	}
	freeifaddrs(all);
}

static void describe(int rank, char *line)
{
	struct addrinfo hints = {.ai_family = AF_INET, .ai_socktype = SOCK_STREAM};
	struct addrinfo *found = NULL;
	char node[HOST_NAME_MAX + 1] = "?";
	char text[INET_ADDRSTRLEN] = "?";
	char interface[64] = "?";

	gethostname(node, sizeof(node) - 1);
	if (getaddrinfo(node, NULL, &hints, &found) == 0 && found != NULL) {
		const struct in_addr *address = &((struct sockaddr_in *)(void *)found->ai_addr)->sin_addr;

		inet_ntop(AF_INET, address, text, sizeof(text));
		interface_of(address, interface, sizeof(interface));
		freeaddrinfo(found);
	}
	snprintf(line, LINE_BYTES, "rank %d  node %s  address %s  interface %s", rank, node, text, interface);
}

static void introduce(int rank, int ranks)
{
	char line[LINE_BYTES] = "";
	char *all = rank == 0 ? calloc((size_t)ranks, LINE_BYTES) : NULL;

	describe(rank, line);
	MPI_Gather(line, LINE_BYTES, MPI_CHAR, all, LINE_BYTES, MPI_CHAR, 0, MPI_COMM_WORLD);
	if (all == NULL)
		return;
	for (int one = 0; one < ranks; one++)
		printf("%s\n", all + (size_t)one * LINE_BYTES);
	fflush(stdout);
	free(all);
}

/* One round: the buffer goes from rank to rank, each adds 1 to every byte, and rank 0 checks what comes back. */
static int pass_round(int rank, int ranks, char *buffer, int size, char start)
{
	int next = (rank + 1) % ranks;
	int previous = (rank + ranks - 1) % ranks;

	if (ranks == 1)
		return 0;
	if (rank == 0) {
		memset(buffer, start, (size_t)size);
		MPI_Send(buffer, size, MPI_CHAR, next, 0, MPI_COMM_WORLD);
	}
	MPI_Recv(buffer, size, MPI_CHAR, previous, 0, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
	if (rank != 0) {
		for (int byte = 0; byte < size; byte++)
			buffer[byte] = (char)(buffer[byte] + 1);
		MPI_Send(buffer, size, MPI_CHAR, next, 0, MPI_COMM_WORLD);
		return 0;
	}
	for (int byte = 0; byte < size; byte++) {
		if (buffer[byte] != (char)(start + ranks - 1))
			return -1;
	}
	return 0;
}

static int reduce(int rank, int ranks)
{
	for (int turn = 0; turn < REDUCTIONS; turn++) {
		long mine = rank + turn;
		long sum = 0;

		MPI_Allreduce(&mine, &sum, 1, MPI_LONG, MPI_SUM, MPI_COMM_WORLD);
		if (sum != (long)ranks * turn + (long)ranks * (ranks - 1) / 2)
			return -1;
	}
	return 0;
}

/* All rounds and reductions once; returns seconds, or a negative number when what arrived was wrong. */
static double exchange(int rank, int ranks, char *buffer, const struct options *options)
{
	double start = MPI_Wtime();
	int wrong = 0;

	for (int turn = 0; turn < options->rounds; turn++)
		wrong |= pass_round(rank, ranks, buffer, options->size, (char)turn);
	wrong |= reduce(rank, ranks);
	MPI_Allreduce(MPI_IN_PLACE, &wrong, 1, MPI_INT, MPI_BOR, MPI_COMM_WORLD);
	return wrong ? -1.0 : MPI_Wtime() - start;
}

static int go_on(double until)
{
	int more = MPI_Wtime() < until;

	MPI_Bcast(&more, 1, MPI_INT, 0, MPI_COMM_WORLD);
	return more;
}

static int work(int rank, int ranks, char *buffer, const struct options *options)
{
	double until = MPI_Wtime() + options->seconds;
	double told = MPI_Wtime();
	double took;

	do {
		took = exchange(rank, ranks, buffer, options);
		if (took < 0) {
			fprintf(stderr, "rank %d: wrong data arrived\n", rank);
			return 1;
		}
		if (rank == 0 && options->seconds > 0 && MPI_Wtime() - told >= 1.0) {
			printf("goes on, %.0f s left\n", until - MPI_Wtime());
			fflush(stdout);
			told = MPI_Wtime();
		}
	} while (go_on(until));
	if (rank == 0)
		printf("ring of %d: %d rounds of %d bytes and %d reductions in %.3f s, all data right\n", ranks,
		       options->rounds, options->size, REDUCTIONS, took);
	return 0;
}

int main(int argc, char **argv)
{
	struct options options = {.size = 1 << 20, .rounds = 16, .seconds = 0};
	int rank = 0;
	int ranks = 0;
	int status;
	char *buffer;

	MPI_Init(&argc, &argv);
	MPI_Comm_rank(MPI_COMM_WORLD, &rank);
	MPI_Comm_size(MPI_COMM_WORLD, &ranks);
	if (parse(argc, argv, &options) != 0) {
		if (rank == 0)
			fprintf(stderr, "usage: ring [--size BYTES] [--rounds N] [--seconds S]\n");
		MPI_Finalize();
		return 2;
	}
	buffer = malloc((size_t)options.size);
	if (buffer == NULL) {
		perror("ring: malloc");
		MPI_Abort(MPI_COMM_WORLD, 1);
	}
	introduce(rank, ranks);
	status = work(rank, ranks, buffer, &options);
	free(buffer);
	MPI_Finalize();
	return status;
}
