/* How long one request takes: latency MODEL COUNT [park|spin] [path of clients.sock]
 *
 * Sends COUNT requests of one row, one after the other, and prints each round trip in nanoseconds, one a line, after a
 * tenth as many to warm up. Inputs are all zero.
 */
#define _POSIX_C_SOURCE 199309L
#include "forebay_client.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static long long now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

static int give_up(void) {
    fprintf(stderr, "%s\n", forebay_error());
    return 1;
}

int main(int argument_count, char **arguments) {
    forebay_client *client;
    forebay_model *model;
    long count = argument_count > 2 ? atol(arguments[2]) : 0;
    long long *took;
    if (count < 1) {
        fprintf(stderr, "usage: %s MODEL COUNT [park|spin] [path]\n", arguments[0]);
        return 2;
    }
    if (forebay_connect(argument_count > 4 ? arguments[4] : NULL, 0, &client) ||
        forebay_open(client, arguments[1], 0, &model))
        return give_up();
    forebay_set_spin(client, argument_count > 3 && !strcmp(arguments[3], "spin"));
    took = malloc(sizeof *took * (size_t)count);
    if (!took)
        return 1;
    for (int i = 0; i < forebay_input_count(model); i++) {
        const forebay_tensor *tensor = forebay_input_at(model, i);
        void *input = forebay_input(model, tensor->name, 1);
        if (!input)
            return give_up();
        memset(input, 0, tensor->row_bytes);
    }
    for (long i = -count / 10; i < count; i++) {
        long long begin_ns = now_ns();
        if (forebay_infer(model, 1, -1))
            return give_up();
        if (i >= 0)
            took[i] = now_ns() - begin_ns;
    }
    for (long i = 0; i < count; i++)
        printf("%lld\n", took[i]);
    free(took);
    forebay_close(client);
    return 0;
}
