/* A squashfs file, written as its members come, with libsquashfs (squashfs-tools-ng).
 *
 * The library compresses data and writes tables; what is here is the tree in between, which has to wait until the last
 * member is known. tar2sqfs, of the same library, keeps 250 to 370 bytes and several allocations for each entry, and
 * searches a list for each name. Here an entry takes 28 bytes, its name, and 5 to 11 bytes of a hash table; of a
 * file's data 36 bytes and 4 for each block are kept; the library keeps each distinct end of a file in mind, to store it
 * once, whether it is told to or not. Names of a directory are sorted once, at the end.
 *
 * Runs in an import's sandbox, on names and data that a user chose. Everything belongs to 0:0. */

#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include <sqfs/block.h>
#include <sqfs/block_processor.h>
#include <sqfs/block_writer.h>
#include <sqfs/compressor.h>
#include <sqfs/dir_writer.h>
#include <sqfs/error.h>
#include <sqfs/frag_table.h>
#include <sqfs/id_table.h>
#include <sqfs/inode.h>
#include <sqfs/io.h>
#include <sqfs/meta_writer.h>
#include <sqfs/super.h>
#include <sqfs/xattr_writer.h>

#include "squash.h"

#define NONE UINT32_MAX
#define NAME_BYTES 255
/* What the kernel takes: it refuses a symlink whose target does not fit one page. Names of extended attributes have 16
 * bits in a file; the library writes longer ones, and then the kernel reads their bytes as attributes. */
#define TARGET_BYTES 4095
#define XATTR_NAME_BYTES 255
#define XATTR_VALUE_BYTES 65536
#define IMPLIED_MODE (S_IFDIR | 0755)
/* Stack of a compressing thread; as shipped it is 8 MB, which counts against RLIMIT_DATA. */
#define STACK_BYTES (512 << 10)
/* Files whose inodes the library still holds; then we wait until it is done with them. */
#define PENDING 2048
#define PRIME (((uint64_t)1 << 61) - 1)

/* `data` is of a file the place of its description in `words`, plus one (0: empty), of a symlink its target in `names`,
 * of a hard link (mode 0) the entry that it names. `links` counts a file's names, and a directory's subdirectories. */
struct entry {
	uint32_t parent;
	uint32_t name;
	uint32_t mtime;
	uint32_t xattrs;
	uint32_t data;
	uint32_t links;
	uint16_t mode;
};

/* How the data of a file is described in `words`; the sizes of its blocks follow. */
struct description {
	uint32_t start[2];
	uint32_t size[2];
	uint32_t sparse[2];
	uint32_t fragment;
	uint32_t fragment_offset;
	uint32_t blocks;
};

struct squash {
	int fd;
	sqfs_file_t *file; /* The same file. */
	sqfs_compressor_t *compressor;
	sqfs_compressor_t *uncompressor;
	sqfs_block_writer_t *writer;
	sqfs_frag_table_t *fragments;
	sqfs_block_processor_t *processor;
	sqfs_xattr_writer_t *xattrs;
	sqfs_id_table_t *ids;
	sqfs_super_t super;
	uint16_t id;
	int in_file;
	int in_xattrs;

	struct entry *entries; /* The first is the root; a directory comes before what is in it. */
	size_t count, entries_room;
	char *names; /* Each with a NUL. */
	size_t names_used, names_room;
	uint32_t *words;
	size_t words_used, words_room;
	uint32_t *slots; /* Hash table of entries by parent and name; 0 is free, else entry + 1. A power of two. */
	size_t slots_count;
	uint64_t secret;

	sqfs_inode_generic_t *pending[PENDING];
	uint32_t pending_entry[PENDING];
	unsigned int pending_count;
};

/* --- room ---------------------------------------------------------------------------------------------------------- */

/* Make room for `more` items behind `used`. glibc moves large blocks by mremap(2), so nothing is there twice. */
static int grow(void **items, size_t *room, size_t used, size_t more, size_t item_bytes)
{
	size_t wanted = *room ? *room : 1024;
	void *grown;

	if (used + more > NONE - 1)
		return SQFS_ERROR_OVERFLOW;
	while (wanted < used + more)
		wanted += wanted / 4;
	if (wanted == *room)
		return 0;
	grown = realloc(*items, wanted * item_bytes);
	if (grown == NULL)
		return SQFS_ERROR_ALLOC;
	*items = grown;
	*room = wanted;
	return 0;
}

