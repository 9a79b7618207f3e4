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
    DOOR_FDS_MAX = 64, DOOR_BYTES_MAX = 64 * 1024, FLAG_ROWS = 1, FLAG_DECOUPLED = 2, PROTOCOL_VERSION = 1,
    FLAG_OPTIONAL = 1, FLAG_RAGGED = 2, FLAG_SHAPE_TENSOR = 4,
};
enum { /* doorbells and submissions */
    RUNS = 1, PARCELS = 2, RUNS_DONE = 16, RUNS_FAILED = 17, RUNS_LOST = 18, PARCEL_REPLY = 19, PARCEL_LOST = 20,
    GRANT = 21, REVOKE = 22, RESYNC = 23,
    SUBMIT_RUNS = 48, SUBMIT_PARCEL = 49, SUBMIT_CANCEL = 50, SUBMIT_COLLECT = 51, SUBMIT_RINGS = 52,
    SUBMIT_CANCEL_RUNS = 53, SUBMIT_CANCEL_RUNG = 54,
    FLAG_GRANTED = 1, FLAG_FINAL = 4, FLAG_GONE = 8, FLAG_HUNG = 32, FLAG_MOVED = 32, FLAG_REMARKS = 64,
    FLAG_SEQUENCE_START = 1, FLAG_SEQUENCE_END = 2,
    HEADER_BYTES = 16, TIMES_BYTES = 32, RUN_BYTES = 40, SUBMIT_RUN_BYTES = 56, SUBMIT_PARCEL_BYTES = 80,
    RING_PARCEL_BYTES = 28, MESSAGE_BYTES_MAX = 192 * 1024, SUBMIT_BYTES_MAX = 64 * 1024, HEAD_BYTES_MAX = 32 * 1024,
};
enum {
    ALIGNMENT = 64, RINGS_MAX = 256, RANK_MAX = 64, TENSORS_MAX = 4096, ATTEMPTS_MAX = 1, NAME_BYTES_MAX = 1024,
    GLANCE_NS = 50000, GLANCE_MISSES = 8, GLANCE_PAUSE = 64,
    SLAB_ROWS_FIRST = 64, SLAB_BYTES_FIRST = 1 << 20, SLAB_CAPACITY_MAX = 1 << 20, LOOK_EVERY = 256,
    REPLY_BYTES_FIRST = 4096, REPLY_BYTES_FIRST_MAX = 1 << 20, SEQUENCE_NAME_BYTES_MAX = 4096,
};

/* A part of the arena; of 0 bytes: none. */
typedef struct {
    uint64_t offset, bytes;
} block;

/* Parts of the arena that nobody uses, by offset; neighbours are one. */
typedef struct extent {
    struct extent *next;
    block free;
} extent;

typedef struct {
    uint32_t instance;
    int fd;
    uint64_t ticket;              /* of the grant; 0: none */
    forebay_request *outstanding; /* what the worker runs under it */
    int is_retired;               /* nothing more is rung under it */
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
    int takes_rows, is_decoupled;
    int input_count, output_count;
    forebay_tensor *tensors; /* inputs, then outputs */
    unsigned char *tensor_flags;
    uint64_t reply_bytes;    /* lent for an answer of unknown size */
    ring rings[RINGS_MAX];
    int ring_count;
    slab *slabs; /* the newest first */
    forebay_request *current;
};

/* prepared -> in flight -> done -> (in flight again | released) */
enum state { PREPARED, IN_FLIGHT, DONE };

/* One answer to a parcel. */
typedef struct response {
    struct response *next;
    block lent;             /* what it lies in, besides the request's reply block */
    unsigned char *message; /* the reply; names of values point into it */
    forebay_value *values;
    int64_t *dims; /* of all values */
    int value_count, code;
    char text[256];
} response;

/* What an input of a parcel is given. */
typedef struct {
    block place;
    uint64_t bytes;
    int64_t dims[RANK_MAX];
    int rank, is_given;
} given_input;

/* A request outside slabs. */
typedef struct {
    uint64_t token, shape_key;
    given_input *inputs;
    block reply;
    block *lent; /* for responses that have not come yet, the oldest first */
    int lent_count;
    unsigned char *head, *options; /* MessagePack; options: the fields behind "outputs" */
    size_t head_bytes, options_bytes;
    uint64_t deadline_ns, sequence_id;
    char *sequence_name;
    uint32_t sequence_flags;
    response *first, *last, *current; /* that nobody has taken; that the caller looks at */
    uint32_t response_count;
} parcel;

struct forebay_request {
    forebay_model *model;
    slab *slab; /* and its rows, or */
    parcel *parcel;
    uint32_t first, rows, attempt, route, priority;
    uint64_t enqueue_ns, timeout_us;
    enum state state;
    int is_orphan; /* released while in flight */
    int is_cancelled, is_taken, code;
    forebay_value *values; /* of rows, made when somebody asks */
    int64_t *dims;
    char text[256];
};

