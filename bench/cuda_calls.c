/* Counts what a process asks of CUDA, for bench/cuda_calls.py.
 *
 * CUDA loads the library that CUDA_INJECTION64_PATH names into each process that opens it, and calls
 * InitializeInjection. From then on CUPTI calls us; the counts lie in a file of this process, which others map too.
 * No header of CUDA is needed: these numbers and prototypes are those of cupti_callbacks.h and cupti_*_cbid.h.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

enum { DRIVER_API = 1, RUNTIME_API = 2, SYNCHRONIZE = 4 };
/* Of the domain SYNCHRONIZE. */
enum { STREAM_SYNCHRONIZED = 1, CONTEXT_SYNCHRONIZED = 2 };
enum { API_ENTER = 0 };

/* In the order of bench/cuda_calls.py. */
enum { CONTEXT_WAITS, STREAM_WAITS, COPIES, WAITING_COPIES, ALLOCATIONS, FREES, LAUNCHES, COUNT };

static const struct {
    int domain;
    uint32_t callback;
    int counter;
} CALLS[] = {
    {SYNCHRONIZE, CONTEXT_SYNCHRONIZED, CONTEXT_WAITS},
    {SYNCHRONIZE, STREAM_SYNCHRONIZED, STREAM_WAITS},
    {RUNTIME_API, 41, COPIES},         /* cudaMemcpyAsync */
    {RUNTIME_API, 31, WAITING_COPIES}, /* cudaMemcpy */
    {RUNTIME_API, 20, ALLOCATIONS},    /* cudaMalloc */
    {RUNTIME_API, 22, FREES},          /* cudaFree */
    {DRIVER_API, 307, LAUNCHES},       /* cuLaunchKernel */
    {DRIVER_API, 652, LAUNCHES},       /* cuLaunchKernelEx */
    {DRIVER_API, 514, LAUNCHES},       /* cuGraphLaunch */
};
enum { CALL_COUNT = sizeof CALLS / sizeof CALLS[0] };

static uint64_t *counts;

static void on_call(void *unused, int domain, uint32_t callback, const void *data) {
    (void)unused;
    /* Of an API call we hear twice; the first field of its data says which time. */
    if (domain != SYNCHRONIZE && *(const int *)data != API_ENTER)
        return;
    for (int index = 0; index < CALL_COUNT; index++)
        if (CALLS[index].domain == domain && CALLS[index].callback == callback)
            __atomic_fetch_add(&counts[CALLS[index].counter], 1, __ATOMIC_RELAXED);
}

static uint64_t *map_counts(const char *folder) {
    char path[4096];
    snprintf(path, sizeof path, "%s/%d", folder, (int)getpid());
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0 || ftruncate(fd, COUNT * sizeof(uint64_t)) != 0)
        return NULL;
    void *mapped = mmap(NULL, COUNT * sizeof(uint64_t), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    return mapped == MAP_FAILED ? NULL : mapped;
}

static int give_up(const char *what, int result) {
    fprintf(stderr, "cuda_calls: %s failed (%d): nothing is counted\n", what, result);
    return 0;
}

int InitializeInjection(void) {
    const char *folder = getenv("BENCH_CUDA_CALLS"), *cupti = getenv("BENCH_CUPTI");
    void *library = dlopen(cupti ? cupti : "libcupti.so", RTLD_NOW);
    if (!library)
        return give_up(dlerror(), 0);
    int (*subscribe)(void **, void (*)(void *, int, uint32_t, const void *), void *) = dlsym(library, "cuptiSubscribe");
    int (*enable)(uint32_t, void *, int, uint32_t) = dlsym(library, "cuptiEnableCallback");
    void *subscriber = NULL;
    int result;
    if (!subscribe || !enable || !folder || !(counts = map_counts(folder)))
        return give_up("finding CUPTI or a place for the counts", 0);
    if ((result = subscribe(&subscriber, on_call, NULL)) != 0)
        return give_up("cuptiSubscribe", result);
    for (int index = 0; index < CALL_COUNT; index++)
        if ((result = enable(1, subscriber, CALLS[index].domain, CALLS[index].callback)) != 0)
            return give_up("cuptiEnableCallback", result);
    return 1;
}
