/* The calls of squash.c. cffi reads this file too (build.py): plain declarations only, no preprocessor. */

struct squash;

/* Beside 0 for success, and libsquashfs' own (sqfs/error.h), which are negative. */
enum { SQUASH_CONFLICT = 1 };

int squash_open(struct squash **opened, const char *path, const char *compressor, unsigned int level,
		uint32_t block_bytes, unsigned int workers, unsigned int backlog);
int squash_xattr(struct squash *squash, const char *key, const void *value, size_t value_bytes);
int squash_add(struct squash *squash, const char *path, size_t path_bytes, uint16_t mode, uint32_t mtime,
	       const char *target, uint64_t size);
int squash_link(struct squash *squash, const char *path, size_t path_bytes, const char *target, size_t target_bytes);
int squash_mode(const struct squash *squash, const char *path, size_t path_bytes);
int squash_mark(struct squash *squash, const char *path, size_t path_bytes);
size_t squash_count(const struct squash *squash);
int squash_data(struct squash *squash, const void *data, size_t bytes);
int squash_finish(struct squash *squash);
void squash_close(struct squash *squash);