static int keep_text(struct squash *squash, const char *text, size_t bytes, uint32_t *place)
{
	int status = grow((void **)&squash->names, &squash->names_room, squash->names_used, bytes + 1, 1);

	if (status != 0)
		return status;
	*place = squash->names_used;
	memcpy(squash->names + *place, text, bytes);
	squash->names[*place + bytes] = '\0';
	squash->names_used += bytes + 1;
	return 0;
}

/* --- the tree ------------------------------------------------------------------------------------------------------ */

static uint64_t times_secret(const struct squash *squash, uint64_t value)
{
	unsigned __int128 product = (unsigned __int128)value * squash->secret;
	uint64_t folded = (uint64_t)(product & PRIME) + (uint64_t)(product >> 61);

	return (folded & PRIME) + (folded >> 61);
}

/* A polynomial at a secret place, modulo a prime: nobody can choose names that collide without knowing it. The last
 * piece is multiplied, too: the table takes the lowest bits, and those of a piece are its first characters. */
static uint64_t hash(const struct squash *squash, uint32_t parent, const char *name, size_t bytes)
{
	uint64_t value = times_secret(squash, (uint64_t)parent + 1);
	size_t at;

	for (at = 0; at < bytes; at += 7) {
		uint64_t piece = 0;

		memcpy(&piece, name + at, bytes - at < 7 ? bytes - at : 7);
		value = times_secret(squash, value + piece);
	}
	return value;
}

/* The slot of an entry, or the free one where it would be. */
static uint32_t *slot_of(const struct squash *squash, uint32_t parent, const char *name, size_t bytes)
{
	size_t place = hash(squash, parent, name, bytes) & (squash->slots_count - 1);

	while (squash->slots[place] != 0) {
		const struct entry *entry = &squash->entries[squash->slots[place] - 1];
		const char *other = squash->names + entry->name;

		if (entry->parent == parent && strncmp(other, name, bytes) == 0 && other[bytes] == '\0')
			break;
		place = (place + 1) & (squash->slots_count - 1);
	}
	return &squash->slots[place];
}

/* Keep a third of the hash table free. */
static int grow_slots(struct squash *squash)
{
	uint32_t index;

	if (squash->count + 1 < squash->slots_count / 3 * 2)
		return 0;
	free(squash->slots);
	squash->slots_count *= 2;
	squash->slots = calloc(squash->slots_count, sizeof(*squash->slots));
	if (squash->slots == NULL)
		return SQFS_ERROR_ALLOC;
	for (index = 1; index < squash->count; index++) {
		const struct entry *entry = &squash->entries[index];
		const char *name = squash->names + entry->name;

		*slot_of(squash, entry->parent, name, strlen(name)) = index + 1;
	}
	return 0;
}

static int add_entry(struct squash *squash, uint32_t parent, const char *name, size_t bytes, uint16_t mode,
		     uint32_t *index)
{
	struct entry entry = {.parent = parent, .xattrs = NONE, .mode = mode, .links = !S_ISDIR(mode)};
	int status;

	if (bytes == 0 || bytes > NAME_BYTES)
		return SQFS_ERROR_ARG_INVALID;
	if ((status = grow((void **)&squash->entries, &squash->entries_room, squash->count, 1, sizeof(entry))) != 0)
		return status;
	if ((status = grow_slots(squash)) != 0)
		return status;
	if ((status = keep_text(squash, name, bytes, &entry.name)) != 0)
		return status;
	*index = squash->count++;
	squash->entries[*index] = entry;
	*slot_of(squash, parent, name, bytes) = *index + 1;
	if (S_ISDIR(mode))
		squash->entries[parent].links++;
	return 0;
}

/* The directory that a path's last name is in, and where that name begins.
 *
 * make: directories that are missing are made, as nobody described them; else SQUASH_CONFLICT, as for a file in the way. */
static int walk(struct squash *squash, const char *path, size_t bytes, int make, uint32_t *directory, size_t *last)
{
	const char *slash;
	int status;

	*directory = 0;
	*last = 0;
	if (memchr(path, '\0', bytes) != NULL)
		return SQFS_ERROR_ARG_INVALID;
	while ((slash = memchr(path + *last, '/', bytes - *last)) != NULL) {
		size_t length = slash - path - *last;
		uint32_t slot = *slot_of(squash, *directory, path + *last, length);
		uint32_t child = slot - 1;

		if (slot == 0) {
			if (!make)
				return SQUASH_CONFLICT;
			status = add_entry(squash, *directory, path + *last, length, IMPLIED_MODE, &child);
			if (status != 0)
				return status;
		} else if (!S_ISDIR(squash->entries[child].mode)) {
			return SQUASH_CONFLICT;
		}
		*directory = child;
		*last += length + 1;
	}
	return 0;
}

