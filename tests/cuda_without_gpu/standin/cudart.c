/* A stand-in for the CUDA runtime on a machine without a GPU, preloaded before torch.
   Devices, streams, events, host registration and errors behave as documented; device memory is never touched and no kernel
   runs. For torch's FakeTensorMode, and for cross compiling with Inductor and Triton.
   STANDIN_CAPABILITY=75|80|90   the card: a T4, an A100 or an H100; 60, a P100, is one that PyTorch has no code for
   STANDIN_FAILS=N               from now on memory is not given and the device not waited for: CUDA's error number N
   STANDIN_LOG=FILE              in order, what makes the host wait, events, copies and host registrations
   STANDIN_REGISTERED=N          cudaHostRegister fails after N successes, as it does where it is not supported */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include "cuda_runtime_api.h"
static cudaError_t last;
static void logit(const char *what, unsigned long a, unsigned long b) {
  const char *path = getenv("STANDIN_LOG");
  FILE *log = path ? fopen(path, "a") : NULL;
  if (log) { fprintf(log, "%s %lu %lu\n", what, a, b); fclose(log); }
}
static cudaError_t failed(void) { const char *s = getenv("STANDIN_FAILS"); return s ? last = atoi(s) : 0; }
static int cc(void) { const char *s = getenv("STANDIN_CAPABILITY"); return s ? atoi(s) : 75; }
cudaError_t cudaGetDeviceCount(int *n) { *n = 1; return 0; }
cudaError_t cudaGetDevice(int *d) { *d = 0; return 0; }
cudaError_t cudaSetDevice(int d) { return 0; }
cudaError_t cudaDriverGetVersion(int *v) { *v = 13000; return 0; }
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int d) {
  memset(p, 0, sizeof *p);
  int c = cc(); p->major = c / 10; p->minor = c % 10; p->warpSize = 32;
  const char *n = c == 60 ? "Tesla P100 (stand-in)" : c == 75 ? "Tesla T4 (stand-in)" : c == 80 ? "A100 (stand-in)" : "H100 (stand-in)";
  strcpy(p->name, n);
  p->totalGlobalMem = c == 75 ? 15642329088UL : c == 80 ? 42505273344UL : 85017493504UL;
  p->multiProcessorCount = c == 75 ? 40 : c == 80 ? 108 : 132;
  p->maxThreadsPerMultiProcessor = c == 75 ? 1024 : 2048; p->maxThreadsPerBlock = 1024;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024; p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647; p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->regsPerMultiprocessor = 65536; p->regsPerBlock = 65536;
  p->sharedMemPerBlock = 49152; p->sharedMemPerBlockOptin = c == 75 ? 65536 : c == 80 ? 166912 : 232448;
  p->sharedMemPerMultiprocessor = c == 75 ? 65536 : c == 80 ? 167936 : 233472;
  p->maxBlocksPerMultiProcessor = c == 75 ? 16 : 32;
  p->l2CacheSize = c == 75 ? 4194304 : c == 80 ? 41943040 : 52428800;
  p->memoryBusWidth = 256; p->pciBusID = 0; p->pciDeviceID = 30;
  for (int i = 0; i < 16; i++) p->uuid.bytes[i] = i + 1;
  return 0;
}
cudaError_t cudaDeviceGetAttribute(int *v, enum cudaDeviceAttr a, int d) {
  struct cudaDeviceProp p; cudaGetDeviceProperties(&p, d);
  switch (a) {
    case cudaDevAttrMultiProcessorCount: *v = p.multiProcessorCount; break;
    case cudaDevAttrComputeCapabilityMajor: *v = p.major; break;
    case cudaDevAttrComputeCapabilityMinor: *v = p.minor; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *v = p.sharedMemPerBlockOptin; break;
    case cudaDevAttrWarpSize: *v = 32; break;
    default: *v = 0; }
  return 0; }
