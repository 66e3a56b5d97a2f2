/*
 * The command that an image's entrypoint is given: it leaves its environment, and ends. See entrypoint.c.
 *
 * Without libc, so that it runs in an image that has none, and is small enough to be a part of the shim. It runs as the
 * user, in his container. Descriptors: ENVIRON_OUTPUT to write to.
 */
#include "environ.h"

#include <asm/unistd.h>

#define AT_FDCWD (-100)

static long call(long number, long one, long two, long three)
{
#if defined(__x86_64__)
	long result;

	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "a"(number), "D"(one), "S"(two), "d"(three)
			 : "rcx", "r11", "memory");
	return result;
#elif defined(__aarch64__)
	register long x8 __asm__("x8") = number;
	register long x0 __asm__("x0") = one;
	register long x1 __asm__("x1") = two;
	register long x2 __asm__("x2") = three;

	__asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2) : "memory");
	return x0;
#else
#error "no system calls for this machine"
#endif
}

static long copy(int from, int to)
{
	static char buffer[4096];
	long count, written, done;

	while ((count = call(__NR_read, from, (long)buffer, sizeof(buffer))) > 0) {
		for (done = 0; done < count; done += written) {
			written = call(__NR_write, to, (long)buffer + done, count - done);
			if (written <= 0)
				return 1;
		}
	}
	return count < 0;
}

void _start(void)
{
	long from = call(__NR_openat, AT_FDCWD, (long)"/proc/self/environ", 0);

	call(__NR_exit_group, from < 0 ? 1 : copy((int)from, ENVIRON_OUTPUT), 0, 0);
	__builtin_unreachable();
}
