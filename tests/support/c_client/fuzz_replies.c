/* Replies with some bytes changed, or cut short: read or refused, and never anything beyond what is there. */
#include "forebay_client.c"

enum { ROUNDS = 300000, ARENA = 4096 };

static size_t make_reply(unsigned char *bytes, size_t capacity) {
    writer w = {bytes, 0, capacity};
    write_array(&w, 7);
    write_array(&w, 1); /* in the arena: FP32 [2, 3] */
    write_array(&w, 5);
    write_text(&w, "OUT");
    write_text(&w, "FP32");
    write_array(&w, 2);
    write_integer(&w, 2);
    write_integer(&w, 3);
    write_unsigned(&w, 64);
    write_unsigned(&w, 24);
    write_array(&w, 1); /* inline: one string */
    write_array(&w, 4);
    write_text(&w, "TEXT");
    write_text(&w, "BYTES");
    write_array(&w, 1);
    write_integer(&w, 1);
    write_number(&w, 0xc4, 5, 1);
    write_bytes(&w, "\1\0\0\0x", 5);
    write_map(&w, 1);
    write_text(&w, "key");
    write_integer(&w, -5);
    write_integer(&w, 0);
    write_text(&w, "");
    write_integer(&w, 0);
    write_integer(&w, 0);
    return w.size;
}

/* Touch everything that a caller may. */
static unsigned use(const response *r) {
    unsigned sum = 0;
    for (int i = 0; i < r->value_count; i++) {
        const forebay_value *value = &r->values[i];
        const unsigned char *data = value->data;
        size_t position = 0, length;
        const char *text;
        sum += (unsigned)strlen(value->name);
        for (size_t k = 0; k < value->byte_size; k++) sum += data[k];
        while (forebay_next_string(value, &position, &text, &length))
            sum += length ? (unsigned char)text[length - 1] : 0;
    }
    return sum;
}

int main(void) {
    unsigned char good[256];
    size_t whole = make_reply(good, sizeof good);
    forebay_client *client = calloc(1, sizeof *client);
    unsigned seed = 1, sum = 0;
    long read = 0;
    client->arena = calloc(1, ARENA);
    client->arena_bytes = ARENA;
    for (int round = 0; round < ROUNDS; round++) {
        size_t size = rand_r(&seed) % 5 ? whole : (size_t)rand_r(&seed) % (whole + 1);
        unsigned char *bytes = malloc(size + !size);
        response *found;
        verdict said = {0};
        memcpy(bytes, good, size);
        for (int changes = round ? rand_r(&seed) % 4 : 0; changes-- && size;)
            bytes[rand_r(&seed) % size] = (unsigned char)rand_r(&seed);
        if ((found = read_reply(client, bytes, size, &said))) {
            read++;
            sum += use(found);
            free_response(client, found);
        }
        free(bytes);
    }
    free(client->arena);
    free(client);
    printf("%d %d\n", read > ROUNDS / 100, sum > 0);
    return 0;
}
