/* See forebay_client.h. The wire: docs/shm-protocol.md, whose names are used here.
 *
 * Everything that arrives is checked before it is used as an index: the server is trusted, and may still have a bug.
 */
#define _GNU_SOURCE
#include "forebay_client.h"

#include <dirent.h>
#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the wire is little endian, and so must be the machine"
#endif

enum { /* the door */
    HELLO = 1, WELCOME = 2, OPEN = 3, MODEL = 4, REFUSED = 5, INSTANCE = 6,
    DOOR_FDS_MAX = 64, DOOR_BYTES_MAX = 64 * 1024, FLAG_ROWS = 1, PROTOCOL_VERSION = 1,
};
enum { /* doorbells and submissions */
    RUNS = 1, RUNS_DONE = 16, RUNS_FAILED = 17, RUNS_LOST = 18, GRANT = 21, REVOKE = 22, RESYNC = 23,
    SUBMIT_RUNS = 48, SUBMIT_RINGS = 52,
    FLAG_GRANTED = 1, FLAG_GONE = 8, FLAG_HUNG = 32, FLAG_MOVED = 32,
    HEADER_BYTES = 16, TIMES_BYTES = 32, RUN_BYTES = 40, SUBMIT_RUN_BYTES = 56, MESSAGE_BYTES_MAX = 192 * 1024,
};
enum {
    ALIGNMENT = 64, RINGS_MAX = 256, RANK_MAX = 64, TENSORS_MAX = 4096, ATTEMPTS_MAX = 1, NAME_BYTES_MAX = 1024,
    GLANCE_NS = 50000, GLANCE_MISSES = 8, GLANCE_PAUSE = 64,
    SLAB_ROWS_FIRST = 64, SLAB_BYTES_FIRST = 1 << 20, SLAB_CAPACITY_MAX = 1 << 20, LOOK_EVERY = 256,
};

typedef struct {
    uint32_t instance;
    int fd;
    uint64_t ticket;              /* of the grant; 0: none */
    forebay_request *outstanding; /* what the worker runs under it */
} ring;

typedef struct slab {
    struct slab *next;
    uint64_t base;
    uint32_t capacity, next_row, live;
    unsigned char *used;      /* [capacity]: 1 where a row is taken */
    forebay_request **owners; /* [capacity]: at its first row, a request in flight */
} slab;

struct forebay_model {
    forebay_model *next;
    forebay_client *client;
    char name[NAME_BYTES_MAX];
    int64_t wanted_version, version;
    uint32_t route, max_batch;
    int input_count, output_count;
    forebay_tensor *tensors; /* inputs, then outputs */
    ring rings[RINGS_MAX];
    int ring_count;
    slab *slabs; /* the newest first */
    forebay_request *current;
};

/* prepared -> in flight -> done -> (in flight again | released) */
enum state { PREPARED, IN_FLIGHT, DONE };

struct forebay_request {
    forebay_model *model;
    slab *slab;
    uint32_t first, rows, attempt, route;
    uint64_t enqueue_ns;
    enum state state;
    int is_orphan; /* released while in flight */
    int code;
    char text[256];
};

struct forebay_client {
    int door, completions, submissions, arena_fd;
    uint32_t producer, epoch, outstanding_max, in_flight, submitted;
    int spins, is_gone, can_glance;
    int glance_misses; /* answers that were not there at a glance, in a row; below 0: so many without a glance */
    unsigned char *arena;
    uint64_t arena_bytes, used_bytes;
    forebay_model *models;
    unsigned char buffer[MESSAGE_BYTES_MAX];
};

static __thread char error_text[512];

const char *forebay_error(void) { return error_text; }

static int fail(int code, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(error_text, sizeof error_text, format, arguments);
    va_end(arguments);
    return code;
}

/* --- little helpers --- */

static uint16_t get16(const unsigned char *p) { uint16_t v; memcpy(&v, p, 2); return v; }
static uint32_t get32(const unsigned char *p) { uint32_t v; memcpy(&v, p, 4); return v; }
static uint64_t get64(const unsigned char *p) { uint64_t v; memcpy(&v, p, 8); return v; }
static void put16(unsigned char *p, uint16_t v) { memcpy(p, &v, 2); }
static void put32(unsigned char *p, uint32_t v) { memcpy(p, &v, 4); }
static void put64(unsigned char *p, uint64_t v) { memcpy(p, &v, 8); }

static uint64_t align_up(uint64_t size) { return (size + ALIGNMENT - 1) & ~(uint64_t)(ALIGNMENT - 1); }

static uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void put_header(unsigned char *p, int kind, int flags, int count, uint64_t batch) {
    p[0] = (unsigned char)kind;
    p[1] = (unsigned char)flags;
    put16(p + 2, (uint16_t)count);
    put32(p + 4, 0);
    put64(p + 8, batch);
}

/* With one core, whoever looks for answers keeps the worker from running. */
static int can_use_two_cores(void) {
    cpu_set_t cores;
    return !sched_getaffinity(0, sizeof cores, &cores) && CPU_COUNT(&cores) > 1;
}