/* --- data ---------------------------------------------------------------------------------------------------------- */

/* Keep of an inode that the library is done with what cannot be made again. */
static int describe(struct squash *squash, const sqfs_inode_generic_t *inode, uint32_t *place)
{
	struct description made = {.blocks = sqfs_inode_get_file_block_count(inode)};
	uint64_t start = 0, size = 0, sparse = inode->base.type == SQFS_INODE_EXT_FILE ? inode->data.file_ext.sparse : 0;
	size_t head = sizeof(made) / sizeof(uint32_t);
	int status;

	sqfs_inode_get_file_block_start(inode, &start);
	sqfs_inode_get_file_size(inode, &size);
	sqfs_inode_get_frag_location(inode, &made.fragment, &made.fragment_offset);
	memcpy(made.start, &start, sizeof(start));
	memcpy(made.size, &size, sizeof(size));
	memcpy(made.sparse, &sparse, sizeof(sparse));
	status = grow((void **)&squash->words, &squash->words_room, squash->words_used, head + made.blocks, sizeof(uint32_t));
	if (status != 0)
		return status;
	*place = squash->words_used + 1;
	memcpy(squash->words + squash->words_used, &made, sizeof(made));
	memcpy(squash->words + squash->words_used + head, inode->extra, made.blocks * sizeof(uint32_t));
	squash->words_used += head + made.blocks;
	return 0;
}

/* Describe all files that are pending; the library does not touch their inodes after a sync. */
static int settle(struct squash *squash)
{
	int status = sqfs_block_processor_sync(squash->processor);
	unsigned int at;

	for (at = 0; at < squash->pending_count && status == 0; at++)
		status = describe(squash, squash->pending[at], &squash->entries[squash->pending_entry[at]].data);
	if (status != 0)
		return status;
	for (at = 0; at < squash->pending_count; at++)
		sqfs_free(squash->pending[at]);
	squash->pending_count = 0;
	return 0;
}

static int begin_file(struct squash *squash, uint32_t index)
{
	int status;

	if (squash->pending_count == PENDING && (status = settle(squash)) != 0)
		return status;
	squash->pending_entry[squash->pending_count] = index;
	squash->pending[squash->pending_count] = NULL;
	status = sqfs_block_processor_begin_file(squash->processor, &squash->pending[squash->pending_count], NULL, 0);
	if (status == 0) {
		squash->pending_count++;
		squash->in_file = 1;
	}
	return status;
}

static int end_file(struct squash *squash)
{
	if (!squash->in_file)
		return 0;
	squash->in_file = 0;
	return sqfs_block_processor_end_file(squash->processor);
}

/* --- opening and members ------------------------------------------------------------------------------------------- */

static int create_compressors(struct squash *squash, const char *name, unsigned int level, uint32_t block_bytes)
{
	sqfs_compressor_config_t config;
	int id = sqfs_compressor_id_from_name(name);
	int status;

	if (id < 0)
		return id;
	if ((status = sqfs_compressor_config_init(&config, id, block_bytes, 0)) != 0)
		return status;
	if (level != 0 && (id == SQFS_COMP_ZSTD || id == SQFS_COMP_GZIP))
		config.level = level;
	if ((status = sqfs_compressor_create(&config, &squash->compressor)) != 0)
		return status;
	config.flags |= SQFS_COMP_FLAG_UNCOMPRESS;
	if ((status = sqfs_compressor_create(&config, &squash->uncompressor)) != 0)
		return status;
	if ((status = sqfs_super_init(&squash->super, block_bytes, 0, id)) != 0)
		return status;
	if ((status = sqfs_super_write(&squash->super, squash->file)) != 0)
		return status;
	if ((status = squash->compressor->write_options(squash->compressor, squash->file)) < 0)
		return status;
	if (status > 0)
		squash->super.flags |= SQFS_FLAG_COMPRESSOR_OPTIONS;
	return 0;
}

static int create_processor(struct squash *squash, uint32_t block_bytes, unsigned int workers, unsigned int backlog)
{
	sqfs_block_processor_desc_t wanted = {
		.size = sizeof(wanted),
		.max_block_size = block_bytes,
		.num_workers = workers,
		.max_backlog = backlog,
		.cmp = squash->compressor,
		.wr = squash->writer,
		.tbl = squash->fragments,
		.file = squash->file,
		.uncmp = squash->uncompressor,
	};
	pthread_attr_t before, small;
	int status;

	if (pthread_getattr_default_np(&before) != 0 || pthread_getattr_default_np(&small) != 0)
		return SQFS_ERROR_INTERNAL;
	pthread_attr_setstacksize(&small, STACK_BYTES);
	pthread_setattr_default_np(&small);
	status = sqfs_block_processor_create_ex(&wanted, &squash->processor);
	pthread_setattr_default_np(&before);
	pthread_attr_destroy(&small);
	pthread_attr_destroy(&before);
	return status;
}