struct forebay_client {
    char *path;             /* as it was given */
    uint64_t wanted_arena_bytes;
    int door, completions, submissions, arena_fd;
    uint32_t producer, epoch, outstanding_max, in_flight, submitted, serial;
    uint32_t held; /* requests that callers have */
    int spins, is_gone, can_glance;
    int glance_misses; /* answers that were not there at a glance, in a row; below 0: so many without a glance */
    unsigned char *arena;
    uint64_t arena_bytes;
    extent *unused;
    forebay_model *models;
    forebay_request **parcels; /* in flight, by the low half of their tokens */
    uint32_t parcel_capacity;
    unsigned char outgoing[SUBMIT_BYTES_MAX];
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

static const struct {
    char name[8];
    unsigned char item_bytes; /* 0: strings */
} datatypes[] = {
    {"", 0}, {"BOOL", 1}, {"UINT8", 1}, {"UINT16", 2}, {"UINT32", 4}, {"UINT64", 8}, {"INT8", 1}, {"INT16", 2},
    {"INT32", 4}, {"INT64", 8}, {"FP16", 2}, {"FP32", 4}, {"FP64", 8}, {"BYTES", 0}, {"BF16", 2},
};
enum { DATATYPE_COUNT = sizeof datatypes / sizeof *datatypes };

/* --- MessagePack, as much of it as heads and replies need --- */

typedef struct {
    unsigned char *bytes;
    size_t size, capacity; /* size may run beyond: then it did not fit */
} writer;

static void write_bytes(writer *w, const void *bytes, size_t size) {
    if (w->size + size <= w->capacity)
        memcpy(w->bytes + w->size, bytes, size);
    w->size += size;
}

/* Write a type's first byte and a big-endian number of `size` bytes. */
static void write_number(writer *w, unsigned char type, uint64_t value, int size) {
    unsigned char bytes[9] = {type};
    for (int i = 0; i < size; i++)
        bytes[size - i] = (unsigned char)(value >> (8 * i));
    write_bytes(w, bytes, (size_t)size + 1);
}

static void write_integer(writer *w, int64_t value) {
    if (value >= 0 && value < 128)
        write_number(w, (unsigned char)value, 0, 0);
    else
        write_number(w, 0xd3, (uint64_t)value, 8);
}

static void write_unsigned(writer *w, uint64_t value) {
    if (value < 128)
        write_number(w, (unsigned char)value, 0, 0);
    else
        write_number(w, 0xcf, value, 8);
}

static void write_array(writer *w, uint32_t count) { write_number(w, 0xdd, count, 4); }
static void write_map(writer *w, uint32_t count) { write_number(w, 0xdf, count, 4); }
static void write_bool(writer *w, int value) { write_number(w, value ? 0xc3 : 0xc2, 0, 0); }

static void write_text(writer *w, const char *text) {
    size_t size = text ? strlen(text) : 0;
    write_number(w, 0xdb, size, 4);
    write_bytes(w, text ? text : "", size);
}

typedef struct {
    const unsigned char *next, *end;
    int is_broken;
} reader;

static uint64_t read_number(reader *r, int size) {
    uint64_t value = 0;
    if (r->end - r->next < size) {
        r->is_broken = 1;
        return 0;
    }
    while (size--)
        value = value << 8 | *r->next++;
    return value;
}

/* The values of one field: an integer, the length of a text, the items of an array or the pairs of a map. */
typedef struct {
    enum { INTEGER, FRACTION, TEXT, ARRAY, MAP, NOTHING } type;
    int64_t number;
} item;

static item read_item(reader *r) {
    unsigned char first = (unsigned char)read_number(r, 1);
    item found = {NOTHING, 0};
    if (first < 0x80 || first >= 0xe0)
        return (item){INTEGER, first < 0x80 ? first : (int64_t)first - 256};
    if (first < 0x90)
        return (item){MAP, first & 15};
    if (first < 0xa0)
        return (item){ARRAY, first & 15};
    if (first < 0xc0)
        return (item){TEXT, first & 31};
    switch (first) {
    case 0xc0: break;
    case 0xc2: case 0xc3: found = (item){INTEGER, first & 1}; break;
    case 0xc4: case 0xc5: case 0xc6: found = (item){TEXT, (int64_t)read_number(r, 1 << (first - 0xc4))}; break;
    case 0xca: case 0xcb: found.type = FRACTION; read_number(r, first == 0xca ? 4 : 8); break;
    case 0xcc: case 0xcd: case 0xce: case 0xcf:
        found = (item){INTEGER, (int64_t)read_number(r, 1 << (first - 0xcc))};
        break;
    case 0xd0: found = (item){INTEGER, (int8_t)read_number(r, 1)}; break;
    case 0xd1: found = (item){INTEGER, (int16_t)read_number(r, 2)}; break;
    case 0xd2: found = (item){INTEGER, (int32_t)read_number(r, 4)}; break;
    case 0xd3: found = (item){INTEGER, (int64_t)read_number(r, 8)}; break;
    case 0xd9: case 0xda: case 0xdb: found = (item){TEXT, (int64_t)read_number(r, 1 << (first - 0xd9))}; break;
    case 0xdc: case 0xdd: found = (item){ARRAY, (int64_t)read_number(r, first == 0xdc ? 2 : 4)}; break;
    case 0xde: case 0xdf: found = (item){MAP, (int64_t)read_number(r, first == 0xde ? 2 : 4)}; break;
    default: r->is_broken = 1;
    }
    return found;
}

/* Read a number; another type breaks the reader, as below. */
static int64_t read_integer(reader *r) {
    item found = read_item(r);
    r->is_broken |= found.type != INTEGER;
    return r->is_broken ? 0 : found.number;
}

/* Read how many items an array has; each takes a byte at least. */
static int read_array(reader *r) {
    item found = read_item(r);
    r->is_broken |= found.type != ARRAY || found.number > r->end - r->next;
    return r->is_broken ? 0 : (int)found.number;
}

static const unsigned char *read_text(reader *r, size_t *size) {
    item found = read_item(r);
    const unsigned char *text = r->next;
    r->is_broken |= found.type != TEXT || found.number > r->end - r->next;
    *size = r->is_broken ? 0 : (size_t)found.number;
    r->next += *size;
    return text;
}

static void skip_item(reader *r) {
    int64_t left = 1;
    while (left-- > 0 && !r->is_broken) {
        item found = read_item(r);
        if (found.type == TEXT && found.number <= r->end - r->next)
            r->next += found.number;
        else if (found.type == ARRAY || found.type == MAP)
            left += found.type == MAP ? 2 * found.number : found.number;
        else
            r->is_broken |= found.type == TEXT;
    }
}

/* --- the arena's books --- */

static int allocate(forebay_client *client, uint64_t bytes, block *result) {
    bytes = align_up(bytes ? bytes : 1);
    for (extent **link = &client->unused; *link; link = &(*link)->next) {
        extent *e = *link;
        if (e->free.bytes < bytes)
            continue;
        *result = (block){e->free.offset, bytes};
        e->free.offset += bytes;
        e->free.bytes -= bytes;
        if (!e->free.bytes) {
            *link = e->next;
            free(e);
        }
        return 0;
    }
    return fail(FOREBAY_NO_MEMORY, "no room for %llu bytes of tensors in an arena of %llu", (unsigned long long)bytes,
                (unsigned long long)client->arena_bytes);
}

static void give_back(forebay_client *client, block *used) {
    extent **link = &client->unused, *e, *before = NULL;
    if (!used->bytes)
        return;
    for (; *link && (*link)->free.offset < used->offset; link = &(*link)->next)
        before = *link;
    e = *link;
    if (before && before->free.offset + before->free.bytes == used->offset) {
        before->free.bytes += used->bytes;
        if (e && used->offset + used->bytes == e->free.offset) {
            before->free.bytes += e->free.bytes;
            before->next = e->next;
            free(e);
        }
    } else if (e && used->offset + used->bytes == e->free.offset) {
        e->free.offset = used->offset;
        e->free.bytes += used->bytes;
    } else if ((before = malloc(sizeof *before))) { /* else the block is lost until the client closes */
        *before = (extent){e, *used};
        *link = before;
    }
    used->bytes = 0;
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
        return fail(FOREBAY_NO_SERVER, "no forebay server is running: there is no clients.sock of this user in %s",
                    place);
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

static void finish_text(forebay_request *request, int code, const char *text);
static void free_request(forebay_request *request);

/* Connect and come in; what was opened is closed again by `disconnect`. */
static int come_in(forebay_client *client) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct timeval patience = {.tv_sec = 30}, slow = {.tv_sec = 10};
    unsigned char body[64] = "forebay", answer[DOOR_BYTES_MAX];
    int fds[DOOR_FDS_MAX], fd_count = 0, flags, code;
    ssize_t size = 0;
    char door[sizeof address.sun_path];
    extent *all;
    if ((code = choose_door(client->path, door, sizeof door)))
        return code;
    client->door = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    memcpy(address.sun_path, door, sizeof door);
    if (client->door < 0 || connect(client->door, (struct sockaddr *)&address, sizeof address))
        return fail(FOREBAY_NO_SERVER, "no forebay server listens at '%s': %s", door, strerror(errno));
    setsockopt(client->door, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    put32(body + 8, PROTOCOL_VERSION);
    put32(body + 12, 0);
    put64(body + 16, client->wanted_arena_bytes);
    memcpy(body + 24, "c client", 8);
    if ((code = ask(client, HELLO, body, 32, WELCOME, &flags, answer, &size, fds, &fd_count)))
        return code;
    if (size < 24 || fd_count != 3 || get32(answer) != PROTOCOL_VERSION || get64(answer + 8) <= ALIGNMENT) {
        close_all(fds, fd_count);
        return fail(FOREBAY_INTERNAL, "the server's answer at its door makes no sense");
    }
    client->producer = get32(answer + 4);
    client->arena_bytes = get64(answer + 8);
    client->epoch = get32(answer + 16);
    client->outstanding_max = get32(answer + 20);
    client->arena_fd = fds[0];
    client->completions = fds[1];
    client->submissions = fds[2];
    setsockopt(client->submissions, SOL_SOCKET, SO_SNDTIMEO, &slow, sizeof slow);
    client->arena = mmap(NULL, client->arena_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, client->arena_fd, 0);
    if (client->arena == MAP_FAILED || !(all = malloc(sizeof *all)))
        return fail(FOREBAY_NO_MEMORY, "cannot map the arena: %s", strerror(errno));
    /* Offset 0 is nobody's. */
    *all = (extent){NULL, {ALIGNMENT, client->arena_bytes - ALIGNMENT}};
    client->unused = all;
    client->is_gone = 0;
    return 0;
}

int forebay_connect(const char *path, uint64_t arena_bytes, forebay_client **result) {
    forebay_client *client = calloc(1, sizeof *client);
    int code;
    if (!client || (path && !(client->path = strdup(path)))) {
        free(client);
        return fail(FOREBAY_NO_MEMORY, "out of memory");
    }
    client->wanted_arena_bytes = arena_bytes;
    client->door = client->completions = client->submissions = client->arena_fd = -1;
    client->arena = MAP_FAILED;
    client->can_glance = can_use_two_cores();
    if ((code = come_in(client)))
        forebay_close(client);
    else
        *result = client;
    return code;
}

void forebay_set_spin(forebay_client *client, int spin) { client->spins = spin; }
int forebay_fd(const forebay_client *client) { return client->completions; }

/* Forget what a model is on the server: its workers' rings, rows, and signature. */
static void clear_model(forebay_model *model) {
    for (int i = 0; i < model->ring_count; i++)
        close(model->rings[i].fd);
    model->ring_count = 0;
    for (slab *s = model->slabs, *next; s; s = next) {
        next = s->next;
        free(s->used);
        free(s->owners);
        free(s);
    }
    model->slabs = NULL;
    for (int i = 0; model->tensors && i < model->input_count + model->output_count; i++) {
        free((void *)model->tensors[i].name);
        free((void *)model->tensors[i].dims);
    }
    free(model->tensors);
    free(model->tensor_flags);
    model->tensors = NULL;
    model->tensor_flags = NULL;
}

static void fail_all(forebay_client *client) {
    for (forebay_model *model = client->models; model; model = model->next)
        for (slab *s = model->slabs; s; s = s->next)
            for (uint32_t row = 0; row < s->capacity; row++)
                if (s->owners[row])
                    finish_text(s->owners[row], FOREBAY_GONE, "the engine is gone: the server has ended");
    for (uint32_t i = 0; i < client->parcel_capacity; i++)
        if (client->parcels[i])
            finish_text(client->parcels[i], FOREBAY_GONE, "the engine is gone: the server has ended");
}

/* Leave the server. Requests that callers still have must not be used any more, but may be released. */
static void disconnect(forebay_client *client) {
    int *fds[] = {&client->door, &client->completions, &client->submissions, &client->arena_fd};
    fail_all(client);
    for (forebay_model *model = client->models; model; model = model->next) {
        if (model->current)
            free_request(model->current);
        model->current = NULL;
        clear_model(model);
    }
    for (extent *e = client->unused, *next; e; e = next) {
        next = e->next;
        free(e);
    }
    client->unused = NULL;
    if (client->arena != MAP_FAILED)
        munmap(client->arena, client->arena_bytes);
    client->arena = MAP_FAILED;
    for (int i = 0; i < 4; i++) {
        if (*fds[i] >= 0)
            close(*fds[i]);
        *fds[i] = -1;
    }
}

void forebay_close(forebay_client *client) {
    disconnect(client);
    for (forebay_model *model = client->models, *next; model; model = next) {
        next = model->next;
        free(model);
    }
    free(client->parcels);
    free(client->path);
    free(client);
}

/* --- models --- */

/* Read a tensor of a signature, into zeroed memory. */
static int read_tensor(const unsigned char *p, const unsigned char *end, forebay_tensor *tensor,
                       const unsigned char **next) {
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
    if (!p[0] || p[0] >= DATATYPE_COUNT)
        return -1;
    tensor->datatype = p[0];
    tensor->rank = rank;
    tensor->row_bytes = datatypes[p[0]].item_bytes;
    tensor->is_optional = p[1] & FLAG_OPTIONAL ? 1 : 0;
    for (int i = 0; i < rank; i++) {
        size_t size = (size_t)(dims[i] = (int64_t)get64(p + 8 + 8 * i));
        if (dims[i] < -1 || __builtin_mul_overflow(tensor->row_bytes, dims[i] < 0 ? 0 : size, &tensor->row_bytes))
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
        model->takes_rows = flags & FLAG_ROWS;
        model->is_decoupled = flags & FLAG_DECOUPLED ? 1 : 0;
        model->reply_bytes = REPLY_BYTES_FIRST;
        model->tensors = calloc((size_t)tensors + 1, sizeof *model->tensors);
        model->tensor_flags = calloc((size_t)tensors + 1, 1);
        if (!model->tensors || !model->tensor_flags)
            code = fail(FOREBAY_NO_MEMORY, "out of memory");
        for (int i = 0; !code && i < tensors; i++) {
            model->tensor_flags[i] = end - next > 1 ? next[1] : 0;
            if (read_tensor(next, end, &model->tensors[i], &next))
                code = fail(FOREBAY_INTERNAL, "the server's answer at its door makes no sense");
        }
        for (int i = 0; !code && i < instances; i++)
            model->rings[model->ring_count++] = (ring){.instance = get32(answer + 24 + 4 * i), .fd = fds[i]};
    }
    if (code)
        close_all(fds, fd_count);
    free(answer);
    return code;
}

int forebay_open(forebay_client *client, const char *name, int64_t version, forebay_model **result) {
    forebay_model *model;
    int code;
    /* A worker listens to one ring of a client's: the model that was opened last would take it from the others. */
    for (model = client->models; model; model = model->next)
        if (model->wanted_version == version && !strcmp(model->name, name)) {
            *result = model;
            return 0;
        }
    model = calloc(1, sizeof *model);
    if (!model || strlen(name) >= NAME_BYTES_MAX) {
        free(model);
        return fail(model ? FOREBAY_NOT_FOUND : FOREBAY_NO_MEMORY, "no model has such a name");
    }
    model->client = client;
    model->wanted_version = version;
    memcpy(model->name, name, strlen(name));
    if ((code = ask_model(client, model))) {
        clear_model(model);
        free(model);
        return code;
    }
    /* The same route, opened by another version: its workers listen to the new rings only. */
    for (forebay_model *other = client->models; other; other = other->next)
        for (int i = 0; other->route == model->route && i < other->ring_count; i++)
            other->rings[i].ticket = 0;
    model->next = client->models;
    client->models = model;
    *result = model;
    return announce_rings(client, model);
}

int forebay_reconnect(forebay_client *client) {
    int code;
    if (client->held)
        return fail(FOREBAY_INVALID_ARGUMENT, "%u requests have not been released", client->held);
    disconnect(client);
    code = come_in(client);
    for (forebay_model *model = client->models; !code && model; model = model->next)
        if (!(code = ask_model(client, model)))
            code = announce_rings(client, model);
    if (code)
        client->is_gone = 1;
    return code;
}

int forebay_is_decoupled(const forebay_model *model) { return model->is_decoupled; }
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
    uint64_t capacity = 4 * (uint64_t)model->max_batch;
    block memory;
    slab *s;
    if (model->slabs)
        capacity = 2 * (uint64_t)model->slabs->capacity;
    else {
        capacity = capacity < SLAB_ROWS_FIRST ? SLAB_ROWS_FIRST : capacity;
        capacity = capacity > fitting ? fitting : capacity;
    }
    capacity = capacity < rows ? rows : capacity > SLAB_CAPACITY_MAX ? SLAB_CAPACITY_MAX : capacity;
    if (allocate(client, slab_bytes(model, (uint32_t)capacity), &memory))
        return NULL;
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
        give_back(client, &memory);
        fail(FOREBAY_NO_MEMORY, "out of memory");
        return NULL;
    }
    s->base = memory.offset;
    s->capacity = (uint32_t)capacity;
    s->next = model->slabs;
    model->slabs = s;
    return s;
}

