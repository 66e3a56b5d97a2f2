/*
 * Where Slurm's releases differ: every such difference that the shim has to know is here, with the place in Slurm's
 * source, and a test of tests/cluster/test_releases.py that runs on each release.
 *
 * What differs and needs nothing here: the meaning of a callback's return value (spank.c, _do_call_stack: up to 24.11 a
 * positive one counts as success), because no callback of ours relies on it (report.c) and a TaskProlog that cannot be
 * run stands in the way (taskprolog.c); the names of job cgroups, spool files and namespaces, because the agent asks
 * the kernel for those.
 */
#define _GNU_SOURCE
#include "enclos.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/*
 * slurmstepd's and slurmd's copy of slurm.conf; each of Slurm's programs exports it, but it is not part of the plugin
 * interface (src/common/read_config.c). Weak, so that a release without it loads the plugin all the same.
 */
extern slurm_conf_t slurm_conf __attribute__((weak));

/* NULL where this release does not show its configuration. */
slurm_conf_t *compat_conf(void)
{
	return &slurm_conf != NULL ? &slurm_conf : NULL;
}

/*
 * The job's node list in the prolog. 22.05 calls it SLURM_NODELIST, 23.02 and later SLURM_JOB_NODELIST
 * (src/slurmd/slurmd/req.c, _build_env; later src/slurmd/common/job_env). Only with PrologFlags=Alloc is it slurmctld's,
 * in all of them; without it the list is srun's, and not for us.
 */
const char *compat_prolog_nodes(void)
{
	const slurm_conf_t *conf = compat_conf();
	const char *nodes = getenv("SLURM_JOB_NODELIST");

	if (conf == NULL || !(conf->prolog_flags & PROLOG_FLAG_ALLOC))
		return NULL;
	return nodes != NULL ? nodes : getenv("SLURM_NODELIST");
}

/*
 * The step's directory, in user_init; false where this process does not stand in it. Up to 23.11 slurmstepd itself calls
 * user_init, from that directory. Later, with SlurmdParameters=contain_spank, a clone does
 * (src/slurmd/slurmstepd/mgr.c, _run_spank_func): it shares our memory, but has joined job_container/tmpfs's mount
 * namespace before, and setns(2) puts it at the root of that.
 */
bool compat_step_directory(pid_t stepd, char *path, size_t size)
{
	char here[size];

	if (getcwd(here, size) == NULL || (getpid() != stepd && strcmp(here, "/") == 0))
		return false;
	memcpy(path, here, strlen(here) + 1);
	return true;
}