static int create_tables(struct squash *squash)
{
	squash->writer = sqfs_block_writer_create(squash->file, SQFS_DEVBLK_SIZE, 0);
	squash->fragments = sqfs_frag_table_create(0);
	squash->xattrs = sqfs_xattr_writer_create(0);
	squash->ids = sqfs_id_table_create(0);
	squash->slots_count = 1 << 12;
	squash->slots = calloc(squash->slots_count, sizeof(*squash->slots));
	squash->entries_room = 1 << 11;
	squash->entries = calloc(squash->entries_room, sizeof(*squash->entries));
	if (!squash->writer || !squash->fragments || !squash->xattrs || !squash->ids || !squash->slots || !squash->entries)
		return SQFS_ERROR_ALLOC;
	squash->count = 1;
	squash->entries[0] = (struct entry){.parent = NONE, .xattrs = NONE, .mode = IMPLIED_MODE};
	if (getrandom(&squash->secret, sizeof(squash->secret), 0) != sizeof(squash->secret))
		return SQFS_ERROR_INTERNAL;
	squash->secret = squash->secret % (PRIME - 2) + 2;
	return sqfs_id_table_id_to_index(squash->ids, 0, &squash->id);
}

/* Begin a file; what is at the path is overwritten. squash_close has to be called in any case. */
int squash_open(struct squash **opened, const char *path, const char *compressor, unsigned int level,
		uint32_t block_bytes, unsigned int workers, unsigned int backlog)
{
	struct squash *squash = calloc(1, sizeof(*squash));
	int status;

	*opened = squash;
	if (squash == NULL)
		return SQFS_ERROR_ALLOC;
	squash->fd = -1;
	squash->file = sqfs_open_file(path, SQFS_FILE_OPEN_OVERWRITE);
	squash->fd = open(path, O_RDWR | O_CLOEXEC);
	if (squash->file == NULL || squash->fd < 0)
		return SQFS_ERROR_IO;
	if ((status = create_compressors(squash, compressor, level, block_bytes)) != 0)
		return status;
	if ((status = create_tables(squash)) != 0)
		return status;
	return create_processor(squash, block_bytes, workers, backlog);
}

/* An extended attribute of the member that comes next. */
int squash_xattr(struct squash *squash, const char *key, const void *value, size_t value_bytes)
{
	int status;

	if (strlen(key) > XATTR_NAME_BYTES || value_bytes > XATTR_VALUE_BYTES)
		return SQFS_ERROR_ARG_INVALID;
	if (!squash->in_xattrs && (status = sqfs_xattr_writer_begin(squash->xattrs, 0)) != 0)
		return status;
	squash->in_xattrs = 1;
	return sqfs_xattr_writer_add(squash->xattrs, key, value, value_bytes);
}

static int end_xattrs(struct squash *squash, uint32_t *xattrs)
{
	*xattrs = NONE;
	if (!squash->in_xattrs)
		return 0;
	squash->in_xattrs = 0;
	return sqfs_xattr_writer_end(squash->xattrs, xattrs);
}

/* A member that is no hard link; of a file with a size, its data has to follow. A directory may be described again.
 *
 * path: relative, with neither empty names nor "." or ".."; "." alone is the root.
 * mode: with the file's type; devices are all 0:0.
 * target: of a symlink. */
int squash_add(struct squash *squash, const char *path, size_t path_bytes, uint16_t mode, uint32_t mtime,
	       const char *target, uint64_t size)
{
	uint32_t directory, index = 0, slot = 1, xattrs;
	size_t last;
	int status;

	if ((status = end_file(squash)) != 0 || (status = end_xattrs(squash, &xattrs)) != 0)
		return status;
	if (S_ISLNK(mode) && strlen(target) > TARGET_BYTES)
		return SQFS_ERROR_ARG_INVALID;
	if (path_bytes != 1 || path[0] != '.') {
		if ((status = walk(squash, path, path_bytes, 1, &directory, &last)) != 0)
			return status;
		slot = *slot_of(squash, directory, path + last, path_bytes - last);
	}
	if (slot != 0) {
		index = slot - 1;
		if (!S_ISDIR(squash->entries[index].mode) || !S_ISDIR(mode))
			return SQUASH_CONFLICT;
	} else if ((status = add_entry(squash, directory, path + last, path_bytes - last, mode, &index)) != 0) {
		return status;
	}
	squash->entries[index].mode = mode;
	squash->entries[index].mtime = mtime;
	squash->entries[index].xattrs = xattrs;
	if (S_ISLNK(mode)) {
		uint32_t place;

		if ((status = keep_text(squash, target, strlen(target), &place)) != 0)
			return status;
		squash->entries[index].data = place;
	}
	return S_ISREG(mode) && size > 0 ? begin_file(squash, index) : 0;
}