static void free_response(forebay_client *client, response *done) {
    give_back(client, &done->lent);
    free(done->message);
    free(done->values);
    free(done->dims);
    free(done);
}

/* Let go of the answers to a request, so that it can be submitted again. */
static void drop_answers(forebay_request *request) {
    forebay_client *client = request->model->client;
    parcel *p = request->parcel;
    if (!p)
        return;
    if (p->current)
        free_response(client, p->current);
    for (response *r = p->first, *next; r; r = next) {
        next = r->next;
        free_response(client, r);
    }
    p->first = p->last = p->current = NULL;
    p->response_count = 0;
    for (int i = 0; i < p->lent_count; i++)
        give_back(client, &p->lent[i]);
    p->lent_count = 0;
    give_back(client, &p->reply);
}

static void free_parcel(forebay_request *request) {
    forebay_client *client = request->model->client;
    parcel *p = request->parcel;
    drop_answers(request);
    for (int i = 0; p->inputs && i < request->model->input_count; i++)
        give_back(client, &p->inputs[i].place);
    free(p->inputs);
    free(p->lent);
    free(p->head);
    free(p->options);
    free(p->sequence_name);
    free(p);
}

/* Give a request's memory back; it is not in flight. */
static void free_request(forebay_request *request) {
    if (request->parcel) {
        free_parcel(request);
    } else {
        memset(request->slab->used + request->first, 0, request->rows);
        request->slab->live -= request->rows;
    }
    free(request->values);
    free(request->dims);
    free(request);
}

static void drop_request(forebay_request *request) {
    if (request->state == IN_FLIGHT)
        request->is_orphan = 1;
    else
        free_request(request);
}

void forebay_release(forebay_request *request) {
    request->model->client->held--;
    drop_request(request);
}

static int take_rows(forebay_request *request) {
    forebay_model *model = request->model;
    int64_t first = -1;
    slab *s;
    for (s = model->slabs; s; s = s->next)
        if ((first = loan(s, request->rows)) >= 0)
            break;
    if (!s) {
        if (!(s = add_slab(model, request->rows)))
            return FOREBAY_NO_MEMORY;
        first = loan(s, request->rows);
    }
    request->slab = s;
    request->first = (uint32_t)first;
    return 0;
}

static int make_parcel(forebay_request *request) {
    parcel *p = request->parcel = calloc(1, sizeof *p);
    if (p && (p->inputs = calloc((size_t)request->model->input_count + 1, sizeof *p->inputs)))
        return 0;
    free(p);
    return fail(FOREBAY_NO_MEMORY, "out of memory");
}

static int prepare(forebay_model *model, int rows, int in_rows, forebay_request **result) {
    forebay_request *request;
    int code, most = model->max_batch ? (int)model->max_batch : 1;
    if (!model->tensors)
        return fail(FOREBAY_GONE, "model '%s' is not open: the engine is gone", model->name);
    if (rows < 1 || rows > most)
        return fail(FOREBAY_INVALID_ARGUMENT, "model '%s' takes 1 to %d rows at a time, not %d", model->name, most,
                    rows);
    if (!(request = calloc(1, sizeof *request)))
        return fail(FOREBAY_NO_MEMORY, "out of memory");
    request->model = model;
    request->rows = (uint32_t)rows;
    if ((code = in_rows ? take_rows(request) : make_parcel(request))) {
        free(request);
        return code;
    }
    *result = request;
    return 0;
}