/* Bytes of an element by datatype number; 0: unknown, or strings. */
static size_t item_bytes(int datatype) {
    static const unsigned char sizes[] = {0, 1, 1, 2, 4, 8, 1, 2, 4, 8, 2, 4, 8, 0, 2};
    return datatype > 0 && datatype < (int)sizeof sizes ? sizes[datatype] : 0;
}

/* --- the door --- */

/* Keep `path` if it is a door of ours and newer than what was found. Anybody can put a socket into /tmp. */
static void try_door(const char *path, char *found, size_t found_bytes, time_t *newest) {
    struct stat status;
    if (strlen(path) < found_bytes && !lstat(path, &status) && S_ISSOCK(status.st_mode) &&
        (status.st_uid == geteuid() || !status.st_uid) && status.st_mtime >= *newest) {
        *newest = status.st_mtime;
        memcpy(found, path, strlen(path) + 1);
    }
}

static void find_door(const char *place, char *found, size_t found_bytes, time_t *newest) {
    char path[600];
    DIR *directory = opendir(place);
    struct dirent *entry;
    try_door(place, found, found_bytes, newest);
    snprintf(path, sizeof path, "%s/clients.sock", place);
    try_door(path, found, found_bytes, newest);
    while (directory && (entry = readdir(directory)))
        if (entry->d_name[0] != '.') {
            snprintf(path, sizeof path, "%s/%s/clients.sock", place, entry->d_name);
            try_door(path, found, found_bytes, newest);
        }
    if (directory)
        closedir(directory);
}

static int choose_door(const char *given, char *path, size_t path_bytes) {
    char place[256];
    time_t newest = 0;
    const char *named = given ? given : getenv("FOREBAY_RUNTIME_DIRECTORY");
    path[0] = 0;
    if (named && *named) {
        snprintf(place, sizeof place, "%s", named);
        find_door(place, path, path_bytes, &newest);
    } else {
        const char *session = getenv("XDG_RUNTIME_DIR");
        if (session && *session) {
            snprintf(place, sizeof place, "%s/forebay", session);
            find_door(place, path, path_bytes, &newest);
        }
        snprintf(place, sizeof place, "/tmp/forebay-%u", (unsigned)getuid());
        find_door(place, path, path_bytes, &newest);
    }
    if (!path[0])
        return fail(FOREBAY_NO_SERVER, "no forebay server is running: there is no clients.sock of this user in %s", place);
    return 0;
}

static int gone(forebay_client *client, const char *why) {
    client->is_gone = 1;
    return fail(FOREBAY_GONE, "the engine is gone: %s", why);
}

/* Receive one message of the door with its descriptors; the caller owns those. Returns bytes, or -1. */
static ssize_t receive_door(forebay_client *client, unsigned char *message, int *fds, int *fd_count, int flags) {
    union { char bytes[CMSG_SPACE(DOOR_FDS_MAX * sizeof(int))]; struct cmsghdr header; } ancillary;
    struct iovec part = {message, DOOR_BYTES_MAX};
    struct msghdr envelope = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &ancillary,
                              .msg_controllen = sizeof ancillary};
    ssize_t size;
    *fd_count = 0;
    do
        size = recvmsg(client->door, &envelope, flags | MSG_CMSG_CLOEXEC);
    while (size < 0 && errno == EINTR);
    for (struct cmsghdr *c = CMSG_FIRSTHDR(&envelope); size >= 0 && c; c = CMSG_NXTHDR(&envelope, c))
        if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS) {
            *fd_count = (int)((c->cmsg_len - CMSG_LEN(0)) / sizeof(int));
            memcpy(fds, CMSG_DATA(c), (size_t)*fd_count * sizeof(int));
        }
    return size;
}

static void close_all(int *fds, int count) {
    while (count--)
        close(fds[count]);
}

static int announce_rings(forebay_client *client, forebay_model *model) {
    unsigned char message[HEADER_BYTES + 4 * RINGS_MAX];
    if (!model->ring_count)
        return 0;
    put_header(message, SUBMIT_RINGS, 0, model->ring_count, client->epoch);
    for (int i = 0; i < model->ring_count; i++)
        put32(message + HEADER_BYTES + 4 * i, model->rings[i].instance);
    if (send(client->submissions, message, HEADER_BYTES + 4 * (size_t)model->ring_count, MSG_NOSIGNAL) < 0)
        return gone(client, strerror(errno));
    return 0;
}

/* A worker was started later: keep its ring. */
static void take_instance(forebay_client *client, const unsigned char *body, ssize_t size, int *fds, int fd_count) {
    if (size == 8 && fd_count == 1)
        for (forebay_model *model = client->models; model; model = model->next)
            if (model->route == get32(body) && model->ring_count < RINGS_MAX) {
                model->rings[model->ring_count++] = (ring){.instance = get32(body + 4), .fd = fds[0]};
                announce_rings(client, model);
                return;
            }
    close_all(fds, fd_count);
}

