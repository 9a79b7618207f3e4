/* A load generator for one fixed HTTP/1.1 request over many keep-alive connections.
 *
 *   load HOST PORT REQUEST_FILE CONNECTIONS IDLE_CONNECTIONS WARMUP_S DURATION_S RATE ARRIVALS TIMEOUT_S [LIMIT_US...]
 *
 * REQUEST_FILE holds the bytes of one whole request, header and body. With RATE 0 the loop is closed: every connection
 * sends its next request when the answer to the last is there. With a RATE (requests per second, all connections
 * together) the loop is open: ARRIVALS "constant", "poisson" or "bursty" (Poisson at a rate that itself changes: on average
 * 2.5 times the mean for 20 ms, then 0.625 times for 80 ms) fixes the time at which each request is meant to be sent,
 * whatever the server does; a request that finds no free connection waits, and its latency counts from the time at
 * which it was meant to be sent, so that a server which stalls cannot hide the requests it kept from being sent
 * (coordinated omission). Requests that were due but not sent when the time is up count with the time they waited.
 *
 * It is one thread around epoll, and per request one recv, one send and a share of an epoll_wait. It writes the line
 * "start" when the warm-up is over, "end" when the measured time is over, and then one JSON object; times in it are
 * microseconds. IDLE_CONNECTIONS have each made one request before the start and are then left open and silent.
 *
 * For each LIMIT_US, right answers to what was due in the measured time are counted whose latency is at most that.
 *
 * Answers must carry Content-Length. An answer counts as right when its status is 200 and its body is as long as that of
 * the first answer.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

/* ---- Latency histogram: 128 linear steps for each power of two, so a value is off by less than 0.8 %. ---- */

enum { STEP_BITS = 7, STEPS = 1 << STEP_BITS, BUCKETS = (48 - STEP_BITS + 1) * STEPS };

static uint64_t histogram[BUCKETS];
static uint64_t recorded_count, recorded_sum_ns, recorded_min_ns = UINT64_MAX, recorded_max_ns;

static int bucket_of(uint64_t ns) {
    if (ns < STEPS) return (int)ns;
    int shift = 63 - __builtin_clzll(ns) - STEP_BITS;
    int bucket = (shift + 1) * STEPS + (int)((ns >> shift) - STEPS);
    return bucket < BUCKETS ? bucket : BUCKETS - 1;
}

/* The highest value that falls into a bucket. */
static uint64_t bucket_top(int bucket) {
    if (bucket < STEPS) return (uint64_t)bucket;
    int shift = bucket / STEPS - 1;
    return ((uint64_t)(bucket % STEPS + STEPS + 1) << shift) - 1;
}

enum { LIMITS_MAX = 16 };
static uint64_t limits_ns[LIMITS_MAX], within_counts[LIMITS_MAX];
static int limit_count;

static void count_within(uint64_t ns) {
    for (int i = 0; i < limit_count; i++) within_counts[i] += ns <= limits_ns[i];
}

static void record(uint64_t ns) {
    histogram[bucket_of(ns)]++;
    recorded_count++;
    recorded_sum_ns += ns;
    if (ns < recorded_min_ns) recorded_min_ns = ns;
    if (ns > recorded_max_ns) recorded_max_ns = ns;
}

static double percentile_us(double percentile) {
    if (recorded_count == 0) return 0;
    uint64_t rank = (uint64_t)ceil(percentile / 100 * (double)recorded_count), seen = 0;
    for (int bucket = 0; bucket < BUCKETS; bucket++) {
        seen += histogram[bucket];
        if (seen >= rank && seen > 0) {
            uint64_t top = bucket_top(bucket);
            return (double)(top < recorded_max_ns ? top : recorded_max_ns) / 1e3;
        }
    }
    return (double)recorded_max_ns / 1e3;
}

/* ---- Settings and counters ---- */

static struct sockaddr_in server;
static char *request;
static size_t request_bytes;
static double rate_per_s;
static bool poisson, bursty;

static uint64_t window_start_ns, window_end_ns; /* what is measured, monotonic clock */
static uint64_t completed_count, non_200_count, length_mismatch_count, connection_error_count, idle_closed_count;
static uint64_t unanswered_count, unsent_count, due_count;
static int64_t expected_body_bytes = -1;

