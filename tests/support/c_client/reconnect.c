/* The end of the server under a request, and, after a line on stdin, an answer of the next server. */
#include "common.h"

int main(int count, char **arguments) {
    forebay_request *request;
    forebay_model *model;
    float *x;
    (void)count;
    if (forebay_connect(arguments[1], 0, &client) || forebay_open(client, "alpha_model", 0, &model)) return 1;
    if (!(request = begin("slow", 1)) || number_up(request, 4)) return 2;
    printf("ready\n");
    fflush(stdout);
    show(forebay_wait(request, PATIENCE_US));
    show(forebay_submit(request));
    forebay_release(request);
    show(forebay_infer(model, 1, -1));
    fflush(stdout);
    getchar();
    show(forebay_reconnect(client));
    if (!(x = forebay_input(model, "features", 1))) { show(3); return 3; }
    for (int i = 0; i < 50; i++) x[i] = 0.5f;
    show(forebay_infer(model, 1, PATIENCE_US));
    printf("%.9g\n", (double)*(const float *)forebay_output(model, "prediction", NULL));
    forebay_close(client);
    return 0;
}
