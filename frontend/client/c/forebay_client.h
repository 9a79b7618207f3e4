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
 * Every model can be used. One whose inputs and outputs all have fixed sizes takes requests as "rows" of shared memory
 * (docs/shm-protocol.md), which is the quickest way; any other, or a request with a sequence, an id or parameters,
 * as a "parcel", whose inputs are given shapes with forebay_shape_input and forebay_put_strings.
 *
 * Nothing here starts a thread or installs a signal handler. A client and its models belong to one thread at a time;
 * several clients are independent of each other. After fork, the child must not use them.
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
    FOREBAY_GONE = 101,       /* the server has ended, or the connection: forebay_reconnect, or close */
    FOREBAY_DEADLINE = 102,   /* no answer in time; the request may still run */
    FOREBAY_NO_MEMORY = 103,  /* the arena or the heap is full */
    FOREBAY_END = 104,        /* the request has no further response */
};

typedef struct forebay_client forebay_client;
typedef struct forebay_model forebay_model;

typedef struct {
    const char *name;
    int datatype; /* number in Triton's model_config.proto: 10 FP16, 11 FP32, 12 FP64, 9 INT64 ... */
    int rank;
    const int64_t *dims; /* without the batch dimension; -1 where the size varies */
    size_t row_bytes;    /* bytes of one batch item; 0 if that varies, and for strings */
    int is_optional;     /* of an input: may be left out */
} forebay_tensor;

enum { FOREBAY_BYTES = 13 }; /* the datatype of strings */

/* One request in flight. Its memory is the engine's until it is done, then the caller's until forebay_release. */
typedef struct forebay_request forebay_request;

/* An output of an answer. Valid until the request is used again, released, or asked for its next response. */
typedef struct {
    const char *name;
    int datatype;
    int rank;
    const int64_t *shape; /* with the batch dimension, if the model has one */
    const void *data;     /* strings: see forebay_next_string */
    size_t byte_size;
} forebay_value;

/* A parameter of a request, for the model: a text, or without one a number. */
typedef struct {
    const char *key;
    const char *text;
    int64_t number;
} forebay_parameter;

/* What a request carries besides its tensors; all zero: nothing. Only timeout_us and priority fit a request in rows. */
typedef struct {
    uint64_t timeout_us;  /* for the model's queue policy, as is priority; how long the caller waits is another thing */
    uint32_t priority;
    uint64_t deadline_ns; /* CLOCK_MONOTONIC time after which nobody waits */
    const char *id;
    uint64_t sequence_id; /* or, as a text, */
    const char *sequence_name;
    int sequence_start, sequence_end;
    const forebay_parameter *parameters;
    int parameter_count;
} forebay_options;

/* What went wrong last in this thread; never NULL. */
const char *forebay_error(void);

/* Connect. path: the server's clients.sock; NULL: $FOREBAY_RUNTIME_DIRECTORY, $XDG_RUNTIME_DIR/forebay or
 * /tmp/forebay-<uid>, the newest server there. arena_bytes: shared memory for tensors at most; 0: as the server
 * likes. */
int forebay_connect(const char *path, uint64_t arena_bytes, forebay_client **client);

/* Leave, and free the client and its models. Requests must have been released, or never be touched again. */
void forebay_close(forebay_client *client);

/* After FOREBAY_GONE: connect to the server that is there now, by the path that was given first. The models stay open,
 * as they are there; requests made before must have been released. What tensors and values pointed to is no longer
 * valid. */
int forebay_reconnect(forebay_client *client);

/* Wait for answers without sleeping (spin != 0), or by sleeping, after a glance of at most 50 us. */
void forebay_set_spin(forebay_client *client, int spin);

/* Open a model; version 0: the newest. The model belongs to the client; asked for again, it is the same one. */
int forebay_open(forebay_client *client, const char *name, int64_t version, forebay_model **model);

int forebay_input_count(const forebay_model *model);
int forebay_output_count(const forebay_model *model);
const forebay_tensor *forebay_input_at(const forebay_model *model, int index);
const forebay_tensor *forebay_output_at(const forebay_model *model, int index);
int64_t forebay_version(const forebay_model *model);
int forebay_is_decoupled(const forebay_model *model); /* 1: a request may have any number of responses */
int forebay_max_batch_size(const forebay_model *model); /* 0: one item, without a batch dimension */

/* --- one request at a time --- */

/* Where an input of the next forebay_infer goes: rows * row_bytes of shared memory. NULL: see forebay_error. Inputs of
 * varying shapes and strings need a request of their own, below. */
void *forebay_input(forebay_model *model, const char *name, int rows);

/* Run the rows that were filled. timeout_us: below 0, as long as it takes. */
int forebay_infer(forebay_model *model, int rows, int64_t timeout_us);

/* An output of the last forebay_infer, valid until the next; byte_size may be NULL. NULL: see forebay_error. */
const void *forebay_output(forebay_model *model, const char *name, size_t *byte_size);

/* --- many in flight --- */

/* Begin a request of so many batch items (1 if the model has no batch dimension): in rows, if the model's are. */
int forebay_prepare(forebay_model *model, int rows, forebay_request **request);
/* The same, as a parcel in any case: for requests that carry more than rows can. */
int forebay_prepare_parcel(forebay_model *model, int rows, forebay_request **request);

/* Where an input of a fixed shape goes. NULL: see forebay_error. */
void *forebay_request_input(forebay_request *request, int index);
/* Where an input goes that has this shape, with the batch dimension (shape tensors have none). NULL: see
 * forebay_error. */
void *forebay_shape_input(forebay_request *request, int index, const int64_t *shape, int rank);
/* Copy strings in, as many as the shape has elements, in row-major order. lengths: NULL, they end with a zero byte. */
int forebay_put_strings(forebay_request *request, int index, const int64_t *shape, int rank, const char *const *strings,
                        const size_t *lengths);
/* What else the request carries, copied; asked for before forebay_submit. */
int forebay_set_options(forebay_request *request, const forebay_options *options);

int forebay_submit(forebay_request *request);
/* Wait until it is done, and return how it ended. timeout_us: below 0, as long as it takes. */
int forebay_wait(forebay_request *request, int64_t timeout_us);
/* Wait for the next response of a decoupled model, whose values are then there; FOREBAY_END: there is none. */
int forebay_next(forebay_request *request, int64_t timeout_us);
/* Nobody waits any more. The request still ends, with FOREBAY_CANCELLED unless it was answered before. */
int forebay_cancel(forebay_request *request);
/* Take answers that have arrived; 1 if the request is done. */
int forebay_is_done(forebay_request *request);
/* Give the memory back; that of a request in flight is given back when its answer comes. */
void forebay_release(forebay_request *request);

/* The outputs of the answer, of a decoupled model those of the response that forebay_next has waited for. */
int forebay_value_count(const forebay_request *request);
const forebay_value *forebay_value_at(const forebay_request *request, int index);
const forebay_value *forebay_value_named(const forebay_request *request, const char *name);
/* An output of a request in rows; the same as the value's data. */
const void *forebay_request_output(forebay_request *request, int index);
/* Go through the strings of a value: 1 and the next string, not ended by a zero byte; 0: there is none. position: 0 to
 * begin with. */
int forebay_next_string(const forebay_value *value, size_t *position, const char **text, size_t *length);

/* The descriptor that becomes readable when answers come, for poll; then call forebay_dispatch. */
int forebay_fd(const forebay_client *client);
int forebay_dispatch(forebay_client *client);

#ifdef __cplusplus
}
#endif
#endif
