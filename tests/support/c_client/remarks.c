/* Requests in rows of a Python model, many at once: some are answered, some refused, some answered with parameters. */
#include "common.h"

enum { AT_ONCE = 30, WIDTH = 4 };

int main(int count, char **arguments) {
    forebay_request *requests[AT_ONCE];
    (void)count;
    if (forebay_connect(arguments[1], 0, &client)) return 1;
    for (int i = 0; i < AT_ONCE; i++) {
        float *x;
        if (!(requests[i] = begin("rows", 1)) || !(x = forebay_request_input(requests[i], 0))) { show(2); return 2; }
        for (int k = 0; k < WIDTH; k++) x[k] = (float)i;
        if (i % 3) x[0] = i % 3 == 1 ? -1 : -6; /* an error; parameters */
        if (forebay_submit(requests[i])) return 3;
    }
    for (int i = 0; i < AT_ONCE; i++) {
        int code = forebay_wait(requests[i], PATIENCE_US);
        if (code) show(code);
        else printf("%g\n", ((const float *)forebay_value_named(requests[i], "OUT")->data)[1]);
        forebay_release(requests[i]);
    }
    forebay_close(client);
    return 0;
}
