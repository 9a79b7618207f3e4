/* One request whose inputs and outputs grow, then many at once, answered in any order. */
#include "common.h"

enum { AT_ONCE = 60 };
int main(int count, char **arguments) {
    forebay_request *request, *many[AT_ONCE]; const forebay_value *value;
    (void)count;
    if (forebay_connect(arguments[1], 0, &client) || !(request = begin("echo", 1))) return 1;
    for (int64_t size = 1; size < 500000; size = 9 * size + 1) {
        if (number_up(request, size) || forebay_wait(request, PATIENCE_US)) { show(2); return 2; }
        value = forebay_value_named(request, "OUTPUT0");
        printf("%s %d %d %lld %zu %g\n", value->name, value->datatype, value->rank, (long long)value->shape[0],
               value->byte_size, ((const float *)value->data)[size - 1]);
    }
    forebay_release(request);
    for (int i = 0; i < AT_ONCE; i++)
        if (!(many[i] = begin("echo", 1)) || number_up(many[i], 1 + 97 * i)) { show(3); return 3; }
    for (int i = AT_ONCE - 1; i >= 0; i--) {
        if (forebay_wait(many[i], PATIENCE_US)) { show(4); return 4; }
        value = forebay_value_at(many[i], 0);
        if (value->shape[0] != 1 + 97 * i || ((const float *)value->data)[97 * i] != (float)(97 * i)) return 5;
        forebay_release(many[i]);
    }
    forebay_close(client);
    return 0;
}
