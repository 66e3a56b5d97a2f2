/*
 * Loaded into Slurm's commands inside a container, by the node's loader (ld.so --preload): a library that they open by
 * its full path is the node's, whatever the image has there. mpi_pmix opens PMIx like that, and the image's may be of
 * another release, or for another libc. Programs that the commands start do not have it.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <limits.h>
#include <stdio.h>
#include <unistd.h>

/* Where runtime/slurmclient.py shows such files of the node, with their whole path below it. */
#define OPENED "/run/enclos/slurm/opened"

__attribute__((visibility("default"))) void *dlopen(const char *path, int flags)
{
	void *(*real)(const char *, int) = (void *(*)(const char *, int))dlsym(RTLD_NEXT, "dlopen");
	char own[PATH_MAX];

	if (path != NULL && path[0] == '/' && snprintf(own, sizeof(own), OPENED "%s", path) < (int)sizeof(own) &&
	    access(own, R_OK) == 0)
		path = own;
	return real != NULL ? real(path, flags) : NULL;
}
