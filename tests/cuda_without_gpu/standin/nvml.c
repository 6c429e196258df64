/* libnvidia-ml.so.1 for the same purpose: two GPUs, the second of which is the one that cudart.c shows.
   So whoever takes NVML's first GPU for CUDA's first one reads an idle card. */
#include <string.h>
typedef struct { unsigned long long total, free, used; } memory_t;
typedef struct { unsigned int gpu, memory; } utilization_t;
#define NOT_FOUND 6
#define OURS ((void *)2)
int nvmlInit_v2(void) { return 0; }
int nvmlInitWithFlags(unsigned int flags) { return 0; }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int e) { return "stand-in"; }
int nvmlDeviceGetCount_v2(unsigned int *n) { *n = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned int i, void **device) { *device = (void *)(unsigned long)(i + 1); return 0; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
  if (strcmp(uuid, "GPU-01020304-0506-0708-090a-0b0c0d0e0f10")) return NOT_FOUND;
  *device = OURS;
  return 0;
}
int nvmlDeviceGetMemoryInfo(void *d, memory_t *m) {
  m->total = 16106127360ULL; m->used = d == OURS ? 12269387776ULL : 0; m->free = m->total - m->used;
  return 0;
}
int nvmlDeviceGetUtilizationRates(void *d, utilization_t *u) { u->gpu = d == OURS ? 98 : 0; u->memory = 0; return 0; }
int nvmlDeviceGetPowerUsage(void *d, unsigned int *mw) { *mw = d == OURS ? 69500 : 9000; return 0; }
int nvmlDeviceGetTemperature(void *d, int sensor, unsigned int *c) { *c = d == OURS ? 74 : 30; return 0; }
int nvmlDeviceGetCurrentClocksThrottleReasons(void *d, unsigned long long *r) { *r = d == OURS ? 0x4 | 0x1 : 0x1; return 0; }
int nvmlDeviceGetClockInfo(void *d, int kind, unsigned int *mhz) { *mhz = kind == 1 ? 1590 : 5000; return 0; }
/* What PyTorch asks before it says that memory has run out: */
int nvmlDeviceGetHandleByPciBusId_v2(const char *id, void **device) { *device = OURS; return 0; }
int nvmlDeviceGetComputeRunningProcesses(void *d, unsigned int *n, void *processes) { *n = 0; return 0; }
int nvmlSystemGetCudaDriverVersion_v2(int *v) { *v = 13000; return 0; }
int nvmlDeviceGetNvLinkRemoteDeviceType(void *d, unsigned int link, int *kind) { return NOT_FOUND; }
int nvmlDeviceGetNvLinkRemotePciInfo_v2(void *d, unsigned int link, void *info) { return NOT_FOUND; }
