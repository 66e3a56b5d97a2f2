/*
 * A program that tries to outlive its step, in the way that its argument names. Prints "WAY is off" when it has begun.
 *
 *   daemon  double fork, a session of its own, all signals ignored
 *   nested  the same, in user and mount namespaces of its own
 *   thread  the same, and its first thread has ended: it looks like a zombie
 *   chain   forks and ends, over and over: no list of processes holds it
 *   storm   some processes that replace each other, bounded
 *   unsent  connects to a listener of its own that never reads, fills the queues, and sleeps
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define SECONDS 300
#define STORM 8

static time_t begun;

static void *keep(void *unused)
{
	(void)unused;
	for (;;)
		pause();
	return NULL;
}

static void detach(void)
{
	int null;

	for (int number = 1; number < NSIG; number++)
		signal(number, SIG_IGN);
	if (fork() != 0)
		_exit(0);
	setsid();
	if (fork() != 0)
		_exit(0);
	null = open("/dev/null", O_RDWR);
	for (int fd = 0; fd < 3; fd++)
		dup2(null, fd);
}

static void chain(void)
{
	signal(SIGCHLD, SIG_IGN);
	while (time(NULL) - begun < SECONDS) {
		if (fork() > 0)
			_exit(0);
	}
}

static void escape(const char *way)
{
	pthread_t thread;

	if (strcmp(way, "nested") == 0 && unshare(CLONE_NEWUSER | CLONE_NEWNS) < 0) {
		perror("unshare");
		_exit(1);
	}
	detach();
	if (strcmp(way, "chain") == 0)
		chain();
	if (strcmp(way, "storm") == 0) {
		for (int i = 0; i < STORM; i++) {
			if (fork() == 0)
				chain();
		}
	}
	if (strcmp(way, "thread") == 0 && pthread_create(&thread, NULL, keep, NULL) == 0)
		pthread_exit(NULL);
	keep(NULL);
}

/* The receiver is on the other side of a device whose queue nobody empties: an address of the overlay that is nobody's. */
static int unsent(void)
{
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	socklen_t length = sizeof(address);
	int listener = socket(AF_INET, SOCK_STREAM, 0), sender = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
	static char data[65536];

	if (bind(listener, (struct sockaddr *)&address, sizeof(address)) < 0 || listen(listener, 1) < 0 ||
	    getsockname(listener, (struct sockaddr *)&address, &length) < 0)
		return 1;
	connect(sender, (struct sockaddr *)&address, sizeof(address));
	usleep(10000);
	while (send(sender, data, sizeof(data), MSG_NOSIGNAL) > 0)
		;
	return 0;
}

int main(int count, char *words[])
{
	const char *way = count > 1 ? words[1] : "";
	struct rlimit many = { 4096, 4096 };

	setrlimit(RLIMIT_NPROC, &many);
	begun = time(NULL);
	if (strcmp(way, "unsent") == 0) {
		if (unsent() != 0)
			return 1;
	} else if (fork() == 0) {
		escape(way);
	}
	usleep(100000);
	printf("%s is off\n", way);
	fflush(stdout);
	if (strcmp(way, "unsent") == 0)
		sleep(SECONDS);
	return 0;
}
