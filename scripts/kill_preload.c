/* Kill the process before its N-th change of a file, for scripts/kill_everywhere.py.
 *
 * The library is preloaded. Each call that changes a file or folder below a root counts; so does
 * each piece of an HTTP request that changes a repo (POST, PUT). fsync changes nothing that a
 * killed process could leave behind, so fsync does not count, and does nothing. The count and the list of operations
 * are in shared memory, so that the parent of a killed process can read both.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define LISTED (1 << 20)
struct shared {
    atomic_long count, used;
    char list[LISTED]; /* "NAME PATH\n" of each operation */
};
static struct shared *page;
static char root[PATH_MAX];
static long at = -1;
static int armed, torn;
static unsigned char uploads[65536]; /* sockets that send a POST or a PUT */

__attribute__((constructor)) static void begin(void) {
    page = mmap(NULL, sizeof *page, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
}

/* Count from 0 on; die before operation `number` (-1: never), or in the middle if `half`. */
void kill_arm(const char *folder, long number, int half) {
    snprintf(root, sizeof root, "%s", folder);
    at = number, torn = half, armed = 1;
    page->count = page->used = 0;
    memset(page->list, 0, LISTED);
}

long kill_count(void) { return page->count; }
const char *kill_list(void) { return page->list; }

static void die(void) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

static int counted(const char *name, const char *path) {
    char line[PATH_MAX + 40];
    int length = snprintf(line, sizeof line, "%s %s\n", name, path);
    long start = atomic_fetch_add(&page->used, length);
    if (start + length < LISTED) memcpy(page->list + start, line, length);
    return atomic_fetch_add(&page->count, 1) == at;
}

static int of_path(int folder, const char *path, char *whole) {
    char base[PATH_MAX] = "", link[64];
    if (path[0] != '/') {
        snprintf(link, sizeof link, folder == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", folder);
        ssize_t length = readlink(link, base, sizeof base - 1);
        base[length < 0 ? 0 : length] = 0;
    }
    snprintf(whole, PATH_MAX, "%s%s%s", base, path[0] == '/' ? "" : "/", path);
    return !strncmp(whole, root, strlen(root));
}

/* Count a change of a path; die if it is the one. */
static void change(const char *name, int folder, const char *path) {
    char whole[PATH_MAX];
    if (armed && path && of_path(folder, path, whole) && counted(name, whole)) die();
}

/* Count the start of a process. */
void kill_start(const char *what) {
    if (armed && counted("start", what)) die();
}

/* Count a change of an open file. Return 1 if the caller must write one half and die. */
static int change_file(const char *name, int file, size_t size) {
    char link[64], whole[PATH_MAX] = "";
    if (!armed) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, whole, sizeof whole - 1);
    if (length < 0 || strncmp(whole, root, strlen(root)) || !counted(name, whole)) return 0;
    if (!torn || size < 2) die();
    return 1;
}

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)
#define HALF(name, file, size, call) \
    if (change_file(name, file, size)) { \
        size /= 2; \
        call; \
        die(); \
    }

static int opens(const char *symbol, int folder, const char *path, int flags, mode_t mode) {
    REAL(int, "openat", int, const char *, int, mode_t);
    if (flags & (O_CREAT | O_TRUNC)) change(symbol, folder, path);
    return real(folder, path, flags, mode);
}
#define MODE \
    va_list list; \
    va_start(list, flags); \
    mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(list, mode_t) : 0; \
    va_end(list)
