/*
 * What is wrong with an option's value, by its row of rules. Runs as the user, in srun, sbatch and salloc.
 */
#define _GNU_SOURCE
#include "checks.h"

#include <locale.h>
#include <regex.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#define GROUPS 4 /* the whole, the generator's brackets around the pattern, and two of the pattern's own */

/* Ends the part that begins at `text`; returns the next one, or NULL. */
static char *end_part(char *text)
{
	for (; *text != '\0'; text++) {
		if (*text == '\\' && text[1] != '\0') {
			text++;
		} else if (*text == ',') {
			*text = '\0';
			return text + 1;
		}
	}
	return NULL;
}

static bool in_order(const char *text, const regmatch_t *groups)
{
	return groups[2].rm_so < 0 || groups[3].rm_so < 0 ||
	       strtoul(text + groups[2].rm_so, NULL, 10) <= strtoul(text + groups[3].rm_so, NULL, 10);
}

/* Is the first group of a match one of the keys? Adds it to them: a list of strings that ends with an empty one. */
static bool seen_before(const char *text, const regmatch_t *groups, char *keys)
{
	size_t length;

	if (groups[2].rm_so < 0)
		return false;
	text += groups[2].rm_so;
	length = (size_t)(groups[2].rm_eo - groups[2].rm_so);
	for (; *keys != '\0'; keys += strlen(keys) + 1) {
		if (strlen(keys) == length && strncmp(keys, text, length) == 0)
			return true;
	}
	memcpy(keys, text, length);
	keys[length] = keys[length + 1] = '\0';
	return false;
}

static bool keeps(const struct enclos_check *check, const regex_t *pattern, const char *text, char *keys)
{
	regmatch_t groups[GROUPS];
	bool matches;

	if (strncmp(text, check->start, strlen(check->start)) != 0)
		return true;
	if (check->longest > 0)
		return strlen(text) <= check->longest;
	matches = regexec(pattern, text, GROUPS, groups, 0) != REG_NOMATCH;
	switch (check->rule) {
	case ENCLOS_MATCH:
		return matches;
	case ENCLOS_AVOID:
		return !matches;
	case ENCLOS_ORDER:
		return !matches || in_order(text, groups);
	case ENCLOS_ONCE:
		return !matches || !seen_before(text, groups, keys);
	}
	return true;
}

/* What cannot be found out refuses nothing: the agent checks everything again. `copy` is the value, to be cut. */
static bool all_keep(const struct enclos_check *check, char *copy, char *keys)
{
	bool groups = check->rule == ENCLOS_ORDER || check->rule == ENCLOS_ONCE, all = true;
	regex_t pattern;

	if (check->longest == 0 && regcomp(&pattern, check->pattern, REG_EXTENDED | (groups ? 0 : REG_NOSUB)) != 0)
		return true;
	for (char *text = copy, *next; all && text != NULL; text = next) {
		next = check->each ? end_part(text) : NULL;
		all = keeps(check, &pattern, text, keys);
	}
	if (check->longest == 0)
		regfree(&pattern);
	return all;
}

const char *checks_refusal(const struct enclos_check *checks, const char *value)
{
	size_t size = strlen(value) + 1;
	/* Keys are parts of the value, each with an end, and one more. */
	char *copy = malloc(size), *keys = malloc(size + 1);
	/* Patterns are of bytes, whatever language the program speaks. */
	locale_t bytes = newlocale(LC_ALL_MASK, "C", (locale_t)0), before = uselocale(bytes);
	const char *words = NULL;

	for (; checks != NULL && checks->words != NULL && words == NULL && copy != NULL && keys != NULL; checks++) {
		memcpy(copy, value, size);
		keys[0] = '\0';
		if (!all_keep(checks, copy, keys))
			words = checks->words;
	}
	uselocale(before);
	freelocale(bytes);
	free(copy);
	free(keys);
	return words;
}
