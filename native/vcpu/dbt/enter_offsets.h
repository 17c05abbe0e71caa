/* Offsets into struct mv_dbt for enter.S; exec.c asserts that they are true. */
#ifndef MV_ENTER_OFFSETS_H
#define MV_ENTER_OFFSETS_H
#define MV_OFF_SELF     584
#define MV_OFF_HOST_RSP 592
#define MV_OFF_RESUME   600
#define MV_OFF_T0       608
#define MV_OFF_JC       271360
#endif
