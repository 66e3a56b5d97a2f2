/*
 * A launcher that cannot reach the program's MPI library, said in words before the library says something else, or nothing:
 * MPICH under --mpi=pmix, and OpenMPI from 5 on under --mpi=pmi2, let each task believe to be the only one.
 *
 * The library is what the program itself is linked with (DT_NEEDED, elf(5)); scripts and interpreters tell nothing. Runs as
 * the user, in the container, in each task, because each may be the first to reach MPI; one of each node says it. It reads
 * the user's file: every offset is his word, and pread() beyond the end reads nothing.
 */
#define _GNU_SOURCE
#include "enclos.h"

#include <elf.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#define HEADERS 64 /* program headers that are looked at, entries of the dynamic section */
#define ENTRIES 512

static const struct library {
	const char *prefix, *name, *launcher, *right;
} libraries[] = {
	{ "libmpich.so.", "MPICH", "pmix", "pmi2" },
	{ "libmpi.so.12", "an MPI of MPICH's kind", "pmix", "pmi2" },
	{ "libmpi.so.40", "OpenMPI", "pmi2", "pmix" },
};

static bool read_at(int fd, void *buffer, size_t size, uint64_t offset)
{
	return offset <= INT64_MAX && pread(fd, buffer, size, (off_t)offset) == (ssize_t)size;
}

/* Where in the file an address of the loaded program is; 0 if nowhere. */
static uint64_t file_offset(const Elf64_Phdr *headers, size_t count, uint64_t address)
{
	for (size_t i = 0; i < count; i++) {
		if (headers[i].p_type == PT_LOAD && address >= headers[i].p_vaddr &&
		    address - headers[i].p_vaddr < headers[i].p_filesz)
			return headers[i].p_offset + (address - headers[i].p_vaddr);
	}
	return 0;
}

static const struct library *match(const char *needed, const char *launcher)
{
	for (size_t i = 0; i < sizeof(libraries) / sizeof(libraries[0]); i++) {
		if (strncmp(needed, libraries[i].prefix, strlen(libraries[i].prefix)) == 0 &&
		    strncmp(launcher, libraries[i].launcher, 4) == 0)
			return &libraries[i];
	}
	return NULL;
}

static const struct library *find_needed(int fd, uint64_t dynamic, uint64_t strings, const char *launcher)
{
	const struct library *found = NULL;
	Elf64_Dyn entry;

	for (size_t i = 0; i < ENTRIES && found == NULL; i++) {
		char name[32] = "";

		if (!read_at(fd, &entry, sizeof(entry), dynamic + i * sizeof(entry)) || entry.d_tag == DT_NULL)
			break;
		if (entry.d_tag == DT_NEEDED && read_at(fd, name, sizeof(name) - 1, strings + entry.d_un.d_val))
			found = match(name, launcher);
	}
	return found;
}

/* The library that the launcher does not suit, if the program is linked with one. */
static const struct library *unsuited(int fd, const char *launcher)
{
	Elf64_Ehdr header;
	Elf64_Phdr headers[HEADERS];
	uint64_t dynamic = 0, strings = 0;
	Elf64_Dyn entry;
	size_t count;

	if (!read_at(fd, &header, sizeof(header), 0) || memcmp(header.e_ident, ELFMAG, SELFMAG) != 0 ||
	    header.e_ident[EI_CLASS] != ELFCLASS64 || header.e_phentsize != sizeof(headers[0]))
		return NULL;
	count = header.e_phnum < HEADERS ? header.e_phnum : HEADERS;
	if (!read_at(fd, headers, count * sizeof(headers[0]), header.e_phoff))
		return NULL;
	for (size_t i = 0; i < count; i++) {
		if (headers[i].p_type == PT_DYNAMIC)
			dynamic = headers[i].p_offset;
	}
	for (size_t i = 0; dynamic != 0 && i < ENTRIES && strings == 0; i++) {
		if (!read_at(fd, &entry, sizeof(entry), dynamic + i * sizeof(entry)) || entry.d_tag == DT_NULL)
			break;
		if (entry.d_tag == DT_STRTAB)
			strings = file_offset(headers, count, entry.d_un.d_ptr);
	}
	return strings != 0 ? find_needed(fd, dynamic, strings, launcher) : NULL;
}

static bool is_one_of_several(spank_t spank)
{
	uint32_t count;

	return spank_get_item(spank, S_JOB_TOTAL_TASK_COUNT, &count) == ESPANK_SUCCESS && count > 1;
}

/* Says what is wrong, and lets the program run: a library may have been built in an unusual way. */
void mpi_check(spank_t spank, const char *file)
{
	const struct library *library = NULL;
	char launcher[32];
	int fd;

	if (!is_one_of_several(spank) ||
	    spank_getenv(spank, "SLURM_MPI_TYPE", launcher, sizeof(launcher)) != ESPANK_SUCCESS)
		return;
	fd = open(file, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
	if (fd < 0)
		return;
	library = unsuited(fd, launcher);
	close(fd);
	if (library != NULL && report_first_notice())
		slurm_spank_log("enclos: %s is linked with %s, which --mpi=%s possibly does not start; use --mpi=%s", file,
				library->name, launcher, library->right);
}