cudaError_t cudaDeviceGetPCIBusId(char *s, int l, int d) { snprintf(s, l, "0000:00:1E.0"); return 0; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *a, int *b) { *a = 0; *b = -1; return 0; }
cudaError_t cudaDeviceSynchronize(void) { logit("wait cudaDeviceSynchronize", 0, 0); return failed(); }
cudaError_t cudaStreamSynchronize(cudaStream_t s) { logit("wait cudaStreamSynchronize", (unsigned long)s, 0); return 0; }
cudaError_t cudaEventSynchronize(cudaEvent_t e) { logit("wait cudaEventSynchronize", (unsigned long)e, 0); return 0; }
static unsigned long next = 0x1000;
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned f, int p) { *s = (cudaStream_t)(next += 16); return 0; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned f) { *s = (cudaStream_t)(next += 16); return 0; }
cudaError_t cudaStreamCreate(cudaStream_t *s) { *s = (cudaStream_t)(next += 16); return 0; }
cudaError_t cudaStreamDestroy(cudaStream_t s) { return 0; }
cudaError_t cudaStreamGetPriority(cudaStream_t s, int *p) { *p = 0; return 0; }
cudaError_t cudaStreamQuery(cudaStream_t s) { return 0; }
cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *c) { *c = cudaStreamCaptureStatusNone; return 0; }
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *m) { return 0; }
cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned f) { logit("streamwait", (unsigned long)s, (unsigned long)e); return 0; }
cudaError_t cudaEventCreate(cudaEvent_t *e) { *e = (cudaEvent_t)(next += 16); return 0; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned f) { *e = (cudaEvent_t)(next += 16); return 0; }
cudaError_t cudaEventDestroy(cudaEvent_t e) { return 0; }
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) { logit("record", (unsigned long)e, (unsigned long)s); return 0; }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned f) { logit("record", (unsigned long)e, (unsigned long)s); return 0; }
cudaError_t cudaEventQuery(cudaEvent_t e) { return 0; }
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) { *ms = 0.5f; return 0; }
cudaError_t cudaMalloc(void **p, size_t n) { if (failed()) return last; *p = mmap(0, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0); logit("cudaMalloc", n, 0); return 0; }
cudaError_t cudaFree(void *p) { return 0; }
cudaError_t cudaHostAlloc(void **p, size_t n, unsigned f) { *p = mmap(0, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0); return 0; }
cudaError_t cudaFreeHost(void *p) { return 0; }
static struct { char *p; size_t n; } reg[4096]; static int nreg;
cudaError_t cudaHostRegister(void *p, size_t n, unsigned f) {
  logit("hostRegister", (unsigned long)p, n);
  const char *admitted = getenv("STANDIN_REGISTERED");
  if (admitted && nreg >= atoi(admitted)) return last = cudaErrorNotSupported;
  reg[nreg].p = p; reg[nreg++].n = n; return 0; }
cudaError_t cudaHostUnregister(void *p) { logit("hostUnregister", (unsigned long)p, 0);
  for (int i = 0; i < nreg; i++) if (reg[i].p == p) { reg[i] = reg[--nreg]; return 0; } return last = cudaErrorHostMemoryNotRegistered; }
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p) {
  memset(a, 0, sizeof *a); a->type = cudaMemoryTypeUnregistered;
  for (int i = 0; i < nreg; i++) if ((char *)p >= reg[i].p && (char *)p < reg[i].p + reg[i].n) a->type = cudaMemoryTypeHost;
  return 0; }
cudaError_t cudaMemGetInfo(size_t *f, size_t *t) { struct cudaDeviceProp p; cudaGetDeviceProperties(&p, 0); *t = p.totalGlobalMem; *f = *t - 419430400; return 0; }
cudaError_t cudaMemcpyAsync(void *d, const void *s, size_t n, enum cudaMemcpyKind k, cudaStream_t st) { logit("memcpyAsync", n, k); return 0; }
cudaError_t cudaMemsetAsync(void *d, int v, size_t n, cudaStream_t st) { return 0; }
cudaError_t cudaLaunchKernel(const void *f, dim3 g, dim3 b, void **a, size_t sh, cudaStream_t s) { return 0; }
cudaError_t cudaGetLastError(void) { cudaError_t e = last; last = 0; return e; }
cudaError_t cudaPeekAtLastError(void) { return last; }
cudaError_t cudaDeviceCanAccessPeer(int *c, int a, int b) { *c = 0; return 0; }
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *f) { memset(a, 0, sizeof *a); return 0; }
static int nothing() { return 0; }
cudaError_t cudaGetDriverEntryPointByVersion(const char *s, void **f, unsigned v, unsigned long long fl, enum cudaDriverEntryPointQueryResult *r) { *f = (void *)nothing; if (r) *r = 0; return 0; }
cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *m, int d) { *m = (cudaMemPool_t)16; return 0; }
cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t m, enum cudaMemPoolAttr a, void *v) { return 0; }
cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t m, enum cudaMemPoolAttr a, void *v) { *(unsigned long *)v = 0; return 0; }
cudaError_t cudaRuntimeGetVersion(int *v) { *v = 13000; return 0; }
cudaError_t cudaProfilerStart(void) { return 0; }
cudaError_t cudaProfilerStop(void) { return 0; }
cudaError_t cudaMemcpy(void *d, const void *s, size_t n, enum cudaMemcpyKind k) { logit("wait cudaMemcpy", n, k); return 0; }
