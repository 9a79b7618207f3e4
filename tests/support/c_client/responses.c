/* Five responses, then none, by a model that answers as often as it likes. */
#include "common.h"

int main(int count, char **arguments) {
    forebay_request *request; int code;
    (void)count;
    if (forebay_connect(arguments[1], 0, &client) || !(request = begin("repeat", 1))) return 1;
    for (int answers = 5; answers >= 0; answers -= 5) {
        *(int *)forebay_request_input(request, 0) = answers;
        if (forebay_submit(request)) return 2;
        while (!(code = forebay_next(request, PATIENCE_US))) {
            const forebay_value *value = forebay_value_at(request, 0);
            printf("%lld %d\n", (long long)value->shape[0], ((const int *)value->data)[value->shape[0] - 1]);
        }
        show(code);
    }
    *(int *)forebay_request_input(request, 0) = 3;
    if (forebay_submit(request)) return 3;
    forebay_release(request); /* while its responses are on their way */
    forebay_close(client);
    return 0;
}
