/*
 * The error of a step on this node: kept where a callback may not fail, shown once where it may.
 *
 * Up to task_init Slurm's answer to a failed callback differs by release, by callback and by `optional`: it runs the
 * program outside, or drains the node. So no callback of ours ever fails; the task prints the line and exits.
 */
#define _GNU_SOURCE
#include "enclos.h"

#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static struct {
	char text[2048];
	char hint[1024];
	bool kept;
	/* Shared by the tasks of this node until they exec, so that the first one that fails speaks for all. */
	atomic_flag *shown;
	atomic_flag *noticed; /* the same for a notice */
} report;

/* Must run before the tasks are forked; without memory every failing task prints its line. */
void report_prepare(void)
{
	void *page = mmap(NULL, 2 * sizeof(atomic_flag), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	if (page == MAP_FAILED)
		return;
	report.shown = page;
	report.noticed = report.shown + 1;
	atomic_flag_clear(report.shown);
	atomic_flag_clear(report.noticed);
}

/* The first error is the cause, later ones are consequences. */
void report_keep(const char *format, ...)
{
	va_list arguments;

	if (report.kept)
		return;
	report.kept = true;
	va_start(arguments, format);
	vsnprintf(report.text, sizeof(report.text), format, arguments);
	va_end(arguments);
}

void report_keep_hint(const char *text, const char *hint)
{
	if (report.kept)
		return;
	report_keep("%s", text);
	snprintf(report.hint, sizeof(report.hint), "%s", hint != NULL ? hint : "");
}

/* Whether this task is the first of this node with a notice; each is without shared memory. */
bool report_first_notice(void)
{
	return report.noticed == NULL || !atomic_flag_test_and_set(report.noticed);
}

bool report_kept(void)
{
	return report.kept;
}

/* This node's name as it stands in messages: the host name up to the first dot. */
const char *report_node(void)
{
	static char name[256];

	if (name[0] == '\0' && gethostname(name, sizeof(name) - 1) == 0)
		name[strcspn(name, ".")] = '\0';
	return name;
}

/*
 * Prints the error on the task's terminal, unless a task of this node did, and ends the task. One call for both lines:
 * the lines of several nodes must not mix. _exit, because slurmstepd's exit handlers belong to its parent process.
 */
void report_exit(int status)
{
	report_show();
	_exit(status);
}

void report_show(void)
{
	if (!report.kept)
		return;
	if (report.shown == NULL || !atomic_flag_test_and_set(report.shown)) {
		if (report.hint[0] != '\0')
			slurm_error("enclos: %s\nhint: %s", report.text, report.hint);
		else
			slurm_error("enclos: %s", report.text);
	}
}
