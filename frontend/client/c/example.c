/* Ask alpha_model of a running server for one answer, and then for many at once.
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
    forebay_close(client);
    return 0;
}
