// Upstream's test-backend-ops with one mode more, `cases`: every case that its `test` mode knows, graphs of several ops too, which `support`
// leaves out and no other mode names without running them. A line each: op, parameters, 1 where it is such a graph.

#define main upstream_main
#include "test-backend-ops.cpp"
#undef main

static int list_cases() {
    for (const auto& test : make_test_cases_eval()) {
        test->mode = MODE_SUPPORT;  // else tensors get sentinels beside them
        const ggml_init_params params = {
            /* .mem_size = */ ggml_tensor_overhead() * 128 + ggml_graph_overhead(),
            /* .mem_base = */ NULL,
            /* .no_alloc = */ true,
        };
        ggml_context_ptr ctx(ggml_init(params));
        ggml_context_ptr ctx_weights(test->use_weight_context() ? ggml_init(params) : nullptr);
        test->gf = ggml_new_graph(ctx.get());
        ggml_tensor* out = test->build_graph(ctx.get(), ctx_weights.get());
        printf("%s\t%s\t%d\n", test->op_desc(out).c_str(), test->vars().c_str(), (int)test->run_whole_graph());
    }
    return 0;
}

int main(int argc, char** argv) { return argc == 2 && strcmp(argv[1], "cases") == 0 ? list_cases() : upstream_main(argc, argv); }
