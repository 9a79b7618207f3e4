/* Inputs whose values are shapes: no batch dimension, and requests share a batch only if the values are equal. */
#include "forebay_client.c"

enum { ARENA = 4096, ROWS = 2 };

static forebay_client client;
static int64_t x_dims[] = {3}, size_dims[] = {2};
static forebay_tensor tensors[] = {
    {.name = "x", .datatype = 11, .rank = 1, .dims = x_dims, .row_bytes = 12},
    {.name = "size", .datatype = 8, .rank = 1, .dims = size_dims, .row_bytes = 8},
};
static unsigned char flags[] = {0, FLAG_SHAPE_TENSOR};
static forebay_model model = {
    .client = &client, .name = "m", .max_batch = 8, .input_count = 2, .tensors = tensors, .tensor_flags = flags};

/* Return the key of a request, or 0 if one of its inputs cannot have its shape. */
static uint64_t key_of(int32_t height, int32_t width) {
    given_input inputs[2] = {{.place = {.offset = 64, .bytes = 64}}, {.place = {.offset = 128, .bytes = 64}}};
    parcel parcel = {.inputs = inputs};
    forebay_request request = {.model = &model, .parcel = &parcel, .rows = ROWS};
    const int64_t batched[] = {ROWS, 2};
    int32_t *size = forebay_request_input(&request, 1);
    if (!forebay_request_input(&request, 0) || !size || inputs[0].rank != 2 || inputs[1].rank != 1)
        return 0;
    size[0] = height, size[1] = width;
    return forebay_shape_input(&request, 1, batched, 2) ? 0 : shape_key_of(&request);
}

int main(void) {
    client.arena = calloc(1, ARENA);
    client.arena_bytes = ARENA;
    printf("%d %d %d\n", key_of(4, 6) != 0, key_of(4, 6) == key_of(4, 6), key_of(4, 6) == key_of(6, 4));
    free(client.arena);
    return 0;
}
