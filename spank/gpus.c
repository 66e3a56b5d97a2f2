/*
 * The GPUs that Slurm granted to the step on this node, and the numbers by which its programs find them inside.
 *
 * slurmstepd writes the grant into the step's environment (its gres/gpu plugin, before init_post_opt) and takes away what
 * the user had there under these names: tried on 22.05, with and without a grant. So the variables are slurmstepd's word,
 * but only where that plugin is loaded. gpus_add_facts() runs as root, gpus_renumber() as the user in task_init.
 */
#define _GNU_SOURCE
#include "enclos.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LIST_BYTES 4096

/* What Slurm sets for its GPUs, by vendor; programs count the GPUs that they find. */
static const char *const number_variables[] = { "CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL",
						"ZE_AFFINITY_MASK", NULL };

/* GresTypes has the word "gpu". */
static bool slurm_manages_gpus(void)
{
	const char *types = compat_conf() != NULL ? compat_conf()->gres_plugins : NULL;

	for (; types != NULL && *types != '\0'; types += strspn(types, ", ")) {
		size_t length = strcspn(types, ", ");

		if (length == 3 && strncmp(types, "gpu", length) == 0)
			return true;
		types += length;
	}
	return false;
}

/*
 * Slurm's numbers of the step's GPUs; always sent, so that a later message can say that there are none. A batch script
 * has those of the job: SLURM_STEP_GPUS in it is its user's.
 */
void gpus_add_facts(spank_t spank, struct wire_out *out)
{
	uint32_t id = 0;
	char list[LIST_BYTES] = "", numbers[LIST_BYTES] = "";

	if (slurm_manages_gpus() && spank_get_item(spank, S_JOB_STEPID, &id) == ESPANK_SUCCESS) {
		const char *variable = id == ENCLOS_BATCH_STEP ? "SLURM_JOB_GPUS" : "SLURM_STEP_GPUS";

		if (spank_getenv(spank, variable, list, sizeof(list)) != ESPANK_SUCCESS)
			list[0] = '\0';
	}
	for (int i = 0; list[0] != '\0' && numbers[0] == '\0' && number_variables[i] != NULL; i++) {
		if (spank_getenv(spank, number_variables[i], numbers, sizeof(numbers)) != ESPANK_SUCCESS)
			numbers[0] = '\0';
	}
	wire_add(out, "gpus", list);
	wire_add(out, "gpu_numbers", numbers);
	if (compat_conf() != NULL)
		wire_add(out, "conf", compat_conf()->slurm_conf);
}

/* The place of a number in "NUMBER:PLACE,...", or -1. */
static long place_of(const char *places, long number)
{
	while (*places != '\0') {
		char *end;
		long found = strtol(places, &end, 10);

		if (*end != ':')
			return -1;
		if (found == number)
			return strtol(end + 1, NULL, 10);
		places = end + strcspn(end, ",");
		places += *places == ',';
	}
	return -1;
}

/* Rewrites a list of numbers; those without a place are left out. Returns false if it is no such list. */
static bool rewrite(const char *list, const char *places, char *out, size_t size)
{
	size_t used = 0;

	out[0] = '\0';
	for (;;) {
		char *end;
		long number = strtol(list, &end, 10), place = place_of(places, number);

		if (end == list || (*end != ',' && *end != '\0'))
			return false;
		if (place >= 0 && used < size)
			used += (size_t)snprintf(out + used, size - used, "%s%ld", used > 0 ? "," : "", place);
		if (*end == '\0')
			return used < size;
		list = end + 1;
	}
}

/* Each task has its own list (--gpu-bind), so the agent sends the places, and the task looks its numbers up. */
void gpus_renumber(spank_t spank, const struct wire_in *reply)
{
	const char *places = wire_get(reply, "gpu_places");
	char list[LIST_BYTES], inside[LIST_BYTES];

	for (int i = 0; places != NULL && number_variables[i] != NULL; i++) {
		if (spank_getenv(spank, number_variables[i], list, sizeof(list)) == ESPANK_SUCCESS && list[0] != '\0' &&
		    rewrite(list, places, inside, sizeof(inside)))
			spank_setenv(spank, number_variables[i], inside, 1);
	}
}
