/*
 * What the shim's files share: the order in which enclos.c calls them is the way of a step in DESIGN.
 *
 * Everything here runs inside Slurm's programs: as the user in srun, sbatch and salloc; as root in slurmstepd until
 * task_init, where it is the user. No file but wire.c may talk to the agent, none but join.c changes namespaces.
 */
#ifndef ENCLOS_H
#define ENCLOS_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

#include <slurm/slurm.h>
#include <slurm/spank.h>

#include "wire.h"

/* The name under which a job's image is in its environment for prologs, where Slurm puts SPANK_ before it. */
#define IMAGE_FOR_PROLOGS "ENCLOS_IMAGE"
#define ENCLOS_SOCKET "/run/enclos/agent.sock"
#define ENCLOS_BATCH_STEP 0xfffffffbU
#define ENCLOS_EXTERN_STEP 0xfffffffcU

/* compat.c: where Slurm's releases differ */
slurm_conf_t *compat_conf(void);
const char *compat_prolog_nodes(void);
bool compat_step_directory(pid_t stepd, char *path, size_t size);

/* options.c: the rows of options.gen.h as Slurm's options, and their values */
void options_register(spank_t spank);
bool options_of_part(spank_t spank);
void options_settle(spank_t spank);
bool options_container_given(void);
bool options_profile_given(void);
const char *options_subject(void);
const char *options_given(const char *key);
void options_replace(const char *name, const char *value, const char *own);
const char *options_relative(void);
void options_use_image(const char *image);
void options_add_fields(struct wire_out *out);
const char *const *options_sent_variables(void);

/* commands.c: what srun, sbatch and salloc make of the options, and refuse */
void commands_read_variables(void);
int commands_check(spank_t spank);

/* parts.c: the parts of a heterogeneous step */
#define PARTS_NONE (-1)
#define PARTS_UNKNOWN (-2)
int parts_current(void);
bool parts_last(void);
bool parts_lost(void);
void parts_next(void);
void parts_forget(void);
const char *part_getenv(const char *name);
void part_setenv(const char *name, const char *value);
void part_unsetenv(const char *name);
int parts_own(spank_t spank);
bool part_spank_getenv(spank_t spank, const char *name, char *text, size_t size);

/* profile.c: --container-profile */
bool profile_expand(const char *name);
bool profile_inherited(void);
char *profile_value(const char *option);
void profile_note_own(const char *names);
bool profile_apply(spank_t spank);
void profile_add_fields(spank_t spank, struct wire_out *out);

/* pin.c: the digest that an image's tag has now */
#define PINNED_LIMIT 4352 /* an image of PATH_MAX and a digest */
bool pin_image(const char *image);
void pin_add_field(spank_t spank, struct wire_out *out);

/* step.c: facts of a step from slurmstepd, and of a job from the prolog's environment */
bool step_wants_container(spank_t spank);
bool step_is_extern(spank_t spank);
void step_add_ids(spank_t spank, struct wire_out *out);
void step_add_facts(spank_t spank, struct wire_out *out);
bool job_add_facts(struct wire_out *out);
int step_task(spank_t spank);

/* gpus.c: the step's GPUs, as slurmstepd has them in its environment, and their numbers inside */
void gpus_add_facts(spank_t spank, struct wire_out *out);
void gpus_renumber(spank_t spank, const struct wire_in *reply);

/* report.c: the one error of a step on this node, kept until the task can show it */
void report_prepare(void);
void report_keep(const char *format, ...) __attribute__((format(printf, 1, 2)));
void report_keep_hint(const char *text, const char *hint);
bool report_first_notice(void);
bool report_kept(void);
const char *report_node(void);
void report_show(void);
void report_exit(int status) __attribute__((noreturn));

/* join.c: from a JOIN to a task inside the container */
struct join {
	struct wire_in *reply; /* NULL until the agent has answered ok */
	int user_fd, mnt_fd, ipc_fd, uts_fd;
	int save_fd;	   /* where the end of the task is told, to have the container saved; -1: it is not */
	int cgroup_fd;	   /* where a cgroup for the task is asked for; -1: it gets none */
	bool delegated;	   /* the task has it */
	int entrypoint_fd; /* what the tasks share of the entrypoint's run; -1: none is run */
	void *filter; /* seccomp program: array of struct sock_filter */
	size_t filter_bytes;
};

bool join_wait(struct join *join, int fd, const struct wire_out *request, bool show);
bool join_network(struct join *join);
void join_environment(struct join *join, spank_t spank);
bool join_container(struct join *join);
bool join_confine(struct join *join);
bool join_find_command(spank_t spank);

/* delegate.c: --container-cgroup=delegate */
bool delegate_wanted(void);
void delegate_begin(struct wire_out *facts);
void delegate_task_ended(spank_t spank);
bool delegate_enter(struct join *join);
bool delegate_mount(const struct join *join);

/* save.c: --container-save */
void save_begin(spank_t spank, int fd);

/* entrypoint.c: the image's entrypoint, run by the first task of the node */
int entrypoint_run(struct join *join, spank_t spank);

/* mpi.c: does the step's launcher suit the program's MPI library */
void mpi_check(spank_t spank, const char *file);

/* taskprolog.c: the site's TaskProlog, run outside the container */
void taskprolog_arm(void);
int taskprolog_run(spank_t spank);
void taskprolog_apply(spank_t spank);

#endif