/* One more name of a member that is there already. */
int squash_link(struct squash *squash, const char *path, size_t path_bytes, const char *target, size_t target_bytes)
{
	uint32_t directory, slot, named, index;
	size_t last;
	int status;

	if ((status = end_file(squash)) != 0)
		return status;
	if ((status = walk(squash, target, target_bytes, 0, &directory, &last)) != 0)
		return status;
	slot = *slot_of(squash, directory, target + last, target_bytes - last);
	named = slot - 1;
	if (slot != 0 && squash->entries[named].mode == 0)
		named = squash->entries[named].data;
	if (slot == 0 || S_ISDIR(squash->entries[named].mode))
		return SQUASH_CONFLICT;
	if ((status = walk(squash, path, path_bytes, 1, &directory, &last)) != 0)
		return status;
	if (*slot_of(squash, directory, path + last, path_bytes - last) != 0)
		return SQUASH_CONFLICT;
	if ((status = add_entry(squash, directory, path + last, path_bytes - last, 0, &index)) != 0)
		return status;
	squash->entries[index].data = named;
	squash->entries[named].links++;
	return 0;
}

/* Mode, with the type, of what is at a path: 0 for nothing, SQUASH_CONFLICT where a file is in the way. */
int squash_mode(const struct squash *squash, const char *path, size_t path_bytes)
{
	uint32_t directory = 0, slot;
	const struct entry *entry;
	const char *slash;

	if (path_bytes == 1 && path[0] == '.')
		return squash->entries[0].mode;
	while ((slash = memchr(path, '/', path_bytes)) != NULL) {
		slot = *slot_of(squash, directory, path, slash - path);
		if (slot == 0)
			return 0;
		if (!S_ISDIR(squash->entries[slot - 1].mode))
			return SQUASH_CONFLICT;
		directory = slot - 1;
		path_bytes -= slash + 1 - path;
		path = slash + 1;
	}
	slot = *slot_of(squash, directory, path, path_bytes);
	if (slot == 0)
		return 0;
	entry = &squash->entries[slot - 1];
	return entry->mode != 0 ? entry->mode : squash->entries[entry->data].mode;
}

/* Give a directory that is there other extended attributes. */
int squash_mark(struct squash *squash, const char *path, size_t path_bytes)
{
	uint32_t directory, index = 0, slot, xattrs;
	size_t last;
	int status;

	if ((status = end_xattrs(squash, &xattrs)) != 0)
		return status;
	if (path_bytes != 1 || path[0] != '.') {
		if ((status = walk(squash, path, path_bytes, 0, &directory, &last)) != 0)
			return status;
		slot = *slot_of(squash, directory, path + last, path_bytes - last);
		if (slot == 0 || !S_ISDIR(squash->entries[slot - 1].mode))
			return SQUASH_CONFLICT;
		index = slot - 1;
	}
	squash->entries[index].xattrs = xattrs;
	return 0;
}

/* Entries so far, with the root and the directories that nobody described. */
size_t squash_count(const struct squash *squash)
{
	return squash->count;
}

/* Data of the file that was added last. */
int squash_data(struct squash *squash, const void *data, size_t bytes)
{
	return sqfs_block_processor_append(squash->processor, data, bytes);
}

/* --- a place for the directory table ------------------------------------------------------------------------------ */

/* It comes behind the inode table, but both grow at the same time. The library would keep it in memory, each block as
 * large as if it were not compressed. So it is written further behind in the same file, and then moved. */
struct later {
	sqfs_file_t base;
	int fd;
	uint64_t start;
	uint64_t size;
};

static int later_write(sqfs_file_t *base, sqfs_u64 offset, const void *buffer, size_t bytes)
{
	struct later *later = (struct later *)base;
	size_t written = 0;

	while (written < bytes) {
		ssize_t more = pwrite(later->fd, (const char *)buffer + written, bytes - written,
				      later->start + offset + written);

		if (more <= 0)
			return SQFS_ERROR_IO;
		written += more;
	}
	if (offset + bytes > later->size)
		later->size = offset + bytes;
	return 0;
}