enum { HEADER_LIMIT = 8192, EXCERPT_LIMIT = 200 };
static char scratch[1 << 18];

typedef struct {
    int fd;
    bool idle;        /* one of IDLE_CONNECTIONS: never sends again */
    bool busy;        /* a request is being sent or answered */
    bool wants_write; /* EPOLLOUT is set */
    uint64_t due_ns;  /* when the request was meant to be sent */
    size_t sent_bytes;
    /* the answer so far */
    size_t header_bytes;
    int64_t body_left; /* -1: still in the header */
    int64_t body_bytes;
    int status;
    char header[HEADER_LIMIT + 1];
} Connection;

static int epoll_fd, timer_fd;
static Connection **free_connections;
static int free_count, open_count;

static uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void fail(const char *what) {
    fprintf(stderr, "load: %s: %s\n", what, strerror(errno));
    exit(1);
}

/* ---- When requests are due (open loop) ---- */

static uint64_t random_state = 0x9E3779B97F4A7C15u;

static double uniform(void) { /* (0, 1], xorshift64*: the same sequence in every run */
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return (double)((random_state * 0x2545F4914F6CDD1Du >> 11) + 1) / 9007199254740992.0;
}

static double next_due_ns; /* a double, so that a rate that does not divide a second keeps its fractions */

static void advance_poisson(double rate) { next_due_ns += -log(uniform()) * 1e9 / rate; }

static const double burst_rate = 2.5, lull_rate = 0.625; /* of the mean rate */
static const double burst_ns = 20e6, lull_ns = 80e6;     /* mean lengths */

static void advance_bursty(void) {
    static bool in_burst;
    static double state_end_ns;
    for (;;) {
        double from_ns = next_due_ns;
        advance_poisson(rate_per_s * (in_burst ? burst_rate : lull_rate));
        if (next_due_ns < state_end_ns) return;
        /* Arrivals have no memory: draw anew from where the rate changes. */
        next_due_ns = state_end_ns > from_ns ? state_end_ns : from_ns;
        in_burst = !in_burst;
        state_end_ns = next_due_ns - log(uniform()) * (in_burst ? burst_ns : lull_ns);
    }
}

static void advance_due(void) {
    if (next_due_ns >= (double)window_start_ns && next_due_ns < (double)window_end_ns) due_count++;
    if (bursty) advance_bursty();
    else if (poisson) advance_poisson(rate_per_s);
    else next_due_ns += 1e9 / rate_per_s;
}

/* ---- Connections ---- */

static int connect_to_server(void) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0) return -1;
    int on = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (connect(fd, (struct sockaddr *)&server, sizeof server) < 0) {
        close(fd);
        return -1;
    }
    return fd;
}

static void watch(Connection *connection, bool write) {
    struct epoll_event event = {.events = EPOLLIN | (write ? EPOLLOUT : 0u), .data.ptr = connection};
    if (epoll_ctl(epoll_fd, EPOLL_CTL_MOD, connection->fd, &event) < 0) fail("epoll_ctl");
    connection->wants_write = write;
}

static void open_connection(Connection *connection) {
    connection->fd = connect_to_server();
    connection->busy = connection->wants_write = false;
    if (connection->fd < 0) return;
    fcntl(connection->fd, F_SETFL, O_NONBLOCK);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = connection};
    if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, connection->fd, &event) < 0) fail("epoll_ctl");
    open_count++;
    if (!connection->idle) free_connections[free_count++] = connection;
}

static void lose_connection(Connection *connection) {
    close(connection->fd);
    open_count--;
    if (connection->idle) {
        idle_closed_count++;
        return;
    }
    connection_error_count++;
    if (!connection->busy) { /* it lies among the free ones: take it out before it is opened again */
        for (int i = 0; i < free_count; i++)
            if (free_connections[i] == connection) free_connections[i--] = free_connections[--free_count];
    }
    open_connection(connection);
}

static void send_more(Connection *connection) {
    while (connection->sent_bytes < request_bytes) {
        ssize_t sent = send(connection->fd, request + connection->sent_bytes, request_bytes - connection->sent_bytes,
                            MSG_NOSIGNAL);
        if (sent < 0) {
            if (errno == EINTR) continue;
            if (errno == EAGAIN) {
                if (!connection->wants_write) watch(connection, true);
                return;
            }
            lose_connection(connection);
            return;
        }
        connection->sent_bytes += (size_t)sent;
    }
    if (connection->wants_write) watch(connection, false);
}

