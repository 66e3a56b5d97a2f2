/*
 * Maps some huge pages of 2 MB and writes to each: `hugepages COUNT [noreserve]`. Prints "COUNT pages" when it has them,
 * or why the kernel does not map them; with `noreserve` the kernel is asked for a page only when that is written to.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define PAGE_BYTES (2UL << 20)

int main(int argc, char **argv)
{
	unsigned long count = argc > 1 ? strtoul(argv[1], NULL, 10) : 0;
	int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB | (argc > 2 ? MAP_NORESERVE : 0);
	char *pages = mmap(NULL, count * PAGE_BYTES, PROT_READ | PROT_WRITE, flags, -1, 0);

	if (pages == MAP_FAILED) {
		puts(strerror(errno));
		return 1;
	}
	for (unsigned long page = 0; page < count; page++)
		pages[page * PAGE_BYTES] = 1;
	printf("%lu pages\n", count);
	return 0;
}