int forebay_prepare(forebay_model *model, int rows, forebay_request **result) {
    int code = prepare(model, rows, model->takes_rows, result);
    model->client->held += !code;
    return code;
}

int forebay_prepare_parcel(forebay_model *model, int rows, forebay_request **result) {
    int code = prepare(model, rows, 0, result);
    model->client->held += !code;
    return code;
}

/* --- inputs --- */

/* Whether an input has a batch dimension: shape tensors are the same for all items of a request. */
static int is_batched(const forebay_model *model, int index) {
    return model->max_batch > 0 && !(model->tensor_flags[index] & FLAG_SHAPE_TENSOR);
}

/* The shape that a tensor has if none of its sizes vary; returns the rank, or -1. batched: rows come first. */
static int fixed_shape(const forebay_request *request, const forebay_tensor *tensor, int batched, int64_t *shape) {
    shape[0] = request->rows;
    for (int i = 0; i < tensor->rank; i++)
        if ((shape[batched + i] = tensor->dims[i]) < 0)
            return -1;
    return tensor->rank + batched;
}

/* Check a shape and return its number of elements, or -1. */
static int64_t element_count(const forebay_request *request, int index, const int64_t *shape, int rank) {
    const forebay_model *model = request->model;
    const forebay_tensor *tensor = forebay_input_at(model, index);
    int batched, fits;
    int64_t count = 1;
    if (!tensor || request->state == IN_FLIGHT) {
        fail(FOREBAY_INVALID_ARGUMENT, tensor ? "a request of model '%s' is in flight" : "model '%s' has no such input",
             model->name);
        return -1;
    }
    batched = is_batched(model, index);
    fits = rank == tensor->rank + batched && rank <= RANK_MAX && (!batched || shape[0] == (int64_t)request->rows);
    for (int i = batched; fits && i < rank; i++)
        fits = shape[i] >= 0 && (tensor->dims[i - batched] < 0 || tensor->dims[i - batched] == shape[i]);
    for (int i = 0; fits && i < rank; i++)
        fits = !__builtin_mul_overflow(count, shape[i], &count);
    if (!fits) {
        fail(FOREBAY_INVALID_ARGUMENT, "input '%s' of model '%s' cannot have this shape", tensor->name, model->name);
        return -1;
    }
    return count;
}

/* Return where `bytes` of an input go that was found to fit; its block is used again if it is large enough. */
static unsigned char *place_input(forebay_request *request, int index, const int64_t *shape, int rank, uint64_t bytes) {
    forebay_client *client = request->model->client;
    given_input *input = &request->parcel->inputs[index];
    if (!input->place.bytes || input->place.bytes < bytes) {
        give_back(client, &input->place);
        input->is_given = 0;
        if (allocate(client, bytes, &input->place))
            return NULL;
    }
    memcpy(input->dims, shape, sizeof *shape * (size_t)rank);
    input->rank = rank;
    input->bytes = bytes;
    input->is_given = 1;
    return client->arena + input->place.offset;
}

void *forebay_shape_input(forebay_request *request, int index, const int64_t *shape, int rank) {
    int64_t count = element_count(request, index, shape, rank), bytes;
    const forebay_tensor *tensor = forebay_input_at(request->model, index);
    if (count < 0)
        return NULL;
    if (tensor->datatype == FOREBAY_BYTES) {
        fail(FOREBAY_INVALID_ARGUMENT, "input '%s' takes strings: use forebay_put_strings", tensor->name);
        return NULL;
    }
    if (!request->parcel)
        return place(request, index);
    if (__builtin_mul_overflow(count, datatypes[tensor->datatype].item_bytes, &bytes)) {
        fail(FOREBAY_NO_MEMORY, "input '%s' is too large", tensor->name);
        return NULL;
    }
    return place_input(request, index, shape, rank, (uint64_t)bytes);
}

void *forebay_request_input(forebay_request *request, int index) {
    const forebay_tensor *tensor = forebay_input_at(request->model, index);
    int64_t shape[RANK_MAX + 1];
    int rank;
    if (tensor && !request->parcel)
        return place(request, index);
    if (tensor && (rank = fixed_shape(request, tensor, is_batched(request->model, index), shape)) < 0) {
        fail(FOREBAY_INVALID_ARGUMENT, "input '%s' varies in size: use forebay_shape_input", tensor->name);
        return NULL;
    }
    return forebay_shape_input(request, index, shape, tensor ? rank : 0);
}

int forebay_put_strings(forebay_request *request, int index, const int64_t *shape, int rank, const char *const *strings,
                        const size_t *lengths) {
    int64_t count = element_count(request, index, shape, rank);
    const forebay_tensor *tensor = forebay_input_at(request->model, index);
    uint64_t bytes = 0;
    unsigned char *next;
    if (count < 0)
        return FOREBAY_INVALID_ARGUMENT;
    if (tensor->datatype != FOREBAY_BYTES)
        return fail(FOREBAY_INVALID_ARGUMENT, "input '%s' takes numbers, not strings", tensor->name);
    for (int64_t i = 0; i < count; i++) {
        size_t length = lengths ? lengths[i] : strlen(strings[i]);
        if (length > UINT32_MAX)
            return fail(FOREBAY_INVALID_ARGUMENT, "a string for input '%s' is too long", tensor->name);
        bytes += 4 + length;
    }
    if (!(next = place_input(request, index, shape, rank, bytes)))
        return FOREBAY_NO_MEMORY;
    for (int64_t i = 0; i < count; i++) {
        size_t length = lengths ? lengths[i] : strlen(strings[i]);
        put32(next, (uint32_t)length);
        memcpy(next + 4, strings[i], length);
        next += 4 + length;
    }
    return 0;
}

/* --- options and heads --- */

int forebay_set_options(forebay_request *request, const forebay_options *options) {
    parcel *p = request->parcel;
    unsigned char bytes[HEAD_BYTES_MAX];
    writer w = {bytes, 0, sizeof bytes};
    const char *sequence = options->sequence_name && *options->sequence_name ? options->sequence_name : NULL;
    char *name = NULL;
    if (request->state == IN_FLIGHT)
        return fail(FOREBAY_INVALID_ARGUMENT, "the request is in flight");
    request->priority = options->priority;
    request->timeout_us = options->timeout_us;
    if (!p) {
        if (options->deadline_ns || options->id || options->sequence_id || sequence || options->parameter_count)
            return fail(FOREBAY_UNSUPPORTED, "a request in rows carries a timeout and a priority only: use "
                                             "forebay_prepare_parcel");
        return 0;
    }
    write_text(&w, options->id);
    write_map(&w, (uint32_t)options->parameter_count);
    for (int i = 0; i < options->parameter_count; i++) {
        write_text(&w, options->parameters[i].key);
        if (options->parameters[i].text)
            write_text(&w, options->parameters[i].text);
        else
            write_integer(&w, options->parameters[i].number);
    }
    if (sequence)
        write_text(&w, sequence);
    else
        write_unsigned(&w, options->sequence_id);
    write_bool(&w, options->sequence_start);
    write_bool(&w, options->sequence_end);
    write_unsigned(&w, options->priority);
    write_unsigned(&w, options->timeout_us);
    write_unsigned(&w, options->deadline_ns);
    if (w.size > w.capacity || (sequence && strlen(sequence) > SEQUENCE_NAME_BYTES_MAX))
        return fail(FOREBAY_INVALID_ARGUMENT, "the options of a request are too long");
    free(p->options);
    p->options = malloc(w.size);
    if (!p->options || (sequence && !(name = strdup(sequence))))
        return fail(FOREBAY_NO_MEMORY, "out of memory");
    memcpy(p->options, bytes, w.size);
    p->options_bytes = w.size;
    free(p->sequence_name);
    p->sequence_name = name;
    p->sequence_id = sequence ? 0 : options->sequence_id;
    p->sequence_flags = options->sequence_start ? FLAG_SEQUENCE_START : 0;
    p->sequence_flags |= options->sequence_end ? FLAG_SEQUENCE_END : 0;
    p->deadline_ns = options->deadline_ns;
    return 0;
}

static void write_place(writer *w, const forebay_tensor *tensor, const given_input *input) {
    write_array(w, 5);
    write_text(w, tensor->name);
    write_text(w, datatypes[tensor->datatype].name);
    write_array(w, (uint32_t)input->rank);
    for (int i = 0; i < input->rank; i++)
        write_integer(w, input->dims[i]);
    write_unsigned(w, input->place.offset);
    write_unsigned(w, input->bytes);
}

