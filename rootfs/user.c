/*
 * Users and groups of the guest, read from /etc/passwd and /etc/group.
 *
 * libc's own functions would bring stdio, locks and name services along. A user
 * that is given by number needs no entry.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "agent.h"

#define FIELDS_MAX 7
#define FILE_MAX   (256 << 10)

/* Cuts the line at *next into fields at ':'. Fields that are missing are "".
 * False: no more lines. */
static bool line_split(char **next, char *field[FIELDS_MAX]) {
  char *at = *next;
  if (!*at)
    return false;
  char *end = strchrnul(at, '\n');
  *next = *end ? end + 1 : end;
  *end = 0;
  for (int i = 0; i < FIELDS_MAX; i++) {
    field[i] = at;
    at = strchrnul(at, ':');
    if (*at)
      *at++ = 0;
  }
  return true;
}

/* A whole string of digits as an id. */
static bool id_parse(const char *text, uint32_t *out) {
  char *end;
  if (*text < '0' || *text > '9')
    return false;
  errno = 0;
  unsigned long value = strtoul(text, &end, 10);
  if (*end || errno || value >= UINT32_MAX)
    return false;
  *out = (uint32_t)value;
  return true;
}

static bool text_copy(char *dst, size_t size, const char *src) {
  size_t len = strlen(src);
  if (len >= size)
    return false;
  memcpy(dst, src, len + 1);
  return true;
}

/* True if a comma-separated list has the name. */
static bool list_has(const char *list, const char *name) {
  size_t len = strlen(name);
  while (*list) {
    const char *end = strchrnul(list, ',');
    if ((size_t)(end - list) == len && !memcmp(list, name, len))
      return true;
    list = *end ? end + 1 : end;
  }
  return false;
}

static bool passwd_find(char *text, const char *who, struct mv_user *out) {
  char *field[FIELDS_MAX];
  uint32_t wanted, uid, gid;
  bool numeric = id_parse(who, &wanted);
  while (line_split(&text, field)) {
    if (!id_parse(field[2], &uid) || !id_parse(field[3], &gid))
      continue;
    if (strcmp(field[0], who) && !(numeric && uid == wanted))
      continue;
    out->uid = uid;
    out->gid = gid;
    return text_copy(out->name, sizeof(out->name), field[0]) &&
           text_copy(out->home, sizeof(out->home), field[5]) &&
           text_copy(out->shell, sizeof(out->shell), *field[6] ? field[6] : "/bin/sh");
  }
  return false;
}

/* Fills gid from a named group, or the supplementary groups of a user. */
static bool group_find(char *text, const char *group, struct mv_user *out) {
  char *field[FIELDS_MAX];
  uint32_t gid;
  while (line_split(&text, field)) {
    if (!id_parse(field[2], &gid))
      continue;
    if (group) {
      if (!strcmp(field[0], group)) {
        out->gid = gid;
        return true;
      }
    } else if (list_has(field[3], out->name) && out->ngroups < MV_GROUPS_MAX) {
      out->groups[out->ngroups++] = gid;
    }
  }
  return !group;
}

static int groups_fill(char *buf, const char *group, struct mv_user *out) {
  if (group && id_parse(group, &out->gid))
    return 0;
  ssize_t len = mv_file_read("/etc/group", buf, FILE_MAX);
  if (len < 0)
    return group ? -ENOENT : 0;
  return group_find(buf, group, out) ? 0 : -ENOENT;
}

int mv_user_find(const char *spec, struct mv_user *out) {
  char who[sizeof(out->name)];
  static char buf[FILE_MAX];
  const char *colon = strchrnul(spec, ':');
  const char *group = *colon ? colon + 1 : NULL;
  if ((size_t)(colon - spec) >= sizeof(who))
    return -ENOENT;
  if (group && !*group)
    return -EINVAL;
  memcpy(who, spec, colon - spec);
  who[colon - spec] = 0;
  if (!*who)
    strcpy(who, "0");

  memset(out, 0, sizeof(*out));
  bool known = mv_file_read("/etc/passwd", buf, sizeof(buf)) >= 0 && passwd_find(buf, who, out);
  if (!known) {
    if (!id_parse(who, &out->uid))
      return -ENOENT;
    out->gid = out->uid;
    text_copy(out->name, sizeof(out->name), out->uid ? who : "root");
    strcpy(out->home, out->uid ? "/" : "/root");
    strcpy(out->shell, "/bin/sh");
  }
  if (!group && (!known || !out->uid))
    return 0; /* root needs no group to be let in */
  return groups_fill(buf, group, out);
}