static void start_request(Connection *connection, uint64_t due_ns) {
    connection->busy = true;
    connection->due_ns = due_ns;
    connection->sent_bytes = connection->header_bytes = 0;
    connection->body_left = -1;
    send_more(connection);
}

/* Give free connections the requests that are due; returns when the next one is (0: none before the end). */
static void start_due_requests(uint64_t now, uint64_t stop_ns) {
    if (now >= stop_ns) return;
    if (rate_per_s == 0) {
        while (free_count > 0) start_request(free_connections[--free_count], now_ns());
        return;
    }
    while (free_count > 0 && next_due_ns <= (double)now) {
        start_request(free_connections[--free_count], (uint64_t)next_due_ns);
        advance_due();
    }
}

static void finish_request(Connection *connection) {
    uint64_t now = now_ns();
    connection->busy = false;
    free_connections[free_count++] = connection;
    if (connection->status != 200) {
        non_200_count++;
        return;
    }
    if (expected_body_bytes < 0) expected_body_bytes = connection->body_bytes;
    if (connection->body_bytes != expected_body_bytes) {
        length_mismatch_count++;
        return;
    }
    bool completed_inside = now >= window_start_ns && now < window_end_ns;
    if (completed_inside) completed_count++;
    /* Open loop: what was due inside counts, however late it came; else the slowest would be left out. */
    bool due_inside = connection->due_ns >= window_start_ns && connection->due_ns < window_end_ns;
    if (rate_per_s > 0 ? due_inside : completed_inside) {
        record(now - connection->due_ns);
        count_within(now - connection->due_ns);
    }
}

/* Parse the status and Content-Length of a complete header; false if it has none. */
static bool parse_header(Connection *connection) {
    char *line = connection->header;
    if (sscanf(line, "HTTP/1.%*d %d", &connection->status) != 1) return false;
    while ((line = strstr(line, "\r\n")) != NULL) {
        line += 2;
        if (strncasecmp(line, "content-length:", 15) == 0) {
            connection->body_left = connection->body_bytes = strtoll(line + 15, NULL, 10);
            return connection->body_left >= 0;
        }
    }
    return false;
}

/* The beginning of the first answer that was not 200; its body may come in pieces. */
static const Connection *error_connection;
static int error_status;
static char error_excerpt[EXCERPT_LIMIT + 1];
static size_t error_bytes;

static void keep_first_error(const Connection *connection, const char *body, size_t count) {
    if (connection->status == 200) return;
    if (error_connection == NULL) {
        error_connection = connection;
        error_status = connection->status;
    }
    bool is_first_answer = error_connection == connection && non_200_count == 0;
    for (size_t i = 0; is_first_answer && i < count && error_bytes < EXCERPT_LIMIT; i++) {
        bool is_plain = body[i] >= 0x20 && body[i] <= 0x7e && body[i] != '\\';
        error_excerpt[error_bytes++] = is_plain ? (body[i] == '"' ? '\'' : body[i]) : ' ';
    }
}

/* Take received bytes; false if they are no answer to one request. */
static bool take(Connection *connection, const char *bytes, size_t count) {
    if (!connection->busy) return false;
    if (connection->body_left < 0) {
        size_t before = connection->header_bytes;
        size_t copied = count < HEADER_LIMIT - before ? count : HEADER_LIMIT - before;
        memcpy(connection->header + before, bytes, copied);
        connection->header_bytes += copied;
        connection->header[connection->header_bytes] = 0;
        char *end = memmem(connection->header, connection->header_bytes, "\r\n\r\n", 4);
        if (end == NULL) return connection->header_bytes < HEADER_LIMIT;
        end[2] = 0;
        size_t taken = (size_t)(end + 4 - connection->header) - before;
        if (!parse_header(connection)) return false;
        bytes += taken;
        count -= taken;
    }
    keep_first_error(connection, bytes, count);
    if ((int64_t)count > connection->body_left) return false;
    connection->body_left -= (int64_t)count;
    if (connection->body_left == 0) finish_request(connection);
    return true;
}

