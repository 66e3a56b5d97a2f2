/* The calls of kernel.c. cffi reads this file too (build.py): plain prototypes only, no preprocessor.
 * Each returns -1 with errno set when it fails, unless it says otherwise. */

int enclos_fsopen(const char *fstype);
int enclos_fsconfig(int fs_fd, unsigned int command, const char *key, const char *value, int aux);
int enclos_fsmount(int fs_fd, unsigned int attributes);
int enclos_open_tree(int dir_fd, const char *path, unsigned int flags);
int enclos_move_mount(int from_fd, const char *from, int to_fd, const char *to, unsigned int flags);
int enclos_mount_setattr(int fd, const char *path, unsigned int flags, uint64_t set, uint64_t clear,
			 uint64_t propagation, int userns_fd);
int enclos_mount(const char *source, const char *target, const char *fstype, unsigned long flags);
int enclos_umount(const char *path, int flags);
int enclos_pivot_root(const char *new_root, const char *old_root);
int enclos_openat2(int dir_fd, const char *path, uint64_t flags, uint64_t mode, uint64_t resolve);

int enclos_setns(int fd, int nstype);
int enclos_unshare(int flags);
int enclos_userns_with_map(const char *uid_map, const char *gid_map);

int enclos_close_range(unsigned int first, unsigned int last);
int enclos_prctl(int option, unsigned long a, unsigned long b, unsigned long c, unsigned long d);
int enclos_capset(uint64_t effective, uint64_t permitted, uint64_t inheritable);
int enclos_capget(uint64_t *effective, uint64_t *permitted, uint64_t *inheritable);
int enclos_set_filesystem_ids(uint32_t uid, uint32_t gid);
int enclos_become(uint32_t uid, uint32_t gid, const uint32_t *groups, size_t count, uint64_t capabilities);
int enclos_seccomp(const void *program, size_t count);

int enclos_loop_free(int control_fd);
int enclos_loop_configure(int loop_fd, int file_fd, const char *name, uint64_t offset, uint64_t size, int writable);

int enclos_new_session_keyring(void);
int enclos_peer_groups(int socket_fd, uint32_t *groups, unsigned int capacity);
int enclos_inotify(const char *path, uint32_t events);