static sqfs_u64 later_size(const sqfs_file_t *base)
{
	return ((const struct later *)base)->size;
}

/* Behind all that the inode table can take: 64 bytes for each, sizes of blocks, targets of symlinks, indexes of
 * directories, and two bytes more for each of its blocks. */
static uint64_t later_start(const struct squash *squash)
{
	uint64_t bytes = 64 * squash->count + sizeof(uint32_t) * squash->words_used + 2 * squash->names_used;

	return squash->super.inode_table_start + bytes + bytes / 1024 + (1 << 16);
}

static int move_later(struct squash *squash, const struct later *later)
{
	char buffer[1 << 16];
	uint64_t moved = 0;

	while (moved < later->size) {
		ssize_t more = pread(later->fd, buffer, sizeof(buffer), later->start + moved);
		int status;

		if (more <= 0)
			return SQFS_ERROR_IO;
		if ((uint64_t)more > later->size - moved)
			more = later->size - moved;
		status = squash->file->write_at(squash->file, squash->super.directory_table_start + moved, buffer, more);
		if (status != 0)
			return status;
		moved += more;
	}
	return 0;
}

/* --- the end: inodes and directories ------------------------------------------------------------------------------- */

/* What is only needed while the tree is written. `order` has all entries but the root by directory and name. */
struct tables {
	uint32_t *order;
	uint32_t *numbers;
	uint64_t *references;
	sqfs_meta_writer_t *inodes;
	sqfs_meta_writer_t *directories;
	sqfs_dir_writer_t *writer;
	struct later later;
};

static int by_directory_and_name(const void *one, const void *other, void *context)
{
	const struct squash *squash = context;
	const struct entry *a = &squash->entries[*(const uint32_t *)one];
	const struct entry *b = &squash->entries[*(const uint32_t *)other];

	if (a->parent != b->parent)
		return a->parent < b->parent ? -1 : 1;
	return strcmp(squash->names + a->name, squash->names + b->name);
}

static int create_order(struct squash *squash, struct tables *tables)
{
	size_t others = squash->count - 1, at;
	uint32_t number = 0;

	tables->order = malloc((others + 1) * sizeof(*tables->order));
	tables->numbers = calloc(squash->count, sizeof(*tables->numbers));
	tables->references = malloc(squash->count * sizeof(*tables->references));
	if (!tables->order || !tables->numbers || !tables->references)
		return SQFS_ERROR_ALLOC;
	for (at = 0; at < others; at++)
		tables->order[at] = at + 1;
	qsort_r(tables->order, others, sizeof(*tables->order), by_directory_and_name, squash);
	for (at = 0; at < others; at++)
		if (squash->entries[tables->order[at]].mode != 0)
			tables->numbers[tables->order[at]] = ++number;
	tables->numbers[0] = ++number;
	squash->super.inode_count = number;
	memset(tables->references, 0xff, squash->count * sizeof(*tables->references));
	return 0;
}

/* Write an inode, and note where it is. It is freed. */
static int write_inode(struct squash *squash, struct tables *tables, uint32_t index, sqfs_inode_generic_t *inode)
{
	const struct entry *entry = &squash->entries[index];
	uint64_t block;
	uint32_t offset;
	int status;

	inode->base.mode = entry->mode;
	inode->base.uid_idx = inode->base.gid_idx = squash->id;
	inode->base.mod_time = entry->mtime;
	inode->base.inode_number = tables->numbers[index];
	sqfs_meta_writer_get_position(tables->inodes, &block, &offset);
	tables->references[index] = block << 16 | offset;
	status = sqfs_meta_writer_write_inode(tables->inodes, inode);
	sqfs_free(inode);
	return status;
}

static sqfs_inode_generic_t *new_inode(size_t payload_bytes)
{
	sqfs_inode_generic_t *inode = calloc(1, sizeof(*inode) + payload_bytes);

	if (inode != NULL)
		inode->payload_bytes_available = inode->payload_bytes_used = payload_bytes;
	return inode;
}

