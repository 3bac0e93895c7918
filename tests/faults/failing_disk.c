/* Preloaded into the trainer: what writes below $FAILING_DISK fails, or is slow, while $FAILING_DISK_CONTROL exists.
   That file holds two numbers: the errno that calls fail with (0: none) and how many milliseconds they take first. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int fails(const char *path) {
  const char *prefix = getenv("FAILING_DISK"), *control = getenv("FAILING_DISK_CONTROL");
  char text[64] = "";
  int number = 0, delay = 0, file;
  if (!path || !prefix || !control || strncmp(path, prefix, strlen(prefix))) return 0;
  file = REAL(open)(control, O_RDONLY);
  if (file < 0) return 0;
  if (read(file, text, sizeof text - 1) > 0) sscanf(text, "%d %d", &number, &delay);
  close(file);
  if (delay) usleep(1000 * delay);
  if (number) errno = number;
  return number != 0;
}

static int fails_fd(int fd) {
  char link[64], path[PATH_MAX];
  ssize_t length;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  length = readlink(link, path, sizeof path - 1);
  if (length <= 0) return 0;
  path[length] = 0;
  return fails(path);
}

#define OPEN(name)                                                   \
  int name(const char *path, int flags, ...) {                       \
    va_list arguments;                                               \
    mode_t mode;                                                     \
    va_start(arguments, flags);                                      \
    mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(arguments, mode_t) : 0; \
    va_end(arguments);                                               \
    if (flags & (O_WRONLY | O_RDWR | O_CREAT) && fails(path)) return -1; \
    return REAL(name)(path, flags, mode);                            \
  }
OPEN(open)
OPEN(open64)

#define FOPEN(name)                                                  \
  FILE *name(const char *path, const char *mode) {                   \
    return strpbrk(mode, "wa+") && fails(path) ? NULL : REAL(name)(path, mode); \
  }
FOPEN(fopen)
FOPEN(fopen64)

int mkdir(const char *path, mode_t mode) { return fails(path) ? -1 : REAL(mkdir)(path, mode); }
int rename(const char *from, const char *to) { return fails(to) ? -1 : REAL(rename)(from, to); }
int fsync(int fd) { return fails_fd(fd) ? -1 : REAL(fsync)(fd); }
ssize_t write(int fd, const void *data, size_t count) { return fails_fd(fd) ? -1 : REAL(write)(fd, data, count); }