/* Ask the door and wait for the answer to `request`; news that come before it are taken. */
static int ask(forebay_client *client, int kind, const void *body, size_t body_bytes, int expected, int *flags,
               unsigned char *answer, ssize_t *answer_bytes, int *fds, int *fd_count) {
    static __thread uint32_t requests;
    unsigned char message[4096], *reply = malloc(DOOR_BYTES_MAX);
    uint32_t request = ++requests;
    int code = 0;
    if (!reply)
        return fail(FOREBAY_NO_MEMORY, "out of memory");
    put16(message, (uint16_t)kind);
    put16(message + 2, 0);
    put32(message + 4, request);
    memcpy(message + 8, body, body_bytes);
    if (send(client->door, message, 8 + body_bytes, MSG_NOSIGNAL) < 0)
        code = gone(client, strerror(errno));
    while (!code) {
        ssize_t size = receive_door(client, reply, fds, fd_count, 0);
        if (size < 8) {
            code = gone(client, size < 0 ? strerror(errno) : "the server has closed the connection");
        } else if (get16(reply) == INSTANCE) {
            take_instance(client, reply + 8, size - 8, fds, *fd_count);
        } else if (get32(reply + 4) != request && (get32(reply + 4) || get16(reply) != REFUSED)) {
            close_all(fds, *fd_count);
        } else if (get16(reply) == REFUSED && size >= 12) {
            int refused = (int)get32(reply + 8);
            code = fail(refused ? refused : FOREBAY_UNKNOWN, "%.*s", (int)(size - 12), (char *)reply + 12);
        } else if (get16(reply) != expected) {
            close_all(fds, *fd_count);
            code = fail(FOREBAY_INTERNAL, "the server's answer at its door makes no sense");
        } else {
            *flags = get16(reply + 2);
            *answer_bytes = size - 8;
            memcpy(answer, reply + 8, (size_t)*answer_bytes);
            break;
        }
    }
    free(reply);
    return code;
}

int forebay_connect(const char *path, uint64_t arena_bytes, forebay_client **result) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct timeval patience = {.tv_sec = 30};
    unsigned char body[64] = "forebay", answer[DOOR_BYTES_MAX];
    int fds[DOOR_FDS_MAX], fd_count = 0, flags, code;
    ssize_t size = 0;
    char door[sizeof address.sun_path];
    forebay_client *client;
    if ((code = choose_door(path, door, sizeof door)))
        return code;
    client = calloc(1, sizeof *client);
    if (!client)
        return fail(FOREBAY_NO_MEMORY, "out of memory");
    client->completions = client->submissions = client->arena_fd = -1;
    client->arena = MAP_FAILED;
    client->door = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    memcpy(address.sun_path, door, sizeof door);
    if (client->door < 0 || connect(client->door, (struct sockaddr *)&address, sizeof address)) {
        code = fail(FOREBAY_NO_SERVER, "no forebay server listens at '%s': %s", door, strerror(errno));
        forebay_close(client);
        return code;
    }
    setsockopt(client->door, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    put32(body + 8, PROTOCOL_VERSION);
    put32(body + 12, 0);
    put64(body + 16, arena_bytes);
    memcpy(body + 24, "c client", 8);
    code = ask(client, HELLO, body, 32, WELCOME, &flags, answer, &size, fds, &fd_count);
    if (!code && (size < 24 || fd_count != 3 || get32(answer) != PROTOCOL_VERSION)) {
        close_all(fds, fd_count);
        code = fail(FOREBAY_INTERNAL, "the server's answer at its door makes no sense");
    }
    if (!code) {
        struct timeval slow = {.tv_sec = 10};
        client->producer = get32(answer + 4);
        client->arena_bytes = get64(answer + 8);
        client->epoch = get32(answer + 16);
        client->outstanding_max = get32(answer + 20);
        client->arena_fd = fds[0];
        client->completions = fds[1];
        client->submissions = fds[2];
        client->used_bytes = ALIGNMENT; /* offset 0 is nobody's */
        client->can_glance = can_use_two_cores();
        setsockopt(client->submissions, SOL_SOCKET, SO_SNDTIMEO, &slow, sizeof slow);
        client->arena = mmap(NULL, client->arena_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, client->arena_fd, 0);
        if (client->arena == MAP_FAILED)
            code = fail(FOREBAY_NO_MEMORY, "cannot map the arena: %s", strerror(errno));
    }
    if (code)
        forebay_close(client);
    else
        *result = client;
    return code;
}

void forebay_set_spin(forebay_client *client, int spin) { client->spins = spin; }
int forebay_fd(const forebay_client *client) { return client->completions; }

static void free_model(forebay_model *model) {
    for (int i = 0; i < model->ring_count; i++)
        close(model->rings[i].fd);
    if (model->current)
        free(model->current);
    for (slab *s = model->slabs, *next; s; s = next) {
        next = s->next;
        for (uint32_t row = 0; row < s->capacity; row++)
            if (s->owners[row] && s->owners[row] != model->current && s->owners[row]->is_orphan)
                free(s->owners[row]);
        free(s->used);
        free(s->owners);
        free(s);
    }
    for (int i = 0; model->tensors && i < model->input_count + model->output_count; i++) {
        free((void *)model->tensors[i].name);
        free((void *)model->tensors[i].dims);
    }
    free(model->tensors);
    free(model);
}

void forebay_close(forebay_client *client) {
    int fds[] = {client->door, client->completions, client->submissions, client->arena_fd};
    for (forebay_model *model = client->models, *next; model; model = next) {
        next = model->next;
        free_model(model);
    }
    if (client->arena != MAP_FAILED)
        munmap(client->arena, client->arena_bytes);
    for (int i = 0; i < 4; i++)
        if (fds[i] >= 0)
            close(fds[i]);
    free(client);
}