static uint64_t hashed(uint64_t hash, const void *bytes, size_t size) {
    for (const unsigned char *p = bytes; size--; p++)
        hash = (hash ^ *p) * 0x100000001b3u;
    return hash;
}

/* A number that is equal for requests that may share a batch: of names and shapes, of ragged inputs the names only, of
 * shape tensors the values too. */
static uint64_t shape_key_of(const forebay_request *request) {
    const forebay_model *model = request->model;
    uint64_t hash = 0xcbf29ce484222325u;
    int varies = 0;
    for (int i = 0; i < model->input_count; i++) {
        const given_input *input = &request->parcel->inputs[i];
        int batched = is_batched(model, i), is_shape = model->tensor_flags[i] & FLAG_SHAPE_TENSOR;
        varies |= is_shape || !model->tensors[i].row_bytes;
        if (!input->is_given)
            continue;
        hash = hashed(hash, model->tensors[i].name, strlen(model->tensors[i].name) + 1);
        if (!batched || !(model->tensor_flags[i] & FLAG_RAGGED))
            hash = hashed(hash, input->dims + batched, sizeof *input->dims * (size_t)(input->rank - batched));
        if (is_shape)
            hash = hashed(hash, model->client->arena + input->place.offset, input->bytes);
    }
    return varies ? hash >> 8 | 1 : 0;
}

/* How large a block to lend for the answer: exact where all outputs have fixed sizes, else what has been seen. */
static uint64_t first_reply_bytes(const forebay_request *request) {
    const forebay_model *model = request->model;
    uint64_t total = 0;
    for (int i = model->input_count; i < model->input_count + model->output_count; i++) {
        if (!model->tensors[i].row_bytes)
            return model->reply_bytes;
        total += align_up(model->tensors[i].row_bytes * request->rows);
    }
    return total;
}

/* Make the head of a parcel that is about to be submitted. */
static int complete_parcel(forebay_request *request) {
    forebay_model *model = request->model;
    parcel *p = request->parcel;
    writer w = {NULL, 0, HEAD_BYTES_MAX};
    uint32_t given = 0;
    for (int i = 0; i < model->input_count; i++) {
        if (!p->inputs[i].is_given && !model->tensors[i].is_optional)
            return fail(FOREBAY_INVALID_ARGUMENT, "model '%s' needs input '%s', which was not filled", model->name,
                        model->tensors[i].name);
        given += (uint32_t)p->inputs[i].is_given;
    }
    drop_answers(request);
    if (allocate(model->client, first_reply_bytes(request), &p->reply))
        return FOREBAY_NO_MEMORY;
    if (!p->head && !(p->head = malloc(HEAD_BYTES_MAX)))
        return fail(FOREBAY_NO_MEMORY, "out of memory");
    w.bytes = p->head;
    write_array(&w, p->options ? 12 : 3);
    write_array(&w, given);
    for (int i = 0; i < model->input_count; i++)
        if (p->inputs[i].is_given)
            write_place(&w, &model->tensors[i], &p->inputs[i]);
    write_unsigned(&w, p->reply.offset);
    write_unsigned(&w, p->reply.bytes);
    if (p->options) {
        write_array(&w, 0);
        write_bytes(&w, p->options, p->options_bytes);
    }
    if (w.size > w.capacity)
        return fail(FOREBAY_INVALID_ARGUMENT, "what the request carries besides tensors is too long");
    p->head_bytes = w.size;
    p->shape_key = shape_key_of(request);
    return 0;
}

/* --- values --- */

/* Describe the outputs in a request's rows. */
static void make_values(forebay_request *request) {
    const forebay_model *model = request->model;
    const forebay_tensor *outputs = model->tensors + model->input_count;
    int64_t *dims;
    request->values = calloc((size_t)model->output_count + 1, sizeof *request->values);
    dims = request->dims = calloc((size_t)model->output_count + 1, sizeof *dims * (RANK_MAX + 1));
    for (int i = 0; request->values && dims && i < model->output_count; i++, dims += RANK_MAX + 1)
        request->values[i] = (forebay_value){
            .name = outputs[i].name, .datatype = outputs[i].datatype,
            .rank = fixed_shape(request, &outputs[i], model->max_batch > 0, dims), .shape = dims,
            .data = place(request, model->input_count + i),
            .byte_size = outputs[i].row_bytes * request->rows,
        };
}

int forebay_value_count(const forebay_request *request) {
    if (request->parcel)
        return request->parcel->current ? request->parcel->current->value_count : 0;
    return request->state == DONE && !request->code ? request->model->output_count : 0;
}

const forebay_value *forebay_value_at(const forebay_request *request, int index) {
    if (index < 0 || index >= forebay_value_count(request))
        return NULL;
    if (request->parcel)
        return &request->parcel->current->values[index];
    if (!request->values)
        make_values((forebay_request *)request);
    return request->values && request->dims ? &request->values[index] : NULL;
}

const forebay_value *forebay_value_named(const forebay_request *request, const char *name) {
    for (int i = 0; i < forebay_value_count(request); i++) {
        const forebay_value *value = forebay_value_at(request, i);
        if (value && !strcmp(value->name, name))
            return value;
    }
    return NULL;
}

const void *forebay_request_output(forebay_request *request, int index) {
    const forebay_model *model = request->model;
    const forebay_value *value;
    if (index < 0 || index >= model->output_count)
        return NULL;
    if (!request->parcel)
        return place(request, model->input_count + index);
    value = forebay_value_named(request, model->tensors[model->input_count + index].name);
    return value ? value->data : NULL;
}

int forebay_next_string(const forebay_value *value, size_t *position, const char **text, size_t *length) {
    const unsigned char *data = value->data;
    size_t left = value->byte_size - (*position < value->byte_size ? *position : value->byte_size);
    if (value->datatype != FOREBAY_BYTES || left < 4 || left - 4 < get32(data + *position))
        return 0;
    *length = get32(data + *position);
    *text = (const char *)data + *position + 4;
    *position += 4 + *length;
    return 1;
}

/* --- handing over --- */

static ring *ring_of(forebay_model *model, uint32_t instance) {
    for (int i = 0; i < model->ring_count; i++)
        if (model->rings[i].instance == instance)
            return &model->rings[i];
    return NULL;
}

/* Take an idle worker that is granted to us; NULL: there is none. */
static ring *idle_ring(forebay_model *model) {
    for (int i = 0; i < model->ring_count; i++)
        if (model->rings[i].ticket && !model->rings[i].outstanding && !model->rings[i].is_retired)
            return &model->rings[i];
    return NULL;
}

/* Ring a granted worker with what lies in the buffer for messages; 0: it does not take it. */
static int ring_worker(ring *r, forebay_request *request, int kind, size_t size) {
    unsigned char *message = request->model->client->outgoing;
    put_header(message, kind, FLAG_GRANTED, 1, r->ticket);
    if (send(r->fd, message, size, MSG_DONTWAIT | MSG_NOSIGNAL) < 0) {
        /* The worker is gone; the completion doorbell will say. */
        r->ticket = 0;
        return 0;
    }
    r->outstanding = request;
    return 1;
}

/* Return the worker that was rung for a request; NULL: the scheduler has it. */
static ring *rung_for(forebay_request *request) {
    for (int i = 0; i < request->model->ring_count; i++)
        if (request->model->rings[i].ticket && request->model->rings[i].outstanding == request)
            return &request->model->rings[i];
    return NULL;
}

/* Send what lies in the buffer for messages to the scheduler; about an instance, or 0. */
static int tell_scheduler_of(uint32_t instance, forebay_client *client, int kind, size_t size) {
    put_header(client->outgoing, kind, 0, 1, client->epoch);
    put32(client->outgoing + 4, instance);
    return send(client->submissions, client->outgoing, size, MSG_NOSIGNAL) < 0 ? gone(client, strerror(errno)) : 0;
}

static int tell_scheduler(forebay_client *client, int kind, size_t size) {
    return tell_scheduler_of(0, client, kind, size);
}

static int hand_over_rows(forebay_request *request) {
    forebay_model *model = request->model;
    forebay_client *client = model->client;
    unsigned char *body = client->outgoing + HEADER_BYTES;
    ring *r;
    while ((r = idle_ring(model))) {
        put32(body, client->producer);
        put32(body + 4, 1);
        put64(body + 8, request->slab->base);
        put32(body + 16, request->slab->capacity);
        put32(body + 20, request->first);
        put32(body + 24, request->rows);
        put32(body + 28, request->attempt);
        put64(body + 32, request->enqueue_ns);
        if (ring_worker(r, request, RUNS, HEADER_BYTES + RUN_BYTES))
            return 0;
    }
    put32(body, model->route);
    put32(body + 4, 1);
    put64(body + 8, request->slab->base);
    put32(body + 16, request->slab->capacity);
    put32(body + 20, request->first);
    put32(body + 24, request->rows);
    put32(body + 28, request->attempt);
    put32(body + 32, request->priority);
    put32(body + 36, 0);
    put64(body + 40, request->timeout_us);
    put64(body + 48, request->enqueue_ns);
    return tell_scheduler(client, SUBMIT_RUNS, HEADER_BYTES + SUBMIT_RUN_BYTES);
}

