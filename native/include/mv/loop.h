/*
 * The VMM's I/O loop: one epoll set, run by the main thread of the VMM
 * process.  Callbacks run on that thread and must not block.
 */
#ifndef MV_LOOP_H
#define MV_LOOP_H

#include <stdbool.h>
#include <stdint.h>

struct mv_loop;
typedef void (*mv_loop_fn)(void *ctx, uint32_t events); /* EPOLLIN etc.     */

struct mv_loop *mv_loop_new(void); /* NULL: errno                          */
void mv_loop_free(struct mv_loop *loop);
/* Level-triggered. 0 or -errno. Regular files (which epoll refuses) get
 * -EPERM: the caller reads them directly. */
int mv_loop_add(struct mv_loop *loop, int fd, uint32_t events, mv_loop_fn fn, void *ctx);
int mv_loop_mod(struct mv_loop *loop, int fd, uint32_t events);
/* Safe from inside any callback: a removed fd gets no further call. */
void mv_loop_del(struct mv_loop *loop, int fd);
/* Runs fn(ctx) once on the loop's thread. Any thread. 0 or -ENOMEM. */
int mv_loop_post(struct mv_loop *loop, void (*fn)(void *ctx), void *ctx);
/* Runs until mv_loop_stop (any thread). 0 or -errno. */
int mv_loop_run(struct mv_loop *loop);
void mv_loop_stop(struct mv_loop *loop);

#endif