static void receive(Connection *connection) {
    ssize_t received = recv(connection->fd, scratch, sizeof scratch, 0);
    if (received < 0 && (errno == EAGAIN || errno == EINTR)) return;
    if (received <= 0 || !take(connection, scratch, (size_t)received)) lose_connection(connection);
}

/* Make one request on a connection and wait for its answer, then leave it open. */
static void use_once(Connection *connection) {
    fcntl(connection->fd, F_SETFL, 0);
    connection->busy = true;
    connection->header_bytes = connection->sent_bytes = 0;
    connection->body_left = -1;
    connection->due_ns = 0;
    for (size_t sent = 0; sent < request_bytes;) {
        ssize_t more = send(connection->fd, request + sent, request_bytes - sent, MSG_NOSIGNAL);
        if (more <= 0) fail("an idle connection's request");
        sent += (size_t)more;
    }
    while (connection->busy) {
        ssize_t received = recv(connection->fd, scratch, sizeof scratch, 0);
        if (received <= 0 || !take(connection, scratch, (size_t)received)) fail("an idle connection's answer");
    }
    free_count--; /* finish_request counted it as free */
    fcntl(connection->fd, F_SETFL, O_NONBLOCK);
}

static double cpu_us(void) {
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) * 1e6 +
           (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec);
}

static void read_request(const char *path) {
    FILE *file = fopen(path, "rb");
    if (file == NULL) fail(path);
    fseek(file, 0, SEEK_END);
    request_bytes = (size_t)ftell(file);
    rewind(file);
    request = malloc(request_bytes + 1);
    if (request == NULL || fread(request, 1, request_bytes, file) != request_bytes) fail(path);
    fclose(file);
}

static void arm_timer(uint64_t at_ns) {
    struct itimerspec when = {.it_value = {.tv_sec = (time_t)(at_ns / 1000000000u), .tv_nsec = (long)(at_ns % 1000000000u)}};
    timerfd_settime(timer_fd, TFD_TIMER_ABSTIME, &when, NULL);
}

