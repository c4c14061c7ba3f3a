/* A layer between a process and its files: at the n-th change under a folder, something happens.

Preloaded (LD_PRELOAD), so that whoever writes is met: Python, C++ of torch, Rust of safetensors. Armed by `arm` through
ctypes, in the process itself. Counted are opens for writing, writes, truncations, fsyncs, renames, new and removed names. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, DIE, FULL, READ_ONLY, BROKEN, SLOW };
static char folder[PATH_MAX];
static int mode = COUNT, number, count;

void arm(const char *path, int how, int at) {
    strncpy(folder, path, sizeof folder - 1);
    mode = how, number = at, count = 0;
}

static int is_inside(int at, const char *path) {
    char link[64], real[PATH_MAX];
    if (!*folder) return 0;
    if (path && *path == '/') return !strncmp(path, folder, strlen(folder));
    snprintf(link, sizeof link, at == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", at);
    ssize_t length = readlink(link, real, sizeof real - 1);
    if (length < 0) return 0;
    snprintf(real + length, sizeof real - length, "/%s", path ? path : "");
    return !strncmp(real, folder, strlen(folder));
}
static void die(void) { raise(SIGKILL); }

/* The number of an error that takes the act's place, or 0. *is_last: the process ends after the act. */
static int meet(int at, const char *path, int makes, int *is_last) {
    *is_last = 0;
    if (!is_inside(at, path)) return 0;
    int now = __sync_add_and_fetch(&count, 1);
    if (mode == DIE) *is_last = now == number;
    if (mode == FULL && now >= number && makes) return ENOSPC;
    if (mode == READ_ONLY && now >= number) return EROFS;
    if (mode == BROKEN && now == number) return EIO;
    return 0;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define ACT(type, at, path, makes, call)                                                                              \
    int is_last, error = meet(at, path, makes, &is_last);                                                             \
    if (error) return errno = error, (type)-1;                                                                        \
    type result = call;                                                                                               \
    if (is_last) die();                                                                                               \
    return result;

#define OPEN(name)                                                                                                    \
    int name(const char *path, int flags, ...) {                                                                      \
        va_list rest;                                                                                                 \
        va_start(rest, flags);                                                                                        \
        int permissions = va_arg(rest, int);                                                                          \
        va_end(rest);                                                                                                 \
        if (!(flags & (O_WRONLY | O_RDWR | O_CREAT))) return REAL(name)(path, flags, permissions);                    \
        ACT(int, AT_FDCWD, path, 1, REAL(name)(path, flags, permissions))                                             \
    }
OPEN(open)
OPEN(open64)
#define OPENAT(name)                                                                                                  \
    int name(int at, const char *path, int flags, ...) {                                                              \
        va_list rest;                                                                                                 \
        va_start(rest, flags);                                                                                        \
        int permissions = va_arg(rest, int);                                                                          \
        va_end(rest);                                                                                                 \
        if (!(flags & (O_WRONLY | O_RDWR | O_CREAT))) return REAL(name)(at, path, flags, permissions);                \
        ACT(int, at, path, 1, REAL(name)(at, path, flags, permissions))                                               \
    }
OPENAT(openat)
OPENAT(openat64)
#define FOPEN(name)                                                                                                   \
    FILE *name(const char *path, const char *how) {                                                                   \
        int is_last = 0, error = strpbrk(how, "wa+") ? meet(AT_FDCWD, path, 1, &is_last) : 0;                         \
        if (error) return errno = error, NULL;                                                                        \
        FILE *result = REAL(name)(path, how);                                                                         \
        if (is_last) die();                                                                                           \
        return result;                                                                                                \
    }
FOPEN(fopen)
FOPEN(fopen64)

/* The last act of a process writes half; so does the one that fills the disk. */
ssize_t write(int file, const void *data, size_t size) {
    int is_last, error = meet(file, NULL, 1, &is_last);
    if (error == ENOSPC && count == number && size > 1) return REAL(write)(file, data, size / 2);
    if (error) return errno = error, -1;
    if (!is_last) return REAL(write)(file, data, size);
    REAL(write)(file, data, size / 2);
    die();
    return -1;
}
ssize_t writev(int file, const struct iovec *parts, int n) { ACT(ssize_t, file, NULL, 1, REAL(writev)(file, parts, n)) }
ssize_t pwrite(int file, const void *data, size_t size, off_t at) {
    ACT(ssize_t, file, NULL, 1, REAL(pwrite)(file, data, size, at))
}
ssize_t pwrite64(int file, const void *data, size_t size, off64_t at) {
    ACT(ssize_t, file, NULL, 1, REAL(pwrite64)(file, data, size, at))
}
ssize_t sendfile(int to, int from, off_t *at, size_t size) { ACT(ssize_t, to, NULL, 1, REAL(sendfile)(to, from, at, size)) }
ssize_t sendfile64(int to, int from, off64_t *at, size_t size) {
    ACT(ssize_t, to, NULL, 1, REAL(sendfile64)(to, from, at, size))
}
int ftruncate(int file, off_t size) { ACT(int, file, NULL, 1, REAL(ftruncate)(file, size)) }
int ftruncate64(int file, off64_t size) { ACT(int, file, NULL, 1, REAL(ftruncate64)(file, size)) }
int fsync(int file) {
    if (mode == SLOW && is_inside(file, NULL)) usleep(number * 1000);
    ACT(int, file, NULL, 0, 0) /* whoever is killed has the kernel write on: to wait for the disk would change nothing */
}
int rename(const char *from, const char *to) { ACT(int, AT_FDCWD, to, 0, REAL(rename)(from, to)) }
int renameat(int f, const char *from, int t, const char *to) { ACT(int, t, to, 0, REAL(renameat)(f, from, t, to)) }
int mkdir(const char *path, mode_t how) { ACT(int, AT_FDCWD, path, 1, REAL(mkdir)(path, how)) }
int rmdir(const char *path) { ACT(int, AT_FDCWD, path, 0, REAL(rmdir)(path)) }
int unlink(const char *path) { ACT(int, AT_FDCWD, path, 0, REAL(unlink)(path)) }
int unlinkat(int at, const char *path, int how) { ACT(int, at, path, 0, REAL(unlinkat)(at, path, how)) }