/* --- models --- */

static int read_tensor(const unsigned char *p, const unsigned char *end, forebay_tensor *tensor, const unsigned char **next) {
    int rank, name_bytes;
    int64_t *dims;
    char *name;
    if (end - p < 8)
        return -1;
    rank = get16(p + 2);
    name_bytes = get16(p + 4);
    if (rank > RANK_MAX || end - p < 8 + 8 * rank + name_bytes)
        return -1;
    dims = malloc(sizeof *dims * (size_t)(rank ? rank : 1));
    name = malloc((size_t)name_bytes + 1);
    tensor->dims = dims;
    tensor->name = name;
    if (!dims || !name)
        return -1;
    tensor->datatype = p[0];
    tensor->rank = rank;
    tensor->row_bytes = item_bytes(p[0]);
    for (int i = 0; i < rank; i++) {
        dims[i] = (int64_t)get64(p + 8 + 8 * i);
        if (dims[i] < 0 || __builtin_mul_overflow(tensor->row_bytes, (size_t)dims[i], &tensor->row_bytes))
            return -1;
    }
    memcpy(name, p + 8 + 8 * rank, (size_t)name_bytes);
    name[name_bytes] = 0;
    *next = p + 8 + 8 * rank + name_bytes;
    return 0;
}

/* Fill `model` from the door's answer. */
static int ask_model(forebay_client *client, forebay_model *model) {
    unsigned char body[8 + NAME_BYTES_MAX], *answer = malloc(DOOR_BYTES_MAX);
    int fds[DOOR_FDS_MAX], fd_count = 0, flags = 0, code, tensors, instances;
    ssize_t size = 0;
    if (!answer)
        return fail(FOREBAY_NO_MEMORY, "out of memory");
    put64(body, (uint64_t)model->wanted_version);
    memcpy(body + 8, model->name, strlen(model->name));
    code = ask(client, OPEN, body, 8 + strlen(model->name), MODEL, &flags, answer, &size, fds, &fd_count);
    if (!code && !(flags & FLAG_ROWS))
        code = fail(FOREBAY_UNSUPPORTED, "model '%s' takes inputs of varying size, which this client does not", model->name);
    if (!code) {
        tensors = size >= 24 ? get16(answer + 16) + get16(answer + 18) : -1;
        instances = size >= 24 ? get16(answer + 20) : 0;
        if (tensors < 0 || tensors > TENSORS_MAX || instances != fd_count || size < 24 + 4 * instances)
            code = fail(FOREBAY_INTERNAL, "the server's answer at its door makes no sense");
    }
    if (!code) {
        const unsigned char *next = answer + 24 + 4 * instances, *end = answer + size;
        model->route = get32(answer);
        model->max_batch = get32(answer + 4);
        model->version = (int64_t)get64(answer + 8);
        model->input_count = get16(answer + 16);
        model->output_count = get16(answer + 18);
        model->tensors = calloc((size_t)tensors + 1, sizeof *model->tensors);
        for (int i = 0; !code && i < tensors; i++)
            if (!model->tensors || read_tensor(next, end, &model->tensors[i], &next))
                code = fail(FOREBAY_INTERNAL, "the server's answer at its door makes no sense");
        for (int i = 0; !code && i < instances; i++)
            model->rings[model->ring_count++] = (ring){.instance = get32(answer + 24 + 4 * i), .fd = fds[i]};
    }
    if (code)
        close_all(fds, fd_count);
    free(answer);
    return code;
}

int forebay_open(forebay_client *client, const char *name, int64_t version, forebay_model **result) {
    forebay_model *model = calloc(1, sizeof *model);
    int code;
    if (!model || strlen(name) >= NAME_BYTES_MAX) {
        free(model);
        return fail(model ? FOREBAY_NOT_FOUND : FOREBAY_NO_MEMORY, "no model has such a name");
    }
    model->client = client;
    model->wanted_version = version;
    memcpy(model->name, name, strlen(name));
    if ((code = ask_model(client, model))) {
        free_model(model);
        return code;
    }
    model->next = client->models;
    client->models = model;
    *result = model;
    return announce_rings(client, model);
}

int forebay_input_count(const forebay_model *model) { return model->input_count; }
int forebay_output_count(const forebay_model *model) { return model->output_count; }
int64_t forebay_version(const forebay_model *model) { return model->version; }
int forebay_max_batch_size(const forebay_model *model) { return (int)model->max_batch; }

const forebay_tensor *forebay_input_at(const forebay_model *model, int index) {
    return index >= 0 && index < model->input_count ? &model->tensors[index] : NULL;
}

const forebay_tensor *forebay_output_at(const forebay_model *model, int index) {
    return index >= 0 && index < model->output_count ? &model->tensors[model->input_count + index] : NULL;
}

/* --- rows --- */

static uint64_t slab_bytes(const forebay_model *model, uint32_t capacity) {
    uint64_t total = 0;
    for (int i = 0; i < model->input_count + model->output_count; i++)
        total += align_up(model->tensors[i].row_bytes * (uint64_t)capacity);
    return total;
}

