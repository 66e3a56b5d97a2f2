/*
 * Rules that an option's value has to keep; the table of them is in options.gen.h. Knows nothing of Slurm.
 */
#ifndef ENCLOS_CHECKS_H
#define ENCLOS_CHECKS_H

#include <stddef.h>

enum enclos_rule {
	ENCLOS_MATCH, /* the whole text matches the pattern */
	ENCLOS_AVOID, /* the whole text does not match it */
	ENCLOS_ORDER, /* where it matches, the number of the first group is not above that of the second */
	ENCLOS_ONCE,  /* no two parts that match have the same text in the first group */
};

struct enclos_check {
	const char *pattern; /* extended regular expression of a whole text; its own groups begin with the second */
	const char *words;   /* what is wrong with a value that does not keep the rule; NULL ends the table */
	const char *start;   /* only texts that begin with it are looked at */
	enum enclos_rule rule;
	int each;	/* the texts are the parts between commas that no backslash precedes, not the value */
	size_t longest; /* of a text in bytes, instead of a pattern; 0: there is one */
};

/* The words of the first rule that the value breaks, or NULL. `checks` may be NULL. */
const char *checks_refusal(const struct enclos_check *checks, const char *value);

#endif
