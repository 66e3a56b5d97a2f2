/*
 * The command that an image's entrypoint is given: it leaves its environment, and ends. See entrypoint.c.
 *
 * Without libc, so that it runs in an image that has none, and is small enough to be a part of the shim. It runs as the
 * user, in his container. Descriptors: ENVIRON_OUTPUT to write to.
 */
#include "environ.h"

#include "nolibc.h"

static long copy(int from, int to)
{
	static char buffer[4096];
	long count, written, done;

	while ((count = call(__NR_read, from, (long)buffer, sizeof(buffer), 0)) > 0) {
		for (done = 0; done < count; done += written) {
			written = call(__NR_write, to, (long)buffer + done, count - done, 0);
			if (written <= 0)
				return 1;
		}
	}
	return count < 0;
}

void begin(long *stack)
{
	long from = call(__NR_openat, AT_FDCWD, (long)"/proc/self/environ", 0, 0);

	(void)stack;
	for (;;)
		call(__NR_exit_group, from < 0 ? 1 : copy((int)from, ENVIRON_OUTPUT), 0, 0, 0);
}
