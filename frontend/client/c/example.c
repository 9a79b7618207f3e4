/* Ask alpha_model of a running server for one answer, for many at once, and for one with a time limit of its own.
 *
 *     make example && ./example [path of clients.sock]
 */
#include "forebay_client.h"

#include <stdio.h>

enum { IN_FLIGHT = 16, FEATURES = 50 };

static int give_up(void) {
    fprintf(stderr, "%s\n", forebay_error());
    return 1;
}

int main(int count, char **arguments) {
    forebay_client *client;
    forebay_model *model;
    forebay_request *requests[IN_FLIGHT];
    float *x;
    const float *y;

    if (forebay_connect(count > 1 ? arguments[1] : NULL, 0, &client) || forebay_open(client, "alpha_model", 0, &model))
        return give_up();

    /* One request: fill the input in place, run, read the output in place. */
    if (!(x = forebay_input(model, "features", 1)))
        return give_up();
    for (int i = 0; i < FEATURES; i++)
        x[i] = 0.5f;
    if (forebay_infer(model, 1, -1) || !(y = forebay_output(model, "prediction", NULL)))
        return give_up();
    printf("%.6f\n", (double)y[0]);

    /* Many in flight, answered in any order. */
    for (int k = 0; k < IN_FLIGHT; k++) {
        if (forebay_prepare(model, 1, &requests[k]))
            return give_up();
        x = forebay_request_input(requests[k], 0);
        for (int i = 0; i < FEATURES; i++)
            x[i] = (float)k / IN_FLIGHT;
        if (forebay_submit(requests[k]))
            return give_up();
    }
    for (int k = 0; k < IN_FLIGHT; k++) {
        if (forebay_wait(requests[k], 10 * 1000 * 1000))
            return give_up();
        y = forebay_request_output(requests[k], 0);
        printf("%.6f\n", (double)y[0]);
        forebay_release(requests[k]);
    }

    /* A parcel: its inputs are given shapes, and it carries more than rows can. Any model takes them. */
    if (forebay_prepare_parcel(model, 1, &requests[0]) ||
        forebay_set_options(requests[0], &(forebay_options){.id = "the last one", .timeout_us = 1000000}) ||
        !(x = forebay_shape_input(requests[0], 0, (int64_t[]){1, FEATURES}, 2)))
        return give_up();
    for (int i = 0; i < FEATURES; i++)
        x[i] = 0.5f;
    if (forebay_submit(requests[0]) || forebay_wait(requests[0], 10 * 1000 * 1000))
        return give_up();
    y = forebay_value_named(requests[0], "prediction")->data;
    printf("%.6f\n", (double)y[0]);
    forebay_release(requests[0]);
    forebay_close(client);
    return 0;
}
