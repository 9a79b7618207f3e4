/* What the test programs of the C client begin with. */
#include "forebay_client.h"
#include <stdio.h>
#include <string.h>
enum { PATIENCE_US = 60000000 };
static forebay_client *client;
static inline void show(int code) { printf("%d %s\n", code, code ? forebay_error() : ""); }
static inline forebay_request *begin(const char *name, int rows) {
    forebay_model *model; forebay_request *request;
    return forebay_open(client, name, 0, &model) || forebay_prepare(model, rows, &request) ? NULL : request;
}
static inline int number_up(forebay_request *request, int64_t count) {
    float *x = forebay_shape_input(request, 0, &count, 1);
    for (int64_t i = 0; x && i < count; i++) x[i] = (float)i;
    return x ? forebay_submit(request) : FOREBAY_NO_MEMORY;
}