/* Where a tensor of the slab's rows begins: all inputs, then all outputs, each area capacity * row_bytes, aligned. */
static unsigned char *place(const forebay_request *request, int tensor) {
    const forebay_model *model = request->model;
    uint64_t offset = request->slab->base;
    for (int i = 0; i < tensor; i++)
        offset += align_up(model->tensors[i].row_bytes * (uint64_t)request->slab->capacity);
    return model->client->arena + offset + model->tensors[tensor].row_bytes * (uint64_t)request->first;
}

static int64_t loan(slab *s, uint32_t rows) {
    uint32_t first = s->live ? s->next_row : 0, run = 0;
    if (rows > s->capacity)
        return -1;
    if (first + rows > s->capacity)
        first = 0;
    if (memchr(s->used + first, 1, rows)) {
        /* The ring has caught up with rows that are still taken: start over at the lowest gap. */
        for (first = 0; first < s->capacity && run < rows; first++)
            run = s->used[first] ? 0 : run + 1;
        if (run < rows)
            return -1;
        first -= rows;
    }
    memset(s->used + first, 1, rows);
    s->next_row = first + rows;
    s->live += rows;
    return first;
}

static slab *add_slab(forebay_model *model, uint32_t rows) {
    forebay_client *client = model->client;
    uint64_t row_bytes = slab_bytes(model, 1), fitting = SLAB_BYTES_FIRST / (row_bytes ? row_bytes : 1);
    uint64_t capacity = 4 * (uint64_t)model->max_batch, bytes;
    slab *s;
    if (model->slabs)
        capacity = 2 * (uint64_t)model->slabs->capacity;
    else {
        capacity = capacity < SLAB_ROWS_FIRST ? SLAB_ROWS_FIRST : capacity;
        capacity = capacity > fitting ? fitting : capacity;
    }
    capacity = capacity < rows ? rows : capacity > SLAB_CAPACITY_MAX ? SLAB_CAPACITY_MAX : capacity;
    bytes = slab_bytes(model, (uint32_t)capacity);
    if (bytes > client->arena_bytes - client->used_bytes) {
        fail(FOREBAY_NO_MEMORY, "no room for %llu bytes of tensors in an arena of %llu", (unsigned long long)bytes,
             (unsigned long long)client->arena_bytes);
        return NULL;
    }
    s = calloc(1, sizeof *s);
    if (s) {
        s->used = calloc(capacity, 1);
        s->owners = calloc(capacity, sizeof *s->owners);
    }
    if (!s || !s->used || !s->owners) {
        if (s) {
            free(s->used);
            free(s->owners);
        }
        free(s);
        fail(FOREBAY_NO_MEMORY, "out of memory");
        return NULL;
    }
    s->base = client->used_bytes;
    s->capacity = (uint32_t)capacity;
    client->used_bytes += bytes;
    s->next = model->slabs;
    model->slabs = s;
    return s;
}

int forebay_prepare(forebay_model *model, int rows, forebay_request **result) {
    int64_t first = -1;
    slab *s;
    forebay_request *request;
    int most = model->max_batch ? (int)model->max_batch : 1;
    if (rows < 1 || rows > most)
        return fail(FOREBAY_INVALID_ARGUMENT, "model '%s' takes 1 to %d rows at a time, not %d", model->name, most, rows);
    for (s = model->slabs; s; s = s->next)
        if ((first = loan(s, (uint32_t)rows)) >= 0)
            break;
    if (!s) {
        if (!(s = add_slab(model, (uint32_t)rows)))
            return FOREBAY_NO_MEMORY;
        first = loan(s, (uint32_t)rows);
    }
    request = calloc(1, sizeof *request);
    if (!request) {
        memset(s->used + first, 0, (size_t)rows);
        s->live -= (uint32_t)rows;
        return fail(FOREBAY_NO_MEMORY, "out of memory");
    }
    request->model = model;
    request->slab = s;
    request->first = (uint32_t)first;
    request->rows = (uint32_t)rows;
    *result = request;
    return 0;
}

void *forebay_request_input(forebay_request *request, int index) {
    return index >= 0 && index < request->model->input_count ? place(request, index) : NULL;
}

const void *forebay_request_output(forebay_request *request, int index) {
    const forebay_model *model = request->model;
    return index >= 0 && index < model->output_count ? place(request, model->input_count + index) : NULL;
}

static void free_rows(forebay_request *request) {
    memset(request->slab->used + request->first, 0, request->rows);
    request->slab->live -= request->rows;
    free(request);
}

void forebay_release(forebay_request *request) {
    if (request->state == IN_FLIGHT)
        request->is_orphan = 1;
    else
        free_rows(request);
}

/* --- handing over --- */

static ring *ring_of(forebay_model *model, uint32_t instance) {
    for (int i = 0; i < model->ring_count; i++)
        if (model->rings[i].instance == instance)
            return &model->rings[i];
    return NULL;
}

