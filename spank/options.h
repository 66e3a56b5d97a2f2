/*
 * The option table as options.c and commands.c see it: rows by their index, and what was given for each.
 */
#ifndef ENCLOS_OPTIONS_H
#define ENCLOS_OPTIONS_H

#include <stdbool.h>
#include <stddef.h>

#include "checks.h"

/* For flags with two spellings: which one won. Names with SLURM_ pass --export=NONE. */
#define FLAGS_VARIABLE "SLURM_ENCLOS_FLAGS"
/* All that was given for a part of a heterogeneous step. */
#define PART_OPTIONS_VARIABLE "SLURM_ENCLOS_OPTIONS"
#define PART_LIMIT 131072 /* bytes of it; the kernel takes no longer variable */

struct enclos_option_row {
	const char *name;      /* without the leading -- */
	const char *arginfo;   /* NULL when it takes no value */
	const char *usage;     /* for --help */
	int has_arg;
	const char *env;       /* read when no option with this key was given; NULL on a no- form */
	const char *pyxis_env; /* the same under pyxis' name */
	const char *key;       /* NAME of option.NAME on the wire */
	const char *fixed;     /* the value when has_arg is 0 */
	const struct enclos_check *checks; /* ends with words of NULL; NULL: none */
};

const struct enclos_option_row *options_row(int index); /* NULL behind the last one */
int options_find_key(const char *key);
bool options_same_group(int one, int other);
const char *options_value(int index);	      /* NULL: not given */
unsigned int options_order(int index);	      /* later ones have a higher number */
unsigned int options_times(int index);	      /* that Slurm named it: from the environment, on the command line */
void options_forget(void);
void options_slurm_name(int index, char *name, size_t size);
const char *options_shown(const char *value);
bool options_listed(const char *list, const char *name);
bool options_lost(const char *flags, int index, int other);

#endif