static int hand_over_parcel(forebay_request *request) {
    forebay_model *model = request->model;
    forebay_client *client = model->client;
    parcel *p = request->parcel;
    unsigned char *body = client->outgoing + HEADER_BYTES;
    size_t text_bytes = p->sequence_name ? strlen(p->sequence_name) : 0;
    ring *r;
    while ((r = idle_ring(model))) {
        put32(body, client->producer);
        put32(body + 4, request->rows);
        put64(body + 8, p->token);
        put64(body + 16, request->enqueue_ns);
        put32(body + 24, (uint32_t)p->head_bytes);
        memcpy(body + RING_PARCEL_BYTES, p->head, p->head_bytes);
        if (ring_worker(r, request, PARCELS, HEADER_BYTES + RING_PARCEL_BYTES + p->head_bytes))
            return 0;
    }
    put32(body, model->route);
    put32(body + 4, request->rows);
    put64(body + 8, p->token);
    put64(body + 16, p->shape_key);
    put64(body + 24, request->timeout_us);
    put64(body + 32, p->deadline_ns);
    put64(body + 40, request->enqueue_ns);
    put64(body + 48, p->sequence_id);
    put32(body + 56, request->priority);
    put32(body + 60, request->attempt);
    put32(body + 64, (uint32_t)p->head_bytes);
    put32(body + 68, (uint32_t)text_bytes);
    put32(body + 72, p->sequence_flags);
    put32(body + 76, 0);
    memcpy(body + SUBMIT_PARCEL_BYTES, p->head, p->head_bytes);
    memcpy(body + SUBMIT_PARCEL_BYTES + p->head_bytes, p->sequence_name ? p->sequence_name : "", text_bytes);
    return tell_scheduler(client, SUBMIT_PARCEL, HEADER_BYTES + SUBMIT_PARCEL_BYTES + p->head_bytes + text_bytes);
}

static int hand_over(forebay_request *request) {
    request->route = request->model->route;
    return request->parcel ? hand_over_parcel(request) : hand_over_rows(request);
}

int forebay_cancel(forebay_request *request) {
    forebay_client *client = request->model->client;
    unsigned char *body = client->outgoing + HEADER_BYTES;
    ring *r;
    if (request->state != IN_FLIGHT || client->is_gone)
        return 0;
    request->is_cancelled = 1;
    if (request->parcel) {
        put64(body, request->parcel->token);
        return tell_scheduler(client, SUBMIT_CANCEL, HEADER_BYTES + 8);
    }
    if ((r = rung_for(request))) {
        /* It names rows, and goes a longer way than a ring: it must not meet the next request in them. */
        r->is_retired = 1;
        put64(body, r->ticket);
        put64(body + 8, request->slab->base);
        put32(body + 16, request->first);
        put32(body + 20, 0);
        return tell_scheduler_of(r->instance, client, SUBMIT_CANCEL_RUNG, HEADER_BYTES + 24);
    }
    put32(body, request->route);
    put32(body + 4, request->first);
    put64(body + 8, request->slab->base);
    return tell_scheduler(client, SUBMIT_CANCEL_RUNS, HEADER_BYTES + 16);
}

/* --- the books of what is in flight --- */

/* Give a parcel its token: the place in the books, and a number that no other had. */
static int enter_parcel(forebay_request *request) {
    forebay_client *client = request->model->client;
    uint32_t index = 0, capacity = client->parcel_capacity;
    forebay_request **grown;
    while (index < capacity && client->parcels[index])
        index++;
    if (index == capacity) {
        capacity = capacity ? 2 * capacity : 16;
        if (!(grown = realloc(client->parcels, sizeof *grown * capacity)))
            return fail(FOREBAY_NO_MEMORY, "out of memory");
        memset(grown + index, 0, sizeof *grown * (capacity - index));
        client->parcels = grown;
        client->parcel_capacity = capacity;
    }
    request->parcel->token = (uint64_t)++client->serial << 32 | index;
    client->parcels[index] = request;
    return 0;
}

static forebay_request *parcel_of(forebay_client *client, uint64_t token) {
    uint32_t index = (uint32_t)token;
    forebay_request *found = index < client->parcel_capacity ? client->parcels[index] : NULL;
    return found && found->parcel->token == token ? found : NULL;
}

static int enter(forebay_request *request) {
    int code = 0;
    if (request->parcel)
        code = enter_parcel(request);
    else
        request->slab->owners[request->first] = request;
    if (!code) {
        request->state = IN_FLIGHT;
        request->model->client->in_flight++;
    }
    return code;
}

static void leave(forebay_request *request) {
    forebay_client *client = request->model->client;
    if (request->parcel)
        client->parcels[(uint32_t)request->parcel->token] = NULL;
    else
        request->slab->owners[request->first] = NULL;
    client->in_flight--;
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
        if (model->rings[i].ticket && !model->rings[i].is_retired)
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
    if (request->parcel && (code = complete_parcel(request)))
        return code;
    while (client->in_flight >= client->outstanding_max)
        if ((code = dispatch(client, 0)))
            return code;
    if (++client->submitted % LOOK_EVERY == 0)
        look_at_door(client);
    request->attempt = 0;
    request->is_cancelled = request->is_taken = request->code = 0;
    request->enqueue_ns = now_ns();
    if ((code = enter(request)))
        return code;
    if ((code = hand_over(request))) {
        leave(request);
        request->state = PREPARED;
    }
    return code;
}

/* --- answers --- */

static void finish(forebay_request *request, int code, const char *text, size_t text_bytes) {
    leave(request);
    request->state = DONE;
    request->code = code;
    if (text_bytes >= sizeof request->text)
        text_bytes = sizeof request->text - 1;
    memcpy(request->text, text, text_bytes);
    request->text[text_bytes] = 0;
    if (request->is_orphan)
        free_request(request);
}

static void finish_text(forebay_request *request, int code, const char *text) {
    finish(request, code, text, strlen(text));
}

static void again(forebay_request *request) {
    if (request->is_cancelled)
        finish_text(request, FOREBAY_CANCELLED, "request was cancelled");
    else if (hand_over(request))
        finish_text(request, FOREBAY_GONE, error_text);
}

