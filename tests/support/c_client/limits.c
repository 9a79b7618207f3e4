/* Waiting that ends too early, a request that is cancelled, one whose deadline passes, and one with parameters. */
#define _POSIX_C_SOURCE 199309L
#include "common.h"
#include <time.h>

int main(int count, char **arguments) {
    forebay_request *first, *second, *third;
    forebay_model *model;
    struct timespec now;
    forebay_parameter parameters[] = {{"text", "value", 0}, {"number", NULL, -7}};
    (void)count;
    if (forebay_connect(arguments[1], 0, &client)) return 1;
    first = begin("slow", 1); second = begin("slow", 1);
    if (!first || !second || number_up(first, 4) || number_up(second, 4)) { show(2); return 2; }
    show(forebay_wait(second, 1000));
    show(forebay_cancel(second));
    show(forebay_wait(second, PATIENCE_US));
    show(forebay_wait(first, PATIENCE_US));
    printf("%g\n", ((const float *)forebay_request_output(first, 0))[3]);
    if (forebay_open(client, "slow", 0, &model) || forebay_prepare_parcel(model, 1, &third)) return 3;
    if (number_up(first, 4) || number_up(second, 4)) return 4; /* both instances are busy */
    clock_gettime(CLOCK_MONOTONIC, &now);
    show(forebay_set_options(third, &(forebay_options){
        .deadline_ns = (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec + 20000000u, .id = "me"}));
    show(number_up(third, 4));
    show(forebay_wait(third, PATIENCE_US));
    show(forebay_set_options(third, &(forebay_options){.id = "me", .parameters = parameters, .parameter_count = 2}));
    show(number_up(third, 4));
    show(forebay_wait(third, PATIENCE_US));
    forebay_release(first); forebay_release(second); forebay_release(third);
    forebay_close(client);
    return 0;
}
