/* The lane: what a runner of rows does for a batch that is one slice, known from before, with no Python around the model;
 * and the wait for what clients ring themselves, which is nearly always such a batch.
 *
 * Why C: with one client a fifth of the server's CPU time was the worker's Python between its doorbell and the model.
 * With the lane p50 is 0.90 and CPU time 0.86 of what they are without (medians of 10 paired runs, one connection); a
 * model's call to another one, which is rung, takes 0.93 of the time (cores awake, medians of 5 paired runs). All that
 * is not this one case is left to rows.py, request_rows.py and rings.py, which alone make bindings and decide what
 * becomes of a client that breaks the rules; without a C compiler there is no lane, and they do everything.
 *
 * Layouts are those of ipc/wire.py, indices those of ipc/counters.py; test_rows_lane.py holds the two against
 * each other.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <errno.h>
#include <poll.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <structmember.h>
#include <sys/socket.h>
#include <time.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "messages are little endian"
#endif

#pragma pack(push, 1)
struct header {
    uint8_t kind, flags;
    uint16_t count;
    uint32_t sender;
    uint64_t batch;
};
struct run {
    uint32_t producer, requests;
    uint64_t base;
    uint32_t capacity, first, rows, attempt;
    uint64_t enqueue_sum_ns;
};
struct times {
    uint64_t start_ns, input_end_ns, output_start_ns, end_ns;
};
struct runs {
    struct header header;
    struct run run;
};
struct runs_done {
    struct header header;
    struct times times;
    struct run run;
};
struct done {
    struct header header;
    struct times times;
};
/* What a binding is for. */
struct slice {
    uint32_t producer;
    uint64_t base;
    uint32_t capacity, first, rows;
    uint32_t requests; /* 0 where it does not matter whose the rows are */
};
#pragma pack(pop)

enum kind { RUNS = 1, RUNS_DONE = 16, DONE = 32 };
enum { FLAG_GRANTED = 1 };

/* Words of an instance's block of counters. */
enum {
    SUCCESS = 0,
    INFERENCES = 4,
    EXECUTIONS = 5,
    QUEUE_NS = 6,
    INPUT_NS = 7,
    INFER_NS = 8,
    LAST_INFERENCE_MS = 10,
    SEGMENTS = 13,
    BUSY_NS = 15,
    RUNNING_SINCE_NS = 18,
    QUEUE_BUCKETS = 24,
    COMPUTE_BUCKETS = 50,
    BATCH_SIZES = 76,
};
enum { LAST_BUCKET = 25, WORDS_PER_BATCH_SIZE = 4 };

/* A client's ring while its grant is open. */
struct ring {
    uint32_t producer;
    uint32_t place; /* the core that the client shares with us, plus one; 0: none */
    uint64_t ticket;
};

/* Claims about when a request was made count if they are at most so old. */
#define ENQUEUE_AGE_NS 1000000000u

typedef struct {
    PyObject_HEAD
    Py_buffer counters; /* uint64, the instance's block */
    uint32_t instance;
    int tells_requests_apart;
    unsigned long long batch; /* that is running, or ran last */
    PyObject *done; /* the Bell that reaches the scheduler */
    PyObject *kept; /* slice, packed -> (call, Bell of its producer) */
    /* What wait() looks at: the doorbell, then the rings. */
    struct pollfd *watched;
    struct ring *rings; /* as many; the first is unused */
    size_t watched_count;
    size_t first_looked_at; /* whoever is read first is not always the same */
    uint32_t rows_max;
    uint64_t spin_ns; /* how long to look before sleeping */
    Py_ssize_t size; /* of the message that wait() has read */
} Lane;

