// A host that exports what the plugin probes, with a layout and an API version of the compiler's choosing, and nothing behind it.
// usage: stub_host PLUGIN; prints what ggml_backend_init returned.
#include <dlfcn.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

static void (*log_callback)(int, const char*, void*);
static void* log_user;
uintptr_t ggml_backend_get_device(const uintptr_t* b) { return b[BACKEND_FUNCTIONS + 1]; }
uintptr_t ggml_backend_buffer_get_type(const uintptr_t* b) { return b[BUFFER_FUNCTIONS]; }
uintptr_t ggml_backend_buft_get_device(const uintptr_t* t) { return t[8]; }
void ggml_backend_dev_get_props(void* device, void* props) { (void)device, memset(props, 0, 56); }
uintptr_t ggml_graph_nodes(const uintptr_t* g) { return g[2]; }
int ggml_graph_n_nodes(const int* g) { return g[1]; }
uintptr_t ggml_get_data(const uintptr_t* t) { return t[31]; }
const char* ggml_get_name(const char* t) { return t + 256; }
const char* ggml_op_name(int op) { return op ? "?" : "NONE"; }
const char* ggml_unary_op_name(int op) {
    (void)op;
    return "?";
}
size_t ggml_nbytes(const void* t) {
    (void)t;
    return 0;
}
int ggml_backend_buffer_get_usage(void* b) {
    (void)b;
    return 0;
}
void* ggml_backend_buffer_init(void) { return 0; }
void ggml_log_set(void* callback, void* user) { memcpy(&log_callback, &callback, sizeof callback), log_user = user; }
void ggml_log_get(void** callback, void** user) { memcpy(callback, &log_callback, sizeof *callback), *user = log_user; }
void* ggml_backend_load(const char* path) {
    void* (*init)(void);
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL), *symbol = library ? dlsym(library, "ggml_backend_init") : 0;
    if (!symbol) return printf("%s\n", dlerror()), (void*)0;
    memcpy(&init, &symbol, sizeof init);
    const int* registration = init();
    if (!registration) return 0;
    if (registration[0] != API_VERSION) {
        char text[200];
        snprintf(text, sizeof text, "backend API version mismatch: %d, current: %d\n", registration[0], API_VERSION);
        if (log_callback) log_callback(4, text, log_user);
        return 0;
    }
    return (void*)registration;
}
int main(int argc, char** argv) { return argc < 2 || printf("%s\n", ggml_backend_load(argv[1]) ? "accepted" : "refused") < 0; }
