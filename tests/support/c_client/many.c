/* Runs 2000 requests, many at a time, each with its own number, and prints the answers. */
#include "forebay_client.h"
#include <stdio.h>
enum { ALL = 2000, AT_ONCE = 300 };
int main(int count, char **arguments) {
    forebay_client *client;
    forebay_model *model;
    static forebay_request *requests[ALL];
    (void)count;
    if (forebay_connect(arguments[1], 0, &client) || forebay_open(client, "alpha_model", 0, &model)) return 1;
    for (int i = 0, next = 0; i < ALL; i++) {
        for (; next < ALL && next < i + AT_ONCE; next++) {
            float *x;
            if (forebay_prepare(model, 1, &requests[next])) return 2;
            x = forebay_request_input(requests[next], 0);
            for (int k = 0; k < 50; k++) x[k] = (float)next / ALL;
            if (forebay_submit(requests[next])) return 3;
        }
        if (forebay_wait(requests[i], 60000000)) { fprintf(stderr, "%s\n", forebay_error()); return 4; }
        printf("%.9g\n", (double)*(const float *)forebay_request_output(requests[i], 0));
        forebay_release(requests[i]);
    }
    forebay_close(client);
    return 0;
}