static sqfs_inode_generic_t *file_inode(const struct squash *squash, const struct entry *entry)
{
	struct description found = {.fragment = NONE, .fragment_offset = NONE};
	const uint32_t *words = NULL;
	sqfs_inode_generic_t *inode;

	if (entry->data != 0) {
		words = squash->words + entry->data - 1;
		memcpy(&found, words, sizeof(found));
	}
	inode = new_inode(found.blocks * sizeof(uint32_t));
	if (inode == NULL)
		return NULL;
	inode->base.type = SQFS_INODE_EXT_FILE;
	memcpy(&inode->data.file_ext.blocks_start, found.start, sizeof(found.start));
	memcpy(&inode->data.file_ext.file_size, found.size, sizeof(found.size));
	memcpy(&inode->data.file_ext.sparse, found.sparse, sizeof(found.sparse));
	inode->data.file_ext.nlink = entry->links;
	inode->data.file_ext.fragment_idx = found.fragment;
	inode->data.file_ext.fragment_offset = found.fragment_offset;
	inode->data.file_ext.xattr_idx = entry->xattrs;
	if (found.blocks)
		memcpy(inode->extra, words + sizeof(found) / sizeof(uint32_t), found.blocks * sizeof(uint32_t));
	return inode;
}

static sqfs_inode_generic_t *symlink_inode(const struct squash *squash, const struct entry *entry)
{
	const char *target = squash->names + entry->data;
	size_t bytes = strlen(target);
	sqfs_inode_generic_t *inode = new_inode(bytes);

	if (inode == NULL)
		return NULL;
	inode->base.type = SQFS_INODE_EXT_SLINK;
	inode->data.slink_ext.nlink = entry->links;
	inode->data.slink_ext.target_size = bytes;
	inode->data.slink_ext.xattr_idx = entry->xattrs;
	memcpy(inode->extra, target, bytes);
	return inode;
}

static sqfs_inode_generic_t *other_inode(const struct entry *entry)
{
	sqfs_inode_generic_t *inode = new_inode(0);

	if (inode == NULL)
		return NULL;
	inode->base.type = S_ISFIFO(entry->mode) ? SQFS_INODE_EXT_FIFO : SQFS_INODE_EXT_CDEV;
	if (S_ISFIFO(entry->mode)) {
		inode->data.ipc_ext.nlink = entry->links;
		inode->data.ipc_ext.xattr_idx = entry->xattrs;
	} else {
		inode->data.dev_ext.nlink = entry->links;
		inode->data.dev_ext.xattr_idx = entry->xattrs;
	}
	return inode;
}

/* The inode of what is no directory, once, however many names it has. */
static int write_leaf(struct squash *squash, struct tables *tables, uint32_t index)
{
	const struct entry *entry = &squash->entries[index];
	sqfs_inode_generic_t *inode;

	if (tables->references[index] != UINT64_MAX)
		return 0;
	if (S_ISREG(entry->mode))
		inode = file_inode(squash, entry);
	else if (S_ISLNK(entry->mode))
		inode = symlink_inode(squash, entry);
	else if (S_ISFIFO(entry->mode) || S_ISCHR(entry->mode))
		inode = other_inode(entry);
	else
		return SQFS_ERROR_UNSUPPORTED;
	if (inode == NULL)
		return SQFS_ERROR_ALLOC;
	sqfs_inode_make_basic(inode); /* Stays as it is where that is not enough for it. */
	return write_inode(squash, tables, index, inode);
}

/* A directory: the inodes of its files, its list of names, its own inode. Those of its subdirectories are written.
 *
 * first, end: its names in `order`. */
static int write_directory(struct squash *squash, struct tables *tables, uint32_t index, size_t first, size_t end)
{
	const struct entry *directory = &squash->entries[index];
	uint32_t nlink = directory->links + 2;
	uint32_t parent = index == 0 ? tables->numbers[0] + 1 : tables->numbers[directory->parent];
	sqfs_inode_generic_t *inode;
	int status = sqfs_dir_writer_begin(tables->writer, 0);

	for (; first < end && status == 0; first++) {
		const struct entry *entry = &squash->entries[tables->order[first]];
		uint32_t named = entry->mode != 0 ? tables->order[first] : entry->data;
		uint16_t mode = squash->entries[named].mode;

		if (!S_ISDIR(mode) && (status = write_leaf(squash, tables, named)) != 0)
			return status;
		status = sqfs_dir_writer_add_entry(tables->writer, squash->names + entry->name, tables->numbers[named],
						   tables->references[named], mode);
	}
	if (status != 0 || (status = sqfs_dir_writer_end(tables->writer)) != 0)
		return status;
	inode = sqfs_dir_writer_create_inode(tables->writer, 0, directory->xattrs, parent);
	if (inode == NULL)
		return SQFS_ERROR_ALLOC;
	if (inode->base.type == SQFS_INODE_DIR)
		inode->data.dir.nlink = nlink;
	else
		inode->data.dir_ext.nlink = nlink;
	return write_inode(squash, tables, index, inode);
}