static int hand_over(forebay_request *request) {
    unsigned char message[HEADER_BYTES + SUBMIT_RUN_BYTES], *body = message + HEADER_BYTES;
    forebay_model *model = request->model;
    forebay_client *client = model->client;
    request->route = model->route;
    for (int i = 0; i < model->ring_count; i++) {
        ring *r = &model->rings[i];
        if (!r->ticket || r->outstanding)
            continue;
        put_header(message, RUNS, FLAG_GRANTED, 1, r->ticket);
        put32(body, client->producer);
        put32(body + 4, 1);
        put64(body + 8, request->slab->base);
        put32(body + 16, request->slab->capacity);
        put32(body + 20, request->first);
        put32(body + 24, request->rows);
        put32(body + 28, request->attempt);
        put64(body + 32, request->enqueue_ns);
        if (send(r->fd, message, HEADER_BYTES + RUN_BYTES, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0) {
            r->outstanding = request;
            return 0;
        }
        /* The worker is gone; the completion doorbell will say. */
        r->ticket = 0;
    }
    memset(message, 0, sizeof message);
    put_header(message, SUBMIT_RUNS, 0, 1, client->epoch);
    put32(body, model->route);
    put32(body + 4, 1);
    put64(body + 8, request->slab->base);
    put32(body + 16, request->slab->capacity);
    put32(body + 20, request->first);
    put32(body + 24, request->rows);
    put32(body + 28, request->attempt);
    put64(body + 48, request->enqueue_ns);
    if (send(client->submissions, message, sizeof message, MSG_NOSIGNAL) < 0)
        return gone(client, strerror(errno));
    return 0;
}

static void look_at_door(forebay_client *client) {
    unsigned char message[DOOR_BYTES_MAX];
    int fds[DOOR_FDS_MAX], fd_count;
    ssize_t size;
    while ((size = receive_door(client, message, fds, &fd_count, MSG_DONTWAIT)) >= 8)
        if (get16(message) == INSTANCE)
            take_instance(client, message + 8, size - 8, fds, fd_count);
        else
            close_all(fds, fd_count);
}

static int dispatch(forebay_client *client, int flags);

static int is_granted(const forebay_model *model) {
    for (int i = 0; i < model->ring_count; i++)
        if (model->rings[i].ticket)
            return 1;
    return 0;
}

int forebay_submit(forebay_request *request) {
    forebay_client *client = request->model->client;
    int code;
    /* A grant follows the answer that earned it. Going to the scheduler without having seen it would end it. */
    if (!is_granted(request->model) && (code = forebay_dispatch(client)))
        return code;
    if (client->is_gone)
        return fail(FOREBAY_GONE, "the engine is gone");
    if (request->state == IN_FLIGHT)
        return fail(FOREBAY_INVALID_ARGUMENT, "the request is in flight already");
    while (client->in_flight >= client->outstanding_max)
        if ((code = dispatch(client, 0)))
            return code;
    if (++client->submitted % LOOK_EVERY == 0)
        look_at_door(client);
    request->state = IN_FLIGHT;
    request->attempt = 0;
    request->enqueue_ns = now_ns();
    request->slab->owners[request->first] = request;
    client->in_flight++;
    if ((code = hand_over(request))) {
        request->state = PREPARED;
        request->slab->owners[request->first] = NULL;
        client->in_flight--;
    }
    return code;
}

/* --- answers --- */

static void finish(forebay_request *request, int code, const char *text, size_t text_bytes) {
    request->slab->owners[request->first] = NULL;
    request->model->client->in_flight--;
    request->state = DONE;
    request->code = code;
    if (text_bytes >= sizeof request->text)
        text_bytes = sizeof request->text - 1;
    memcpy(request->text, text, text_bytes);
    request->text[text_bytes] = 0;
    if (request->is_orphan)
        free_rows(request);
}

static void finish_text(forebay_request *request, int code, const char *text) {
    finish(request, code, text, strlen(text));
}

static void again(forebay_request *request) {
    if (hand_over(request))
        finish_text(request, FOREBAY_GONE, error_text);
}

static void retry(forebay_request *request, int flags) {
    if (flags & FLAG_HUNG) {
        finish_text(request, FOREBAY_INTERNAL, "an instance of the model took too long and was ended");
        return;
    }
    if (request->attempt >= ATTEMPTS_MAX) {
        finish_text(request, FOREBAY_INTERNAL, "an instance of the model ended unexpectedly while it ran the request, "
                                               "and so did the one that tried it again");
        return;
    }
    request->attempt++;
    again(request);
}

/* The server has loaded the model anew: ask where it is now, and hand in again what the old route did not take. */
static void follow(forebay_request *request, int code, const char *text, size_t text_bytes) {
    forebay_model *model = request->model, *found;
    int fits = 1;
    if (model->route != request->route) {
        again(request);
        return;
    }
    found = calloc(1, sizeof *found);
    if (!found) {
        finish(request, code, text, text_bytes);
        return;
    }
    found->client = model->client;
    found->wanted_version = model->wanted_version;
    memcpy(found->name, model->name, sizeof found->name);
    if ((code = ask_model(model->client, found))) {
        finish_text(request, code, error_text);
        free_model(found);
        return;
    }
    if (found->route == model->route) {
        finish(request, FOREBAY_UNAVAILABLE, text, text_bytes);
        free_model(found);
        return;
    }
    fits = found->max_batch == model->max_batch && found->input_count == model->input_count &&
           found->output_count == model->output_count;
    for (int i = 0; fits && i < model->input_count + model->output_count; i++)
        fits = found->tensors[i].datatype == model->tensors[i].datatype &&
               found->tensors[i].row_bytes == model->tensors[i].row_bytes &&
               !strcmp(found->tensors[i].name, model->tensors[i].name);
    if (!fits) {
        finish_text(request, FOREBAY_UNAVAILABLE, "the model was loaded anew with other inputs or outputs; open it again");
        free_model(found);
        return;
    }
    for (int i = 0; i < model->ring_count; i++)
        close(model->rings[i].fd);
    memcpy(model->rings, found->rings, sizeof model->rings);
    model->ring_count = found->ring_count;
    model->route = found->route;
    model->version = found->version;
    found->ring_count = 0;
    free_model(found);
    announce_rings(model->client, model);
    again(request);
}

static slab *slab_at(forebay_client *client, uint64_t base) {
    for (forebay_model *model = client->models; model; model = model->next)
        for (slab *s = model->slabs; s; s = s->next)
            if (s->base == base)
                return s;
    return NULL;
}

static void set_idle(forebay_client *client, uint32_t instance) {
    for (forebay_model *model = client->models; model; model = model->next) {
        ring *r = ring_of(model, instance);
        if (r)
            r->outstanding = NULL;
    }
}

/* Act on `count` runs that begin at `runs`. */
static void take_runs(forebay_client *client, int kind, int flags, int count, const unsigned char *runs,
                      const unsigned char *end) {
    const unsigned char *trailer = runs + (size_t)count * RUN_BYTES;
    if (trailer > end || (kind == RUNS_FAILED && trailer == end))
        return;
    for (int i = 0; i < count; i++) {
        const unsigned char *run = runs + (size_t)i * RUN_BYTES;
        slab *s = slab_at(client, get64(run + 8));
        uint32_t first = get32(run + 20), rows = get32(run + 24);
        if (!s || first > s->capacity || rows > s->capacity - first)
            continue;
        for (uint32_t row = first; row < first + rows; row++) {
            forebay_request *request = s->owners[row];
            if (!request)
                continue;
            if (kind == RUNS_DONE)
                finish(request, 0, "", 0);
            else if (kind == RUNS_LOST)
                retry(request, flags);
            else if (flags & FLAG_MOVED)
                follow(request, trailer[0], (const char *)trailer + 1, (size_t)(end - trailer - 1));
            else
                finish(request, trailer[0] ? trailer[0] : FOREBAY_UNKNOWN, (const char *)trailer + 1,
                       (size_t)(end - trailer - 1));
        }
    }
}

static void take_grant(forebay_client *client, int kind, int flags, uint64_t ticket, const unsigned char *body) {
    uint32_t route = get32(body), instance = get32(body + 4);
    for (forebay_model *model = client->models; model; model = model->next) {
        ring *r = ring_of(model, instance);
        forebay_request *running;
        if (!r || (kind == GRANT && model->route != route))
            continue;
        if (kind == GRANT) {
            r->ticket = ticket;
            r->outstanding = NULL;
            return;
        }
        if (!(flags & FLAG_GONE) && r->ticket != ticket)
            return;
        running = r->outstanding;
        r->ticket = 0;
        r->outstanding = NULL;
        if (running && running->state == IN_FLIGHT) {
            /* Everything that the worker ran was answered before this message. */
            if (flags & FLAG_GONE)
                retry(running, flags);
            else
                again(running);
        }
        return;
    }
}

/* A new scheduler is up, and every worker has finished what the old one had sent: hand in again what is left. */
static void resync(forebay_client *client, uint64_t epoch) {
    client->epoch = (uint32_t)epoch;
    for (forebay_model *model = client->models; model; model = model->next) {
        for (int i = 0; i < model->ring_count; i++) {
            model->rings[i].ticket = 0;
            model->rings[i].outstanding = NULL;
        }
        announce_rings(client, model);
        for (slab *s = model->slabs; s; s = s->next)
            for (uint32_t row = 0; row < s->capacity; row++)
                if (s->owners[row])
                    again(s->owners[row]);
    }
}

static void fail_all(forebay_client *client) {
    for (forebay_model *model = client->models; model; model = model->next)
        for (slab *s = model->slabs; s; s = s->next)
            for (uint32_t row = 0; row < s->capacity; row++)
                if (s->owners[row])
                    finish_text(s->owners[row], FOREBAY_GONE, "the engine is gone: the server has ended");
}

/* Take one message of the completion doorbell; `flags` as for recv. Returns 0, FOREBAY_GONE, or -1: nothing there. */
static int dispatch(forebay_client *client, int flags) {
    unsigned char *message = client->buffer, *end;
    int kind, count;
    ssize_t size;
    if (client->is_gone)
        return fail(FOREBAY_GONE, "the engine is gone");
    do
        size = recv(client->completions, message, sizeof client->buffer, flags);
    while (size < 0 && errno == EINTR);
    if (size < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
        return -1;
    if (size < HEADER_BYTES) {
        int code = gone(client, size < 0 ? strerror(errno) : "the server has ended, or ended this connection");
        fail_all(client);
        return code;
    }
    end = message + size;
    kind = message[0];
    count = get16(message + 2);
    switch (kind) {
    case RUNS_DONE:
    case RUNS_FAILED:
        set_idle(client, get32(message + 4));
        /* fall through */
    case RUNS_LOST:
        if (size >= HEADER_BYTES + TIMES_BYTES)
            take_runs(client, kind, message[1], count, message + HEADER_BYTES + TIMES_BYTES, end);
        break;
    case GRANT:
    case REVOKE:
        if (size >= HEADER_BYTES + 16)
            take_grant(client, kind, message[1], get64(message + 8), message + HEADER_BYTES);
        break;
    case RESYNC:
        resync(client, get64(message + 8));
        break;
    default:
        break; /* parcels, which this client does not send */
    }
    return 0;
}

int forebay_dispatch(forebay_client *client) {
    int code;
    while (!(code = dispatch(client, MSG_DONTWAIT)))
        ;
    return code < 0 ? 0 : code;
}

int forebay_is_done(forebay_request *request) {
    if (request->state == IN_FLIGHT)
        forebay_dispatch(request->model->client);
    return request->state == DONE;
}

/* Look for answers for a moment before going to sleep, as long as they have been that quick: to wake a process on an idle
 * core takes longer than many a model. */
static void glance(forebay_request *request) {
    forebay_client *client = request->model->client;
    uint64_t end_ns;
    if (client->glance_misses < 0) {
        client->glance_misses++;
        return;
    }
    end_ns = now_ns() + GLANCE_NS;
    while (request->state == IN_FLIGHT && now_ns() < end_ns)
        if (dispatch(client, MSG_DONTWAIT) > 0)
            return;
    if (request->state != IN_FLIGHT)
        client->glance_misses = 0;
    else if (++client->glance_misses >= GLANCE_MISSES)
        client->glance_misses = -GLANCE_PAUSE;
}

int forebay_wait(forebay_request *request, int64_t timeout_us) {
    forebay_client *client = request->model->client;
    uint64_t deadline_ns = timeout_us < 0 ? 0 : now_ns() + (uint64_t)timeout_us * 1000;
    if (request->state == PREPARED)
        return fail(FOREBAY_INVALID_ARGUMENT, "the request was not submitted");
    if (request->state == IN_FLIGHT && client->can_glance && !client->spins && client->in_flight == 1)
        glance(request);
    while (request->state == IN_FLIGHT) {
        int code;
        if (client->spins) {
            code = dispatch(client, MSG_DONTWAIT);
        } else if (!deadline_ns) {
            code = dispatch(client, 0);
        } else {
            struct pollfd readable = {.fd = client->completions, .events = POLLIN};
            uint64_t now = now_ns();
            struct timespec left = {0};
            if (now < deadline_ns) {
                left.tv_sec = (time_t)((deadline_ns - now) / 1000000000u);
                left.tv_nsec = (long)((deadline_ns - now) % 1000000000u);
            }
            code = ppoll(&readable, 1, &left, NULL) == 1 ? dispatch(client, MSG_DONTWAIT) : -1;
        }
        if (code > 0)
            break;
        if (code < 0 && deadline_ns && now_ns() >= deadline_ns)
            return fail(FOREBAY_DEADLINE, "the deadline passed before the answer came");
    }
    if (request->code)
        return fail(request->code, "%s", request->text);
    return 0;
}

/* --- one request at a time --- */

static int make_current(forebay_model *model, int rows) {
    forebay_request *current = model->current;
    if (current && current->rows == (uint32_t)rows && current->state != IN_FLIGHT)
        return 0;
    if (current)
        forebay_release(current);
    model->current = NULL;
    return forebay_prepare(model, rows, &model->current);
}

static int index_of(const forebay_tensor *tensors, int count, const char *name) {
    for (int i = 0; i < count; i++)
        if (!strcmp(tensors[i].name, name))
            return i;
    return -1;
}

void *forebay_input(forebay_model *model, const char *name, int rows) {
    int index = index_of(model->tensors, model->input_count, name);
    if (index < 0) {
        fail(FOREBAY_INVALID_ARGUMENT, "model '%s' has no input '%s'", model->name, name);
        return NULL;
    }
    return make_current(model, rows) ? NULL : forebay_request_input(model->current, index);
}

int forebay_infer(forebay_model *model, int rows, int64_t timeout_us) {
    int code;
    if (!model->current || model->current->rows != (uint32_t)rows || model->current->state == IN_FLIGHT)
        return fail(FOREBAY_INVALID_ARGUMENT, "no input of %d rows of model '%s' was filled", rows, model->name);
    if ((code = forebay_submit(model->current)))
        return code;
    return forebay_wait(model->current, timeout_us);
}

const void *forebay_output(forebay_model *model, const char *name, size_t *byte_size) {
    int index = index_of(model->tensors + model->input_count, model->output_count, name);
    if (index < 0 || !model->current || model->current->state != DONE) {
        fail(FOREBAY_INVALID_ARGUMENT, index < 0 ? "model '%s' has no output '%s'" : "model '%s' has no answer with '%s'",
             model->name, name);
        return NULL;
    }
    if (byte_size)
        *byte_size = model->tensors[model->input_count + index].row_bytes * model->current->rows;
    return forebay_request_output(model->current, index);
}
