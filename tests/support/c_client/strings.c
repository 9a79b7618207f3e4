/* Strings there and back. */
#include "common.h"

int main(int count, char **arguments) {
    int64_t shape[] = {2, 2};
    const char *strings[] = {"one", "", "a\0b and more", "x"};
    size_t lengths[] = {3, 0, 12, 1};
    forebay_request *request; float *x;
    (void)count;
    if (forebay_connect(arguments[1], 0, &client) || !(request = begin("pair", 2))) return 1;
    if (!(x = forebay_shape_input(request, 0, shape, 2))) return 2;
    memset(x, 0, 4 * sizeof *x);
    if (forebay_put_strings(request, 1, shape, 2, strings, lengths) || forebay_submit(request)) return 3;
    if (forebay_wait(request, PATIENCE_US)) { show(4); return 4; }
    const forebay_value *value = forebay_value_named(request, "OUTPUT1");
    const char *text;
    size_t position = 0, length;
    while (forebay_next_string(value, &position, &text, &length))
        printf("%zu %d\n", length, length ? text[length - 1] : 0);
    printf("%d %d\n", forebay_value_count(request), value->rank);
    forebay_release(request);
    forebay_close(client);
    return 0;
}
