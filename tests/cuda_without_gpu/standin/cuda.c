/* libcuda.so.1 for the same purpose as cudart.c: what torch asks of the driver itself, and what Triton's helper links to. */
int cuInit(unsigned f) { return 0; }
int cuDriverGetVersion(int *v) { *v = 13000; return 0; }
int cuDevicePrimaryCtxGetState(int d, unsigned *f, int *a) { *f = 0; *a = 1; return 0; }
int cuCtxGetCurrent(void **c) { *c = (void *)1; return 0; }
int cuGetErrorString(int e, const char **s) { *s = "stand-in"; return 0; }
int cuGetErrorName(int e, const char **s) { *s = "stand-in"; return 0; }
int cuDeviceGet(int *d, int n) { *d = 0; return 0; }
int cuDeviceGetCount(int *n) { *n = 1; return 0; }
int cuDeviceGetAttribute(int *v, int a, int d) { *v = 65536; return 0; }
int cuModuleLoadData(void **m, const void *i) { *m = (void *)16; return 0; }
int cuModuleGetFunction(void **f, void *m, const char *n) { *f = (void *)32; return 0; }
int cuFuncGetAttribute(int *v, int a, void *f) { *v = 0; return 0; }
#define STUB(n) int n() { return 0; }
STUB(cuModuleUnload) STUB(cuLaunchKernel) STUB(cuFuncSetAttribute) STUB(cuOccupancyMaxActiveBlocksPerMultiprocessor)
STUB(cuLaunchKernelEx) STUB(cuFuncSetCacheConfig) STUB(cuOccupancyMaxActiveClusters) STUB(cuTensorMapEncodeTiled)
STUB(cuTensorMapEncodeIm2col) STUB(cuTensorMapEncodeIm2colWide)
STUB(cuCtxSetCurrent) STUB(cuDevicePrimaryCtxRetain) STUB(cuCtxSetLimit) STUB(cuPointerGetAttribute) STUB(cuCtxGetDevice)
STUB(cuCtxGetLimit)
STUB(cuLaunchKernelExHandle)
STUB(cuPointerGetAttributes)
STUB(cuModuleLoadDataEx)
STUB(cuFuncGetModule)
STUB(cuDevicePrimaryCtxRelease)
STUB(cuCtxSynchronize)
STUB(cuMemGetInfo)
STUB(cuLaunchCooperativeKernel)
STUB(cuStreamWriteValue32)
STUB(cuDevicePrimaryCtxSetFlags)
STUB(cuModuleGetGlobal)
STUB(cuLinkCreate)
STUB(cuLinkAddData)
STUB(cuLinkComplete)
STUB(cuOccupancyMaxPotentialBlockSize)
int cuModuleLoad(void **m, const char *n) { *m = (void *)16; return 0; }