static void retry(forebay_request *request, int flags) {
    if (flags & FLAG_HUNG) {
        finish_text(request, FOREBAY_INTERNAL, "an instance of the model took too long and was ended");
        return;
    }
    if (request->parcel && request->parcel->response_count) {
        finish_text(request, FOREBAY_INTERNAL, "an instance of the model ended unexpectedly before its last response");
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

/* Whether requests that were made for one signature fit another. */
static int has_signature_of(const forebay_model *a, const forebay_model *b) {
    int fits = a->max_batch == b->max_batch && a->input_count == b->input_count && a->output_count == b->output_count &&
               a->takes_rows == b->takes_rows;
    for (int i = 0; fits && i < a->input_count + a->output_count; i++)
        fits = a->tensors[i].datatype == b->tensors[i].datatype && a->tensors[i].rank == b->tensors[i].rank &&
               !strcmp(a->tensors[i].name, b->tensors[i].name) &&
               !memcmp(a->tensors[i].dims, b->tensors[i].dims, sizeof(int64_t) * (size_t)a->tensors[i].rank);
    return fits;
}

/* The server has loaded the model anew: ask where it is now, and hand in again what the old route did not take. */
static void follow(forebay_request *request, int code, const char *text, size_t text_bytes) {
    forebay_model *model = request->model, *found;
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
    } else if (found->route == model->route) {
        finish(request, FOREBAY_UNAVAILABLE, text, text_bytes);
    } else if (!has_signature_of(found, model)) {
        finish_text(request, FOREBAY_UNAVAILABLE,
                    "the model was loaded anew with other inputs or outputs; open it again");
    } else {
        for (int i = 0; i < model->ring_count; i++)
            close(model->rings[i].fd);
        memcpy(model->rings, found->rings, sizeof model->rings);
        model->ring_count = found->ring_count;
        model->route = found->route;
        model->version = found->version;
        found->ring_count = 0;
        announce_rings(model->client, model);
        again(request);
    }
    clear_model(found);
    free(found);
}

static slab *slab_at(forebay_client *client, uint64_t base) {
    for (forebay_model *model = client->models; model; model = model->next)
        for (slab *s = model->slabs; s; s = s->next)
            if (s->base == base)
                return s;
    return NULL;
}

/* A worker has answered; of a parcel, `answered`, others may have answers first. */
static void set_idle(forebay_client *client, uint32_t instance, const forebay_request *answered) {
    for (forebay_model *model = client->models; model; model = model->next) {
        ring *r = ring_of(model, instance);
        if (r && (!answered || r->outstanding == answered))
            r->outstanding = NULL;
    }
}

/* Fail those requests of a RUNS_DONE that did not go well: [[run, first row, code, text, parameters] ...]. */
static void take_remarks(forebay_client *client, int count, const unsigned char *runs, const unsigned char *remarks,
                         const unsigned char *end) {
    reader r = {remarks, end, 0};
    for (int left = read_array(&r); left-- > 0 && !r.is_broken;) {
        int fields = read_array(&r), code;
        int64_t run = read_integer(&r), first = read_integer(&r);
        size_t size = 0;
        const unsigned char *text = (const unsigned char *)"";
        slab *s;
        code = fields > 2 ? (int)read_integer(&r) : 0;
        if (fields > 3)
            text = read_text(&r, &size);
        for (int i = 4; i < fields; i++)
            skip_item(&r);
        if (r.is_broken || !size || run < 0 || run >= count)
            continue;
        s = slab_at(client, get64(runs + (size_t)run * RUN_BYTES + 8));
        if (s && first >= 0 && first < (int64_t)s->capacity && s->owners[first])
            finish(s->owners[first], code ? code : FOREBAY_UNKNOWN, (const char *)text, size);
    }
}

/* Act on `count` runs that begin at `runs`. */
static void take_runs(forebay_client *client, int kind, int flags, int count, const unsigned char *runs,
                      const unsigned char *end) {
    const unsigned char *trailer = runs + (size_t)count * RUN_BYTES;
    if (trailer > end || (kind == RUNS_FAILED && trailer == end))
        return;
    if (kind == RUNS_DONE && flags & FLAG_REMARKS)
        take_remarks(client, count, runs, trailer, end);
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

/* --- replies to parcels --- */

static int datatype_named(const unsigned char *name, size_t size) {
    for (int i = 1; i < DATATYPE_COUNT; i++)
        if (strlen(datatypes[i].name) == size && !memcmp(datatypes[i].name, name, size))
            return i;
    return 0;
}

/* Read one output: [name, datatype, shape, ...]; the name is ended by a zero byte in place of what follows it. */
static int64_t *read_value(reader *r, forebay_value *value, int64_t *dims, unsigned char **name_end) {
    size_t name_bytes, size;
    const unsigned char *name = read_text(r, &name_bytes), *datatype = read_text(r, &size);
    int64_t count = 1;
    *name_end = (unsigned char *)name + name_bytes;
    value->name = (const char *)name;
    value->datatype = datatype_named(datatype, size);
    value->shape = dims;
    value->rank = read_array(r);
    for (int i = 0; i < value->rank; i++) {
        *dims = read_integer(r);
        r->is_broken |= *dims < 0 || __builtin_mul_overflow(count, *dims, &count);
        dims++;
    }
    r->is_broken |= !value->datatype;
    return dims;
}

/* Whether a value has the bytes of its shape. */
static int is_whole(const forebay_value *value) {
    uint64_t bytes = datatypes[value->datatype].item_bytes;
    for (int i = 0; i < value->rank; i++)
        if (__builtin_mul_overflow(bytes, (uint64_t)value->shape[i], &bytes))
            return 0;
    return value->datatype == FOREBAY_BYTES || bytes == value->byte_size;
}

/* Read outputs, in the arena or inline, behind those that were read before. */
static int64_t *read_values(reader *r, forebay_client *client, response *into, int count, int64_t *dims,
                            int is_inline) {
    for (int left = count; left-- > 0 && !r->is_broken;) {
        forebay_value *value = &into->values[into->value_count++];
        unsigned char *name_end;
        int fields = read_array(r);
        dims = read_value(r, value, dims, &name_end);
        if (is_inline) {
            value->data = read_text(r, &value->byte_size);
        } else {
            uint64_t offset = (uint64_t)read_integer(r), bytes = (uint64_t)read_integer(r);
            r->is_broken |= offset > client->arena_bytes || bytes > client->arena_bytes - offset;
            value->data = client->arena + (r->is_broken ? 0 : offset);
            value->byte_size = bytes;
        }
        for (int i = is_inline ? 4 : 5; i < fields; i++)
            skip_item(r);
        r->is_broken |= r->is_broken || !is_whole(value);
        /* What stood there, the type of the datatype's name, has been read. */
        *name_end = 0;
    }
    return dims;
}

/* What a reply says besides its outputs. */
typedef struct {
    int code;
    const unsigned char *text;
    size_t text_bytes;
    uint64_t needs_bytes;
} verdict;

/* Make a response of a reply's bytes, which are copied; NULL: it cannot be read. */
static response *read_reply(forebay_client *client, const unsigned char *bytes, size_t size, verdict *said) {
    response *made = calloc(1, sizeof *made);
    reader r;
    int fields, count;
    int64_t *dims;
    /* Every value and every dimension takes a byte at least. */
    if (!made || !(made->message = malloc(size + 1)) || !(made->values = calloc(size + 1, sizeof *made->values)) ||
        !(dims = made->dims = calloc(size + 1, sizeof *made->dims)))
        goto broken;
    memcpy(made->message, bytes, size);
    r = (reader){made->message, made->message + size, 0};
    fields = read_array(&r);
    if (fields > 0) {
        count = read_array(&r);
        dims = read_values(&r, client, made, count, dims, 0);
    }
    if (fields > 1) {
        count = read_array(&r);
        read_values(&r, client, made, count, dims, 1);
    }
    if (fields > 2)
        skip_item(&r); /* parameters */
    said->code = fields > 3 ? (int)read_integer(&r) : 0;
    said->text = (const unsigned char *)"";
    said->text_bytes = 0;
    if (fields > 4)
        said->text = read_text(&r, &said->text_bytes);
    if (fields > 5)
        skip_item(&r); /* index */
    said->needs_bytes = fields > 6 ? (uint64_t)read_integer(&r) : 0;
    if (!r.is_broken)
        return made;
broken:
    if (made)
        free_response(client, made);
    return NULL;
}

/* Lend a larger block for a response that did not fit. */
static void lend(forebay_request *request, uint64_t bytes, uint32_t instance) {
    forebay_client *client = request->model->client;
    parcel *p = request->parcel;
    unsigned char *message = client->outgoing;
    uint64_t token = p->token;
    block lent = {0, 0}, *grown = realloc(p->lent, sizeof *grown * ((size_t)p->lent_count + 1));
    if (grown)
        p->lent = grown;
    if (!grown || allocate(client, bytes, &lent)) {
        finish_text(request, FOREBAY_NO_MEMORY, grown ? error_text : "out of memory");
    } else {
        p->lent[p->lent_count++] = lent;
        if (bytes > request->model->reply_bytes)
            request->model->reply_bytes = bytes < REPLY_BYTES_FIRST_MAX ? bytes : REPLY_BYTES_FIRST_MAX;
    }
    put_header(message, SUBMIT_COLLECT, 0, 1, client->epoch);
    put32(message + 4, instance);
    put64(message + HEADER_BYTES, token);
    put64(message + HEADER_BYTES + 8, lent.offset);
    put64(message + HEADER_BYTES + 16, lent.bytes ? bytes : 0);
    if (send(client->submissions, message, HEADER_BYTES + 24, MSG_NOSIGNAL) < 0)
        gone(client, strerror(errno));
}

/* Keep a response until the caller takes it. */
static void keep(parcel *p, response *made) {
    if (p->lent_count) {
        made->lent = p->lent[0];
        memmove(p->lent, p->lent + 1, sizeof *p->lent * (size_t)--p->lent_count);
    }
    if (p->last)
        p->last->next = made;
    else
        p->first = made;
    p->last = made;
    p->response_count++;
}

static void take_reply(forebay_client *client, int flags, uint32_t instance, const unsigned char *body, size_t size) {
    forebay_request *request = parcel_of(client, get64(body));
    int is_final = flags & FLAG_FINAL, is_error;
    verdict said = {0};
    response *made;
    if (!request)
        return;
    if (is_final)
        set_idle(client, instance, request);
    if (!(made = read_reply(client, body + 8, size - 8, &said))) {
        finish_text(request, FOREBAY_INTERNAL, "the model's answer could not be read");
        return;
    }
    is_error = said.text_bytes || said.code;
    if (flags & FLAG_MOVED) {
        follow(request, said.code, (const char *)said.text, said.text_bytes);
    } else if (said.needs_bytes) {
        lend(request, said.needs_bytes, instance);
    } else {
        int is_response = made->value_count || !request->model->is_decoupled;
        said.code = is_error && !said.code ? FOREBAY_UNKNOWN : said.code;
        if (is_error ? !is_final : is_response) {
            made->code = said.code;
            snprintf(made->text, sizeof made->text, "%.*s", (int)said.text_bytes, (const char *)said.text);
            keep(request->parcel, made);
            made = NULL;
        }
        if (is_final)
            finish(request, said.code, (const char *)said.text, said.text_bytes);
    }
    if (made)
        free_response(client, made);
}

/* --- grants, and schedulers that were restarted --- */

static int is_among(uint64_t token, const unsigned char *tokens, int count) {
    for (int i = 0; i < count; i++)
        if (get64(tokens + 8 * i) == token)
            return 1;
    return 0;
}

/* Act on a GRANT or REVOKE; `count` tokens stand behind the latter. */
static void take_grant(forebay_client *client, int kind, int flags, uint64_t ticket, const unsigned char *body,
                       int count) {
    uint32_t route = get32(body), instance = get32(body + 4);
    for (forebay_model *model = client->models; model; model = model->next) {
        ring *r = ring_of(model, instance);
        forebay_request *running;
        if (!r || (kind == GRANT && model->route != route))
            continue;
        if (kind == GRANT) {
            r->ticket = ticket;
            r->outstanding = NULL;
            r->is_retired = 0;
            return;
        }
        if (!(flags & FLAG_GONE) && r->ticket != ticket)
            return;
        running = r->outstanding;
        r->ticket = 0;
        r->outstanding = NULL;
        if (running && running->state == IN_FLIGHT) {
            /* Everything that the worker ran was answered before this message, or is named in it. */
            if (flags & FLAG_GONE)
                retry(running, flags);
            else if (!running->parcel || !is_among(running->parcel->token, body + 16, count))
                again(running);
        }
        return;
    }
}

/* A new scheduler is up, and of what the old one had sent no worker runs anything of ours but the parcels that are named:
 * hand in again what else is left. */
static void resync(forebay_client *client, uint64_t epoch, const unsigned char *tokens, int count) {
    if (client->epoch == (uint32_t)epoch)
        return; /* Nothing of ours went to an earlier one. */
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
    for (uint32_t i = 0; i < client->parcel_capacity; i++)
        if (client->parcels[i] && !is_among(client->parcels[i]->parcel->token, tokens, count))
            again(client->parcels[i]);
}

/* Take one message of the completion doorbell; `flags` as for recv. Returns 0, FOREBAY_GONE, or -1: nothing there. */
static int dispatch(forebay_client *client, int flags) {
    unsigned char *message = client->buffer, *body = message + HEADER_BYTES + TIMES_BYTES, *end;
    int kind, count;
    uint32_t instance;
    ssize_t size;
    if (client->is_gone)
        return fail(FOREBAY_GONE, "the engine is gone");
    do
        size = recv(client->completions, message, MESSAGE_BYTES_MAX, flags);
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
    instance = get32(message + 4);
    switch (kind) {
    case RUNS_DONE:
    case RUNS_FAILED:
        set_idle(client, instance, NULL);
        /* fall through */
    case RUNS_LOST:
        if (body <= end)
            take_runs(client, kind, message[1], count, body, end);
        break;
    case PARCEL_REPLY:
        if (body + 8 <= end)
            take_reply(client, message[1], instance, body, (size_t)(end - body));
        break;
    case PARCEL_LOST:
        for (int i = 0; i < count && body + 8 * (i + 1) <= end; i++) {
            forebay_request *lost = parcel_of(client, get64(body + 8 * i));
            if (lost) {
                set_idle(client, instance, lost);
                retry(lost, message[1]);
            }
        }
        break;
    case GRANT:
    case REVOKE:
        if (size >= HEADER_BYTES + 16 + 8 * (kind == REVOKE ? count : 0))
            take_grant(client, kind, message[1], get64(message + 8), message + HEADER_BYTES, count);
        break;
    case RESYNC:
        if (size >= HEADER_BYTES + 8 * count)
            resync(client, get64(message + 8), message + HEADER_BYTES, count);
        break;
    default:
        break;
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

/* --- waiting --- */

/* Whether waiting goes on: for the end of a request, or for its next response, whichever is first. */
static int is_awaited(const forebay_request *request, int any) {
    return request->state == IN_FLIGHT && !(any && request->parcel && request->parcel->first);
}

/* Look for answers for a moment before going to sleep, as long as they have been that quick: to wake a process on an
 * idle core takes longer than many a model. */
static void glance(forebay_request *request, int any) {
    forebay_client *client = request->model->client;
    uint64_t end_ns;
    if (client->glance_misses < 0) {
        client->glance_misses++;
        return;
    }
    end_ns = now_ns() + GLANCE_NS;
    while (is_awaited(request, any) && now_ns() < end_ns)
        if (dispatch(client, MSG_DONTWAIT) > 0)
            return;
    if (!is_awaited(request, any))
        client->glance_misses = 0;
    else if (++client->glance_misses >= GLANCE_MISSES)
        client->glance_misses = -GLANCE_PAUSE;
}

/* Take one message, waiting until a time at most, or as long as it takes. */
static int dispatch_until(forebay_client *client, uint64_t deadline_ns) {
    struct pollfd readable = {.fd = client->completions, .events = POLLIN};
    uint64_t now = now_ns();
    struct timespec left = {0};
    if (client->spins)
        return dispatch(client, MSG_DONTWAIT);
    if (!deadline_ns)
        return dispatch(client, 0);
    if (now < deadline_ns) {
        left.tv_sec = (time_t)((deadline_ns - now) / 1000000000u);
        left.tv_nsec = (long)((deadline_ns - now) % 1000000000u);
    }
    return ppoll(&readable, 1, &left, NULL) == 1 ? dispatch(client, MSG_DONTWAIT) : -1;
}

/* Wait for the end of a request, or for its next response. */
static int wait_for(forebay_request *request, int any, int64_t timeout_us) {
    forebay_client *client = request->model->client;
    uint64_t deadline_ns = timeout_us < 0 ? 0 : now_ns() + (uint64_t)timeout_us * 1000;
    if (request->state == PREPARED)
        return fail(FOREBAY_INVALID_ARGUMENT, "the request was not submitted");
    if (client->can_glance && !client->spins && client->in_flight == 1 && is_awaited(request, any))
        glance(request, any);
    while (is_awaited(request, any)) {
        int code = dispatch_until(client, deadline_ns);
        if (code > 0)
            break;
        if (code < 0 && deadline_ns && now_ns() >= deadline_ns)
            return fail(FOREBAY_DEADLINE, "the deadline passed before the answer came");
    }
    return 0;
}

/* Show the caller the next response that is there. */
static int take_response(forebay_request *request) {
    parcel *p = request->parcel;
    response *next = p->first;
    if (p->current)
        free_response(request->model->client, p->current);
    p->current = next;
    p->first = next->next;
    if (!p->first)
        p->last = NULL;
    return next->code ? fail(next->code, "%s", next->text) : 0;
}

int forebay_wait(forebay_request *request, int64_t timeout_us) {
    int code = wait_for(request, 0, timeout_us);
    if (code)
        return code;
    if (request->code)
        return fail(request->code, "%s", request->text);
    return request->parcel && !request->parcel->current && request->parcel->first ? take_response(request) : 0;
}

int forebay_next(forebay_request *request, int64_t timeout_us) {
    int code = wait_for(request, 1, timeout_us);
    if (code)
        return code;
    if (request->parcel && request->parcel->first)
        return take_response(request);
    if (!request->is_taken && (request->code || !request->parcel)) {
        request->is_taken = 1;
        return request->code ? fail(request->code, "%s", request->text) : 0;
    }
    return fail(FOREBAY_END, "there is no further response");
}

/* --- one request at a time --- */

static int make_current(forebay_model *model, int rows) {
    forebay_request *current = model->current;
    if (current && current->rows == (uint32_t)rows && current->state != IN_FLIGHT)
        return 0;
    if (current)
        drop_request(current);
    model->current = NULL;
    return prepare(model, rows, model->takes_rows, &model->current);
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
    const forebay_value *value = NULL;
    if (index >= 0 && model->current && model->current->state == DONE)
        value = forebay_value_named(model->current, name);
    if (!value) {
        fail(FOREBAY_INVALID_ARGUMENT,
             index < 0 ? "model '%s' has no output '%s'" : "model '%s' has no answer with '%s'", model->name, name);
        return NULL;
    }
    if (byte_size)
        *byte_size = value->byte_size;
    return value->data;
}
