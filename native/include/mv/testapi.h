/*
 * The low-level test API: a vCPU of either backend, in process, with memory,
 * registers and code of the caller's choosing.
 */
#ifndef MV_TESTAPI_H
#define MV_TESTAPI_H

#include <stdint.h>

#include "mv/vcpu.h"

#endif
