/*
 * What stands in a container where the node has srun and its siblings, with --container-slurm.
 *
 * The real program cannot be executed there: its loader and libraries are not the image's. They are mounted below
 * SLURM_PLACE (runtime/slurmclient.py), and this program hands itself over to the node's loader with them. It knows
 * by the name under which it was executed which program is meant. Without libc: the image may have none.
 */
#include "nolibc.h"

#define SLURM_PLACE "/run/enclos/slurm"
#define LIBRARIES                                                                                                   \
	SLURM_PLACE "/lib/0:" SLURM_PLACE "/lib/1:" SLURM_PLACE "/lib/2:" SLURM_PLACE "/lib/3:" SLURM_PLACE "/lib/4:" \
	SLURM_PLACE "/lib/5:" SLURM_PLACE "/lib/6:" SLURM_PLACE "/lib/7"

/* The agent puts it there where the loader knows what to do with it. */
#define PRELOADED SLURM_PLACE "/opened.so"

static const char loader[] = SLURM_PLACE "/loader";
static const char directory[] = SLURM_PLACE "/bin";

void begin(long *stack)
{
	static char own[4096], program[4096];
	long count = stack[0], length = call(__NR_readlinkat, AT_FDCWD, (long)"/proc/self/exe", (long)own, sizeof(own) - 1);
	char **arguments = (char **)(stack + 1), **environment = arguments + count + 1;
	const char **words = __builtin_alloca(sizeof(char *) * (unsigned long)(count + 7));
	long slash = length, used = 0, word = 0;

	while (slash > 0 && own[slash - 1] != '/')
		slash--;
	for (; directory[used] != '\0'; used++)
		program[used] = directory[used];
	program[used++] = '/';
	for (; slash < length && used < (long)sizeof(program) - 1; slash++)
		program[used++] = own[slash];
	words[word++] = loader;
	words[word++] = "--library-path";
	words[word++] = LIBRARIES;
	if (call(__NR_faccessat, AT_FDCWD, (long)PRELOADED, 4 /* R_OK */, 0) == 0) {
		words[word++] = "--preload";
		words[word++] = PRELOADED;
	}
	words[word++] = program;
	for (long i = 1; i < count; i++)
		words[word++] = arguments[i];
	words[word] = (void *)0;
	call(__NR_execve, (long)loader, (long)words, (long)environment, 0);
	for (;;)
		call(__NR_exit_group, 127, 0, 0, 0);
}
