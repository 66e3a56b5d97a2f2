/*
 * The wire between shim and agent: docs/protocol.md in C.
 *
 * Holds encoding, sending, receiving and checking of messages, and nothing of what they mean. Knows neither Slurm nor
 * namespaces, so that a test program can be linked from wire.c alone. Used by root in slurmstepd.
 */
#ifndef ENCLOS_WIRE_H
#define ENCLOS_WIRE_H

#include <stdbool.h>
#include <stddef.h>

#define WIRE_VERSION 1
#define WIRE_OLDEST 1
#define WIRE_LIMIT 131072 /* bytes of one message */
#define WIRE_FDS 16	  /* descriptors with one message, more than any version sends */

/* A request that grows. `error` keeps the first failure (an errno), so that only wire_send() has to be checked. */
struct wire_out {
	char *data;
	size_t used;
	size_t size;
	int error;
};

/* A reply that was checked: `used` bytes of whole fields, each ended by NUL. Owns its descriptors. */
struct wire_in {
	char data[WIRE_LIMIT];
	size_t used;
	int fds[WIRE_FDS];
	unsigned int fd_count;
};

void wire_begin(struct wire_out *out, const char *verb);
void wire_add(struct wire_out *out, const char *key, const char *value);
void wire_add_number(struct wire_out *out, const char *key, unsigned long long value);
void wire_append(struct wire_out *out, const struct wire_out *fields);
void wire_free(struct wire_out *out);

int wire_connect(const char *path, int timeout_s);
int wire_send(int fd, const struct wire_out *out, int attached_fd);
int wire_receive(int fd, struct wire_in *in, int timeout_ms);

int wire_check(struct wire_in *in);
bool wire_next(const struct wire_in *in, size_t *cursor, const char **key, const char **value);
const char *wire_get(const struct wire_in *in, const char *key);
int wire_take_fd(struct wire_in *in, const char *name);
void wire_close_fds(struct wire_in *in);

#endif
