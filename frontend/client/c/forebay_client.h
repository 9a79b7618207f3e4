/* A shared-memory client of forebay for programs on the server's own machine. Needs libc and Linux, nothing else.
 *
 *     forebay_client *client;
 *     forebay_model *model;
 *     if (forebay_connect(NULL, 0, &client) || forebay_open(client, "alpha_model", 0, &model))
 *         fail(forebay_error());
 *     float *x = forebay_input(model, "features", 1);
 *     fill(x);
 *     if (forebay_infer(model, 1, -1))
 *         fail(forebay_error());
 *     const float *y = forebay_output(model, "prediction", NULL);
 *
 * Models whose inputs and outputs all have fixed shapes and sizes can be used ("rows", docs/shm-protocol.md); others
 * are refused by forebay_open. Nothing here starts a thread or installs a signal handler. A client and its models belong
 * to one thread at a time; several clients are independent of each other. After fork, the child must not use them.
 *
 * Functions that return int: 0, or one of the codes below, with a text in forebay_error().
 */
#ifndef FOREBAY_CLIENT_H
#define FOREBAY_CLIENT_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Codes: Triton's, as the server sends them, and our own from 100. */
enum {
    FOREBAY_OK = 0,
    FOREBAY_INTERNAL = 1,
    FOREBAY_NOT_FOUND = 2,
    FOREBAY_INVALID_ARGUMENT = 3,
    FOREBAY_UNAVAILABLE = 4,
    FOREBAY_UNSUPPORTED = 5,
    FOREBAY_ALREADY_EXISTS = 6,
    FOREBAY_CANCELLED = 7,
    FOREBAY_UNKNOWN = 8,
    FOREBAY_NO_SERVER = 100,  /* nobody listens there */
    FOREBAY_GONE = 101,       /* the server has ended, or the connection: close it and connect anew */
    FOREBAY_DEADLINE = 102,   /* no answer in time; the request may still run */
    FOREBAY_NO_MEMORY = 103,  /* the arena or the heap is full */
};

typedef struct forebay_client forebay_client;
typedef struct forebay_model forebay_model;

typedef struct {
    const char *name;
    int datatype; /* number in Triton's model_config.proto: 10 FP16, 11 FP32, 12 FP64, 9 INT64 ... */
    int rank;
    const int64_t *dims; /* without the batch dimension */
    size_t row_bytes;    /* bytes of one batch item */
} forebay_tensor;

/* One request in flight. Its rows are the engine's until it is done, then the caller's until forebay_release. */
typedef struct forebay_request forebay_request;

/* What went wrong last in this thread; never NULL. */
const char *forebay_error(void);

/* Connect. path: the server's clients.sock; NULL: $FOREBAY_RUNTIME_DIRECTORY, $XDG_RUNTIME_DIR/forebay or
 * /tmp/forebay-<uid>, the newest server there. arena_bytes: shared memory for tensors at most; 0: as the server likes. */
int forebay_connect(const char *path, uint64_t arena_bytes, forebay_client **client);

/* Leave, and free the client and its models. Requests must have been released, or never be touched again. */
void forebay_close(forebay_client *client);

/* Wait for answers without sleeping (spin != 0), or by sleeping, after a glance of at most 50 us. */
void forebay_set_spin(forebay_client *client, int spin);

/* Open a model; version 0: the newest. The model belongs to the client. */
int forebay_open(forebay_client *client, const char *name, int64_t version, forebay_model **model);

int forebay_input_count(const forebay_model *model);
int forebay_output_count(const forebay_model *model);
const forebay_tensor *forebay_input_at(const forebay_model *model, int index);
const forebay_tensor *forebay_output_at(const forebay_model *model, int index);
int64_t forebay_version(const forebay_model *model);
int forebay_max_batch_size(const forebay_model *model); /* 0: one item, without a batch dimension */

/* --- one request at a time --- */

/* Where an input of the next forebay_infer goes: rows * row_bytes of shared memory. NULL: see forebay_error. */
void *forebay_input(forebay_model *model, const char *name, int rows);

/* Run the rows that were filled. timeout_us: below 0, as long as it takes. */
int forebay_infer(forebay_model *model, int rows, int64_t timeout_us);

/* An output of the last forebay_infer, valid until the next; byte_size may be NULL. NULL: see forebay_error. */
const void *forebay_output(forebay_model *model, const char *name, size_t *byte_size);

/* --- many in flight --- */

/* Take rows for a request. */
int forebay_prepare(forebay_model *model, int rows, forebay_request **request);
void *forebay_request_input(forebay_request *request, int index);
const void *forebay_request_output(forebay_request *request, int index);
int forebay_submit(forebay_request *request);
/* Wait until it is done, and return how it ended. */
int forebay_wait(forebay_request *request, int64_t timeout_us);
/* Take answers that have arrived; 1 if the request is done. */
int forebay_is_done(forebay_request *request);
/* Give the rows back; one that is in flight is given back when its answer comes. */
void forebay_release(forebay_request *request);
/* The descriptor that becomes readable when answers come, for poll; then call forebay_dispatch. */
int forebay_fd(const forebay_client *client);
int forebay_dispatch(forebay_client *client);

#ifdef __cplusplus
}
#endif
#endif