int open(const char *path, int flags, ...) { MODE; return opens("open", AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE; return opens("open", AT_FDCWD, path, flags, mode); }
int openat(int at, const char *path, int flags, ...) { MODE; return opens("open", at, path, flags, mode); }
int openat64(int at, const char *path, int flags, ...) { MODE; return opens("open", at, path, flags, mode); }
int creat(const char *path, mode_t mode) {
    return opens("open", AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode);
}
FILE *fopen64(const char *path, const char *mode) {
    REAL(FILE *, "fopen64", const char *, const char *);
    if (mode[0] == 'w' || mode[0] == 'a') change("fopen", AT_FDCWD, path);
    return real(path, mode);
}
FILE *fopen(const char *path, const char *mode) { return fopen64(path, mode); }

ssize_t write(int file, const void *data, size_t size) {
    REAL(ssize_t, "write", int, const void *, size_t);
    HALF("write", file, size, real(file, data, size));
    return real(file, data, size);
}
ssize_t pwrite(int file, const void *data, size_t size, off_t offset) {
    REAL(ssize_t, "pwrite", int, const void *, size_t, off_t);
    HALF("pwrite", file, size, real(file, data, size, offset));
    return real(file, data, size, offset);
}
ssize_t pwrite64(int file, const void *data, size_t size, off_t offset) {
    return pwrite(file, data, size, offset);
}
ssize_t writev(int file, const struct iovec *parts, int count) {
    REAL(ssize_t, "writev", int, const struct iovec *, int);
    HALF("writev", file, count, real(file, parts, count));
    return real(file, parts, count);
}
ssize_t pwritev(int file, const struct iovec *parts, int count, off_t offset) {
    REAL(ssize_t, "pwritev", int, const struct iovec *, int, off_t);
    HALF("pwritev", file, count, real(file, parts, count, offset));
    return real(file, parts, count, offset);
}
ssize_t pwritev64(int file, const struct iovec *parts, int count, off_t offset) {
    return pwritev(file, parts, count, offset);
}
ssize_t sendfile(int file, int from, off_t *offset, size_t size) {
    REAL(ssize_t, "sendfile", int, int, off_t *, size_t);
    HALF("sendfile", file, size, real(file, from, offset, 100));
    return real(file, from, offset, size);
}
ssize_t sendfile64(int file, int from, off_t *offset, size_t size) {
    return sendfile(file, from, offset, size);
}
ssize_t copy_file_range(int from, off_t *start, int file, off_t *offset, size_t size, unsigned flags) {
    REAL(ssize_t, "copy_file_range", int, off_t *, int, off_t *, size_t, unsigned);
    HALF("copy_file_range", file, size, real(from, start, file, offset, 100, flags));
    return real(from, start, file, offset, size, flags);
}

#define ON_FILE(type, name, symbol, parameters, arguments) \
    type name parameters { \
        static type(*real) parameters; \
        if (!real) real = (type(*) parameters)dlsym(RTLD_NEXT, symbol); \
        change_file(symbol, file, 0); \
        return real arguments; \
    }
ON_FILE(int, ftruncate, "ftruncate", (int file, off_t size), (file, size))
ON_FILE(int, ftruncate64, "ftruncate", (int file, off_t size), (file, size))
ON_FILE(int, posix_fallocate, "posix_fallocate", (int file, off_t a, off_t b), (file, a, b))
ON_FILE(int, posix_fallocate64, "posix_fallocate", (int file, off_t a, off_t b), (file, a, b))
ON_FILE(int, fallocate, "fallocate", (int file, int mode, off_t a, off_t b), (file, mode, a, b))
ON_FILE(int, fallocate64, "fallocate", (int file, int mode, off_t a, off_t b), (file, mode, a, b))
ON_FILE(int, futimens, "futimens", (int file, const struct timespec times[2]), (file, times))
ON_FILE(int, fchmod, "fchmod", (int file, mode_t mode), (file, mode))

#define ON_PATH(name, folder, path, parameters, arguments) \
    int name parameters { \
        static int(*real) parameters; \
        if (!real) real = (int(*) parameters)dlsym(RTLD_NEXT, #name); \
        change(#name, folder, path); \
        return real arguments; \
    }
typedef const char *text;
ON_PATH(rename, AT_FDCWD, b, (text a, text b), (a, b))
ON_PATH(renameat, y, b, (int x, text a, int y, text b), (x, a, y, b))
ON_PATH(renameat2, y, b, (int x, text a, int y, text b, unsigned f), (x, a, y, b, f))
ON_PATH(unlink, AT_FDCWD, a, (text a), (a))
ON_PATH(unlinkat, x, a, (int x, text a, int f), (x, a, f))
ON_PATH(link, AT_FDCWD, b, (text a, text b), (a, b))
ON_PATH(linkat, y, b, (int x, text a, int y, text b, int f), (x, a, y, b, f))
ON_PATH(symlink, AT_FDCWD, b, (text a, text b), (a, b))
ON_PATH(symlinkat, y, b, (text a, int y, text b), (a, y, b))
ON_PATH(mkdir, AT_FDCWD, a, (text a, mode_t m), (a, m))
ON_PATH(mkdirat, x, a, (int x, text a, mode_t m), (x, a, m))
ON_PATH(rmdir, AT_FDCWD, a, (text a), (a))
ON_PATH(truncate, AT_FDCWD, a, (text a, off_t n), (a, n))
ON_PATH(truncate64, AT_FDCWD, a, (text a, off_t n), (a, n))
ON_PATH(chmod, AT_FDCWD, a, (text a, mode_t m), (a, m))
ON_PATH(fchmodat, x, a, (int x, text a, mode_t m, int f), (x, a, m, f))
ON_PATH(utimensat, x, a, (int x, text a, const struct timespec t[2], int f), (x, a, t, f))

/* Not needed where the machine does not fail, and slow. */
int fsync(int file) { return fcntl(file, F_GETFD) < 0 ? -1 : 0; }
int fdatasync(int file) { return fsync(file); }

ssize_t send(int file, const void *data, size_t size, int flags) {
    REAL(ssize_t, "send", int, const void *, size_t, int);
    if (armed && file >= 0 && file < (int)sizeof uploads) {
        const char *head = data;
        if (size > 5 && (!strncmp(head, "POST ", 5) || !strncmp(head, "PUT ", 4))) uploads[file] = 1;
        if (size > 5 && (!strncmp(head, "GET ", 4) || !strncmp(head, "HEAD ", 5))) uploads[file] = 0;
        char line[80];
        snprintf(line, sizeof line, "%.*s", (int)strnlen(head, size < 60 ? size : 60), head);
        line[strcspn(line, "\r\n")] = 0;
        if (uploads[file] && counted("send", line)) {
            if (torn && size > 1) real(file, data, size / 2, flags);
            die();
        }
    }
    return real(file, data, size, flags);
}