static uint64_t now_ns(clockid_t clock)
{
    struct timespec now;
    clock_gettime(clock, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* The bucket of a duration, as ipc/counters.py counts it. */
static unsigned bucket(uint64_t ns)
{
    uint64_t units = ns >> 10;
    unsigned bits = units ? 64 - (unsigned)__builtin_clzll(units) : 0;
    return bits < LAST_BUCKET ? bits : LAST_BUCKET;
}

static void count(volatile uint64_t *words, const struct run *run, const struct times *times)
{
    uint64_t requests = run->requests, since_ns = requests * times->start_ns;
    uint64_t queue_ns = since_ns > run->enqueue_sum_ns ? since_ns - run->enqueue_sum_ns : 0;
    uint64_t input_ns = times->input_end_ns - times->start_ns, infer_ns = times->end_ns - times->input_end_ns;
    volatile uint64_t *of_size = words + BATCH_SIZES + WORDS_PER_BATCH_SIZE * (run->rows - 1);

    words[SUCCESS] += requests;
    words[INFERENCES] += run->rows;
    words[EXECUTIONS] += 1;
    words[QUEUE_NS] += queue_ns;
    words[INPUT_NS] += requests * input_ns;
    words[INFER_NS] += requests * infer_ns;
    words[LAST_INFERENCE_MS] = now_ns(CLOCK_REALTIME) / 1000000;
    words[SEGMENTS] += 1;
    words[BUSY_NS] += times->end_ns - times->start_ns;
    words[QUEUE_BUCKETS + bucket(queue_ns / requests)] += requests;
    words[COMPUTE_BUCKETS + bucket(times->end_ns - times->start_ns)] += requests;
    of_size[0] += 1;
    of_size[1] += input_ns;
    of_size[2] += infer_ns;
}

/* Send a message, or have the Bell keep it behind what waits already. Returns -1 with an exception set. */
static int ring(PyObject *bell, const void *message, size_t size)
{
    PyObject *waiting = PyObject_GetAttrString(bell, "backlog");
    if (waiting == NULL)
        return -1;
    int is_free = PyObject_Not(waiting);
    Py_DECREF(waiting);
    if (is_free > 0) {
        int fd = PyObject_AsFileDescriptor(bell);
        if (fd < 0)
            return -1;
        if (send(fd, message, size, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0)
            return 0;
    }
    PyObject *result = PyObject_CallMethod(bell, "ring", "y#", (const char *)message, (Py_ssize_t)size);
    Py_XDECREF(result);
    return result == NULL ? -1 : 0;
}

static PyObject *pack_slice(const Lane *self, const struct run *run)
{
    uint32_t requests = self->tells_requests_apart ? run->requests : 0;
    struct slice slice = {run->producer, run->base, run->capacity, run->first, run->rows, requests};
    return PyBytes_FromStringAndSize((const char *)&slice, sizeof slice);
}

/* Return (call, bell) for the slice of a batch: borrowed; NULL without an exception: it is not kept. */
static PyObject *find(Lane *self, const struct run *run)
{
    PyObject *slice = pack_slice(self, run);
    if (slice == NULL)
        return NULL;
    PyObject *found = PyDict_GetItemWithError(self->kept, slice);
    Py_DECREF(slice);
    return found;
}

/* Run the batch and ring its producer; -1 with an exception set. */
static int execute(Lane *self, PyObject *call, PyObject *bell, const struct runs *batch, struct times *times)
{
    volatile uint64_t *words = self->counters.buf;

    self->batch = batch->header.batch;
    times->start_ns = times->input_end_ns = words[RUNNING_SINCE_NS] = now_ns(CLOCK_MONOTONIC);
    PyObject *result = PyObject_CallNoArgs(call);
    if (result == NULL)
        return -1;
    Py_DECREF(result);
    times->output_start_ns = times->end_ns = now_ns(CLOCK_MONOTONIC);
    count(words, &batch->run, times);
    words[RUNNING_SINCE_NS] = 0;
    struct runs_done reply = {{RUNS_DONE, 0, 1, self->instance, batch->header.batch}, *times, batch->run};
    return ring(bell, &reply, sizeof reply);
}

static PyObject *lane_run(Lane *self, PyObject *const *arguments, Py_ssize_t argument_count)
{
    struct runs batch;
    struct times times;
    Py_buffer message;

    if (argument_count != 3)
        return PyErr_Format(PyExc_TypeError, "run() takes a message, its size and whether to tell the scheduler");
    Py_ssize_t size = PyLong_AsSsize_t(arguments[1]);
    int is_told = PyObject_IsTrue(arguments[2]);
    if (is_told < 0 || (size == -1 && PyErr_Occurred()))
        return NULL;
    if (size != sizeof batch)
        Py_RETURN_FALSE;
    if (PyObject_GetBuffer(arguments[0], &message, PyBUF_SIMPLE))
        return NULL;
    bool is_whole = message.len >= size;
    if (is_whole)
        memcpy(&batch, message.buf, sizeof batch);
    PyBuffer_Release(&message);
    if (!is_whole || batch.header.kind != RUNS || batch.header.count != 1 || batch.run.requests == 0)
        Py_RETURN_FALSE;
    PyObject *found = find(self, &batch.run);
    if (found == NULL) {
        if (PyErr_Occurred())
            return NULL;
        Py_RETURN_FALSE;
    }
    /* The call may have the lane forget it. */
    Py_INCREF(found);
    int failure = execute(self, PyTuple_GetItem(found, 0), PyTuple_GetItem(found, 1), &batch, &times);
    Py_DECREF(found);
    if (!failure && is_told && !(batch.header.flags & FLAG_GRANTED)) {
        struct done done = {{DONE, 0, 0, self->instance, batch.header.batch}, times};
        failure = ring(self->done, &done, sizeof done);
    }
    if (failure)
        return NULL;
    Py_RETURN_TRUE;
}

/* Find what is watched; watched_count if it is not. */
static size_t position(const Lane *self, int fd)
{
    size_t index = 1;
    while (index < self->watched_count && self->watched[index].fd != fd)
        index++;
    return index;
}

static PyObject *lane_listen(Lane *self, PyObject *arguments)
{
    int doorbell;
    unsigned int rows_max;
    unsigned long long spin_ns;

    if (!PyArg_ParseTuple(arguments, "iIK", &doorbell, &rows_max, &spin_ns))
        return NULL;
    self->watched[0].fd = doorbell;
    self->rows_max = rows_max;
    self->spin_ns = spin_ns;
    Py_RETURN_NONE;
}

static PyObject *lane_watch(Lane *self, PyObject *arguments)
{
    int fd;
    struct ring ring;

    if (!PyArg_ParseTuple(arguments, "iIKI", &fd, &ring.producer, &ring.ticket, &ring.place))
        return NULL;
    size_t index = position(self, fd);
    if (index == self->watched_count) {
        struct pollfd *watched = PyMem_Realloc(self->watched, (index + 1) * sizeof *watched);
        if (watched == NULL)
            return PyErr_NoMemory();
        self->watched = watched;
        struct ring *rings = PyMem_Realloc(self->rings, (index + 1) * sizeof *rings);
        if (rings == NULL)
            return PyErr_NoMemory();
        self->rings = rings;
        self->watched[index] = (struct pollfd){fd, POLLIN, 0};
        self->watched_count++;
    }
    self->rings[index] = ring;
    Py_RETURN_NONE;
}

static PyObject *lane_unwatch(Lane *self, PyObject *argument)
{
    int fd = PyObject_AsFileDescriptor(argument);
    if (fd < 0)
        return NULL;
    size_t index = position(self, fd);
    if (index < self->watched_count) {
        size_t last = --self->watched_count;
        self->watched[index] = self->watched[last];
        self->rings[index] = self->rings[last];
    }
    Py_RETURN_NONE;
}

/* Sleep until something is readable, having looked for it a while if so asked. */
static int poll_watched(const Lane *self, int timeout_ms)
{
    if (self->spin_ns) {
        uint64_t end_ns = now_ns(CLOCK_MONOTONIC) + self->spin_ns;
        do {
            int ready = poll(self->watched, self->watched_count, 0);
            if (ready)
                return ready;
        } while (now_ns(CLOCK_MONOTONIC) < end_ns);
    }
    return poll(self->watched, self->watched_count, timeout_ms);
}

/* Check what would be taken from a scheduler on trust, and write in who asks; what is not sound is left to rings.py. */
static bool is_sound(const Lane *self, const struct ring *ring, struct runs *batch)
{
    struct run *run = &batch->run;
    if (batch->header.kind != RUNS || batch->header.count != 1 || batch->header.batch != ring->ticket ||
        batch->header.sender != ring->place || run->requests < 1 || run->requests > run->rows ||
        run->rows > self->rows_max)
        return false;
    __extension__ typedef unsigned __int128 wide;
    wide since_ns = (wide)run->requests * now_ns(CLOCK_MONOTONIC);
    if (run->enqueue_sum_ns > since_ns || since_ns - run->enqueue_sum_ns > (wide)run->requests * ENQUEUE_AGE_NS)
        run->enqueue_sum_ns = (uint64_t)since_ns;
    run->producer = ring->producer;
    return true;
}

/* Run what has been rung, if it is of the simplest kind: 1; 0: it is not; -1 with an exception set. */
static int run_rung(Lane *self, const struct ring *ring, void *message, Py_ssize_t size)
{
    struct runs batch;
    struct times times;

    if (size != sizeof batch)
        return 0;
    memcpy(&batch, message, sizeof batch);
    if (!is_sound(self, ring, &batch))
        return 0;
    PyObject *found = find(self, &batch.run);
    if (found == NULL)
        return PyErr_Occurred() ? -1 : 0;
    /* Others look there for what runs. */
    memcpy(message, &batch, sizeof batch);
    Py_INCREF(found);
    int failure = execute(self, PyTuple_GetItem(found, 0), PyTuple_GetItem(found, 1), &batch, &times);
    Py_DECREF(found);
    return failure ? -1 : 1;
}

/* Read one ring; returns what wait() does: -1 without an exception if there is nothing left to do. */
static int read_ring(Lane *self, size_t index, Py_buffer *buffer)
{
    int fd = self->watched[index].fd;
    Py_ssize_t size = recv(fd, buffer->buf, (size_t)buffer->len, MSG_DONTWAIT);
    if (size < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR))
        return -1;
    self->size = size < 0 ? 0 : size;
    struct ring ring = self->rings[index];
    return run_rung(self, &ring, buffer->buf, size) ? -1 : fd;
}

static PyObject *lane_wait(Lane *self, PyObject *arguments)
{
    Py_buffer buffer;
    int timeout_ms, fd = -1, ready;

    if (!PyArg_ParseTuple(arguments, "w*i", &buffer, &timeout_ms))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    ready = poll_watched(self, timeout_ms);
    Py_END_ALLOW_THREADS
    if (ready < 0 && errno == EINTR)
        PyErr_CheckSignals();
    else if (ready < 0)
        PyErr_SetFromErrno(PyExc_OSError);
    for (size_t looked = 0; ready > 0 && looked < self->watched_count; looked++) {
        size_t index = self->first_looked_at++ % self->watched_count;
        if (self->watched[index].revents) {
            fd = index ? read_ring(self, index, &buffer) : self->watched[0].fd;
            break;
        }
    }
    PyBuffer_Release(&buffer);
    return PyErr_Occurred() ? NULL : PyLong_FromLong(fd);
}

static PyObject *lane_keep(Lane *self, PyObject *arguments)
{
    Py_buffer packed;
    PyObject *call, *bell;
    struct run run;

    if (!PyArg_ParseTuple(arguments, "y*OO", &packed, &call, &bell))
        return NULL;
    bool is_run = packed.len == sizeof run;
    if (is_run)
        memcpy(&run, packed.buf, sizeof run);
    PyBuffer_Release(&packed);
    if (!is_run)
        return PyErr_Format(PyExc_ValueError, "not a RUN");
    PyObject *slice = pack_slice(self, &run), *pair = PyTuple_Pack(2, call, bell);
    int failure = slice == NULL || pair == NULL || PyDict_SetItem(self->kept, slice, pair);
    Py_XDECREF(slice);
    Py_XDECREF(pair);
    if (failure)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *lane_forget(Lane *self, PyObject *argument)
{
    unsigned long producer = PyLong_AsUnsignedLong(argument);
    if (producer == (unsigned long)-1 && PyErr_Occurred())
        return NULL;
    PyObject *slices = PyDict_Keys(self->kept);
    if (slices == NULL)
        return NULL;
    int failure = 0;
    for (Py_ssize_t index = 0; index < PyList_Size(slices) && !failure; index++) {
        PyObject *packed = PyList_GetItem(slices, index);
        struct slice slice;
        memcpy(&slice, PyBytes_AsString(packed), sizeof slice);
        if (slice.producer == producer)
            failure = PyDict_DelItem(self->kept, packed);
    }
    Py_DECREF(slices);
    if (failure)
        return NULL;
    Py_RETURN_NONE;
}

static int lane_init(Lane *self, PyObject *arguments, PyObject *Py_UNUSED(keywords))
{
    unsigned int instance;
    int tells_requests_apart;
    PyObject *counters, *done;

    if (self->kept != NULL) {
        PyErr_SetString(PyExc_TypeError, "a lane is made once");
        return -1;
    }
    if (!PyArg_ParseTuple(arguments, "IOOp", &instance, &counters, &done, &tells_requests_apart))
        return -1;
    if (PyObject_GetBuffer(counters, &self->counters, PyBUF_CONTIG))
        return -1;
    self->instance = instance;
    self->tells_requests_apart = tells_requests_apart;
    self->done = Py_NewRef(done);
    self->watched = PyMem_Malloc(sizeof *self->watched);
    self->rings = PyMem_Malloc(sizeof *self->rings);
    self->kept = PyDict_New();
    if (self->watched == NULL || self->rings == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    self->watched[0] = (struct pollfd){-1, POLLIN, 0};
    self->watched_count = 1;
    return self->kept == NULL ? -1 : 0;
}

static void lane_dealloc(Lane *self)
{
    PyTypeObject *type = Py_TYPE((PyObject *)self);

    if (self->counters.obj != NULL)
        PyBuffer_Release(&self->counters);
    Py_XDECREF(self->done);
    Py_XDECREF(self->kept);
    PyMem_Free(self->watched);
    PyMem_Free(self->rings);
    freefunc free_lane = (freefunc)PyType_GetSlot(type, Py_tp_free);
    free_lane(self);
    Py_DECREF(type);
}

static PyMethodDef lane_methods[] = {
    {"run", (PyCFunction)(void (*)(void))lane_run, METH_FASTCALL, NULL},
    {"keep", (PyCFunction)lane_keep, METH_VARARGS, NULL},
    {"forget", (PyCFunction)lane_forget, METH_O, NULL},
    {"listen", (PyCFunction)lane_listen, METH_VARARGS, NULL},
    {"watch", (PyCFunction)lane_watch, METH_VARARGS, NULL},
    {"unwatch", (PyCFunction)lane_unwatch, METH_O, NULL},
    {"wait", (PyCFunction)lane_wait, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef lane_members[] = {
    {"batch", T_ULONGLONG, offsetof(Lane, batch), READONLY, NULL},
    {"size", T_PYSSIZET, offsetof(Lane, size), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot lane_slots[] = {
    {Py_tp_init, (void *)lane_init},
    {Py_tp_dealloc, (void *)lane_dealloc},
    {Py_tp_members, lane_members},
    {Py_tp_methods, lane_methods},
    {0, NULL},
};

static PyType_Spec lane_spec = {
    .name = "forebay.engine.worker.rows_lane.RowsLane",
    .basicsize = sizeof(Lane),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = lane_slots,
};

static struct PyModuleDef rows_lane = {
    PyModuleDef_HEAD_INIT,
    .m_name = "rows_lane",
    .m_size = -1,
};

PyMODINIT_FUNC PyInit_rows_lane(void)
{
    PyObject *module = PyModule_Create(&rows_lane), *type = PyType_FromSpec(&lane_spec);

    if (module == NULL || type == NULL || PyModule_AddObjectRef(module, "RowsLane", type) < 0)
        Py_CLEAR(module);
    Py_XDECREF(type);
    return module;
}
