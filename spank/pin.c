/*
 * A tag means one image for a whole step: srun asks the registry for its digest, once, and passes it to the nodes.
 *
 * `enclos image resolve` does it, as the user, before anything is allocated: what the registry refuses is said at once.
 * Where it cannot be asked from here (no such command, no way to the registry), each node asks for itself. The digest
 * is the user's word like all the rest: a node imports what has it, and its registry's answer decides who may have it.
 */
#define _GNU_SOURCE
#include "enclos.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

/* IMAGE=DIGEST; a name with SLURM_ passes --export=NONE. */
#define PINNED_VARIABLE "SLURM_ENCLOS_PINNED"
#define OUTPUT_LIMIT 8192
#define DIGEST "sha256:"
#define DIGEST_LENGTH (sizeof(DIGEST) - 1 + 64)
#define RESOLVE_TIMEOUT_S 15

/* Errors that a node may not have: it can have another way to the registry, or trust it. */
static const char *const elsewhere[] = { "cannot reach the registry", "no such registry", "no secure connection",
					 "lost the connection", "is not installed", NULL };
static const char *const local_kinds[] = { "oci:", "oci-archive:", "docker-archive:", "dir:", NULL };

static bool begins_with_one(const char *text, const char *const *words)
{
	for (; *words != NULL; words++) {
		if (strncmp(text, *words, strlen(*words)) == 0)
			return true;
	}
	return false;
}

static bool contains_one(const char *text, const char *const *words)
{
	for (; *words != NULL; words++) {
		if (strstr(text, *words) != NULL)
			return true;
	}
	return false;
}

/* A name in a registry, whose tag may move; a node says what is wrong with other texts. */
static bool may_move(const char *image)
{
	return image[0] != '/' && image[0] != '.' && image[0] != '\0' && strstr(image, "@" DIGEST) == NULL &&
		!begins_with_one(image, local_kinds) &&
		(strncmp(image, "docker://", 9) == 0 || strchr(image, '#') != NULL || strchr(image, ':') != NULL);
}

static void be_resolver(const char *image, int output_fd)
{
	if (dup2(output_fd, STDOUT_FILENO) < 0 || dup2(output_fd, STDERR_FILENO) < 0)
		_exit(126);
	alarm(RESOLVE_TIMEOUT_S);
	execlp("enclos", "enclos", "image", "resolve", image, NULL);
	_exit(127);
}

/* What the resolver prints; returns its wait status, or -1. */
static int run_resolver(const char *image, char *output)
{
	int ends[2], status = -1;
	size_t used = 0;
	ssize_t count;
	pid_t child;

	if (pipe(ends) < 0)
		return -1;
	child = fork();
	if (child == 0)
		be_resolver(image, ends[1]);
	close(ends[1]);
	while (used < OUTPUT_LIMIT && (count = read(ends[0], output + used, OUTPUT_LIMIT - used)) != 0) {
		if (count < 0 && errno != EINTR)
			break;
		used += count > 0 ? (size_t)count : 0;
	}
	output[used] = '\0';
	close(ends[0]);
	while (child > 0 && waitpid(child, &status, 0) < 0 && errno == EINTR)
		;
	return status;
}

/* Called in srun. Returns false after it has said why the image cannot be had. */
bool pin_image(const char *image)
{
	char output[OUTPUT_LIMIT + 1], value[PINNED_LIMIT];
	const char *digest;
	int status;

	/* One that was inherited is of another step's moment. */
	part_unsetenv(PINNED_VARIABLE);
	if (!may_move(image))
		return true;
	status = run_resolver(image, output);
	if (status == 0) {
		digest = strstr(output, "@" DIGEST);
		if (digest != NULL && strlen(digest + 1) >= DIGEST_LENGTH &&
		    snprintf(value, sizeof(value), "%s=%.*s", image, (int)DIGEST_LENGTH, digest + 1) < (int)sizeof(value))
			part_setenv(PINNED_VARIABLE, value);
		return true;
	}
	if (!WIFEXITED(status) || WEXITSTATUS(status) != 1 || strncmp(output, "enclos: ", 8) != 0 ||
	    contains_one(output, elsewhere))
		return true;
	if (output[strlen(output) - 1] == '\n')
		output[strlen(output) - 1] = '\0';
	slurm_error("%s", output);
	return false;
}

/* Called in slurmstepd. */
void pin_add_field(spank_t spank, struct wire_out *out)
{
	char value[PINNED_LIMIT];

	if (part_spank_getenv(spank, PINNED_VARIABLE, value, sizeof(value)))
		wire_add(out, "pinned", value);
}