/* All directories, those below before those above: their references are in the lists of the others. */
static int write_directories(struct squash *squash, struct tables *tables)
{
	size_t first, end = squash->count - 1;
	uint32_t index = squash->count;
	int status = 0;

	while (index-- > 0 && status == 0) {
		if (!S_ISDIR(squash->entries[index].mode))
			continue;
		for (first = end; first > 0 && squash->entries[tables->order[first - 1]].parent == index; first--)
			;
		status = write_directory(squash, tables, index, first, end);
		end = first;
	}
	return status;
}

static int write_tree(struct squash *squash, struct tables *tables)
{
	int status = create_order(squash, tables);

	if (status != 0)
		return status;
	squash->super.inode_table_start = squash->file->get_size(squash->file);
	tables->later.base.write_at = later_write;
	tables->later.base.get_size = later_size;
	tables->later.fd = squash->fd;
	tables->later.start = later_start(squash);
	tables->inodes = sqfs_meta_writer_create(squash->file, squash->compressor, 0);
	tables->directories = sqfs_meta_writer_create(&tables->later.base, squash->compressor, 0);
	if (tables->inodes == NULL || tables->directories == NULL)
		return SQFS_ERROR_ALLOC;
	tables->writer = sqfs_dir_writer_create(tables->directories, 0);
	if (tables->writer == NULL)
		return SQFS_ERROR_ALLOC;
	if ((status = write_directories(squash, tables)) != 0)
		return status;
	if ((status = sqfs_meta_writer_flush(tables->inodes)) != 0)
		return status;
	if ((status = sqfs_meta_writer_flush(tables->directories)) != 0)
		return status;
	squash->super.root_inode_ref = tables->references[0];
	squash->super.directory_table_start = squash->file->get_size(squash->file);
	if (squash->super.directory_table_start > tables->later.start)
		return SQFS_ERROR_INTERNAL;
	return move_later(squash, &tables->later);
}

static int write_tables(struct squash *squash)
{
	int status;

	status = sqfs_frag_table_write(squash->fragments, squash->file, &squash->super, squash->compressor);
	if (status == 0)
		status = sqfs_id_table_write(squash->ids, squash->file, &squash->super, squash->compressor);
	if (status == 0)
		status = sqfs_xattr_writer_flush(squash->xattrs, squash->file, &squash->super, squash->compressor);
	if (status != 0)
		return status;
	squash->super.bytes_used = squash->file->get_size(squash->file);
	if ((status = sqfs_super_write(&squash->super, squash->file)) != 0)
		return status;
	/* Loop devices and the kernel's readers want whole blocks. */
	return squash->file->truncate(squash->file, (squash->super.bytes_used + SQFS_DEVBLK_SIZE - 1)
							    / SQFS_DEVBLK_SIZE * SQFS_DEVBLK_SIZE);
}

/* Give back what only members needed: the tree's own tables come to the same memory. */
static void drop_processor(struct squash *squash)
{
	sqfs_destroy(squash->processor);
	sqfs_destroy(squash->writer);
	squash->processor = NULL;
	squash->writer = NULL;
	free(squash->slots);
	squash->slots = NULL;
}

/* Write the tree behind the data; then only squash_close may follow. */
int squash_finish(struct squash *squash)
{
	struct tables tables = {0};
	int status;

	if ((status = end_file(squash)) != 0)
		return status;
	if ((status = sqfs_block_processor_finish(squash->processor)) != 0 || (status = settle(squash)) != 0)
		return status;
	drop_processor(squash);
	status = write_tree(squash, &tables);
	sqfs_destroy(tables.writer);
	sqfs_destroy(tables.directories);
	sqfs_destroy(tables.inodes);
	free(tables.references);
	free(tables.numbers);
	free(tables.order);
	return status == 0 ? write_tables(squash) : status;
}

/* Free everything, also after errors; the file stays as it is. */
void squash_close(struct squash *squash)
{
	unsigned int at;

	if (squash == NULL)
		return;
	drop_processor(squash);
	for (at = 0; at < squash->pending_count; at++)
		sqfs_free(squash->pending[at]);
	sqfs_destroy(squash->xattrs);
	sqfs_destroy(squash->ids);
	sqfs_destroy(squash->fragments);
	sqfs_destroy(squash->uncompressor);
	sqfs_destroy(squash->compressor);
	sqfs_destroy(squash->file);
	if (squash->fd >= 0)
		close(squash->fd);
	free(squash->entries);
	free(squash->names);
	free(squash->words);
	free(squash);
}
