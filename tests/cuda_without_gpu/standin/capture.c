/* Apart from cudart.c: cuda_runtime_api.h declares this name with other arguments than the version that torch asks for. */
int cudaStreamGetCaptureInfo(void *stream, int *status, unsigned long *id) { *status = 0; if (id) *id = 0; return 0; }
