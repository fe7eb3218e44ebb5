/* A CUDA runtime without a GPU, for tests: memory of the "device" is the host's, work runs when it is queued, a capture
 * keeps it for launches. FAKE_INTEGRATED=1 is a Jetson; FAKE_FREE_MIB is what cudaMemGetInfo tells. */
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef int Error;
typedef void (*Work)(int);
typedef struct { void *to; const void *from; size_t size; Work work; int argument; } Step;
typedef struct { Step steps[64]; int count; } Graph;

static Graph *capture = NULL;
int room = 1 << 30; /* allocations that still succeed */
int live = 0;    /* allocations, streams and graphs that nobody has given back */
int copies = 0;  /* between host and device */
int launches = 0;

static void *take(size_t size) { live++; return calloc(1, size ? size : 1); }
static Error give(void *thing) { live--; free(thing); return 0; }
static void run(Step s) { if (s.work) s.work(s.argument); else { memcpy(s.to, s.from, s.size); copies++; } }
static void queue(Step s) { if (capture) capture->steps[capture->count++] = s; else run(s); }
static int number(const char *name, int otherwise) { const char *v = getenv(name); return v ? atoi(v) : otherwise; }

Error cudaGetDeviceCount(int *n) { *n = number("FAKE_DEVICES", 1); return 0; }
Error cudaDeviceGetAttribute(int *value, int which, int device) {
    *value = which == 18 ? number("FAKE_INTEGRATED", 0) : which == 75 ? 8 : 7;
    return device;
}
Error cudaGetDeviceProperties(char *properties, int device) { strcpy(properties, "Fake Orin"); return device; }
Error cudaMemGetInfo(size_t *free, size_t *total) {
    *free = (size_t)number("FAKE_FREE_MIB", 4096) << 20;
    *total = (size_t)8192 << 20;
    return 0;
}
Error cudaMalloc(void **p, size_t size) { if (!room) return 2; room--; *p = take(size); return 0; }
Error cudaHostAlloc(void **p, size_t size, unsigned flags) { return flags == 2 ? cudaMalloc(p, size) : 1; }
Error cudaHostGetDevicePointer(void **p, void *host, unsigned flags) { *p = host; return flags; }
Error cudaFree(void *p) { return give(p); }
Error cudaFreeHost(void *p) { return give(p); }
Error cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream) {
    Step s = {to, from, size, NULL, 0};
    if ((kind != 1 && kind != 2) || !stream) return 1;
    queue(s);
    return 0;
}
Error cudaStreamCreateWithFlags(void **p, unsigned flags) { *p = take(8); return flags != 1; }
Error cudaStreamSynchronize(void *stream) { return !stream || capture; }
Error cudaStreamDestroy(void *p) { return give(p); }
Error cudaStreamBeginCapture(void *stream, int mode) { capture = take(sizeof(Graph)); return !stream || mode != 1; }
Error cudaStreamEndCapture(void *stream, void **graph) { *graph = capture; capture = NULL; return !stream; }
Error cudaGraphInstantiateWithFlags(void **p, void *graph, unsigned long long flags) {
    *p = memcpy(take(sizeof(Graph)), graph, sizeof(Graph));
    return (int)flags;
}
Error cudaGraphDestroy(void *p) { return give(p); }
Error cudaGraphExecDestroy(void *p) { return give(p); }
Error cudaGraphLaunch(void *graph, void *stream) {
    Graph *g = graph;
    for (int i = 0; i < g->count; i++) run(g->steps[i]);
    launches++;
    return !stream;
}
Error cudaEventCreate(void **p) { *p = take(sizeof(struct timespec)); return 0; }
Error cudaEventRecord(void *event, void *stream) { return !stream || capture || clock_gettime(CLOCK_MONOTONIC, event); }
Error cudaEventElapsedTime(float *ms, void *start, void *end) {
    struct timespec *a = start, *b = end;
    *ms = (b->tv_sec - a->tv_sec) * 1e3 + (b->tv_nsec - a->tv_nsec) / 1e6;
    return 0;
}
Error cudaEventDestroy(void *p) { return give(p); }
const char *cudaGetErrorString(Error error) { return error == 1 ? "invalid argument" : "unknown error"; }

/* What the fake TensorRT queues. */
void fakeQueue(Work work, int argument) { Step s = {NULL, NULL, 0, work, argument}; queue(s); }
