/* A disk that does not answer while the file named by SLOW_WHILE is there: writes to paths that hold SLOW_PATH wait. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static void wait_for_disk(int descriptor) {
  const char *part = getenv("SLOW_PATH"), *flag = getenv("SLOW_WHILE");
  char link[64], path[4096];
  if (!part || !flag) return;
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return;
  path[length] = 0;
  while (strstr(path, part) && access(flag, F_OK) == 0) usleep(20000);
}

ssize_t write(int descriptor, const void *data, size_t size) {
  static ssize_t (*next)(int, const void *, size_t);
  if (!next) next = dlsym(RTLD_NEXT, "write");
  wait_for_disk(descriptor);
  return next(descriptor, data, size);
}

ssize_t writev(int descriptor, const struct iovec *parts, int count) {
  static ssize_t (*next)(int, const struct iovec *, int);
  if (!next) next = dlsym(RTLD_NEXT, "writev");
  wait_for_disk(descriptor);
  return next(descriptor, parts, count);
}

ssize_t pwrite(int descriptor, const void *data, size_t size, off_t offset) {
  static ssize_t (*next)(int, const void *, size_t, off_t);
  if (!next) next = dlsym(RTLD_NEXT, "pwrite");
  wait_for_disk(descriptor);
  return next(descriptor, data, size, offset);
}

ssize_t pwrite64(int descriptor, const void *data, size_t size, off64_t offset) {
  static ssize_t (*next)(int, const void *, size_t, off64_t);
  if (!next) next = dlsym(RTLD_NEXT, "pwrite64");
  wait_for_disk(descriptor);
  return next(descriptor, data, size, offset);
}