int main(int argc, char **argv) {
    if (argc < 11 || argc > 11 + LIMITS_MAX) {
        fprintf(stderr, "usage: load HOST PORT REQUEST_FILE CONNECTIONS IDLE_CONNECTIONS WARMUP_S DURATION_S RATE "
                        "constant|poisson|bursty TIMEOUT_S [LIMIT_US...]\n");
        return 2;
    }
    server.sin_family = AF_INET;
    server.sin_port = htons((uint16_t)atoi(argv[2]));
    if (inet_pton(AF_INET, argv[1], &server.sin_addr) != 1) {
        fprintf(stderr, "load: %s is not an IPv4 address\n", argv[1]);
        return 2;
    }
    read_request(argv[3]);
    int busy_count = atoi(argv[4]), idle_count = atoi(argv[5]);
    double warmup_s = atof(argv[6]), duration_s = atof(argv[7]), timeout_s = atof(argv[10]);
    rate_per_s = atof(argv[8]);
    poisson = strcmp(argv[9], "poisson") == 0;
    bursty = strcmp(argv[9], "bursty") == 0;
    for (int i = 11; i < argc; i++) limits_ns[limit_count++] = (uint64_t)(atof(argv[i]) * 1e3);

    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);

    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    Connection *connections = calloc((size_t)(busy_count + idle_count), sizeof *connections);
    free_connections = calloc((size_t)(busy_count + 1), sizeof *free_connections);
    if (epoll_fd < 0 || timer_fd < 0 || connections == NULL || free_connections == NULL) fail("start");
    struct epoll_event timer_event = {.events = EPOLLIN, .data.ptr = NULL};
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, timer_fd, &timer_event);

    for (int i = 0; i < idle_count; i++) {
        connections[i].idle = true;
        open_connection(&connections[i]);
        if (connections[i].fd < 0) fail("connect");
        use_once(&connections[i]);
    }
    for (int i = idle_count; i < idle_count + busy_count; i++) {
        open_connection(&connections[i]);
        if (connections[i].fd < 0) fail("connect");
    }

    uint64_t begin_ns = now_ns();
    window_start_ns = begin_ns + (uint64_t)(warmup_s * 1e9);
    window_end_ns = window_start_ns + (uint64_t)(duration_s * 1e9);
    uint64_t give_up_ns = window_end_ns + (uint64_t)(timeout_s * 1e9);
    next_due_ns = (double)begin_ns;
    double cpu_start_us = 0, cpu_end_us = 0;
    bool started = false, ended = false;
    struct epoll_event events[256];

    for (;;) {
        uint64_t now = now_ns();
        if (!started && now >= window_start_ns) {
            started = true;
            cpu_start_us = cpu_us();
            puts("start");
            fflush(stdout);
        }
        if (!ended && now >= window_end_ns) {
            start_due_requests(window_end_ns - 1, window_end_ns); /* what fell due since the last look */
            ended = true;
            cpu_end_us = cpu_us();
            puts("end");
            fflush(stdout);
        }
        start_due_requests(now, window_end_ns);
        if (ended && (free_count == busy_count || now >= give_up_ns)) break;
        if (open_count == 0) {
            fprintf(stderr, "load: the server is gone\n");
            return 1;
        }
        uint64_t wake_ns = !started ? window_start_ns : !ended ? window_end_ns : give_up_ns;
        if (rate_per_s > 0 && !ended && free_count > 0 && next_due_ns < (double)wake_ns) wake_ns = (uint64_t)next_due_ns + 1;
        static uint64_t armed_ns;
        if (wake_ns != armed_ns) arm_timer(armed_ns = wake_ns);
        int count = epoll_wait(epoll_fd, events, 256, -1);
        for (int i = 0; i < count; i++) {
            Connection *connection = events[i].data.ptr;
            if (connection == NULL) {
                uint64_t expirations;
                if (read(timer_fd, &expirations, sizeof expirations) > 0) armed_ns = 0;
                continue;
            }
            if (events[i].events & EPOLLOUT && connection->busy) send_more(connection);
            if (events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) receive(connection);
            /* At once, not after the other events: a closed loop's latency begins where the last answer ended. */
            if (rate_per_s == 0 && free_count > 0) start_due_requests(now, window_end_ns);
        }
    }

    uint64_t finished_ns = now_ns();
    for (int i = idle_count; i < idle_count + busy_count; i++) {
        if (!connections[i].busy) continue;
        unanswered_count++;
        if (rate_per_s > 0 && connections[i].due_ns >= window_start_ns) record(finished_ns - connections[i].due_ns);
    }
    if (rate_per_s > 0) {
        for (; next_due_ns < (double)window_end_ns; advance_due()) {
            unsent_count++;
            if (next_due_ns >= (double)window_start_ns) record(finished_ns - (uint64_t)next_due_ns);
        }
    }
    printf("{\"duration_s\": %.6f, \"completed_count\": %lu, \"non_200_count\": %lu, \"length_mismatch_count\": %lu, "
           "\"connection_error_count\": %lu, \"idle_closed_count\": %lu, \"unanswered_count\": %lu, \"unsent_count\": %lu, "
           "\"body_bytes\": %ld, \"first_error_status\": %d, \"first_error\": \"%s\", \"client_cpu_us\": %.1f, "
           "\"mean_us\": %.2f, \"min_us\": %.2f, \"max_us\": %.2f, "
           "\"p50_us\": %.2f, \"p75_us\": %.2f, \"p90_us\": %.2f, \"p95_us\": %.2f, \"p99_us\": %.2f, \"p99_9_us\": %.2f, "
           "\"due_count\": %lu, \"within_counts\": [",
           duration_s, completed_count, non_200_count, length_mismatch_count, connection_error_count, idle_closed_count,
           unanswered_count, unsent_count, (long)expected_body_bytes, error_status, error_excerpt,
           cpu_end_us - cpu_start_us, recorded_count ? (double)recorded_sum_ns / 1e3 / (double)recorded_count : 0,
           recorded_count ? (double)recorded_min_ns / 1e3 : 0, (double)recorded_max_ns / 1e3, percentile_us(50),
           percentile_us(75), percentile_us(90), percentile_us(95), percentile_us(99), percentile_us(99.9), due_count);
    for (int i = 0; i < limit_count; i++) printf("%s%lu", i ? ", " : "", within_counts[i]);
    puts("]}");
    return 0;
}
