/*
 * Loads kernel modules: a stock kernel has the drivers of our devices as files.
 * /lib/microvm/modules.list has a line for each, in the order that dependencies
 * ask for: the file's path, then parameters. To these come the
 * "module.parameter=value" words of the kernel's command line, which the kernel
 * itself gives to built-in code only. All other modules load when the kernel
 * calls modprobe.
 */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "agent.h"

#define LIST       "/lib/microvm/modules.list"
#define LIST_MAX   8192
#define PARAMS_MAX 1024

/* True if the word begins with the module's name and a dot; '-' equals '_'. */
static bool word_is_for(const char *word, const char *name, size_t len) {
  for (size_t i = 0; i < len; i++) {
    char a = word[i] == '-' ? '_' : word[i], b = name[i] == '-' ? '_' : name[i];
    if (a != b)
      return false;
  }
  return word[len] == '.';
}

/* Appends to params what the command line has for the module. */
static void params_add(char *params, const char *cmdline, const char *name, size_t len) {
  size_t used = strlen(params);
  for (const char *word = cmdline; *word;) {
    size_t word_len = strcspn(word, " \n");
    if (word_is_for(word, name, len)) {
      size_t n = word_len - len - 1;
      if (used + n + 2 < PARAMS_MAX) {
        params[used++] = ' ';
        memcpy(params + used, word + len + 1, n);
        used += n;
        params[used] = 0;
      }
    }
    word += word_len;
    word += strspn(word, " \n");
  }
}

static void module_load(char *line, const char *cmdline) {
  char params[PARAMS_MAX] = "";
  char *space = strchrnul(line, ' ');
  if (*space)
    *space++ = 0;
  const char *base = strrchr(line, '/') ? strrchr(line, '/') + 1 : line;
  if (strlen(space) >= sizeof(params))
    return;
  strcpy(params, space);
  params_add(params, cmdline, base, strcspn(base, "."));
  int fd = open(line, O_RDONLY | O_CLOEXEC);
  if (fd < 0 || (syscall(SYS_finit_module, fd, params, 0) < 0 && errno != EEXIST))
    mv_console_say("cannot load module", line, errno);
  if (fd >= 0)
    close(fd);
}

void mv_modules_load(const char *cmdline) {
  static char list[LIST_MAX];
  if (mv_file_read(LIST, list, sizeof(list)) <= 0)
    return;
  for (char *line = list; *line;) {
    char *end = strchrnul(line, '\n');
    char *next = *end ? end + 1 : end;
    *end = 0;
    if (*line)
      module_load(line, cmdline);
    line = next;
  }
}
