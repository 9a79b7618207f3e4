/* What a client does wrong, and what it is told: prints one line per case. */
#include "forebay_client.h"
#include <stdio.h>
static void show(int code) { printf("%d %s\n", code, forebay_error()); }
enum { ALL = 1000 };
int main(int count, char **arguments) {
    forebay_client *client; forebay_model *model, *echo; forebay_request *request, *all[ALL];
    int64_t shape[] = {2, 2}; const char *text = "text";
    show(forebay_connect("/nowhere", 0, &client));
    show(forebay_connect(arguments[1], (uint64_t)1 << 60, &client));
    if (forebay_connect(arguments[1], 1 << 20, &client)) return 1;
    show(forebay_open(client, "nobody", 0, &model));
    show(forebay_open(client, "alpha_model", 9, &model));
    if (forebay_open(client, "alpha_model", 1, &model)) return 1;
    printf("%d %d %d %s %d\n", (int)forebay_version(model), forebay_input_count(model), forebay_max_batch_size(model),
           forebay_input_at(model, 0)->name, (int)forebay_input_at(model, 0)->row_bytes);
    show(forebay_prepare(model, 65, &request));
    show(forebay_input(model, "nothing", 1) != NULL);
    show(forebay_infer(model, 1, -1));
    show(forebay_output(model, "prediction", NULL) != NULL);
    if (forebay_prepare(model, 1, &all[0])) return 1;
    request = all[0];
    show(forebay_set_options(request, &(forebay_options){.id = "me"}));
    show(forebay_shape_input(request, 0, shape, 2) != NULL);
    show(forebay_put_strings(request, 0, (int64_t[]){1, 50}, 2, &text, NULL));
    show(forebay_wait(request, -1));
    show(forebay_reconnect(client));
    if (forebay_open(client, "echo", 0, &echo) || forebay_prepare(echo, 1, &all[1])) return 1;
    request = all[1];
    count = 2;
    show(forebay_request_input(request, 0) != NULL);
    show(forebay_submit(request));
    show(forebay_shape_input(request, 0, shape, 2) != NULL);
    show(forebay_shape_input(request, 0, (int64_t[]){1 << 20}, 1) != NULL);
    while (count < ALL && !forebay_prepare(model, 64, &all[count])) count++;
    show(FOREBAY_NO_MEMORY);
    while (count--) forebay_release(all[count]);
    forebay_close(client);
    return 0;
}
